"""The reader as describer and judge: naming without a language model, on images of the demo world.

It sees what any backend sees, panels and images, and knows the world's attributes. Features made
from the truth itself (`planted`) say how good it is: how often it finds their names, against an
oracle who knows them and against chance, which deals them out at random.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from helpers.checks import one_of, refuse
from helpers.demo import reader, world
from helpers.demo.truth import LABELS
from helpers.measure import metrics
from helpers.measure.labels import token_shares
from helpers.naming import names
from helpers.naming.examples import choose, unpanel

VALUES = {v: a for a, values in world.ATTRIBUTES.items() for v in values}  # each of one only
WORDS = ("size", "shade", "colour", "texture", "phase", "turn", "mark")  # in a name, in this order
SURE = 6.0  # log likelihood ratio from which on a further word is added to a name
PLACED = re.compile(f"(.*?)(?: at the ({'|'.join(world.POSITIONS)}))?")


def name_of(attributes: dict[str, str]) -> str:
    """The name of things with these values, such as 'red circle at the top left', '' for none."""
    for attribute, value in attributes.items():
        one_of(attribute, value, world.ATTRIBUTES.get(attribute, ()))
    if not attributes:
        return ""
    if "background" in attributes:
        return f"{attributes['background']} background"
    words = [attributes[a] for a in WORDS if a in attributes] + [attributes.get("shape", "thing")]
    place = f" at the {attributes['position']}" if "position" in attributes else ""
    return " ".join(words) + place


def parse(name: str) -> dict[str, str]:
    """The values that a name says, by attribute; ValueError for words that are not the world's."""
    *words, last = name.split() or [""]
    if last == "background" and len(words) == 1 and words[0] in world.BACKGROUNDS:
        return {"background": words[0]}
    body, position = PLACED.fullmatch(name).groups()
    *words, last = body.split() or [""]
    words += [last] * (last != "thing")
    found = {VALUES.get(word): word for word in words}
    found |= {"position": position} if position else {}
    if not found or None in found or name_of(found) != name:
        refuse(
            "name", name, "a name in the world's words, such as 'red striped circle at the left'"
        )
    return found


def says(name: str, label: str) -> bool:
    """Whether a name, '' for none, says a label such as 'colour=red', be it among other things."""
    attribute, _, value = label.partition("=")
    return bool(name) and parse(name).get(attribute) == value


def describe(panels: np.ndarray) -> dict[str, str]:
    """What the brightest things of panels have in common: 'patterns' and 'name', '' for nothing.

    Each panel speaks for the thing, an object or the background, that is lit most by area. The name
    is the value that these have beyond what chance gives by the largest likelihood ratio, and all
    further ones of the same kind of thing that are as sure.
    """
    lit = [thing for thing in map(_brightest, panels) if thing is not None]
    held = [_values(thing) for thing in lit]
    evidence = {}
    for value, attribute in VALUES.items():
        known = [h[attribute] for h in held if h.get(attribute)]
        base = 1 / len(world.ATTRIBUTES[attribute])
        evidence[attribute, value] = _ratio(known.count(value), len(known), base)
    ranked = sorted(evidence, key=lambda label: -evidence[label])
    if not lit or evidence[ranked[0]] <= 0:
        return {"patterns": f"{len(lit)} things were read and have nothing in common", "name": ""}
    chosen = dict(ranked[:1])
    is_ground = "background" in chosen
    for attribute, value in ranked[1:]:
        share = np.mean([h.get(attribute) == value for h in held])
        sure = evidence[attribute, value] >= SURE and share >= 0.8
        if sure and attribute not in chosen and not is_ground and attribute != "background":
            chosen[attribute] = value
    counts = (f"{v} {sum(h.get(a) == v for h in held)}" for a, v in chosen.items())
    return {"patterns": f"of {len(lit)} things read: {', '.join(counts)}", "name": name_of(chosen)}


