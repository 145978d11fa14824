"""Collecting: a plan's images and activations on disk, whatever stops it on the way.

An image depends on its own seed alone, so shards can be made in any order, by any process, and made
again. A folder without `manifest.json` is unfinished: collecting goes on with the shards that it
lacks, and ends with the same bytes.
"""

from __future__ import annotations

import platform
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from helpers.checks import in_range, refuse
from helpers.files import digest, in_units, load_tensors, save_json, save_tensors, save_text
from helpers.store.plan import Plan, load_manifest, load_record, shard_path
from helpers.trajectories import record_all


def collect(
    plan: Plan, pipe, *, accelerator=None, share: tuple[int, int] = (0, 1), only_check: bool = False
) -> dict:
    """Record every prompt of a plan, one shard a batch; shards that are whole are left alone.

    Processes of an `accelerate.Accelerator` share the shards out; so do n machines on one disk,
    with `share` (index, n). `only_check` raises what collecting would raise at its beginning.
    Returns `new_images` made by this call in `new_seconds`, and `missing_images`, not there yet.
    """
    index, parts = share
    in_range("num_shards", parts, 1)
    in_range("shard_index", index, 0, parts - 1)
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
        _check_disk(folders, pipe, lacking)
    if only_check:
        return {"new_images": 0, "new_seconds": 0.0, "missing_images": plan.n_images(lacking)}
    wait = accelerator.wait_for_everyone if accelerator else lambda: None
    wait()  # all have looked at the disk before any of them writes
    start = time.perf_counter()
    _record(folders, pipe, todo, own, silent=accelerator and not accelerator.is_main_process)
    seconds = time.perf_counter() - start
    wait()
    missing = plan.n_images(_absent(folders))
    if not missing and (accelerator is None or accelerator.is_main_process):
        for folder in folders:
            folder.finish()
    wait()
    n_new = plan.n_images(todo)
    return {"new_images": n_new, "new_seconds": seconds, "missing_images": missing}


def repair(folder, pipe) -> dict:
    """Collect the damaged and missing shards of a store again, with the settings on its record.

    Where the model gives the same bytes again, as on a CPU, the manifest stays as it was, and all
    that was made from it valid. Returns as `collect` does; ValueError for other weights.
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
        finished = (path / "manifest.json").exists()
        self.digests: dict[str, str] = load_manifest(path)["shards"] if finished else {}

    def shard(self, i: int) -> Path:
        return shard_path(self.path, i)

    def intact(self, i: int) -> bool:
        """Whether shard i is there, with the SHA-256 that was noted when it was written."""
        path = self.shard(i)
        if not path.exists():
            return False
        try:
            return digest(path) == (self.digests.get(path.name) or _noted_digest(path))
        except (OSError, IndexError):  # killed before the note, or the manifest was deleted
            try:
                load_tensors(path)  # compares with the digest inside the file
                return True
            except ValueError:
                return False

    def tokens(self, i: int) -> torch.Tensor | None:
        """Which tokens to keep of the images of shard i; None for all."""
        return self.plan.chosen_tokens(i, self.record["grid"][0] * self.record["grid"][1])

    def write(self, i: int, h: torch.Tensor, images: np.ndarray, tokens) -> None:
        """Write shard i and its digest; the first shard of a folder begins its record."""
        if not (self.path / "begun.json").exists():
            save_json(self.path / "begun.json", self.record)
        tensors = {"h": h.to(self.plan.store_dtype)}
        if tokens is not None:
            tensors["tokens"] = tokens.int()
        if self.plan.with_images(i):
            tensors["images"] = torch.from_numpy((images * 255).round().astype(np.uint8))
        path = self.shard(i)
        _note(path).unlink(missing_ok=True)
        save_tensors(path, tensors)
        save_text(_note(path), f"{digest(path)}  {path.name}\n")

    def remove_half_written(self, own: range | None) -> None:
        """Remove what a killed process left half written: of `own` shards where others write."""
        for path in self.path.glob(".*"):
            # of this package, and of safetensors, which writes to a temporary file of its own
            ours = re.fullmatch(r"\.(?:shard-(\d+))?.*\.part|\.tmp\w{6}", path.name)
            if ours and (own is None or (ours[1] and int(ours[1]) in own)):
                path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write the manifest of a complete folder, unless it would be of the same shards."""
        digests = {}
        for path in map(self.shard, range(len(self.plan.shards))):
            try:
                digests[path.name] = _noted_digest(path)
            except FileNotFoundError:  # of an earlier call, or another machine is finishing, too
                digests[path.name] = self.digests.get(path.name) or digest(path)
        if digests != self.digests:  # else the versions that made the shards stay on record
            packages = {p: version(p) for p in ("torch", "diffusers", "transformers")}
            made = {"shards": digests, "images_of_shard": self.plan.shards}
            made["versions"] = {"python": platform.python_version()} | packages
            save_json(self.path / "manifest.json", self.record | made)
        for name in digests:
            _note(self.path / name).unlink(missing_ok=True)


