import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score

from helpers.measure import metrics

nan = float("nan")


def same(a, b):
    return np.array_equal(np.array(a, float), np.array(b, float), equal_nan=True)


@pytest.mark.parametrize(
    "numerator, denominator, value",
    [
        ([1, 3], [2, 2], 1.0),
        ([1, 0], [3, 1], 0.25),
        ([0, 1, 0], [0, 2, 2], 0.25),
        ([0, 0], [1, 1], 0.0),
    ],
)
def test_a_ratio_is_of_sums_not_a_mean_of_ratios(numerator, denominator, value):
    assert metrics.ratio(numerator, denominator).value == value


@pytest.mark.parametrize("numerator, denominator", [([], []), ([0, 0], [0, 0])])
def test_a_ratio_of_nothing_is_nan(numerator, denominator):
    assert same(metrics.ratio(numerator, denominator), [nan] * 3)


def test_the_interval_is_the_percentile_bootstrap_over_images():
    rng = np.random.default_rng(1)
    numerator, denominator = rng.random(30), rng.random(30) + 1
    resampled = []
    draw = np.random.default_rng(7)
    for pick in draw.integers(30, size=(1000, 30)):
        resampled.append(sum(numerator[i] for i in pick) / sum(denominator[i] for i in pick))
    estimate = metrics.ratio(numerator, denominator, seed=7)
    np.testing.assert_allclose(estimate[1:], np.percentile(resampled, [2.5, 97.5]))
    assert estimate.low < estimate.value < estimate.high


def test_a_mean_and_its_interval():
    values = np.repeat([0.0, 1.0], 200)
    estimate = metrics.mean(values)
    assert estimate.value == 0.5
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)
    assert same(metrics.mean([0.3]), [0.3] * 3)


def test_an_estimate_prints_with_its_interval():
    assert str(metrics.Estimate(0.12345, 0.1, 0.2)) == "0.123 [0.100, 0.200]"
    assert str(metrics.NOTHING) == "–"


# --- explained variance -------------------------------------------------------------------------


