"""The store: many images' trajectories on disk, collected so that nothing is lost, and read back whole or in shuffled batches.

A store is a folder of safetensors shards and one `manifest.json`, which is written last: a folder without it is
unfinished, and collecting goes on where it stopped, because an image depends on its own seed alone.
"""

from __future__ import annotations

import hashlib
import json
import os
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

from helpers.files import (
    digest,
    in_units,
    load_json,
    load_rows,
    load_tensors,
    save_json,
    save_tensors,
    save_text,
)
from helpers.hooks import BRANCHES, SIGNALS, denoiser_of, find
from helpers.trajectories import Tap, bytes_per_image, hookpoints, record_all, shapes, times_of

SPLITS = ("train", "validation", "test")
DESCRIBED = (
    "prompts",
    "seeds",
    "split",
    "sampling",
    "steps",
    "timesteps",
    "grid",
    "channels",
    "dtype",
    "tokens_per_image",
    "train_images",
)  # what reading needs
TAPPED = ("hookpoint", "signal", "branch", "batch_size")  # and collecting


def shards_of(split_of, batch_size: int) -> list[list[int]]:
    """The images of each shard: neighbours of one split, `batch_size` at most."""
    of_split = ([i for i, s in enumerate(split_of) if s == split] for split in SPLITS)
    return [
        images[i : i + batch_size] for images in of_split for i in range(0, len(images), batch_size)
    ]


def chosen_tokens(seeds, n_tokens: int, tokens_per_image: int) -> torch.Tensor:
    """Int64[Tensor, "image kept"]: a random subset of each image's tokens, ascending, told by the image's seed."""
    picks = (
        np.sort(np.random.default_rng([s, 7]).permutation(n_tokens)[:tokens_per_image])
        for s in seeds
    )
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
    except (
        OSError,
        IndexError,
    ):  # killed between the shard and its note, or the manifest was deleted: the shard keeps a digest of its own
        try:
            load_tensors(path)
            return True
        except ValueError:
            return False


