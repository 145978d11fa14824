"""What an edit gains against what it changes: curves over strengths, compared at equal change.

A direction added at several strengths gives a curve: its effect, such as the mean of success × kept
over images, against how much the images changed. Two directions of equal strength may change images
very differently, so they are compared where they change them equally. Curves begin where nothing is
added and nothing changes, go from strength to strength in straight lines, and are read up to where
they first reach a change; a curve that never comes so far is held at its strongest.

Trainings, or draws of a random direction, are the units of the statistics: each has its own images,
so that Student's interval over them holds both what images and what trainings vary.
"""

import numpy as np
from scipy.stats import t

from helpers.measure.metrics import NOTHING, Estimate
from helpers.measure.readouts import over_seeds


def at_change(effect, change, level: float) -> float:
    """Effect (strength,), strengths ascending, where the curve first changes images by `level`.

    Over `level`, it is effect per change at equal change. NaN if the curve has no point.
    """
    x, y = _curve(effect, change)
    if len(x) < 2:
        return float("nan")
    return float(np.interp(level, x, y))


def area(effect, change, level: float) -> float:
    """Mean effect over all changes from 0 to `level`: the area under the curve, over `level`."""
    x, y = _curve(effect, change)
    below = x < level
    x, y = np.append(x[below], level), np.append(y[below], at_change(effect, change, level))
    return float(np.trapezoid(y, x) / level)


def _curve(effect, change) -> tuple[np.ndarray, np.ndarray]:
    """Change and effect from (0, 0) on, without what comes after a stronger change."""
    effect, change = (np.append(0.0, np.asarray(v, float)) for v in (effect, change))
    known = ~np.isnan(effect + change)
    effect, change = effect[known], change[known]
    rising = np.append(True, change[1:] > np.maximum.accumulate(change)[:-1])
    return change[rising], effect[rising]


def best(judged, allowed=None) -> int:
    """Which strength has the most of what is judged, (strength,), of equals the weakest.

    Among those `allowed`, bool (strength,); the weakest of all if none is.
    """
    judged = np.asarray(judged, float)
    if allowed is not None:
        judged = np.where(allowed, judged, np.nan)
    return 0 if np.isnan(judged).all() else int(np.nanargmax(judged))


def crossed(judged, values, allowed=None):
    """Values (half, strength) of each half at the strength that the other half chose: their mean.

    `judged` (half, strength) is what is chosen by, `allowed` like it, bool: no image takes part in
    the choice of the strength at which it is measured. Also the two strengths, as places.
    """
    allowed = np.ones(np.shape(judged), bool) if allowed is None else allowed
    places = [best(*of_half) for of_half in zip(judged, allowed)][::-1]
    return float(np.mean([v[place] for v, place in zip(values, places)])), places


# --- over trainings ---


def student(values) -> tuple[Estimate, float]:
    """The mean of independent values (seed,) with Student's 95 % interval, and p of a mean of 0."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    n = len(values)
    if n < 2:
        return (Estimate(float(values[0]), *NOTHING[1:]) if n else NOTHING), float("nan")
    error = values.std(ddof=1) / n**0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * t.sf(abs(values.mean()) / error, n - 1)
    return over_seeds(values, np.zeros(n)), float(1.0 if np.isnan(p) else p)


def times(ours, theirs) -> Estimate:
    """How many times theirs ours is: the ratio of two means of paired values (seed,).

    With Fieller's interval (1954, JRSS B 16), those ratios r for which Student's interval of ours -
    r · theirs holds zero; NaN ends where theirs is not measurably above or below zero, so that any
    ratio may be.
    """
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    n, (mean_a, mean_b) = len(a), (a.mean(), b.mean())
    if n < 2 or mean_b == 0:
        return NOTHING
    (aa, ab), (_, bb) = np.cov(a, b) / n * t.ppf(0.975, n - 1) ** 2
    scale = mean_b**2 - bb
    if scale <= 0:
        return Estimate(float(mean_a / mean_b), *NOTHING[1:])
    middle = mean_a * mean_b - ab
    half = max(middle**2 - scale * (mean_a**2 - aa), 0.0) ** 0.5
    return Estimate(
        *map(float, (mean_a / mean_b, (middle - half) / scale, (middle + half) / scale))
    )


def holm(p) -> np.ndarray:
    """p values (test,) corrected for their number: Holm (1979, Scand. J. Statistics 6).

    A NaN is no test, and stays.
    """
    p = np.asarray(p, float)
    order = np.argsort(p)  # NaN last
    n = int((~np.isnan(p)).sum())
    corrected = p.copy()
    steps = p[order[:n]] * np.arange(n, 0, -1)
    corrected[order[:n]] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected
