import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from helpers.demo import world as scenes
from helpers.demo.world import ATTRIBUTES, BACKGROUNDS, HELD_OUT, PAIRS, POSITIONS, Object, Scene


def objects_at(position):
    names = ("shape", "colour", "size", "texture")
    return st.builds(Object, *(st.sampled_from(ATTRIBUTES[n]) for n in names), st.just(position))


any_objects = st.one_of(
    *(st.tuples(objects_at(p)) for p in POSITIONS),
    *(st.tuples(objects_at(a), objects_at(b)) for a, b in PAIRS),
)
any_scene = st.builds(Scene, any_objects, st.sampled_from(tuple(BACKGROUNDS)))


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(11)
    wanted = scenes.sample(600, rng)
    images, masks = scenes.render(wanted, rng)
    return wanted, images, masks, scenes.read(images)


@given(any_scene)
def test_a_caption_and_its_scene_are_the_same_thing(scene):
    assert scenes.parse(scenes.caption(scene)) == scene


@given(any_scene, any_scene)
def test_different_scenes_have_different_captions(a, b):
    assert (scenes.caption(a) == scenes.caption(b)) == (a == b)


GOOD = "a large red striped circle at the top left on a white background"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photograph of a dog",
        GOOD.replace("red", "pink"),
        GOOD.replace("circle", "star"),
        GOOD.replace("large ", ""),
        GOOD.replace("large", "huge"),
        GOOD.replace("striped", "checked"),
        GOOD.replace("top left", "nowhere"),
        GOOD.replace("white", "black"),
        GOOD.replace(" background", ""),
        GOOD + " ",
        GOOD.replace("red", "Red"),
        GOOD.replace(" on a", " and a small red solid circle at the right on a"),
        "a small red solid circle at the left and " * 3 + GOOD,
    ],
)
def test_what_is_not_a_scene_is_refused_by_name_with_an_example(text):
    with pytest.raises(ValueError) as refused:
        scenes.parse(text)
    assert repr(text) in str(refused.value)
    example = str(refused.value).split("a valid one is ")[1].strip("'")
    assert scenes.caption(scenes.parse(example)) == example


def test_held_out_scenes_are_those_with_a_held_out_pair():
    for scene in scenes.sample(500, np.random.default_rng(0)):
        pair = any((o.colour, o.shape) in HELD_OUT for o in scene.objects)
        assert (scenes.split(scene) == "held_out") == pair


def test_a_tenth_of_the_other_captions_is_unseen():
    parts = [
        scenes.split(s) for s in scenes.sample(4000, np.random.default_rng(1), ("train", "unseen"))
    ]
    assert 0.08 < parts.count("unseen") / len(parts) < 0.12


def test_a_caption_belongs_to_one_split_whatever_was_drawn_before():
    wanted = scenes.sample(300, np.random.default_rng(2))
    once = {scenes.caption(s): scenes.split(s) for s in wanted}
    again = {scenes.caption(s): scenes.split(s) for s in reversed(wanted)}
    assert once == again
    assert set(once.values()) == {"train", "unseen", "held_out"}


@pytest.mark.parametrize("part", ["train", "unseen", "held_out"])
def test_sample_draws_from_the_asked_split_alone(part):
    assert {scenes.split(s) for s in scenes.sample(50, np.random.default_rng(3), (part,))} == {part}


@pytest.mark.parametrize("two, counts", [(0.0, {1}), (1.0, {2}), (0.5, {1, 2})])
def test_sample_draws_the_asked_share_of_pairs(two, counts):
    assert {len(s.objects) for s in scenes.sample(60, np.random.default_rng(4), two=two)} == counts


def test_every_value_of_every_attribute_is_drawn():
    wanted = scenes.sample(400, np.random.default_rng(5))
    for attribute, values in ATTRIBUTES.items():
        seen = (
            {s.background for s in wanted}
            if attribute == "background"
            else {getattr(o, attribute) for s in wanted for o in s.objects}
        )
        assert seen == set(values)


def test_the_same_generator_gives_the_same_scenes_images_and_masks():
    def draw(seed):
        rng = np.random.default_rng(seed)
        wanted = scenes.sample(20, rng)
        return wanted, *scenes.render(wanted, rng)

    (a, images, masks), (b, images_again, masks_again) = draw(6), draw(6)
    assert a == b and np.array_equal(images, images_again) and np.array_equal(masks, masks_again)
    assert not np.array_equal(images, draw(7)[1])


def test_jitter_makes_two_drawings_of_one_scene_differ():
    scene = scenes.sample(1, np.random.default_rng(8))[0]
    images, _ = scenes.render([scene, scene], np.random.default_rng(9))
    assert not np.array_equal(*images)


def test_images_and_masks_are_float32_in_the_unit_interval(drawn):
    _, images, masks, _ = drawn
    assert images.shape == (600, 64, 64, 3) and masks.shape == (600, 2, 64, 64)
    for values in (images, masks):
        assert values.dtype == np.float32 and values.min() >= 0 and values.max() <= 1


