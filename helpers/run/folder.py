"""A run: the folder in which notebooks hand on files, each held against what it was made from."""

import platform
import re
import subprocess
import sys
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from helpers.checks import choose_device, choose_dtype, refuse
from helpers.demo.truth import Scenes
from helpers.dictionary import Dictionary
from helpers.files import check_writable, digest, load_json, load_tensors, save_json
from helpers.measure.encoders import Encoder, Judge
from helpers.measure.lpips import LPIPS
from helpers.measure.words import Words
from helpers.pipelines.loading import load_pipeline
from helpers.plots.style import save_figure
from helpers.predictors import Predictors
from helpers.run import parameters as _parameters
from helpers.store.read import Store
from helpers.training.loop import History, TrainConfig

DEMO_MODEL = Path(__file__).resolve().parents[1] / "demo" / "weights"  # trained by notebook 00
FILES = {  # what a run hands on: its file, and the notebook that writes it
    "trajectories": ("trajectories/manifest.json", "01_collect_trajectories"),
    "predictors": ("predictors.safetensors", "02_fit_predictors"),
    "sae": ("sae.safetensors", "03_train_residual_sae"),
    "residual concat": ("sae.safetensors", "03_train_residual_sae"),
    "latents": ("latents.json", "05_spatiotemporal_heatmaps"),
}
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scikit-learn", "safetensors")


class Run:
    """One notebook at work in one run: its checked parameters, and the files it reads and writes.

    `namespace` is the notebook's `globals()`, where `run` may be this object by now, or a dict of
    its parameters. ValueError names a wrong, absent or unknown parameter, or a read-only folder.
    """

    def __init__(self, notebook: str, namespace: dict):
        known = _parameters.parameters_of(_parameters.NOTEBOOKS / f"{notebook}.ipynb")
        _parameters.refuse_unknown(_parameters.injected(namespace), known)
        for name in known:
            if name not in namespace:
                raise ValueError(f"{name} has no value; run the parameters cell first")
        values = {name: namespace[name] for name in known}
        if isinstance(values["run"], Run):
            values["run"] = values["run"].name
        self.parameters = _parameters.checked(values, known)
        self.notebook, self.name = notebook, values["run"]
        self.folder, self.figures = run_folder(self.name), figures_folder(self.name)
        for folder in (self.folder, self.figures):
            check_writable(folder)
        check_writable(self.folder / "metrics", f"{notebook}.json")
        self.device, self.dtype = choose_device(values["device"]), choose_dtype(values["dtype"])

    def path(self, what: str) -> Path:
        """Where a file of the run lies: one of FILES, or a baseline by its name."""
        return path_in(self.folder, what)

    def made_from(self, what: str) -> dict[str, str]:
        """For the record of a file that is made from trajectories, predictors or dictionary."""
        names = {"dictionary": ("predictors", "sae")}.get(what, (what,))
        return {name: fingerprint(self.path(name)) for name in names}

    @cached_property
    def store(self) -> Store:
        """The trajectories of notebook 01."""
        return Store(self.path("trajectories").parent)

    @cached_property
    def predictors(self) -> Predictors:
        """The predictors of notebook 02, on the run's device."""
        return self._read(Predictors.load, "predictors", "trajectories")[0]

    @cached_property
    def _trained(self) -> tuple[Dictionary, dict]:
        """The dictionary of notebook 03 on the run's device, and what was written beside it."""
        return self._read(Dictionary.load, "sae", "predictors")

    dictionary = property(lambda self: self._trained[0])
    record = property(lambda self: self._trained[1])  # with config, history and block_exponent
    config = property(lambda self: TrainConfig(**self.record["config"]))
    history = property(lambda self: History(**self.record["history"]))

    def baseline(self, name: str) -> Dictionary:
        """A dictionary that notebook 04 made beside that of 03, such as "raw concat"."""
        return self._read(Dictionary.load, name, "predictors", "sae")[0]

    @cached_property
    def latents(self) -> dict:
        """What notebook 05 found each label's best latents to be."""
        found = load_json(self.path("latents"))
        self._hold("latents", found, "sae", "raw concat")
        return found

    @cached_property
    def truth(self) -> Scenes | Words:  # a Judge is Words, too
        """Who says what is in an image: the demo world about its own, else the prompts' words.

        Prompts without a word are the world's only if the images are the shipped model's. Where the
        notebook names an encoder as `judge`, it says what images show of those words; it is held
        against the validation images before, and measures LPIPS if `lpips` names its weights.
        """
        prompts, shape = self.store.prompts, self.store.images("test", [0]).shape[1:]
        own = any(prompts) or self.store.manifest["model"] == "demo"
        if own and Scenes.describes(prompts, shape):
            return Scenes()
        judge, weights = (self.parameters.get(name) for name in ("judge", "lpips"))
        if not judge:
            return Words(prompts)
        lpips = LPIPS.load(weights, self.device) if weights else None
        judge = Judge(Encoder.load(judge, self.device), prompts, lpips=lpips)
        return judge.calibrate(self.store.prompts_of("validation"), self.store.images("validation"))

    def pipeline(self):
        """The diffusion model: `model` in notebook 01, afterwards the one that was recorded."""
        p = self.parameters
        about = p if "model" in p else self.store.manifest
        return load_model(about["model"], p["device"], p["dtype"], about["revision"])

    def _read(self, load, what: str, *made_from: str) -> tuple:
        """What a file holds, on the run's device, and its record, held against what it names."""
        found, record = load(self.path(what))
        self._hold(what, record, *made_from)
        return found.to(self.device), record

    def _hold(self, what: str, record: dict, *made_from: str) -> None:
        notebook = FILES.get(what, ("", "04_reconstruction_ablation"))[1]
        for source in made_from:
            if record.get(source) != fingerprint(self.path(source)):
                again = f"{notebook} read another one, so run {notebook} again"
                raise ValueError(f"{self.path(source).name} has changed: {again}")

    def keep_other(self, path: Path, record: dict) -> Path | None:
        """Move a file made with another record aside, to a name of its own, which is returned."""
        try:
            before = load_tensors(path)[1]
        except (FileNotFoundError, ValueError):  # there is none, or a damaged one: nothing to keep
            return None
        if all(before.get(k) == v for k, v in record.items()):
            return None
        aside = path.with_name(f"{path.stem}-{fingerprint(path)[:8]}{path.suffix}")
        path.rename(aside)
        print(f"{path.name} had been made otherwise; it is kept as {aside.name}")
        return aside

    def save(self, fig, name: str, **about) -> None:
        """Save a figure as PDF and PNG in figures/<run>/; its metadata name notebook and commit."""
        about |= {
            "notebook": self.notebook,
            "run": self.name,
            "seed": self.parameters.get("seed", ""),
        }
        save_figure(fig, self.figures, name, commit=commit(), **about)

    def write(self, metrics: dict) -> None:
        """Write metrics/<notebook>.json: the figures reported, parameters and versions."""
        path = self.folder / "metrics" / f"{self.notebook}.json"
        record = {"notebook": self.notebook, "parameters": self.parameters, "metrics": metrics}
        versions = {"python": platform.python_version()} | {p: version(p) for p in PACKAGES}
        save_json(path, record | {"versions": versions}, sort_keys=False)  # tables keep this order
        print(f"{path.name} written")


