"""Masks of things: how well maps find them, and what frozen features tell of them, token by token.

Tokens that belong to nobody, as on an object's edge, count nowhere.
"""

import numpy as np

from helpers.measure import decisions, metrics
from helpers.measure.labels import Labels

CUTS = np.linspace(0.05, 0.95, 19)  # of a map's range


def overlaps(maps, masks, valid) -> np.ndarray:
    """IoU of every map, cut at each of CUTS, with every mask: (cut, map, mask).

    All are (n, token), entry i of each from one image; `valid` says which of its tokens count. A
    map is cut at a share of the way from its lowest to its highest token; a flat one finds nothing.
    """
    low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        found = ((maps - low) / (high - low) >= CUTS[:, None, None]).astype(float)
    masks, valid = (masks & valid).astype(float), valid.astype(float)
    both = found @ masks.T
    return both / np.maximum(found @ valid.T + masks.sum(1) - both, 1)


def found_and_chance(maps, masks, valid, images) -> tuple[np.ndarray, np.ndarray]:
    """IoU of maps with their own masks, and that of other images' maps with them: two (n,).

    Arguments as in `overlaps`, and the image of each map, (n,). Maps of one half of the images are
    cut where those of the other half overlap most with their masks.
    """
    every = overlaps(maps, masks, valid)
    own = every.diagonal(axis1=1, axis2=2)  # (cut, map)
    half = np.unique(images, return_inverse=True)[1] % 2
    best = [
        own[:, half != h].sum(1).argmax() if (half != h).any() else len(CUTS) // 2 for h in (0, 1)
    ]
    cut, rows = np.array(best)[half], np.arange(len(half))
    other = images[:, None] != images
    chance = [
        every[c, other[:, j], j].mean() if other[:, j].any() else np.nan for j, c in zip(rows, cut)
    ]
    return own[cut, rows], np.array(chance)


def per_image(values, images, n_images: int) -> np.ndarray:
    """Mean of values (n,) over those of each image, (image,); NaN for an image that has none."""
    with np.errstate(invalid="ignore"):
        return np.bincount(images, values, n_images) / np.bincount(images, minlength=n_images)


def classes(labels: Labels, attribute: str) -> np.ndarray:
    """What a dense probe is to tell of each token: int, (image, token).

    1, 2, … are the attribute's values in the order of the labels, 0 is a thing of another kind, as
    the background is for 'colour'; -1: nobody's, or of a thing whose value is not known.
    """
    own = decisions.attributes_of(labels.names)[attribute]
    value = 1 + labels.has[:, own].argmax(1)
    value[~labels.has[:, own].any(1)] = -1
    value[labels.kind != labels.kind_of(labels.names[own[0]])] = 0
    return np.append(value, -1)[labels.owner]


def probe(x, known, on) -> np.ndarray:
    """Classes that a multinomial logistic regression gives to features `on` (image, token, d).

    It is fitted to features x (image, token, d), dense or sparse, at tokens whose classes `known`
    (image, token) are not -1.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    given = known >= 0
    size = np.maximum(x[given].std(0), 1e-6)
    model = LogisticRegression(C=0.01, max_iter=200, tol=1e-3).fit(x[given] / size, known[given])
    return model.predict(on.reshape(-1, on.shape[-1]) / size).reshape(on.shape[:2])


def mean_iou(predicted, known) -> metrics.Estimate:
    """Mean over classes of Σ intersection / Σ union of predicted and known classes (image, token).

    Over classes that some token has; the interval resamples images.
    """
    counts, valid, found = metrics.resampled_counts(len(known)), known >= 0, []
    for c in np.unique(known[valid]):
        a, b = (predicted == c) & valid, known == c
        with np.errstate(invalid="ignore"):
            found.append(((a & b).sum(1) @ counts) / ((a | b).sum(1) @ counts))
    return metrics.of_resampled(np.nanmean(found, axis=0))
