"""What a cell of a sweep is trained and measured with: tables of coordinates and coders by name.

A new method is one line in a table. Coordinates are written as what they do to trajectories, then,
if it is not ridge regression on the step before, what predicts: "a=0.5", "gamma=0.25", "whitened",
"a=1 identity", "a=0 lags=2".
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain, islice

import numpy as np
import torch

from helpers import coordinates, dictionary, nonlinear, predictors
from helpers.checks import one_of, refuse
from helpers.dictionary import Dictionary, Projection
from helpers.measure import decisions, detection, readouts, reconstruction
from helpers.measure.readouts import Readout
from helpers.measure.reconstruction import Reconstruction, SomeSteps, standardised
from helpers.moments import accumulate
from helpers.run import decided
from helpers.run.folder import Run
from helpers.run.parameters import NOTEBOOKS, parameters_of
from helpers.training import coders
from helpers.training.dictionaries import train_dictionary
from helpers.training.loop import TrainConfig

PREDICTORS = {  # word -> (data, value) -> Predictors
    "ridge": lambda data, _: data.predictors,
    "identity": lambda data, _: predictors.identity(data.train),
    "mean": lambda data, _: predictors.mean_only(data.train),
    "lags": lambda data, n: predictors.fit(data.train, data.validation, lags=int(n)),
    "rank": lambda data, n: predictors.fit(data.train, data.validation, rank=int(n)),
}
COORDINATES = {  # word -> (predictors, data, value) -> Coordinates
    "raw": lambda p, data, _: coordinates.raw(p),
    "a": lambda p, data, a: coordinates.residual(p, a),
    "gamma": lambda p, data, gamma: coordinates.between(p, gamma),
    "whitened": lambda p, data, _: coordinates.whitened(p, data.train),
    "nonlinear": lambda p, data, a: nonlinear.fit(data.store, p, a, device=data.run.device),
}
TRAINED = {  # name -> a function shaped as `train_dictionary`, and its options
    "sae": (train_dictionary, {}),
    "one step": (train_dictionary, {"one_step": True, "updates_factor": 1}),
    "per step": (coders.train_per_step, {}),
    "conditioned": (coders.train_conditioned, {"updates_factor": 1}),
    "matryoshka": (coders.train_matryoshka, {}),
    "itda": (coders.train_itda, {}),
}
UNTRAINED = {  # name -> (data, coordinates, config) -> Dictionary
    "untrained": lambda data, c, config: dictionary.untrained(
        c, config.n_latents, config.k, config.seed
    ),
    "pca": lambda data, c, config: dictionary.pca(c, data.standardised("train"), round(config.k)),
    "neurons": lambda data, c, _: Dictionary("neurons", c, Projection(torch.eye(c.d_in).to(c.mu))),
}
MATCHED = 2048  # latents at most that are matched one to one with those of another seed
DENSE = 8192  # latents at most whose evidence and codes before the threshold, dense, are read
CEILING = "ceiling"  # no coder: logistic regressions on activations, of all steps and of each


class Data:
    """Trajectories of some images and steps, what they show, and what is fitted to them."""

    def __init__(self, run: str, n_train: int, steps: tuple[int, ...]):
        self.run = run_of(run)
        store = self.run.store
        store.split[store.indices("train")[n_train:]] = "left out"
        self.store = SomeSteps(store, [store.steps.index(step) for step in steps])
        self.train = accumulate(self.store.shards("train"))
        self.validation = accumulate(self.store.shards("validation"), self.train.shift)
        self.predictors = predictors.fit(self.train, self.validation).to(self.run.device)
        self.labels = {split: labels_of(run, split) for split in ("validation", "test")}
        self.x = {split: torch.cat([*self.standardised(split)]) for split in self.labels}
        # as many images that dictionaries were trained on, to see how much less they err there
        images = chain.from_iterable(self.standardised("train"))
        self.x["train"] = torch.stack([*islice(images, len(self.x["test"]))])
        self.names = readouts.usable(self.labels)
        self.steps, self.decided = steps, decided.read(self.run)

    def standardised(self, split: str):
        """Shards of a split, (image, token, step, channel)."""
        return standardised(self.store, split, self.predictors)


def run_of(run: str) -> Run:
    """A run of a collection, with notebook 02's defaults."""
    (notebook,) = NOTEBOOKS.glob("02_*.ipynb")
    defaults = {name: default for name, (default, _) in parameters_of(notebook).items()}
    return Run(notebook.stem, defaults | {"run": run})


