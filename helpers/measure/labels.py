"""What is where in the images, on the token grid: what latents are held against.

In the demo world the reader knows every object's mask and attributes. For other images all that is known
is which words a prompt holds, and a word counts for every token of its image: a much weaker truth.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from helpers.demo import world as scenes


@dataclass(frozen=True)
class Labels:
    """Labels of tokens.

    Attributes
    ----------
    names : list of str
        'colour=red', 'background=sky', or 'word=dog'.
    owner : int, (image, token)
        Which thing each token belongs to, an index into `has`; -1 where it belongs to none or is mixed.
    has : bool, (thing, label)
        Which labels each thing carries.
    kind : int, (thing,)
        Things of one kind can be exchanged in a control: 0 an object, 1 a background, 2 a whole image.
    """

    names: list[str]
    owner: np.ndarray
    has: np.ndarray
    kind: np.ndarray

    def at_tokens(self) -> np.ndarray:
        """Labels of every token, bool, (image, token, label); all False where a token belongs to nothing."""
        if not len(self.has):
            return np.zeros((*self.owner.shape, len(self.names)), bool)
        values = self.has[np.maximum(self.owner, 0)]
        return values & (self.owner >= 0)[..., None]

    def of_kind(self, kind: int) -> np.ndarray:
        """Which tokens belong to a thing of this kind, bool, (image, token)."""
        return np.isin(self.owner, np.nonzero(self.kind == kind)[0])

    def kind_of(self, label: int) -> int:
        """The kind of thing that a label describes."""
        return int(self.kind[self.has[:, label]][0]) if self.has[:, label].any() else 0

    def shuffled(self, rng: np.random.Generator) -> Labels:
        """The control: masks stay, but each thing gets the labels of another thing of its kind."""
        has = self.has.copy()
        for kind in np.unique(self.kind):
            members = np.nonzero(self.kind == kind)[0]
            has[members] = self.has[rng.permutation(members)]
        return replace(self, has=has)


def token_shares(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Share of each token's patch that a mask (height, width) covers: float, (rows, columns)."""
    rows, columns = grid
    height, width = mask.shape
    edges_y, edges_x = np.linspace(0, height, rows + 1), np.linspace(0, width, columns + 1)
    total = np.zeros((height + 1, width + 1))
    total[1:, 1:] = mask.astype(float).cumsum(0).cumsum(1)
    y, x = edges_y.round().astype(int), edges_x.round().astype(int)
    area = np.outer(np.diff(y), np.diff(x))
    at = total[np.ix_(y, x)]
    return (at[1:, 1:] - at[:-1, 1:] - at[1:, :-1] + at[:-1, :-1]) / np.maximum(area, 1)


def from_readings(readings, grid: tuple[int, int]) -> Labels:
    """Labels of images of the demo world, from what the reader found in them.

    A token belongs to an object that covers at least half of its patch, to the background if objects cover less
    than a tenth, and to nothing in between, or where the image was not readable.
    """
    attributes = ("colour", "shape", "size", "texture")
    names = [f"{a}={v}" for a in (*attributes, "background") for v in scenes.ATTRIBUTES[a]]
    owner = np.full((len(readings), grid[0] * grid[1]), -1)
    has, kind = [], []
    for i, reading in enumerate(readings):
        shares = [token_shares(o.mask, grid).ravel() for o in reading.objects]
        if reading.background is not None:
            owner[i, sum(shares, np.zeros(owner.shape[1])) < 0.1] = len(has)
            has.append([n == f"background={reading.background}" for n in names])
            kind.append(1)
        for o, share in zip(reading.objects, shares):
            owner[i, share >= 0.5] = len(has)
            has.append([n in {f"{a}={getattr(o, a)}" for a in attributes} for n in names])
            kind.append(0)
    return Labels(names, owner, np.array(has, bool).reshape(-1, len(names)), np.array(kind, int))


def from_words(prompts: list[str], n_tokens: int, most: int = 20) -> Labels:
    """Labels of any images: the words (or numbers of classes) that between a twentieth and half of the prompts hold, the
    commonest `most`; where there are none, as without prompts, the upper and the lower half of the image.
    """
    words = [set(re.findall(r"[a-z]{3,}|\d+", p.lower())) for p in prompts]
    counts = Counter(w for ws in words for w in ws)
    chosen = [w for w, c in counts.most_common() if len(prompts) / 20 <= c <= len(prompts) / 2][
        :most
    ]
    n = len(prompts)
    if not chosen:
        lower = np.arange(n_tokens) >= n_tokens // 2
        has = np.tile(np.eye(2, dtype=bool), (n, 1))
        return Labels(
            ["half=upper", "half=lower"], 2 * np.arange(n)[:, None] + lower, has, np.full(2 * n, 2)
        )
    owner = np.repeat(np.arange(n)[:, None], n_tokens, 1)
    has = np.array([[w in ws for w in chosen] for ws in words], bool).reshape(n, len(chosen))
    return Labels([f"word={w}" for w in chosen], owner, has, np.full(n, 2))
