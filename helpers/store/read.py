"""Reading a finished collection, shard by shard or in shuffled batches, with bounded memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from helpers.checks import one_of, refuse
from helpers.files import digest, load_rows, load_tensors
from helpers.store.plan import SPLITS, load_manifest, shard_path
from helpers.trajectories import Tap, bytes_per_image


class Store:
    """A collected folder; each shard is held against its SHA-256 when it is first read.

    `tap`, `steps`, `timesteps`, `grid` (token rows, columns), `channels`, `sampling` say what was
    recorded; `prompts`, `seeds` and `split` are of each image; `manifest` holds all of it.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            raise FileNotFoundError(
                f"run: {self.folder} holds no finished collection; run 01_collect_trajectories"
            )
        self.manifest = m = load_manifest(self.folder)
        self.tap = Tap(m["hookpoint"], m["signal"], m["branch"])
        self.prompts, self.seeds, self.sampling = m["prompts"], m["seeds"], m["sampling"]
        self.steps, self.timesteps = m["steps"], m["timesteps"]
        self.grid, self.channels = tuple(m["grid"]), m["channels"]
        self.n_steps, self.n_tokens = len(self.steps), self.grid[0] * self.grid[1]
        self.dtype = getattr(torch, m["dtype"])
        self.split = np.array(m["split"])
        self._checked: set[str] = set()

    def verify(self) -> None:
        """Hold every shard against its SHA-256; ValueError names the first that differs."""
        shards = range(len(self.manifest["shards"]))
        for i in tqdm(shards, desc="checking shards", leave=False, delay=2, disable=None):
            self._shard(i)

    def _shard(self, i: int) -> Path:
        """A shard's path, after holding it against its SHA-256 once."""
        path = shard_path(self.folder, i)
        if path.name not in self._checked:
            again = "run 01_collect_trajectories again to collect it"
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing; {again}")
            if digest(path) != self.manifest["shards"][path.name]:
                raise ValueError(f"{path} is damaged; {again} again")
            self._checked.add(path.name)
        return path

    def indices(self, split: str) -> np.ndarray:
        """Numbers of a split's images, ascending, as all that is read by split."""
        return np.nonzero(self.split == one_of("split", split, SPLITS))[0]

    def n_images(self, split: str) -> int:
        return len(self.indices(split))

    def prompts_of(self, split: str) -> list[str]:
        return [self.prompts[i] for i in self.indices(split)]

    def tokens_kept(self, split: str) -> int:
        """Tokens kept of each image of a split."""
        return (self.manifest["tokens_per_image"] if split == "train" else 0) or self.n_tokens

    def shards(self, split: str, share: tuple[int, int] = (0, 1)):
        """Activations of a split, raw, shard by shard: Float32[Tensor, "image step token channel"].

        `share` (index, n) gives each n-th shard, from the index-th on.
        """
        own = self._shards_of(split)[share[0] :: share[1]]
        return (load_tensors(self._shard(i), ("h",))[0]["h"].float() for i in own)

    def tokens(self, split: str) -> np.ndarray:
        """Which tokens of each image were kept, int, (image, token)."""
        shards = self._shards_of(split)
        if self.tokens_kept(split) == self.n_tokens:
            return np.tile(np.arange(self.n_tokens), (self.n_images(split), 1))
        tokens = [load_tensors(self._shard(i), ("tokens",))[0]["tokens"].numpy() for i in shards]
        return np.concatenate(tokens)

    def images(self, split: str, rows=slice(None)) -> np.ndarray:
        """A split's images, or `rows` of them: float32, (image, height, width, 3), in [0, 1]."""
        if split == "train" and not self.manifest["train_images"]:
            raise ValueError("train_images was false when they were collected; they are not there")
        every = self._places(split)
        places = [every[n] for n in np.arange(len(every))[rows]]
        shape = load_rows(self._shard(every[0][0]), "images", [0])[0].shape
        out = np.empty((len(places), *shape), np.float32)
        for n, image in self._rows(places, "images"):
            out[n] = image
        out /= 255
        return out

    def _shards_of(self, split: str) -> list[int]:
        one_of("split", split, SPLITS)
        of_shard = enumerate(self.manifest["images_of_shard"])
        return [i for i, images in of_shard if self.split[images[0]] == split]

    def _places(self, split: str) -> list[tuple[int, int]]:
        """Shard and row of each image of a split."""
        if not self.n_images(split):
            refuse("split", split, "one that images were collected for")
        n_images = [len(images) for images in self.manifest["images_of_shard"]]
        return [(i, row) for i in self._shards_of(split) for row in range(n_images[i])]

    def _rows(self, places, name: str):
        """The numbers of places (shard, row) and what a tensor holds there, shard by shard."""
        of_shard: dict[int, list[tuple[int, int]]] = {}
        for n, (i, row) in enumerate(places):
            of_shard.setdefault(i, []).append((n, row))
        for i, here in sorted(of_shard.items()):
            numbers, rows = zip(*here)
            yield from zip(numbers, load_rows(self._shard(i), name, list(rows)))

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
        buffer_bytes: int = 2**30,
    ):
        """Endless shuffled trajectories, raw: Float32[Tensor, "batch_size step channel"].

        Images come in a random order over all shards, are read through memory maps into a buffer of
        `buffer_bytes` (a second one is filled meanwhile), and their trajectories are mixed there;
        each epoch has every one once.
        The first `start` batches are left out, unread: there a stopped training goes on. `share`
        (index, n) gives only the index-th of n equal parts of every batch, to one of n processes.
        """
        index, n = share
        if batch_size % n:
            refuse("sae_batch_size", batch_size, f"a multiple of {n}, the number of processes")
        part = slice(index * batch_size // n, (index + 1) * batch_size // n)
        with ThreadPoolExecutor(1) as reader:
            buffers = self._buffers(split, seed, start * batch_size, buffer_bytes)
            ahead, left = reader.submit(next, buffers), None
            while True:
                buffer, rows = ahead.result()
                ahead = reader.submit(next, buffers)
                first = 0
                if left is not None:  # a batch that began in the buffer before
                    first = batch_size - len(left)
                    left = torch.cat([left, _gather(buffer, rows[:first])])
                    if len(left) == batch_size:
                        yield left[part].float()
                        left = None
                while left is None and first + batch_size <= len(rows):
                    yield _gather(buffer, rows[first : first + batch_size][part]).float()
                    first += batch_size
                if left is None and first < len(rows):
                    left = _gather(buffer, rows[first:])

    def _buffers(self, split: str, seed: int, position: int, buffer_bytes: int):
        """Endless buffers of images (image, step, token, channel) and orders of their trajectories.

        `position` trajectories are left out at the beginning.
        """
        places, n_tokens = self._places(split), self.tokens_kept(split)
        size = bytes_per_image(self.n_steps, n_tokens, self.channels, self.dtype)
        at_once = max(1, buffer_bytes // size)
        small = len(places) <= at_once  # then it is read once and kept
        whole = self._read(places, n_tokens) if small else None
        epoch, position = divmod(position, len(places) * n_tokens)
        while True:
            order = np.arange(len(places))
            if not small:
                order = np.random.default_rng([seed, epoch]).permutation(len(places))
            for b, first in enumerate(range(0, len(order), at_once)):
                chosen = order[first : first + at_once]
                n_rows = len(chosen) * n_tokens
                if position >= n_rows:
                    position -= n_rows
                    continue
                buffer = whole if small else self._read([places[i] for i in chosen], n_tokens)
                rows = np.random.default_rng([seed, epoch, b]).permutation(n_rows)
                yield buffer, torch.from_numpy(rows[position:])
                position = 0
            epoch += 1

    def _read(self, places, n_tokens: int) -> torch.Tensor:
        """Activations of images at places (shard, row): (place, step, token, channel)."""
        out = torch.empty(len(places), self.n_steps, n_tokens, self.channels, dtype=self.dtype)
        for n, h in self._rows(places, "h"):
            out[n] = h
        return out


def _gather(buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Trajectories (row, step, channel) of a buffer; a row's number is image · tokens + token."""
    _, S, n_tokens, d = buffer.shape
    first = (rows // n_tokens) * S * n_tokens + rows % n_tokens
    places = first[:, None] + torch.arange(S) * n_tokens
    return buffer.view(-1, d).index_select(0, places.flatten()).view(len(rows), S, d)
