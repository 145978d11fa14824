from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import some_predictors

from helpers.coordinates import raw, residual
from helpers.dictionary import Dictionary, Projection, first_step, neurons, pca, untrained
from helpers.measure.reconstruction import SomeSteps, difference, measure, standardised
from helpers.moments import accumulate
from helpers.predictors import Predictors, fit
from helpers.sae import SAE
from helpers.training.dictionaries import held_out, train_dictionary
from helpers.training.loop import TrainConfig

S, D, TOKENS = 3, 4, 5


def by_hand():
    """Two steps of one channel: y[0] = x[0], y[1] = (x[1] - x[0] / 2) / 0.5."""
    one, two = torch.ones(1), torch.ones(2)
    A = torch.tensor([0.0, 0.5]).view(2, 1, 1)
    rho = torch.tensor([1.0, 0.5])
    return Predictors(torch.zeros(2, 1), two, A, torch.zeros(2, 1), rho, one.expand(2))


def test_errors_in_both_spaces_worked_by_hand():
    predictors = by_hand()
    spaces = {"activation": raw(predictors), "residual": residual(predictors)}
    only_first = Dictionary("", spaces["activation"], Projection(torch.tensor([[1.0, 0.0]])))
    x = torch.tensor([[2.0, 3.0], [0.0, 1.0]]).view(1, 2, 2, 1)  # one image of two tokens
    # x̂ = (2, 0), (0, 0); y = (2, 4), (0, 2); ŷ = (2, -2), (0, 0)
    m = measure({"first": only_first}, [x], spaces)["first"]
    error, spread = m.sums["activation"]
    assert error.tolist() == [[0.0, 9.0 + 1.0]] and spread.tolist() == [[4.0, 9.0 + 1.0]]
    error, spread = m.sums["residual"]
    assert error.tolist() == [[0.0, 36.0 + 4.0]] and spread.tolist() == [[4.0, 16.0 + 4.0]]
    assert m.ev("activation").value == pytest.approx(1 - 10 / 14)
    assert m.ev("residual").value == pytest.approx(1 - 40 / 24)
    assert [e.value for e in m.ev_per_step("residual")] == [1.0, -1.0]
    assert m.ev("residual", 1) == m.ev_per_step("residual")[1]
    assert m.numbers.tolist() == [0.5]  # the second token's only code is zero


@pytest.fixture(scope="module")
def predictors():
    return some_predictors(S, D)


@pytest.fixture(scope="module")
def spaces(predictors):
    return {"activation": raw(predictors), "residual": residual(predictors)}


@pytest.fixture(scope="module")
def x():
    return torch.randn(6, TOKENS, S, D, generator=torch.Generator().manual_seed(0))


def sparse(coordinates, one_step=False):
    """An SAE of random weights, some of whose latents never fire."""
    sae = SAE(D if one_step else S * D, 12, 3, seed=1)
    with torch.no_grad():
        sae.b_enc[:4] = -100
    return Dictionary("", coordinates, sae)


@pytest.mark.parametrize("one_step", [False, True])
def test_sums_numbers_and_use_are_those_of_a_loop_over_trajectories(spaces, x, one_step):
    dictionary = sparse(spaces["residual"], one_step)
    m = measure({"": dictionary}, [x], spaces)[""]
    coder, used, numbers = dictionary.coder, np.zeros(12, bool), np.zeros(len(x))
    for i, image in enumerate(x):
        error, spread = np.zeros(S), np.zeros(S)
        for trajectory in image:
            y = spaces["residual"].residualize(trajectory)
            z = coder.encode(y.view(S, D) if one_step else y[None])
            y_hat = coder.decode(z).view(S, D)
            error += (y.view(S, D) - y_hat).double().pow(2).sum(1).numpy()
            mean = spaces["residual"].residualize(torch.zeros(S, D)).view(S, D)
            spread += (y.view(S, D) - mean).double().pow(2).sum(1).numpy()
            used |= (z > 0).any(0).numpy()
            numbers[i] += int((z > 0).sum()) / TOKENS
        np.testing.assert_allclose(m.sums["residual"][0][i], error, rtol=1e-5)
        np.testing.assert_allclose(m.sums["residual"][1][i], spread, rtol=1e-5)
    np.testing.assert_allclose(m.numbers, numbers)
    assert m.used.tolist() == used.tolist() and not used[:4].any()
    assert m.alive == pytest.approx(used.mean())


