"""Training an SAE on batches: the settings, the loop, and checkpoints from which it goes on."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path

import torch
from tqdm.auto import tqdm

from helpers.checks import in_range, memory, positive, refuse
from helpers.files import check_writable, in_units, load_tensors, save_tensors
from helpers.sae import SAE
from helpers.training.sparse_step import SparseStep

LOG_EVERY = 10  # updates between two entries of the history


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training; a checkpoint made with others is not gone on from."""

    n_latents: int  # width of the dictionary
    k: float  # active latents per input, on average
    n_updates: int  # optimiser steps
    batch_size: int = 1024  # inputs in one update
    learning_rate: float = 1e-3  # Adam's; up over 5 % of the updates, down over the last 20 %
    dead_after: int = 50_000  # inputs without firing after which a latent joins the auxiliary loss
    accumulate: int = 1  # parts of a batch, to save memory; BatchTopK then chooses within each part
    dtype: str = "float32"  # of the encoder's product, the dense one; all else stays float32
    seed: int = 0  # of the initial weights and of the order of the data
    aux_coefficient: float = 1 / 32  # weight of the auxiliary loss

    def __post_init__(self):
        for name in ("n_updates", "dead_after", "accumulate"):
            in_range(name, getattr(self, name), 1)
        positive("learning_rate", self.learning_rate)
        # the variance within a part needs two inputs
        in_range("sae_batch_size", self.batch_size, 2 * self.accumulate)

    def memory(self, d_in: int, n_processes: int = 1) -> int:
        """Bytes: weights, gradient and Adam's two moments; codes, and six copies of the batch."""
        weights = (2 * d_in + 1) * self.n_latents
        rows = self.batch_size // (self.accumulate * n_processes)
        return 4 * (4 * weights + rows * (self.n_latents + 6 * d_in))

    def check_memory(self, d_in: int, device, n_processes: int = 1) -> None:
        """ValueError if the device could not hold what training on inputs of that width takes."""
        need, there = self.memory(d_in, n_processes), memory(device)
        if need > there:
            valid = (
                f"less, as that takes {in_units(need)} of memory, and there are {in_units(there)}"
            )
            refuse("n_latents, sae_batch_size", (self.n_latents, self.batch_size), valid)

    @staticmethod
    def of(parameters: dict) -> TrainConfig:
        """The settings among a notebook's parameters, where `sae_batch_size` is the batch size."""
        named = parameters | {"batch_size": parameters["sae_batch_size"]}
        own = (f.name for f in fields(TrainConfig) if f.name in named)
        return TrainConfig(**{name: named[name] for name in own})


@dataclass
class History:
    """How training went: an entry every `LOG_EVERY` updates, and for the last."""

    step: list[int] = field(default_factory=list)
    fvu: list[float] = field(default_factory=list)  # of the batch, by its BatchTopK codes
    l0: list[float] = field(default_factory=list)  # of the batch, by the threshold
    alive: list[float] = field(default_factory=list)  # share of latents that are not dead
    seconds: float = 0.0


def train(
    batches,
    d_in: int,
    config: TrainConfig,
    *,
    device="cpu",
    checkpoints: str | Path | None = None,
    record: dict | None = None,
    accelerator=None,
    save_every: int = 500,
    label: str = "SAE",
    training=None,
) -> tuple[torch.nn.Module, History]:
    """Train an SAE with Adam on `batches` (batch, d_in), or on `batches(n)`, which leaves out n.

    In the folder `checkpoints`, the whole state is saved every `save_every` updates, in a file
    named by the settings and by `record`, such as the data's fingerprint. From that file training
    goes on, to the weights that it would have had without stopping, bit for bit on a CPU. With an
    `accelerate.Accelerator`, each process gives its part of every batch, and the largest codes are
    chosen among all. `training` (d_in, config, device, accelerator) -> `Training` is for another
    coder or loss. FloatingPointError names an update whose batch or loss is not finite.
    """
    # MPS has no sparse products
    device = "cpu" if str(device).startswith("mps") else device
    device = accelerator.device if accelerator else device
    config.check_memory(d_in, device, accelerator.num_processes if accelerator else 1)
    training = (training or Training)(d_in, config, device, accelerator)
    settings = (record or {}) | {"d_in": d_in} | asdict(config)
    path = checkpoints and _checkpoint(Path(checkpoints), label, settings)
    if path and path.exists():
        training.resume(path)
    done, n_updates, history = training.done, config.n_updates, training.history
    if path and done < n_updates:
        check_writable(path.parent, path.name, name="checkpoints")
    main = accelerator is None or accelerator.is_main_process
    quiet = not main or done == n_updates or None  # None: shown in notebooks and terminals
    start = time.perf_counter() - history.seconds
    stream = _from(batches, done, n_updates)
    bar = tqdm(range(done, n_updates), label, n_updates, initial=done, mininterval=1, disable=quiet)
    for _ in bar:
        try:
            training.update(next(stream))
        except FloatingPointError as error:
            saved = f"; {path} is saved" if path and path.exists() else ""
            raise FloatingPointError(f"{label}, {error}{saved}") from None
        history.seconds = time.perf_counter() - start
        if path and main and (training.done % save_every == 0 or training.done == n_updates):
            training.save(path, settings)
        bar.set_postfix_str(f"fvu {history.fvu[-1]:.3f}, alive {history.alive[-1]:.0%}", False)
    training.coder.zero_grad()  # frees the gradients
    return training.coder.cpu().eval(), history


