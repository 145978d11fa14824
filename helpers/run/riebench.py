"""RIEBench with dictionaries of ours: how far features of one image edit another, and at what cost.

    python -m helpers.run.riebench riebench

A file of notebooks/parameters/sweeps says what is edited and how: see helpers.measure.transport.
Each case leaves a small JSON in runs/<run> and is skipped afterwards; all go into
figures/<run>/riebench.csv. A case that fails is counted, and fails for every way to edit, so that
all ways are compared on the same cases.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from helpers.checks import one_of, refuse
from helpers.dictionary import Dictionary
from helpers.files import load_json, save_json, save_text
from helpers.measure import metrics
from helpers.measure.encoders import Encoder, Segmenter
from helpers.measure.lpips import LPIPS
from helpers.measure.transport import CHOICES, KINDS, Bench, Case, read_cases, scores
from helpers.run import parameters
from helpers.run.folder import figures_folder, fingerprint, load_model, path_in, run_folder
from helpers.run.sweep import cell_path, file_of
from helpers.store.read import Store

EFFICIENCY = ("ΔCLIP-T", "LPIPS to original")


@dataclass(frozen=True)
class Protocol:
    """What a file of notebooks/parameters/sweeps asks for."""

    run: str  # whose folder holds a JSON a case, and figures/<run>/riebench.csv
    of: str  # run whose model, hookpoint, settings and dictionaries are used
    dictionaries: list[str]  # 'residual concat', or baselines of notebook 04 by name
    cases: str  # the list, a JSON file
    per_type: int  # cases of each type, the first in the list
    seed: int
    features: int
    choices: list[str]
    strengths: list[float]
    encoder: str
    masks: str  # a model as `Segmenter` takes, a folder of <case>_original.png and _edited.png, ''
    lpips: str  # weights, see helpers.measure.lpips; '' leaves it out


def load(name: str) -> Protocol:
    """Read notebooks/parameters/sweeps/<name>.yaml, or a .yaml file by its path."""
    path = file_of(name)
    given = yaml.safe_load(path.read_text())
    known = {f.name: ("", f.type) for f in fields(Protocol)}
    parameters.refuse_unknown(given, known, f"{path.name}: a parameter")
    for missing in set(known) - set(given):
        refuse(f"{path.name}: {missing}", None, "given")
    for choice in parameters.checked(given, known)["choices"]:
        one_of("choices", choice, CHOICES)
    return Protocol(**given)


def bench_of(p: Protocol) -> Bench:
    """What a protocol names, loaded."""
    store = Store(run_folder(p.of) / "trajectories")
    pipe = load_model(store.manifest["model"], revision=store.manifest["revision"])
    device = str(pipe.device)
    found = {n: Dictionary.load(path)[0].to(device) for n, path in _paths(p).items()}
    lpips = LPIPS.load(p.lpips, device) if p.lpips else None
    judges = Encoder.load(p.encoder, device), lpips, _segment(p)
    return Bench(pipe, store, found, *judges, p.seed, p.features, p.choices, p.strengths)


def do(bench: Bench, case: Case, path: Path) -> dict:
    """Try a case and leave its JSON, with its scores or with why it failed."""
    found: dict = {"case": asdict(case)}
    try:
        found["scores"] = scores(bench, case)
    except (RuntimeError, ValueError) as error:
        found["failed"] = str(error)
    save_json(path, found)
    return found


def table(records: list[dict]) -> str:
    """A CSV of what `do` gave: a row a type of edit, way and measure; all ways have the same cases.

    Means over cases with intervals, 'edit efficiency' as the ratio of its two parts' means.
    """
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["edit", "way", "measure", *metrics.Estimate._fields, "cases", "failed"])
    for kind in ("all", *KINDS):
        own = [r for r in records if kind in ("all", r["case"]["kind"])]
        done = [r["scores"] for r in own if "scores" in r]
        for way in done[0] if done else ():
            values = {n: np.array([d[way][n] for d in done]) for n in done[0][way]}
            estimates = {n: metrics.mean(v) for n, v in values.items()}
            if set(EFFICIENCY) <= set(values):
                estimates["edit efficiency"] = metrics.ratio(*(values[n] for n in EFFICIENCY))
            for name, estimate in estimates.items():
                shown = [f"{v:.5g}" for v in estimate]
                out.writerow([kind, way, name, *shown, len(done), len(own) - len(done)])
    return text.getvalue()


def run(p: Protocol, bench: Bench | None = None) -> Path:
    """Do what is not done, tell what failed and why, and write the table."""
    cases = read_cases(p.cases, p.per_type)
    n = 2 + len(p.dictionaries) * len(p.choices) * len(p.strengths)
    print(f"{len(cases)} cases, {n} images each: {n * len(cases)} images", flush=True)
    bench = bench or bench_of(p)
    folder, records = _folder(p), []
    for i, case in enumerate(cases, 1):
        path = folder / f"{case.name}.json"
        found = load_json(path) if path.exists() else do(bench, case, path)
        records.append(found)
        if "failed" in found:
            print(f"[{i}/{len(cases)}] {case.name} failed: {found['failed']}", flush=True)
    print(f"{sum('failed' in r for r in records)} of {len(records)} cases failed")
    path = figures_folder(p.run) / "riebench.csv"
    save_text(path, table(records))
    return path


def _paths(p: Protocol) -> dict[str, Path]:
    """Where dictionaries lie, as notebooks 03 and 04 leave them."""
    return {name: path_in(run_folder(p.of), name) for name in p.dictionaries}


def _folder(p: Protocol) -> Path:
    """Where cases go, named by all that their scores depend on."""
    there = [fingerprint(path) for path in _paths(p).values() if path.exists()]
    return cell_path(p.run, asdict(p) | {"made_from": there}, "cases", "")


def _segment(p: Protocol):
    if not p.masks:
        return None
    if (folder := Path(p.masks)).is_dir():
        return lambda _, text, name: _drawn(folder / f"{name}.png")
    segmenter = Segmenter.load(p.masks)
    return lambda image, text, _: segmenter(image, text)


def _drawn(path: Path) -> np.ndarray:
    """A mask, bool, (height, width), that somebody drew."""
    if not path.exists():
        raise ValueError(f"there is no mask {path.name}")
    return np.asarray(Image.open(path).convert("L")) > 127


def main() -> None:
    told = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("python -m helpers.run.riebench", description=told)
    parser.add_argument("protocol", help="a file in notebooks/parameters/sweeps, or a path to one")
    try:
        print(f"wrote {run(load(parser.parse_args().protocol))}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
