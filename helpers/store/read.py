"""Reading a finished collection, shard by shard or in shuffled batches, with bounded memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from helpers.checks import one_of, refuse
from helpers.files import digest, load_rows, load_tensors
from helpers.store.plan import SPLITS, load_record, shard_path
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
        self.manifest = m = load_record(self.folder / "manifest.json")
        self.tap = Tap(m["hookpoint"], m["signal"], m["branch"])
        self.prompts, self.seeds, self.sampling = m["prompts"], m["seeds"], m["sampling"]
        self.steps, self.timesteps = m["steps"], m["timesteps"]
        self.grid, self.channels = tuple(m["grid"]), m["channels"]
        self.n_steps, self.n_tokens = len(self.steps), self.grid[0] * self.grid[1]
        self.dtype = getattr(torch, m["dtype"])
        self.split = np.array(m["split"])
        self._checked: set[str] = set()

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

    def shards(self, split: str, share=(0, 1)):
        """Raw activations, each n-th shard of `share` (index, n): (image, step, token, channel)."""
        own = self._shards_of(split)[share[0] :: share[1]]
        return (load_tensors(self._shard(i), ("h",))[0]["h"].float() for i in own)

    def tokens(self, split: str) -> np.ndarray:
        """Which tokens of each image were kept, int, (image, token)."""
        if self.tokens_kept(split) == self.n_tokens:
            return np.tile(np.arange(self.n_tokens), (self.n_images(split), 1))
        paths = map(self._shard, self._shards_of(split))
        return np.concatenate([load_tensors(path, ("tokens",))[0]["tokens"] for path in paths])

    def images(self, split: str, rows=slice(None)) -> np.ndarray:
        """A split's images, or `rows` of them: float32, (image, height, width, 3), in [0, 1]."""
        if split == "train" and not self.manifest["train_images"]:
            raise ValueError("train_images was false when they were collected; they are not there")
        places = self._places(split)
        chosen = [places[n] for n in np.arange(len(places))[rows]]
        shape = load_rows(self._shard(places[0][0]), "images", [0])[0].shape
        out = self._fill(np.empty((len(chosen), *shape), np.float32), chosen, "images")
        out /= 255
        return out

    def activations(self, split: str, rows) -> torch.Tensor:
        """Raw activations of `rows` of a split's images: float32, (image, step, token, channel)."""
        places = self._places(split)
        return self._read([places[n] for n in rows], self.tokens_kept(split)).float()

    def _shards_of(self, split: str) -> list[int]:
        one_of("split", split, SPLITS)
        every = enumerate(self.manifest["images_of_shard"])
        return [i for i, images in every if self.split[images[0]] == split]

    def _places(self, split: str) -> list[tuple[int, int]]:
        """Shard and row of each image of a split."""
        if not self.n_images(split):
            refuse("split", split, "one that images were collected for")
        n_images = [len(images) for images in self.manifest["images_of_shard"]]
        return [(i, row) for i in self._shards_of(split) for row in range(n_images[i])]

    def _fill(self, out, places, name: str):
        """`out`, filled with what a tensor holds at places (shard, row), read shard by shard."""
        of_shard: dict[int, list[tuple[int, int]]] = {}
        for n, (i, row) in enumerate(places):
            of_shard.setdefault(i, []).append((n, row))
        for i, here in sorted(of_shard.items()):
            numbers, rows = zip(*here)
            for n, entry in zip(numbers, load_rows(self._shard(i), name, list(rows))):
                out[n] = entry
        return out

    def batches(self, split, batch_size, seed=0, start=0, share=(0, 1), buffer_bytes=2**30):
        """Endless shuffled trajectories, raw: Float32[Tensor, "batch_size step channel"].

        Images of all shards come in a random order into a buffer of `buffer_bytes` (a second one is
        filled meanwhile), where their trajectories are mixed; each epoch has every one once. The
        first `start` batches are left out, unread. `share` (index, n) gives the index-th of n equal
        parts of every batch.
        """
        index, n = share
        if batch_size % n:
            refuse("sae_batch_size", batch_size, f"a multiple of {n}, the number of processes")
        low, high = index * batch_size // n, (index + 1) * batch_size // n
        with ThreadPoolExecutor(1) as reader:
            buffers = self._buffers(split, seed, start * batch_size, buffer_bytes)
            ahead = reader.submit(next, buffers)
            begun, size = [], 0  # our parts of a batch that earlier buffers began, and its rows
            while True:
                buffer, rows = ahead.result()
                ahead = reader.submit(next, buffers)
                for here in rows.tensor_split([*range(batch_size - size, len(rows), batch_size)]):
                    own = here[max(0, low - size) : max(0, high - size)]
                    begun.append(_gather(buffer, own).float())
                    size += len(here)
                    if size == batch_size:
                        yield begun[0] if len(begun) == 1 else torch.cat(begun)
                        begun, size = [], 0

    def _buffers(self, split: str, seed: int, position: int, buffer_bytes: int):
        """Endless buffers (image, step, token, channel) and orders of their trajectories."""
        places, n_tokens = self._places(split), self.tokens_kept(split)
        size = bytes_per_image(self.n_steps, n_tokens, self.channels, self.dtype)
        at_once = max(1, buffer_bytes // size)
        small = len(places) <= at_once  # then it is read once and kept
        buffer = self._read(places, n_tokens) if small else None
        epoch, position = divmod(position, len(places) * n_tokens)
        while True:
            order = np.arange(len(places))
            if not small:
                order = np.random.default_rng([seed, epoch]).permutation(len(places))
            for b, first in enumerate(range(0, len(order), at_once)):
                chosen = order[first : first + at_once]
                n_rows = len(chosen) * n_tokens
                if position < n_rows:
                    if not small:
                        buffer = self._read([places[i] for i in chosen], n_tokens)
                    rows = np.random.default_rng([seed, epoch, b]).permutation(n_rows)
                    yield buffer, torch.from_numpy(rows[position:])
                position = max(0, position - n_rows)
            epoch += 1

    def _read(self, places, n_tokens: int) -> torch.Tensor:
        """Activations of images at places (shard, row): (place, step, token, channel)."""
        shape = len(places), self.n_steps, n_tokens, self.channels
        return self._fill(torch.empty(shape, dtype=self.dtype), places, "h")


def _gather(buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Trajectories (row, step, channel) of a buffer; a row's number is image · tokens + token."""
    _, S, n_tokens, d = buffer.shape
    first = (rows // n_tokens) * S * n_tokens + rows % n_tokens
    places = first[:, None] + torch.arange(S) * n_tokens
    return buffer.view(-1, d).index_select(0, places.flatten()).view(len(rows), S, d)
