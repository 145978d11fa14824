"""What this project costs, as ratios against what one would use otherwise.

    python -m tests.benchmarks             # print the table; figures into figures/bench/bench.json
    python -m tests.benchmarks --readme    # and write it between the markers in figures/README.md
    python -m tests.benchmarks --quick     # at tiny sizes, to see that it runs; --only sae for some

Both sides of a line take turns in one run, never at the same time; a ratio is the median over the
turns, given with its range. A side's memory is the peak of a process that does nothing else, less
what its imports take, measured apart from the timings. sparsify (eai-sparsify, tests/peers.txt)
runs in a virtual environment of its own, `.venv-peers`, as a process that trains one block of
updates each time it is asked to; without that environment its line says so. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".venv-peers" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

SIZES = {
    "recording": {
        "images": 4,
        "num_inference_steps": 25,
        "steps": [0, 6, 12, 18, 24],
        "rounds": 12,
    },
    "ridge": {"n": 100_000, "d": 640, "n_steps": 5, "rounds": 3},
    "strengths": {"n": 20_000, "d": 320, "n_steps": 5, "rounds": 3},
    "sae": {
        **{"d": 640, "m": 2560, "k": 16, "batch": 1024, "features": 2560, "n_batches": 48},
        **{"rounds": 10, "updates": 20, "learning_rate": 4e-3},
    },
    "wide_sae": {
        **{"d": 6400, "m": 8192, "k": 32, "batch": 512, "features": 512, "n_batches": 16},
        **{"rounds": 8, "updates": 4, "learning_rate": 2e-3},
    },
    "store": {
        **{"images": 1024, "n_steps": 5, "grid": 16, "channels": 640, "per_shard": 16},
        **{"batch": 1024, "buffer": 2**28, "rounds": 3},
    },
}
TINY_SAE = {"n_batches": 8, "rounds": 3, "updates": 4, "k": 4}
QUICK = {
    "recording": {"images": 1, "num_inference_steps": 3, "steps": [0, 2], "rounds": 2},
    "ridge": {"n": 4_000, "d": 32, "rounds": 2},
    "strengths": {"n": 4_000, "d": 32, "rounds": 2},
    "sae": TINY_SAE | {"d": 64, "m": 128, "batch": 128, "features": 128},
    "wide_sae": TINY_SAE | {"d": 128, "m": 256, "batch": 64, "features": 64},
    "store": {
        **{"images": 32, "grid": 8, "channels": 32, "per_shard": 4},
        **{"batch": 64, "buffer": 2**18, "rounds": 2},
    },
}
LINES = tuple(SIZES)
TORCH = torch.__version__.split("+")[0]


@dataclass
class Line:
    """One row of the table: a ratio, its aim, and the peak memory of each side in bytes."""

    what: str
    pairs: list[float]  # the ratio of each turn
    aim: str = ""  # such as "≥ 1.5"; empty for none
    seconds: dict[str, float] = field(default_factory=dict)  # median of each side's turns
    memory: dict[str, int] = field(default_factory=dict)
    note: str = ""
    also: dict = field(default_factory=dict)  # further figures, for the JSON file

    @property
    def ratio(self) -> float:
        return float(np.median(self.pairs)) if self.pairs else float("nan")

    @property
    def met(self) -> bool | None:
        if not self.aim or not self.pairs:
            return None
        sign, bound = self.aim.split()
        return self.ratio <= float(bound) if sign == "≤" else self.ratio >= float(bound)

    def row(self) -> str:
        measured = "not measured"
        if self.pairs:
            measured = f"{self.ratio:.3f} [{min(self.pairs):.3f}, {max(self.pairs):.3f}]"
        met = {True: "met", False: "not met", None: ""}[self.met]
        memory = ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in self.memory.items())
        return f"| {self.what} | {measured} | {self.aim} | {met} | {memory} | {self.note} |"


# --- taking turns ---


def seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(sides: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round.

    The first round is not counted, and every second one goes the other way round.
    """
    times = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            time.sleep(0.05)  # threads of the side before stop spinning
            times[name].append(seconds_of(sides[name]))
    return {name: t[1:] for name, t in times.items()}


def ratios(times: dict, numerator: str, denominator: str) -> list[float]:
    return [a / b for a, b in zip(times[numerator], times[denominator])]


def medians(times: dict) -> dict[str, float]:
    return {name: float(np.median(t)) for name, t in times.items()}


# --- memory ---


