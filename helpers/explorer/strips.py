"""One image steered along a feature at several strengths, for the feature's page."""

from pathlib import Path

import torch

from helpers import steering
from helpers.explorer.record import Strip, load_strip, save_strip
from helpers.explorer.steered import of_example

STRENGTHS = (-4.0, -2.0, 0.0, 2.0, 4.0)  # in units of the RMS norm of centred tokens


def path_of(found, latent: int) -> Path:
    return found.folder / "strips" / f"{latent}.safetensors"


def make(found, dictionary, pipe, latent: int, strengths=STRENGTHS, batch_size=None) -> Strip:
    """The first of a latent's random examples, steered everywhere and at all steps, and saved.

    `found` are the `records.Records` of this dictionary, `pipe` the model that was recorded. A
    latent that never fires is shown on the split's first image. What is there already, of the same
    strengths and prompt, is kept. A direction that is zero raises ValueError.
    """
    store, strengths, path = found.store, sorted(strengths), path_of(found, latent)
    prompt, seed = of_example(found, latent)
    if path.exists():
        strip = load_strip(path)
        if strip.prompt == prompt and strip.strengths.tolist() == strengths:
            return strip
    n_steps, n = store.sampling["num_inference_steps"], len(strengths)
    u, c = dictionary.directions(latent), dictionary.coordinates
    unit = steering.addition(u, c, store.steps, n_steps, 1.0)  # (step, channel)
    delta = unit[:, None, None] * torch.tensor(strengths).to(unit)[:, None, None]
    given = [prompt] * n, [seed] * n, store.tap, delta
    images = steering.steer(pipe, *given, batch_size=batch_size, **store.sampling)
    save_strip(path, Strip(torch.tensor(strengths).numpy(), images, prompt))
    return load_strip(path)
