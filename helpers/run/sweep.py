"""Notebook 07's study: many dictionaries, each trained and measured as one cell of a table.

    python -m helpers.run.sweep comparison --processes 2 --budget 2400

A file of notebooks/parameters/sweeps says what is collected, and which cells to train, the most
important first. Each cell leaves a small JSON in runs/<run>/cells and is skipped afterwards. What
there is goes into figures/<run>/comparison.csv, a row a cell and read-out: its value with a 95 %
interval over test images, and by how much it exceeds the same cell in raw coordinates. Rows that
are there already, of the very same trajectories, are kept: a table can be continued elsewhere.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import yaml

from helpers.checks import nearest, refuse
from helpers.files import load_json, load_tensors, save_json, save_tensors
from helpers.measure.readouts import Readout, stability
from helpers.run import decided, jobs, methods, parameters, tables
from helpers.run.folder import figures_folder, fingerprint, run_folder
from helpers.run.workers import Workers, command, work_off

ROW = ("readout", "value", "low", "high", "less_raw", "less_low", "less_high")


@dataclass(frozen=True)
class Cell:
    """One dictionary, by all that makes it: a row's first columns."""

    captions: str  # collection, as named in the file
    hookpoint: str
    n_train: int  # images
    steps: tuple[int, ...]  # kept denoising steps
    n_latents: int
    k: int
    n_updates: int
    learning_rate: float
    coordinates: str  # such as "raw", "a=0.5", "a=1 lags=2": see helpers.run.methods
    coder: str
    seed: int  # of the training


@dataclass(frozen=True)
class Sweep:
    """What a file of notebooks/parameters/sweeps asks for."""

    run: str
    collections: dict[str, dict]  # captions -> parameters of notebook 01
    default: Cell  # what studies leave unsaid
    studies: dict[str, list[Cell]]  # name -> its cells; the same cell may be in several

    @property
    def cells(self) -> list[Cell]:
        """All cells, each once, in the order of the studies."""
        return list(dict.fromkeys(itertools.chain.from_iterable(self.studies.values())))

    def run_of(self, cell: Cell) -> str:
        """The run whose trajectories a cell is trained on."""
        p = self.collections[cell.captions]
        runs = {p["hookpoint"]: p["run"]} | {hookpoint: run for run, hookpoint in p["also"].items()}
        return runs[cell.hookpoint]

    def path(self, cell: Cell) -> Path:
        """Where a cell's JSON lies, or is to lie: named by what the cell is made of."""
        manifest = run_folder(self.run_of(cell)) / "trajectories" / "manifest.json"
        return cell_path(self.run, asdict(cell) | {"trajectories": fingerprint(manifest)})


def cell_path(run: str, made_of: dict, folder: str = "cells", suffix: str = ".json") -> Path:
    """The file of a run's cell, named by all that it is made of."""
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    return run_folder(run) / folder / f"{name}{suffix}"


