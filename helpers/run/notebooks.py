"""Executing notebooks 01 to 06 in order, and publishing their outputs, figures and results."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import time
from pathlib import Path

import nbformat
from PIL import Image

from helpers.files import digest, load_json, save_json, save_text
from helpers.run import parameters
from helpers.run.folder import figures_folder, run_folder

HELPERS = Path(__file__).resolve().parents[1]
PNG, WIDGET = "image/png", "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(name: str) -> list[Path]:
    """Run notebooks 01 to 06 with a file of parameters; returns the executed copies.

    A notebook whose code, parameters and files are as its last run left them is skipped. One that
    fails is named, with its error's sentence, in a RuntimeError.
    """
    values = parameters.load_parameters(name)
    run = values.get("run", "demo")
    folder, figures = run_folder(run), figures_folder(run)
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    state, copies = _digest_of_helpers(), []
    for notebook in parameters.analysis_notebooks():
        known = parameters.parameters_of(notebook)
        chosen = {k: v for k, v in values.items() if k in known}
        state = _hash(state, _code(notebook), json.dumps(chosen, sort_keys=True))
        stamp = folder / "done" / f"{notebook.stem}.json"
        copies.append(folder / "notebooks" / notebook.name)
        before = load_json(stamp) if stamp.exists() else {"files": {}}
        print(f"{notebook.stem:28}", end="", flush=True)
        if before.get("state") == state and _intact(before["files"]):
            print("done and intact", flush=True)
            continue
        there, start = _snapshot(folder, figures), time.perf_counter()
        _papermill(notebook, copies[-1], chosen)
        seconds = round(time.perf_counter() - start, 1)
        written = {p for p, t in _snapshot(folder, figures).items() if there.get(p) != t}
        earlier = {Path(p) for p in before["files"]}
        for stale in earlier - written:
            if stale.is_relative_to(figures):  # drawn with other parameters
                stale.unlink(missing_ok=True)
        files = {str(p): digest(p) for p in sorted(written | earlier) if p.exists()}
        save_json(stamp, {"state": state, "files": files, "seconds": seconds})
        print(f"{seconds:6.0f} s", flush=True)
    return copies


def _papermill(notebook: Path, copy: Path, chosen: dict) -> None:
    """Execute one notebook; on a terminal with a bar, which leaves the line as it found it."""
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    options = {
        "cwd": str(parameters.ROOT),
        "kernel_name": "python3",
        "progress_bar": {"desc": notebook.stem, "leave": False} if terminal else False,
        # without it, each kernel warns that what it sends over the loopback device is not encrypted
        "config": Config(KernelManager={"transport_encryption": "auto"}),
    }
    try:
        papermill.execute_notebook(str(notebook), str(copy), chosen, **options)
    except PapermillExecutionError as error:
        print("stopped", flush=True)
        raise RuntimeError(f"{notebook.stem} stopped: {error.evalue or error.ename}") from None
    if terminal:
        print(f"{notebook.stem:28}", end="")  # the bar stood there


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest_of_helpers() -> str:
    """One digest of all that `helpers` consists of: code, styles, the shipped model."""
    files = sorted(p for p in HELPERS.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return _hash(*(f"{p.relative_to(HELPERS)} {digest(p)}" for p in files))


def _code(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "code")


def _intact(files: dict[str, str]) -> bool:
    return all(Path(p).exists() and digest(p) == known for p, known in files.items())


def _snapshot(run: Path, figures: Path) -> dict[Path, int]:
    """When each file of a run was last written, but for stamps and unfinished files."""
    paths = {p for folder in (run, figures) for p in folder.rglob("*") if p.is_file()}
    aside = {p for p in paths if p.name.endswith(".part") or p.is_relative_to(run / "done")}
    return {p: p.stat().st_mtime_ns for p in paths - aside}


def publish(copies: list[Path]) -> None:
    """Put executed copies' outputs into the committed notebooks, without machine paths and times.

    Raises ValueError, and changes nothing, for a copy of another notebook than the committed one.
    """
    for copy in copies:
        target = parameters.NOTEBOOKS / copy.name
        committed = nbformat.read(target, as_version=4)
        ran = nbformat.read(copy, as_version=4).cells
        ran = [c for c in ran if "injected-parameters" not in c.metadata.get("tags", [])]
        code = [(a, b) for a, b in zip(committed.cells, ran, strict=True) if a.cell_type == "code"]
        for count, (cell, executed) in enumerate(code, 1):
            cell.execution_count = count
            cell.outputs = [_clean(o, count) for o in executed.outputs if _to_keep(o)]
        committed.metadata = nbformat.from_dict(METADATA)
        nbformat.write(committed, target)


def _to_keep(output) -> bool:
    """Whether an output is for readers: no progress bars, which are on stderr, and no widgets."""
    return output.get("name") != "stderr" and WIDGET not in output.get("data", {})


def _clean(output, count: int):
    root = str(parameters.ROOT)
    text = json.dumps(output, ensure_ascii=False).replace(f"{root}/", "").replace(root, ".")
    output = nbformat.from_dict(json.loads(text))
    if "execution_count" in output:
        output.execution_count = count
    if "metadata" in output:
        output.metadata = {k: v for k, v in output.metadata.items() if k == PNG}  # size on screen
    if PNG in output.get("data", {}):
        output.data[PNG] = _smaller(output.data[PNG])
    return output


def _smaller(png: str) -> str:
    """A PNG in base64 with 256 colours at most: under half the size, and no difference is seen."""
    picture, small = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    picture.convert("RGB").quantize(256).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def publish_results(run: str) -> None:
    """Put a run's metrics beside its figures, drop plots not its own, write the result tables."""
    from helpers.run import report

    figures, stamps = figures_folder(run), (run_folder(run) / "done").glob("*.json")
    made = {Path(p) for stamp in stamps for p in load_json(stamp)["files"]}
    for plot in set(figures.glob("*.p??")) - made:
        plot.unlink()  # of an earlier run
    for path in sorted((run_folder(run) / "metrics").glob("0[1-9]_*.json")):
        save_text(figures / "metrics" / path.name, path.read_text())
    report.write(parameters.ROOT, figures, figures_folder("demo_model"))
