import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import SAMPLING

from helpers import files, trajectories
from helpers.run import folder as runs

# --- folders and choices ------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "project"
    (root / "notebooks" / "parameters").mkdir(parents=True)
    monkeypatch.setattr(runs, "ROOT", root)
    monkeypatch.setattr(runs, "NOTEBOOKS", root / "notebooks")
    return root


@pytest.mark.parametrize(
    "run", ["", ".", "..", "...", "a/b", "../up", "a b", "~", "a\n", "a\\b", "*"]
)
def test_bad_run_names_are_refused_by_name(run):
    with pytest.raises(ValueError) as refused:
        runs.run_folder(run)
    assert f"run {run!r} is not a folder name" in str(refused.value)


@pytest.mark.parametrize("run", ["demo", "sd-1.5_k64", "2024", "é"])
def test_a_run_is_a_folder_of_the_project(project, run):
    assert runs.run_folder(run) == project / "runs" / run
    assert runs.figures_folder(run) == project / "figures" / run


def test_an_absolute_run_is_that_folder(tmp_path):
    assert runs.run_folder(str(tmp_path)) == tmp_path
    assert runs.figures_folder(str(tmp_path)) == tmp_path / "figures"


@pytest.mark.parametrize("device", ["gpu", "tpu", "", "CUDA"])
def test_an_unknown_device_is_named_with_those_that_are_here(device):
    with pytest.raises(ValueError, match=f"device '{device}' is not here; valid are 'auto', 'cpu'"):
        runs.choose_device(device)


@pytest.mark.parametrize(
    "cuda, mps, chosen", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device_is_chosen_and_absent_ones_are_refused(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert runs.choose_device("auto") == chosen and runs.choose_device("cpu") == "cpu"
    for device, there in (("cuda:1", cuda), ("mps", mps)):
        if there:
            assert runs.choose_device(device) == device
        else:
            with pytest.raises(ValueError, match=device):
                runs.choose_device(device)


@pytest.mark.parametrize(
    "dtype, auto, expected",
    [
        ("auto", torch.float32, torch.float32),
        ("auto", torch.float16, torch.float16),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float32", torch.float16, torch.float32),
    ],
)
def test_dtypes(dtype, auto, expected):
    assert runs.choose_dtype(dtype, auto) == expected


@pytest.mark.parametrize("dtype", ["float8", "fp16", "", "torch.float32"])
def test_an_unknown_dtype_is_named_with_the_valid_ones(dtype):
    with pytest.raises(
        ValueError, match=f"dtype '{dtype}' is not one of 'auto', 'float32', 'float16', 'bfloat16'"
    ):
        runs.choose_dtype(dtype)


def test_a_pipeline_in_a_folder_is_loaded_as_it_was_saved(pipe, prompts, tmp_path):
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    loaded = runs.load_pipeline(str(tmp_path / "model"), "cpu", "float32")
    images = [trajectories.generate(p, prompts[:1], [0], **SAMPLING) for p in (pipe, loaded)]
    np.testing.assert_allclose(*images, atol=1e-5)
    assert (
        runs.load_pipeline(str(tmp_path / "model"), "cpu", "bfloat16").unet.dtype == torch.bfloat16
    )


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="model '.*empty' could not be loaded .*valid are 'demo'"):
        (tmp_path / "empty").mkdir()
        runs.load_pipeline(str(tmp_path / "empty"), "cpu")


@pytest.mark.parametrize(
    "value, high, right",
    [(1, None, True), (0, None, False), (3, 3, True), (4, 3, False), (float("nan"), None, False)],
)
def test_require_names_what_is_out_of_range(value, high, right):
    if right:
        runs.require("k", value, 1, high)
    else:
        with pytest.raises(ValueError, match=f"k is {value}; it must be at least 1"):
            runs.require("k", value, 1, high)


def test_a_file_made_from_another_version_is_refused(tmp_path):
    path = tmp_path / "p.bin"
    path.write_bytes(b"one")
    made_from = {"predictors": runs.fingerprint(path)}
    runs.require_same(made_from, "predictors", path, "03_train")
    path.write_bytes(b"two")
    for record in (made_from, {}):
        with pytest.raises(ValueError, match="predictors: p.bin has changed.*run 03_train again"):
            runs.require_same(record, "predictors", path, "03_train")


@pytest.mark.parametrize(
    "record, kept", [({"k": 4}, False), ({"k": 5}, True), ({"k": 4, "new": 1}, True)]
)
def test_a_file_made_otherwise_is_moved_aside_not_lost(tmp_path, record, kept):
    path = tmp_path / "sae.safetensors"
    files.save_tensors(path, {"x": torch.ones(2)}, {"k": 4, "seed": 0})
    before = path.read_bytes()
    aside = runs.keep_other(path, record)
    assert (aside is not None) == kept
    assert (aside if kept else path).read_bytes() == before and path.exists() != kept


def test_there_is_nothing_to_keep_of_an_absent_or_damaged_file(tmp_path):
    (tmp_path / "damaged").write_bytes(b"x")
    assert runs.keep_other(tmp_path / "absent", {"k": 1}) is None
    assert runs.keep_other(tmp_path / "damaged", {"k": 1}) is None


def test_metrics_are_written_with_their_parameters_and_versions(project):
    path = runs.write_metrics("r", "02_fit", {"lam": 0.1}, {"ev": [0.5, 0.4, 0.6]})
    assert path == project / "runs" / "r" / "metrics" / "02_fit.json"
    assert files.load_json(path)["metrics"] == {"ev": [0.5, 0.4, 0.6]}
    record = files.load_json(path)
    assert record["parameters"] == {"lam": 0.1} and record["versions"]["numpy"] == np.__version__


def test_the_commit_is_unknown_outside_a_checkout(project):
    assert runs.commit() == "unknown"
    subprocess.run(["git", "init", "-q", project], check=True)
    who = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(
        ["git", "-C", project, *who, "commit", "-q", "--allow-empty", "-m", "x"], check=True
    )
    assert runs.commit() in subprocess.check_output(
        ["git", "-C", project, "rev-parse", "HEAD"], text=True
    )


# --- notebooks ----------------------------------------------------------------------------------


def code(source, *tags, outputs=()):
    metadata = {"tags": list(tags)} if tags else {}
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": metadata,
        "outputs": list(outputs),
        "source": source,
    }


