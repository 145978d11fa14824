"""Images and the heat maps over them."""

import numpy as np

GAP = 2  # white pixels between the images of `tile`


def show_image(ax, image: np.ndarray, title: str = "", **place) -> None:
    """An image (height, width, 3 or 1) in [0, 1], without axes."""
    ax.imshow(image, interpolation="nearest", cmap="gray", vmin=0, vmax=1, **place)
    ax.set_title(title, fontsize=7)
    ax.set_axis_off()


def overlay(ax, image: np.ndarray, heat: np.ndarray, vmax: float, left: float = 0.0):
    """A heat map (rows, columns) under the image's edges, from x = `left` on; the mappable."""
    height, width = image.shape[:2]
    place = {"extent": (left, left + width, height, 0), "interpolation": "nearest"}
    mappable = ax.imshow(heat, cmap="magma", vmin=0, vmax=vmax, **place)
    draw_edges(ax, image, (1.0, 1.0, 1.0), 0.6, place)
    ax.set_axis_off()
    return mappable


def draw_edges(ax, image: np.ndarray, ink, opacity: float, place: dict) -> None:
    """An image's edges, in a colour (red, green, blue), over what stands at `place`."""
    edges = np.hypot(*np.gradient(image.mean(axis=2)))
    lines = np.ones((*edges.shape, 4)) * (*ink, 1)
    lines[..., 3] = np.clip(edges / max(0.15, np.quantile(edges, 0.98)), 0, 1) * opacity
    ax.imshow(lines, **place)


def heat_strip(ax, image: np.ndarray, heat: np.ndarray, timesteps, vmax: float, titles=True):
    """The image and, to its right, a heat map for each step of `heat` (step, rows, columns).

    All in one axes, since axes are what takes time to draw; returns the mappable.
    """
    height, width = image.shape[:2]
    show_image(ax, image, extent=(0, width, height, 0))
    for i, (of_step, t) in enumerate(zip(heat, timesteps), 1):
        left = 1.06 * i * width
        mappable = overlay(ax, image, of_step, vmax, left)
        if titles:
            ax.text(left + width / 2, -0.06 * height, f"t = {t:.0f}", ha="center", fontsize=7)
    ax.set_xlim(0, left + width)
    return mappable


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Images (n, height, width, 3 or 1) in [0, 1] as one, uint8, one channel as grey."""
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    gaps = ((0, -len(images) % columns), (0, GAP), (0, GAP), (0, 0))
    tiles = np.pad((images * 255).round().astype(np.uint8), gaps, constant_values=255)
    rows = np.split(tiles, len(tiles) // columns)
    return np.vstack([np.hstack(row) for row in rows])[:-GAP, :-GAP]
