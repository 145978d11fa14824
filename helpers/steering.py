"""Steering: edit what a module computes while images are made, along feature trajectories.

    steer        h[s] <- h[s] + strength · RMS(h[s]) · û[s]
    project_out  h[s] <- h[s] - amount · ((h[s] - c[s]) · v[s]) v[s],  |v[s]| = 1
    replace      h[s] <- what is given

RMS(h[s]) is the root mean squared norm of centred tokens at that step (`scale[s]` · √channels). û
is a feature trajectory in standardised units, divided once by its root mean squared norm over the
kept steps, so that a late feature stays late. Between kept steps directions are interpolated
linearly in the step index; outside them the nearest kept step's serves.
"""

import numpy as np
import torch

from helpers.checks import one_of, refuse
from helpers.coordinates import Coordinates
from helpers.hooks import Tap, by_branch, listen
from helpers.pipelines.calls import BRANCHES
from helpers.pipelines.generate import generate
from helpers.pipelines.loading import denoiser_of


def unit(u: torch.Tensor) -> torch.Tensor:
    """û: a feature trajectory (S, d) divided by the root mean square over steps of its norm."""
    size = u.norm(dim=-1).pow(2).mean().sqrt()
    if size == 0:
        refuse("direction", 0, "a trajectory that is not zero at every step; take another latent")
    return u / size


def random_like(u: torch.Tensor, seed: int, coordinates: Coordinates | None = None) -> torch.Tensor:
    """A random trajectory (S, d) with the norm of u at every step: the control for any direction.

    Its steps point in independent directions. With `coordinates` it is a random decoder row sent
    through their recurrence instead, so that neighbouring steps are as alike as those of features.
    """
    noise = torch.randn(u.shape, generator=torch.Generator().manual_seed(seed)).to(u)
    if coordinates is not None:
        noise = coordinates.feature_trajectories(noise.flatten())
    return noise / noise.norm(dim=-1, keepdim=True) * u.norm(dim=-1, keepdim=True)


def only_new(u: torch.Tensor, coordinates: Coordinates) -> torch.Tensor:
    """What each step adds to u (…, S, d), u[s] - u[s-1] A[s] - u[s-2] B[s].

    The rest is left to the model, which carries on what it was given at the steps before.
    """
    new = u.clone()
    for lag, M in coordinates.lags():
        new[..., lag:, :] -= torch.einsum("...sd,sde->...se", u[..., :-lag, :], M[lag:].to(u))
    return new


def at_every_step(values: torch.Tensor, steps, num_inference_steps: int) -> torch.Tensor:
    """Values at the kept steps, (S, …), at all denoising steps, linear in the step index."""
    order = np.argsort(steps)
    values, steps = values[order], np.asarray(steps)[order]
    position = np.interp(np.arange(num_inference_steps), steps, np.arange(len(steps)))
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, len(steps) - 1)
    share = torch.tensor(position - low, dtype=values.dtype, device=values.device)
    share = share.reshape(-1, *[1] * (values.ndim - 1))
    return values[low] * (1 - share) + values[high] * share


def addition(u, coordinates: Coordinates, steps, num_inference_steps: int, strength: float):
    """What to add at every denoising step, (step, d), raw units, for u (S, d) of any length."""
    size = coordinates.scale.to(u) * u.shape[-1] ** 0.5  # RMS norm of centred tokens
    return at_every_step(strength * size[:, None] * unit(u), steps, num_inference_steps)


def scaling(codes, u, coordinates: Coordinates, steps, num_inference_steps: int, factor: float):
    """What multiplies features that images already have: factor 0 removes them, 2 doubles them.

    Second of two passes with the same seeds: the first recorded the images and gave `codes`,
    (image, token) for a feature trajectory u (S, d), or (image, token, latent) for several,
    (latent, S, d), standardised. For `steer`: (step, image, token, channel), raw units.
    """
    if u.ndim == 2:
        codes, u = codes[..., None], u[None]
    raw = coordinates.scale[:, None].to(u) * u
    raw = at_every_step(raw.transpose(0, 1), steps, num_inference_steps).to(codes)
    return torch.einsum("itm,smd->sitd", (factor - 1) * codes, raw)


def steer(pipe, prompts, seeds, tap, delta: torch.Tensor, *, mask=None, **settings) -> np.ndarray:
    """Generate images while adding `delta` to what a tap hears.

    delta: (step, channel) or (step, image, token, channel), for all the num_inference_steps, in raw
    units, see `addition` and `scaling`; a length of 1 serves all images or tokens. mask: weights
    from 0 to 1, (token,) or (image, token). The rest is as in `edit`.
    """
    delta = _at_steps("delta", delta[:, None, None] if delta.ndim == 2 else delta, settings)
    delta = delta.expand(-1, len(prompts), -1, -1)

    def add(rows, step, images):
        return rows + _weighted("delta", delta[step, images], mask, rows, images).to(rows)

    return edit(pipe, prompts, seeds, tap, add, **settings)


