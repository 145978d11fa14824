import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from activations import D, S, recorded
from conftest import some_predictors
from hypothesis import given
from hypothesis import strategies as st

from helpers import predictors
from helpers.coordinates import Coordinates, between, raw, residual, whitened
from helpers.coordinates import recorded as as_recorded
from helpers.moments import accumulate

seeds = st.integers(0, 10_000)


def two_back(seed, n_steps=4, d=3, matrix=False):
    """Coordinates of two lags with every term at work."""
    g = torch.Generator().manual_seed(seed)
    p = some_predictors(n_steps, d, seed)
    B = 0.3 * torch.randn(n_steps, d, d, generator=g)
    D_inverse = torch.rand(n_steps, generator=g) + 0.5
    if matrix:
        off_diagonal = 0.2 * torch.randn(n_steps, d, d, generator=g)
        D_inverse = D_inverse[:, None, None] * (torch.eye(d) + off_diagonal)
    return Coordinates(p.mu, p.scale, p.A, p.b, D_inverse, B)


def member(name, seed=0):
    p = some_predictors(4, 3, seed)
    h = torch.randn(40, 4, 6, 3, generator=torch.Generator().manual_seed(seed))
    return {
        "raw": lambda: raw(p),
        "recorded": lambda: as_recorded(p),
        "residual": lambda: residual(p),
        "half": lambda: residual(p, 0.5),
        "unweighted": lambda: residual(p, 0.0),
        "differences": lambda: residual(predictors.identity(accumulate([h]))),
        "mean only": lambda: residual(predictors.mean_only(accumulate([h]))),
        "whitened": lambda: whitened(p, accumulate([h])),
        "between": lambda: between(p, 0.3, 0.5),
        "two lags": lambda: residual(second_order(seed), 0.5),
        "two lags, whitened": lambda: whitened(second_order(seed), accumulate([h])),
        "two lags, between": lambda: between(second_order(seed), 0.3, 0.5),
        "two back": lambda: two_back(seed),
        "two back, matrices": lambda: two_back(seed, matrix=True),
    }[name]()


MEMBERS = (
    *("raw", "recorded", "residual", "half", "unweighted", "differences", "mean only", "whitened"),
    *(
        "between",
        "two lags",
        "two lags, whitened",
        "two lags, between",
        "two back",
        "two back, matrices",
    ),
)


def second_order(seed=0, n_steps=4, d=3):
    """Predictors of two lags."""
    g = torch.Generator().manual_seed(seed)
    return replace(
        some_predictors(n_steps, d, seed), B=0.3 * torch.randn(n_steps, d, d, generator=g)
    )


def trajectories(n=20, n_steps=4, d=3, seed=0):
    return torch.randn(n, n_steps, d, generator=torch.Generator().manual_seed(seed))


# --- the map and its inverse --------------------------------------------------------------------


@pytest.mark.parametrize("name", MEMBERS)
@given(seed=st.integers(0, 10))
def test_there_and_back_again(name, seed):
    c, x = member(name, seed), trajectories(seed=seed)
    y = c.residualize(x)
    assert y.dtype == torch.float32 and y.shape == (20, 12) == (20, c.d_in)
    assert (c.restore(y) - x).norm() <= 2e-5 * x.norm()
    assert (c.residualize(c.restore(y)) - y).norm() <= 2e-5 * y.norm()


@given(seed=seeds, n_steps=st.integers(1, 8), d=st.integers(1, 9))
def test_residuals_of_any_size_lead_back(seed, n_steps, d):
    c, x = residual(some_predictors(n_steps, d, seed)), trajectories(5, n_steps, d, seed)
    assert (c.n_steps, c.channels) == (n_steps, d)
    assert (c.restore(c.residualize(x)) - x).norm() <= 1e-5 * x.norm()


