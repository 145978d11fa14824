"""The store: many images' trajectories on disk, collected so that nothing is lost, and read back whole or in shuffled batches.

A store is a folder of safetensors shards and one `manifest.json`, which is written last: a folder without it is
unfinished, and collecting goes on where it stopped, because an image depends on its own seed alone.
"""

from __future__ import annotations

import json
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

from helpers.files import digest, load_json, load_rows, load_tensors, save_json, save_tensors, save_text
from helpers.hooks import BRANCHES, SIGNALS, denoiser_of, find
from helpers.trajectories import Tap, bytes_per_image, hookpoints, record_all, shapes, times_of

SPLITS = ("train", "validation", "test")


def shards_of(split_of, batch_size: int) -> list[list[int]]:
    """The images of each shard: neighbours of one split, `batch_size` at most."""
    of_split = ([i for i, s in enumerate(split_of) if s == split] for split in SPLITS)
    return [images[i : i + batch_size] for images in of_split for i in range(0, len(images), batch_size)]


def chosen_tokens(seeds, n_tokens: int, tokens_per_image: int) -> torch.Tensor:
    """Int64[Tensor, "image kept"]: a random subset of each image's tokens, ascending, told by the image's seed."""
    picks = (np.sort(np.random.default_rng([s, 7]).permutation(n_tokens)[:tokens_per_image]) for s in seeds)
    return torch.from_numpy(np.stack(list(picks)))


def _shard(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05d}.safetensors"


def _noted(path: Path) -> Path:
    """Where a finished shard's SHA-256 stands until the manifest takes it up; `sha256sum --check` reads it."""
    return path.with_suffix(".sha256")


def _intact(path: Path, known: dict[str, str]) -> bool:
    """Whether a shard is there, and is the one whose digest was noted when it was written."""
    if not path.exists():
        return False
    try:
        expected = known.get(path.name) or _noted(path).read_text().split()[0]
        return expected == digest(path)
    except (OSError, IndexError):  # killed between the shard and its note: the shard is whole, since it was renamed
        try:
            load_tensors(path)
            return True
        except ValueError:
            return False


def collect(
    folder, pipe, prompts, seeds, split_of, *, hookpoint, steps, batch_size, signal="output", branch="conditional", store_dtype=torch.float16,
    tokens_per_image=0, train_images=True, also=None, record_of=None, accelerator=None, shard_index=0, num_shards=1, **sampling,
) -> dict:  # fmt: skip
    """Record every prompt into `folder`, one shard a batch, with a progress bar; resumes, and skips what is whole.

    Parameters
    ----------
    prompts, seeds, split_of : lists of equal length
        Each image's prompt, seed, and 'train', 'validation' or 'test'.
    tokens_per_image : int
        Tokens kept of each training image, drawn at random; 0 keeps all. Validation and test images, on which
        heat maps are made, always keep all.
    train_images : bool
        Whether to store the training images beside their activations.
    also : dict, folder -> Tap
        Further taps recorded in the same pass, each into a store of its own.
    record_of : dict
        Whatever else identifies the collection (model name and so on). A folder begun with other values is
        refused with a ValueError that names what differs; nothing in it is touched.
    accelerator : accelerate.Accelerator, optional
        Shares the batches out among its processes.
    shard_index, num_shards : int
        This machine's part, where several machines share one folder; the last to finish writes the manifest.

    Returns the manifest; `new_images` and `new_seconds` tell what this call did, and `missing` how many shards
    other machines still owe.
    """
    if not prompts:
        raise ValueError("prompts is empty; at least one prompt is needed")
    if not len(prompts) == len(seeds) == len(split_of) or not set(split_of) <= set(SPLITS):
        raise ValueError(f"prompts, seeds and split_of have {len(prompts)}, {len(seeds)} and {len(split_of)} entries; they need as many, and splits are {', '.join(SPLITS)}")
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"shard_index is {shard_index}; with num_shards={num_shards} it must lie in 0 to {num_shards - 1}")
    common = (record_of or {}) | {
        "steps": [int(s) for s in steps], "prompts": list(prompts), "seeds": [int(s) for s in seeds], "split": list(split_of), "batch_size": batch_size,
        "dtype": str(store_dtype).removeprefix("torch."), "tokens_per_image": tokens_per_image, "train_images": train_images,
        "scheduler": type(pipe.scheduler).__name__, "sampling": {"height": 0, "width": 0} | sampling,
    }  # fmt: skip
    taps = {Path(folder): Tap(hookpoint, signal, branch)} | {Path(f): Tap(*tap) for f, tap in (also or {}).items()}
    jobs = {f: common | tap._asdict() for f, tap in taps.items()}
    for f, job in jobs.items():
        refuse_others(f, job)
    return _collect(jobs, pipe, accelerator, shard_index, num_shards)


