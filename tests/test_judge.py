from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.demo import figures, judge, reader, world
from helpers.files import load_json
from helpers.measure.metrics import Estimate
from helpers.pipelines.generate import generate
from helpers.pipelines.loading import load_pipeline

DEMO = Path(judge.__file__).parent
ORDER = ("shape", "colour", "size", "texture", "position", "colour_at_place")
ORDER += ("background", "count", "all")  # as tables have them
METRICS = Path(__file__).parents[1] / "figures" / "demo_model" / "metrics" / "00_demo_model.json"


@pytest.fixture(scope="module")
def wanted():
    return judge.scenes_to_judge(16, 0)


@pytest.fixture(scope="module")
def drawn(wanted):
    return world.render(wanted, np.random.default_rng(0))[0]


def test_half_of_the_captions_are_unseen_and_half_held_out_with_one_and_two_objects(wanted):
    members = judge.groups(wanted)
    assert list(members) == [
        (split, kind) for split in ("unseen", "held_out") for kind in ("one object", "two objects")
    ]
    assert [m.sum() for m in members.values()] == [4] * 4 and sum(members.values()).all()
    assert len({world.caption(s) for s in wanted}) == 16
    for (split, kind), m in members.items():
        for scene in np.array(wanted, object)[m]:
            assert world.split(scene) == split
            assert len(scene.objects) == {"one object": 1, "two objects": 2}[kind]
    assert judge.scenes_to_judge(16, 0) == wanted != judge.scenes_to_judge(16, 1)


@pytest.mark.parametrize("n", [0, 6, 1204])
def test_a_number_of_captions_that_cannot_be_is_refused(n):
    with pytest.raises(ValueError, match=f"n_captions is {n}"):
        judge.scenes_to_judge(n, 0)


def test_images_are_made_from_captions_and_judged_by_them(wanted, drawn, monkeypatch):
    def generate_all(pipe, prompts, seeds, batch_size, **sampling):
        assert (seeds, batch_size, sampling["num_inference_steps"]) == (list(range(16)), 5, 3)
        return drawn[[prompts.index(world.caption(s)) for s in wanted]]

    monkeypatch.setattr(judge, "generate_all", generate_all)
    images, readings, judgements = judge.evaluate(
        None, wanted, list(range(16)), 5, num_inference_steps=3
    )
    assert np.array_equal(images, drawn) and len(readings) == 16
    assert set(judgements) == set(judge.NAMES)
    for attribute, shares in judgements.items():  # of what captions do not say, nothing is asked
        assert np.isnan(shares).all() if attribute in world.FINE else (shares == 1).all()
    assert set(judge.estimates(judgements)) == {*judge.NAMES} - {*world.FINE}


def test_drawn_scenes_are_held_to_their_fine_attributes_too(wanted, drawn):
    whole = judge.judge(wanted, reader.read(drawn))
    for attribute, value in (("shade", "light"), ("mark", "marked")):
        assert (whole[attribute] == 1).all()
        other = [
            replace(s, objects=tuple(replace(o, **{attribute: value}) for o in s.objects))
            for s in wanted
        ]
        assert 0 < judge.estimate(judge.judge(other, reader.read(drawn))[attribute]).value < 1


def test_by_chance_each_image_meets_the_next_caption_of_its_group(wanted, drawn):
    readings = reader.read(drawn)
    luck = judge.by_chance(wanted, readings)
    assert (luck["count"] == 1).all()  # groups know how many objects there are
    for members in judge.groups(wanted).values():
        picks = np.nonzero(members)[0]
        for i, caption_of in zip(picks, [*picks[1:], picks[0]]):
            judged = reader.judge(wanted[caption_of], readings[i])
            assert {a: v[i] for a, v in luck.items()} == pytest.approx(judged, nan_ok=True)
    assert luck["all"].mean() < 0.2


def test_aims_are_met_by_the_measured_share(wanted):
    one = np.array([len(s.objects) == 1 for s in wanted])
    judgements = dict.fromkeys(judge.AIMS, np.ones(16))
    judgements |= {"all": np.where(one, 1.0, 0.0), "texture": np.full(16, 0.5)}
    aims = judge.against_aims(judgements, wanted)
    assert aims["all"][0].value == 1 and aims["texture"][0].value == 0.5
    assert {a: met for a, (_, _, met) in aims.items()} == dict.fromkeys(judge.AIMS, True) | {
        "texture": False
    }
    assert aims["shape"][1] == 0.9 and aims["shape"][0].low < 0.9  # an interval may reach below


