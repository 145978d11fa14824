from dataclasses import replace

import numpy as np
import pytest
import torch
from activations import D, S, flat, recorded
from conftest import some_predictors
from sklearn.linear_model import Ridge

from helpers import predictors
from helpers.files import save_tensors
from helpers.moments import Moments, accumulate
from helpers.predictors import STRENGTHS, Predictors, eigenvalues, fit, residual_covariance


@pytest.fixture(scope="module")
def fitted():
    train, validation = recorded(), recorded(seed=1)
    first = accumulate([train])
    return train, validation, fit(first, accumulate([validation], first.shift))


def two_back(seed=3):
    """Predictors of no particular origin, with intercepts and two lags."""
    B = 0.3 * torch.randn(S, D, D, generator=torch.Generator().manual_seed(seed))
    return replace(some_predictors(S, D, seed), B=B)


def residuals(p, h):
    """x and r, (trajectory, step, channel), float64, by the definition."""
    x = (flat(h) - p.mu.double().numpy()) / p.scale.double().numpy()[:, None]
    r = x.copy()
    for s in range(1, S):
        r[:, s] = x[:, s] - (x[:, s - 1] @ p.A[s].double().numpy() + p.b[s].double().numpy())
        if s > 1 and p.B is not None:
            r[:, s] -= x[:, s - 2] @ p.B[s].double().numpy()
    return x, r


