"""When a latent gets its evidence: what each kept step adds to its codes.

A code is one number a token, but its pre-activation is a sum over the kept steps,

    z_pre = Σ_s e[s] + b_enc,   e[s] = (y[s] − b_dec[s]) W_enc[s]   (`Dictionary.evidence`),

so that evidence is a map over tokens *and* steps. What a code of 1 does is its effect ‖u[s]‖; the
part of it that is new at step s, ‖w[s]‖ in units of x, is its onset. Steps are denoising steps.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from scipy.stats import rankdata

from helpers.measure import metrics
from helpers.steering import only_new


def crossing(evidence, steps, share: float = 0.5) -> np.ndarray:
    """Denoising step from which evidence (…, S), summed so far, stays above a share of its sum.

    Float (…), linear between the kept `steps` (S,); NaN where the sum is not positive.
    """
    so_far, steps = np.cumsum(evidence, -1, dtype=float), np.asarray(steps, float)
    goal = share * so_far[..., -1:]
    below = (so_far < goal)[..., ::-1]
    at = np.where(below.any(-1), len(steps) - below.argmax(-1), 0)[..., None]
    at = np.minimum(at, len(steps) - 1)  # past the last step only where the sum is negative
    here = np.take_along_axis(so_far, at, -1)
    before = np.take_along_axis(so_far, np.maximum(at - 1, 0), -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        back = np.where(at > 0, (here - goal) / (here - before), 0)
    found = steps[at] - back * (steps[at] - steps[np.maximum(at - 1, 0)])
    return np.where(so_far[..., -1] > 0, found[..., 0], np.nan)


def lasting_from(holds: np.ndarray, steps) -> np.ndarray:
    """The first of `steps` (S,) from which on `holds`, bool (S, n), stays true, or NaN: (n,)."""
    lasting = np.logical_and.accumulate(holds[::-1])[::-1]
    return np.where(lasting.any(0), np.asarray(steps, float)[lasting.argmax(0)], np.nan)


def peak_share(evidence) -> np.ndarray:
    """Share of positive evidence (…, S) that comes from its largest step; NaN where none is."""
    positive = np.maximum(evidence, 0)
    with np.errstate(invalid="ignore"):
        return positive.max(-1) / positive.sum(-1)


def duration(evidence) -> np.ndarray:
    """Fewest steps that together hold half of the positive evidence (…, S), with a fraction.

    All in one step is 0.5, the same in all of them S / 2; NaN where nothing is positive.
    """
    largest_first = -np.sort(-np.maximum(evidence, 0), -1)
    from_none = np.pad(largest_first, [(0, 0)] * (largest_first.ndim - 1) + [(1, 0)])
    return crossing(from_none, np.arange(from_none.shape[-1]))


def entropy(maps) -> np.ndarray:
    """Entropy of non-negative maps (…, token) over log(tokens): 0 at one token, 1 alike at all.

    NaN for a map of zeros.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        p = maps / maps.sum(-1, keepdims=True)
        return -np.where(p > 0, p * np.log(p), p).sum(-1) / np.log(maps.shape[-1])


