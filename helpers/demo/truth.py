"""What is true of images of the demo world: the reader's answers to what the notebooks ask.

`helpers.measure.words.Words` has the same methods for images of which only the prompts are known.
A target is a label such as 'colour=red': an attribute and the value to steer it to.
"""

from operator import attrgetter

import numpy as np

from helpers.checks import nearest, one_of, refuse
from helpers.demo import reader, world
from helpers.measure.labels import Labels, token_shares

LABELLED = ("colour", "shape", "size", "texture", "background", *world.FINE)
LABELS = [(attribute, value) for attribute in LABELLED for value in world.ATTRIBUTES[attribute]]
JUDGED = ("colour_at_place", "shape", "size", "texture", "background", "all")
KEPT = {
    "objects kept": ("position", "colour", "shape"),
    "with size and texture": ("position", "colour", "shape", "size", "texture"),
}
OBJECT, BACKGROUND = 0, 1  # kinds of things in `Labels.kind`


class Scenes:
    """Truth by reading: every object's mask and attributes, measured in the image itself."""

    @staticmethod
    def describes(prompts: list[str], image_shape) -> bool:
        """Whether every prompt is a caption of this world, and an image has the reader's shape."""
        try:
            scenes = [world.parse(p) for p in prompts]
        except ValueError:
            return False
        return bool(scenes) and tuple(image_shape) == (world.IMAGE_SIZE, world.IMAGE_SIZE, 3)

    def labels(self, prompts: list[str], images: np.ndarray, grid: tuple[int, int]) -> Labels:
        """What the tokens of images, (image, height, width, 3), show.

        A token belongs to an object that covers at least half of its patch (where patches are too
        large for that: to the one that covers most), to the background if objects cover less than a
        tenth, and to nothing in between or in an unreadable image. Things are numbered as
        `reader.things` lists them. Circles have no turn, solid things no phase.
        """
        owner, things = np.full((len(images), grid[0] * grid[1]), -1), []
        for tokens, reading in zip(owner, reader.read(images)):
            shares = [token_shares(o.mask, grid).ravel() for o in reading.objects]
            if reading.background is not None:
                tokens[sum(shares, np.zeros(len(tokens))) < 0.1] = len(things)
                things.append(reading)
            for o, share in zip(reading.objects, shares):
                tokens[share >= min(0.5, 0.9 * share.max())] = len(things)
                things.append(o)
        read = np.array([[getattr(t, a, None) for a, _ in LABELS] for t in things], object)
        read = read.reshape(-1, len(LABELS))
        kind = [BACKGROUND if isinstance(t, reader.Reading) else OBJECT for t in things]
        return Labels(
            names=["=".join(label) for label in LABELS],
            owner=owner,
            has=read == np.array([value for _, value in LABELS], object),
            kind=np.array(kind, int),
            applies=read != np.array(None),
        )

    def decided(
        self, pipe, prompts: list[str], seeds, images: np.ndarray, sampling: dict, level=0.8
    ) -> dict[str, np.ndarray]:
        """From which denoising step on each thing's values are foreseen: attribute -> (thing,).

        Float, counted over all the sampler's steps; NaN where that is never so, or a thing has no
        such attribute. Things are those of `labels` of the same images, which must be the ones that
        `pipe` makes of these prompts and seeds. See `timing.foreseen`.
        """
        from helpers.demo import timing  # scikit-learn takes a second to import

        found = timing.foreseen(pipe, prompts, seeds, images, sampling)
        return {a: timing.first_step(probability, level) for a, probability in found.items()}

    def judged(self, prompts: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
        """Share of each image's objects, (image,), that are as its caption says, by attribute."""
        each = [reader.judge(world.parse(p), r) for p, r in zip(prompts, reader.read(images))]
        return {a: np.array([j[a] for j in each]) for a in JUDGED}

    def objects_kept(self, before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
        """Share of each image's objects found again in another version of it, (image,).

        NaN for an image in which no object was read before.
        """
        read = list(zip(reader.read(before), reader.read(after)))
        return {name: np.array([_kept(b, a, of) for b, a in read]) for name, of in KEPT.items()}

    def steering_prompts(self, n: int, seed: int, given: list[str]) -> list[str]:
        """Fresh captions of one object each; `given`, the store's own, are not needed here."""
        scenes = world.sample(n, np.random.default_rng([seed, 60]), two=0)
        return [world.caption(s) for s in scenes]

    def redescribed(self, images: np.ndarray) -> list[str]:
        """A caption of all that is read in each image, of its first two objects; '' for nothing."""
        scenes = (world.Scene(r.objects[:2], r.background) for r in reader.read(images))
        return [world.caption(scene) for scene in scenes]

    def steerable(self, target: str, images: np.ndarray, grid: tuple[int, int]):
        """Which images can be steered towards a target, bool, (image,), and where, (image, token).

        Those of one object in which the attribute was read and is not the target's. The weights
        are the share of each token's patch that the object covers, or its complement for a
        background; 1 everywhere in an image without exactly one object.
        """
        attribute, value = _parts(target)
        readings = reader.read(images)
        weights = np.ones((len(readings), grid[0] * grid[1]))
        for weight, reading in zip(weights, readings):
            if len(reading.objects) == 1:
                share = token_shares(reading.objects[0].mask, grid).ravel()
                weight[:] = 1 - share if attribute == "background" else share
        found = [_value(r, attribute) for r in readings]
        return np.array([f not in (None, value) for f in found], bool), weights

    def asked_for(self, target: str, prompts: list[str]) -> list[str]:
        """Captions of one object that say what `prompts` do, and the target: the surest way there.

        ValueError for a fine attribute, which captions never name.
        """
        attribute, value = _parts(target)
        one_of("attribute", attribute, world.NAMED)
        scenes = [world.with_value(world.parse(p), attribute, value) for p in prompts]
        return [world.caption(s) for s in scenes]

    def outcome(self, target: str, before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
        """What steering towards a target did to images, each (image,).

        'success', bool: the target is read; 'kept', float: share of the other attributes that
        captions name read as before; 'kept shape' and so on, bool: each of them. What cannot be
        read is not kept.
        """
        attribute, value = _parts(target)
        readings = [reader.read(before), reader.read(after)]
        of = (*world.NAMED, attribute)
        values = {a: [[_value(r, a) for r in some] for some in readings] for a in of}
        success = np.array([v == value for v in values.pop(attribute)[1]], bool)
        kept = {
            f"kept {a}": np.array([w is not None and w == v for w, v in zip(*were_and_are)], bool)
            for a, were_and_are in values.items()
        }
        return {"success": success, "kept": np.mean(list(kept.values()), axis=0)} | kept

    def has(self, target: str, images: np.ndarray) -> np.ndarray:
        """Whether images of one object show the target, bool, (image,)."""
        attribute, value = _parts(target)
        return np.array([_value(r, attribute) == value for r in reader.read(images)], bool)


def _parts(target: str) -> tuple[str, str]:
    attribute, _, value = target.partition("=")
    if value not in world.ATTRIBUTES.get(attribute, ()):
        known = [f"{a}={v}" for a, values in world.ATTRIBUTES.items() for v in values]
        refuse("target", target, f"a label such as {nearest(target, known)}")
    return attribute, value


def _value(reading: reader.Reading, attribute: str) -> str | None:
    """An attribute of an image of one object; None where the reader cannot tell."""
    if reading.background is None or len(reading.objects) != 1:
        return None
    holder = reading if attribute == "background" else reading.objects[0]
    return getattr(holder, attribute)


def _kept(before: reader.Reading, after: reader.Reading, attributes) -> float:
    """Share of the objects before that one object after equals in these attributes."""
    if not before.objects:
        return float("nan")
    values = attrgetter(*attributes)
    there = {values(o) for o in after.objects}
    return float(np.mean([values(o) in there for o in before.objects]))
