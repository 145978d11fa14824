"""Pictures that pages and cards are made of, as arrays: maps under an image's edges, rows of them.

Composing arrays takes a hundredth of the time that an axes for each picture would.
"""

import matplotlib
import numpy as np

from helpers.plots.images import GAP

STEPS_SHOWN = 8  # at most, of the kept steps


def rgb(image: np.ndarray) -> np.ndarray:
    """An image (height, width, 3 or 1) in [0, 1] as bytes (height, width, 3)."""
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def enlarged(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (rows, columns) at each pixel, (height, width): of the token that holds its centre."""
    rows, columns = values.shape
    y = ((np.arange(height) + 0.5) * rows / height).astype(int)
    x = ((np.arange(width) + 0.5) * columns / width).astype(int)
    return values[y[:, None], x]


def heated(image: np.ndarray, heat: np.ndarray, limit: float = 1.0, signed=False) -> np.ndarray:
    """A map (rows, columns) under the image's edges, bytes (height, width, 3).

    From 0 to `limit` in magma or, `signed`, from -limit to limit in red and blue.
    """
    height, width = image.shape[:2]
    share = enlarged(np.asarray(heat, float), height, width) / (limit or 1.0)
    name, share = ("RdBu_r", (share + 1) / 2) if signed else ("magma", share)
    colours = matplotlib.colormaps[name](np.clip(share, 0, 1))[..., :3]
    ink, most = (0.0, 0.4) if signed else (1.0, 0.6)
    weight = most * edges(image)[..., None]
    return rgb(colours * (1 - weight) + ink * weight)


def edges(image: np.ndarray) -> np.ndarray:
    """How much of an edge each pixel is, in [0, 1], (height, width)."""
    grey = np.pad(image.mean(2), ((0, 1), (0, 1)), mode="edge")
    found = np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1])
    return np.clip(found / max(0.15, np.quantile(found, 0.98)), 0, 1)


def beside(*pictures: np.ndarray) -> np.ndarray:
    """Pictures (height, width, 3), bytes, from left to right with white between them."""
    gap = np.full((len(pictures[0]), GAP, 3), 255, np.uint8)
    return np.hstack([part for picture in pictures for part in (gap, picture)][1:])


def above(*pictures: np.ndarray) -> np.ndarray:
    """Pictures (height, width, 3), bytes, one below the other with white between them."""
    return beside(*(p.transpose(1, 0, 2) for p in pictures)).transpose(1, 0, 2)


def examples(of) -> list[np.ndarray]:
    """Each of some `Examples`, the image above the map of where the latent is active."""
    pairs = zip(of.pictures, of.maps)
    return [above(rgb(image), heated(image, heat)) for image, heat in pairs]


def over_time(of, limit: float) -> list[np.ndarray]:
    """Each of some `Examples` with evidence: the image, then its evidence at `shown_steps`."""
    return [
        beside(rgb(image), *(heated(image, e[s], limit, signed=True) for s in shown_steps(len(e))))
        for image, e in zip(of.pictures, of.evidence)
    ]


def shown_steps(n_steps: int) -> list[int]:
    """Numbers of the kept steps that are drawn, first and last among them."""
    at = np.linspace(0, n_steps - 1, min(n_steps, STEPS_SHOWN))
    return at.round().astype(int).tolist()


def limit_of(examples_: dict) -> float:
    """The largest evidence, of either sign, at all of a record's examples: their common scale."""
    return max(float(abs(own.evidence).max(initial=1e-9)) for own in examples_.values())


def place(heat: np.ndarray) -> str:
    """Where a map (rows, columns) is largest, in words, such as 'upper left'; '' for a flat one."""
    if np.ptp(heat) == 0:
        return ""
    at = np.unravel_index(np.argmax(heat), heat.shape)
    third = [int(3 * (i + 0.5) / n) for i, n in zip(at, heat.shape)]
    words = ("upper", "", "lower")[third[0]], ("left", "", "right")[third[1]]
    return " ".join(word for word in words if word) or "centre"