def high_water() -> int:
    """The most memory this process has held, in bytes."""
    try:  # a child's ru_maxrss begins with its parent's on Linux, this does not
        return 1024 * int(
            next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
        )
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


def peak_of(side: str, size: dict, threads: int) -> int:
    """Peak memory of one of `SIDES`, less that of its imports, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        json.dumps(size),
        "--threads",
        str(threads),
    ]
    return int(
        subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=ROOT
        ).stdout.split()[-1]
    )


# --- recording ---


def recording_sides(size: dict) -> dict:
    from helpers.pipelines.generate import generate
    from helpers.run.folder import load_model
    from helpers.trajectories import record

    pipe, n = load_model("demo", "cpu"), size["images"]
    circle = "a large {} solid circle at the left on a white background"
    prompts = [circle.format("red" if i % 2 else "blue") for i in range(n)]
    sampling = {"num_inference_steps": size["num_inference_steps"], "guidance_scale": 3.0}
    where = ("up_blocks.1.attentions.1", size["steps"])
    return {
        "recorded": lambda: record(pipe, prompts, range(n), *where, **sampling)[0],
        "plain": lambda: generate(pipe, prompts, range(n), **sampling),
    }


def recording(size: dict, memory) -> list[Line]:
    sides = recording_sides(size)
    same = np.array_equal(sides["recorded"](), sides["plain"]())
    times = take_turns(sides, size["rounds"])
    line = Line(
        "time with recording / plain pipeline",
        ratios(times, "recorded", "plain"),
        "≤ 1.02",
        medians(times),
    )
    line.memory = {name: memory(f"recording {name}") for name in sides}
    line.note = (
        f"demo model, {size['images']} images, {size['num_inference_steps']} steps, "
        f"{len(size['steps'])} kept, all tokens; "
        f"images {'the same to the last bit' if same else 'DIFFER'}"
    )
    return [line]


# --- ridge ---


def activations(n: int, d: int, n_steps: int, seed: int = 0):
    """Made-up activations of n trajectories, float32 (image, step, 250 tokens, d).

    They come in shards of 16 images at most.
    """
    g = torch.Generator().manual_seed(seed)
    step = torch.randn(d, d, generator=torch.Generator().manual_seed(7)) / d**0.5
    spread, mean = torch.logspace(0.5, -1, d), 3.0
    for first in range(0, n, 4000):
        x = [torch.randn(min(4000, n - first), d, generator=g)]
        for _ in range(n_steps - 1):
            x.append(0.8 * x[-1] @ step + 0.6 * torch.randn(x[0].shape, generator=g))
        yield (torch.stack(x) * spread + mean).unflatten(1, (-1, 250)).transpose(0, 1)


def by_moments(shards, held=None, strengths=(1e-3,)) -> np.ndarray:
    """Our way: one pass of sums over each split, then the predictors.

    Returns their coefficients before rounding, (step, d, d).
    """
    from helpers import predictors
    from helpers.moments import accumulate

    train = accumulate(shards)
    validation = accumulate(held, train.shift) if held is not None else train
    return predictors.fit(train, validation, strengths, dtype=torch.float64).A[1:].numpy()


def by_sklearn(shards, held=None, strengths=(1e-3,)) -> np.ndarray:
    """The same with scikit-learn: one Ridge per pair and strength.

    All activations are in memory, standardised in float64.
    """
    from sklearn.linear_model import Ridge

    h = torch.cat([s.permute(1, 0, 2, 3).flatten(1, 2) for s in shards], dim=1)
    held = (
        None
        if held is None
        else torch.cat([s.permute(1, 0, 2, 3).flatten(1, 2) for s in held], dim=1)
    )

    def standardised(s):
        x = h[s].double().numpy()
        mu = x.mean(0)
        x -= mu
        scale = np.sqrt(np.einsum("nd,nd->", x, x) / x.size)
        x /= scale
        return x, None if held is None else (held[s].double().numpy() - mu) / scale

    A, (x, x_held) = [], standardised(0)
    for s in range(1, len(h)):
        y, y_held = standardised(s)
        mean_eigenvalue = np.einsum("nd,nd->", x, x) / x.shape[1]
        fits = [
            Ridge(alpha=strength * mean_eigenvalue, fit_intercept=False).fit(x, y)
            for strength in strengths
        ]
        best = (
            0
            if held is None
            else np.argmin([np.square(y_held - fit.predict(x_held)).sum() for fit in fits])
        )
        A.append(fits[best].coef_.T)
        x, x_held = y, y_held
    return np.stack(A)


def agreement(apart: float) -> str:
    met = "met" if apart <= 1e-8 else "not met"
    return f"coefficients {apart:.0e} apart at most (aim ≤ 1e-08: {met})"


def ridge(size: dict, memory) -> list[Line]:
    n, d, S = size["n"], size["d"], size["n_steps"]
    shards = list(activations(n, d, S))
    apart = float(np.abs(by_moments(shards) - by_sklearn(shards)).max())
    times = take_turns(
        {"ours": lambda: by_moments(shards), "scikit-learn": lambda: by_sklearn(shards)},
        size["rounds"],
    )
    pairs = ratios(times, "scikit-learn", "ours")
    line = Line("speed of ridge, one strength / scikit-learn's Ridge", pairs, "≥ 5", medians(times))
    line.memory = {
        f"ours, n = {n // 1000}k": memory("ridge ours"),
        f"ours, n = {4 * n // 1000}k": memory("ridge ours", n=4 * n),
        f"scikit-learn, n = {n // 1000}k": memory("ridge scikit-learn"),
    }
    line.note = (
        f"n = {n // 1000}k trajectories of {S} steps, d = {d}, float64, "
        f"both sides bound by the same products; {agreement(apart)}"
    )
    line.also = {"largest_difference": apart}
    return [line]


def strengths(size: dict, memory) -> list[Line]:
    from helpers.predictors import STRENGTHS

    n, d, S = size["n"], size["d"], size["n_steps"]
    shards, held = list(activations(n, d, S)), list(activations(n // 4, d, S, seed=1))
    sides = {
        "ours": lambda: by_moments(shards, held, STRENGTHS),
        "scikit-learn": lambda: by_sklearn(shards, held, STRENGTHS),
    }
    apart = float(np.abs(sides["ours"]() - sides["scikit-learn"]()).max())
    times = take_turns(sides, size["rounds"])
    best = f"the best of {len(STRENGTHS)} strengths on held-out data"
    what = f"speed of ridge, {best} / scikit-learn's Ridge"
    line = Line(what, ratios(times, "scikit-learn", "ours"), "", medians(times))
    line.memory = {name: memory(f"strengths {name}") for name in sides}
    line.note = (
        f"{n // 1000}k trajectories of {S} steps and {n // 4000}k held out, d = {d}, float64; "
        f"{agreement(apart)}"
    )
    line.also = {"largest_difference": apart}
    return [line]


# --- SAE ---


def examples(size: dict, seed: int) -> torch.Tensor:
    """A batch of made-up data with a dictionary behind it, (batch, d).

    Each input is k of its features, of exponential size, a mean, and noise.
    """
    d, k, n = size["d"], size["k"], size["batch"]
    directions = torch.nn.functional.normalize(
        torch.randn(size["features"], d, generator=torch.Generator().manual_seed(7)), dim=1
    )
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(len(directions), (n, k), generator=g)
    sizes = torch.empty(n, k).exponential_(generator=g)
    y = torch.nn.functional.embedding_bag(which, directions, per_sample_weights=sizes, mode="sum")
    return y + 0.02 * torch.randn(n, d, generator=g) + directions[0]


def batches_of(size: dict) -> list[torch.Tensor]:
    return [examples(size, seed) for seed in range(size["n_batches"])]


def held_out(size: dict) -> torch.Tensor:
    return examples(size, seed=10_000)


class Peer:
    """sparsify's trainer in a process of its own, which trains a block each time it is asked."""

    def __init__(self, size: dict, threads: int):
        self.said = tempfile.TemporaryFile("w+")
        command = [str(PEER), __file__, "--peer", json.dumps(size), "--threads", str(threads)]
        environment = os.environ | {
            "SPARSIFY_DISABLE_TRITON": "1"
        }  # its Triton kernels are for GPUs
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        self.process = subprocess.Popen(command, **pipes, text=True, env=environment)

    def ask(self, what: str):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.said.seek(0)
            raise RuntimeError(f"sparsify's process ended: {self.said.read()[-2000:]}")
        return json.loads(answer)

    def block(self) -> float:
        return self.ask("block")

    def end(self) -> dict:
        answer = self.ask("end")
        self.process.wait()
        return answer


