"""Where a run's files live, what every notebook needs at its start and end, and running the notebooks in order.

A run is a folder, `runs/<run>/`: what notebooks hand on to each other, `metrics/<notebook>.json` for the figures they report, and
`notebooks/` for the executed copies. Its plots are in `figures/<run>/`. From the shell:

    python -m helpers.run.folder demo              # run notebooks 01 to 06 with notebooks/parameters/demo.yaml
    python -m helpers.run.folder demo --publish    # and put their outputs into the committed notebooks
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from helpers.files import digest, load_json, load_tensors, save_json

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
DEMO_MODEL = (
    Path(__file__).resolve().parents[1] / "demo" / "weights"
)  # the shipped model, trained by notebook 00


# --- what a notebook needs ----------------------------------------------------------------------


def run_folder(run: str) -> Path:
    """runs/<run> under the project, or the folder itself if `run` is an absolute path."""
    if (
        not isinstance(run, str)
        or not run
        or (not Path(run).is_absolute() and not re.fullmatch(r"[\w.-]+", run))
        or set(run) == {"."}
    ):
        raise ValueError(
            f"run {run!r} is not a folder name; valid are letters, digits, '.', '_' and '-', or an absolute path"
        )
    return ROOT / "runs" / run


def figures_folder(run: str) -> Path:
    """figures/<run> under the project, or `figures` inside the run's folder if that is an absolute path."""
    return run_folder(run) / "figures" if Path(run).is_absolute() else ROOT / "figures" / run


