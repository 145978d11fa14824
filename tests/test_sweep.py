import shutil
import subprocess
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from helpers import files
from helpers.measure.labels import Labels
from helpers.run import decided, methods, results, sweep
from helpers.run.parameters import ROOT
from helpers.run.results import Results

CELL = {
    **{"captions": "open", "hookpoint": "a", "n_train": 20, "steps": [0, 6], "n_latents": 16},
    **{"k": 2, "n_updates": 3, "learning_rate": 0.001, "coordinates": "raw", "coder": "sae"},
}
COLLECT = {"hookpoint": "a", "also": ["b"], "n_train": 40, "batch_size": 20, "steps": [0, 6, 12]}


def written(folder, **studies):
    """A file of a sweep with these studies."""
    given = {
        "run": str(folder / "run"),
        "collect": COLLECT,
        "captions": {"open": {"prompts": "scenes"}, "empty": {"prompts": "none", "n_train": 20}},
        "cell": CELL | {"seed": 0},
        "studies": studies,
    }
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump(given))
    return str(path)


def test_studies_are_products_and_no_cell_is_done_twice(tmp_path):
    first = [{"coordinates": ["raw", "a=0"], "seed": [0, 1]}, {"hookpoint": "b"}]
    second = [{"coordinates": "a=0", "steps": [[0, 6], [0, 6, 12]]}]
    found = sweep.load(written(tmp_path, first=first, second=second))
    assert found.default == sweep.Cell(**CELL | {"steps": (0, 6), "seed": 0})
    assert [len(cells) for cells in found.studies.values()] == [5, 2]
    assert len(found.cells) == 6 and found.cells[:5] == found.studies["first"]
    first = [(c.seed, c.coordinates, c.hookpoint) for c in found.cells[:4]]  # by seed, then order
    assert first == [(0, "raw", "a"), (0, "a=0", "a"), (0, "raw", "b"), (1, "raw", "a")]
    assert found.cells[-1] == replace(found.default, coordinates="a=0", steps=(0, 6, 12))
    run = str(tmp_path / "run-open")
    assert found.run_of(found.default) == run
    assert found.run_of(found.cells[2]) == f"{run}-b"
    assert found.collections["empty"]["n_train"] == 20


@pytest.mark.parametrize(
    ("product", "words"),
    [
        ({"coder": "sea"}, "coder is 'sea'.*'sae'"),
        ({"coordinates": "b=1"}, "coordinates is 'b'"),
        ({"coordinates": "a=1 ridges"}, "predictors in coordinates is 'ridges'"),
        ({"coordinates": "a=1 mean identity"}, "coordinates is 'a=1 mean identity'"),
        ({"hookpoint": "c"}, "hookpoint is 'c'.* a, b"),
        ({"steps": [0, 18]}, r"steps is \[0, 18\]"),
        ({"n_train": 30}, "n_train is 30"),
        ({"captions": "empty", "n_train": 40}, "n_train is 40"),
        ({"captions": "none"}, "captions is 'none'.*empty"),
        ({"latents": 3}, "'latents'.*n_latents"),
    ],
)
def test_a_cell_that_cannot_be_is_refused_before_work(tmp_path, product, words):
    with pytest.raises(ValueError, match=words):
        sweep.load(written(tmp_path, study=[{"coordinates": "a=1"}, product]))


def test_an_unknown_sweep_or_parameter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'comparisn'.*comparison"):
        sweep.load("comparisn")
    path = tmp_path / "wrong.yaml"
    path.write_text(open(written(tmp_path)).read().replace("n_train: 40", "n_trian: 40"))
    with pytest.raises(ValueError, match="'n_trian'"):
        sweep.load(str(path))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_table_of_the_shipped_study_is_not_ignored_by_git():
    table = sweep.csv_of(sweep.load("comparison"))
    assert subprocess.run(["git", "check-ignore", "-q", table], cwd=ROOT).returncode == 1


def test_the_shipped_study_has_the_cells_that_carry_the_argument():
    found = sweep.load("comparison")
    first = found.studies["exponent"]
    for coordinates in ("raw", "a=0", "a=0.5", "a=1"):
        seeds = {c.seed for c in first if (c.coordinates, c.coder) == (coordinates, "sae")}
        assert len(seeds) >= 5
    assert len({c.hookpoint for c in found.studies["layers"]} | {found.default.hookpoint}) == 3


