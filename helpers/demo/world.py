"""A world with known truth: scenes, their captions, and images of them with every object's mask.

A scene holds one or two objects, each with a shape, colour, size, texture and position, on a plain
background. A caption names any of this, or nothing at all; what it leaves open is decided by the
noise. `caption` and `parse` translate between what is named and one English sentence without loss,
`render` draws a scene, and `helpers.demo.reader` reads it back from pixels.

Fine attributes are never named: the shade of the colour, the turn of the shape, the phase of the
texture, a white mark in the middle. Textures have a period of six pixels, one and a half VAE
latents: detail that only late denoising steps can decide. Shape, colour and position are coarse.
"""

import hashlib
import re
from dataclasses import dataclass, replace

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
TEXTURES = ("solid", "striped", "barred")  # plain, dark rows, dark columns
BACKGROUNDS = {"white": (0.97, 0.97, 0.97), "gray": (0.60, 0.60, 0.60), "sky": (0.62, 0.82, 0.96)}
_GRID = (15.0, 32.0, 49.0)  # object centres along one axis, pixels
POSITIONS = {
    f"{row} {column}".strip() or "center": (y, x)
    for row, y in zip(("top", "", "bottom"), _GRID)
    for column, x in zip(("left", "", "right"), _GRID)
}  # name -> (row, column) of the centre, pixels
FINE = {
    "shade": {"light": 1.0, "dark": 0.68},  # factor of the colour
    "turn": {"upright": 0.0, "tilted": 22.5},  # degrees; a circle has none
    # of the texture, pixels; solid has none. A quarter of the period apart: at half of it the
    # two cancel in the mean
    "phase": {"even": 0.0, "odd": 1.5},
    "mark": {"plain": 0.0, "marked": 2.1},  # radius of the white mark, pixels
}
NAMED = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
ATTRIBUTES = NAMED | {name: tuple(values) for name, values in FINE.items()}
OBJECT_ATTRIBUTES = tuple(name for name in ATTRIBUTES if name != "background")
PAIRS = (("left", "right"), ("top", "bottom"))  # positions of two-object scenes
HELD_OUT = (("red", "triangle"), ("blue", "circle"), ("yellow", "cross"))  # never trained on
# area of a shape whose circumscribed circle has radius 1
UNIT_AREA = dict(zip(SHAPES, (np.pi, 4 * 0.85**2, 3 * 3**0.5 / 4, 4 * (2 * 0.36 - 0.36**2))))

PATTERN_PERIOD = 6.0  # pixels
_PATTERN_DARKEN = 0.35  # the pattern's colour is the object's times this
_CENTRES = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5  # of pixels, along one axis


