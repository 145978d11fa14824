"""Steering experiments: a pool of images, ways to steer them, and the images so made.

An image is made once for each way to steer it, whichever section of a notebook asks for it, and
what is asked for at once is made in full batches, each image with its own direction and region.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm.auto import tqdm

from helpers import steering
from helpers.checks import in_range, nearest, refuse
from helpers.coordinates import Coordinates
from helpers.dictionary import Dictionary
from helpers.measure.effects import measure
from helpers.measure.labels import Labels
from helpers.trajectories import record


def choose_targets(best: dict, given: list[str], n: int) -> list[str]:
    """Labels to steer towards: those given, else the n best detected, each of another attribute.

    The mean over both SAEs' AUROC in `best`, of latents.json, decides, to favour neither.
    """
    for target in given:
        if target not in best:
            refuse("targets", target, f"labels that have latents, such as {nearest(target, best)}")

    def detected(label):
        return sum(best[label]["validation_auroc"][name] for name in ("residual", "raw")) / 2

    of_attribute: dict[str, str] = {}
    for label in sorted(best, key=detected, reverse=True):
        of_attribute.setdefault(label.split("=")[0], label)
    return list(dict.fromkeys(given)) or list(of_attribute.values())[:n]


@dataclass(frozen=True)
class ClassMeans:
    """Mean standardised trajectories (S, d) of tokens with a label, and of others of their kind."""

    having: torch.Tensor
    lacking: torch.Tensor

    @property
    def difference(self) -> torch.Tensor:
        """A dense direction that uses the labels, (S, d)."""
        return self.having - self.lacking


def class_means(shards, labels: Labels, targets, coordinates) -> dict[str, ClassMeans]:
    """Of each target that some tokens have and others lack.

    `shards` hold the images that `labels` describe, raw, (image, step, token, channel).
    """
    masks = {t: labels.contrast(t) for t in targets if t in labels.names}
    masks = {t: pair for t, pair in masks.items() if all(mask.any() for mask in pair)}
    totals = {t: [0.0, 0.0] for t in masks}
    first = 0
    for h in shards:
        x, here = coordinates.standardise(h.transpose(1, 2)), slice(first, first + len(h))
        for target, pair in masks.items():
            for i, mask in enumerate(pair):
                totals[target][i] = totals[target][i] + x[torch.from_numpy(mask[here])].sum(0)
        first += len(h)
    return {
        target: ClassMeans(*(total / int(mask.sum()) for total, mask in zip(totals[target], pair)))
        for target, pair in masks.items()
    }


@dataclass(frozen=True)
class Pool:
    """Images before any steering: what each steered one is compared with."""

    prompts: list[str]
    seeds: list[int]
    images: np.ndarray
    """float32, (image, height, width, 3), in [0, 1]."""
    h: torch.Tensor
    """Recorded with them, raw, (image, step, token, channel)."""

    @classmethod
    def make(cls, pipe, store, prompts, seeds, batch_size: int) -> Pool:
        """Generate and record images with the settings of a store, at its tap and steps."""
        images, h = [], []
        starts = range(0, len(prompts), batch_size)
        for i in tqdm(starts, "unsteered images", leave=False, disable=None):
            batch = slice(i, i + batch_size)
            made = record(
                pipe, prompts[batch], seeds[batch], store.tap, store.steps, **store.sampling
            )
            images.append(made[0])
            h.append(made[1])
        return cls(list(prompts), list(seeds), np.concatenate(images), torch.cat(h))


@dataclass(frozen=True)
class Push:
    """One way to steer: a direction added at a strength."""

    target: str
    direction: str
    """'residual latent', 'raw latent', 'class means' or 'random rows'."""
    strength: float
    """In units of the RMS norm of centred tokens."""
    window: tuple[int, int] | None = None
    """First and last denoising step; None for all."""
    everywhere: bool = False
    """Over the whole image, not in the target's region."""


