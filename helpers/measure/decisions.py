"""Does evidence come when an attribute is decided? Latents' timing against the truth about time.

Ranks are taken within a label, so that no label's usual hour counts: is the evidence for red early
in those things whose colour was decided early? The control is evidence for their other attributes:
a thing that is drawn early as a whole makes all of its evidence early.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from helpers.measure import metrics
from helpers.measure.labels import Labels
from helpers.measure.timing import crossing, lasting_from


def attributes_of(names: list[str]) -> dict[str, list[int]]:
    """The labels of each attribute, as places in `names`: 'colour=red' is one of 'colour'."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(name.partition("=")[0], []).append(i)
    return found


def of_things(values: np.ndarray, labels: Labels) -> np.ndarray:
    """Values (image, token, …) summed over the tokens of each thing: float64, (thing, …)."""
    out = np.zeros((len(labels.has), *values.shape[2:]))
    owned = labels.owner >= 0
    np.add.at(out, labels.owner[owned], values[owned])
    return out


def mean_of_things(values: np.ndarray, labels: Labels) -> np.ndarray:
    """Mean over the tokens of each thing, (thing, …); 0 for one that owns no token."""
    count = of_things(np.ones(values.shape[:2]), labels)
    total = of_things(values, labels)
    return total / np.maximum(count, 1).reshape(-1, *[1] * (total.ndim - 1))


def image_of(labels: Labels) -> np.ndarray:
    """The image that each thing is in, (thing,); 0 for one that owns no token."""
    out = np.zeros(len(labels.has), int)
    for image, owner in enumerate(labels.owner):
        out[owner[owner >= 0]] = image
    return out


def own_label(labels: Labels) -> dict[str, np.ndarray]:
    """Which label of each attribute a thing carries, int, (thing,); -1: none."""
    out = {}
    for attribute, places in attributes_of(labels.names).items():
        has = labels.has[:, places]
        out[attribute] = np.where(has.any(1), np.array(places)[has.argmax(1)], -1)
    return out


def in_images(decided: dict, labels: Labels, label: str, n_images: int) -> np.ndarray:
    """When a label's attribute was decided in each image that shows it, (image,), else NaN."""
    out, attribute = np.full(n_images, np.nan), label.partition("=")[0]
    if attribute in decided:
        has = labels.has[:, labels.names.index(label)]
        out[image_of(labels)[has]] = decided[attribute][has]
    return out


def half_steps(evidence: np.ndarray, labels: Labels, steps) -> dict[str, np.ndarray]:
    """When half of a thing's evidence for its own value has come: attribute -> step, (thing,).

    `evidence` (thing, step, label) of each label's latent; NaN without a value or evidence.
    """
    half, rows = crossing(evidence.swapaxes(1, 2), steps), np.arange(len(evidence))
    return {a: np.where(v < 0, np.nan, half[rows, v]) for a, v in own_label(labels).items()}


def right_from(x: np.ndarray, labels: Labels, on: np.ndarray, on_labels: Labels, steps) -> dict:
    """From which kept step a probe on that step's activations gives a thing its own value.

    Logistic regressions of x (thing, step, channel) and its labels, asked about `on` and its; float
    (thing,) by attribute, the first of the `steps` from which all are right; NaN: not the last.
    """
    from sklearn.linear_model import LogisticRegression

    given, asked, out = own_label(labels), own_label(on_labels), {}
    for attribute, truth in asked.items():
        right = np.zeros((len(steps), len(on)), bool)
        value = given.get(attribute, np.full(len(x), -1))
        known = value >= 0
        if len(set(value[known])) > 1:
            for s in range(len(steps)):
                probe = LogisticRegression(C=0.1, max_iter=1000).fit(x[known, s], value[known])
                right[s] = probe.predict(on[:, s]) == truth
        out[attribute] = lasting_from(right, steps)
    return out


@dataclass(frozen=True)
class Agreement:
    """Rank correlations of decisions (first attribute) with evidence (second), within labels."""

    resampled: dict[tuple[str, str], np.ndarray]  # as it is, then on resampled images
    n: dict[tuple[str, str], int]  # things

    def own(self, *attributes: str) -> metrics.Estimate:
        """Of decisions with evidence for the same attribute, mean over attributes."""
        return metrics.mean_of_resampled([self.resampled[a, a] for a in attributes])

    def other(self, *attributes: str) -> metrics.Estimate:
        """Of decisions with evidence for other attributes of the same things."""
        return metrics.mean_of_resampled([self._others(a) for a in attributes])

    def specific(self, *attributes: str) -> metrics.Estimate:
        """`own` less `other`, on the same resampled images."""
        return metrics.mean_of_resampled(
            [self.resampled[a, a] - self._others(a) for a in attributes]
        )

    def matrix(self, attributes: list[str]) -> np.ndarray:
        return np.array([[self.resampled[a, b][0] for b in attributes] for a in attributes])

    def _others(self, attribute: str) -> np.ndarray:
        rows = [v for (a, b), v in self.resampled.items() if a == attribute != b]
        rows = [v for v in rows if not np.isnan(v[0])]
        return (
            np.mean(rows, axis=0)
            if rows
            else np.full_like(self.resampled[attribute, attribute], np.nan)
        )


def agreement(decided: dict, half: dict, labels: Labels, seed=0, at_least: int = 10) -> Agreement:
    """Rank correlation over things of the steps of `decided` and of `half`, by attribute.

    Each dict: attribute -> denoising step (thing,), NaN unknown. Ranks are within things of one
    label; intervals resample images; NaN with fewer than `at_least` things or no spread.
    """
    own, image = own_label(labels), image_of(labels)
    counts = metrics.resampled_counts(len(labels.owner), seed=seed)
    ranks = [
        {a: _ranks(v, own[a]) for a, v in steps.items() if a in own} for steps in (decided, half)
    ]
    resampled, n = {}, {}
    for a, x in ranks[0].items():
        for b, y in ranks[1].items():
            both = ~(np.isnan(x) | np.isnan(y))
            n[a, b] = int(both.sum())
            resampled[a, b] = np.full(counts.shape[1], np.nan)
            if n[a, b] >= at_least:
                resampled[a, b] = _correlations(x[both], y[both], image[both], counts)
    return Agreement(resampled, n)


def _ranks(values: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Ranks within each label, from -1/2 to 1/2; NaN for NaN and for a label seen once."""
    out = np.full(len(values), np.nan)
    for one in np.unique(label[label >= 0]):
        mine = np.nonzero((label == one) & ~np.isnan(values))[0]
        if len(mine) > 1:
            out[mine] = (rankdata(values[mine]) - 0.5) / len(mine) - 0.5
    return out


def _correlations(x, y, image, counts) -> np.ndarray:
    """Pearson's, of ranks that stay, on images that count `counts` (image, resample) times."""
    terms = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y])
    n, *sums = [np.bincount(image, t, len(counts)) @ counts for t in terms]
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y, xx, yy, xy = (total / n for total in sums)
        found = (xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y))
    return np.where(np.isfinite(found), found, np.nan)
