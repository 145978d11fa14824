"""Notebook 08's study: does a direction cause its label, and what else does it change?

    python -m helpers.run.scorecard scorecard --processes 2 --budget 7200

A file of notebooks/parameters/sweeps says which directions are tried, in which ways, the most
important first. A cell is one direction, of one training or draw, at several strengths, on images
of one label. Each leaves a small JSON in runs/<run>/cells and is skipped afterwards. What there is
goes into figures/<run>/scorecard.csv, a row a cell and strength, from which notebook 08 draws. Rows
that are there already, of the very same trajectories, are kept: a table can be continued elsewhere.

Each label has a fixed list of images that do not show it yet. They are dealt out to trainings (or
draws of a control) in turns, so that trainings have no images in common and all directions the same
ones: differences are taken image by image, and trainings vary as images and trainings do.
"""

from __future__ import annotations

import csv
import io
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import yaml

from helpers.checks import in_range, one_of, refuse
from helpers.files import load_json, save_json
from helpers.run import directions, gallery, sweep, tables
from helpers.run.bench import PART, Bench
from helpers.run.folder import figures_folder, fingerprint, run_folder
from helpers.run.workers import Workers, command, work_off

MEANS = ("inside", "outside", "change", "distance")  # of all images of a row
HALVED = ("success", "kept", "gain")  # of either half: one chooses strengths for the other
ROW = ("direction", "seed", "label", "condition", "auroc", "strength", "n", *MEANS)
ROW += tuple(f"{name} {half}" for half in (1, 2) for name in HALVED)
VALUES = {  # of a cell's fields that have few
    "way": ("add", "keep norm", "clamp", "together", "subspace", "remove", "remove aligned"),
    "mode": ("activation", "residual"),
    "window": ("all", "early", "middle", "late", "onset", "decided"),
    "region": ("label", "whole image"),
    "branch": ("conditional", "unconditional", "both"),
}


@dataclass(frozen=True)
class Cell:
    """A direction at several strengths, on those images of a label that one training is dealt."""

    direction: str  # see `helpers.run.directions`
    seed: int  # of the training, or of a control's draw
    seeds: int  # trainings or draws that share the label's images
    label: str
    images: int  # of the label, of all seeds together
    strengths: tuple[float, ...]  # in RMS norms; of a clamp, in 99th percentiles of active codes
    way: str  # 'together' adds the best latents as one; 'remove' takes out what is there
    mode: str
    window: str  # thirds of the steps, or those from a latent's onset, or after the decision
    region: str
    branch: str
    num_inference_steps: int


@dataclass(frozen=True)
class Study(sweep.Sweep):
    """What a scorecard's file asks for; collections are those of the sweep that it builds on."""

    name: str  # of the file
    dictionary: sweep.Cell  # how dictionaries are trained, but for coordinates and seed
    trainings: int
    labels: list[str]
    pool: int  # images made without steering, from which labels take theirs
    batch_size: int

    @cached_property
    def trajectories(self) -> str:
        """Fingerprint of what dictionaries are trained on."""
        manifest = run_folder(self.run_of(self.dictionary)) / "trajectories" / "manifest.json"
        return fingerprint(manifest)

    @property
    def made_from(self) -> dict[str, str]:
        return {self.run_of(self.dictionary): self.trajectories}

    @property
    def last_step(self) -> int:
        """Of the sampling that dictionaries were trained on."""
        return self.collections[self.dictionary.captions]["num_inference_steps"] - 1

    def path(self, cell, folder: str = "cells", suffix: str = ".json") -> Path:
        made_of = (cell if isinstance(cell, dict) else asdict(cell)) | {
            "trajectories": self.trajectories,
            "dictionary": asdict(self.dictionary),
        }
        return sweep.cell_path(self.run, made_of, folder, suffix)


