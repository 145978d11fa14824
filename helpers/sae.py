"""A BatchTopK sparse autoencoder and its training.

In training the k · batch largest codes of a whole batch are kept (BatchTopK, Bussmann et al. 2024,
arXiv:2412.06410); at inference a threshold learnt meanwhile takes their place, so that a code never
depends on what else is in its batch. Latents that stopped firing are revived by the auxiliary loss of Gao et al. (2024,
arXiv:2406.04093): they reconstruct what the living ones left over. Decoder rows have unit norm.

The one dense product that training needs is the encoder's. Decoding, the gradient of the codes and the gradients of both
weight matrices are products with a sparse matrix of the kept codes, so they are written out by hand.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
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
            raise ValueError(
                f"k is {k}; with n_latents={n_latents} it must lie in 1 to {n_latents}"
            )
        self.d_in, self.n_latents, self.k = d_in, n_latents, k
        rows = torch.randn(n_latents, d_in, generator=torch.Generator().manual_seed(seed))
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.W_dec = torch.nn.Parameter(rows)  # (n_latents, d_in)
        self.W_enc = torch.nn.Parameter(
            rows.clone().T
        )  # (d_in, n_latents), in memory latent by latent
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
            raise ValueError(
                f"{path} does not hold an SAE; run 03_train_residual_sae again"
            ) from None
        return sae.eval(), record

    @torch.no_grad()
    def set_threshold(self, y: torch.Tensor) -> SAE:
        """Set the threshold to what leaves k active latents an input, on average over inputs (n, d_in) not trained on; returns the SAE.

        The threshold learnt in training is that of inputs it knows, and leaves more on others. ValueError for NaN or infinity in y.
        """
        if not torch.isfinite(y).all():
            raise ValueError("y holds NaN or infinity; collect the activations again")
        n, largest = min(self.k * len(y), self.n_latents * len(y) - 1), self.W_dec.new_zeros(0)
        for part in y.to(self.W_dec).split(1024):
            found = torch.cat([largest, self.preactivations(part).flatten()])
            largest = torch.topk(found, min(n + 1, len(found))).values
        self.threshold.copy_(largest[n])
        return self


@dataclass
class History:
    """What training printed: one entry per logged step."""

    step: list[int] = field(default_factory=list)
    fvu: list[float] = field(default_factory=list)  # of the batch, BatchTopK codes
    l0: list[float] = field(default_factory=list)  # of the batch, threshold codes
    alive: list[float] = field(default_factory=list)  # share of latents not dead
    seconds: float = 0.0


def train(
    batches,
    d_in: int,
    n_latents: int,
    k: int,
    *,
    n_steps: int,
    learning_rate: float = 1e-3,
    aux_coefficient: float = 1 / 32,
    dead_after: int = 50_000,
    seed: int = 0,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    accumulate: int = 1,
    checkpoints=None,
    save_every: int = 500,
    record: dict | None = None,
    accelerator=None,
    log_every: int = 10,
    label: str = "SAE",
) -> tuple[SAE, History]:
    """Train an SAE on batches with Adam: warm-up over 5 % of the updates, linear decay over the last 20 %.

    Parameters
    ----------
    batches : iterable of Float[Tensor, "batch d_in"], or a function of the number of batches to leave out that returns one
    n_steps : int
        Updates.
    dead_after : int
        Inputs without firing after which a latent counts as dead and takes part in the auxiliary loss.
    dtype : torch.dtype
        Of the encoder's product, the one dense one; weights, codes and everything else stay float32.
    accumulate : int
        Parts that each batch is taken in, to save memory; the largest codes are then chosen within each part.
    checkpoints : folder, optional
        Where the whole state is kept every `save_every` updates, in a file whose name tells these settings. If it is there,
        training goes on from it and ends with the weights it would have had without stopping, bit for bit on a CPU; a
        finished one is only loaded.
    record : dict, optional
        What else a checkpoint must agree in, such as the data's fingerprint.
    accelerator : accelerate.Accelerator, optional
        Data parallel: each process gives its part of every batch, and the largest codes are chosen among all of them.

    Raises
    ------
    ValueError
        k above n_latents; a learning rate, dead_after or accumulate that is not positive.
    FloatingPointError
        NaN or infinity in a batch or in the loss, naming the update; the last checkpoint stays as it was.
    """
    for name, value in (
        ("learning_rate", learning_rate),
        ("dead_after", dead_after),
        ("accumulate", accumulate),
        ("n_updates", n_steps),
    ):
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    device = (
        accelerator.device if accelerator else "cpu" if str(device).startswith("mps") else device
    )  # MPS has no sparse products
    settings = (record or {}) | {
        "d_in": d_in,
        "n_latents": n_latents,
        "k": k,
        "n_steps": n_steps,
        "learning_rate": learning_rate,
        "aux_coefficient": aux_coefficient,
        "dead_after": dead_after,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "accumulate": accumulate,
    }
    sae = SAE(d_in, n_latents, k, seed).to(device)
    rows_enc = torch.nn.Parameter(
        sae.W_enc.data.T
    )  # the same memory, (n_latents, d_in) and contiguous, as fused Adam likes it
    parameters = (rows_enc, sae.W_dec, sae.b_enc, sae.b_dec)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    fused = torch.device(device).type in ("cpu", "cuda")
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.999), fused=fused)
    since_fired, done, history = torch.zeros(n_latents, device=device), 0, History()
    checkpoint = None
    if checkpoints is not None:
        told = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        checkpoint = Path(checkpoints) / f"{label.replace(' ', '_')}-{told}.safetensors"
        if checkpoint.exists():
            done, history = _resume(checkpoint, sae, optimiser, since_fired)
    main = accelerator is None or accelerator.is_main_process
    start = time.perf_counter() - history.seconds
    stream = None if done == n_steps else _from(batches, done)
    bar = tqdm(
        range(done, n_steps),
        initial=done,
        total=n_steps,
        desc=label,
        mininterval=1,
        disable=not main or done == n_steps,
    )
    for step in bar:
        y = next(stream).to(device)
        if step == 0:
            sae.b_dec.data = _sum(accelerator, y.sum(0)) / _sum(
                accelerator, torch.tensor(float(len(y)), device=device)
            )
        rate = min(
            1.0, (step + 1) / (0.05 * n_steps + 1), max(0.01, (n_steps - step) / (0.2 * n_steps))
        )
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rate
        dead = (since_fired >= dead_after).nonzero().flatten()
        if step == done and len(y) < 2 * accumulate:
            raise ValueError(
                f"sae_batch_size gives {len(y)} inputs at once; with accumulate={accumulate} it must be at least {2 * accumulate}, two inputs a part"
            )
        log = step % log_every == 0 or step == n_steps - 1
        chunks = y.chunk(accumulate)
        parts = [
            _backward(
                sae,
                rows_enc,
                part,
                dead,
                aux_coefficient,
                1 / len(chunks),
                i > 0,
                dtype,
                accelerator,
                log,
            )
            for i, part in enumerate(chunks)
        ]
        fvu = sum(p.fvu for p in parts) / len(parts)
        if not torch.isfinite(fvu):
            where = (
                "the batch holds NaN or infinity; look at the recorded activations"
                if not torch.isfinite(y).all()
                else f"the loss is {fvu.item()}; lower learning_rate (now {learning_rate})"
            )
            raise FloatingPointError(
                f"{label}, update {step}: {where}"
                + (
                    f". The last checkpoint, {checkpoint}, is kept"
                    if checkpoint and checkpoint.exists()
                    else ""
                )
            )
        _update(sae, optimiser, sum(p.along for p in parts), accelerator)
        since_fired += _sum(accelerator, torch.tensor(float(len(y)), device=device))
        since_fired[_sum(accelerator, sum(p.fired for p in parts)) > 0] = 0
        for part in parts:
            sae.threshold.lerp_(part.smallest, 1.0 if step == 0 else 0.02)
        if log:
            history.step.append(step)
            history.fvu.append(fvu.item())
            history.l0.append(sum(p.active for p in parts).item() / len(y))
            history.alive.append(1 - len(dead) / n_latents)
            bar.set_postfix(fvu=f"{fvu.item():.3f}", alive=f"{history.alive[-1]:.2f}")
        if (
            checkpoint is not None
            and main
            and ((step + 1) % save_every == 0 or step + 1 == n_steps)
        ):
            history.seconds = time.perf_counter() - start
            _save(checkpoint, settings, sae, optimiser, since_fired, step + 1, history)
    history.seconds = time.perf_counter() - start if done < n_steps else history.seconds
    sae.zero_grad()  # frees the gradients
    return sae.cpu().eval(), history


def _from(batches, start: int):
    """Batches from the one numbered `start` on."""
    if callable(batches):
        return iter(batches(start))
    batches = iter(batches)
    for _ in range(start):
        next(batches)
    return batches


def _sum(accelerator, value: torch.Tensor) -> torch.Tensor:
    return value if accelerator is None else accelerator.reduce(value, "sum")


@dataclass
class _Part:
    """What one part of a batch gave, beside gradients."""

    fvu: torch.Tensor
    along: torch.Tensor  # (n_latents,): the decoder's gradient along its own rows
    fired: torch.Tensor  # (n_latents,): how often each latent was kept
    smallest: torch.Tensor  # the smallest kept code
    active: torch.Tensor | int  # codes above the threshold, if they were to be counted


@torch.no_grad()
def _backward(
    sae: SAE, rows_enc, y, dead, aux_coefficient, weight, add: bool, dtype, accelerator, count: bool
) -> _Part:
    """Gradients of weight · (FVU + auxiliary loss) on one batch, put into (or added to) the `.grad` of `rows_enc`, W_dec, b_enc and b_dec.

    With Z the sparse matrix of kept codes, e = y - b_dec - Z W_dec and G = dFVU/dy_hat = -2 e / Σ (y - mean)², the gradients are
    dZ = G W_decᵀ at the kept places, dW_dec = Zᵀ G, dW_encᵀ = dZᵀ (y - b_dec), db_enc = Σ dZ, db_dec = Σ G - W_enc db_enc.
    """
    n, m = len(y), sae.n_latents
    centred = y - sae.b_dec
    if dtype == torch.float32:
        pre = torch.addmm(sae.b_enc, centred, sae.W_enc)
    else:
        pre = (centred.to(dtype) @ sae.W_enc.to(dtype)).float() + sae.b_enc
    n_all = int(_sum(accelerator, torch.tensor(n, device=y.device)))
    places, codes, cut = _largest(pre.flatten(), sae.k * n_all, accelerator)
    row = places // m
    latent = places - row * m
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # CSR is called beta, and unchecked
        Z = torch.sparse_csr_tensor(
            torch.searchsorted(row, torch.arange(n + 1, device=y.device)), latent, codes, (n, m)
        )
        error = torch.addmm(centred, Z, sae.W_dec, alpha=-1)
        spread = _sum(accelerator, (y - _sum(accelerator, y.sum(0)) / n_all).pow(2).sum())
        left = _sum(accelerator, error.pow(2).sum())
        G = error * (-2 * weight / spread)
        d_codes = torch.sparse.sampled_addmm(Z, G, sae.W_dec.T, beta=0).values()
        order = torch.sort(latent.int(), stable=True).indices  # the same matrices, latent by latent
        starts = torch.searchsorted(latent[order], torch.arange(m + 1, device=y.device))
        for grad, values, other in ((sae.W_dec.grad, codes, G), (rows_enc.grad, d_codes, centred)):
            torch.addmm(
                grad,
                torch.sparse_csr_tensor(starts, row[order], values[order], (m, n)),
                other,
                beta=float(add),
                out=grad,
            )
    zeros = torch.zeros(m, device=y.device)
    d_b_enc, along = (
        zeros.index_add(0, latent, d_codes),
        zeros.index_add(0, latent, codes * d_codes),
    )
    if len(dead) and left > 0:
        z = torch.relu(pre[:, dead])
        top = torch.topk(z, min(len(dead), max(1, sae.d_in // 2)), dim=1)
        z = torch.zeros_like(z).scatter(1, top.indices, top.values)
        G_dead = (z @ sae.W_dec[dead] - error) * (2 * weight * aux_coefficient / left)
        d_z = (G_dead @ sae.W_dec[dead].T) * (z > 0)
        d_W_dec = z.T @ G_dead
        sae.W_dec.grad[dead] += d_W_dec
        rows_enc.grad[dead] += d_z.T @ centred
        d_b_enc[dead] += d_z.sum(0)
        along[dead] += torch.linalg.vecdot(d_W_dec, sae.W_dec[dead])
    d_b_dec = G.sum(0) - d_b_enc @ rows_enc
    for p, grad in ((sae.b_enc, d_b_enc), (sae.b_dec, d_b_dec)):
        p.grad = p.grad + grad if add else grad
    fired = zeros.index_add(0, latent, torch.ones_like(codes))
    return _Part(
        left / spread,
        along,
        fired,
        torch.where(cut > 0, cut, sae.threshold),
        (pre > sae.threshold).sum() if count else 0,
    )


def _largest(
    flat: torch.Tensor, n: int, accelerator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places, ascending, and values of the positive ones among the n largest entries over all processes, and the n-th largest."""
    among = flat[:0].long()
    if (
        flat.numel() > 100_000
    ):  # a sample tells where the cut lies, so that few entries need sorting
        sample = flat[:: flat.numel() // 20_000 | 1]  # an odd stride, to meet every latent
        low = torch.topk(sample, min(len(sample), 1 + 2 * n * len(sample) // flat.numel())).values[
            -1
        ]
        above = flat > low
        among = (
            torch.from_numpy(np.flatnonzero(above.numpy()))
            if flat.device.type == "cpu"
            else above.nonzero().flatten()
        )  # three times as fast
    if len(among) < n:  # a small batch, or a sample that misled
        among = torch.arange(flat.numel(), device=flat.device)
    values = flat[among]
    top = torch.topk(values, min(n, len(values)), sorted=False).values
    if accelerator is not None and accelerator.num_processes > 1:
        top = torch.nn.functional.pad(top, (0, n - len(top)), value=float("-inf"))
        top = torch.topk(accelerator.gather(top), n, sorted=False).values
    cut = top.min()
    kept = (values >= cut) & (values > 0)
    return among[kept], values[kept], cut


@torch.no_grad()
def _update(sae: SAE, optimiser, along, accelerator) -> None:
    """One step of Adam; decoder rows stay of unit norm, so the gradient along them is taken off first."""
    for p in optimiser.param_groups[0]["params"]:
        p.grad = _sum(accelerator, p.grad)
    sae.W_dec.grad.addcmul_(sae.W_dec, _sum(accelerator, along)[:, None], value=-1)
    optimiser.step()
    sae.W_dec /= torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True)


def _save(path, settings, sae, optimiser, since_fired, done: int, history: History) -> None:
    """The whole state of a training, or only the result if it is finished."""
    tensors = dict(sae.state_dict())
    if done < settings["n_steps"]:
        tensors |= {
            f"adam.{i}.{name}": v
            for i, p in enumerate(optimiser.param_groups[0]["params"])
            for name, v in optimiser.state[p].items()
        }
        tensors["since_fired"] = since_fired
    save_tensors(path, tensors, {"settings": settings, "done": done, "history": asdict(history)})


def _resume(path, sae, optimiser, since_fired) -> tuple[int, History]:
    """Put a saved state back; returns the updates done and the history."""
    tensors, saved = load_tensors(path)
    try:
        sae.load_state_dict({name: tensors[name] for name in sae.state_dict()})
    except (KeyError, RuntimeError):
        raise ValueError(
            f"{path} does not hold a checkpoint of this training; delete it to train anew"
        ) from None
    if saved["done"] < saved["settings"]["n_steps"]:
        since_fired.copy_(tensors["since_fired"])
        for i, p in enumerate(optimiser.param_groups[0]["params"]):
            state = {
                name.split(".")[-1]: v
                for name, v in tensors.items()
                if name.startswith(f"adam.{i}.")
            }
            optimiser.state[p] = {name: v.to(p.device) for name, v in state.items()}
    return saved["done"], History(**saved["history"])