def prose(source):
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def write_notebook(path, cells):
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cells = [c | {"id": f"cell-{i}"} for i, c in enumerate(cells)]
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


FIRST = """
from pathlib import Path
folder = Path("runs") / run
with open("log.txt", "a") as log: log.write("first ")
for name in ("a", "b"):
    if not (folder / name).exists():
        (folder / name).write_text(f"{name} {count}")
"""
SECOND = """
from pathlib import Path
with open("log.txt", "a") as log: log.write("second ")
(Path("runs") / run / "c").write_text((Path("runs") / run / "a").read_text() + scale)
"""


@pytest.fixture
def two_notebooks(project):
    run = 'run: str = "demo"  # run folder\n'
    write_notebook(
        project / "notebooks" / "01_first.ipynb",
        [prose("# One"), code(run + "count: int = 1  # how many", "parameters"), code(FIRST)],
    )
    write_notebook(
        project / "notebooks" / "02_second.ipynb",
        [code(run + 'scale: str = "x"  # unit', "parameters"), code(SECOND)],
    )
    write_notebook(
        project / "notebooks" / "00_model.ipynb",
        [code("other: int = 1", "parameters"), code("raise SystemExit")],
    )
    parameters(project, run="tiny", count=3)
    return project


def parameters(project, name="tiny", **values):
    (project / "notebooks" / "parameters" / f"{name}.yaml").write_text(yaml.safe_dump(values))


def ran(project):
    """Which notebooks ran since the last question."""
    log = project / "log.txt"
    text = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    return text.split()


def test_parameters_are_those_of_the_tagged_cell(two_notebooks):
    first, second = runs.analysis_notebooks()
    assert (first.name, second.name) == ("01_first.ipynb", "02_second.ipynb")
    assert runs.parameters_of(first) == {"run": ("demo", "str"), "count": (1, "int")}
    assert runs.parameters_of(second) == {"run": ("demo", "str"), "scale": ("x", "str")}