# --- a sweep at smoke size ---


def smoke(folder):
    """The shipped study, each of its methods once, on few images of the demo model."""
    path = ROOT / "notebooks" / "parameters" / "sweeps" / "comparison.yaml"
    given = yaml.safe_load(path.read_text())
    given["run"] = str(folder / "run")
    given["collect"] |= {"n_train": 8, "n_validation": 8, "n_test": 8, "batch_size": 4}
    given["collect"] |= {"also": [], "device": "cpu", "steps": [0, 12, 24]}
    given["captions"] = {"open": {"prompts": "scenes"}}
    small = {"n_train": 8, "steps": [0, 12, 24], "n_latents": 32, "k": 3, "n_updates": 6}
    given["cell"] |= small
    methods_of = {
        tuple(sorted({"coordinates": c.coordinates, "coder": c.coder}.items()))
        for c in sweep.load("comparison").cells
    }
    one_each = [dict(pairs) for pairs in sorted(methods_of)]
    given["studies"] = {"methods": one_each, "seeds": [{"seed": [0, 1]}]}
    (folder / "smoke.yaml").write_text(yaml.safe_dump(given))
    return str(folder / "smoke.yaml")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished sweep, with captions of one sort, so that labels have enough images."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods.readouts, "usable", lambda labels: ["background=sky", "size=large"])
        found = sweep.load(smoke(folder))
        return found, sweep.run(found)


@pytest.mark.process
def test_every_method_of_the_study_can_be_trained_and_measured(done):
    found, path = done
    rows = pd.read_csv(path)
    assert list(rows.columns) == [*asdict(found.default), *sweep.ROW]
    assert Results(path, found.default).done(found.cells) == len(found.cells)
    trained = rows[rows.coder != "ceiling"]
    steps = decided.read(methods.run_of(found.run_of(found.default)))
    assert set(steps) > {"colour", "phase"} and all(0 <= v <= 24 for v in steps["colour"] if v == v)
    for readout in ("ev", "ev, residual space", "auroc", "neighbour ev", "numbers"):
        assert len(trained[trained.readout == readout]) == len(found.cells) - 1, readout
    ev = rows[rows.readout == "ev"].set_index(["coordinates", "coder", "seed"]).value
    assert ev["raw", "sae", 0] > ev["raw", "untrained", 0]
    assert ev["raw", "neurons", 0] == pytest.approx(1)
    stable = rows[rows.readout == "stability"]
    assert set(zip(stable.coder, stable.coordinates, stable.seed)) == {
        ("sae", "raw", 0),
        ("sae", "raw", 1),
    }


@pytest.mark.process
def test_what_is_done_is_not_done_again_and_a_spent_budget_begins_nothing(done, capsys, tmp_path):
    found, path = done
    before = path.read_text()
    cell = found.cells[0]
    line = found.path(cell)
    record = files.load_json(line)
    line.unlink()
    path.with_suffix(".json").unlink()  # else the table's own rows would do
    assert sweep.run(found, budget=0) == path and not line.exists()
    assert len(path.read_text()) < len(before)
    files.save_json(line, record)
    sweep.run(found)
    assert "0 are not" in capsys.readouterr().out
    assert path.read_text() == before


@pytest.mark.process
def test_a_table_is_continued_where_its_cells_are_not(done, capsys):
    found, path = done
    before, elsewhere = path.read_text(), path.parent / "elsewhere"
    (found_run := sweep.run_folder(found.run) / "cells").rename(elsewhere)
    assert sweep.run(found) == path and "0 are not" in capsys.readouterr().out
    assert path.read_text() == before
    # one more cell needs its raw counterpart again, to be held against it
    more = replace(found.default, coordinates="a=0", seed=7)
    found.studies["more"] = [more, replace(more, coordinates="raw")]
    assert sweep.run(found) == path and ", 2 are not" in capsys.readouterr().out
    rows = pd.read_csv(path)
    of_more = rows[(rows.seed == 7) & (rows.coordinates == "a=0")].set_index("readout")
    assert of_more.less_raw["ev"] < 0
    # a table of other trajectories is not continued
    files.save_json(path.with_suffix(".json"), {})
    assert sweep.run(found, budget=0) == path
    assert len(path.read_text().splitlines()) < 0.3 * len(before.splitlines())
    del found.studies["more"]
    shutil.rmtree(found_run)
    elsewhere.rename(found_run)
    assert sweep.run(found) == path and path.read_text() == before