@dataclass
class Experiment:
    """A pool, directions and regions, and the images made from them."""

    pipe: object
    """The diffusion model."""
    store: object
    """The `Store` whose tap, steps, grid and sampling are used."""
    coordinates: Coordinates
    """Their scale and mean lead from standardised to raw units."""
    truth: object
    """What judges images, such as `helpers.demo.truth.Scenes`."""
    pool: Pool
    directions: dict[tuple[str, str], torch.Tensor]
    """(target, name) -> trajectory (S, d) in standardised units."""
    weights: dict[str, np.ndarray]
    """target -> how much each token belongs to the region that is steered, (image, token)."""
    mode: str = "activation"
    """'activation' adds u[s]; 'residual' only what each step adds to it."""
    branch: str = "conditional"
    """Which branch of guidance is steered, or 'both'."""
    batch_size: int = 20
    """Images made at once."""
    made: dict[tuple[Push, int], np.ndarray] = field(default_factory=dict)
    """(push, image of the pool) -> the steered image."""
    n_made: int = 0
    """Images generated so far, the pool's among them."""

    def __post_init__(self):
        self.n_made += len(self.pool.images)
        self.directions = dict(self.directions)  # `latent_push` adds to them

    @property
    def n_steps(self) -> int:
        return self.store.sampling["num_inference_steps"]

    def make(self, wanted: dict[Push, list[int]]) -> None:
        """Generate the images of the pool that each push is wanted for, unless they are there."""
        tasks = [(push, i) for push, picks in wanted.items() for i in picks]
        tasks = [task for task in dict.fromkeys(tasks) if task not in self.made]
        starts = range(0, len(tasks), self.batch_size)
        quiet = len(starts) < 2 or None  # None: shown in notebooks and terminals
        for start in tqdm(starts, "steered images", leave=False, disable=quiet):
            batch = tasks[start : start + self.batch_size]
            additions = {push: self.addition(push) for push in dict.fromkeys(p for p, _ in batch)}
            delta = torch.stack([additions[push] for push, _ in batch], dim=1)[:, :, None]
            mask = np.stack([self.mask(push)[i] for push, i in batch])
            images = self.edit(steering.steer, [i for _, i in batch], delta, mask=mask)
            self.made |= zip(batch, images)

    def images(self, push: Push, picks) -> np.ndarray:
        """Steered images of the pool's `picks`, (image, height, width, 3), made if need be."""
        self.make({push: picks})
        return np.stack([self.made[push, i] for i in picks])

    def latent_push(self, target: str, dictionary: Dictionary, latent: int, strength: float):
        """The `Push` along any latent's feature trajectory, in a target's region at all steps."""
        in_range("latent", latent, 0, dictionary.n_latents - 1)
        self.directions[target, f"latent {latent}"] = dictionary.directions(latent)
        return Push(target, f"latent {latent}", strength)

    def addition(self, push: Push) -> torch.Tensor:
        """What a push adds at every denoising step, raw units, (step, channel)."""
        u = self.directions[push.target, push.direction]
        u = steering.only_new(u, self.coordinates) if self.mode == "residual" else u
        delta = steering.addition(
            u, self.coordinates, self.store.steps, self.n_steps, push.strength
        )
        first, last = steering.check_window(push.window or (0, self.n_steps - 1), self.n_steps)
        delta[:first], delta[last + 1 :] = 0, 0
        return delta

    def mask(self, push: Push) -> np.ndarray:
        """Weights per token of the pool's images, (image, token), that a push is multiplied by."""
        weights = self.weights[push.target]
        return np.ones_like(weights) if push.everywhere else weights

    def edit(self, how, picks, *arguments, mask=None, **settings) -> np.ndarray:
        """Images of the pool's `picks` by a function of `helpers.steering`, with our settings."""
        texts, seeds = (
            [values[i] for i in picks] for values in (self.pool.prompts, self.pool.seeds)
        )
        self.n_made += len(texts)
        return how(
            *(self.pipe, texts, seeds, self.store.tap, *arguments),
            mask=None if mask is None else torch.from_numpy(mask).float(),
            branch=self.branch,
            batch_size=self.batch_size,
            **settings,
            **self.store.sampling,
        )

    def measure(self, push: Push, picks) -> dict:
        """What a push does to the pool's `picks`; see `helpers.measure.effects.measure`."""
        return self.compare(push.target, picks, self.images(push, picks))

    def compare(self, target: str, picks, images) -> dict:
        """`measure` of any images that were made from the pool's `picks`."""
        before, weights = self.pool.images[picks], self.weights[target][picks]
        return measure(self.truth, target, before, images, weights, self.store.grid)

    # --- taking a feature out of images that have it; dicts are by target ---

    def without_latents(self, picks: dict, dictionary: Dictionary, latents: dict) -> dict:
        """Images of the pool's `picks` without what some latents added to what was recorded."""
        coordinates, deltas = dictionary.coordinates, []
        if not picks:
            return {}
        for target, some in picks.items():
            x = coordinates.standardise(self.pool.h[some].float().transpose(1, 2))
            with torch.no_grad():
                z = dictionary.codes(x.to(coordinates.mu.device))[..., latents[target]]
            u = dictionary.directions(latents[target])
            steps = (self.store.steps, self.n_steps)
            deltas.append(steering.scaling(z, u, coordinates, *steps, factor=0.0))
        every = [i for some in picks.values() for i in some]
        return _by_target(picks, self.edit(steering.steer, every, torch.cat(deltas, dim=1)))

    def without_direction(self, picks: dict, means: dict, amount: float) -> dict:
        """Images of the pool's `picks`, projected along the difference of their class means.

        At all denoising steps, in the region, seen from the mean of tokens that lack the label:
        1 takes the component out, 2 mirrors it.
        """
        every = [(target, i) for target, some in picks.items() for i in some]
        if not every:
            return {}
        lines = {}
        for target in picks:
            m = means[target]
            difference = self.coordinates.scale.to(m.lacking)[:, None] * m.difference
            line = torch.stack([difference, self.coordinates.unstandardise(m.lacking)], dim=1)
            lines[target] = steering.at_every_step(line, self.store.steps, self.n_steps)
        direction, centre = torch.stack([lines[t] for t, _ in every], dim=1).unbind(2)
        mask = np.stack([self.weights[target][i] for target, i in every])
        where = (steering.project_out, [i for _, i in every], direction, centre)
        return _by_target(picks, self.edit(*where, mask=mask, amount=amount))


def _by_target(picks: dict, images: np.ndarray) -> dict[str, np.ndarray]:
    ends = np.cumsum([len(some) for some in picks.values()])[:-1]
    return dict(zip(picks, np.split(images, ends)))


def aligned(u: torch.Tensor, direction: torch.Tensor, at_least: float) -> list[int]:
    """Latents whose trajectories u (m, S, d) have at least this cosine with a direction (S, d)."""
    cosine = torch.nn.functional.cosine_similarity(u.flatten(1), direction.flatten()[None].to(u))
    return (cosine >= at_least).nonzero().flatten().tolist()
