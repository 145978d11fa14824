"""Linear predictors of a kept step from those before: ridge regression of x[s] on x[s-1].

What they leave over is the residual r[s] = x[s] - (x[s-1] A[s] + b[s]) of Residualized Temporal
SAEs (arXiv:2605.27813). With two lags x[s-2] B[s] is predicted, too. Everything is fitted from the
sums of `helpers.moments`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from helpers.checks import in_range, one_of, refuse
from helpers.files import load_tensors, save_tensors
from helpers.moments import Moments

# ridge strengths tried, relative to the mean eigenvalue of XᵀX
STRENGTHS = tuple(10.0 ** np.arange(-6, 1.5, 0.5))


@dataclass
class Predictors:
    """Standardisation, predictors and residual sizes of S kept steps and d channels.

    x[s] = (h[s] - mu[s]) / scale[s], and x[s-1] A[s] + x[s-2] B[s] + b[s] predicts it. Nothing
    precedes the first step: A[0], b[0], B[0] and B[1] are zero, strength[0] is unused.
    """

    mu: torch.Tensor  # (S, d): mean
    scale: torch.Tensor  # (S,): RMS of the centred activation
    A: torch.Tensor  # (S, d, d)
    b: torch.Tensor  # (S, d)
    rho: torch.Tensor  # (S,): RMS of r[s] per channel, on the training images
    strength: torch.Tensor  # (S,): of the ridge, relative to the mean eigenvalue
    B: torch.Tensor | None = None  # (S, d, d), of two steps back; None with one lag

    @property
    def n_steps(self) -> int:
        return self.A.shape[0]

    def standardise(self, h: torch.Tensor) -> torch.Tensor:
        """h -> x, both (…, S, d)."""
        return (h - self.mu.to(h)) / self.scale.to(h)[:, None]

    def unstandardise(self, x: torch.Tensor) -> torch.Tensor:
        """x -> h, both (…, S, d)."""
        return x * self.scale.to(x)[:, None] + self.mu.to(x)

    def to(self, device) -> Predictors:
        """These predictors on another device, or in another precision."""
        return Predictors(**{name: v.to(device) for name, v in self._tensors().items()})

    def save(self, path: str | Path, record: dict | None = None) -> None:
        """Write one safetensors file, atomically, with a JSON-able record beside the tensors."""
        save_tensors(path, self._tensors(), record)

    @staticmethod
    def load(path: str | Path) -> tuple[Predictors, dict]:
        """Read what `save` wrote; FileNotFoundError or ValueError names a missing or wrong file."""
        tensors, record = load_tensors(path)
        try:
            return Predictors(**tensors), record
        except TypeError:
            raise ValueError(
                f"{path} does not hold predictors; run 02_fit_predictors again"
            ) from None

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: v for name, v in vars(self).items() if v is not None}

    def _weights(self, s: int) -> torch.Tensor:
        """A[s] over B[s], as far as there are such steps before s: (lags · d, d), float64."""
        lags = [M[s] for M in (self.A, self.B) if M is not None]
        return torch.cat(lags[:s]).cpu().double()


def fit(
    train: Moments,
    validation: Moments,
    strengths=STRENGTHS,
    dtype=torch.float32,
    lags: int = 1,
    rank: int | None = None,
) -> Predictors:
    """Ridge regression on the step before, each step at the strength best on held-out images.

    Solves (XᵀX + strength · tr(XᵀX)/p · I) W = XᵀY in float64 on standardised activations. X has p
    columns: x[s-1] and, with `lags` = 2, x[s-2] where there is one; W holds A[s], and B[s] below.
    With `rank` r, W has at most rank r and minimises the same penalised error (reduced-rank ridge
    regression, Mukherjee & Zhu 2011). The intercept is not penalised, and is zero because both
    sides are centred. The result is rounded to `dtype`. Where there are fewer trajectories than
    channels, so that training residuals all but vanish, rho is measured on the held-out images.
    ValueError names a step that never varies, is predicted without error, or whose predictor is not
    determined.
    """
    one_of("lags", lags, (1, 2))
    if rank is not None:
        in_range("rank", rank, 1, train.shift.shape[1])
    strengths = list(strengths)
    if not strengths or not all(isinstance(v, Real) and 0 <= v < math.inf for v in strengths):
        refuse("ridge_strengths", strengths, "one or more numbers of at least 0")
    if not train.count or not validation.count:
        raise ValueError("there are no trajectories in one of the splits; give both some prompts")
    mu, scale = _standardisation(train)
    seen, held = _products(train, mu, scale), _products(validation, mu, scale)
    W, chosen = seen.square.new_zeros(lags, *seen.square.shape), torch.zeros_like(scale)
    for s in range(1, len(mu)):
        found, chosen[s] = _ridge(seen, held, s, min(lags, s), strengths, rank)
        W[: min(lags, s), s] = found.unflatten(0, (-1, mu.shape[1]))
    return _predictors(mu, scale, W, chosen, seen, held, dtype)


def identity(train: Moments, dtype: torch.dtype = torch.float32) -> Predictors:
    """No change: A = I, so that residuals are plain differences of standardised activations."""
    return _given(train, torch.eye(train.shift.shape[1], dtype=torch.float64), dtype)


def mean_only(train: Moments, dtype: torch.dtype = torch.float32) -> Predictors:
    """The training mean: A = 0, so that residuals are the standardised activations themselves."""
    d = train.shift.shape[1]
    return _given(train, torch.zeros(d, d, dtype=torch.float64), dtype)


def explained(predictors: Predictors, moments: Moments) -> np.ndarray:
    """Share of each step's variance around `mu` that those before explain, float64, (S-1,)."""
    p = predictors
    mu, scale, b = (v.cpu().double() for v in (p.mu, p.scale, p.b))
    m, shares = _products(moments, mu, scale), []
    for s in range(1, p.n_steps):
        W = p._weights(s)
        constant = m.count * b[s] @ b[s] - 2 * b[s] @ (m.total[s] - m.before(s, W) @ W)
        shares.append(1 - (m.error(W, s) + constant) / torch.trace(m.square[s]))
    return torch.stack(shares).numpy()


