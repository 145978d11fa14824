"""Listening to, and editing, one layer of a diffusion model while it samples.

A *hookpoint* is the dotted name of a module inside the denoiser (`pipe.unet`, `pipe.transformer`, or any
`torch.nn.Module`), as `named_modules()` spells it: `up_blocks.1.attentions.1`. Its *signal* is the module's `output`,
its `input`, or its `update`, output - input. Which denoising step is running is read from the timestep the denoiser
is given, never from counting calls, so solvers that call the model twice in a step do not confuse it.

Activations are handed over as (row, token, channel): image tokens alone, in reading order of an upright grid.
"""

from __future__ import annotations

import difflib
import inspect
import re
from contextlib import contextmanager
from dataclasses import dataclass

import torch

SIGNALS = ("output", "input", "update")
BRANCHES = ("conditional", "unconditional")
# under guidance most pipelines put the unconditional rows first; these put them last
CONDITIONAL_FIRST = ("DiTTransformer2DModel", "StableCascadeUNet", "WuerstchenPrior")
# these are given 1 - timestep / 1000, which names another step of the same list
REVERSED_TIME = ("LuminaNextDiT2DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel")
TEXT_ONLY = r"context|caption|text_|txt_|add_[qkv]_proj|to_add_out|attn2\.to_[kv]"  # names of modules through which no image token goes


@dataclass(frozen=True)
class Call:
    """Where sampling stands when a hookpoint fires."""

    step: int  # counted from the noisiest
    timestep: float  # the value the denoiser was given
    repeated: bool  # the solver calls the model once more within the step (Heun, PNDM)
    grid: tuple[int, int]  # token rows and columns
    branches: tuple[str, ...]  # which branch of guidance each equal part of the rows belongs to


def denoiser_of(pipe) -> torch.nn.Module:
    """The network that a diffusers pipeline calls at each step."""
    if hasattr(
        pipe, "set_pag_applied_layers"
    ):  # its rows hold a third, perturbed branch, in an order of their own
        raise ValueError(
            f"model {type(pipe).__name__} runs perturbed-attention guidance, whose rows are not told apart; valid is the pipeline without PAG"
        )
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), torch.nn.Module):
            return getattr(pipe, name)
    raise ValueError(
        f"model {type(pipe).__name__} has neither a `unet` nor a `transformer` to listen to"
    )


def find(denoiser: torch.nn.Module, hookpoint: str) -> torch.nn.Module:
    """The module called `hookpoint`; ValueError with the nearest names if there is none."""
    modules = {name: m for name, m in denoiser.named_modules() if name}
    if hookpoint in modules:
        return modules[hookpoint]
    near = (
        difflib.get_close_matches(hookpoint, modules, 4, 0.5)
        or (usual(denoiser) or list(modules))[:6]
    )
    raise ValueError(
        f"hookpoint {hookpoint!r} is not a module of {type(denoiser).__name__}; valid ones are like {', '.join(near)}"
    )


def usual(denoiser: torch.nn.Module) -> list[str]:
    """Where one would usually listen: members of the denoiser's lists of blocks, not the blocks within transformer blocks."""
    numbered = [
        n for n, _ in denoiser.named_modules() if n.split(".")[-1].isdigit() and n.count(".") <= 3
    ]
    blocks = (
        "attentions",
        "resnets",
        "transformer_blocks",
        "joint_transformer_blocks",
        "single_transformer_blocks",
    )
    known = [
        n
        for n in numbered
        if "." in n and n.split(".")[-2] in blocks and "transformer_blocks" not in n.split(".")[:-2]
    ]
    return known or numbered