def load(name: str) -> Study:
    """Read notebooks/parameters/sweeps/<name>.yaml, or a .yaml file by its path.

    ValueError, before any work, for an unknown field or value of a cell.
    """
    given = yaml.safe_load(sweep.file_of(name).read_text())
    trained = sweep.load(given["sweep"])
    default = given["cell"] | {"seed": 0, "label": given["labels"][0]}
    (default,) = sweep.crossed(Cell, default, "strengths")
    study = Study(
        *(given["run"], trained.collections, default, {}, name),
        replace(trained.default, **given["dictionary"]),
        *(given[field] for field in ("trainings", "labels", "pool", "batch_size")),
    )
    for of_study, products in given["studies"].items():
        cells: list[Cell] = []
        for p in ({"label": given["labels"]} | given["cell"] | p for p in products):
            cells += sweep.crossed(Cell, p | {"seed": list(range(p["seeds"]))}, "strengths")
        # all directions of one training before the next: what a budget cuts off is trainings
        cells.sort(key=lambda cell: cell.seed)
        study.studies[of_study] = [_checked(study, cell) for cell in cells]
    return study


def _checked(study: Study, cell: Cell) -> Cell:
    for field, valid in VALUES.items():
        one_of(field, getattr(cell, field), valid)
    in_range("images", cell.images, cell.seeds, study.pool)
    kept = [s * (cell.num_inference_steps - 1) / study.last_step for s in study.dictionary.steps]
    if len({int(s) for s in kept}) < len(kept) or any(s % 1 for s in kept):
        refuse("num_inference_steps", cell.num_inference_steps, "such that kept steps stay steps")
    directions.check(cell.direction, study.dictionary)
    control, of = directions.parts_of(cell.direction)
    latents, removed = of not in ("", "neurons"), cell.way.startswith("remove")
    needs = cell.window == "onset" or cell.way in ("clamp", "together", "remove aligned")
    if (needs or (removed and cell.direction != "class means")) and not latents:
        refuse("direction", cell.direction, "of trained latents, for this way or window")
    if removed and control not in ("", "random"):
        refuse("direction", cell.direction, "latents, class means or a random direction")
    return cell


def n_images(cell: Cell) -> int:
    """How many images a cell makes."""
    return len(cell.strengths) * len(range(cell.seed, cell.images, cell.seeds))


@lru_cache(maxsize=1)
def _bench(name: str) -> Bench:
    return Bench(load(name))


def make_part(name: str, n_steps: int, first: int) -> str:
    """Make unsteered images of so many steps, from number `first` on; a line about it."""
    _bench(name).part(n_steps, first)
    return f"unsteered images from number {first} on, {n_steps} steps"


def train(name: str, coordinates: str, seed: int) -> str:
    """Train a dictionary and choose its latents; a line about it."""
    _, latents = _bench(name).directions.dictionary(coordinates, seed)
    chosen = ", ".join(f"{label} {of.auroc:.2f}" for label, of in latents.items())
    return f"{coordinates}, seed {seed}: AUROC {chosen}"


def do(name: str, cell: Cell, deadline: float = float("inf")) -> str:
    """Make and judge a cell's images, and leave its file; a line, empty past the deadline."""
    if time.time() > deadline:
        return ""
    start, bench = time.perf_counter(), _bench(name)
    what = " ".join(filter(None, [cell.direction, condition(cell, bench.study.default)]))
    what = f"{what}, seed {cell.seed}, {cell.label}"
    try:
        outcomes = bench.outcomes(cell)
        own = directions.parts_of(cell.direction)[1]
        auroc = bench.latents(cell)[1].auroc if own else None
    except (FloatingPointError, RuntimeError, ValueError) as error:
        return f"{what}: failed, {error}"
    seconds = time.perf_counter() - start
    rounded = {
        f"{strength:g}": {n: [float(f"{float(v):.4g}") for v in values] for n, values in of.items()}
        for strength, of in outcomes.items()
    }
    record = {"cell": asdict(cell), "seconds": seconds, "auroc": auroc, "outcomes": rounded}
    save_json(bench.study.path(cell), record)
    gains = ", ".join(f"×{s:g} {np.mean(of['gain']):.2f}" for s, of in outcomes.items())
    return f"{what}: {gains}; {seconds:.0f} s"


def condition(cell: Cell, default: Cell) -> str:
    """In what a cell differs from the default, but for direction, label, images and strengths."""
    names = [f.name for f in fields(Cell)]
    names = names[names.index("strengths") + 1 :]
    own = {name: getattr(cell, name) for name in names}
    return ", ".join(f"{n}={v}" for n, v in own.items() if v != getattr(default, n))


