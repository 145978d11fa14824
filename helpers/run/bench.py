"""Making and judging the images of a scorecard's cells (of `helpers.run.scorecard`)."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from helpers import steering
from helpers.checks import refuse
from helpers.files import load_json, save_json
from helpers.measure.effects import GAIN
from helpers.measure.experiment import Experiment, Push, aligned, codes_of
from helpers.measure.pool import Pool
from helpers.pipelines.generate import generate_all
from helpers.pipelines.replay import Outputs
from helpers.run import directions, methods

PART = 100  # unsteered images that are made and kept together


class Bench:
    """What all cells of a study are made with, in one process."""

    def __init__(self, study):
        run = study.run_of(study.dictionary)
        self.study, self.run = study, methods.run_of(run)
        self.directions = directions.Directions(run, study.dictionary, study.labels, self._kept)
        self._pools: dict[int, Pool] = {}

    def _kept(self, cell) -> Path:
        """Where the dictionary of a cell (of a sweep) is."""
        made_of = asdict(cell) | {"labels": self.study.labels}
        return self.study.path(made_of, "dictionaries", ".safetensors")

    @cached_property
    def pipe(self):
        return self.run.pipeline()

    def store(self, n_steps: int) -> SimpleNamespace:
        """What an `Experiment` asks of a store, for images of so many steps."""
        store, last = self.run.store, self.study.last_step
        steps = [s * (n_steps - 1) // last for s in self.study.dictionary.steps]
        sampling = store.sampling | {"num_inference_steps": n_steps}
        return SimpleNamespace(tap=store.tap, steps=steps, grid=store.grid, sampling=sampling)

    def part(self, n_steps: int, first: int) -> Path:
        """The file of unsteered images from number `first` on, made if it is not there."""
        made_of = {"steps": n_steps, "first": first, "pool": self.study.pool}
        path = self.study.path(made_of, "pool", ".safetensors")
        if not path.exists():
            given = self.run.store.prompts_of("test")
            every = self.run.truth.steering_prompts(self.study.pool, 0, given)
            part = range(first, min(first + PART, len(every)))
            seeds = [8_000_000_000 + i for i in part]
            where = self.store(n_steps), [every[i] for i in part], seeds
            Pool.make(self.pipe, *where, self.study.batch_size).save(path)
        return path

    def pool(self, n_steps: int) -> Pool:
        """All unsteered images of so many steps."""
        if n_steps not in self._pools:
            parts = [Pool.load(self.part(n_steps, i)) for i in range(0, self.study.pool, PART)]
            joined = np.concatenate([p.images for p in parts]), torch.cat([p.h for p in parts])
            texts, seeds = ([v for p in parts for v in getattr(p, n)] for n in ("prompts", "seeds"))
            outputs = Outputs.joined([p.outputs for p in parts])
            self._pools = {n_steps: Pool(texts, seeds, *joined, outputs)}  # one at a time
        return self._pools[n_steps]

    @lru_cache(maxsize=64)  # noqa: B019, a process has one bench
    def _steerable(self, label: str, n_steps: int):
        """Numbers of the images that lack a label, of those that have it; regions of all."""
        images, truth = self.pool(n_steps).images, self.run.truth
        usable, weights = truth.steerable(label, images, self.run.store.grid)
        return np.flatnonzero(usable), np.flatnonzero(truth.has(label, images)), weights

    def picks(self, cell) -> list[int]:
        """Numbers of a cell's images, in the pool."""
        lacking, having, _ = self._steerable(cell.label, cell.num_inference_steps)
        whole = having if cell.way.startswith("remove") else lacking
        return whole[: cell.images][cell.seed :: cell.seeds].tolist()

    def lab(self, cell) -> Experiment:
        """The experiment of a cell, nothing made yet."""
        n = cell.num_inference_steps
        return Experiment(
            *(self.pipe, self.store(n), self.directions.coordinates),
            *(self.run.truth, self.pool(n), {}),
            weights={cell.label: self._steerable(cell.label, n)[2]},
            mode=cell.mode,
            branch=cell.branch,
            batch_size=self.study.batch_size,
            natural=self.directions.natural,
        )

    def window(self, cell) -> tuple[int, int] | None:
        """First and last step of a cell's window; None for all."""
        n = cell.num_inference_steps
        if cell.window == "all":
            return None
        thirds = dict(zip(("early", "middle", "late"), np.array_split(range(n), 3)))
        if cell.window in thirds:
            return int(thirds[cell.window][0]), int(thirds[cell.window][-1])
        if cell.window == "decided":
            return self.decided(cell.label, n), n - 1
        _, latents = self.latents(cell)
        return min(latents.onset * (n - 1) // self.study.last_step, n - 1), n - 1

    def latents(self, cell):
        """A cell's dictionary, and what is known of its latents for the cell's label."""
        _, coordinates = directions.parts_of(cell.direction)
        seed = cell.seed % self.study.trainings
        dictionary, latents = self.directions.dictionary(coordinates, seed)
        return dictionary, latents[cell.label]

    def decided(self, label: str, n_steps: int) -> int:
        """The step by which the truth says that half of the unsteered images settled a label."""
        if not hasattr(self.run.truth, "decided"):
            refuse("window", "decided", "another, where the truth does not know when that is")
        path = self.study.path({"decided": n_steps}, "decided")
        if not path.exists():
            pool, sampling = self.pool(n_steps), self.store(n_steps).sampling
            some = slice(PART)
            own = pool.prompts[some], pool.seeds[some], pool.images[some]
            found = self.run.truth.decided(self.pipe, *own, sampling)
            save_json(path, {a: float(np.nanmedian(steps)) for a, steps in found.items()})
        step = load_json(path)[label.partition("=")[0]]
        if step is None:
            refuse("window", "decided", f"another, as it is never decided for {label}")
        return round(step)

    # --- what is done to images ---

    def outcomes(self, cell) -> dict[float, dict]:
        """What each strength did to a cell's images: name -> (image,)."""
        lab, picks = self.lab(cell), self.picks(cell)
        if not picks:
            refuse("pool", self.study.pool, f"larger: too few images can be used for {cell.label}")
        if cell.direction == "prompt":
            return {s: self.shown(cell, s, picks)[1] for s in cell.strengths}
        if cell.way.startswith("remove"):
            found = {}
            for strength in cell.strengths:
                images = self.without(lab, cell, picks, strength)
                measured = lab.compare(cell.label, picks, images)
                measured["success"] = ~measured["success"]  # it is gone
                measured[GAIN] = measured["success"] * measured["kept"]
                found[strength] = _each(measured)
            return found
        pushes = {s: self.push(lab, cell, s) for s in cell.strengths}
        lab.make(dict.fromkeys(pushes.values(), picks))
        return {
            s: _each(lab.measure(push, picks)) | {"distance": lab.distance(push, picks)}
            for s, push in pushes.items()
        }

    def shown(self, cell, strength: float, picks: list[int]) -> tuple[np.ndarray, dict]:
        """Images of any of the pool's `picks` that a cell steers, and what became of them."""
        lab = self.lab(cell)
        if cell.direction == "prompt":
            images = self.asked_for(cell, picks)
        else:
            images = lab.images(self.push(lab, cell, strength), picks)
        return images, _each(lab.compare(cell.label, picks, images))

    def push(self, lab: Experiment, cell, strength: float) -> Push:
        """The push of a cell at one strength, its direction known to the experiment."""
        window, everywhere = self.window(cell), cell.region == "whole image"
        if cell.way == "clamp":
            dictionary, of = self.latents(cell)
            how = {"way": "clamp", "natural": of.typical, "name": cell.direction}
            push = lab.latent_push(cell.label, dictionary, of.best[0], strength, **how)
            return replace(push, window=window, everywhere=everywhere)
        whose = cell.direction, cell.label, cell.seed, self.study.trainings
        lab.directions[cell.label, cell.direction] = self.directions.of(*whose, cell.way)
        way = cell.way if cell.way == "keep norm" else "add"
        return Push(cell.label, cell.direction, strength, window, everywhere, way)

    def asked_for(self, cell, picks: list[int]) -> np.ndarray:
        """Images whose prompts say what the others do, and the label: the surest way there."""
        if not hasattr(self.run.truth, "asked_for"):
            refuse("direction", "prompt", "another, where nobody knows how to ask for a label")
        pool = self.pool(cell.num_inference_steps)
        texts = self.run.truth.asked_for(cell.label, [pool.prompts[i] for i in picks])
        of_picks = texts, [pool.seeds[i] for i in picks], self.study.batch_size
        return generate_all(self.pipe, *of_picks, **self.store(cell.num_inference_steps).sampling)

    def without(self, lab: Experiment, cell, picks: list[int], amount: float) -> np.ndarray:
        """Images with an amount of what carries the label taken out: 1 all of it, 2 as much again.

        Of latents, what they added to the images as recorded; else the component along a
        direction, seen from tokens that lack the label.
        """
        window = self.window(cell) or (0, cell.num_inference_steps - 1)
        weights = np.where(cell.region == "whole image", 1.0, lab.weights[cell.label][picks])
        one_batch = len(picks) <= self.study.batch_size
        settings = {"mask": weights, "window": window, "until": window[0] if one_batch else 0}
        means = self.directions.class_means[cell.label]
        if directions.parts_of(cell.direction)[0] == "random" or cell.direction == "class means":
            whose = cell.direction, cell.label, cell.seed, self.study.trainings
            u, scale = self.directions.of(*whose), lab.coordinates.scale[:, None]
            line = scale.to(u) * u, lab.coordinates.unstandardise(means.lacking)
            line = (steering.at_every_step(v, *lab.steps) for v in line)
            return lab.edit(steering.project_out, picks, *line, amount=amount, **settings)
        dictionary, of = self.latents(cell)
        taken = of.best[:1] if cell.way == "remove" else None
        if taken is None:
            taken = aligned(dictionary.directions(), means.difference, directions.ALIGNED)
            taken = taken or of.best[:1]
        z, u = codes_of(dictionary, taken, lab.pool.h[picks]), dictionary.directions(taken)
        delta = steering.scaling(z, u, dictionary.coordinates, *lab.steps, factor=1 - amount)
        return lab.edit(steering.steer, picks, delta, **settings)


def _each(measured: dict) -> dict[str, np.ndarray]:
    """What is kept of `effects.measure`, a number an image."""
    if GAIN not in measured:
        refuse("labels", "none that the truth can judge", "some that it can")
    sums = {name: measured[name] for name in ("inside", "outside")}
    sums["change"] = tuple(np.add(sums["inside"], sums["outside"]))
    with np.errstate(invalid="ignore"):
        means = {name: change / size for name, (change, size) in sums.items()}
    return {n: measured[n] for n in ("success", "kept")} | {"gain": measured[GAIN]} | means
