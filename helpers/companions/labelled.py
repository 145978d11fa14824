"""Supervised latents: how much one direction can tell of a label that it was fitted to.

They stand for the upper bound of latents that were never shown a label, as in IntroVAC (Maggipinto
et al. 2020, arXiv:2008.00760), where a latent space is given a direction for each label.
"""

import numpy as np
import torch

from helpers import coordinates
from helpers.dictionary import Dictionary, Projection
from helpers.measure.labels import Labels
from helpers.predictors import Predictors


def labelled(predictors: Predictors, x: np.ndarray, labels: Labels, names: list[str]) -> Dictionary:
    """A dictionary of one latent for each of `names`, in raw coordinates, its codes dense.

    x: standardised trajectories (image, token, step, channel) of the images of `labels`. Each
    latent is a logistic regression's direction between tokens with its label and those of things
    that could carry it, of any length; 0 for a label that all or no tokens have.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    rows = torch.zeros(len(names), x.shape[2] * x.shape[3])
    for row, name in zip(rows, names):
        has, lacks = labels.contrast(name)
        if has.any() and lacks.any():
            y = np.concatenate([x[has], x[lacks]]).reshape(-1, len(row))
            known = np.arange(len(y)) < has.sum()
            model = LogisticRegression(C=0.01, solver="newton-cholesky").fit(y, known)
            row.copy_(torch.from_numpy(model.coef_[0]))
    raw = coordinates.raw(predictors)
    return Dictionary("labelled", raw, Projection(rows.to(raw.mu)))


def separation(evidence: np.ndarray, has: np.ndarray, lacks: np.ndarray) -> np.ndarray:
    """Mean evidence (image, token, step) of tokens with a label less that of those without it.

    As shares of its sum over steps, (step,): when the two are told apart. NaN where the sum is not
    positive, as of a latent that does not tell them apart.
    """
    gap = evidence[has].mean(0) - evidence[lacks].mean(0)
    return gap / gap.sum() if gap.sum() > 0 else np.full(len(gap), np.nan)
