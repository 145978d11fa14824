"""Measures, each defined once, with intervals over images.

Tokens of one image are not independent, so every interval resamples images, never tokens: functions that
measure return sums per image, and `ratio` turns two such sums into a figure with its interval.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from scipy.stats import binomtest, rankdata


class Estimate(NamedTuple):
    """A figure and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(
    numerator, denominator, n_resamples: int = 1000, seed: int = 0, transform=lambda q: q
) -> Estimate:
    """transform(Σ numerator / Σ denominator) over images, with a 95 % bootstrap interval (percentile, by image).

    Parameters
    ----------
    numerator, denominator : float, (image,)
        Sums of one image each. An image in which both are zero takes no part.
    """
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    if len(numerator) == 0 or denominator.sum() == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    picks = np.random.default_rng(seed).integers(len(numerator), size=(n_resamples, len(numerator)))
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = transform(numerator[picks].sum(1) / denominator[picks].sum(1))
    return Estimate(
        float(transform(numerator.sum() / denominator.sum())),
        *map(float, np.nanpercentile(resampled, [2.5, 97.5])),
    )


def mean(values, **kwargs) -> Estimate:
    """Mean over images with its bootstrap interval."""
    return ratio(values, np.ones(len(values)), **kwargs)


def share(successes) -> Estimate:
    """Share of images, bool, (image,), that are true, with Wilson's 95 % interval: it has a width where all or none are."""
    successes = np.asarray(successes, bool)
    if len(successes) == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    interval = binomtest(int(successes.sum()), len(successes)).proportion_ci(method="wilson")
    return Estimate(float(successes.mean()), float(interval.low), float(interval.high))


def squared_errors(
    x: torch.Tensor, x_hat: torch.Tensor, mean_train: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """What explained variance is made of, per image and step.

    Parameters
    ----------
    x, x_hat : Float[Tensor, "image step token channel"]
    mean_train : Float[Tensor, "step channel"]
        Mean of the training set: predicting it is the zero of explained variance.

    Returns
    -------
    Σ (x - x_hat)² and Σ (x - mean_train)², each float64, (image, step).
    """
    x, x_hat, mean_train = (
        v.to("cpu" if v.device.type == "mps" else v.device).double() for v in (x, x_hat, mean_train)
    )
    error = (x - x_hat).pow(2).sum((2, 3))
    spread = (x - mean_train[:, None]).pow(2).sum((2, 3))
    return error.cpu().numpy(), spread.cpu().numpy()


def explained_variance(error, spread, **kwargs) -> Estimate:
    """EV = 1 - Σ error / Σ spread, of `squared_errors` summed as wished to (image,): 1 is perfect, 0 the training mean."""
    return ratio(error, spread, transform=lambda q: 1 - q, **kwargs)


def auroc(scores, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each score for each label: Mann-Whitney, ties count a half.

    Parameters
    ----------
    scores : float, (sample, latent), dense; or a scipy sparse matrix of codes, not negative, whose zeros all tie
    labels : bool, (sample, label)

    Returns
    -------
    float, (latent, label); nan for a label that is always or never true.
    """
    labels = np.asarray(labels, float)
    positives, n = labels.sum(0), len(labels)
    if scipy.sparse.issparse(scores):
        ranks, zero_rank = sparse_ranks(scores)
        with_code = (ranks != 0).astype(
            float
        ).T @ labels  # (latent, label): positives that have a code
        out = ranks.T @ labels + (positives - with_code) * zero_rank[:, None]
    else:
        out = np.empty((scores.shape[1], labels.shape[1]))
        for i in range(0, scores.shape[1], 64):  # ranks of 64 latents at a time, to bound memory
            out[i : i + 64] = rankdata(scores[:, i : i + 64], axis=0).T @ labels
    with np.errstate(invalid="ignore", divide="ignore"):
        return (out - positives * (positives + 1) / 2) / (positives * (n - positives))


def sparse_ranks(codes) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """Ranks among each column of codes that are not negative: of the positive ones, as a sparse matrix, and the one that all zeros share, (latent,)."""
    coo = scipy.sparse.coo_matrix(codes)
    row, column, value = (v[coo.data > 0] for v in (coo.row, coo.col, coo.data))
    order = np.lexsort((value, column))
    row, column, value = row[order], column[order], value[order]
    count = np.bincount(column, minlength=codes.shape[1])
    zeros = codes.shape[0] - count
    within = np.arange(len(column)) - np.repeat(np.cumsum(count) - count, count) + 1.0
    new = np.concatenate([[True], (np.diff(column) != 0) | (np.diff(value) != 0)])[: len(column)]
    tie = np.cumsum(new) - 1
    shared = np.bincount(tie, within) / np.bincount(tie) if len(tie) else within
    ranks = scipy.sparse.csr_matrix((shared[tie] + zeros[column], (row, column)), codes.shape)
    return ranks, (zeros + 1) / 2


def resampled_auroc(
    scores, labels, images, n_images: int, n_resamples: int = 200, seed: int = 0
) -> np.ndarray:
    """AUROC of one score for one label, (sample,): first as it is, then on resampled images, float, (1 + n_resamples,).

    Calls with the same n_images and seed draw the same images, so that what they return can be averaged or subtracted.

    Parameters
    ----------
    images : int, (sample,)
        Which of n_images images each sample comes from.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(images, kind="stable")
    groups = np.split(order, np.searchsorted(images[order], np.arange(1, n_images)))
    picks = [np.arange(len(images))] + [
        np.concatenate([groups[i] for i in rng.integers(n_images, size=n_images)])
        for _ in range(n_resamples)
    ]
    return np.array([auroc(scores[p, None], labels[p, None])[0, 0] for p in picks])


def of_resampled(values: np.ndarray) -> Estimate:
    """A figure with its 95 % interval, from the figure itself and its resampled values, (1 + n_resamples,)."""
    if np.isnan(values[1:]).all():
        return Estimate(float(values[0]), float("nan"), float("nan"))
    return Estimate(float(values[0]), *map(float, np.nanpercentile(values[1:], [2.5, 97.5])))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine between vectors along the last axis; 0 where either is the zero vector."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide(
        (a * b).sum(-1), norms, out=np.zeros(np.broadcast(a, b).shape[:-1]), where=norms > 0
    )
