"""A world with known truth: captioned scenes, their masks, and a reader that measures images.

A scene holds one or two objects, each with a shape, colour, size, texture and position, on a plain
background. `caption` and `parse` translate between a scene and one English sentence without loss;
`render` draws it; `read` looks at any image, drawn or generated, and says what is there. The
reader knows nothing of the diffusion model: it segments, measures and compares with the shapes' own
geometry, so what a model generated can be measured against what its caption asked for.

Textures have a period of six pixels, one and a half VAE latents: fine detail that only the late
denoising steps can decide. Shape, colour and position are coarse and decided early.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import ndimage

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.88, 0.12, 0.12),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.98, 0.88, 0.12),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.60, 0.15, 0.75),
}
SIZES = {"small": 8.0, "large": 12.0}  # radius of the circumscribed circle, pixels
TEXTURES = ("solid", "striped", "dotted")
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "gray": (0.60, 0.60, 0.60), "sky": (0.62, 0.82, 0.96)}
_GRID = (15.0, 32.0, 49.0)  # object centres along one axis, pixels
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")
POSITIONS = {
    f"{row} {column}".strip() or "center": (_GRID[i], _GRID[j])
    for i, row in enumerate(_ROWS)
    for j, column in enumerate(_COLUMNS)
}  # name -> (row, column) of the centre, pixels
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
PAIRS = (("left", "right"), ("top", "bottom"))  # positions of two-object scenes
HELD_OUT = (
    ("red", "triangle"),
    ("blue", "circle"),
    ("yellow", "cross"),
)  # never trained on together

_PATTERN_PERIOD = 6.0  # pixels
_PATTERN_DARKEN = 0.35  # the pattern's colour is the object's times this
_UNIT_AREA = {
    "circle": np.pi,
    "square": 4 * 0.85**2,
    "triangle": 3 * 3**0.5 / 4,
    "cross": 4 * (2 * 0.36 - 0.36**2),
}


@dataclass(frozen=True)
class Object:
    """One thing in a scene, by the names in `ATTRIBUTES`."""

    shape: str
    colour: str
    size: str
    texture: str
    position: str


@dataclass(frozen=True)
class Scene:
    """One object anywhere on the 3×3 grid, or two at left/right or top/bottom, on a background."""

    objects: tuple[Object, ...]
    background: str


@dataclass(frozen=True)
class Found:
    """An object the reader found: the same names, its mask (height, width, bool) and how well it fits."""

    shape: str
    colour: str
    size: str
    texture: str
    position: str
    mask: np.ndarray
    iou: float  # overlap of the mask with the ideal shape, 0..1


@dataclass(frozen=True)
class Reading:
    """What `read` found in one image; nothing readable is `objects=()` and `background=None`."""

    objects: tuple[Found, ...]
    background: str | None


# --- captions -----------------------------------------------------------------------------------


def caption(scene: Scene) -> str:
    """The scene as a sentence; `parse` is its inverse."""
    things = [
        f"a {o.size} {o.colour} {o.texture} {o.shape} at the {o.position}" for o in scene.objects
    ]
    return " and ".join(things) + f" on a {scene.background} background"


def parse(text: str) -> Scene:
    """The scene a caption describes. Raises ValueError, naming the caption, outside the grammar."""
    try:
        body, background = text.removesuffix(" background").rsplit(" on a ", 1)
        objects = []
        for thing in body.split(" and "):
            what, position = thing.split(" at the ")
            article, size, colour, texture, shape = what.split()
            objects.append(Object(shape, colour, size, texture, position))
        scene = Scene(tuple(objects), background)
        if caption(scene) != text:
            raise ValueError
        _check(scene)
    except ValueError:
        example = caption(
            Scene((Object("circle", "red", "large", "striped", "top left"),), "white")
        )
        raise ValueError(f"caption {text!r} is not a scene; a valid one is {example!r}") from None
    return scene


def _check(scene: Scene) -> None:
    for o in scene.objects:
        for name in ("shape", "colour", "size", "texture", "position"):
            if getattr(o, name) not in ATTRIBUTES[name]:
                raise ValueError(
                    f"{name} {getattr(o, name)!r} is not one of {', '.join(ATTRIBUTES[name])}"
                )
    if scene.background not in BACKGROUNDS:
        raise ValueError(f"background {scene.background!r} is not one of {', '.join(BACKGROUNDS)}")
    if not 1 <= len(scene.objects) <= 2:
        raise ValueError(f"a scene has one or two objects, not {len(scene.objects)}")
    if len(scene.objects) == 2 and tuple(o.position for o in scene.objects) not in PAIRS:
        raise ValueError(f"two objects stand at {' or '.join(' and '.join(p) for p in PAIRS)}")


def split(scene: Scene) -> str:
    """Which part of the world a scene belongs to: 'train', 'unseen' or 'held_out'.

    'held_out' scenes contain a (colour, shape) pair of `HELD_OUT`; 'unseen' are a tenth of the other
    captions, chosen by their SHA-256, so every machine agrees. The demo model trains on 'train' alone.
    """
    if any((o.colour, o.shape) in HELD_OUT for o in scene.objects):
        return "held_out"
    return "unseen" if hashlib.sha256(caption(scene).encode()).digest()[0] < 26 else "train"


def sample(
    n: int, rng: np.random.Generator, splits=("train", "unseen", "held_out"), two: float = 0.5
) -> list[Scene]:
    """Draw n scenes uniformly over attributes; a share `two` of them with two objects."""
    scenes = []
    while len(scenes) < n:
        places = (
            PAIRS[rng.integers(2)] if rng.random() < two else (str(rng.choice(list(POSITIONS))),)
        )
        objects = tuple(
            Object(
                *(
                    ATTRIBUTES[a][rng.integers(len(ATTRIBUTES[a]))]
                    for a in ("shape", "colour", "size", "texture")
                ),
                p,
            )
            for p in places
        )
        scene = Scene(objects, ATTRIBUTES["background"][rng.integers(len(BACKGROUNDS))])
        if split(scene) in splits:
            scenes.append(scene)
    return scenes


def describable(prompts: list[str], images: np.ndarray) -> bool:
    """Whether these images are of this world: every prompt a caption, and the size the reader takes."""
    if np.shape(images)[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        return False
    try:
        return bool([parse(p) for p in prompts])
    except ValueError:
        return False


# --- rendering ----------------------------------------------------------------------------------


def _distance(shape: str, x, y):
    """Signed distance (negative inside) to a shape whose circumscribed circle has radius about 1."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85
    if shape == "triangle":  # points up; its centroid is the origin
        return np.maximum(y - 0.5, abs(x) * 3**0.5 / 2 - y / 2 - 0.5)
    return np.minimum(np.maximum(abs(x) - 0.36, abs(y) - 1), np.maximum(abs(x) - 1, abs(y) - 0.36))


