from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from helpers.demo import world
from helpers.demo.world import ATTRIBUTES, BACKGROUNDS, HELD_OUT, POSITIONS, Object, Scene


def any_of(seed):
    return world.sample(1, np.random.default_rng(seed))[0]


any_scene = st.integers(0, 10**9).map(any_of)


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(11)
    scenes = world.sample(200, rng)
    return scenes, *world.render(scenes, rng)


open_scene = st.integers(0, 10**9).map(
    lambda seed: world.leave_open(any_of(seed), np.random.default_rng([seed, 1]))
)


@given(open_scene)
def test_a_caption_and_what_it_names_are_the_same_thing(scene):
    assert world.parse(world.caption(scene)) == scene


@given(open_scene, open_scene)
def test_different_scenes_have_different_captions(a, b):
    assert (world.caption(a) == world.caption(b)) == (a == b)


@given(any_scene)
def test_a_caption_says_all_but_the_fine_attributes(scene):
    said = world.parse(world.caption(scene))
    fine = dict.fromkeys(world.FINE)
    assert said.objects == tuple(replace(o, **fine) for o in scene.objects)
    assert said.background == scene.background
    assert not any(f" {v}" in world.caption(scene) for v in ("light", "dark", "tilted", "odd"))


@pytest.mark.parametrize(
    "scene, text",
    [
        (Scene(), ""),
        (Scene(background="sky"), "a sky background"),
        (Scene((Object(),)), "a thing"),
        (Scene((Object(colour="orange"),), "gray"), "an orange thing on a gray background"),
        (Scene((Object("cross", position="top"), Object())), "a cross at the top and a thing"),
    ],
)
def test_what_is_left_open_is_not_said(scene, text):
    assert world.caption(scene) == text and world.parse(text) == scene


def test_any_part_of_a_scene_may_be_left_open():
    rng = np.random.default_rng(0)
    scenes = world.sample(2000, rng)
    told = [world.leave_open(s, rng) for s in scenes]
    for scene, said in zip(scenes, told):
        assert said.background in (None, scene.background)
        for o in said.objects:
            parts = [
                replace(
                    whole,
                    **{a: None for a in ATTRIBUTES if hasattr(whole, a) and getattr(o, a) is None},
                )
                for whole in scene.objects
            ]
            assert o in parts
    full = np.mean([world.caption(a) == world.caption(b) for a, b in zip(told, scenes)])
    empty = np.mean([s == Scene() for s in told])
    assert 0.25 < full < 0.45 and 0.01 < empty < 0.1
    for attribute in world.OBJECT_ATTRIBUTES:
        named = np.mean([getattr(o, attribute) is not None for s in told for o in s.objects])
        assert (named == 0) if attribute in world.FINE else 0.4 < named < 0.8


GOOD = "a large red striped circle at the top left on a white background"


@pytest.mark.parametrize(
    "text",
    [
        " ",
        "a photograph of a dog",
        GOOD.replace("red", "pink"),
        GOOD.replace("circle", "star"),
        GOOD.replace("a large red", "an red"),
        GOOD.replace("large red", "red large"),
        GOOD.replace("circle ", ""),
        GOOD.replace("large", "huge"),
        GOOD.replace("striped", "checked"),
        GOOD.replace("top left", "nowhere"),
        GOOD.replace("white", "black"),
        GOOD.replace(" background", ""),
        GOOD.replace("red", "dark red"),
        GOOD + " ",
        GOOD.replace("a large", "the large"),
        GOOD.replace("red", "Red"),
        GOOD.replace(" on a", " and a small red solid circle at the right on a"),
        "a small red solid circle at the left and " * 3 + GOOD,
    ],
)
def test_what_is_not_a_scene_is_refused_with_an_example(text):
    with pytest.raises(ValueError) as refused:
        world.parse(text)
    assert repr(text) in str(refused.value) and repr(GOOD) in str(refused.value)


def test_held_out_scenes_are_those_with_a_held_out_pair():
    for scene in world.sample(300, np.random.default_rng(0)):
        pair = any((o.colour, o.shape) in HELD_OUT for o in scene.objects)
        assert (world.split(scene) == "held_out") == pair


def test_a_tenth_of_the_other_captions_is_unseen():
    scenes = world.sample(4000, np.random.default_rng(1), ("train", "unseen"))
    assert 0.08 < np.mean([world.split(s) == "unseen" for s in scenes]) < 0.12


@pytest.mark.parametrize("part", ["train", "unseen", "held_out"])
def test_sample_draws_from_the_asked_split_alone(part):
    assert {world.split(s) for s in world.sample(50, np.random.default_rng(3), (part,))} == {part}


@pytest.mark.parametrize("two, counts", [(0.0, {1}), (1.0, {2}), (0.5, {1, 2})])
def test_sample_draws_the_asked_share_of_pairs(two, counts):
    assert {len(s.objects) for s in world.sample(60, np.random.default_rng(4), two=two)} == counts


