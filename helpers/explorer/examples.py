"""Which images show what a latent does, kept while any number of images goes by.

A feature's strongest images flatter it, so there are three kinds: a random sample of the images in
which it fires, that sample's quantiles by strength, and the strongest. An image counts by the
largest code of its tokens. What is kept is bounded by the latents, not by the images.
"""

from typing import NamedTuple

import numpy as np


class Counts(NamedTuple):
    """How many images are kept of each latent."""

    random: int = 8
    quantile: int = 10  # from the sample, evenly over its ranks
    top: int = 8
    sample: int = 64  # random images that the first two are taken from
    evidence: int = 2  # of the random and of the top ones, how many have evidence by step, too

    @property
    def slots(self) -> dict[str, slice]:
        """Where each kind stands among a latent's examples, in the order in which it is shown."""
        a, b = self.random, self.random + self.quantile
        return {"random": slice(0, a), "quantile": slice(a, b), "top": slice(b, b + self.top)}

    @property
    def with_evidence(self) -> list[int]:
        """Numbers of the examples that have evidence by step."""
        random, _, top = self.slots.values()
        few = min(self.evidence, self.random), min(self.evidence, self.top)
        return [*range(few[0]), *range(top.start, top.start + few[1])]


USUAL = Counts()


class Kept:
    """Of all images offered so far, those with the n largest keys of each latent."""

    def __init__(self, n: int, n_latents: int):
        self.keys = np.full((n, n_latents), -np.inf, np.float32)
        self.images = np.full((n, n_latents), -1, np.int32)
        self.codes = np.zeros((n, n_latents), np.float32)

    def offer(self, image: int, keys: np.ndarray, codes: np.ndarray) -> None:
        """An image with a key and a code for each latent, (latent,); a key of −inf is no offer."""
        if not len(self.keys):
            return
        worst = self.keys.argmin(0)
        latents = np.flatnonzero(keys > self.keys[worst, np.arange(len(worst))])
        place = worst[latents], latents
        self.keys[place], self.images[place] = keys[latents], image
        self.codes[place] = codes[latents]

    def ordered(self) -> tuple[np.ndarray, np.ndarray]:
        """Images, -1 for none, and codes, each (latent, n), the largest key first."""
        order = np.lexsort((self.images, -self.keys), axis=0)
        return tuple(np.take_along_axis(v, order, 0).T for v in (self.images, self.codes))


def chosen(top: Kept, sample: Kept, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """A latent's examples, in the places of `counts.slots`, from what was kept.

    Images (latent, example), int32, -1 where too few fired; codes (latent, example), float32.
    `sample` was offered random keys.
    """
    drawn, strongest = sample.ordered(), top.ordered()
    over = quantiles(*drawn, counts.quantile)
    parts = zip((v[:, : counts.random] for v in drawn), over, strongest)
    images, codes = (np.concatenate(part, axis=1) for part in parts)
    return images, codes


def quantiles(images: np.ndarray, codes: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n of images (latent, m), -1 for none, evenly over the ranks of their codes, strongest first.

    Of q = min(n, images there) the i-th stands in the middle of the i-th of q equal parts.
    """
    order = np.argsort(np.where(images < 0, np.inf, -codes), axis=1, kind="stable")
    there = (images >= 0).sum(1, keepdims=True)
    q, i = np.minimum(n, there), np.arange(n)
    place = np.floor((i + 0.5) / np.maximum(q, 1) * there).astype(int)
    place = np.take_along_axis(order, np.minimum(place, images.shape[1] - 1), 1)
    return (
        np.where(i < q, np.take_along_axis(images, place, 1), -1).astype(np.int32),
        np.where(i < q, np.take_along_axis(codes, place, 1), 0).astype(np.float32),
    )