KNOWN = {
    "seed": (0, "int"),
    "k": (20, "int"),
    "rate": (0.5, "float"),
    "ship": (False, "bool"),
    "run": ("demo", "str"),
    "also": ({}, "dict"),
    "steps": ([], "list[int]"),
    "strengths": ([1.0], "list[float]"),
    "windows": ([], "list[list]"),
    "show": ([], "list[str]"),
}


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("k", 4.5, "k is 4.5; it must be a whole number, such as 20"),
        ("k", "4", "k is '4'; it must be a whole number"),
        ("k", True, "k is True; it must be a whole number"),
        ("k", None, "k is None; it must be a whole number"),
        ("seed", -1, "seed is -1; it must be a whole number of at least 0"),
        ("rate", "2e-3", "rate is '2e-3'; it must be a finite number, such as 0.5"),
        ("rate", float("nan"), "rate is nan; it must be a finite number"),
        ("rate", False, "rate is False; it must be a finite number"),
        ("ship", "no", "ship is 'no'; it must be true or false"),
        ("ship", 0, "ship is 0; it must be true or false"),
        ("run", 7, "run is 7; it must be a text, such as 'demo'"),
        ("also", [], r"also is \[\]; it must be pairs of name and value"),
        ("steps", 5, "steps is 5; it must be a list with a whole number for each entry"),
        (
            "steps",
            "[0, 4]",
            r"steps is '\[0, 4\]'; it must be a list with a whole number for each entry",
        ),
        ("steps", [0.5], r"steps is \[0.5\]; it must be a list with a whole number"),
        (
            "strengths",
            [float("inf")],
            r"strengths is \[inf\]; it must be a list with a finite number for each entry, such as \[1.0\]",
        ),
        ("windows", [3], r"windows is \[3\]; it must be a list with a list for each entry"),
        (
            "show",
            "colour=red",
            "show is 'colour=red'; it must be a list with a text for each entry",
        ),
    ],
)
def test_a_parameter_of_the_wrong_type_is_named_with_what_would_be_valid(name, value, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        runs.checked({name: value}, KNOWN)


def test_parameters_of_the_right_type_pass_as_they_are():
    values = {
        "seed": 0,
        "k": 1,
        "rate": 2,
        "ship": True,
        "run": "x",
        "also": {"a": 1},
        "steps": [0],
        "strengths": [1, 0.5],
        "windows": [[0, 1]],
        "show": [],
    }
    assert runs.checked(values, KNOWN) == values


def test_every_default_is_of_its_own_type():
    for notebook in [runs.NOTEBOOKS / "00_demo_model.ipynb", *runs.analysis_notebooks()]:
        known = runs.parameters_of(notebook)
        assert runs.checked({k: default for k, (default, _) in known.items()}, known)


def test_a_run_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    known = {
        k: default
        for k, (default, _) in runs.parameters_of(
            runs.NOTEBOOKS / "02_fit_predictors.ipynb"
        ).items()
    }
    assert (
        runs.parameters_here(
            "02_fit_predictors", known | {"run": str(tmp_path / "new"), "other": 1}
        )["seed"]
        == 0
    )
    assert not (tmp_path / "new").exists()
    for run in (str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        with pytest.raises(
            ValueError, match="run is '.*', but .*file is not a folder that can be written in"
        ):
            runs.parameters_here("02_fit_predictors", known | {"run": run})


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a: [", "cannot be read as YAML"),
        ("\ta: 1", "cannot be read as YAML"),
        ("7", "holds 7; it must hold lines"),
        ("3: 4", "no notebook has a parameter 3"),
    ],
)
def test_a_parameter_file_that_is_none_is_told_in_one_sentence(
    two_notebooks, tmp_path, text, sentence
):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"bad.yaml:? {sentence}"):
        runs.load_parameters(str(tmp_path / "bad.yaml"))


def test_a_parameter_file_is_found_by_name_and_by_path(two_notebooks, tmp_path):
    assert runs.load_parameters("tiny") == {"run": "tiny", "count": 3}
    (tmp_path / "mine.yaml").write_text("scale: y\n")
    assert runs.load_parameters(str(tmp_path / "mine.yaml")) == {"scale": "y"}
    (tmp_path / "nothing.yaml").write_text("# only a comment\n")
    assert runs.load_parameters(str(tmp_path / "nothing.yaml")) == {}


@pytest.mark.parametrize("name, near", [("cuont", "count"), ("sclae", "scale"), ("other", None)])
def test_a_parameter_no_notebook_has_is_named_with_the_nearest(two_notebooks, name, near):
    parameters(two_notebooks, **{"run": "tiny", name: 1})
    with pytest.raises(
        ValueError,
        match=f"tiny.yaml: no notebook has a parameter '{name}'; did you mean .*{near or ''}",
    ):
        runs.load_parameters("tiny")