def choose_device(device: str) -> str:
    """'auto' is CUDA, else MPS, else the CPU; anything else must be a device that is there."""
    if device == "auto":
        return (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    kind = device.split(":")[0]
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(kind) or not re.fullmatch(r"\w+(:\d+)?", device):
        raise ValueError(
            f"device {device!r} is not here; valid are 'auto', {', '.join(repr(k) for k, v in there.items() if v)}"
        )
    return device


def choose_dtype(dtype: str, auto: torch.dtype = torch.float32) -> torch.dtype:
    """'float32', 'float16' or 'bfloat16'; 'auto' is what the caller says."""
    named = {
        "auto": auto,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    if dtype not in named:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(map(repr, named))}")
    return named[dtype]


def peak_memory(device: str = "cpu") -> str:
    """The most memory this process has held so far, in words."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    said = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB of memory"
    if str(device).startswith("cuda"):
        said += f", {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on {torch.cuda.get_device_name(device)}"
    return said


def load_pipeline(model: str, device: str = "auto", dtype: str = "auto", revision: str = ""):
    """A diffusers pipeline: 'demo' for the shipped model, else a folder or a name on the Hugging Face hub.

    `dtype` 'auto' is float16 on CUDA and float32 elsewhere; `revision` is a branch, tag or commit on the hub. Weights are
    read from safetensors alone, and no code comes with them.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    device = choose_device(device)
    precision = choose_dtype(dtype, torch.float16 if device.startswith("cuda") else torch.float32)
    options = {"dtype": precision, "use_safetensors": True} | (
        {"revision": revision} if revision else {}
    )
    source = DEMO_MODEL if model == "demo" else model
    try:
        config = DiffusionPipeline.load_config(source, revision=revision or None)
        if "safety_checker" in config:  # it would blacken images; research needs to see them
            options |= {"safety_checker": None, "requires_safety_checker": False}
        pipe = DiffusionPipeline.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"model {model!r} could not be loaded ({reason}); valid are 'demo', a folder, or a hub name, with safetensors weights"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for part in (
        p for p in pipe.components.values() if device == "cpu" and isinstance(p, torch.nn.Module)
    ):
        if not any(
            weight.ndim == 5 for weight in part.parameters()
        ):  # of video, which has no such order
            part.to(memory_format=torch.channels_last)  # convolutions take a seventh less time
    return pipe


def resolved_revision(model: str, revision: str = "") -> str:
    """The commit on the hub that a model's files came from; the given revision where it cannot be told; empty for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if model == "demo" or Path(model).expanduser().exists():
        return ""
    path = try_to_load_from_cache(model, "model_index.json", revision=revision or None)
    return Path(path).parent.name if isinstance(path, str) else revision


def fingerprint(path: str | Path) -> str:
    """First 16 hex digits of a file's SHA-256: what a later file was made from."""
    return digest(path)[:16]


def require_same(made_from: dict, what: str, path: Path, notebook: str) -> None:
    """ValueError if a file was made from another version of `path` than the one that stands there now."""
    if made_from.get(what) != fingerprint(path):
        raise ValueError(
            f"{what}: {path.name} has changed since {notebook} read it; run {notebook} again"
        )


def keep_other(path: Path, record: dict) -> Path | None:
    """Move a file made with another record aside, under a name of its own, so that it is not lost; returns that name."""
    if not path.exists():
        return None
    try:
        before = load_tensors(path)[1]
    except ValueError:  # damaged: nothing to keep
        return None
    if all(before.get(k) == v for k, v in record.items()):
        return None
    aside = path.with_name(f"{path.stem}-{fingerprint(path)[:8]}{path.suffix}")
    path.rename(aside)
    return aside


def require(name: str, value, low, high=None) -> None:
    """ValueError, naming the parameter, unless low <= value (<= high)."""
    if not (low <= value and (high is None or value <= high)):
        raise ValueError(
            f"{name} is {value}; it must be at least {low}"
            + ("" if high is None else f" and at most {high}")
        )


_KINDS = {  # type as written in a parameters cell -> what a value must be, and in words
    "bool": (lambda v: isinstance(v, bool), "true or false"),
    "int": (lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"),
    "float": (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v),
        "a finite number",
    ),
    "str": (lambda v: isinstance(v, str), "a text"),
    "list": (lambda v: isinstance(v, list), "a list"),
    "dict": (
        lambda v: isinstance(v, dict) and all(isinstance(k, str) for k in v),
        "pairs of name and value",
    ),
}


def checked(values: dict, known: dict[str, tuple]) -> dict:
    """Parameters as they are; ValueError for one of another type than its notebook says. `known` is of `parameters_of`."""
    for name, value in values.items():
        default, kind = known[name]
        outer, _, inner = kind.removesuffix("]").partition("[")
        fits, words = _KINDS[outer]
        ok = fits(value) and (not inner or all(_KINDS[inner][0](v) for v in value))
        if not ok or (name == "seed" and value < 0):
            words += (
                f" with {_KINDS[inner][1]} for each entry"
                if inner
                else " of at least 0"
                if name == "seed"
                else ""
            )
            raise ValueError(
                f"{name} is {value!r:.80}; it must be {words}"
                + (f", such as {default!r}" if default not in ("", [], {}) else "")
            )
    return values


def parameters_here(notebook: str, namespace: dict) -> dict:
    """The parameters of the notebook that is running, from its `globals()`: checked, and its folders found fit to write in.

    Raises ValueError for a parameter of the wrong type or a run that cannot be written, before anything is begun.
    """
    known = parameters_of(NOTEBOOKS / f"{notebook}.ipynb")
    values = checked({name: namespace[name] for name in known}, known)
    for folder in (run_folder(values["run"]), figures_folder(values["run"])):
        there = next(p for p in (folder, *folder.parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(
                f"run is {values['run']!r}, but {there} is not a folder that can be written in; give another run, or make it writable"
            )
    return values


def write_metrics(run: str, notebook: str, parameters: dict, metrics: dict) -> Path:
    """Write runs/<run>/metrics/<notebook>.json: the figures a notebook reports, its parameters and the versions."""
    packages = ("torch", "diffusers", "transformers", "numpy", "scikit-learn", "safetensors")
    record = {
        "notebook": notebook,
        "parameters": parameters,
        "metrics": metrics,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
    path = run_folder(run) / "metrics" / f"{notebook}.json"
    save_json(path, record)
    return path


# --- running the notebooks ----------------------------------------------------------------------


def analysis_notebooks() -> list[Path]:
    """Notebooks 01 to 06, in order; 00 trains the demo model and is run on its own."""
    return sorted(NOTEBOOKS.glob("0[1-9]_*.ipynb"))


def load_parameters(name: str) -> dict:
    """notebooks/parameters/<name>.yaml, or a .yaml file by path.

    Raises ValueError for a parameter that no notebook has, naming the nearest one.
    """
    import difflib

    import yaml

    path = (
        Path(name)
        if name.endswith((".yaml", ".yml"))
        else NOTEBOOKS / "parameters" / f"{name}.yaml"
    )
    if not path.exists():
        there = ", ".join(p.stem for p in sorted((NOTEBOOKS / "parameters").glob("*.yaml")))
        raise ValueError(
            f"there is no parameter file {path.name}; valid are {there}, or a path ending in .yaml"
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path.name} cannot be read as YAML ({' '.join(str(error).split())[:160]})"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path.name} holds {values!r:.60}; it must hold lines of name and value, as run: demo"
        )
    known = {p for notebook in analysis_notebooks() for p in parameters_of(notebook)}
    for parameter in values:
        if parameter not in known:
            near = difflib.get_close_matches(str(parameter), known, 3, 0.4) or sorted(known)
            raise ValueError(
                f"{path.name}: no notebook has a parameter {parameter!r}; did you mean {' or '.join(near)}?"
            )
    return values


def parameters_of(notebook: Path) -> dict[str, tuple]:
    """Names, default values and types (as written) of a notebook's parameters cell: name -> (default, type)."""
    import ast

    import papermill

    return {
        k: (ast.literal_eval(v["default"]), v["inferred_type_name"])
        for k, v in papermill.inspect_notebook(str(notebook)).items()
    }


def parameters_for(notebook: str, name: str) -> dict:
    """All parameters of a notebook ('01'), its defaults under those of a parameter file; see `load_parameters`."""
    (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
    known, given = parameters_of(path), load_parameters(name)
    return checked({k: given.get(k, default) for k, (default, _) in known.items()}, known)


def _snapshot(run: Path, figures: Path) -> dict[Path, int]:
    found = [
        p
        for folder in (run, figures)
        for p in folder.rglob("*")
        if p.is_file() and not p.name.endswith(".part")
    ]
    return {p: p.stat().st_mtime_ns for p in found if not p.is_relative_to(run / "done")}


def execute(name: str) -> list[Path]:
    """Run notebooks 01 to 06 with a parameter file; skip each whose code, parameters and outputs are as it left them.

    Returns the executed copies. A notebook that fails is named, with its error's sentence, in a RuntimeError.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    values = load_parameters(name)
    run = values.get("run", "demo")
    folder, figures = run_folder(run), figures_folder(run)
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    code = hashlib.sha256(
        b"".join(p.read_bytes() for p in sorted(Path(__file__).resolve().parents[1].rglob("*.py")))
    ).hexdigest()
    copies = []
    for notebook in analysis_notebooks():
        cells = json.loads(notebook.read_text())["cells"]
        source = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        chosen = {k: v for k, v in values.items() if k in parameters_of(notebook)}
        code = hashlib.sha256(
            json.dumps([code, source, chosen], sort_keys=True).encode()
        ).hexdigest()
        copy, stamp = (
            folder / "notebooks" / notebook.name,
            folder / "done" / f"{notebook.stem}.json",
        )
        copies.append(copy)
        if stamp.exists():
            done = load_json(stamp)
            if done["code"] == code and all(
                (ROOT / p).exists() and digest(ROOT / p) == d for p, d in done["files"].items()
            ):
                print(f"{notebook.stem}: done and intact", flush=True)
                continue
        earlier = (
            set(load_json(stamp)["files"]) if stamp.exists() else set()
        )  # what it wrote before and may now leave as it is
        print(f"{notebook.stem}: running", flush=True)
        before, start = _snapshot(folder, figures), time.perf_counter()
        try:
            papermill.execute_notebook(
                str(notebook),
                str(copy),
                chosen,
                cwd=str(ROOT),
                kernel_name="python3",
                progress_bar=sys.stderr.isatty() or {"mininterval": 15},
            )
        except PapermillExecutionError as error:
            raise RuntimeError(f"{notebook.stem} stopped: {error.evalue or error.ename}") from None
        after = _snapshot(folder, figures)
        written = {
            str(p.relative_to(ROOT) if p.is_relative_to(ROOT) else p)
            for p, t in after.items()
            if before.get(p) != t
        }
        for stale in (ROOT / p for p in earlier - written):
            if stale.is_relative_to(
                figures
            ):  # plots are always drawn anew: this one belongs to other parameters
                stale.unlink(missing_ok=True)
        files = {p: digest(ROOT / p) for p in sorted(written | earlier) if (ROOT / p).exists()}
        save_json(
            stamp, {"code": code, "files": files, "seconds": round(time.perf_counter() - start, 1)}
        )
    return copies


def publish(copies: list[Path]) -> None:
    """Put the outputs of executed copies into the committed notebooks, without anything of the machine or the hour."""
    for copy in copies:
        executed, target = json.loads(copy.read_text()), NOTEBOOKS / copy.name
        committed = json.loads(target.read_text())
        ran = [
            c
            for c in executed["cells"]
            if "injected-parameters" not in c["metadata"].get("tags", [])
        ]
        count = 0
        for cell, shown in zip(committed["cells"], ran, strict=True):
            if cell["cell_type"] == "code":
                count += 1
                cell["execution_count"] = count
                cell["outputs"] = [_clean(o, count) for o in shown["outputs"] if _keep(o)]
        committed["metadata"] = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        target.write_text(json.dumps(committed, indent=1, ensure_ascii=False) + "\n")


def publish_metrics(run: str) -> None:
    """Copy a run's metrics beside its figures, leave only its own plots there, and write the README's results table."""
    from helpers.run import report

    made = {
        ROOT / p
        for stamp in (run_folder(run) / "done").glob("*.json")
        for p in load_json(stamp)["files"]
    }
    for plot in (p for p in figures_folder(run).glob("*.p??") if p not in made):
        plot.unlink()  # of an earlier run
    for path in sorted((run_folder(run) / "metrics").glob("0[1-9]_*.json")):
        save_json(figures_folder(run) / "metrics" / path.name, load_json(path))
    table = report.results_table(
        figures_folder(run) / "metrics", figures_folder("demo_model") / "metrics"
    )
    report.put_into(ROOT / "README.md", table)


def _keep(output: dict) -> bool:
    if output["output_type"] == "stream":
        return output["name"] == "stdout"
    return "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def _clean(output: dict, count: int) -> dict:
    output = json.loads(
        json.dumps(output, ensure_ascii=False).replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    )
    if "execution_count" in output:
        output["execution_count"] = count
    if output["output_type"] != "stream":
        output["metadata"] = {}
    return output


def commit() -> str:
    """The commit of the project's checkout, or 'unknown'; goes into the figures' metadata."""
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.run.folder", description="Run notebooks 01 to 06."
    )
    parser.add_argument(
        "parameters", help="a file in notebooks/parameters, without .yaml, or a path to one"
    )
    parser.add_argument(
        "--publish", action="store_true", help="put the outputs into the committed notebooks"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        copies = execute(arguments.parameters)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if arguments.publish:
        publish(copies)
        publish_metrics(load_parameters(arguments.parameters)["run"])
    print(
        f"finished in {time.perf_counter() - start:.0f} s; executed notebooks are in {copies[0].parent}"
    )


if __name__ == "__main__":
    main()
