"""Listening to, and editing, one module of a diffusion model while it samples.

A *hookpoint* is the dotted name of a module inside the denoiser (`pipe.unet`, `pipe.transformer`,
or any `torch.nn.Module`), as `named_modules()` spells it: `up_blocks.1.attentions.1`. Its *signal*
is the module's `output`, its `input`, or its `update`, output - input. Activations are handed over
as (row, token, channel): image tokens alone, in reading order of an upright grid.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import NamedTuple

import torch

from helpers.checks import nearest, one_of, refuse
from helpers.pipelines.calls import Call, CallReader

SIGNALS = ("output", "input", "update")
# names of modules through which only text goes
TEXT_ONLY = r"context|caption|text_|txt_|add_[qkv]_proj|to_add_out|attn2\.to_[kv]"
# the lists in which models keep their blocks
BLOCKS = ("attentions", "resnets", *(f"{k}transformer_blocks" for k in ("", "joint_", "single_")))


class Tap(NamedTuple):
    """Where to listen: a module of the denoiser, its signal, and the branch of guidance."""

    hookpoint: str
    signal: str = "output"
    branch: str = "conditional"

    @classmethod
    def of(cls, value) -> Tap:
        return cls(value) if isinstance(value, str) else cls(*value)


def find(denoiser: torch.nn.Module, hookpoint: str) -> torch.nn.Module:
    """The module called `hookpoint`; ValueError with the nearest names if there is none."""
    modules = {name: module for name, module in denoiser.named_modules() if name}
    if hookpoint not in modules:
        near = nearest(hookpoint, usual(denoiser) or modules)  # others may hold no image tokens
        refuse("hookpoint", hookpoint, f"a module of {type(denoiser).__name__}, such as {near}")
    return modules[hookpoint]


def usual(denoiser: torch.nn.Module) -> list[str]:
    """Where one would usually listen: the members of the denoiser's lists of blocks."""
    names = [name.split(".") for name, _ in denoiser.named_modules()]
    listed = [n for n in names if n[-1].isdigit() and len(n) <= 4]
    known = [n for n in listed if len(n) > 1 and n[-2] in BLOCKS]
    known = [n for n in known if "transformer_blocks" not in n[:-2]]  # not the blocks within blocks
    return [".".join(n) for n in known or listed]


@contextmanager
def listen(denoiser, scheduler, tap, on_call, *, n_images=None, skip_unfit=False):
    """While the context lasts, call `on_call(activation, call)` each time the tap's module runs.

    `activation` is Float[Tensor, "row token channel"]. A tensor that `on_call` returns, of the same
    shape, takes its place (for `update`, the module's output becomes its input + that tensor).
    `scheduler` is one of diffusers', or the timesteps of a sampling loop, noisiest first; all
    branches are heard. `n_images` in the batch tells two branches from a plain batch; None: as many
    as rows. Hooks are removed when the context ends, whatever ended it. ValueError for a hookpoint
    that does not exist or (unless `skip_unfit`) holds no grid of tokens, for timesteps that do not
    say which step is running, and for a compiled model, under which hooks do not run.
    """
    tap = Tap.of(tap)
    one_of("signal", tap.signal, SIGNALS)
    if any(_is_compiled(module) for module in denoiser.modules()):
        refuse("model", type(denoiser).__name__, "the one before torch.compile (`._orig_mod`)")
    calls = CallReader(denoiser, scheduler, n_images)
    module = find(denoiser, tap.hookpoint)
    listener = _Listener(module, tap, on_call, calls, skip_unfit)
    handles = [denoiser.register_forward_pre_hook(calls.note, with_kwargs=True)]
    if tap.signal != "output":
        handles.append(module.register_forward_pre_hook(listener.enter, with_kwargs=True))
    if tap.signal != "input":
        handles.append(module.register_forward_hook(listener.leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_branch(tokens: torch.Tensor, call: Call) -> dict[str, torch.Tensor]:
    """Rows of each branch of guidance that the call runs, in the order of the images."""
    return dict(zip(call.branches, tokens.chunk(len(call.branches))))


def _is_compiled(module: torch.nn.Module) -> bool:
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module, "_orig_mod")
        or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
    )


