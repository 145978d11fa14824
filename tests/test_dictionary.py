import numpy as np
import pytest
import torch
from activations import recorded
from conftest import some_predictors
from sklearn.decomposition import PCA

from helpers import coordinates, dictionary
from helpers.dictionary import Dictionary
from helpers.files import save_tensors
from helpers.moments import accumulate
from helpers.predictors import fit
from helpers.sae import SAE

S, D, M, K = 3, 4, 10, 2


def trajectories(*lead, seed=0):
    return torch.randn(*(lead or (50,)), S, D, generator=torch.Generator().manual_seed(seed))


def concat(c=None):
    c = c or coordinates.residual(some_predictors())
    return dictionary.untrained(c, M, K).calibrate(trajectories())


def one_step():
    c = coordinates.residual(some_predictors())
    return Dictionary("one step", c, SAE(D, S * M, K / S)).calibrate(trajectories(400))


@pytest.mark.parametrize("made", [concat, one_step])
def test_codes_and_what_they_rebuild_are_those_of_the_parts(made):
    found, x = made(), trajectories(7)
    y = found.coordinates.residualize(x)
    z = found.coder.encode(y.reshape(-1, found.coder.d_in))
    y_hat = found.coder.decode(z).reshape(7, S * D)
    codes = found.codes(x)
    assert torch.equal(codes, z.reshape(7, -1)) and codes.shape == (7, found.n_latents)
    torch.testing.assert_close(found.rebuild(codes), found.coordinates.restore(y_hat))
    torch.testing.assert_close(found(x), found.rebuild(codes))
    assert found(x).shape == x.shape and not found.two_sided and (codes > 0).any()
    assert not codes.requires_grad


def test_a_coder_as_wide_as_one_step_codes_each_step_on_its_own():
    found, x = one_step(), trajectories(5)
    assert found.one_step and not concat().one_step and found.n_latents == S * S * M
    other = x.clone()
    other[:, 1] = 9  # changes residuals of steps 1 and 2, but not of step 0
    before, after = (found.codes(v).view(5, S, -1) for v in (x, other))
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize("made", [concat, one_step])
def test_directions_are_what_codes_add(made):
    found = made()
    n = found.n_latents
    z = torch.rand(4, n, generator=torch.Generator().manual_seed(1))
    u = found.directions()
    assert u.shape == (n, S, D)
    added = found.rebuild(z) - found.rebuild(torch.zeros_like(z))
    torch.testing.assert_close(torch.einsum("nm,msd->nsd", z, u), added, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.directions([n - 1, 3]), u[[n - 1, 3]])
    assert torch.equal(found.directions(5), u[5]) and found.directions(5).shape == (S, D)


@pytest.mark.parametrize("latents", [8, -1, [0, 8], torch.tensor([9, 1])])
def test_a_latent_that_there_is_not_is_refused(latents):
    found = Dictionary("d", coordinates.raw(some_predictors()), SAE(12, 8, 2))
    for ask in (found.directions, lambda latents: found.evidence(torch.zeros(1, 3, 4), latents)):
        with pytest.raises(ValueError, match=r"latent is (8|9|-1); it must be from 0 to 7"):
            ask(latents)


@pytest.mark.parametrize("made", [concat, one_step, lambda: dictionary.neurons(some_predictors())])
def test_evidence_of_the_steps_adds_up_to_what_is_held_against_the_threshold(made):
    found, x = made(), trajectories(4, 5)
    if not found.two_sided:
        torch.nn.init.normal_(found.coder.b_enc)
        torch.nn.init.normal_(found.coder.b_dec)
    e, scores = found.evidence(x), found.scores(x)
    assert e.shape == (4, 5, S, found.n_latents) and scores.shape == (4, 5, found.n_latents)
    if found.two_sided:
        torch.testing.assert_close(e.sum(-2), found.codes(x))
        assert torch.equal(scores, found.codes(x))
    else:
        bias = found.coder.b_enc.repeat(found.n_blocks)
        torch.testing.assert_close(e.sum(-2) + bias, scores)
        above = scores > found.coder.threshold.repeat(found.n_blocks).clamp(min=0)
        torch.testing.assert_close(found.codes(x), scores * above, rtol=1e-4, atol=1e-5)
        assert (scores < 0).any()
    n = found.n_latents
    torch.testing.assert_close(found.evidence(x, [n - 1, 0]), e[..., [n - 1, 0]])


@pytest.mark.parametrize("made", [concat, one_step])
def test_evidence_of_a_step_is_what_that_block_of_y_says(made):
    found, x = made(), trajectories(6)
    c = found.coordinates
    y = c.residualize(x).view(6, S, D)
    y[:, 1] += 1
    change = found.evidence(c.restore(y.flatten(1))) - found.evidence(x)
    assert change[:, 1].abs().max() > 0.1
    torch.testing.assert_close(change[:, [0, 2]], 0 * change[:, [0, 2]], rtol=0, atol=1e-4)


