"""How far a feature's name says when it fires (detection) and where (localisation).

A judge says from 0 to 1 whether an image shows what the name says. It is asked about images on
which the feature fires, about random ones on which it is silent, and about hard ones, on which its
nearest feature fires and it does not: a name that is too wide passes the first and fails the last.
It is then asked about right and moved maps of one image. All scores are 0.5 for any judge
that gives one answer to everything; a question that was not answered counts as that. After the
automated interpretation of text features (Bills et al. 2023; Paulo et al. 2024, arXiv:2410.13928).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from helpers.measure import metrics
from helpers.measure.metrics import NOTHING, Estimate, Z
from helpers.naming.examples import Examples, moved, panels


@dataclass(frozen=True)
class Score:
    """Two figures of the same answers, 0.5 by guessing, with 95 % intervals over images."""

    auc: Estimate  # chance that what should be affirmed is affirmed more, ties half
    balanced: Estimate  # mean of the shares of both kinds answered rightly; 0.5 is half right
    n: tuple[int, int]  # images of either kind
    unanswered: int = 0


NO_SCORE = Score(NOTHING, NOTHING, (0, 0))


def score(matching, others) -> Score:
    """Of answers in [0, 1] about images that should match, (n,), and others, (m,); NaN: none."""
    sides = [np.asarray(side, float) for side in (matching, others)]
    unanswered = int(sum(np.isnan(side).sum() for side in sides))
    a, b = (np.nan_to_num(side, nan=0.5) for side in sides)
    return Score(auc(a, b), balanced(right(a, True), right(b, False)), (len(a), len(b)), unanswered)


def paired(of_right, of_moved) -> Score:
    """Of answers about two versions of the same images, both (n,), the first to be affirmed.

    The AUC is within images: the share in which the right one is affirmed more, ties half.
    """
    sides = [np.asarray(side, float) for side in (of_right, of_moved)]
    unanswered = int(sum(np.isnan(side).sum() for side in sides))
    a, b = (np.nan_to_num(side, nan=0.5) for side in sides)
    within = metrics.share(np.where(a == b, 0.5, a > b))
    both = metrics.share((right(a, True) + right(b, False)) / 2)
    return Score(within, both, (len(a), len(b)), unanswered)


def right(answers: np.ndarray, affirm: bool) -> np.ndarray:
    """How far answers say what they should, (n,): 1 or 0, and 0.5 where they are 0.5."""
    return np.where(answers == 0.5, 0.5, (answers > 0.5) == affirm)


def auc(matching, others) -> Estimate:
    """Area under the ROC curve, ties half; its interval keeps a width where all is in order.

    The interval is method 5 of Newcombe (2006, Statistics in Medicine 25, 559): θ for which the
    observed figure lies Z standard errors away. A bootstrap of few images that are told apart
    perfectly would have no width.
    """
    matching, others = np.asarray(matching, float), np.asarray(others, float)
    n, m = len(matching), len(others)
    if not n or not m:
        return NOTHING
    is_matching = np.arange(n + m) < n
    answers = np.concatenate([matching, others])
    found = float(metrics.auroc(answers[:, None], is_matching[:, None])[0, 0])
    extra = (n + m) / 2 - 1

    def beyond(theta):  # squared distance less Z² times the variance of the figure at θ
        spread = 1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (found - theta) ** 2 - Z**2 * theta * (1 - theta) * spread / (n * m)

    near = 1e-9  # at 0 and 1 the figure itself solves the equation, too
    low = brentq(beyond, 0, found - near) if found > 2 * near else 0.0
    high = brentq(beyond, found + near, 1) if found < 1 - 2 * near else 1.0
    return Estimate(found, low, high)


def balanced(right_matching, right_others) -> Estimate:
    """Mean of two shares of right answers, (n,) and (m,) in [0, 1], of different images.

    The interval joins those of the two shares (Zou & Donner 2008, Statistics in Medicine 27).
    """
    a, b = _share(right_matching), _share(right_others)
    value = (a.value + b.value) / 2
    if np.isnan(value):
        return NOTHING
    below = np.hypot(a.value - a.low, b.value - b.low) / 2
    above = np.hypot(a.high - a.value, b.high - b.value) / 2
    return Estimate(value, max(0.0, float(value - below)), min(1.0, float(value + above)))


def _share(values) -> Estimate:
    values = np.asarray(values, float)
    return metrics.share(values.astype(bool) if np.isin(values, (0, 1)).all() else values)


def detection(judge, name: str, images, examples: Examples) -> dict[str, Score]:
    """How well a judge tells by the name on which images a feature fires: 'random' and 'hard'.

    `judge(image, name)` is in [0, 1] or NaN, of images (height, width, 3) in [0, 1]; `images` may
    be anything that an array of indices picks images from. It is asked once about each image.
    """
    answers = {
        kind: np.array([judge(image, name) for image in images[getattr(examples, kind)]], float)
        for kind in ("matching", "random", "hard")
    }
    return {kind: score(answers["matching"], answers[kind]) for kind in ("random", "hard")}


def localisation(locate, name: str, images, maps, seed: int = 0) -> Score:
    """How well a judge tells by the name a feature's maps from moved ones, on the same images.

    `locate(panel, name)` is in [0, 1] or NaN, of `panels`; images (image, height, width, 3 or 1),
    maps (image, rows, columns). Images whose map cannot be moved take no part. Things are few and
    most of an image is background, so that a wrong name of a thing does better than 0.5, too: hold
    a feature's score against what names of other features get on the same maps.
    """
    elsewhere, can = moved(maps, seed)
    images, maps, elsewhere = np.asarray(images)[can], np.asarray(maps)[can], elsewhere[can]
    if not can.any():
        return NO_SCORE
    answers = [[locate(p, name) for p in panels(images, m)] for m in (maps, elsewhere)]
    return paired(*answers)


def coherence(vectors) -> float:
    """Mean cosine of all pairs of J vectors e, (J, d), in O(J): (|Σ e|² − J) / (J (J − 1)).

    Vectors are brought to unit length; NaN for fewer than two. As D-Scope (arXiv:2609.39625) says
    of a feature's top images, with the vectors of an image encoder.
    """
    vectors = np.asarray(vectors, float)
    n = len(vectors)
    if n < 2:
        return float("nan")
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return float((np.square(vectors.sum(0)).sum() - n) / (n * (n - 1)))
