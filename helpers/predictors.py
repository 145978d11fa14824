"""Linear predictors between neighbouring kept steps, and the residual coordinates they define.

A trajectory x[0..S-1] becomes its start and what each step adds that the step before did not foretell:
r[0] = x[0], r[s] = x[s] - (x[s-1] A[s] + b[s]) (Residualized Temporal SAEs, arXiv:2605.27813). The map
is affine and invertible: residuals lead back to activations by x[s] = x[s-1] A[s] + b[s] + r[s], and
a direction in residual coordinates becomes a trajectory of directions by the same recurrence without b.

Everything is fitted from one pass of sums: memory grows with channels squared, not with trajectories.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path

import numpy as np
import torch

from helpers.files import load_tensors, save_tensors

STRENGTHS = tuple(
    10.0 ** np.arange(-6, 1.5, 0.5)
)  # ridge strengths tried, relative to the mean eigenvalue


@dataclass
class Moments:
    """Sums over trajectories, in float64, enough for means, scales and every regression between neighbours.

    `shift` (S, d) is subtracted first, so that large means do not eat the precision; it must be the same in
    moments that are added up.
    """

    shift: torch.Tensor
    count: int
    total: torch.Tensor  # (S, d): sum of h
    square: torch.Tensor  # (S, d, d): sum of h[s]ᵀ h[s]
    cross: torch.Tensor  # (S, d, d): sum of h[s-1]ᵀ h[s]; [0] is unused

    def summed(self, accelerator) -> Moments:
        """These sums added up over an `accelerate.Accelerator`'s processes, which must share one shift."""
        parts = (
            torch.as_tensor(getattr(self, f.name)).to(accelerator.device) for f in fields(self)[1:]
        )
        count, *sums = (accelerator.reduce(part, "sum").cpu() for part in parts)
        return Moments(self.shift, int(count), *sums)

    @staticmethod
    def none(shift: torch.Tensor) -> Moments:
        """Those of no trajectories at all."""
        S, d = shift.shape
        return Moments(
            shift, 0, torch.zeros_like(shift), shift.new_zeros(S, d, d), shift.new_zeros(S, d, d)
        )

    def save(self, path: str | Path, record: dict | None = None) -> None:
        """Write to one safetensors file, atomically, with a JSON-able record beside the tensors."""
        save_tensors(
            path, {f.name: torch.as_tensor(getattr(self, f.name)) for f in fields(self)}, record
        )

    @staticmethod
    def load(path: str | Path) -> tuple[Moments, dict]:
        """Read what `save` wrote; FileNotFoundError or ValueError names a missing or damaged file."""
        tensors, record = load_tensors(path)
        try:
            return Moments(**tensors | {"count": int(tensors["count"])}), record
        except (KeyError, TypeError):
            raise ValueError(
                f"{path} does not hold moments; delete it and run 02_fit_predictors again"
            ) from None

    def __add__(self, other: Moments) -> Moments:
        if not torch.equal(self.shift, other.shift):
            raise ValueError(
                "moments with different shifts cannot be added; pass the first one's shift to accumulate"
            )
        return Moments(
            self.shift, *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)[1:])
        )


def accumulate(shards, shift: torch.Tensor | None = None, device: str = "cpu") -> Moments:
    """Moments of an iterable of raw activations, each Float[Tensor, "image step token channel"].

    Sums are float64, on the CPU where the device has none (MPS), and come back on the CPU. Without a `shift`, it is the
    first shard's mean.

    Raises
    ------
    ValueError
        No trajectories, or a value that is not finite.
    """
    device = "cpu" if str(device).startswith("mps") else device
    shift, moments, waiting = None if shift is None else shift.to(device), None, []
    for h in itertools.chain(shards, [None]):
        if h is not None:
            h = (
                h.permute(1, 0, 2, 3)
                .to(device, torch.float64, copy=True, memory_format=torch.contiguous_format)
                .flatten(1, 2)
            )  # step, trajectory, channel
            if shift is None:
                shift = h.mean(1)
            waiting.append(h)
            if sum(w.shape[1] for w in waiting) < min(
                h.shape[2], 4096
            ):  # adding (d, d) up is work like a product with d rows, so small shards are joined
                continue
        if not waiting:
            break
        h = torch.cat(waiting, 1) if len(waiting) > 1 else waiting[0]
        waiting.clear()
        h -= shift[:, None]
        total = h.sum(1)
        if not torch.isfinite(total).all():
            raise ValueError(
                "the recorded activations hold NaN or infinity; collect them again with store_dtype 'float32'"
            )
        cross = h.new_zeros(len(h), h.shape[2], h.shape[2])
        cross[1:] = h[:-1].transpose(1, 2) @ h[1:]
        part = Moments(shift, h.shape[1], total, _squares(h), cross)
        moments = part if moments is None else moments + part
    if moments is None:
        raise ValueError(
            "there are no trajectories to fit on; the split is empty, so give it at least one prompt"
        )
    return Moments(
        *(
            v.cpu() if isinstance(v, torch.Tensor) else v
            for v in (getattr(moments, f.name) for f in fields(moments))
        )
    )


