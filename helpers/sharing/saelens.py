"""SAEs in the format of SAELens 6, written and read without importing it.

A dictionary's coder reads coordinates y, which nobody else has. But y = h M + c is an affine
function of the raw trajectory h, so that it *folds* into the weights, and an SAE comes out that
reads raw activations of the kept steps, one after the other:

    W_enc ← M W_enc,    W_dec ← W_dec M⁻¹,    b_dec ← (b_dec − c) M⁻¹

b_enc and the threshold, hence the codes, stay. Rows of the new W_dec are feature trajectories in
raw units, no longer of unit norm.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tqdm import tqdm

from helpers.checks import one_of, refuse
from helpers.coders.topk import TopK
from helpers.dictionary import Dictionary
from helpers.files import save_json, save_tensors
from helpers.nonlinear import Nonlinear
from helpers.predictors import Predictors
from helpers.sharing import weights

FILE = "sae_weights.safetensors"
VERSION = "6.0.0"  # the format's: what it has been since
ARCHITECTURES = ("jumprelu", "topk", "batchtopk", "standard")
ROWS = 4096  # of W_dec that are folded together


def save(
    dictionary: Dictionary, folder: str | Path, manifest: dict | None = None, *, folded: bool
) -> Path:
    """Write a dictionary so that `sae_lens.SAE.load_from_disk(folder)` reads it; the folder.

    `folded` reads raw trajectories (…, S · d), step after step; otherwise the SAE reads coordinates
    y, of `dictionary.coordinates.residualize`. `manifest`, a bundle's, says where it listens.
    ValueError for a coder that is no JumpReLU or TopK of a linear map, and, to be folded, for
    nonlinear coordinates. An SAE of one step becomes, folded, one of all, S² times as large.
    """
    folder, manifest = Path(folder), manifest or {}
    tensors = fold(dictionary) if folded else _parts(dictionary.coder)
    kind = {"architecture": "jumprelu"}
    if isinstance(dictionary.coder, TopK):
        del tensors["threshold"]
        kind = {"architecture": "topk", "k": dictionary.coder.k}
        kind["rescale_acts_by_decoder_norm"] = False
    n_latents, d_in = tensors["W_dec"].shape
    (folder / weights.CONFIG).unlink(missing_ok=True)  # no settings, no SAE, until both are there
    save_tensors(folder / FILE, tensors)
    about = {"steps", "timesteps", "signal", "branch", "grid", "channels"} & manifest.keys()
    metadata = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": manifest.get("model"),
        "hook_name": manifest.get("hookpoint"),
        "reads": "raw activations, step after step" if folded else "coordinates",
        "coordinates": dictionary.coordinates.digest(),
        "name": dictionary.name,
        "k": dictionary.coder.k,
    }
    settings = kind | {
        "d_in": d_in,
        "d_sae": n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata | {name: manifest[name] for name in about},
    }
    save_json(folder / weights.CONFIG, settings)
    return folder


@torch.no_grad()
def fold(dictionary: Dictionary) -> dict[str, torch.Tensor]:
    """The coder's weights, float32 on the CPU, as those of an SAE that reads h, (…, S · d).

    Computed in float64. ValueError for nonlinear coordinates and other coders.
    """
    if isinstance(dictionary.coordinates, Nonlinear):
        refuse("coordinates", "nonlinear", "linear to be folded; save with folded=False")
    parts = {name: t.double() for name, t in _parts(dictionary.coder).items()}
    if dictionary.n_blocks > 1:  # the same SAE at every step
        blocks = dictionary.n_blocks
        parts |= {n: torch.block_diag(*[parts[n]] * blocks) for n in ("W_enc", "W_dec")}
        parts |= {n: parts[n].repeat(blocks) for n in ("b_enc", "b_dec", "threshold")}
    c = copy.deepcopy(dictionary.coordinates).cpu()
    S, d, scale = c.n_steps, c.channels, c.scale.double()[:, None]
    at_zero, W_enc = c.residualize(torch.zeros(S, d, dtype=torch.float64)), []
    for s in tqdm(range(S), "folding", disable=None):
        unit = torch.zeros(d, S, d, dtype=torch.float64)
        unit[:, s] = torch.eye(d)
        M = c.residualize(unit / scale) - at_zero  # its rows of step s, (d, S · d)
        W_enc.append((M @ parts["W_enc"]).float())
    W_dec = [
        (scale * c.feature_trajectories(rows)).flatten(1).float()
        for rows in parts["W_dec"].split(ROWS)
    ]
    b_dec = c.unstandardise(c.restore(parts["b_dec"])).flatten()
    made = parts | {"W_enc": torch.cat(W_enc), "W_dec": torch.cat(W_dec), "b_dec": b_dec}
    return {name: t.float() for name, t in made.items()}


def _parts(coder) -> dict[str, torch.Tensor]:
    """Weights, biases and threshold of a coder, float32 on the CPU."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    found = {name: getattr(coder, name, None) for name in names}
    if any(value is None for value in found.values()):
        refuse("coder", type(coder).__name__, "one with an encoder, biases and a threshold")
    return {name: t.detach().cpu().float() for name, t in found.items()}


def load(
    folder: str | Path,
    predictors: Predictors | None = None,
    *,
    k: float | None = None,
    name: str = "SAELens",
) -> Dictionary:
    """A dictionary of an SAE that SAELens 6 wrote, or of one that `save` folded.

    Kinds: jumprelu; topk; batchtopk, with its learnt threshold, as jumprelu; standard. See
    `weights.as_dictionary` for `predictors`. k, active codes an input, is needed only to calibrate
    an SAE whose file names none. FileNotFoundError or ValueError names what is missing or differs.
    """
    settings, t = weights.read(folder, FILE)
    about = settings.get("metadata") or {}
    version = str(about.get("sae_lens_version") or settings.get("sae_lens_version"))
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        refuse("sae_lens_version", version, "6 or later; let SAELens 6 load the SAE and save it")
    kind = one_of("architecture", settings.get("architecture"), ARCHITECTURES)
    for setting in ("normalize_activations", "reshape_activations"):
        one_of(setting, settings.get(setting) or "none", ["none"])
    d, n = settings.get("d_in"), settings.get("d_sae")
    own = {"jumprelu": {"threshold": (n,)}, "batchtopk": {"topk_threshold": ()}}.get(kind, {})
    shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    weights.check_tensors(t, shapes | own)
    W_enc, b_enc, W_dec, b_dec = (t[part] for part in shapes)
    if settings.get("rescale_acts_by_decoder_norm", kind == "batchtopk") and "topk" in kind:
        norm = W_dec.norm(dim=1).clamp(min=1e-8)  # codes are in units of these: fold them in
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    if not settings.get("apply_b_dec_to_input", True):
        b_enc = b_enc + b_dec @ W_enc
    threshold = {"jumprelu": t.get("threshold"), "standard": torch.zeros(n)}.get(kind)
    if kind == "batchtopk":
        threshold = t["topk_threshold"].expand(n)
    k = k or settings.get("k") or about.get("k")
    made = weights.coder(W_enc, b_enc, W_dec, b_dec, threshold, k)
    return weights.as_dictionary(made, predictors, name)