def test_codes_that_are_no_sums_over_steps_have_no_evidence():
    class Nearest(dictionary.Projection):
        W_enc = property()

    found = Dictionary("nearest", coordinates.raw(some_predictors()), Nearest(torch.eye(S * D)))
    with pytest.raises(ValueError, match="nearest: .*no evidence"):
        found.evidence(trajectories())
    assert torch.equal(found.scores(trajectories()), found.codes(trajectories()))


@pytest.mark.parametrize("made", [concat, one_step])
def test_leading_dimensions_are_kept(made):
    found, x = made(), trajectories(2, 5)
    z = found.codes(x)
    assert z.shape == (2, 5, found.n_latents) and found.rebuild(z).shape == x.shape
    torch.testing.assert_close(found.codes(x[1, 3]), z[1, 3], rtol=1e-4, atol=1e-5)
    assert found.cost(z).shape == (2, 5)


@pytest.mark.parametrize("made", [concat, one_step])
def test_after_calibration_a_trajectory_costs_k_numbers(made):
    found, x = made(), trajectories(400)
    cost = found.calibrate(x).cost(found.codes(x)).double().mean()
    assert cost == pytest.approx(K, rel=1e-6)


def test_any_precision_is_coded_and_the_coder_may_have_its_own():
    found, x = concat(), trajectories(200)
    codes = found.codes(x)
    assert found.codes(x.half()).dtype == torch.float16 and found(x.half()).dtype == torch.float16
    found.coder.to(torch.bfloat16)
    assert found.codes(x).dtype == torch.float32 and found(x).dtype == torch.float32
    assert ((found.codes(x) > 0) == (codes > 0)).double().mean() > 0.97


def test_a_coder_that_does_not_fit_the_coordinates_is_refused():
    with pytest.raises(ValueError, match="odd: the coder reads 5 numbers"):
        Dictionary("odd", coordinates.raw(some_predictors()), SAE(5, M, K))


# --- baselines ----------------------------------------------------------------------------------


def test_principal_components_are_scikit_learns_in_any_coordinates():
    h = recorded(40)
    moments = accumulate([h])
    p = fit(moments, moments)
    for c in (coordinates.raw(p), coordinates.residual(p)):
        x = c.standardise(h.transpose(1, 2))  # (image, token, step, channel)
        found = dictionary.pca(c, x.split(7), 3)
        y = c.residualize(x).flatten(0, 1).double().numpy()
        theirs = PCA(3).fit(y)
        expected = theirs.inverse_transform(theirs.transform(y))
        rebuilt = c.residualize(found(x)).flatten(0, 1)
        np.testing.assert_allclose(rebuilt, expected, atol=1e-3)
        assert found.two_sided and (found.cost(found.codes(x)) == 3).all()


def test_predictors_alone_are_given_the_first_step():
    p, x = some_predictors(), trajectories()
    found = dictionary.first_step(p)
    expected = [x[:, 0]]
    for s in range(1, S):
        expected.append(expected[-1] @ p.A[s] + p.b[s])
    torch.testing.assert_close(found(x), torch.stack(expected, 1))
    assert (found.cost(found.codes(x)) == D).all() and found.two_sided


def test_neurons_are_the_activations_themselves():
    found, x = dictionary.neurons(some_predictors()), trajectories()
    assert torch.equal(found.codes(x), x.flatten(1)) and torch.equal(found(x), x)
    assert found.two_sided and torch.equal(found.directions(S * D - 1)[S - 1], torch.eye(D)[-1])


def test_names_are_given_or_usual():
    p = some_predictors()
    assert (dictionary.neurons(p).name, dictionary.first_step(p, "none").name) == (
        "neurons",
        "none",
    )


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        concat,
        one_step,
        lambda: concat(coordinates.between(some_predictors(), 0.4, 1.0)),
        lambda: dictionary.first_step(some_predictors()),
    ],
)
def test_a_dictionary_comes_back_to_the_bit(tmp_path, made):
    found, x = made(), trajectories()
    found.save(tmp_path / "d.safetensors", {"predictors": "12ab"})
    loaded, record = Dictionary.load(tmp_path / "d.safetensors")
    assert record["predictors"] == "12ab" and loaded.name == found.name and not loaded.training
    assert torch.equal(loaded.codes(x), found.codes(x)) and torch.equal(loaded(x), found(x))
    assert torch.equal(loaded.directions(), found.directions())
    if not found.two_sided:
        assert loaded.coder.k == found.coder.k and loaded.coder.W_enc.T.is_contiguous()


@pytest.mark.parametrize("keep", [0, 7, 100, -3])
def test_a_file_cut_short_is_named(tmp_path, keep):
    path = tmp_path / "sae.safetensors"
    concat().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="sae.safetensors is damaged"):
        Dictionary.load(path)


def test_a_file_that_holds_no_dictionary_is_named(tmp_path):
    some_predictors().save(tmp_path / "p.safetensors")
    tensors = concat().state_dict()
    record = {"dictionary": {"name": "cut", "k": K}}
    del tensors["coder.b_dec"]
    save_tensors(tmp_path / "part.safetensors", tensors, record)
    for name in ("p", "part"):
        with pytest.raises(ValueError, match=f"{name}.safetensors does not hold a dictionary"):
            Dictionary.load(tmp_path / f"{name}.safetensors")