def _silhouette(shape, row, column, radius, angle):
    """Antialiased masks, shape (n, 64, 64), of one shape at per-object places (pixels) and angles (radians)."""
    row, column, radius, angle = (
        np.asarray(v, np.float32)[:, None, None] for v in (row, column, radius, angle)
    )
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    y, x = (grid[:, None] - row) / radius, (grid[None, :] - column) / radius
    c, s = np.cos(angle), np.sin(angle)
    return np.clip(0.5 - _distance(shape, c * x + s * y, c * y - s * x) * radius, 0, 1)


def _pattern(texture, phase_y, phase_x):
    """Where a texture is dark, 0..1, shape (n, 64, 64); phases in pixels."""
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    y = (grid[:, None] + np.asarray(phase_y, np.float32)[:, None, None]) / _PATTERN_PERIOD
    x = (grid[None, :] + np.asarray(phase_x, np.float32)[:, None, None]) / _PATTERN_PERIOD
    if texture == "striped":
        return np.broadcast_to(
            np.clip(0.5 + 3 * (np.cos(2 * np.pi * y) - 0.3), 0, 1), (len(y), IMAGE_SIZE, IMAGE_SIZE)
        )
    if texture == "dotted":  # two interleaved grids, so that no row is much darker than another
        return np.clip(0.5 + 3 * (np.cos(np.pi * (x + y)) * np.cos(np.pi * (x - y)) - 0.42), 0, 1)
    return np.zeros((len(y), IMAGE_SIZE, IMAGE_SIZE), np.float32)


