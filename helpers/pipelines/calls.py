"""Which call of the denoiser is running: its step, its branches of guidance, its grid of tokens.

All of this is read, at each call, from the denoiser's inputs and the scheduler's timesteps. Calls
are never counted, so solvers that call the model twice in a step (Heun, KDPM2, PNDM) and runs that
start late need no special treatment.

A *step* is an index, 0 for the noisiest; a *timestep* is the scheduler's value for it. Under
classifier-free guidance a step has two *branches*: two halves of one call's rows, or two calls
with the same latents.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import NamedTuple

import torch

from helpers.checks import refuse

BRANCHES = ("conditional", "unconditional")
# most pipelines put the unconditional rows first; these denoisers' pipelines put them last
CONDITIONAL_FIRST = ("DiTTransformer2DModel", "StableCascadeUNet", "WuerstchenPrior")
# these are given 1 - timestep / 1000, which is the value of another step
REVERSED_TIME = ("LuminaNextDiT2DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel")


@dataclass(frozen=True)
class Call:
    """Where sampling stands when a hookpoint's module runs."""

    step: int  # 0 for the noisiest
    timestep: float  # the time as the denoiser was given it
    repeated: bool  # the solver evaluates the model once more within the step (Heun, PNDM)
    grid: tuple[int, int]  # rows and columns of the hookpoint's image tokens
    branches: tuple[str, ...]  # of guidance, one for each equal part of the batch's rows