@dataclass(frozen=True)
class Object:
    """One thing in a scene, by the names in `ATTRIBUTES`; None is left open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    position: str | None = None
    shade: str | None = None
    turn: str | None = None
    phase: str | None = None
    mark: str | None = None


@dataclass(frozen=True)
class Scene:
    """One object anywhere on the 3×3 grid, or two at left/right or top/bottom, on a background.

    Without objects, what there is to see is left open.
    """

    objects: tuple[Object, ...] = ()
    background: str | None = None


EXAMPLE = Scene((Object("circle", "red", "large", "striped", "top left"),), "white")


def caption(scene: Scene) -> str:
    """What is named in a scene, as a sentence, '' if nothing is; `parse` is its inverse."""
    things = " and ".join(_phrase(o) for o in scene.objects)
    ground = f"a {scene.background} background" if scene.background else ""
    return " on ".join(part for part in (things, ground) if part)


def _phrase(o: Object) -> str:
    words = [word for word in (o.size, o.colour, o.texture, o.shape or "thing") if word]
    article = "an" if words[0] == "orange" else "a"
    return " ".join([article, *words]) + (f" at the {o.position}" if o.position else "")


def _one(attribute: str) -> str:
    return f"(?P<{attribute}>{'|'.join(NAMED[attribute])})"


_GROUND = re.compile(f"(?:(.*?)(?: on |^))?a {_one('background')} background")
_THING = re.compile(
    f"an? (?:{_one('size')} )?(?:{_one('colour')} )?(?:{_one('texture')} )?"
    f"(?:thing|{_one('shape')})(?: at the {_one('position')})?"
)


def parse(text: str) -> Scene:
    """The scene a caption describes. Raises ValueError, naming the caption, outside the grammar."""
    ground = _GROUND.fullmatch(text)
    body, background = (ground[1], ground["background"]) if ground else (text, None)
    things = [_THING.fullmatch(thing) for thing in body.split(" and ")] if body else []
    try:
        scene = Scene(tuple(Object(**thing.groupdict()) for thing in things), background)
        _check(scene)
    except (AttributeError, ValueError):
        scene = None
    if scene is None or caption(scene) != text:
        raise ValueError(f"caption {text!r} is not a scene; a valid one is {caption(EXAMPLE)!r}")
    return scene


def _check(scene: Scene, complete: bool = False) -> None:
    """Refuse names that are not in `ATTRIBUTES`; if `complete`, named attributes left open, too."""
    left_open = () if complete else (None,)
    one_of("number of objects", len(scene.objects), (1, 2) if complete else (0, 1, 2))
    for name in NAMED:
        holders = [scene] if name == "background" else scene.objects
        for holder in holders:
            one_of(name, getattr(holder, name), (*NAMED[name], *left_open))
    if len(scene.objects) == 2:
        allowed = [p for pair in PAIRS for p in (pair, (pair[0], None), (None, pair[1]))]
        allowed = PAIRS if complete else [*allowed, (None, None)]
        one_of("positions", tuple(o.position for o in scene.objects), allowed)


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
    """Draw n complete scenes uniformly over attributes; a share `two` of them with two objects."""

    def pick(attribute):
        return ATTRIBUTES[attribute][rng.integers(len(ATTRIBUTES[attribute]))]

    def thing(position):
        drawn = {name: pick(name) for name in OBJECT_ATTRIBUTES} | {"position": position}
        if drawn["shape"] == "circle":
            drawn["turn"] = None
        if drawn["texture"] == "solid":
            drawn["phase"] = None
        return Object(**drawn)

    scenes = []
    while len(scenes) < n:
        positions = PAIRS[rng.integers(2)] if rng.random() < two else (pick("position"),)
        scene = Scene(tuple(map(thing, positions)), pick("background"))
        if split(scene) in splits:
            scenes.append(scene)
    return scenes


def with_value(scene: Scene, attribute: str, value: str) -> Scene:
    """A scene of one object, or its background, with another value of an attribute."""
    if attribute == "background":
        return replace(scene, background=value)
    (thing,) = scene.objects
    return replace(scene, objects=(replace(thing, **{attribute: value}),))


def leave_open(scene: Scene, rng: np.random.Generator, full: float = 0.25) -> Scene:
    """What a caption might name of a scene: all of it in a share `full`, else any subset.

    Each attribute is named with one probability that is itself uniform; objects of which nothing
    is named are, every second time, not mentioned at all. Two objects without positions come in
    any order.
    """
    if rng.random() < full:
        return parse(caption(scene))
    named = rng.random()

    def keep(holder, names):
        return {a: getattr(holder, a) if rng.random() < named else None for a in names}

    names = [a for a in NAMED if a != "background"]
    objects = tuple(Object(**keep(o, names)) for o in scene.objects)
    if rng.random() < 0.5 and all(o == Object() for o in objects):
        objects = ()
    if rng.random() < 0.5 and all(o.position is None for o in objects):
        objects = objects[::-1]
    return Scene(objects, **keep(scene, ["background"]))


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
    """Where a texture is dark, 0 to 1, (n, 64 or 1, 64 or 1); phases, (n,), in pixels."""
    wave = np.cos(2 * np.pi * (_CENTRES + phase[:, None]) / PATTERN_PERIOD)
    dark = np.clip(0.5 + 3 * (wave - 0.3), 0, 1)
    return {"solid": 0 * dark[:, :1, None], "striped": dark[:, :, None], "barred": dark[:, None]}[
        texture
    ]


def _amount(o: Object, attribute: str) -> float:
    """Of a fine attribute, in its unit; the first value if it is left open."""
    values = FINE[attribute]
    return values[getattr(o, attribute) or next(iter(values))]


def render(scenes: list[Scene], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw scenes: images (n, 64, 64, 3) and antialiased masks (n, 2, 64, 64), float32 in [0, 1].

    Centres move by up to 1.5 pixels, radii by 6 %, angles by 4°, colours by 0.03, textures by 0.3
    pixels. Masks are in caption order, and zero where there is no second object.
    """
    n = len(scenes)
    tint = rng.uniform(-0.03, 0.03, (n, 3, 3)).astype(np.float32)  # of two objects and background
    jitter = rng.uniform(-1, 1, (n, 2, 5)).astype(np.float32)  # row, column, radius, angle, phase
    masks = np.zeros((n, 2, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    images = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    for scene in scenes:
        _check(scene, complete=True)
    background = np.float32([BACKGROUNDS[s.background] for s in scenes]).reshape(n, 3)
    images[:] = (background + tint[:, 2])[:, None, None]
    alike: dict[tuple[int, str, str], list[int]] = {}  # drawn together, which is fast
    for i, scene in enumerate(scenes):
        for j, o in enumerate(scene.objects):
            alike.setdefault((j, o.shape, o.texture), []).append(i)
    for (j, shape, texture), i in alike.items():
        objects, moved = [scenes[k].objects[j] for k in i], jitter[i, j]
        fine = {a: np.float32([_amount(o, a) for o in objects]) for a in FINE}
        row, column = (np.float32([POSITIONS[o.position] for o in objects]) + 1.5 * moved[:, :2]).T
        radius = np.float32([SIZES[o.size] for o in objects]) * (1 + 0.06 * moved[:, 2])
        mask = silhouette(shape, row, column, radius, np.deg2rad(fine["turn"] + 4 * moved[:, 3]))
        colour = np.float32([COLOURS[o.colour] for o in objects]) + tint[i, j]
        colour = (colour * fine["shade"][:, None])[:, None, None]
        phase = fine["phase"] + 0.3 * moved[:, 4]
        paint = colour * (1 - (1 - _PATTERN_DARKEN) * _pattern(texture, phase)[..., None])
        dot = silhouette("circle", row, column, np.maximum(fine["mark"], 1e-3), 0 * row)
        dot = (dot * (fine["mark"] > 0)[:, None, None])[..., None]
        paint = paint * (1 - dot) + 0.97 * dot
        images[i] = images[i] * (1 - mask[..., None]) + paint * mask[..., None]
        masks[i, j] = mask
    return np.clip(images, 0, 1), masks
