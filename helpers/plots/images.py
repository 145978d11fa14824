"""Images and the heat maps over them."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def show_image(ax, image: np.ndarray, title: str = "") -> None:
    """An image (height, width, 3 or 1) in [0, 1], without axes."""
    ax.imshow(image, interpolation="nearest", cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=7)
    ax.set_axis_off()


def overlay(ax, image: np.ndarray, heat: np.ndarray, vmax: float, left: float = 0.0):
    """A heat map (rows, columns), from 0 to vmax, under the image's edges; returns the mappable.

    Colours are those of the colour bar. The left edge is at x = `left`, in the image's pixels.
    """
    height, width = image.shape[:2]
    place = {"extent": (left, left + width, height, 0), "interpolation": "nearest"}
    mappable = ax.imshow(heat, cmap="magma", vmin=0, vmax=vmax, **place)
    edges = np.hypot(*np.gradient(image.mean(axis=2)))
    lines = np.ones((height, width, 4))
    lines[..., 3] = np.clip(edges / max(0.15, np.quantile(edges, 0.98)), 0, 1) * 0.6
    ax.imshow(lines, **place)
    ax.set_axis_off()
    return mappable


def heat_strip(ax, image: np.ndarray, heat: np.ndarray, timesteps, vmax: float, titles=True):
    """The image and, to its right, a heat map for each step of `heat` (step, rows, columns).

    All in one axes, since axes are what takes time to draw; returns the mappable.
    """
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    ax.imshow(image, interpolation="nearest", cmap="gray", vmin=0, vmax=1, extent=extent)
    for i, (of_step, t) in enumerate(zip(heat, timesteps), 1):
        left = 1.06 * i * width
        mappable = overlay(ax, image, of_step, vmax, left)
        if titles:
            ax.text(left + width / 2, -0.06 * height, f"t = {t:.0f}", ha="center", fontsize=7)
    ax.set_xlim(0, left + width)
    return mappable


def png(fig: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG bytes, for an image widget; closes it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi)
    plt.close(fig)
    return buffer.getvalue()


def tile(images: np.ndarray, columns: int) -> Image.Image:
    """Images (n, height, width, 3 or 1) in [0, 1] as one picture, with a two-pixel white gap."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    sheet = np.ones((rows * (height + 2) - 2, columns * (width + 2) - 2, 3))
    for i, image in enumerate(images):
        r, c = divmod(i, columns)
        sheet[r * (height + 2) :, c * (width + 2) :][:height, :width] = image
    return Image.fromarray((sheet * 255).round().astype(np.uint8))
