"""What a run will take before it is begun: bytes on disk, arithmetic, hours, memory.

    python -m helpers.run.estimate sd15 --tflops 60

Sizes are exact, from one call of the denoiser for one image on whatever device is there; hours follow from the arithmetic counted
in that call and the rate that `--tflops` says the GPU sustains (a half to a third of what its maker
prints). GPU memory is that of weights and denoiser; decoding a batch of pictures may take more.
"""

from __future__ import annotations

import argparse
import math
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from helpers import trajectories
from helpers.files import in_units
from helpers.hooks import denoiser_of
from helpers.run import folder as runs
from helpers.run import jobs
from helpers.store import collect as stores


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors alive that were made while the mode was on; `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note(
            (args, kwargs), made=False
        )  # weights and inputs were there before: views of them take nothing
        out = func(*args, **(kwargs or {}))
        self._note(out, made=True)
        return out

    def _note(self, tree, made: bool):
        for t in tree_leaves(tree):
            if (
                isinstance(t, torch.Tensor)
                and (key := t.untyped_storage()._cdata) not in self.known
            ):
                size = t.untyped_storage().nbytes() if made else 0
                self.known.add(key)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(t.untyped_storage(), self._gone, key, size)

    def _gone(self, key, size):
        self.known.discard(key)
        self.alive -= size


def one_call(pipe, prompt: str, taps, **sampling) -> tuple[dict, float, int]:
    """Shapes at the taps, floating-point operations and peak bytes of activations of the denoiser's first call for one image."""
    flops, peak = FlopCounterMode(display=False), PeakMemory()
    modes = (peak, flops)
    denoiser = denoiser_of(pipe)
    handles = [
        denoiser.register_forward_pre_hook(lambda *_: [m.__enter__() for m in modes] and None),
        denoiser.register_forward_hook(
            lambda *_: [m.__exit__(None, None, None) for m in reversed(modes)] and None
        ),
    ]
    try:
        found = trajectories.shapes(pipe, taps, prompt, **sampling)
    finally:
        for handle in handles:
            handle.remove()
    return found, float(flops.get_total_flops()), peak.peak


def estimate(name: str, pipe=None, tflops: float = 60.0) -> dict:
    """Figures for a parameter file; the model is loaded unless a pipeline is given. Bytes, hours, operations."""
    p, sae = runs.parameters_for("01", name), runs.parameters_for("03", name)
    jobs.require("collect", p)
    jobs.require("train", sae)
    if not 0 < tflops < math.inf:
        raise ValueError(f"tflops is {tflops}; it must be a number above 0")
    pipe = pipe or runs.load_pipeline(p["model"], p["device"], p["dtype"], p["revision"])
    half = (
        runs.choose_dtype(p["dtype"], torch.float16).itemsize
        / next(denoiser_of(pipe).parameters()).element_size()
    )
    sampling, taps = jobs.sampling_of(p), jobs.taps_of(p)
    steps = trajectories.kept_steps(p["steps"], p["num_inference_steps"], p["n_keep"])
    found, flops, peak = one_call(pipe, "a photograph of a dog", list(taps.values()), **sampling)
    missing = [tap.hookpoint for tap in taps.values() if tap not in found]
    if missing:
        raise ValueError(
            f"hookpoint {missing[0]!r} is never called or has no grid of tokens; valid are like {', '.join(list(trajectories.hookpoints(pipe, 'a dog', **sampling))[:8])}"
        )
    n = {split: p[f"n_{split}"] for split in stores.SPLITS}
    precision, activations, d_in = runs.choose_dtype(p["store_dtype"]), 0, 0
    for tap in taps.values():
        rows, columns, channels = found[tap]
        of = {split: rows * columns for split in n} | {
            "train": p["tokens_per_image"] or rows * columns
        }
        activations += sum(
            n[split] * trajectories.bytes_per_image(len(steps), of[split], channels, precision)
            for split in n
        )
        d_in = d_in or len(steps) * channels
    pictures = stores.image_bytes(pipe, sampling) * sum(
        v for split, v in n.items() if split != "train" or p["train_images"]
    )
    weights = sum(
        t.numel() * t.element_size()
        for c in pipe.components.values()
        if isinstance(c, torch.nn.Module)
        for t in c.parameters()
    )
    sae_weights = (2 * d_in + 1) * sae["n_latents"] * 4
    return {
        "images": sum(n.values()),
        "dimensions": d_in,
        "activations on disk": activations,
        "images on disk": pictures,
        "operations an image": flops * p["num_inference_steps"],
        "collecting, hours": flops
        * p["num_inference_steps"]
        * sum(n.values())
        / tflops
        / 1e12
        / 3600,
        "collecting, GPU memory": int((weights + peak * p["batch_size"]) * half),
        "training the SAE, hours": 2
        * d_in
        * sae["n_latents"]
        * sae["n_updates"]
        * sae["sae_batch_size"]
        / 0.5
        / tflops
        / 1e12
        / 3600,
        "training the SAE, GPU memory": 4 * sae_weights
        + sae["sae_batch_size"] * (sae["n_latents"] + 6 * d_in) * 4 // sae["accumulate"],
        "SAE on disk": sae_weights,
        "its checkpoint on disk": 3 * sae_weights,
        "sums on disk": 2 * 2 * (d_in // len(steps)) ** 2 * len(steps) * 8,
        "memory for notebook 05": 2 * 4 * d_in * rows * columns * (n["validation"] + n["test"]),
    }


def say(figures: dict) -> str:
    """The figures in words, a line each."""
    lines = []
    for name, value in figures.items():
        if "disk" in name or "memory" in name:
            shown = in_units(value)
        else:
            shown = (
                in_units(value, "FLOP")
                if "operations" in name
                else f"{value:,.2f}"
                if "hours" in name
                else f"{value:,}"
            )
        lines.append(f"{name:32} {shown:>14}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.run.estimate", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "parameters", help="a file in notebooks/parameters, without .yaml, or a path to one"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=60.0,
        help="what the GPU sustains, in 10¹² operations a second (default 60)",
    )
    given = parser.parse_args()
    try:
        print(say(estimate(given.parameters, tflops=given.tflops)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
