import numpy as np
import pytest
import torch
from conftest import some_predictors, take
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from helpers import files, predictors, sae
from helpers.predictors import STRENGTHS, Moments, Predictors, accumulate, eigenvalues, fit

S, D = 3, 4
seeds = st.integers(0, 10_000)


def recorded(n_images=12, seed=0, offset=0.0):
    """Activations (image, step, token, channel) in which each step partly foretells the next."""
    g = torch.Generator().manual_seed(seed)
    A = 0.5 * torch.randn(D, D, generator=torch.Generator().manual_seed(99))
    h = [torch.randn(n_images, 5, D, generator=g)]
    for _ in range(S - 1):
        h.append(h[-1] @ A + 0.5 * torch.randn(n_images, 5, D, generator=g) + 1)
    return torch.stack(h, 1) * torch.tensor([1.0, 3.0, 10.0])[:, None, None] + offset


def flat(h):
    """(image, step, token, channel) -> (trajectory, step, channel) in float64."""
    return h.transpose(1, 2).flatten(0, 1).double().numpy()


@pytest.fixture(scope="module")
def fitted():
    train, validation = recorded(), recorded(seed=1)
    first = accumulate([train])
    return train, validation, fit(first, accumulate([validation], first.shift))


# --- moments ------------------------------------------------------------------------------------


def test_moments_are_the_sums_they_claim_to_be():
    h = recorded(offset=100)
    m = accumulate([h])
    x = flat(h) - m.shift.numpy()
    assert m.count == 60 and m.total.dtype == torch.float64
    np.testing.assert_allclose(m.total, x.sum(0), atol=1e-9)
    for s in range(S):
        np.testing.assert_allclose(m.square[s], x[:, s].T @ x[:, s], atol=1e-9)
        if s:
            np.testing.assert_allclose(m.cross[s], x[:, s - 1].T @ x[:, s], atol=1e-9)


@given(seed=seeds, cuts=st.sets(st.integers(1, 11)))
def test_moments_do_not_depend_on_how_images_are_cut_into_shards(seed, cuts):
    h = recorded(seed=seed)
    whole = accumulate([h])
    bounds = [0, *sorted(cuts), len(h)]
    shards = [h[a:b] for a, b in zip(bounds, bounds[1:])]
    parts = [accumulate([shard], whole.shift) for shard in shards]
    for other in (accumulate(shards, whole.shift), sum(parts[1:], parts[0])):
        assert other.count == whole.count
        for name in ("total", "square", "cross"):
            torch.testing.assert_close(
                getattr(other, name), getattr(whole, name), rtol=1e-10, atol=1e-9
            )


