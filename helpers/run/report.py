"""Tables and findings, written from the metrics that the notebooks measured, never by hand.

The tables stand in figures/README.md, the findings, a sentence each, in README.md; both between
markers.
"""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from helpers.files import load_json, save_text
from helpers.measure.metrics import Estimate

OURS = "residual concat"
INTERVALS = (
    "`[…]` are 95 % intervals over images: Wilson's for shares, else from resampling test images."
)


def load(figures: Path, model_figures: Path) -> dict[str, dict]:
    """The metrics of each notebook, '00' to '06', beside a run's and the demo model's figures.

    FileNotFoundError or ValueError names a file that is missing or damaged.
    """
    found = {}
    for folder, pattern in ((model_figures, "00_*.json"), (figures, "0[1-6]_*.json")):
        for path in sorted((folder / "metrics").glob(pattern)):
            found[path.name[:2]] = load_json(path)["metrics"]
    for notebook in ("00", "01", "02", "04", "05", "06"):
        if notebook not in found:
            raise FileNotFoundError(f"there are no metrics of notebook {notebook}; run it first")
    return found


def write(root: Path, figures: Path, model_figures: Path) -> None:
    """Renew the tables in figures/README.md and the findings in README.md."""
    metrics = load(figures, model_figures)
    put_between(root / "figures" / "README.md", "results", tables(metrics))
    put_between(root / "README.md", "results", findings(metrics))


def put_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between a page's markers of that name; ValueError if it has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page.name} has no markers {begin} and {end}; put them back")
    save_text(page, f"{before}{begin}\n{text}\n{end}{after}")


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; an estimate is a list of its value and the ends of its interval."""
    shown = [[str(Estimate(*v)) if isinstance(v, list) else v for v in row] for row in rows]
    return tabulate(shown, header, tablefmt="github", disable_numparse=True)


# --- tables ---


def tables(metrics: dict[str, dict]) -> str:
    """All tables, each under its own heading."""
    parts = {
        "The demo model, on captions it never saw": demo_model(metrics["00"]),
        "Explained variance of the next kept step": predictors(metrics["02"]),
        "Reconstruction": reconstruction(metrics["04"]),
        "Images on reconstructions": images(metrics["04"]),
        "Detection: mean AUROC of the best latent, chosen on other images": detection(
            metrics["05"]
        ),
        "Steering, at strengths chosen on other images": steering(metrics["06"]),
        "Taking a feature away": removal(metrics["06"]),
        "Costs": costs(metrics["01"], metrics["02"]),
    }
    sections = [f"### {title}\n\n{text}" for title, text in parts.items()]
    return "\n\n".join([INTERVALS, *sections])


def demo_model(m: dict) -> str:
    rows = [
        [name, row["measured"], f"≥ {row['aim']:.2f}", "met" if row["met"] else "not met"]
        for name, row in m["aims"].items()
    ]
    return table(["read in its images", "share right", "aim", ""], rows)


def predictors(m: dict) -> str:
    return table(["", *m["pairs"]], [[name, *row] for name, row in m["ev"].items()])


def reconstruction(m: dict) -> str:
    alive = {n: "" if share is None else f"{share:.0%}" for n, share in m["alive"].items()}
    rows = [
        [n, ev["activation"], ev["residual"], f"{m['numbers_per_trajectory'][n]:.1f}", alive[n]]
        for n, ev in m["ev"].items()
    ]
    header = ["EV in activation space", "EV in residual space", "numbers a trajectory", "alive"]
    return table(["", *header], rows)


def images(m: dict) -> str:
    names = list(m["image_effect"][OURS])
    rows = [[n, *(e[name] for name in names)] for n, e in m["image_effect"].items()]
    return table(["", *names], rows)


def detection(m: dict) -> str:
    rows = [[n, *row.values()] for n, row in m["mean_auroc"].items()]
    rows += [[f"arbitrary, {n}", *row.values()] for n, row in m["mean_auroc_arbitrary"].items()]
    return table(["", *next(iter(m["mean_auroc"].values()))], rows)


def steering(m: dict) -> str:
    rows = [
        [which, f"×{c['strength']:g}", c["success"], c["kept"], m["paired"].get(which, "")]
        for which, c in m["chosen"].items()
    ]
    rows = [[*row[0].split(" | "), *row[1:]] for row in rows]
    less = "success × kept, residual latent less this"
    return table(["target", "direction", "strength", "success", "others kept", less], rows)


def removal(m: dict) -> str:
    left = [[way, of_way["still there"]] for way, of_way in m["removal"].items()]
    return table(["what was taken away", "the attribute is still read"], left)


def costs(m01: dict, m02: dict) -> str:
    rows = [
        ["time with recording / plain pipeline", f"{m01['slowdown']:.3f}"],
        ["relative error of residualize → restore", f"{m02['round_trip_relative_error']:.1e}"],
    ]
    return table(["", "measured"], rows)


# --- findings ---


def findings(metrics: dict[str, dict]) -> str:
    """Five sentences; the figures choose the words."""
    m = metrics
    sentences = (
        _on_the_model(m["00"]),
        _on_prediction(m["02"]),
        _on_reconstruction(m["04"]),
        _on_detection(m["05"]),
        _on_steering(m["06"]),
    )
    return "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1))


def _on_the_model(m: dict) -> str:
    right = Estimate(*m["aims"]["all"]["measured"])
    return f"The shipped model draws all that a caption of one object says in {right} of images."


def _on_prediction(m: dict) -> str:
    ends = {name: [min(e[0] for e in row), max(e[0] for e in row)] for name, row in m["ev"].items()}
    ours, same = ("{:.2f} to {:.2f}".format(*ends[name]) for name in ("ridge", "identity"))
    return f"A linear predictor explains {ours} of the next kept step's variance, no change {same}."


def _on_reconstruction(m: dict) -> str:
    own = {"activation": "raw concat", "residual": OURS}
    best = {space: max(own.values(), key=lambda n, s=space: m["ev"][n][s][0]) for space in own}
    led = "each space is led" if best == own else "not each space is led"
    at = {n: " and ".join(f"{m['ev'][n][space][0]:.2f}" for space in own) for n in own.values()}
    return (
        f"Of the two concatenated SAEs, {led} by the one that was trained in it: explained "
        f"variance in activation and in residual space is {at['raw concat']} for raw and "
        f"{at[OURS]} for residual coordinates."
    )


def _on_detection(m: dict) -> str:
    auroc = {n: Estimate(*row["all labels"]) for n, row in m["mean_auroc"].items()}
    ranked = sorted(auroc, key=lambda n: -auroc[n].value)
    found = ", ".join(f"{auroc[n]} ({n})" for n in ranked)
    return f"The best latent for a label, chosen on other images, reaches a mean AUROC of {found}."


def _on_steering(m: dict) -> str:
    against = [
        f"{rival} on {v['ahead']} (behind on {v['behind']})" for rival, v in m["verdicts"].items()
    ]
    of = next(iter(m["verdicts"].values()))["of"]
    rivals = ", ".join(against)
    return f"Of {of} targets, steering along the residual latent is ahead of {rivals}."
