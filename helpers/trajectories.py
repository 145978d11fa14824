"""Recording trajectories: generate images, keep one layer's activations at some steps, store them whole.

One trajectory is what the layer says about one token over the kept denoising steps, raw and unscaled:
standardising is a later choice. The store is a folder of safetensors shards and one
`manifest.json`, which is written last: a folder without it is unfinished, and collecting goes
on where it stopped, because an image depends on its own seed alone.
"""

from __future__ import annotations

import functools
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from helpers.files import digest, load_json, load_tensors, save_json, save_tensors
from helpers.hooks import conditional, denoiser_of, find, listen, steps_of

SPLITS = ("train", "validation", "test")


def kept_steps(steps, num_inference_steps: int, n_keep: int) -> list[int]:
    """The steps to keep: as listed, or `n_keep` spread evenly from the first to the last if the list is empty.

    Raises ValueError for a step outside 0..num_inference_steps-1, or fewer than two steps.
    """
    chosen = sorted(set(steps)) or np.linspace(0, num_inference_steps - 1, n_keep).round().astype(int).tolist()
    for step in chosen:
        if not 0 <= step < num_inference_steps:
            raise ValueError(f"steps: step {step} does not exist; with num_inference_steps={num_inference_steps} valid steps are 0 to {num_inference_steps - 1}")  # fmt: skip
    if len(set(chosen)) < 2 or len(set(chosen)) != len(chosen):
        raise ValueError(f"steps {chosen}: a trajectory needs at least two different steps; valid are 0 to {num_inference_steps - 1}")  # fmt: skip
    return chosen


def generate(pipe, prompts, seeds, *, num_inference_steps, guidance_scale, hookpoint=None, on_call=None, height=None, width=None):  # fmt: skip
    """Images of one batch of prompts, each from its own seed: float32, (n, height, width, 3), in [0, 1].

    With a hookpoint, `on_call` listens or edits there (see `hooks.listen`). Noise is drawn on the CPU, so an
    image does not depend on the device or on the batch it is made in, beyond rounding.
    """
    generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
    pipe.set_progress_bar_config(disable=True)
    size = {k: v for k, v in (("height", height), ("width", width)) if v}

    def run():
        return pipe(
            list(prompts), num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            generator=generators, output_type="np", **size,
        ).images  # fmt: skip

    with torch.no_grad():
        if hookpoint is None:
            return run()
        with listen(denoiser_of(pipe), pipe.scheduler, hookpoint, len(prompts), on_call):
            return run()


def record(pipe, prompts, seeds, *, hookpoint, steps, **sampling) -> tuple[np.ndarray, torch.Tensor, dict]:
    """Generate one batch and keep the conditional branch's activations at the kept steps.

    Returns
    -------
    images : float32, (n, height, width, 3), in [0, 1]
    h : Float[Tensor, "image step token channel"]
        Raw activations, on the CPU, in the model's dtype.
    where : dict
        `grid` (token rows, columns), `timesteps` and `sigmas` of the kept steps.
    """
    kept: dict[int, torch.Tensor] = {}
    where: dict = {}

    def on_call(tokens, call):
        where["grid"] = list(call.grid)
        if call.step in steps:  # a second call within the step takes the place of the first: it sees the accepted latents
            kept[call.step] = conditional(tokens, call).to("cpu")

    images = generate(pipe, prompts, seeds, hookpoint=hookpoint, on_call=on_call, **sampling)
    missing = [s for s in steps if s not in kept]
    if missing:
        raise ValueError(f"steps {missing} were never run by {type(pipe.scheduler).__name__} with num_inference_steps={sampling['num_inference_steps']}; valid are 0 to {len(steps_of(pipe.scheduler)) - 1}")  # fmt: skip
    timesteps = steps_of(pipe.scheduler).double().cpu()
    where["timesteps"] = [float(timesteps[s]) for s in steps]
    alphas = getattr(pipe.scheduler, "alphas_cumprod", None)
    if alphas is not None:  # noise level of the variance-exploding form, sqrt((1 - alpha_bar) / alpha_bar)
        at = alphas.double().cpu()[[int(t) for t in where["timesteps"]]]
        where["sigmas"] = ((1 - at) / at).sqrt().tolist()
    return images, torch.stack([kept[s] for s in steps], dim=1), where


def shapes(pipe, names, prompt: str, **sampling) -> dict[str, tuple[int, int, int]]:
    """Token rows, token columns and channels at hookpoints, from one denoising step of one image.

    A module that the denoiser does not call, or that has no grid of tokens, is left out.
    """
    seen: dict[str, tuple[int, int, int]] = {}
    denoiser = denoiser_of(pipe)
    with ExitStack() as stack:
        for name in names:
            note = functools.partial(lambda name, t, c: seen.setdefault(name, (*c.grid, t.shape[-1])) and None, name)
            stack.enter_context(listen(denoiser, pipe.scheduler, name, 1, note, skip_unfit=True))
        generate(pipe, [prompt], [0], **sampling | {"num_inference_steps": 1})
    return seen


