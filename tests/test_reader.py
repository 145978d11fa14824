import numpy as np
import pytest
from scipy import ndimage

from helpers.demo import reader, world
from helpers.demo.reader import Found, Reading
from helpers.demo.world import BACKGROUNDS, Object, Scene


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(11)
    scenes = world.sample(300, rng)
    images, masks = world.render(scenes, rng)
    return scenes, masks, reader.read(images)


def test_the_reader_is_right_at_least_99_times_in_100(drawn):
    scenes, _, readings = drawn
    each = [reader.judge(s, r) for s, r in zip(scenes, readings)]
    right = {name: np.nanmean([j[name] for j in each]) for name in each[0]}
    assert min(v for k, v in right.items() if k != "all") >= 0.99
    assert right["all"] >= 0.98 and set(right) == {*EVERYTHING}


def test_the_mask_read_is_the_mask_drawn(drawn):
    scenes, masks, readings = drawn
    overlaps = []
    for scene, mask, reading in zip(scenes, masks, readings):
        found = {f.position: f.mask for f in reading.objects}
        for o, m in zip(scene.objects, mask > 0.5):
            read = found.get(o.position, np.zeros((64, 64), bool))
            overlaps.append((read & m).sum() / (read | m).sum())
    assert len(overlaps) > 400 and np.mean(overlaps) > 0.9 and np.quantile(overlaps, 0.01) > 0.75


def unreadable(kind, rng, n=60):
    if kind == "white noise":
        return rng.random((n, 64, 64, 3))
    if kind == "smooth noise":
        smooth = [
            ndimage.gaussian_filter(rng.standard_normal((64, 64, 3)), (s, s, 0))
            for s in rng.uniform(1, 8, n)
        ]
        return np.stack([(x - x.min()) / np.ptp(x) for x in smooth])
    if kind == "uniform":
        return np.broadcast_to(rng.random((n, 1, 1, 3)), (n, 64, 64, 3))
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1, 1))
    y, x = np.mgrid[-1:1:64j, -1:1:64j][:, None, :, :, None]
    ramp = 0.5 + (np.cos(angle) * x + np.sin(angle) * y) / 2**1.5
    start, end = rng.random((2, n, 1, 1, 3))
    if kind == "vignettes":
        return end * np.clip(1 - (x**2 + y**2) * rng.uniform(0.1, 0.5, (n, 1, 1, 1)), 0, 1)
    if kind == "horizons":
        ramp = 1 / (1 + np.exp(-8 * (y - rng.uniform(-0.6, 0.6, (n, 1, 1, 1)))))
        start = np.float32([0.62, 0.82, 0.96])
    return start + (end - start) * ramp + rng.normal(0, 0.02, (n, 64, 64, 3))


@pytest.mark.parametrize(
    "kind", ["white noise", "smooth noise", "uniform", "gradients", "vignettes", "horizons"]
)
def test_the_reader_finds_nothing_where_there_is_nothing(kind):
    readings = reader.read(unreadable(kind, np.random.default_rng(12)))
    assert sum(bool(r.objects) for r in readings) == 0


def test_an_empty_background_is_read_as_one():
    image = np.broadcast_to(np.float32(BACKGROUNDS["sky"]), (1, 64, 64, 3))
    assert reader.read(image)[0] == Reading((), "sky")


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 32, 32, 3), (1, 64, 64, 4), (1, 3, 64, 64)])
def test_the_reader_names_the_shape_it_cannot_read(shape):
    with pytest.raises(ValueError, match="shape of images is .*" + str(shape[-1])):
        reader.read(np.zeros(shape))


def found(position, **changes):
    values = {"shape": "circle", "colour": "red", "size": "small", "texture": "solid"}
    values |= {"shade": "dark", "mark": "plain"} | changes
    return Found(position=position, mask=np.zeros((64, 64), bool), iou=1.0, **values)


LEFT_RIGHT = Scene(
    (
        Object("circle", "red", "small", "solid", "left"),
        Object("circle", "red", "small", "solid", "right"),
    ),
    "white",
)
GIVEN = ("shape", "colour", "size", "texture", "position", "colour_at_place")
EVERYTHING = (*GIVEN, "background", "count", "all", *world.FINE)


@pytest.mark.parametrize(
    "objects, background, wrong",
    [
        ([found("left"), found("right")], "white", {}),
        ([found("right"), found("left")], "white", {}),
        ([found("left"), found("right")], "gray", {"background": 0, "all": 0}),
        (
            [found("left"), found("right", colour="blue")],
            "white",
            {"colour": 0.5, "colour_at_place": 0.5, "all": 0},
        ),
        (
            [found("left"), found("bottom right")],
            "white",
            {"position": 0.5, "colour_at_place": 0.5, "all": 0},
        ),
        ([found("left"), found("right"), found("center")], "white", {"count": 0, "all": 0}),
        ([found("left")], "white", dict.fromkeys(GIVEN, 0.5) | {"count": 0, "all": 0}),
        ([], None, dict.fromkeys((*GIVEN, "background", "count", "all"), 0)),
    ],
)
def test_judgements_worked_by_hand(objects, background, wrong):
    expected = dict.fromkeys(EVERYTHING, 1) | wrong | dict.fromkeys(world.FINE, np.nan)
    judged = reader.judge(LEFT_RIGHT, Reading(tuple(objects), background))
    assert judged == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    "caption, objects, background, given",
    [
        ("", [], "sky", {"all": 1}),
        ("", [], None, {"all": 0}),
        ("a sky background", [found("left")], "sky", {"background": 1, "all": 1}),
        ("a thing", [found("left")], "sky", {"count": 1, "all": 1}),
        ("a blue thing", [found("left")], "sky", {"colour": 0, "count": 1, "all": 0}),
        (  # which of two things without places is meant is read from the rest
            "a blue thing and a circle",
            [found("left"), found("right", colour="blue", shape="cross")],
            "sky",
            {"colour": 1, "shape": 1, "count": 1, "all": 1},
        ),
        (
            "a red thing and a blue thing",
            [found("top")],
            "sky",
            {"colour": 0.5, "count": 0, "all": 0},
        ),
    ],
)
def test_only_what_a_caption_gives_is_judged(caption, objects, background, given):
    judged = reader.judge(world.parse(caption), Reading(tuple(objects), background))
    assert judged == pytest.approx(dict.fromkeys(EVERYTHING, np.nan) | given, nan_ok=True)


def test_things_are_each_readable_images_background_and_objects():
    objects = (found("left"), found("right"))
    readings = [Reading(objects, "sky"), Reading((), None), Reading((), "gray")]
    listed = reader.things(readings)
    assert [image for image, _ in listed] == [0, 0, 0, 2]
    expected = (readings[0], *objects, readings[2])
    assert all(thing is e for (_, thing), e in zip(listed, expected))


def test_fine_attributes_are_judged_where_a_scene_has_them():
    scene = Scene((Object("circle", position="left", shade="light", mark="plain"),))
    judged = reader.judge(scene, Reading((found("left"),), "sky"))
    assert (judged["shade"], judged["mark"]) == (0, 1) and np.isnan(judged["turn"])
