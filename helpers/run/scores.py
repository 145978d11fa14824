"""Reading a scorecard's table: directions compared over trainings and images, for notebook 08."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers.measure import frontier, metrics
from helpers.measure.effects import GAIN
from helpers.measure.metrics import Estimate
from helpers.measure.timing import spearman
from helpers.run.scorecard import HALVED, MEANS, ROW, Study, condition, csv_of

YARDSTICK = "class means"  # the change at its best strength is what others are compared at
ALL = "all labels"
NO_STRENGTH = 1e-6  # below, an edit is a control that adds nothing


class Curves(NamedTuple):
    """A direction at several strengths: arrays (training, label, strength), NaN where none is.

    Draws of a control are taken together with the training that they are held against.
    """

    strengths: np.ndarray
    means: dict[str, np.ndarray]  # success, kept, gain, inside, outside, change, distance
    halves: dict[str, np.ndarray]  # success, kept, gain: (training, label, half, strength)
    n: int  # images at one strength, of all labels

    @property
    def within(self) -> np.ndarray:
        """Whether edited tokens are on average no farther out than 99 % of natural ones."""
        with np.errstate(invalid="ignore"):
            return ~(self.means["distance"] > 1)


class Scores:
    """A study's CSV, of which any part may be missing.

    Measures of a direction are arrays (training, label), in the order of the study's labels.
    """

    def __init__(self, study: Study, path: str | Path | None = None):
        self.study, self.labels = study, study.labels
        self.rows, path = pd.DataFrame(columns=ROW), path or csv_of(study)
        if Path(path).exists():
            self.rows = pd.read_csv(path, keep_default_na=False, na_values=[""])
            self.rows = self.rows.assign(condition=self.rows.condition.fillna(""))
        self._curves: dict[tuple, Curves] = {}

    def done(self, cells: list) -> int:
        """How many of some cells are in the table."""
        keys = ["direction", "seed", "label", "condition"]
        there = set(self.rows[keys].itertuples(index=False, name=None))
        default = self.study.default
        return sum((c.direction, c.seed, c.label, condition(c, default)) in there for c in cells)

    def has(self, direction: str, where: str = "") -> bool:
        """Whether a direction is in the table, under a condition such as "window=late"."""
        return bool(self.curves(direction, where).n)

    def curves(self, direction: str, where: str = "") -> Curves:
        """What a direction does at each strength; no strengths if it is not in the table."""
        if (direction, where) not in self._curves:
            own = self.rows[(self.rows.direction == direction) & (self.rows.condition == where)]
            self._curves[direction, where] = self._read(own[own.strength > NO_STRENGTH])
        return self._curves[direction, where]

    def _read(self, own: pd.DataFrame) -> Curves:
        strengths = np.unique(own.strength.to_numpy(float))
        training = own.seed.to_numpy(int) % self.study.trainings
        grouped = own.groupby([training, "label", "strength"])
        found = grouped[[c for c in ROW if c[-1] in "12" or c in MEANS]].mean()
        axes = range(self.study.trainings), self.labels, strengths
        found = found.reindex(pd.MultiIndex.from_product(axes))
        shape = [len(axis) for axis in axes]
        halves = {
            name: np.stack([found[f"{name} {h}"].to_numpy(float).reshape(shape) for h in (1, 2)], 2)
            for name in HALVED
        }
        means = {name: found[name].to_numpy(float).reshape(shape) for name in MEANS}
        means |= {name: _mean(of_halves, 2) for name, of_halves in halves.items()}
        n = own.groupby("strength").n.sum().max() if len(own) else 0
        return Curves(strengths, means, halves, int(n))

    # --- measures, (training, label) ---

    @cached_property
    def levels(self) -> dict[str, float]:
        """The change of images that is the yardstick of each label: of class means at their best.

        NaN without them. None of the directions compared has a say in it.
        """
        own = {n: _mean(v, 0) for n, v in self.curves(YARDSTICK).means.items()}
        if not self.has(YARDSTICK):
            return dict.fromkeys(self.labels, float("nan"))
        best = [frontier.best(gain) for gain in own["gain"]]
        return {t: float(own["change"][i, k]) for i, (t, k) in enumerate(zip(self.labels, best))}

    def at(self, direction: str, share: float, where="", name="gain") -> np.ndarray:
        """Success × kept where a direction changes images by a share of the yardstick."""
        return self._each(frontier.at_change, direction, share, where, name)

    def area(self, direction: str, share: float, where="", name="gain") -> np.ndarray:
        """Mean success × kept over all changes up to a share of the yardstick."""
        return self._each(frontier.area, direction, share, where, name)

    def _each(self, function, direction, share, where, name) -> np.ndarray:
        means = self.curves(direction, where).means
        levels = share * np.array([*self.levels.values()])
        pairs = zip(means[name], means["change"])
        return np.array([[*map(function, *of_training, levels)] for of_training in pairs])

    def chosen(self, direction: str, where="", natural=False, among=None) -> dict[str, np.ndarray]:
        """'success', 'kept', 'gain' at strengths chosen by the gain of other images.

        And those strengths, and the 'distance' from natural tokens there. Each half of a training's
        images is taken at the other half's best strength: `among` all or some, or, if `natural`,
        those that leave tokens within the data.
        """
        c = self.curves(direction, where)
        shape = (self.study.trainings, len(self.labels))
        found = {name: np.full(shape, np.nan) for name in (*HALVED, "strength", "distance")}
        tried = np.isin(c.strengths, c.strengths if among is None else among)
        for at in np.ndindex(shape) if c.n else ():
            allowed = np.tile(tried & c.within[at] if natural else tried, (2, 1))
            for name in HALVED:
                own = c.halves["gain"][at], c.halves[name][at], allowed
                found[name][at], places = frontier.crossed(*own)
            found["strength"][at] = c.strengths[places].mean()
            found["distance"][at] = c.means["distance"][at][places].mean()
        return found

    def summary(self, direction: str, where="", among=None) -> dict[str, str]:
        """A row of a table: what a direction does at its best strength, within the data, too."""
        n = self.curves(direction, where).n
        best, inside = (self.chosen(direction, where, natural, among) for natural in (False, True))
        return {
            "direction": direction,
            "where": where,
            "strength": f"×{_mean(best['strength'], None):.2g}",
            "success": str(self.share(best["success"], n)),
            "kept": str(self.share(best["kept"], n)),
            GAIN: str(self.share(best["gain"], n)),
            "distance": f"{_mean(best['distance'], None):.2f}".replace("nan", ""),
            "within the data": str(self.share(inside["gain"], n)),
            "strength there": f"×{_mean(inside['strength'], None):.2g}",
        }

    def monotonic(self, direction: str, where="", name="success") -> np.ndarray:
        """Spearman's correlation of what a direction does with its strength."""
        c = self.curves(direction, where)
        return np.array([[spearman(c.strengths, v) for v in own] for own in c.means[name]])

    def auroc(self, direction: str) -> np.ndarray:
        """How well a dictionary's latents detect the labels."""
        own = self.rows[(self.rows.direction == direction) & (self.rows.condition == "")]
        found = own.groupby(["seed", "label"]).auroc.first()
        axes = range(self.study.trainings), self.labels
        shape = [len(axis) for axis in axes]
        return found.reindex(pd.MultiIndex.from_product(axes)).to_numpy(float).reshape(shape)

    # --- over trainings ---

    def share(self, values: np.ndarray, n: int) -> Estimate:
        """The mean of shares (training, label) of n images, with an interval never of no width.

        The wider of Student's over trainings and Wilson's over images, at either end.
        """
        over, _ = frontier.student(_mean(values, 1))
        if np.isnan(over.value):
            return over
        wilson = metrics.share(np.arange(n) < round(over.value * n))
        low, high = np.fmin(over.low, wilson.low), np.fmax(over.high, wilson.high)
        return Estimate(over.value, max(0.0, float(low)), min(1.0, float(high)))

    def compared(self, pairs: dict[tuple[str, str], tuple]) -> pd.DataFrame:
        """Differences of measures, (ours, theirs) by name, as a row for all labels and for each.

        Columns: 'ours', 'theirs', 'label', value, low, high, p, and 'corrected' p, by Holm: over
        the pairs for all labels together, and over all of their single labels.
        """
        rows = []
        for names, (ours, theirs) in pairs.items():
            difference = ours - theirs
            columns = {ALL: _mean(difference, 1)} | dict(zip(self.labels, difference.T))
            for label, of_training in columns.items():
                estimate, p = frontier.student(of_training)
                rows.append([*names, label, *estimate, p])
        found = pd.DataFrame(rows, columns=["ours", "theirs", "label", *Estimate._fields, "p"])
        family = found.label == ALL
        for members in (family, ~family):
            found.loc[members, "corrected"] = frontier.holm(found.p[members])
        return found


def _mean(values: np.ndarray, axis: int | None) -> np.ndarray:
    """The mean of what is not NaN along an axis; NaN where nothing is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis) / known.sum(axis)