@lru_cache(maxsize=2)
def data_of(run: str, n_train: int, steps: tuple[int, ...]) -> Data:
    return Data(run, n_train, steps)


@lru_cache(maxsize=12)
def labels_of(run: str, split: str, n: int | None = None):
    """What the images of a split, or the first n, show."""
    source = run_of(run)
    images, tokens = source.store.images(split, slice(n)), source.store.tokens(split)[:n]
    labels = source.truth.labels(source.store.prompts_of(split)[:n], images, source.store.grid)
    return labels.only(tokens)


def _words(name: str) -> list[tuple[str, float]]:
    """Coordinates' name as [(what is done, value), (what predicts, value)]."""
    first, *others = name.split()
    parts = [word.partition("=") for word in (first, *(others or ["ridge"]))]
    return [(word, float(value or 0)) for word, _, value in parts]


def check(cell) -> None:
    """ValueError for coordinates or a coder that do not exist."""
    (how, _), *rest = _words(cell.coordinates)
    one_of("coordinates", how, COORDINATES)
    if len(rest) > 1:
        refuse("coordinates", cell.coordinates, "a word, and one for the predictor")
    one_of("predictors in coordinates", rest[0][0], PREDICTORS)
    one_of("coder", cell.coder, [*TRAINED, *UNTRAINED, CEILING])


def measured(cell, run: str) -> tuple[dict[str, Readout], torch.Tensor | None]:
    """Train a cell on a run's trajectories: its read-outs, and feature trajectories (latent, …)."""
    data = data_of(run, cell.n_train, cell.steps)
    if cell.coder == CEILING:
        return _ceilings(data, run), None
    own = trained(cell, data)
    found = {n: r for n, r in _readouts(own, data).items() if not np.isnan(r.value)}
    matched = own.coder.sparse and own.n_latents <= MATCHED
    return found, own.directions() if matched else None


@lru_cache(maxsize=4)
def _coordinates(name: str, data: Data) -> coordinates.Coordinates:
    (how, value), (predicts, of_predictors) = _words(name)
    c = COORDINATES[how](PREDICTORS[predicts](data, of_predictors), data, value)
    return c.to(data.run.device)


def trained(cell, data: Data) -> Dictionary:
    """The dictionary of a cell, its threshold set on validation images."""
    named = ("n_latents", "k", "n_updates", "learning_rate", "seed")
    config = TrainConfig(**{name: getattr(cell, name) for name in named})
    own = _trained(cell.coder, data, _coordinates(cell.coordinates, data), config)
    return own.calibrate(data.x["validation"].flatten(0, 1))


def _trained(coder: str, data: Data, c, config: TrainConfig) -> Dictionary:
    """The dictionary of a coder's name, in coordinates c."""
    if coder in UNTRAINED:
        return UNTRAINED[coder](data, c, config)
    train, options = TRAINED[coder]
    return train(data.store, c, config, name=coder, device=data.run.device, **options)[0]


def _readouts(own: Dictionary, data: Data) -> dict[str, Readout]:
    """All that is read out of one dictionary."""
    p, x, one = data.predictors, data.x, {"": own}
    spaces = {"activation": coordinates.raw(p), "residual": coordinates.residual(p)}
    rebuilt = {s: reconstruction.measure(one, [v], spaces)[""] for s, v in x.items()}
    found = {
        "ev": _explained(rebuilt["test"], "activation"),
        "ev, residual space": _explained(rebuilt["test"], "residual"),
        "ev, validation": _explained(rebuilt["validation"], "activation"),
        "ev, training": _explained(rebuilt["train"], "activation"),
        "neighbour ev": readouts.neighbours(x["test"], coordinates.residual(p, 0)),
        "numbers": readouts.ratio(rebuilt["test"].numbers, np.ones(len(x["test"]))),
    }
    codes = {split: detection.encode(one, [x[split]])[""] for split in data.labels}
    detected, best = readouts.detect(codes, data.labels, data.names)
    if not own.two_sided:
        error = rebuilt["validation"].sums["activation"][0]
        norms = own.directions().flatten(1).norm(dim=1).cpu().numpy()
        bits = readouts.bits(codes["validation"], norms, error, p.mu.shape[1])
        found |= {f"bits, {part}": r for part, r in bits.items()}
        found |= _rates(codes["test"])
        if own.n_latents <= DENSE:
            scores = {split: _scores(own, x[split]) for split in codes}
            found |= (time := readouts.time_of(own, x["test"]))
            found |= _when(own, data, best) if time and data.decided else {}
            before, _ = readouts.detect(scores, data.labels, data.names, probes=())
            detected["auroc before threshold"] = before.get("auroc", {})
    if data.names:
        found |= {what: readouts.mean(by_label.values()) for what, by_label in detected.items()}
        found |= _by_attribute("auroc", detected["auroc"])
    return found


