import itertools

import numpy as np
import pytest
import torch
from conftest import some_predictors
from hypothesis import given
from hypothesis import strategies as st

from helpers.sae import SAE, train

D, M, K = 16, 24, 3


def dictionary(seed=0):
    rows = torch.randn(M, D, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def sparse_data(batch_size=256, seed=1):
    """Endless sums of exactly K of the dictionary's M rows."""
    g = torch.Generator().manual_seed(seed)
    rows = dictionary()
    while True:
        active = torch.rand(batch_size, M, generator=g).topk(K).indices
        z = torch.zeros(batch_size, M).scatter(1, active, 0.5 + torch.rand(batch_size, K, generator=g))
        yield z @ rows + 1


def trained_on_sparse_data(seed=0, n_steps=400):
    return train(sparse_data(), D, 2 * M, K, n_steps=n_steps, learning_rate=3e-3, dead_after=5000, seed=seed)


@pytest.fixture(scope="module")
def trained():
    return trained_on_sparse_data()


def random_sae(seed=0, threshold=0.3, n_latents=M):
    sae = SAE(D, n_latents, K, seed)
    g = torch.Generator().manual_seed(seed + 1)
    sae.b_enc.data = 0.1 * torch.randn(n_latents, generator=g)
    sae.b_dec.data = torch.randn(D, generator=g)
    sae.threshold.fill_(threshold)
    return sae.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "n_latents, k, named", [(8, 9, "k is 9.*1 to 8"), (8, 0, "k is 0.*1 to 8"), (8, -1, "k is -1"), (0, 1, "n_latents is 0")]
)
def test_sizes_that_cannot_be_are_refused_by_name(n_latents, k, named):
    with pytest.raises(ValueError, match=named):
        SAE(4, n_latents, k)
    with pytest.raises(ValueError, match=named):
        train(iter([torch.zeros(2, 4)]), 4, n_latents, k, n_steps=1)


def test_every_latent_may_be_active():
    y = torch.randn(5, 4)
    sae = SAE(4, 6, 6)
    assert torch.equal(sae.batch_topk(sae.preactivations(y)), sae.preactivations(y))


def test_the_encoder_starts_as_the_decoders_transpose():
    sae = SAE(D, M, K, seed=3)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))


def test_codes_and_reconstruction_follow_the_formula():
    sae = random_sae()
    y = torch.randn(7, D)
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, n).double().numpy() for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    pre = np.maximum((y.double().numpy() - b_dec) @ W_enc + b_enc, 0)
    z = pre * (pre > 0.3)
    np.testing.assert_allclose(sae.preactivations(y), pre, atol=1e-5)
    np.testing.assert_allclose(sae.encode(y), z, atol=1e-5)
    np.testing.assert_allclose(sae(y), z @ W_dec + b_dec, atol=1e-5)
    assert 0 < (z > 0).mean() < (pre > 0).mean()


@given(seed=st.integers(0, 1000), order=st.permutations(range(12)), cut=st.integers(1, 11))
def test_a_code_does_not_depend_on_its_batch(seed, order, cut):
    sae = random_sae(seed)
    y = torch.randn(12, D, generator=torch.Generator().manual_seed(seed))
    order = torch.tensor(order)
    together = sae.encode(y)
    torch.testing.assert_close(torch.cat([sae.encode(y[order[:cut]]), sae.encode(y[order[cut:]])]), together[order])
    torch.testing.assert_close(sae.encode(torch.cat([y, 100 * y]))[:12], together)


@given(seed=st.integers(0, 1000), n=st.integers(1, 40), k=st.integers(1, M))
def test_batch_topk_keeps_the_k_times_batch_largest(seed, n, k):
    z = torch.rand(n, M, generator=torch.Generator().manual_seed(seed)) + 0.01
    kept = SAE(D, M, k).batch_topk(z)
    assert (kept > 0).sum() == k * n
    smallest = np.sort(z.numpy().ravel())[-k * n]
    assert torch.equal(kept, z * (z >= smallest))


