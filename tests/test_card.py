import pytest
import torch
from conftest import some_predictors

from helpers import coordinates, dictionary
from helpers.bundle import Bundle
from helpers.files import digest, load_json, save_json
from helpers.sharing import card

S, D = 3, 4
MANIFEST = {
    "model": "someone/a-model",
    "hookpoint": "mid|block",
    "signal": "output",
    "revision": "",
    "steps": [0, 12, 24],
    "timesteps": [961.0, 481.0, 1.0],
    "sampling": {"num_inference_steps": 25, "guidance_scale": 3.0, "height": 0},
    "grid": [8, 4],
    "channels": D,
    "prompts": ["a secret"],
}
LATENTS = {
    "best": {
        "colour=red": {"residual": 5, "raw": 1, "validation_auroc": {"residual": 0.7, "raw": 0.9}},
        "shape=round": {"residual": 5, "raw": 2, "validation_auroc": {"residual": 0.9, "raw": 0.5}},
        "size=small": {"residual": 2, "raw": 2, "validation_auroc": {"residual": None, "raw": 0.5}},
        "size=large": {"residual": 7, "raw": 2, "validation_auroc": {"residual": 0.8, "raw": 0.5}},
    },
    "labels": {},
    "strongest": [
        {"name": "cluster 1", "residual": 7, "raw": 0, "effect": 1.0},
        {"name": "cluster 2", "residual": 9, "raw": 0, "effect": 0.5},
    ],
}


def some():
    return dictionary.untrained(coordinates.residual(some_predictors(S, D)), 10, 2, name="ours")


@pytest.fixture
def run(tmp_path):
    """A run's folder, as far as a card reads it."""
    folder = tmp_path / "run"
    some().save(folder / "sae.safetensors")
    result = {"ev": [0.5, 0.4, 0.6], "l0": [2.0, 1.5, 2.5], "alive": 0.9, "trajectories": 640}
    spaces = {"activation": [0.72, 0.7, 0.74], "residual": [0.55, 0.5, 0.6]}
    wholes = {"residual concat": {"all labels": [0.6, 0.5, 0.7], "colour": [1, 1, 1]}, "none": {}}
    auroc = {"shape=round": [0.81, 0.75, 0.88], "size=large": [None, None, None]}
    metrics = {
        "03_train_residual_sae": {"results": {"trained": result}},
        "04_reconstruction_ablation": {"ev": {"residual concat": spaces, "PCA raw": spaces}},
        "05_spatiotemporal_heatmaps": {
            **{"mean_auroc": wholes, "n_images": 100, "auroc": {"residual concat": auroc}},
        },
    }
    for name, found in metrics.items():
        save_json(folder / "metrics" / f"{name}.json", {"metrics": found})
    made_from = {"sae": digest(folder / "sae.safetensors")[:16]}
    save_json(folder / "latents.json", LATENTS | made_from)
    return folder


def test_the_best_features_are_each_labels_latents_by_auroc_then_clusters():
    found = card.best(LATENTS, {"shape=round": [0.8, 0.7, 0.9]})
    assert [(f["latent"], f["what"]) for f in found] == [
        *((5, "shape=round"), (7, "size=large"), (2, "size=small"), (9, "cluster 2")),
    ]
    assert [f["auroc"] for f in found] == [[0.8, 0.7, 0.9], None, None, None]
    assert [f["latent"] for f in card.best(LATENTS, {}, 2)] == [5, 7]
    no_labels = card.best(LATENTS | {"best": {}}, {})
    assert [f["latent"] for f in no_labels] == [7, 9]


def test_a_summary_holds_what_the_notebooks_found(run):
    found = card.summary(run)
    assert found["reconstruction"]["trained"]["ev"] == [0.5, 0.4, 0.6]
    assert list(found["spaces"]) == ["residual concat"]
    assert found["auroc"] == {"residual concat": [0.6, 0.5, 0.7]} and found["n_images"] == 100
    assert [f["latent"] for f in found["features"]] == [5, 7, 2, 9]


def test_what_was_found_of_another_dictionary_is_left_out(run):
    found = dictionary.untrained(coordinates.raw(some_predictors(S, D)), 10, 2, seed=1)
    found.save(run / "sae.safetensors")
    assert list(card.summary(run)) == ["reconstruction"]
    (run / "latents.json").unlink()
    assert list(card.summary(run)) == ["reconstruction"]
    for path in (run / "metrics").iterdir():
        path.unlink()
    assert card.summary(run) == {}


def test_a_card_says_what_where_and_how_well(run):
    said = card.text(some(), MANIFEST, card.summary(run), "me/mine", [7])
    assert said.startswith("# ours, someone/a-model, mid|block\n")
    for figure in (
        *("0.500 [0.400, 0.600]", "2.000 [1.500, 2.500]", "90%", "640", "0.720 [0.700, 0.740]"),
        *("0.600 [0.500, 0.700]", "0.810 [0.750, 0.880]", "100 test images", "mid\\|block"),
        *("0 (t = 961), 12 (t = 481), 24 (t = 1)", "num_inference_steps = 25", "8 × 4"),
        *('from_pretrained("me/mine")', "2605.27813", "2412.06410", "MIT", "3 denoising steps"),
        "in residual coordinates: what predictors leave over of each step",
    ):
        assert figure in said, figure
    assert "[7](features/latent-7.html)" in said and "(features/latent-7.jpg)" in said
    assert "features/latent-5" not in said
    assert "secret" not in said and "height" not in said and "$" not in said
    rows = [line for line in said.splitlines() if line.startswith("|") and "size=large" in line]
    assert len(rows) == 1 and "–" in rows[0]  # nothing measured there


def test_a_card_of_nothing_measured_says_so():
    raw = dictionary.untrained(coordinates.raw(some_predictors(S, D)), 10, 2)
    said = card.text(raw, {"steps": [0, 1, 2], "channels": D}, {}, "me/mine")
    assert said.count("Not measured") == 2 and "at once, in raw coordinates. Each" in said


def test_a_saved_bundle_has_the_card(run, tmp_path):
    report = card.summary(run)
    bundle = Bundle(some(), MANIFEST, report)
    bundle.save_pretrained(tmp_path / "saved")
    said = (tmp_path / "saved" / "README.md").read_text()
    top, body = said.removeprefix("---\n").split("---\n", 1)
    assert "base_model: someone/a-model" in top and "license: mit" in top
    assert "library_name: residualized-temporal-saes" in top and "sparse-autoencoder" in top
    assert body.strip() == card.text(some(), MANIFEST, report, "owner/name").strip()
    loaded = Bundle.from_pretrained(tmp_path / "saved")
    assert loaded.report == load_json(tmp_path / "saved" / "config.json")["report"] == report
    assert torch.equal(loaded.dictionary.directions(), bundle.dictionary.directions())
