"""What a run will take before it is begun: bytes on disk, arithmetic, hours, memory.

    python -m helpers.run.estimate sd15 --tflops 60

Sizes are exact: they are read off one call of the denoiser for one image, on whatever device is
there. Hours follow from the arithmetic counted in that call and the rate that `--tflops` says the
GPU sustains, which is a half to a third of what its maker prints. GPU memory is that of weights and
denoiser; decoding a batch of pictures may take more.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from helpers.checks import choose_dtype, positive, refuse
from helpers.files import in_units
from helpers.pipelines.loading import denoiser_of
from helpers.run.folder import load_model
from helpers.run.jobs import sampling_of, taps_of
from helpers.run.parameters import parameters_for
from helpers.store.plan import SPLITS, image_bytes
from helpers.trajectories import bytes_per_image, hookpoints, kept_steps, shapes


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of living tensors that were made while the mode was on.

    `peak` is the most at once. Weights and inputs were there before; views of them take nothing.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._count((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._count(out, made=True)
        return out

    def _count(self, tree, made: bool):
        for t in tree_leaves(tree):
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            if storage._cdata not in self.known:
                size = storage.nbytes() if made else 0
                self.known.add(storage._cdata)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key, size):
        self.known.discard(key)
        self.alive -= size


def one_call(pipe, prompt: str, taps, **sampling) -> tuple[dict, float, int]:
    """The denoiser's first call for one image: shapes at the taps, operations, peak bytes."""
    flops, peak = FlopCounterMode(display=False), PeakMemory()
    modes = (peak, flops)
    denoiser = denoiser_of(pipe)

    def begin(*_):
        for mode in modes:
            mode.__enter__()

    def end(*_):
        for mode in reversed(modes):
            mode.__exit__(None, None, None)

    hooks = denoiser.register_forward_pre_hook(begin), denoiser.register_forward_hook(end)
    try:
        found = shapes(pipe, taps, prompt, **sampling)
    finally:
        for hook in hooks:
            hook.remove()
    return found, float(flops.get_total_flops()), peak.peak


class Needs(NamedTuple):
    """What a run takes; the last word of a name is its unit.

    With several taps, `activations` are those of all; what follows collecting is the run's own.
    """

    images: int
    numbers_a_trajectory: int
    activations_on_disk_bytes: int
    images_on_disk_bytes: int
    collecting_an_image_flop: float
    collecting_hours: float
    collecting_gpu_memory_bytes: int
    training_hours: float
    training_gpu_memory_bytes: int
    sae_on_disk_bytes: int
    checkpoint_on_disk_bytes: int
    moments_on_disk_bytes: int
    notebook_05_memory_bytes: int

    def __str__(self) -> str:
        lines = []
        for name, value in self._asdict().items():
            label, _, unit = name.rpartition("_")
            if unit in ("bytes", "flop"):
                shown = in_units(value, "B" if unit == "bytes" else "FLOP")
            elif unit == "hours":
                label, shown = name, f"{value:,.2f}"
            else:
                label, shown = name, f"{value:,}"
            label = label.replace("_", " ").replace("gpu", "GPU").replace("sae", "SAE")
            lines.append(f"{label:32} {shown:>14}")
        return "\n".join(lines)


def activation_bytes(shape: tuple[int, int, int], n_steps: int, parameters: dict) -> int:
    """What one tap's activations take on disk, from its token rows, token columns and channels."""
    rows, columns, channels = shape
    precision, total = choose_dtype(parameters["store_dtype"]), 0
    for split in SPLITS:
        kept = parameters["tokens_per_image"] if split == "train" else 0
        size = bytes_per_image(n_steps, kept or rows * columns, channels, precision)
        total += parameters[f"n_{split}"] * size
    return total


def estimate(name: str, pipe=None, tflops: float = 60.0) -> Needs:
    """What the run of a parameter file takes; the model is loaded unless a pipeline is given."""
    p, training = parameters_for("01", name), parameters_for("03", name)
    rate = positive("tflops", tflops) * 1e12 * 3600  # operations an hour
    pipe = pipe or load_model(p["model"], p["device"], p["dtype"], p["revision"])
    sampling, taps = sampling_of(p), list(taps_of(p).values())
    found, flops, peak = one_call(pipe, "a photograph of a dog", taps, **sampling)
    for tap in taps:
        if tap not in found:
            known = ", ".join(hookpoints(pipe, "a photograph of a dog", **sampling))
            refuse("hookpoint", tap.hookpoint, f"called, with a grid of tokens, such as {known}")
    n_steps = len(kept_steps(p["steps"], p["num_inference_steps"], p["n_keep"]))
    n = {split: p[f"n_{split}"] for split in SPLITS}
    n_pictures = sum(n.values()) - (0 if p["train_images"] else n["train"])
    flops *= p["num_inference_steps"]
    modules = [c for c in pipe.components.values() if isinstance(c, torch.nn.Module)]
    weights = sum(w.numel() * w.element_size() for m in modules for w in m.parameters())
    # the model may have been loaded in another precision than it will run in on the GPU
    precision = choose_dtype(p["dtype"], torch.float16)
    shrink = precision.itemsize / next(denoiser_of(pipe).parameters()).element_size()
    rows, columns, channels = found[taps[0]]
    d_in, m, batch = n_steps * channels, training["n_latents"], training["sae_batch_size"]
    sae_bytes = (2 * d_in + 1) * m * 4
    return Needs(
        images=sum(n.values()),
        numbers_a_trajectory=d_in,
        activations_on_disk_bytes=sum(activation_bytes(found[t], n_steps, p) for t in taps),
        images_on_disk_bytes=image_bytes(pipe, sampling) * n_pictures * len(taps),
        collecting_an_image_flop=flops,
        collecting_hours=flops * sum(n.values()) / rate,
        collecting_gpu_memory_bytes=int((weights + peak * p["batch_size"]) * shrink),
        # the hand-written step, twice the product of encoding
        training_hours=4 * d_in * m * training["n_updates"] * batch / rate,
        # weights, gradient and Adam's two moments; codes, and six copies of the batch
        training_gpu_memory_bytes=4 * sae_bytes
        + batch * (m + 6 * d_in) * 4 // training["accumulate"],
        sae_on_disk_bytes=sae_bytes,
        checkpoint_on_disk_bytes=3 * sae_bytes,
        moments_on_disk_bytes=2 * 2 * n_steps * channels**2 * 8,
        notebook_05_memory_bytes=8 * d_in * rows * columns * (n["validation"] + n["test"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.run.estimate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("parameters", help="a file in notebooks/parameters, or a path to one")
    words = "what the GPU sustains, in 10¹² operations a second (default 60)"
    parser.add_argument("--tflops", type=float, default=60.0, help=words)
    given = parser.parse_args()
    try:
        print(estimate(given.parameters, tflops=given.tflops))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
