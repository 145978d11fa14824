"""Recording trajectories: what modules of a model compute at some of the denoising steps.

A trajectory is one image token's activation over the recorded steps, raw. A `Recorder` works under
any sampling loop, `record` under a diffusers pipeline, `helpers.store.collect` for many prompts.
"""

import functools
from contextlib import ExitStack, suppress
from difflib import get_close_matches

import numpy as np
import torch

from helpers.checks import in_range, nearest, one_of, refuse
from helpers.hooks import Tap, by_branch, listen, usual
from helpers.pipelines.calls import BRANCHES, numbered
from helpers.pipelines.generate import generate
from helpers.pipelines.loading import denoiser_of


def kept_steps(steps, num_inference_steps: int, n_keep: int) -> list[int]:
    """The steps to record, ascending: those listed or, if none is, `n_keep` evenly over all."""
    n = in_range("num_inference_steps", num_inference_steps, 2)
    if not len(steps):
        if n_keep not in range(2, n + 1):
            refuse("n_keep", n_keep, f"a whole number from 2 to num_inference_steps={n}")
        return np.linspace(0, n - 1, n_keep).round().astype(int).tolist()
    chosen = sorted(set(steps))
    if len(chosen) < 2 or any(step not in range(n) for step in chosen):
        refuse("steps", chosen, f"at least two different whole numbers from 0 to {n - 1}")
    return chosen


class Recorder:
    """While its context lasts, keeps one tap's activations at some steps, under any sampling loop.

    Arguments are as in `listen`; `tokens`, Int[Tensor, "image kept"], says which to keep.
    """

    def __init__(self, denoiser, scheduler, tap, steps, *, n_images=None, tokens=None):
        self.scheduler, self.tap, self.steps, self.tokens = scheduler, Tap.of(tap), [*steps], tokens
        one_of("branch", self.tap.branch, BRANCHES)
        self.recorded: dict[int, torch.Tensor] = {}  # step -> (image, token, channel)
        self.grid: tuple[int, int] | None = None
        self.branches_run: set[str] = set()
        self.devices: set[torch.device] = set()
        self._listening = listen(denoiser, scheduler, self.tap, self._keep, n_images=n_images)

    def __enter__(self):
        self._listening.__enter__()
        return self

    def __exit__(self, *error):
        return self._listening.__exit__(*error)

    def _keep(self, activation, call):
        self.branches_run.update(call.branches)
        rows = by_branch(activation, call).get(self.tap.branch)
        if rows is None or call.step not in self.steps:
            return
        self.grid = call.grid
        if self.tokens is not None:
            kept = self.tokens.to(rows.device)[..., None]
            rows = rows.gather(1, kept.expand(-1, -1, rows.shape[-1]))
        # a second evaluation of the step takes the first one's place: the solver goes on from it
        self.recorded[call.step] = _to_host(rows)
        self.devices.add(rows.device)

    def trajectories(self) -> torch.Tensor:
        """Raw, (image, step, token, channel), on the CPU; ValueError for what was never run."""
        if not self.branches_run:
            refuse("hookpoint", self.tap.hookpoint, "a module that the model calls as it samples")
        if self.tap.branch not in self.branches_run:
            run = " or ".join(sorted(self.branches_run))
            refuse("branch", self.tap.branch, f"{run}, which this pipeline runs at these settings")
        if missing := [step for step in self.steps if step not in self.recorded]:
            last = int(numbered(self.scheduler)[1].max())
            refuse("steps", missing, f"steps that the sampler runs, of 0 to {last}")
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # until here copies run beside the computation
        return torch.stack([self.recorded[step] for step in self.steps], dim=1)


_stream = functools.cache(torch.cuda.Stream)  # of a device, for copies


