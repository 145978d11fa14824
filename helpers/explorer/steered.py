"""One image as it is, and steered along a feature as a view's state says."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from helpers import steering
from helpers.checks import in_range, refuse
from helpers.explorer.search import State

SEEDS = 2**53 - 1  # the largest: a browser reads no greater whole number exactly


def checked(state: State, found) -> State:
    """A state in its shortest form; ValueError for one that these records cannot show."""
    run = found.run.name.rpartition("/")[2]  # it may be a path, which is nobody else's business
    for name, own in (("run", run), ("dictionary", found.dictionary)):
        if getattr(state, name) != own:
            refuse(name, getattr(state, name), f"{own!r}, which is open here")
    in_range("latent", state.latent, 0, found.n_latents - 1)
    in_range("seed", state.seed, 0, SEEDS)
    if state.mask:
        in_range("mask", state.mask[-1], 0, found.store.n_tokens - 1)
    _, last = window_of(state, found)
    at_end = last == found.store.sampling["num_inference_steps"] - 1
    return replace(state, last=-1 if at_end else last)


def window_of(state: State, found) -> tuple[int, int]:
    """First and last denoising step to steer at, both included; ValueError for other than steps."""
    n_steps = found.store.sampling["num_inference_steps"]
    last = n_steps - 1 if state.last == -1 else state.last
    return steering.check_window((state.first, last), n_steps)


def check_strength(state: State) -> None:
    """ValueError for a state that steers nothing."""
    if state.strength == 0:
        refuse("strength", 0, "another number, since 0 steers nothing")


def of_example(found, latent: int) -> tuple[str, int]:
    """Prompt and seed of the first of a latent's random examples, or the split's first image."""
    image = max(0, int(found.array("images")[latent, 0]))
    number = found.store.indices(found.split)[image]
    return found.store.prompts[number], found.store.seeds[number]


def recorded(found, prompt: str, seed: int) -> np.ndarray | None:
    """The recorded image (height, width, channels) of a prompt and seed, if there is one."""
    numbers = enumerate(found.store.indices(found.split))
    given = found.store.prompts, found.store.seeds
    rows = [i for i, n in numbers if (given[0][n], given[1][n]) == (prompt, seed)]
    return found.store.images(found.split, rows[:1])[0] if rows else None


def plain(state: State, found, pipe, on_step: Callable[[int], None] | None = None) -> np.ndarray:
    """The image of a state's prompt and seed without steering, float32 (height, width, channels).

    `on_step` is called with the number of each denoising step as it ends; what it raises ends the
    work and leaves no hook behind.
    """
    return _made(steering.edit, state, found, pipe, on_step, lambda *_: None)


def steered(
    state: State, found, dictionary, pipe, on_step: Callable[[int], None] | None = None
) -> np.ndarray:
    """The image of a state's prompt and seed, steered: float32 (height, width, channels).

    By `strength` along its latent, from its first to its last step, at its painted tokens or, where
    none is painted, at all. `dictionary` is that of `found`; `on_step` as in `plain`. ValueError
    for a strength of 0 or a direction that is zero.
    """
    check_strength(state)
    store, window = found.store, window_of(checked(state, found), found)
    n_steps, u = store.sampling["num_inference_steps"], dictionary.directions(state.latent)
    given = dictionary.coordinates, store.steps, n_steps, state.strength
    delta, mask = steering.addition(u, *given), None
    if state.mask:
        mask = torch.zeros(store.n_tokens)
        mask[list(state.mask)] = 1
    return _made(
        steering.steer, state, found, pipe, on_step, delta.detach(), mask=mask, window=window
    )


def _made(make, state: State, found, pipe, on_step, change, **settings) -> np.ndarray:
    watch = on_step and (lambda rows, step, images: on_step(step))
    given = [state.prompt], [state.seed], found.store.tap, change
    return make(pipe, *given, watch=watch, **settings, **found.store.sampling)[0]
