"""Predictors, SAE and manifest in one folder or one name on the Hugging Face hub: all that a colleague needs to steer.

    Bundle.from_run("sd15").push_to_hub("me/sd15-residual-sae")
    bundle = Bundle.from_pretrained("me/sd15-residual-sae")

Weights are one safetensors file with its SHA-256, settings one config.json; downloading and uploading are huggingface_hub's own mixin.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE

from helpers.files import load_json, load_tensors, save_tensors
from helpers.predictors import Predictors
from helpers.run import folder as runs
from helpers.sae import SAE

# of a collection's manifest, what is needed to listen and to steer where it was recorded
TOLD = (
    "model",
    "model_dtype",
    "revision",
    "hookpoint",
    "signal",
    "branch",
    "steps",
    "timesteps",
    "sigmas",
    "scheduler",
    "sampling",
    "grid",
    "channels",
    "versions",
)


def _file(
    name: str,
    filename: str,
    *,
    revision=None,
    cache_dir=None,
    force_download=False,
    token=None,
    local_files_only=False,
) -> Path:
    """A bundle's file, in its folder or downloaded."""
    if os.path.isdir(name):
        if not (path := Path(name) / filename).exists():
            raise FileNotFoundError(
                f"{path} does not exist; {name} is no bundle, which save_pretrained writes"
            )
        return path
    return Path(
        hf_hub_download(
            name,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            token=token,
            local_files_only=local_files_only,
        )
    )


class Bundle(
    torch.nn.Module,
    PyTorchModelHubMixin,
    library_name="residualized-temporal-saes",
    tags=["sparse-autoencoder", "diffusion", "interpretability"],
    license="mit",
    paper_url="https://arxiv.org/abs/2605.27813",
):
    """An SAE on residualized trajectories with the predictors it stands on.

    Attributes
    ----------
    sae : SAE
    manifest : dict
        Where it listens: model, revision, hookpoint, signal, branch, steps, timesteps, sampling, grid.
    """

    def __init__(self, manifest: dict, n_latents: int, k: int):
        super().__init__()
        S, d = len(manifest["steps"]), manifest["channels"]
        self.manifest = manifest
        self.sae = SAE(S * d, n_latents, k)
        for name, shape in {
            "mu": (S, d),
            "scale": (S,),
            "A": (S, d, d),
            "b": (S, d),
            "rho": (S,),
            "strength": (S,),
        }.items():
            self.register_buffer(name, torch.zeros(shape))

    @property
    def predictors(self) -> Predictors:
        return Predictors(*(getattr(self, f.name) for f in fields(Predictors)))

    @classmethod
    def from_pretrained(cls, name, *, map_location="cpu", **download) -> Bundle:
        """A bundle from a folder or a name on the hub; `download` may hold revision, token, cache_dir, force_download, local_files_only.

        Raises FileNotFoundError or ValueError, naming the file, if one is missing, damaged or of other sizes than the settings say.
        """
        name = os.path.expanduser(name)
        if not os.path.isdir(name) and (name.startswith((".", os.sep)) or name.count("/") > 1):
            raise FileNotFoundError(
                f"{name} is not a folder; valid is one that save_pretrained wrote, or a name on the hub, owner/name"
            )
        config = _file(name, CONFIG_NAME, **download)
        told = load_json(config)
        told = told if isinstance(told, dict) else {}
        for part, key, kind in (
            (told, "manifest", dict),
            (told, "n_latents", int),
            (told, "k", int),
            ("manifest", "steps", list),
            ("manifest", "channels", int),
        ):
            if not isinstance((told[part] if part == "manifest" else part).get(key), kind):
                raise ValueError(
                    f"{config} is not a bundle's (it has no {key!r}); save the bundle again"
                )
        return super().from_pretrained(name, map_location=map_location, **download)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, manifest: dict, n_latents: int, k: int, map_location, **download
    ) -> Bundle:
        path = _file(model_id, SAFETENSORS_SINGLE_FILE, **download)
        tensors, _ = load_tensors(path)
        try:
            bundle = cls(manifest=manifest, n_latents=n_latents, k=k)
            bundle.load_state_dict(tensors)
        except RuntimeError as error:  # torch's own words take many lines
            raise ValueError(
                f"{path} does not fit the {CONFIG_NAME} beside it ({' '.join(str(error).split())[:200]}); save the bundle again"
            ) from error
        return bundle.to(map_location).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        save_tensors(save_directory / SAFETENSORS_SINGLE_FILE, self.state_dict())

    @staticmethod
    def from_run(run: str) -> Bundle:
        """The bundle of a run folder, after 03; FileNotFoundError or ValueError names what is missing or does not belong together."""
        folder = runs.run_folder(run)
        path = folder / "trajectories" / "manifest.json"
        manifest = {name: value for name, value in load_json(path).items() if name in TOLD}
        if Path(
            manifest.get("model", "")
        ).is_absolute():  # where it lay on this machine is nobody's business
            manifest["model"] = Path(manifest["model"]).name
        fitted, made_from = Predictors.load(folder / "predictors.safetensors")
        runs.require_same(made_from, "trajectories", path, "02_fit_predictors")
        sae, record = SAE.load(folder / "sae.safetensors")
        runs.require_same(
            record, "predictors", folder / "predictors.safetensors", "03_train_residual_sae"
        )
        bundle = Bundle(manifest=manifest, n_latents=sae.n_latents, k=sae.k)
        bundle.sae = sae
        for f in fields(Predictors):
            setattr(bundle, f.name, getattr(fitted, f.name))
        return bundle.eval()

    @torch.no_grad()
    def encode(self, h: torch.Tensor) -> torch.Tensor:
        """Raw activations (…, step, channel), of any precision and device -> codes (…, latent)."""
        y = self.predictors.residualize(self.predictors.standardise(h.to(self.mu)))
        return self.sae.encode(y.reshape(-1, y.shape[-1])).view(*y.shape[:-1], -1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (…, latent) -> raw activations (…, step, channel)."""
        return self.predictors.unstandardise(self.predictors.restore(self.sae.decode(codes)))

    @torch.no_grad()
    def feature_trajectories(self) -> torch.Tensor:
        """u of every latent, (latent, step, channel), standardised units; see `Predictors.feature_trajectories`."""
        return self.predictors.feature_trajectories(self.sae.W_dec)
