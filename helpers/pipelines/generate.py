"""Generating images, each from its own seed, under any diffusers pipeline of images."""

import inspect
import logging
import math
import re
import warnings
from contextlib import contextmanager, suppress
from numbers import Integral

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from helpers.checks import refuse
from helpers.pipelines.calls import numbered
from helpers.pipelines.loading import check_weights


def generate(pipe, prompts, seeds, **sampling) -> np.ndarray:
    """Images of one batch of prompts: float32, (image, height, width, channel), in [0, 1].

    Noise is drawn on the CPU, from one generator an image, so an image depends neither on the
    device nor on its batch, beyond rounding. Prompts may be names or numbers of classes. `sampling`
    are arguments of the pipeline's call; height or width 0 is the model's own, and one
    negative_prompt, or one image, serves the whole batch. Raises ValueError for an argument or a
    size that the pipeline does not take, and for noise that does not come from the seeds.
    """
    arguments = arguments_of(pipe, prompts, sampling)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad(), _no_other_noise(pipe):
            made = pipe(**arguments, generator=generators, output_type="np")
    except (AttributeError, TypeError) as error:
        scheduler, kind = type(getattr(pipe, "scheduler", None)).__name__, type(pipe).__name__
        if "BFloat16" in str(error):
            valid = f"'float32' or 'float16', in which {kind} can hand out images"
            refuse("dtype", "bfloat16", valid)
        if scheduler in str(error):
            refuse("scheduler", scheduler, f"one that {kind} can run ({error})")
        raise
    if not hasattr(made, "images"):
        refuse("model", type(pipe).__name__, f"a pipeline that makes images, not {', '.join(made)}")
    images = np.asarray(made.images).astype(np.float32, copy=False)
    if not np.isfinite(images).all():
        check_weights(pipe)
        valid = "a wider one, or guidance and edits weaker; images hold NaN or infinity"
        refuse("dtype", str(pipe.dtype).removeprefix("torch."), valid)
    return images


def generate_all(pipe, prompts, seeds, batch_size, *, desc=None, **sampling) -> np.ndarray:
    """`generate` in batches, joined; `desc` stands before a progress bar, None for no bar."""
    starts = tqdm(range(0, len(prompts), batch_size), desc, disable=desc is None or None)
    batches = (slice(start, start + batch_size) for start in starts)
    return np.concatenate([generate(pipe, prompts[b], seeds[b], **sampling) for b in batches])


def switch_prompts(pipe, before, after, seeds, step: int, **sampling) -> np.ndarray:
    """`generate` with prompts `before`, but `after` from denoising step `step` on.

    0 is `after` throughout, the number of steps or more is `before` throughout. Raises ValueError
    for a pipeline in which what the prompts say cannot be exchanged on the way.
    """
    if step <= 0:
        return generate(pipe, after, seeds, **sampling)
    names = _exchangeable(pipe)

    def run(prompts, at_end_of_step):
        callback = {"callback_on_step_end": at_end_of_step}
        callback["callback_on_step_end_tensor_inputs"] = names
        return generate(pipe, prompts, seeds, **callback, **sampling)

    def keep(_, i, timestep, tensors):
        new.update((k, v) for k, v in tensors.items() if isinstance(v, torch.Tensor))
        raise _Enough

    def exchange(_, i, timestep, tensors):
        steps = numbered(pipe.scheduler)[1]
        if any(new[k].shape != tensors[k].shape for k in new):
            refuse("prompts", "of different lengths", "encoded to the same number of tokens")
        return new if i + 1 < len(steps) and steps[i + 1] >= step else {}

    new = {}
    with suppress(_Enough):  # one step with the other prompts, to have them encoded
        run(after, keep)
    return run(before, exchange)


class _Enough(Exception):
    pass


def _exchangeable(pipe) -> list[str]:
    """Tensors by which a caption reaches the denoiser, all of which a callback can exchange."""
    names = [n for n in getattr(pipe, "_callback_tensor_inputs", ()) if "embeds" in n]
    taken = inspect.signature(pipe.__call__).parameters
    needed = [n for n in taken if re.match(r"(pooled_)?prompt_.*(embeds|mask)", n)]
    same = {"pooled_prompt_embeds": "add_text_embeds"}  # SDXL's name for it
    missing = [n for n in needed if n not in names and same.get(n) not in names]
    if "callback_on_step_end" not in taken or "prompt_embeds" not in names or missing:
        valid = "one with callback_on_step_end for all by which prompts reach the denoiser"
        refuse("model", type(pipe).__name__, valid)
    return names


