import hashlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml

from helpers import files
from helpers.measure import frontier, metrics
from helpers.run import directions, methods, scorecard, sweep
from helpers.run.parameters import ROOT
from helpers.run.scores import ALL, Scores

SHIPPED = yaml.safe_load((ROOT / "notebooks/parameters/sweeps/scorecard.yaml").read_text())


def written(folder, sweep_of="comparison", **changes):
    """The shipped file with changes, elsewhere."""
    given = SHIPPED | {"run": str(folder / "run"), "sweep": sweep_of} | changes
    path = folder / "scorecard.yaml"
    path.write_text(yaml.safe_dump(given))
    return str(path)


# --- the study as it is asked for ---


def test_the_shipped_study_has_the_power_that_the_argument_needs():
    study = scorecard.load("scorecard")
    first = study.studies["frontier"]
    assert len(study.labels) >= 8 and len({t.partition("=")[0] for t in study.labels}) >= 4
    for direction in ("raw", "a=0", "a=1"):
        own = [c for c in first if c.direction == direction]
        assert {c.label for c in own} == set(study.labels)
        assert {c.seed for c in own} == set(range(5)) == set(range(study.trainings))
        assert all(c.images >= 100 and len(c.strengths) >= 8 for c in own)
    draws = [c for c in study.cells if c.direction.startswith("random") and c.way == "add"]
    assert {c.seed for c in draws} == set(range(20))
    assert sum(map(scorecard.n_images, first)) == 4 * 8 * 8 * 100
    assert max(c.images for c in study.cells) <= study.pool