def render(scenes: list[Scene], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw scenes with jitter: centre ±1.5 px, radius ±6 %, angle ±8°, colour ±0.03, any texture phase.

    Returns
    -------
    images : float32, (n, 64, 64, 3), in [0, 1]
    masks : float32, (n, 2, 64, 64), in [0, 1]
        Antialiased mask of each object in caption order; zeros where there is no second one.
    """
    n = len(scenes)
    tint = rng.uniform(-0.03, 0.03, (n, 3, 3)).astype(np.float32)
    jitter = rng.uniform(-1, 1, (n, 2, 4)).astype(np.float32)
    phase = rng.uniform(0, _PATTERN_PERIOD, (n, 2, 2)).astype(np.float32)
    background = (
        np.array([BACKGROUNDS[s.background] for s in scenes], np.float32).reshape(n, 3) + tint[:, 2]
    )
    images = np.broadcast_to(background[:, None, None], (n, IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    masks = np.zeros((n, 2, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for i, scene in enumerate(scenes):
        _check(scene)
        for j, o in enumerate(scene.objects):
            groups.setdefault((j, o.shape, o.texture), []).append((i, j))
    for (j, shape, texture), members in groups.items():
        i = np.array([m[0] for m in members])
        objects = [scenes[k].objects[j] for k in i]
        row, column = (
            np.array([POSITIONS[o.position] for o in objects], np.float32).T
            + 1.5 * jitter[i, j, :2].T
        )
        radius = np.array([SIZES[o.size] for o in objects], np.float32) * (
            1 + 0.06 * jitter[i, j, 2]
        )
        mask = _silhouette(shape, row, column, radius, np.deg2rad(8) * jitter[i, j, 3])
        dark = _pattern(texture, phase[i, j, 0], phase[i, j, 1])[..., None]
        colour = (np.array([COLOURS[o.colour] for o in objects], np.float32) + tint[i, j])[
            :, None, None
        ]
        paint = colour * (1 - (1 - _PATTERN_DARKEN) * dark)
        images[i] = images[i] * (1 - mask[..., None]) + paint * mask[..., None]
        masks[i, j] = mask
    return np.clip(images, 0, 1), masks


def attribute_masks(objects, masks: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """Where each attribute value is: (attribute, value) -> the union of the masks, (height, width), of its objects.

    `objects` are `Object`s with their masks, or `Found`s with the masks they carry.
    """
    where: dict[tuple[str, str], np.ndarray] = {}
    for o, mask in zip(objects, masks):
        for attribute in ("shape", "colour", "size", "texture", "position"):
            key = (attribute, getattr(o, attribute))
            where[key] = np.maximum(where[key], mask) if key in where else mask
    return where


# --- the reader ---------------------------------------------------------------------------------


def read(images: np.ndarray) -> list[Reading]:
    """Find the objects in images of this world.

    Foreground is what differs from the border's median colour; each connected piece is compared with
    the four shapes drawn at its centroid and area (overlap at least 0.7, else it is not readable);
    colour is that of its brightest third; texture is how dark its inside gets and whether rows differ.

    Parameters
    ----------
    images : float, (n, 64, 64, 3), in [0, 1]

    Raises
    ------
    ValueError
        Images of another shape.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"images have shape {images.shape}; the reader takes (n, {IMAGE_SIZE}, {IMAGE_SIZE}, 3)"
        )
    return [_read_one(image) for image in images]


def _nearest(colour, palette: dict, limit: float) -> str | None:
    names = list(palette)
    distance = np.linalg.norm(np.array([palette[n] for n in names]) - colour, axis=1)
    return names[distance.argmin()] if distance.min() < limit else None


