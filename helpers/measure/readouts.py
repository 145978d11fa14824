"""What a dictionary shows on images it has not seen, each figure with the share of every image.

Latents are chosen, and probes fitted, on validation images; figures are those of test images. The
tokens of an image are not independent, so a `Readout` keeps each image's influence: by how much the
value exceeds what it would be had the image counted a little less. Two dictionaries measured on the
same images are compared by subtracting influences.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata, t

from helpers.measure import detection, metrics, timing
from helpers.measure.detection import Codes
from helpers.measure.labels import Labels

PRECISION = 0.1  # of activations in a description, in units of their standard deviation
N_SHUFFLED = 4  # shuffled labellings behind the control of `detect`
PROBES = (5, 20)  # numbers of latents that a logistic regression reads together


class Readout(NamedTuple):
    """A figure and each image's influence on it, float64, (image,)."""

    value: float
    influence: np.ndarray

    def less(self, other: "Readout") -> "Readout":
        """The difference from another figure of the same images."""
        return Readout(self.value - other.value, self.influence - other.influence)

    def estimate(self) -> metrics.Estimate:
        """With a normal 95 % interval over images; NaN for what has no influences."""
        n = len(self.influence)
        if not n:
            return metrics.Estimate(self.value, float("nan"), float("nan"))
        half = metrics.Z * (n / max(n - 1, 1) * (self.influence**2).sum()) ** 0.5
        return metrics.Estimate(self.value, self.value - half, self.value + half)