def numbered(scheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """The timesteps that a sampler runs through, noisiest first, and the step that each belongs to.

    Both are (evaluation,), on the CPU. `scheduler` is one of diffusers', its timesteps set, or the
    timesteps of a loop. Raises ValueError where evaluations cannot be assigned to steps.
    """
    listed = torch.as_tensor(getattr(scheduler, "timesteps", scheduler)).cpu()
    n = getattr(scheduler, "num_inference_steps", None)
    if n == len(listed):  # equal neighbours are two steps: Karras' noise levels, rounded
        return listed, torch.arange(n)
    config = getattr(scheduler, "config", None)
    runge_kutta = getattr(config, "skip_prk_steps", True) is False  # PNDM: up to four a step
    if n and 2 * n - 1 == len(listed) and not runge_kutta:  # Heun, KDPM2: two a step, then one
        return listed, (torch.arange(2 * n - 1) + 1) // 2
    steps = torch.unique_consecutive(listed, return_inverse=True)[1]  # PNDM evaluates one twice
    custom = getattr(scheduler, "custom_timesteps", False)  # num_inference_steps is then outdated
    if n and int(steps[-1]) + 1 != n and not custom:
        valid = f"one that lists {n} different timesteps for {n} steps (PNDM: skip_prk_steps=True)"
        refuse("scheduler", type(scheduler).__name__, valid)
    return listed, steps


def timesteps_of(scheduler) -> torch.Tensor:
    """The timestep of each step, noisiest first: of a step's evaluations, the last one's."""
    listed, steps = numbered(scheduler)
    return listed[torch.searchsorted(steps, torch.arange(int(steps.max()) + 1), right=True) - 1]


class _Schedule(NamedTuple):
    """A scheduler, the list of timesteps that it or a loop holds, and that list `numbered`."""

    scheduler: object
    listed: object
    timesteps: torch.Tensor
    steps: torch.Tensor


def _step_of(time, schedule: _Schedule) -> tuple[int, float]:
    """The step whose time the denoiser was given, and that time as a number."""
    place = _entry_of(time, schedule.listed)
    if place is not None:  # a GPU need not be waited for
        return int(schedule.steps[place]), float(schedule.timesteps[place])
    time = torch.as_tensor(time).flatten()[0].cpu()
    places = _nearest(time, schedule)
    # the scheduler's own index tells apart timesteps that rounding made equal
    own = getattr(schedule.scheduler, "step_index", -1)
    if own is None:  # before its first step
        own = getattr(schedule.scheduler, "begin_index", None) or 0
    return int(schedule.steps[own if own in places else places[0]]), float(time)


def _entry_of(time, listed) -> int | None:
    """The place of `time` in the tensor `listed` if it is a view of one of its entries."""
    if not all(isinstance(t, torch.Tensor) for t in (time, listed)):
        return None
    if time.untyped_storage().data_ptr() != listed.untyped_storage().data_ptr():
        return None
    offset = time.storage_offset() - listed.storage_offset()
    place, rest = divmod(offset, listed.stride(0) or 1)
    return place if rest == 0 and 0 <= place < len(listed) else None


def _nearest(time: torch.Tensor, schedule: _Schedule) -> list[int]:
    """Places in the list that `time` may stand for, whole or as a share of the training steps."""
    listed = schedule.timesteps
    if time.is_floating_point():
        listed = listed.to(time.dtype)  # half precision rounds the timesteps, too
    config = getattr(schedule.scheduler, "config", None)
    trained = getattr(config, "num_train_timesteps", 1000)
    off = torch.stack([_distance(time, table) for table in (listed, listed / trained)])
    if not off.min() <= 0.5:
        valid = f"one that the scheduler lists, {float(listed[0]):.6g} to {float(listed[-1]):.6g}"
        refuse("timestep", _rounded(time), valid)
    # 1 may be a last timestep of 1, or a first one of 1000, divided: both are candidates then
    return (off == off.min()).nonzero()[:, 1].tolist()


def _distance(time, table: torch.Tensor) -> torch.Tensor:
    """Relative to each entry and, a little, to the largest, which serves entries near 0."""
    return (table - time).abs().double() / (table.abs().double() + 1e-3 * table.abs().max())


class _Inputs(NamedTuple):
    """What the denoiser was given in one call."""

    latents: torch.Tensor
    time: torch.Tensor | float
    grid: tuple[int, int] | None  # of image tokens, where the inputs or the patch size say it
    text: int  # how many text tokens may stand before the image's


def _inputs_of(denoiser, signature: inspect.Signature, args, kwargs) -> _Inputs | None:
    """The inputs by what they mean; None for the extra pass of SD 3's skip-layer guidance."""
    given = signature.bind_partial(*args, **kwargs).arguments
    names = list(given)
    latents = given[next((n for n in ("sample", "hidden_states") if n in given), names[0])]
    times = ("timestep", "timesteps", "t", "sigma")
    time = given[next((n for n in times if n in given), names[1 % len(names)])]
    if not isinstance(latents, torch.Tensor):
        valid = "one tensor, given to a forward that names its arguments"
        refuse("the denoiser's first input", type(latents).__name__, valid)
    if given.get("skip_layers") is not None:
        return None
    text = given.get("encoder_hidden_states")
    n_text = text.shape[1] if isinstance(text, torch.Tensor) and text.ndim == 3 else 0
    if n_text and type(denoiser).__name__.startswith("AuraFlow"):
        n_text += denoiser.register_tokens.shape[1]  # they stand before the text
    patch = getattr(getattr(denoiser, "config", None), "patch_size", None)
    # loops may change their latents in place
    return _Inputs(latents.clone(), time, _grid_of(given, latents, patch), n_text)


def _grid_of(given: dict, latents: torch.Tensor, patch) -> tuple[int, int] | None:
    """Rows and columns of image tokens as the inputs tell them; None where they do not."""
    ids, sizes = given.get("img_ids"), given.get("img_shapes")
    if ids is not None:  # Flux: (0, row, column); Flux 2: (image, row, column, layer)
        ids = ids.reshape(-1, ids.shape[-1])[:, 1:3]
        grid = tuple(int(v) for v in ids.amax(0) - ids.amin(0) + 1)
    elif sizes:  # Qwen: for each row of the batch, (frames, rows, columns) of its images
        grid = tuple((sizes[0][0] if isinstance(sizes[0], list) else sizes[0])[-2:])
    elif latents.ndim == 4 and isinstance(patch, int):
        return latents.shape[2] // patch, latents.shape[3] // patch
    else:
        return None
    if latents.ndim == 3 and latents.shape[1] != grid[0] * grid[1]:
        valid = f"{grid[0]} × {grid[1]}: one image, without reference images beside it"
        refuse("the number of image tokens", latents.shape[1], valid)
    return grid


def _branches_of(rows: int, n_images: int | None, turn: int, order) -> tuple[str, ...]:
    """The branch of each equal part of the rows; `order` is theirs in a batch that holds both."""
    parts = rows // n_images if n_images and rows % n_images == 0 else 1
    if parts > 2:
        refuse("the number of the denoiser's rows", rows, f"{n_images} or {2 * n_images}")
    return tuple(order) if parts == 2 else (BRANCHES[min(turn, 1)],)


class Reading(NamedTuple):
    """One call of the denoiser, read; the next call is read against it."""

    inputs: _Inputs
    step: int
    timestep: float
    first: int  # the step at which this run of the sampler began
    turn: int  # how many calls of this step were given the same latents before
    repeated: bool
    branches: tuple[str, ...]

    def at(self, grid: tuple[int, int]) -> Call:
        return Call(self.step, self.timestep, self.repeated, grid, self.branches)


def _read(inputs: _Inputs, before: Reading | None, schedule, n_images, order) -> Reading:
    """The running call, from its inputs and from the call before it in the same run, if any."""
    step, timestep = _step_of(inputs.time, schedule)
    first = before.first if before else step
    if before and first != step < before.step and step:  # a loop begins anew at 0 or at `first`
        valid = f"one of step {before.step} or a later one, not of step {step}"
        refuse("timestep", _rounded(timestep), valid)
    same_step = before is not None and step == before.step
    # the same latents again are guidance's other branch, other latents the solver's next evaluation
    now, earlier = inputs.latents, before.inputs.latents if same_step else None
    same_latents = same_step and now.shape == earlier.shape and torch.equal(now, earlier)
    turn = before.turn + 1 if same_latents else 0
    repeated = before.repeated if same_latents else same_step
    branches = _branches_of(len(inputs.latents), n_images, turn, order)
    return Reading(inputs, step, timestep, first, turn, repeated, branches)


def _rounded(timestep) -> float:
    return float(f"{float(timestep):.6g}")


class CallReader:
    """Reads each call of a denoiser: `note` is a forward pre-hook of it, `now` what it read."""

    def __init__(self, denoiser: torch.nn.Module, scheduler, n_images: int | None):
        kind = type(denoiser).__name__
        if kind in REVERSED_TIME:
            refuse("the model's denoiser", kind, "one that is not given 1 - timestep / 1000")
        self.denoiser, self.scheduler, self.n_images = denoiser, scheduler, n_images
        self.signature = inspect.signature(denoiser.forward)
        self.order = BRANCHES if kind in CONDITIONAL_FIRST else BRANCHES[::-1]
        self.schedule: _Schedule | None = None
        self.before: Reading | None = None
        self.now: Reading | None = None  # None before the first call, and in one to pass over

    def note(self, _, args, kwargs) -> None:
        inputs = _inputs_of(self.denoiser, self.signature, args, kwargs)
        if inputs is None:
            self.now = None
            return
        listed = getattr(self.scheduler, "timesteps", self.scheduler)
        if self.schedule is None or self.schedule.listed is not listed:  # set anew for each run
            self.schedule = _Schedule(self.scheduler, listed, *numbered(self.scheduler))
            self.before = None
        self.now = _read(inputs, self.before, self.schedule, self.n_images, self.order)
        self.before = self.now