def _checkpoint(folder: Path, label: str, settings: dict) -> Path:
    """The file of a training's checkpoint, named by its label and a hash of its settings."""
    hashed = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return folder / f"{label.replace(' ', '_')}-{hashed[:12]}.safetensors"


def _from(batches, start: int, n_updates: int):
    """Batches from the one numbered `start` on; ValueError where they end before n_updates."""
    yield from batches(start) if callable(batches) else islice(batches, start, None)
    valid = "at most the number of batches; give more, or an endless iterator"
    refuse("n_updates", n_updates, valid)


class Training:
    """A coder, and everything else that changes from update to update.

    The coder is an SAE, or has one as `sae`, which then reads rows narrower than the batch's.
    """

    def __init__(
        self, d_in: int, config: TrainConfig, device, accelerator=None, coder=None, step=SparseStep
    ):
        self.config = config
        self.coder = coder or SAE(d_in, config.n_latents, config.k, config.seed)
        self.coder.to(device)
        self.sae = getattr(self.coder, "sae", self.coder)
        self.step = step(self.coder, config, accelerator)
        self.since_fired = torch.zeros(config.n_latents, device=device)  # inputs
        self.done, self.history = 0, History()

    def update(self, y: torch.Tensor) -> None:
        """One optimiser step on a batch (n, d_in)."""
        c, sae, step, first = self.config, self.sae, self.step, self.done == 0
        y = y.to(sae.W_dec.device)
        rows = y.reshape(-1, sae.d_in)
        n = step.sum(torch.tensor(float(len(rows)), device=y.device))
        if first:
            sae.b_dec.data = step.sum(rows.sum(0)) / n
        if len(y) < 2 * c.accumulate:
            refuse("sae_batch_size", len(y), f"at least {2 * c.accumulate}, two inputs a part")
        dead = (self.since_fired >= c.dead_after).nonzero().flatten()
        log = self.done % LOG_EVERY == 0 or self.done == c.n_updates - 1
        chunks = y.chunk(c.accumulate)
        parts = [step(part, dead, 1 / len(chunks), count=log) for part in chunks]
        fvu = sum(p.fvu for p in parts) / len(parts)
        if not torch.isfinite(fvu):
            why = "the batch holds NaN or infinity; look at the recorded activations"
            if torch.isfinite(y).all():
                why = f"the loss is {fvu.item()}; lower learning_rate, now {c.learning_rate}"
            raise FloatingPointError(f"update {self.done}: {why}")
        step.update(c.learning_rate * _rate(self.done, c.n_updates))
        self.since_fired += n
        self.since_fired[step.sum(sum(p.fired for p in parts)) > 0] = 0
        for part in parts:  # the threshold follows the smallest kept code, in a running mean
            sae.threshold.lerp_(part.smallest, 1.0 if first else 0.02)
        if log:
            self.history.step.append(self.done)
            self.history.fvu.append(fvu.item())
            self.history.l0.append(sum(p.active for p in parts).item() / len(rows))
            self.history.alive.append(1 - len(dead) / sae.n_latents)
        self.done += 1

    def save(self, path: Path, settings: dict) -> None:
        """Write the whole state, or the weights alone once training is finished."""
        tensors = dict(self.coder.state_dict())
        if self.done < self.config.n_updates:
            tensors["since_fired"] = self.since_fired
            for i, p in enumerate(self.step.parameters):
                state = self.step.optimiser.state[p]
                tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        record = {"settings": settings, "done": self.done, "history": asdict(self.history)}
        save_tensors(path, tensors, record)

    def resume(self, path: Path) -> None:
        """Put a saved state back; ValueError if the file holds something else."""
        tensors, record = load_tensors(path)
        try:
            self.coder.load_state_dict({name: tensors[name] for name in self.coder.state_dict()})
            self.done, self.history = record["done"], History(**record["history"])
        except (KeyError, RuntimeError, TypeError):
            raise ValueError(
                f"{path} is no checkpoint of this training; delete it to train anew"
            ) from None
        if self.done < self.config.n_updates:
            self.since_fired.copy_(tensors["since_fired"])
            for i, p in enumerate(self.step.parameters):
                adam = {n: v.to(p.device) for n, v in tensors.items() if n.startswith(f"adam.{i}.")}
                self.step.optimiser.state[p] = {n.split(".")[-1]: v for n, v in adam.items()}


def _rate(step: int, n: int) -> float:
    """The learning rate's share at an update: up over 5 % of n, down over the last 20 %."""
    return min(1.0, (step + 1) / (0.05 * n + 1), max(0.01, (n - step) / (0.2 * n)))
