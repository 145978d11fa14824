import io

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from PIL import Image

from helpers.plots.viewer import viewer


def view(width, height):
    if width > 3:
        raise ValueError("width is 4; it must be from 1 to 3")
    return plt.figure(figsize=(width, height))


def shape(widget):
    return Image.open(io.BytesIO(widget.children[1].value)).size


def test_the_picture_follows_the_controls_and_leaves_no_figure_open():
    before = plt.get_fignums()  # of other tests
    width = ipywidgets.BoundedIntText(1, min=1, max=4)
    widget = viewer(view, width=width, height=ipywidgets.IntSlider(2, min=1, max=3))
    assert shape(widget) == (110, 220) and widget.children[0].children[0] is width
    width.value = 3
    assert shape(widget) == (330, 220) and plt.get_fignums() == before


def test_an_error_at_first_sight_is_raised():
    with pytest.raises(ValueError, match="width is 4"):
        viewer(view, width=ipywidgets.IntText(4), height=ipywidgets.IntText(1))
