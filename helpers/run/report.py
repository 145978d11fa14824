"""Tables and findings, written from the metrics that the notebooks measured, never by hand."""

import re
from pathlib import Path

from tabulate import tabulate

from helpers.checks import refuse
from helpers.files import load_json, save_text
from helpers.measure.metrics import Estimate

INTERVALS = "`[…]` are 95 % intervals over images: Wilson's for shares, else from resampling."


def load(figures: Path, model_figures: Path) -> dict[str, dict]:
    """The metrics of notebooks '00' to '06', in order, beside a run's and the model's figures."""
    found = {}
    for notebook in ("00", "01", "02", "04", "05", "06"):
        folder = model_figures if notebook == "00" else figures
        path = next(folder.glob(f"metrics/{notebook}_*.json"), None)
        if path is None:
            raise FileNotFoundError(f"there are no metrics of notebook {notebook}; run it first")
        found[notebook] = load_json(path)["metrics"]
    return found


def write(root: Path, figures: Path, model_figures: Path) -> None:
    """Renew tables in figures/README.md, findings in README.md and figures in REPRODUCE.md."""
    metrics = load(figures, model_figures)
    put_between(root / "figures" / "README.md", "results", tables(metrics))
    put_between(root / "README.md", "results", findings(metrics))
    (study,) = figures.glob("metrics/07_*.json")
    told = residualizing(load_json(study)["metrics"]["differences"])
    put_between(root / "README.md", "residualizing", told)
    renew(root / "REPRODUCE.md", metrics)


def put_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between a page's markers of that name; ValueError if it has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page.name} has no markers {begin} and {end}; put them back")
    save_text(page, f"{before}{begin}\n{text}\n{end}{after}")


def renew(page: Path, metrics: dict[str, dict]) -> None:
    """Renew each figure that stands in a page's text behind the metric that it is.

    As `<!--04: ev / raw concat / activation-->0.87 [0.86, 0.88]<!---->`: notebook, then keys, or a
    number for a list's entry. ValueError for one that the notebook did not measure.
    """

    def figure(match: re.Match) -> str:
        value = metrics.get(match[1])
        for key in match[2].split(" / "):
            try:
                value = value[int(key) if isinstance(value, list) else key]
            except (KeyError, IndexError, TypeError, ValueError):
                refuse(f"a figure in {page.name}", match[0], "a metric that the notebook measured")
        shown = "{} [{}, {}]" if isinstance(value, list) else "{}"
        numbers = value if isinstance(value, list) else [value]
        return f"<!--{match[1]}: {match[2]}-->{shown.format(*(f'{v:.2f}' for v in numbers))}<!---->"

    save_text(page, re.sub(r"<!--(\d\d): (.+?)-->.*?<!---->", figure, page.read_text()))


def table(rows: list[dict]) -> str:
    """A Markdown table; an estimate is a list of its value and the ends of its interval."""
    shown = [
        r | {k: str(Estimate(*map(_number, v))) for k, v in r.items() if isinstance(v, list)}
        for r in rows
    ]
    return tabulate(shown, "keys", tablefmt="github", disable_numparse=True)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value  # JSON has no NaN


def tables(metrics: dict[str, dict]) -> str:
    """All tables, each under its own heading."""
    model, costs, ridge, sae, latents, steered = metrics.values()
    aims, reconstruction, chosen = [], [], []
    for name, aim in model["aims"].items():
        met = {"aim": f"≥ {aim['aim']:.2f}", "": "met" if aim["met"] else "not met"}
        aims.append({"read in its images": name, "share right": aim["measured"]} | met)
    for name, of in sae["ev"].items():
        ev = {f"EV in {space} space": of[space] for space in ("activation", "residual")}
        alive = "" if sae["alive"][name] is None else f"{sae['alive'][name]:.0%}"
        numbers = f"{sae['numbers_per_trajectory'][name]:.1f}"
        reconstruction.append({"": name} | ev | {"numbers": numbers, "alive": alive})
    for which, of in steered["chosen"].items():
        row = dict(zip(("target", "direction"), which.split(" | ")))
        row |= {"strength": f"×{of['strength']:g}", "success": of["success"], "kept": of["kept"]}
        row["success × kept, ours less it"] = steered["paired"].get(which, "")
        chosen.append(row)
    ev = {name: dict(zip(ridge["pairs"], row)) for name, row in ridge["ev"].items()}
    arbitrary = {f"arbitrary, {n}": row for n, row in latents["mean_auroc_arbitrary"].items()}
    costs = {
        "time with recording / plain pipeline": f"{costs['slowdown']:.3f}",
        "relative error of residualize → restore": f"{ridge['round_trip_relative_error']:.1e}",
    }
    parts = {
        "The demo model, on captions it never saw": aims,
        "Explained variance of the next kept step": _named(ev),
        "Reconstruction": reconstruction,
        "Images on reconstructions": _named(sae["image_effect"]),
        "Detection: mean AUROC of the best latent, chosen on other images": _named(
            latents["mean_auroc"] | arbitrary
        ),
        "Steering, at strengths chosen on other images": chosen,
        "Taking a feature away": [
            {"what was taken away": way, "the attribute is still read": found["still there"]}
            for way, found in steered["removal"].items()
        ],
        "Costs": [{"": what, "measured": value} for what, value in costs.items()],
    }
    sections = [f"### {title}\n\n{table(rows)}" for title, rows in parts.items()]
    return "\n\n".join([INTERVALS, *sections])


