"""One latent's record: the arrays and numbers of which notebook, explorer and cards are views."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from helpers.files import load_json, load_tensors, save_json, save_tensors
from helpers.measure.metrics import Estimate

STATISTICS = {  # of every latent, and what each counts
    "firing rate": "share of tokens at which the code is not zero",
    "L0 share": "share of all active codes",
    "images": "share of images in which it fires",
    "largest code": "over all tokens",
    "onset": "denoising step by which a tenth of the evidence has come",
    "peak": "denoising step of the most evidence",
    "duration": "kept steps that hold half of the evidence",
    "label score": "AUROC for the label it detects best",
    "name score": "how well its name tells the images in which it fires from others",
}


class Name(NamedTuple):
    """What somebody, or some model, calls a feature."""

    text: str
    score: Estimate | None = None


class Strip(NamedTuple):
    """One prompt and seed, steered along a feature at several strengths."""

    strengths: np.ndarray  # (n,), ascending; 0 is the plain image
    images: np.ndarray  # float32 (n, height, width, channels) in [0, 1]
    prompt: str = ""


class Near(NamedTuple):
    """Another latent, how alike it is, and what it is called or detects."""

    latent: int
    similarity: float
    title: str


@dataclass(frozen=True)
class Examples:
    """Images of one kind, and where a latent is active in them."""

    images: np.ndarray  # numbers within the split, int (n,)
    codes: np.ndarray  # largest code in each, (n,)
    prompts: list[str]
    pictures: np.ndarray  # float32 (n, height, width, channels) in [0, 1]
    maps: np.ndarray  # code over the latent's largest one, float32 (n, rows, columns)
    evidence: np.ndarray  # by step, of the first m of them, float32 (m, step, rows, columns)


@dataclass(frozen=True)
class Record:
    """Everything that a page shows of a latent, as arrays and numbers."""

    run: str
    dictionary: str
    split: str
    latent: int
    statistics: dict[str, float]  # by the names of STATISTICS; NaN where there is nothing to say
    labels: dict[str, Estimate]  # AUROC for the labels it was found best at, the best first
    examples: dict[str, Examples]  # 'random', 'quantile' and 'top', in this order
    steps: list[int]  # kept denoising steps
    timesteps: list[float]
    profile: np.ndarray  # share of evidence that comes at each kept step, (step,)
    effect: np.ndarray  # ‖u[s]‖, what a code of 1 does, (step,)
    onset: np.ndarray  # ‖w[s]‖, what is new of it at each step, (step,)
    nearest: dict[str, list[Near]]  # 'by trajectory' and 'by co-firing'
    name: Name | None = None
    strip: Strip | None = None

    @property
    def title(self) -> str:
        """What it is called, as `title` chooses."""
        return title(self.name, self.labels)


def title(name: Name | None, labels: dict[str, Estimate]) -> str:
    """A name; but the best label where there is one and the name's score may be that of chance."""
    doubtful = name is not None and name.score is not None and not name.score.low > 0.5
    return name.text if name and not (doubtful and labels) else next(iter(labels), "")


def write_names(path: str | Path, names: dict[int, Name], made_from: dict[str, str]) -> None:
    """Add the names of latents to a file, in place of older ones.

    `made_from` holds fingerprints of the dictionary's files; names of another dictionary go.
    """
    kept = read_names(path, made_from) | names
    written = {
        str(i): {"name": of.text, "score": of.score, "made_from": made_from}
        for i, of in sorted(kept.items())
    }
    save_json(path, written, sort_keys=False)


def read_names(path: str | Path, made_from: dict[str, str]) -> dict[int, Name]:
    """The names in a file, {} if there is none, but for those of another dictionary.

    A name that says nothing of what it was made from, such as one written by hand, is taken.
    """
    found = load_json(path) if Path(path).exists() else {}
    return {
        int(latent): Name(of["name"], _estimate(of.get("score")))
        for latent, of in found.items()
        if of.get("made_from", made_from) == made_from
    }


def _estimate(score) -> Estimate | None:
    return score and Estimate(*(float("nan") if v is None else v for v in score))


def save_strip(path: str | Path, strip: Strip) -> None:
    """Write a strip; images as bytes, rounded."""
    images = torch.from_numpy((np.clip(strip.images, 0, 1) * 255).round().astype(np.uint8))
    strengths = torch.as_tensor(np.asarray(strip.strengths, float))
    save_tensors(path, {"strengths": strengths, "images": images}, {"prompt": strip.prompt})


def load_strip(path: str | Path) -> Strip:
    """Read what `save_strip` wrote."""
    tensors, record = load_tensors(path)
    images = tensors["images"].numpy().astype(np.float32) / 255
    return Strip(tensors["strengths"].numpy(), images, record["prompt"])
