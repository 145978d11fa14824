from dataclasses import replace

import numpy as np
import pytest

from helpers.demo import reader, truth, world
from helpers.demo.reader import Found, Reading
from helpers.demo.truth import Scenes
from helpers.demo.world import Object, Scene


def found(rows=slice(0, 32), columns=slice(0, 40), position="left", **values):
    mask = np.zeros((64, 64), bool)
    mask[rows, columns] = True
    values = {"shape": "circle", "colour": "red", "size": "small", "texture": "solid"} | values
    values = {"shade": "light", "mark": "plain"} | values
    return Found(position=position, mask=mask, iou=1.0, **values)


NOTHING = Reading((), None)


@pytest.fixture
def images_of(monkeypatch):
    """Makes images that the reader reads as these readings."""
    table = []
    monkeypatch.setattr(reader, "read", lambda images: [table[int(i)] for i in images])

    def make(*readings):
        table.extend(readings)
        return np.arange(len(table) - len(readings), len(table))

    return make


def drawn(*scenes):
    return world.render(list(scenes), np.random.default_rng(0))[0]


def one(shape="circle", colour="red", size="large", texture="solid", place="left", ground="white"):
    return Scene((Object(shape, colour, size, texture, place),), ground)


def test_labels_worked_by_hand(images_of):
    # one object covers token 0 of 2×2 and a quarter of token 1
    images = images_of(Reading((found(),), "sky"), NOTHING, Reading((), "white"))
    made = Scenes().labels([""] * 3, images, (2, 2))
    at = {name: made.at_tokens()[:, :, i].tolist() for i, name in enumerate(made.names)}
    none, every = [False] * 4, [True] * 4
    assert at["colour=red"] == at["shape=circle"] == [[True, False, False, False], none, none]
    assert at["background=sky"] == [[False, False, True, True], none, none]
    assert at["background=white"] == [none, none, every]
    assert at["colour=blue"] == [none] * 3
    assert made.kind.tolist() == [truth.BACKGROUND, truth.OBJECT, truth.BACKGROUND]
    assert at["shade=light"] == at["mark=plain"] == at["colour=red"]
    assert len(made.names) == len(set(made.names)) == 26
    assert made.among("mark=marked").tolist() == [[True, False, False, False], none, none]
    assert not made.among("turn=tilted").any()  # circles have none
    assert not made.among("phase=odd").any()  # nor have solid things a phase


def test_large_patches_belong_to_the_object_that_covers_most_of_them(images_of):
    images = images_of(Reading((found(slice(4, 16), slice(4, 20)),), "sky"))
    made = Scenes().labels([""], images, (2, 2))
    assert made.at_tokens()[0, :, made.names.index("colour=red")].tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_unreadable_images_give_no_labels(images_of):
    made = Scenes().labels([""] * 2, images_of(NOTHING, NOTHING), (2, 2))
    assert made.at_tokens().shape == (2, 4, len(made.names)) and not made.at_tokens().any()


def test_grids_that_are_not_square_are_upright(images_of):
    images = images_of(Reading((found(slice(0, 16), slice(32, 64)),), "sky"))
    made = Scenes().labels([""], images, (4, 2))
    red = made.at_tokens()[0, :, made.names.index("colour=red")].reshape(4, 2)
    assert np.argwhere(red).tolist() == [[0, 1]]


def test_labels_of_a_drawing_are_where_its_object_is_drawn():
    scenes = [one(place="top left", ground="sky"), one("square", "blue", place="bottom right")]
    images, masks = world.render(scenes, np.random.default_rng(0))
    made = Scenes().labels([""] * 2, images, (8, 8))
    shares = masks[:, 0].reshape(2, 8, 8, 8, 8).mean((2, 4)).reshape(2, 64)
    for label, i in (("colour=red", 0), ("shape=square", 1)):
        at = made.at_tokens()[..., made.names.index(label)]
        assert at[i][shares[i] > 0.6].all() and not at[i][shares[i] < 0.4].any()
        assert not at[1 - i].any()


def test_a_drawing_is_as_its_caption_says_and_not_as_anothers():
    scenes = [one(), one("square", texture="striped")]
    captions = [world.caption(s) for s in scenes]
    right = Scenes().judged(captions, drawn(*scenes))
    assert {a: v.tolist() for a, v in right.items()} == dict.fromkeys(truth.JUDGED, [1, 1])
    swapped = Scenes().judged(captions[::-1], drawn(*scenes))
    assert swapped["shape"].tolist() == swapped["texture"].tolist() == [0, 0]
    assert swapped["colour_at_place"].tolist() == swapped["background"].tolist() == [1, 1]


def test_objects_kept_worked_by_hand(images_of):
    two = (found(), found(position="right", colour="blue"))
    before = images_of(*[Reading(two, "sky")] * 4, NOTHING)
    after = images_of(
        Reading(two[::-1], "white"),
        Reading((two[0], found(position="right", colour="blue", texture="barred")), "sky"),
        Reading((two[0], found(position="right", colour="green")), "sky"),
        NOTHING,
        Reading(two, "sky"),
    )
    kept = Scenes().objects_kept(before, after)
    np.testing.assert_array_equal(kept["objects kept"], [1, 1, 0.5, 0, np.nan])
    np.testing.assert_array_equal(kept["with size and texture"], [1, 0.5, 0.5, 0, np.nan])