def repair(folder, pipe) -> dict:
    """Collect the damaged and missing shards of a store again, with the settings that its manifest keeps; returns as `collect` does.

    Where the model gives the same bytes again, as on a CPU, the manifest stays as it was, and all that was made from it valid.
    """
    folder = Path(folder)
    name = "manifest.json" if (folder / "manifest.json").exists() else "begun.json"
    return _collect({folder: load_json(folder / name)}, pipe)


def _collect(jobs: dict[Path, dict], pipe, accelerator=None, shard_index: int = 0, num_shards: int = 1) -> dict:
    """Fill the folders with what their jobs, alike in everything but the tap, ask for."""
    jobs = {f: {k: v for k, v in job.items() if k not in ("shards", "images_of_shard", "versions")} for f, job in jobs.items()}
    first, job = next(iter(jobs.items()))
    prompts, seeds, split_of, steps, sampling = (job[k] for k in ("prompts", "seeds", "split", "steps", "sampling"))
    store_dtype = getattr(torch, job["dtype"])
    taps = {f: Tap(j["hookpoint"], j["signal"], j["branch"]) for f, j in jobs.items()}
    for tap in taps.values():
        find(denoiser_of(pipe), tap.hookpoint)
        for name, value, valid in (("signal", tap.signal, SIGNALS), ("branch", tap.branch, BRANCHES)):
            if value not in valid:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(valid)}")
    found, times = shapes(pipe, list(taps.values()), prompts[0], **sampling), times_of(pipe.scheduler, steps)
    for f, tap in taps.items():
        if tap not in found:
            raise ValueError(f"hookpoint {tap.hookpoint!r} is never called, or its {tap.signal} is no grid of tokens; valid are like {', '.join(list(hookpoints(pipe, prompts[0], **sampling))[:8])}")
        rows, columns, channels = found[tap]
        if not 0 <= job["tokens_per_image"] <= rows * columns:
            raise ValueError(f"tokens_per_image is {job['tokens_per_image']}; {tap.hookpoint!r} has {rows * columns} tokens, so it must lie in 1 to {rows * columns}, or be 0 for all")
        jobs[f] |= times | {"grid": [rows, columns], "channels": channels}
    plan = shards_of(split_of, job["batch_size"])
    known = {f: load_json(f / "manifest.json")["shards"] if (f / "manifest.json").exists() else {} for f in jobs}
    index, parts = shard_index, num_shards
    if accelerator is not None:
        index, parts = shard_index * accelerator.num_processes + accelerator.process_index, num_shards * accelerator.num_processes
    mine = range(index, len(plan), parts)
    _tidy(jobs, mine, alone=parts == 1)
    todo = [i for i in mine if not all(_intact(_shard(f, i), known[f]) for f in jobs)]
    n_mine, n_todo = (sum(len(plan[i]) for i in these) for these in (mine, todo))
    _check_disk(first, sum(_bytes_of(j, plan[i], pipe) for j in jobs.values() for i in todo), n_todo)
    for path in (p for i in todo for f in jobs for p in f.glob(f".{_shard(f, i).name}.*.part")):
        path.unlink(missing_ok=True)  # what a killed process left half written
    start, writing = time.perf_counter(), []
    with ThreadPoolExecutor(1) as writer, tqdm(total=n_mine, initial=n_mine - n_todo, desc="collecting", unit="image", disable=accelerator is not None and not accelerator.is_main_process) as bar:
        for i in todo:
            own = [seeds[j] for j in plan[i]]
            tokens = [_chosen(j, own, plan[i]) for j in jobs.values()]
            images, activations, _ = record_all(pipe, [prompts[j] for j in plan[i]], own, list(taps.values()), steps, tokens, **sampling)
            for tap, h in zip(taps.values(), activations):
                if not torch.isfinite(h).all():
                    raise ValueError(f"dtype: the activations of {tap.hookpoint!r} hold NaN or infinity in {str(h.dtype).removeprefix('torch.')}; valid is a wider one, 'float32' or 'bfloat16'")
                if not torch.isfinite(h.to(store_dtype)).all():
                    raise ValueError(f"store_dtype {job['dtype']!r} cannot hold the activations of {tap.hookpoint!r} (largest {h.abs().max():.3g}); valid are 'bfloat16' and 'float32'")  # fmt: skip
            if len(writing) == 2:  # batches that wait for the disk while the next is computed
                writing.pop(0).result()
            writing.append(writer.submit(_write_shard, i, jobs, activations, tokens, images, plan[i]))
            bar.update(len(images))
        for written in writing:
            written.result()
    seconds = time.perf_counter() - start
    if accelerator is not None:
        accelerator.wait_for_everyone()
    missing = sum(not all(_shard(f, i).exists() for f in jobs) for i in range(len(plan)))
    if not missing and (accelerator is None or accelerator.is_main_process):
        jobs = {f: _finish(f, j, plan, known[f]) for f, j in jobs.items()}
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return jobs[first] | {"new_images": n_todo, "new_seconds": seconds, "missing": missing}