def file_of(name: str) -> Path:
    """notebooks/parameters/sweeps/<name>.yaml, or a .yaml file by its path; ValueError: none."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if not path.exists():
        there = ", ".join(p.stem for p in sorted(_folder().glob("*.yaml")))
        refuse("the file of a sweep", name, f"one of {there}, or a path ending in .yaml")
    return path


def load(name: str) -> Sweep:
    """Read notebooks/parameters/sweeps/<name>.yaml, or a .yaml file by its path.

    ValueError, before any work, for a parameter that notebook 01 does not have, or a cell that
    cannot be: an unknown field, coordinates or coder, steps or images that are not collected.
    """
    path = file_of(name)
    given = yaml.safe_load(path.read_text())
    (notebook,) = parameters.NOTEBOOKS.glob("01_*.ipynb")
    known = parameters.parameters_of(notebook)
    collections = {}
    for captions, own in given["captions"].items():
        run = f"{given['run']}-{captions}"
        values = given["collect"] | own | {"run": run}
        values["also"] = {f"{run}-{hookpoint}": hookpoint for hookpoint in values.get("also", [])}
        parameters.refuse_unknown(values, known, f"{path.name}: a parameter")
        defaults = {k: default for k, (default, _) in known.items()}
        collections[captions] = parameters.checked(defaults | values, known)
    sweep = Sweep(given["run"], collections, crossed(Cell, given["cell"], "steps")[0], {})
    for study, products in given["studies"].items():
        cells = [cell for p in products for cell in crossed(Cell, given["cell"] | p, "steps")]
        cells.sort(key=lambda cell: cell.seed)  # what a budget cuts off is trainings
        sweep.studies[study] = [_checked(sweep, cell) for cell in cells]
    return sweep


def steps_as_text(steps) -> str:
    """Steps as they stand in the table, such as "0 6 12"."""
    return " ".join(map(str, steps))


def _folder() -> Path:
    return parameters.NOTEBOOKS / "parameters" / "sweeps"


def crossed(kind: type, product: dict, listed: str) -> list:
    """All combinations of a product's values, as cells of a kind.

    A list of values counts as several, any other as one; a value of the field `listed` is a list
    of numbers itself.
    """
    for name in product:
        if name not in kind.__annotations__:
            refuse("a field of a cell", name, f"such as {nearest(name, kind.__annotations__)}")
    values = {n: v if isinstance(v, list) else [v] for n, v in product.items()}
    if not isinstance(values[listed][0], list):
        values[listed] = [values[listed]]
    values[listed] = list(map(tuple, values[listed]))
    return [kind(**dict(zip(values, v))) for v in itertools.product(*values.values())]


def _checked(sweep: Sweep, cell: Cell) -> Cell:
    """The cell; ValueError if it cannot be trained."""
    if cell.captions not in sweep.collections:
        refuse("captions", cell.captions, f"one of {', '.join(sweep.collections)}")
    collected = sweep.collections[cell.captions]
    hookpoints = [collected["hookpoint"], *collected["also"].values()]
    if cell.hookpoint not in hookpoints:
        refuse("hookpoint", cell.hookpoint, f"one of {', '.join(hookpoints)}")
    if not set(cell.steps) <= set(collected["steps"]):
        refuse("steps", list(cell.steps), f"among {collected['steps']}")
    if cell.n_train > collected["n_train"] or cell.n_train % collected["batch_size"]:
        most = f"at most {collected['n_train']}, in batches of {collected['batch_size']}"
        refuse("n_train", cell.n_train, most)
    methods.check(cell)
    return cell


def collect(sweep: Sweep, captions: str, share: tuple[int, int] = (0, 1)) -> None:
    """Collect the trajectories of some captions, or a share (index, n) of their shards."""
    jobs.collect(sweep.collections[captions], share=share)


def find_decided(sweep: Sweep, captions: str) -> None:
    """When what the test images of some captions show was decided, where that can be known."""
    p = sweep.collections[captions]
    decided.find(methods.run_of(p["run"]), [methods.run_of(run) for run in p["also"]])


def do(sweep: Sweep, cell: Cell, deadline: float = float("inf")) -> str:
    """Train and measure a cell, and leave its files; a line about it, empty past the deadline."""
    if time.time() > deadline:
        return ""
    start, path = time.perf_counter(), sweep.path(cell)
    what = f"{cell.captions} {cell.hookpoint} {cell.coordinates}, {cell.coder}, seed {cell.seed}"
    try:
        readouts, directions = methods.measured(cell, sweep.run_of(cell))
    except (FloatingPointError, RuntimeError, ValueError) as error:
        return f"{what}: failed, {error}"
    if directions is not None:
        save_tensors(path.with_suffix(".safetensors"), {"u": directions.half()})
    seconds = time.perf_counter() - start
    rounded = {
        name: [float(f"{r.value:.7g}"), [float(f"{v:.3g}") for v in r.influence]]
        for name, r in readouts.items()
    }
    save_json(path, {"cell": asdict(cell), "seconds": seconds, "readouts": rounded})
    shown = [f"{n} {readouts[n].value:.3f}" for n in ("auroc", "ev", "ceiling") if n in readouts]
    return f"{what}: {', '.join(shown)}, {seconds:.0f} s"


def table(sweep: Sweep) -> str:
    """The CSV of all cells that are done, with the rows of those that were done elsewhere."""
    kept = _kept(sweep)
    found = {cell: load_json(path) for cell, path in _paths(sweep).items()}
    readouts = {
        cell: {n: Readout(v, np.array(i)) for n, (v, i) in record["readouts"].items()}
        for cell, record in found.items()
    }
    for cell, value in _stabilities(sweep, found):
        readouts[cell]["stability"] = Readout(value, np.zeros(0))
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow([*(f.name for f in fields(Cell)), *ROW])
    for cell in sweep.cells:
        own, columns = readouts.get(cell, {}), _columns(cell)
        out.writerows([*columns, *row] for row in kept.get(cell, []))
        reference = readouts.get(replace(cell, coordinates="raw"), {})
        for name, readout in own.items():
            row = [*readout.estimate()]
            if cell.coordinates != "raw" and name in reference and len(readout.influence):
                row += readout.less(reference[name]).estimate()
            shown = [f"{v:.5g}" for v in row] + [""] * (6 - len(row))
            out.writerow([*columns, name, *shown])
    return text.getvalue()


def _columns(cell: Cell) -> list[str]:
    """What tells a cell's rows from others, as it stands in the table."""
    return [str(v) for v in (asdict(cell) | {"steps": steps_as_text(cell.steps)}).values()]


