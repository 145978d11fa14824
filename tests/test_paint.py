import io

import numpy as np
import pytest
import traitlets
from PIL import Image

from helpers.explorer.paint import HERE, Paint, region_of


def test_painted_tokens_are_numbered_row_by_row():
    paint = Paint((2, 3), mask=[4, 0, 4])
    assert paint.mask == [0, 4]
    assert paint.region().tolist() == [[True, False, False], [False, True, False]]
    assert not region_of((), (1, 5)).any()


def test_the_browser_sends_a_list_that_arrives():
    """As the front end does: a state with JSON in it, no buffers."""
    paint, seen = Paint((2, 3)), []
    paint.observe(lambda event: seen.append(event["new"]), "mask")
    paint.set_state({"mask": [5, 1]})
    assert seen == [[1, 5]]


@pytest.mark.parametrize("wrong", [[6], [-1, 2]])
def test_tokens_that_there_are_not_are_refused(wrong):
    paint = Paint((2, 3), mask=[1])
    with pytest.raises((ValueError, traitlets.TraitError), match="it must be numbers of tokens"):
        paint.mask = wrong
    assert paint.mask == [1]


def test_an_image_of_any_shape_lies_under_the_grid():
    paint = Paint((2, 3))
    paint.show(np.full((4, 6, 1), 0.5), "grey")
    image = np.asarray(Image.open(io.BytesIO(paint.picture)))
    assert image.shape == (4, 6, 3) and (image == 128).all()
    assert (paint.height, paint.width, paint.told) == (4, 6, "grey")
    paint.show(None, "nothing yet")
    assert paint.picture == b"" and paint.told == "nothing yet"


def test_the_script_and_its_style_are_files_of_the_package():
    assert "pointerup" in str(Paint._esm) and (HERE / "paint.js").exists()
    assert ".explorer-paint" in str(Paint._css)
