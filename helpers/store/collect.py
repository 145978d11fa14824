"""Collecting: a plan's images and activations on disk, whatever stops it on the way.

An image depends on its own seed alone, so any process can make any shard, and make it again. A
folder without `manifest.json` is unfinished: collecting goes on, and ends with the same bytes.
"""

import math
import platform
import re
import shutil
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from helpers.checks import in_range, refuse
from helpers.files import digest, in_units, load_tensors, save_json, save_tensors, save_text
from helpers.pipelines.generate import warn_of_long
from helpers.store.plan import Plan, load_record, shard_path
from helpers.trajectories import record_all


def collect(plan: Plan, pipe, *, accelerator=None, share=(0, 1), only_check=False) -> dict:
    """Record every prompt of a plan, one shard a batch; shards that are whole are left alone.

    Processes of an `accelerate.Accelerator` share the shards out, as do n machines on one disk with
    `share` (index, n). `only_check` raises what collecting would raise at its beginning. Returns
    `new_images` made by this call in `new_seconds`, and `missing_images`, not there yet.
    """
    index, parts = share
    in_range("num_shards", parts, 1)
    in_range("shard_index", index, 0, parts - 1)
    is_main = accelerator is None or accelerator.is_main_process
    warn_of_long(pipe, plan.prompts, plan.sampling, silent=not is_main)
    folders = [_Folder(path, record, plan) for path, record in plan.check(pipe).items()]
    if accelerator is not None:
        index = index * accelerator.num_processes + accelerator.process_index
        parts *= accelerator.num_processes
    own = range(index, len(plan.shards), parts)
    for folder in folders:
        folder.remove_half_written(None if parts == 1 else own)
    todo = [i for i in own if not all(f.intact(i) for f in folders)]
    lacking = {*todo, *_absent(folders)}
    if todo:
        n_of = Counter(plan.splits[j] for i in lacking for j in plan.shards[i])
        sizes = [(*f.record["grid"], f.record["channels"]) for f in folders]
        need = sum(plan.bytes_of(n_of, dict(zip(plan.taps.values(), sizes)), pipe))
        check_room(folders[0].path, need, plan.n_images(lacking))
    if only_check:
        return {"new_images": 0, "new_seconds": 0.0, "missing_images": plan.n_images(lacking)}
    wait = accelerator.wait_for_everyone if accelerator else lambda: None
    wait()  # all have looked at the disk before any of them writes
    start = time.perf_counter()
    _record(folders, pipe, todo, own, silent=not is_main)
    seconds = time.perf_counter() - start
    wait()
    missing = plan.n_images(_absent(folders))
    for folder in folders if is_main and not missing else ():
        folder.finish()
    wait()
    new = plan.n_images(todo)
    return {"new_images": new, "new_seconds": seconds, "missing_images": missing}


def repair(folder, pipe) -> dict:
    """Collect the damaged and missing shards of a store again, with the settings on its record.

    Where the model gives the same bytes again, as on a CPU, all that was made from the store stays
    valid. Returns as `collect` does; ValueError for other weights.
    """
    folder = Path(folder)
    for name in ("manifest.json", "begun.json"):
        if (folder / name).exists():
            return collect(Plan.of_record(folder, load_record(folder / name)), pipe)
    raise FileNotFoundError(f"{folder} is no collection; it has no manifest.json and no begun.json")


