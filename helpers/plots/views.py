"""Whole figures of latents, drawn from arrays: for the notebooks, and for the viewers in them."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from helpers.plots.images import draw_edges, overlay, show_image
from helpers.plots.style import WIDE, colour


def evidence_strip(ax, image, evidence, timesteps, limit: float, titles=True):
    """An image and, to its right, evidence (step, rows, columns) at each step, within ±limit.

    All in one axes; the image (height, width, 3 or 1) in [0, 1]. Returns the mappable and the left
    end of each map.
    """
    height, width = image.shape[:2]
    show_image(ax, image, extent=(0, width, height, 0))
    lefts = 1.06 * width * np.arange(1, len(evidence) + 2)
    for left, of_step, t in zip(lefts, evidence, timesteps):
        place = {"extent": (left, left + width, height, 0), "interpolation": "nearest"}
        shown = ax.imshow(of_step, cmap="RdBu_r", vmin=-limit, vmax=limit, **place)
        draw_edges(ax, image, (0.0, 0.0, 0.0), 0.35, place)
        if titles:
            ax.text(left + width / 2, -0.06 * height, f"t = {t:.0f}", ha="center", fontsize=6)
    ax.set_xlim(0, lefts[-2] + width)
    return shown, lefts


def latent_view(title: str, images, of_dictionary: dict, timesteps, marks=None) -> Figure:
    """When and where latents get their evidence, one of each dictionary on the same images.

    `of_dictionary`: name -> dict of 'latent'; 'evidence', (image, step, row, column), on one scale
    over images and steps; 'codes' (image, row, column); and by step the 'effect' of a code of 1,
    its 'onset' and the same of random rows, 'random', each (step,). `marks`: places in 0 … S − 1 of
    the step at which each image's label was decided, (image,), NaN unknown: a triangle each.
    """
    n = len(images)
    fig = plt.figure(figsize=(WIDE, len(of_dictionary) * (0.62 * n + 0.45) + 0.25))
    parts = fig.subfigures(len(of_dictionary), 1, squeeze=False)[:, 0]
    for part, (name, found) in zip(parts, of_dictionary.items()):
        maps, lines = part.subfigures(1, 2, width_ratios=(3.6, 1))
        _maps(maps, images, found, timesteps, marks)
        maps.suptitle(f"{name}, latent {found['latent']}", fontsize=8)
        _by_step(lines.subplots(), name, found, timesteps)
    fig.suptitle(title)
    return fig


def _maps(fig, images, found: dict, timesteps, marks) -> None:
    axes = fig.subplots(len(images), squeeze=False)[:, 0]
    limit = float(abs(found["evidence"]).max()) or 1.0
    strongest = float(found["codes"].max()) or 1.0
    for i, (ax, image) in enumerate(zip(axes, images)):
        shown, lefts = evidence_strip(ax, image, found["evidence"][i], timesteps, limit, i == 0)
        height, width = image.shape[:2]
        left = lefts[-1] + 0.12 * width
        place = {"extent": (left, left + width, height, 0), "interpolation": "nearest"}
        code = ax.imshow(found["codes"][i], cmap="magma", vmin=0, vmax=strongest, **place)
        draw_edges(ax, image, (1.0, 1.0, 1.0), 0.6, place)
        ax.set_xlim(0, left + width)
        if i == 0:
            ax.text(left + width / 2, -0.06 * height, "code", ha="center", fontsize=6)
        if marks is not None and not np.isnan(marks[i]):
            x = np.interp(marks[i], np.arange(len(timesteps)), lefts[:-1]) + width / 2
            ax.plot(x, height + 3, "^", color="black", markersize=3, clip_on=False)
    fig.colorbar(code, ax=axes.tolist(), label="code", fraction=0.03, pad=0.01)
    fig.colorbar(shown, ax=axes.tolist(), label="evidence", fraction=0.03, pad=0.02)


def _by_step(ax, name: str, found: dict, timesteps) -> None:
    for what, line in (("effect", "-"), ("onset", "--"), ("random", ":")):
        ink = colour("random" if what == "random" else name)
        label = {"random": "effect, random rows"}.get(what, what)
        ax.plot(timesteps, found[what], line, marker="o", markersize=2, color=ink, label=label)
    ax.invert_xaxis()
    ax.set_ylim(0, 1.4 * max(np.max(found[what]) for what in ("effect", "onset", "random")) or 1)
    ax.set_xlabel("timestep", fontsize=6)
    ax.set_title("‖u[s]‖ and what is new", fontsize=7)
    ax.tick_params(labelsize=6)
    ax.legend(fontsize=5, handlelength=2, loc="upper left", borderpad=0.2)


def shares_by_latent(ax, profile: np.ndarray, title: str):
    """Evidence (latent, step) as shares, a row a latent, by the step of its peak; the mappable."""
    profile = profile / profile.sum(1, keepdims=True)
    order = np.lexsort((profile @ np.arange(profile.shape[1]), profile.argmax(1)))
    ax.set(title=title, yticks=[])
    return ax.imshow(profile[order], aspect="auto", vmin=0, vmax=0.6, interpolation="nearest")


def correlations(ax, matrix: np.ndarray, names: list[str], title: str):
    """A matrix of rank correlations with its numbers; the mappable."""
    shown = ax.imshow(matrix, cmap="RdBu_r", vmin=-0.6, vmax=0.6)
    for (i, j), value in np.ndenumerate(matrix):
        ink = "white" if abs(value) > 0.4 else "black"
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=5, color=ink)
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    ax.set_yticks(range(len(names)), names, fontsize=6)
    ax.set_title(title, fontsize=8)
    return shown


def cluster_view(clusters, grid: tuple[int, int], timesteps) -> Figure:
    """`features.clusters`: the mean map of each above, its steps' shares of evidence below."""
    n = max(1, len(clusters))
    fig, axes = plt.subplots(2, n, figsize=(WIDE, 2.3), squeeze=False, height_ratios=(1.3, 1))
    vmax = max((c.map.max() for c in clusters), default=1)
    for number, (above, below, c) in enumerate(zip(*axes, clusters), 1):
        shown = above.imshow(c.map.reshape(grid), cmap="magma", vmin=0, vmax=vmax)
        above.set_title(f"cluster {number}: {len(c.latents)}\nstrongest {c.latents[0]}", fontsize=7)
        above.set_axis_off()
        below.bar(range(len(timesteps)), c.profile, color=colour("residual concat"))
        below.set_xticks(range(len(timesteps)), [f"{t:.0f}" for t in timesteps], rotation=90)
        below.tick_params(labelsize=6)
        below.set(ylim=(0, 1.05 * max(c.profile.max() for c in clusters)), yticks=[])
    if clusters:
        fig.colorbar(shown, ax=axes[0].tolist(), label="share of codes")
        axes[1, 0].set_ylabel("share of\nevidence", fontsize=7)
    return fig


def maps_beside(fig, images, columns: dict[str, np.ndarray], names=()) -> None:
    """A row for each image (height, width, 3 or 1): its name, itself, and its map of each column.

    `columns`: title -> maps (image, row, column), each on its own scale, or colours (…, 3).
    """
    height, width = images.shape[1:3]
    words = {"fontsize": 6, "linespacing": 0.9}
    for i, ax in enumerate(fig.subplots(len(images), squeeze=False)[:, 0]):
        show_image(ax, images[i], extent=(0, width, height, 0))
        for k, (title, maps) in enumerate(columns.items(), 1):
            left, drawn = 1.06 * k * width, maps[i] - (maps[i].min() if maps.ndim == 3 else 0)
            if maps.ndim == 3:
                overlay(ax, images[i], drawn, drawn.max() or 1, left)
            else:
                place = {"extent": (left, left + width, height, 0), "interpolation": "nearest"}
                ax.imshow(drawn, **place)
            if i == 0:
                ax.text(left + width / 2, -3, title, ha="center", va="bottom", **words)
        if len(names):
            ax.text(-3, height / 2, names[i], ha="right", va="center", **words)
        ax.set_xlim(0, left + width)
