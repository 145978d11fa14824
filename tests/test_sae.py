import itertools
import json
import multiprocessing
import random
import signal
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import some_predictors
from hypothesis import given
from hypothesis import strategies as st

from helpers.files import load_tensors, save_tensors
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
        z = torch.zeros(batch_size, M).scatter(
            1, active, 0.5 + torch.rand(batch_size, K, generator=g)
        )
        yield z @ rows + 1


def trained_on_sparse_data(seed=0, n_steps=400, **changes):
    return train(
        sparse_data(),
        D,
        2 * M,
        K,
        **{"n_steps": n_steps, "learning_rate": 3e-3, "dead_after": 5000, "seed": seed} | changes,
    )


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
    "n_latents, k, named",
    [
        (8, 9, "k is 9.*1 to 8"),
        (8, 0, "k is 0.*1 to 8"),
        (8, -1, "k is -1"),
        (0, 1, "n_latents is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(n_latents, k, named):
    with pytest.raises(ValueError, match=named):
        SAE(4, n_latents, k)
    with pytest.raises(ValueError, match=named):
        train(iter([torch.zeros(2, 4)]), 4, n_latents, k, n_steps=1)


def test_the_encoder_starts_as_the_decoders_transpose():
    sae = SAE(D, M, K, seed=3)
    assert torch.equal(sae.W_enc, sae.W_dec.T) and sae.W_enc.T.is_contiguous()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))


