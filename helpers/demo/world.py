"""A world with known truth: scenes, their captions, and images of them with every object's mask.

A scene holds one or two objects, each with a shape, colour, size, texture and position, on a plain
background. `caption` and `parse` translate between a scene and one English sentence without loss,
`render` draws it, and `helpers.demo.reader` reads it back from pixels.

Textures have a period of six pixels, one and a half VAE latents: fine detail that only the late
denoising steps can decide. Shape, colour and position are coarse and decided early.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from helpers.checks import one_of

IMAGE_SIZE = 64  # pixels
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
POSITIONS = {
    f"{row} {column}".strip() or "center": (y, x)
    for row, y in zip(("top", "", "bottom"), _GRID)
    for column, x in zip(("left", "", "right"), _GRID)
}  # name -> (row, column) of the centre, pixels
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
OBJECT_ATTRIBUTES = tuple(ATTRIBUTES)[:5]
PAIRS = (("left", "right"), ("top", "bottom"))  # positions of two-object scenes
HELD_OUT = (("red", "triangle"), ("blue", "circle"), ("yellow", "cross"))  # never trained on
# area of a shape whose circumscribed circle has radius 1
UNIT_AREA = dict(zip(SHAPES, (np.pi, 4 * 0.85**2, 3 * 3**0.5 / 4, 4 * (2 * 0.36 - 0.36**2))))

_CENTRES = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5  # of pixels, along one axis
_PATTERN_PERIOD = 6.0  # pixels
_PATTERN_DARKEN = 0.35  # the pattern's colour is the object's times this


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


EXAMPLE = Scene((Object("circle", "red", "large", "striped", "top left"),), "white")


def caption(scene: Scene) -> str:
    """The scene as a sentence; `parse` is its inverse."""
    each = [
        f"a {o.size} {o.colour} {o.texture} {o.shape} at the {o.position}" for o in scene.objects
    ]
    return " and ".join(each) + f" on a {scene.background} background"


def parse(text: str) -> Scene:
    """The scene a caption describes. Raises ValueError, naming the caption, outside the grammar."""
    body, _, background = text.removesuffix(" background").rpartition(" on a ")
    things = [thing.split() for thing in body.split(" and ")]
    try:
        objects = (Object(w[4], w[2], w[1], w[3], " ".join(w[7:])) for w in things)
        scene = Scene(tuple(objects), background)
        _check(scene)
    except (IndexError, ValueError):
        scene = None
    if scene is None or caption(scene) != text:
        raise ValueError(f"caption {text!r} is not a scene; a valid one is {caption(EXAMPLE)!r}")
    return scene


def _check(scene: Scene) -> None:
    for o in scene.objects:
        for name in OBJECT_ATTRIBUTES:
            one_of(name, getattr(o, name), ATTRIBUTES[name])
    one_of("background", scene.background, BACKGROUNDS)
    one_of("number of objects", len(scene.objects), (1, 2))
    if len(scene.objects) == 2:
        one_of("positions", tuple(o.position for o in scene.objects), PAIRS)


def split(scene: Scene) -> str:
    """Which part of the world a scene belongs to: 'train', 'unseen' or 'held_out'.

    'held_out' scenes contain a (colour, shape) pair of `HELD_OUT`; 'unseen' are a tenth of the
    other captions, chosen by their SHA-256, so every machine agrees.
    """
    if any((o.colour, o.shape) in HELD_OUT for o in scene.objects):
        return "held_out"
    return "unseen" if hashlib.sha256(caption(scene).encode()).digest()[0] < 26 else "train"


def sample(
    n: int, rng: np.random.Generator, splits=("train", "unseen", "held_out"), two: float = 0.5
) -> list[Scene]:
    """Draw n scenes uniformly over attributes; a share `two` of them with two objects."""

    def pick(attribute):
        return ATTRIBUTES[attribute][rng.integers(len(ATTRIBUTES[attribute]))]

    scenes = []
    while len(scenes) < n:
        positions = PAIRS[rng.integers(2)] if rng.random() < two else (pick("position"),)
        objects = tuple(Object(*map(pick, OBJECT_ATTRIBUTES[:-1]), p) for p in positions)
        scene = Scene(objects, pick("background"))
        if split(scene) in splits:
            scenes.append(scene)
    return scenes


def _distance(shape: str, x, y):
    """Signed distance, negative inside, to a shape of circumscribed radius about 1."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85
    if shape == "triangle":  # points up; its centroid is the origin
        return np.maximum(y - 0.5, abs(x) * 3**0.5 / 2 - y / 2 - 0.5)
    return np.minimum(np.maximum(abs(x) - 0.36, abs(y) - 1), np.maximum(abs(x) - 1, abs(y) - 0.36))