def test_evidence_that_comes_when_things_are_decided_is_told_from_evidence_that_does_not():
    n, steps, rng = 80, (0, 6, 12), np.random.default_rng(0)
    first, second = rng.random((2, n)) < 0.5
    has = np.stack([first, ~first, second, ~second], 1)
    labels = Labels(["a=0", "a=1", "b=0", "b=1"], np.arange(n)[:, None], has, np.zeros(n, int))
    hours = {name: rng.choice(steps, n).astype(float) for name in "ab"}
    at = np.stack([hours["a"], hours["a"], hours["b"], hours["b"]], 1)  # (thing, label)
    evidence = torch.from_numpy((at[:, None] == np.array(steps)[:, None]).astype(float))[:, None]
    data = SimpleNamespace(
        **{"labels": {"test": labels}, "steps": steps, "x": {"test": None}, "decided": hours}
    )

    def when(evidence):
        own = SimpleNamespace(evidence=lambda x, latents: evidence[..., latents])
        return methods._when(own, data, {name: i for i, name in enumerate(labels.names)})

    assert when(evidence)["when"].estimate().low > 0.7
    assert abs(when(evidence[rng.permutation(n)])["when"].value) < 0.3
    known = when(evidence)["when, own"].value - when(evidence)["when"].value
    assert abs(known) < 0.3  # what evidence for the other attribute says


# --- reading the table ---


def table(path, rows):
    """A CSV of the default cell with changes, a read-out, its value and low (high is as far)."""
    default = sweep.Cell(**CELL | {"steps": (0, 6), "seed": 0})
    records = []
    for changes, readout, value, half, *less in rows:
        own = asdict(default) | {"steps": "0 6"} | changes
        record = dict(zip(sweep.ROW, (readout, value, value - half, value + half)))
        if less:
            record |= dict(zip(sweep.ROW[4:], (less[0], less[0] - half, less[0] + half)))
        records.append(own | record)
    pd.DataFrame(records, columns=[*asdict(default), *sweep.ROW]).to_csv(path, index=False)
    return Results(path, default)


def test_figures_are_taken_together_over_seeds_and_picked_by_fields(tmp_path):
    found = table(
        tmp_path / "t.csv",
        [
            ({"seed": 0}, "ev", 0.5, 0.1),
            ({"seed": 1}, "ev", 0.7, 0.1),
            ({"coordinates": "a=0", "seed": 0}, "ev", 0.3, 0.1, -0.2),
            ({"k": 4}, "ev", 0.9, 0.1),
            ({}, "auroc", 0.8, 0.1),
        ],
    )
    rows = found.estimates("ev", coordinates=["a=1", "raw", "a=0"])
    assert list(rows.coordinates) == ["raw", "a=0"] and list(rows.seeds) == [2, 1]
    assert rows.value.tolist() == pytest.approx([0.6, 0.3])
    assert rows.high[1] == pytest.approx(0.4) and rows.high[0] > 0.7
    assert found.estimates("ev", k=[2, 4]).value.tolist() == pytest.approx([0.6, 0.9])
    less = found.estimates("ev", less_raw=True, coordinates=["raw", "a=0"])
    assert less[["coordinates", "value"]].values.tolist() == [["a=0", -0.2]]
    shown = found.overview(["ev", "auroc"], ["ev"], coordinates=["raw", "a=0"])
    assert list(shown.columns) == ["ev", "auroc", "ev, less raw"]
    assert shown.loc["a=0"].tolist() == ["0.300 [0.200, 0.400]", "", "-0.200 [-0.300, -0.100]"]


def test_a_table_that_lacks_something_gives_what_it_has(tmp_path):
    default = sweep.Cell(**CELL | {"steps": (0, 6), "seed": 0})
    none = results.Results(tmp_path / "none.csv", default)
    assert none.estimates("ev", coordinates=["raw"]).empty
    assert none.overview(["ev"], coordinates=["raw", "a=0"]).empty
    assert none.done([default]) == 0
