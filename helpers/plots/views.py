"""What an interactive viewer shows: whole figures, drawn from arrays."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from helpers.checks import in_range
from helpers.plots.images import overlay, show_image
from helpers.plots.style import WIDE, colour


def latent_view(
    latent: int, step: int, images: np.ndarray, codes: np.ndarray, norms: np.ndarray, timesteps
) -> Figure:
    """A latent's effect on images at one kept step, and its norm over all steps.

    Parameters
    ----------
    latent : int
        Its number, for the title.
    step : int
        Which of the kept steps, from 0; ValueError if there is no such step.
    images : float, (image, height, width, 3 or 1), in [0, 1]
    codes : float, (image, row, column)
        The latent's codes. Its effect is the code times the norm, on one scale in all images.
    norms : float, (step,)
        ‖u[s]‖ of the latent.
    timesteps : sequence of float, (step,)
    """
    in_range("step", step, 0, len(timesteps) - 1)
    effects = codes * norms[step]
    fig = plt.figure(figsize=(WIDE, 2.5))
    left, right = fig.subfigures(1, 2, width_ratios=(2.4, 1))
    axes = left.subplots(2, len(images), squeeze=False)
    for above, below, image, effect in zip(*axes, images, effects):
        show_image(above, image)
        shown = overlay(below, image, effect, float(effects.max()) or 1.0)
    left.colorbar(shown, ax=axes[1].tolist(), label="effect")
    left.suptitle(f"latent {latent} at t = {timesteps[step]:.0f}: top test images")
    ax = right.subplots()
    ax.plot(timesteps, norms, marker="o", markersize=3, color=colour("residual concat"))
    ax.axvline(timesteps[step], color="black", linewidth=0.8, linestyle=":")
    ax.invert_xaxis()
    ax.set(xlabel="timestep", ylabel="‖u[s]‖", ylim=(0, 1.1 * norms.max()))
    return fig
