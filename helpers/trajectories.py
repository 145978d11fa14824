"""Recording trajectories: generate images, and keep what layers say at some of the denoising steps.

One trajectory is what a layer says about one token over the kept denoising steps, raw and unscaled: standardising is a
later choice. A `Recorder` works under any sampling loop, `record` under a diffusers pipeline, `stores.collect` for many prompts.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import warnings
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from helpers.hooks import BRANCHES, denoiser_of, listen, numbered, rows_of, steps_of, usual


def kept_steps(steps, num_inference_steps: int, n_keep: int) -> list[int]:
    """The steps to keep: as listed, or `n_keep` spread evenly from the first to the last if the list is empty.

    Raises ValueError for a step outside 0..num_inference_steps-1, or fewer than two steps.
    """
    if num_inference_steps < 2:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}; a trajectory needs at least two steps"
        )
    if not len(steps) and n_keep not in range(2, num_inference_steps + 1):
        raise ValueError(
            f"n_keep is {n_keep}; with num_inference_steps={num_inference_steps} it must lie in 2 to {num_inference_steps}"
        )
    chosen = (
        sorted(set(steps))
        or np.linspace(0, num_inference_steps - 1, n_keep).round().astype(int).tolist()
    )
    for step in chosen:
        if step not in range(num_inference_steps):
            raise ValueError(
                f"steps: step {step} does not exist; with num_inference_steps={num_inference_steps} valid steps are 0 to {num_inference_steps - 1}"
            )
    if len(chosen) < 2:
        raise ValueError(
            f"steps {chosen}: a trajectory needs at least two different steps; valid are 0 to {num_inference_steps - 1}"
        )
    return chosen


# --- generating and recording -------------------------------------------------------------------


def generate(pipe, prompts, seeds, **sampling) -> np.ndarray:
    """Images of one batch of prompts, each from its own seed: float32, (n, height, width, channel), in [0, 1].

    Noise is drawn on the CPU, so an image does not depend on the device or on the batch it is made in, beyond rounding.

    Parameters
    ----------
    prompts : list of str
        Texts; names or numbers of classes for a class-conditional pipeline; not looked at by an unconditional one.
    sampling
        Arguments of the pipeline's call: num_inference_steps, guidance_scale, height, width (0 is the model's own), and any other
        that it takes, such as negative_prompt; one negative prompt or one image serves every prompt. ValueError names one that
        it does not take.

    Raises ValueError as well for a scheduler that draws noise from elsewhere than the seeds.
    """
    taken = inspect.signature(pipe.__call__).parameters
    options = {
        name: value for name, value in sampling.items() if name not in ("height", "width") or value
    }
    if "guidance_scale" not in taken:  # an unconditional pipeline has nothing to guide
        options.pop("guidance_scale", None)
    for name in options:
        if name not in taken:
            raise ValueError(
                f"sampling: {type(pipe).__name__} does not take {name}; valid are {', '.join(n for n in taken if n not in ('self', 'args', 'kwargs'))}"
            )
    if {"height", "width"} <= set(taken):
        _check_size(pipe, sampling.get("height") or 0, sampling.get("width") or 0)
    n = len(prompts)
    # each image needs its own copy: of a single one, diffusers would take what the first seed makes of it for all
    for name in (
        "negative_prompt",
        "control_image",
        *(("image", "mask_image") if "strength" in taken else ()),
    ):
        given = options.get(name)
        if isinstance(given, str if name == "negative_prompt" else Image.Image) or (
            isinstance(given, (np.ndarray, torch.Tensor)) and given.ndim < 4
        ):
            options[name] = [given] * n
    if "prompt" in taken:
        options["prompt"] = list(prompts)
    elif (
        "class_labels" in taken
        and getattr(pipe.components.get("unet"), "config", {}).get("num_class_embeds", 0)
        is not None
    ):
        options["class_labels"] = [
            int(p) if str(p).isdigit() else _class_of(pipe, p) for p in prompts
        ]
    if "batch_size" in taken:
        options["batch_size"] = n
    generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
    pipe.set_progress_bar_config(disable=True)
    before = _global_random_state()
    try:
        with torch.no_grad():
            made = pipe(**options, generator=generators, output_type="np")
    except TypeError as error:
        if "BFloat16" not in str(error):
            raise
        raise ValueError(
            f"dtype 'bfloat16': {type(pipe).__name__} cannot hand out images in it; valid are 'float32' and 'float16'"
        ) from error
    if not hasattr(made, "images"):
        raise ValueError(
            f"model {type(pipe).__name__} makes no images but {', '.join(made)}; valid is a pipeline of images"
        )
    moved = [not torch.equal(a, b) for a, b in zip(before, _global_random_state())]
    drawn = f"model: {type(pipe).__name__}, most likely its {type(pipe.scheduler).__name__}, draws from torch's global generator, so images do not follow their seeds; valid is a scheduler that draws from the generators it is given"
    if moved[0]:
        raise ValueError(drawn)
    if any(moved):  # on a GPU kernels may move it without drawing
        warnings.warn(drawn, stacklevel=2)
    return np.asarray(made.images).astype(np.float32, copy=False)


def _check_size(pipe, height, width) -> None:
    """ValueError unless height and width are both 0, or both whole numbers of pixels that the pipeline can draw."""
    if bool(height) != bool(width):
        alone = (
            f"height is 0 while width is {width}"
            if width
            else f"width is 0 while height is {height}"
        )
        raise ValueError(f"{alone}; give both in pixels, or 0 for both")
    factor = getattr(
        getattr(getattr(pipe, "image_processor", None), "config", None), "vae_scale_factor", 1
    )
    for name, value in (("height", height), ("width", width)):
        if (
            not isinstance(value, numbers.Integral) or value < 0 or value % factor
        ):  # some pipelines round down instead
            raise ValueError(
                f"{name} is {value}; valid are positive multiples of {factor} pixels, or 0 for the model's own size"
            )


def _class_of(pipe, name: str) -> int:
    if not hasattr(pipe, "get_label_ids"):
        raise ValueError(
            f"class {name!r}: {type(pipe).__name__} knows no names of classes; valid are whole numbers"
        )
    return pipe.get_label_ids([name])[0]


def _global_random_state() -> list[torch.Tensor]:
    return [
        torch.get_rng_state(),
        *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()),
    ]


class Tap(NamedTuple):
    """What to record: a module of the denoiser, its signal, and the branch of classifier-free guidance."""

    hookpoint: str
    signal: str = "output"
    branch: str = "conditional"


class Recorder:
    """While its context lasts, keeps one tap's activations at some steps; works under any sampling loop.

    Parameters
    ----------
    scheduler : a diffusers scheduler, or the loop's timesteps, noisiest first
    steps : list of int
        Which of the timesteps to keep.
    n_images : int, optional
        Images in the batch; None: as many as the denoiser is given rows.
    tokens : Int[Tensor, "image kept"], optional
        Which tokens of each image to keep; None for all.
    """

    def __init__(
        self,
        denoiser,
        scheduler,
        hookpoint,
        steps,
        *,
        n_images=None,
        signal="output",
        branch="conditional",
        tokens=None,
    ):
        if branch not in BRANCHES:
            raise ValueError(f"branch {branch!r} is not one of {', '.join(BRANCHES)}")
        self.scheduler, self.hookpoint, self.steps, self.branch, self.tokens = (
            scheduler,
            hookpoint,
            list(steps),
            branch,
            tokens,
        )
        self.kept: dict[int, torch.Tensor] = {}
        self.grid: tuple[int, int] | None = None
        self.seen: set[str] = set()
        self.devices: set[torch.device] = set()
        self._listening = listen(
            denoiser, scheduler, hookpoint, self._keep, n_images=n_images, signal=signal
        )

    def __enter__(self):
        self._listening.__enter__()
        return self

    def __exit__(self, *error):
        return self._listening.__exit__(*error)

    def _keep(self, activation, call):
        self.seen.update(call.branches)
        rows = rows_of(activation, call, self.branch)
        if rows is None or call.step not in self.steps:
            return
        self.grid = call.grid
        if self.tokens is not None:
            rows = rows.gather(
                1, self.tokens.to(rows.device)[..., None].expand(-1, -1, rows.shape[-1])
            )
        # a second look at the step takes the place of the first: it sees the latents that the solver accepted
        self.kept[call.step] = _to_host(rows)
        self.devices.add(rows.device)

    def trajectories(self) -> torch.Tensor:
        """Float[Tensor, "image step token channel"]: raw, on the CPU, in the model's dtype.

        Raises ValueError, naming them, if kept steps, the branch or the hookpoint were never run.
        """
        if not self.seen:
            raise ValueError(
                f"hookpoint {self.hookpoint!r} was never called, so no steps were kept; valid are modules that the model calls as it samples"
            )
        if self.branch not in self.seen:
            raise ValueError(
                f"branch {self.branch!r} is not run by this pipeline with these settings; valid is {' or '.join(sorted(self.seen))}"
            )
        n = len(steps_of(self.scheduler))
        missing = [s for s in self.steps if s not in self.kept]
        if missing:
            raise ValueError(
                f"steps {missing} were never run; the scheduler has steps 0 to {n - 1}"
            )
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(
                    device
                )  # the copies to the host run beside the computation until here
        return torch.stack([self.kept[s] for s in self.steps], dim=1)


def _to_host(t: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; from CUDA through pinned memory, on a stream of its own, so that neither waits for the other."""
    if t.device.type == "cuda":
        t, stream = (
            t.detach().clone(memory_format=torch.contiguous_format),
            _copying(t.device),
        )  # the next module may write over t
        stream.wait_stream(torch.cuda.current_stream(t.device))
        t.record_stream(stream)  # its memory is not used again before it is copied
        with torch.cuda.stream(stream):
            return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
    return t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def times_of(scheduler, steps) -> dict:
    """`timesteps` of the kept steps and, where the scheduler knows them, `sigmas`, its noise levels."""
    listed, step = numbered(scheduler)
    n = int(step.max()) + 1
    if missing := [s for s in steps if not 0 <= s < n]:
        raise ValueError(f"steps {missing} do not exist; the scheduler has steps 0 to {n - 1}")
    places = [int((step == s).nonzero()[-1]) for s in steps]
    times = {"timesteps": listed[places].double().tolist()}
    sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None and len(sigmas) >= len(listed):
        times["sigmas"] = [float(sigmas[i]) for i in places]
    elif alphas is not None:  # of the variance-exploding form, sqrt((1 - alpha_bar) / alpha_bar)
        at = alphas.double().cpu()[[int(t) for t in times["timesteps"]]]
        times["sigmas"] = ((1 - at) / at).sqrt().tolist()
    return times


