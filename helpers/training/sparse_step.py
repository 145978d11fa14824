"""One update of a BatchTopK SAE, its gradients written out by hand.

The one dense product that training needs is the encoder's. Decoding, the gradient of the codes and
the gradients of both weight matrices are products with a sparse matrix of the kept codes.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch

from helpers.checks import choose_dtype
from helpers.sae import SAE


class Part(NamedTuple):
    """What one part of a batch gave, beside gradients."""

    fvu: torch.Tensor
    fired: torch.Tensor  # (n_latents,): how often each latent was kept
    smallest: torch.Tensor  # (n_latents,): the smallest kept code, or the threshold if none is
    active: torch.Tensor | int  # codes above the threshold, if they were counted


class SparseStep:
    """One update: `step(part, dead, weight)` for each part of a batch, then `step.update(rate)`.

    The loss is FVU + aux_coefficient · (auxiliary loss of Gao et al. 2024, arXiv:2406.04093): dead
    latents reconstruct what the others left over. Decoder rows stay of unit norm.
    """

    def __init__(self, sae: SAE, config, accelerator=None):
        self.sae, self.accelerator = sae, accelerator
        self.aux_coefficient, self.dtype = config.aux_coefficient, choose_dtype(config.dtype)
        # W_enc's memory, seen as (n_latents, d_in): contiguous, as fused Adam likes it
        self.rows_enc = torch.nn.Parameter(sae.W_enc.data.T)
        self.parameters = (self.rows_enc, sae.W_dec, sae.b_enc, sae.b_dec)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        fused = sae.W_dec.device.type in ("cpu", "cuda")
        self.optimiser = torch.optim.Adam(self.parameters, lr=config.learning_rate, fused=fused)
        self.first = True  # of a batch's parts: its gradients replace those before
        self.along: torch.Tensor | float = 0.0  # (n_latents,): decoder gradient along its own rows

    @torch.no_grad()
    def __call__(self, y, dead, weight: float = 1.0, count: bool = False) -> Part:
        """Add the gradients of weight · loss on inputs y, (n, d_in); `dead` holds latents' numbers.

        With Z the sparse matrix of kept codes, e = y − b_dec − Z W_dec and
        G = dFVU/dy_hat = −2 e / Σ (y − mean)², the gradients are dZ = G W_decᵀ at the kept places,
        dW_dec = Zᵀ G, dW_encᵀ = dZᵀ (y − b_dec), db_enc = Σ dZ and db_dec = Σ G − W_enc db_enc.
        """
        sae, n, m = self.sae, len(y), self.sae.n_latents
        centred = y - sae.b_dec
        if self.dtype == torch.float32:
            pre = torch.addmm(sae.b_enc, centred, sae.W_enc)
        else:
            pre = (centred.to(self.dtype) @ sae.W_enc.to(self.dtype)).float() + sae.b_enc
        n_all = int(self.sum(torch.tensor(n, device=y.device)))
        n_kept = max(1, round(sae.k * n_all))
        places, codes, cut = largest(pre.flatten(), n_kept, self.accelerator)
        row = places // m
        latent = places - row * m
        Z = _csr(torch.searchsorted(row, torch.arange(n + 1, device=y.device)), latent, codes, n, m)
        error = torch.addmm(centred, Z, sae.W_dec, alpha=-1)
        spread = self.sum((y - self.sum(y.sum(0)) / n_all).pow(2).sum())
        left = self.sum(error.pow(2).sum())
        G = error * (-2 * weight / spread)
        d_codes = torch.sparse.sampled_addmm(Z, G, sae.W_dec.T, beta=0).values()
        # the same matrices once more, latent by latent
        order = torch.sort(latent.int(), stable=True).indices
        starts = torch.searchsorted(latent[order], torch.arange(m + 1, device=y.device))
        beta = float(not self.first)
        for p, values, other in ((sae.W_dec, codes, G), (self.rows_enc, d_codes, centred)):
            by_latent = _csr(starts, row[order], values[order], m, n)
            torch.addmm(p.grad, by_latent, other, beta=beta, out=p.grad)
        zeros = torch.zeros(m, device=y.device)
        d_b_enc = zeros.index_add(0, latent, d_codes)
        along = zeros.index_add(0, latent, codes * d_codes)
        if len(dead) and left > 0:
            revived = 2 * weight * self.aux_coefficient / left
            self._revive(pre, centred, error, dead, revived, d_b_enc, along)
        d_b_dec = G.sum(0) - d_b_enc @ self.rows_enc
        for p, grad in ((sae.b_enc, d_b_enc), (sae.b_dec, d_b_dec)):
            p.grad = grad if self.first else p.grad + grad
        self.along, self.first = self.along + along, False
        fired = zeros.index_add(0, latent, torch.ones_like(codes))
        active = (pre > sae.threshold).sum() if count else 0
        return Part(left / spread, fired, torch.where(cut > 0, cut, sae.threshold), active)

    def _revive(self, pre, centred, error, dead, weight, d_b_enc, along) -> None:
        """Add the gradients of weight / 2 · ‖z W_dec − error‖², z the top codes of dead latents."""
        W, z = self.sae.W_dec[dead], torch.relu(pre[:, dead])
        top = torch.topk(z, min(len(dead), max(1, self.sae.d_in // 2)), dim=1)
        z = torch.zeros_like(z).scatter(1, top.indices, top.values)
        G = (z @ W - error) * weight
        d_z = (G @ W.T) * (z > 0)
        d_W_dec = z.T @ G
        self.sae.W_dec.grad[dead] += d_W_dec
        self.rows_enc.grad[dead] += d_z.T @ centred
        d_b_enc[dead] += d_z.sum(0)
        along[dead] += torch.linalg.vecdot(d_W_dec, W)

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        """One step of Adam; decoder rows keep their norm, so their gradient along them is cut."""
        W = self.sae.W_dec
        for p in self.parameters:
            p.grad = self.sum(p.grad)
        W.grad.addcmul_(W, self.sum(self.along)[:, None], value=-1)
        self.optimiser.param_groups[0]["lr"] = learning_rate
        self.optimiser.step()
        W /= torch.linalg.vector_norm(W, dim=1, keepdim=True)
        self.first, self.along = True, 0.0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Summed over processes."""
        return value if self.accelerator is None else self.accelerator.reduce(value, "sum")


