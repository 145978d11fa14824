"""When an image's values are decided: from which denoising step on they can be foreseen.

At every step the model predicts a finished image. It is measured where the final image has its
objects, by what tells an attribute's values apart and does not follow from the place itself: the
colour inside the mask, say, or how the contrast around the centroid correlates with each shape. A
logistic probe a step then says how probable the final value is. Without any training, the caption
can be exchanged while an image is made: what is still open then follows the new one.
"""

import numpy as np
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.demo import judge, reader, world
from helpers.demo.reader import Found, Reading
from helpers.measure import metrics
from helpers.measure.timing import lasting_from
from helpers.pipelines.generate import switch_prompts

_PLACES = world.silhouette("circle", *np.transpose([*world.POSITIONS.values()]), [8.0] * 9, [0] * 9)


def foreseen(pipe, prompts, seeds, images, sampling: dict, batch_size=50) -> dict[str, np.ndarray]:
    """Probability of each thing's final value at each denoising step: attribute -> (step, thing).

    `images`, (image, 64, 64, 3), are those of these prompts and seeds; things are `reader.things`
    of them. NaN where a thing has no such attribute. Where objects are is foreseen for all of an
    image together.
    """
    readings = reader.read(images)
    things = reader.things(readings)
    seen = [{} for _ in things]  # of each thing: attribute -> measurements, (step, measurement)
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        predicted = judge.predicted_images(pipe, prompts[batch], seeds[batch], **sampling)
        for (image, thing), found in zip(things, seen):
            if 0 <= image - start < predicted.shape[1]:
                found |= measurements(predicted[:, image - start], thing)
    out = {}
    for attribute in world.ATTRIBUTES:
        values = [_value(readings[image], thing, attribute) for image, thing in things]
        mine = [i for i, value in enumerate(values) if value is not None]
        out[attribute] = np.full((len(predicted), len(things)), np.nan)
        if mine:
            x = np.stack([seen[i][attribute] for i in mine], axis=1)
            of_image = np.array([things[i][0] for i in mine])
            y = np.array([values[i] for i in mine])
            out[attribute][:, mine] = [probe(step, y, of_image) for step in x]
    return out


def first_step(probability: np.ndarray, level: float = 0.8) -> np.ndarray:
    """First step from which on (step, thing) is at least `level`, float, (thing,); NaN: never."""
    return lasting_from(probability >= level, range(len(probability)))