class _Folder:
    """One store in the making: its record, its shards, and their SHA-256 if a manifest has them."""

    def __init__(self, path: Path, record: dict, plan: Plan):
        self.path, self.record, self.plan = path, record, plan
        manifest = path / "manifest.json"
        self.digests: dict[str, str] = load_record(manifest)["shards"] if manifest.exists() else {}

    def noted(self, shard: Path) -> str | None:
        """The SHA-256 of a shard as it was written; None where a kill came before the note."""
        with suppress(FileNotFoundError):
            return _note(shard).read_text().partition(" ")[0]
        return self.digests.get(shard.name)

    def intact(self, i: int) -> bool:
        """Whether shard i is there, and holds what was written."""
        shard = shard_path(self.path, i)
        with suppress(OSError, ValueError):
            if noted := self.noted(shard):
                return digest(shard) == noted
            load_tensors(shard)  # compares with the digest inside the file
            return True
        return False

    def write(self, i: int, h: torch.Tensor, images: np.ndarray, tokens) -> None:
        """Write shard i and its digest; the first shard of a folder begins its record."""
        if not (self.path / "begun.json").exists():
            save_json(self.path / "begun.json", self.record)
        tensors = {"h": h.to(self.plan.store_dtype)}
        if tokens is not None:
            tensors["tokens"] = tokens.int()
        if self.plan.with_images(i):
            tensors["images"] = torch.from_numpy((images * 255).round().astype(np.uint8))
        shard = shard_path(self.path, i)
        _note(shard).unlink(missing_ok=True)
        save_tensors(shard, tensors)
        save_text(_note(shard), f"{digest(shard)}  {shard.name}\n")

    def remove_half_written(self, own: range | None) -> None:
        """Remove what a killed process left half written: of `own` shards where others write."""
        for path in self.path.glob(".*"):
            # of this package, and of safetensors, which writes to a temporary file of its own
            ours = re.fullmatch(r"\.(?:shard-(\d+))?.*\.part|\.tmp\w{6}", path.name)
            if ours and (own is None or (ours[1] and int(ours[1]) in own)):
                path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write the manifest of a complete folder, unless it would be of the same shards."""
        shards = [shard_path(self.path, i) for i in range(len(self.plan.shards))]
        digests = {shard.name: self.noted(shard) or digest(shard) for shard in shards}
        if digests != self.digests:  # else the versions that made the shards stay on record
            packages = {p: version(p) for p in ("torch", "diffusers", "transformers")}
            made = {"shards": digests, "images_of_shard": self.plan.shards}
            made["versions"] = {"python": platform.python_version()} | packages
            save_json(self.path / "manifest.json", self.record | made)
        for shard in shards:
            _note(shard).unlink(missing_ok=True)


def _note(shard: Path) -> Path:
    """Where a shard's SHA-256 stands until the manifest has it; `sha256sum --check` reads it."""
    return shard.with_suffix(".sha256")


def _absent(folders: list[_Folder]) -> list[int]:
    """The shards that are not there yet in some folder, whole or damaged."""
    every = range(len(folders[0].plan.shards))
    return [i for i in every if not all(shard_path(f.path, i).exists() for f in folders)]


def check_room(folder: Path, need: int, n_images: int) -> None:
    """OSError if a folder's disk has no room for so many bytes, those of so many images."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise OSError(
            f"n_train: {n_images} images need {in_units(need)} in {folder}, which has"
            f" {in_units(free)} free; choose fewer images, steps or tokens_per_image"
        )


def _record(folders: list[_Folder], pipe, todo: list[int], own: range, silent: bool) -> None:
    """Make the shards of `todo`; each is written while the next is computed."""
    plan, taps = folders[0].plan, list(folders[0].plan.taps.values())
    n, n_new = plan.n_images(own), plan.n_images(todo)
    hidden = silent or not todo or None  # None: shown in notebooks and terminals
    bar = tqdm(total=n, initial=n - n_new, desc="collecting", unit="image", disable=hidden)
    with bar, ThreadPoolExecutor(1) as writer:
        writing = deque()
        for i in todo:
            prompts, seeds = ([of[j] for j in plan.shards[i]] for of in (plan.prompts, plan.seeds))
            chosen = [plan.chosen_tokens(i, math.prod(f.record["grid"])) for f in folders]
            images, activations, _ = record_all(
                pipe, prompts, seeds, taps, plan.steps, chosen, **plan.sampling
            )
            for tap, h in zip(taps, activations):
                if not torch.isfinite(h).all():
                    valid = f"a wider one; {tap.hookpoint} gives NaN or infinity in it"
                    refuse("dtype", h.dtype, valid)
                if not torch.isfinite(h.to(plan.store_dtype)).all():
                    largest = f"{tap.hookpoint} gives up to {h.abs().max():.3g}"
                    refuse("store_dtype", plan.store_dtype, f"'bfloat16' or 'float32'; {largest}")
            if len(writing) == 2:  # batches that wait for the disk: no more memory
                list(writing.popleft())
            of_each = folders, repeat(i), activations, repeat(images), chosen
            writing.append(writer.map(_Folder.write, *of_each))
            bar.update(len(images))
        for written in writing:
            list(written)  # raises what writing raised
