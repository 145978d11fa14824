"""Coordinates of a small nonlinear predictor: a perceptron on top of ridge regression.

    x[s] = x[s−1] A[s] + b[s] + f_s(x[s−1]) + rho[s]^a y[s],    f_s(x) = tanh(x U[s] + c[s]) V[s]

Restoring step after step is exact, whatever f is. A direction in y is sent on by the Jacobian at
the mean trajectory, which is 0 in standardised units: A[s] + U[s] (1 − tanh²c[s]) V[s]. This and
f_s(0) are kept as A[s] and b[s] of `Coordinates`, so that only the rest of f_s is computed apart.
"""

from itertools import islice

import torch

from helpers.coordinates import Coordinates, residual
from helpers.predictors import Predictors


class Nonlinear(Coordinates):
    """U (S, d, m), c (S, m), V (S, m, d): a perceptron's part beyond first order around 0."""

    def __init__(self, mu, scale, A, b, D_inverse, U, c, V, B=None):
        super().__init__(mu, scale, A, b, D_inverse, B)
        for name, value in {"U": U, "c": c, "V": V}.items():
            self.register_buffer(name, value)

    def beyond(self, x: torch.Tensor, s: int) -> torch.Tensor:
        """What f_s has beyond f_s(0) and its Jacobian there, of x[s−1]: (…, d) -> (…, d)."""
        U, c, V = (v[s].to(x) for v in (self.U, self.c, self.V))
        linear, at_zero = x @ U, torch.tanh(c)
        return (torch.tanh(linear + c) - at_zero - (1 - at_zero**2) * linear) @ V

    def residualize(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.zeros_like(x[..., 0, :])
        bent = [first, *(self.beyond(x[..., s - 1, :], s) for s in range(1, self.n_steps))]
        bent = torch.stack(bent, -2) / self.D_inverse.to(x)[:, None]
        return super().residualize(x) - bent.flatten(-2)

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        return self._recur(y, self.b, self.beyond)


def fit(
    store,
    predictors: Predictors,
    block_exponent: float = 1.0,
    *,
    width: int | None = None,
    n_updates: int = 1000,
    batch_size: int = 512,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device="cpu",
) -> Nonlinear:
    """Train f_s for every step on what linear predictors leave over, with Adam.

    `width` is m, 2 · d where None. Squared errors are relative to rho[s]²; the learning rate falls
    linearly to 0. A step whose f_s does not help on validation trajectories goes without. rho is
    the RMS of what is left of a sample of the training trajectories.
    """
    base = residual(predictors, 0.0).to(device)
    S, d, m = base.n_steps, base.channels, width or 2 * base.channels
    rho = predictors.rho.to(base.mu)[:, None, None]
    g = torch.Generator().manual_seed(seed)
    U = (torch.randn(S, d, m, generator=g) / d**0.5).to(base.mu).requires_grad_()
    c, V = (base.mu.new_zeros(S, *n, requires_grad=True) for n in ((1, m), (m, d)))
    optimiser = torch.optim.AdamW((U, c, V), lr=learning_rate)

    def errors(h):
        """Squared errors without and with f, relative to rho², (S,) each; none precedes step 0."""
        x = base.standardise(h.to(base.mu))
        r = base.residualize(x).view(x.shape).transpose(0, 1) / rho
        before = torch.nn.functional.pad(x.transpose(0, 1)[:-1], (0, 0, 0, 0, 1, 0))
        f = torch.tanh(before @ U + c) @ V
        return r.pow(2).mean((1, 2)), (r - f).pow(2).mean((1, 2))

    for i, h in enumerate(islice(store.batches("train", batch_size, seed), n_updates)):
        optimiser.param_groups[0]["lr"] = learning_rate * (1 - i / n_updates)
        optimiser.zero_grad()
        errors(h)[1].sum().backward()
        optimiser.step()
    with torch.no_grad():
        before, after = errors(next(store.batches("validation", 16 * batch_size, seed)))
        V *= rho * (after < before)[:, None, None]
        V[0] = 0
        at_zero = torch.tanh(c)
        A, b = base.A + (U * (1 - at_zero**2)) @ V, base.b + (at_zero @ V)[:, 0]
        U, c, V = U.detach(), c.detach()[:, 0], V.detach()
        found = Nonlinear(base.mu, base.scale, A, b, base.D_inverse, U, c, V, base.B)
        x = base.standardise(next(store.batches("train", 16 * batch_size, seed)).to(base.mu))
        size = found.residualize(x).view(x.shape).pow(2).mean((0, 2)).sqrt()
    return Nonlinear(base.mu, base.scale, A, b, size**block_exponent, U, c, V, base.B)