def test_squared_errors_worked_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]]).view(1, 1, 2, 2)  # two tokens, two channels
    x_hat = torch.tensor([[1.0, 0.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    error, spread = metrics.squared_errors(x, x_hat, torch.tensor([[2.0, 3.0]]))
    assert error.tolist() == [[5.0]]  # 0 + 4 + 0 + 1
    assert spread.tolist() == [[7.0]]  # 1 + 1 + 1 + 4
    assert metrics.explained_variance(error.sum(1), spread.sum(1)).value == pytest.approx(1 - 5 / 7)


@pytest.fixture
def activations():
    g = torch.Generator().manual_seed(0)
    return 3 * torch.randn(4, 3, 5, 2, generator=g) + 7, torch.randn(3, 2, generator=g)


def explained(x, x_hat, mean):
    error, spread = metrics.squared_errors(x, x_hat, mean)
    assert error.shape == spread.shape == (4, 3) and error.dtype == np.float64
    return metrics.explained_variance(error.sum(1), spread.sum(1))


def test_predicting_the_training_mean_explains_nothing(activations):
    x, mean = activations
    assert same(explained(x, mean[:, None].expand_as(x), mean), [0, 0, 0])


def test_predicting_the_truth_explains_everything(activations):
    x, mean = activations
    assert same(explained(x, x, mean), [1, 1, 1])


def test_squared_errors_are_those_of_each_image_and_step(activations):
    x, mean = activations
    x_hat = x + torch.arange(12.0).view(4, 3, 1, 1)
    error, spread = metrics.squared_errors(x, x_hat, mean)
    for i in range(4):
        for s in range(3):
            assert error[i, s] == pytest.approx(10 * (3 * i + s) ** 2, rel=1e-5)
            assert spread[i, s] == pytest.approx(
                sum(float((x[i, s, t] - mean[s]).pow(2).sum()) for t in range(5)), rel=1e-5
            )


def test_intervals_resample_images_not_tokens():
    one_image_differs = np.array([100.0, 0, 0, 0])
    by_image = metrics.explained_variance(one_image_differs, np.full(4, 100.0))
    by_token = metrics.explained_variance(np.repeat(one_image_differs, 50) / 50, np.full(200, 2.0))
    assert by_image.value == by_token.value == 0.75
    assert by_image.high - by_image.low > 3 * (by_token.high - by_token.low)


# --- AUROC --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, labels, value",
    [
        ([0, 1], [0, 1], 1.0),
        ([1, 0], [0, 1], 0.0),
        ([1, 1], [0, 1], 0.5),
        ([0, 1, 1, 2], [0, 0, 1, 1], 0.875),  # 3 pairs in order, one tied
        ([0, 1], [1, 1], nan),
        ([0, 1], [0, 0], nan),
    ],
)
def test_auroc_worked_by_hand(scores, labels, value):
    assert same(
        metrics.auroc(np.array(scores)[:, None], np.array(labels, bool)[:, None]), [[value]]
    )


@given(
    scores=hnp.arrays(float, (20, 3), elements=st.integers(0, 4).map(float)),
    labels=hnp.arrays(bool, (20, 2)).filter(lambda a: (a.any(0) & ~a.all(0)).all()),
)
def test_auroc_is_that_of_sklearn_ties_included(scores, labels):
    ours = metrics.auroc(scores, labels)
    for i in range(3):
        for j in range(2):
            assert ours[i, j] == pytest.approx(roc_auc_score(labels[:, j], scores[:, i]), abs=1e-12)


def test_auroc_of_many_latents_at_once_is_that_of_each():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 5, (50, 150)), rng.random((50, 4)) < 0.4
    one_by_one = np.stack([metrics.auroc(scores[:, [i]], labels)[0] for i in range(150)])
    assert np.array_equal(metrics.auroc(scores, labels), one_by_one)


def test_the_interval_of_auroc_resamples_images():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(12), 30)
    labels = np.repeat(np.arange(12) % 2 == 0, 30)
    scores = labels + np.repeat(rng.normal(0, 1.5, 12), 30) + 0.01 * rng.random(360)
    by_image = metrics.of_resampled(metrics.resampled_auroc(scores, labels, images, 12))
    by_token = metrics.of_resampled(metrics.resampled_auroc(scores, labels, np.arange(360), 360))
    assert by_image.value == by_token.value == pytest.approx(roc_auc_score(labels, scores))
    assert by_image.low <= by_image.value <= by_image.high
    assert by_image.high - by_image.low > 2 * (by_token.high - by_token.low)


def test_the_interval_of_a_label_that_never_holds_is_nan():
    estimate = metrics.of_resampled(
        metrics.resampled_auroc(np.arange(6.0), np.zeros(6, bool), np.arange(6), 6)
    )
    assert same(estimate, [nan] * 3)


def test_resampled_auroc_draws_the_same_images_whoever_takes_part():
    rng = np.random.default_rng(1)
    images, labels = np.repeat(np.arange(8), 5), rng.random(40) < 0.5
    scores = rng.integers(0, 6, 40).astype(float)  # with ties
    some = images != 3  # an image without samples of this kind keeps its place in the draw
    kept = metrics.resampled_auroc(scores[some], labels[some], images[some], 8, n_resamples=20)
    picks = np.random.default_rng(0).integers(8, size=(20, 8))
    for value, pick in zip(kept[1:], picks):
        rows = np.concatenate([np.nonzero(images == i)[0] for i in pick if i != 3])
        assert value == pytest.approx(roc_auc_score(labels[rows], scores[rows]))


# --- shares -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_true, n", [(0, 12), (12, 12), (3, 10), (1, 1)])
def test_the_interval_of_a_share_is_wilsons(n_true, n):
    z, p = metrics.Z, n_true / n
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n),
    )
    estimate = metrics.share(np.arange(n) < n_true)
    assert estimate == pytest.approx((p, max(0, centre - half), min(1, centre + half)))
    assert estimate.low < estimate.high


