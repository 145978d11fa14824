"""A BatchTopK sparse autoencoder and its training.

In training the k · batch largest codes of a whole batch are kept (BatchTopK, Bussmann et al. 2024,
arXiv:2412.06410); at inference a threshold learnt meanwhile takes their place, so that a code never
depends on what else is in its batch. Latents that stopped firing are revived by the auxiliary loss of Gao et al. (2024,
arXiv:2406.04093): they reconstruct what the living ones left over. Decoder rows have unit norm.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from helpers.files import load_tensors, save_tensors


class SAE(torch.nn.Module):
    """z = threshold(relu((y - b_dec) W_enc + b_enc)), y_hat = z W_dec + b_dec.

    Parameters
    ----------
    d_in, n_latents, k : int
        Width of the input, number of latents, and active latents per input.

    Raises
    ------
    ValueError
        k outside 1..n_latents.
    """

    def __init__(self, d_in: int, n_latents: int, k: int, seed: int = 0):
        super().__init__()
        if n_latents < 1:
            raise ValueError(f"n_latents is {n_latents}; it must be at least 1")
        if not 1 <= k <= n_latents:
            raise ValueError(f"k is {k}; with n_latents={n_latents} it must lie in 1 to {n_latents}")
        self.d_in, self.n_latents, self.k = d_in, n_latents, k
        rows = torch.randn(n_latents, d_in, generator=torch.Generator().manual_seed(seed))
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.W_dec = torch.nn.Parameter(rows)  # (n_latents, d_in)
        self.W_enc = torch.nn.Parameter(rows.T.contiguous())  # (d_in, n_latents)
        self.b_enc = torch.nn.Parameter(torch.zeros(n_latents))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(()))

    def preactivations(self, y: torch.Tensor) -> torch.Tensor:
        """relu((y - b_dec) W_enc + b_enc): (n, d_in) -> (n, n_latents)."""
        return torch.relu(torch.addmm(self.b_enc - self.b_dec @ self.W_enc, y, self.W_enc))

    def encode(self, y: torch.Tensor) -> torch.Tensor:
        """Codes z, (n, n_latents), by the learnt threshold: (n, d_in) -> about k non-zeros a row."""
        z = self.preactivations(y)
        return z * (z > self.threshold)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruction, (n, d_in), of codes (n, n_latents)."""
        return z @ self.W_dec + self.b_dec

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(y))

    def kept(self, z: torch.Tensor) -> torch.Tensor:
        """Flat indices, ascending, of the k · n largest entries of preactivations (n, n_latents) over the whole batch."""
        flat, n = z.flatten(), self.k * len(z)
        among = torch.arange(0)
        if flat.numel() > 100_000:  # a sample tells where the cut lies, so that few entries need sorting
            sample = flat[:: flat.numel() // 20_000]
            low = torch.topk(sample, min(len(sample), 1 + 3 * n * len(sample) // flat.numel())).values[-1]
            among = (flat > low).nonzero().flatten()
        if len(among) < n:  # a small batch, or a sample that misled
            among = torch.arange(flat.numel(), device=z.device)
        return among[torch.topk(flat[among], n, sorted=False).indices].sort().values

    def batch_topk(self, z: torch.Tensor) -> torch.Tensor:
        """Preactivations (n, n_latents) with all but the k · n largest of the whole batch set to zero."""
        kept = self.kept(z.detach())
        return torch.zeros_like(z).flatten().scatter(0, kept, z.flatten()[kept]).view_as(z)

    def decode_kept(self, z: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """`decode(batch_topk(z))`, touching only the decoder rows of the entries `kept`: the same to rounding, and faster."""
        starts = torch.searchsorted(kept, torch.arange(len(z), device=z.device) * self.n_latents)
        rows = torch.nn.functional.embedding_bag(
            kept % self.n_latents, self.W_dec, starts, mode="sum", per_sample_weights=z.flatten()[kept]
        )
        return rows + self.b_dec

    def save(self, path: str | Path, record: dict | None = None) -> None:
        """Write to one safetensors file, atomically, with a JSON-able record."""
        sizes = {"d_in": self.d_in, "n_latents": self.n_latents, "k": self.k}
        save_tensors(path, self.state_dict(), (record or {}) | sizes)

    @staticmethod
    def load(path: str | Path) -> tuple[SAE, dict]:
        """Read what `save` wrote; FileNotFoundError or ValueError names a missing or damaged file."""
        tensors, record = load_tensors(path)
        try:
            sae = SAE(record["d_in"], record["n_latents"], record["k"])
            sae.load_state_dict(tensors)
        except (KeyError, RuntimeError):
            raise ValueError(f"{path} does not hold an SAE; run 03_train_residual_sae again") from None
        return sae.eval(), record


@dataclass
class History:
    """What training printed: one entry per logged step."""

    step: list[int] = field(default_factory=list)
    fvu: list[float] = field(default_factory=list)  # of the batch, BatchTopK codes
    l0: list[float] = field(default_factory=list)  # of the batch, threshold codes
    alive: list[float] = field(default_factory=list)  # share of latents not dead
    seconds: float = 0.0


def train(
    batches, d_in: int, n_latents: int, k: int, *, n_steps: int, learning_rate: float = 1e-3, aux_coefficient: float = 1 / 32,
    dead_after: int = 50_000, seed: int = 0, device="cpu", log_every: int = 10, label: str = "SAE",
) -> tuple[SAE, History]:  # fmt: skip
    """Train an SAE on an iterator of batches (n, d_in), float32.

    Adam; linear warm-up over the first 5 % of steps, linear decay over the last 20 %. A latent is dead once it has
    not fired for `dead_after` inputs; the dead ones share an auxiliary loss with k_aux = d_in / 2, at most
    their number.

    Raises
    ------
    ValueError
        k above n_latents.
    FloatingPointError
        A loss that is not finite, naming the step.
    """
    sae = SAE(d_in, n_latents, k, seed)
    batches = iter(batches)
    y = next(batches).to(device)
    sae.b_dec.data = y.mean(0).to("cpu")
    sae = sae.to(device)
    optimiser = torch.optim.Adam(sae.parameters(), lr=learning_rate, betas=(0.9, 0.999))
    since_fired = torch.zeros(n_latents, device=device)
    history, start = History(), time.perf_counter()
    bar = tqdm(range(n_steps), desc=label, mininterval=1)
    for step in bar:
        rate = min(1.0, (step + 1) / (0.05 * n_steps + 1), max(0.01, (n_steps - step) / (0.2 * n_steps)))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rate
        pre = sae.preactivations(y)
        kept = sae.kept(pre.detach())
        error = y - sae.decode_kept(pre, kept)
        spread = (y - y.mean(0)).pow(2).sum()
        fvu = error.pow(2).sum() / spread
        loss = fvu
        with torch.no_grad():
            codes = pre.detach().flatten()[kept]
            since_fired += len(y)
            since_fired[kept[codes > 0] % n_latents] = 0
            smallest = codes[codes > 0].min() if (codes > 0).any() else sae.threshold
            sae.threshold.lerp_(smallest, 1.0 if step == 0 else 0.02)
            dead = (since_fired >= dead_after).nonzero().flatten()
        if len(dead):
            pre_dead = pre[:, dead]
            kept = torch.topk(pre_dead, min(len(dead), max(1, d_in // 2)), dim=1)
            z_dead = torch.zeros_like(pre_dead).scatter(1, kept.indices, kept.values)
            left = error.detach()
            loss = loss + aux_coefficient * ((left - z_dead @ sae.W_dec[dead]).pow(2).sum() / left.pow(2).sum()).nan_to_num()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{label}: the loss is {loss.item()} at step {step}; lower learning_rate (now {learning_rate})")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():  # no gradient along a row: its norm is fixed
            grad = sae.W_dec.grad
            grad -= (grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        if step % log_every == 0 or step == n_steps - 1:
            history.step.append(step)
            history.fvu.append(fvu.item())
            history.l0.append((pre > sae.threshold).sum().item() / len(y))
            history.alive.append(1 - len(dead) / n_latents)
            bar.set_postfix(fvu=f"{fvu.item():.3f}", alive=f"{history.alive[-1]:.2f}")
        if step + 1 < n_steps:
            y = next(batches).to(device)
    history.seconds = time.perf_counter() - start
    return sae.cpu().eval(), history