def eigenvalues(predictors: Predictors) -> np.ndarray:
    """Eigenvalues of A[1..S-1], complex, (S-1, d), largest magnitude first."""
    values = torch.linalg.eigvals(predictors.A[1:].double())
    return np.stack([v[np.argsort(-abs(v))] for v in values.cpu().numpy()])


def residual_covariance(predictors: Predictors, moments: Moments) -> torch.Tensor:
    """Covariance of r[s] over the trajectories summed in `moments`, float64, (S, d, d)."""
    mu, scale = (v.cpu().double() for v in (predictors.mu, predictors.scale))
    m = _products(moments, mu, scale)
    product, total = m.square.clone(), m.total.clone()
    for s in range(1, len(mu)):
        W = predictors._weights(s)
        gram, with_target = m.regression(s, len(W))
        mixed = W.T @ with_target
        product[s] += W.T @ gram @ W - mixed - mixed.T
        total[s] -= m.before(s, W) @ W
    return product / m.count - total[:, :, None] * total[:, None] / m.count**2


def shuffled_pairs(h: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A control: trajectories (n, S, d), each step's activations in a random order of its own."""
    orders = [torch.randperm(len(h), generator=generator) for _ in range(h.shape[1])]
    return torch.stack([h[order, s] for s, order in enumerate(orders)], dim=1)


class _Products(NamedTuple):
    """Sums of products of standardised activations."""

    square: torch.Tensor  # (S, d, d): XᵀX
    cross: torch.Tensor  # (S, d, d): X[s-1]ᵀX[s]
    cross2: torch.Tensor  # (S, d, d): X[s-2]ᵀX[s]
    total: torch.Tensor  # (S, d): ΣX
    count: int

    def regression(self, s: int, p: int) -> tuple[torch.Tensor, torch.Tensor]:
        """XᵀX (p, p) and Xᵀx[s] (p, d) of X = x[s-1], or of x[s-1] and x[s-2] where p is 2 · d."""
        if p == self.total.shape[1]:
            return self.square[s - 1], self.cross[s]
        mixed = self.cross[s - 1]
        first, second = [self.square[s - 1], mixed.T], [mixed, self.square[s - 2]]
        gram = torch.cat([torch.cat(first, 1), torch.cat(second, 1)])
        return gram, torch.cat([self.cross[s], self.cross2[s]])

    def before(self, s: int, W: torch.Tensor) -> torch.Tensor:
        """ΣX of the X that W (p, d) is multiplied with: (p,)."""
        return self.total[:s].flip(0).flatten()[: len(W)]

    def error(self, W: torch.Tensor, s: int) -> torch.Tensor:
        """Σ ‖x[s] - X W‖² over trajectories, X as in `regression`."""
        gram, with_target = self.regression(s, len(W))
        return torch.trace(self.square[s]) - 2 * (W * with_target).sum() + (W * (gram @ W)).sum()


def _products(m: Moments, mu: torch.Tensor, scale: torch.Tensor) -> _Products:
    """Sums of products of x = (h - mu) / scale, from those of h."""
    off = mu - m.shift

    def centre(product, left, right, left_off, right_off):
        mixed = left_off[:, :, None] * right[:, None] + left[:, :, None] * right_off[:, None]
        return product - mixed + m.count * left_off[:, :, None] * right_off[:, None]

    square = centre(m.square, m.total, m.total, off, off) / scale[:, None, None] ** 2
    crosses = []
    for lag, sums in ((1, m.cross), (2, m.cross2)):
        cross = torch.zeros_like(sums)
        cross[lag:] = centre(sums[lag:], m.total[:-lag], m.total[lag:], off[:-lag], off[lag:])
        cross[lag:] /= (scale[:-lag] * scale[lag:])[:, None, None]
        crosses.append(cross)
    return _Products(square, *crosses, (m.total - m.count * off) / scale[:, None], m.count)


def _standardisation(train: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """mu (S, d) and scale (S,); ValueError for a step that never varies."""
    mean = train.total / train.count
    variance = torch.diagonal(train.square, dim1=1, dim2=2) / train.count - mean**2
    scale = variance.clamp(min=0).mean(1).sqrt()
    for s in (scale == 0).nonzero().flatten().tolist():
        raise ValueError(f"kept step number {s} never varies; choose another hookpoint or steps")
    return train.shift + mean, scale


def _ridge(seen: _Products, held: _Products, s: int, lags: int, strengths, rank):
    """The predictor W of step s with the least held-out error among strengths, and its strength."""
    gram, with_target = seen.regression(s, lags * seen.total.shape[1])
    values, vectors = torch.linalg.eigh(gram)
    projected = vectors.T @ with_target
    best = None
    for strength in strengths:
        shrunk = values.clamp(min=0) + strength * values.mean()
        W = vectors @ (projected / shrunk[:, None])
        if rank is not None and W.isfinite().all():
            # Wᵀ XᵀY = Wᵀ (XᵀX + λI) W: fitted values, λ included; their main directions are kept
            main = torch.linalg.eigh(W.T @ with_target).eigenvectors[:, -rank:]
            W = W @ main @ main.T
        error = held.error(W, s)
        if torch.isfinite(error) and (best is None or error < best[0]):
            best = error, W, strength
    if best is None:
        refuse("ridge_strengths", list(strengths), f"above 0 to determine kept step number {s}")
    return best[1:]


def _given(train: Moments, A: torch.Tensor, dtype: torch.dtype) -> Predictors:
    """Predictors with the same A (d, d) at every step, and rho as measured."""
    mu, scale = _standardisation(train)
    seen = _products(train, mu, scale)
    A = torch.stack([torch.zeros_like(A), *[A] * (len(mu) - 1)])
    return _predictors(mu, scale, (A,), torch.zeros_like(scale), seen, seen, dtype)


def _predictors(mu, scale, weights, strength, seen, held, dtype) -> Predictors:
    """Predictors with rho as measured, on `held` where they fit what they have `seen` too well."""
    A, *B = weights
    rho = torch.ones_like(scale)
    made = Predictors(mu, scale, A, torch.zeros_like(mu), rho, strength, *B)
    for s in range(1, len(rho)):
        W = made._weights(s)
        mse, held_mse = seen.error(W, s) / seen.count, held.error(W, s) / held.count
        rho[s] = ((mse if mse > 1e-4 * held_mse else held_mse) / len(A[s])).clamp(min=0).sqrt()
    for s in (rho == 0).nonzero().flatten().tolist():
        raise ValueError(
            f"steps: kept step number {s} is predicted without error; leave it out or add images"
        )
    return made.to(dtype)
