"""Executing notebooks 01 to 08 in order, and publishing their outputs, figures and results."""

import base64
import hashlib
import io
import json
import sys
import time
from pathlib import Path

import nbformat
import papermill
from PIL import Image
from traitlets.config import Config

from helpers.files import digest, load_json, save_json, save_text
from helpers.run import parameters, report
from helpers.run.folder import figures_folder, run_folder

HELPERS = Path(__file__).resolve().parents[1]
PNG, WIDGET = "image/png", "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(name: str, companions: bool = False) -> list[Path]:
    """Run notebooks 01 to 08, with `companions` the later ones too, and return their copies.

    A notebook whose code, parameters and files are as its last run left them is skipped. One that
    fails is named, with its error's sentence, in a RuntimeError.
    """
    values = parameters.load_parameters(name)
    run = values.get("run", "demo")
    folder, figures = run_folder(run), figures_folder(run)
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    helpers = sorted(p for p in HELPERS.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    state, copies = _hash(*(f"{p.relative_to(HELPERS)} {digest(p)}" for p in helpers)), []
    for notebook in parameters.analysis_notebooks(companions):
        known = parameters.parameters_of(notebook)
        chosen = {k: v for k, v in values.items() if k in known}
        cells = nbformat.read(notebook, as_version=4).cells
        code = "\n\n".join(c.source for c in cells if c.cell_type == "code")
        state = _hash(state, code, json.dumps(chosen, sort_keys=True))
        stamp = folder / "done" / f"{notebook.stem}.json"
        copies.append(folder / "notebooks" / notebook.name)
        before = load_json(stamp) if stamp.exists() else {"state": "", "files": {}}
        earlier = {Path(p): known for p, known in before["files"].items()}
        print(f"{notebook.stem:28}", end="", flush=True)
        intact = all(p.exists() and digest(p) == known for p, known in earlier.items())
        if before["state"] == state and intact:
            print("done and intact", flush=True)
            continue
        there, start = _written(folder, figures), time.perf_counter()
        _papermill(notebook, copies[-1], chosen)
        seconds = time.perf_counter() - start
        written = {p for p, t in _written(folder, figures).items() if there.get(p) != t}
        for stale in earlier.keys() - written:
            if stale.is_relative_to(figures):  # drawn with other parameters
                stale.unlink(missing_ok=True)
        files = {str(p): digest(p) for p in sorted(written | earlier.keys()) if p.exists()}
        save_json(stamp, {"state": state, "files": files})
        print(f"{seconds:6.0f} s", flush=True)
    return copies


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _written(run: Path, figures: Path) -> dict[Path, int]:
    """When each file of a run was last written, but for stamps and unfinished files."""
    paths = {p for folder in (run, figures) for p in folder.rglob("*") if p.is_file()}
    aside = {p for p in paths if p.name.endswith(".part") or p.is_relative_to(run / "done")}
    return {p: p.stat().st_mtime_ns for p in paths - aside}


def _papermill(notebook: Path, copy: Path, chosen: dict) -> None:
    """Execute one notebook; on a terminal with a bar, which leaves the line as it found it."""
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(copy),
            chosen,
            cwd=str(parameters.ROOT),
            kernel_name="python3",
            progress_bar={"desc": notebook.stem, "leave": False} if terminal else False,
            # without it, each kernel warns that the loopback device is not encrypted
            config=Config(KernelManager={"transport_encryption": "auto"}),
            # a kernel may log the interrupt that ends it, as if it had been ours
            extra_arguments=["--log-level=CRITICAL"],
        )
    except papermill.exceptions.PapermillExecutionError as error:
        print("stopped", flush=True)
        raise RuntimeError(f"{notebook.stem} stopped: {error.evalue or error.ename}") from None
    if terminal:
        print(f"{notebook.stem:28}", end="")  # the bar stood there


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
            # progress bars are on stderr, or widgets
            shown = (o for o in executed.outputs if o.get("name") != "stderr")
            cell.outputs = [_clean(o, count) for o in shown if WIDGET not in o.get("data", {})]
        committed.metadata = nbformat.from_dict(METADATA)
        nbformat.write(committed, target)


def _clean(output, count: int):
    root = str(parameters.ROOT)
    text = json.dumps(output, ensure_ascii=False).replace(f"{root}/", "").replace(root, ".")
    output = nbformat.from_dict(json.loads(text))
    if "execution_count" in output:
        output.execution_count = count
    if "metadata" in output:
        output.metadata = {k: v for k, v in output.metadata.items() if k == PNG}  # size on screen
    if PNG in output.get("data", {}):
        # 256 colours: a third of the size, and none is far off, as some are by Pillow's default
        picture, small = Image.open(io.BytesIO(base64.b64decode(output.data[PNG]))), io.BytesIO()
        few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        few.save(small, "png", optimize=True)
        output.data[PNG] = base64.b64encode(small.getvalue()).decode()
    return output


def publish_results(run: str) -> None:
    """Put a run's metrics beside its figures, drop plots not its own, write the result tables."""
    figures, stamps = figures_folder(run), (run_folder(run) / "done").glob("*.json")
    made = {Path(p) for stamp in stamps for p in load_json(stamp)["files"]}
    for plot in set(figures.glob("*.p??")) - made:
        plot.unlink()  # of an earlier run
    for path in sorted((run_folder(run) / "metrics").glob("[0-9][0-9]_*.json")):
        save_text(figures / "metrics" / path.name, path.read_text())
    report.write(parameters.ROOT, figures, figures_folder("demo_model"))
