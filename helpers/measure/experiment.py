"""Steering experiments: a pool of images, ways to steer them, and the images so made.

An image is made once for each way to steer it, whichever section of a notebook asks for it, and
what is asked for at once is made in full batches, each image with its own direction and region.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from helpers import steering
from helpers.checks import nearest, one_of, refuse
from helpers.coordinates import Coordinates
from helpers.dictionary import Dictionary
from helpers.measure.effects import measure
from helpers.measure.labels import Labels
from helpers.measure.natural import Natural
from helpers.measure.pool import Pool
from helpers.pipelines.loading import denoiser_of
from helpers.pipelines.replay import replay


def choose_targets(found: dict, given: list[str], n: int) -> dict[str, dict]:
    """What to steer towards, of latents.json: labels, or, if it has none, its strongest features.

    Those given, else n of them, each with its latent in both SAEs, 'residual' and 'raw': the best
    detected labels, each of another attribute, by the mean of both SAEs' AUROC, to favour neither.
    """
    best = found["best"] or {feature["name"]: feature for feature in found["strongest"]}
    for target in given:
        if target not in best:
            refuse("targets", target, f"a target with latents, such as {nearest(target, best)}")
    ranked, of_attribute = list(best), {}
    if found["best"]:  # an AUROC may be null, where validation images cannot tell
        auroc = {t: of["validation_auroc"] for t, of in best.items()}
        ranked.sort(key=lambda t: -(auroc[t]["residual"] or 0) - (auroc[t]["raw"] or 0))
    for target in ranked:
        of_attribute.setdefault(target.split("=")[0], target)
    return {t: best[t] for t in given or list(of_attribute.values())[:n]}


def where_active(dictionary: Dictionary, latent: int, h: torch.Tensor) -> np.ndarray:
    """1 where a latent is active in raw trajectories (image, step, token, channel), else 0.

    Float, (image, token): the region to steer in where nothing else says where a feature is.
    """
    return (codes_of(dictionary, latent, h) > 0).double().cpu().numpy()


def codes_of(dictionary: Dictionary, latents, h: torch.Tensor) -> torch.Tensor:
    """Codes (image, token[, latent]) of one or more latents in raw trajectories."""
    dictionary.check(latents)
    x = dictionary.coordinates.standardise(h.float().transpose(1, 2))
    return dictionary.codes(x.to(dictionary.coordinates.mu.device))[..., latents]


class ClassMeans(NamedTuple):
    """Mean standardised trajectory (S, d) of tokens that lack a label, and what having it adds."""

    lacking: torch.Tensor
    difference: torch.Tensor


def class_means(shards, labels: Labels, targets, coordinates) -> dict[str, ClassMeans]:
    """Of each target that some tokens have and others of their kind lack.

    `shards` hold the images that `labels` describe, raw, (image, step, token, channel).
    """
    masks = {t: np.stack(labels.contrast(t)) for t in targets if t in labels.names}
    masks = {t: torch.from_numpy(pair) for t, pair in masks.items() if pair.any((1, 2)).all()}
    totals, first = dict.fromkeys(masks, 0.0), 0
    for h in shards:
        x = coordinates.standardise(h.transpose(1, 2))
        for target, pair in masks.items():
            here = pair[:, first : first + len(h)]  # (having or lacking, image, token)
            totals[target] = totals[target] + torch.stack([x[mask].sum(0) for mask in here])
        first += len(h)
    found = {}
    for target, pair in masks.items():
        having, lacking = (total / int(mask.sum()) for total, mask in zip(totals[target], pair))
        found[target] = ClassMeans(lacking, having - lacking)
    return found


WAYS = ("add", "clamp", "keep norm")


@dataclass(frozen=True)
class Push:
    """One way to steer: a direction added at a strength, or a code set to it."""

    target: str
    direction: str  # 'residual latent', 'raw latent', 'class means' or 'random rows'
    strength: float  # in units of the RMS norm of centred tokens; for 'clamp', of the codes
    window: tuple[int, int] | None = None  # first and last denoising step; None for all
    everywhere: bool = False  # over the whole image, not in the target's region
    way: str = "add"  # one of `WAYS`: 'keep norm' adds, then gives tokens back their norm


@dataclass
class Experiment:
    """A pool, directions and regions, and the images made from them."""

    pipe: object
    store: object  # whose tap, steps, grid and sampling are used
    coordinates: Coordinates  # whose scale and mean lead from standardised to raw units
    truth: object  # what judges images, such as `helpers.demo.truth.Scenes`
    pool: Pool
    directions: dict[tuple, torch.Tensor]  # (target, name) -> trajectory (S, d), standardised
    weights: dict[str, np.ndarray]  # target -> share of each token that is steered, (image, token)
    mode: str = "activation"  # adds u[s]; 'residual' only what each step adds to it
    branch: str = "conditional"  # of guidance, that is steered, or 'both'
    batch_size: int = 20  # images made at once
    natural: Natural | None = None  # by which the distance of edited tokens is measured
    # (target, name) -> codes of the pool's tokens, (image, token), in units of the direction's
    # length: what 'clamp' goes by
    codes: dict[tuple, torch.Tensor] = field(default_factory=dict)
    made: dict[tuple, np.ndarray] = field(default_factory=dict)  # (push, of the pool) -> image
    distances: dict[tuple, float] = field(default_factory=dict)  # of the same, see `distance`
    n_made: int = 0  # images generated so far, the pool's among them

    def __post_init__(self):
        self.n_made += len(self.pool.images)
        self.directions, self.codes = dict(self.directions), dict(self.codes)  # both are added to
        self.steps = (self.store.steps, self.store.sampling["num_inference_steps"])

    def make(self, wanted: dict[Push, list[int]]) -> None:
        """Generate the images of the pool that each push is wanted for, unless they are there."""
        tasks = [(push, i) for push, picks in wanted.items() for i in picks]
        tasks = [task for task in dict.fromkeys(tasks) if task not in self.made]
        tasks.sort(key=lambda task: self._first(task[0]))  # batches replay more then
        starts = range(0, len(tasks), self.batch_size)
        quiet = len(starts) < 2 or None  # None: shown in notebooks and terminals
        for start in tqdm(starts, "steered images", leave=False, disable=quiet):
            self._make(tasks[start : start + self.batch_size])

    def _make(self, batch: list[tuple[Push, int]]) -> None:
        """Generate one batch, whatever ways of steering are in it."""
        additions = {push: self.addition(push) for push in {push for push, _ in batch}}
        delta = torch.stack([additions[push] for push, _ in batch], dim=1)[:, :, None]
        weights = [np.where(p.everywhere, 1.0, self.weights[p.target][i]) for p, i in batch]
        weights, picks = torch.from_numpy(np.stack(weights)), [i for _, i in batch]
        first = torch.tensor([self._first(push) for push, _ in batch])
        far = torch.full((len(batch),), np.nan, dtype=torch.float64)

        def watch(rows, step, _):
            if step in self.store.steps:
                s = self.store.steps.index(step)
                apart = self.natural.distance(rows, s).cpu() / self.natural.limits[s]
                apart = (apart * weights).sum(1) / weights.sum(1)
                far.copy_(torch.where(first <= step, torch.fmax(far, apart), far))

        mask = torch.stack([self._amount(*task, w) for task, w in zip(batch, weights)])
        settings = {"mask": mask, "watch": self.natural and watch, "until": int(first.min())}
        settings["keep_norm"] = torch.tensor([push.way == "keep norm" for push, _ in batch])
        settings["centre"] = steering.at_every_step(self.coordinates.mu, *self.steps)
        self.made |= zip(batch, self.edit(steering.steer, picks, delta, **settings))
        self.distances |= zip(batch, far.tolist())

    def _first(self, push: Push) -> int:
        return push.window[0] if push.window else 0

    def _amount(self, push: Push, i: int, weights: torch.Tensor) -> torch.Tensor:
        """How much of a push's addition each token of an image gets, (token,)."""
        if push.way != "clamp":
            return weights
        return weights * (push.strength - self.codes[push.target, push.direction][i].to(weights))

    def images(self, push: Push, picks) -> np.ndarray:
        """Steered images of the pool's `picks`, (image, height, width, 3), made if need be."""
        self.make({push: picks})
        return np.stack([self.made[push, i] for i in picks])

    def distance(self, push: Push, picks) -> np.ndarray:
        """How far a push takes each image's tokens from `natural` ones, (image,); 1 is the edge.

        Their mean distance over the region, in the 99th percentile of held-out tokens: the largest
        of the kept steps from the push's first on. NaN without `natural`, or without a region.
        """
        self.make({push: picks})
        return np.array([self.distances[push, i] for i in picks])

    def latent_push(
        self, target: str, dictionary, latent: int, strength: float, way="add", natural=1.0, name=""
    ) -> Push:
        """The `Push` along any latent's feature trajectory, in a target's region at all steps.

        Known as `name`, or by its number. `natural` is a code, such as one of
        `natural.typical_codes`, of which 'clamp' sets multiples.
        """
        key = target, name or f"latent {latent}"
        self.directions[key] = natural * dictionary.directions(latent)
        if way == "clamp":
            self.codes[key] = codes_of(dictionary, latent, self.pool.h) / natural
        return Push(*key, strength, way=way)

    def addition(self, push: Push) -> torch.Tensor:
        """What a push adds at every denoising step, raw units, (step, channel).

        A clamp adds as much for each code that a token lacks.
        """
        u = self.directions[push.target, push.direction]
        u = steering.only_new(u, self.coordinates) if self.mode == "residual" else u
        if one_of("way", push.way, WAYS) == "clamp":
            if (key := (push.target, push.direction)) not in self.codes:
                refuse("direction", key, "one whose codes are given, to be clamped")
            delta = steering.at_every_step(self.coordinates.scale[:, None].to(u) * u, *self.steps)
        else:
            delta = steering.addition(u, self.coordinates, *self.steps, push.strength)
        if push.window is not None:
            first, last = steering.check_window(push.window, len(delta))
            delta[:first], delta[last + 1 :] = 0, 0
        return delta

    def edit(self, how, picks, *arguments, mask=None, until=0, **settings) -> np.ndarray:
        """Images of the pool's `picks` by a function of `helpers.steering`, with our settings.

        Steps before `until`, at which nothing is edited, are replayed, if these are one batch.
        """
        of_picks = ([values[i] for i in picks] for values in (self.pool.prompts, self.pool.seeds))
        self.n_made += len(picks)
        settings |= {"mask": None if mask is None else torch.from_numpy(np.stack(mask)).float()}
        settings |= {"branch": self.branch, "batch_size": self.batch_size, "idle": True}
        known, calls = self.pool.outputs, (denoiser_of(self.pipe), self.pipe.scheduler)
        with replay(*calls, known, until, list(picks)) if known and until else nullcontext():
            settings |= self.store.sampling
            return how(self.pipe, *of_picks, self.store.tap, *arguments, **settings)

    def measure(self, push: Push, picks) -> dict:
        """What a push does to the pool's `picks`; see `helpers.measure.effects.measure`."""
        return self.compare(push.target, picks, self.images(push, picks))

    def compare(self, target: str, picks, images) -> dict:
        """`measure` of any images that were made from the pool's `picks`."""
        before, weights = self.pool.images[picks], self.weights[target][picks]
        return measure(self.truth, target, before, images, weights, self.store.grid)

    def without_latents(self, picks: dict, dictionary: Dictionary, latents: dict) -> dict:
        """Images of `picks`, by target, without what some latents added to what was recorded."""
        deltas = []
        for target, some in picks.items():
            z = codes_of(dictionary, latents[target], self.pool.h[some])
            u = dictionary.directions(latents[target])
            deltas.append(steering.scaling(z, u, dictionary.coordinates, *self.steps, factor=0.0))
        return self._edit_each(picks, steering.steer, deltas)

    def without_direction(self, picks: dict, means: dict, amount: float) -> dict:
        """Images of `picks`, by target, projected along a difference of class means in the region.

        Seen from the mean of tokens that lack the label: 1 takes the component out, 2 mirrors it.
        """
        lines, mask = [], [self.weights[t][i] for t, some in picks.items() for i in some]
        for target, some in picks.items():
            m = means[target]
            difference = self.coordinates.scale.to(m.lacking)[:, None] * m.difference
            line = torch.stack([difference, self.coordinates.unstandardise(m.lacking)], dim=1)
            line = steering.at_every_step(line, *self.steps)[:, None]
            lines.append(line.expand(-1, len(some), -1, -1).unbind(2))  # two (step, image, channel)
        settings = {"mask": mask, "amount": amount}
        return self._edit_each(picks, steering.project_out, *zip(*lines), **settings)

    def _edit_each(self, picks: dict, how, *parts, **settings) -> dict[str, np.ndarray]:
        """`edit` for all targets at once; each of `parts` has an argument's images by target."""
        if not picks:
            return {}
        every = [i for some in picks.values() for i in some]
        images = self.edit(how, every, *(torch.cat(part, dim=1) for part in parts), **settings)
        return dict(zip(picks, np.split(images, np.cumsum([len(p) for p in picks.values()]))))


def aligned(u: torch.Tensor, direction: torch.Tensor, at_least: float) -> list[int]:
    """Latents whose trajectories u (m, S, d) have at least this cosine with a direction (S, d)."""
    cosine = torch.nn.functional.cosine_similarity(u.flatten(1), direction.flatten()[None].to(u))
    return (cosine >= at_least).nonzero().flatten().tolist()