def _read_one(image: np.ndarray) -> Reading:
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    plain = np.median(border, axis=0)
    background = _nearest(plain, BACKGROUNDS, 0.2)
    if background is None or np.mean(abs(border - plain).max(axis=1) > 0.15) > 0.1:
        return Reading((), None)
    foreground = ndimage.binary_fill_holes(abs(image - plain).max(axis=2) > 0.22)
    labels, n = ndimage.label(foreground)
    found = []
    for k in range(1, n + 1):
        mask = labels == k
        if mask.sum() >= 40:  # the smallest object covers 73 pixels
            found.append(_measure(image, mask))
    if len(found) > 4 or (found and all(o is None for o in found)):
        return Reading((), None)
    return Reading(tuple(o for o in found if o is not None), background)


def _measure(image: np.ndarray, mask: np.ndarray) -> Found | None:
    area = mask.sum()
    row, column = (v.mean() + 0.5 for v in np.nonzero(mask))
    best = (0.0, "", 0.0)
    angles = np.deg2rad([-6.0, 0.0, 6.0])
    for shape in SHAPES:
        radius = np.sqrt(area / _UNIT_AREA[shape])
        ideal = _silhouette(shape, [row] * 3, [column] * 3, [radius] * 3, angles)
        overlap = np.minimum(ideal, mask).sum((1, 2)) / np.maximum(ideal, mask).sum((1, 2))
        best = max(best, (float(overlap.max()), shape, float(radius)))
    iou, shape, radius = best
    inside = ndimage.binary_erosion(mask)
    brightness = image.max(axis=2)
    core = inside if inside.sum() >= 12 else mask  # away from the antialiased edge
    bright = image[core & (brightness >= np.quantile(brightness[core], 0.7))]
    colour = _nearest(np.median(bright, axis=0), COLOURS, 0.35)
    if iou < 0.7 or colour is None:
        return None
    position = min(
        POSITIONS, key=lambda p: np.hypot(POSITIONS[p][0] - row, POSITIONS[p][1] - column)
    )
    size = "small" if radius < sum(SIZES.values()) / 2 else "large"
    return Found(shape, colour, size, _texture(brightness, inside), position, mask, iou)


def _texture(brightness: np.ndarray, inside: np.ndarray) -> str:
    """Solid if the inside hardly varies; striped if most of its variance is between rows, else dotted."""
    if inside.sum() < 12 or brightness[inside].std() < 0.1 * brightness[inside].max():
        return "solid"
    rows = np.nonzero(inside.any(axis=1))[0]
    count = inside[rows].sum(axis=1)
    means = (brightness * inside)[rows].sum(axis=1) / count
    between = np.average((means - np.average(means, weights=count)) ** 2, weights=count)
    return "striped" if between > 0.6 * brightness[inside].var() else "dotted"


def judge(scene: Scene, reading: Reading) -> dict[str, float]:
    """Compare what was read with what was asked for; each value is a share of the scene's objects, 0..1.

    Objects are paired so that the summed distance of their grid positions is smallest; an object that
    was not found is wrong in everything. 'colour_at_place' asks for colour and position together,
    'all' for every attribute, the background, and no object too many.
    """
    wanted, found = scene.objects, reading.objects
    slots = list(found) + [None] * max(0, len(wanted) - len(found))

    def cost(assignment):
        ends = [
            (POSITIONS[w.position], POSITIONS[f.position]) for w, f in zip(wanted, assignment) if f
        ]
        apart = sum(np.hypot(a[0] - b[0], a[1] - b[1]) for a, b in ends) + 100 * sum(
            f is None for f in assignment
        )
        wrong = sum(
            getattr(w, a) != getattr(f, a)
            for w, f in zip(wanted, assignment)
            if f
            for a in ("colour", "shape")
        )
        return (
            apart,
            wrong,
        )  # at equal distance, as left and right are from top, the likelier pairing

    pairs = list(zip(wanted, min(permutations(slots, len(wanted)), key=cost)))
    names = ("shape", "colour", "size", "texture", "position")
    right = {
        a: float(np.mean([f is not None and getattr(f, a) == getattr(w, a) for w, f in pairs]))
        for a in names
    }
    right["colour_at_place"] = float(
        np.mean(
            [f is not None and f.position == w.position and f.colour == w.colour for w, f in pairs]
        )
    )
    right["background"] = float(reading.background == scene.background)
    right["count"] = float(len(found) == len(wanted))
    right["all"] = float(all(v == 1 for v in right.values()))
    return right
