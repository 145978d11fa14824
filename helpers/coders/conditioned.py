"""One SAE for all steps that is told the step, after TIDE (arXiv:2503.07050)."""

from __future__ import annotations

import torch

from helpers.sae import SAE


class Conditioned(torch.nn.Module):
    """z[s] = sae.encode(y[s] ∘ (1 + scale[s]) + shift[s]), y_hat[s] = sae.decode(z[s]).

    `scale` and `shift` (S, d), zero before training, are learnt with the SAE: a free table in place
    of TIDE's map from an embedded timestep, since a trajectory has but S of them. As a coder of
    whole trajectories it has latent s · n + j for the SAE's j at step s; W_enc (S · d, S · n),
    b_enc, W_dec and b_dec are what it does to them, all linear up to ReLU and threshold.
    """

    sparse = True

    def __init__(self, n_steps: int, sae: SAE):
        super().__init__()
        self.sae = sae
        self.scale = torch.nn.Parameter(torch.zeros(n_steps, sae.d_in))
        self.shift = torch.nn.Parameter(torch.zeros(n_steps, sae.d_in))
        self.d_in, self.n_latents, self.k = (n_steps * v for v in (sae.d_in, sae.n_latents, sae.k))

    @staticmethod
    def like(tensors: dict[str, torch.Tensor], k: float) -> Conditioned:
        n_steps, d = tensors["scale"].shape
        return Conditioned(n_steps, SAE(d, len(tensors["sae.W_dec"]), k / n_steps))

    def modulated(self, y: torch.Tensor) -> torch.Tensor:
        """What the SAE reads: (n, S · d) -> (n · S, d)."""
        return (y.unflatten(1, self.scale.shape) * (1 + self.scale) + self.shift).flatten(0, 1)

    def encode(self, y: torch.Tensor) -> torch.Tensor:
        return self.sae.encode(self.modulated(y)).view(len(y), -1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.sae.decode(z.reshape(-1, self.sae.n_latents)).view(len(z), -1)

    def set_threshold(self, y: torch.Tensor) -> None:
        """One for all steps, with k active latents a trajectory on average."""
        self.sae.set_threshold(self.modulated(y))

    @property
    def W_enc(self) -> torch.Tensor:
        return torch.block_diag(*((1 + scale)[:, None] * self.sae.W_enc for scale in self.scale))

    @property
    def b_enc(self) -> torch.Tensor:
        b_dec, W_enc = self.sae.b_dec, self.sae.W_enc
        return (self.sae.b_enc + (self.scale * b_dec + self.shift) @ W_enc).flatten()

    W_dec = property(lambda self: torch.block_diag(*[self.sae.W_dec] * len(self.scale)))
    b_dec = property(lambda self: self.sae.b_dec.repeat(len(self.scale)))
    threshold = property(lambda self: self.sae.threshold.repeat(len(self.scale)))