def record(
    pipe, prompts, seeds, *, hookpoint, steps, signal="output", branch="conditional", **sampling
) -> tuple[np.ndarray, torch.Tensor, dict]:
    """Generate one batch and keep one tap's activations at the kept steps.

    Returns
    -------
    images : float32, (n, height, width, 3), in [0, 1]
    h : Float[Tensor, "image step token channel"]
        Raw activations, on the CPU, in the model's dtype.
    where : dict
        `grid` (token rows, columns), `timesteps` and `sigmas` of the kept steps.
    """
    images, (h,), (where,) = record_all(
        pipe, prompts, seeds, [Tap(hookpoint, signal, branch)], steps, **sampling
    )
    return images, h, where


def record_all(pipe, prompts, seeds, taps, steps, tokens=None, **sampling):
    """`record` for several taps in one pass: images, a list of activations, a list of `where`.

    Parameters
    ----------
    taps : list of Tap
    tokens : list of (Int[Tensor, "image kept"] or None), optional
        For each tap, the tokens to keep of each image.
    """
    with ExitStack() as stack:
        recorders = [
            stack.enter_context(
                Recorder(
                    denoiser_of(pipe),
                    pipe.scheduler,
                    t.hookpoint,
                    steps,
                    n_images=len(prompts),
                    signal=t.signal,
                    branch=t.branch,
                    tokens=kept,
                )
            )
            for t, kept in zip(taps, tokens or [None] * len(taps))
        ]
        images = generate(pipe, prompts, seeds, **sampling)
    where = times_of(pipe.scheduler, steps)
    return (
        images,
        [r.trajectories() for r in recorders],
        [where | {"grid": list(r.grid)} for r in recorders],
    )


