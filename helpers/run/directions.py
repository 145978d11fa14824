"""What a scorecard steers along: latents of trained dictionaries, and what they are held against.

A direction is named by coordinates, as "raw" or "a=1", of which a dictionary is trained (or by
"neurons", which need no training), after one of `CONTROLS`, if it is one; or by one of `LABELLED`,
which use labels and no dictionary. Latents are the best on validation images, as in notebook 05.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from helpers import coordinates, steering
from helpers.checks import refuse
from helpers.dictionary import Dictionary
from helpers.measure import detection, experiment, timing
from helpers.measure.natural import Natural, subspace
from helpers.run import methods

TOGETHER = 5  # latents that steer as one
N_MATCHED = 20  # latents that fire as often as a label's best one
ALIGNED = 0.3  # cosine with the difference of class means from which a latent is removed with it
CONTROLS = ("random", "matched", "shuffled")
LABELLED = ("class means", "probe", "prompt")


class Latents(NamedTuple):
    """What is known of a dictionary's latents for one label, from validation images."""

    best: list[int]  # those with the largest AUROC, TOGETHER of them
    sign: int  # -1 if the best one's codes are small where the label holds
    auroc: float
    matched: list[int]  # those that fire about as often as the best one, but none of `best`
    typical: float  # 99th percentile of the best one's codes where it is active
    onset: int  # denoising step by which a tenth of the best one's evidence has come


def parts_of(direction: str) -> tuple[str, str]:
    """A direction's control, or '', and its coordinates, or '' where it needs no dictionary."""
    if direction in LABELLED:
        return "", ""
    first, _, rest = direction.partition(" ")
    return (first, rest) if first in CONTROLS else ("", direction)


def check(direction: str, cell) -> None:
    """ValueError for a direction that is none; `cell` (of a sweep) is its dictionary's, else."""
    _, name = parts_of(direction)
    if name not in ("", "neurons"):
        methods.check(replace(cell, coordinates=name))


class Directions:
    """Trajectories (S, d), standardised, for some labels, from a run's trajectories.

    `cell` (of a sweep) says how dictionaries are trained; `path` of such a cell, where one is kept.
    """

    def __init__(self, run: str, cell, labels: list[str], path):
        self.cell, self.labels, self.path = cell, labels, path
        self._where = (run, cell.n_train, cell.steps)

    def dictionary(self, name: str, seed: int) -> tuple[Dictionary, dict[str, Latents]]:
        """A dictionary in coordinates of some name, and its latents for each label.

        It is trained, if it is not there.
        """
        cell = replace(self.cell, coordinates=name, seed=seed)
        if name == "neurons":
            cell = replace(cell, coder="neurons", coordinates="raw", seed=0)
        path = self.path(cell)
        if not path.exists():
            own = methods.trained(cell, methods.data_of(*self._where))
            own.save(path, {"latents": {t: of._asdict() for t, of in self._latents(own).items()}})
        own, record = _loaded(path)
        return own, {t: Latents(**of) for t, of in record["latents"].items()}

    def _latents(self, own: Dictionary) -> dict[str, Latents]:
        data = methods.data_of(*self._where)
        x, labels = data.x["validation"], data.labels["validation"]
        codes = detection.encode({"": own}, [x])[""]
        auroc = detection.aurocs(codes, [labels], self.labels)[0]
        either = np.maximum(auroc, 1 - auroc) if own.two_sided else auroc
        onset = np.zeros(own.n_latents)
        if not own.two_sided:
            onset = np.nan_to_num(timing.measure(own, [x]).lifetimes(self.cell.steps)["onset"])
        rate = np.log(np.maximum(np.asarray((codes.values != 0).mean(0)).ravel(), 1e-9))
        found = {}
        for i, label in enumerate(self.labels):
            best = np.argsort(-either[:, i], kind="stable")[:TOGETHER]
            first, apart = best[0], abs(rate - rate[best[0]])
            apart[best] = np.inf
            values = codes.of(first)
            found[label] = Latents(
                best=best.tolist(),
                sign=1 if auroc[first, i] == either[first, i] else -1,
                auroc=float(either[first, i]),
                matched=np.argsort(apart, kind="stable")[:N_MATCHED].tolist(),
                typical=float(np.quantile(values[values > 0], 0.99)) if (values > 0).any() else 1.0,
                onset=round(onset[first]),
            )
        return found

    def of(self, direction: str, label: str, seed: int, n_trainings: int, way="add"):
        """The trajectory (S, d) of a direction for one label.

        `seed` is that of the training, or of a control's draw, of which there may be more than
        `n_trainings`: draw i is held against training i % n_trainings.
        """
        control, name = parts_of(direction)
        if not name:
            u = self.class_means[label].difference
            u = u if direction == "class means" else _probe(*self._where, label)
        else:
            own, latents = self.dictionary(name, seed % n_trainings)
            of = latents[label]
            u = of.sign * own.directions(of.best[0])
            if way == "together":
                u = steering.together(own.directions(of.best))
            if control == "matched":
                u = own.directions(of.matched[seed % len(of.matched)])
            if control == "random":
                u = steering.random_like(u, seed, own.coordinates)
            if control == "shuffled":
                u = steering.shuffled_steps(u, seed)
        if way == "subspace":
            u = steering.onto(u, subspace(methods.data_of(*self._where).train))
        return u

    @property
    def coordinates(self):
        """Residual ones: whose scale and mean lead to raw units, and what mode 'residual' takes."""
        return coordinates.residual(methods.data_of(*self._where).predictors)

    @property
    def class_means(self) -> dict[str, experiment.ClassMeans]:
        """Of each label; ValueError for one that no training token has, or none lacks."""
        found = _class_means(*self._where, tuple(self.labels))
        for label in self.labels:
            if label not in found:
                refuse("labels", label, "a label that some training tokens have, and others lack")
        return found

    @property
    def natural(self) -> Natural:
        """How far the data reaches."""
        return _natural(*self._where)


@lru_cache(maxsize=4)
def _loaded(path) -> tuple[Dictionary, dict]:
    return Dictionary.load(path)


@lru_cache(maxsize=1)
def _natural(*where) -> Natural:
    data = methods.data_of(*where)
    return Natural.fit(data.train, data.validation, data.store.shards("validation"))


@lru_cache(maxsize=1)
def _class_means(run: str, n_train: int, steps: tuple, labels: tuple):
    data = methods.data_of(run, n_train, steps)
    seen = methods.labels_of(run, "train", n_train)
    return experiment.class_means(data.store.shards("train"), seen, labels, data.predictors)


@cache
def _probe(run: str, n_train: int, steps: tuple, label: str) -> torch.Tensor:
    """The weights (S, d) of a logistic regression on training tokens' trajectories."""
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    data = methods.data_of(run, n_train, steps)
    x = torch.cat([*data.standardised("train")]).flatten(2).cpu().numpy()  # (image, token, S · d)
    labelled, others = methods.labels_of(run, "train", n_train).contrast(label)
    model = LogisticRegression(solver="newton-cholesky", max_iter=30)
    weights = model.fit(x[labelled | others], labelled[labelled | others]).coef_[0]
    return torch.from_numpy(weights).float().unflatten(0, (len(steps), -1))
