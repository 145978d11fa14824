"""A shared dictionary's model card: what it is, where it listens, and what its run measured.

`summary` takes from a run's folder what the card needs, once, so that a bundle has it without the
run; `text` writes the card. What was not measured is said not to have been.
"""

from __future__ import annotations

from pathlib import Path
from string import Template

from tabulate import tabulate

from helpers.dictionary import Dictionary
from helpers.files import digest, load_json
from helpers.measure.metrics import Estimate

N_BEST = 12  # features that a card shows
RIVALS = ("raw concat", "untrained residual", "untrained raw", "predictors")  # shown beside it
SHOWN = ("trained", "trained, on training images", "untrained")
LISTENS = ("model", "hookpoint", "revision", "signal", "branch", "scheduler", "sampling", "grid")


def summary(folder: str | Path) -> dict:
    """What the notebooks of a run's folder found of its dictionary, as JSON can hold it.

    "reconstruction" of 03, "spaces" of 04 and "auroc" and "features" of 05, as far as these were
    run; the latter two only if they read this very dictionary. ValueError names a damaged file.
    """
    folder, found = Path(folder), {}
    trained = _metrics(folder, "03_train_residual_sae")
    if trained:
        found["reconstruction"] = {n: of for n, of in trained["results"].items() if n in SHOWN}
    latents = folder / "latents.json"
    fresh = latents.exists() and load_json(latents).get("sae")
    if not fresh or not digest(folder / "sae.safetensors").startswith(fresh):
        return found
    compared, detected = (
        _metrics(folder, name)
        for name in ("04_reconstruction_ablation", "05_spatiotemporal_heatmaps")
    )
    if compared:
        found["spaces"] = {
            n: compared["ev"][n] for n in ("residual concat", *RIVALS) if n in compared["ev"]
        }
    if detected:
        found["auroc"] = {
            n: of["all labels"] for n, of in detected["mean_auroc"].items() if "all labels" in of
        }
        found["n_images"] = detected["n_images"]
    auroc = (detected or {}).get("auroc", {}).get("residual concat", {})
    return found | {"features": best(load_json(latents), auroc)}


def _metrics(folder: Path, notebook: str) -> dict | None:
    path = folder / "metrics" / f"{notebook}.json"
    return load_json(path)["metrics"] if path.exists() else None


def best(latents: dict, auroc: dict, n: int = N_BEST) -> list[dict]:
    """The n best features: each label's best latent, the best detected first, of `latents.json`.

    Ordered by AUROC on validation images, which chose them; `auroc`, label -> [value, low, high],
    is that on test images. Then, or without labels, the strongest of the clusters.
    """
    by_label = latents["best"]
    rank = {label: of["validation_auroc"]["residual"] or 0 for label, of in by_label.items()}
    found: dict[int, dict] = {}
    for label in sorted(rank, key=lambda label: -rank[label]):
        latent = by_label[label]["residual"]
        feature = {"latent": latent, "what": label, "auroc": auroc.get(label)}
        found.setdefault(latent, feature)
    for cluster in latents["strongest"]:
        feature = {"latent": cluster["residual"], "what": cluster["name"], "auroc": None}
        found.setdefault(cluster["residual"], feature)
    return list(found.values())[:n]


def text(dictionary: Dictionary, manifest: dict, report: dict, repo: str, with_page=()) -> str:
    """The model card in Markdown, without the metadata on top.

    `report` is `summary`'s, empty where nothing is known; `with_page` are the latents of which
    there is a page and a picture beside it, as `pages.write` makes them.
    """
    c = dictionary.coordinates
    return Template((Path(__file__).parent / "card.md").read_text()).substitute(
        title=", ".join([dictionary.name, *(manifest[n] for n in LISTENS[:2] if manifest.get(n))]),
        repo=repo,
        model=manifest.get("model") or "a diffusion model",
        n_steps=c.n_steps,
        n_latents=f"{dictionary.n_latents:,}",
        space=f"{'residual' if c.lags() else 'raw'} coordinates",
        meaning=": what predictors leave over of each step" if c.lags() else "",
        listens=_listens(dictionary, manifest),
        reconstruction=_reconstruction(report),
        detection=_detection(report),
        features=_features(report.get("features", []), with_page),
    )


def _listens(dictionary: Dictionary, manifest: dict) -> str:
    rows = [[name, manifest[name]] for name in LISTENS if manifest.get(name) not in ("", None)]
    steps = [f"{s} (t = {t:g})" for s, t in zip(manifest["steps"], manifest.get("timesteps", ()))]
    rows.append(["kept steps", ", ".join(steps or map(str, manifest["steps"]))])
    rows.append(["channels", dictionary.coordinates.channels])
    rows.append(["dictionary", dictionary.name])
    if getattr(dictionary.coder, "k", None):
        rows.append(["active latents asked for", f"{dictionary.coder.k:g} a trajectory"])
    return _table([[name, _words(value)] for name, value in rows], ["", ""])


def _reconstruction(report: dict) -> str:
    results, spaces = report.get("reconstruction", {}), report.get("spaces", {})
    if not results:
        return "Not measured."
    rows = [
        [name, _estimate(of["ev"]), _estimate(of["l0"]), f"{of['alive']:.0%}", of["trajectories"]]
        for name, of in results.items()
    ]
    header = ["in its own coordinates", "EV", "active latents (L0)", "latents used", "trajectories"]
    parts = ["Explained variance (EV) is 1 for the truth and 0 for the mean."]
    parts.append("Of images not trained on, unless said; `[…]` are 95 % intervals over images.")
    parts = [" ".join(parts), _table(rows, header)]
    if spaces:
        rows = [
            [n, *(_estimate(of[s]) for s in ("activation", "residual"))] for n, of in spaces.items()
        ]
        parts.append(_table(rows, ["EV", "in activation space", "in residual space"]))
    return "\n\n".join(parts)


def _detection(report: dict) -> str:
    if not report.get("auroc"):
        return "Not measured: the run has no labels, or notebook 05 has not been run."
    rows = [[name, _estimate(value)] for name, value in report["auroc"].items()]
    said = "Mean AUROC over labels of the best latent for each, chosen on other images; "
    said += f"{report['n_images']} test images."
    return said + "\n\n" + _table(rows, ["", "mean AUROC"])


def _features(features: list[dict], with_page) -> str:
    if not features:
        return "None were chosen yet: notebook 05 does."
    header, rows = ["latent", "of what", "AUROC on test images", ""], []
    for feature in features:
        name, picture = str(feature["latent"]), ""
        if feature["latent"] in with_page:
            picture = f"![Images and maps of latent {name}](features/latent-{name}.jpg)"
            name = f"[{name}](features/latent-{name}.html)"
        rows.append([name, _words(feature["what"]), _estimate(feature["auroc"]), picture])
    said = "The best detected labels' latents, then the strongest of the clusters."
    if with_page:
        header[-1] = "random images in which it fires, and where"
        said += " Each number leads to a page for a browser: download the folder `features` and"
        said += " open its `index.html`."
    return said + "\n\n" + _table(rows, header)


def _estimate(value) -> str:
    """[value, low, high], or null where nothing was measured, in figures."""
    if value is None or None in value:
        return "–"
    return str(Estimate(*value))


def _words(value) -> str:
    """A value of a manifest as a cell of a Markdown table."""
    if isinstance(value, dict):
        value = ", ".join(f"{n} = {v}" for n, v in value.items() if v not in (0, "", None, {}))
    elif isinstance(value, (list, tuple)):
        value = " × ".join(map(str, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(rows: list[list], header: list[str]) -> str:
    return tabulate(rows, header, "github", disable_numparse=True)