def test_estimates_by_group_worked_by_hand(wanted):
    shares = np.array([1.0, 0.5, 0.0, 0.5] * 4)
    found = judge.by_group({"shape": shares, "count": np.ones(16)}, wanted)
    for group in found.values():
        assert group["shape"].value == 0.5 and group["shape"].low < 0.5 < group["shape"].high
        assert group["count"].value == 1 and group["count"].low < 0.8  # Wilson, not of zero width


def test_an_estimate_leaves_out_what_captions_leave_open():
    assert judge.estimate(np.array([1, np.nan, 0, np.nan])) == judge.estimate(np.array([1, 0]))
    assert judge.estimate(np.array([0.5, np.nan])).value == 0.5
    given = {"shape": np.array([1, np.nan]), "turn": np.full(2, np.nan)}
    assert list(judge.estimates(given)) == ["shape"]


def test_spread_is_1_for_even_values_and_0_for_one_value():
    readings = [reader.Reading((), b) for b in ("white", "gray", "sky", None)]
    assert judge.spread(readings)["background"] == pytest.approx(1)
    assert judge.spread(readings[:1])["background"] == 0
    assert np.isnan(judge.spread(readings)["shape"])
    drawn = world.render(world.sample(150, np.random.default_rng(0)), np.random.default_rng(0))[0]
    assert min(judge.spread(reader.read(drawn)).values()) > 0.85


def test_predicted_images_become_the_image():
    pipe = load_pipeline(DEMO / "weights", "cpu", "float32")
    prompts = [world.caption(world.EXAMPLE)]
    sampling = {"num_inference_steps": 5, "guidance_scale": 3.0}
    step = pipe.scheduler.step
    predicted = judge.predicted_images(pipe, prompts, [3], **sampling)
    assert pipe.scheduler.step == step
    images = generate(pipe, prompts, [3], **sampling)
    assert predicted.shape == (5, *images.shape) and predicted.dtype == np.float32
    errors = abs(predicted - images).mean((1, 2, 3, 4))
    assert errors[-1] < 0.002 and errors[0] > 0.03


def test_tables_say_percent_with_intervals():
    columns = {"one": {"shape": Estimate(0.5, 0.25, 1), "all": Estimate(*[float("nan")] * 3)}}
    rows = judge.table(columns).splitlines()
    assert [[c.strip() for c in row.strip("|").split("|")] for row in rows[:1] + rows[2:]] == [
        ["attribute", "one"],
        ["shape", "50.0 % [25.0, 100.0]"],
        ["everything at once", "–"],
    ]


def measured():
    """What the committed metrics of notebook 00 say, in the form of a running notebook."""
    record = load_json(METRICS)
    names = ("unseen, one object", "unseen, two objects")
    names += ("held_out, one object", "held_out, two objects")
    found = record["metrics"]
    estimates = {
        which: {
            tuple(g.split(", ")): {a: Estimate(*found[which][g][a]) for a in ORDER} for g in names
        }
        for which in ("quality", "chance")
    }
    aims = {a: found["aims"][a] for a in judge.AIMS}
    aims = {a: (Estimate(*v["measured"]), v["aim"], v["met"]) for a, v in aims.items()}
    return record["parameters"], found, estimates | {"aims": aims}


def test_the_shipped_card_says_what_was_measured():
    parameters, found, results = measured()
    parameters = parameters | {"device": "cpu"}
    card = judge.model_card(parameters, found["seconds"], found["bytes"], results)
    assert card == (DEMO / "weights" / "README.md").read_text()


def test_a_card_names_the_aims_that_are_missed():
    parameters, found, results = measured()
    for name, (estimate, aim, _) in results["aims"].items():
        results["aims"][name] = estimate, aim, name != "all"
    card = judge.model_card(parameters, found["seconds"], found["bytes"], results)
    assert "Aims not met: everything at once." in card and "not met |" in card


def test_quality_bars_leave_out_the_number_of_objects():
    *_, results = measured()
    _, ax = plt.subplots()
    figures.quality_bars(ax, results["quality"], results["chance"], "one object")
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert len(labels) == 8 and "number of objects" not in labels
    widths = [bar.get_width() for bar in ax.patches[:8]]
    unseen = results["quality"]["unseen", "one object"]
    assert widths == [unseen[a].value for a in ORDER if a != "count"]
    plt.close()


@pytest.mark.parametrize(
    "wrong, title", [(None, ""), ([], "✓"), (["shape", "size"], "✗ shape, size")]
)
def test_a_scene_is_shown_with_what_is_wrong(wanted, drawn, wrong, title):
    _, ax = plt.subplots()
    figures.show_scene(ax, drawn[0], wanted[0], wrong)
    assert ax.get_title() == title
    assert ax.get_xlabel().replace("\n", " ") == world.caption(wanted[0])
    plt.close()
