"""Names without a judge: is a feature what an image-text encoder finds first for its name?

A feature's vector is the mean of its patches' embeddings, weighted by activation; a text finds
features by cosine, alone or as the difference from another text, which leaves out what is common to
all images. As D-Scope (arXiv:2609.39625) finds features by text. An encoder that has not learnt the
images' domain finds nothing, whatever the name is worth.
"""

import numpy as np
from scipy.stats import rankdata

from helpers.checks import refuse
from helpers.measure.labels import token_shares


def patches(images: np.ndarray, grid: tuple[int, int]) -> list[np.ndarray]:
    """Crops of images (image, height, width, channel) on a grid of rows and columns, row by row.

    A list (image · patch) of arrays whose sides differ by a pixel where the grid does not divide
    the image. ValueError for a grid finer than pixels.
    """
    height, width = images.shape[1:3]
    rows, columns = grid
    if not (1 <= rows <= height and 1 <= columns <= width):
        refuse("grid", tuple(grid), f"from (1, 1) to {height, width}")
    tops, lefts = (
        np.linspace(0, n, k + 1).round().astype(int) for n, k in zip((height, width), grid)
    )
    return [
        image[tops[r] : tops[r + 1], lefts[c] : lefts[c + 1]]
        for image in images
        for r in range(rows)
        for c in range(columns)
    ]


def embed(encoder, images: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Unit vectors (image, patch, d) of the patches, by a `helpers.measure.encoders.Encoder`."""
    crops = patches(np.broadcast_to(images, (*images.shape[:3], 3)), grid)
    by_shape: dict[tuple, list[int]] = {}  # the encoder takes crops of one size at a time
    for i, crop in enumerate(crops):
        by_shape.setdefault(crop.shape, []).append(i)
    found: list = [None] * len(crops)
    for members in by_shape.values():
        vectors = encoder.images(np.stack([crops[i] for i in members])).cpu().numpy()
        for i, vector in zip(members, vectors):
            found[i] = vector
    return np.array(found).reshape(len(images), grid[0] * grid[1], -1)


def feature_vector(embedded: np.ndarray, maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Mean of patch embeddings (image, patch, d) weighted by maps (image, rows, columns): (d,).

    Of unit length. Maps are averaged over each patch of `grid`, so that their grids may differ;
    ValueError for maps that are zero everywhere.
    """
    weights = np.array([token_shares(m, grid).ravel() for m in np.asarray(maps)])
    if weights.sum() <= 0:
        refuse("maps", "zero everywhere", "above 0 somewhere, for the feature has to fire")
    vector = np.einsum("ip,ipd->d", weights, embedded)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def similarity(vectors: np.ndarray, texts: np.ndarray, against: np.ndarray | None = None):
    """Cosines (text, feature) of feature vectors (feature, d) and texts (text, d), all unit.

    With `against` (text, d), or (d,) for all, less the cosine with that.
    """
    found = texts @ vectors.T
    return found if against is None else found - np.atleast_2d(against) @ vectors.T


def retrieved(similarities: np.ndarray) -> np.ndarray:
    """Share of the other features that a name's own one is ahead of, ties half: (name,).

    Of similarities (name, feature), the name of row i being that of feature i; 0.5 by guessing, 1
    is found first. NaN for a single feature.
    """
    n = len(similarities)
    if similarities.shape != (n, n):
        refuse("shape of similarities", similarities.shape, "square, a name for each feature")
    ranks = np.array([rankdata(row)[i] for i, row in enumerate(similarities)])
    return (ranks - 1) / (n - 1) if n > 1 else np.full(n, np.nan)