def sizes(dictionary, latents=slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """‖u[s]‖, the effect of a code of 1, and its onset, the norm of what is new in it at s.

    Of some latents, in units of x: two arrays (latent, step).
    """
    u = dictionary.directions(latents)
    new = only_new(u, dictionary.coordinates)
    return u.norm(dim=-1).cpu().numpy(), new.norm(dim=-1).cpu().numpy()


@dataclass(frozen=True)
class Timing:
    """What the active codes of each image owe to each step, and where they are."""

    evidence: np.ndarray  # positive evidence of active codes, float32, (image, latent, step)
    entropy: np.ndarray  # of a latent's codes over tokens, (image, latent); NaN where it is silent
    shares: np.ndarray  # Σ `peak_share` of active codes, and how many there are, (image, 2)

    @property
    def confined(self) -> metrics.Estimate:
        """Share of a code's positive evidence in its peak step, mean over active codes."""
        return metrics.ratio(*self.shares.T)

    @property
    def profile(self) -> np.ndarray:
        """Positive evidence of each latent by step, over all images, (latent, step)."""
        return self.evidence.sum(0)

    def fires(self, at_least: int = 1) -> np.ndarray:
        """Which latents are active in at least so many images, bool, (latent,)."""
        return (~np.isnan(self.entropy)).sum(0) >= at_least

    def peaks(self) -> np.ndarray:
        """Share of the latents that fire whose evidence peaks at each step, (step,)."""
        peak = self.profile[self.fires()].argmax(1)
        return np.bincount(peak, minlength=self.evidence.shape[2]) / max(1, len(peak))

    def of_latents(self) -> dict[str, float]:
        """Medians over the latents that fire: 'in peak step', `peak_share`, and `duration`."""
        profile = self.profile[self.fires()]
        measured = {"in peak step": peak_share(profile), "duration": duration(profile)}
        return {name: float(np.nanmedian(v)) if len(v) else None for name, v in measured.items()}

    def lifetimes(self, steps, times=None) -> dict[str, np.ndarray]:
        """Of each latent, from images that count `times` (image,), each (latent,), NaN if silent.

        'onset': denoising step by which a tenth of its evidence has come; 'peak': of the most;
        'duration': kept steps that hold half of it; 'entropy': spatial, mean over images.
        """
        times = np.ones(len(self.evidence)) if times is None else times
        profile = np.tensordot(times, self.evidence, 1)  # (latent, step)
        silent = profile.sum(1) == 0
        with np.errstate(invalid="ignore"):
            spread = times @ np.nan_to_num(self.entropy) / (times @ ~np.isnan(self.entropy))
        return {
            "onset": crossing(profile, steps, 0.1),
            "peak": np.where(silent, np.nan, np.asarray(steps, float)[profile.argmax(1)]),
            "duration": duration(profile),
            "entropy": spread,
        }

    def early_last(self, steps, at_least: int = 5, n_resamples: int = 300, seed: int = 0):
        """Do early features last, and are they diffuse? Spearman's correlation over latents.

        Of the peak step with 'duration' and 'entropy', for latents active in `at_least` images; the
        intervals resample images. Negative: early latents last longer, are more spread out.
        """
        own = self.fires(at_least)
        timing = Timing(self.evidence[:, own], self.entropy[:, own], self.shares)
        found = {"duration": [], "entropy": []}
        for times in metrics.resampled_counts(len(self.evidence), n_resamples, seed).T:
            lifetimes = timing.lifetimes(steps, times)
            for name, values in found.items():
                values.append(spearman(lifetimes["peak"], lifetimes[name]))
        return {name: metrics.of_resampled(values) for name, values in found.items()}


def measure(dictionary, shards, shuffle: torch.Generator | None = None) -> Timing:
    """`Timing` of standardised trajectories x, shards (image, token, step, channel).

    With `shuffle`, the steps of each code's evidence are exchanged at random: a control that
    leaves each code as confined as it was. Evidence counts towards its code, of either sign.
    """
    evidence, spread, shares = [], [], []
    for x in chain.from_iterable(shards):  # an image at a time bounds the memory
        z, e = dictionary.codes(x), dictionary.evidence(x)
        token, latent = z.nonzero(as_tuple=True)
        own = (e[token, :, latent] * z[token, latent, None].sign()).clamp(min=0).cpu()
        if shuffle is not None:
            order = torch.rand(own.shape, generator=shuffle).argsort(1)
            own = own.gather(1, order)
        sums = torch.zeros(z.shape[1], own.shape[1]).index_add_(0, latent.cpu(), own.float())
        evidence.append(sums.numpy())
        spread.append(entropy(z.abs().T.cpu().numpy()).astype(np.float32))
        of_codes = peak_share(own.numpy())
        shares.append([np.nansum(of_codes), (~np.isnan(of_codes)).sum()])
    return Timing(np.stack(evidence), np.stack(spread), np.array(shares))


def spearman(a, b) -> float:
    """Spearman's rank correlation of a and b (n,) where neither is NaN; NaN where one is flat."""
    valid = ~(np.isnan(a) | np.isnan(b))
    a, b = (rankdata(v[valid]) for v in (a, b))
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
