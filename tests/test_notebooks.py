import ast
import dis
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
import yaml
from servers import chat, serving

from helpers import files
from helpers.explorer import cards, records
from helpers.run import report
from helpers.run.folder import Run
from helpers.run.parameters import (
    NOTEBOOKS,
    ROOT,
    analysis_notebooks,
    load_parameters,
    parameters_for,
    parameters_of,
)

PATHS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
NAMES = [p.stem for p in PATHS]
README = (ROOT / "README.md").read_text()
TINY = {
    "01": {
        **{"n_train": 5, "n_validation": 2, "n_test": 3, "batch_size": 4, "device": "cpu"},
        **{"num_inference_steps": 3, "n_keep": 2, "hookpoint": "mid_block.attentions.0"},
        **{"store_dtype": "float32", "n_timings": 1},
    },
    "02": {"ridge_strengths": [0.1, 1.0]},
    "03": {"k": 3, "n_latents": 32, "n_updates": 40, "sae_batch_size": 20},
    "04": {"ablate_k": [2], "ablate_n_latents": [16], "ablate_n_keep": [2], "n_replaced": 2},
}


def papermill(folder, notebook, **parameters):
    """Run a notebook as a person would, from a folder of their own; the finished process."""
    (folder / "given.yaml").write_text(yaml.safe_dump(parameters))
    source = next(NOTEBOOKS.glob(f"{notebook}_*.ipynb"))
    where = [str(source), str(folder / f"{notebook}.ipynb"), "-f", "given.yaml"]
    command = [sys.executable, "-m", "papermill", *where, "--no-progress-bar"]
    alike = os.environ | {"OMP_NUM_THREADS": "1"}  # bytes depend on the number of threads
    return subprocess.run(command, cwd=folder, env=alike, capture_output=True, text=True)