@pytest.mark.parametrize("n", [1, 3, 40])
def test_small_shards_are_summed_together(monkeypatch, n):
    """Fewer rows than channels are not worth adding (d, d) up for; the sums are the same."""
    products, squares = [], predictors._squares
    monkeypatch.setattr(predictors, "_squares", lambda h: products.append(h.shape[1]) or squares(h))
    h = torch.randn(n, 2, 4, 20, generator=torch.Generator().manual_seed(0)) + 5
    together, shift = accumulate(h.split(1)), accumulate([h[:1]]).shift
    assert products[:-1] == [n * 4] if n * 4 < 20 else products[:-1] == [20] * (n * 4 // 20)
    x = flat(h) - shift.numpy()
    assert together.count == n * 4 and torch.equal(together.shift, shift)
    np.testing.assert_allclose(together.total, x.sum(0), rtol=1e-12, atol=1e-10)
    for s in range(2):
        np.testing.assert_allclose(together.square[s], x[:, s].T @ x[:, s], rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(together.cross[1], x[:, 0].T @ x[:, 1], rtol=1e-12, atol=1e-10)


def test_moments_with_different_shifts_do_not_add():
    with pytest.raises(ValueError, match="shift"):
        accumulate([recorded()]) + accumulate([recorded(seed=1)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value):
    h = recorded()
    h[3, 1, 2, 0] = value
    with pytest.raises(ValueError, match="NaN or infinity.*store_dtype"):
        accumulate([h])


def test_no_trajectories_are_refused():
    with pytest.raises(ValueError, match="no trajectories"):
        accumulate(iter([]))


def test_moments_start_from_the_first_shards_mean():
    h = recorded(offset=50)
    moments = accumulate([h[:6], h[6:]], device="cpu")
    assert isinstance(moments, Moments)
    np.testing.assert_allclose(moments.shift, flat(h[:6]).mean(0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "device", ["cpu", torch.device("cpu"), "mps"]
)  # MPS has no float64, so the CPU does it
def test_moments_are_float64_on_the_cpu_whatever_they_are_summed_from(dtype, device):
    h = recorded().to(dtype)
    m, expected = accumulate([h], device=device), accumulate([h.double()])
    for name in ("shift", "total", "square", "cross"):
        assert getattr(m, name).dtype == torch.float64 and getattr(m, name).device.type == "cpu"
        assert torch.equal(getattr(m, name), getattr(expected, name))


class Processes:
    """An accelerator of as many processes as it is given moments; reduces by adding up what all of them hold."""

    device = torch.device("cpu")

    def __init__(self, parts):
        self.parts, self.fields = parts, iter(("count", "total", "square", "cross"))

    def reduce(self, value, how):
        name = next(self.fields)
        assert how == "sum" and torch.equal(value, torch.as_tensor(getattr(self.parts[0], name)))
        return sum(torch.as_tensor(getattr(part, name)) for part in self.parts)


def test_moments_of_several_processes_add_up_and_an_idle_one_adds_nothing():
    h = recorded(offset=3)
    whole = accumulate([h])
    parts = [
        accumulate([h[:5]], whole.shift),
        accumulate([h[5:]], whole.shift),
        Moments.none(whole.shift),
    ]
    together = parts[0].summed(Processes(parts))
    assert together.count == whole.count and isinstance(together.count, int)
    for name in ("shift", "total", "square", "cross"):
        torch.testing.assert_close(
            getattr(together, name), getattr(whole, name), rtol=1e-12, atol=1e-10
        )
    alone = whole + parts[2]
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(getattr(whole, name)))
        for name, v in vars(alone).items()
    )


def test_moments_come_back_from_their_file(tmp_path):
    moments = accumulate([recorded()])
    moments.save(tmp_path / "m.safetensors", {"trajectories": "12ab"})
    loaded, record = Moments.load(tmp_path / "m.safetensors")
    assert (
        record == {"trajectories": "12ab"}
        and loaded.count == moments.count
        and isinstance(loaded.count, int)
    )
    for name in ("shift", "total", "square", "cross"):
        assert torch.equal(getattr(loaded, name), getattr(moments, name))
    for name, value in vars(fit(loaded, loaded)).items():
        assert torch.equal(value, getattr(fit(moments, moments), name))


# --- fitting ------------------------------------------------------------------------------------


def test_standardised_activations_have_mean_zero_and_rms_one(fitted):
    train, _, p = fitted
    x = p.standardise(train.transpose(1, 2)).double().flatten(0, 1)
    assert abs(x.mean(0)).max() < 1e-5
    np.testing.assert_allclose(x.pow(2).mean((0, 2)), 1, rtol=1e-5)


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
        ridge = Ridge(alpha=strength * np.trace(x[:, s - 1].T @ x[:, s - 1]) / D, tol=1e-12).fit(
            x[:, s - 1], x[:, s]
        )
        np.testing.assert_allclose(p.A[s], ridge.coef_.T, atol=1e-6)
        np.testing.assert_allclose(p.b[s], ridge.intercept_, atol=1e-6)
        assert p.strength[s] == pytest.approx(strength)


def test_the_intercept_takes_up_a_mean_that_is_not_zero():
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


def residuals(p, h):
    """r, (trajectory, step, channel), float64, by the definition."""
    x = (flat(h) - p.mu.double().numpy()) / p.scale.double().numpy()[:, None]
    r = x.copy()
    for s in range(1, S):
        r[:, s] = x[:, s] - (x[:, s - 1] @ p.A[s].double().numpy() + p.b[s].double().numpy())
    return x, r


def test_rho_is_the_rms_of_the_training_residuals(fitted):
    train, _, p = fitted
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


@pytest.mark.parametrize(
    "strengths, said",
    [
        ((0.1, -1), "holds -1;"),
        ((float("nan"),), "holds nan;"),
        ((float("inf"), 1), "holds inf;"),
        (("a",), "holds 'a';"),
        ((), "is empty;"),
    ],
)
def test_strengths_that_mean_nothing_are_refused(fitted, strengths, said):
    moments = accumulate([recorded()])
    with pytest.raises(ValueError, match=f"^ridge_strengths {said}.*of at least 0$"):
        fit(moments, moments, strengths)


def test_a_predictor_that_is_not_determined_is_refused_and_another_strength_chosen():
    h = recorded()
    h[..., 1] = (
        7  # a channel that never varies, so that without ridge anything may be its coefficient
    )
    moments = accumulate([h])
    with pytest.raises(
        ValueError,
        match=r"^ridge_strengths \[0\]: .*kept step number 1 is not determined; valid is a number above 0",
    ):
        fit(moments, moments, [0])
    assert fit(moments, moments, [0, 0.1]).strength[1] == pytest.approx(0.1)


def test_moments_of_no_trajectories_are_refused():
    moments = accumulate([recorded()])
    for train, validation in (
        (Moments.none(moments.shift), moments),
        (moments, Moments.none(moments.shift)),
    ):
        with pytest.raises(ValueError, match="no trajectories"):
            fit(train, validation)


def test_the_first_step_has_no_predictor(fitted):
    _, _, p = fitted
    assert not p.A[0].any() and not p.b[0].any() and p.rho[0] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1234.567])
