"""A trained dictionary and where it listens, in one folder or one name on the Hugging Face hub.

Bundle.from_folder("runs/sd15").push_to_hub("me/sd15-residual-sae")
bundle = Bundle.from_pretrained("me/sd15-residual-sae")
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE

from helpers.checks import refuse
from helpers.dictionary import Dictionary
from helpers.files import digest, load_json, load_tensors, save_json
from helpers.sharing import card

# of a collection's manifest, what is needed to listen and to steer where it was recorded
MANIFEST_FIELDS = (
    *("model", "model_dtype", "revision", "hookpoint", "signal", "branch", "steps", "timesteps"),
    *("sigmas", "scheduler", "sampling", "grid", "channels", "versions"),
)


class Bundle(
    ModelHubMixin,
    library_name="residualized-temporal-saes",
    tags=["sparse-autoencoder", "diffusion", "interpretability"],
    license="mit",
    paper_url="https://arxiv.org/abs/2605.27813",
):
    """A dictionary and, of the manifest of what it was trained on, what steering needs.

    `report` is what its run measured, of `card.summary`; with `records`, of `explorer.records`, its
    best features are shown. `save_pretrained` is huggingface_hub's, with a model card of both, made
    anew each time. Prompts, seeds and paths stay behind, but for what features' pages show.
    """

    def __init__(self, dictionary: Dictionary, manifest: dict, report=None, records=None):
        sizes = dictionary.coordinates.n_steps, dictionary.coordinates.channels
        given = len(manifest["steps"]), manifest["channels"]
        if given != sizes:
            refuse("manifest's steps and channels", given, f"the dictionary's, {sizes}")
        self.dictionary = dictionary
        self.manifest = {name: value for name, value in manifest.items() if name in MANIFEST_FIELDS}
        if Path(self.manifest.get("model", "")).is_absolute():
            self.manifest["model"] = Path(self.manifest["model"]).name
        self.report, self.records = report or {}, records

    @property
    def shown(self) -> list[int]:
        """Latents whose pages go along: the report's features that fire in the records' images."""
        if self.records is None:
            return []
        fires = self.records.table["images"] > 0
        return [f["latent"] for f in self.report.get("features", []) if fires[f["latent"]]]

    @staticmethod
    def from_folder(folder: str | Path, cards: bool = False) -> Bundle:
        """The bundle of a run's folder, after notebook 03; its card says what later ones found.

        With `cards`, which needs notebook 05, pages of the best features go along: they show images
        and prompts. FileNotFoundError or ValueError names a file that is missing, or newer than
        what it made.
        """
        manifest = Path(folder) / "trajectories" / "manifest.json"
        predictors = Path(folder) / "predictors.safetensors"
        about, (_, fitted) = load_json(manifest), load_tensors(predictors, ())
        dictionary, trained = Dictionary.load(Path(folder) / "sae.safetensors")
        seen = {manifest: fitted.get("trajectories"), predictors: trained.get("predictors")}
        for path, fingerprint in seen.items():
            if not fingerprint or not digest(path).startswith(fingerprint):
                raise ValueError(f"{path} has changed since it was used; run the later notebooks")
        report = card.summary(folder)
        if not cards:
            return Bundle(dictionary, about, report)
        if not report.get("features"):
            refuse("cards", cards, "False until notebook 05 has chosen features")
        from helpers.explorer import records  # here, with all that notebooks need
        from helpers.explorer.cards import open_run

        found = records.build(open_run(str(Path(folder).resolve())))
        return Bundle(dictionary, about, report, found)

    @classmethod
    def from_pretrained(cls, name: str | Path, **download) -> Bundle:
        """A bundle from a folder or a name on the hub; `download` is for `hf_hub_download`.

        FileNotFoundError or ValueError names a file that is missing or damaged.
        """
        folder = Path(name).expanduser()
        local = folder.is_dir()
        if not local and (str(name).startswith((".", "~", os.sep)) or str(name).count("/") > 1):
            raise FileNotFoundError(f"{name} is not a folder, nor a name on the hub, owner/name")
        config, weights = (
            folder / file if local else Path(hf_hub_download(str(name), file, **download))
            for file in (CONFIG_NAME, SAFETENSORS_SINGLE_FILE)
        )
        about = load_json(config)
        dictionary, _ = Dictionary.load(weights)
        try:
            return cls(dictionary, about["manifest"], about.get("report"))
        except (KeyError, TypeError, ValueError):
            refuse(str(config), about, "the file that was saved beside the dictionary")

    def push_to_hub(self, repo_id: str, **options) -> str:
        """As huggingface_hub's, with a model card that names the repository."""
        named = {"repo": repo_id} | (options.pop("model_card_kwargs", None) or {})
        return super().push_to_hub(repo_id, model_card_kwargs=named, **options)

    def generate_model_card(self, repo: str = "owner/name") -> ModelCard:
        """README.md: metadata, and what `card.text` says of the dictionary."""
        data = ModelCardData(**self._hub_mixin_info.model_card_data.to_dict())
        model = self.manifest.get("model", "")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists():
            data.base_model = model
        text = card.text(self.dictionary, self.manifest, self.report, repo, self.shown)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")

    def _save_pretrained(self, save_directory: Path) -> None:
        self.dictionary.save(save_directory / SAFETENSORS_SINGLE_FILE)
        (save_directory / "README.md").unlink(missing_ok=True)  # huggingface_hub would keep it
        if self.shown:
            from helpers.sharing import pages  # here, with all that draws

            pages.write(self.records, self.shown, save_directory / "features")
        about = {"manifest": self.manifest} | ({"report": self.report} if self.report else {})
        save_json(save_directory / CONFIG_NAME, about)
