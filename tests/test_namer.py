import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.demo import namer, world
from helpers.demo.world import Object, Scene
from helpers.naming.examples import panels

LABELS = ["colour=red", "colour=blue", "background=sky", "shape=circle", "mark=marked"]


def draw(*scenes):
    return world.render(list(scenes), np.random.default_rng(0))


def thing(**changes):
    values = {"shape": "circle", "colour": "red", "size": "large", "texture": "solid"}
    return Object(**values | {"position": "left", "shade": "light", "mark": "plain"} | changes)


PAIR = Scene((thing(), thing(shape="square", colour="blue", position="right")), "sky")


@given(st.dictionaries(st.sampled_from(world.OBJECT_ATTRIBUTES), st.integers(0, 10**6), min_size=1))
def test_a_name_says_values_and_is_read_back(drawn):
    values = {a: world.ATTRIBUTES[a][i % len(world.ATTRIBUTES[a])] for a, i in drawn.items()}
    assert namer.parse(namer.name_of(values)) == values


def test_names_worked_by_hand():
    values = {"position": "top left", "colour": "red", "shade": "dark", "shape": "circle"}
    assert namer.name_of(values) == "dark red circle at the top left"
    assert namer.name_of({"mark": "marked"}) == "marked thing" and namer.name_of({}) == ""
    assert namer.says("dark red circle", "colour=red") and namer.says(
        "sky background", "background=sky"
    )
    assert not namer.says("red circle", "shape=square") and not namer.says("", "colour=red")
    assert namer.parse("sky background") == {"background": "sky"}
    assert sum(map(len, world.ATTRIBUTES.values())) == len(namer.VALUES)  # no word says two things


@pytest.mark.parametrize(
    "name", ["", "thing", "a red cat", "red red thing", "circle red", "background"]
)
def test_what_is_not_in_the_worlds_words_is_refused(name):
    with pytest.raises(ValueError, match="name is .*such as"):
        namer.parse(name)


def test_the_judge_says_whether_one_thing_is_all_that_is_said():
    image = draw(PAIR)[0][0]
    said = {"red circle": 1, "blue square at the right": 1, "sky background": 1}
    said |= {"blue circle": 0, "red thing at the right": 0, "white background": 0}
    assert {name: namer.judge(image, name) for name in said} == said


def test_locating_asks_whether_what_is_lit_is_what_is_said():
    images, masks = draw(PAIR)
    (panel,) = panels(images, masks[:, 0])  # the red circle is lit
    assert namer.locate(panel, "red circle") > 0.95
    assert namer.locate(panel, "blue thing") < 0.2 and namer.locate(panel, "gray background") == 0
    (even,) = panels(images, np.ones((1, 2, 2)))
    assert namer.locate(even, "red circle") == pytest.approx(0.5, abs=0.02)


def test_what_is_lit_is_described_and_not_what_is_beside_it():
    rng = np.random.default_rng(1)
    scenes = world.sample(40, rng)
    images, masks = world.render(scenes, rng)
    first = np.array([s.objects[0].texture == "striped" for s in scenes])
    found = namer.describe(panels(images[first], masks[first][:, 0]))
    assert namer.parse(found["name"])["texture"] == "striped" and "striped" in found["patterns"]
    sky = np.array([s.background == "sky" for s in scenes])
    lit = 1 - masks[sky].sum(1)
    assert namer.describe(panels(images[sky], lit))["name"] == "sky background"


def test_as_an_encoder_the_reader_puts_what_is_shown_near_what_is_said():
    eye = namer.Encoder()
    x = eye.images(draw(PAIR)[0])
    texts = ["red circle", "sky background", "green circle", "white background"]
    near = (eye.texts(texts) @ x[0]).tolist()
    n = int(x.count_nonzero())  # the background and what either thing is: five or more values
    assert n > 5 and near[:2] == pytest.approx([(2 / n) ** 0.5, n**-0.5])
    assert near[2] == pytest.approx(near[0] / 2) and near[3] == 0
    assert eye.images(np.random.default_rng(0).random((1, 64, 64, 3), np.float32)).sum() == 0


def test_nothing_in_common_has_no_name():
    noise = np.random.default_rng(0).random((4, 64, 64, 3), np.float32)
    assert namer.describe(panels(noise, np.ones((4, 4, 4))))["name"] == ""
    assert namer.describe(panels(draw(PAIR)[0], np.zeros((1, 4, 4))))["name"] == ""


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="shape of an image is .*32"):
        namer.judge(np.zeros((32, 32, 3)), "red thing")


@pytest.mark.parametrize("name", ["red circle at the left", "sky background", "dark red thing"])
def test_captions_say_the_name_or_exchange_it(name):
    said = {a: v for a, v in namer.parse(name).items() if a in world.NAMED}
    found = namer.write(name, 6)
    assert namer.write(name, 6) == found != namer.write(name, 6, seed=1)
    for yes, no in zip(found["should"], found["should_not"], strict=True):
        one, other = (world.parse(caption) for caption in (yes, no))
        for attribute in world.NAMED:
            values = [
                getattr(s if attribute == "background" else s.objects[0], attribute)
                for s in (one, other)
            ]
            if attribute in said:
                assert values[0] == said[attribute] != values[1]
            else:
                assert values[0] == values[1]


def test_fine_attributes_alone_cannot_be_asked_for():
    with pytest.raises(ValueError, match="name is 'marked thing'"):
        namer.write("marked thing", 2)


@pytest.fixture(scope="module")
def features():
    return namer.planted(60, LABELS, grid=(9, 7))


def test_planted_features_are_active_where_their_label_is(features):
    assert features.maps.shape == (5, 60, 9, 7) and features.nearest(0) == 1
    assert features.nearest(1) == 0 and features.nearest(4) == 0
    strength = features.maps.max((2, 3)) > 0
    for i in range(12):
        for label, fires in zip(LABELS, strength[:, i]):
            shown = namer.judge(features.images[i], namer.name_of(dict([label.split("=")])))
            assert shown == fires
    with pytest.raises(ValueError, match="label is 'mauve'"):
        namer.planted(1, ["colour=mauve"])


def test_naming_by_reading_is_near_the_oracle_and_far_from_chance(features):
    found = namer.measure(features, n_described=10, n_judged=6)
    assert set(found["names"]) == set(LABELS) and found["named right"].value >= 0.8
    for what in ("random AUC", "hard AUC", "localisation AUC", "random balanced accuracy"):
        reader, oracle, chance = (found[who][what].value for who in ("reader", "oracle", "chance"))
        assert oracle >= 0.95 and reader >= 0.8 and chance <= 0.7, what
