"""Steering: edit what a module computes while images are made, along feature trajectories.

    steer        h[s] <- h[s] + strength · RMS(h[s]) · û[s]      (`addition`)
                 h[s] <- h[s] + (value - z) · scale[s] · u[s]    (`setting`, `scaling`)
      keep_norm  h[s] <- c[s] + (h'[s] - c[s]) · |h[s] - c[s]| / |h'[s] - c[s]|,  h' as above
    project_out  h[s] <- h[s] - amount · ((h[s] - c[s]) · v[s]) v[s],  |v[s]| = 1
    replace      h[s] <- what is given

RMS(h[s]) is the root mean squared norm of centred tokens at that step (`scale[s]` · √channels). û
is a feature trajectory in standardised units, divided once by its root mean squared norm over the
kept steps, so that a late feature stays late. z is an image's own code, c[s] a centre, such as the
mean. Between kept steps directions are interpolated linearly in the step index; outside them the
nearest kept step's serves.
"""

import numpy as np
import torch

from helpers.checks import finite, one_of, refuse
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


def shuffled_steps(u: torch.Tensor, seed: int) -> torch.Tensor:
    """The steps of u (S, d) in a random order in which none keeps its place: a control.

    What is added stays, in direction and size; that each part comes at its own step is lost.
    """
    generator, places = torch.Generator().manual_seed(seed), torch.arange(len(u))
    order = places if len(u) > 1 else refuse("steps", len(u), "at least 2, to be exchanged")
    while (order == places).any():  # about e times
        order = torch.randperm(len(u), generator=generator)
    return u[order.to(u.device)]


def together(us: torch.Tensor, weights=None) -> torch.Tensor:
    """Several feature trajectories (latent, S, d) as one, (S, d): Σ weight · û; 1 each if None."""
    weights = torch.ones(len(us)) if weights is None else torch.as_tensor(weights)
    if weights.shape != us.shape[:1]:
        refuse("weights", tuple(weights.shape), f"of {len(us)} trajectories")
    return torch.einsum("m,msd->sd", weights.to(us), torch.stack([unit(u) for u in us]))