def _trajectories(sweep: Sweep) -> dict[str, str]:
    """The fingerprint of the trajectories of each run that is there."""
    runs = {sweep.run_of(cell) for cell in sweep.cells}
    manifests = {run: run_folder(run) / "trajectories" / "manifest.json" for run in sorted(runs)}
    return {run: fingerprint(path) for run, path in manifests.items() if path.exists()}


def _kept(sweep: Sweep) -> dict[Cell, list[list[str]]]:
    """Read-outs in the table of cells that are not done here.

    If their trajectories are the very same, or not collected here, so that nobody can tell.
    """
    path, done, here = csv_of(sweep), _paths(sweep), _trajectories(sweep)
    changed = set(here) - tables.unchanged(path, here)
    cells = [c for c in sweep.cells if c not in done and sweep.run_of(c) not in changed]
    rows = tables.rows(path, len(fields(Cell)))
    return {cell: own for cell in cells if (own := rows.get(tuple(_columns(cell))))}


def csv_of(sweep: Sweep) -> Path:
    """Where the table stands: beside the figures, committed."""
    return figures_folder(sweep.run) / "comparison.csv"


def _paths(sweep: Sweep) -> dict[Cell, Path]:
    """The cells that are done, and their files."""
    here = _trajectories(sweep)
    paths = {cell: sweep.path(cell) for cell in sweep.cells if sweep.run_of(cell) in here}
    return {cell: path for cell, path in paths.items() if path.exists()}


def _stabilities(sweep: Sweep, done):
    """Each cell that has directions, and its stability against the same with the next seed."""
    groups: dict[Cell, list[Cell]] = {}
    for cell in done:
        if sweep.path(cell).with_suffix(".safetensors").exists():
            groups.setdefault(replace(cell, seed=0), []).append(cell)
    for cells in groups.values():
        if len(cells) > 1:
            paths = (sweep.path(cell).with_suffix(".safetensors") for cell in cells)
            u = [load_tensors(path)[0]["u"] for path in paths]
            yield from ((c, stability(a, b)) for c, a, b in zip(cells, u, u[1:] + u[:1]))


def run(sweep: Sweep, processes: int = 1, budget: float = float("inf")) -> Path:
    """Do study after study what is not done, write the CSV; past `budget` seconds begin nothing."""
    deadline = time.time() + budget
    with Workers(processes) as workers:
        try:
            for name, cells in sweep.studies.items():
                if time.time() < deadline:
                    _do_all(sweep, name, list(dict.fromkeys(cells)), workers, deadline)
        finally:  # also of a sweep that is stopped
            text = table(sweep)
            tables.save(csv_of(sweep), text, _trajectories(sweep))
    return csv_of(sweep)


def _do_all(sweep: Sweep, name: str, cells: list[Cell], workers: Workers, deadline: float):
    """Do one of the studies: trajectories, when things were decided, cells."""
    for captions in dict.fromkeys(cell.captions for cell in cells):
        list(workers(collect, [(sweep, captions, (i, workers.n)) for i in range(workers.n)]))
        find_decided(sweep, captions)  # here, with all threads
    done, kept = _paths(sweep), _kept(sweep)
    todo = [cell for cell in cells if cell not in done and cell not in kept]
    raw = {replace(cell, coordinates="raw") for cell in todo}  # what these are held against
    todo += [cell for cell in sweep.cells if cell in raw and cell in kept]
    print(f"{name}: {len(cells) - len(todo)} cells are done, {len(todo)} are not", flush=True)
    work_off(workers, do, [(sweep, cell, deadline) for cell in todo])


if __name__ == "__main__":
    command("sweep", __doc__.splitlines()[0], load, run)
