"""Training other coders than one BatchTopK SAE of whole trajectories, each by one call.

train_…(store, coordinates, config, *, name, **where) -> (Dictionary, History): `config` is for
whole trajectories, `where` the device, checkpoints and made_from of `train_dictionary`. All spend k
numbers a trajectory and n_latents · S · d parameters on decoding, and all but ITDA on encoding.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np

from helpers.coders.conditioned import Conditioned
from helpers.coders.itda import Growing
from helpers.coders.per_step import PerStep
from helpers.dictionary import Dictionary
from helpers.sae import SAE
from helpers.training.dense_step import DenseStep
from helpers.training.dictionaries import of_single_steps, train_dictionary, trajectories
from helpers.training.loop import History, TrainConfig, Training, train

PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of a Matryoshka dictionary, shares of its width


def train_per_step(
    store, coordinates, config: TrainConfig, *, name, device="cpu", checkpoints=None, made_from=None
) -> tuple[Dictionary, History]:
    """S SAEs of n_latents each, each trained on its own, k / S active (whole or not), n_updates.

    The history has means over steps of FVU and share alive, and the sums of L0 and of seconds.
    """
    coordinates = coordinates.to(device)
    S, d = coordinates.n_steps, coordinates.channels
    config = replace(config, k=of_single_steps(config, S).k)
    saes, histories = [], []
    for s in range(S):

        def batches(start, s=s):
            for y in trajectories(store, coordinates, config.batch_size, config.seed, start):
                yield y[:, s * d : (s + 1) * d].contiguous()

        record = (made_from or {}) | {"coordinates": coordinates.digest(), "step": s}
        where = {"device": device, "checkpoints": checkpoints, "record": record}
        sae, history = train(batches, d, config, label=f"{name} {s}", **where)
        saes.append(sae)
        histories.append(history)
    fvu, l0, alive = (np.array([getattr(h, n) for h in histories]) for n in ("fvu", "l0", "alive"))
    values = (v.tolist() for v in (fvu.mean(0), l0.sum(0), alive.mean(0)))
    history = History(histories[0].step, *values, sum(h.seconds for h in histories))
    return Dictionary(name, coordinates, PerStep(saes)), history


def train_conditioned(
    store, coordinates, config: TrainConfig, *, name, updates_factor: int = 0, **where
) -> tuple[Dictionary, History]:
    """`Conditioned`, with the loss, width, k and updates of `train_dictionary`'s one-step SAE."""
    S = coordinates.n_steps
    config = of_single_steps(config, S, updates_factor)
    sae = SAE(coordinates.channels, config.n_latents, config.k, config.seed)
    # a batch of trajectories gives S times as many rows
    config = replace(config, batch_size=max(2 * config.accumulate, -(-config.batch_size // S)))
    training = partial(Training, coder=Conditioned(S, sae), step=DenseStep)
    where |= {"training": training, "kind": "conditioned"}
    return train_dictionary(store, coordinates, config, name=name, **where)


def train_matryoshka(
    store, coordinates, config: TrainConfig, *, name, **where
) -> tuple[Dictionary, History]:
    """Matryoshka BatchTopK (Bussmann et al. 2025, arXiv:2503.17547), an `SAE` of trajectories.

    The k largest codes of the batch are chosen among all latents. The loss is the mean, with equal
    weights, of the FVUs of the five reconstructions by the first n/16, n/8, n/4, n/2 and n latents
    (each with b_dec), + aux_coefficient · the auxiliary loss on what all together leave over. The
    history's FVU is that of all latents.
    """
    training = partial(Training, step=partial(DenseStep, prefixes=PREFIXES))
    where |= {"training": training, "kind": "matryoshka"}
    return train_dictionary(store, coordinates, config, name=name, **where)


def train_itda(
    store, coordinates, config: TrainConfig, *, name, tau: float = 0.1, **where
) -> tuple[Dictionary, History]:
    """ITDA: n_latents atoms, collected from trajectories, evenly over n_updates batches.

    An input joins if the share of its variance that its code leaves unexplained is above `tau`:
    not itself, but what is left of it, divided by its norm (as the authors do for Flux; the paper
    adds the input). A batch has 32 inputs per atom that is to join, and at most batch_size. Where
    too few inputs are above `tau`, the last atoms stay empty; `History.alive` is the share filled.
    b_dec is the first batch's mean. k is rounded to a whole number.
    """
    n = min(config.batch_size, 32 * math.ceil(config.n_latents / config.n_updates))
    where |= {"training": partial(Growing, tau=tau), "kind": f"itda, tau {tau}"}
    return train_dictionary(store, coordinates, replace(config, batch_size=n), name=name, **where)
