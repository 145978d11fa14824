"""Does evidence come when an attribute is decided? Latents' timing against the truth about time.

Ranks are taken within a label, so that no label's usual hour counts: is the evidence for red early
in those things whose colour was decided early? The control is evidence for their other attributes:
a thing that is drawn early as a whole makes all of its evidence early.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.stats import rankdata

from helpers.measure.labels import Labels
from helpers.measure.readouts import Readout, correlation, mean
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

    of: dict[tuple[str, str], Readout]  # NaN where too few things have both
    n: dict[tuple[str, str], int]  # things

    @property
    def attributes(self) -> list[str]:
        """Those whose correlation is known, and with that of their things' other attributes."""
        own = dict.fromkeys(a for a, _ in self.of)
        return [a for a in own if not np.isnan(self.specific(a).value)]

    def own(self, *attributes: str) -> Readout:
        """Of decisions with evidence for the same attribute, mean over attributes."""
        return mean(self.of[a, a] for a in attributes)

    def other(self, *attributes: str) -> Readout:
        """Of decisions with evidence for other attributes of the same things."""
        return mean(mean(r for (x, y), r in self.of.items() if x == a != y) for a in attributes)

    def specific(self, *attributes: str) -> Readout:
        """`own` less `other`, of the same images."""
        return mean(self.own(a).less(self.other(a)) for a in attributes)

    def matrix(self, attributes: list[str]) -> np.ndarray:
        return np.array([[self.of[a, b].value for b in attributes] for a in attributes])


def agreement(decided: dict, half: dict, labels: Labels, at_least: int = 10) -> Agreement:
    """Rank correlation over things of the steps of `decided` and of `half`, by attribute.

    Each dict: attribute -> denoising step (thing,), NaN unknown; an attribute of only one of them
    is left out. Ranks are within things of one label; NaN with fewer than `at_least` things or no
    spread.
    """
    own, image = own_label(labels), image_of(labels)
    shared = [a for a in decided if a in half and a in own]
    x, y = ({a: _ranks(steps[a], own[a]) for a in shared} for steps in (decided, half))
    of, n = {}, {}
    for pair in product(shared, shared):
        both = ~(np.isnan(x[pair[0]]) | np.isnan(y[pair[1]]))
        n[pair] = int(both.sum())
        known = both & (n[pair] >= at_least)
        ranks = x[pair[0]][known], y[pair[1]][known]
        of[pair] = correlation(*ranks, image[known], len(labels.owner))
    return Agreement(of, n)


def _ranks(values: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Ranks within each label, from -1/2 to 1/2; NaN for NaN and for a label seen once."""
    out = np.full(len(values), np.nan)
    for one in np.unique(label[label >= 0]):
        mine = np.nonzero((label == one) & ~np.isnan(values))[0]
        if len(mine) > 1:
            out[mine] = (rankdata(values[mine]) - 0.5) / len(mine) - 0.5
    return out
