"""A widget over a view: a plain function that draws a figure, which tests and scripts call, too."""

import io
from collections.abc import Callable

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def viewer(view: Callable[..., Figure], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """Controls in a row above what `view` draws from their values, by argument name.

    Give those that start slow work `continuous_update=False`.
    """
    # as large as it is drawn: a box would stretch it to the width of the cell
    picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})

    def redraw(_=None):
        fig = view(**{name: control.value for name, control in controls.items()})
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=110)
        plt.close(fig)
        picture.value = buffer.getvalue()

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()  # an error in the view is seen here: within a callback it would only be logged
    return ipywidgets.VBox([ipywidgets.HBox(list(controls.values())), picture])
