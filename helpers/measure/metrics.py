"""Measures, each defined once, with 95 % intervals over images.

Tokens of one image are not independent, so functions that measure return a value or sum per image.
Sums are resampled (`ratio`); shares, which may be all or none, have intervals that keep a width
there (`share`, `paired`).
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
from scipy.stats import binomtest, rankdata

from helpers.checks import refuse

Z = 1.959963984540054  # the normal distribution's 97.5th percentile


class Estimate(NamedTuple):
    """A figure and the ends of its 95 % interval; NaN where there is nothing to measure."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "–"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


def ratio(numerator, denominator, seed: int = 0, transform=lambda q: q) -> Estimate:
    """transform(Σ numerator / Σ denominator) of sums (image,), with a percentile bootstrap."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    if len(numerator) == 0 or denominator.sum() == 0:
        return NOTHING
    picks = np.random.default_rng(seed).integers(len(numerator), size=(1000, len(numerator)))
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = transform(numerator[picks].sum(1) / denominator[picks].sum(1))
    return of_resampled([transform(numerator.sum() / denominator.sum()), *resampled])


def mean(values, **kwargs) -> Estimate:
    """Mean over images with its bootstrap interval."""
    return ratio(values, np.ones(len(values)), **kwargs)


def share(values) -> Estimate:
    """Mean over images of successes or of shares, with an interval that is never of zero width.

    Successes (bool) get Wilson's interval; shares, numbers in [0, 1], that of their mean with two
    ones and two zeros added, after Agresti & Coull (1998, The American Statistician 52). NaN takes
    no part; anything else outside [0, 1] raises ValueError.
    """
    values = _shares("values", values)
    if len(values) == 0:
        return NOTHING
    if values.dtype == bool:
        interval = binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return Estimate(float(values.mean()), float(interval.low), float(interval.high))
    padded = np.concatenate([values, [0, 0, 1, 1]])
    half = Z * padded.std() / len(padded) ** 0.5
    low, high = np.clip([padded.mean() - half, padded.mean() + half], 0, 1)
    return Estimate(float(values.mean()), float(low), float(high))


def paired(a, b) -> Estimate:
    """Mean over images of a - b, two `share`s of the same images; never of zero width.

    Half an image is added to each of the four outcomes (both, neither, only a, only b), that is 2
    to n and 1 to Σ (a - b)², after Agresti & Min (2005, Statistics in Medicine 24).
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    valid = ~(np.isnan(a) | np.isnan(b))
    difference = _shares("a", a[valid]) - _shares("b", b[valid])
    if len(difference) == 0:
        return NOTHING
    n = len(difference) + 2
    centre = difference.sum() / n
    half = Z * np.sqrt(((difference**2).sum() + 1) / n - centre**2) / n**0.5
    low, high = np.clip([centre - half, centre + half], -1, 1)
    return Estimate(float(difference.mean()), float(low), float(high))


def _shares(name: str, values) -> np.ndarray:
    """The values that are not NaN; ValueError for one outside [0, 1]."""
    values = np.asarray(values)
    if values.dtype == bool:
        return values
    values = values[~np.isnan(values)].astype(float)
    outside = values[(values < 0) | (values > 1)]
    return refuse(name, float(outside[0]), "from 0 to 1") if len(outside) else values


def squared_errors(x, x_hat, mean_train) -> tuple[np.ndarray, np.ndarray]:
    """Σ (x - x_hat)² and Σ (x - mean_train)² of each image and step, float64, (image, step).

    Of tensors (image, step, token, channel); predicting mean_train (step, channel), the mean of the
    training set, is the zero of explained variance.
    """
    x, x_hat, mean_train = ((v.cpu() if v.is_mps else v).double() for v in (x, x_hat, mean_train))
    error = (x - x_hat).pow(2).sum((2, 3))
    spread = (x - mean_train[:, None]).pow(2).sum((2, 3))
    return error.cpu().numpy(), spread.cpu().numpy()


def explained_variance(error, spread, **kwargs) -> Estimate:
    """EV = 1 - Σ error / Σ spread of sums (image,): 1 is perfect, 0 predicts the training mean."""
    return ratio(error, spread, transform=lambda q: 1 - q, **kwargs)


def auroc(scores, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each score for each label: Mann-Whitney, ties count a half.

    The same as scikit-learn's `roc_auc_score`, which sorts anew for each pair. Of scores (sample,
    latent), dense, or sparse and not negative, and labels (sample, label): float, (latent, label),
    NaN for a label that is always or never true.
    """
    labels = np.asarray(labels, float)
    positives, n = labels.sum(0), len(labels)
    if scipy.sparse.issparse(scores):
        above = scipy.sparse.csc_matrix(scores, dtype=float, copy=True)
        above.eliminate_zeros()
        n_zeros = n - np.diff(above.indptr)
        for codes, zeros in zip(np.split(above.data, above.indptr[1:-1]), n_zeros):
            codes[:] = rankdata(codes) + (zeros - 1) / 2  # less the rank that all zeros share
        rank_sums = above.T @ labels + positives * (n_zeros[:, None] + 1) / 2
    else:
        parts = np.array_split(scores, -(-scores.shape[1] // 64), axis=1)  # to bound memory
        rank_sums = np.concatenate([rankdata(part, axis=0).T @ labels for part in parts])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (rank_sums - positives * (positives + 1) / 2) / (positives * (n - positives))


def resampled_auroc(scores, labels, images, n_images, n_resamples=1000, seed=0) -> np.ndarray:
    """AUROC of one score for one label, both (sample,): as it is, then on resampled images.

    `images` (sample,) tells which of n_images a sample comes from. Calls with the same n_images and
    seed draw the same images, so that results, (1 + n_resamples,), can be averaged or subtracted.
    """
    weights = resampled_counts(n_images, n_resamples, seed)
    _, place = np.unique(scores, return_inverse=True)  # ties share a place
    n_places = place.max(initial=0) + 1
    positives, negatives = (  # samples of each image at each place of the order
        scipy.sparse.csr_matrix((np.ones(w.sum()), (place[w], images[w])), (n_places, n_images))
        for w in (labels, ~labels)
    )
    out = []
    for w in np.array_split(weights, 1 + weights.shape[1] * n_places // 10**7, axis=1):
        p, n = positives @ w, negatives @ w  # (place, resample), some resamples at a time
        with np.errstate(invalid="ignore", divide="ignore"):
            out.append((p * (np.cumsum(n, 0) - n / 2)).sum(0) / (p.sum(0) * n.sum(0)))
    return np.concatenate(out)


def resampled_counts(n_images: int, n_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each image counts, as it is and then resampled: (image, 1 + n_resamples)."""
    drawn = np.random.default_rng(seed).integers(n_images, size=(n_resamples, n_images))
    counts = [np.bincount(d, minlength=n_images) for d in drawn]
    return np.column_stack([np.ones(n_images), *counts])


def of_resampled(values) -> Estimate:
    """An estimate from a figure and its resampled values, (1 + n_resamples,)."""
    value, resampled = float(values[0]), np.asarray(values[1:])
    if np.isnan(resampled).all():
        return Estimate(value, float("nan"), float("nan"))
    return Estimate(value, *map(float, np.nanpercentile(resampled, [2.5, 97.5])))


def mean_of_resampled(resampled: list[np.ndarray]) -> Estimate:
    """The mean of figures resampled alike, each (1 + n_resamples,); NaN ones take no part."""
    defined = [v for v in resampled if not np.isnan(v[0])]
    return of_resampled(np.mean(defined, axis=0)) if defined else NOTHING