@pytest.mark.parametrize("n_true, n", [(0, 12), (12, 12), (3, 10)])
def test_the_interval_of_successes_given_as_numbers_is_agresti_and_coulls(n_true, n):
    p = (n_true + 2) / (n + 4)
    half = metrics.Z * np.sqrt(p * (1 - p) / (n + 4))
    estimate = metrics.share((np.arange(n) < n_true).astype(float))
    assert estimate == pytest.approx((n_true / n, max(0, p - half), min(1, p + half)))


def test_the_interval_of_shares_worked_by_hand():
    # with 0 0 1 1 added: mean 0.5, squares 4 · 0.25 + 2 · 0.25² = 1.125 over 6 values
    half = metrics.Z * np.sqrt(1.125 / 6 / 6)
    estimate = metrics.share([0.25, nan, 0.75])
    assert estimate == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_a_difference_of_pairs_worked_by_hand():
    # successes of a alone: 3, of b alone: 1, of both: 2, of neither: 4
    a = np.repeat([True, False, True, False], [3, 1, 2, 4])
    b = np.repeat([False, True, True, False], [3, 1, 2, 4])
    centre = (3.5 - 1.5) / 12
    half = metrics.Z * np.sqrt((3.5 + 1.5 - (3.5 - 1.5) ** 2 / 12) / 12**2)
    assert metrics.paired(a, b) == pytest.approx((0.2, centre - half, centre + half))


def test_pairs_with_nothing_read_take_no_part():
    a, b = [0.5, nan, 1.0, 0.25], [0.25, 1.0, nan, 0.25]
    assert metrics.paired(a, b) == metrics.paired([0.5, 0.25], [0.25, 0.25])


@given(values=hnp.arrays(float, st.integers(1, 40), elements=st.floats(0, 1)))
def test_intervals_of_shares_have_a_width_and_hold_their_value(values):
    for e in (
        metrics.share(values),
        metrics.share(values > 0.5),
        metrics.paired(values, np.full(len(values), 1.0)),
        metrics.paired(values, values),
    ):
        assert e.low <= e.value <= e.high and e.high - e.low > 1 / (len(values) + 4)


def test_shares_cover_what_they_estimate():
    rng = np.random.default_rng(0)
    trials = rng.beta(8, 0.5, (400, 12))  # the mean is 8 / 8.5, most are close to 1
    covered = [e.low <= 8 / 8.5 <= e.high for e in map(metrics.share, trials)]
    assert np.mean(covered) > 0.9  # the percentile bootstrap: 0.85


@pytest.mark.parametrize("values", [[0.5, 1.5], [-0.1]])
def test_what_is_no_share_is_refused(values):
    outside = next(v for v in values if not 0 <= v <= 1)
    with pytest.raises(ValueError, match=f"values is {outside}"):
        metrics.share(values)
    with pytest.raises(ValueError, match=f"b is {outside}"):
        metrics.paired(np.ones(len(values)), values)


def test_the_share_of_nothing_is_nan():
    assert same(metrics.share([]), [nan] * 3) and same(metrics.share([nan]), [nan] * 3)
    assert same(metrics.paired([nan], [1.0]), [nan] * 3)


# --- sparse codes -------------------------------------------------------------------------------


def some_codes(seed=0, n=150, latents=12):
    """Codes with many zeros and many ties; one latent never fires, one always does."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(1, 4, (n, latents)) * (rng.random((n, latents)) < 0.2)
    codes[:, 0], codes[:, 1] = 0, 1 + rng.integers(0, 3, n)
    labels = rng.random((n, 3)) < 0.3
    labels[:, 2] = False
    return codes.astype(float), labels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "kind", [scipy.sparse.csr_matrix, scipy.sparse.csc_matrix, scipy.sparse.coo_matrix]
)
def test_auroc_of_sparse_codes_is_that_of_dense_ones(seed, kind):
    codes, labels = some_codes(seed)
    given = kind(codes)
    np.testing.assert_array_equal(metrics.auroc(given, labels), metrics.auroc(codes, labels))
    assert np.array_equal(given.toarray(), codes)
