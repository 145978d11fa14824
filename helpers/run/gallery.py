"""What steering along a scorecard's directions looks like: a sheet of images a label."""

import numpy as np

from helpers.files import load_json
from helpers.measure import frontier
from helpers.plots.sheet import sheet
from helpers.plots.style import save_figure
from helpers.run.bench import Bench
from helpers.run.folder import figures_folder

SHOWN = ("a=1", "a=0", "raw", "class means", "random a=1", "prompt")


def draw(bench: Bench, done: dict, n: int = 6) -> None:
    """Save a sheet for the first label of each attribute, as far as `SHOWN` is done.

    `done`: cells of a scorecard, of one training and without conditions, and their files. Each
    direction stands at the strength that is best on half of its images; shown are others, with a
    tick on each success.
    """
    study = bench.study
    labels = {label.partition("=")[0]: label for label in reversed(study.labels)}.values()
    for label in labels:
        cells = {c.direction: c for c in reversed(done) if c.label == label}
        if SHOWN[0] not in cells:
            continue
        picks = bench.picks(cells[SHOWN[0]])[1::2][:n]
        rows, ticks = {"unsteered": bench.lab(cells[SHOWN[0]]).pool.images[picks]}, {}
        for cell in (cells[name] for name in SHOWN if name in cells):
            gains = [of["gain"][::2] for of in load_json(done[cell])["outcomes"].values()]
            strength = cell.strengths[frontier.best(np.mean(gains, axis=1))]
            images, measured = bench.shown(cell, strength, picks)
            name = cell.direction + f", ×{strength:g}" * (cell.direction != "prompt")
            rows[name], ticks[name] = images, ["✓" * bool(v) for v in measured["success"]]
        fig = sheet(rows, ticks, title=label)
        save_figure(fig, figures_folder(study.run), f"gallery_{label.replace('=', '_')}")