def test_every_value_of_every_attribute_is_drawn():
    scenes = world.sample(400, np.random.default_rng(5))
    for attribute in world.OBJECT_ATTRIBUTES:
        seen = {getattr(o, attribute) for s in scenes for o in s.objects}
        assert seen - {None} == set(ATTRIBUTES[attribute])
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    for o in (o for s in scenes for o in s.objects):
        assert (o.turn is None) == (o.shape == "circle")
        assert (o.phase is None) == (o.texture == "solid")


def test_the_same_generator_gives_the_same_scenes_images_and_masks():
    def draw(seed):
        rng = np.random.default_rng(seed)
        scenes = world.sample(20, rng)
        return scenes, *world.render(scenes, rng)

    (a, images, masks), (b, images_again, masks_again) = draw(6), draw(6)
    assert a == b and np.array_equal(images, images_again) and np.array_equal(masks, masks_again)
    assert not np.array_equal(images, draw(7)[1])


CAPTIONS = [
    "a large yellow striped cross at the top left on a gray background",
    "a small red barred circle at the left on a gray background",
    "a large blue solid cross at the top on a gray background",
]
SPLITS = ["held_out", "train", "train"]
MEANS = [[0.576, 0.607, 0.572], [0.583, 0.590, 0.561], [0.579, 0.571, 0.602]]
AREAS = [376.6, 209.8, 316.0]


def test_the_world_is_the_one_the_shipped_model_was_trained_on():
    """Captions, splits and pixels as they were; the model and its figures belong to them."""
    rng = np.random.default_rng(5)
    scenes = world.sample(3, rng, two=0)
    images, masks = world.render(scenes, rng)
    assert [world.caption(s) for s in scenes] == CAPTIONS
    assert [world.split(s) for s in scenes] == SPLITS
    np.testing.assert_allclose(images.mean((1, 2)), MEANS, atol=1e-3)
    np.testing.assert_allclose(masks[:, 0].sum((1, 2)), AREAS, atol=0.1)


def test_textures_are_told_apart_by_the_mean_over_phases_which_no_caption_names():
    """Half a period apart, two phases would cancel, and leave the words little to tell."""

    def mean(texture):
        both = [
            Scene((replace(PLAIN, texture=texture, phase=p),), "white") for p in ("even", "odd")
        ]
        images, masks = world.render(both, np.random.default_rng(3))
        return images.mean((0, 3))[masks[:, 0].min(0) == 1]

    striped, barred, solid = map(mean, ("striped", "barred", "solid"))
    assert np.std(striped - barred) > 0.5 * np.std(striped) > 0.1 * np.mean(solid)


def test_jitter_makes_two_drawings_of_one_scene_differ():
    scene = world.sample(1, np.random.default_rng(8))[0]
    assert not np.array_equal(*world.render([scene, scene], np.random.default_rng(9))[0])


def test_images_and_masks_are_float32_in_the_unit_interval(drawn):
    _, images, masks = drawn
    assert images.shape == (200, 64, 64, 3) and masks.shape == (200, 2, 64, 64)
    for values in (images, masks):
        assert values.dtype == np.float32 and values.min() >= 0 and values.max() <= 1


def test_masks_are_where_the_image_differs_from_its_background(drawn):
    for scene, image, mask in zip(*drawn):
        differs = abs(image - image[0, 0]).max(axis=2)
        covered = mask.max(axis=0)
        assert (differs[covered == 0] == 0).all()
        if all(o.mark == "plain" for o in scene.objects):  # else there is white, perhaps on white
            assert (differs[covered > 0.9] > 0.2).all()
        assert [m.any() for m in mask] == [True, len(scene.objects) == 2]


def test_each_mask_lies_at_its_objects_place(drawn):
    for scene, _, mask in zip(*drawn):
        for o, m in zip(scene.objects, mask):
            centre = np.array(ndimage.center_of_mass(m)) + 0.5
            assert np.hypot(*(centre - POSITIONS[o.position])) < 2.5


def test_render_refuses_a_scene_outside_the_world():
    bad = Scene((Object("circle", "pink", "small", "solid", "left"),), "white")
    with pytest.raises(ValueError, match="colour is 'pink'"):
        world.render([bad], np.random.default_rng(0))


PLAIN = Object("square", "green", "large", "striped", "center", "light", "upright", "even", "plain")


@pytest.mark.parametrize(
    "attribute, value, where",
    [
        ("shade", "dark", "everywhere"),
        ("phase", "odd", "everywhere"),
        ("mark", "marked", "middle"),
        ("turn", "tilted", "outline"),
    ],
)
def test_fine_attributes_change_what_they_should(attribute, value, where):
    def draw(o):
        images, masks = world.render([Scene((o,), "white")], np.random.default_rng(1))
        return images[0], masks[0, 0]

    (before, mask), (after, turned) = draw(PLAIN), draw(replace(PLAIN, **{attribute: value}))
    changed = abs(after - before).max(axis=2) > 0.05
    assert np.array_equal(mask, turned) == (where != "outline")
    assert not changed[np.maximum(mask, turned) == 0].any() and changed.any()
    y, x = np.mgrid[:64, :64] - 31.5
    if where == "middle":
        assert np.hypot(y, x)[changed].max() < 5
    elif where == "everywhere":
        assert changed[mask > 0.9].mean() > 0.6