def test_standardised_activations_have_mean_zero_and_rms_one(fitted):
    train, _, p = fitted
    x = p.standardise(train.transpose(1, 2)).double().flatten(0, 1)
    assert abs(x.mean(0)).max() < 1e-5
    np.testing.assert_allclose(x.pow(2).mean((0, 2)), 1, rtol=1e-5)
    back = p.unstandardise(x)
    torch.testing.assert_close(back, torch.from_numpy(flat(train)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_coefficients_are_those_of_sklearns_ridge(strength, offset):
    h = recorded(offset=offset)
    moments = accumulate([h])
    p = fit(moments, moments, (strength,))
    x = flat(h)
    mu = x.mean(0)
    scale = np.sqrt(((x - mu) ** 2).mean((0, 2)))
    x = (x - mu) / scale[:, None]
    for s in range(1, S):
        alpha = strength * np.trace(x[:, s - 1].T @ x[:, s - 1]) / D
        ridge = Ridge(alpha=alpha, tol=1e-12).fit(x[:, s - 1], x[:, s])
        np.testing.assert_allclose(p.A[s], ridge.coef_.T, atol=1e-6)
        np.testing.assert_allclose(p.b[s], ridge.intercept_, atol=1e-6)
        assert p.strength[s] == pytest.approx(strength)


@pytest.mark.parametrize("strength", [1e-6, 0.1])
def test_two_lags_are_regressed_together(strength):
    h = recorded(offset=10)
    moments = accumulate([h])
    p, one = (fit(moments, moments, (strength,), torch.float64, lags=n) for n in (2, 1))
    x = p.standardise(torch.from_numpy(flat(h))).numpy()
    X = np.concatenate([x[:, 1], x[:, 0]], 1)
    alpha = strength * np.trace(X.T @ X) / (2 * D)
    ridge = Ridge(alpha=alpha, tol=1e-12).fit(X, x[:, 2])
    np.testing.assert_allclose(np.concatenate([p.A[2], p.B[2]]), ridge.coef_.T, atol=1e-9)
    assert torch.equal(p.A[1], one.A[1]) and not p.B[:2].any() and one.B is None
    np.testing.assert_allclose(p.rho, np.sqrt((residuals(p, h)[1] ** 2).mean((0, 2))), rtol=1e-9)
    assert p.rho[2] < one.rho[2]


def test_a_second_lag_finds_what_only_it_can_know():
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 400, 4, D, generator=g)
    h = torch.stack([first, second, first + 0.1 * torch.randn(400, 4, D, generator=g)], 1)
    train = accumulate([h[:200]])
    held = accumulate([h[200:]], train.shift)
    one, two = (predictors.explained(fit(train, held, lags=n), held) for n in (1, 2))
    assert one[1] < 0.05 and two[1] > 0.95 and one[0] == two[0]


@pytest.mark.parametrize("lags", [1, 2])
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_the_best_of_its_rank(rank, lags):
    h, strength = recorded(offset=3), 0.05
    moments = accumulate([h])
    p = fit(moments, moments, (strength,), torch.float64, lags, rank)
    x = p.standardise(torch.from_numpy(flat(h))).numpy()
    for s in range(1, S):
        X = np.concatenate([x[:, s - 1 - lag] for lag in range(min(lags, s))], 1)
        penalty = np.sqrt(strength * np.trace(X.T @ X) / X.shape[1]) * np.eye(X.shape[1])
        X, Y = np.concatenate([X, penalty]), np.concatenate([x[:, s], 0 * penalty[:, :D]])
        W = np.linalg.lstsq(X, Y, rcond=None)[0]
        fitted = np.linalg.svd(X @ W)
        best = (fitted[0][:, :rank] * fitted[1][:rank]) @ fitted[2][:rank]
        found = np.concatenate([M[s].numpy() for M in (p.A, p.B) if M is not None][:s])
        np.testing.assert_allclose(X @ found, best, atol=1e-9)
        assert np.linalg.matrix_rank(found, tol=1e-9) == rank
        # a second way to the same: the columns and the rows, in turns
        rows = np.random.default_rng(0).normal(size=(rank, D))
        for _ in range(2000):
            columns = np.linalg.lstsq(X, Y @ np.linalg.pinv(rows), rcond=None)[0]
            rows = np.linalg.lstsq(X @ columns, Y, rcond=None)[0]
        assert ((Y - X @ found) ** 2).sum() <= ((Y - X @ columns @ rows) ** 2).sum() + 1e-6


def test_full_rank_is_no_restriction():
    moments = accumulate([recorded()])
    full, same = fit(moments, moments), fit(moments, moments, rank=D)
    torch.testing.assert_close(same.A, full.A)
    torch.testing.assert_close(same.rho, full.rho)


@pytest.mark.parametrize("wrong", [{"lags": 3}, {"lags": 0}, {"rank": 0}, {"rank": D + 1}], ids=str)
def test_lags_and_ranks_that_cannot_be_are_refused(wrong):
    moments = accumulate([recorded()])
    with pytest.raises(ValueError, match=f"^{[*wrong][0]} is"):
        fit(moments, moments, **wrong)


def test_the_means_take_up_the_intercept():
    h = recorded(offset=5)
    moments = accumulate([h])
    p = fit(moments, moments, (1e-3,))
    x = flat(h)
    for s in range(1, S):
        alpha = 1e-3 * moments.square[s - 1].trace().item() / D
        ridge = Ridge(alpha=alpha, tol=1e-12).fit(x[:, s - 1], x[:, s])
        A = (p.A[s] * p.scale[s] / p.scale[s - 1]).double().numpy()
        intercept = p.mu[s].double().numpy() - p.mu[s - 1].double().numpy() @ A
        np.testing.assert_allclose(A, ridge.coef_.T, atol=1e-5)
        np.testing.assert_allclose(intercept, ridge.intercept_, atol=1e-4)


def test_the_first_step_has_no_predictor(fitted):
    _, _, p = fitted
    assert not p.A[0].any() and not p.b[0].any() and p.rho[0] == pytest.approx(1, rel=1e-5)


def test_rho_is_the_rms_of_the_training_residuals(fitted):
    train, _, ridge = fitted
    moments = accumulate([train])
    for p in (ridge, predictors.identity(moments), predictors.mean_only(moments)):
        _, r = residuals(p, train)
        np.testing.assert_allclose(p.rho, np.sqrt((r**2).mean((0, 2))), rtol=1e-5)


def test_the_strength_is_the_best_of_those_tried_on_held_out_images():
    few, validation = recorded(n_images=2), recorded(n_images=40, seed=1)
    train = accumulate([few])
    held = accumulate([validation], train.shift)
    chosen = fit(train, held).strength[1:]
    errors = [
        (residuals(fit(train, held, (s,)), validation)[1][:, 1:] ** 2).sum((0, 2))
        for s in STRENGTHS
    ]
    np.testing.assert_allclose(chosen, np.array(STRENGTHS)[np.argmin(errors, axis=0)], rtol=1e-5)
    assert (chosen > min(STRENGTHS)).all()


def test_fewer_trajectories_than_channels_have_rho_measured_on_held_out_images():
    g = torch.Generator().manual_seed(0)
    train, held = (accumulate([torch.randn(n, 2, 1, 9, generator=g)]) for n in (5, 50))
    held = accumulate([torch.randn(50, 2, 1, 9, generator=g)], train.shift)
    assert fit(train, held, (1e-9,)).rho[1] > 0.5  # on the training images it would be nearly 0


@pytest.mark.parametrize("strengths", [(0.1, -1), (float("nan"),), ("a",), ()])
def test_strengths_that_mean_nothing_are_refused(strengths):
    moments = accumulate([recorded()])
    with pytest.raises(ValueError, match="^ridge_strengths"):
        fit(moments, moments, strengths)


def test_a_predictor_that_is_not_determined_is_refused_and_another_strength_chosen():
    h = recorded()
    h[..., 1] = 7  # never varies: without ridge, anything may be its coefficient
    moments = accumulate([h])
    with pytest.raises(ValueError, match=r"^ridge_strengths is \[0\].*step number 1"):
        fit(moments, moments, [0])
    assert fit(moments, moments, [0, 0.1]).strength[1] == pytest.approx(0.1)


def test_moments_of_no_trajectories_are_refused():
    moments = accumulate([recorded()])
    none = Moments.none(moments.shift)
    for train, validation in ((none, moments), (moments, none)):
        with pytest.raises(ValueError, match="no trajectories"):
            fit(train, validation)


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567])
def test_a_step_that_never_varies_is_refused_by_number(value):
    h = recorded()
    h[:, 1] = value
    moments = accumulate([h])
    with pytest.raises(ValueError, match="step number 1 never varies"):
        fit(moments, moments)


