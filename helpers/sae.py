"""A sparse autoencoder with BatchTopK codes: the model; `helpers.training` trains it.

In training the k · batch largest codes of a whole batch are kept (BatchTopK, Bussmann et al. 2024,
arXiv:2412.06410). At inference each latent has a threshold instead (JumpReLU, Rajamanoharan et al.
2024, arXiv:2407.14435), so that a code never depends on what else is in its batch.
"""

from __future__ import annotations

import torch

from helpers.checks import in_range, refuse


class SAE(torch.nn.Module):
    """z = JumpReLU((y − b_dec) W_enc + b_enc), y_hat = z W_dec + b_dec.

    k is the number of active latents per input, on average over a batch; it need not be whole.
    """

    sparse = True  # codes are mostly zero and never negative

    def __init__(self, d_in: int, n_latents: int, k: float, seed: int = 0):
        super().__init__()
        in_range("n_latents", n_latents, 1)
        if not 0 < k <= n_latents:
            refuse("k", k, f"above 0 and at most n_latents, {n_latents}")
        self.d_in, self.n_latents, self.k = d_in, n_latents, k
        rows = torch.randn(n_latents, d_in, generator=torch.Generator().manual_seed(seed))
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.W_dec = torch.nn.Parameter(rows)  # (n_latents, d_in), rows of unit norm
        self.W_enc = torch.nn.Parameter(rows.clone().T)  # (d_in, n_latents), memory by latent
        self.b_enc = torch.nn.Parameter(torch.zeros(n_latents))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(n_latents))

    def preactivations(self, y: torch.Tensor) -> torch.Tensor:
        """relu((y − b_dec) W_enc + b_enc): (n, d_in) -> (n, n_latents)."""
        return torch.relu(torch.addmm(self.b_enc - self.b_dec @ self.W_enc, y, self.W_enc))

    def encode(self, y: torch.Tensor) -> torch.Tensor:
        """Codes z, those above their latent's threshold: (n, d_in) -> (n, n_latents)."""
        z = self.preactivations(y)
        return z * (z > self.threshold)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruction, (n, d_in), of codes (n, n_latents)."""
        return z @ self.W_dec + self.b_dec

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(y))

    @torch.no_grad()
    def set_threshold(self, y: torch.Tensor) -> SAE:
        """Set all thresholds to the one that leaves k active latents on average on y (n, d_in).

        `y` should not have been trained on: the threshold learnt in training admits more than k
        latents on unseen images. ValueError for NaN or infinity in it.
        """
        if not torch.isfinite(y).all():
            raise ValueError("y holds NaN or infinity; collect the activations again")
        n = min(round(self.k * len(y)), self.n_latents * len(y) - 1)
        largest = self.W_dec.new_zeros(0)
        for part in y.to(self.W_dec).split(1024):
            found = torch.cat([largest, self.preactivations(part).flatten()])
            largest = torch.topk(found, min(n + 1, len(found))).values
        self.threshold.fill_(largest[n])
        return self