def collect(
    folder,
    pipe,
    prompts,
    seeds,
    split_of,
    *,
    hookpoint,
    steps,
    batch_size,
    signal="output",
    branch="conditional",
    store_dtype=torch.float16,
    tokens_per_image=0,
    train_images=True,
    also=None,
    record_of=None,
    accelerator=None,
    shard_index=0,
    num_shards=1,
    only_check=False,
    **sampling,
) -> dict:
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
    only_check : bool
        Raise what collecting would raise at its beginning, and collect nothing.

    Returns the manifest; `new_images` and `new_seconds` tell what this call did, and `missing` how many shards
    other machines still owe.
    """
    if not prompts:
        raise ValueError("prompts is empty; at least one prompt is needed")
    if not len(prompts) == len(seeds) == len(split_of) or not set(split_of) <= set(SPLITS):
        raise ValueError(
            f"prompts, seeds and split_of have {len(prompts)}, {len(seeds)} and {len(split_of)} entries; they need as many, and splits are {', '.join(SPLITS)}"
        )
    if num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}; it must be at least 1")
    if not 0 <= shard_index < num_shards:
        raise ValueError(
            f"shard_index is {shard_index}; with num_shards={num_shards} it must lie in 0 to {num_shards - 1}"
        )
    common = (record_of or {}) | {
        "steps": [int(s) for s in steps],
        "prompts": list(prompts),
        "seeds": [int(s) for s in seeds],
        "split": list(split_of),
        "batch_size": batch_size,
        "dtype": str(store_dtype).removeprefix("torch."),
        "tokens_per_image": tokens_per_image,
        "train_images": train_images,
        "scheduler": type(pipe.scheduler).__name__,
        "sampling": {"height": 0, "width": 0} | sampling,
        "weights": weights_of(pipe),
    }
    if Path(folder) in (Path(f) for f in also or {}):
        raise ValueError(f"also: {folder} is the folder of the first tap; give another one")
    taps = {Path(folder): Tap(hookpoint, signal, branch)} | {
        Path(f): Tap(*tap) for f, tap in (also or {}).items()
    }
    jobs = {f: common | tap._asdict() for f, tap in taps.items()}
    for f, job in jobs.items():
        find(
            denoiser_of(pipe), job["hookpoint"]
        )  # a misspelt one is better told with what is near it
        refuse_others(f, job)
        require_folder(f)
    return _collect(jobs, pipe, accelerator, shard_index, num_shards, only_check)


def repair(folder, pipe) -> dict:
    """Collect the damaged and missing shards of a store again, with the settings that its manifest keeps; returns as `collect` does.

    Where the model gives the same bytes again, as on a CPU, the manifest stays as it was, and all that was made from it valid.
    ValueError if the pipeline's weights are not those that the store was made with.
    """
    folder = Path(folder)
    name = next((n for n in ("manifest.json", "begun.json") if (folder / n).exists()), None)
    if name is None:
        raise FileNotFoundError(
            f"{folder} is no collection; valid is a folder that stores.collect has begun, such as runs/demo/trajectories"
        )
    job = _told(folder / name, TAPPED)
    _refuse_weights(folder, job, weights_of(pipe))
    return _collect({folder: job}, pipe)


@torch.no_grad()
def weights_of(pipe) -> str:
    """SHA-256 over a sample of every weight that makes the images, alike on all devices; empty where they cannot be looked at."""
    found = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module) and name != "safety_checker":
            for p in part.parameters():
                if p.is_meta:  # offloaded
                    return ""
                try:
                    found.update(
                        p.flatten()[:: max(1, p.numel() // 64) | 1]
                        .float()
                        .cpu()
                        .contiguous()
                        .numpy()
                    )
                except (RuntimeError, TypeError):  # some quantised weights cannot be sliced
                    return ""
    return found.hexdigest()[:16]


def _collect(
    jobs: dict[Path, dict],
    pipe,
    accelerator=None,
    shard_index: int = 0,
    num_shards: int = 1,
    only_check: bool = False,
) -> dict:
    """Fill the folders with what their jobs, alike in everything but the tap, ask for."""
    jobs = {
        f: {k: v for k, v in job.items() if k not in ("shards", "images_of_shard", "versions")}
        for f, job in jobs.items()
    }
    known = {f: _manifest(f)["shards"] if (f / "manifest.json").exists() else {} for f in jobs}
    first, job = next(iter(jobs.items()))
    prompts, seeds, split_of, steps, sampling = (
        job[k] for k in ("prompts", "seeds", "split", "steps", "sampling")
    )
    store_dtype = getattr(torch, job["dtype"])
    taps = {f: Tap(j["hookpoint"], j["signal"], j["branch"]) for f, j in jobs.items()}
    for tap in taps.values():
        find(denoiser_of(pipe), tap.hookpoint)
        for name, value, valid in (
            ("signal", tap.signal, SIGNALS),
            ("branch", tap.branch, BRANCHES),
        ):
            if value not in valid:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(valid)}")
    found, times = (
        shapes(pipe, list(taps.values()), prompts[0], **sampling),
        times_of(pipe.scheduler, steps),
    )
    for f, tap in taps.items():
        if tap not in found:
            raise ValueError(
                f"hookpoint {tap.hookpoint!r} is never called, or its {tap.signal} is no grid of tokens; valid are like {', '.join(list(hookpoints(pipe, prompts[0], **sampling))[:8])}"
            )
        rows, columns, channels = found[tap]
        if not 0 <= job["tokens_per_image"] <= rows * columns:
            raise ValueError(
                f"tokens_per_image is {job['tokens_per_image']}; {tap.hookpoint!r} has {rows * columns} tokens, so it must lie in 1 to {rows * columns}, or be 0 for all"
            )
        jobs[f] |= times | {"grid": [rows, columns], "channels": channels}
    plan = shards_of(split_of, job["batch_size"])
    index, parts = shard_index, num_shards
    if accelerator is not None:
        index, parts = (
            shard_index * accelerator.num_processes + accelerator.process_index,
            num_shards * accelerator.num_processes,
        )
    mine = range(index, len(plan), parts)
    _tidy(jobs, mine, alone=parts == 1)
    todo = [i for i in mine if not all(_intact(_shard(f, i), known[f]) for f in jobs)]
    n_mine, n_todo = (sum(len(plan[i]) for i in these) for these in (mine, todo))
    # the others' shards need room, too: all processes look before any of them writes
    lacking = (
        sorted(
            {*todo, *(i for i in range(len(plan)) if not all(_shard(f, i).exists() for f in jobs))}
        )
        if todo
        else []
    )
    _check_disk(
        first,
        sum(_bytes_of(j, plan[i], pipe) for j in jobs.values() for i in lacking),
        sum(len(plan[i]) for i in lacking),
    )
    if only_check:
        return jobs[first]
    if accelerator is not None:
        accelerator.wait_for_everyone()
    start, writing = time.perf_counter(), []
    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(
            total=n_mine,
            initial=n_mine - n_todo,
            desc="collecting",
            unit="image",
            disable=accelerator is not None and not accelerator.is_main_process,
        ) as bar,
    ):
        for i in todo:
            own = [seeds[j] for j in plan[i]]
            tokens = [_chosen(j, own, plan[i]) for j in jobs.values()]
            images, activations, _ = record_all(
                pipe,
                [prompts[j] for j in plan[i]],
                own,
                list(taps.values()),
                steps,
                tokens,
                **sampling,
            )
            for tap, h in zip(taps.values(), activations):
                if not torch.isfinite(h).all():
                    raise ValueError(
                        f"dtype: the activations of {tap.hookpoint!r} hold NaN or infinity in {str(h.dtype).removeprefix('torch.')}; valid is a wider one, 'float32' or 'bfloat16'"
                    )
                if not torch.isfinite(h.to(store_dtype)).all():
                    raise ValueError(
                        f"store_dtype {job['dtype']!r} cannot hold the activations of {tap.hookpoint!r} (largest {h.abs().max():.3g}); valid are 'bfloat16' and 'float32'"
                    )
            if len(writing) == 2:  # batches that wait for the disk while the next is computed
                writing.pop(0).result()
            writing.append(
                writer.submit(_write_shard, i, jobs, activations, tokens, images, plan[i])
            )
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
    size = bytes_per_image(
        len(job["steps"]), n_tokens, job["channels"], getattr(torch, job["dtype"])
    )
    return len(images) * (
        size + (image_bytes(pipe, job["sampling"]) if _with_images(job, images) else 0)
    )


def image_bytes(pipe, sampling: dict) -> int:
    """What one stored image takes: 3 bytes a pixel."""
    own = (
        getattr(pipe, "default_sample_size", None)
        or getattr(denoiser_of(pipe).config, "sample_size", 0)
        or 0
    )
    own = [
        v * getattr(pipe, "vae_scale_factor", 1)
        for v in (own if isinstance(own, list | tuple) else (own, own))
    ]
    return 3 * (sampling.get("height") or own[0]) * (sampling.get("width") or own[1])


def require_folder(folder) -> None:
    """OSError, naming `run`, unless `folder` can be written in; one whose collection is finished need not be."""
    if os.path.exists(Path(folder) / "manifest.json"):
        return
    there = next(p for p in (Path(folder), *Path(folder).absolute().parents) if os.path.exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OSError(
            f"run: {folder} cannot be written, since {there} is {'read-only' if there.is_dir() else 'no folder'}; give a run name or a folder that can"
        )


def _check_disk(folder: Path, need: int, n_images: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"run: {folder} cannot be made ({error.strerror}); give another run name or folder"
        ) from error
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(
            f"n_train: {n_images} images need {in_units(need)} in {folder}, which has {in_units(free)} free; choose fewer images, steps or tokens_per_image, or another folder"
        )


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
        except (
            FileNotFoundError
        ):  # a shard of an earlier call, or another machine has just taken the note up
            digests[path.name] = before.get(path.name) or digest(path)
    packages = ("torch", "diffusers", "transformers")
    about = {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "shards": digests,
        "images_of_shard": plan,
    }
    if digests != before:  # else what made the shards stays on record
        save_json(folder / "manifest.json", job | about)
    for name in digests:
        _noted(folder / name).unlink(missing_ok=True)
    return _manifest(folder)


def _told(path: Path, keys=()) -> dict:
    """What a manifest.json or begun.json tells; ValueError if it lacks what any of them has."""
    told = load_json(path)
    for key in (*DESCRIBED, *keys):
        if not isinstance(told, dict) or key not in told:
            raise ValueError(
                f"{path} is damaged (it has no {key!r}); delete it and run 01_collect_trajectories again"
            )
    return told


def _manifest(folder: Path) -> dict:
    """A finished folder's manifest."""
    told = _told(folder / "manifest.json", ("shards", "images_of_shard"))
    for i in range(len(told["images_of_shard"])):
        if _shard(folder, i).name not in told["shards"]:
            raise ValueError(
                f"{folder / 'manifest.json'} is damaged (it has no {_shard(folder, i).name!r}); delete it and run 01_collect_trajectories again"
            )
    return told