class _Listener:
    """The hooks of one tap: `enter` runs before its module, `leave` after it."""

    def __init__(self, module, tap: Tap, on_call, calls: CallReader, skip_unfit: bool):
        self.tap, self.on_call, self.calls, self.skip_unfit = tap, on_call, calls, skip_unfit
        only_text = re.search(TEXT_ONLY, tap.hookpoint) is not None
        # a group norm's three axes are (row, channel, token)
        self.only_grids = only_text or isinstance(module, torch.nn.GroupNorm)
        kind = type(module).__name__
        # attentions and CogView's blocks return (image, text), other blocks (text, image)
        self.image_first = "Attention" in kind or kind.startswith("CogView")
        self.entered: torch.Tensor | None = None  # input tokens, until the update is known

    def enter(self, _, args, kwargs):
        """Hand over the module's input, or keep it until the output is there."""
        if self.calls.now is None:
            return None
        key, value = _image_argument(args, kwargs)
        part = self._part(value)
        if part is None:
            return self._unfit(value)
        if self.tap.signal == "update":
            self.entered = part.tokens().clone()  # the module may write over its input
            return None
        edited = self.on_call(part.tokens(), self.calls.now._replace(grid=part.grid))
        if edited is None:
            return None
        new = part.put(edited)
        if isinstance(key, str):
            return args, kwargs | {key: new}
        return (*args[:key], new, *args[key + 1 :]), kwargs

    def leave(self, _, args, output):
        """Hand over the module's output, or what it adds to its input."""
        if self.calls.now is None:
            return None
        entered, self.entered = self.entered, None
        part = self._part(output)
        if part is None:
            return self._unfit(output)
        heard, update = part.tokens(), self.tap.signal == "update"
        if update:
            if entered is None or entered.shape != heard.shape:
                return self._unfit(output)
            heard = heard - entered
        edited = self.on_call(heard, self.calls.now._replace(grid=part.grid))
        if edited is not None:
            return part.put(entered + edited if update else edited)

    def _part(self, value) -> _Part | None:
        """The image within a tensor, a tuple or a dict of tensors."""
        if value is None or isinstance(value, torch.Tensor):
            entries = [(None, value)]
        else:
            entries = enumerate(value.values() if isinstance(value, dict) else value)
        parts = []
        for position, tensor in entries:
            if not isinstance(tensor, torch.Tensor) or (tensor.ndim == 3 and self.only_grids):
                continue
            if found := _grid_in(tensor, self.calls.now):
                parts.append(_Part(value, position, tensor, *found))
        parts = [p for p in parts if p.text == 0] or parts  # without text in front, if there is one
        return parts[0 if self.image_first else -1] if parts else None

    def _unfit(self, value):
        if not self.skip_unfit:
            what = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            valid = f"a module whose {self.tap.signal} is a grid of image tokens, not {what}"
            refuse("hookpoint", self.tap.hookpoint, valid)


def _image_argument(args, kwargs):
    """Name or position, and value, of the argument through which a module is given the image."""
    if "hidden_states" in kwargs:
        return "hidden_states", kwargs["hidden_states"]
    place = next((i for i, a in enumerate(args) if isinstance(a, torch.Tensor)), None)
    return place, None if place is None else args[place]


class _Part(NamedTuple):
    """The image within what a module is given or returns."""

    value: object  # all of it
    position: int | None  # of the tensor within it; None if it is the tensor
    tensor: torch.Tensor  # (row, channel, height, width) or (row, token, channel)
    grid: tuple[int, int]
    text: int  # tokens of text before the image's

    def tokens(self) -> torch.Tensor:
        t = self.tensor
        return t.flatten(2).transpose(1, 2) if t.ndim == 4 else t[:, self.text :]

    def put(self, tokens: torch.Tensor):
        """The whole value with the image's tokens replaced."""
        new = tokens.to(self.tensor.dtype)
        if self.tensor.ndim == 4:
            new = new.transpose(1, 2).unflatten(2, self.grid).contiguous()
        elif self.text:
            new = torch.cat([self.tensor[:, : self.text], new], 1)
        if self.position is None:
            return new
        kind, named = type(self.value), isinstance(self.value, dict)
        entries = list(self.value.values() if named else self.value)
        entries[self.position] = new
        return kind(**dict(zip(self.value, entries))) if named else kind(entries)


def _grid_in(tensor: torch.Tensor, call: Call) -> tuple[tuple[int, int], int] | None:
    """Rows and columns of a tensor's image tokens, and how many text tokens stand before them."""
    latents, exact, text = call.latents, call.grid, call.text
    if tensor.ndim == 4 and len(tensor) == len(latents):
        grid = tuple(tensor.shape[2:])
        fits = not exact or grid in (exact, tuple(latents.shape[2:]))
        return (grid, 0) if fits else None  # else they are the heads of an attention
    if tensor.ndim != 3:
        return None
    n = tensor.shape[1]
    if exact:
        before = n - exact[0] * exact[1]
        return (exact, before) if before in (0, text) else None
    if latents.ndim == 4:
        grid = _scaled(n, *latents.shape[2:])
    else:  # packed tokens of unknown shape: a square, unless text is among them
        grid = None if text else _scaled(n, 1, 1)
    return grid and (grid, 0)


def _scaled(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of tokens over height × width: halved some times or in proportion."""
    for halvings in range(8):
        rows, columns = -(-height // 2**halvings), -(-width // 2**halvings)
        if rows * columns == tokens:
            return rows, columns
    for rows in range(1, tokens + 1):
        if tokens % rows == 0 and rows * width == tokens // rows * height:
            return rows, tokens // rows
    return None