def hookpoints(pipe, prompt: str, **sampling) -> dict[str, tuple[int, int, int]]:
    """Where one would usually listen, in the order of the network: name -> token rows, columns, channels."""
    names = [n for n, _ in denoiser_of(pipe).named_modules()]
    blocks = ("attentions", "resnets", "transformer_blocks", "single_transformer_blocks")
    usual = [n for n in names if n.count(".") <= 3 and n.split(".")[-1].isdigit() and n.split(".")[-2] in blocks]
    return shapes(pipe, usual, prompt, **sampling)


def _shard(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05d}.safetensors"


def collect(folder, pipe, prompts, seeds, split_of, *, hookpoint, steps, batch_size, store_dtype=torch.float16, record_of=None, **sampling):  # fmt: skip
    """Record every prompt into `folder`, one shard a batch, with a progress bar; resumes, and skips what is whole.

    Parameters
    ----------
    prompts, seeds, split_of : lists of equal length
        Each image's prompt, seed, and 'train', 'validation' or 'test'.
    record_of : dict
        Whatever else identifies the collection (model name and so on). A folder begun with other values is
        refused with a ValueError that names what differs; nothing in it is touched.

    Returns the manifest; `manifest["new_images"]` and `["new_seconds"]` tell what this call did.
    """
    if not prompts:
        raise ValueError("prompts is empty; at least one prompt is needed")
    if not len(prompts) == len(seeds) == len(split_of) or not set(split_of) <= set(SPLITS):
        raise ValueError(f"prompts, seeds and split_of have {len(prompts)}, {len(seeds)} and {len(split_of)} entries; they need as many, and splits are {', '.join(SPLITS)}")
    folder = Path(folder)
    find(denoiser_of(pipe), hookpoint)
    described = (record_of or {}) | {
        "hookpoint": hookpoint, "steps": list(steps), "prompts": list(prompts), "seeds": [int(s) for s in seeds],
        "split": list(split_of), "batch_size": batch_size, "dtype": str(store_dtype).removeprefix("torch."),
        "scheduler": type(pipe.scheduler).__name__, "height": 0, "width": 0, **sampling,
    }  # fmt: skip
    refuse_others(folder, described)
    found = shapes(pipe, [hookpoint], prompts[0], **sampling)
    if not found:
        raise ValueError(f"hookpoint {hookpoint!r} is never called; valid are like {', '.join(hookpoints(pipe, prompts[0], **sampling))}")
    rows, columns, channels = found[hookpoint]
    described |= {"grid": [rows, columns], "channels": channels}
    known = load_json(folder / "manifest.json")["shards"] if (folder / "manifest.json").exists() else {}
    todo = [i for i in range(0, len(prompts), batch_size) if not _intact(_shard(folder, i // batch_size), known)]
    images_todo = sum(len(prompts[i : i + batch_size]) for i in todo)
    need = images_todo * bytes_per_image(len(steps), rows * columns, channels, store_dtype)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"n_prompts: {images_todo} images need {need / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB free; choose fewer prompts or steps, or another folder")  # fmt: skip
    start, where = time.perf_counter(), {}
    with tqdm(total=len(prompts), initial=len(prompts) - images_todo, desc="collecting", unit="image") as bar:
        for i in todo:
            batch = slice(i, i + batch_size)
            images, h, where = record(pipe, prompts[batch], seeds[batch], hookpoint=hookpoint, steps=steps, **sampling)
            if not torch.isfinite(h.to(store_dtype)).all():
                raise ValueError(f"store_dtype {store_dtype} cannot hold the activations of {hookpoint!r} (largest {h.abs().max():.3g}); valid are bfloat16 and float32")  # fmt: skip
            if not (folder / "begun.json").exists():
                save_json(folder / "begun.json", described)
            tensors = {"h": h.to(store_dtype), "images": torch.from_numpy((images * 255).round().astype(np.uint8))}
            save_tensors(_shard(folder, i // batch_size), tensors, where)
            bar.update(len(images))
    seconds = time.perf_counter() - start
    shards = [_shard(folder, i) for i in range(-(-len(prompts) // batch_size))]
    manifest = described | load_tensors(shards[0])[1]
    manifest["shards"] = {s.name: digest(s) for s in shards}
    save_json(folder / "manifest.json", manifest)
    return manifest | {"new_images": images_todo, "new_seconds": seconds}


def bytes_per_image(n_steps: int, tokens: int, channels: int, dtype: torch.dtype) -> int:
    """What one image's trajectories take on disk."""
    return n_steps * tokens * channels * dtype.itemsize


def refuse_others(folder, described: dict) -> None:
    """Raise ValueError, naming what differs, if `folder` was begun with other values than `described`."""
    for name in ("begun.json", "manifest.json"):
        if (Path(folder) / name).exists():
            before = load_json(Path(folder) / name)
            for key, value in described.items():
                if before.get(key) != value:
                    was, now = (v if len(str(v)) < 60 else f"{str(v)[:50]}…" for v in (before.get(key), value))
                    raise ValueError(f"{key} is {now!r}, but {folder} was made with {was!r}; give that value or another run name")  # fmt: skip


def _intact(path: Path, known: dict[str, str]) -> bool:
    """Whether a shard can be read, and is the one in the manifest where there is a manifest."""
    try:
        load_tensors(path)
        return known.get(path.name) in (None, digest(path))
    except (FileNotFoundError, ValueError):
        return False


class Store:
    """A collected folder, read shard by shard.

    `n_steps`, `n_tokens`, `channels`, `grid`, `steps`, `timesteps`, `prompts`, `seeds` describe it.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            raise FileNotFoundError(f"run: {self.folder} holds no finished collection; run 01_collect_trajectories first")
        self.manifest = load_json(self.folder / "manifest.json")
        self.prompts, self.seeds = self.manifest["prompts"], self.manifest["seeds"]
        self.steps, self.timesteps = self.manifest["steps"], self.manifest["timesteps"]
        self.grid, self.channels = tuple(self.manifest["grid"]), self.manifest["channels"]
        self.n_steps, self.n_tokens = len(self.steps), self.grid[0] * self.grid[1]
        self.split = np.array(self.manifest["split"])

    def verify(self) -> None:
        """Compare every shard with its SHA-256; ValueError names the first that differs."""
        for name, expected in self.manifest["shards"].items():
            path = self.folder / name
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing; run 01_collect_trajectories again to collect it")
            if digest(path) != expected:
                raise ValueError(f"{path} is damaged; delete it and run 01_collect_trajectories again")

    def indices(self, split: str) -> np.ndarray:
        """Image numbers of a split."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        return np.nonzero(self.split == split)[0]

    def _parts(self, key, split, numbers=None):
        size = self.manifest["batch_size"]
        wanted = np.isin(np.arange(len(self.split)), self.indices(split))
        for i in range(len(self.manifest["shards"])) if numbers is None else numbers:
            keep = np.nonzero(wanted[i * size : (i + 1) * size])[0]
            if len(keep):
                yield load_tensors(_shard(self.folder, i))[0][key][torch.from_numpy(keep)]

    def shards(self, split: str):
        """Activations of a split, one shard at a time: float32 Tensor, (image, step, token, channel)."""
        self.indices(split)
        return (h.float() for h in self._parts("h", split))

    def images(self, split: str) -> np.ndarray:
        """The split's images, float32, (image, height, width, 3), in [0, 1]."""
        return np.concatenate([p.numpy() for p in self._parts("images", split)]).astype(np.float32) / 255

    def batches(self, split: str, batch_size: int, seed: int = 0, buffer_shards: int = 64):
        """Endless shuffled trajectories: Float[Tensor, "batch_size step channel"], float32.

        Shards are read in random order, `buffer_shards` at a time, and their trajectories mixed together.
        """
        if not len(self.indices(split)):
            raise ValueError(f"split {split!r} holds no images; collect some, or choose another of {', '.join(SPLITS)}")
        rng = np.random.default_rng(seed)
        size = self.manifest["batch_size"]
        with_split = [i for i in range(len(self.manifest["shards"])) if (self.split[i * size : (i + 1) * size] == split).any()]
        whole = None
        left = torch.empty(0, self.n_steps, self.channels)
        while True:
            order = rng.permutation(with_split)
            for b in range(0, len(order), buffer_shards):
                if whole is None:
                    buffer = torch.cat([h.transpose(1, 2).flatten(0, 1) for h in self._parts("h", split, order[b : b + buffer_shards])])  # fmt: skip
                    whole = buffer if len(order) <= buffer_shards else None  # small enough to keep
                else:
                    buffer = whole
                buffer = buffer[torch.from_numpy(rng.permutation(len(buffer)))].float()
                buffer = torch.cat([left, buffer])
                for i in range(0, len(buffer) - batch_size + 1, batch_size):
                    yield buffer[i : i + batch_size]
                left = buffer[len(buffer) - len(buffer) % batch_size :]


def read_prompts(source: str | Path) -> list[str]:
    """Prompts from a text file, one a line, blank lines left out. ValueError if none is left."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"prompts {str(source)!r} is not a file; valid are 'scenes' or a text file with one prompt a line")  # fmt: skip
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompts {str(source)!r} holds no prompt; it needs one a line")
    return prompts


def to_pil(image: np.ndarray, size: int | None = None) -> Image.Image:
    """A PIL image of one (height, width, 3) array in [0, 1]; enlarged to `size` pixels high without smoothing."""
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    if size is None:
        return picture
    return picture.resize((round(size * picture.width / picture.height), size), Image.Resampling.NEAREST)