def onto(u: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The part of u (…, S, d) within a subspace of each step, as `natural.subspace` gives it.

    basis: (S, d, r), orthonormal columns, or zero ones where a step has fewer.
    """
    inside = torch.einsum("...sd,sdr->...sr", u, basis.to(u))
    return torch.einsum("...sr,sdr->...sd", inside, basis.to(u))


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


def setting(codes, u, coordinates: Coordinates, steps, num_inference_steps: int, value):
    """What brings features that images already have to a `value`: a clamp.

    Second of two passes with the same seeds: the first recorded the images and gave `codes`,
    (image, token) for a feature trajectory u (S, d), or (image, token, latent) for several,
    (latent, S, d), standardised. value: a number, one a latent, or as `codes`. For `steer`: (step,
    image, token, channel), raw units. Of a linear coder whose rows are orthonormal, what was
    recorded would have codes of exactly `value`; others come near.
    """
    change = torch.as_tensor(value).to(codes) - codes
    if u.ndim == 2:
        change, u = change[..., None], u[None]
    raw = coordinates.scale[:, None].to(u) * u
    raw = at_every_step(raw.transpose(0, 1), steps, num_inference_steps).to(codes)
    return torch.einsum("itm,smd->sitd", change, raw)


def scaling(codes, u, coordinates: Coordinates, steps, num_inference_steps: int, factor: float):
    """`setting` to multiples of what images have: factor 0 removes features, 2 doubles them."""
    return setting(codes, u, coordinates, steps, num_inference_steps, factor * codes)


def steer(
    pipe,
    prompts,
    seeds,
    tap,
    delta: torch.Tensor,
    *,
    mask=None,
    keep_norm=False,
    centre=None,
    idle=False,
    **settings,
) -> np.ndarray:
    """Generate images while adding `delta` to what a tap hears.

    delta: (step, channel) or (step, image, token, channel), for all the num_inference_steps, in raw
    units, see `addition` and `setting`; a length of 1 serves all images or tokens. mask: how much
    of it each token gets, 0 to 1 where it is a region, (token,) or (image, token); one that is zero
    everywhere is refused unless `idle`, as in a control. keep_norm: True, or which images (image,):
    brings each token back to its distance from `centre`, given as in `project_out`. The rest is as
    in `edit`. ValueError for what does not fit, before the first step is through.
    """
    delta, mask = _for_images("delta", delta, 4, prompts, settings), _mask(mask, prompts, idle)
    keeps = torch.as_tensor(keep_norm).expand(len(prompts))[:, None, None]
    if keeps.any():
        if centre is None:
            refuse("centre", None, "given, such as the mean, where keep_norm is")
        centre = _for_images("centre", centre, 3, prompts, settings)[:, :, None]

    def add(rows, step, images):
        new = rows + _weighted("delta", delta[step, images], mask, rows, images).to(rows)
        if not keeps[images].any():
            return new
        c = _weighted("centre", centre[step, images], None, rows, images).to(rows)
        before, after = ((x - c).float().norm(dim=-1, keepdim=True) for x in (rows, new))
        # a token that did not move has a ratio of exactly 1; one at the centre has none
        ratio = (before / after).nan_to_num(1, posinf=1).to(rows)
        return torch.where(keeps[images].to(rows.device), new + (ratio - 1) * (new - c), new)

    return edit(pipe, prompts, seeds, tap, add, **settings)


def project_out(
    pipe, prompts, seeds, tap, direction, centre, *, amount=1.0, mask=None, idle=False, **settings
) -> np.ndarray:
    """Generate images while taking a direction's component, seen from `centre`, out of a tap.

    direction, centre: (step, channel) or (step, image, channel), for all the num_inference_steps,
    in raw units; directions of any length. amount: 1 leaves every token where `centre` is along the
    direction, 2 at its mirror image. The rest is as in `steer`.
    """
    given = (("direction", direction), ("centre", centre))
    v, c = (_for_images(*pair, 3, prompts, settings)[:, :, None] for pair in given)
    v, mask = torch.nn.functional.normalize(v, dim=-1), _mask(mask, prompts, idle)

    def project(rows, step, images):
        along = _weighted("direction", v[step, images], None, rows, images).to(rows)
        off = rows - _weighted("centre", c[step, images], None, rows, images).to(rows)
        component = amount * (off * along).sum(-1, keepdim=True) * along
        return rows - _weighted("direction", component, mask, rows, images)

    return edit(pipe, prompts, seeds, tap, project, **settings)


def replace(pipe, prompts, seeds, tap, replacement, steps, **settings) -> np.ndarray:
    """Generate images with a tap's activations replaced, by (image, step, token, channel).

    In raw units, one entry per kept step, in the order of `steps`; settings as in `edit`.
    """
    if replacement.shape[:2] != (n := (len(prompts), len(steps))):
        refuse("replacement", tuple(replacement.shape), f"of {n[0]} images and {n[1]} steps")
    of_step = dict(zip(steps, finite("replacement", replacement).transpose(0, 1)))

    def put(rows, step, images):
        return of_step[step][images] if step in of_step else None

    return edit(pipe, prompts, seeds, tap, put, **settings)


def edit(
    pipe,
    prompts,
    seeds,
    tap,
    change,
    *,
    window=None,
    branch=None,
    batch_size=None,
    watch=None,
    **sampling,
) -> np.ndarray:
    """Generate images, as `generate` does, while `change` edits what a tap hears.

    `change` takes the rows of one branch, Float[Tensor, "image token channel"], the denoising step,
    and which of the images they are (a slice); it returns new rows, or None to leave them. `window`
    is the (first, last) step, both included, None for all; `branch` is 'conditional',
    'unconditional' or 'both' of classifier-free guidance, None for the tap's; `batch_size` images
    are made at once, None for all. `watch` is called as `change` is, at every step, with rows of
    the tap's own branch as the edit left them. `sampling` are arguments of the pipeline's call.
    """
    tap, n = Tap.of(tap), len(prompts)
    branch = one_of("branch", branch or tap.branch, (*BRANCHES, "both"))
    chosen = BRANCHES if branch == "both" else (branch,)
    n_steps = sampling["num_inference_steps"]
    first, last = check_window((0, n_steps - 1) if window is None else window, n_steps)
    size, made, run = batch_size or n, [], set()
    for images in (slice(i, i + size) for i in range(0, n, size)):

        def on_call(tokens, call, images=images):
            rows, inside = by_branch(tokens, call), first <= call.step <= last
            # tried once before the window, too, to refuse what does not fit before long work
            named = [name for name in chosen if name in rows and (inside or name not in run)]
            new = {name: change(rows[name], call.step, images) for name in named}
            run.update(call.branches)
            edited = {n: v.to(tokens) for n, v in new.items() if inside and v is not None}
            rows |= edited
            if watch and tap.branch in rows:
                watch(rows[tap.branch], call.step, images)
            return torch.cat([*rows.values()]) if edited else None

        n_images = len(prompts[images])
        with listen(denoiser_of(pipe), pipe.scheduler, tap, on_call, n_images=n_images):
            made.append(generate(pipe, prompts[images], seeds[images], **sampling))
        if not run:
            refuse("hookpoint", tap.hookpoint, "a module that the model calls as it samples")
        if not run & set(chosen):
            valid = " or ".join([*sorted(run), "both"])
            refuse("branch", branch, f"{valid}, as this pipeline runs no other at these settings")
    return np.concatenate(made)


def check_window(window, num_inference_steps: int) -> tuple[int, int]:
    """First and last step (included) of a window; ValueError outside 0..num_inference_steps-1."""
    steps = list(window) if isinstance(window, (list, tuple, np.ndarray)) else [window]
    inside = all(s in range(num_inference_steps) for s in steps)
    if len(steps) != 2 or not inside or steps[0] > steps[1]:
        last = num_inference_steps - 1
        refuse("windows", window, f"pairs of first and last step, each from 0 to {last}")
    return int(steps[0]), int(steps[1])


def _for_images(name: str, values, ndim: int, prompts, settings: dict) -> torch.Tensor:
    """Finite values of every step, (step, channel) or of `ndim` axes, as (step, image, …)."""
    n_steps, n = settings["num_inference_steps"], len(prompts)
    if len(values) != n_steps:
        refuse(name, tuple(values.shape), f"given for {n_steps} steps")
    if values.ndim == 2:
        values = values.reshape(n_steps, *[1] * (ndim - 2), -1)
    if values.ndim != ndim or values.shape[1] not in (1, n):
        refuse(name, tuple(values.shape), f"of {n_steps} steps, then 1 or {n} images")
    return finite(name, values).expand(-1, n, *[-1] * (ndim - 2))


def _mask(mask, prompts, idle: bool):
    """The mask, if it fits the images and is not zero everywhere."""
    if mask is None:
        return None
    if mask.ndim not in (1, 2) or (mask.ndim == 2 and len(mask) != len(prompts)):
        refuse("mask", tuple(mask.shape), f"(token,) or ({len(prompts)} images, token)")
    if not (idle or mask.any()):
        refuse("mask", 0, "above 0 at some token, as nothing is steered otherwise")
    return finite("mask", mask)


def _weighted(name: str, values, mask, rows: torch.Tensor, images: slice) -> torch.Tensor:
    """A change of rows (image, token, channel), times the mask (token,) or (all images, token)."""
    if values.shape[-1] != rows.shape[-1]:
        refuse(name, tuple(values.shape), f"of {rows.shape[-1]} channels, as the hookpoint's are")
    if mask is None:
        return values
    if mask.shape[-1] != rows.shape[1]:
        refuse("mask", tuple(mask.shape), f"weights of {rows.shape[1]} tokens")
    return values * (mask if mask.ndim == 1 else mask[images])[..., None].to(values)