def probe(x: np.ndarray, y: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Probability that measurements x (thing, measurement) give to each thing's own y, (thing,).

    By logistic regressions that were fitted on other images; NaN where those show one value only.
    """
    out = np.full(len(y), np.nan)
    if len(set(image)) < 2:
        return out
    for train, test in GroupKFold(min(5, len(set(image)))).split(x, y, image):
        if len(set(y[train])) > 1:
            regression = LogisticRegression(C=10, tol=1e-3, max_iter=200)
            model = make_pipeline(StandardScaler(), regression)
            p = model.fit(x[train], y[train]).predict_proba(x[test])
            out[test] = (p * (y[test][:, None] == model.classes_)).sum(1)
    return out


def _value(reading: Reading, thing, attribute: str) -> str | None:
    if attribute == "position" and thing is not reading:
        return " and ".join(sorted(o.position for o in reading.objects))
    return getattr(thing, attribute, None)


def measurements(images: np.ndarray, thing: Reading | Found) -> dict[str, np.ndarray]:
    """What images (step, 64, 64, 3) show at the place of a thing: attribute -> (step, number)."""
    border = (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
    plain = np.median(np.concatenate(border, axis=1), axis=1)
    if isinstance(thing, Reading):
        return {"background": plain}
    contrast = abs(images - plain[:, None, None]).max(axis=3)
    places = np.einsum("shw,phw->sp", contrast, _PLACES) / _PLACES[0].sum()
    row, column = (v.mean() + 0.5 for v in np.nonzero(thing.mask))
    likeness = _likeness(contrast, row, column)
    own = np.stack([v for (shape, *_), v in likeness.items() if shape == thing.shape], axis=1)
    outline = np.stack([*likeness.values()], axis=1)
    around = world.silhouette("circle", [row], [column], [3.0], [0.0])[0] > 0.5
    inside = ndimage.binary_erosion(thing.mask) & ~around
    inside = inside if inside.sum() >= 12 else thing.mask
    pixels = images[:, inside]
    order = np.argsort(-pixels.max(axis=2), axis=1)[:, : max(1, inside.sum() * 3 // 10)]
    bright = np.take_along_axis(pixels, order[..., None], axis=1).mean(1)
    colour = np.hstack([bright, bright / bright.max(axis=1, keepdims=True).clip(0.05)])
    waves = _waves(pixels.max(axis=2), inside)
    middle = images[:, around].min(axis=2)
    mark = np.stack([middle.mean(1), middle.max(1), pixels.min(axis=2).mean(1)], axis=1)
    return {
        "shape": outline,
        "size": outline,
        "turn": own,
        "colour": colour,
        "shade": colour,
        "texture": waves,
        "phase": waves,
        "mark": mark,
        "position": np.hstack([places, places / places.max(axis=1, keepdims=True).clip(0.02)]),
    }


def _likeness(contrast: np.ndarray, row: float, column: float) -> dict[tuple, np.ndarray]:
    """Correlation of contrast, (step, 64, 64), around a point with what could be drawn there.

    (shape, size, turn) -> (step,).
    """
    near = world.silhouette("circle", [row], [column], [15.0], [0.0])[0] > 0.5
    there = contrast[:, near] - contrast[:, near].mean(1, keepdims=True)
    there /= np.linalg.norm(there, axis=1, keepdims=True).clip(1e-3)
    found = {}
    for shape in world.SHAPES:
        turns = world.FINE["turn"] if shape != "circle" else {None: 0.0}
        for size, radius in world.SIZES.items():
            for turn, angle in turns.items():
                place = ([row], [column], [radius], [np.deg2rad(angle)])
                ideal = world.silhouette(shape, *place)[0][near]
                ideal = ideal - ideal.mean()
                found[shape, size, turn] = there @ (ideal / np.linalg.norm(ideal))
    return found


def _waves(brightness: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The textures' waves in brightness (step, pixel inside): (step, 7), shares of its mean."""
    brightness = brightness / brightness.mean(axis=1, keepdims=True).clip(0.05)
    _, *cosines, down, across = np.linalg.pinv(reader.waves(inside)) @ brightness.T
    sizes = np.hypot(cosines, [down, across])
    return np.stack([*cosines, down, across, *sizes, brightness.std(axis=1)], axis=1)


def exchanged(scene: world.Scene, attribute: str, rng: np.random.Generator) -> world.Scene:
    """A scene of one object, complete in what can be named, with another value of an attribute."""
    holder = scene if attribute == "background" else scene.objects[0]
    others = [v for v in world.NAMED[attribute] if v != getattr(holder, attribute)]
    return world.with_value(scene, attribute, others[rng.integers(len(others))])


def switched(pipe, scenes, attribute: str, steps, seeds, rng, batch_size=50, **sampling):
    """Share of images that show their scene's value if only the caption from a step on names it.

    Up to then it names another value, from `rng`. Prompt switching as in Görgün et al. (2025),
    arXiv:2512.08486; step 0 is the scene's own caption throughout. An Estimate for each step.
    """
    before = [world.caption(exchanged(s, attribute, rng)) for s in scenes]
    after = [world.caption(s) for s in scenes]
    shown = []
    for step in steps:
        batches = [slice(i, i + batch_size) for i in range(0, len(scenes), batch_size)]
        images = [
            switch_prompts(pipe, before[b], after[b], seeds[b], step, **sampling) for b in batches
        ]
        right = judge.judge(scenes, reader.read(np.concatenate(images)))[attribute]
        shown.append(metrics.share(right == 1))
    return shown