@pytest.mark.parametrize("kind", ["dense", "sparse", "concentrated"])
@pytest.mark.parametrize("n_latents", [1000, 1024])
def test_batch_topk_of_a_large_batch_is_exact_too(kind, n_latents):
    n = 300
    z = torch.rand(n, n_latents, generator=torch.Generator().manual_seed(0)) + 0.01
    if kind == "sparse":
        z *= z > 1.005
    if kind == "concentrated":
        z[:, 1:] *= 1e-3
    kept = SAE(2, n_latents, K).batch_topk(z)
    expected = np.sort(z.numpy().ravel())[-K * n :]
    assert np.array_equal(np.sort(kept.numpy().ravel())[-K * n :], expected)
    assert (kept > 0).sum() == (expected > 0).sum()
    assert torch.equal(kept[kept > 0], z[kept > 0])


# --- training -----------------------------------------------------------------------------------


def test_decoder_rows_have_unit_norm_after_training(trained):
    sae, _ = trained
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(2 * M), atol=1e-5, rtol=0)


def best_match(sae):
    """For each true row, the largest cosine with a decoder row."""
    return (dictionary() @ sae.W_dec.detach().T).amax(1)


def test_training_finds_the_dictionary_that_made_the_data(trained):
    sae, _ = trained
    found, chance = best_match(sae), best_match(SAE(D, 2 * M, K, seed=5))
    print(f"mean best cosine {found.mean():.3f}, untrained {chance.mean():.3f}")
    assert found.mean() > 0.9 > 0.7 > chance.mean()


def test_training_explains_held_out_data_with_about_k_codes(trained):
    sae, _ = trained
    y = next(sparse_data(2000, seed=9))
    with torch.no_grad():
        fvu = ((y - sae(y)) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        l0 = (sae.encode(y) > 0).sum(1).float().mean()
    assert fvu < 0.15
    assert K / 2 < l0 < 2 * K
    assert sae.threshold > 0


def test_the_history_tells_what_happened(trained):
    _, history = trained
    assert history.step == [*range(0, 400, 10), 399]
    assert len(history.fvu) == len(history.l0) == len(history.alive) == len(history.step)
    assert history.fvu[-1] < 0.5 * history.fvu[0]
    assert all(0 <= a <= 1 for a in history.alive) and history.seconds > 0


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trained_on_sparse_data(seed, n_steps=30)[0].save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("seed", [1, 2])
def test_the_auxiliary_loss_revives_dead_latents(seed):
    def run(**aux):
        batches = sparse_data()
        off_centre = itertools.chain([next(batches) + 1], batches)  # b_dec starts in the wrong place: latents fall silent
        return train(off_centre, D, M, K, n_steps=300, learning_rate=1e-2, dead_after=2000, seed=seed, **aux)[1]

    revived, left_dead = run(), run(aux_coefficient=0.0)
    assert min(revived.alive) < 0.7
    assert revived.alive[-1] > left_dead.alive[-1] + 0.1
    assert revived.fvu[-1] < left_dead.fvu[-1]


def test_a_loss_that_is_not_finite_stops_training_and_names_the_step():
    good = next(sparse_data())
    batches = iter([good, good, good * float("nan"), good])
    with pytest.raises(FloatingPointError, match="mine: .* at step 2; lower learning_rate"):
        train(batches, D, M, K, n_steps=4, label="mine")


# --- files --------------------------------------------------------------------------------------


def test_a_saved_sae_comes_back(tmp_path, trained):
    sae, _ = trained
    sae.save(tmp_path / "sae.safetensors", {"trained_in": "residual"})
    loaded, record = SAE.load(tmp_path / "sae.safetensors")
    assert record == {"trained_in": "residual", "d_in": D, "n_latents": 2 * M, "k": K}
    y = next(sparse_data())
    assert torch.equal(loaded.encode(y), sae.encode(y)) and torch.equal(loaded(y), sae(y))
    assert loaded.threshold == sae.threshold and not loaded.training


@pytest.mark.parametrize("keep", [0, 7, 100, -3])
def test_a_damaged_file_is_named(tmp_path, keep):
    path = tmp_path / "sae.safetensors"
    random_sae().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="sae.safetensors is damaged"):
        SAE.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        SAE.load(tmp_path / "absent.safetensors")


def test_a_file_that_holds_no_sae_is_named(tmp_path):
    some_predictors().save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors does not hold an SAE"):
        SAE.load(tmp_path / "other.safetensors")
