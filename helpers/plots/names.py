"""Named features as figures: what names are worth, feature by feature, and what they are of."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from helpers.plots.images import tile
from helpers.plots.style import WIDE, colour

ROW = 0.135  # inches a line of text takes
LOOKS = {  # series -> how its marks look, in the order of drawing
    "another's": {"marker": "|", "color": colour("random"), "markersize": 5},
    "label": {"marker": "D", "color": "black", "markersize": 3.5, "markerfacecolor": "none"},
    "its name": {"marker": "o", "color": colour("residual concat"), "markersize": 3},
}
for _series, _width in (("another's", 1.2), ("label", 0.6)):
    LOOKS[_series]["markeredgewidth"] = _width


def scores_view(rows: list[tuple[str, dict, bool]], panels: dict[str, str]) -> Figure:
    """A line of text for each feature and, beside it, its scores in each of some panels.

    `rows`: text, scores, and whether it is bold, as means are; scores are series -> panel ->
    `metrics.Estimate`, the series those of LOOKS. They are from 0 to 1, and a line stands at 0.5.
    `panels`: panel -> title.
    """
    height = ROW * len(rows) + 0.75
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDE, height), sharey=True, squeeze=False)
    for ax, (panel, title) in zip(axes[0], panels.items()):
        ax.axvline(0.5, color="black", linewidth=0.5, linestyle=":")
        for series, look in LOOKS.items():
            _dots(ax, [scores.get(series, {}).get(panel) for _, scores, _ in rows], series, look)
        ax.set(title=title, xlabel="AUC", xlim=(-0.03, 1.03), ylim=(len(rows) - 0.4, -0.6))
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(range(len(rows)), [text for text, *_ in rows], fontsize=5.5)
    for text, (*_, bold) in zip(axes[0, 0].get_yticklabels(), rows):
        text.set_fontweight("bold" if bold else "normal")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def _dots(ax, estimates: list, series: str, look: dict) -> None:
    """A series in one panel: a mark for each row that has a value, of names also its interval."""
    there = [(e, y) for y, e in enumerate(estimates) if e is not None and not np.isnan(e.value)]
    for e, y in there if series == "its name" else ():
        ax.plot([e.low, e.high], [y, y], color=look["color"], linewidth=0.8, zorder=1)
    if there:
        value, place = zip(*((e.value, y) for e, y in there))
        ax.plot(value, place, linestyle="", label=series, **look)


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
