import subprocess
from dataclasses import asdict
from types import SimpleNamespace

import matplotlib.figure
import nbformat
import numpy as np
import pytest
import torch
from conftest import some_predictors
from encoders import encoder

from helpers import coordinates, files
from helpers.dictionary import untrained
from helpers.measure.encoders import Encoder, Judge
from helpers.measure.lpips import LPIPS
from helpers.run import folder, parameters
from helpers.run.folder import Run
from helpers.training.loop import History, TrainConfig

CELL = 'run: str = "demo"\nk: int = 20\ndevice: str = "auto"\ndtype: str = "auto"\nseed: int = 0'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a notebook `03_train` of a few parameters."""
    root = tmp_path / "project"
    (root / "notebooks").mkdir(parents=True)
    monkeypatch.setattr(parameters, "ROOT", root)
    monkeypatch.setattr(parameters, "NOTEBOOKS", root / "notebooks")
    cell = nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), root / "notebooks" / "03_train.ipynb")
    return root


def namespace(**given):
    return {"run": "tiny", "k": 20, "device": "cpu", "dtype": "auto", "seed": 0} | given


# --- a notebook's start and end ---


def test_a_run_has_its_parameters_folders_device_and_dtype(project):
    run = Run("03_train", namespace(dtype="bfloat16", unrelated=object()))
    assert run.parameters == namespace(dtype="bfloat16") and run.name == "tiny"
    assert run.folder == project / "runs" / "tiny" and run.figures == project / "figures" / "tiny"
    assert run.device == "cpu" and run.dtype == torch.bfloat16
    assert not run.folder.exists()


def test_the_cell_that_makes_it_can_be_run_again(project):
    names = namespace()
    names["run"] = Run("03_train", names)
    names["k"] = 8
    again = Run("03_train", names)
    assert again.name == "tiny" and again.parameters == namespace(k=8)


@pytest.mark.parametrize("given", [{"k": 0}, {"k": 2.5}, {"device": "gpu"}, {"run": "a/b"}])
def test_bad_parameters_are_refused(project, given):
    with pytest.raises(ValueError, match=f"^{next(iter(given))} is "):
        Run("03_train", namespace(**given))


def test_a_misspelt_parameter_is_refused_with_the_nearest_name(project):
    history = ["", CELL, "# Parameters\nsede = 1\n"]
    for seen_again in (history, [*history, "own = 1"]):
        with pytest.raises(ValueError, match="'sede'; .* seed"):
            Run("03_train", namespace(In=seen_again, sede=1, own=1))


def test_a_parameters_cell_that_was_not_run_is_noticed(project):
    with pytest.raises(ValueError, match="^k has no value; run the parameters cell"):
        Run("03_train", {"run": "tiny"})


@pytest.mark.parametrize("below", ["", "below"])
def test_a_run_that_cannot_be_written_is_refused(project, tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="^run: .* cannot be written; .*file is no folder$"):
        Run("03_train", namespace(run=str(tmp_path / "file" / below)))


@pytest.mark.parametrize("what", ["metrics", "metrics/03_train.json"])
def test_metrics_that_cannot_be_written_are_refused_before_the_work(project, monkeypatch, what):
    Run("03_train", namespace()).write({})
    read_only = project / "runs" / "tiny" / what
    monkeypatch.setattr(files.os, "access", lambda path, _: path != read_only)
    with pytest.raises(OSError, match=f"^run: .*metrics cannot be written; {read_only} is read-on"):
        Run("03_train", namespace())


def test_metrics_are_written_with_parameters_and_versions(project, capsys):
    Run("03_train", namespace()).write({"ev": [0.5, 0.4, 0.6]})
    record = files.load_json(project / "runs" / "tiny" / "metrics" / "03_train.json")
    assert record["metrics"] == {"ev": [0.5, 0.4, 0.6]} and record["parameters"] == namespace()
    assert record["versions"]["numpy"] == np.__version__
    assert capsys.readouterr().out == "03_train.json written\n"


def test_a_figure_knows_the_run_that_made_it(project):
    run = Run("03_train", namespace(seed=7))
    run.save(matplotlib.figure.Figure(figsize=(1, 1)), "plot", k=3)
    assert {p.name for p in run.figures.iterdir()} == {"plot.pdf", "plot.png"}
    text = (run.figures / "plot.png").read_bytes()
    for told in (b"03_train", b"tiny", b"7", b"unknown"):
        assert told in text


# --- each file held against what it was made from ---


@pytest.fixture
def written(project):
    """A run with every file that notebooks hand on, as `write(what)` writes it anew."""
    config = TrainConfig(n_latents=8, k=2, n_updates=3)

    def write(what, seed=0):
        run, predictors = Run("03_train", namespace()), some_predictors(seed=seed)
        if what == "trajectories":
            files.save_json(run.path(what), {"seed": seed})
        elif what == "predictors":
            predictors.save(run.path(what), run.made_from("trajectories"))
        elif what == "latents":
            record = run.made_from("dictionary") | run.made_from("raw concat")
            files.save_json(run.path(what), record)
        else:
            of_predictors = run.made_from("predictors") | {"config": asdict(config)}
            of_predictors |= {"history": asdict(History(step=[0, 2], seconds=1.5))}
            record = of_predictors if what == "sae" else run.made_from("dictionary")
            made = untrained(coordinates.raw(predictors), n_latents=8, k=2, seed=seed, name=what)
            made.save(run.path(what), record)

    for what in ("trajectories", "predictors", "sae", "raw concat", "latents"):
        write(what)
    return SimpleNamespace(run=lambda: Run("03_train", namespace()), write=write)


def test_what_was_made_from_one_another_is_read(written):
    run = written.run()
    assert run.path("raw concat") == run.folder / "baselines" / "raw_concat.safetensors"
    assert (run.dictionary.name, run.baseline("raw concat").name) == ("sae", "raw concat")
    assert torch.equal(run.predictors.A, some_predictors().A)
    assert run.dictionary is run.dictionary and run.predictors is run.predictors
    assert run.config == TrainConfig(n_latents=8, k=2, n_updates=3)
    assert run.history.step == [0, 2] and run.history.seconds == 1.5
    assert set(run.latents) == {"predictors", "sae", "raw concat"}


@pytest.mark.parametrize(
    "changed, read, notebook",
    [
        ("trajectories", lambda run: run.predictors, "02"),
        ("predictors", lambda run: run.dictionary, "03"),
        ("predictors", lambda run: run.baseline("raw concat"), "04"),
        ("sae", lambda run: run.baseline("raw concat"), "04"),
        ("sae", lambda run: run.latents, "05"),
        ("raw concat", lambda run: run.latents, "05"),
    ],
)
def test_what_was_made_from_another_version_is_refused(written, changed, read, notebook):
    written.write(changed, seed=1)
    with pytest.raises(ValueError, match=f"has changed.*run {notebook}_\\w+ again"):
        read(written.run())


def test_a_file_that_is_not_there_is_named(written):
    written.run().path("sae").unlink()
    with pytest.raises(FileNotFoundError, match=r"sae\.safetensors"):
        _ = written.run().dictionary


@pytest.mark.parametrize(
    "record, kept", [({"k": 4}, False), ({"k": 5}, True), ({"k": 4, "new": 1}, True)]
)
def test_a_file_made_otherwise_is_moved_aside_not_lost(project, record, kept):
    run, path = Run("03_train", namespace()), project / "sae.safetensors"
    files.save_tensors(path, {"x": torch.ones(2)}, {"k": 4, "seed": 0})
    before = path.read_bytes()
    aside = run.keep_other(path, record)
    assert (aside is not None) == kept
    assert (aside if kept else path).read_bytes() == before and path.exists() != kept


def test_there_is_nothing_to_keep_of_an_absent_or_damaged_file(project):
    run = Run("03_train", namespace())
    (project / "damaged").write_bytes(b"x")
    for name in ("absent", "damaged"):
        assert run.keep_other(project / name, {"k": 1}) is None


# --- folders ---


@pytest.mark.parametrize("run", ["", ".", "...", "a/b", "../up", "a b", "~", "a\n", "a\\b", 2024])
def test_bad_run_names_are_refused(run):
    with pytest.raises(ValueError, match="^run is "):
        folder.run_folder(run)


@pytest.mark.parametrize("run", ["demo", "sd-1.5_k64", "2024", "é"])
def test_a_run_is_a_folder_of_the_project(project, run):
    assert folder.run_folder(run) == project / "runs" / run
    assert folder.figures_folder(run) == project / "figures" / run


def test_an_absolute_run_is_that_folder(tmp_path):
    assert folder.run_folder(str(tmp_path)) == tmp_path
    assert folder.figures_folder(str(tmp_path)) == tmp_path / "figures"


@pytest.mark.process
def test_the_commit_is_unknown_outside_a_checkout(project):
    assert folder.commit() == "unknown"
    subprocess.run(["git", "init", "-q", project], check=True)
    who = ["-c", "user.name=x", "-c", "user.email=x@x"]
    made = ["commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(["git", "-C", project, *who, *made], check=True)
    head = subprocess.check_output(["git", "-C", project, "rev-parse", "HEAD"], text=True)
    assert head.startswith(folder.commit())


@pytest.mark.parametrize(
    "prompts, model, expected",
    [
        (["", ""], "demo", "Scenes"),
        (["", ""], "another/model", "Words"),
        (["", "a red thing"], "another/model", "Scenes"),
        (["", "a dog"], "demo", "Words"),
    ],
)
def test_prompts_without_a_word_are_the_worlds_only_with_its_model(prompts, model, expected):
    store = SimpleNamespace(
        prompts=prompts, manifest={"model": model}, images=lambda *_: np.zeros((1, 64, 64, 3))
    )
    run = SimpleNamespace(store=store, parameters={"judge": ""})
    assert type(Run.truth.func(run)).__name__ == expected


def test_an_encoder_judges_where_the_demo_world_does_not(monkeypatch, tmp_path):
    shown = np.random.default_rng(0).random((4, 40, 40, 3), np.float32)
    store = SimpleNamespace(prompts=["a dog", "a cat"] * 2, manifest={"model": "another/model"})
    store.images, store.prompts_of = (lambda *_: shown), (lambda _: store.prompts)
    files.save_tensors(tmp_path / "w.safetensors", LPIPS().state_dict())
    monkeypatch.setattr(Encoder, "load", lambda name, device: encoder(name))
    given = {"judge": "clip", "lpips": str(tmp_path / "w.safetensors")}
    run = SimpleNamespace(store=store, parameters=given, device="cpu")
    judge = Run.truth.func(run)
    assert isinstance(judge, Judge) and set(judge.auroc) == {"word=dog", "word=cat"}
    assert "LPIPS" in judge.outcome("word=dog", shown, shown)
    run.parameters = given | {"lpips": ""}
    assert "LPIPS" not in Run.truth.func(run).outcome("word=dog", shown, shown)
    store.prompts, store.manifest["model"] = ["", ""], "demo"
    store.images = lambda *_: np.zeros((1, 64, 64, 3))
    assert type(Run.truth.func(run)).__name__ == "Scenes"