def table(study: Study) -> str:
    """The CSV of all cells that are done, with the rows of those that were done elsewhere."""
    text, done, kept = io.StringIO(), _paths(study), _kept(study)
    out = csv.writer(text, lineterminator="\n")
    out.writerow(ROW)
    for cell in study.cells:
        out.writerows([*_columns(study, cell), *row] for row in kept.get(cell, []))
        if cell not in done:
            continue
        record = load_json(done[cell])
        auroc = "" if record["auroc"] is None else f"{record['auroc']:.3g}"
        key = *_columns(study, cell), auroc
        for strength, of in record["outcomes"].items():
            of = {name: np.array(values, float) for name, values in of.items()}  # null: NaN
            means = [_mean(of[name]) if name in of else "" for name in MEANS]
            halves = [_mean(of[name][half::2]) for half in (0, 1) for name in HALVED]
            out.writerow([*key, strength, len(of["gain"]), *means, *halves])
    return text.getvalue()


def _columns(study: Study, cell: Cell) -> tuple[str, ...]:
    """The first columns of a cell's rows."""
    return cell.direction, str(cell.seed), cell.label, condition(cell, study.default)


def _kept(study: Study) -> dict[Cell, list[list[str]]]:
    """What the table says of cells that are not done here, if of the same trajectories."""
    path, done, found = csv_of(study), _paths(study), {}
    if not tables.unchanged(path, study.made_from):
        return found
    rows = tables.rows(path, 4)
    for cell in (cell for cell in study.cells if cell not in done):
        n = str(len(range(cell.seed, cell.images, cell.seeds)))
        own = {row[1]: row for row in rows.get(_columns(study, cell), []) if row[2] == n}
        strengths = [f"{strength:g}" for strength in cell.strengths]
        if set(strengths) <= set(own):
            found[cell] = [own[strength] for strength in strengths]
    return found


def _mean(values: np.ndarray) -> str:
    return f"{np.nanmean(values):.3g}" if (~np.isnan(values)).any() else ""


def csv_of(study: Study) -> Path:
    """Where the table stands: beside the figures, committed."""
    return figures_folder(study.run) / "scorecard.csv"


def _paths(study: Study) -> dict[Cell, Path]:
    """The cells that are done, and their files."""
    return {cell: path for cell in study.cells if (path := study.path(cell)).exists()}


def run(study: Study, processes: int = 1, budget: float = float("inf")) -> Path:
    """Do study after study what is not done, write the CSV; past `budget` seconds begin nothing."""
    deadline = time.time() + budget
    only = study.dictionary.captions
    with Workers(processes) as workers:
        list(workers(sweep.collect, [(study, only, (i, processes)) for i in range(processes)]))
        try:
            for name, cells in study.studies.items():
                if time.time() < deadline:
                    _do_all(study, name, cells, workers, deadline)
        finally:  # also of a study that is stopped
            tables.save(csv_of(study), table(study), study.made_from)
    done = _paths(study).items()
    plain = {c: path for c, path in done if c.seed == 0 and not condition(c, study.default)}
    gallery.draw(_bench(study.name), plain)
    return csv_of(study)


def _do_all(study: Study, name: str, cells: list[Cell], workers: Workers, deadline: float):
    """Do one of the studies: unsteered images, dictionaries, cells."""
    cells = list(dict.fromkeys(cells))
    kept = _kept(study)
    todo = [c for c in cells if c not in kept and not study.path(c).exists()]
    images = sum(map(n_images, todo))
    print(f"{name}: {len(cells) - len(todo)} cells are done, {len(todo)} are not: {images} images")
    if not todo:
        return
    lengths = dict.fromkeys(cell.num_inference_steps for cell in todo)
    parts = [(study.name, n, i) for n in lengths for i in range(0, study.pool, PART)]
    work_off(workers, make_part, parts)
    named = [(directions.parts_of(cell.direction)[1], cell.seed) for cell in todo]
    trained = {(of, 0 if of == "neurons" else s % study.trainings) for of, s in named if of}
    work_off(workers, train, [(study.name, *of) for of in sorted(trained)])
    sizes = [n_images(cell) * cell.num_inference_steps for cell in todo]
    work_off(workers, do, [(study.name, cell, deadline) for cell in todo], sizes)


if __name__ == "__main__":
    command("scorecard", __doc__.splitlines()[0], load, run)
