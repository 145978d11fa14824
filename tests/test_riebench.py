import csv
import io
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import some_predictors
from encoders import encoder, parts
from PIL import Image
from stores import tiny_plan
from test_transport import LARGER, LIST

from helpers import coordinates, dictionary, files, sae
from helpers.measure import metrics
from helpers.measure.encoders import Segmenter
from helpers.measure.lpips import LPIPS
from helpers.run import riebench
from helpers.store.collect import collect

SHIPPED = "riebench"


@pytest.fixture(scope="module")
def protocol(pipe, tmp_path_factory):
    """A protocol all of whose files are there: a tiny run, encoder, masks and LPIPS' weights."""
    folder, predictors = tmp_path_factory.mktemp("riebench"), some_predictors(2, 32)
    pipe.save_pretrained(folder / "model")
    about = {"model": str(folder / "model"), "revision": ""}
    collect(tiny_plan(folder / "of" / "trajectories", sampling=LARGER, about=about), pipe)
    torch.manual_seed(0)
    for file, c in (
        ("sae", coordinates.residual(predictors)),
        ("baselines/raw_concat", coordinates.raw(predictors)),
    ):
        made = dictionary.Dictionary(file, c, sae.SAE(64, 24, 6))
        made.save(folder / "of" / f"{file}.safetensors")
    model, processor = parts("clip")
    model.save_pretrained(folder / "clip")
    processor.save_pretrained(folder / "clip")
    files.save_tensors(folder / "lpips.safetensors", LPIPS().state_dict())
    (folder / "masks").mkdir()
    left = Image.fromarray(np.uint8(255 * (np.arange(64) < 24))[None].repeat(64, 0))
    for case in range(1, 9):
        left.save(folder / "masks" / f"c{case}_original.png")
        if case != 7:
            left.save(folder / "masks" / f"c{case}_edited.png")
    given = {
        **{"run": str(folder / "run"), "of": str(folder / "of"), "cases": str(LIST)},
        **{"dictionaries": ["residual concat", "raw concat"], "per_type": 50, "seed": 42},
        **{"features": 3, "choices": ["score"], "strengths": [2.0]},
        **{"encoder": str(folder / "clip"), "masks": str(folder / "masks")},
        **{"lpips": str(folder / "lpips.safetensors")},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(given))
    return riebench.load(str(folder / "tiny.yaml"))


def rows_of(text):
    rows = csv.DictReader(io.StringIO(text))
    return {(r["edit"], r["way"], r["measure"]): r for r in rows}


def test_the_protocol_runs_from_files_and_counts_what_fails(protocol, capsys, monkeypatch):
    path = riebench.run(protocol)
    told = capsys.readouterr().out
    assert "9 cases, 4 images each: 36 images" in told and "2 of 9 cases failed" in told
    assert "c7 failed: there is no mask c7_edited.png" in told
    assert "c9 failed: both prompts are the same" in told
    rows = rows_of(path.read_text())
    ways = ["residual concat, score, ×2", "raw concat, score, ×2", "edited prompt"]
    assert list(dict.fromkeys(way for _, way, _ in rows)) == ways
    whole = rows["all", ways[0], "edit efficiency"]
    assert (whole["cases"], whole["failed"]) == ("7", "2")
    parts_of_it = [float(rows["all", ways[0], n]["value"]) for n in riebench.EFFICIENCY]
    assert float(whole["value"]) == pytest.approx(parts_of_it[0] / parts_of_it[1], rel=1e-3)
    assert float(rows["all", "edited prompt", "LPIPS to edited"]["value"]) < 1e-6
    assert {edit for edit, _, _ in rows} == {"all", *riebench.KINDS} - {
        *("change material", "change style")  # of which every case failed
    }
    monkeypatch.setattr(riebench, "scores", lambda *_: pytest.fail("done before"))
    assert riebench.run(protocol, bench=object()).read_text() == path.read_text()


def test_other_settings_are_done_anew(protocol):
    assert riebench._folder(protocol) == riebench._folder(replace(protocol))
    others = [replace(protocol, features=2), replace(protocol, dictionaries=["raw concat"])]
    assert len({riebench._folder(p) for p in (protocol, *others)}) == 3


def test_the_table_worked_by_hand():
    def done(kind, gain, lpips):
        scores = {"a": {"ΔCLIP-T": gain, "LPIPS to original": lpips}}
        return {"case": {"kind": kind}, "scores": scores}

    records = [
        done("change pose", 0.1, 0.2),
        done("change pose", 0.3, 0.6),
        done("add object", 0.2, 0.1),
        {"case": {"kind": "add object"}, "failed": "why"},
    ]
    rows = rows_of(riebench.table(records))
    both = rows["change pose", "a", "edit efficiency"]
    assert (both["value"], both["cases"], both["failed"]) == ("0.5", "2", "0")
    whole = rows["all", "a", "edit efficiency"]
    expected = metrics.ratio([0.1, 0.3, 0.2], [0.2, 0.6, 0.1])
    assert [float(whole[n]) for n in ("value", "low", "high")] == pytest.approx(expected, rel=1e-4)
    assert (whole["cases"], whole["failed"]) == ("3", "1")
    assert rows["add object", "a", "ΔCLIP-T"]["failed"] == "1"
    assert ("delete object", "a", "ΔCLIP-T") not in rows


def test_without_lpips_its_measures_are_left_out():
    record = {"case": {"kind": "change pose"}, "scores": {"a": {"ΔCLIP-T": 0.1}}}
    assert {measure for _, _, measure in rows_of(riebench.table([record]))} == {"ΔCLIP-T"}


def test_the_shipped_protocol_is_that_of_the_paper():
    p = riebench.load(SHIPPED)
    assert (p.seed, p.features, p.strengths, p.per_type) == (42, 80, [2.0], 50)
    assert p.encoder == "openai/clip-vit-large-patch14" and "score" in p.choices
    assert not Path(p.cases).exists()  # it has no licence


@pytest.mark.parametrize(
    "change, words",
    [
        ({"feature": 3}, "a parameter is 'feature'.*features"),
        ({"choices": ["best"]}, "choices is 'best'.*'score', 'random'"),
        ({"strengths": [0.0]}, "strengths is 0.0"),
        ({"seed": "x"}, "seed is 'x'"),
    ],
)
def test_a_wrong_setting_is_refused(protocol, tmp_path, change, words):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(asdict(protocol) | change))
    with pytest.raises(ValueError, match=words):
        riebench.load(str(tmp_path / "p.yaml"))


def test_a_setting_that_is_missing_and_an_absent_file_are_named(protocol, tmp_path):
    given = asdict(protocol)
    del given["masks"]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(ValueError, match="p.yaml: masks is None"):
        riebench.load(str(tmp_path / "p.yaml"))
    with pytest.raises(ValueError, match="'riebenhc'.*riebench"):
        riebench.load("riebenhc")


def test_masks_come_from_a_model_a_folder_or_nowhere(protocol, monkeypatch):
    image = np.random.default_rng(0).random((32, 32, 3), np.float32)
    monkeypatch.setattr(Segmenter, "load", lambda name: encoder("clipseg"))
    found = riebench._segment(replace(protocol, masks="some/model"))(image, "a dog", "c1_edited")
    assert found.tolist() == encoder("clipseg")(image, "a dog").tolist()
    drawn = riebench._segment(protocol)(image, "a dog", "c1_edited")
    assert drawn.shape == (64, 64) and drawn.mean() == 24 / 64
    assert riebench._segment(replace(protocol, masks="")) is None
