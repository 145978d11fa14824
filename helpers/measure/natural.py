"""What is natural at a hookpoint: how far activations are from those of images as they are made.

Steering that is strong enough takes activations where the model has never been. What it then draws
says little of a feature, so this distance is printed beside every success.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from helpers.checks import in_range, refuse
from helpers.dictionary import Dictionary
from helpers.moments import Moments
from helpers.predictors import mean_only, residual_covariance

SHRINKAGES = [10.0**e for e in range(-6, 1)]  # tried, towards equal variance in all directions


@dataclass(frozen=True)
class Natural:
    """A Gaussian of the tokens at each kept step, and where 99 % of held-out tokens are."""

    mean: torch.Tensor  # (S, d), raw units
    whitening: torch.Tensor  # (S, d, d): inverse roots of the covariances, over √d
    limits: torch.Tensor  # (S,): 99th percentile of the distance of validation tokens
    shrinkage: torch.Tensor  # (S,), of the covariances

    @classmethod
    def fit(cls, train: Moments, validation: Moments, shards) -> Natural:
        """Fit to training trajectories; `shards` are the validation images' activations, raw.

        The covariance is (1 − λ) C + λ tr(C)/d I, with λ by the likelihood of validation tokens.
        """
        p = mean_only(train, torch.float64)
        seen, held = (residual_covariance(p, m) for m in (train, validation))
        whitening, chosen = [], []
        for s, C in enumerate(seen):
            values, vectors = torch.linalg.eigh(C)
            along = (vectors * (held[s] @ vectors)).sum(0)  # variance of held-out tokens
            tried = [(1 - v) * values.clamp(min=0) + v * values.mean() for v in SHRINKAGES]
            losses = torch.stack([(v.log() + along / v).sum() for v in tried])
            best = int(losses.argmin())
            whitening.append(vectors / (len(C) * tried[best]).sqrt() / p.scale[s])
            chosen.append(SHRINKAGES[best])
        found = cls(p.mu, torch.stack(whitening), p.scale, torch.tensor(chosen))
        steps = range(len(seen))
        each = [torch.stack([found.distance(h[:, s], s).flatten() for s in steps]) for h in shards]
        limits = torch.from_numpy(np.quantile(torch.cat(each, 1), 0.99, axis=1)).float()
        return cls(found.mean.float(), found.whitening.float(), limits, found.shrinkage)

    def distance(self, h: torch.Tensor, s: int) -> torch.Tensor:
        """Mahalanobis distance over √d of raw tokens (…, d) at kept step number s: 1 in RMS."""
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        return ((h - self.mean[s].to(h)) @ self.whitening[s].to(h)).norm(dim=-1)


def subspace(moments: Moments, share: float = 0.99) -> torch.Tensor:
    """The directions at each step that hold a share of the variance, for `steering.onto`.

    (S, d, r), orthonormal columns, the largest variance first; zero ones at steps that need fewer.
    """
    in_range("share", share, 0, 1)
    bases = []
    for C in residual_covariance(mean_only(moments), moments):
        values, vectors = (v.flip(-1) for v in torch.linalg.eigh(C))
        before = values.cumsum(0) - values
        bases.append(vectors * (before < share * values.sum() * (1 - 1e-12)))
    widest = max(int(basis.any(0).sum()) for basis in bases)
    return torch.stack(bases)[..., :widest].float()


def typical_codes(dictionary: Dictionary, latents, shards, quantile: float = 0.99) -> torch.Tensor:
    """A quantile of each latent's codes where they are not zero, (latent,), of raw activations.

    `shards` are (image, step, token, channel). ValueError for a latent that is active nowhere.
    """
    dictionary.check(latents)
    coordinates, found = dictionary.coordinates, []
    for h in shards:
        x = coordinates.standardise(h.float().transpose(1, 2)).to(coordinates.mu.device)
        found.append(dictionary.codes(x)[..., latents].flatten(0, 1).cpu())
    codes = torch.cat(found).T
    for latent, z in zip(latents, codes):
        if not z.any():
            refuse("latent", latent, "one that is active in these images")
    return torch.tensor([float(np.quantile(z[z != 0], quantile)) for z in codes])
