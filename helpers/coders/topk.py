"""An SAE that keeps the k largest codes of every single input."""

from __future__ import annotations

import torch

from helpers.checks import refuse
from helpers.sae import SAE


class TopK(SAE):
    """z = the k largest of ReLU((y − b_dec) W_enc + b_enc), the rest 0; there is no threshold.

    TopK of Gao et al. (2024), arXiv:2406.04093: how SAEs trained elsewhere often read. Its
    `threshold` stays 0.
    """

    def __init__(self, d_in: int, n_latents: int, k: int, seed: int = 0):
        if k != round(k):
            refuse("k", k, "whole: as many codes of every input are kept")
        super().__init__(d_in, n_latents, round(k), seed)

    @staticmethod
    def like(tensors: dict[str, torch.Tensor], k: int) -> TopK:
        n_latents, d_in = tensors["W_dec"].shape
        return TopK(d_in, n_latents, k)

    def encode(self, y: torch.Tensor) -> torch.Tensor:
        z = self.preactivations(y)
        largest = z.topk(self.k, dim=1)
        return torch.zeros_like(z).scatter(1, largest.indices, largest.values)

    def set_threshold(self, y: torch.Tensor) -> TopK:
        """Nothing to set: k holds for every single input."""
        return self
