"""How well dictionaries rebuild held-out trajectories, in any coordinates, and at what cost.

A change of coordinates changes the metric in which an error counts, so every dictionary is measured
in several. What is kept are sums per image and step, since intervals are over images.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from helpers.coordinates import Coordinates
from helpers.measure import metrics


@dataclass(frozen=True)
class Reconstruction:
    """Errors and cost of one dictionary, over the trajectories of each image."""

    sums: dict[str, tuple]  # space -> Σ (y - ŷ)², Σ (y - y of the training mean)², (image, step)
    numbers: np.ndarray  # that a trajectory was rebuilt from, mean of each image, float64, (image,)
    used: np.ndarray | None  # whether each latent fired on any trajectory; None if codes are dense

    @property
    def alive(self) -> float:
        """Share of latents that fired at least once; NaN for a dense dictionary."""
        return float("nan") if self.used is None else float(self.used.mean())

    def ev(self, space: str, step: int | None = None) -> metrics.Estimate:
        """Explained variance over all steps, or at one of them."""
        steps = slice(None) if step is None else [step]
        return metrics.explained_variance(*(v[:, steps].sum(1) for v in self.sums[space]))

    def ev_per_step(self, space: str) -> list[metrics.Estimate]:
        return [self.ev(space, step) for step in range(self.sums[space][0].shape[1])]


def difference(a: Reconstruction, b: Reconstruction, space: str) -> metrics.Estimate:
    """EV of a less EV of b, both on the same resampled images."""
    (error_a, spread), (error_b, _) = a.sums[space], b.sums[space]
    return metrics.ratio((error_b - error_a).sum(1), spread.sum(1))


def measure(dictionaries: dict, shards, spaces: dict) -> dict[str, Reconstruction]:
    """Rebuild trajectories from each `Dictionary`'s codes; `Coordinates` are what to measure in.

    `shards` of standardised trajectories, (image, token, step, channel), are read once.
    """
    sums, numbers, used = defaultdict(list), defaultdict(list), {}
    means = {s: c.residualize(torch.zeros_like(c.mu)).view_as(c.mu) for s, c in spaces.items()}
    for x in (image for shard in shards for image in shard.split(1)):  # bounds the codes' memory
        truth = {space: _blocks(c, x) for space, c in spaces.items()}
        for name, dictionary in dictionaries.items():
            z = dictionary.codes(x)  # (1, token, latent)
            x_hat = dictionary.rebuild(z)
            for space, c in spaces.items():
                part = metrics.squared_errors(truth[space], _blocks(c, x_hat), means[space])
                sums[name, space].append(part)
            numbers[name].append(float(dictionary.cost(z).double().mean()))
            if not dictionary.two_sided:  # one step at a time, a latent is the same at every step
                fired = (z != 0).view(-1, dictionary.coder.n_latents).any(0)
                used[name] = used.get(name, False) | fired.cpu().numpy()
    found = {}
    for name in dictionaries:
        joined = {s: tuple(map(np.concatenate, zip(*sums[name, s]))) for s in spaces}
        found[name] = Reconstruction(joined, np.array(numbers[name]), used.get(name))
    return found


def _blocks(coordinates: Coordinates, x: torch.Tensor) -> torch.Tensor:
    """(image, token, step, channel) -> the blocks of y, (image, step, token, channel)."""
    return coordinates.residualize(x).unflatten(-1, x.shape[-2:]).transpose(1, 2)


def standardised(store, split: str, predictors):
    """A split's standardised activations, shard by shard: (image, token, step, channel)."""
    for h in store.shards(split):
        yield predictors.standardise(h.transpose(1, 2).to(predictors.mu.device))


class SomeSteps:
    """A store to train and measure on, of which only the kept steps numbered `keep` are read."""

    def __init__(self, store, keep: list[int]):
        self._store, self.keep = store, keep
        self.n_images, self.n_tokens = store.n_images, store.n_tokens

    def shards(self, split: str):
        return (h[:, self.keep] for h in self._store.shards(split))

    def batches(self, *args, **kwargs):
        return (h[:, self.keep] for h in self._store.batches(*args, **kwargs))
