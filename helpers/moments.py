"""One pass over trajectories: the sums from which means, scales and every regression follow.

Memory grows with channels squared, whatever the number of trajectories, and sums of parts add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from helpers.files import check_writable, load_tensors, save_tensors


@dataclass
class Moments:
    """Sums over trajectories, float64, of activations h less a `shift`, the same where they add up.

    The shift keeps large means from eating the precision.
    """

    shift: torch.Tensor  # (S, d)
    count: int
    total: torch.Tensor  # (S, d): Σ h
    square: torch.Tensor  # (S, d, d): Σ h[s]ᵀ h[s]
    cross: torch.Tensor  # (S, d, d): Σ h[s-1]ᵀ h[s]; [0] is unused
    cross2: torch.Tensor  # (S, d, d): Σ h[s-2]ᵀ h[s]; [0] and [1] are unused

    @staticmethod
    def none(shift: torch.Tensor) -> Moments:
        square = shift.new_zeros(*shift.shape, shift.shape[1])
        return Moments(shift, 0, torch.zeros_like(shift), *(square.clone() for _ in range(3)))

    def __add__(self, other: Moments) -> Moments:
        if not torch.equal(self.shift, other.shift):
            raise ValueError("moments with different shifts do not add; give accumulate one shift")
        sums = (getattr(self, f.name) + getattr(other, f.name) for f in fields(self)[1:])
        return Moments(self.shift, *sums)

    def summed(self, accelerator) -> Moments:
        """These sums over an `accelerate.Accelerator`'s processes, which must share one shift."""
        sums = (torch.as_tensor(getattr(self, f.name)) for f in fields(self)[1:])
        count, *sums = (accelerator.reduce(v.to(accelerator.device), "sum").cpu() for v in sums)
        return Moments(self.shift, int(count), *sums)

    def save(self, path: str | Path, record: dict | None = None) -> None:
        """Write one safetensors file, atomically, with a JSON-able record beside the tensors."""
        save_tensors(path, {name: torch.as_tensor(v) for name, v in vars(self).items()}, record)

    @staticmethod
    def load(path: str | Path) -> tuple[Moments, dict]:
        """Read what `save` wrote; FileNotFoundError or ValueError names a missing or wrong file."""
        tensors, record = load_tensors(path)
        try:
            return Moments(**tensors | {"count": int(tensors["count"])}), record
        except (KeyError, TypeError):
            raise ValueError(
                f"{path} does not hold moments; delete it and run 02_fit_predictors again"
            ) from None


def accumulate(shards: Iterable[torch.Tensor], shift=None, device="cpu") -> Moments:
    """Moments of raw activations, each shard Float[Tensor, "image step token channel"].

    Sums are float64, on the CPU where the device has none (MPS), and come back on the CPU. Without
    `shift` (S, d), the first shard's mean serves. ValueError for values that are not finite.
    """
    device = "cpu" if str(device).startswith("mps") else device
    moments: Moments | None = None
    waiting: list[torch.Tensor] = []
    for shard in shards:
        whole = {"copy": True, "memory_format": torch.contiguous_format}
        h = shard.permute(1, 0, 2, 3).to(device, torch.float64, **whole).flatten(1, 2)
        if moments is None:
            moments = Moments.none(h.mean(1) if shift is None else shift.to(device))
        waiting.append(h)
        # adding (d, d) up is work like a product with d rows, so small shards are joined
        if sum(w.shape[1] for w in waiting) >= min(h.shape[2], 4096):
            moments, waiting = moments + _sums(waiting, moments.shift), []
    if moments is None:
        raise ValueError("there are no trajectories to sum; give the split at least one prompt")
    if waiting:
        moments = moments + _sums(waiting, moments.shift)
    return Moments(*(v.cpu() if torch.is_tensor(v) else v for v in vars(moments).values()))


def _sums(parts: list[torch.Tensor], shift: torch.Tensor) -> Moments:
    """Moments of parts (step, trajectory, channel), float64, which are overwritten."""
    h = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    h -= shift[:, None]
    total = h.sum(1)
    if not torch.isfinite(total).all():
        raise ValueError(
            "the activations hold NaN or infinity; collect them with store_dtype 'float32'"
        )
    if h.device.type == "cpu":  # NumPy knows that a product with itself is half the work
        square = torch.from_numpy(np.stack([x.T @ x for x in h.numpy()]))
    else:
        square = h.mT @ h
    cross, cross2 = torch.zeros_like(square), torch.zeros_like(square)
    cross[1:], cross2[2:] = h[:-1].mT @ h[1:], h[:-2].mT @ h[2:]
    return Moments(shift, h.shape[1], total, square, cross, cross2)


def cached(path: str | Path, made_from: dict, make: Callable[[], Moments]) -> Moments:
    """The moments in `path` if it was `made_from` the same, else those of `make`, saved there."""
    if Path(path).exists():
        moments, record = Moments.load(path)
        if record == made_from:
            return moments
    check_writable(Path(path).parent)
    moments = make()
    moments.save(path, made_from)
    return moments


def accumulate_once(path, made_from: dict, shards, shift=None, device="cpu") -> Moments:
    """`accumulate`, kept in `path`; `shards` are left unread where it was `made_from` the same."""
    return cached(path, made_from, lambda: accumulate(shards, shift, device))