def _csr(starts, columns, values, n: int, m: int) -> torch.Tensor:
    """A sparse n × m matrix, row by row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # CSR is called beta, and unchecked
        return torch.sparse_csr_tensor(starts, columns, values, (n, m))


def largest(flat: torch.Tensor, n: int, accelerator=None) -> tuple[torch.Tensor, ...]:
    """Of the n largest entries over all processes, the places, ascending, and values of those that
    are here and positive; and the n-th largest."""
    among = flat[:0].long()
    if flat.numel() > 100_000:
        # a sample says where the cut lies, so that few entries need sorting; its stride is odd, so
        # that it meets every latent
        sample = flat[:: flat.numel() // 20_000 | 1]
        n_sample = min(len(sample), 1 + 2 * n * len(sample) // flat.numel())
        above = flat > torch.topk(sample, n_sample).values[-1]
        if flat.device.type == "cpu":  # NumPy is three times as fast
            among = torch.from_numpy(np.flatnonzero(above.numpy()))
        else:
            among = above.nonzero().flatten()
    if len(among) < n:  # a small batch, or a sample that misled
        among = torch.arange(flat.numel(), device=flat.device)
    values = flat[among]
    top = torch.topk(values, min(n, len(values)), sorted=False).values
    if accelerator is not None and accelerator.num_processes > 1:
        top = torch.nn.functional.pad(top, (0, n - len(top)), value=float("-inf"))
        top = torch.topk(accelerator.gather(top), n, sorted=False).values
    cut = top.min()
    active = (values >= cut) & (values > 0)
    return among[active], values[active], cut
