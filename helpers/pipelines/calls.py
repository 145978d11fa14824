"""Which call of the denoiser is running: its step, its branches of guidance, its grid of tokens.

All is read, at each call, from the denoiser's inputs and the scheduler's timesteps; nothing is
counted, as solvers may call the model twice in a step (Heun, KDPM2, PNDM), and runs start late.

A *step* is an index, 0 for the noisiest; a *timestep* is the scheduler's value for it. Under
guidance a step has two *branches*: two halves of one call's rows, or two calls with equal latents.
"""

import inspect
from typing import NamedTuple

import torch

from helpers.checks import refuse

BRANCHES = ("conditional", "unconditional")
# most pipelines put the unconditional rows first; these denoisers' pipelines put them last
CONDITIONAL_FIRST = ("DiTTransformer2DModel", "StableCascadeUNet", "WuerstchenPrior")
# these are given 1 - timestep / 1000, which is the value of another step
REVERSED_TIME = ("LuminaNextDiT2DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel")


class Call(NamedTuple):
    """Where sampling stands in a call of the denoiser; a hookpoint is told of its own `grid`."""

    step: int  # 0 for the noisiest
    timestep: float  # the time as the denoiser was given it
    repeated: bool  # the solver evaluates the model once more within the step (Heun, PNDM)
    branches: tuple[str, ...]  # of guidance, one for each equal part of the batch's rows
    grid: tuple[int, int] | None  # rows and columns of image tokens; None where no input says it
    latents: torch.Tensor  # what the denoiser was given; the next call is read against it
    text: int  # how many text tokens may stand before the image's
    first: int  # the step at which this run of the sampler began
    turn: int  # how many calls of this step were given the same latents before


def numbered(scheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """The timesteps that a sampler runs through, noisiest first, and the step that each belongs to.

    Both are (evaluation,), on the CPU. `scheduler`: of diffusers, its timesteps set, or a loop's
    timesteps. ValueError where evaluations cannot be assigned to steps.
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


class CallReader:
    """Reads each call of a denoiser: `note` is a forward pre-hook of it, `now` what it read."""

    def __init__(self, denoiser: torch.nn.Module, scheduler, n_images: int | None):
        kind = type(denoiser).__name__
        if kind in REVERSED_TIME:
            refuse("the model's denoiser", kind, "one that is not given 1 - timestep / 1000")
        self.denoiser, self.scheduler, self.n_images = denoiser, scheduler, n_images
        self.signature = inspect.signature(denoiser.forward)
        self.order = BRANCHES if kind in CONDITIONAL_FIRST else BRANCHES[::-1]
        self.listed = None  # the timesteps as the scheduler holds them
        self.before: Call | None = None
        self.now: Call | None = None  # None before the first call, and in one to pass over

    def note(self, _, args, kwargs) -> None:
        given = self.signature.bind_partial(*args, **kwargs).arguments
        listed = getattr(self.scheduler, "timesteps", self.scheduler)
        if self.listed is not listed:  # set anew for each run
            self.timesteps, self.steps = numbered(self.scheduler)
            self.listed, self.before = listed, None
        # the extra pass of SD 3's skip-layer guidance is to be passed over
        self.now = self._read(given) if given.get("skip_layers") is None else None
        self.before = self.now or self.before

    def _read(self, given: dict) -> Call:
        """The running call, from what is given and the call before it in the same run, if any."""
        names, before = list(given), self.before
        latents = given[next((n for n in ("sample", "hidden_states") if n in given), names[0])]
        times = ("timestep", "timesteps", "t", "sigma")
        time = given[next((n for n in times if n in given), names[1 % len(names)])]
        if not isinstance(latents, torch.Tensor):
            valid = "one tensor, given to a forward that names its arguments"
            refuse("the denoiser's first input", type(latents).__name__, valid)
        step, timestep = self._step_of(time)
        first = before.first if before else step
        if before and first != step < before.step and step:  # a loop begins anew at 0 or `first`
            valid = f"one of step {before.step} or a later one, not of step {step}"
            refuse("timestep", float(f"{timestep:.6g}"), valid)
        repeated, turn = before is not None and step == before.step, 0
        if repeated and latents.shape == before.latents.shape:
            if torch.equal(latents, before.latents):  # the other branch, not the next evaluation
                repeated, turn = before.repeated, before.turn + 1
        branches = self._branches_of(len(latents), turn)
        patch = getattr(getattr(self.denoiser, "config", None), "patch_size", None)
        grid = _grid_of(given, latents, patch)
        text = given.get("encoder_hidden_states")
        text = text.shape[1] if isinstance(text, torch.Tensor) and text.ndim == 3 else 0
        if text and type(self.denoiser).__name__.startswith("AuraFlow"):
            text += self.denoiser.register_tokens.shape[1]  # they stand before the text
        latents = latents.clone()  # loops may change them in place
        return Call(step, timestep, repeated, branches, grid, latents, text, first, turn)

    def _branches_of(self, rows: int, turn: int) -> tuple[str, ...]:
        """The branch of each equal part of the rows."""
        n = self.n_images
        parts = rows // n if n and rows % n == 0 else 1
        if parts > 2:
            refuse("the number of the denoiser's rows", rows, f"{n} or {2 * n}")
        return self.order if parts == 2 else (BRANCHES[min(turn, 1)],)

    def _step_of(self, time) -> tuple[int, float]:
        """The step whose time the denoiser was given, and that time as a number."""
        place = _entry_of(time, self.listed)
        if place is not None:  # a GPU need not be waited for
            return int(self.steps[place]), float(self.timesteps[place])
        time, listed = torch.as_tensor(time).flatten()[0].cpu(), self.timesteps
        if time.is_floating_point():
            listed = listed.to(time.dtype)  # half precision rounds the timesteps, too
        config = getattr(self.scheduler, "config", None)
        # it may be a timestep, or its share of the training steps
        tables = torch.stack([listed, listed / getattr(config, "num_train_timesteps", 1000)])
        # relative to each entry and, a little, to the largest, which serves entries near 0
        scale = tables.abs().double() + 1e-3 * tables.abs().amax(1, keepdim=True)
        off = (tables - time).abs().double() / scale
        if not off.min() <= 0.5:
            valid = f"one that the scheduler lists, {listed[0]:.6g} to {listed[-1]:.6g}"
            refuse("timestep", float(f"{float(time):.6g}"), valid)
        # 1 may be a last timestep of 1, or a first one of 1000, divided: both are candidates then
        places = (off == off.min()).nonzero()[:, 1].tolist()
        # the scheduler's own index tells apart timesteps that rounding made equal
        own = getattr(self.scheduler, "step_index", -1)
        if own is None:  # before its first step
            own = getattr(self.scheduler, "begin_index", None) or 0
        return int(self.steps[own if own in places else places[0]]), float(time)


def _entry_of(time, listed) -> int | None:
    """The place of `time` in the tensor `listed` if it is a view of one of its entries."""
    if not all(isinstance(t, torch.Tensor) for t in (time, listed)):
        return None
    size = (listed.stride(0) or 1) * listed.element_size()
    place, rest = divmod(time.data_ptr() - listed.data_ptr(), size)
    return place if rest == 0 and 0 <= place < len(listed) else None


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
