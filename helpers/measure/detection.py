"""What each latent detects: how well its codes tell the tokens of a label from others.

AUROC is the chance that a token with the label has a larger code than one without it: 0.5 is
guessing, 1 is never wrong. Tokens are compared with tokens of things of the label's kind only. The
latent of a label is the best one on validation images; its figure is that on test images, since the
best of many is always partly luck on the images that chose it.

A thresholded code is zero at most tokens, and these all tie, so that a latent which is active too
rarely scores low. Dense two-sided codes, such as those of neurons, have no threshold.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch

from helpers.measure import metrics
from helpers.measure.labels import Labels


@dataclass(frozen=True)
class Codes:
    """Codes of a dictionary, (image · token, latent): CSC or, of two-sided latents, an array.

    Two-sided: a small code may indicate a label as well as a large one.
    """

    values: scipy.sparse.csc_matrix | np.ndarray
    n_images: int
    two_sided: bool = False

    def of(self, latent: int) -> np.ndarray:
        """One latent's codes, (image, token)."""
        column = self.values[:, [latent]]
        column = column.toarray() if scipy.sparse.issparse(column) else column
        return column.reshape(self.n_images, -1)

    def fires(self) -> np.ndarray:
        """Which latents have a code that is not zero, bool, (latent,)."""
        return np.asarray((self.values != 0).sum(0)).ravel() > 0

    def top_images(self, latent: int, n: int) -> np.ndarray:
        """The n images on which a latent's largest code is largest."""
        return np.argsort(-self.of(latent).max(1), kind="stable")[:n]


