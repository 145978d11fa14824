"""Steering: add a feature trajectory to the activations while an image is made, or scale and remove a feature it has.

    h[s] <- h[s] + strength · RMS(h[s]) · û[s]

RMS(h[s]) is the root mean squared norm of centred tokens at that step (`scale[s]` · √channels), measured when the
predictors were fitted. û is the feature trajectory in standardised units, divided once by its root mean squared
norm over the kept steps: it keeps its profile over time, so that a late feature stays late. Between kept steps
directions are interpolated linearly in the step index; outside them the nearest kept step's is used.
"""

from __future__ import annotations

import numpy as np
import torch

from helpers.hooks import BRANCHES, denoiser_of, listen
from helpers.predictors import Predictors
from helpers.trajectories import generate


def unit(u: torch.Tensor) -> torch.Tensor:
    """û: a feature trajectory (S, d), standardised units, divided by the RMS over steps of its norm."""
    size = u.norm(dim=-1).pow(2).mean().sqrt()
    if size == 0:
        raise ValueError("the direction is zero at every step; choose another latent")
    return u / size


def random_like(u: torch.Tensor, seed: int) -> torch.Tensor:
    """A random trajectory (S, d) with the same norm at every step as u: the control for any direction."""
    noise = torch.randn(u.shape, generator=torch.Generator().manual_seed(seed)).to(
        u
    )  # drawn on the CPU: the same on every device
    return noise / noise.norm(dim=-1, keepdim=True) * u.norm(dim=-1, keepdim=True)


def only_new(u: torch.Tensor, predictors: Predictors) -> torch.Tensor:
    """The part of u that each step adds, rho[s] w[s] = u[s] - u[s-1] A[s]: mode 'residual' leaves the rest to the model."""
    new = u.clone()
    new[1:] -= torch.einsum("sd,sde->se", u[:-1], predictors.A[1:].to(u))
    return new


def _at_every_step(values: torch.Tensor, steps, n: int) -> torch.Tensor:
    """Values at the kept steps, (S, …) -> at all n steps, linear in the step index."""
    order = np.argsort(steps)
    values, steps = values[order], np.asarray(steps)[order]
    position = np.interp(np.arange(n), steps, np.arange(len(steps)))
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, len(steps) - 1)
    share = torch.tensor(position - low, dtype=values.dtype, device=values.device).reshape(
        -1, *[1] * (values.ndim - 1)
    )
    return values[low] * (1 - share) + values[high] * share


def addition(
    u, predictors: Predictors, steps, num_inference_steps: int, strength: float
) -> torch.Tensor:
    """What to add at every denoising step, raw units, (num_inference_steps, d), for a trajectory u (S, d), standardised."""
    size = predictors.scale.to(u) * u.shape[-1] ** 0.5  # RMS norm of centred tokens
    return _at_every_step(strength * size[:, None] * unit(u), steps, num_inference_steps)


def check_window(window, num_inference_steps: int) -> tuple[int, int]:
    """First and last step (included) of a window; ValueError outside 0..num_inference_steps-1."""
    steps = list(window) if isinstance(window, (list, tuple, np.ndarray)) else [window]
    if (
        len(steps) != 2
        or any(s not in range(num_inference_steps) for s in steps)
        or steps[0] > steps[1]
    ):
        held = steps if len(steps) != 1 else window
        raise ValueError(
            f"windows holds {held}; each is two steps, first and last, from 0 to {num_inference_steps - 1}"
        )
    return int(steps[0]), int(steps[1])


def _edit(pipe, prompts, seeds, hookpoint, signal, branch, edit, sampling) -> np.ndarray:
    """Generate while `edit(rows, call)` changes the rows of one branch, or of both; None from it leaves them."""
    wanted = BRANCHES if branch == "both" else (branch,)
    seen: set[str] = set()

    def on_call(tokens, call):
        seen.update(call.branches)
        rows = list(tokens.chunk(len(call.branches)))
        edited = [edit(r, call) if name in wanted else None for name, r in zip(call.branches, rows)]
        if all(e is None for e in edited):
            return None
        return torch.cat([r if e is None else e.to(r) for r, e in zip(rows, edited)])

    with listen(
        denoiser_of(pipe), pipe.scheduler, hookpoint, on_call, n_images=len(prompts), signal=signal
    ):
        images = generate(pipe, prompts, seeds, **sampling)
    if not seen:
        raise ValueError(
            f"hookpoint {hookpoint!r} was never called, so nothing was edited; valid are modules that the model calls as it samples"
        )
    if not seen & set(wanted):
        raise ValueError(
            f"branch {branch!r} is not run by this pipeline with these settings, so nothing was edited; valid is {' or '.join(sorted(seen))}"
        )
    return images


