"""A brush: which of an image's tokens, painted in the browser and sent when the pointer is lifted.

Strokes are drawn by `paint.js` alone, so that painting asks nothing of a kernel that is at work.
"""

import io
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from PIL import Image

from helpers.checks import refuse
from helpers.explorer.pictures import rgb

HERE = Path(__file__).parent


class Paint(anywidget.AnyWidget):
    """A token grid (rows, columns) over an image; `mask` numbers the painted tokens, row by row."""

    _esm = HERE / "paint.js"
    _css = HERE / "paint.css"
    rows = traitlets.Int(1).tag(sync=True)
    columns = traitlets.Int(1).tag(sync=True)
    # a list, since bytes from a browser arrive as a memoryview, which a Bytes trait drops unseen
    mask = traitlets.List(traitlets.Int()).tag(sync=True)
    picture = traitlets.Bytes(b"").tag(sync=True)  # a PNG, from here to the browser only
    height = traitlets.Int(1).tag(sync=True)  # of the picture, in pixels
    width = traitlets.Int(1).tag(sync=True)
    told = traitlets.Unicode("").tag(sync=True)  # what the picture shows, for those who cannot see

    def __init__(self, grid: tuple[int, int], **traits):
        rows, columns = grid
        size = {"height": 64 * rows, "width": 64 * columns}
        super().__init__(rows=rows, columns=columns, **size, **traits)

    @traitlets.validate("mask")
    def _tokens(self, proposal) -> list[int]:
        found, n = sorted(set(proposal["value"])), self.rows * self.columns
        if found and not (0 <= found[0] and found[-1] < n):
            refuse("mask", found, f"numbers of tokens, from 0 to {n - 1}")
        return found

    def region(self) -> np.ndarray:
        """The painted tokens as bool (rows, columns)."""
        return region_of(self.mask, (self.rows, self.columns))

    def show(self, image: np.ndarray | None, told: str) -> None:
        """Lay an image (height, width, 3 or 1), in [0, 1], under the grid, or nothing."""
        stream = io.BytesIO()
        with self.hold_sync():
            if image is not None:
                Image.fromarray(rgb(image)).save(stream, "png")
                self.height, self.width = image.shape[:2]
            self.picture, self.told = stream.getvalue(), told


def region_of(mask, grid: tuple[int, int]) -> np.ndarray:
    """Numbers of tokens as bool (rows, columns)."""
    found = np.zeros(grid, bool)
    found.flat[list(mask)] = True
    return found