def ratio(numerator, denominator) -> Readout:
    """Σ numerator / Σ denominator of sums (image,); NaN where the denominator is zero."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    total = denominator.sum()
    if total == 0:
        return Readout(float("nan"), np.zeros(len(numerator)))
    value = numerator.sum() / total
    return Readout(float(value), (numerator - value * denominator) / total)


def mean(readouts) -> Readout:
    """The mean of readouts of the same images; those that are NaN take no part."""
    readouts = list(readouts)
    defined = [r for r in readouts if not np.isnan(r.value)]
    if not defined:
        return readouts[0] if readouts else Readout(float("nan"), np.zeros(()))
    return Readout(*(np.mean([r[i] for r in defined], axis=0) for i in (0, 1)))


def auroc(scores, labelled, images, n_images: int) -> Readout:
    """AUROC of scores (sample,) for one label, bool (sample,), of images (sample,).

    Influences are those of clustered ROC curves: Obuchowski (1997, Biometrics 53). NaN for a label
    that all or no samples have.
    """
    positive, negative = scores[labelled], scores[~labelled]
    if not len(positive) or not len(negative):
        return Readout(float("nan"), np.zeros(n_images))
    ranks = rankdata(scores)
    above = (ranks[labelled] - rankdata(positive)) / len(negative)  # share of negatives below it
    below = 1 - (ranks[~labelled] - rankdata(negative)) / len(positive)
    value, influence = above.mean(), np.zeros(n_images)
    np.add.at(influence, images[labelled], (above - value) / len(positive))
    np.add.at(influence, images[~labelled], (below - value) / len(negative))
    return Readout(float(value), influence)


def correlation(x, y, images, n_images: int) -> Readout:
    """Pearson's correlation of x and y (sample,) of images (sample,); NaN if one is constant.

    Influences are those of Devlin, Gnanadesikan and Kettenring (1975, Biometrika 62).
    """
    x, y = (np.asarray(v, float) - np.mean(v) if len(v) else np.zeros(1) for v in (x, y))
    if not x.any() or not y.any():
        return Readout(float("nan"), np.zeros(n_images))
    x, y = x / (x @ x / len(x)) ** 0.5, y / (y @ y / len(y)) ** 0.5
    value = x @ y / len(x)
    each = (x * y - value * (x**2 + y**2) / 2) / len(x)
    return Readout(float(value), np.bincount(images, each, n_images))


def over_seeds(values, halves) -> metrics.Estimate:
    """The mean over training seeds, with an interval over seeds and images.

    `values` (seed,) come with the half widths (seed,) of their intervals over images, NaN for what
    has none. Seeds share their images, so that their mean is as uncertain as one of them; to that,
    Student's interval over seeds is added in quadrature. With a single seed, only images are in it.
    """
    values, halves = np.asarray(values, float), np.asarray(halves, float)
    n, images, seeds = len(values), np.nan_to_num(halves).mean(), 0.0
    if n > 1:
        seeds = t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5
    half = float(np.hypot(images, seeds)) or float("nan")
    return metrics.Estimate(float(values.mean()), values.mean() - half, values.mean() + half)


def stability(u: torch.Tensor, v: torch.Tensor) -> float:
    """Mean cosine between two dictionaries' directions (latent, …), matched one to one.

    The Hungarian method finds the pairs whose cosines sum to most.
    """
    u, v = (torch.nn.functional.normalize(w.flatten(1).float(), dim=1) for w in (u, v))
    cosines = (u @ v.T).numpy()
    return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())


# --- detection ---


def usable(labels: dict[str, Labels], least: int = 5) -> list[str]:
    """Labels that at least so many images of every split have, and so many lack."""
    first = next(iter(labels.values()))

    def in_all(name: str) -> bool:
        sides = (side for own in labels.values() for side in own.contrast(name))
        return all(side.any(1).sum() >= least for side in sides)

    return [name for name in first.names if in_all(name)]


def detect(
    codes: dict[str, Codes], labels: dict[str, Labels], names, probes=PROBES
) -> tuple[dict[str, dict[str, Readout]], dict[str, int]]:
    """What codes of 'validation' and 'test' images tell of labels: readouts by name and label.

    And each label's best latent on validation images.

    "auroc" of the best latent; "tpr", its true positives at the threshold that 1 % of validation
    tokens without the label exceed; "probe 5", "probe 20", AUROC of logistic regressions on the
    best latents; "arbitrary", AUROC of latents chosen for shuffled labels. Of thresholded codes
    also "recall", the share of a label's tokens on which the best latent fires (low where features
    are split), and "precision", the share of the tokens it fires on that have the label (low where
    they are mixed).
    """
    seen, tested, rng = codes["validation"], codes["test"], np.random.default_rng(0)
    labellings = [labels["validation"].shuffled(rng) for _ in range(N_SHUFFLED)]
    found = detection.aurocs(seen, [labels["validation"], *labellings], names)
    signs = np.where(seen.two_sided & (found < 0.5), -1, 1)
    found = np.maximum(found, 1 - found) if seen.two_sided else found
    out: dict[str, dict[str, Readout]] = {}
    best: dict[str, int] = {}
    for i, name in enumerate(names):
        order = np.argsort(-found[0, :, i], kind="stable")
        best[name] = int(order[0])
        held, side = _side(labels["validation"], name), _side(labels["test"], name)
        score, without = (
            (v.of(order[0]) * signs[0, order[0], i])[s.among]
            for v, s in ((tested, side), (seen, held))
        )
        over = score > np.quantile(without[~held.has], 0.99, method="higher")
        of_label = {"auroc": _auroc(score, side), "tpr": _share(over, side.has, side)}
        for n in probes:
            predict = _logistic(_columns(seen, order[:n], held), held.has)
            of_label[f"probe {n}"] = _auroc(predict(_columns(tested, order[:n], side)), side)
        chosen = found[1:, :, i].argmax(1)
        z = _columns(tested, chosen, side) * signs[1 + np.arange(N_SHUFFLED), chosen, i]
        of_label["arbitrary"] = mean(_auroc(column, side) for column in z.T)
        if not seen.two_sided:
            of_label["recall"] = _share(score > 0, side.has, side)
            of_label["precision"] = _share(side.has, score > 0, side)
        for what, readout in of_label.items():
            out.setdefault(what, {})[name] = readout
    return out, best


def ceiling(x: dict[str, np.ndarray], labels: dict[str, Labels], names) -> dict[str, Readout]:
    """AUROC of logistic regressions on activations x (image, token, channel), by label.

    Fitted on the images of 'train', measured on those of 'test'.
    """
    out = {}
    for name in names:
        seen, side = _side(labels["train"], name), _side(labels["test"], name)
        predict = _logistic(x["train"][seen.among], seen.has)
        out[name] = _auroc(predict(x["test"][side.among]), side)
    return out


class _Side(NamedTuple):
    """The tokens that a label is looked for among: all of its kind of thing."""

    among: np.ndarray  # bool, (image, token)
    has: np.ndarray  # which of them have the label, bool, (sample,)
    images: np.ndarray  # the image of each, (sample,)


def _side(labels: Labels, name: str) -> _Side:
    labelled, others = labels.contrast(name)
    among = labelled | others
    return _Side(among, labelled[among], np.nonzero(among)[0])


def _columns(codes: Codes, latents: np.ndarray, side: _Side) -> np.ndarray:
    """Some latents' codes at the tokens of a label's kind, (sample, latent)."""
    columns = codes.values[:, latents]
    columns = columns if codes.two_sided else columns.toarray()
    return columns[side.among.ravel()]


def _auroc(scores: np.ndarray, side: _Side) -> Readout:
    return auroc(scores, side.has, side.images, len(side.among))


def _share(of: np.ndarray, among: np.ndarray, side: _Side) -> Readout:
    """The share, among some samples, of those that are also `of`; all bool, (sample,)."""
    return ratio(*(np.bincount(side.images, w, len(side.among)) for w in (of & among, among)))


def _logistic(X: np.ndarray, has: np.ndarray):
    """A logistic regression on columns of unit size: a function from samples to scores."""
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    size = np.maximum(X.std(0), 1e-6)
    model = LogisticRegression(solver="newton-cholesky", max_iter=30).fit(X / size, has)
    return lambda Z: model.decision_function(Z / size)


# --- steps, description ---


def neighbours(x: torch.Tensor, residual) -> Readout:
    """Share of x's variance (image, token, step, channel) that the step before explains.

    The mean over all steps but the first; `residual` are `coordinates.residual` with exponent 0.
    """
    left = residual.residualize(x).view_as(x)
    each = [v[:, :, 1:].double().pow(2).sum((1, 3)).cpu().numpy() for v in (x, left)]
    return mean(ratio(a - b, a) for a, b in zip(*(v.T for v in each)))


def time_of(dictionary, x: torch.Tensor) -> dict[str, Readout]:
    """ "peak share": how much of an active code's positive evidence comes from its peak step.

    The mean over all active codes of x (image, token, step, channel); 1 / S is even, 1 a moment.
    Nothing for a dictionary whose codes are no sums over steps.
    """
    sums = []
    for image in x:  # one at a time: evidence is dense
        try:
            evidence = dictionary.evidence(image).movedim(-2, -1)
        except ValueError:
            return {}
        shares = timing.peak_share(evidence[dictionary.codes(image) != 0].cpu().numpy())
        sums.append((np.nansum(shares), np.isfinite(shares).sum()))
    return {"peak share": ratio(*zip(*sums))}


def bits(codes: Codes, norms: np.ndarray, error: np.ndarray, d: int) -> dict[str, Readout]:
    """Bits that describe a trajectory by its sparse codes, by part and in all.

    After Ayonrinde et al. (2024, arXiv:2410.11179), with the norms (latent,) of feature
    trajectories and Σ (x - x̂)² of each image and step, float64, (image, step), over tokens and d
    channels. "which": the active latents, each at its own rate. "values": what they add, rounded so
    finely that all of them together err as activations rounded to PRECISION would. "error": what is
    left, Gaussian, of one variance a step. The dictionary itself, sent once, is not in it.
    """
    (n_images, S), z = error.shape, scipy.sparse.coo_matrix(codes.values)
    n = z.shape[0]
    rate = np.clip(np.bincount(z.col, minlength=z.shape[1]) / n, 1e-9, 1 - 1e-9)
    silent = -np.log2(1 - rate).sum()
    image, n_tokens = z.row // (n // n_images), n // n_images
    width = PRECISION * (S * d / max(z.nnz / n, 1)) ** 0.5
    _, place, counts = np.unique(
        np.round(z.data * norms[z.col] / width), return_inverse=True, return_counts=True
    )
    each = {
        "which": np.log2((1 - rate) / rate)[z.col],
        "values": -np.log2(counts / counts.sum())[place],
    }
    parts = {name: np.bincount(image, v, n_images) / n_tokens for name, v in each.items()}
    parts["which"] += silent
    left = error / n_tokens + d * PRECISION**2 / 12  # rounding errs, too
    variance = left.mean(0) / d
    log = np.log2(2 * np.pi * variance / PRECISION**2) * d / 2
    parts["error"] = (log + left / (2 * np.log(2) * variance)).sum(1)
    parts["all"] = sum(parts.values())
    return {name: ratio(v, np.ones(n_images)) for name, v in parts.items()}
