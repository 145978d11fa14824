"""Named features as figures: what names are worth, feature by feature, and what they are of."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from helpers.plots.images import tile
from helpers.plots.style import WIDE

ROW = 0.135  # inches a line of text takes


def scores_view(rows: list[tuple[str, dict]], panels: list[str], looks: dict) -> Figure:
    """A line of text for each feature and, beside it, its scores in each of some panels.

    `rows`: (text, scores); scores are series -> panel -> `metrics.Estimate`, {} for a heading.
    `looks`: series -> what `Axes.plot` takes, in the order of drawing, and 'interval', whether it
    is drawn. Scores are from 0 to 1; a line stands at 0.5.
    """
    height = ROW * len(rows) + 0.75
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDE, height), sharey=True, squeeze=False)
    for ax, panel in zip(axes[0], panels):
        ax.axvline(0.5, color="black", linewidth=0.5, linestyle=":")
        for series, look in looks.items():
            _dots(ax, [scores.get(series, {}).get(panel) for _, scores in rows], series, look)
        ax.set(title=panel, xlim=(-0.03, 1.03), ylim=(len(rows) - 0.4, -0.6))
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(range(len(rows)), [text for text, _ in rows], fontsize=5.5)
    for text, (_, scores) in zip(axes[0, 0].get_yticklabels(), rows):
        text.set_fontweight("normal" if scores else "bold")
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=len(looks))
    return fig


def _dots(ax, estimates: list, series: str, look: dict) -> None:
    """A series in one panel: a mark for each row that has a value, and its interval."""
    style = {name: value for name, value in look.items() if name != "interval"}
    there = [(e, y) for y, e in enumerate(estimates) if e is not None and not np.isnan(e.value)]
    for e, y in there if look["interval"] else ():
        ax.plot([e.low, e.high], [y, y], color=style["color"], linewidth=0.8, zorder=1)
    ax.plot([e.value for e, _ in there], [y for _, y in there], linestyle="", label=series, **style)


def examples_view(features: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """For each feature, under its text, images (image, height, width, 3) and, below, these lit.

    `features`: text -> images and lit images, in [0, 1], as `helpers.naming.examples.panels` has
    them side by side; all are of one size.
    """
    n = max(len(images) for images, _ in features.values())
    height, width = next(iter(features.values()))[0].shape[1:3]
    inches = len(features) * (2 * WIDE / n * height / width + 0.3)
    fig, axes = plt.subplots(len(features), 1, figsize=(WIDE, inches), squeeze=False)
    for ax, (text, halves) in zip(axes[:, 0], features.items()):
        lacking = ((0, n - len(halves[0])), *[(0, 0)] * 3)
        padded = [np.pad(half, lacking, constant_values=1) for half in halves]
        ax.imshow(tile(np.clip(np.concatenate(padded), 0, 1), n), interpolation="nearest")
        ax.set_title(text, fontsize=7, loc="left")
        ax.set_axis_off()
    return fig