def _tidy(folders, mine, alone: bool) -> None:
    """Remove the half-written files that a killed run left, but none that another process may be writing."""
    for stray in (p for folder in folders for p in folder.glob(".*.part")):
        shard = re.match(r"\.shard-(\d+)", stray.name)
        if alone or (shard and int(shard[1]) in mine):
            stray.unlink(missing_ok=True)


def _chosen(job: dict, seeds, images) -> torch.Tensor | None:
    """The tokens to keep of a shard's images; None for all."""
    if not job["tokens_per_image"] or job["split"][images[0]] != "train":
        return None
    return chosen_tokens(seeds, job["grid"][0] * job["grid"][1], job["tokens_per_image"])


def _with_images(job: dict, images) -> bool:
    return job["train_images"] or job["split"][images[0]] != "train"


def _bytes_of(job: dict, images, pipe) -> int:
    """What a shard takes on disk."""
    train = job["split"][images[0]] == "train"
    n_tokens = (train and job["tokens_per_image"]) or job["grid"][0] * job["grid"][1]
    size = bytes_per_image(len(job["steps"]), n_tokens, job["channels"], getattr(torch, job["dtype"]))
    return len(images) * (size + (image_bytes(pipe, job["sampling"]) if _with_images(job, images) else 0))


def image_bytes(pipe, sampling: dict) -> int:
    """What one stored image takes: 3 bytes a pixel."""
    own = getattr(pipe, "default_sample_size", None) or getattr(denoiser_of(pipe).config, "sample_size", 0) or 0
    own = [v * getattr(pipe, "vae_scale_factor", 1) for v in (own if isinstance(own, list | tuple) else (own, own))]
    return 3 * (sampling.get("height") or own[0]) * (sampling.get("width") or own[1])


def _check_disk(folder: Path, need: int, n_images: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"n_train: {n_images} images need {need / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB free; choose fewer images, steps or tokens_per_image, or another folder")  # fmt: skip


def _write_shard(i: int, jobs: dict[Path, dict], activations, tokens, images, chosen) -> None:
    for (folder, job), h, kept in zip(jobs.items(), activations, tokens):
        if not (folder / "begun.json").exists():
            save_json(folder / "begun.json", job)
        tensors = {"h": h.to(getattr(torch, job["dtype"]))}
        if kept is not None:
            tensors["tokens"] = kept.int()
        if _with_images(job, chosen):
            tensors["images"] = torch.from_numpy((images * 255).round().astype(np.uint8))
        path = _shard(folder, i)
        _noted(path).unlink(missing_ok=True)
        save_tensors(path, tensors)
        save_text(_noted(path), f"{digest(path)}  {path.name}\n")


