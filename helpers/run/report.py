"""Tables and findings, written from the metrics that the notebooks measured, never by hand.

The tables stand in figures/README.md, the findings, a sentence each, in README.md, both between
markers.
"""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from helpers.files import load_json, save_text
from helpers.measure.metrics import Estimate

INTERVALS = "`[…]` are 95 % intervals over images: Wilson's for shares, else from resampling."


def load(figures: Path, model_figures: Path) -> dict[str, dict]:
    """The metrics of each notebook, '00' to '06', beside a run's and the demo model's figures."""
    paths = [*model_figures.glob("metrics/00_*.json"), *figures.glob("metrics/0[1-6]_*.json")]
    found = {path.name[:2]: load_json(path)["metrics"] for path in paths}
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


def tables(metrics: dict[str, dict]) -> str:
    """All tables, each under its own heading."""
    model, ridge, sae, latents, steered = (metrics[n] for n in ("00", "02", "04", "05", "06"))
    round_trip = f"{ridge['round_trip_relative_error']:.1e}"
    parts = {
        "The demo model, on captions it never saw": table(
            ["read in its images", "share right", "aim", ""],
            [
                [name, row["measured"], f"≥ {row['aim']:.2f}", "met" if row["met"] else "not met"]
                for name, row in model["aims"].items()
            ],
        ),
        "Explained variance of the next kept step": table(
            ["", *ridge["pairs"]], [[name, *row] for name, row in ridge["ev"].items()]
        ),
        "Reconstruction": table(
            ["", "EV in activation space", "EV in residual space", "numbers", "alive"],
            [
                [name, ev["activation"], ev["residual"]]
                + [f"{sae['numbers_per_trajectory'][name]:.1f}", _share(sae["alive"][name])]
                for name, ev in sae["ev"].items()
            ],
        ),
        "Images on reconstructions": table(
            ["", *next(iter(sae["image_effect"].values()))],
            [[name, *effect.values()] for name, effect in sae["image_effect"].items()],
        ),
        "Detection: mean AUROC of the best latent, chosen on other images": table(
            ["", *next(iter(latents["mean_auroc"].values()))],
            [[name, *row.values()] for name, row in latents["mean_auroc"].items()]
            + [
                [f"arbitrary, {n}", *r.values()] for n, r in latents["mean_auroc_arbitrary"].items()
            ],
        ),
        "Steering, at strengths chosen on other images": table(
            ["target", "direction", "strength", "success", "kept", "success × kept, ours less it"],
            [
                [*which.split(" | "), f"×{c['strength']:g}", c["success"], c["kept"]]
                + [steered["paired"].get(which, "")]
                for which, c in steered["chosen"].items()
            ],
        ),
        "Taking a feature away": table(
            ["what was taken away", "the attribute is still read"],
            [[way, of_way["still there"]] for way, of_way in steered["removal"].items()],
        ),
        "Costs": table(
            ["", "measured"],
            [
                ["time with recording / plain pipeline", f"{metrics['01']['slowdown']:.3f}"],
                ["relative error of residualize → restore", round_trip],
            ],
        ),
    }
    sections = [f"### {title}\n\n{text}" for title, text in parts.items()]
    return "\n\n".join([INTERVALS, *sections])


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def findings(metrics: dict[str, dict]) -> str:
    """Five sentences; the figures choose the words."""
    model, ridge, sae, latents, steered = (metrics[n] for n in ("00", "02", "04", "05", "06"))
    ends = {
        name: "{:.2f} to {:.2f}".format(*(f(e[0] for e in row) for f in (min, max)))
        for name, row in ridge["ev"].items()
    }
    ev = {
        name: [e[0] for e in (of["activation"], of["residual"])] for name, of in sae["ev"].items()
    }
    raw, residual = ev["raw concat"], ev["residual concat"]
    own_wins = raw[0] > residual[0] and residual[1] > raw[1]
    auroc = {name: Estimate(*row["all labels"]) for name, row in latents["mean_auroc"].items()}
    ranked = sorted(auroc.items(), key=lambda found: -found[1].value)
    verdicts = steered["verdicts"]
    against = (
        f"{rival} on {v['ahead']} (behind on {v['behind']})" for rival, v in verdicts.items()
    )
    sentences = (
        "The shipped model draws all that a caption of one object says in "
        f"{Estimate(*model['aims']['all']['measured'])} of images.",
        f"A linear predictor explains {ends['ridge']} of the next kept step's variance, "
        f"no change {ends['identity']}.",
        f"Of the two concatenated SAEs, {'each' if own_wins else 'not each'} space is led by the "
        "one trained in it: explained variance in activation and in residual space is "
        f"{raw[0]:.2f} and {raw[1]:.2f} for raw coordinates, {residual[0]:.2f} and "
        f"{residual[1]:.2f} for residual ones.",
        "The best latent for a label, chosen on other images, reaches a mean AUROC of "
        + ", ".join(f"{e} ({name})" for name, e in ranked)
        + ".",
        f"Of {next(iter(verdicts.values()))['of']} targets, steering along the residual latent is "
        f"ahead of {', '.join(against)}.",
    )
    return "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1))
