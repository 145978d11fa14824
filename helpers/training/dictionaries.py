"""Training a dictionary on a store: one call for notebooks, baselines and several processes."""

from dataclasses import replace
from pathlib import Path

import torch

from helpers.coordinates import Coordinates
from helpers.dictionary import Dictionary
from helpers.training.loop import History, TrainConfig, train


def train_dictionary(
    store,
    coordinates: Coordinates,
    config: TrainConfig,
    *,
    name: str,
    one_step: bool = False,
    updates_factor: int = 0,
    checkpoints: str | Path | None = None,
    made_from: dict | None = None,
    device="cpu",
    accelerator=None,
    training=None,
    kind: str = "",
) -> tuple[Dictionary, History]:
    """Train an SAE on a store's training trajectories, seen in some coordinates.

    `config` is for whole trajectories. With `one_step`, each of the S steps is coded on its own by
    the same weights: k / S active latents a step (whole or not) for equal cost, S · n_latents for
    equal parameters, since its input is S times narrower, and S · dead_after. It is trained for
    `updates_factor` · n_updates, where 0 stands for S, to see as many trajectories. Checkpoints, as
    in `train`, must also agree in the coordinates and in `made_from`. The threshold is the one
    learnt in training; `Dictionary.calibrate` sets another on `held_out`. Other coders than an SAE
    have a `training`, as in `train`, and a `kind`, which tells their checkpoints from its.
    """
    S = coordinates.n_steps if one_step else 1
    config = of_single_steps(config, S, updates_factor)
    share = (0, 1)
    if accelerator is not None:
        device, share = accelerator.device, (accelerator.process_index, accelerator.num_processes)
    coordinates = coordinates.to(device)
    d_in = coordinates.d_in // S

    def batches(start):
        n = config.batch_size // S + 1 if one_step else config.batch_size
        for y in trajectories(store, coordinates, n, config.seed, start, share):
            yield y.reshape(-1, d_in)[: config.batch_size // share[1]]

    record = (made_from or {}) | {"coordinates": coordinates.digest()}
    record |= {"kind": kind} if kind else {}
    where = {"device": device, "checkpoints": checkpoints, "accelerator": accelerator}
    where |= {"training": training}
    coder, history = train(batches, d_in, config, record=record, label=name, **where)
    return Dictionary(name, coordinates, coder), history


def of_single_steps(config: TrainConfig, S: int, updates_factor: int = 0) -> TrainConfig:
    """The settings, given for whole trajectories, of one SAE for S single steps."""
    return replace(
        config,
        n_latents=S * config.n_latents,
        k=config.k / S if config.k % S else config.k // S,
        n_updates=config.n_updates * (updates_factor or S),
        dead_after=config.dead_after * S,
    )


def trajectories(store, coordinates: Coordinates, n: int, seed: int, start=0, share=(0, 1)):
    """Endless batches of n training trajectories in coordinates, (n, S · d), from one on."""
    for h in store.batches("train", n, seed, start, share):
        yield coordinates.residualize(coordinates.standardise(h.to(coordinates.mu.device)))


def held_out(store, coordinates: Coordinates, n: int = 16384, seed: int = 0) -> torch.Tensor:
    """At most n standardised validation trajectories, (n, S, d), at random: for `calibrate`."""
    n = min(n, store.n_images("validation") * store.n_tokens)
    h = next(store.batches("validation", n, seed))
    return coordinates.standardise(h.to(coordinates.mu.device))
