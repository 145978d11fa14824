"""The README's results table, written from the metrics that the notebooks measured, never by hand."""

from __future__ import annotations

from pathlib import Path

from helpers.files import load_json

NOTEBOOKS_READ = ("01_collect_trajectories", "02_fit_predictors", "04_reconstruction_ablation", "05_spatiotemporal_heatmaps", "06_steering")
AIMED = {"all": "everything at once, one-object captions", "colour_at_place": "colour at its place"}
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def _interval(e) -> str:
    return f"{e[0]:.3f} [{e[1]:.3f}, {e[2]:.3f}]"


def results_table(demo: Path, demo_model: Path) -> str:
    """Markdown tables from the metrics folders of the demo run and of the demo model's training.

    Raises FileNotFoundError for a metrics file that is missing, naming it.
    """
    m = {name: load_json(demo / f"{name}.json")["metrics"] for name in NOTEBOOKS_READ}
    model = load_json(demo_model / "00_demo_model.json")["metrics"]
    lines = ["Measured by the notebooks; `[…]` are 95 % intervals from resampling test images.", "", "| demo model, read on captions it never saw | measured | aim | |", "|---|---|---|---|"]
    for name, row in model["aims"].items():
        lines.append(f"| {AIMED.get(name, name)} | {_interval(row['measured'])} | ≥ {row['aim']:.2f} | {'met' if row['met'] else 'not met'} |")
    ev = m["02_fit_predictors"]["ev"]
    pairs = m["02_fit_predictors"]["pairs"]
    lines += ["", "| explained variance of the next kept step | " + " | ".join(pairs) + " |", "|---|" + "---|" * len(pairs)]
    lines += [f"| {name} | " + " | ".join(_interval(e) for e in row) + " |" for name, row in ev.items()]
    r = m["04_reconstruction_ablation"]
    lines += ["", "| dictionary, equal sparsity and parameters | EV in activation space | EV in residual space | numbers per trajectory |", "|---|---|---|---|"]
    lines += [f"| {n} | {_interval(row['activation'])} | {_interval(row['residual'])} | {r['numbers_per_trajectory'][n]:.1f} |" for n, row in r["ev"].items()]
    readouts = m["05_spatiotemporal_heatmaps"]["auroc"]
    shuffled = m["05_spatiotemporal_heatmaps"]["auroc_shuffled"]
    groups = dict.fromkeys(n.split("=")[0] for n in shuffled)

    def averaged(row):
        return [sum(v[0] for n, v in row.items() if n.startswith(g + "=")) / sum(n.startswith(g + "=") for n in row) for g in groups]

    lines += ["", "| mean AUROC of the best latent, chosen on other images | " + " | ".join(groups) + " |", "|---|" + "---|" * len(groups)]
    lines += [f"| {name} | " + " | ".join(f"{v:.3f}" for v in averaged(row)) + " |" for name, row in (*readouts.items(), ("shuffled labels", shuffled))]
    lines += ["", "| steering, at each direction's best strength | success | other attributes kept |", "|---|---|---|"]
    best: dict[str, dict] = {}
    for key, row in m["06_steering"]["response"].items():
        name = " · ".join(key.split(" | ")[:2])
        if "success" in row and (name not in best or _product(row) > _product(best[name])):
            best[name] = row
    lines += [f"| {name} | {_interval(row['success'])} | {_interval(row['kept'])} |" for name, row in best.items()]
    lines += ["", f"Recording against the plain pipeline: {m['01_collect_trajectories']['slowdown']:.3f} × the time. Round trip residualize → restore: {m['02_fit_predictors']['round_trip_relative_error']:.1e} relative error in float32."]
    return "\n".join(lines)


def _product(row) -> float:
    return row["success"][0] * row["kept"][0]


def put_into(readme: Path, table: str) -> None:
    """Replace what stands between the README's markers."""
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