def test_masks_are_where_the_image_differs_from_its_background(drawn):
    wanted, images, masks, _ = drawn
    for scene, image, mask in zip(wanted[:200], images, masks):
        differs = abs(image - image[0, 0]).max(axis=2)
        covered = mask.max(axis=0)
        assert (differs[covered == 0] == 0).all()
        assert (differs[covered > 0.9] > 0.2).all()
        assert [m.any() for m in mask] == [True, len(scene.objects) == 2]


def test_each_mask_lies_at_its_objects_place(drawn):
    wanted, _, masks, _ = drawn
    for scene, mask in zip(wanted, masks):
        for o, m in zip(scene.objects, mask):
            row, column = np.array(ndimage.center_of_mass(m)) + 0.5
            assert np.hypot(row - POSITIONS[o.position][0], column - POSITIONS[o.position][1]) < 2.5


def test_render_refuses_a_scene_outside_the_world():
    bad = Scene((Object("circle", "pink", "small", "solid", "left"),), "white")
    with pytest.raises(ValueError, match="colour 'pink'"):
        scenes.render([bad], np.random.default_rng(0))


def test_the_reader_is_right_at_least_99_times_in_100(drawn, capsys):
    wanted, _, _, readings = drawn
    each = [scenes.judge(s, r) for s, r in zip(wanted, readings)]
    right = {name: np.mean([j[name] for j in each]) for name in each[0]}
    with capsys.disabled():
        print("\nread right: " + ", ".join(f"{name} {share:.2%}" for name, share in right.items()))
    assert min(v for k, v in right.items() if k != "all") >= 0.99
    assert right["all"] >= 0.98


def test_the_mask_read_is_the_mask_drawn(drawn):
    wanted, _, masks, readings = drawn
    overlaps = []
    for scene, mask, reading in zip(wanted, masks, readings):
        if len(reading.objects) == len(scene.objects):
            for o, m in zip(scene.objects, mask):
                read = next(
                    (f.mask for f in reading.objects if f.position == o.position),
                    np.zeros((64, 64), bool),
                )
                overlaps.append((read & (m > 0.5)).sum() / (read | (m > 0.5)).sum())
    assert len(overlaps) > 800 and np.mean(overlaps) > 0.9 and np.quantile(overlaps, 0.01) > 0.75


def unreadable(kind, rng, n=150):
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
    readings = scenes.read(unreadable(kind, np.random.default_rng(12)))
    false = sum(bool(r.objects) for r in readings)
    print(f"{kind}: {false} of {len(readings)} images read as scenes")
    assert false == 0


def test_an_empty_background_is_read_as_one():
    image = np.broadcast_to(np.float32(BACKGROUNDS["sky"]), (1, 64, 64, 3))
    assert scenes.read(image)[0] == scenes.Reading((), "sky")


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 32, 32, 3), (1, 64, 64, 4), (1, 3, 64, 64)])
def test_the_reader_names_the_shape_it_cannot_read(shape):
    with pytest.raises(ValueError, match=r"images have shape .*" + str(shape[-1])):
        scenes.read(np.zeros(shape))


def found(position, **changes):
    values = {"shape": "circle", "colour": "red", "size": "small", "texture": "solid"} | changes
    return scenes.Found(position=position, mask=np.zeros((64, 64), bool), iou=1.0, **values)


LEFT_RIGHT = Scene(
    (
        Object("circle", "red", "small", "solid", "left"),
        Object("circle", "red", "small", "solid", "right"),
    ),
    "white",
)
EVERYTHING = (
    "shape",
    "colour",
    "size",
    "texture",
    "position",
    "colour_at_place",
    "background",
    "count",
    "all",
)


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
        ([found("left")], "white", dict.fromkeys(EVERYTHING[:6], 0.5) | {"count": 0, "all": 0}),
        ([], None, dict.fromkeys(EVERYTHING, 0)),
    ],
)
def test_judgements_worked_by_hand(objects, background, wrong):
    expected = dict.fromkeys(EVERYTHING, 1) | wrong
    assert scenes.judge(LEFT_RIGHT, scenes.Reading(tuple(objects), background)) == expected


def test_attribute_masks_are_unions_over_objects():
    left, right = np.zeros((2, 4, 4))
    left[:, 0], right[:, 3] = 1, 0.5
    a, b = LEFT_RIGHT.objects[0], Object("cross", "red", "small", "solid", "right")
    where = scenes.attribute_masks((a, b), (left, right))
    assert np.array_equal(where["colour", "red"], np.maximum(left, right))
    assert np.array_equal(where["shape", "cross"], right)
    assert ("shape", "square") not in where


@pytest.mark.parametrize(
    "prompts, side, expected",
    [([GOOD], 64, True), ([GOOD, "a dog"], 64, False), ([GOOD], 32, False), ([], 64, False)],
)
def test_only_captions_with_images_of_the_right_size_are_describable(prompts, side, expected):
    assert scenes.describable(prompts, np.zeros((len(prompts), side, side, 3))) is expected