def test_prompts_to_steer_are_fresh_captions_of_one_object():
    prompts = Scenes().steering_prompts(20, 3, ["not used"])
    assert prompts == Scenes().steering_prompts(20, 3, [])
    assert prompts != Scenes().steering_prompts(20, 4, [])
    assert [len(world.parse(p).objects) for p in prompts] == [1] * 20


def test_captions_can_ask_for_a_target_and_else_stay_as_they_are():
    before = "a small red solid circle at the left on a white background"
    for target, after in {
        "colour=blue": "a small blue solid circle at the left on a white background",
        "background=sky": "a small red solid circle at the left on a sky background",
        "colour=red": before,
    }.items():
        assert Scenes().asked_for(target, [before]) == [after]
    with pytest.raises(ValueError, match="attribute is 'mark'"):
        Scenes().asked_for("mark=marked", [before])


def test_an_image_can_be_steered_towards_what_it_does_not_show(images_of):
    images = images_of(
        Reading((found(colour="blue"),), "sky"),
        Reading((found(),), "sky"),
        Reading((found(), found(position="right")), "sky"),
        NOTHING,
    )
    usable, weights = Scenes().steerable("colour=red", images, (2, 2))
    assert usable.tolist() == [True, False, False, False]
    np.testing.assert_allclose(weights, [[1, 0.25, 0, 0]] * 2 + [[1] * 4] * 2)
    usable, weights = Scenes().steerable("background=white", images, (2, 2))
    assert usable.tolist() == [True, True, False, False]
    np.testing.assert_allclose(weights[0], [0, 0.75, 1, 1])


def test_outcomes_worked_by_hand(images_of):
    start = Reading((found(colour="blue"),), "sky")
    before = images_of(*[start] * 4, NOTHING)
    after = images_of(
        Reading((found(),), "sky"),
        Reading((found(shape="cross", position="right"),), "sky"),
        start,
        NOTHING,
        NOTHING,
    )
    got = Scenes().outcome("colour=red", before, after)
    assert got["success"].tolist() == [True, True, False, False, False]
    np.testing.assert_allclose(got["kept"], [1, 0.6, 1, 0, 0])
    assert got["kept shape"].tolist() == [True, False, True, False, False]
    assert got["kept background"].tolist() == [True, True, True, False, False]
    assert set(got) == {"success", "kept"} | {
        f"kept {a}" for a in ("shape", "size", "texture", "position", "background")
    }
    assert got["success"].dtype == got["kept shape"].dtype == bool


def test_repainting_an_object_succeeds_and_keeps_all_else():
    scenes = [one(), one("square", "blue", "small", "striped", "top")]
    green = [Scene((replace(s.objects[0], colour="green"),), s.background) for s in scenes]
    got = Scenes().outcome("colour=green", drawn(*scenes), drawn(*green))
    assert got["success"].tolist() == [True, True] and got["kept"].tolist() == [1, 1]
    assert Scenes().has("colour=green", drawn(*scenes, *green)).tolist() == [False] * 2 + [True] * 2


def test_no_images_have_no_outcome_and_no_labels():
    none = drawn()
    assert Scenes().has("colour=red", none).shape == (0,)
    assert Scenes().outcome("colour=red", none, none)["kept"].shape == (0,)
    assert Scenes().labels([], none, (2, 2)).at_tokens().shape == (0, 4, 26)


@pytest.mark.parametrize("target", ["colour=pink", "colour", "", "word=dog", "size=red"])
@pytest.mark.parametrize("method", ["has", "outcome", "steerable"])
def test_an_unknown_target_is_refused(target, method):
    more = {"has": (), "outcome": (drawn(),), "steerable": ((2, 2),)}[method]
    with pytest.raises(ValueError, match=f"target is {target!r}"):
        getattr(Scenes(), method)(target, drawn(), *more)


CAPTION = world.caption(world.EXAMPLE)


@pytest.mark.parametrize(
    "prompts, side, expected",
    [
        ([CAPTION], 64, True),
        ([CAPTION, "a dog"], 64, False),
        ([CAPTION], 32, False),
        ([""], 64, True),
        ([], 64, False),
    ],
)
def test_scenes_describes_captions_with_images_of_the_right_size(prompts, side, expected):
    assert Scenes.describes(prompts, (side, side, 3)) is expected


def test_an_image_is_described_anew_by_what_is_read_in_it(images_of):
    two = Reading((found(), found(position="right", colour="blue", shape="cross")), "sky")
    images = images_of(two, Reading((), "white"), NOTHING)
    red, blue = "a small red solid circle at the left", "a small blue solid cross at the right"
    captions = [f"{red} and {blue} on a sky background", "a white background", ""]
    assert Scenes().redescribed(images) == captions
    assert [world.caption(world.parse(c)) for c in captions] == captions


def test_a_drawing_is_described_as_it_was_asked_for():
    scene = one("square", "green", "small", "striped", "top", "gray")
    assert Scenes().redescribed(drawn(scene)) == [world.caption(scene)]