def test_a_missing_parameter_file_is_named_with_those_there(two_notebooks):
    with pytest.raises(ValueError, match="tny.yaml; valid are tiny"):
        runs.load_parameters("tny")


def test_execute_skips_what_is_done_and_runs_again_what_was_damaged(two_notebooks, capsys):
    project, folder = two_notebooks, two_notebooks / "runs" / "tiny"
    copies = runs.execute("tiny")
    assert copies == [folder / "notebooks" / name for name in ("01_first.ipynb", "02_second.ipynb")]
    assert ran(project) == ["first", "second"]
    assert (folder / "c").read_text() == "a 3x"

    assert runs.execute("tiny") == copies
    assert ran(project) == []
    assert capsys.readouterr().out.count("done and intact") == 2

    (folder / "b").unlink()
    runs.execute("tiny")
    assert ran(project) == ["first"]

    (folder / "a").unlink()  # not rewritten in the last run, and still the first notebook's
    runs.execute("tiny")
    assert ran(project) == ["first"] and (folder / "a").read_text() == "a 3"

    (folder / "c").write_text("damaged")
    runs.execute("tiny")
    assert ran(project) == ["second"] and (folder / "c").read_text() == "a 3x"


def test_execute_runs_again_what_a_parameter_touches(two_notebooks):
    project = two_notebooks
    runs.execute("tiny")
    ran(project)
    parameters(project, run="tiny", count=3, scale="y")
    runs.execute("tiny")
    assert ran(project) == ["second"]
    notebook = project / "notebooks" / "01_first.ipynb"
    write_notebook(
        notebook,
        [
            c | {"source": c["source"] + "\nnew = 1"}
            for c in json.loads(notebook.read_text())["cells"]
        ],
    )
    runs.execute("tiny")
    assert ran(project) == ["first", "second"]


def test_a_plot_of_other_parameters_does_not_stay(two_notebooks):
    project, figures = two_notebooks, two_notebooks / "figures" / "tiny"
    notebook = project / "notebooks" / "02_second.ipynb"
    cells = json.loads(notebook.read_text())["cells"]
    draw = "import pathlib\npathlib.Path('figures/tiny').mkdir(parents=True, exist_ok=True)\npathlib.Path(f'figures/tiny/{scale}.png').write_text('plot')"
    write_notebook(notebook, [*cells, code(draw)])
    for scale in ("x", "y"):
        parameters(project, run="tiny", count=3, scale=scale)
        runs.execute("tiny")
        assert [p.name for p in figures.iterdir()] == [f"{scale}.png"]


def test_a_notebook_that_fails_is_named_and_not_taken_for_done(two_notebooks):
    project = two_notebooks
    notebook = project / "notebooks" / "02_second.ipynb"
    cells = json.loads(notebook.read_text())["cells"]
    write_notebook(notebook, [*cells, code("raise ValueError('scale is x; valid is y')")])
    for expected in (["first", "second"], ["second"]):
        with pytest.raises(RuntimeError, match="^02_second stopped: scale is x; valid is y$"):
            runs.execute("tiny")
        assert ran(project) == expected


@pytest.mark.parametrize("content", ["run: a/b\n", "run: 2024\nwrong: 1\n", "run: ..\n"])
def test_the_shell_tells_a_wrong_parameter_in_one_sentence(two_notebooks, monkeypatch, content):
    (two_notebooks / "notebooks" / "parameters" / "bad.yaml").write_text(content)
    monkeypatch.setattr(sys, "argv", ["runs", "bad"])
    with pytest.raises(SystemExit, match="^error: "):
        runs.main()


def test_a_run_named_by_a_number_is_told_to_be_no_name(two_notebooks, monkeypatch):
    parameters(two_notebooks, "numbered", run=2024)
    monkeypatch.setattr(sys, "argv", ["runs", "numbered"])
    with pytest.raises(SystemExit, match="^error: run 2024"):
        runs.main()


# --- publishing ---------------------------------------------------------------------------------


def output(kind, **fields):
    return {"output_type": kind} | fields


