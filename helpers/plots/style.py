"""Figures: one style, one way to save, and the few drawings that more than one notebook makes.

Functions draw on the axes they are given and touch no global state but `use_style`.
"""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

COLUMN, TEXT, WIDE = (
    3.25,
    5.5,
    6.75,
)  # figure widths in inches: one column, NeurIPS text, two columns
# Okabe-Ito colours, told apart by colour-blind readers; one per method, the same in every figure
PALETTE = {
    "residual concat": "#0072B2",
    "raw concat": "#D55E00",
    "residual one step": "#56B4E9",
    "raw one step": "#E69F00",
    "predictors": "#999999",
    "PCA": "#009E73",
    "random": "#999999",
    "class means": "#009E73",
    "latent": "#0072B2",
}


def use_style() -> None:
    """Apply `helpers/plots/paper.mplstyle`."""
    plt.style.use(Path(__file__).parent / "paper.mplstyle")


def save_figure(fig: Figure, folder, name: str, **about) -> None:
    """Write `name`.pdf and `name`.png into `folder`, without dates, so that the same run gives the same bytes.

    `about` (notebook, parameters, commit) goes into the files' metadata.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"figures: {folder} cannot be made ({error.strerror}); give another run, or make the folder writable"
        ) from None
    text = "; ".join(f"{k}={v}" for k, v in sorted(about.items()))
    for suffix, metadata in (
        ("pdf", {"CreationDate": None, "Subject": text}),
        ("png", {"Description": text}),
    ):
        aside = folder / f".{name}.{suffix}.part"
        try:
            fig.savefig(aside, format=suffix, metadata=metadata)
            aside.replace(folder / f"{name}.{suffix}")
        except (OSError, AttributeError) as error:  # a PDF on a full disk fails with the latter
            raise OSError(
                f"figures: {folder / name}.{suffix} could not be written ({getattr(error, 'strerror', None) or error}); free some disk space or make the folder writable"
            ) from None
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def show_image(ax, image: np.ndarray, title: str = "") -> None:
    """An image in [0, 1], without axes."""
    ax.imshow(image, interpolation="nearest")
    ax.set_title(title, fontsize=7)
    ax.set_axis_off()


def overlay(
    ax, image: np.ndarray, heat: np.ndarray, vmax: float, vmin: float = 0.0, cmap: str = "magma"
):
    """A heat map (rows, columns) of tokens, in the colours of its colour bar, with the image's edges drawn over it; returns the mappable."""
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    shown = ax.imshow(heat, cmap=cmap, vmin=vmin, vmax=vmax, extent=extent, interpolation="nearest")
    edges = np.hypot(*np.gradient(image.mean(axis=2)))
    lines = np.ones((height, width, 4))
    lines[..., 3] = np.clip(edges / max(0.15, np.quantile(edges, 0.98)), 0, 1) * 0.6
    ax.imshow(lines, extent=extent, interpolation="nearest")
    ax.set_axis_off()
    return shown


def heat_strip(
    axes,
    image: np.ndarray,
    heat: np.ndarray,
    timesteps,
    vmax: float | None = None,
    titles: bool = True,
):
    """The image, then one heat map per kept step over it, all on one colour scale.

    Parameters
    ----------
    heat : float, (step, rows, columns)
    """
    vmax = float(heat.max()) or 1.0 if vmax is None else vmax
    show_image(axes[0], image)
    shown = None
    for ax, h, t in zip(axes[1:], heat, timesteps):
        shown = overlay(ax, image, h, vmax)
        if titles:
            ax.set_title(f"t = {t:.0f}", fontsize=7)
    return shown


def with_interval(ax, x, estimates, label: str, **style) -> None:
    """A line of `metrics.Estimate`s with their intervals as a band."""
    value, low, high = np.array(estimates, float).T
    (line,) = ax.plot(x, value, marker="o", markersize=3, label=label, **style)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def png(fig: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG bytes, for an image widget; closes it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi)
    plt.close(fig)
    return buffer.getvalue()


def tile(images: np.ndarray, columns: int) -> Image.Image:
    """Images (n, height, width, 3) in [0, 1] as one picture, with a two-pixel white gap."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    sheet = np.ones((rows * (height + 2) - 2, columns * (width + 2) - 2, 3))
    for i, image in enumerate(images):
        r, c = divmod(i, columns)
        sheet[r * (height + 2) :, c * (width + 2) :][:height, :width] = image
    return Image.fromarray((sheet * 255).round().astype(np.uint8))
