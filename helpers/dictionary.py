"""A dictionary: coordinates, and a coder that reads trajectories in them.

    x ──residualize──▶ y ──encode──▶ z ──decode──▶ ŷ ──restore──▶ x̂

What is trained, what it is compared with and what is shared as a file are all of this kind. A coder
has `d_in`, `n_latents`, `W_dec`, `encode`, `decode` and `sparse`, as `SAE` has, and, where its
pre-activations are linear in y, `W_enc`, `b_enc` and `b_dec`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from helpers import coordinates as _coordinates
from helpers.checks import refuse
from helpers.coders.conditioned import Conditioned
from helpers.coders.itda import Pursuit
from helpers.coders.per_step import PerStep
from helpers.coders.topk import TopK
from helpers.coordinates import Coordinates
from helpers.files import load_tensors, save_tensors
from helpers.nonlinear import Nonlinear
from helpers.predictors import Predictors
from helpers.sae import SAE

KINDS = {
    kind.__name__: kind for kind in (PerStep, Conditioned, Pursuit, TopK)
}  # as files name them


class Projection(torch.nn.Module):
    """A dense linear coder of given rows V (m, d_in): z = y Vᵀ, of either sign, y_hat = z V."""

    sparse = False

    def __init__(self, V: torch.Tensor):
        super().__init__()
        self.n_latents, self.d_in = V.shape
        self.register_buffer("W_dec", V)

    W_enc = property(lambda self: self.W_dec.T)

    def encode(self, y: torch.Tensor) -> torch.Tensor:
        return y @ self.W_dec.T

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.W_dec


class Dictionary(torch.nn.Module):
    """Coordinates and a coder, under the name that tables and figures use.

    A coder of d_in = d codes each step on its own; latent s · n + j is then its latent j at step s.
    """

    def __init__(self, name: str, coordinates: Coordinates, coder: torch.nn.Module):
        super().__init__()
        if coder.d_in not in (coordinates.d_in, coordinates.channels):
            raise ValueError(
                f"{name}: the coder reads {coder.d_in} numbers; these coordinates have "
                f"{coordinates.d_in}, {coordinates.channels} at each step"
            )
        self.name, self.coordinates = name, coordinates
        self.coder = coder.to(coordinates.mu.device).requires_grad_(False)
        self.one_step = coder.d_in < coordinates.d_in
        self.two_sided = not coder.sparse  # codes are dense and of either sign
        self.n_blocks = coordinates.d_in // coder.d_in  # in which a trajectory is coded
        self.n_latents = coder.n_latents * self.n_blocks

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Standardised x (…, S, d) -> codes (…, n_latents), in x's precision, not the coder's."""
        y = self.coordinates.residualize(x).reshape(-1, self.coder.d_in)
        z = self.coder.encode(y.to(self.coder.W_dec.dtype))
        return z.to(x.dtype).view(*x.shape[:-2], self.n_latents)

    def evidence(self, x: torch.Tensor, latents=slice(None)) -> torch.Tensor:
        """Pre-activations split by kept step: x (…, S, d) -> e (…, S, m), of all or some latents.

        e[s] = (y[s] − b_dec[s]) W_enc[s]; their sum over steps and b_enc is what is held against
        the threshold. ValueError for a coder that is not linear up to there.
        """
        W, S = getattr(self.coder, "W_enc", None), self.coordinates.n_steps
        self.check(latents)
        if W is None:
            raise ValueError(f"{self.name}: codes that are no sums over steps have no evidence")
        y = self.coordinates.residualize(x).reshape(*x.shape[:-2], -1, self.coder.d_in)
        y = (y - getattr(self.coder, "b_dec", y.new_zeros(())).to(y)).reshape(x.shape)
        if self.one_step:  # latent s · n + j has evidence at step s only
            e = torch.eye(S).to(y)[:, :, None] * (y @ W.to(y))[..., None, :]
            return e.flatten(-2)[..., latents]
        return torch.einsum("...sd,sdm->...sm", y, W[:, latents].to(y).unflatten(0, (S, -1)))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Codes (…, n_latents) before threshold and ReLU, of either sign; else the codes."""
        if self.two_sided or not hasattr(self.coder, "W_enc"):
            return self.codes(x)
        return self.evidence(x).sum(-2) + self.coder.b_enc.repeat(self.n_blocks).to(x)

    def rebuild(self, z: torch.Tensor) -> torch.Tensor:
        """Codes (…, n_latents) -> reconstructed trajectories, (…, S, d), standardised."""
        rows = z.reshape(-1, self.coder.n_latents).to(self.coder.W_dec.dtype)
        y = self.coder.decode(rows).to(z.dtype)
        return self.coordinates.restore(y.view(*z.shape[:-1], self.coordinates.d_in))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rebuild(self.codes(x))

    def directions(self, latents=slice(None)) -> torch.Tensor:
        """Feature trajectories u, (…, S, d), of latents (index, list or slice): what a 1 adds."""
        self.check(latents)
        W, n = self.coder.W_dec, self.coder.n_latents
        latents = torch.arange(self.n_latents, device=W.device)[latents]
        rows = W.new_zeros(latents.numel(), self.n_blocks, self.coder.d_in)
        rows[torch.arange(len(rows)), latents.flatten() // n] = W[latents.flatten() % n]
        u = self.coordinates.feature_trajectories(rows.flatten(1))
        return u.view(*latents.shape, *u.shape[1:])

    def check(self, latents) -> None:
        """ValueError for a latent (of an index, list or slice) that there is not."""
        for latent in [] if isinstance(latents, slice) else torch.as_tensor(latents).unique():
            if not 0 <= latent < self.n_latents:
                refuse("latent", latent.item(), f"from 0 to {self.n_latents - 1}")

    def cost(self, z: torch.Tensor) -> torch.Tensor:
        """Numbers that a trajectory takes, int (…,): its codes (…, n_latents) that are not zero."""
        return torch.count_nonzero(z, dim=-1)

    def calibrate(self, x: torch.Tensor) -> Dictionary:
        """Set a sparse coder's threshold for k on held-out x, (n, S, d); returns itself."""
        if self.coder.sparse:
            self.coder.set_threshold(self.coordinates.residualize(x).reshape(-1, self.coder.d_in))
        return self

    def save(self, path: str | Path, record: dict | None = None) -> None:
        """Write all that the dictionary is into one safetensors file, with a JSON-able record."""
        kind = type(self.coder).__name__
        own = {"name": self.name, "k": getattr(self.coder, "k", None), "kind": kind}
        save_tensors(path, self.state_dict(), (record or {}) | {"dictionary": own})

    @staticmethod
    def load(path: str | Path) -> tuple[Dictionary, dict]:
        """Read what `save` wrote; FileNotFoundError or ValueError names a missing or wrong file."""
        tensors, record = load_tensors(path)
        parts: dict[str, dict] = {"coordinates": {}, "coder": {}}
        try:
            own = record["dictionary"]
            for name, value in tensors.items():
                part, _, of_part = name.partition(".")
                parts[part][of_part] = value
            coder = _empty(own.get("kind"), parts["coder"], own["k"])
            coder.load_state_dict(parts["coder"])
            kind = Nonlinear if "V" in parts["coordinates"] else Coordinates
            found = Dictionary(own["name"], kind(**parts["coordinates"]), coder)
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{path} does not hold a dictionary; run the notebook that writes it again"
            ) from None
        return found.eval(), record