def test_a_step_that_is_the_one_before_is_refused_by_number():
    h = recorded()
    h[:, 1] = h[:, 0]
    with pytest.raises(ValueError, match="step number 1 is predicted without error"):
        predictors.identity(accumulate([h]))


def test_identity_and_mean_only_are_what_they_are_called(fitted):
    moments = accumulate([fitted[0]])
    same, nothing = predictors.identity(moments), predictors.mean_only(moments)
    assert torch.equal(same.A[1:], torch.eye(D).expand(S - 1, D, D)) and not same.A[0].any()
    assert not nothing.A.any() and not same.b.any() and not nothing.b.any()
    for p in (same, nothing):
        assert torch.equal(p.mu, fitted[2].mu) and torch.equal(p.scale, fitted[2].scale)
    torch.testing.assert_close(nothing.rho, torch.ones(S))


def test_residual_covariance_is_that_of_the_residuals():
    h = recorded(30, seed=2, offset=7)
    for p in (some_predictors(S, D, seed=3), two_back()):
        _, r = residuals(p, h)
        C = residual_covariance(p, accumulate([h]))
        assert C.dtype == torch.float64
        for s in range(S):
            np.testing.assert_allclose(C[s], np.cov(r[:, s].T, bias=True), rtol=1e-9, atol=1e-9)


def test_explained_is_the_share_of_variance_by_definition(fitted):
    held = recorded(30, seed=2)
    for p in (fitted[2], some_predictors(S, D, seed=3), two_back()):  # the latter have intercepts
        x, r = residuals(p, held)
        expected = 1 - (r[:, 1:] ** 2).sum((0, 2)) / (x[:, 1:] ** 2).sum((0, 2))
        np.testing.assert_allclose(predictors.explained(p, accumulate([held])), expected, rtol=1e-9)


def test_eigenvalues_come_largest_first():
    p = some_predictors(3, 2)
    p.A[1], p.A[2] = torch.diag(torch.tensor([0.1, -0.9])), torch.tensor([[0.0, 0.5], [-0.5, 0.0]])
    values = eigenvalues(p)
    np.testing.assert_allclose(values[0], [-0.9, 0.1], atol=1e-7)
    np.testing.assert_allclose(sorted(values[1].imag), [-0.5, 0.5], atol=1e-7)


def test_predictors_move_to_another_device_whole(fitted):
    for p in (fitted[2], two_back()):
        moved = p.to("meta")
        assert isinstance(moved, Predictors) and (moved.B is None) == (p.B is None)
        assert all(v.device.type == "meta" for v in vars(moved).values() if v is not None)


def test_predictors_come_back_from_their_file(tmp_path, fitted):
    for p in (fitted[2], two_back()):
        p.save(tmp_path / "p.safetensors", {"steps": [0, 2]})
        loaded, record = Predictors.load(tmp_path / "p.safetensors")
        assert record == {"steps": [0, 2]} and loaded.n_steps == S
        for name, value in vars(p).items():
            found = getattr(loaded, name)
            assert found is value is None or torch.equal(found, value)


def test_a_file_that_holds_no_predictors_is_named(tmp_path):
    save_tensors(tmp_path / "part.safetensors", {"mu": torch.zeros(1)})
    with pytest.raises(ValueError, match="part.safetensors does not hold predictors"):
        Predictors.load(tmp_path / "part.safetensors")


def test_shuffled_pairs_hold_the_same_activations_in_another_order_at_every_step():
    h = torch.arange(50 * 3 * 2.0).view(50, 3, 2)
    mixed = predictors.shuffled_pairs(h, torch.Generator().manual_seed(0))
    for s in range(3):
        assert torch.equal(mixed[:, s].sort(0).values, h[:, s])
    places = mixed[:, :, 0].argsort(0)  # where each step's activations went
    assert (places[:, 0] == places[:, 1]).sum() < 10 and (places[:, 1] == places[:, 2]).sum() < 10