def _finish(folder: Path, job: dict, plan, before: dict[str, str]) -> dict:
    """Write the manifest of a complete folder: what was asked, the versions, each shard's images and SHA-256."""
    digests = {}
    for path in (_shard(folder, i) for i in range(len(plan))):
        try:
            digests[path.name] = _noted(path).read_text().split()[0]
        except FileNotFoundError:  # a shard of an earlier call, or another machine has just taken the note up
            digests[path.name] = before.get(path.name) or digest(path)
    packages = ("torch", "diffusers", "transformers")
    about = {"versions": {"python": platform.python_version()} | {p: version(p) for p in packages}, "shards": digests, "images_of_shard": plan}
    if digests != before:  # else what made the shards stays on record
        save_json(folder / "manifest.json", job | about)
    for name in digests:
        _noted(folder / name).unlink(missing_ok=True)
    return load_json(folder / "manifest.json")


def refuse_others(folder, described: dict) -> None:
    """Raise ValueError, naming what differs, if `folder` was begun with other values than `described`."""
    described = json.loads(json.dumps(described))  # as it would come back from the file
    for name in ("begun.json", "manifest.json"):
        if (Path(folder) / name).exists():
            before = load_json(Path(folder) / name)
            arguments = before.get("sampling", {})
            before, now = before | arguments, described | dict.fromkeys(arguments) | described.get("sampling", {})
            for key, value in now.items():
                if before.get(key) != value and key != "sampling":
                    old, new = (v if len(str(v)) < 60 else f"{str(v)[:50]}…" for v in (before.get(key), value))
                    raise ValueError(f"{key} is {new!r}, but {folder} was made with {old!r}; give that value or another run name")  # fmt: skip