def _ratio(k: int, n: int, base: float) -> float:
    """Log likelihood ratio of k of n at their own share against `base`; 0 below it."""
    share = k / n if n else 0.0
    if share <= base:
        return 0.0
    rest = (n - k) * np.log((1 - share) / (1 - base)) if k < n else 0.0
    return float(k * np.log(share / base) + rest)


def _values(thing) -> dict[str, str]:
    """The attributes of an object, or of a background, that were read."""
    of = ("background",) if isinstance(thing, reader.Reading) else world.OBJECT_ATTRIBUTES
    return {a: getattr(thing, a) for a in of if getattr(thing, a) is not None}


def _regions(image: np.ndarray) -> list[tuple]:
    """Things read in an image, each with its region, bool (height, width)."""
    if image.shape != (world.IMAGE_SIZE, world.IMAGE_SIZE, 3):
        refuse("shape of an image", image.shape, "(64, 64, 3)")
    reading = _reading(np.asarray(image, np.float32).tobytes())
    if reading.background is None:
        return []
    masks = [o.mask for o in reading.objects]
    rest = ~np.any(masks, axis=0) if masks else np.ones(image.shape[:2], bool)
    return [(reading, rest), *zip(reading.objects, masks)]


@lru_cache(maxsize=4096)  # a name is judged on the same images as the next one
def _reading(pixels: bytes) -> reader.Reading:
    image = np.frombuffer(pixels, np.float32).reshape(1, world.IMAGE_SIZE, world.IMAGE_SIZE, 3)
    return reader.read(image)[0]


def _brightest(panel: np.ndarray):
    image, lit = unpanel(panel)
    things = [(lit[region].mean(), thing) for thing, region in _regions(image) if region.any()]
    return max(things, key=lambda t: t[0])[1] if things and lit.max() > 0.01 else None


def judge(image: np.ndarray, name: str) -> float:
    """1 if something in the image (64, 64, 3) is all that the name says, else 0."""
    wanted = parse(name).items()
    return float(any(wanted <= _values(thing).items() for thing, _ in _regions(image)))


def locate(panel: np.ndarray, name: str) -> float:
    """How much brighter what the name says is lit than the rest: 1 it alone, 0.5 alike, 0 not."""
    image, lit = unpanel(panel)
    wanted, own = parse(name).items(), np.zeros(image.shape[:2], bool)
    for thing, region in _regions(image):
        if wanted <= _values(thing).items():
            own |= region
    inside, outside = (lit[of].mean() if of.any() else 0.0 for of in (own, ~own))
    return float(inside / (inside + outside)) if inside + outside > 0 else 0.5


class Encoder:
    """The reader as an encoder of images and texts, shaped as `helpers.measure.encoders.Encoder`.

    A vector has an entry for each value there is: of an image, whether anything in it shows the
    value; of a name, whether it says it. Images are read as wholes, (64, 64, 3), not in patches.
    """

    reads_text = True

    def images(self, images: np.ndarray) -> torch.Tensor:
        """Vectors (image, value) of unit length, of zeros where nothing can be read."""
        held = [[_values(thing).items() for thing, _ in _regions(image)] for image in images]
        shows = [[any((a, v) in of for of in own) for v, a in VALUES.items()] for own in held]
        return torch.nn.functional.normalize(torch.tensor(shows, dtype=torch.float32), dim=1)

    def texts(self, names: list[str]) -> torch.Tensor:
        """Vectors (name, value) of unit length; ValueError for words that are not the world's."""
        says = [[(a, v) in parse(name).items() for v, a in VALUES.items()] for name in names]
        return torch.nn.functional.normalize(torch.tensor(says, dtype=torch.float32), dim=1)


def write(name: str, n: int, seed: int = 0) -> dict[str, list[str]]:
    """Captions of one object that say the name, and the same with its words exchanged, n of each.

    ValueError for a name of fine attributes alone, which captions never say.
    """
    said = {a: v for a, v in parse(name).items() if a in world.NAMED}
    if not said:
        refuse("name", name, f"one that says {', '.join(world.NAMED)}; captions name nothing else")
    rng = np.random.default_rng([seed, 61])
    found = {"should": [], "should_not": []}
    for scene in world.sample(n, rng, two=0):
        other = scene
        for attribute, value in said.items():
            rest = [v for v in world.ATTRIBUTES[attribute] if v != value]
            scene = world.with_value(scene, attribute, value)
            other = world.with_value(other, attribute, rest[rng.integers(len(rest))])
        found["should"].append(world.caption(scene))
        found["should_not"].append(world.caption(other))
    return found