def _to_host(t: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; from CUDA on a stream of its own, so that the model need not wait."""
    if t.device.type != "cuda":
        return t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    # a copy on the device first: the next module may write over t
    t = t.detach().clone(memory_format=torch.contiguous_format)
    stream = _stream(t.device)
    stream.wait_stream(torch.cuda.current_stream(t.device))
    t.record_stream(stream)  # its memory is not used again before it is copied
    with torch.cuda.stream(stream):
        return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)


def times_of(scheduler, steps) -> dict:
    """`timesteps` of some steps and, where the scheduler knows them, `sigmas`, its noise levels.

    Where it has no sigmas but alphas, sigma is sqrt((1 - alpha_bar) / alpha_bar), that of the
    variance-exploding form (Karras et al. 2022, arXiv:2206.00364, table 1).
    """
    listed, numbers = numbered(scheduler)
    last = int(numbers.max())
    if missing := [step for step in steps if not 0 <= step <= last]:
        refuse("steps", missing, f"from 0 to {last}")
    places = [int((numbers == step).nonzero()[-1]) for step in steps]
    times = {"timesteps": listed[places].double().tolist()}
    sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None and len(sigmas) >= len(listed):
        times["sigmas"] = [float(sigmas[i]) for i in places]
    elif alphas is not None:
        at = alphas.double().cpu()[[int(t) for t in times["timesteps"]]]
        times["sigmas"] = ((1 - at) / at).sqrt().tolist()
    return times


def record(pipe, prompts, seeds, tap, steps, **sampling) -> tuple[np.ndarray, torch.Tensor, dict]:
    """Generate one batch and keep one tap's activations at some steps.

    Gives images, float32 (image, height, width, 3) in [0, 1]; `Recorder.trajectories`; and a dict
    of `grid` (token rows, columns) and the steps' `timesteps` and `sigmas`.
    """
    images, (h,), (where,) = record_all(pipe, prompts, seeds, [tap], steps, **sampling)
    return images, h, where


def record_all(pipe, prompts, seeds, taps, steps, tokens=None, **sampling):
    """`record` for several taps in one pass: images, a list of activations, a list of `where`.

    `tokens` is a list as long as `taps` of what a `Recorder` takes.
    """
    make = functools.partial(Recorder, denoiser_of(pipe), pipe.scheduler, n_images=len(prompts))
    recorders = [make(t, steps, tokens=kept) for t, kept in zip(taps, tokens or [None] * len(taps))]
    with ExitStack() as stack:
        for recorder in recorders:
            stack.enter_context(recorder)
        images = generate(pipe, prompts, seeds, **sampling)
    times = times_of(pipe.scheduler, steps)
    activations = [recorder.trajectories() for recorder in recorders]
    return images, activations, [times | {"grid": list(r.grid)} for r in recorders]


class _FirstStepDone(Exception):
    """Raised to leave a pipeline after its first denoising step."""


def shapes(pipe, taps, prompt: str, **sampling) -> dict:
    """Token rows, token columns and channels of each tap, in the order of the network.

    Keys are the taps as given, read off the denoiser's first call for one image. Left out are those
    that it does not have or call, or that have no grid of tokens. ValueError for `sampling` that
    the pipeline stumbles over.
    """
    found: dict = {}
    denoiser = denoiser_of(pipe)
    modules = dict(denoiser.named_modules())

    def leave(*_):
        raise _FirstStepDone

    with suppress(_FirstStepDone), ExitStack() as stack:
        for tap in (t for t in taps if Tap.of(t).hookpoint in modules):

            def note(activation, call, tap=tap):
                found.setdefault(tap, (*call.grid, activation.shape[-1]))

            stack.enter_context(listen(denoiser, pipe.scheduler, tap, note, skip_unfit=True))
        stack.callback(denoiser.register_forward_hook(leave).remove)
        try:
            generate(pipe, [prompt], [0], **sampling)
        except (AttributeError, LookupError, RuntimeError, TypeError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0][:200]
            valid = f"what {type(pipe).__name__} takes ({why})"
            refuse("what the pipeline is called with", sampling, valid)
    return found


def hookpoints(pipe, prompt: str, **sampling) -> dict[str, tuple[int, int, int]]:
    """`shapes` of where one would usually listen: name -> token rows, columns, channels."""
    return shapes(pipe, usual(denoiser_of(pipe)), prompt, **sampling)


def refuse_absent(pipe, taps, found: dict, prompt: str, **sampling) -> None:
    """ValueError for a tap that `shapes` did not find, with the nearest that it does find."""
    for tap in taps:
        if tap not in found:
            denoiser = denoiser_of(pipe)
            named = get_close_matches(tap.hookpoint, dict(denoiser.named_modules()), 20, 0.5)
            others = [tap._replace(hookpoint=n) for n in {*named, *usual(denoiser)}]
            fit = [t.hookpoint for t in shapes(pipe, others, prompt, **sampling)]
            valid = f"a module that is called, with a grid of tokens as {tap.signal}"
            refuse("hookpoint", tap.hookpoint, f"{valid}, such as {nearest(tap.hookpoint, fit)}")


def bytes_per_image(n_steps: int, tokens: int, channels: int, dtype: torch.dtype) -> int:
    """What one image's trajectories take on disk."""
    return n_steps * tokens * channels * dtype.itemsize
