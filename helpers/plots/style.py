"""Figures: one style, one colour a method, one way to save; only `use_style` is global."""

import sys
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from helpers.checks import nearest, refuse

COLUMN, TEXT, WIDE = 3.25, 5.5, 6.75  # inches: one column, NeurIPS text, two columns

# Okabe and Ito's colours, which colour-blind readers can tell apart, then some of Paul Tol's.
COLOURS = {
    "residual concat": "#0072B2",  # blue
    "raw concat": "#D55E00",  # vermilion
    "residual one step": "#56B4E9",  # sky blue
    "raw one step": "#E69F00",  # orange
    "matryoshka": "#DDCC77",  # sand
    "PCA raw": "#009E73",  # green
    "PCA residual": "#00543D",
    "neurons": "#CC79A7",  # pink
    "untrained residual": "#00324F",  # the trained ones' colours, darker
    "untrained raw": "#6B2F00",
    "ridge": "#332288",  # indigo
    "identity": "#AA4499",  # purple
    "predictors": "#000000",
    "class means": "#44AA99",  # teal
    "cross-attention": "#882255",  # wine
    "labelled direction": "#117733",  # green
    "random": "#999999",
}
LIKE = {"residual latent": "residual concat", "raw latent": "raw concat", "random rows": "random"}


def colour(method: str) -> str:
    """The colour of a method, the same in every figure; ValueError for an unknown method."""
    known = LIKE.get(method, method)
    if known not in COLOURS:
        refuse("method", method, f"one that has a colour, such as {nearest(method, COLOURS)}")
    return COLOURS[known]


def use_style() -> None:
    """Apply `paper.mplstyle`; in a notebook, show figures at twice the resolution."""
    plt.style.use(Path(__file__).parent / "paper.mplstyle")
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


def save_figure(fig: Figure, folder, name: str, **about) -> None:
    """Write `name`.pdf and `name`.png into `folder`, or OSError, and what stood there stays.

    The same run gives the same bytes: no dates. `about` (notebook, run, commit) goes into metadata.
    The layout is computed once and then stays, which saves a quarter of the time.
    """
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be made: {error.strerror}") from None
    text = "; ".join(f"{k}={v}" for k, v in sorted(about.items()))
    for suffix, metadata in (
        ("pdf", {"CreationDate": None, "Subject": text}),
        ("png", {"Description": text}),
    ):
        path, aside = folder / f"{name}.{suffix}", folder / f".{name}.{suffix}.part"
        try:
            fig.savefig(aside, format=suffix, metadata=metadata)
            aside.replace(path)
        except (OSError, AttributeError) as error:  # a PDF on a full disk fails with the latter
            why = getattr(error, "strerror", None) or error
            raise OSError(f"{path} cannot be written: {why}") from None
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def with_interval(ax, x, estimates, label: str, **style) -> None:
    """A line of `metrics.Estimate`s with their intervals as a band."""
    value, low, high = np.array(estimates, float).T
    (line,) = ax.plot(x, value, label=label, **{"marker": "o", "markersize": 3} | style)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
