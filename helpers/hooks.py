"""Listening to, and editing, one layer of a diffusion model while it samples.

A *hookpoint* is the dotted name of a module inside the denoiser (`pipe.unet` or `pipe.transformer`), as
`named_modules()` spells it: `up_blocks.1.attentions.1`. Which denoising step is running is read from
the timestep the denoiser is given, never from counting calls, so solvers that call the model
twice in a step do not confuse it.

Activations are handed over as (image, token, channel), tokens in reading order of an upright grid.
"""

from __future__ import annotations

import difflib
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Call:
    """Where sampling stands when a hookpoint fires."""

    step: int  # index into the scheduler's distinct timesteps, noisiest first
    timestep: float  # the scheduler's value
    repeated: bool  # a second call within the step (Heun, PNDM)
    grid: tuple[int, int]  # token rows and columns
    branches: int  # 2 when the batch holds unconditional, then conditional rows; else 1


def denoiser_of(pipe) -> torch.nn.Module:
    """The network that a diffusers pipeline calls at each step."""
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), torch.nn.Module):
            return getattr(pipe, name)
    raise ValueError(f"model {type(pipe).__name__} has neither a `unet` nor a `transformer` to listen to")


def find(denoiser: torch.nn.Module, hookpoint: str) -> torch.nn.Module:
    """The module called `hookpoint`; ValueError with the nearest names if there is none."""
    modules = {name: m for name, m in denoiser.named_modules() if name}
    if hookpoint in modules:
        return modules[hookpoint]
    usual = [n for n in modules if n.split(".")[-1].isdigit() and n.split(".")[-2] in ("attentions", "resnets")]
    near = difflib.get_close_matches(hookpoint, modules, 4, 0.5) or (usual or list(modules))[:6]
    raise ValueError(f"hookpoint {hookpoint!r} is not a module of {type(denoiser).__name__}; valid ones are like {', '.join(near)}")


def steps_of(scheduler) -> torch.Tensor:
    """The scheduler's distinct timesteps, noisiest first (PNDM and Heun list some of them twice)."""
    return torch.unique_consecutive(scheduler.timesteps)


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of `tokens` tokens over a latent of `height` × `width`, keeping its aspect ratio; None if they do not fit."""
    for rows in range(1, tokens + 1):
        if tokens % rows == 0 and rows * width == tokens // rows * height:
            return rows, tokens // rows
    return None


@contextmanager
def listen(denoiser: torch.nn.Module, scheduler, hookpoint: str, n_images: int, on_call, skip_unfit: bool = False):
    """While the context lasts, call `on_call(activation, call)` each time the hookpoint's module has run.

    Parameters
    ----------
    n_images : int
        Images in the batch, to tell classifier-free guidance's two branches from a plain batch.
    on_call : function
        Takes the activation, Float[Tensor, "row token channel"] (all rows of the batch, unconditional
        first), and a `Call`. If it returns a tensor of the same shape, that takes the activation's place.

    skip_unfit : bool
        Pass over a module whose output is not a grid of tokens, instead of raising ValueError.

    Hooks are removed when the context ends, whatever ended it.
    """
    module = find(denoiser, hookpoint)
    state = {"step": None, "calls": 0}

    def before(_, args, kwargs):
        sample = kwargs["sample"] if "sample" in kwargs else kwargs.get("hidden_states", args[0] if args else None)
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        value = float(torch.as_tensor(timestep).flatten()[0])
        steps = steps_of(scheduler).to("cpu", torch.float64)
        step = int((steps - value).abs().argmin())
        state["calls"] = state["calls"] + 1 if step == state["step"] else 0
        state.update(step=step, timestep=value, sample=sample.shape)

    def after(_, __, output):
        tensor = output
        while not isinstance(tensor, torch.Tensor):  # tuples and diffusers' output classes: the first entry
            tensor = tensor[0]
        rows = state["sample"][0]
        branches = rows // n_images if rows % n_images == 0 else 1
        if tensor.ndim == 4:
            grid, tokens = tuple(tensor.shape[2:]), tensor.flatten(2).transpose(1, 2)
        elif tensor.ndim == 3:
            grid, tokens = _grid(tensor.shape[1], *state["sample"][-2:]), tensor
        else:
            grid = None
        if grid is None and skip_unfit:
            return None
        if grid is None:
            raise ValueError(f"hookpoint {hookpoint!r} gives shape {tuple(tensor.shape)}, not a grid of tokens; valid are blocks, attentions and resnets")
        edited = on_call(tokens, Call(state["step"], state["timestep"], state["calls"] > 0, grid, branches))
        if edited is None:
            return None
        edited = edited.to(tensor.dtype)
        new = edited.transpose(1, 2).unflatten(2, grid).contiguous() if tensor.ndim == 4 else edited
        if isinstance(output, torch.Tensor):
            return new
        return (new, *output[1:]) if isinstance(output, tuple) else type(output)(new)

    handles = [denoiser.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def conditional(tokens: torch.Tensor, call: Call) -> torch.Tensor:
    """The rows of the conditional branch; all of them where there is no guidance."""
    return tokens.chunk(call.branches)[-1]