def numbered(scheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """The timesteps of a scheduler, or a sequence of them, noisiest first, and the step that each belongs to."""
    listed = torch.as_tensor(getattr(scheduler, "timesteps", scheduler)).cpu()
    n = getattr(scheduler, "num_inference_steps", None)
    if n == len(
        listed
    ):  # equal neighbours are two steps: Karras' noise levels, rounded to whole timesteps
        return listed, torch.arange(n)
    prk = (
        getattr(getattr(scheduler, "config", None), "skip_prk_steps", True) is False
    )  # PNDM's Runge-Kutta looks, up to four a step
    if n and 2 * n - 1 == len(listed) and not prk:  # two looks a step: Heun, KDPM2
        return listed, (torch.arange(2 * n - 1) + 1) // 2
    step = torch.unique_consecutive(listed, return_inverse=True)[1]  # PNDM looks twice at one step
    if (
        n and int(step[-1]) + 1 != n and not getattr(scheduler, "custom_timesteps", False)
    ):  # with these, n is of the time before
        raise ValueError(
            f"scheduler {type(scheduler).__name__} lists {int(step[-1]) + 1} different timesteps for num_inference_steps={n}, so its steps are not told apart; valid is one timestep a step (PNDM: skip_prk_steps=True)"
        )
    return listed, step


def steps_of(scheduler) -> torch.Tensor:
    """The timestep of each step, noisiest first."""
    listed, step = numbered(scheduler)
    return listed[torch.searchsorted(step, torch.arange(int(step.max()) + 1), right=True) - 1]


def _step(given, scheduler, listed, step) -> tuple[int, float]:
    """Index of the step whose timestep the denoiser was given, and that value; some pipelines hand over timestep / 1000."""
    own = getattr(scheduler, "timesteps", scheduler)
    if (
        all(isinstance(t, torch.Tensor) for t in (given, own))
        and given.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
    ):
        at, off = divmod(given.storage_offset() - own.storage_offset(), own.stride(0) or 1)
        if off == 0 and 0 <= at < len(
            own
        ):  # an entry of the list itself: a GPU need not be waited for
            return int(step[at]), float(listed[at])
    given = torch.as_tensor(given).flatten()[0].cpu()
    listed = (
        listed.to(given.dtype) if given.is_floating_point() else listed
    )  # half precision rounds the timesteps, too
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
    far = [
        (table - given).abs().double() / (table.abs().double() + 1e-3 * table.abs().max())
        for table in (listed, listed / trained)
    ]
    distance = min(far, key=lambda f: f.min())
    tied = (
        far[0].min() == far[1].min()
    )  # 1 is a last timestep of 1, or a first one of 1000, divided
    if distance.min() > 0.5:
        raise ValueError(
            f"the denoiser was given timestep {float(given):.6g}, which is none of the scheduler's; valid are the timesteps that it lists, {float(listed[0]):.6g} to {float(listed[-1]):.6g}"
        )
    nearest = (distance == distance.min()).nonzero().flatten().tolist()
    either = (
        (torch.minimum(*far) == distance.min()).nonzero().flatten().tolist() if tied else nearest
    )
    at = getattr(scheduler, "step_index", -1)  # tells apart those that rounding made equal, too
    at = (
        (getattr(scheduler, "begin_index", None) or 0) if at is None else at
    )  # None before the first step
    return int(step[at if at in either else nearest[0]]), float(given)


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of `tokens` tokens over `height` × `width` latents: halved some times, or in proportion; None if neither."""
    for halvings in range(8):
        rows, columns = -(-height // 2**halvings), -(-width // 2**halvings)
        if rows * columns == tokens:
            return rows, columns
    for rows in range(1, tokens + 1):
        if tokens % rows == 0 and rows * width == tokens // rows * height:
            return rows, tokens // rows
    return None


class _Sampling:
    """What the denoiser's own inputs tell about the running call."""

    def __init__(self, denoiser, scheduler, n_images, image_tokens):
        self.signature = inspect.signature(denoiser.forward)
        self.patch = getattr(getattr(denoiser, "config", None), "patch_size", None)
        self.reversed = type(denoiser).__name__ in CONDITIONAL_FIRST
        self.registers = (
            denoiser.register_tokens.shape[1]
            if type(denoiser).__name__.startswith("AuraFlow")
            else 0
        )  # before the text
        self.scheduler, self.n_images, self.image_tokens = scheduler, n_images, image_tokens
        self.step = self.latents = self.listed = None

    def note(self, args, kwargs) -> None:
        given = self.signature.bind_partial(*args, **kwargs).arguments
        names = list(given)
        latents = given[next((n for n in ("sample", "hidden_states") if n in given), names[0])]
        timestep = given[
            next(
                (n for n in ("timestep", "timesteps", "t", "sigma") if n in given),
                names[1 % len(names)],
            )
        ]
        if not isinstance(latents, torch.Tensor):
            raise ValueError(
                f"model: its denoiser was given a {type(latents).__name__} for its latents; valid is a forward that names its arguments and takes latents as one tensor"
            )
        self.ignored = (
            given.get("skip_layers") is not None
        )  # SD 3's skip-layer guidance: neither branch, some blocks left out
        if self.ignored:
            return
        before, self.step_before = self.latents, self.step
        listed = getattr(self.scheduler, "timesteps", self.scheduler)
        if listed is not self.listed:  # set anew by each call of a pipeline
            self.listed, self.numbers, self.first = listed, numbered(self.scheduler), None
        self.step, self.timestep = _step(timestep, self.scheduler, *self.numbers)
        self.first = self.step if self.first is None else self.first
        if (
            self.step_before is not None
            and self.first != self.step < self.step_before
            and self.step
        ):  # a new run begins at 0, or where the last one did
            raise ValueError(
                f"the denoiser was given timestep {self.timestep:.6g}, step {self.step}, after step {self.step_before}; valid are the timesteps in the order that the scheduler lists them"
            )
        same_step = self.step == self.step_before
        same_latents = (
            same_step
            and before is not None
            and before.shape == latents.shape
            and torch.equal(before, latents)
        )
        # the same latents again are guidance's other branch, other latents are the solver's second look
        self.pass_ = self.pass_ + 1 if same_latents else 0
        self.repeated = same_step and (self.repeated if same_latents else True)
        self.latents = latents.clone()  # loops may change theirs in place
        rows = len(latents)
        n = rows // self.n_images if self.n_images and rows % self.n_images == 0 else 1
        if n > 2:
            raise ValueError(
                f"the denoiser was given {rows} rows for {self.n_images} images; valid are one row an image, or two under classifier-free guidance"
            )
        order = BRANCHES if self.reversed else BRANCHES[::-1]
        self.branches = order if n == 2 else (BRANCHES[min(self.pass_, 1)],)
        text = given.get("encoder_hidden_states")
        self.text = (
            text.shape[1] + self.registers
            if isinstance(text, torch.Tensor) and text.ndim == 3
            else 0
        )
        ids, sizes = given.get("img_ids"), given.get("img_shapes")
        if ids is not None:
            ids = ids.reshape(-1, ids.shape[-1])[
                :, 1:3
            ]  # Flux: (0, row, column); Flux 2: (image, row, column, layer)
            self.exact = tuple(int(v) for v in ids.amax(0) - ids.amin(0) + 1)
        elif sizes:  # Qwen: for each row, (frames, rows, columns) of its images
            self.exact = tuple((sizes[0][0] if isinstance(sizes[0], list) else sizes[0])[-2:])
        elif latents.ndim == 4 and isinstance(self.patch, int):
            self.exact = (latents.shape[2] // self.patch, latents.shape[3] // self.patch)
        else:
            self.exact = None
        if self.exact and latents.ndim == 3 and latents.shape[1] != self.exact[0] * self.exact[1]:
            raise ValueError(
                f"the denoiser was given {latents.shape[1]} tokens for a grid of {self.exact[0]} × {self.exact[1]}; valid is one image, without reference images beside it"
            )

    def fit(self, tensor) -> tuple[tuple[int, int], int] | None:
        """Grid of a tensor's image tokens and how many tokens (of text) stand before them; None if it holds no grid."""
        if tensor.ndim == 4 and len(tensor) == len(self.latents):
            grid, own = tuple(tensor.shape[2:]), tuple(self.latents.shape[2:])
            return (
                (grid, 0) if not self.exact or grid in (self.exact, own) else None
            )  # not the heads of an attention
        if tensor.ndim != 3 or not self.image_tokens:
            return None
        n = tensor.shape[1]
        if self.exact:
            before = n - self.exact[0] * self.exact[1]
            return (self.exact, before) if before in (0, self.text) else None
        grid = (
            _grid(n, *self.latents.shape[-2:])
            if self.latents.ndim == 4
            else None
            if self.text
            else _square(n)
        )
        return grid and (grid, 0)


def _square(tokens: int) -> tuple[int, int] | None:
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else None


def _image_part(module, value, sampling: _Sampling):
    """Of a module's output: its position (None for a bare tensor), the tensor that holds the image, its grid, text tokens before it."""
    if isinstance(value, torch.Tensor):
        fits = sampling.fit(value)
        return fits and (None, value, *fits)
    entries = list(value.values()) if isinstance(value, dict) else list(value)
    fitting = [
        (i, v, sampling.fit(v)) for i, v in enumerate(entries) if isinstance(v, torch.Tensor)
    ]
    fitting = [(i, v, f) for i, v, f in fitting if f]
    fitting = [
        c for c in fitting if c[2][1] == 0
    ] or fitting  # without text in front, if there is such a one
    if not fitting:
        return None
    image_first = "Attention" in type(module).__name__ or type(module).__name__.startswith(
        "CogView"
    )
    i, v, fits = fitting[
        0 if image_first else -1
    ]  # two-stream blocks return (text, image), CogView's and attention (image, text)
    return i, v, *fits


def _tokens(tensor, before):
    return tensor.flatten(2).transpose(1, 2) if tensor.ndim == 4 else tensor[:, before:]


def _put(tensor, tokens, grid, before):
    """The tensor with its image tokens replaced."""
    tokens = tokens.to(tensor.dtype)
    if tensor.ndim == 4:
        return tokens.transpose(1, 2).unflatten(2, grid).contiguous()
    return torch.cat([tensor[:, :before], tokens], 1) if before else tokens


def _put_into(value, position, tensor):
    if position is None:
        return tensor
    if isinstance(value, dict):  # diffusers' output classes
        return type(value)(
            **{name: tensor if i == position else v for i, (name, v) in enumerate(value.items())}
        )
    return type(value)(tensor if i == position else v for i, v in enumerate(value))


@contextmanager
def listen(
    denoiser: torch.nn.Module,
    scheduler,
    hookpoint: str,
    on_call,
    *,
    n_images: int | None = None,
    signal: str = "output",
    skip_unfit: bool = False,
):
    """While the context lasts, call `on_call(activation, call)` each time the hookpoint's module runs.

    Parameters
    ----------
    scheduler : a diffusers scheduler, or the timesteps of a sampling loop, noisiest first
    on_call : function
        Takes the activation, Float[Tensor, "row token channel"], and a `Call`. If it returns a tensor of the same
        shape, that takes the activation's place (for `update`, the output becomes input + what was returned).
    n_images : int, optional
        Images in the batch, to tell classifier-free guidance's two branches from a plain batch; None: as many as rows.
    signal : 'output', 'input' or 'update' of the module
    skip_unfit : bool
        Pass over a module without a grid of tokens, instead of raising ValueError.

    Raises
    ------
    ValueError
        No such hookpoint or signal, no grid of tokens there, a compiled model, under which hooks do not run, or a model or
        a loop whose timesteps do not say which step is running.

    Hooks are removed when the context ends, whatever ended it.
    """
    if signal not in SIGNALS:
        raise ValueError(f"signal {signal!r} is not one of {', '.join(SIGNALS)}")
    if any(
        getattr(m, "_compiled_call_impl", None) is not None
        or hasattr(m, "_orig_mod")
        or hasattr(getattr(m, "forward", None), "_torchdynamo_orig_callable")
        for m in denoiser.modules()
    ):
        raise ValueError(
            "model: its denoiser is compiled by torch.compile, under which hooks are passed over; valid is the model before compiling (`._orig_mod`)"
        )
    if type(denoiser).__name__ in REVERSED_TIME:
        raise ValueError(
            f"model: its denoiser {type(denoiser).__name__} is given 1 - timestep / 1000, which is not read here; valid are denoisers that are given the scheduler's timesteps, or these / 1000"
        )
    module = find(denoiser, hookpoint)
    image_tokens = not re.search(TEXT_ONLY, hookpoint) and not isinstance(
        module, torch.nn.GroupNorm
    )  # its three axes are (row, channel, token)
    sampling = _Sampling(denoiser, scheduler, n_images, image_tokens)
    inputs: dict = {}

    def unfit(value):
        if skip_unfit:
            return None
        what = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(
            f"hookpoint {hookpoint!r}: its {signal} ({what}) is not a grid of image tokens; valid are blocks, attentions and resnets"
        )

    def call(grid):
        return Call(sampling.step, sampling.timestep, sampling.repeated, grid, sampling.branches)

    def before(_, args, kwargs):
        if sampling.ignored:
            return None
        key = (
            "hidden_states"
            if "hidden_states" in kwargs
            else next((i for i, a in enumerate(args) if isinstance(a, torch.Tensor)), None)
        )
        value = kwargs[key] if key == "hidden_states" else args[key] if key is not None else None
        fits = sampling.fit(value) if value is not None else None
        if fits is None:
            return unfit(value)
        if signal == "update":
            inputs["tokens"] = _tokens(
                value, fits[1]
            ).clone()  # the module may write over its input
            return None
        edited = on_call(_tokens(value, fits[1]), call(fits[0]))
        if edited is None:
            return None
        new = _put(value, edited, *fits)
        if key == "hidden_states":
            return args, kwargs | {key: new}
        return (*args[:key], new, *args[key + 1 :]), kwargs

    def after(_, __, output):
        if sampling.ignored:
            return None
        part = _image_part(module, output, sampling)
        if part is None:
            return unfit(output)
        position, tensor, grid, text = part
        tokens = _tokens(tensor, text)
        if signal == "update":
            entering = inputs.pop("tokens", None)
            if entering is None or entering.shape != tokens.shape:
                return unfit(output)
            edited = on_call(tokens - entering, call(grid))
            edited = None if edited is None else entering + edited
        else:
            edited = on_call(tokens, call(grid))
        return (
            None
            if edited is None
            else _put_into(output, position, _put(tensor, edited, grid, text))
        )

    handles = [
        denoiser.register_forward_pre_hook(
            lambda _, args, kwargs: sampling.note(args, kwargs), with_kwargs=True
        )
    ]
    if signal != "output":
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    if signal != "input":
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_of(tokens: torch.Tensor, call: Call, branch: str) -> torch.Tensor | None:
    """The rows of one branch of guidance, in the order of the images; None if this call does not run it."""
    if branch not in call.branches:
        return None
    return tokens.chunk(len(call.branches))[call.branches.index(branch)]