class _Enough(Exception):
    """Raised to leave a pipeline after its first denoising step."""


def shapes(pipe, taps, prompt: str, **sampling) -> dict[Tap, tuple[int, int, int]]:
    """Token rows, token columns and channels of taps, from the first call of the denoiser for one image, in the order of the network.

    Taps may be `Tap`s or names of modules. One that the denoiser does not call, or that has no grid of tokens, is left out.
    """
    seen: dict = {}
    denoiser = denoiser_of(pipe)
    with ExitStack() as stack:
        for tap in taps:
            name, signal = (tap.hookpoint, tap.signal) if isinstance(tap, Tap) else (tap, "output")
            note = functools.partial(
                lambda tap, t, c: seen.setdefault(tap, (*c.grid, t.shape[-1])) and None, tap
            )
            stack.enter_context(
                listen(denoiser, pipe.scheduler, name, note, signal=signal, skip_unfit=True)
            )

        def leave(*_):
            raise _Enough

        stack.callback(denoiser.register_forward_hook(leave).remove)
        try:
            generate(pipe, [prompt], [0], **sampling)
        except _Enough:
            pass
    return seen


def hookpoints(pipe, prompt: str, **sampling) -> dict[str, tuple[int, int, int]]:
    """Where one would usually listen, in the order of the network: name -> token rows, columns, channels."""
    return shapes(pipe, usual(denoiser_of(pipe)), prompt, **sampling)


def bytes_per_image(n_steps: int, tokens: int, channels: int, dtype: torch.dtype) -> int:
    """What one image's trajectories take on disk."""
    return n_steps * tokens * channels * dtype.itemsize