def _squares(h: torch.Tensor) -> torch.Tensor:
    """hᵀh of each step, (S, n, d) -> (S, d, d); NumPy knows that a product with itself is half the work."""
    if h.device.type != "cpu":
        return h.transpose(1, 2) @ h
    return torch.from_numpy(np.stack([x.T @ x for x in h.numpy()]))


@dataclass
class Predictors:
    """Standardisation, predictors and residual scales; symbols as in the method (S kept steps, d channels).

    Attributes
    ----------
    mu : Float[Tensor, "S d"]; scale : Float[Tensor, "S"]
        Per-step mean, and RMS of the centred activation: x[s] = (h[s] - mu[s]) / scale[s].
    A : Float[Tensor, "S d d"]; b : Float[Tensor, "S d"]
        Predictor x[s-1] -> x[s]; A[0] and b[0] are zero, since nothing precedes the first step.
    rho : Float[Tensor, "S"]
        RMS of r[s]; blocks are divided by it so that every step weighs the same in the SAE's loss.
    strength : Float[Tensor, "S"]
        Ridge strength chosen for each step, relative to the mean eigenvalue; [0] is unused.
    """

    mu: torch.Tensor
    scale: torch.Tensor
    A: torch.Tensor
    b: torch.Tensor
    rho: torch.Tensor
    strength: torch.Tensor

    @property
    def n_steps(self) -> int:
        return self.A.shape[0]

    def standardise(self, h: torch.Tensor) -> torch.Tensor:
        """h -> x, both (..., S, d)."""
        return (h - self.mu.to(h)) / self.scale.to(h)[:, None]

    def unstandardise(self, x: torch.Tensor) -> torch.Tensor:
        """x -> h, both (..., S, d)."""
        return x * self.scale.to(x)[:, None] + self.mu.to(x)

    def residualize(self, x: torch.Tensor) -> torch.Tensor:
        """Standardised activations (..., S, d) -> residualized trajectories y = concat(r[s] / rho[s]), (..., S·d)."""
        predicted = torch.einsum("...sd,sde->...se", x[..., :-1, :], self.A[1:].to(x)) + self.b[
            1:
        ].to(x)
        r = torch.cat([x[..., :1, :], x[..., 1:, :] - predicted], dim=-2)
        return (r / self.rho.to(x)[:, None]).flatten(-2)

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse of `residualize`: (..., S·d) -> (..., S, d), by x[s] = x[s-1] A[s] + b[s] + r[s]."""
        r = y.unflatten(-1, (self.n_steps, -1)) * self.rho.to(y)[:, None]
        x = [r[..., 0, :]]
        for s in range(1, self.n_steps):
            x.append(x[-1] @ self.A[s].to(y) + self.b[s].to(y) + r[..., s, :])
        return torch.stack(x, dim=-2)

    def feature_trajectories(self, directions: torch.Tensor) -> torch.Tensor:
        """Decoder rows (m, S·d) -> feature trajectories u, (m, S, d), in standardised units.

        u[0] = rho[0] w[0]; u[s] = u[s-1] A[s] + rho[s] w[s]. Multiply by `scale[s]` for raw units.
        """
        return self.restore(directions) - self.restore(torch.zeros_like(directions[:1]))

    def batches(
        self,
        store,
        split: str,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
        device="cpu",
    ):
        """Endless shuffled batches of residualized trajectories, (batch_size, S·d), of a `stores.Store`; see its `batches`."""
        for h in store.batches(split, batch_size, seed, start, share):
            yield self.residualize(self.standardise(h.to(device)))

    def to(self, device) -> Predictors:
        """These predictors on another device."""
        return Predictors(*(getattr(self, f.name).to(device) for f in fields(self)))

    def save(self, path: str | Path, record: dict | None = None) -> None:
        """Write to one safetensors file, atomically, with a JSON-able record beside the tensors."""
        save_tensors(path, {f.name: getattr(self, f.name) for f in fields(self)}, record)

    @staticmethod
    def load(path: str | Path) -> tuple[Predictors, dict]:
        """Read what `save` wrote; FileNotFoundError or ValueError names a missing or damaged file."""
        tensors, record = load_tensors(path)
        try:
            return Predictors(**tensors), record
        except TypeError:
            raise ValueError(
                f"{path} does not hold predictors; run 02_fit_predictors again"
            ) from None


def _standardised(m: Moments, mu: torch.Tensor, scale: torch.Tensor):
    """XᵀX (S, d, d), X[s-1]ᵀX[s] (S, d, d) and ΣX (S, d) in units standardised by `mu` and `scale`."""
    off = mu - m.shift
    total = (m.total - m.count * off) / scale[:, None]

    def centre(product, left_total, right_total, left_off, right_off):
        mixed = (
            left_off[:, :, None] * right_total[:, None]
            + left_total[:, :, None] * right_off[:, None]
        )
        return product - mixed + m.count * left_off[:, :, None] * right_off[:, None]

    square = centre(m.square, m.total, m.total, off, off) / scale[:, None, None] ** 2
    cross = torch.zeros_like(m.cross)
    cross[1:] = centre(m.cross[1:], m.total[:-1], m.total[1:], off[:-1], off[1:])
    cross[1:] /= (scale[:-1] * scale[1:])[:, None, None]
    return square, cross, total


def fit(
    train: Moments, validation: Moments, strengths=STRENGTHS, dtype: torch.dtype = torch.float32
) -> Predictors:
    """Ridge regression between neighbouring steps; each pair's strength is the best on held-out images.

    Solves (XᵀX + lam · tr(XᵀX)/d · I) A = XᵀY in float64 on standardised, centred activations; the intercept is not
    penalised, and is zero because both sides are centred. The result is rounded to `dtype`. Where there are fewer trajectories
    than channels, so that training residuals all but vanish, rho is measured on the held-out images.
    """
    strengths = tuple(strengths)
    for strength in strengths:
        if not isinstance(strength, Real) or not 0 <= strength < math.inf:
            raise ValueError(
                f"ridge_strengths holds {strength!r}; each must be a number of at least 0"
            )
    if not strengths:
        raise ValueError("ridge_strengths is empty; it must hold at least one number of at least 0")
    if not train.count or not validation.count:
        raise ValueError(
            "there are no trajectories to fit on or to choose a strength with; give both splits at least one prompt"
        )
    n, (S, d) = train.count, train.shift.shape
    mu = train.shift + train.total / n
    variance = torch.diagonal(train.square, dim1=1, dim2=2) / n - (train.total / n) ** 2
    scale = variance.clamp(min=0).mean(1).sqrt()
    if (scale == 0).any():
        raise ValueError(
            f"the activations of kept step number {int((scale == 0).nonzero()[0])} never vary; choose another hookpoint or steps"
        )
    square, cross, _ = _standardised(train, mu, scale)
    held_square, held_cross, _ = _standardised(validation, mu, scale)
    A, rho, chosen = (
        torch.zeros(S, d, d, dtype=torch.float64),
        torch.ones(S, dtype=torch.float64),
        torch.zeros(S, dtype=torch.float64),
    )
    for s in range(1, S):
        values, vectors = torch.linalg.eigh(square[s - 1])
        projected = vectors.T @ cross[s]
        best = None
        for strength in strengths:
            candidate = vectors @ (
                projected / (values.clamp(min=0) + strength * values.mean())[:, None]
            )
            error = _squared_error(candidate, held_square[s - 1], held_cross[s], held_square[s])
            if torch.isfinite(error) and (best is None or error < best[0]):
                best = (error, strength, candidate)
        if best is None:
            raise ValueError(
                f"ridge_strengths {list(strengths)}: the predictor of kept step number {s} is not determined; valid is a number above 0"
            )
        held_error, chosen[s], A[s] = best
        seen, held = (
            _squared_error(A[s], square[s - 1], cross[s], square[s]) / n,
            held_error / validation.count,
        )
        rho[s] = ((seen if seen > 1e-4 * held else held) / d).clamp(min=0).sqrt()
    if (rho == 0).any():
        raise ValueError(
            f"steps: kept step number {int((rho == 0).nonzero()[0])} is predicted without error, so it has no residual; leave it out or record more images"
        )
    parts = (mu, scale, A, torch.zeros(S, d, dtype=torch.float64), rho, chosen)
    return Predictors(*(p.to(dtype) for p in parts))


def _squared_error(A, xx, xy, yy):
    """Σ (y - x A)² from sums of products."""
    return torch.trace(yy) - 2 * (A * xy).sum() + (A * (xx @ A)).sum()


def eigenvalues(predictors: Predictors) -> np.ndarray:
    """Eigenvalues of A[1..S-1], complex, (S-1, d), largest magnitude first: 1 carries on, 0 forgets."""
    values = torch.linalg.eigvals(predictors.A[1:].double())
    return np.stack([v[np.argsort(-abs(v))] for v in values.cpu().numpy()])
