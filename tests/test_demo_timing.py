import numpy as np
import pytest

from helpers.demo import judge, reader, timing, world
from helpers.demo.truth import Scenes

NAN = np.nan


def test_first_steps_worked_by_hand():
    probability = np.array(
        [[0.9, 0.1, 0.9, 0.1, NAN], [0.9, 0.8, 0.1, 0.9, NAN], [0.9, 0.9, 0.9, 0.1, NAN]]
    )
    np.testing.assert_array_equal(timing.first_step(probability), [0, 1, 2, NAN, NAN])
    np.testing.assert_array_equal(timing.first_step(probability, 0.85), [0, 2, 2, NAN, NAN])


def test_a_probe_foresees_what_measurements_tell_and_nothing_else():
    rng = np.random.default_rng(0)
    y = rng.choice(["a", "b", "c"], 200)
    telling = np.stack([y == "a", y == "b"], axis=1) + 0.1 * rng.standard_normal((200, 2))
    image = np.arange(200) // 2
    assert timing.probe(telling, y, image).min() > 0.8
    assert timing.probe(rng.standard_normal((200, 2)), y, image).mean() == pytest.approx(
        1 / 3, abs=0.1
    )


def test_no_image_judges_itself():
    """Measurements that tell images apart, and values that are an image's own, at random."""
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(20), 10)
    y = rng.permutation(np.repeat(["a", "b"], 10))[image]
    assert timing.probe(np.eye(20)[image], y, image).mean() < 0.6


def test_a_value_without_an_alternative_is_not_foreseen():
    assert np.isnan(timing.probe(np.zeros((4, 2)), np.array(["a"] * 4), np.arange(4))).all()
    assert np.isnan(timing.probe(np.zeros((2, 2)), np.array(["a", "b"]), np.zeros(2))).all()


@pytest.fixture(scope="module")
def decided():
    """Images whose predictions show others until step 2, and themselves from then on."""
    rng = np.random.default_rng(3)
    scenes = world.sample(240, rng, two=0.2)
    images = world.render(scenes, rng)[0]
    others = world.render(world.sample(240, rng, two=0.2), rng)[0]
    predicted = np.stack([others, others[::-1], images, images])

    def of_batch(pipe, prompts, seeds, **sampling):
        return predicted[:, seeds]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "predicted_images", of_batch)
        found = Scenes().decided(None, [""] * 240, list(range(240)), images, {})
    return found, Scenes().labels([""] * 240, images, (8, 8)), reader.read(images)


@pytest.mark.parametrize("attribute", world.ATTRIBUTES)
def test_every_attribute_is_foreseen_when_it_shows_and_not_before(decided, attribute):
    found, _, _ = decided
    steps = found[attribute][~np.isnan(found[attribute])]
    assert (steps == 2).mean() > 0.6
    assert len(steps) > 100 and (steps < 2).mean() < 0.4  # two values are guessed now and then


def test_steps_are_of_the_things_that_labels_number(decided):
    found, labels, readings = decided
    things = reader.things(readings)
    assert {len(v) for v in found.values()} == {len(labels.has)} == {len(things)}
    background = labels.kind == 1
    assert np.isnan(found["colour"][background]).all()
    assert np.isnan(found["background"][~background]).all()
    circles = labels.has[:, labels.names.index("shape=circle")]
    assert circles.any() and np.isnan(found["turn"][circles]).all()


@pytest.mark.parametrize("attribute", world.NAMED)
def test_an_exchanged_caption_names_another_value_of_one_attribute(attribute):
    scene = world.parse(world.caption(world.EXAMPLE))
    other = timing.exchanged(scene, attribute, np.random.default_rng(0))
    said = reader.judge(other, reader.Reading(scene.objects, scene.background))
    assert said[attribute] == 0
    assert all(said[a] == 1 for a in world.NAMED if a != attribute)


def test_prompts_are_switched_at_each_step_and_what_shows_is_counted(monkeypatch):
    scenes = world.sample(6, np.random.default_rng(1), two=0)

    def switch(pipe, before, after, seeds, step, **sampling):
        assert len(before) <= 4 and sampling == {"num_inference_steps": 9}
        shown = [a if seed >= step else b for b, a, seed in zip(before, after, seeds)]
        return world.render([world.parse(c) for c in shown], np.random.default_rng(0))[0]

    monkeypatch.setattr(timing, "switch_prompts", switch)
    rng = np.random.default_rng(2)
    more = {"batch_size": 4, "num_inference_steps": 9}
    shares = timing.switched(None, scenes, "colour", [0, 2, 9], range(6), rng, **more)
    assert [s.value for s in shares] == pytest.approx([1, 4 / 6, 0])
    assert shares[0].low < 1 and shares[2].high > 0