@pytest.mark.parametrize("matrix", [False, True])
def test_the_map_is_its_definition(matrix):
    c, x = two_back(1, matrix=matrix), trajectories(5, 4, 3).double().numpy()
    A, B, b, D_inverse = (getattr(c, n).double().numpy() for n in ("A", "B", "b", "D_inverse"))
    y = c.residualize(torch.from_numpy(x)).unflatten(1, (4, 3))
    for s in range(4):
        r = x[:, s] - b[s]
        r -= x[:, s - 1] @ A[s] if s >= 1 else 0
        r -= x[:, s - 2] @ B[s] if s >= 2 else 0
        expected = r @ np.linalg.inv(D_inverse[s]) if matrix else r / D_inverse[s]
        np.testing.assert_allclose(y[:, s], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(c.D[s] * D_inverse[s], 1, rtol=1e-6) if not matrix else None


def test_the_way_back_worked_by_hand():
    c = Coordinates(
        mu=torch.zeros(3, 1),
        scale=torch.ones(3),
        A=torch.tensor([0.0, 2.0, -1.0]).view(3, 1, 1),
        b=torch.tensor([[0.0], [1.0], [5.0]]),
        D_inverse=torch.tensor([1.0, 0.5, 2.0]),
        B=torch.tensor([0.0, 0.0, 10.0]).view(3, 1, 1),
    )
    y = torch.tensor([[3.0, 4.0, 1.0]])
    # 3; 3·2 + 1 + 4/2; 9·(-1) + 3·10 + 5 + 1·2
    assert c.restore(y).flatten().tolist() == [3, 9, 28]
    # the same without the constants: 3; 3·2 + 4/2; 8·(-1) + 3·10 + 1·2
    assert c.feature_trajectories(y).flatten().tolist() == [3, 8, 24]


def test_raw_coordinates_are_the_activations():
    c, x = raw(some_predictors(4, 3)), trajectories()
    assert torch.equal(c.residualize(x), x.flatten(1))
    assert torch.equal(c.restore(x.flatten(1)), x)
    assert torch.equal(c.feature_trajectories(x.flatten(1)), x)


def test_recorded_coordinates_are_the_activations_in_their_own_units():
    p, h = some_predictors(4, 3), trajectories()
    c = as_recorded(p)
    torch.testing.assert_close(c.residualize(p.standardise(h)), h.flatten(-2))
    directions = trajectories(seed=1)
    u = c.feature_trajectories(directions.flatten(-2))
    torch.testing.assert_close(p.scale[:, None] * u, directions)


def test_differences_of_neighbours():
    moments, x = accumulate([recorded()]), trajectories(5, S, D)
    r = residual(predictors.identity(moments), block_exponent=0).residualize(x).view(5, S, D)
    torch.testing.assert_close(r[:, 1:], x[:, 1:] - x[:, :-1])
    torch.testing.assert_close(r[:, 0], x[:, 0])


@pytest.mark.parametrize("a", [-0.5, 0.0, 0.25, 1.0])
def test_blocks_are_weighed_by_a_power_of_rho(a):
    p, x = some_predictors(4, 3), trajectories()
    r = residual(p, 0.0).residualize(x).view(20, 4, 3)
    y = residual(p, a).residualize(x).view(20, 4, 3)
    torch.testing.assert_close(y, r / p.rho[:, None] ** a)


def test_residuals_of_the_training_images_have_rms_one_in_every_block():
    h = recorded(50)
    moments = accumulate([h])
    c = residual(predictors.fit(moments, moments))
    y = c.residualize(c.standardise(h.transpose(1, 2))).unflatten(-1, (S, D))
    torch.testing.assert_close(y.pow(2).mean((0, 1, 3)).sqrt(), torch.ones(S), rtol=1e-4, atol=0)


def test_whitened_residuals_have_unit_covariance():
    h = recorded(50, offset=2)
    moments = accumulate([h])
    c = whitened(predictors.fit(moments, moments), moments)
    y = c.residualize(c.standardise(h.transpose(1, 2))).unflatten(-1, (S, D)).flatten(0, 1)
    for s in range(S):
        np.testing.assert_allclose(np.cov(y[:, s].T, bias=True), np.eye(D), atol=1e-4)


def test_a_direction_in_which_nothing_varies_is_not_blown_up():
    h = recorded(50)
    h[..., 1] = 7
    moments = accumulate([h])
    p = predictors.fit(moments, moments)
    c = whitened(p, moments, floor=1e-4)
    assert torch.isfinite(c.residualize(c.standardise(h.transpose(1, 2)))).all()
    assert (torch.linalg.matrix_norm(c.D, 2) * p.rho <= 100.1).all()


# --- the family between raw and residual --------------------------------------------------------


def dense_metric(c):
    """(S·d) × (S·d) matrix M of ‖y − ŷ‖² = (x − x̂) M (x − x̂)ᵀ, from the map of unit vectors."""
    c = c.double()
    eye = torch.eye(c.d_in, dtype=torch.float64).view(-1, c.n_steps, c.channels)
    T = c.residualize(eye) - c.residualize(torch.zeros_like(eye))
    return T @ T.T


@given(seed=seeds, gamma=st.floats(0, 1), a=st.sampled_from([0.0, 0.5, 1.0]))
def test_gamma_mixes_the_two_metrics(seed, gamma, a):
    for p in (some_predictors(4, 3, seed), second_order(seed)):
        mixed = (1 - gamma) * dense_metric(raw(p)) + gamma * dense_metric(residual(p, a))
        found = dense_metric(between(p, gamma, a))
        assert (found - mixed).norm() <= 1e-5 * mixed.norm()


@pytest.mark.parametrize("a", [0.0, 1.0])
def test_the_ends_of_the_family_are_raw_and_residual(a):
    x = trajectories()
    for p, gamma in itertools.product((some_predictors(4, 3), second_order()), (0, 1)):
        c, end = between(p, gamma, a), (raw(p), residual(p, a))[gamma]
        torch.testing.assert_close(c.residualize(x), end.residualize(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [-0.1, 1.5])
def test_gamma_outside_the_family_is_refused(gamma):
    with pytest.raises(ValueError, match=f"^gamma is {gamma}"):
        between(some_predictors(), gamma)


# --- directions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEMBERS)
@given(seed=st.integers(0, 10))
def test_a_feature_trajectory_is_what_its_direction_adds(name, seed):
    c = member(name, seed)
    W = torch.randn(5, c.d_in, generator=torch.Generator().manual_seed(seed))
    u = c.feature_trajectories(W)
    assert u.shape == (5, c.n_steps, c.channels)
    torch.testing.assert_close(u, c.restore(W) - c.restore(torch.zeros_like(W)), atol=1e-4, rtol=0)


@given(seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_feature_trajectories_are_linear(seed, a, b):
    c = two_back(seed)
    v, w = torch.randn(2, 5, c.d_in, generator=torch.Generator().manual_seed(seed))
    expected = a * c.feature_trajectories(v) + b * c.feature_trajectories(w)
    torch.testing.assert_close(c.feature_trajectories(a * v + b * w), expected, rtol=0, atol=1e-4)


def test_gains_worked_by_hand():
    c = Coordinates(
        mu=torch.zeros(3, 1),
        scale=torch.ones(3),
        A=torch.tensor([0.0, 2.0, -3.0]).view(3, 1, 1),
        b=torch.ones(3, 1),
        D_inverse=torch.tensor([1.0, 0.5, 4.0]),
    )
    assert c.gains().tolist() == [[1, 2, 6], [0, 0.5, 1.5], [0, 0, 4]]


@pytest.mark.parametrize("name", ["residual", "whitened", "two back, matrices"])
def test_gains_are_the_rms_of_errors_sent_back(name):
    c = member(name, seed=2)
    for s, row in enumerate(c.gains()):
        e = torch.zeros(40_000, 4, 3)
        e[:, s] = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(s))
        sent = c.feature_trajectories(e.flatten(1)).pow(2).mean((0, 2)).sqrt()
        torch.testing.assert_close(row, sent, rtol=0.03, atol=0)
        assert not row[:s].any()
    torch.testing.assert_close(raw(some_predictors()).gains(), torch.eye(3))


def test_exchanged_blocks_are_the_same_ones_in_other_company():
    c, x = member("residual"), trajectories(60).view(6, 10, 4, 3)
    other = c.exchanged(x, torch.Generator().manual_seed(0))
    y, mixed = (c.residualize(v).view(60, 4, 3) for v in (x, other))
    origin = torch.cdist(mixed.transpose(0, 1), y.transpose(0, 1)).argmin(-1)  # (step, trajectory)
    for s in range(4):
        torch.testing.assert_close(mixed[:, s], y[origin[s], s], rtol=1e-4, atol=1e-4)
        assert len(set(origin[s].tolist())) == 60
    assert (origin[0] != origin[1]).sum() > 50


# --- shapes, types and files --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "whitened", "two back"])
def test_leading_dimensions_and_precision_are_kept(name):
    c = member(name)
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    y = c.residualize(x)
    assert y.shape == (2, 5, 12) and y.dtype == torch.float64
    torch.testing.assert_close(y[1, 3], c.residualize(x[1, 3]))
    torch.testing.assert_close(c.restore(y), x)


def test_standardising_is_the_predictors_and_leads_back():
    p, h = some_predictors(4, 3), trajectories()
    c = residual(p)
    assert torch.equal(c.standardise(h), p.standardise(h))
    torch.testing.assert_close(c.unstandardise(c.standardise(h)), h)


@pytest.mark.parametrize("name", MEMBERS)
def test_coordinates_come_back_from_their_tensors_to_the_bit(name):
    c, x = member(name), trajectories()
    again = Coordinates(**c.state_dict())
    assert torch.equal(again.residualize(x), c.residualize(x)) and again.digest() == c.digest()
    assert torch.equal(again.restore(x.flatten(1)), c.restore(x.flatten(1)))


def test_other_coordinates_have_another_digest():
    digests = [member(name).digest() for name in MEMBERS] + [member("residual", 1).digest()]
    assert len(set(digests)) == len(digests)


def test_coordinates_move_to_another_device():
    c = two_back(0).to("meta")
    assert c.residualize(trajectories().to("meta")).is_meta