def display(**data):
    return output(
        "display_data",
        data={k.replace("_", "/"): v for k, v in data.items()},
        metadata={"papermill": "now"},
    )


WIDGET = "application/vnd.jupyter.widget-view+json"


def publish(project, outputs, name="01_first.ipynb"):
    """The code cells of a committed notebook once an executed copy with these outputs was published."""
    cells = [prose("# One"), code("count: int = 1", "parameters"), code("look()"), code("count")]
    write_notebook(project / "notebooks" / name, cells)
    stamped = [
        c | {"metadata": c["metadata"] | {"papermill": {"start_time": "2024-01-01T00:00:00"}}}
        for c in cells
    ]
    stamped[2]["outputs"], stamped[2]["execution_count"] = outputs, 7
    injected = code(
        "# Parameters\ncount = 99",
        "injected-parameters",
        outputs=[output("stream", name="stdout", text="injected")],
    )
    write_notebook(project / "copy" / name, [*stamped[:2], injected, *stamped[2:]])
    runs.publish([project / "copy" / name])
    published = json.loads((project / "notebooks" / name).read_text())
    assert [c["source"] for c in published["cells"]] == [c["source"] for c in cells]
    assert [c["metadata"] for c in published["cells"]] == [c["metadata"] for c in cells]
    assert set(published["metadata"]) == {"kernelspec", "language_info"}
    return [c for c in published["cells"] if c["cell_type"] == "code"]


def test_publishing_keeps_what_readers_should_see(project):
    picture = display(image_png="iVBOR", text_plain="<Figure>")
    result = output("execute_result", data={"text/plain": "3 µm"}, metadata={}, execution_count=7)
    cells = publish(project, [output("stream", name="stdout", text=["a line\n"]), picture, result])
    assert [c["execution_count"] for c in cells] == [1, 2, 3]
    stream, shown, value = cells[1]["outputs"]
    assert stream["text"] == ["a line\n"]
    assert shown == picture | {"metadata": {}}
    assert value == result | {"execution_count": 2}


def test_publishing_drops_injected_parameters_stderr_widgets_and_times(project):
    widget = output(
        "display_data", data={WIDGET: {"model_id": "abc"}, "text/plain": "HBox()"}, metadata={}
    )
    noise = [output("stream", name="stderr", text="100%|###| 3 s"), widget]
    assert all(c["outputs"] == [] for c in publish(project, noise))
    text = (project / "notebooks" / "01_first.ipynb").read_text()
    assert not any(
        word in text for word in ("injected", "99", "papermill", "2024-01-01", "model_id", "###")
    )


@pytest.mark.parametrize("root", ["project", "prôjet with space"])
@pytest.mark.parametrize(
    "form", ["saved {}/runs/x.pdf", "PosixPath('{}/runs')", "working in {}", "{}"]
)
def test_publishing_leaves_no_absolute_path_of_the_project(tmp_path, monkeypatch, root, form):
    root = tmp_path / root
    monkeypatch.setattr(runs, "ROOT", root)
    monkeypatch.setattr(runs, "NOTEBOOKS", root / "notebooks")
    text = form.format(root)
    cells = publish(
        root,
        [
            output("stream", name="stdout", text=[text]),
            display(text_plain=text, text_html=[f"<b>{text}</b>"]),
        ],
    )
    outputs = cells[1]["outputs"]
    assert len(outputs) == 2
    assert str(tmp_path) not in json.dumps(outputs, ensure_ascii=False)
    if "runs" in form:
        assert "runs" in outputs[0]["text"][0]


def test_publishing_a_copy_of_another_notebook_is_refused_and_changes_nothing(project):
    write_notebook(project / "notebooks" / "01_first.ipynb", [code("a"), code("b")])
    write_notebook(project / "copy" / "01_first.ipynb", [code("a")])
    before = (project / "notebooks" / "01_first.ipynb").read_bytes()
    with pytest.raises(ValueError):
        runs.publish([project / "copy" / "01_first.ipynb"])
    assert (project / "notebooks" / "01_first.ipynb").read_bytes() == before


def test_publishing_twice_gives_the_same_bytes(project):
    outputs = [output("stream", name="stdout", text=["x"])]
    publish(project, outputs)
    once = (project / "notebooks" / "01_first.ipynb").read_bytes()
    publish(project, outputs)
    assert (project / "notebooks" / "01_first.ipynb").read_bytes() == once