def _empty(kind: str | None, tensors: dict[str, torch.Tensor], k: float | None):
    """A coder of some kind, in which tensors of these names and shapes have their places."""
    if kind in KINDS:
        return KINDS[kind].like(tensors, k)
    W = tensors["W_dec"]
    return Projection(W) if k is None else SAE(W.shape[1], W.shape[0], k)


def untrained(coordinates, n_latents: int, k: float, seed=0, name="untrained") -> Dictionary:
    """An SAE with its random initial weights, the floor for trained ones; `calibrate` it."""
    return Dictionary(name, coordinates, SAE(coordinates.d_in, n_latents, k, seed))


def first_step(predictors: Predictors, name="predictors alone") -> Dictionary:
    """The predictors alone: the first step as it is, every later one as predicted from it."""
    residual = _coordinates.residual(predictors)
    V = torch.eye(residual.d_in)[: residual.channels]
    return Dictionary(name, residual, Projection(V.to(residual.mu)))


def neurons(predictors: Predictors, name="neurons") -> Dictionary:
    """Single neurons: every channel at every step is a code."""
    raw = _coordinates.raw(predictors)
    return Dictionary(name, raw, Projection(torch.eye(raw.d_in).to(raw.mu)))


def pca(coordinates: Coordinates, trajectories, k: int, name="PCA") -> Dictionary:
    """The k largest principal components of standardised trajectories, shards of (…, S, d)."""
    covariance = torch.zeros(coordinates.d_in, coordinates.d_in, dtype=torch.float64)
    for x in trajectories:
        y = coordinates.residualize(x).flatten(0, -2)
        covariance += (y.T @ y).cpu().double()
    V = torch.linalg.eigh(covariance).eigenvectors[:, -k:].T.contiguous()
    return Dictionary(name, coordinates, Projection(V.to(coordinates.mu)))
