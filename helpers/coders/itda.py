"""A dictionary of data points, without gradients: ITDA (Leask et al. 2025, arXiv:2505.17769)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from helpers.training.loop import LOG_EVERY, History, TrainConfig, Training


class Pursuit(torch.nn.Module):
    """Non-negative gradient pursuit (Blumensath & Davies 2008): at most k atoms an input.

    k times, the atom most along what is left joins those chosen, if it is along it at all, and
    their codes take the best step along the gradient; negative ones become 0. There is no encoder.
    """

    sparse = True

    def __init__(self, d_in: int, n_latents: int, k: int):
        super().__init__()
        self.d_in, self.n_latents, self.k = d_in, n_latents, k
        self.register_buffer("W_dec", torch.zeros(n_latents, d_in))  # unit norm, or still empty
        self.register_buffer("b_dec", torch.zeros(d_in))

    @staticmethod
    def like(tensors: dict[str, torch.Tensor], k: int) -> Pursuit:
        n_latents, d_in = tensors["W_dec"].shape
        return Pursuit(d_in, n_latents, k)

    def encode(self, y: torch.Tensor) -> torch.Tensor:
        z = y.new_zeros(len(y), self.n_latents)
        chosen = torch.zeros_like(z, dtype=torch.bool)
        for _ in range(self.k):
            left = y - self.decode(z)
            along = left @ self.W_dec.T
            best = along.masked_fill(chosen, -math.inf).max(1, keepdim=True)
            chosen |= torch.zeros_like(chosen).scatter(1, best.indices, best.values > 0)
            gradient = along * chosen
            moved = gradient @ self.W_dec
            size = (moved * left).sum(1) / moved.pow(2).sum(1).clamp(min=1e-30)
            z = torch.relu(z + size[:, None] * gradient)
        return z

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.W_dec + self.b_dec

    def set_threshold(self, y: torch.Tensor) -> None:
        """Nothing to set: k holds for every single input."""


class Growing(Training):
    """Batch by batch, atoms join where coding fails."""

    def __init__(self, d_in: int, config: TrainConfig, device, accelerator=None, *, tau: float):
        self.config, self.tau = config, tau
        self.coder = Pursuit(d_in, config.n_latents, max(1, round(config.k))).to(device)
        self.step, self.since_fired = SimpleNamespace(parameters=()), torch.zeros(0)
        self.done, self.history = 0, History()

    @torch.no_grad()
    def update(self, y: torch.Tensor) -> None:
        c, coder, history = self.config, self.coder, self.history
        if not torch.isfinite(y).all():
            raise FloatingPointError(f"update {self.done}: the batch holds NaN or infinity")
        if not self.done:
            coder.b_dec.copy_(y.mean(0))
        n, z = int(coder.W_dec.any(1).sum()), coder.encode(y)
        left = y - coder.decode(z)
        missed, whole = left.pow(2).sum(1), (y - coder.b_dec).pow(2).sum(1)
        room = math.ceil((c.n_latents - n) / (c.n_updates - self.done))
        new = left[missed > self.tau * whole][:room]
        coder.W_dec[n : n + len(new)] = torch.nn.functional.normalize(new)
        if self.done % LOG_EVERY == 0 or self.done == c.n_updates - 1:
            history.step.append(self.done)
            history.fvu.append((missed.sum() / whole.sum()).item())
            history.l0.append((z > 0).sum(1).float().mean().item())
            history.alive.append((n + len(new)) / c.n_latents)
        self.done += 1
