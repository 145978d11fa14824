"""Sheets of images: named rows of them, some marked; one image beside the unsteered one."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from helpers.plots.images import GAP, show_image, tile
from helpers.plots.style import TEXT


def sheet(rows: dict[str, np.ndarray], marks=None, titles=(), title: str = "") -> Figure:
    """A row of images (image, height, width, 3 or 1), in [0, 1], for each name; titles of columns.

    `marks`, name -> a text for each image, stand in the images' corners, a tick on green. All is
    drawn in one axes, since axes are what takes time to draw.
    """
    columns = max(map(len, rows.values()))
    height, width = np.shape(next(iter(rows.values())))[1:3]
    lacking = [((0, columns - len(images)), (0, 0), (0, 0), (0, 0)) for images in rows.values()]
    padded = [np.pad(r, n, constant_values=1) for r, n in zip(rows.values(), lacking)]
    above = 0.2 * bool(titles) + 0.2 * bool(title)
    inches = 0.66 * columns + 1.3, (0.66 * height / width + 0.03) * len(rows) + above
    fig, ax = plt.subplots(figsize=inches)
    ax.imshow(tile(np.concatenate(padded), columns), interpolation="nearest")
    ax.set_axis_off()
    lefts, tops = np.arange(columns) * (width + GAP), np.arange(len(rows)) * (height + GAP)
    corner = {"ha": "right", "va": "bottom", "color": "white", "fontsize": 6}
    for top, name in zip(tops, rows):
        ax.text(-GAP, top + height / 2, name, fontsize=7, ha="right", va="center")
        for left, text in zip(lefts, (marks or {}).get(name, [])):
            ground = {"facecolor": "#007A3D" if text == "✓" else "black", "linewidth": 0}
            place = left + 0.96 * width, top + 0.96 * height
            if text:
                ax.text(*place, text, bbox=ground | {"boxstyle": "square,pad=0.15"}, **corner)
    for left, text in zip(lefts, titles):
        ax.text(left + width / 2, -GAP, text, fontsize=7, ha="center", va="bottom")
    fig.suptitle(title, fontsize=8)
    return fig


def beside_unsteered(unsteered: np.ndarray, steered: np.ndarray, title: str) -> Figure:
    """An image (height, width, 3 or 1) in [0, 1] without and with steering, and the difference."""
    fig, axes = plt.subplots(1, 3, figsize=(TEXT, 1.8))
    show_image(axes[0], unsteered, "unsteered")
    show_image(axes[1], steered, title)
    change = axes[2].imshow(abs(steered - unsteered).mean(-1), cmap="magma", vmin=0, vmax=1)
    axes[2].set_title("absolute change", fontsize=7)
    axes[2].set_axis_off()
    fig.colorbar(change, ax=axes[2])
    return fig