def silhouette(shape: str, row, column, radius, angle) -> np.ndarray:
    """Antialiased masks, (n, 64, 64), of one shape at n places (pixels) and angles (radians)."""
    row, column, radius, angle = np.float32([row, column, radius, angle])[..., None, None]
    y, x = (_CENTRES[:, None] - row) / radius, (_CENTRES[None, :] - column) / radius
    c, s = np.cos(angle), np.sin(angle)
    return np.clip(0.5 - _distance(shape, c * x + s * y, c * y - s * x) * radius, 0, 1)


def _pattern(texture: str, phase) -> np.ndarray:
    """Where a texture is dark, 0 to 1, (n, 64, 1 or 64); phases, (n, 2): row, column, pixels."""
    y = (_CENTRES[:, None] + phase[:, 0, None, None]) / _PATTERN_PERIOD
    x = (_CENTRES[None, :] + phase[:, 1, None, None]) / _PATTERN_PERIOD
    if texture == "solid":
        return np.zeros_like(y)
    if texture == "striped":
        return np.clip(0.5 + 3 * (np.cos(2 * np.pi * y) - 0.3), 0, 1)
    # dotted: two interleaved grids, so that no row is much darker than another
    return np.clip(0.5 + 3 * (np.cos(np.pi * (x + y)) * np.cos(np.pi * (x - y)) - 0.42), 0, 1)


def render(scenes: list[Scene], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw scenes: images (n, 64, 64, 3) and antialiased masks (n, 2, 64, 64), float32 in [0, 1].

    Centres move by up to 1.5 pixels, radii by 6 %, angles by 8°, colours by 0.03; textures have any
    phase. Masks are in caption order, and zero where there is no second object.
    """
    n = len(scenes)
    tint = rng.uniform(-0.03, 0.03, (n, 3, 3)).astype(np.float32)  # of two objects and background
    jitter = rng.uniform(-1, 1, (n, 2, 4)).astype(np.float32)  # of row, column, radius, angle
    phase = rng.uniform(0, _PATTERN_PERIOD, (n, 2, 2)).astype(np.float32)
    masks = np.zeros((n, 2, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    images = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    background = np.float32([BACKGROUNDS[s.background] for s in scenes]).reshape(n, 3)
    images[:] = (background + tint[:, 2])[:, None, None]
    alike: dict[tuple[int, str, str], list[int]] = {}  # drawn together, which is fast
    for i, scene in enumerate(scenes):
        _check(scene)
        for j, o in enumerate(scene.objects):
            alike.setdefault((j, o.shape, o.texture), []).append(i)
    for (j, shape, texture), i in alike.items():
        objects = [scenes[k].objects[j] for k in i]
        places = np.float32([POSITIONS[o.position] for o in objects])
        row, column = (places + 1.5 * jitter[i, j, :2]).T
        radius = np.float32([SIZES[o.size] for o in objects]) * (1 + 0.06 * jitter[i, j, 2])
        mask = silhouette(shape, row, column, radius, np.deg2rad(8) * jitter[i, j, 3])
        colour = (np.float32([COLOURS[o.colour] for o in objects]) + tint[i, j])[:, None, None]
        paint = colour * (1 - (1 - _PATTERN_DARKEN) * _pattern(texture, phase[i, j])[..., None])
        images[i] = images[i] * (1 - mask[..., None]) + paint * mask[..., None]
        masks[i, j] = mask
    return np.clip(images, 0, 1), masks
