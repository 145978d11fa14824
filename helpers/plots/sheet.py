"""Sheets of images: named rows of them, some with a tick; one image beside the unsteered one."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from helpers.plots.images import show_image
from helpers.plots.style import TEXT


def sheet(rows: dict[str, np.ndarray], ticks=None, titles=(), title: str = "") -> Figure:
    """A row of images (image, height, width, 3), in [0, 1], for each name; titles are of columns.

    `ticks`, name -> bool, (image,), tells which get a white tick on green, to be seen on any image.
    """
    columns = max(map(len, rows.values()))
    size = (0.66 * columns + 1.3, 0.69 * len(rows) + 0.2 * bool(titles) + 0.2 * bool(title))
    fig, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    ground = {"boxstyle": "square,pad=0.15", "facecolor": "#007A3D", "linewidth": 0}
    tick = {"ha": "right", "va": "bottom", "color": "white", "fontsize": 6, "bbox": ground}
    for r, (of_row, (name, images)) in enumerate(zip(axes, rows.items())):
        place = {"ha": "right", "va": "center", "transform": of_row[0].transAxes}
        of_row[0].text(-0.1, 0.5, name, fontsize=7, **place)
        ticked = (ticks or {}).get(name, [False] * columns)
        for i, ax in enumerate(of_row):
            ax.set_axis_off()
            if i < len(images):
                show_image(ax, images[i], titles[i] if titles and r == 0 else "")
                if ticked[i]:
                    ax.text(0.96, 0.04, "✓", transform=ax.transAxes, **tick)
    fig.suptitle(title, fontsize=8)
    return fig


def beside_unsteered(unsteered: np.ndarray, steered: np.ndarray, title: str) -> Figure:
    """An image (height, width, 3) in [0, 1] without and with steering, and where they differ."""
    fig, axes = plt.subplots(1, 3, figsize=(TEXT, 1.8))
    show_image(axes[0], unsteered, "unsteered")
    show_image(axes[1], steered, title)
    change = axes[2].imshow(abs(steered - unsteered).mean(-1), cmap="magma", vmin=0, vmax=1)
    axes[2].set_title("absolute change", fontsize=7)
    axes[2].set_axis_off()
    fig.colorbar(change, ax=axes[2])
    return fig
