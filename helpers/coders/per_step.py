"""One SAE a step."""

from __future__ import annotations

import torch

from helpers.sae import SAE


class PerStep(torch.nn.Module):
    """SAEs of the steps as one coder of whole trajectories: latent s · n + j is j at step s.

    W_enc (S · d, S · n) and W_dec (S · n, S · d) are block diagonal.
    """

    sparse = True

    def __init__(self, saes: list[SAE]):
        super().__init__()
        self.saes = torch.nn.ModuleList(saes)
        self.d_in, self.n_latents, self.k = (
            sum(getattr(sae, name) for sae in saes) for name in ("d_in", "n_latents", "k")
        )

    @staticmethod
    def like(tensors: dict[str, torch.Tensor], k: float) -> PerStep:
        rows = [W for name, W in tensors.items() if name.endswith("W_dec")]
        return PerStep([SAE(W.shape[1], W.shape[0], k / len(rows)) for W in rows])

    W_enc = property(lambda self: torch.block_diag(*(sae.W_enc for sae in self.saes)))
    W_dec = property(lambda self: torch.block_diag(*(sae.W_dec for sae in self.saes)))
    b_enc = property(lambda self: torch.cat([sae.b_enc for sae in self.saes]))
    b_dec = property(lambda self: torch.cat([sae.b_dec for sae in self.saes]))
    threshold = property(lambda self: torch.cat([sae.threshold for sae in self.saes]))

    def _each(self, what: str, rows: torch.Tensor) -> list:
        parts = rows.chunk(len(self.saes), dim=1)
        return [getattr(sae, what)(part) for sae, part in zip(self.saes, parts)]

    def encode(self, y: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._each("encode", y), dim=1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._each("decode", z), dim=1)

    def set_threshold(self, y: torch.Tensor) -> None:
        """Each step's own, for k / S active latents."""
        self._each("set_threshold", y)