def test_a_budget_cuts_off_trainings_not_directions():
    first = scorecard.load("scorecard").studies["frontier"]
    seeds = [c.seed for c in first]
    assert seeds == sorted(seeds)
    assert len({(c.direction, c.label) for c in first[: len(first) // 5]}) == 4 * 8


@pytest.mark.parametrize(
    ("product", "words"),
    [
        ({"direction": "b=1"}, "coordinates is 'b'"),
        ({"direction": "randm a=1"}, "coordinates is 'randm'"),
        ({"direction": "raw", "way": "push"}, "way is 'push'.*'clamp'"),
        ({"direction": "raw", "window": "never"}, "window is 'never'.*'onset'"),
        ({"direction": "class means", "way": "clamp"}, "direction is 'class means'.*latents"),
        ({"direction": "neurons", "window": "onset"}, "direction is 'neurons'.*latents"),
        ({"direction": "shuffled raw", "way": "remove"}, "direction is 'shuffled raw'"),
        ({"direction": "probe", "way": "remove"}, "direction is 'probe'"),
        ({"num_inference_steps": 10}, "num_inference_steps is 10"),
        ({"num_inference_steps": 1}, "num_inference_steps is 1"),
        ({"images": 3}, "images is 3; it must be from 5 to 600"),
        ({"strenghts": [1.0]}, "'strenghts'.*strengths"),
    ],
)
def test_a_cell_that_cannot_be_is_refused_before_work(tmp_path, product, words):
    with pytest.raises(ValueError, match=words):
        scorecard.load(written(tmp_path, studies={"one": [product]}))


def test_a_condition_is_what_differs_from_the_default():
    default = scorecard.load("scorecard").default
    assert scorecard.condition(replace(default, direction="a=1", seed=3, images=50), default) == ""
    other = replace(default, window="late", way="clamp")
    assert scorecard.condition(other, default) == "way=clamp, window=late"


def test_a_directions_name_is_its_control_and_its_coordinates():
    assert directions.parts_of("random a=1 identity") == ("random", "a=1 identity")
    assert directions.parts_of("a=1 identity") == ("", "a=1 identity")
    assert directions.parts_of("class means") == directions.parts_of("prompt") == ("", "")


# --- a study at smoke size ---

LABELS = ["background=sky", "size=large"]
TWO = {"seeds": 2, "images": 4}
SIZE = {"label": "size=large"}
ONE_OF_EACH = [
    TWO | {"direction": ["raw", "a=1", "random a=1"], "strengths": [1.0, 4.0]},
    {"direction": "class means"},
    SIZE | {"direction": ["matched raw", "shuffled a=1", "probe", "neurons", "prompt"]},
    SIZE | {"direction": "a=1", "strengths": [1e-12]},
    SIZE | {"direction": "a=1", "window": ["late", "onset", "decided"]},
    SIZE | {"direction": "a=1", "way": ["keep norm", "clamp", "together", "subspace"]},
    SIZE | {"direction": "raw", "mode": "residual", "region": "whole image", "branch": "both"},
    SIZE | {"direction": ["class means", "random a=1", "raw"], "way": "remove"},
    SIZE | {"direction": "raw", "way": "remove aligned", "window": "late"},
    SIZE | {"direction": "raw", "num_inference_steps": 5},
]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study: every direction, way and window once, on few images."""
    folder = tmp_path_factory.mktemp("scorecard")
    given = yaml.safe_load((ROOT / "notebooks/parameters/sweeps/comparison.yaml").read_text())
    given["run"] = str(folder / "sweep")
    given["collect"] |= {"n_train": 12, "n_validation": 12, "n_test": 4, "batch_size": 4}
    given["collect"] |= {"also": [], "device": "cpu", "steps": [0, 4, 8], "num_inference_steps": 9}
    given["captions"] = {"open": {"prompts": "scenes"}}
    given["cell"] |= {"n_train": 12, "steps": [0, 4, 8], "n_latents": 32, "k": 3, "n_updates": 6}
    given["studies"] = {}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(given))
    cell = SHIPPED["cell"] | {"seeds": 1, "images": 2, "strengths": [2.0]}
    path = written(
        folder,
        str(folder / "sweep.yaml"),
        **{"dictionary": {"n_train": 12}, "trainings": 2, "pool": 24, "labels": LABELS},
        cell=cell | {"num_inference_steps": 9},
        studies={"all": ONE_OF_EACH},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods.readouts, "usable", lambda labels: LABELS)
        study = scorecard.load(path)
        return study, scorecard.run(study)


@pytest.mark.process
def test_every_direction_way_and_window_can_be_tried(done, capsys):
    study, path = done
    assert Scores(study).done(study.cells) == len(study.cells)
    rows = pd.read_csv(path)
    assert list(rows.columns) == list(scorecard.ROW)
    assert set(rows.direction) == {c.direction for c in study.cells}
    assert (rows.change >= 0).all() and rows["kept 1"].between(0, 1).all()
    sheets = {p.name for p in path.parent.glob("gallery_*.png")}
    assert sheets == {"gallery_background_sky.png", "gallery_size_large.png"}


@pytest.mark.process
def test_trainings_share_no_images_and_directions_share_all(done):
    study, _ = done
    bench = scorecard._bench(study.name)
    of = {
        (c.direction, c.seed): bench.picks(c)
        for c in study.studies["all"]
        if c.label == LABELS[0] and not scorecard.condition(c, study.default)
    }
    assert of["raw", 0] == of["a=1", 0] == of["random a=1", 0]
    assert not set(of["raw", 0]) & set(of["raw", 1])
    assert len(of["raw", 0]) == len(of["raw", 1]) == 2


@pytest.mark.process
def test_nothing_added_changes_nothing_and_something_does(done):
    rows = Scores(done[0]).rows
    nothing = rows[rows.strength < 1e-6]
    assert len(nothing) == 1 and nothing.change.max() < 1e-4
    assert (nothing["success 1"] == 0).all()
    assert (rows[rows.strength > 1e-6].change > nothing.change.max()).all()


@pytest.mark.process
def test_an_image_of_a_cell_is_the_one_that_a_plain_push_makes(done):
    from helpers import steering

    study, _ = done
    bench = scorecard._bench(study.name)
    cell = next(c for c in study.cells if c.direction == "a=1" and c.window == "late")
    lab, picks = bench.lab(cell), bench.picks(cell)
    dictionary, latents = bench.latents(cell)
    pool, store = bench.pool(9), bench.store(9)
    u = dictionary.directions(latents.best[0])
    delta = steering.addition(u, dictionary.coordinates, [0, 4, 8], 9, 2.0)
    weights = bench.run.truth.steerable(cell.label, pool.images, store.grid)[1][picks]
    one = [pool.prompts[picks[0]]], [pool.seeds[picks[0]]], store.tap, delta
    expected = steering.steer(
        bench.pipe,
        *one,
        mask=methods.torch.from_numpy(weights[:1]).float(),
        window=(6, 8),
        **store.sampling,
    )
    found, _ = bench.shown(cell, 2.0, picks)
    np.testing.assert_allclose(found[:1], expected, atol=1e-4)
    record = files.load_json(study.path(cell))["outcomes"]["2"]
    change = abs(found - lab.pool.images[picks]).mean((1, 2, 3))
    np.testing.assert_allclose(record["change"], change, rtol=1e-3, atol=1e-6)


@pytest.mark.process
def test_what_is_done_is_not_done_again_and_a_spent_budget_begins_nothing(done, capsys):
    study, path = done
    before, cell = path.read_text(), study.cells[0]
    record = files.load_json(study.path(cell))
    study.path(cell).unlink()
    path.with_suffix(".json").unlink()  # else the table's own rows would do
    assert scorecard.run(study, budget=0) == path and not study.path(cell).exists()
    assert len(path.read_text()) < len(before)
    files.save_json(study.path(cell), record)
    scorecard.run(study)
    assert "0 are not" in capsys.readouterr().out
    assert path.read_text() == before


@pytest.mark.process
def test_a_table_is_continued_where_its_cells_are_not(done, capsys):
    study, path = done
    before, cells = path.read_text(), study.path(study.cells[0]).parent
    cells.rename(aside := cells.with_name("aside"))
    scorecard.run(study)
    assert ", 0 are not" in capsys.readouterr().out and path.read_text() == before
    files.save_json(path.with_suffix(".json"), {"elsewhere": "other trajectories"})
    scorecard.run(study, budget=0)
    assert len(path.read_text().splitlines()) == 1
    aside.rename(cells)
    scorecard.run(study)
    assert path.read_text() == before


# --- reading the table ---


@pytest.fixture
def study(tmp_path):
    return scorecard.load(written(tmp_path, labels=LABELS, trainings=2))


def table(study, rows):
    """Scores of rows (direction, seed, label, strength, change, gains of both halves, distance)."""
    records = []
    for direction, seed, label, strength, change, gains, *distance in rows:
        of = dict.fromkeys(scorecard.ROW, 0.5) | {"condition": "", "n": 4, "change": change}
        of |= {"direction": direction, "seed": seed, "label": label, "strength": strength}
        of |= {"gain 1": gains[0], "gain 2": gains[1], "distance": (distance or [0.5])[0]}
        records.append(of)
    path = scorecard.run_folder(study.run) / "t.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(records).to_csv(path, index=False)
    return Scores(study, path)


SKY, LARGE = LABELS
ROWS = [
    *[("class means", s, SKY, 1.0, 0.2, (0.6, 0.8)) for s in (0, 1)],
    *[("class means", s, SKY, 2.0, 0.6, (0.5, 0.5)) for s in (0, 1)],
    ("a=1", 0, SKY, 1.0, 0.1, (0.2, 0.4)),
    ("a=1", 0, SKY, 2.0, 0.3, (0.6, 0.2), 1.5),
    ("a=1", 1, SKY, 1.0, 0.2, (0.4, 0.4)),
    ("a=1", 1, SKY, 2.0, 0.4, (0.8, 0.6)),
    ("raw", 0, SKY, 1.0, 0.2, (0.1, 0.1)),
    ("raw", 1, SKY, 1.0, 0.2, (0.3, 0.1)),
    ("random a=1", 0, SKY, 1.0, 0.2, (0.0, 0.0)),
    ("random a=1", 2, SKY, 1.0, 0.4, (0.1, 0.1)),  # held against training 0
]


def test_directions_are_read_at_the_change_of_class_means_at_their_best(study):
    found = table(study, ROWS)
    assert found.levels[SKY] == pytest.approx(0.2) and np.isnan(found.levels[LARGE])
    at = found.at("a=1", 1.0)
    np.testing.assert_allclose(at[:, 0], [(0.3 + 0.4) / 2, 0.4])
    assert np.isnan(at[:, 1]).all()
    np.testing.assert_allclose(found.at("a=1", 0.5)[:, 0], [0.3, 0.2])
    area = frontier.area([0.3, 0.4], [0.1, 0.3], 0.2)
    assert found.area("a=1", 1.0)[0, 0] == pytest.approx(area)


def test_each_half_is_judged_at_the_strength_of_the_other(study):
    found = table(study, ROWS)
    best = found.chosen("a=1")
    # training 0: the second half chooses 1 for the first, the first 2 for the second
    np.testing.assert_allclose(best["gain"][:, 0], [(0.2 + 0.2) / 2, (0.8 + 0.6) / 2])
    np.testing.assert_allclose(best["strength"][:, 0], [1.5, 2.0])
    within = found.chosen("a=1", natural=True)
    np.testing.assert_allclose(within["strength"][:, 0], [1.0, 2.0])
    np.testing.assert_allclose(found.chosen("a=1", among=[1.0])["strength"][:, 0], 1.0)


def test_draws_count_with_the_training_they_are_held_against(study):
    random = table(study, ROWS).curves("random a=1")
    np.testing.assert_allclose(random.means["gain"][:, 0, 0], [0.05, np.nan])
    np.testing.assert_allclose(random.means["change"][0, 0, 0], 0.3)
    assert random.n == 8


def test_differences_are_students_over_trainings_and_corrected(study):
    found = table(study, ROWS)
    ours, raw = found.at("a=1", 1.0), found.at("raw", 1.0)
    rows = found.compared({("a=1", "raw"): (ours, raw)}).set_index("label")
    expected, p = frontier.student(ours[:, 0] - raw[:, 0])
    assert rows.loc[ALL, "value"] == pytest.approx(expected.value)
    assert rows.loc[ALL, ["p", "corrected"]].tolist() == pytest.approx([p, p])
    assert np.isnan(rows.loc[LARGE, "corrected"])


def test_a_share_has_the_wider_interval_of_trainings_and_images(study):
    found = table(study, ROWS)
    none = found.share(np.zeros((2, 2)), 200)
    assert none.low == 0 and none.high == metrics.share(np.zeros(200, bool)).high > 0
    apart = found.share(np.array([[0.2, 0.2], [0.8, 0.8]]), 200)
    assert (apart.low, apart.high) == (0, 1)


def test_a_table_that_lacks_everything_gives_nothing(study, tmp_path):
    found = Scores(study, tmp_path / "none.csv")
    assert not found.has("raw") and found.done(study.cells) == 0
    assert np.isnan(list(found.levels.values())).all()
    assert found.compared({}).empty
    assert np.isnan(found.chosen("raw")["gain"]).all()
    assert np.isnan(found.share(found.chosen("raw")["gain"], 0)).all()


def test_a_cells_file_is_named_by_what_the_cell_is_made_of():
    """Names that changed would make a long sweep begin anew."""
    path = sweep.cell_path("some", {"seed": 1, "steps": (0, 6)})
    expected = hashlib.sha256(b'{"seed": 1, "steps": [0, 6]}').hexdigest()[:16]
    assert path.parts[-2:] == ("cells", f"{expected}.json")
