"""What an interactive viewer shows: whole figures, drawn from arrays."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from helpers.checks import in_range
from helpers.plots.images import overlay, show_image
from helpers.plots.style import WIDE, colour


def latent_view(latent: int, step: int, images, codes, norms, timesteps) -> Figure:
    """A latent's effect on images at one kept step, and its norm over all steps.

    The effect is its code, (image, row, column), times its norm ‖u[s]‖, (step,), on one scale in
    all images, (image, height, width, 3 or 1); ValueError if there is no such step.
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