def test_the_training_mean_explains_nothing_in_any_space(spaces, x):
    class Mean(Projection):
        def decode(self, z):
            return spaces["residual"].residualize(torch.zeros(S, D)).expand(len(z), -1)

    dictionary = Dictionary("", spaces["residual"], Mean(torch.eye(S * D)))
    m = measure({"": dictionary}, [x], spaces)[""]
    for space in spaces:
        np.testing.assert_allclose([e.value for e in m.ev_per_step(space)], 0, atol=1e-5)


def test_the_neurons_explain_everything_and_the_predictors_what_is_given(predictors, spaces, x):
    found = measure({"n": neurons(predictors), "p": first_step(predictors)}, [x], spaces)
    assert found["n"].ev("residual").value == pytest.approx(1)
    assert found["p"].ev("activation", 0).value == pytest.approx(1)
    assert found["p"].numbers.tolist() == [D] * len(x)
    assert np.isnan(found["n"].alive) and np.isnan(found["p"].alive)  # dense: none could be dead


def test_shards_and_company_change_nothing(spaces, x):
    a, b = sparse(spaces["residual"]), sparse(spaces["activation"], one_step=True)
    together = measure({"a": a, "b": b}, x.split(4), spaces)["b"]
    alone = measure({"b": b}, [x], spaces)["b"]
    assert together.numbers.tolist() == alone.numbers.tolist()
    for space in spaces:
        for one, other in zip(together.sums[space], alone.sums[space]):
            assert np.array_equal(one, other)


def test_a_difference_is_paired_by_image(spaces, x):
    m = measure({"a": sparse(spaces["residual"]), "b": sparse(spaces["activation"])}, [x], spaces)
    apart = difference(m["a"], m["b"], "activation")
    assert apart.value == pytest.approx(
        m["a"].ev("activation").value - m["b"].ev("activation").value
    )
    same = difference(m["a"], m["a"], "activation")
    assert tuple(same) == (0, 0, 0)


# --- on a store ---------------------------------------------------------------------------------


class FakeStore(SimpleNamespace):
    """Trajectories of a few recurring patterns, all in memory, read as `Store` reads a folder."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        patterns = torch.randn(6, S, D, generator=g)
        on = (torch.rand(24, 16, 6, generator=g) < 0.2) * torch.rand(24, 16, 6, generator=g)
        h = torch.einsum("itp,psd->istd", on, patterns)
        h = h + 0.05 * torch.randn(h.shape, generator=g) + 3
        self.parts = {"train": h[:8], "validation": h[8:16], "test": h[16:]}
        super().__init__(n_tokens=16)

    def n_images(self, split):
        return len(self.parts[split])

    def shards(self, split, share=(0, 1)):
        return iter(self.parts[split].split(2))

    def batches(self, split, batch_size, seed=0, start=0, share=(0, 1)):
        rows, g = (
            self.parts[split].transpose(1, 2).flatten(0, 1),
            torch.Generator().manual_seed(seed),
        )
        while True:
            yield rows[torch.randperm(len(rows), generator=g)[:batch_size]]


@pytest.fixture(scope="module")
def store():
    return FakeStore()


def test_a_store_is_read_at_some_of_its_steps(store):
    part = SomeSteps(store, [0, 2])
    assert (part.n_images("test"), part.n_tokens) == (8, 16)
    for whole, some in zip(store.shards("train"), part.shards("train")):
        assert torch.equal(some, whole[:, [0, 2]])
    whole, some = next(store.batches("train", 7)), next(part.batches("train", 7))
    assert torch.equal(some, whole[:, [0, 2]])


def test_standardised_shards_are_those_of_the_store(store, predictors):
    for h, x in zip(store.shards("test"), standardised(store, "test", predictors)):
        assert torch.equal(x[1, 3], predictors.standardise(h[1, :, 3]))


def test_a_trained_dictionary_beats_pca_and_an_untrained_one(store):
    part = SomeSteps(store, [0, 2])
    predictors = fit(*(accumulate(part.shards(split)) for split in ("train", "validation")))
    spaces = {"activation": raw(predictors), "residual": residual(predictors)}
    config = TrainConfig(n_latents=24, k=2, n_updates=100, batch_size=64, learning_rate=1e-2)
    for own, coordinates in spaces.items():
        validation = held_out(part, coordinates)
        dictionaries = {
            "trained": train_dictionary(part, coordinates, config, name="trained")[0],
            "untrained": untrained(coordinates, 24, 2),
            "PCA": pca(coordinates, standardised(part, "train", predictors), 2),
        }
        for dictionary in dictionaries.values():
            dictionary.calibrate(validation)
        found = measure(dictionaries, standardised(part, "test", predictors), spaces)
        for floor in ("untrained", "PCA"):
            assert difference(found["trained"], found[floor], own).low > 0.1
        assert found["trained"].numbers.mean() == pytest.approx(2, abs=0.5)