class Store:
    """A collected folder, read shard by shard or in shuffled batches; each shard is held against its SHA-256 when first read.

    `n_steps`, `n_tokens`, `channels`, `grid`, `steps`, `timesteps`, `prompts`, `seeds`, `split`, `sampling` describe it.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            raise FileNotFoundError(f"run: {self.folder} holds no finished collection; run 01_collect_trajectories first")
        self.manifest = m = load_json(self.folder / "manifest.json")
        self.prompts, self.seeds, self.sampling = m["prompts"], m["seeds"], m["sampling"]
        self.steps, self.timesteps = m["steps"], m["timesteps"]
        self.grid, self.channels, self.dtype = tuple(m["grid"]), m["channels"], getattr(torch, m["dtype"])
        self.n_steps, self.n_tokens = len(self.steps), self.grid[0] * self.grid[1]
        self.split = np.array(m["split"])
        self._checked: set[str] = set()

    def _shard(self, i: int) -> Path:
        """A shard's path, after holding it against its SHA-256 once."""
        path = _shard(self.folder, i)
        if path.name not in self._checked:
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing; run 01_collect_trajectories again to collect it")
            if digest(path) != self.manifest["shards"][path.name]:
                raise ValueError(f"{path} is damaged; run 01_collect_trajectories again to collect it again")
            self._checked.add(path.name)
        return path

    def verify(self) -> None:
        """Compare every shard with its SHA-256; ValueError names the first that differs."""
        for i in tqdm(range(len(self.manifest["shards"])), desc="checking shards", leave=False, delay=2):
            self._shard(i)

    def indices(self, split: str) -> np.ndarray:
        """Image numbers of a split, ascending; everything read by split comes in this order."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        return np.nonzero(self.split == split)[0]

    def tokens_kept(self, split: str) -> int:
        """Tokens kept of each image of a split."""
        return (self.manifest["tokens_per_image"] if split == "train" else 0) or self.n_tokens

    def _shards_of(self, split: str) -> list[int]:
        self.indices(split)
        return [i for i, images in enumerate(self.manifest["images_of_shard"]) if self.split[images[0]] == split]

    def shards(self, split: str, share: tuple[int, int] = (0, 1)):
        """Activations of a split, one shard at a time: float32 Tensor, (image, step, token, channel); `share` (index, n) gives each n-th."""
        return (load_tensors(self._shard(i), ("h",))[0]["h"].float() for i in self._shards_of(split)[share[0] :: share[1]])

    def tokens(self, split: str) -> np.ndarray:
        """Which tokens of each image were kept, int, (image, kept)."""
        shards = self._shards_of(split)
        if self.tokens_kept(split) == self.n_tokens:
            return np.tile(np.arange(self.n_tokens), (len(self.indices(split)), 1))
        return np.concatenate([load_tensors(self._shard(i), ("tokens",))[0]["tokens"].numpy() for i in shards])

    def images(self, split: str) -> np.ndarray:
        """The split's images, float32, (image, height, width, 3), in [0, 1]; ValueError if they were not kept."""
        if split == "train" and not self.manifest["train_images"]:
            raise ValueError(f"train_images was false when {self.folder} was collected, so the training images are not there; valid splits are validation, test")
        return np.concatenate([load_tensors(self._shard(i), ("images",))[0]["images"].numpy() for i in self._shards_of(split)]).astype(np.float32) / 255

    def batches(self, split: str, batch_size: int, seed: int = 0, start: int = 0, share: tuple[int, int] = (0, 1), buffer_bytes: int = 2**30):
        """Endless shuffled trajectories: Float[Tensor, "batch_size step channel"], float32.

        Images come in a random order over all shards, are read through memory maps into a buffer of `buffer_bytes` (a
        second one is filled meanwhile), and their trajectories are mixed there; each epoch has every trajectory once.

        Parameters
        ----------
        start : int
            Batches to leave out at the beginning, without reading them: where a stopped training goes on.
        share : (index, n)
            Give only the index-th of n equal parts of every batch, to one of n processes.
        """
        if not len(self.indices(split)):
            raise ValueError(f"split {split!r} holds no images; collect some, or choose another of {', '.join(SPLITS)}")
        if batch_size % share[1]:
            raise ValueError(f"sae_batch_size is {batch_size}; it must be a multiple of the number of processes, {share[1]}")
        part = slice(share[0] * batch_size // share[1], (share[0] + 1) * batch_size // share[1])
        with ThreadPoolExecutor(1) as reader:
            buffers = self._buffers(split, seed, start * batch_size, buffer_bytes)
            ahead, left = reader.submit(next, buffers), None
            while True:
                buffer, rows = ahead.result()
                ahead = reader.submit(next, buffers)
                first = 0
                if left is not None:  # a batch that began in the buffer before
                    first = batch_size - len(left)
                    left = torch.cat([left, self._gather(buffer, rows[:first])])
                    if len(left) == batch_size:
                        yield left[part].float()
                        left = None
                while left is None and first + batch_size <= len(rows):
                    yield self._gather(buffer, rows[first : first + batch_size][part]).float()
                    first += batch_size
                if left is None and first < len(rows):
                    left = self._gather(buffer, rows[first:])

    def _gather(self, buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Trajectories (row, step, channel) of a buffer (image, step, token, channel); a row is image · tokens + token."""
        _, S, n_tokens, d = buffer.shape
        first = (rows // n_tokens) * S * n_tokens + rows % n_tokens
        places = first[:, None] + torch.arange(S) * n_tokens
        return buffer.view(-1, d).index_select(0, places.flatten()).view(len(rows), S, d)

    def _buffers(self, split, seed, position, buffer_bytes):
        """Endless buffers of images (image, step, token, channel), as stored, each with its trajectories in a random order, from a position in the stream on."""
        places = [(i, j) for i in self._shards_of(split) for j in range(len(self.manifest["images_of_shard"][i]))]
        per_image = self.tokens_kept(split)
        at_once = max(1, buffer_bytes // bytes_per_image(self.n_steps, per_image, self.channels, self.dtype))
        small = len(places) <= at_once  # then it is read once and kept
        whole = self._read(places, per_image) if small else None
        epoch, position = divmod(position, len(places) * per_image)
        while True:
            order = np.arange(len(places)) if small else np.random.default_rng([seed, epoch]).permutation(len(places))
            for b, first in enumerate(range(0, len(order), at_once)):
                chosen = order[first : first + at_once]
                rows = len(chosen) * per_image
                if position >= rows:
                    position -= rows
                    continue
                buffer = whole if small else self._read([places[i] for i in chosen], per_image)
                yield buffer, torch.from_numpy(np.random.default_rng([seed, epoch, b]).permutation(rows)[position:])
                position = 0
            epoch += 1

    def _read(self, places, per_image) -> torch.Tensor:
        """Activations of images at places (shard, row), (place, step, token, channel)."""
        out = torch.empty(len(places), self.n_steps, per_image, self.channels, dtype=self.dtype)
        for i in sorted({i for i, _ in places}):
            rows = [(n, j) for n, (shard, j) in enumerate(places) if shard == i]
            for (n, _), h in zip(rows, load_rows(self._shard(i), "h", [j for _, j in rows])):
                out[n] = h
        return out
