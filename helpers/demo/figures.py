"""Drawings of the demo model's notebook: scenes with their captions, and shares right as bars."""

import textwrap

import numpy as np

from helpers.demo import world
from helpers.demo.judge import AIMS, NAMES

SPLITS = {"unseen": "#0072B2", "held_out": "#E69F00"}  # blue, orange


def show_scene(ax, image: np.ndarray, scene: world.Scene, wrong: list[str] | None = None) -> None:
    """An image over its caption; given what is `wrong`, framed in green, or in red and named."""
    ax.imshow(image, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(textwrap.fill(world.caption(scene), 26), fontsize=5.5)
    ax.spines[:].set_visible(wrong is not None)
    if wrong is not None:
        colour = "#D55E00" if wrong else "#009E73"
        ax.spines[:].set(color=colour, linewidth=1.5)
        title = textwrap.fill("✗ " + ", ".join(wrong), 29) if wrong else "✓"
        ax.set_title(title, color=colour, fontsize=6)


def wrong_in(judgements: dict, i: int) -> list[str]:
    """Names of the attributes that are wrong in image i."""
    return [NAMES[a] for a in (*world.ATTRIBUTES, "count") if judgements[a][i] < 1]  # not of NaN


def quality_bars(ax, quality: dict, chance: dict, kind: str) -> None:
    """Bars of shares right by attribute, for scenes of one kind ('one object').

    Unseen and held-out captions, with intervals, chance as ticks and aims as diamonds. The number
    of objects is left out: the control knows it.
    """
    names = [a for a in next(iter(quality.values())) if a != "count"]
    for j, (split, colour) in enumerate(SPLITS.items()):
        value, low, high = np.array([quality[split, kind][a] for a in names]).T
        y = np.arange(len(names)) + 0.38 * (j - 0.5)
        error = np.clip([value - low, high - value], 0, None)
        style = {"color": colour, "error_kw": {"lw": 0.8}, "label": split.replace("_", " ")}
        ax.barh(y, value, 0.36, xerr=error, **style)
        luck = [chance[split, kind][a].value for a in names]
        label = None if j else "chance"
        ax.plot(luck, y, "|", color="black", markersize=5, markeredgewidth=1.2, label=label)
    aims = {a: aim for a, aim in AIMS.items() if a != "all" or kind == "one object"}
    style = {"color": "white", "markeredgecolor": "black", "markersize": 3.5}
    ax.plot(aims.values(), [names.index(a) for a in aims], "D", label="aim", **style)
    ax.set_yticks(range(len(names)), [NAMES[a] for a in names])
    ax.set(xlim=(0, 1.02), ylim=(len(names) - 0.4, -0.6), xlabel="share right", title=kind)


def decision_steps(ax, decided: dict[str, np.ndarray]) -> None:
    """Rows of steps, (thing,), by attribute: middle 80 % thin, middle 50 % thick, median a dot."""
    for row, steps in enumerate(decided.values()):
        known = steps[~np.isnan(steps)]
        if len(known):
            low, lower, median, upper, high = np.quantile(known, (0.1, 0.25, 0.5, 0.75, 0.9))
            ax.plot((low, high), (row, row), color="#0072B2", linewidth=0.8, marker="")
            ax.plot((lower, upper), (row, row), color="#0072B2", linewidth=3, marker="")
            ax.plot(median, row, "o", color="white", markeredgecolor="black", markersize=4)
    ax.set_yticks(range(len(decided)), [NAMES[a] for a in decided])
    ax.set(ylim=(len(decided) - 0.5, -0.5), xlabel="denoising step")
