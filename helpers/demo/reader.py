"""The reader: what is in an image of the demo world, drawn or generated.

It knows nothing of the diffusion model: it cuts an image into pieces, measures them and compares
them with the shapes' own geometry, so what a model generated can be held against its caption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import ndimage

from helpers.checks import refuse
from helpers.demo import world
from helpers.demo.world import POSITIONS, Object, Scene


@dataclass(frozen=True)
class Found(Object):
    """An object that was found: its attributes, its mask and how well that fits the shape."""

    mask: np.ndarray  # bool, (height, width)
    iou: float  # overlap of the mask with the ideal shape, 0 to 1


@dataclass(frozen=True)
class Reading:
    """What was found in one image."""

    objects: tuple[Found, ...]
    background: str | None  # None: the image is unreadable, and no object was found


def read(images: np.ndarray) -> list[Reading]:
    """What is in images, (n, 64, 64, 3), in [0, 1].

    Foreground is what differs from the border's median colour; each connected piece is compared
    with the shapes drawn at its centroid and area (unreadable at an overlap below 0.7); its colour
    is that of its brightest third; its texture, how dark its inside gets and whether rows differ.
    """
    images = np.asarray(images, np.float32)
    if images.shape[1:] != (world.IMAGE_SIZE, world.IMAGE_SIZE, 3):
        refuse("shape of images", images.shape, "(n, 64, 64, 3)")
    return [_read_one(image) for image in images]


def _read_one(image: np.ndarray) -> Reading:
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    plain = np.median(border, axis=0)
    background = _nearest(plain, world.BACKGROUNDS, 0.2)
    if background is None or np.mean(abs(border - plain).max(axis=1) > 0.15) > 0.1:
        return Reading((), None)
    foreground = ndimage.binary_fill_holes(abs(image - plain).max(axis=2) > 0.22)
    pieces, n = ndimage.label(foreground)
    masks = [pieces == k for k in range(1, n + 1)]
    found = [_measure(image, m) for m in masks if m.sum() >= 40]  # the smallest object covers 73
    if len(found) > 4 or (found and all(o is None for o in found)):
        return Reading((), None)
    return Reading(tuple(o for o in found if o is not None), background)


def _measure(image: np.ndarray, mask: np.ndarray) -> Found | None:
    """The object that covers `mask`; None where it has no known shape or colour."""
    row, column = (v.mean() + 0.5 for v in np.nonzero(mask))
    iou, shape, radius = max(_fit(mask, shape, row, column) for shape in world.SHAPES)
    inside = ndimage.binary_erosion(mask)
    brightness = image.max(axis=2)
    core = inside if inside.sum() >= 12 else mask  # away from the antialiased edge
    bright = image[core & (brightness >= np.quantile(brightness[core], 0.7))]
    colour = _nearest(np.median(bright, axis=0), world.COLOURS, 0.35)
    if iou < 0.7 or colour is None:
        return None
    size = "small" if radius < sum(world.SIZES.values()) / 2 else "large"
    position = min(POSITIONS, key=lambda p: math.dist(POSITIONS[p], (row, column)))
    return Found(shape, colour, size, _texture(brightness, inside), position, mask, iou)


def _fit(mask: np.ndarray, shape: str, row: float, column: float) -> tuple[float, str, float]:
    """Overlap of a mask with a shape drawn at its centroid and area, the shape, its radius."""
    radius = np.sqrt(mask.sum() / world.UNIT_AREA[shape])
    angles = np.deg2rad([-6.0, 0.0, 6.0])
    ideal = world.silhouette(shape, [row] * 3, [column] * 3, [radius] * 3, angles)
    overlap = np.minimum(ideal, mask).sum((1, 2)) / np.maximum(ideal, mask).sum((1, 2))
    return float(overlap.max()), shape, float(radius)


def _texture(brightness: np.ndarray, inside: np.ndarray) -> str:
    """Solid if the inside hardly varies; striped if mostly between rows, else dotted."""
    if inside.sum() < 12 or brightness[inside].std() < 0.1 * brightness[inside].max():
        return "solid"
    rows = np.nonzero(inside.any(axis=1))[0]
    count = inside[rows].sum(axis=1)
    means = (brightness * inside)[rows].sum(axis=1) / count
    between = np.average((means - np.average(means, weights=count)) ** 2, weights=count)
    return "striped" if between > 0.6 * brightness[inside].var() else "dotted"


def _nearest(colour, palette: dict, limit: float) -> str | None:
    """Name of the nearest colour of a palette; None if it is `limit` away or farther."""
    names = list(palette)
    distance = np.linalg.norm(np.array([palette[n] for n in names]) - colour, axis=1)
    return names[distance.argmin()] if distance.min() < limit else None


def judge(scene: Scene, reading: Reading) -> dict[str, float]:
    """Share of a scene's objects, 0 to 1, that were read as they should be, by attribute.

    Objects are paired so that the summed distance of their grid positions is smallest; an object
    that was not found is wrong in everything. 'colour_at_place' asks for colour and position
    together, 'all' for every attribute, the background, and no object too many.
    """
    pairs = _paired(scene.objects, reading.objects)

    def share(*attributes):
        return float(np.mean([f is not None and _same(w, f, attributes) for w, f in pairs]))

    right = {a: share(a) for a in world.OBJECT_ATTRIBUTES}
    right["colour_at_place"] = share("position", "colour")
    right["background"] = float(reading.background == scene.background)
    right["count"] = float(len(reading.objects) == len(scene.objects))
    right["all"] = float(all(v == 1 for v in right.values()))
    return right


def _same(a: Object, b: Object, attributes) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in attributes)


def _paired(wanted, found) -> list[tuple[Object, Found | None]]:
    """Each wanted object with the found one in its place, or with None."""
    slots = [*found, *[None] * max(0, len(wanted) - len(found))]

    def cost(assignment):
        there = [(w, f) for w, f in zip(wanted, assignment) if f is not None]
        apart = sum(math.dist(POSITIONS[w.position], POSITIONS[f.position]) for w, f in there)
        wrong = sum(not _same(w, f, [a]) for w, f in there for a in ("colour", "shape"))
        # at equal distance, as left and right are from top, the likelier pairing
        return apart + 100 * (len(wanted) - len(there)), wrong

    return list(zip(wanted, min(permutations(slots, len(wanted)), key=cost)))
