import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from helpers import files
from helpers.run import folder as runs
from helpers.run import report

NAMES = sorted(p.stem for p in runs.NOTEBOOKS.glob("0*.ipynb"))
TINY = {
    "n_train": 5,
    "n_validation": 2,
    "n_test": 3,
    "num_inference_steps": 3,
    "n_keep": 2,
    "batch_size": 4,
    "device": "cpu",
    "hookpoint": "mid_block.attentions.0",
    "store_dtype": "float32",
}


def papermill(folder, notebook, **parameters):
    """Run a notebook as a person would, from a folder of their own; returns the finished process."""
    (folder / "given.yaml").write_text(yaml.safe_dump(parameters))
    source = next(runs.NOTEBOOKS.glob(f"{notebook}_*.ipynb"))
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(source),
        str(folder / f"{notebook}.ipynb"),
        "-f",
        "given.yaml",
        "--no-progress-bar",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Notebooks 01 and 02 with parameters unlike the demo's, in a folder outside the project."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for notebook, parameters in (("01", TINY), ("02", {"ridge_strengths": [0.1, 1.0]})):
        done = papermill(folder, notebook, run=str(folder / "run"), **parameters)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_changed_parameters_reach_the_files_and_the_metrics(tiny_run):
    done = papermill(
        tiny_run, "03", run=str(tiny_run / "run"), k=3, n_latents=32, n_updates=5, sae_batch_size=20
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = files.load_json(tiny_run / "run" / "metrics" / "03_train_residual_sae.json")
    _, record = files.load_tensors(tiny_run / "run" / "sae.safetensors")
    assert (metrics["parameters"]["k"], record["k"], record["n_latents"], record["d_in"]) == (
        3,
        3,
        32,
        2 * 160,
    )
    manifest = files.load_json(tiny_run / "run" / "trajectories" / "manifest.json")
    assert (manifest["steps"], manifest["grid"], manifest["dtype"], len(manifest["prompts"])) == (
        [0, 2],
        [4, 4],
        "float32",
        10,
    )
    assert list((tiny_run / "run" / "figures").glob("*.pdf"))


def test_the_same_parameters_give_the_same_bytes_and_figures(tiny_run, tmp_path):
    for notebook, parameters in (
        ("01", TINY),
        ("02", {"ridge_strengths": [0.1, 1.0]}),
        ("03", {"k": 2, "n_latents": 16, "n_updates": 3, "sae_batch_size": 20}),
    ):
        for run in (tmp_path / "run", *([tiny_run / "run"] if notebook == "03" else [])):
            done = papermill(tmp_path, notebook, run=str(run), **parameters)
            assert done.returncode == 0, done.stderr[-2000:]
    for name in (
        "trajectories/manifest.json",
        "trajectories/shard-00000.safetensors",
        "moments/train.safetensors",
        "predictors.safetensors",
        "sae.safetensors",
    ):
        assert (tmp_path / "run" / name).read_bytes() == (tiny_run / "run" / name).read_bytes(), (
            name
        )
    for notebook in ("02_fit_predictors", "03_train_residual_sae"):
        first, again = (
            files.load_json(run / "run" / "metrics" / f"{notebook}.json")["metrics"]
            for run in (tiny_run, tmp_path)
        )
        assert {k: v for k, v in first.items() if k != "seconds"} == {
            k: v for k, v in again.items() if k != "seconds"
        }


@pytest.mark.parametrize(
    ("notebook", "parameters", "sentence"),
    [
        (
            "01",
            TINY | {"hookpoint": "mid_block.attention.0"},
            "hookpoint 'mid_block.attention.0' is not a module",
        ),
        ("01", TINY | {"steps": [0, 3]}, "step 3 does not exist"),
        ("01", TINY | {"guidance_scale": 2.0, "prompts": "scenes"}, "guidance_scale is 2.0, but"),
        ("01", TINY | {"n_train": 4.5}, "n_train is 4.5; it must be a whole number"),
        ("01", TINY | {"prompts": "empty.txt"}, r"prompts '?.*empty.txt"),
        ("03", {"k": 33, "n_latents": 32}, "k is 33; with n_latents=32 it must lie in 1 to 32"),
        ("03", {"k": 3, "n_latents": 32, "damaged": True}, "predictors.safetensors is damaged"),
        ("04", {}, "latents.json|sae.safetensors does not exist"),
    ],
)
def test_bad_input_fails_with_one_sentence(tiny_run, tmp_path, notebook, parameters, sentence):
    if notebook == "04":  # a run that stopped after 02
        run = tmp_path / "run"
        run.mkdir()
        (run / "trajectories").symlink_to(tiny_run / "run" / "trajectories")
        (run / "predictors.safetensors").symlink_to(tiny_run / "run" / "predictors.safetensors")
    elif parameters.pop("damaged", False):
        run = tmp_path / "run"
        shutil.copytree(tiny_run / "run", run)
        whole = (run / "predictors.safetensors").read_bytes()
        (run / "predictors.safetensors").write_bytes(
            whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
        )
    else:
        run = tiny_run / "run"
    (tmp_path / "empty.txt").write_text("\n")
    done = papermill(tmp_path, notebook, run=str(run), **parameters)
    assert done.returncode != 0
    assert re.search(sentence, done.stderr), done.stderr[-1500:]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_in_order_and_fit_to_publish(name):
    path = runs.NOTEBOOKS / f"{name}.ipynb"
    notebook = json.loads(path.read_text())
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert not any(o["output_type"] == "error" for c in code for o in c["outputs"])
    assert any(c["outputs"] for c in code)
    assert path.stat().st_size <= 700_000
    assert sum("parameters" in c["metadata"].get("tags", []) for c in code) == 1
    assert "papermill" not in notebook["metadata"]
    assert not any("execution" in c["metadata"] or "papermill" in c["metadata"] for c in code)
    text = path.read_text()
    assert str(runs.ROOT) not in text and "/home/" not in text and "it/s]" not in text


@pytest.mark.parametrize(
    "path", sorted((runs.NOTEBOOKS / "parameters").glob("*.yaml")), ids=lambda p: p.stem
)
def test_parameter_files_name_only_parameters_that_exist(path):
    assert runs.load_parameters(path.stem)["run"] == path.stem


def test_demo_parameters_are_the_notebooks_defaults():
    defaults = {
        k: default
        for n in runs.analysis_notebooks()
        for k, (default, _) in runs.parameters_of(n).items()
    }
    for name, value in runs.load_parameters("demo").items():
        assert defaults[name] == value, name


def test_a_name_means_one_thing_in_every_notebook():
    seen: dict[str, tuple] = {}
    for notebook in runs.analysis_notebooks():
        for name, default in runs.parameters_of(notebook).items():
            assert seen.setdefault(name, default) == default, (notebook.stem, name)


def test_readme_results_are_those_of_the_metrics():
    table = report.results_table(
        runs.ROOT / "figures" / "demo" / "metrics", runs.ROOT / "figures" / "demo_model" / "metrics"
    )
    assert table in (runs.ROOT / "README.md").read_text()


def test_readme_shows_files_that_exist():
    readme = (runs.ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", readme):
        assert (runs.ROOT / target).exists(), target


@pytest.fixture(scope="module")
def readme_names():
    """What the README's first code makes."""
    names: dict = {}
    exec(readme_code()[0], names)
    return names


def readme_code():
    return re.findall(r"```python\n(.*?)```", (runs.ROOT / "README.md").read_text(), re.DOTALL)


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

    names = readme_names | {
        "net": Net(),
        "timesteps": torch.linspace(1, 0.02, 50),
        "x": torch.randn(2, 3, 4, 6),
    }
    with torch.no_grad():
        exec(readme_code()[1], names)
    assert names["h"].shape == (2, 5, 24, 3)


def test_readme_bundle_lines_run(tiny_run, monkeypatch):
    done = papermill(
        tiny_run, "03", run=str(tiny_run / "run"), k=3, n_latents=32, n_updates=5, sae_batch_size=20
    )
    assert done.returncode == 0, done.stderr[-2000:]
    code = (
        readme_code()[2]
        .replace(".push_to_hub(", ".save_pretrained(")
        .replace('"sd15"', repr(str(tiny_run / "run")))
    )
    names: dict = {}
    exec(code.replace("you/sd15-residual-sae", str(tiny_run / "bundle")), names)
    assert names["u"].shape == (32, 2, 160)
