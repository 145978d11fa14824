"""The README's results table, written from the metrics that the notebooks measured, never by hand."""

from __future__ import annotations

from pathlib import Path

from helpers.files import load_json

NOTEBOOKS_READ = (
    "01_collect_trajectories",
    "02_fit_predictors",
    "04_reconstruction_ablation",
    "05_spatiotemporal_heatmaps",
    "06_steering",
)
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
    lines = [
        "Measured by the notebooks; `[…]` are 95 % intervals: from resampling test images, for shares of images (success) Wilson's.",
        "",
        "| demo model, read on captions it never saw | measured | aim | |",
        "|---|---|---|---|",
    ]
    for name, row in model["aims"].items():
        lines.append(
            f"| {AIMED.get(name, name)} | {_interval(row['measured'])} | ≥ {row['aim']:.2f} | {'met' if row['met'] else 'not met'} |"
        )
    ev = m["02_fit_predictors"]["ev"]
    pairs = m["02_fit_predictors"]["pairs"]
    lines += [
        "",
        "| explained variance of the next kept step | " + " | ".join(pairs) + " |",
        "|---|" + "---|" * len(pairs),
    ]
    lines += [
        f"| {name} | " + " | ".join(_interval(e) for e in row) + " |" for name, row in ev.items()
    ]
    r = m["04_reconstruction_ablation"]
    sparse = [n for n in r["ev"] if n.endswith(("concat", "one step")) or n.startswith("untrained")]
    header = f"SAEs of equal sparsity (thresholds set on validation images) and equal parameters, {r['n_trajectories']} test trajectories"
    lines += [
        "",
        f"| {header} | EV in activation space | EV in residual space | numbers per trajectory | alive on test images |",
        "|---|---|---|---|---|",
    ]
    for n in (*sparse, *(n for n in r["ev"] if n not in sparse)):
        row = r["ev"][n]
        lines.append(
            f"| {n if n in sparse else f'for comparison: {n}'} | {_interval(row['activation'])} | {_interval(row['residual'])} | {r['numbers_per_trajectory'][n]:.1f} | {r['alive'][n]:.0%} |"
        )
    d = m["05_spatiotemporal_heatmaps"]
    groups = list(next(iter(d["mean_auroc"].values())))
    lines += [
        "",
        "| mean AUROC of the best latent, chosen on other images | " + " | ".join(groups) + " |",
        "|---|" + "---|" * len(groups),
    ]
    lines += [
        f"| {name} | " + " | ".join(_interval(row[g]) for g in groups) + " |"
        for name, row in d["mean_auroc"].items()
    ]
    lines += [
        f"| {name}, shuffled labels | " + " | ".join(f"{row[g][0]:.3f}" for g in groups) + " |"
        for name, row in d["mean_auroc_shuffled"].items()
    ]
    s = m["06_steering"]
    n_images = sorted({n["measuring"] for n in s["n_images"].values()})
    header = f"steering, {' to '.join(map(str, n_images))} images, at the strength chosen on others"
    lines += [
        "",
        f"| {header} | strength | success | other attributes kept | success × kept, residual latent less this one |",
        "|---|---|---|---|---|",
    ]
    for name, row in s["chosen"].items():
        if "success" in row:
            less = _interval(s["paired"][name]) if name in s["paired"] else ""
            lines.append(
                f"| {name.replace(' | ', ' · ')} | ×{row['strength']:g} | {_interval(row['success'])} | {_interval(row['kept'])} | {less} |"
            )
    lines += [
        "",
        f"Recording against the plain pipeline: {m['01_collect_trajectories']['slowdown']:.3f} × the time. Round trip residualize → restore: {m['02_fit_predictors']['round_trip_relative_error']:.1e} relative error in float32.",
    ]
    return "\n".join(
        [*lines, "", "In short, on this model and at this layer:", "", *_in_short(r, d, s)]
    )


def _in_short(r, d, s) -> list[str]:
    """What the figures say in words, as a list; nothing here is said but what they say."""
    best = {
        space: max(
            (n for n in r["ev"] if n.endswith(("concat", "one step"))),
            key=lambda n: r["ev"][n][space][0],
        )
        for space in ("activation", "residual")
    }
    lines = [
        f"* **Reconstruction.** Of the SAEs, {best['activation']} explains most in activation space and {best['residual']} in residual space."
    ]
    image = {
        n: r["image_effect"][n]["rmse"]
        for n in ("residual concat", "raw concat", "PCA", "training mean")
    }
    lines[-1] += (
        " Images made on reconstructions differ from the originals by "
        + ", ".join(f"{_interval(e)} ({n})" for n, e in image.items())
        + ", RMSE of pixels."
    )
    n_labels = len(next(iter(d["auroc"].values())))
    for rival, against in d["against"].items():
        lines.append(
            f"* **Detection, residual latents less {rival}.** AUROC {_interval(against['gap'])} on average; better on {against['better']} labels, worse on {against['worse']} of {n_labels}, by paired intervals without zero."
        )
    for rival, v in s["verdicts"].items():
        lines.append(
            f"* **Steering, residual latent less {rival}.** Ahead on {v['ahead']}, behind on {v['behind']} of {v['of']} targets; on the others these images cannot tell."
        )
    still = {
        t: next(e for k, e in rows["×0"].items() if k.startswith("still"))
        for t, rows in s["by_factor"].items()
        if any(k.startswith("still") for k in rows.get("×0", {}))
    }
    if still:
        lines.append(
            "* **Taking one latent away.** What still reads as it did: "
            + ", ".join(f"{t} {_interval(e)}" for t, e in still.items())
            + "."
        )
    return lines


def put_into(readme: Path, table: str) -> None:
    """Replace what stands between the README's markers."""
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