def project_out(
    pipe, prompts, seeds, tap, direction, centre, *, amount=1.0, mask=None, **settings
) -> np.ndarray:
    """Generate images while taking a direction's component, seen from `centre`, out of a tap.

    direction, centre: (step, channel) or (step, image, channel), for all the num_inference_steps,
    in raw units; directions of any length. amount: 1 leaves every token where `centre` is along the
    direction, 2 at its mirror image. The rest is as in `steer`.
    """
    given = _at_steps("direction", direction, settings), _at_steps("centre", centre, settings)
    given = (x if x.ndim == 3 else x[:, None] for x in given)
    v, c = (x.expand(-1, len(prompts), -1)[:, :, None] for x in given)
    v = torch.nn.functional.normalize(v, dim=-1)

    def project(rows, step, images):
        along = v[step, images].to(rows)
        component = ((rows - c[step, images].to(rows)) * along).sum(-1, keepdim=True) * along
        return rows - _weighted("direction", amount * component, mask, rows, images).to(rows)

    return edit(pipe, prompts, seeds, tap, project, **settings)


def replace(pipe, prompts, seeds, tap, replacement, steps, **settings) -> np.ndarray:
    """Generate images with a tap's activations replaced, by (image, step, token, channel).

    In raw units, one entry per kept step, in the order of `steps`; settings as in `edit`.
    """
    of_step = dict(zip(steps, replacement.transpose(0, 1)))

    def put(rows, step, images):
        return of_step[step][images] if step in of_step else None

    return edit(pipe, prompts, seeds, tap, put, **settings)


def edit(
    pipe, prompts, seeds, tap, change, *, window=None, branch=None, batch_size=None, **sampling
) -> np.ndarray:
    """Generate images, as `generate` does, while `change` edits what a tap hears.

    `change` takes the rows of one branch, Float[Tensor, "image token channel"], the denoising step,
    and which of the images they are (a slice); it returns new rows, or None to leave them. `window`
    is the (first, last) step, both included, None for all; `branch` is 'conditional',
    'unconditional' or 'both' of classifier-free guidance, None for the tap's; `batch_size` images
    are made at once, None for all. `sampling` are arguments of the pipeline's call.
    """
    tap, n = Tap.of(tap), len(prompts)
    branch = one_of("branch", branch or tap.branch, (*BRANCHES, "both"))
    chosen = BRANCHES if branch == "both" else (branch,)
    n_steps = sampling["num_inference_steps"]
    first, last = check_window((0, n_steps - 1) if window is None else window, n_steps)
    size, made, run = batch_size or n, [], set()
    for images in (slice(i, i + size) for i in range(0, n, size)):

        def on_call(tokens, call, images=images):
            run.update(call.branches)
            if not first <= call.step <= last:
                return None
            rows = by_branch(tokens, call)
            new = {name: change(rows[name], call.step, images) for name in chosen if name in rows}
            edited = {name: value.to(tokens) for name, value in new.items() if value is not None}
            return torch.cat([*(rows | edited).values()]) if edited else None

        n_images = len(prompts[images])
        with listen(denoiser_of(pipe), pipe.scheduler, tap, on_call, n_images=n_images):
            made.append(generate(pipe, prompts[images], seeds[images], **sampling))
        if not run:
            refuse("hookpoint", tap.hookpoint, "a module that the model calls as it samples")
        if not run & set(chosen):
            refuse("branch", branch, f"{' or '.join(sorted(run))}, which this pipeline runs")
    return np.concatenate(made)


def check_window(window, num_inference_steps: int) -> tuple[int, int]:
    """First and last step (included) of a window; ValueError outside 0..num_inference_steps-1."""
    steps = list(window) if isinstance(window, (list, tuple, np.ndarray)) else [window]
    inside = all(s in range(num_inference_steps) for s in steps)
    if len(steps) != 2 or not inside or steps[0] > steps[1]:
        last = num_inference_steps - 1
        refuse("windows", window, f"pairs of first and last step, each from 0 to {last}")
    return int(steps[0]), int(steps[1])


def _at_steps(name: str, values: torch.Tensor, settings: dict) -> torch.Tensor:
    """The values, if there is one for each denoising step."""
    if len(values) != settings["num_inference_steps"]:
        refuse(name, tuple(values.shape), f"given for {settings['num_inference_steps']} steps")
    return values


def _weighted(name: str, values, mask, rows: torch.Tensor, images: slice) -> torch.Tensor:
    """A change of rows (image, token, channel), times the mask (token,) or (all images, token)."""
    if values.shape[-1] != rows.shape[-1]:
        refuse(name, tuple(values.shape), f"of {rows.shape[-1]} channels, as the hookpoint's are")
    if mask is None:
        return values
    if mask.shape[-1] != rows.shape[1]:
        refuse("mask", tuple(mask.shape), f"weights of {rows.shape[1]} tokens")
    return values * (mask if mask.ndim == 1 else mask[images])[..., None].to(values)