def warn_of_long(pipe, prompts, sampling: dict, silent=False) -> None:
    """Warn, once and in one line, of prompts that each of the pipeline's tokenizers cuts."""
    taken = inspect.signature(pipe.__call__).parameters
    default = getattr(taken.get("max_sequence_length"), "default", None)
    asked, most = sampling.get("max_sequence_length", default) or math.inf, 0
    tokenizers = [t for t in pipe.components.values() if hasattr(t, "model_max_length")]
    cut = range(len(prompts)) if tokenizers else ()
    for t in tokenizers:
        limit = t.model_max_length if "CLIP" in type(t).__name__ else min(t.model_max_length, asked)
        # a token takes a byte or more, but for a few at the ends
        cut = [i for i in cut if len(prompts[i].encode()) + 4 > limit]
        cut = [i for i in cut if len(t(prompts[i], verbose=False).input_ids) > limit]
        most = max(most, limit)
    if cut:
        some = ", ".join(f"{i} ({prompts[i][:40]!r}…)" for i in cut[:3]) + ", …" * (len(cut) > 3)
        which = f"{len(cut)} of {len(prompts)} prompts are cut after {most} tokens: number {some}"
        if not silent:
            warnings.warn(which, stacklevel=3)
        for handler in logging.getLogger("diffusers").handlers:  # it would say so for each batch
            handler.addFilter(_not_of_cut_prompts)


def _not_of_cut_prompts(record: logging.LogRecord) -> bool:
    return "was truncated because" not in record.getMessage()


def arguments_of(pipe, prompts, sampling: dict) -> dict:
    """What to call the pipeline with for these prompts, apart from the noise."""
    taken = inspect.signature(pipe.__call__).parameters
    arguments = {k: v for k, v in sampling.items() if k not in ("height", "width") or v}
    if "guidance_scale" not in taken:  # an unconditional pipeline has nothing to guide
        arguments.pop("guidance_scale", None)
    for name in arguments:
        if name not in taken:
            known = (n for n in taken if n not in ("self", "args", "kwargs"))
            refuse("sampling", name, f"one of {', '.join(known)} for {type(pipe).__name__}")
    if {"height", "width"} <= set(taken):
        _check_size(pipe, sampling.get("height") or 0, sampling.get("width") or 0)
    # each image needs its own copy: diffusers would encode a single one with the first seed for all
    single = {"negative_prompt", "control_image"}
    if "strength" in taken:
        single |= {"image", "mask_image"}
    for name in single & set(arguments):
        value = arguments[name]
        is_array = isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim < 4
        if isinstance(value, (str, Image.Image)) or is_array:
            arguments[name] = [value] * len(prompts)
    if "prompt" in taken:
        arguments["prompt"] = list(prompts)
    elif "class_labels" in taken:
        arguments |= _classes(pipe, prompts)
    if "batch_size" in taken:
        arguments["batch_size"] = len(prompts)
    return arguments


@contextmanager
def _no_other_noise(pipe):
    """ValueError if torch's global generators were drawn from, so that images miss their seeds."""

    def states():
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()
        return [torch.get_rng_state(), *cuda]

    before = states()
    yield
    moved = [not torch.equal(a, b) for a, b in zip(before, states())]
    scheduler = type(getattr(pipe, "scheduler", None)).__name__
    if moved[0]:
        valid = f"one that draws from the seeds' generators alone (in {type(pipe).__name__})"
        refuse("scheduler", scheduler, valid)
    if any(moved):  # a GPU's kernels may move its state without drawing noise
        warnings.warn(f"scheduler {scheduler} may draw noise that misses the seeds", stacklevel=4)


def _check_size(pipe, height, width) -> None:
    """ValueError unless both are 0, or both whole numbers of pixels that the pipeline can draw."""
    if bool(height) != bool(width):
        given, missing = ("height", "width") if height else ("width", "height")
        refuse(missing, 0, f"given in pixels, as the {given} is")
    config = getattr(getattr(pipe, "image_processor", None), "config", None)
    factor = getattr(config, "vae_scale_factor", 1)
    for name, value in (("height", height), ("width", width)):  # some would round down instead
        if not isinstance(value, Integral) or value < 0 or value % factor:
            refuse(name, value, f"a multiple of {factor} pixels, or 0 for the model's own size")


def _classes(pipe, names) -> dict:
    """Numbers of classes from names or numbers; nothing for a model that was trained without."""
    config = getattr(pipe.components.get("unet"), "config", {})
    if config.get("num_class_embeds", 0) is None:
        return {}
    found = []
    for name in names:
        if not str(name).isdigit() and not hasattr(pipe, "get_label_ids"):
            refuse("class", name, f"a whole number: {type(pipe).__name__} knows no names")
        found.append(int(name) if str(name).isdigit() else pipe.get_label_ids([name])[0])
    return {"class_labels": found}
