"""What a collection is to hold, and the record that each of its folders keeps of that.

A store is a folder of safetensors shards, one a batch of images, of `begun.json`, written with the
first, and of `manifest.json`, written with the last, which adds their SHA-256 and the versions.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from helpers.checks import DTYPES, in_range, one_of, refuse
from helpers.files import check_writable, load_json
from helpers.pipelines.calls import BRANCHES
from helpers.pipelines.loading import denoiser_of
from helpers.trajectories import Tap, bytes_per_image, refuse_absent, shapes, times_of

SPLITS = ("train", "validation", "test")
RECORDED = (  # what every begun.json and manifest.json holds, among others
    *("prompts", "seeds", "split", "sampling", "steps", "timesteps", "grid", "channels", "dtype"),
    *("tokens_per_image", "train_images", "hookpoint", "signal", "branch", "batch_size"),
)
IN_MANIFEST = ("shards", "images_of_shard")
PARAMETERS = {"dtype": "store_dtype", "model_dtype": "dtype"}  # of other names than on record
# with these, what follows from a Plan and the pipeline
NOT_CHOSEN = ("scheduler", "weights", "sigmas", "versions", *IN_MANIFEST)


@dataclass
class Plan:
    """What a collection is to hold; plan and weights determine its bytes on a given machine."""

    taps: dict[Path, Tap]  # folder of each store -> what it records, all in one pass
    prompts: list[str]  # of each image
    seeds: list[int]  # of each image; its noise and its kept tokens follow from it alone
    splits: list[str]  # of each image: 'train', 'validation' or 'test'
    steps: list[int]  # denoising steps to keep, 0 is the noisiest
    sampling: dict  # arguments of the pipeline's call; height or width 0 is the model's own
    batch_size: int  # images made at once and stored in one shard
    store_dtype: torch.dtype = torch.float16  # of activations on disk
    tokens_per_image: int = 0  # kept of each training image, at random; 0, and of others: all
    train_images: bool = True  # whether training images are stored beside their activations
    about: dict = field(default_factory=dict)  # what else identifies it: model, model_dtype …

    def __post_init__(self):
        self.taps = {Path(folder): Tap.of(tap) for folder, tap in self.taps.items()}
        self.sampling = {"height": 0, "width": 0} | self.sampling
        lengths = tuple(map(len, (self.prompts, self.seeds, self.splits)))
        if not lengths[0] or len(set(lengths)) > 1:
            refuse("prompts, seeds and splits", lengths, "of one length, which is at least 1")
        for split in self.splits:
            one_of("split", split, SPLITS)
        for tap in self.taps.values():
            one_of("branch", tap.branch, BRANCHES)
        in_range("batch_size", self.batch_size, 1)
        one_of("store_dtype", self.store_dtype, DTYPES.values())

    @staticmethod
    def of_record(folder: Path, record: dict) -> Plan:
        """The plan that a folder was begun with, for this folder alone."""
        return Plan(
            taps={folder: Tap(*(record[name] for name in Tap._fields))},
            splits=record["split"],
            store_dtype=getattr(torch, record["dtype"]),
            about={k: v for k, v in record.items() if k not in (*RECORDED, *NOT_CHOSEN)},
            **{f.name: record[f.name] for f in fields(Plan) if f.name in RECORDED},
        )

    @cached_property
    def shards(self) -> list[list[int]]:
        """The images of each shard: neighbours of one split, `batch_size` at most."""
        of_split = ([i for i, s in enumerate(self.splits) if s == split] for split in SPLITS)
        n = self.batch_size
        return [images[i : i + n] for images in of_split for i in range(0, len(images), n)]

    def n_images(self, shards) -> int:
        """How many images some shards hold."""
        return sum(len(self.shards[i]) for i in shards)

    def is_train(self, i: int) -> bool:
        return self.splits[self.shards[i][0]] == "train"

    def with_images(self, i: int) -> bool:
        return self.train_images or not self.is_train(i)

    def chosen_tokens(self, i: int, n_tokens: int) -> torch.Tensor | None:
        """Int64[Tensor, "image token"]: tokens to keep, drawn by image seeds; None for all."""
        if not (self.tokens_per_image and self.is_train(i)):
            return None
        draws = (np.random.default_rng([self.seeds[j], 7]) for j in self.shards[i])
        tokens = [draw.permutation(n_tokens)[: self.tokens_per_image] for draw in draws]
        return torch.from_numpy(np.sort(tokens, axis=1))

    def bytes_of(self, n_images: dict[str, int], found: dict, pipe) -> tuple[int, int]:
        """What so many images of each split take on disk: activations, and images beside them.

        `found` holds the taps' token rows, columns and channels, as `shapes` gives them.
        """
        activations = pictures = 0
        for rows, columns, channels in (found[tap] for tap in self.taps.values()):
            for split, n in n_images.items():
                is_train = split == "train"
                tokens = (is_train and self.tokens_per_image) or rows * columns
                size = bytes_per_image(len(self.steps), tokens, channels, self.store_dtype)
                activations += n * size
                if self.train_images or not is_train:
                    pictures += n * image_bytes(pipe, self.sampling)
        return activations, pictures

    def shapes(self, pipe) -> dict[Tap, tuple[int, int, int]]:
        """Token rows, token columns and channels of each tap; ValueError for one that has none."""
        taps, prompt = list(self.taps.values()), self.prompts[0]
        found = shapes(pipe, taps, prompt, **self.sampling)
        refuse_absent(pipe, taps, found, prompt, **self.sampling)
        for rows, columns, _ in found.values():
            in_range("tokens_per_image", self.tokens_per_image, 0, rows * columns)
        return found

    def check(self, pipe) -> dict[Path, dict]:
        """Call the denoiser once, and say what each folder's record is to hold.

        ValueError for what this pipeline does not have, or a folder begun with other settings.
        """
        found = self.shapes(pipe)
        times = times_of(pipe.scheduler, self.steps)
        # what must be the same for another image to be added to a folder
        common = {f.name: getattr(self, f.name) for f in fields(Plan) if f.name in RECORDED}
        common |= self.about | {
            "seeds": [int(s) for s in self.seeds],
            "split": self.splits,
            "steps": [int(s) for s in self.steps],
            "dtype": str(self.store_dtype).removeprefix("torch."),
            "scheduler": type(pipe.scheduler).__name__,
            "weights": weights_of(pipe),
        }
        records = {}
        for folder, tap in self.taps.items():
            rows, columns, channels = found[tap]
            settings = common | tap._asdict()
            refuse_other_settings(folder, settings)
            records[folder] = settings | times | {"grid": [rows, columns], "channels": channels}
        self.check_folders()
        return records

    def check_folders(self) -> None:
        """OSError unless each folder can be written in; a finished one need not be."""
        for folder in self.taps:
            if not os.path.exists(folder / "manifest.json"):
                check_writable(folder)


def image_bytes(pipe, sampling: dict) -> int:
    """What one stored image takes: 3 bytes a pixel."""
    size = getattr(pipe, "default_sample_size", None)
    size = size or getattr(denoiser_of(pipe).config, "sample_size", 0) or 0
    height, width = size if isinstance(size, list | tuple) else (size, size)
    factor = getattr(pipe, "vae_scale_factor", 1)
    return 3 * (sampling["height"] or height * factor) * (sampling["width"] or width * factor)


@torch.no_grad()
def weights_of(pipe) -> str:
    """SHA-256 over a sample of the weights that make images; empty where one is unreadable."""
    found = hashlib.sha256()
    try:
        for name, part in sorted(pipe.components.items()):
            if isinstance(part, torch.nn.Module) and name != "safety_checker":
                for p in part.parameters():
                    sample = p.flatten()[:: max(1, p.numel() // 64) | 1]
                    found.update(sample.float().cpu().contiguous().numpy())
    except (RuntimeError, TypeError):  # of weights that are offloaded, or quantised in some way
        return ""
    return found.hexdigest()[:16]


def shard_path(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05d}.safetensors"


def load_record(path: Path) -> dict:
    """A manifest.json or begun.json; ValueError if it lacks something."""
    record, finished = load_json(path), path.name == "manifest.json"
    names = RECORDED + IN_MANIFEST if finished else RECORDED
    lacking = [n for n in names if not isinstance(record, dict) or n not in record]
    if finished and not lacking:
        shards = (shard_path(path.parent, i).name for i in range(len(record["images_of_shard"])))
        lacking = [name for name in shards if name not in record["shards"]]
    if lacking:
        what = f"{path} is damaged (it has no {lacking[0]!r})"
        raise ValueError(f"{what}; delete it, run 01_collect_trajectories again")
    return record


def refuse_other_settings(folder: Path, described: dict) -> None:
    """ValueError, naming what differs, if `folder` was begun with other settings than those."""
    described = json.loads(json.dumps(described))  # as it would come back from the file
    for path in filter(Path.exists, (folder / "begun.json", folder / "manifest.json")):
        record = load_record(path)
        before = record | record["sampling"]
        now = dict.fromkeys(record["sampling"]) | described | described["sampling"]
        if not (before.get("weights") and now["weights"]):  # one of them is not known
            del now["weights"]
        del now["sampling"]
        for name, value in now.items():
            if before.get(name) != value:
                name, old = PARAMETERS.get(name, name), before.get(name)
                where, old, new = _first_difference(name, old, value)
                refuse(where, new, f"{old!r:.80}, as {folder} was made with, or give another run")


def _first_difference(name: str, old, new) -> tuple:
    """Where two values differ, by name, and what they hold there; long texts from there on."""
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"the number of {name}", len(old), len(new)
        i = next(i for i, (a, b) in enumerate(zip(old, new)) if a != b)
        return _first_difference(f"{name}[{i}]", old[i], new[i])
    if isinstance(old, str) and isinstance(new, str):
        start = len(os.path.commonprefix([old, new])) - 20
        if start > 20:
            old, new = (f"…{text[start : start + 60]}" for text in (old, new))
    return name, old, new