def steer(
    pipe,
    prompts,
    seeds,
    hookpoint: str,
    delta: torch.Tensor,
    *,
    window=None,
    mask=None,
    branch: str = "conditional",
    signal: str = "output",
    **sampling,
) -> np.ndarray:
    """Generate images while adding `delta` at the hookpoint.

    Parameters
    ----------
    delta : Float[Tensor, "step channel"] or Float[Tensor, "step image token channel"]
        What to add at each of the num_inference_steps, raw units; see `addition` and `scaling`. All zero leaves
        every activation as it is, bit for bit.
    window : (first, last) step, both included; None for all
    mask : Float[Tensor, "token"] or Float[Tensor, "image token"], optional
        Weight per token, 0 to 1.
    branch : 'conditional', 'unconditional' or 'both' of classifier-free guidance
    signal : 'output', 'input' or 'update', as it was recorded

    Returns
    -------
    images : float32, (n, height, width, 3), in [0, 1]
    """
    n = sampling["num_inference_steps"]
    if branch not in (*BRANCHES, "both"):
        raise ValueError(f"branch {branch!r} is not one of {', '.join(BRANCHES)}, both")
    if len(delta) != n:
        raise ValueError(f"delta has {len(delta)} steps; num_inference_steps={n} needs as many")
    first, last = check_window((0, n - 1) if window is None else window, n)
    moves = [bool(d.any()) for d in delta]  # asked once: on a GPU each answer is waited for

    def add(rows, call):
        if not first <= call.step <= last or not moves[call.step]:
            return None
        d = delta[call.step]
        d = d[None, None] if d.ndim == 1 else d
        if mask is not None:
            if mask.shape[-1] != rows.shape[1]:
                raise ValueError(
                    f"mask covers {mask.shape[-1]} tokens; {hookpoint!r} has {rows.shape[1]}"
                )
            d = d * mask.reshape(-1, rows.shape[1], 1).to(d)
        return rows + d.to(rows)

    return _edit(pipe, prompts, seeds, hookpoint, signal, branch, add, sampling)


def scaling(
    codes: torch.Tensor, u, predictors: Predictors, steps, num_inference_steps: int, factor: float
) -> torch.Tensor:
    """What multiplies a feature that images already have: factor 0 removes it, 1 leaves it, 2 doubles it.

    Second of two passes with the same seeds; the first recorded the images and gave `codes`.

    Parameters
    ----------
    codes : Float[Tensor, "image token"]
        The latent's code for each recorded trajectory.
    u : Float[Tensor, "S d"]
        Its feature trajectory in standardised units, not normalised.

    Returns
    -------
    Float[Tensor, "step image token channel"], raw units, for `steer`.
    """
    raw = _at_every_step(predictors.scale[:, None].to(u) * u, steps, num_inference_steps).to(
        codes.device
    )
    return (factor - 1) * codes[None, :, :, None] * raw[:, None, None, :]


def replace(
    pipe,
    prompts,
    seeds,
    hookpoint: str,
    replacement: torch.Tensor,
    steps,
    *,
    between: bool = False,
    branch: str = "conditional",
    signal: str = "output",
    **sampling,
) -> np.ndarray:
    """Generate images with one branch's activations replaced by given ones.

    Parameters
    ----------
    replacement : Float[Tensor, "image step token channel"]
        Raw units, one entry per kept step, in the order of `steps`.
    between : bool
        Whether to replace at every denoising step, by linear interpolation between kept ones, or at the kept ones alone.
    """
    at_kept = dict(zip(steps, replacement.transpose(0, 1)))  # step -> (image, token, channel)
    every = (
        _at_every_step(replacement.transpose(0, 1), steps, sampling["num_inference_steps"])
        if between
        else at_kept
    )

    def put(rows, call):
        return every[call.step] if between or call.step in at_kept else None

    return _edit(pipe, prompts, seeds, hookpoint, signal, branch, put, sampling)