def test_a_step_that_never_varies_is_refused_by_number(value):
    h = recorded()
    h[:, 1] = value
    moments = accumulate([h])
    with pytest.raises(ValueError, match="kept step number 1 never vary"):
        fit(moments, moments)


# --- the map and its inverse --------------------------------------------------------------------


@given(seed=seeds, n_steps=st.integers(2, 8), d=st.integers(1, 9))
def test_residualize_then_restore_gives_the_activations_back(seed, n_steps, d):
    p = some_predictors(n_steps, d, seed)
    x = torch.randn(20, n_steps, d, generator=torch.Generator().manual_seed(seed))
    y = p.residualize(x)
    assert y.dtype == torch.float32 and y.shape == (20, n_steps * d)
    assert (p.restore(y) - x).norm() <= 1e-5 * x.norm()
    assert (p.residualize(p.restore(y)) - y).norm() <= 1e-5 * y.norm()


@given(seed=seeds)
def test_standardise_then_unstandardise_gives_the_activations_back(seed):
    p = some_predictors(seed=seed)
    h = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(p.unstandardise(p.standardise(h)), h)


def test_residuals_follow_their_definition(fitted):
    train, _, p = fitted
    x, r = residuals(p, train)
    expected = (r / p.rho.double().numpy()[:, None]).reshape(len(r), -1)
    np.testing.assert_allclose(p.residualize(torch.from_numpy(x)), expected, rtol=1e-9, atol=1e-9)


@given(seed=seeds)
def test_restore_is_the_recurrence(seed):
    p = some_predictors(5, 3, seed)
    y = np.random.default_rng(seed).standard_normal((4, 15))
    A, b, rho = (getattr(p, name).double().numpy() for name in ("A", "b", "rho"))
    for row, restored in zip(y, p.restore(torch.from_numpy(y))):
        x = None
        for s in range(5):
            r = rho[s] * row[3 * s : 3 * s + 3]
            x = r if x is None else x @ A[s] + b[s] + r
            np.testing.assert_allclose(restored[s], x, rtol=1e-10, atol=1e-12)


def test_restore_worked_by_hand():
    p = Predictors(
        mu=torch.zeros(3, 1),
        scale=torch.ones(3),
        A=torch.tensor([0.0, 2.0, -1.0]).view(3, 1, 1),
        b=torch.tensor([[0.0], [1.0], [5.0]]),
        rho=torch.tensor([1.0, 0.5, 2.0]),
        strength=torch.zeros(3),
    )
    y = torch.tensor([[3.0, 4.0, 1.0]])
    assert p.restore(y).flatten().tolist() == [3, 9, -2]  # 3; 3·2 + 1 + 2; 9·(-1) + 5 + 2
    assert p.feature_trajectories(y).flatten().tolist() == [3, 8, -6]  # 3; 3·2 + 2; 8·(-1) + 2


@given(seed=seeds, a=st.floats(-3, 3), c=st.floats(-3, 3))
def test_feature_trajectories_are_linear(seed, a, c):
    p = some_predictors(seed=seed)
    v, w = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed))
    together = p.feature_trajectories(a * v + c * w)
    torch.testing.assert_close(
        together,
        a * p.feature_trajectories(v) + c * p.feature_trajectories(w),
        rtol=1e-4,
        atol=1e-4,
    )