def run_folder(run: str) -> Path:
    """runs/<run> under the project, or the folder itself if `run` is an absolute path."""
    named = re.fullmatch(r"[\w.-]*[\w-][\w.-]*", str(run))
    if not isinstance(run, str) or not (named or Path(run).is_absolute()):
        refuse("run", run, "letters, digits, '.', '_' and '-', or an absolute path")
    return _parameters.ROOT / "runs" / run


def path_in(folder: Path, what: str) -> Path:
    """Where a file lies in a run's folder: one of FILES, or a baseline of notebook 04 by name."""
    baseline = f"baselines/{what.replace(' ', '_')}.safetensors"
    return folder / FILES.get(what, (baseline,))[0]


def figures_folder(run: str) -> Path:
    """figures/<run> under the project, or `figures` inside `run` if that is an absolute path."""
    folder = run_folder(run)
    return folder / "figures" if Path(run).is_absolute() else _parameters.ROOT / "figures" / run


def load_model(model: str, device: str = "auto", dtype: str = "auto", revision: str = ""):
    """A diffusers pipeline: 'demo' is the shipped model, all else as `load_pipeline` takes it."""
    return load_pipeline(str(DEMO_MODEL) if model == "demo" else model, device, dtype, revision)


def fingerprint(path: str | Path) -> str:
    """First 16 hex digits of a file's SHA-256: what a later file was made from."""
    return digest(path)[:16]


def peak_memory(device: str = "cpu") -> str:
    """The most memory this process has held so far, in words."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    words = f"{held / 1e9:.2f} GB of memory"
    if str(device).startswith("cuda"):
        on_card = torch.cuda.max_memory_allocated(device) / 1e9
        words += f", {on_card:.2f} GB on {torch.cuda.get_device_name(device)}"
    return words


def commit() -> str:
    """The commit of the project's checkout, or 'unknown'; goes into the figures' metadata."""
    command = ["git", "-C", str(_parameters.ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
