"""SAEs that EleutherAI's sparsify wrote, read without it: `cfg.json` and `sae.safetensors`.

Its encoder is a linear layer, (n, d_in), and the k largest codes of an input are kept.
"""

from __future__ import annotations

from pathlib import Path

from helpers.checks import in_range, one_of, refuse
from helpers.dictionary import Dictionary
from helpers.predictors import Predictors
from helpers.sharing import weights

FILE = "sae.safetensors"
OTHERS = ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed")  # no plain SAEs


def load(
    folder: str | Path, predictors: Predictors | None = None, *, name: str = "sparsify"
) -> Dictionary:
    """A dictionary of an SAE that sparsify wrote: one hookpoint's folder.

    See `weights.as_dictionary` for `predictors`. FileNotFoundError or ValueError names what is
    missing or damaged, and settings that make it something else than a TopK SAE.
    """
    settings, t = weights.read(folder, FILE)
    for setting in OTHERS:
        if settings.get(setting):
            refuse(setting, settings[setting], "false: only autoencoders can be read")
    one_of("activation", settings.get("activation", "topk"), ["topk"])
    if "encoder.weight" not in t:
        refuse("weights", sorted(t), "those of an SAE, with encoder.weight")
    n, d = t["encoder.weight"].shape
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)}
    weights.check_tensors(t, shapes)
    k = in_range("k", settings.get("k"), 1, n)
    W_enc, b_enc, W_dec, b_dec = (t[part] for part in shapes)
    return weights.as_dictionary(weights.coder(W_enc.T, b_enc, W_dec, b_dec, k=k), predictors, name)