def train_peer(size: dict) -> None:
    """In `.venv-peers`: sparsify's own Trainer with its own defaults, on our batches.

    It trains a block for each line on standard input. It wants a language model whose hookpoint it
    listens to; one that hands over our batches takes its place.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = sys.stderr
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    imports = high_water()
    batches, d = batches_of(size), size["d"]

    class Done(Exception):
        pass

    class Model(torch.nn.Module):
        dummy_inputs, device = {"ids": None}, torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.layer, self.calls, self.start = torch.nn.Identity(), 0, None

        @property
        def base_model(self):
            return self

        def forward(self, ids):
            if ids is None:  # asked for the width
                return self.layer(torch.zeros(1, 1, d))
            if self.calls % size["updates"] == 0:  # all updates asked for so far are done
                if self.start is not None:
                    print(json.dumps(time.perf_counter() - self.start), file=answers)
                if sys.stdin.readline().strip() != "block":
                    raise Done
                self.start = time.perf_counter()
            self.calls += 1
            return self.layer(batches[(self.calls - 1) % len(batches)][None])

    class Dataset:
        def __len__(self):
            return 10**6

        def __getitem__(self, i):
            return {"input_ids": torch.zeros(size["batch"], dtype=torch.long)}

    coder = SparseCoderConfig(num_latents=size["m"], k=size["k"])
    config = TrainConfig(
        sae=coder, batch_size=1, hookpoints=["layer"], save_every=10**9, log_to_wandb=False
    )
    trainer = Trainer(config, Dataset(), Model())
    try:
        trainer.fit()
    except Done:
        pass
    peak = high_water() - imports
    trainer.optimizers[0].eval()  # the weights that it would save
    with torch.no_grad():
        fvu = trainer.saes["layer"](held_out(size)).fvu.item()
    print(json.dumps({"fvu": fvu, "peak": peak, "optimiser": config.optimizer}), file=answers)


def train_ours(size: dict, peer: Peer | None, times: dict):
    """One call of `train`, which waits after each block of updates.

    Meanwhile the product alone and the peer do theirs.
    """
    from helpers.sae import SAE
    from helpers.training.loop import TrainConfig, train

    d, m, k, rounds, updates = (size[name] for name in ("d", "m", "k", "rounds", "updates"))
    batches = batches_of(size)
    weights = SAE(d, m, k).W_enc.detach()  # laid out in memory as ours are
    out = torch.empty(size["batch"], m)

    def products():
        for y in itertools.islice(itertools.cycle(batches), updates):
            torch.mm(y, weights, out=out)

    def stream():  # when a batch is asked for, the update with the one before it is done
        cycled = itertools.cycle(batches)
        for _ in range(rounds + 1):
            time.sleep(0.05)
            start = time.perf_counter()
            yield from itertools.islice(cycled, updates)
            times["ours"].append(time.perf_counter() - start)
            times["product"].append(seconds_of(products))
            if peer:
                time.sleep(0.05)
                times["sparsify"].append(peer.block())
        yield next(cycled)

    n_updates, rate = (rounds + 1) * updates + 1, size["learning_rate"]
    return train(stream(), d, TrainConfig(m, k, n_updates, size["batch"], learning_rate=rate))


def sae_lines(size: dict, memory, threads: int, side: str) -> list[Line]:
    peer = Peer(size, threads) if PEER.exists() else None
    times = {"ours": [], "product": []} | ({"sparsify": []} if peer else {})
    model, history = train_ours(size, peer, times)
    times = {name: t[1:] for name, t in times.items()}  # the first turn warms up
    y = held_out(size)
    with torch.no_grad():
        z = model.encode(y)
        fvu = ((y - model.decode(z)).pow(2).sum() / (y - y.mean(0)).pow(2).sum()).item()
    active, alive = (z > 0).sum().item() / len(y), history.alive[-1]
    rate = float(size["updates"] * size["batch"] / np.median(times["ours"]))
    shape = f"d = {size['d']}, m = {size['m']}, k = {size['k']}, batch {size['batch']}, float32"
    share = Line(
        "examples/s of SAE training / of the encoder's product alone",
        ratios(times, "product", "ours"),
        "≥ 0.45",
    )
    share.seconds, share.memory = medians(times), {"ours": memory(f"{side} ours")}
    share.note = f"{shape}: {rate:.0f} examples/s, {100 * alive:.0f} % of latents alive"
    share.also = {"examples_per_second": rate, "alive": alive}
    against = Line("examples/s of SAE training / of sparsify", [], "≥ 1.5")
    if peer is None:
        against.note = f"{shape}; .venv-peers is not there: `make bench` creates it"
        return [share, against]
    other, alone = peer.end(), Peer(size, threads)
    alone.block()
    against.pairs, against.seconds = ratios(times, "sparsify", "ours"), medians(times)
    against.memory = share.memory | {"sparsify": alone.end()["peak"]}
    against.note = (
        f"{shape}; held-out FVU after {(size['rounds'] + 1) * size['updates']} updates: "
        f"ours {fvu:.3f} with {active:.1f} latents an input, "
        f"sparsify ({other['optimiser']}, its default) {other['fvu']:.3f} with {size['k']}"
    )
    against.also = {
        "fvu": fvu,
        "active": active,
        "sparsify_fvu": other["fvu"],
        "sparsify_optimiser": other["optimiser"],
    }
    return [share, against]


# --- store ---


def make_store(folder: Path, size: dict) -> None:
    """A made-up collection, of training images alone, as `collect` would leave it."""
    from helpers.files import digest, save_json, save_tensors

    n, S, side, channels, per_shard = (
        size[name] for name in ("images", "n_steps", "grid", "channels", "per_shard")
    )
    h = torch.randn(
        per_shard, S, side * side, channels, generator=torch.Generator().manual_seed(0)
    ).half()
    images, shards = [list(range(i, min(i + per_shard, n))) for i in range(0, n, per_shard)], {}
    for i, members in enumerate(images):
        path = folder / f"shard-{i:05d}.safetensors"
        save_tensors(path, {"h": h[: len(members)] + i})
        shards[path.name] = digest(path)
    manifest = {
        "prompts": [""] * n,
        "seeds": list(range(n)),
        "split": ["train"] * n,
        "sampling": {},
        **{"hookpoint": "layer", "signal": "output", "branch": "conditional"},
        "batch_size": per_shard,
        "grid": [side, side],
        "steps": list(range(S)),
        "timesteps": [float(S - s) for s in range(S)],
        "channels": channels,
        "dtype": "float16",
        "tokens_per_image": 0,
        "train_images": False,
        "shards": shards,
        "images_of_shard": images,
    }
    save_json(folder / "manifest.json", manifest)


def read_plainly(folder: Path) -> None:
    buffer = bytearray(2**23)
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def from_disk(folder: Path) -> None:
    """Have the page cache forget a folder's files, so that they are read from the disk."""
    if hasattr(os, "posix_fadvise"):  # on Linux
        for path in folder.glob("*.safetensors"):
            with open(path, "rb") as f:
                os.fsync(f.fileno())  # what is not on the disk yet cannot be forgotten
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def epochs(folder: Path, size: dict):
    """The batches of a store that was not read yet: one epoch each time it is asked for one."""
    from helpers.store.read import Store

    batches = Store(folder).batches("train", size["batch"], buffer_bytes=size["buffer"])
    per_epoch = size["images"] * size["grid"] ** 2 // size["batch"]
    while True:
        for batch in itertools.islice(batches, per_epoch):
            del batch
        yield


