"""Loading a diffusers pipeline, and finding its denoiser, the network called at every step."""

import logging
from contextlib import suppress
from pathlib import Path

import torch

from helpers.checks import choose_device, choose_dtype, refuse

# transformers warns where it takes PIL because torchvision is missing; no result depends on that
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision (not installed)" not in record.getMessage()
)


def load_pipeline(model: str | Path, device: str = "auto", dtype: str = "auto", revision: str = ""):
    """A diffusers pipeline from a folder, or from the hub by name and branch, tag or commit.

    Reads safetensors alone, runs no model's own code; 'auto' is float16 on CUDA, else float32.
    """
    device = choose_device(device)
    precision = choose_dtype(dtype, torch.float16 if device.startswith("cuda") else torch.float32)
    try:
        pipe = _from_pretrained(model, precision, revision or None)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        refuse("model", str(model), f"a folder or hub name with safetensors weights ({reason})")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    check_weights(pipe, str(model))
    for part in pipe.components.values() if device == "cpu" else ():
        if isinstance(part, torch.nn.Module) and not any(w.ndim == 5 for w in part.parameters()):
            # convolutions take a seventh less time; 5 axes are video's, which has no such order
            part.to(memory_format=torch.channels_last)
    return pipe


def _from_pretrained(model, precision: torch.dtype, revision: str | None):
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    no_bars_for_weights()
    options = {"dtype": precision, "use_safetensors": True, "revision": revision}
    listed = DiffusionPipeline.load_config(model, revision=revision)
    parts = {k for k, v in listed.items() if isinstance(v, list) and v and isinstance(v[0], str)}
    there = {k for k in parts if not Path(model).is_dir() or (Path(model) / k).is_dir()}
    if lacking := sorted(parts - there - {"safety_checker"}):
        raise ValueError(f"it has no {', '.join(lacking)}")
    if not parts & {"unet", "transformer"}:
        raise ValueError(f"it has no unet and no transformer, but {', '.join(sorted(parts))}")
    if "safety_checker" in listed:
        # it would blacken images that research needs to see
        options |= {"safety_checker": None, "requires_safety_checker": False}
    return DiffusionPipeline.from_pretrained(model, **options)


def no_bars_for_weights() -> None:
    """Let transformers read weights silently; downloads keep their bars, which it would take."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hub_is_silent = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if not hub_is_silent:
        enable_progress_bars()


def check_weights(pipe, model: str = "") -> None:
    """ValueError names a tensor of the pipeline's networks that holds NaN or infinity."""
    for part, module in pipe.components.items():
        weights = module.named_parameters() if isinstance(module, torch.nn.Module) else ()
        for name, w in weights:
            with suppress(RuntimeError, TypeError):  # offloaded, or quantised: not readable
                # a sum is quick, and finite unless a weight is not, or it overflows
                if not w.sum().isfinite() and not w.isfinite().all():
                    dtype = str(w.dtype).removeprefix("torch.")
                    valid = f"one of finite weights, and {part}.{name} is not, in {dtype}"
                    refuse("model", model or type(pipe).__name__, valid)


def resolved_revision(model: str | Path, revision: str = "") -> str:
    """The hub commit of a model's cached files: `revision` if unknown, '' for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).expanduser().exists():
        return ""
    path = try_to_load_from_cache(str(model), "model_index.json", revision=revision or None)
    return Path(path).parent.name if isinstance(path, str) else revision


def denoiser_of(pipe) -> torch.nn.Module:
    """The network that a diffusers pipeline calls at each denoising step."""
    if hasattr(pipe, "set_pag_applied_layers"):  # adds a third, perturbed branch to the rows
        refuse("model", type(pipe).__name__, "a pipeline without perturbed-attention guidance")
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), torch.nn.Module):
            return getattr(pipe, name)
    refuse("model", type(pipe).__name__, "a pipeline with a `unet` or a `transformer`")