@dataclass(frozen=True)
class Planted:
    """Features whose truth is known, since they were drawn: one for each label."""

    labels: list[str]  # such as 'colour=red'
    images: np.ndarray  # (image, 64, 64, 3)
    maps: np.ndarray  # (feature, image, rows, columns), share of each token that shows the label

    def nearest(self, feature: int) -> int:
        """The next value of the same attribute, or the next label where there is none."""
        attribute = self.labels[feature].partition("=")[0]
        alike = [i for i, v in enumerate(self.labels) if v.partition("=")[0] == attribute]
        alike = alike if len(alike) > 1 else list(range(len(self.labels)))
        return alike[(alike.index(feature) + 1) % len(alike)]


def planted(n_images: int, labels=None, grid=(16, 16), seed: int = 0) -> Planted:
    """Drawn scenes of one and two objects, and a feature for each label, ideal in all ways."""
    labels = ["=".join(label) for label in LABELS] if labels is None else list(labels)
    rng = np.random.default_rng([seed, 62])
    scenes = world.sample(n_images, rng)
    images, masks = world.render(scenes, rng)
    maps = np.zeros((len(labels), n_images, *grid), np.float32)
    for i, label in enumerate(labels):
        attribute, _, value = label.partition("=")
        one_of("label", value, world.ATTRIBUTES.get(attribute, ()))
        for j, (scene, mask) in enumerate(zip(scenes, masks)):
            if attribute == "background":
                shown = (1 - mask.sum(0)) * (scene.background == value)
            else:
                carries = [getattr(o, attribute) == value for o in scene.objects]
                shown = mask[: len(carries)][carries].sum(0) if any(carries) else 0 * mask[0]
            maps[i, j] = token_shares(np.clip(shown, 0, 1), grid)
    return Planted(labels, images, maps)


def measure(features: Planted, *, n_described=10, n_judged=10, seed: int = 0) -> dict:
    """How good naming by reading is: names found, and scores against an oracle's and chance's.

    'named right', the share of features whose name says their label, with 'exactly' where it says
    nothing else; and mean scores, as `names.summary`, of the names found ('reader'), the true ones
    ('oracle') and those of other features ('chance'). All with intervals over features.
    """
    rng, n = np.random.default_rng([seed, 63]), len(features.labels)
    found, examples = [], []
    for i in range(n):
        strength, rival = (features.maps[f].max((1, 2)) for f in (i, features.nearest(i)))
        sizes = {"n_described": n_described, "n_judged": n_judged, "seed": seed}
        examples.append(choose(strength, rival, **sizes))
        given = features.images, features.maps[i], examples[-1]
        found.append(names.describe_and_score(describe, judge, locate, *given))
    right = np.array([says(f.name, label) for f, label in zip(found, features.labels)], bool)
    true_names = [name_of(dict([label.split("=")])) for label in features.labels]
    exact = np.array([f.name == name for f, name in zip(found, true_names)], bool)
    order = rng.permutation(n)
    dealt = dict(zip(order.tolist(), np.roll(order, 1).tolist()))  # nobody gets their own

    def scored(given: list[str]) -> dict:
        rows = zip(given, features.maps, examples)
        return names.summary(
            names.score_name(judge, locate, name, features.images, maps, e)
            for name, maps, e in rows
        )

    return {
        "names": {label: f.name for label, f in zip(features.labels, found)},
        "named right": metrics.share(right),
        "exactly": metrics.share(exact),
        "reader": names.summary(found),
        "oracle": scored(true_names),
        "chance": scored([true_names[dealt[i]] for i in range(n)]),
    }