def encode(
    dictionaries: dict, shards_of_x: Iterable[torch.Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Codes]:
    """Codes of several `Dictionary`s, in one pass over x (image, token, step, channel).

    `dtype` is the precision of sparse coders' products.
    """
    dictionaries = copy.deepcopy(dictionaries)  # the ones given keep their precision
    for dictionary in dictionaries.values():
        if not dictionary.two_sided:
            dictionary.coder.to(dtype)
    rows, n_images = {name: [] for name in dictionaries}, 0
    for x in shards_of_x:
        n_images += len(x)
        for name, dictionary in dictionaries.items():
            for image in x:  # one at a time: codes are dense for a moment
                z = dictionary.codes(image).float().cpu().numpy()
                rows[name].append(z if dictionary.two_sided else scipy.sparse.csr_matrix(z))
    return {
        name: Codes(np.concatenate(rows[name]), n_images, two_sided=True)
        if dictionary.two_sided
        else Codes(scipy.sparse.vstack(rows[name]).tocsc(), n_images)
        for name, dictionary in dictionaries.items()
    }


def aurocs(codes: Codes, labellings: list[Labels], names: list[str]) -> np.ndarray:
    """AUROC of every latent for every label: float, (labelling, latent, label).

    `labellings` differ only in which thing carries what, as `Labels.shuffled` makes them. 0.5 for a
    label that all or no tokens have.
    """
    first = labellings[0]
    kinds = np.array([first.kind_of(name) for name in names])
    out = np.empty((len(labellings), codes.values.shape[1], len(names)))
    for kind in np.unique(kinds):
        own = np.nonzero(kinds == kind)[0]
        columns = [first.names.index(names[i]) for i in own]
        among = np.nonzero(first.of_kind(kind).ravel())[0]
        owner = first.owner.ravel()[among]
        labelled = np.concatenate([v.has[owner][:, columns] for v in labellings], axis=1)
        found = metrics.auroc(codes.values[among], labelled)
        out[:, :, own] = found.reshape(-1, len(labellings), len(own)).swapaxes(0, 1)
    return np.nan_to_num(out, nan=0.5)


def choose(codes: Codes, labellings: list[Labels], names: list[str]):
    """Each label's best latent, its AUROC and its sign, each (labelling, label).

    The sign is -1 for a two-sided latent that is smaller where the label holds.
    """
    found = aurocs(codes, labellings, names)
    either = np.maximum(found, 1 - found) if codes.two_sided else found
    latent = either.argmax(1)
    auroc = np.take_along_axis(either, latent[:, None], 1)[:, 0]
    turned = auroc > np.take_along_axis(found, latent[:, None], 1)[:, 0]
    return latent, auroc, np.where(turned, -1, 1)


@dataclass(frozen=True)
class Detection:
    """How well a dictionary's best latents detect labels; each attribute is a dict by label."""

    latent: dict[str, int]
    """The best latent on the validation images."""
    validation: dict[str, float]
    """Its AUROC there."""
    resampled: dict[str, np.ndarray]
    """Its AUROC on test images, then on resampled ones, the same for every dictionary."""
    shuffled: dict[str, np.ndarray]
    """AUROC, for the true labels of test images, of latents chosen for shuffled validation labels,
    (shuffle,)."""
    on_test: dict[str, np.ndarray]
    """AUROC of every latent on the test images, (latent,)."""

    def auroc(self, *names: str) -> metrics.Estimate:
        """AUROC on the test images, mean over labels, with its interval over images.

        Labels that all or no test tokens of their kind have are left out, here and below.
        """
        return _mean([self.resampled[n] for n in names])

    def less(self, rival: Detection, *names: str) -> metrics.Estimate:
        """AUROC less a rival's on the same images, mean over labels."""
        return _mean([self.resampled[n] - rival.resampled[n] for n in names])

    def arbitrary(self, *names: str) -> metrics.Estimate:
        """AUROC of arbitrary latents, those chosen for shuffled labels, mean over labels.

        The interval is the central 95 % of the shuffles.
        """
        defined = [self.shuffled[n] for n in names if not np.isnan(self.resampled[n][0])]
        return _mean([np.array([v.mean(), *v]) for v in defined])


def _mean(resampled: list[np.ndarray]) -> metrics.Estimate:
    defined = [v for v in resampled if not np.isnan(v[0])]
    return metrics.of_resampled(np.mean(defined, axis=0)) if defined else metrics.NOTHING


def detect(codes: dict, labels: dict, names: list[str], *, n_shuffles: int, seed=0) -> Detection:
    """Choose latents on validation images and measure them on test images.

    `codes` and `labels` are dicts with 'validation' and 'test'.
    """
    rng = np.random.default_rng(seed)
    true = labels["validation"]
    labellings = [true, *(true.shuffled(rng) for _ in range(n_shuffles))]
    latents, validation, signs = choose(codes["validation"], labellings, names)
    on_test = aurocs(codes["test"], [labels["test"]], names)[0]
    reached = on_test[latents[1:], np.arange(len(names))]
    reached = np.where(signs[1:] < 0, 1 - reached, reached)
    resampled = {}
    for name, latent, sign in zip(names, latents[0], signs[0]):
        labelled, others = labels["test"].contrast(name)
        among = labelled | others
        scores, images = codes["test"].of(latent)[among] * sign, np.nonzero(among)[0]
        resampled[name] = metrics.resampled_auroc(
            scores, labelled[among], images, codes["test"].n_images, seed=seed
        )
    return Detection(
        latent=dict(zip(names, latents[0].tolist())),
        validation=dict(zip(names, validation[0].tolist())),
        resampled=resampled,
        shuffled=dict(zip(names, reached.T)),
        on_test=dict(zip(names, on_test.T)),
    )


def holds_at_top(codes: Codes, labels: Labels, name: str, latent: int, n: int = 20):
    """Whether a label holds at a latent's strongest token, in each of its top images, bool.

    At most n images, those in which it fires; and the label's share of all tokens of its kind.
    """
    z, (labelled, others) = codes.of(latent), labels.contrast(name)
    top = [i for i in codes.top_images(latent, n) if z[i].max() > 0]
    n_among = labelled.sum() + others.sum()
    anywhere = float(labelled.sum() / n_among) if n_among else float("nan")
    return labelled[top, z[top].argmax(1)], anywhere