def test_codes_and_reconstruction_follow_the_formula():
    sae = random_sae()
    y = torch.randn(7, D)
    W_enc, b_enc, W_dec, b_dec = (
        getattr(sae, n).double().numpy() for n in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
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
    torch.testing.assert_close(
        torch.cat([sae.encode(y[order[:cut]]), sae.encode(y[order[cut:]])]), together[order]
    )
    torch.testing.assert_close(sae.encode(torch.cat([y, 100 * y]))[:12], together)


# --- each update, against plain autograd --------------------------------------------------------


def naive_train(
    batches,
    d_in,
    n_latents,
    k,
    *,
    n_steps,
    learning_rate,
    aux_coefficient,
    dead_after,
    seed,
    accumulate,
):
    """What `train` should do, written densely: the SAE, the loss of each update and how many latents were dead."""
    sae = SAE(d_in, n_latents, k, seed)
    optimiser = torch.optim.Adam(sae.parameters(), fused=False, foreach=False)
    since_fired, fvus, n_dead = torch.zeros(n_latents), [], []
    for step, y in zip(range(n_steps), batches):
        if step == 0:
            sae.b_dec.data = y.mean(0)
        warm, decay = (
            (step + 1) / (0.05 * n_steps + 1),
            max(0.01, (n_steps - step) / (0.2 * n_steps)),
        )
        optimiser.param_groups[0]["lr"] = learning_rate * min(1, warm, decay)
        dead = since_fired >= dead_after
        since_fired += len(y)
        parts, loss, fvu = y.chunk(accumulate), 0, 0
        for part in parts:
            pre = (part - sae.b_dec) @ sae.W_enc + sae.b_enc
            cut = pre.detach().flatten().sort(descending=True).values[k * len(part) - 1]
            z = torch.relu(pre) * (pre >= cut)
            error = part - sae.decode(z)
            part_fvu = error.pow(2).sum() / (part - part.mean(0)).pow(2).sum()
            fvu, loss = fvu + part_fvu.item() / len(parts), loss + part_fvu / len(parts)
            if dead.any():
                z_dead = torch.relu(pre[:, dead])
                top = z_dead.topk(min(int(dead.sum()), max(1, d_in // 2)), dim=1)
                left = error.detach()
                again = (
                    torch.zeros_like(z_dead).scatter(1, top.indices, top.values) @ sae.W_dec[dead]
                )
                loss = loss + aux_coefficient * (left - again).pow(2).sum() / left.pow(
                    2
                ).sum() / len(parts)
            since_fired[(z > 0).any(0)] = 0
            if cut > 0:
                sae.threshold.lerp_(cut, 1.0 if step == 0 else 0.02)
        optimiser.zero_grad()
        loss.backward()
        grad = sae.W_dec.grad
        grad -= (grad * sae.W_dec.detach()).sum(1, keepdim=True) * sae.W_dec.detach()
        optimiser.step()
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
        fvus.append(fvu)
        n_dead.append(int(dead.sum()))
    return sae, fvus, n_dead


PLAIN = {
    "n_steps": 10,
    "learning_rate": 1e-2,
    "aux_coefficient": 1 / 32,
    "dead_after": 50_000,
    "seed": 0,
    "accumulate": 1,
}
SETTINGS = {
    "one update": (64, M, K, {"n_steps": 1}),
    "two updates": (64, M, K, {"n_steps": 2}),
    "ten updates": (64, M, K, {}),
    "dead latents": (64, 2 * M, 1, {"dead_after": 100}),
    "more dead than the loss takes": (20, 6 * M, 1, {"dead_after": 10, "aux_coefficient": 0.5}),
    "fewer positive than k · batch": (64, M, M, {}),
    "three parts": (64, M, K, {"accumulate": 3}),
    "three parts, dead latents": (64, 2 * M, 1, {"accumulate": 3, "dead_after": 100}),
    "fewer parts than asked for": (9, M, K, {"accumulate": 4}),
    "large enough for a sample": (1000, 200, 5, {"n_steps": 2}),
    "no aux": (64, 2 * M, 1, {"dead_after": 100, "aux_coefficient": 0.0}),
}


@pytest.fixture
def precise():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def both(batch_size, n_latents, k, changes):
    data = [
        y.to(torch.get_default_dtype())
        for y in itertools.islice(sparse_data(batch_size), PLAIN["n_steps"])
    ]
    expected, fvus, n_dead = naive_train(data, D, n_latents, k, **PLAIN | changes)
    sae, history = train(data, D, n_latents, k, **PLAIN | changes, log_every=1)
    return sae, history, expected, fvus, n_dead


@pytest.mark.parametrize("name", SETTINGS)
def test_updates_are_those_of_autograd_and_a_dense_top_k(precise, name):
    batch_size, n_latents, k, changes = SETTINGS[name]
    sae, history, expected, fvus, n_dead = both(batch_size, n_latents, k, changes)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(
            sae.state_dict()[key], value, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )
    np.testing.assert_allclose(history.fvu, fvus, rtol=1e-9)
    np.testing.assert_allclose(history.alive, 1 - np.array(n_dead) / n_latents)
    assert ("dead" in name or name == "no aux") == any(n_dead)


@pytest.mark.parametrize(
    "name",
    [
        "ten updates",
        "dead latents",
        "fewer positive than k · batch",
        "three parts",
        "large enough for a sample",
    ],
)
def test_in_float32_they_are_so_to_rounding(name):
    sae, history, expected, fvus, _ = both(*SETTINGS[name])
    np.testing.assert_allclose(history.fvu, fvus, rtol=1e-3)
    for key, value in expected.state_dict().items():
        off = (sae.state_dict()[key] - value).abs()
        assert off.mean() < 1e-4 and off.max() < 1e-2, key


@pytest.mark.parametrize("kind", ["dense", "sparse", "concentrated", "tied"])
@pytest.mark.parametrize("n_latents", [1000, 1024])
def test_the_largest_of_a_large_batch_are_found_however_they_lie(kind, n_latents):
    """Codes chosen by a sample of them must be the k · batch largest: the threshold tells the smallest."""
    n, d = 300, 4
    y = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    if kind == "sparse":
        y[5:] = 0
    if kind == "concentrated":
        y[:, 1:] *= 1e-3
    if kind == "tied":
        y = y[:1].sign().repeat(n, 1) * torch.arange(n)[:, None].remainder(3)
    sae, _ = train([y], d, n_latents, K, n_steps=1)
    start = SAE(d, n_latents, K)
    pre = (y - y.mean(0)) @ start.W_enc
    assert sae.threshold == pytest.approx(pre.flatten().sort().values[-K * n].item(), rel=1e-4)


def test_weights_lie_in_memory_latent_by_latent_and_gradients_are_gone(trained):
    sae, _ = trained
    assert sae.W_enc.T.is_contiguous() and sae.W_dec.is_contiguous()
    assert all(p.grad is None for p in sae.parameters())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(2 * M), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype, apart", [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_a_narrow_encoder_trains_nearly_as_well(dtype, apart):
    (_, wide), (sae, narrow) = (
        trained_on_sparse_data(n_steps=100, dtype=d) for d in (torch.float32, dtype)
    )
    assert all(v.dtype == torch.float32 for v in sae.state_dict().values())
    assert wide.fvu != narrow.fvu and np.abs(np.subtract(wide.fvu, narrow.fvu)).max() < apart


# --- what training achieves ---------------------------------------------------------------------


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
    print(f"FVU {fvu:.4f}, L0 {l0:.2f}")
    assert fvu < 0.1
    assert 0.8 * K < l0 < 1.25 * K
    assert sae.threshold > 0


def test_the_history_tells_what_happened(trained):
    _, history = trained
    assert history.step == [*range(0, 400, 10), 399]
    assert len(history.fvu) == len(history.l0) == len(history.alive) == len(history.step)
    assert history.fvu[-1] < 0.2 * history.fvu[0] and history.l0[-1] == pytest.approx(K, rel=0.1)
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
        off_centre = itertools.chain(
            [next(batches) + 1], batches
        )  # b_dec starts in the wrong place: latents fall silent
        return train(
            off_centre, D, M, K, n_steps=300, learning_rate=1e-2, dead_after=2000, seed=seed, **aux
        )[1]

    revived, left_dead = run(), run(aux_coefficient=0.0)
    assert min(revived.alive) < 0.7
    assert revived.alive[-1] > left_dead.alive[-1] + 0.1
    assert revived.fvu[-1] < left_dead.fvu[-1]


# --- stopping and going on ----------------------------------------------------------------------


class Stop(Exception):
    """Stands for whatever ends a training early."""


def stopping_at(n, batches):
    yield from itertools.islice(batches, n)
    raise Stop


def as_iterator(at):
    return stopping_at(at, sparse_data(32))


def as_function(at):
    return lambda start: stopping_at(at - start, itertools.islice(sparse_data(32), start, None))


def resumable(batches, folder, n_steps=11, **changes):
    values = {
        "n_steps": n_steps,
        "learning_rate": 1e-2,
        "dead_after": 100,
        "save_every": 3,
        "checkpoints": folder,
        "log_every": 2,
    }
    return train(batches, D, 2 * M, 1, **values | changes)


def same(one, other):
    """Whether two trainings ended in the same bits; only the clock may differ."""
    tensors = all(
        torch.equal(a, b)
        for a, b in zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True)
    )
    return tensors and asdict(one[1]) | {"seconds": 0} == asdict(other[1]) | {"seconds": 0}


@pytest.fixture(scope="module")
def uninterrupted():
    return resumable(sparse_data(32), None)


@pytest.mark.parametrize("kind", [as_iterator, as_function])
@pytest.mark.parametrize("stops", [(0,), (2,), (3,), (4, 7), (1, 5, 8, 9, 10)])
def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(
    tmp_path, uninterrupted, kind, stops
):
    for at in stops:
        with pytest.raises(Stop):
            resumable(kind(at), tmp_path)
    assert same(resumable(kind(99), tmp_path), uninterrupted)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_training_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    n_steps, dice, fork = 300, random.Random(0), multiprocessing.get_context("fork")
    start = time.perf_counter()
    expected = resumable(sparse_data(32), tmp_path / "whole", n_steps)
    took, ends = time.perf_counter() - start, []
    for _ in range(5):
        child = fork.Process(target=resumable, args=(sparse_data(32), tmp_path / "killed", n_steps))
        child.start()
        time.sleep(dice.uniform(0.02, 0.16) * took)
        child.kill()
        child.join()
        ends.append(child.exitcode)
    assert -signal.SIGKILL in ends and (tmp_path / "killed").exists()
    assert same(resumable(sparse_data(32), tmp_path / "killed", n_steps), expected)


def test_a_finished_training_is_only_loaded(tmp_path, uninterrupted):
    resumable(sparse_data(32), tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()

    def never(start):
        raise AssertionError("batches were asked for")

    loaded = resumable(never, tmp_path)
    assert same(loaded, uninterrupted) and loaded[1].seconds > 0
    assert path.read_bytes() == before and not loaded[0].training
    assert set(load_tensors(path)[0]) == {
        "W_enc",
        "W_dec",
        "b_enc",
        "b_dec",
        "threshold",
    }  # nothing that only training needs


@pytest.mark.parametrize(
    "change",
    [
        {"n_steps": 12},
        {"learning_rate": 2e-2},
        {"dead_after": 99},
        {"seed": 1},
        {"dtype": torch.bfloat16},
        {"accumulate": 2},
        {"aux_coefficient": 0.1},
        {"record": {"predictors": "1234"}},
        {"label": "other"},
    ],
)
def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path, change):
    with pytest.raises(Stop):
        resumable(as_iterator(4), tmp_path)
    assert same(
        resumable(sparse_data(32), tmp_path, **change), resumable(sparse_data(32), None, **change)
    )
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_says_what_it_is_of(tmp_path):
    resumable(sparse_data(32), tmp_path, record={"predictors": "1234"}, label="my SAE")
    (path,) = tmp_path.iterdir()
    saved = load_tensors(path)[1]
    assert path.name.startswith("my_SAE-") and saved["done"] == 11
    assert (
        saved["settings"]["predictors"] == "1234"
        and saved["settings"]["dtype"] == "float32"
        and json.dumps(saved)
    )


def test_a_damaged_checkpoint_is_named(tmp_path):
    resumable(sparse_data(32), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        resumable(sparse_data(32), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 7])
def test_a_batch_that_is_not_finite_stops_training_and_leaves_the_last_checkpoint(
    tmp_path, uninterrupted, at, value
):
    batches = list(itertools.islice(sparse_data(32), 11))
    good, batches[at] = batches[at], batches[at].clone()
    batches[at][3, 2] = value
    with pytest.raises(
        FloatingPointError, match=rf"mine, update {at}: the batch holds NaN or infinity[^\n]*$"
    ) as error:
        resumable(batches, tmp_path, label="mine")
    kept = list(tmp_path.iterdir())
    assert [load_tensors(path)[1]["done"] for path in kept] == ([6] if at else []) and all(
        str(p) in str(error.value) for p in kept
    )
    assert all(torch.isfinite(v).all() for path in kept for v in load_tensors(path)[0].values())
    batches[at] = good
    assert same(resumable(batches, tmp_path, label="mine"), uninterrupted)


def test_a_learning_rate_that_explodes_is_named_and_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(
        FloatingPointError,
        match=r"SAE, update \d+: the loss is (nan|inf); lower learning_rate \(now 1e\+25\)[^\n]*$",
    ):
        resumable(sparse_data(32), tmp_path, learning_rate=1e25, save_every=1)
    (path,) = tmp_path.iterdir()
    assert load_tensors(path)[1]["done"] >= 1


# --- files --------------------------------------------------------------------------------------


def test_a_saved_sae_comes_back(tmp_path, trained):
    sae, _ = trained
    sae.save(tmp_path / "sae.safetensors", {"trained_in": "residual"})
    loaded, record = SAE.load(tmp_path / "sae.safetensors")
    assert record == {"trained_in": "residual", "d_in": D, "n_latents": 2 * M, "k": K}
    y = next(sparse_data())
    assert torch.equal(loaded.encode(y), sae.encode(y)) and torch.equal(loaded(y), sae(y))
    assert (
        loaded.threshold == sae.threshold and not loaded.training and loaded.W_enc.T.is_contiguous()
    )


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


# --- the threshold on inputs not trained on -----------------------------------------------------


@pytest.mark.parametrize("n", [7, 3000])
def test_set_threshold_leaves_k_active_on_average(n):
    sae = SAE(D, M, K, seed=1)
    y = torch.randn(n, D, generator=torch.Generator().manual_seed(2))
    assert sae.set_threshold(y) is sae
    z = sae.encode(y)
    assert (z > 0).sum() == K * n
    flat = sae.preactivations(y).flatten().sort(descending=True).values  # all at once, sorted
    assert sae.threshold == flat[K * n]


def test_set_threshold_where_fewer_than_k_are_positive_keeps_them_all():
    sae = SAE(D, M, M)
    y = torch.randn(50, D, generator=torch.Generator().manual_seed(3))
    sae.set_threshold(y)
    assert sae.threshold == 0 and torch.equal(sae.encode(y), sae.preactivations(y))


def test_set_threshold_refuses_nan():
    with pytest.raises(ValueError, match="NaN or infinity"):
        SAE(D, M, K).set_threshold(torch.full((4, D), float("nan")))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"dead_after": -1}, "dead_after is -1; it must be above 0"),
        ({"n_steps": 0}, "n_updates is 0; it must be above 0"),
        ({"accumulate": 0}, "accumulate is 0; it must be above 0"),
        (
            {"accumulate": 200},
            "sae_batch_size gives 256 inputs at once; with accumulate=200 it must be at least 400",
        ),
    ],
)
def test_training_refuses_what_cannot_train(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        trained_on_sparse_data(**changes)


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    trained_on_sparse_data(n_steps=2, checkpoints=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors, record = load_tensors(path)
    save_tensors(path, {"other": tensors["b_dec"]}, record)
    with pytest.raises(ValueError, match="does not hold a checkpoint of this training; delete it"):
        trained_on_sparse_data(n_steps=2, checkpoints=tmp_path)
