"""Which tokens show what: the labels that latents are held against, on the token grid.

They come from a truth: `Scenes` reads the demo world's images, `Words` knows only the prompts.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Labels:
    """Labels of tokens, by way of the things that tokens belong to."""

    names: list[str]  # such as 'colour=red', 'background=sky' or 'word=dog'
    owner: np.ndarray  # thing that each token belongs to, (image, token), a row of `has`; -1: none
    has: np.ndarray  # which labels each thing carries, bool, (thing, label)
    kind: np.ndarray  # of each thing: those of one kind, such as objects, a control may exchange
    applies: np.ndarray | None = None  # which labels a thing could carry, like `has`; None: all

    def at_tokens(self) -> np.ndarray:
        """Labels of every token, bool, (image, token, label); False where a token has no owner."""
        return np.vstack([self.has, np.zeros(len(self.names), bool)])[self.owner]  # -1: the last

    def kind_of(self, name: str) -> int:
        """The kind of thing that a label describes; 0 for a label that nothing carries."""
        carriers = self.kind[self.has[:, self.names.index(name)]]
        return int(carriers[0]) if len(carriers) else 0

    def among(self, name: str) -> np.ndarray:
        """Tokens of things of a label's kind that could carry it, bool, (image, token)."""
        could = self.kind == self.kind_of(name)
        if self.applies is not None:
            could &= self.applies[:, self.names.index(name)]
        return np.isin(self.owner, np.nonzero(could)[0])

    def contrast(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens with a label, and those `among` which it is missing: two bool (image, token)."""
        among = self.among(name)
        labelled = self.at_tokens()[..., self.names.index(name)]
        return among & labelled, among & ~labelled

    def only(self, tokens: np.ndarray) -> "Labels":
        """Labels of some tokens of each image: indices, (image, kept token)."""
        return replace(self, owner=np.take_along_axis(self.owner, tokens, 1))

    def shuffled(self, rng: np.random.Generator) -> "Labels":
        """The control: masks stay, but each thing gets the labels of another of its kind."""
        has = self.has.copy()
        for kind in np.unique(self.kind):
            members = np.nonzero(self.kind == kind)[0]
            has[members] = self.has[rng.permutation(members)]
        return replace(self, has=has)


def token_shares(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Share of each token's patch that a mask (height, width) covers: float, (rows, columns).

    Where the grid does not divide the image, a pixel counts for the token that holds its centre.
    """
    rows, columns = grid
    picture = Image.fromarray(np.asarray(mask, np.float32))
    shares = np.asarray(picture.resize((columns, rows), Image.Resampling.BOX), float)
    return shares.round(6)  # so that a half is a half, whatever float32 made of it