@given(seed=seeds)
def test_a_feature_trajectory_is_what_its_direction_adds(seed):
    p = some_predictors(seed=seed)
    y, w = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        p.restore(y + w) - p.restore(y), p.feature_trajectories(w), rtol=1e-4, atol=1e-4
    )


def test_leading_dimensions_are_kept():
    p = some_predictors()
    x = torch.randn(2, 5, 3, 4)
    y = p.residualize(x)
    assert y.shape == (2, 5, 12)
    torch.testing.assert_close(y[1, 3], p.residualize(x[1, 3]))
    torch.testing.assert_close(p.restore(y), x)


class FakeStore:
    """Trajectories (trajectory, step, channel) that need no folder."""

    def __init__(self, h):
        self.h = h

    def batches(self, split, batch_size, seed=0, start=0, share=(0, 1)):
        order = torch.randperm(len(self.h), generator=torch.Generator().manual_seed(seed))
        parts = self.h[order].split(batch_size)[start:]
        return (part.chunk(share[1])[share[0]] for part in parts)


@pytest.mark.parametrize("start, share", [(0, (0, 1)), (3, (0, 1)), (1, (1, 2))])
def test_batches_are_the_stores_residualized(fitted, start, share):
    train, _, p = fitted
    store = FakeStore(train.transpose(1, 2).flatten(0, 1))
    given = take(3, p.batches(store, "train", 8, 5, start, share))
    for y, h in zip(given, store.batches("train", 8, 5, start, share)):
        assert torch.equal(y, p.residualize(p.standardise(h))) and y.shape == (8 // share[1], S * D)
    assert len(given) == 3


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_predictors_move_to_another_device_whole(fitted, device):
    _, _, p = fitted
    moved = p.to(device)
    assert isinstance(moved, Predictors) and all(
        v.device.type == device for v in vars(moved).values()
    )
    assert moved.residualize(torch.randn(2, S, D, device=device)).device.type == device
    assert all(v.device.type == "cpu" for v in vars(p).values())


def test_eigenvalues_come_largest_first():
    p = some_predictors(3, 2)
    p.A[1], p.A[2] = torch.diag(torch.tensor([0.1, -0.9])), torch.tensor([[0.0, 0.5], [-0.5, 0.0]])
    values = eigenvalues(p)
    np.testing.assert_allclose(values[0], [-0.9, 0.1], atol=1e-7)
    np.testing.assert_allclose(sorted(values[1].imag), [-0.5, 0.5], atol=1e-7)


# --- files --------------------------------------------------------------------------------------


def test_predictors_come_back_from_their_file(tmp_path, fitted):
    _, _, p = fitted
    p.save(tmp_path / "p.safetensors", {"steps": [0, 2]})
    loaded, record = Predictors.load(tmp_path / "p.safetensors")
    assert record == {"steps": [0, 2]} and loaded.n_steps == S
    for name, value in vars(p).items():
        assert torch.equal(getattr(loaded, name), value)


def test_a_file_that_holds_no_predictors_is_named(tmp_path):
    sae.SAE(4, 4, 1).save(tmp_path / "sae.safetensors")
    files.save_tensors(tmp_path / "part.safetensors", {"mu": torch.zeros(1)})
    for name in ("sae", "part"):
        with pytest.raises(ValueError, match=f"{name}.safetensors does not hold predictors"):
            Predictors.load(tmp_path / f"{name}.safetensors")


def test_a_file_that_holds_no_moments_is_named(tmp_path, fitted):
    fitted[2].save(tmp_path / "p.safetensors")
    files.save_tensors(tmp_path / "part.safetensors", {"count": torch.tensor(3)})
    for name in ("p", "part"):
        with pytest.raises(
            ValueError, match=f"{name}.safetensors does not hold moments; delete it"
        ):
            Moments.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("name", ["moments", "predictors"])
def test_a_flipped_byte_is_noticed(tmp_path, fitted, name):
    what, path = (
        accumulate([recorded()]) if name == "moments" else fitted[2],
        tmp_path / f"{name}.safetensors",
    )
    what.save(path)
    path.write_bytes(
        path.read_bytes()[:-9] + bytes([path.read_bytes()[-9] ^ 1]) + path.read_bytes()[-8:]
    )
    with pytest.raises(ValueError, match=f"{name}.safetensors is damaged"):
        type(what).load(path)
