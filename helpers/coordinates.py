"""Coordinates in which a trajectory of activations is encoded, and the way back.

    y[s] = (x[s] − x[s−1] A[s] − x[s−2] B[s] − b[s]) D[s]

x[s] is the standardised activation at kept step s, a row of d channels. The map is affine and
invertible: step after step, x[s] = x[s−1] A[s] + x[s−2] B[s] + b[s] + y[s] D[s]⁻¹. Without b the
same recurrence turns a direction in y (a decoder row) into a trajectory of directions in x. To
choose A, B and D is to choose the metric ‖y − ŷ‖² in which an SAE's loss counts an error:

==============================  ============================  =================================
coordinates                     A[s]                          D[s]
==============================  ============================  =================================
raw                             0                             I
residual (arXiv:2605.27813)     a predictor's                 rho[s]^−a; a = 1 equalises steps
whitened residual               a predictor's                 inverse root of r[s]'s covariance
between raw and residual        shrunk, see `between`         a root, see `between`
==============================  ============================  =================================

With `predictors.identity` for predictors, residuals are differences of neighbouring steps.
"""

import hashlib
import itertools

import torch

from helpers.checks import in_range
from helpers.moments import Moments
from helpers.predictors import Predictors, residual_covariance, shuffled_pairs


class Coordinates(torch.nn.Module):
    """An invertible affine map between standardised trajectories x and coordinates y.

    mu (S, d) and scale (S,) standardise, as in `Predictors`. A (S, d, d) and b (S, d) predict from
    the step before, B (S, d, d), if given, from two steps before; A[0], B[0] and B[1] are not used.
    D_inverse (S,) or (S, d, d) is D[s]⁻¹, a number or a matrix: what a unit of y[s] is in x.
    """

    def __init__(self, mu, scale, A, b, D_inverse, B=None):
        super().__init__()
        given = {"mu": mu, "scale": scale, "A": A, "B": B, "b": b, "D_inverse": D_inverse}
        for name, value in given.items():
            self.register_buffer(name, value)
        # computed from the rounded D⁻¹, so that a saved one comes back to the same bits
        inverse = torch.linalg.inv(D_inverse.double()) if D_inverse.ndim == 3 else 1 / D_inverse
        self.register_buffer("D", inverse.to(D_inverse.dtype), persistent=False)
        # lags that predict anything: raw coordinates need no products
        self._used = [lag for lag, M in ((1, A), (2, B)) if M is not None and M[lag:].any()]
        self.n_steps, self.channels = mu.shape
        self.d_in = mu.numel()  # width of y: S · d

    # raw activations h <-> x, both (…, S, d)
    standardise = Predictors.standardise
    unstandardise = Predictors.unstandardise

    def residualize(self, x: torch.Tensor) -> torch.Tensor:
        """Standardised activations (…, S, d) -> coordinates y, (…, S·d)."""
        predicted = self.b.to(x)
        for lag, M in self.lags():
            part = torch.einsum("...sd,sde->...se", x[..., :-lag, :], M[lag:].to(x))
            predicted = predicted + torch.nn.functional.pad(part, (0, 0, lag, 0))
        r = x - predicted
        if self.D_inverse.ndim == 1:
            return (r / self.D_inverse.to(x)[:, None]).flatten(-2)
        D = self.D.to(x)
        if x.dtype == torch.float64:  # an inverse rounded to single precision loses half its digits
            D = torch.linalg.inv(self.D_inverse.to(x))
        return torch.einsum("...sd,sde->...se", r, D).flatten(-2)

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse of `residualize`: (…, S·d) -> (…, S, d)."""
        return self._recur(y, self.b)

    def feature_trajectories(self, directions: torch.Tensor) -> torch.Tensor:
        """Directions in y (…, S·d) -> trajectories of directions u in x, (…, S, d).

        `scale[s] · u[s]` is in raw units; what is constant, b and mu, is no part of a direction.
        """
        return self._recur(directions, torch.zeros_like(self.b))

    def _recur(self, y: torch.Tensor, b: torch.Tensor, beyond=None) -> torch.Tensor:
        """x[s] = x[s−1] A[s] + x[s−2] B[s] + b[s] + beyond(x[s−1], s) + y[s] D[s]⁻¹, in turns."""
        y = y.unflatten(-1, (self.n_steps, self.channels))
        if self.D_inverse.ndim == 1:
            r = y * self.D_inverse.to(y)[:, None]
        else:
            r = torch.einsum("...sd,sde->...se", y, self.D_inverse.to(y))
        x: list[torch.Tensor] = []
        for s in range(self.n_steps):
            predicted = b[s].to(y)
            for lag, M in self.lags():
                if lag <= s:
                    predicted = x[s - lag] @ M[s].to(y) + predicted
            if beyond and s:
                predicted = predicted + beyond(x[s - 1], s)
            x.append(predicted + r[..., s, :])
        return torch.stack(x, dim=-2)

    def lags(self) -> list[tuple[int, torch.Tensor]]:
        """(1, A) and (2, B), where they predict anything."""
        return [(lag, M) for lag, M in ((1, self.A), (2, self.B)) if lag in self._used]

    def exchanged(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Trajectories made of the blocks y[s] of x (…, S, d), exchanged at random at every step.

        A control: only how the blocks of different steps go together is lost.
        """
        y = self.residualize(x).unflatten(-1, x.shape[-2:]).flatten(0, -3)
        return self.restore(shuffled_pairs(y, generator).flatten(1)).view_as(x)

    def gains(self) -> torch.Tensor:
        """RMS size at step t of a unit error in block s, sent back: Float[Tensor, "S S"].

        [s, t] is ‖D[s]⁻¹ A[s+1] … A[t]‖ (Frobenius) / √d: for an error in a random direction of
        y[s], of RMS 1 per channel, the RMS per channel in x[t]. Zero for t < s.
        """
        rows = []
        for s in range(self.n_steps):
            unit = self.mu.new_zeros(self.channels, self.n_steps, self.channels)
            unit[:, s] = torch.eye(self.channels).to(unit)
            u = self.feature_trajectories(unit.flatten(1))
            rows.append((u.pow(2).sum((0, 2)) / self.channels).sqrt())
        return torch.stack(rows)

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of everything that defines these coordinates."""
        found = hashlib.sha256()
        for name, value in self.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]


def raw(predictors: Predictors) -> Coordinates:
    """Standardised activations, step after step: y = x."""
    p, ones = predictors, torch.ones_like(predictors.rho)
    return Coordinates(p.mu, p.scale, torch.zeros_like(p.A), torch.zeros_like(p.b), ones)


def recorded(predictors: Predictors) -> Coordinates:
    """Activations as they are recorded, in their own units: y = h, for coders trained elsewhere."""
    p = predictors
    return Coordinates(p.mu, p.scale, torch.zeros_like(p.A), -p.mu / p.scale[:, None], 1 / p.scale)


def residual(predictors: Predictors, block_exponent: float = 1.0) -> Coordinates:
    """What predictors leave over, y[s] = r[s] / rho[s]^a with a = `block_exponent`.

    a = 1 gives every step the same weight in an SAE's loss, a = 0 leaves residuals as they are.
    """
    p = predictors
    return Coordinates(p.mu, p.scale, p.A, p.b, p.rho**block_exponent, p.B)


def whitened(predictors: Predictors, moments: Moments, floor: float = 1e-4) -> Coordinates:
    """Residuals with unit covariance at every step, over the trajectories of `moments`.

    ‖y − ŷ‖² is then the Mahalanobis norm of a Markov model of the trajectory, of as many lags as
    predict. D[s] is the symmetric inverse root; eigenvalues of the covariance are at least `floor`
    times their mean, so that directions in which nothing varies are not blown up.
    """
    p = predictors
    roots = torch.stack([_symmetric(C, floor)[0] for C in residual_covariance(p, moments)])
    return Coordinates(p.mu, p.scale, p.A, p.b, roots.to(p.mu), p.B)


def between(predictors: Predictors, gamma: float, block_exponent: float = 0.0) -> Coordinates:
    """Coordinates in which ‖y − ŷ‖² = (1−γ) ‖x − x̂‖² + γ Σ_s rho[s]^−2a ‖r[s] − r̂[s]‖².

    γ = 0 is `raw`, γ = 1 is `residual` with the same a. With w[s] = rho[s]^−2a and r = x R, R[s, s]
    = I, R[s−1, s] = −A[s], R[s−2, s] = −B[s], the matrix of this quadratic form is block banded:

        M = (1−γ) I + γ R w Rᵀ

    That of y[s] = (x[s] − x[s−1] A'[s] − x[s−2] B'[s]) D'[s] is R' P R'ᵀ with P[s] = D'[s] D'[s]ᵀ.
    Comparing them from the last step back (a block Cholesky factorisation in reverse order) gives
    P[s] = M[s, s], A'[s] = −M[s−1, s] P[s]⁻¹, B'[s] = −M[s−2, s] P[s]⁻¹, after which M[s−i, s−j]
    loses M[s−i, s] P[s]⁻¹ M[s, s−j], step s being dealt with. D' is P's root.
    """
    in_range("gamma", gamma, 0, 1)
    p = predictors
    given = [M.cpu().double() for M in (p.A, p.B) if M is not None]
    w = p.rho.cpu().double() ** (-2 * block_exponent)
    eye = torch.eye(p.mu.shape[1], dtype=w.dtype)
    M: dict[tuple[int, int], torch.Tensor] = {}
    for s in range(p.n_steps):
        R = {s: eye} | {s - lag: -W[s] for lag, W in enumerate(given, 1) if lag <= s}
        M[s, s] = (1 - gamma) * eye
        for i, j in itertools.product(R, R):
            M[i, j] = M.get((i, j), 0) + gamma * w[s] * R[i] @ R[j].T
    shrunk, inverse_roots = [torch.zeros_like(W) for W in given], torch.zeros_like(given[0])
    for s in reversed(range(p.n_steps)):
        _, inverse_roots[s] = _symmetric(M[s, s])
        before = range(max(0, s - len(given)), s)
        for i in before:
            shrunk[s - i - 1][s] = -M[i, s] @ inverse_roots[s] @ inverse_roots[s]
        for i, j in itertools.product(before, before):
            M[i, j] = M[i, j] + shrunk[s - i - 1][s] @ M[s, j]
    A, *B = (W.to(p.A) for W in shrunk)
    # b only moves y by a constant, which no error sees
    return Coordinates(p.mu, p.scale, A, gamma * p.b, inverse_roots.to(p.A), *B)


def _symmetric(C: torch.Tensor, floor: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """C^½ and C^−½ of a symmetric matrix, its eigenvalues at least `floor` times their mean."""
    values, vectors = torch.linalg.eigh(C)
    root = values.clamp(min=floor * values.mean().item()).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
