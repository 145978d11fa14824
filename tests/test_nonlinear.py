import functools

import numpy as np
import pytest
import torch
from activations import FakeStore
from conftest import some_predictors

from helpers import coordinates, dictionary, nonlinear
from helpers.dictionary import Dictionary
from helpers.moments import accumulate
from helpers.nonlinear import Nonlinear
from helpers.predictors import fit

S, D, M = 3, 4, 5


def bent(seed=0, a=1.0):
    """Coordinates of a random perceptron, in double precision."""
    g = torch.Generator().manual_seed(seed)
    p = some_predictors(S, D, seed)
    U, c, V = (torch.randn(S, *n, generator=g) for n in ((D, M), (M,), (M, D)))
    return Nonlinear(p.mu, p.scale, p.A, p.b, p.rho**a, U, c, V).double()


def trajectories(n=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, S, D, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_there_and_back_again(seed):
    c, x = bent(seed), trajectories(seed=seed)
    torch.testing.assert_close(c.restore(c.residualize(x)), x, rtol=1e-9, atol=1e-9)
    y = c.residualize(x)
    torch.testing.assert_close(c.residualize(c.restore(y)), y, rtol=1e-9, atol=1e-9)


def test_directions_are_the_jacobian_at_the_mean_trajectory():
    c = bent(1, a=0.5)
    at = c.residualize(torch.zeros(S, D, dtype=torch.float64))
    J = torch.autograd.functional.jacobian(c.restore, at)  # (S, d, S · d)
    u = c.feature_trajectories(torch.eye(S * D, dtype=torch.float64))
    torch.testing.assert_close(u, J.permute(2, 0, 1), rtol=1e-9, atol=1e-9)
    far = torch.autograd.functional.jacobian(c.restore, at + 1)  # elsewhere it is another one
    assert (far - J).abs().max() > 0.1


def test_without_output_weights_it_is_linear():
    c, p = bent(2), some_predictors(S, D, 2)
    c.V.zero_()
    x, linear = trajectories(), coordinates.residual(p).double()
    torch.testing.assert_close(c.residualize(x), linear.residualize(x))
    torch.testing.assert_close(c.restore(linear.residualize(x)), x)


def curved(n_images, seed):
    """Step 1 is a curved function of step 0, step 2 is noise."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(n_images, 10, D, generator=g)
    second = first.abs() + 0.3 * first + 0.1 * torch.randn(n_images, 10, D, generator=g)
    return torch.stack([first, second, torch.randn(n_images, 10, D, generator=g)], 1) + 2


STORE = FakeStore(train=curved(100, 1), validation=curved(40, 2))


@functools.cache
def linear():
    train = accumulate([STORE.splits["train"]])
    return fit(train, accumulate([STORE.splits["validation"]], train.shift))


@functools.cache
def fitted(a=0.0):
    return nonlinear.fit(
        STORE, linear(), a, n_updates=400, batch_size=128, learning_rate=1e-2, width=12
    )


def left(c, h):
    """RMS of what is left at each step."""
    x = c.standardise(h.transpose(1, 2).flatten(0, 1))
    return c.residualize(x).view(-1, S, D).pow(2).mean((0, 2)).sqrt()


def test_a_curved_dependence_is_found_where_there_is_one():
    unseen = curved(40, 3)
    before, after = left(coordinates.residual(linear(), 0.0), unseen), left(fitted(), unseen)
    assert after[1] < 0.5 * before[1]
    assert after[0] == pytest.approx(before[0].item(), rel=1e-5)
    assert after[2] < 1.02 * before[2]


def test_where_it_only_learns_by_heart_it_is_left_out():
    few = FakeStore(train=curved(2, 1), validation=curved(40, 2))
    c = nonlinear.fit(
        few, linear(), 0.0, n_updates=300, batch_size=20, learning_rate=3e-2, width=50
    )
    assert not c.V[2].any()
    torch.testing.assert_close(c.A[2], linear().A[2])


@pytest.mark.parametrize("a", [0.5, 1.0])
def test_blocks_are_divided_by_what_is_left_to_the_power_of_the_exponent(a):
    plain, weighted = left(fitted(), STORE.splits["train"]), left(fitted(a), STORE.splits["train"])
    np.testing.assert_allclose(weighted, plain ** (1 - a), rtol=0.05)


def test_the_same_seed_gives_the_same_coordinates():
    small = {"n_updates": 5, "batch_size": 32}
    one, same, other = (
        nonlinear.fit(STORE, linear(), seed=seed, **small).digest() for seed in (0, 0, 1)
    )
    assert one == same != other


def test_a_dictionary_in_these_coordinates_comes_back_from_its_file(tmp_path):
    x = torch.randn(6, S, D, generator=torch.Generator().manual_seed(0))
    made = dictionary.untrained(fitted(1.0), 8, 2)
    made.save(tmp_path / "d.safetensors")
    loaded, _ = Dictionary.load(tmp_path / "d.safetensors")
    assert isinstance(loaded.coordinates, Nonlinear)
    assert torch.equal(loaded(x), made(x)) and torch.equal(loaded.directions(), made.directions())
    assert loaded.evidence(x).shape == (6, S, 8)
