"""Which images a feature is named from, which its name is scored on, and how they are shown.

A name given from some images is scored on others, or it would only have to say what these happen to
share. Those that it is given from lie over the quantiles of activation, not at the top alone, where
every feature looks purer than it is. A describer is shown *panels*: the image, and beside it the
same image lit where the feature is active.
"""

from dataclasses import dataclass

import numpy as np

from helpers.checks import in_range, refuse

GAP = 2  # white pixels between the two halves of a panel
DIM = 0.15  # brightness of the right half where the feature is silent


@dataclass(frozen=True)
class Examples:
    """Indices of images, int (n,) each; no image is in two of them."""

    described: np.ndarray  # the feature fires; over its quantiles, strongest first
    matching: np.ndarray  # it fires; over the quantiles of the others, strongest first
    random: np.ndarray  # it is silent; drawn at random
    hard: np.ndarray  # it is silent and its nearest feature fires; strongest of that first

    @property
    def n_judged(self) -> int:
        """How many images a judge sees whole."""
        return len(self.matching) + len(self.random) + len(self.hard)


def choose(strength, nearest=None, *, n_described=10, n_judged=10, seed: int = 0) -> Examples:
    """Images to describe a feature from, and others to score its name on, `n_judged` of each kind.

    `strength` (image,) is the feature's largest code in each image, `nearest` that of the feature
    most like it (None: there are no hard negatives). Where fewer images fire, about half of them
    are described; at least half of the silent ones that are judged are random. ValueError if the
    feature fires in fewer than two images.
    """
    strength = _strength("strength", strength)
    rival = np.zeros_like(strength) if nearest is None else _strength("nearest", nearest)
    if len(rival) != len(strength):
        refuse("nearest", f"of {len(rival)} images", f"of {len(strength)}, as strength is")
    in_range("n_described", n_described, 1)
    in_range("n_judged", n_judged, 1)
    order = np.argsort(-strength, kind="stable")
    firing, silent = order[strength[order] > 0], np.nonzero(strength <= 0)[0]
    if len(firing) < 2:
        valid = "above 0 in two images or more, one to describe and one to judge"
        refuse("strength", f"above 0 in {len(firing)}", valid)
    described = spread(firing, min(n_described, (len(firing) + 1) // 2))
    matching = spread(firing[~np.isin(firing, described)], n_judged)
    hard = silent[rival[silent] > 0]
    hard = hard[np.argsort(-rival[hard], kind="stable")][: min(n_judged, len(silent) // 2)]
    others = silent[~np.isin(silent, hard)]
    drawn = np.random.default_rng(seed).permutation(others)[:n_judged]
    return Examples(described, matching, np.sort(drawn), hard)


def spread(items: np.ndarray, n: int) -> np.ndarray:
    """At most n of the items, from the first to the last at equal distances."""
    n = min(n, len(items))
    return items[np.linspace(0, len(items) - 1, n).round().astype(int)]


def _strength(name: str, values) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 1:
        refuse(f"shape of {name}", values.shape, "(image,)")
    if not np.isfinite(values).all():
        refuse(name, float(values[~np.isfinite(values)][0]), "finite everywhere")
    return values


def at_pixels(maps: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Maps (image, rows, columns) at pixels, (image, height, width).

    A pixel has the value of the token that holds its centre, whether or not the grid divides it.
    """
    maps = np.asarray(maps)
    row, column = (
        ((np.arange(pixels) + 0.5) * tokens / pixels).astype(int)
        for pixels, tokens in zip(shape, maps.shape[1:])
    )
    return maps[:, row][:, :, column]


def panels(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Each image and, beside it, the image lit where its map is high; float32.

    (image, height, 2 width + GAP, 3) of images (image, height, width, 3 or 1) in [0, 1] and maps
    (image, rows, columns), each taken as a share of its own maximum, so that weak examples can be
    seen, too. Where the map is 0 the right half has `DIM` of the image's brightness.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        refuse("shape of images", images.shape, "(image, height, width, 3 or 1)")
    maps = np.asarray(maps, np.float32)
    if maps.ndim != 3 or len(maps) != len(images):
        refuse("shape of maps", maps.shape, f"({len(images)}, rows, columns)")
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    highest = np.maximum(maps.max((1, 2), keepdims=True, initial=0), 1e-12)
    lit = at_pixels(np.clip(maps / highest, 0, 1), images.shape[1:3])[..., None]
    gap = np.ones((*images.shape[:2], GAP, 3), np.float32)
    return np.concatenate([images, gap, images * (DIM + (1 - DIM) * lit)], axis=2)


def unpanel(panel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image (height, width, 3) and the map at its pixels (height, width) that a panel shows.

    The map is 0 wherever the image is black, since nothing can be seen there.
    """
    width = (panel.shape[1] - GAP) // 2
    image, lit = panel[:, :width], panel[:, width + GAP :]
    brightness = image.sum(-1)
    share = np.divide(lit.sum(-1), brightness, out=np.zeros_like(brightness), where=brightness > 0)
    return image, np.clip((share - DIM) / (1 - DIM), 0, 1)


def moved(maps: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Each map moved, around the edges, to where it least covers itself; and whether it can be.

    Maps (image, rows, columns); of several places as good as each other, one is drawn. A map that
    would cover half of itself wherever it went (even ones, or of a single token) cannot be moved:
    bool, (image,). Overlaps are autocorrelations, by the fast Fourier transform.
    """
    maps, rng = np.asarray(maps, float), np.random.default_rng(seed)
    if maps.ndim != 3:
        refuse("shape of maps", maps.shape, "(image, rows, columns)")
    size = maps.shape[1:]
    overlap = np.fft.irfft2(abs(np.fft.rfft2(maps)) ** 2, s=size)  # of each shift, (image, …)
    out, can = np.empty_like(maps), np.zeros(len(maps), bool)
    for i, of_shift in enumerate(overlap):
        own = of_shift[0, 0]
        shifts = np.argwhere(of_shift <= of_shift.min() + 1e-6 * own)
        out[i] = np.roll(maps[i], shifts[rng.integers(len(shifts))], axis=(0, 1))
        can[i] = of_shift.min() < own / 2
    return out, can
