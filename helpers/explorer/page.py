"""One latent's record drawn as one page: what it does, when and where, and what is like it."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from helpers.explorer import pictures
from helpers.explorer.record import STATISTICS, Record
from helpers.plots.style import WIDE, colour

KINDS = {
    "random": "random images in which it fires",
    "quantile": "images over the range of its strength, strongest first",
    "top": "its strongest images",
}
SILENT = "it fires in none of these images"


def in_words(name: str, value: float) -> str:
    """A statistic as it is written on pages."""
    if np.isnan(value):
        return "–"
    if name in ("firing rate", "L0 share", "images"):
        return f"{value:.2%}" if value < 0.1 else f"{value:.0%}"
    return f"{value:.3f}" if name.endswith("score") else f"{value:.3g}"


def statistics(record: Record) -> dict[str, str]:
    """The page's first panel: statistics, label scores, name and its score, all in words."""
    found = {name: in_words(name, v) for name, v in record.statistics.items()}
    del found["label score"], found["name score"]  # both follow, with their intervals
    found |= {f"AUROC, {label}": str(score) for label, score in record.labels.items()}
    if record.name:
        found |= {"name": record.name.text, "name's score": str(record.name.score or "–")}
    return found


def column_of(sort: str) -> str:
    """The statistic that a list shows beside latents: the one it is sorted by, if it is by one."""
    name = sort.removeprefix("-")
    return name if name in STATISTICS else "firing rate"


def row(records, latent: int, sort: str = "") -> str:
    """A latent's line in a list, in columns of even width: number, name or label, statistic."""
    name = column_of(sort)
    value = in_words(name, records.table[name][latent])
    return f"{latent:>5} {(records.title(latent) or '–')[:24]:24} {value:>7}"


def overview(records, latents) -> list[dict]:
    """A table of latents: number, name or label, and statistics, in words."""
    return [
        {"latent": i, "name or label": records.title(i) or "–"}
        | {name: in_words(name, values[i]) for name, values in records.table.items()}
        for i in latents
    ]


def heading(record: Record) -> str:
    """What stands above a page."""
    title = f": {record.title}" if record.title else ""
    run = Path(record.run).name  # a run may be given as a path
    return f"{run}, {record.dictionary}, latent {record.latent}{title}"


def draw(record: Record) -> Figure:
    """All panels of a record, from top to bottom; those of what was not made are left out."""
    n_rows = -(-len(statistics(record)) // _n_columns(statistics(record)))
    panels = [(0.24 * n_rows + 0.1, _statistics)]
    panels += [(_height(own), _examples(kind)) for kind, own in record.examples.items()]
    n = sum(len(own.evidence) for own in record.examples.values())
    if n:
        panels.append((0.35 + n * _strip_height(record), _over_time))
    panels.append((1.5, _lines_and_neighbours))
    if record.strip is not None:
        panels.append((1.3, _steered))
    heights = [height for height, _ in panels]
    fig = plt.figure(figsize=(WIDE, sum(heights) + 0.3), layout="constrained")
    fig.suptitle(heading(record), fontsize=9)
    parts = fig.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (_, panel) in zip(parts, panels):
        panel(part, record)
    return fig


def _height(own) -> float:
    """Inches that a row of examples takes."""
    if not len(own.images):
        return 0.35
    height, width = pictures.beside(*pictures.examples(own)).shape[:2]
    return min(WIDE * height / width, 2.0) + 0.25


def _strip_height(record: Record) -> float:
    height, width = record.examples["random"].pictures.shape[1:3]
    return WIDE * height / width / (len(pictures.shown_steps(len(record.steps))) + 2)


def _n_columns(found: dict[str, str]) -> int:
    """In how many columns statistics have room."""
    return 3 if max(len(name) + len(value) for name, value in found.items()) < 36 else 2


def _statistics(fig, record: Record) -> None:
    ax, found = fig.subplots(), statistics(record)
    ax.set_axis_off()
    n = _n_columns(found)
    for i, (name, value) in enumerate(found.items()):
        row, column = divmod(i, n)
        left, right = column / n, (column + 0.92) / n
        ax.text(left, -row, name[:26], fontsize=6.5, va="center", color="#555555")
        ax.text(right, -row, value[:36], fontsize=6.5, va="center", ha="right")
    ax.set(xlim=(0, 1), ylim=(-row - 0.5, 0.5))


def _examples(kind: str):
    def panel(fig, record: Record) -> None:
        ax, own = fig.subplots(), record.examples[kind]
        ax.set_axis_off()
        ax.set_title(KINDS[kind] if len(own.images) else f"{kind}: {SILENT}", fontsize=7)
        if len(own.images):
            ax.imshow(pictures.beside(*pictures.examples(own)), interpolation="nearest")
            _bar(fig, ax, "magma", 0, 1, "code / largest")

    return panel


def _bar(fig, ax, name: str, low: float, high: float, label: str) -> None:
    bar = fig.colorbar(ScalarMappable(Normalize(low, high), name), ax=ax, fraction=0.03, pad=0.01)
    bar.set_label(label, fontsize=6)
    bar.ax.tick_params(labelsize=5)


def _over_time(fig, record: Record) -> None:
    ax, limit = fig.subplots(), pictures.limit_of(record.examples)
    shown = [row for own in record.examples.values() for row in pictures.over_time(own, limit)]
    ax.imshow(pictures.above(*shown), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title("evidence, step by step", fontsize=7, pad=12)
    steps = pictures.shown_steps(len(record.steps))
    width = shown[0].shape[1] / (len(steps) + 1)
    for i, s in enumerate(steps, 1):
        text = f"t = {record.timesteps[s]:.0f}"
        ax.text((i + 0.5) * width, -2, text, ha="center", va="bottom", fontsize=6)
    _bar(fig, ax, "RdBu_r", -limit, limit, "evidence")


def _lines_and_neighbours(fig, record: Record) -> None:
    lines, *axes = fig.subplots(1, 1 + len(record.nearest), width_ratios=(1.4, 1, 1))
    for name, values, style in (("effect", record.effect, "-"), ("onset", record.onset, "--")):
        ink = colour("residual concat")
        lines.plot(record.timesteps, values, style, marker="o", markersize=2, color=ink, label=name)
    lines.invert_xaxis()
    lines.set(ylim=(0, None), xlabel="timestep")
    lines.set_title("effect ‖u[s]‖ and what is new of it, ‖w[s]‖", fontsize=7)
    lines.legend(fontsize=6, loc="center right")
    for ax, (kind, near) in zip(axes, record.nearest.items()):
        names = [f"{n.latent} {n.title}".strip()[:24] for n in near]
        ax.barh(range(len(near)), [n.similarity for n in near], color="#999999")
        ax.set_yticks(range(len(near)), names, fontsize=5)
        ax.set(xlim=(0, 1), ylim=(len(near) - 0.4, -0.6))
        ax.tick_params(labelsize=5)
        ax.set_title(f"nearest {kind}", fontsize=7)


def _steered(fig, record: Record) -> None:
    ax, strip = fig.subplots(), record.strip
    row = pictures.beside(*map(pictures.rgb, strip.images))
    ax.imshow(row, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(f"steered along it: “{strip.prompt}”" if strip.prompt else "steered", fontsize=7)
    width = row.shape[1] / len(strip.images)
    for i, strength in enumerate(strip.strengths):
        place = (i + 0.5) * width, row.shape[0] + 2
        ax.text(*place, f"×{strength:g}", ha="center", va="top", fontsize=6)