def _explained(rebuilt: Reconstruction, space: str) -> Readout:
    error, spread = (v.sum(1) for v in rebuilt.sums[space])
    return readouts.ratio(spread - error, spread)


def _scores(own: Dictionary, x: torch.Tensor) -> detection.Codes:
    """What codes are before their threshold, of either sign."""
    values = [own.scores(image).cpu().numpy() for image in x]
    return detection.Codes(np.concatenate(values), len(x), two_sided=True)


def _by_attribute(what: str, by_label: dict[str, Readout]) -> dict[str, Readout]:
    """Means over the labels of each attribute, such as "auroc, colour"."""
    attributes = dict.fromkeys(label.partition("=")[0] for label in by_label)
    return {
        f"{what}, {a}": readouts.mean(r for n, r in by_label.items() if n.startswith(f"{a}="))
        for a in attributes
    }


def _when(own: Dictionary, data: Data, best: dict[str, int]) -> dict[str, Readout]:
    """Whether the evidence of labels' best latents comes when their attributes are decided."""
    labels = data.labels["test"]
    evidence = own.evidence(data.x["test"], list(best.values())).cpu().numpy()
    of_thing = np.zeros((len(labels.has), len(data.steps), len(labels.names)))
    places = [labels.names.index(name) for name in best]
    of_thing[..., places] = decisions.of_things(evidence, labels)
    return _agreement(data, decisions.half_steps(of_thing, labels, data.steps))


def _agreement(data: Data, half: dict[str, np.ndarray]) -> dict[str, Readout]:
    """Of steps, attribute -> (thing,), with those at which attributes were decided.

    "when": the rank correlation less that with evidence for things' other attributes; "when, own"
    is not less anything.
    """
    agree = decisions.agreement(data.decided, half, data.labels["test"])
    known = agree.attributes
    return {"when": agree.specific(*known), "when, own": agree.own(*known)} if known else {}


def _rates(codes: detection.Codes) -> dict[str, Readout]:
    """The spectrum of firing rates, shares of all tokens, and the share of latents that fire."""
    rates, none = np.diff(codes.values.indptr) / codes.values.shape[0], np.zeros(0)
    at = {f"rate, {q} %": Readout(float(np.percentile(rates, q)), none) for q in (10, 50, 90, 99)}
    return at | {"alive": Readout(float((rates > 0).mean()), none)}


def _ceilings(data: Data, run: str) -> dict[str, Readout]:
    """Logistic regressions on standardised activations, of all steps together and of each."""
    if not data.names:
        return {}
    seen = torch.cat([*data.standardised("train")])
    labels = {"train": labels_of(run, "train", len(seen)), "test": data.labels["test"]}
    x = {"train": seen.cpu().numpy(), "test": data.x["test"].cpu().numpy()}
    whole = {split: v.reshape(*v.shape[:2], -1) for split, v in x.items()}
    by_label = readouts.ceiling(whole, labels, data.names)
    found = {"ceiling": readouts.mean(by_label.values())} | _by_attribute("ceiling", by_label)
    for s in range(seen.shape[2]):
        at_step = {split: v[:, :, s] for split, v in x.items()}
        one = readouts.ceiling(at_step, labels, data.names)
        found[f"ceiling, step {s}"] = readouts.mean(one.values())
    if data.decided:  # from which step on a probe at each step knows a thing's value
        of_things = {
            split: decisions.mean_of_things(x[split], own) for split, own in labels.items()
        }
        known = [v for split in labels for v in (of_things[split], labels[split])]
        found |= _agreement(data, decisions.right_from(*known, data.steps))
    return found
