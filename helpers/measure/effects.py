"""What steering did to images, against the same images without it.

What counts as success comes from a truth, `Scenes` or `Words`; where it reads nothing, what is left
to measure is how much the pixels changed, inside and outside the steered region.
"""

import numpy as np
import torch

from helpers.measure import metrics

GAIN = "success × kept"
ALL = "all targets"


def measure(truth, target: str, before, after, weights, grid) -> dict:
    """What steering in a region, weights (image, token), did to each image, (image,).

    The truth's outcome and its 'success × kept', if it can judge the target, a label as
    'colour=red'; 'inside' and 'outside': sums of absolute pixel change and of weights. What
    comes as such a pair is summarised as a ratio.
    """
    outcome = dict(truth.outcome(target, before, after)) if "=" in target else {}
    if {"success", "kept"} <= set(outcome):
        outcome[GAIN] = outcome["success"] * outcome["kept"]
    change = abs(after - before).mean(-1)
    tokens = torch.from_numpy(weights).double().unflatten(1, tuple(grid))[:, None]
    pixels = torch.nn.functional.interpolate(tokens, change.shape[1:], mode="nearest-exact")
    pixels = pixels[:, 0].numpy()  # each has the weight of the token that holds its centre
    for name, w in (("inside", pixels), ("outside", 1 - pixels)):
        outcome[name] = ((change * w).sum((1, 2)), w.sum((1, 2)))
    return outcome


def summary(measured: dict) -> dict[str, metrics.Estimate]:
    """Estimates of what `measure` gives: ratios of sums, else shares of images."""
    return {
        name: metrics.ratio(*value) if isinstance(value, tuple) else metrics.share(value)
        for name, value in measured.items()
    }


def left_over(measured: dict) -> dict[str, metrics.Estimate]:
    """The same of images from which the target was to go: its success is that it is still there."""
    found = summary(measured)
    return {"still there" if n == "success" else n: e for n, e in found.items() if n != GAIN}


def joined(measured: list[dict]) -> dict:
    """What `measure` gives for several targets as if for one, as far as all have it."""
    names = [n for n in measured[0] if all(n in m for m in measured)] if measured else []
    found = {name: np.concatenate([m[name] for m in measured], axis=-1) for name in names}
    return {n: tuple(v) if isinstance(measured[0][n], tuple) else v for n, v in found.items()}


def headline(summarised: dict) -> tuple[str, str]:
    """What is wanted and what is not: success and kept, or pixel change inside and outside."""
    return ("success", "kept") if "success" in summarised else ("inside", "outside")


def some(summarised: dict, *names: str) -> dict[str, metrics.Estimate]:
    """The measures to show: those named that are there, or else the headline."""
    chosen = [n for n in names if n in summarised] or headline(summarised)
    return {name: summarised[name] for name in chosen}


def best_strength(response: dict[float, dict]) -> float:
    """That with the most success × kept, of equals the weakest; unjudged, the middle one."""
    strengths = sorted(response)
    if GAIN not in response[strengths[0]]:
        return strengths[len(strengths) // 2]
    return max(strengths, key=lambda s: (response[s][GAIN].value, -s))


def edge(strength: float, strengths: list[float]) -> str:
    """Words for a strength at an end of those tried, beyond which a better one may lie; or ''."""
    ends = {min(strengths): "the weakest tried", max(strengths): "the strongest tried"}
    return ends.get(strength, "") if len(set(strengths)) > 1 else ""


def compared(measured: dict[tuple[str, str], dict], ours: str) -> dict:
    """Success × kept of our direction less each rival's, paired by image, of what was `measure`d.

    By (target, rival) and ('all targets', rival); {} where nothing can be judged.
    """
    pairs = {
        (target, rival): (measured[target, ours][GAIN], theirs[GAIN])
        for (target, rival), theirs in measured.items()
        if rival != ours and GAIN in theirs
    }
    for rival in dict.fromkeys(r for _, r in pairs):
        own = [pair for (_, r), pair in pairs.items() if r == rival]
        pairs[ALL, rival] = tuple(np.concatenate(side) for side in zip(*own))
    return {key: metrics.paired(*pair) for key, pair in pairs.items()}


def verdicts(differences: dict) -> dict[str, dict]:
    """For each rival of `compared`: how many targets we are ahead or behind on, and by how much."""
    found = {}
    for rival in dict.fromkeys(r for _, r in differences):
        each = [e for (t, r), e in differences.items() if r == rival and t != ALL]
        found[rival] = {
            "ahead": sum(e.low > 0 for e in each),
            "behind": sum(e.high < 0 for e in each),
            "of": len(each),
            "difference": differences[ALL, rival],
        }
    return found