def store(size: dict, memory) -> list[Line]:
    times = {"plain": [], "first": [], "later": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder, size)
        n_bytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        for _ in range(size["rounds"] + 1):
            reading = epochs(folder, size)
            for side, work in (
                ("plain", lambda: read_plainly(folder)),
                ("first", reading.__next__),
                ("later", reading.__next__),
            ):
                from_disk(folder)
                times[side].append(seconds_of(work))
            reading.close()  # waits for what is read ahead
        peaks = {
            "batches": memory("store batches", folder=name),
            "plain": memory("store plain", folder=name),
        }
    times = {name: t[1:] for name, t in times.items()}
    rate = {name: n_bytes / t / 1e9 for name, t in medians(times).items()}
    lines = []
    for name, said in (
        ("first", "first pass, every shard's SHA-256 checked"),
        ("later", "later passes"),
    ):
        what = f"bytes/s of shuffled batches from the store / of reading its files: {said}"
        line = Line(what, ratios(times, "plain", name), "", medians(times), peaks)
        line.note = (
            f"{n_bytes / 1e9:.1f} GB of float16, put out of the page cache before each pass, "
            f"buffers of {size['buffer'] / 1e6:.0f} MB: "
            f"{rate[name]:.2f} against {rate['plain']:.2f} GB/s"
        )
        line.also = {
            "bytes": n_bytes,
            "gigabytes_per_second": rate[name],
            "plain_gigabytes_per_second": rate["plain"],
        }
        lines.append(line)
    return lines


