"""What a run will take before it is begun: bytes on disk, arithmetic, hours, memory.

    python -m helpers.run.estimate sd15 --tflops 60

Sizes are exact, read off one call of the denoiser for one image. Hours follow from the arithmetic
in that call and the rate that the GPU sustains, a half to a third of what its maker prints. GPU
memory is that of weights and denoiser; decoding a batch of pictures may take more.
"""

import argparse
import sys
import weakref
from contextlib import ExitStack

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from helpers.checks import choose_dtype, positive
from helpers.files import in_units
from helpers.pipelines.loading import denoiser_of
from helpers.run.folder import load_model
from helpers.run.jobs import one_each, plan_of
from helpers.run.parameters import parameters_for
from helpers.store.plan import SPLITS
from helpers.training.loop import TrainConfig
from helpers.trajectories import refuse_absent, shapes


class PeakMemory(TorchDispatchMode):
    """Counts bytes of living tensors made while the mode was on; `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))  # outputs that are views of these take nothing
        for key, storage in _storages(out).items():
            if key not in given:
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def _gone(self, size: int):
        self.alive -= size


def _storages(tree) -> dict:
    tensors = (t for t in tree_leaves(tree) if isinstance(t, torch.Tensor))
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def one_call(pipe, prompt: str, taps, **sampling) -> tuple[dict, float, int]:
    """The denoiser's first call for one image: shapes at the taps, operations, peak bytes."""
    flops, peak, denoiser = FlopCounterMode(display=False), PeakMemory(), denoiser_of(pipe)
    with ExitStack() as hooks, ExitStack() as modes:

        def begin(*_):
            modes.enter_context(peak)
            modes.enter_context(flops)

        hooks.callback(denoiser.register_forward_pre_hook(begin).remove)
        hooks.callback(denoiser.register_forward_hook(lambda *_: modes.close()).remove)
        found = shapes(pipe, taps, prompt, **sampling)
    return found, float(flops.get_total_flops()), peak.peak


def estimate(name: str, pipe=None, tflops: float = 60.0) -> dict[str, float]:
    """What the run of a parameter file takes; the model is loaded unless a pipeline is given.

    A unit stands behind a comma in the name. With several taps, activations are those of all; what
    follows collecting is the run's own.
    """
    p, training = parameters_for("01", name), parameters_for("03", name)
    rate = positive("tflops", tflops) * 1e12 * 3600  # operations an hour
    pipe = pipe or load_model(p["model"], p["device"], p["dtype"], p["revision"])
    plan, prompt = plan_of(one_each(p) | {"prompts": "none"}), "a photograph of a dog"
    taps = list(plan.taps.values())
    found, flops, peak = one_call(pipe, prompt, taps, **plan.sampling)
    refuse_absent(pipe, taps, found, prompt, **plan.sampling)
    flops *= p["num_inference_steps"]
    n_of = {split: p[f"n_{split}"] for split in SPLITS}
    n_images = sum(n_of.values())
    activations, pictures = plan.bytes_of(n_of, found, pipe)
    modules = [c for c in pipe.components.values() if isinstance(c, torch.nn.Module)]
    weights = sum(w.numel() * w.element_size() for m in modules for w in m.parameters())
    # the model may have been loaded in another precision than it will run in on the GPU
    precision = choose_dtype(p["dtype"], torch.float16)
    shrink = precision.itemsize / next(denoiser_of(pipe).parameters()).element_size()
    rows, columns, channels = found[taps[0]]
    d_in, c = len(plan.steps) * channels, TrainConfig.of(training)
    sae = (2 * d_in + 1) * c.n_latents * 4
    return {
        "images": n_images,
        "numbers a trajectory": d_in,
        "activations on disk, B": activations,
        "images on disk, B": pictures,
        "collecting an image, FLOP": flops,
        "collecting hours": flops * n_images / rate,
        "collecting GPU memory, B": int((weights + peak * p["batch_size"]) * shrink),
        # the hand-written step, twice the product of encoding
        "training hours": 4 * d_in * c.n_latents * c.n_updates * c.batch_size / rate,
        "training GPU memory, B": c.memory(d_in),
        "SAE on disk, B": sae,
        "checkpoint on disk, B": 3 * sae,
        "moments on disk, B": 2 * 2 * len(plan.steps) * channels**2 * 8,
        "notebook 05 memory, B": 8 * d_in * rows * columns * (n_images - n_of["train"]),
    }


def in_words(needs: dict[str, float]) -> str:
    """A line for each need, in the unit that suits it."""
    lines = []
    for name, value in needs.items():
        label, _, unit = name.partition(", ")
        plain = f"{value:,.2f}" if "hours" in name else f"{value:,}"
        lines.append(f"{label:32} {in_units(value, unit) if unit else plain:>14}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m helpers.run.estimate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("parameters", help="a file in notebooks/parameters, or a path to one")
    words = "what the GPU sustains, in 10¹² operations a second (default 60)"
    parser.add_argument("--tflops", type=float, default=60.0, help=words)
    given = parser.parse_args()
    try:
        print(in_words(estimate(given.parameters, tflops=given.tflops)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
