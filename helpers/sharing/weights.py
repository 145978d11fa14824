"""Weights of an SAE that was trained elsewhere, and the dictionary they make here.

Such an SAE reads the activations of one denoising step, in their own units. As the coder of a
`Dictionary` in `coordinates.recorded` it codes every kept step on its own, latent s · n + j being
its latent j at step s, so that every measure of a notebook can be taken of it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from helpers import coordinates
from helpers.checks import finite, refuse
from helpers.coders.topk import TopK
from helpers.dictionary import Dictionary
from helpers.files import load_json, load_tensors
from helpers.predictors import Predictors
from helpers.sae import SAE

CONFIG = "cfg.json"  # SAELens and sparsify both call it that


def read(folder: str | Path, file: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Settings of `cfg.json` and the tensors, as float32, of a safetensors file beside it.

    FileNotFoundError or ValueError names a file that is missing, damaged or holds NaN.
    """
    config, weights = Path(folder) / CONFIG, Path(folder) / file
    for path in (config, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; an SAE is {CONFIG} and {file}")
    settings, (tensors, _) = load_json(config), load_tensors(weights)
    if not isinstance(settings, dict):
        refuse(str(config), settings, "an object with the settings of an SAE")
    tensors = {name: finite(f"{weights}: {name}", t.float()) for name, t in tensors.items()}
    return settings, tensors


def check_tensors(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple]) -> None:
    """ValueError unless there are tensors of these names, of these shapes, and no others."""
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != shapes:
        refuse("weights", found, f"{shapes}: anything else would be an SAE of another kind")


def coder(W_enc, b_enc, W_dec, b_dec, threshold=None, k: float | None = None) -> SAE:
    """An SAE of given weights, (d_in, n), (n,), (n, d_in), (d_in,): JumpReLU's with a threshold.

    Without one it is a `TopK`. k None, where nobody says how many codes are active, is n.
    """
    n_latents, d_in = W_dec.shape
    made = (SAE if threshold is not None else TopK)(d_in, n_latents, k or n_latents)
    given = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    given["threshold"] = made.threshold if threshold is None else threshold.clamp(min=0)
    made.load_state_dict(given)
    return made


def as_dictionary(made: SAE, predictors: Predictors | None, name: str) -> Dictionary:
    """The dictionary of a coder that reads activations as they are recorded.

    With a run's predictors it codes each of their steps, or, if it is as wide as all of them, whole
    trajectories; without, x is an activation of one step in its own units, (…, 1, d). ValueError
    for a coder of another width.
    """
    if predictors is None:
        zeros, one = torch.zeros(1, made.d_in), torch.ones(1)
        nothing = torch.zeros(1, made.d_in, made.d_in)
        found = coordinates.Coordinates(zeros, one, nothing, zeros, one)
    else:
        found = coordinates.recorded(predictors)
    return Dictionary(name, found, made).eval()
