import numpy as np
import pytest
import scipy.sparse
import torch
from activations import D, S, recorded
from conftest import some_predictors
from sklearn.metrics import roc_auc_score

from helpers import coordinates, predictors
from helpers.dictionary import Dictionary
from helpers.measure import metrics, readouts
from helpers.measure.detection import Codes
from helpers.measure.labels import Labels
from helpers.moments import accumulate
from helpers.sae import SAE

N_IMAGES, N_TOKENS = 40, 6


def samples(n=200, n_images=20, seed=0):
    """Scores with ties, labels that go with them, and images."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(6, size=n).astype(float)
    return scores, rng.random(n) < 0.2 + 0.1 * scores, rng.integers(n_images, size=n)


def change(value_of, n_images, i, by=1e-6):
    """By how much a figure changes with the weight of image i, per unit of it."""
    weights = np.ones(n_images)
    weights[i] += by
    return (value_of(weights) - value_of(np.ones(n_images))) / by


def test_an_influence_is_what_a_figure_changes_by_with_an_images_weight():
    scores, labelled, images = samples()
    found = readouts.auroc(scores, labelled, images, 20)
    assert found.value == pytest.approx(roc_auc_score(labelled, scores))
    rng = np.random.default_rng(1)
    a, b = rng.random(20), rng.random(20)
    share = readouts.ratio(a, b)
    assert share.value == pytest.approx(a.sum() / b.sum())
    for i in range(20):
        weighted = change(lambda w: roc_auc_score(labelled, scores, sample_weight=w[images]), 20, i)
        assert found.influence[i] == pytest.approx(weighted, abs=1e-5)
        assert share.influence[i] == pytest.approx(
            change(lambda w: (w @ a) / (w @ b), 20, i), abs=1e-5
        )


def test_intervals_agree_with_resampling_images():
    scores, labelled, images = samples(n=3000, n_images=150)
    ours = readouts.auroc(scores, labelled, images, 150).estimate()
    resampled = metrics.of_resampled(metrics.resampled_auroc(scores, labelled, images, 150))
    np.testing.assert_allclose(ours, resampled, atol=0.1 * (resampled.high - resampled.low))


def test_a_correlation_is_pearsons_and_its_interval_that_of_resampling_images():
    rng = np.random.default_rng(3)
    images = rng.integers(60, size=240)
    x, each = rng.standard_normal(240), rng.standard_normal(60)
    x, y = x + each[images], 0.5 * x + rng.standard_normal(240) + each[images]
    found = readouts.correlation(x, y, images, 60)
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    resampled = []
    for drawn in rng.integers(60, size=(800, 60)):
        rows = np.concatenate([np.nonzero(images == i)[0] for i in drawn])
        resampled.append(np.corrcoef(x[rows], y[rows])[0, 1])
    estimate = found.estimate()
    assert estimate.high - estimate.value == pytest.approx(1.96 * np.std(resampled), rel=0.15)
    assert np.isnan(readouts.correlation(x, np.ones(240), images, 60).value)
    assert np.isnan(readouts.correlation([], [], np.zeros(0, int), 60).value)


def test_a_difference_of_the_same_images_leaves_out_what_they_share():
    rng = np.random.default_rng(0)
    hard = rng.random(100)
    a, b = (readouts.ratio(hard + noise, np.ones(100)) for noise in (0.01 * rng.random(100), 0))
    assert a.less(a).estimate() == (0, 0, 0)
    width, alone = (e.high - e.low for e in (a.less(b).estimate(), a.estimate()))
    assert width < alone / 20


def test_figures_that_are_undefined_take_no_part_in_a_mean():
    fine, none = readouts.ratio([1, 3], [4, 4]), readouts.ratio([0, 0], [0, 0])
    assert np.isnan(none.value)
    assert readouts.mean([none, fine, none]).value == 0.5
    assert np.isnan(readouts.mean([none]).value)
    assert np.isnan(readouts.auroc(np.ones(3), np.ones(3, bool), np.arange(3), 3).value)


def test_seeds_and_images_add_up_in_quadrature():
    value, low, high = readouts.over_seeds([1, 2, 3], [0.2, 0.3, 0.4])
    assert value == 2
    assert high - 2 == 2 - low == pytest.approx(np.hypot(0.3, 4.302653 / 3**0.5))
    assert readouts.over_seeds([1], [0.5]) == (1, 0.5, 1.5)
    assert np.isnan(readouts.over_seeds([1], [float("nan")]).low)
    assert readouts.over_seeds([1, 2], [np.nan] * 2).high > 1.5


def test_stability_is_that_of_the_best_pairing():
    u = torch.randn(30, 4, 25, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert readouts.stability(u, 3 * u[order]) == pytest.approx(1)
    assert readouts.stability(u, torch.randn(30, 4, 25)) < 0.5
    # greedily, 0 would take its nearest and leave 1 the worst
    a, b = torch.eye(2), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert readouts.stability(b, torch.flip(a, [0])) == pytest.approx((1 + 0.6) / 2)


# --- detection ---


def labels_of(seed, n=N_IMAGES):
    """Each image's first half is a thing that may be red, the second one that may be new."""
    rng = np.random.default_rng(seed)
    owner = 2 * np.arange(n)[:, None] + (np.arange(N_TOKENS) >= N_TOKENS // 2)
    has = rng.random((2 * n, 3)) < 0.5
    has[1::2, :1], has[::2, 1:] = False, False
    return Labels(["colour=red", "age=new", "age=rare"], owner, has, np.tile([0, 1], n))


def codes_of(labels, values):
    """Codes (image, token, latent) as `detection` keeps them."""
    return Codes(scipy.sparse.csc_matrix(values.reshape(-1, values.shape[-1])), len(labels.owner))


@pytest.fixture(scope="module")
def split():
    """Latent 0 is red, 1 and 2 share new by halves of the images, the others are noise."""
    codes, labels = {}, {"validation": labels_of(0), "test": labels_of(1)}
    for name, own in labels.items():
        rng = np.random.default_rng(len(name))
        red, new, _ = own.at_tokens().transpose(2, 0, 1)
        half = np.arange(N_IMAGES)[:, None] % 2 == 0
        noise = rng.random((N_IMAGES, N_TOKENS, 30)) * (rng.random((N_IMAGES, N_TOKENS, 30)) < 0.3)
        codes[name] = codes_of(
            own, np.stack([red, new & half, new & ~half, *noise.T.swapaxes(1, 2)], -1)
        )
    return codes, labels


def test_a_feature_that_is_split_shows_in_recall_and_is_found_by_several_latents(split):
    found, _ = readouts.detect(*split, ["colour=red", "age=new"])
    assert found["auroc"]["colour=red"].value == found["tpr"]["colour=red"].value == 1
    assert found["recall"]["colour=red"].value == found["precision"]["colour=red"].value == 1
    labelled, _ = split[1]["test"].contrast("age=new")
    share = labelled.any(1)[::2].sum() / labelled.any(1).sum()
    recall = found["recall"]["age=new"].value
    assert recall == pytest.approx(share) or recall == pytest.approx(1 - share)
    assert found["auroc"]["age=new"].value == pytest.approx((1 + recall) / 2)
    assert found["probe 5"]["age=new"].value == 1


def test_what_says_nothing_is_found_by_no_readout(split):
    codes, labels = split
    codes = {n: Codes(c.values[:, 3:], N_IMAGES) for n, c in codes.items()}
    found, _ = readouts.detect(codes, labels, labels["test"].names)
    for what in ("auroc", "probe 5", "probe 20", "arbitrary"):
        estimate = readouts.mean(found[what].values()).estimate()
        assert estimate.low < 0.5 < estimate.high and 0.4 < estimate.value < 0.6, what
    assert readouts.mean(found["tpr"].values()).value < 0.05


def test_the_control_is_that_of_latents_chosen_for_shuffled_labels(split):
    found, _ = readouts.detect(*split, ["colour=red"])
    assert found["arbitrary"]["colour=red"].value < 0.7 < found["auroc"]["colour=red"].value


def test_codes_of_either_sign_are_turned_and_have_no_recall(split):
    codes, labels = split
    both = {n: Codes(-c.values.toarray(), N_IMAGES, two_sided=True) for n, c in codes.items()}
    found, _ = readouts.detect(both, labels, ["colour=red"], probes=())
    assert found["auroc"]["colour=red"].value == 1 and set(found) == {"auroc", "tpr", "arbitrary"}


def test_labels_that_too_few_images_have_or_lack_are_left_out():
    labels = {"validation": labels_of(0), "test": labels_of(1)}
    assert readouts.usable(labels) == labels["test"].names
    labels["test"].has[:-4, 2] = False
    assert readouts.usable(labels) == labels["test"].names[:2]


def test_the_ceiling_is_what_a_probe_fitted_on_other_images_reads():
    labels = {"train": labels_of(2), "test": labels_of(3)}
    rng = np.random.default_rng(0)
    x = {n: rng.normal(size=(N_IMAGES, N_TOKENS, 4)) for n in labels}
    for name, own in labels.items():  # neither channel tells alone
        x[name][..., 0] = x[name][..., 1] + own.at_tokens()[..., 0]
    found = readouts.ceiling(x, labels, ["colour=red", "age=new"])
    assert found["colour=red"].value > 0.9
    assert 0.3 < found["age=new"].value < 0.7


# --- steps, description ---


def test_neighbours_are_explained_as_the_predictors_say():
    h = recorded(30)
    train, test = accumulate([h[:20]]), accumulate([h[20:]], accumulate([h[:20]]).shift)
    fitted = predictors.fit(train, test)
    x = fitted.standardise(h[20:].transpose(1, 2))
    found = readouts.neighbours(x, coordinates.residual(fitted, 0))
    assert found.value == pytest.approx(predictors.explained(fitted, test).mean(), abs=1e-5)


def test_the_peak_share_is_over_active_codes_and_their_positive_evidence():
    p = some_predictors(S, D)
    own = Dictionary("", coordinates.residual(p), SAE(S * D, 8, 2))
    x = torch.randn(3, 5, S, D, generator=torch.Generator().manual_seed(0))
    own.calibrate(x.flatten(0, 1))
    shares, e, z = [], own.evidence(x), own.codes(x)
    for image, token, latent in (z != 0).nonzero().tolist():
        positive = [max(0.0, float(v)) for v in e[image, token, :, latent]]
        shares.append(max(positive) / sum(positive))
    assert readouts.time_of(own, x)["peak share"].value == pytest.approx(np.mean(shares), abs=1e-5)
    assert 1 / S < np.mean(shares) < 1


def test_bits_are_those_of_an_ideal_code():
    rng = np.random.default_rng(0)
    z = rng.integers(1, 4, (6, 5, 7)) * (rng.random((6, 5, 7)) < 0.3) * 1.0
    norms, error, d = np.arange(1.0, 8), rng.random((6, S)) * 5, D
    found = readouts.bits(Codes(scipy.sparse.csc_matrix(z.reshape(30, 7)), 6), norms, error, d)
    active = (z != 0).mean((0, 1))
    entropy = -active * np.log2(active) - (1 - active) * np.log2(1 - active)
    assert found["which"].value == pytest.approx(entropy.sum())
    width = readouts.PRECISION * (S * d / (z != 0).sum(-1).mean()) ** 0.5
    levels, counts = np.unique(np.round(z * norms / width)[z != 0], return_counts=True)
    share = counts / counts.sum()
    per_code = -(share * np.log2(share)).sum()
    assert found["values"].value == pytest.approx(per_code * (z != 0).sum() / 30)
    variance = error.sum(0) / 30 / d + readouts.PRECISION**2 / 12
    gaussian = d * 0.5 * np.log2(2 * np.pi * np.e * variance / readouts.PRECISION**2)
    assert found["error"].value == pytest.approx(gaussian.sum())
    parts = sum(found[name].value for name in ("which", "values", "error"))
    assert found["all"].value == pytest.approx(parts)


def test_a_code_that_says_nothing_costs_bits_and_one_that_explains_saves_them():
    silent = Codes(scipy.sparse.csc_matrix((30, 7)), 6)
    random = Codes(scipy.sparse.random(30, 7, 0.3, "csc", random_state=0), 6)
    bits = [
        readouts.bits(codes, np.ones(7), np.full((6, S), of * 5.0 * D), D)["all"].value
        for codes, of in ((silent, 1), (random, 1), (random, 0.01))
    ]
    assert bits[2] < bits[0] < bits[1]
