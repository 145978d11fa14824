"""From features to names with their scores: describe, judge, locate, one feature after another."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from helpers.checks import in_range
from helpers.measure import metrics
from helpers.measure.metrics import Estimate
from helpers.naming import scores
from helpers.naming.examples import Examples, panels
from helpers.naming.scores import NO_SCORE, Score


@dataclass(frozen=True)
class Named:
    """A feature's name, what it was read from, and how far it holds on other images."""

    name: str  # '' where the describer gave none; then there are no scores
    patterns: str
    random: Score  # detection against images on which the feature is silent
    hard: Score  # detection against those on which its nearest feature fires
    localisation: Score


def describe_and_score(
    describe: Callable, judge: Callable, locate: Callable, images, maps, examples: Examples
) -> Named:
    """Name one feature and score the name.

    `describe(panels)` gives a dict of 'patterns' and 'name'; `judge(image, name)` and
    `locate(panel, name)` are in [0, 1] or NaN. Images are float32 (image, height, width, 3 or 1) in
    [0, 1], or anything that an array of indices picks such from; maps (image, rows, columns).
    """
    shown = examples.described
    found = describe(panels(images[shown], maps[shown]))
    name, patterns = found["name"], found["patterns"]
    return Named(name, patterns, *score_name(judge, locate, name, images, maps, examples))


def score_name(judge, locate, name: str, images, maps, examples: Examples):
    """Detection against random and against hard images, and localisation, of any name."""
    if not name:
        return NO_SCORE, NO_SCORE, NO_SCORE
    found = scores.detection(judge, name, images, examples)
    own = examples.matching
    return found["random"], found["hard"], scores.localisation(locate, name, images[own], maps[own])


def name_features(
    features: Iterable[int], callables, examples, images, maps, workers: int = 1
) -> dict[int, Named]:
    """`describe_and_score` of many features, with a progress bar, several at once if asked to.

    `callables(feature)` gives describe, judge and locate, `examples(feature)` its `Examples`,
    `maps(feature)` its maps; with `workers` above 1, from threads, for servers that answer many at
    a time. What `helpers.naming.replies` keeps on disk is not asked again.
    """
    features = list(features)

    def one(feature: int) -> Named:
        of = maps(feature), examples(feature)
        return describe_and_score(*callables(feature), images, *of)

    with ThreadPoolExecutor(in_range("workers", workers, 1)) as pool:
        each = (pool.map if workers > 1 else map)(one, features)
        done = tqdm(each, "features named", total=len(features), disable=None)
        return dict(zip(features, done))


def score_names(
    given: dict, callables, examples, images, maps, workers: int = 1
) -> dict[int, Named]:
    """Scores of names that are given, feature -> name, as `name_features` scores those it found."""

    def told(feature):
        return (lambda _: {"name": given[feature], "patterns": ""}, *callables(feature)[1:])

    return name_features(given, told, examples, images, maps, workers)


def summary(named: Iterable) -> dict[str, Estimate]:
    """Mean scores over features, with intervals over features; those without one take no part.

    Of `Named`s, or of triples as `score_name` gives them: 'random AUC', 'hard AUC' and so on.
    Features are resampled; where all have one score, which would give no interval, it is that of
    `metrics.share`.
    """
    rows = [(n.random, n.hard, n.localisation) if isinstance(n, Named) else n for n in named]
    found = {}
    for kind, of_kind in zip(("random", "hard", "localisation"), zip(*rows)):
        for what in ("auc", "balanced"):
            values = np.array([getattr(s, what).value for s in of_kind], float)
            values = values[~np.isnan(values)]
            label = f"{kind} {'AUC' if what == 'auc' else 'balanced accuracy'}"
            alike = len(set(values.tolist())) < 2
            found[label] = metrics.share(values) if alike else metrics.mean(values)
    return found