def _note(path: Path) -> Path:
    """Where a shard's SHA-256 stands until the manifest has it; `sha256sum --check` reads it."""
    return path.with_suffix(".sha256")


def _noted_digest(path: Path) -> str:
    return _note(path).read_text().split()[0]


def _absent(folders: list[_Folder]) -> list[int]:
    """The shards that are not there yet in some folder, whole or damaged."""
    every = range(len(folders[0].plan.shards))
    return [i for i in every if not all(f.shard(i).exists() for f in folders)]


def _check_disk(folders: list[_Folder], pipe, shards: set[int]) -> None:
    """OSError if there is no room for these shards, other processes' included."""
    plan, path = folders[0].plan, folders[0].path
    path.mkdir(parents=True, exist_ok=True)
    need = sum(plan.shard_bytes(i, f.record, pipe) for f in folders for i in shards)
    free = shutil.disk_usage(path).free
    if need > free:
        raise OSError(
            f"n_train: {plan.n_images(shards)} images need {in_units(need)} in {path}, which has"
            f" {in_units(free)} free; choose fewer images, steps or tokens_per_image"
        )


def _record(folders: list[_Folder], pipe, todo: list[int], own: range, silent) -> None:
    """Make the shards of `todo`; each is written while the next is computed."""
    plan, taps = folders[0].plan, list(folders[0].plan.taps.values())
    bar = tqdm(
        total=plan.n_images(own),
        initial=plan.n_images(own) - plan.n_images(todo),
        desc="collecting",
        unit="image",
        disable=bool(silent) or not todo or None,  # None: shown in notebooks and terminals
    )
    with bar, ThreadPoolExecutor(1) as writer:
        writing = []
        for i in todo:
            prompts, seeds = ([of[j] for j in plan.shards[i]] for of in (plan.prompts, plan.seeds))
            chosen = [folder.tokens(i) for folder in folders]
            images, activations, _ = record_all(
                pipe, prompts, seeds, taps, plan.steps, chosen, **plan.sampling
            )
            for tap, h in zip(taps, activations):
                _refuse_overflow(tap.hookpoint, h, plan.store_dtype)
            if len(writing) == 2 * len(folders):  # two batches wait for the disk: no more memory
                for written in writing[: len(folders)]:
                    written.result()
                del writing[: len(folders)]
            for folder, h, tokens in zip(folders, activations, chosen):
                writing.append(writer.submit(folder.write, i, h, images, tokens))
            bar.update(len(images))
        for written in writing:
            written.result()


def _refuse_overflow(hookpoint: str, h: torch.Tensor, store_dtype: torch.dtype) -> None:
    """ValueError for activations that the model's or the store's precision cannot hold."""
    if not torch.isfinite(h).all():
        refuse("dtype", h.dtype, f"a wider one; {hookpoint} gives NaN or infinity in it")
    if not torch.isfinite(h.to(store_dtype)).all():
        largest = f"{hookpoint} gives up to {h.abs().max():.3g}"
        refuse("store_dtype", store_dtype, f"'bfloat16' or 'float32'; {largest}")