def run_here(notebook, **parameters):
    """Run a notebook's cells in this process, which takes no kernel; returns its names."""
    (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
    names: dict = {"In": [f"# Parameters\n{name} = ..." for name in parameters]}
    with matplotlib.rc_context():
        for cell in code_of(path):
            exec(compile(cell.source, path.name, "exec"), names)
            if is_parameters(cell):
                names |= parameters
        plt.close("all")
    return names


def code_of(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


# --- a tiny run ---


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Notebooks 01 to 04 with parameters unlike the demo's, in a folder outside the project."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for notebook, parameters in TINY.items():
        done = papermill(folder, notebook, run=str(folder / "run"), **parameters)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder / "run"


def metrics_of(run, notebook):
    (path,) = (run / "metrics").glob(f"{notebook}_*.json")
    return files.load_json(path)


@pytest.mark.process
def test_changed_parameters_reach_the_files_and_the_metrics(tiny_run):
    given = metrics_of(tiny_run, "03")["parameters"]
    tensors, _ = files.load_tensors(tiny_run / "sae.safetensors")
    assert (given["k"], given["n_latents"]) == (3, 32)
    assert tensors["coder.W_dec"].shape == (32, 2 * 128)
    manifest = files.load_json(tiny_run / "trajectories" / "manifest.json")
    assert (manifest["steps"], manifest["grid"], manifest["dtype"]) == ([0, 2], [4, 4], "float32")
    assert len(manifest["prompts"]) == 10
    assert list((tiny_run / "figures").glob("*.pdf"))


@pytest.mark.process
def test_a_trained_dictionary_explains_more_than_an_untrained_one(tiny_run):
    ev = metrics_of(tiny_run, "04")["metrics"]["ev"]
    for kind in ("residual", "raw"):
        space = {"residual": "residual", "raw": "activation"}[kind]
        assert ev[f"{kind} concat"][space][0] > ev[f"untrained {kind}"][space][0] + 0.1


@pytest.fixture(scope="session")
def names_of_a_run(tmp_path_factory):
    """Notebooks 01 to 03 with the tiny run's parameters, in this process: folder, names left."""
    folder = tmp_path_factory.mktemp("here") / "run"
    names = {n: run_here(n, run=str(folder), **TINY[n]) for n in ("01", "02", "03")}
    return folder, names


@pytest.mark.process
def test_the_same_parameters_give_the_same_bytes_and_figures(tiny_run, names_of_a_run):
    again, _ = names_of_a_run
    for name in (
        *("trajectories/manifest.json", "trajectories/shard-00000.safetensors"),
        *("moments/train.safetensors", "predictors.safetensors"),
    ):
        assert (again / name).read_bytes() == (tiny_run / name).read_bytes(), name
    one, other = (files.load_tensors(run / "sae.safetensors")[0] for run in (tiny_run, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for notebook in ("02", "03"):
        one, other = (metrics_of(run, notebook)["metrics"] for run in (tiny_run, again))
        assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.process
@pytest.mark.parametrize("notebook", ["01", "02", "03"])
def test_every_cell_runs_again_after_all_others(names_of_a_run, notebook):
    """And the figures written then are the same; each cell has a copy of the names left at last."""
    folder, names = names_of_a_run
    (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
    before = metrics_of(folder, notebook)["metrics"]
    with matplotlib.rc_context():
        for cell in code_of(path):
            if not is_parameters(cell):
                exec(compile(cell.source, path.name, "exec"), dict(names[notebook]))
        plt.close("all")
    assert metrics_of(folder, notebook)["metrics"] == before


@pytest.mark.process
def test_a_misspelt_parameter_stops_papermill_with_one_sentence(tmp_path):
    done = papermill(tmp_path, "03", run=str(tmp_path / "run"), n_latent=32)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "'n_latent'" in last and "such as n_latents" in last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("notebook", "parameters", "sentence"),
    [
        ("01", {"n_train": 4.5}, "n_train is 4.5; .*whole number"),
        ("01", {"steps": [0, 3]}, "steps? .*3"),
        ("01", {"prompts": "empty.txt"}, "prompts .*empty.txt"),
        ("01", {"hookpoint": "mid_block.attention.0"}, "hookpoint .*mid_block.attention.0"),
        ("02", {}, "run.*01_collect_trajectories"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(tmp_path, monkeypatch, notebook, parameters, sentence):
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    given = TINY[notebook] | parameters | {"run": str(tmp_path / "run")}
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        run_here(notebook, **given)


@pytest.mark.process
@pytest.mark.parametrize(
    ("notebook", "parameters", "sentence"),
    [
        ("03", {"k": 33}, "k is 33; .*32"),
        ("03", {"damaged": "predictors.safetensors"}, "predictors.safetensors is damaged"),
        ("04", {"damaged": "sae.safetensors"}, "sae.safetensors is damaged"),
        ("05", {"n_examples": 1}, "sae.safetensors does not exist"),
    ],
)
def test_a_bad_size_or_a_damaged_file_is_refused(
    tiny_run, tmp_path, notebook, parameters, sentence
):
    damaged = parameters.pop("damaged", "")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("trajectories", "moments", "predictors.safetensors", "sae.safetensors"):
        if name != damaged and not (notebook == "05" and name == "sae.safetensors"):
            (run / name).symlink_to(tiny_run / name)
    if damaged:
        whole = (tiny_run / damaged).read_bytes()
        (run / damaged).write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        run_here(notebook, **TINY.get(notebook, {}) | parameters | {"run": str(run)})


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_misspelt_parameter_is_refused_before_anything_is_written(tmp_path, path):
    with pytest.raises(ValueError, match="a parameter is 'devise'; .* such as device"):
        run_here(path.stem[:2], run=str(tmp_path / "run"), devise=1)
    assert not (tmp_path / "run").exists()


# --- a model of one's own: grey images, no prompts, nothing that can be labelled ---


@pytest.fixture(scope="module")
def grey_run(tmp_path_factory):
    """Notebooks 01 to 05 on an unconditional model of one channel."""
    import pipelines

    folder = tmp_path_factory.mktemp("grey")
    pipelines.ddpm(channels=1).save_pretrained(folder / "model")
    own = {"model": str(folder / "model"), "prompts": "none", "num_inference_steps": 4}
    for notebook, parameters in TINY.items():
        own_here = own if notebook == "01" else {}
        run_here(notebook, run=str(folder / "run"), **parameters | own_here)
    run_here("05", run=str(folder / "run"), n_examples=2)
    return folder / "run"


@pytest.mark.process
def test_without_labels_steering_tells_what_it_changed_and_calls_nothing_a_success(grey_run):
    small = {"n_steered": 3, "n_targets": 2, "strengths": [2.0, 4.0], "batch_size": 4}
    names = run_here("06", run=str(grey_run), **small)
    assert names["truth"].labels([""], np.zeros((1, 8, 8, 1)), (4, 4)).names == []
    assert names["pool"].images.shape[-1] == 1
    found = metrics_of(grey_run, "06")["metrics"]
    assert set(found["by_region"]["region"]) == {"inside", "outside"}
    assert found["paired"] == found["verdicts"] == {}
    assert {key.split(" | ")[0] for key in found["chosen"]} <= {"cluster 1", "cluster 2"}
    assert all(of["inside"][0] > 0 for of in found["chosen"].values())
    for path in grey_run.rglob("*.json"):
        assert "NaN" not in path.read_text(), path


@pytest.mark.process
def test_without_labels_or_an_autoencoder_companions_have_nothing_to_measure(grey_run):
    names = run_here("09", run=str(grey_run), n_attended=2, n_inverted=2)
    assert names["pairs"] == [] and names["m"] == 0
    found = metrics_of(grey_run, "09")["metrics"]
    assert found["masks"] == found["dense probe"] == found["auroc, less labelled direction"] == {}


@pytest.mark.process
def test_a_state_that_the_explorer_wrote_makes_the_same_image_again(grey_run):
    names = run_here("10", run=str(grey_run))
    assert names["explorer"].state.prompt == "" and names["found"].labels == {}
    first = metrics_of(grey_run, "10")["metrics"]
    assert first["change"]["painted"] > 0 and "strength=4.0" in first["tried"]
    run_here("10", run=str(grey_run), state=first["tried"], example_strength=0.0)
    again = metrics_of(grey_run, "10")["metrics"]
    assert again == first | {"opened": first["tried"]}
    with pytest.raises(ValueError, match="latent is 99; it must be from 0 to 31"):
        run_here("10", run=str(grey_run), state="run/residual/latent=99")


@pytest.mark.process
def test_after_another_training_baselines_are_refused_until_04_has_trained_them_anew(
    grey_run, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(grey_run, folder)
    parameters = parameters_for("06", "demo") | {"run": str(folder)}
    assert Run("06_steering", parameters).baseline("raw concat").coder.k == TINY["03"]["k"]
    run_here("03", run=str(folder), **TINY["03"] | {"k": 2})
    with pytest.raises(ValueError, match="run 04_reconstruction_ablation again"):
        Run("06_steering", parameters).baseline("raw concat")
    run_here("04", run=str(folder), **TINY["04"])
    run = Run("06_steering", parameters)
    assert [run.baseline(f"{kind} one step").coder.k for kind in ("raw", "residual")] == [1, 1]
    assert run.baseline("raw concat").coder.k == 2
    with pytest.raises(ValueError, match="run 05_spatiotemporal_heatmaps again"):
        _ = run.latents


# --- names ---

SMALL_NAMING = {
    **{"n_described": 2, "n_judged": 2, "n_labelled": 3, "n_random": 3, "n_untrained": 2},
    **{"n_planted": 40, "n_examined": 1, "n_prompts": 2, "batch_size": 4, "n_patches": 2},
}


@pytest.fixture(scope="module")
def labelled_run(tmp_path_factory):
    """Notebooks 01 to 05 on the demo model, with enough test images to name features from."""
    folder = tmp_path_factory.mktemp("labelled") / "run"
    more = {"01": {"n_test": 10}, "05": {"n_timed": 0, "n_shuffles": 2, "n_examples": 1}}
    for notebook in ("01", "02", "03", "04", "05"):
        given = TINY.get(notebook, {}) | more.get(notebook, {})
        run_here(notebook, run=str(folder), **given)
    return folder


class Seer:
    """Answers a chat server's questions: names all different, every judgement the same."""

    def __init__(self):
        self.named = 0

    def __call__(self, body):
        text = body["messages"][0]["content"][-1]["text"]
        if "lit regions" in text:
            self.named += 1
            return chat({"patterns": "seen", "name": f"name {self.named}"})
        if "prompts" in text:
            return chat({side: ["one", "two"] for side in ("should", "should_not")})
        return chat({"score": 70})


def ask_server(run, url, **changes):
    """Notebook 11 with a server; its names."""
    given = {"backend": "server", "vlm": "seer", "base_url": url, "n_planted": 0}
    return run_here("11", run=str(run), **SMALL_NAMING | given | changes)


@pytest.mark.process
def test_the_reader_names_planted_features_far_better_than_chance(labelled_run, tmp_path):
    shutil.copytree(labelled_run, run := tmp_path / "run")
    enough = {"n_planted": 100, "n_described": 10, "n_judged": 6}
    run_here("11", run=str(run), **SMALL_NAMING | enough)
    found = metrics_of(run, "11")["metrics"]
    planted = found["planted"]
    assert planted["named right"][0] >= 0.8
    for what in ("random AUC", "hard AUC", "localisation AUC"):
        reader, chance = (planted[who][what][0] for who in ("reader", "chance"))
        assert reader >= 0.85 and reader > chance + 0.15, what
    assert found["spent"] == {} and not (run / "replies").exists()
    for path in run.rglob("*.json"):
        assert "NaN" not in path.read_text(), path


@pytest.mark.process
def test_a_constant_judge_gets_one_half_and_a_second_run_asks_nothing(
    labelled_run, tmp_path, capsys
):
    import encoders

    shutil.copytree(labelled_run, run := tmp_path / "run")
    for part in encoders.parts("siglip"):
        part.save_pretrained(tmp_path / "encoder")
    given = {"price_read": 1.0, "encoder": str(tmp_path / "encoder")}
    with serving((429, {"Retry-After": "0.01"}, ""), Seer()) as server:
        names = ask_server(run, server.url, **given)
        asked, said = len(server.asked), capsys.readouterr().out
        found = metrics_of(run, "11")["metrics"]
        ask_server(run, server.url, **given)
    assert len(server.asked) == asked and metrics_of(run, "11")["metrics"] == found
    spent = sum(of[0] for of in found["spent"].values())
    most = found["expected"]["calls"]
    assert spent == asked - 1 <= most
    assert f"at most: {most:,} calls" in said and said.index("at most") < said.index("have a name")
    assert sum(of[3] for of in found["spent"].values()) == pytest.approx(7e-6 * spent)

    of_names = [of for named in found["named"].values() for k, of in named.items() if " " in k]
    assert {value for value, *_ in of_names} - {None} == {0.5}
    assert found["without a name"] == [] and found["unanswered"] == {}
    assert len(found["examined"]) == 1 and names["together"] == ["one", "two"] * 2
    retrieval = [of["retrieval"][0] for of in found["without a judge"].values() if len(of) == 3]
    assert {0 <= value <= 1 for value in retrieval if value is not None} == {True}

    (kind, latent), of = next(iter(names["named"].items()))
    built = records.build(names["run"])
    assert built.names[latent].text == of.name and kind != "untrained"
    cards.write(built, [latent], tmp_path / "cards")
    pages = [(tmp_path / "cards" / p).read_text() for p in ("index.html", f"latent-{latent}.html")]
    assert all("0.500" in page for page in pages) and of.name in pages[1]


@pytest.mark.process
def test_features_that_nobody_names_are_listed_with_the_reason(labelled_run, tmp_path, capsys):
    shutil.copytree(labelled_run, run := tmp_path / "run")
    refusal, words = chat(None, refusal="I would rather not"), chat("no JSON today")
    with serving(refusal, words, words, words, Seer()) as server:
        names = ask_server(run, server.url)
    said, found = capsys.readouterr().out, metrics_of(run, "11")["metrics"]
    first, second = [f"{kind} {latent}" for kind, latent in names["features"][:2]]
    reasons = {"refused: I would rather not", "no JSON object in 'no JSON today'"}
    assert found["without a name"] == [first, second] and f"{first}, {second}" in said
    assert set(found["unanswered"].values()) == reasons and all(why in said for why in reasons)
    assert found["named"][first]["random AUC"][0] is None
    kept = files.load_json(names["path"])
    assert kept and not {first.split()[-1], second.split()[-1]} & set(kept)


@pytest.mark.process
def test_a_killed_naming_asks_only_for_what_is_missing(labelled_run, tmp_path):
    shutil.copytree(labelled_run, run := tmp_path / "run")
    with serving(*[Seer()] * 7, "hang") as server:
        naming = multiprocessing.get_context("fork").Process(
            target=ask_server, args=(run, server.url)
        )
        naming.start()
        waited = time.monotonic() + 120
        while len(server.asked) < 8 and time.monotonic() < waited and naming.is_alive():
            time.sleep(0.05)
        os.kill(naming.pid, signal.SIGKILL)
        naming.join()
    assert naming.exitcode == -signal.SIGKILL and not (run / "metrics/11_naming.json").exists()
    assert len(list((run / "replies").rglob("*.json"))) == 7
    with serving(Seer()) as server:
        ask_server(run, server.url)
    every = len(list((run / "replies").rglob("*.json")))
    assert len(server.asked) == every - 7 > 0


@pytest.mark.process
def test_outside_the_demo_world_a_language_model_is_asked_and_told_of_rare_features(
    grey_run, capsys
):
    with pytest.raises(
        ValueError, match="^backend is 'reader'; it must be 'server' or 'local' for"
    ):
        run_here("11", run=str(grey_run))
    with serving(Seer()) as server:
        with pytest.raises(ValueError, match="^vlm is ''; it must be the name of a"):
            ask_server(grey_run, server.url, vlm="")
        names = ask_server(grey_run, server.url, latents=[*range(TINY["03"]["n_latents"])])
    assert names["images"].shape[-1] == 1 and names["labels"] == names["examined"] == {}
    assert any(of.name for of in names["named"].values())
    rare = {f"{kind} {i}" for kind, i in names["rare"]}
    assert rare <= set(metrics_of(grey_run, "11")["metrics"]["without a name"])
    assert len(rare) == capsys.readouterr().out.count("fires in fewer than two images")


# --- the notebooks as they stand ---


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_notebook_is_in_order_and_fit_to_publish(path):
    notebook, code = nbformat.read(path, as_version=4), code_of(path)
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert any(c.outputs for c in code)
    assert path.stat().st_size <= 900_000
    assert sum(map(is_parameters, code)) == 1
    assert "papermill" not in notebook.metadata
    assert not any({"execution", "papermill"} & set(c.metadata) for c in code)
    text = path.read_text()
    assert str(ROOT) not in text and "/home/" not in text and "it/s]" not in text


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_notebook_reads_well(path):
    """Short cells of short lines, and much prose.

    The parameters' cell may be as long as it likes: it is a list, one commented line for each.
    """
    cells = nbformat.read(path, as_version=4).cells
    code = [c.source.splitlines() for c in code_of(path) if not is_parameters(c)]
    assert max(map(len, code)) <= 25
    assert statistics.median(map(len, code)) < 10
    assert max(len(line) for lines in code for line in lines) <= 100
    assert sum(c.cell_type == "markdown" for c in cells) >= 0.45 * len(cells)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_notebook_can_be_stepped_through_in_any_state(path):
    """Cells redefine no function, and give no parameter another value, but for `run`."""
    defined, assigned = [], set()
    for cell in code_of(path):
        if not is_parameters(cell):
            tree = ast.parse(cell.source)
            defined += [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
            stored = (n for n in ast.walk(tree) if isinstance(n, ast.Name))
            assigned |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
    assert len(defined) == len(set(defined)) and not set(defined) & assigned
    assert assigned & set(parameters_of(path)) <= {"run"}


@pytest.mark.parametrize("path", PATHS[1:4], ids=NAMES[1:4])
def test_what_a_cell_takes_from_others_was_given_by_one_of_them(path):
    """So cells that are run again, in any order, never hand on a value that means another thing."""
    makers: dict[str, list[int]] = {}
    taken: dict[str, int] = {}
    for i, cell in enumerate(code_of(path)):
        if not is_parameters(cell):
            stored, read = global_names(compile(cell.source, path.name, "exec"))
            for name in stored:
                makers.setdefault(name, []).append(i)
            taken |= dict.fromkeys(read, i)
    assert {name: makers[name] for name in taken if len(makers.get(name, [])) > 1} == {}


def global_names(code):
    """Names that a cell's code stores, and names that it reads before it stores them."""
    stored, read = set(), set()
    for step in dis.get_instructions(code):
        if step.opname == "STORE_NAME":
            stored.add(step.argval)
        elif step.opname in ("LOAD_NAME", "LOAD_GLOBAL") and step.argval not in stored:
            read.add(step.argval)
        elif hasattr(step.argval, "co_code"):  # a function or comprehension
            read |= global_names(step.argval)[1] - stored
    return stored, read


@pytest.mark.parametrize("path", (NOTEBOOKS / "parameters").glob("*.yaml"), ids=lambda p: p.stem)
def test_parameter_files_name_only_parameters_that_exist(path):
    assert load_parameters(path.stem)["run"] == path.stem


def test_demo_parameters_are_the_notebooks_defaults():
    known = [parameters_of(path) for path in analysis_notebooks()]
    defaults = {name: default for k in known for name, (default, _) in k.items()}
    for name, value in load_parameters("demo").items():
        assert defaults[name] == value, name


def test_a_name_means_one_thing_in_every_notebook():
    seen: dict[str, tuple] = {}
    for path in analysis_notebooks():
        for name, default in parameters_of(path).items():
            assert seen.setdefault(name, default) == default, (path.stem, name)


# --- README and results ---


def test_published_results_are_those_of_the_metrics():
    metrics = report.load(ROOT / "figures" / "demo", ROOT / "figures" / "demo_model")
    assert report.findings(metrics) in README
    assert report.tables(metrics) in (ROOT / "figures" / "README.md").read_text()


def test_readme_links_to_files_that_exist():
    for page in (ROOT / name for name in ("README.md", "REPRODUCE.md", "figures/README.md")):
        for target in re.findall(r"\]\(((?!http)[^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_readmes_tree_names_every_file_and_room_at_the_top_of_helpers():
    names = [p.name + "/" * p.is_dir() for p in (ROOT / "helpers").iterdir()]
    for name in names:
        assert name.startswith("__") or f" {name}" in README, name


@pytest.fixture(scope="module")
def readme_names():
    """What the README's first code makes."""
    names: dict = {}
    exec(readme_code()[0], names)
    return names


def readme_code():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_ten_lines_run(readme_names):
    assert readme_names["steered"].shape == readme_names["images"].shape == (6, 64, 64, 3)
    assert abs(readme_names["steered"] - readme_names["images"]).max() > 0.01


def test_readme_own_loop_runs(readme_names):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

        def forward(self, x, t):
            for block in self.blocks:
                x = block(x) * t
            return x

    given = {"net": Net(), "timesteps": torch.linspace(1, 0.02, 50), "x": torch.randn(2, 3, 4, 6)}
    names = readme_names | given
    with torch.no_grad():
        exec(readme_code()[1], names)
    assert names["h"].shape == (2, 5, 24, 3)


@pytest.mark.process
def test_readme_bundle_lines_run(tiny_run, tmp_path):
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    shutil.copytree(tiny_run, run)
    chosen = {"name": "cluster 1", "residual": 3, "raw": 0, "effect": 1.0}
    read = {"sae": files.digest(run / "sae.safetensors")[:16]}
    read["raw concat"] = files.digest(run / "baselines" / "raw_concat.safetensors")[:16]
    found = {"best": {}, "labels": {}, "strongest": [chosen]}
    files.save_json(run / "latents.json", read | found)
    code = readme_code()[2].replace(".push_to_hub(", ".save_pretrained(")
    names: dict = {}
    code = code.replace('"runs/sd15"', repr(str(run)))
    exec(code.replace("you/sd15-residual-sae", str(bundle)), names)
    assert names["u"].shape == (32, 2, 128)
    assert "| [3](features/latent-3.html)" in (bundle / "README.md").read_text()
    page = (bundle / "features" / "latent-3.html").read_text()
    assert "latent 3 of run, residual dictionary" in page and str(tmp_path) not in page