# --- one side alone, for its memory ---


def ours_alone(size: dict) -> None:
    from helpers.training.loop import TrainConfig, train

    config = TrainConfig(size["m"], size["k"], size["updates"], size["batch"])
    train(itertools.cycle(batches_of(size)), size["d"], config)


def ridge_alone(size: dict, fit) -> None:
    fit(activations(size["n"], size["d"], size["n_steps"]))


def strengths_alone(size: dict, fit) -> None:
    from helpers.predictors import STRENGTHS

    n, shape = size["n"], (size["d"], size["n_steps"])
    fit(activations(n, *shape), activations(n // 4, *shape, seed=1), STRENGTHS)


SIDES = {
    "recording recorded": lambda size: recording_sides(size)["recorded"](),
    "recording plain": lambda size: recording_sides(size)["plain"](),
    "ridge ours": lambda size: ridge_alone(size, by_moments),
    "ridge scikit-learn": lambda size: ridge_alone(size, by_sklearn),
    "strengths ours": lambda size: strengths_alone(size, by_moments),
    "strengths scikit-learn": lambda size: strengths_alone(size, by_sklearn),
    "sae ours": ours_alone,
    "wide_sae ours": ours_alone,
    "store batches": lambda size: next(epochs(Path(size["folder"]), size)),
    "store plain": lambda size: read_plainly(Path(size["folder"])),
}


def measure_alone(side: str, size: dict) -> None:
    """Print the peak memory of one side, less that of the imports."""
    import sklearn.linear_model  # noqa: F401

    if side.startswith("recording"):
        from diffusers import StableDiffusionPipeline  # noqa: F401
    imports = high_water()
    SIDES[side](size)
    print(high_water() - imports)


# --- the table ---


def processor() -> str:
    try:
        return next(
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(lines: list[Line], threads: int) -> str:
    head = [
        f"Measured by `make bench` on {processor()}, {threads} threads, torch {TORCH}. "
        "Both sides take turns in one run; a ratio is the median over the turns, with its range. "
        "Memory is the peak of a process that does this side alone, less that of its imports.",
        "",
        "| | ratio | aim | | peak memory | |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(head + [line.row() for line in lines])


def measure(name: str, size: dict, threads: int) -> list[Line]:
    def memory(side, **changes):
        return peak_of(side, size | changes, threads)

    if name in ("sae", "wide_sae"):
        return sae_lines(size, memory, threads, name)
    return {"recording": recording, "ridge": ridge, "strengths": strengths, "store": store}[name](
        size, memory
    )


def limit_threads(threads: int) -> None:
    """For torch and, where they are installed, for the libraries under numpy and scipy."""
    torch.set_num_threads(threads)
    try:
        import scipy.linalg  # noqa: F401
        from threadpoolctl import threadpool_limits
    except ImportError:  # in .venv-peers
        return
    threadpool_limits(threads)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="What this project costs, as ratios."
    )
    parser.add_argument("--readme", action="store_true", help="write it into figures/README.md")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to see that it runs; the figures mean nothing",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=LINES,
        default=LINES,
        metavar="LINE",
        help=f"some of {', '.join(LINES)}",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    limit_threads(arguments.threads)
    if arguments.peer:
        return train_peer(json.loads(arguments.peer))
    if arguments.side:
        return measure_alone(arguments.side[0], json.loads(arguments.side[1]))
    whole = not arguments.quick and set(arguments.only) == set(LINES)
    if arguments.readme and not whole:
        parser.error("--readme takes all lines at their full sizes, so neither --quick nor --only")
    from helpers.files import save_json
    from helpers.run.report import put_between

    lines, start = [], time.perf_counter()
    for name in arguments.only:
        begun = time.perf_counter()
        lines += measure(
            name, SIZES[name] | (QUICK[name] if arguments.quick else {}), arguments.threads
        )
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    text = table(lines, arguments.threads)
    print(text)
    print(f"finished in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if whole:
        about = {"processor": processor(), "threads": arguments.threads, "torch": TORCH}
        rows = [
            asdict(line) | {"ratio": line.ratio if line.pairs else None, "met": line.met}
            for line in lines
        ]
        save_json(ROOT / "figures" / "bench" / "bench.json", about | {"lines": rows})
    if arguments.readme:
        put_between(ROOT / "figures" / "README.md", "bench", text)


if __name__ == "__main__":
    main()
