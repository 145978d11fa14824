"""A run folder with a trained dictionary that needs no model: for the explorer's tests."""

from types import SimpleNamespace

import numpy as np
import torch
from activations import recorded

from helpers.coordinates import residual
from helpers.dictionary import untrained
from helpers.measure.words import Words
from helpers.moments import accumulate
from helpers.predictors import fit

GRID, SHAPE, N, LATENTS = (1, 5), (6, 7, 3), 12, 16
PROMPTS = [f"a {colour} cat" for colour in ("red", "blue", "green")] * 4


class Store:
    """Twelve test images of 6×7 pixels, five tokens and three kept steps, in memory."""

    steps, timesteps, grid = [0, 3, 9], [961.0, 481.0, 21.0], GRID
    n_steps, n_tokens, sampling = 3, 5, {"num_inference_steps": 10}
    manifest = {"model": "tiny"}

    def __init__(self, channels=3, seed=0):
        self.h = recorded(N, seed)
        rng = np.random.default_rng(seed)
        self.pictures = rng.random((N, *SHAPE[:2], channels)).astype(np.float32)
        self.prompts, self.read = PROMPTS, []

    def n_images(self, split):
        return {"test": N}[split]

    def prompts_of(self, split):
        return self.prompts

    def shards(self, split):
        return iter(self.h.split(5))

    def images(self, split, rows=slice(None)):
        return self.pictures[rows]

    def activations(self, split, rows):
        self.read.append(list(rows))
        return self.h[list(rows)]


def tiny_run(folder, channels=3, labels=True, k=3.0, store=None, **changes):
    """What `records.build` asks of a run; `made` tells what its files were made from."""
    store = store or Store(channels)
    moments = accumulate([store.h])
    predictors = fit(moments, moments)
    x = predictors.standardise(store.h.transpose(1, 2)).flatten(0, 1)
    made = {"predictors": "p", "sae": "s", "trajectories": "t", "latents": "l"}
    run = SimpleNamespace(
        **{"name": "tiny", "folder": folder, "store": store, "predictors": predictors},
        dictionary=untrained(residual(predictors), LATENTS, k).calibrate(x),
        truth=Words(store.prompts),
        path=lambda what: folder / f"{what}.json",
        made=made,
        made_from=lambda what: {
            name: made[name] for name in {"dictionary": ("predictors", "sae")}.get(what, (what,))
        },
        latents={
            "best": {"word=red": {"residual": 2, "raw": 1}},
            "labels": {"2": ["word=red", 0.9], "5": ["word=blue", 0.6]},
        },
    )
    if labels:
        folder.mkdir(parents=True, exist_ok=True)
        run.path("latents").write_text("{}")
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def codes_of(run):
    """Codes of all test images at once, (image, token, latent), and their x."""
    x = run.predictors.standardise(run.store.h.transpose(1, 2))
    with torch.no_grad():
        return run.dictionary.codes(x).numpy(), x