def _refuse_weights(folder, before: dict, now: str) -> None:
    if before.get("weights") and now and before["weights"] != now:  # else one of them is not known
        raise ValueError(
            f"model: its weights are not those that {folder} was made with; give that model, revision and dtype, or another run name"
        )


def refuse_others(folder, described: dict) -> None:
    """Raise ValueError, naming what differs, if `folder` was begun with other values than `described`."""
    described = json.loads(json.dumps(described))  # as it would come back from the file
    for name in ("begun.json", "manifest.json"):
        if (Path(folder) / name).exists():
            before = _told(Path(folder) / name)
            arguments = before.get("sampling", {})
            before, now = (
                before | arguments,
                described | dict.fromkeys(arguments) | described.get("sampling", {}),
            )
            for key, value in now.items():
                if key == "weights":
                    _refuse_weights(folder, before, value)
                elif before.get(key) != value and key != "sampling":
                    old, new = _apart(before.get(key), value)
                    raise ValueError(
                        f"{key} {new}, but {folder} was made with {old}; give that value or another run name"
                    )


def _apart(old, new) -> tuple[str, str]:
    """Two values that differ in words, or where they differ, if they are long."""
    if len(repr(old)) < 60 and len(repr(new)) < 60:
        return repr(old), f"is {new!r}"
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return str(len(old)), f"has {len(new)} entries"
        i = next(i for i in range(len(old)) if old[i] != new[i])
        before, now = _apart(old[i], new[i])
        return f"{before} there", f"{now} at entry {i}"
    a, b = repr(old), repr(new)
    i = max(0, len(os.path.commonprefix([a, b])) - 20)
    a, b = (
        ("…" if i else "") + text[i : i + 50] + ("…" if len(text) > i + 50 else "")
        for text in (a, b)
    )
    return a, f"is {b}"