def _named(rows: dict[str, dict]) -> list[dict]:
    return [{"": name} | row for name, row in rows.items()]


def findings(metrics: dict[str, dict]) -> str:
    """Five sentences; the figures choose the words."""
    model, _, ridge, sae, latents, steered = metrics.values()
    ends = {n: f"{min(row)[0]:.2f} to {max(row)[0]:.2f}" for n, row in ridge["ev"].items()}
    spaces = ("activation", "residual")
    raw = [sae["ev"]["raw concat"][space][0] for space in spaces]
    residual = [sae["ev"]["residual concat"][space][0] for space in spaces]
    led = "each" if raw[0] > residual[0] and residual[1] > raw[1] else "not each"
    auroc = {name: Estimate(*row["all labels"]) for name, row in latents["mean_auroc"].items()}
    ranked = sorted(auroc, key=lambda name: -auroc[name].value)
    verdicts = steered["verdicts"]
    against = (f"{name} on {v['ahead']} (behind on {v['behind']})" for name, v in verdicts.items())
    missed = [name for name, aim in model["aims"].items() if not aim["met"]]
    met = f"{len(model['aims']) - len(missed)} of {len(model['aims'])} aims"
    met += f" and misses {', '.join(missed)}" if missed else ""
    return f"""\
1. The shipped model draws all that a caption of one object says in \
{Estimate(*model["aims"]["all"]["measured"])} of images; it meets {met}, set before its training.
2. A linear predictor explains {ends["ridge"]} of the next kept step's variance, \
no change {ends["identity"]}.
3. Of the two concatenated SAEs, {led} space is led by the one trained in it: explained variance \
in activation and in residual space is {raw[0]:.2f} and {raw[1]:.2f} for raw coordinates, \
{residual[0]:.2f} and {residual[1]:.2f} for residual ones.
4. The best latent for a label, chosen on other images, reaches a mean AUROC of \
{", ".join(f"{auroc[name]} ({name})" for name in ranked)}.
5. Of {next(iter(verdicts.values()))["of"]} targets, steering along the residual latent is \
ahead of {", ".join(against)}."""


def residualizing(found: dict[str, list[float]]) -> str:
    """Three sentences on what residual coordinates do, from notebook 07's differences from raw.

    One that says so where the study has not come to it.
    """
    names = ("auroc | a=1", "probe 20 | a=1", "ev | a=1", "ev, residual space | a=1")
    if not set(names) <= set(found):
        return "Not measured yet on this model: `make sweep RUN=comparison`, then `make notebooks`."

    def of(name: str) -> Estimate:
        return Estimate(*found.get(name, [float("nan")] * 3))

    def by(name: str) -> str:
        value, low, high = of(name)
        return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"

    one, several = of("auroc | a=1"), of("probe 20 | a=1")
    splits = one.high < 0 and several.value > one.value
    gain = of("peak share, trained less untrained | open a=1")
    own, floor = of("when | open sae a=1"), of("when | open untrained a=1")
    told = "tells" if own.low > max(0, floor.value) else "does not tell"
    return f"""\
1. **It moves the error**: explained variance changes by {by("ev | a=1")} in activation space and \
by {by("ev, residual space | a=1")} in residual space.
2. **It {"splits features" if splits else "does not split features"}**: the AUROC of a label's \
best latent changes by {by("auroc | a=1")}, that of its best 20 latents together by \
{by("probe 20 | a=1")}.
3. **It {"buys" if gain.low > 0 else "does not buy"} concentration in time, and its evidence \
{told} when an attribute is decided**: training adds {gain.value:+.3f} to the share of a code's \
evidence in its peak step (raw {of("peak share, trained less untrained | open raw").value:+.3f}), \
and the rank correlation of evidence with decisions, less that for other attributes, is {own} \
(raw {of("when | open sae raw")}, untrained {floor}, a probe at each step \
{of("when | open ceiling raw")})."""
