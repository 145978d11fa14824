"""What each latent detects: how well its codes tell the tokens of a label from others.

AUROC is the chance that a token with the label has a larger code than one without it: 0.5 is
guessing, 1 is never wrong. Tokens are compared with tokens of things that could carry the label,
only. The latent of a label is the best one on validation images; its figure is that on test images,
since the best of many is always partly luck. Zeros of a thresholded code all tie, so that a latent
which is active too rarely scores low; dense two-sided codes, such as those of neurons, have no
threshold.
"""

import copy
from dataclasses import dataclass
from itertools import chain

import numpy as np
import scipy.sparse
import torch

from helpers.measure import metrics
from helpers.measure.labels import Labels


@dataclass(frozen=True)
class Codes:
    """Codes of a dictionary, (image · token, latent): CSC or, of two-sided latents, an array."""

    values: scipy.sparse.csc_matrix | np.ndarray
    n_images: int
    two_sided: bool = False  # a small code may indicate a label as well as a large one

    def of(self, latent: int) -> np.ndarray:
        """One latent's codes, (image, token)."""
        column = self.values[:, [latent]]
        column = column.toarray() if scipy.sparse.issparse(column) else column
        return column.reshape(self.n_images, -1)

    def fires(self) -> np.ndarray:
        """Which latents have a code that is not zero, bool."""
        return np.asarray((self.values != 0).sum(0)).ravel() > 0

    def top_images(self, latent: int, n: int) -> np.ndarray:
        """The n images on which a latent's largest code is largest."""
        return np.argsort(-self.of(latent).max(1), kind="stable")[:n]


def encode(dictionaries: dict, shards, dtype: torch.dtype = torch.float32) -> dict[str, Codes]:
    """Codes of all dictionaries for x (image, token, step, channel); SAEs work in `dtype`."""
    dictionaries = copy.deepcopy(dictionaries)  # the ones given keep their precision
    for dictionary in dictionaries.values():
        if not dictionary.two_sided:
            dictionary.coder.to(dtype)
    found = {name: [] for name in dictionaries}
    for x in chain.from_iterable(shards):  # an image at a time: codes are dense for a moment
        for name, dictionary in dictionaries.items():
            z = dictionary.codes(x).float().cpu().numpy()
            found[name].append(z if dictionary.two_sided else scipy.sparse.csr_matrix(z))
    return {
        name: Codes(np.concatenate(z), len(z), two_sided=True)
        if dictionaries[name].two_sided
        else Codes(scipy.sparse.vstack(z).tocsc(), len(z))
        for name, z in found.items()
    }


def aurocs(codes: Codes, labellings: list[Labels], names: list[str]) -> np.ndarray:
    """AUROC of every latent, (labelling, latent, label); 0.5 for what all or no tokens have.

    `labellings` differ only in which thing carries what, as `Labels.shuffled` makes them.
    """
    first = labellings[0]
    compared = np.array([first.among(name).ravel() for name in names])  # (label, token)
    out = np.empty((len(labellings), codes.values.shape[1], len(names)))
    alike, of_label = np.unique(compared, axis=0, return_inverse=True)
    for group, tokens in enumerate(alike):
        own = np.nonzero(of_label.ravel() == group)[0]
        columns = [first.names.index(names[i]) for i in own]
        among = np.nonzero(tokens)[0]
        owner = first.owner.ravel()[among]
        labelled = np.concatenate([v.has[owner][:, columns] for v in labellings], axis=1)
        found = metrics.auroc(codes.values[among], labelled)
        out[:, :, own] = found.reshape(-1, len(labellings), len(own)).swapaxes(0, 1)
    return np.nan_to_num(out, nan=0.5)


def choose(codes: Codes, labellings: list[Labels], names: list[str]):
    """Best latents, their AUROC, their sign (-1: small where it holds), each (labelling, label)."""
    found = aurocs(codes, labellings, names)
    either = np.maximum(found, 1 - found) if codes.two_sided else found
    latent, auroc = either.argmax(1), either.max(1)
    turned = auroc > np.take_along_axis(found, latent[:, None], 1)[:, 0]
    return latent, auroc, np.where(turned, -1, 1)


@dataclass(frozen=True)
class Detection:
    """How well a dictionary's best latents detect labels; each attribute is a dict by label."""

    latent: dict[str, int]  # the best on the validation images
    validation: dict[str, float]  # its AUROC there
    resampled: dict[str, np.ndarray]  # on test images, then on the same resampled ones for all
    shuffled: dict[str, np.ndarray]  # on test images, of latents chosen for shuffled labels
    on_test: dict[str, np.ndarray]  # on test images, of every latent

    def auroc(self, *names: str) -> metrics.Estimate:
        """AUROC on the test images, mean over those labels that some tokens have, some lack."""
        return metrics.mean_of_resampled([self.resampled[n] for n in names])

    def less(self, rival: "Detection", *names: str) -> metrics.Estimate:
        """AUROC less a rival's on the same images, mean over labels."""
        return metrics.mean_of_resampled([self.resampled[n] - rival.resampled[n] for n in names])

    def arbitrary(self, *names: str) -> metrics.Estimate:
        """Mean AUROC of latents chosen for shuffled labels; the interval is that of shuffles."""
        defined = [self.shuffled[n] for n in names if not np.isnan(self.resampled[n][0])]
        return metrics.mean_of_resampled([np.array([v.mean(), *v]) for v in defined])


def detect(codes: dict, labels: dict, names: list[str], *, n_shuffles: int, seed=0) -> Detection:
    """Choose latents by the codes and labels under 'validation', measure by those of 'test'."""
    rng, true = np.random.default_rng(seed), labels["validation"]
    labellings = [true, *(true.shuffled(rng) for _ in range(n_shuffles))]
    latents, validation, signs = choose(codes["validation"], labellings, names)
    on_test = aurocs(codes["test"], [labels["test"]], names)[0]
    reached = on_test[latents[1:], np.arange(len(names))]
    reached = np.where(signs[1:] < 0, 1 - reached, reached)
    resampled, z = [], codes["test"]
    for name, latent, sign in zip(names, latents[0], signs[0]):
        labelled, others = labels["test"].contrast(name)
        among = np.nonzero(labelled | others)
        samples = z.of(latent)[among] * sign, labelled[among], among[0]
        resampled.append(metrics.resampled_auroc(*samples, z.n_images, seed=seed))
    chosen = latents[0].tolist(), validation[0].tolist()
    columns = (*chosen, resampled, reached.T, on_test.T)
    return Detection(*(dict(zip(names, column)) for column in columns))


def holds_at_top(codes: Codes, labels: Labels, name: str, latent: int, n: int = 20):
    """Whether a label holds at a latent's strongest token, in its top n images that it fires in.

    And the label's share of all tokens of its kind.
    """
    z, (labelled, others) = codes.of(latent), labels.contrast(name)
    top = [i for i in codes.top_images(latent, n) if z[i].max() > 0]
    return labelled[top, z[top].argmax(1)], float(labelled[labelled | others].mean())