class Store:
    """A collected folder, read shard by shard or in shuffled batches; each shard is held against its SHA-256 when first read.

    `n_steps`, `n_tokens`, `channels`, `grid`, `steps`, `timesteps`, `prompts`, `seeds`, `split`, `sampling` describe it.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            raise FileNotFoundError(
                f"run: {self.folder} holds no finished collection; run 01_collect_trajectories first"
            )
        self.manifest = m = _manifest(self.folder)
        self.prompts, self.seeds, self.sampling = m["prompts"], m["seeds"], m["sampling"]
        self.steps, self.timesteps = m["steps"], m["timesteps"]
        self.grid, self.channels, self.dtype = (
            tuple(m["grid"]),
            m["channels"],
            getattr(torch, m["dtype"]),
        )
        self.n_steps, self.n_tokens = len(self.steps), self.grid[0] * self.grid[1]
        self.split = np.array(m["split"])
        self._checked: set[str] = set()

    def _shard(self, i: int) -> Path:
        """A shard's path, after holding it against its SHA-256 once."""
        path = _shard(self.folder, i)
        if path.name not in self._checked:
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing; run 01_collect_trajectories again to collect it"
                )
            if digest(path) != self.manifest["shards"][path.name]:
                raise ValueError(
                    f"{path} is damaged; run 01_collect_trajectories again to collect it again"
                )
            self._checked.add(path.name)
        return path

    def verify(self) -> None:
        """Compare every shard with its SHA-256; ValueError names the first that differs."""
        for i in tqdm(
            range(len(self.manifest["shards"])), desc="checking shards", leave=False, delay=2
        ):
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
        return [
            i
            for i, images in enumerate(self.manifest["images_of_shard"])
            if self.split[images[0]] == split
        ]

    def shards(self, split: str, share: tuple[int, int] = (0, 1)):
        """Activations of a split, one shard at a time: float32 Tensor, (image, step, token, channel); `share` (index, n) gives each n-th."""
        return (
            load_tensors(self._shard(i), ("h",))[0]["h"].float()
            for i in self._shards_of(split)[share[0] :: share[1]]
        )

    def tokens(self, split: str) -> np.ndarray:
        """Which tokens of each image were kept, int, (image, kept)."""
        shards = self._shards_of(split)
        if self.tokens_kept(split) == self.n_tokens:
            return np.tile(np.arange(self.n_tokens), (len(self.indices(split)), 1))
        return np.concatenate(
            [load_tensors(self._shard(i), ("tokens",))[0]["tokens"].numpy() for i in shards]
        )

    def images(self, split: str, rows=slice(None)) -> np.ndarray:
        """The split's images, or those of `rows` (a slice or a list), float32, (image, height, width, 3), in [0, 1]; ValueError if they were not kept."""
        if split == "train" and not self.manifest["train_images"]:
            raise ValueError(
                f"train_images was false when {self.folder} was collected, so the training images are not there; valid splits are validation, test"
            )
        every = self._places(split)
        if not every:
            raise ValueError(
                f"split {split!r} holds no images; collect some, or choose another of {', '.join(SPLITS)}"
            )
        places = [every[n] for n in np.arange(len(every))[rows]]
        out = np.empty(
            (len(places), *load_rows(self._shard(every[0][0]), "images", [0])[0].shape), np.float32
        )
        for n, image in self._rows(places, "images"):
            out[n] = image
        out /= 255
        return out

    def _places(self, split: str) -> list[tuple[int, int]]:
        """Shard and row of each image of a split."""
        return [
            (i, j)
            for i in self._shards_of(split)
            for j in range(len(self.manifest["images_of_shard"][i]))
        ]

    def _rows(self, places, name: str):
        """The numbers of places (shard, row) and what a tensor holds there, shard by shard."""
        of_shard: dict[int, list[tuple[int, int]]] = {}
        for n, (i, j) in enumerate(places):
            of_shard.setdefault(i, []).append((n, j))
        for i, here in sorted(of_shard.items()):
            yield from zip(
                (n for n, _ in here), load_rows(self._shard(i), name, [j for _, j in here])
            )

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
        buffer_bytes: int = 2**30,
    ):
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
            raise ValueError(
                f"split {split!r} holds no images; collect some, or choose another of {', '.join(SPLITS)}"
            )
        if batch_size % share[1]:
            raise ValueError(
                f"sae_batch_size is {batch_size}; it must be a multiple of the number of processes, {share[1]}"
            )
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
        places = self._places(split)
        per_image = self.tokens_kept(split)
        at_once = max(
            1, buffer_bytes // bytes_per_image(self.n_steps, per_image, self.channels, self.dtype)
        )
        small = len(places) <= at_once  # then it is read once and kept
        whole = self._read(places, per_image) if small else None
        epoch, position = divmod(position, len(places) * per_image)
        while True:
            order = (
                np.arange(len(places))
                if small
                else np.random.default_rng([seed, epoch]).permutation(len(places))
            )
            for b, first in enumerate(range(0, len(order), at_once)):
                chosen = order[first : first + at_once]
                rows = len(chosen) * per_image
                if position >= rows:
                    position -= rows
                    continue
                buffer = whole if small else self._read([places[i] for i in chosen], per_image)
                yield (
                    buffer,
                    torch.from_numpy(
                        np.random.default_rng([seed, epoch, b]).permutation(rows)[position:]
                    ),
                )
                position = 0
            epoch += 1

    def _read(self, places, per_image) -> torch.Tensor:
        """Activations of images at places (shard, row), (place, step, token, channel)."""
        out = torch.empty(len(places), self.n_steps, per_image, self.channels, dtype=self.dtype)
        for n, h in self._rows(places, "h"):
            out[n] = h
        return out
