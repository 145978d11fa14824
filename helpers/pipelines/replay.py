"""Replaying what a denoiser computed before, up to the step from which an edit makes a difference.

    with record_outputs(denoiser, scheduler, n_images=8) as outputs: generate(…)
    with replay(denoiser, scheduler, outputs, until=12, picks=[3, 5]): steer(…, window=(12, 24))

Sampling runs as ever, with the scheduler, its noise and guidance; only calls of the denoiser before
step `until` are answered from memory. So whatever the scheduler, images are the same to the last
bit as without it, if they were recorded in the same batch; in another one, up to rounding.
"""

import functools
import inspect
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from helpers.checks import refuse
from helpers.pipelines.calls import CallReader


@dataclass
class Outputs:
    """What a denoiser computed as images were made, on the CPU."""

    calls: list[tuple] = field(default_factory=list)  # (step, which call of it, timestep)
    rows: torch.Tensor | list = field(default_factory=list)  # (image, call, branch, …)
    latents: torch.Tensor | None = None  # that the first call was given, (image, …)
    channels_last: bool = False  # memory order of the outputs, on which later rounding may depend

    @staticmethod
    def joined(parts: list["Outputs"]) -> "Outputs":
        """The outputs of several batches of images that were made in the same way."""
        rows, latents = (torch.cat([getattr(p, n) for p in parts]) for n in ("rows", "latents"))
        return Outputs(parts[0].calls, rows, latents, parts[0].channels_last)


@contextmanager
def record_outputs(denoiser, scheduler, n_images: int):
    """Gives `Outputs` that are filled while one batch of images is made in its context."""
    found, calls = Outputs(), _Calls(denoiser, scheduler, n_images)

    def keep(_, args, output):
        rows = output if isinstance(output, torch.Tensor) else output[0]
        if not found.calls:
            found.latents = _by_image(calls.reader.before.latents, n_images)[:, 0].cpu()
            last = {"memory_format": torch.channels_last}
            found.channels_last = rows.ndim == 4 and rows.is_contiguous(**last)
        found.calls.append(calls.now)
        found.rows.append(_by_image(rows, n_images).cpu())

    handles = calls.listen(), denoiser.register_forward_hook(keep)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if len({rows.shape for rows in found.rows}) != 1:
        refuse("model", type(denoiser).__name__, "one whose calls all return as many rows")
    found.rows = torch.stack(found.rows, 1)


@contextmanager
def replay(denoiser, scheduler, outputs: Outputs, until: int, picks):
    """While a batch of images is made, answers calls before step `until` with what was recorded.

    `picks` says which of the recorded images are in the batch, in its order. Nothing within the
    denoiser runs in these calls, so nothing can be heard there. ValueError for images that do not
    begin as they were recorded, or other timesteps.
    """
    calls, forward = _Calls(denoiser, scheduler, len(picks)), denoiser.forward
    own = vars(denoiser).get("forward")  # accelerate puts one there, for offloading
    known, signature = {call: i for i, call in enumerate(outputs.calls)}, calls.reader.signature

    @functools.wraps(forward)
    def answer(*args, **kwargs):
        if calls.now[0] >= until:
            return forward(*args, **kwargs)
        given = calls.reader.before.latents
        if calls.now not in known:
            refuse("timestep", calls.now[2], "one at which the recorded images were made, too")
        if known[calls.now] == 0:
            then = outputs.latents[picks].to(given)
            if not torch.allclose(_by_image(given, len(picks))[:, 0], then, 1e-2, 1e-2):
                refuse("seeds", "of other images", f"those of the recorded images {picks}")
        rows = outputs.rows[picks, known[calls.now]].transpose(0, 1).flatten(0, 1).to(given.device)
        if outputs.channels_last:
            rows = rows.contiguous(memory_format=torch.channels_last)
        return _as_returned(rows, signature.bind(*args, **kwargs).arguments, signature)

    handle, denoiser.forward = calls.listen(), answer
    try:
        yield
    finally:
        handle.remove()
        if own is None:
            del denoiser.forward
        else:
            denoiser.forward = own


class _Calls:
    """Tells the calls of a run apart: `now` is (step, which call of it, timestep)."""

    def __init__(self, denoiser, scheduler, n_images: int):
        self.denoiser, self.now = denoiser, (-1, 0, 0.0)
        self.reader = CallReader(denoiser, scheduler, n_images)

    def listen(self):
        return self.denoiser.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, *given) -> None:
        self.reader.note(*given)
        step, timestep, *_ = self.reader.before  # also of a call that is to be passed over
        turn = self.now[1] + 1 if step == self.now[0] else 0
        self.now = step, turn, timestep


def _by_image(rows: torch.Tensor, n_images: int) -> torch.Tensor:
    """Rows of a batch, those of a branch after those of another, as (image, branch, …), a copy."""
    return (
        rows.detach()
        .unflatten(0, (-1, n_images))
        .transpose(0, 1)
        .clone(memory_format=torch.contiguous_format)
    )


def _as_returned(rows: torch.Tensor, given: dict, signature: inspect.Signature):
    """A denoiser's output, in the form in which diffusers' models return it."""
    if "return_dict" not in signature.parameters:
        return rows
    if not given.get("return_dict", True):
        return (rows,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=rows)  # they differ in name alone
