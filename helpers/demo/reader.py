"""The reader: what is in an image of the demo world, drawn or generated.

It knows nothing of the diffusion model: it cuts an image into pieces, measures them and compares
them with the shapes' own geometry, so what a model generated can be held against its caption.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import ndimage

from helpers.checks import refuse
from helpers.demo import world
from helpers.demo.world import POSITIONS, Object, Scene

SHADED = {
    (name, shade): tuple(factor * c for c in colour)
    for name, colour in world.COLOURS.items()
    for shade, factor in world.FINE["shade"].items()
}


@dataclass(frozen=True, kw_only=True)
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
    is that of its brightest third; its texture, how dark its inside gets and in which direction.
    A mark is looked for at the centroid, and left out of colour and texture.
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
    iou, shape, radius, turn = max(_fit(mask, shape, row, column) for shape in world.SHAPES)
    inside = ndimage.binary_erosion(mask)
    middle = world.silhouette("circle", [row], [column], [1.5], [0.0])[0]
    marked = np.average(image.min(axis=2), weights=middle) > 0.45  # no colour is so pale
    around = world.silhouette("circle", [row], [column], [3.0], [0.0])[0] > 0.5
    unmarked = inside & ~around if marked else inside
    core = unmarked if unmarked.sum() >= 12 else mask  # away from the antialiased edge
    brightness = image.max(axis=2)
    bright = image[core & (brightness >= np.quantile(brightness[core], 0.7))]
    colour, shade = _nearest(np.median(bright, axis=0), SHADED, 0.3) or (None, None)
    if iou < 0.7 or colour is None:
        return None
    size = "small" if radius < sum(world.SIZES.values()) / 2 else "large"
    position = min(POSITIONS, key=lambda p: math.dist(POSITIONS[p], (row, column)))
    texture, phase = _texture(brightness, unmarked)
    mark = "marked" if marked else "plain"
    attributes = (shape, colour, size, texture, position, shade, turn, phase, mark)
    return Found(*attributes, mask=mask, iou=iou)


def _fit(mask: np.ndarray, shape: str, row: float, column: float) -> tuple[float, str, float, str]:
    """Overlap of a mask with a shape drawn at its centroid and area, the shape, radius, turn."""
    radius = np.sqrt(mask.sum() / world.UNIT_AREA[shape])
    turns = {} if shape == "circle" else world.FINE["turn"]
    angles = [turn + move for turn in turns.values() for move in (-3, 0, 3)] or [0.0]
    n = len(angles)
    ideal = world.silhouette(shape, [row] * n, [column] * n, [radius] * n, np.deg2rad(angles))
    overlap = np.minimum(ideal, mask).sum((1, 2)) / np.maximum(ideal, mask).sum((1, 2))
    turn = list(turns)[overlap.argmax() // 3] if turns else None
    return float(overlap.max()), shape, float(radius), turn


def _texture(brightness: np.ndarray, inside: np.ndarray) -> tuple[str, str | None]:
    """Solid if the inside hardly varies, else striped or barred; and the phase.

    Waves down and across are fitted to the inside by least squares; the larger one tells.
    """
    if inside.sum() < 12 or brightness[inside].std() < 0.1 * brightness[inside].max():
        return "solid", None
    fitted = np.linalg.lstsq(waves(inside), brightness[inside], rcond=None)[0]
    cosines, sines = fitted[1:].reshape(2, 2)
    larger = np.hypot(cosines, sines).argmax()
    angles = {name: 2 * np.pi * v / world.PATTERN_PERIOD for name, v in world.FINE["phase"].items()}
    # the pattern is dark where cos(angle of the pixel + angle of the phase) is large
    fit = {p: sines[larger] * np.sin(a) - cosines[larger] * np.cos(a) for p, a in angles.items()}
    return ("striped", "barred")[larger], max(fit, key=fit.get)


def waves(inside: np.ndarray) -> np.ndarray:
    """1 and waves of the pattern's period, down and across, at the pixels inside: (pixel, 5)."""
    angles = 2 * np.pi * (np.argwhere(inside) + 0.5) / world.PATTERN_PERIOD  # (pixel, 2)
    return np.hstack([np.ones((len(angles), 1)), np.cos(angles), np.sin(angles)])


def _nearest(colour, palette: dict, limit: float):
    """Name of the nearest colour of a palette; None if it is `limit` away or farther."""
    names = list(palette)
    distance = np.linalg.norm(np.array([palette[n] for n in names]) - colour, axis=1)
    return names[distance.argmin()] if distance.min() < limit else None


def things(readings: list[Reading]) -> list[tuple[int, Reading | Found]]:
    """All that was read, with its image's number: each readable image's background, its objects.

    A background is given as its `Reading`.
    """
    read = [(i, r) for i, r in enumerate(readings) if r.background is not None]
    return [(i, thing) for i, r in read for thing in (r, *r.objects)]


def judge(scene: Scene, reading: Reading) -> dict[str, float]:
    """Share of a scene's objects, 0 to 1, that were read as they should be, by attribute.

    Only objects of which the scene gives the attribute count; NaN where there are none. Objects are
    paired so that the summed distance of their grid positions is smallest; an object that was not
    found is wrong in everything. 'colour_at_place' asks for colour and position together, 'all' for
    every attribute given and no object too many, or just for a readable image if nothing is given.
    """
    pairs = _paired(scene.objects, reading.objects)

    def share(*attributes):
        given = [(w, f) for w, f in pairs if None not in (getattr(w, a) for a in attributes)]
        right = [f is not None and _same(w, f, attributes) for w, f in given]
        return float(np.mean(right)) if right else math.nan

    right = {a: share(a) for a in world.OBJECT_ATTRIBUTES}
    right["colour_at_place"] = share("position", "colour")
    same = float(reading.background == scene.background)
    right["background"] = same if scene.background else math.nan
    same = float(len(reading.objects) == len(scene.objects))
    right["count"] = same if scene.objects else math.nan
    readable = reading.background is not None
    right["all"] = float(readable and all(v == 1 for v in right.values() if not math.isnan(v)))
    return right


def _same(a: Object, b: Object, attributes) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in attributes)


def _paired(wanted, found) -> list[tuple[Object, Found | None]]:
    """Each wanted object with the found one in its place, or with None."""
    slots = [*found, *[None] * max(0, len(wanted) - len(found))]

    def cost(assignment):
        there = [(w, f) for w, f in zip(wanted, assignment) if f is not None]
        placed = [(w.position, f.position) for w, f in there if w.position]
        apart = sum(math.dist(POSITIONS[w], POSITIONS[f]) for w, f in placed)
        given = [(w, f, a) for w, f in there for a in world.OBJECT_ATTRIBUTES if getattr(w, a)]
        wrong = sum(not _same(w, f, [a]) for w, f, a in given)
        # at equal distance, as left and right are from top, the likelier pairing
        return apart + 100 * (len(wanted) - len(there)), wrong

    return list(zip(wanted, min(permutations(slots, len(wanted)), key=cost)))
