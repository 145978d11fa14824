import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import SAMPLING, TOKENS, some_predictors

from helpers import coordinates, dictionary
from helpers.bundle import MANIFEST_FIELDS, Bundle
from helpers.files import digest, load_json, save_json, save_tensors
from helpers.predictors import Predictors

S, D = 3, 32
MANIFEST = {
    "model": "/home/someone/models/tiny",
    "model_dtype": "auto",
    "revision": "",
    "hookpoint": TOKENS,
    "signal": "output",
    "branch": "conditional",
    "steps": [0, 1, 2],
    "timesteps": [900.0, 500.0, 1.0],
    "sigmas": [9.0, 1.0, 0.1],
    "scheduler": "DDIMScheduler",
    "sampling": SAMPLING | {"height": 0, "width": 0},
    "grid": [4, 4],
    "channels": D,
    "versions": {"torch": "2"},
    "prompts": ["a secret prompt"],
    "seeds": [1234567],
}


def trajectories():
    return torch.randn(60, S, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder after notebook 03, as far as a bundle reads it."""
    folder = tmp_path_factory.mktemp("bundle") / "run"
    save_json(folder / "trajectories" / "manifest.json", MANIFEST)
    p, path = some_predictors(S, D), folder / "predictors.safetensors"
    p.save(path, {"trajectories": digest(folder / "trajectories" / "manifest.json")[:16]})
    found = dictionary.untrained(coordinates.residual(p), 64, 4).calibrate(trajectories())
    found.save(folder / "sae.safetensors", {"predictors": digest(path)[:16]})
    return folder


@pytest.fixture(scope="module")
def bundle(run):
    return Bundle.from_folder(run)


@pytest.fixture(scope="module")
def saved(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "mine"
    bundle.save_pretrained(folder)
    return folder


def same(one, other):
    a, b = one.dictionary.state_dict(), other.dictionary.state_dict()
    return one.manifest == other.manifest and all(torch.equal(a[k], b[k]) for k in a.keys() | b)


def test_a_bundle_knows_where_it_listens_and_nothing_of_the_images(bundle):
    assert bundle.manifest == {name: MANIFEST[name] for name in MANIFEST_FIELDS} | {"model": "tiny"}


def test_what_the_run_measured_goes_along(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    results = {"trained": {"ev": [0.1234, 0, 1], "l0": [4, 3, 5], "alive": 1, "trajectories": 60}}
    path = tmp_path / "run" / "metrics" / "03_train_residual_sae.json"
    save_json(path, {"metrics": {"results": results}})
    found = Bundle.from_folder(tmp_path / "run")
    found.save_pretrained(tmp_path / "saved")
    assert "0.123 [0.000, 1.000]" in (tmp_path / "saved" / "README.md").read_text()
    assert Bundle.from_pretrained(tmp_path / "saved").report == {"reconstruction": results}
    with pytest.raises(ValueError, match="cards is True; it must be False until notebook 05"):
        Bundle.from_folder(tmp_path / "run", cards=True)


def test_its_dictionary_is_the_runs(run, bundle):
    found, _ = dictionary.Dictionary.load(run / "sae.safetensors")
    x = trajectories()
    assert torch.equal(bundle.dictionary.codes(x), found.codes(x)) and found.codes(x).any()


def test_a_saved_bundle_comes_back_bit_for_bit(bundle, saved):
    assert {p.name for p in saved.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    loaded = Bundle.from_pretrained(saved)
    assert same(loaded, bundle) and not loaded.dictionary.training
    assert torch.equal(loaded.dictionary.directions(), bundle.dictionary.directions())


def test_no_path_and_no_prompt_goes_along(saved):
    written = "".join(p.read_text() for p in saved.iterdir() if p.suffix != ".safetensors")
    assert not any(word in written for word in ("someone", "secret", "prompts", "1234567"))
    assert "residualized-temporal-saes" in written and "mit" in written


def test_a_bundle_is_uploaded_as_it_is_saved(bundle, saved, monkeypatch):
    calls = {}

    def create_repo(self, repo_id, **options):
        calls["created"] = repo_id, options["private"]
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **_):
        calls["uploaded"] = repo_id, {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    bundle.push_to_hub("me/mine", private=True)
    assert calls["created"] == ("me/mine", True) and calls["uploaded"][0] == "me/mine"
    uploaded, written = calls["uploaded"][1], {p.name: p.read_bytes() for p in saved.iterdir()}
    said, named = (files.pop("README.md").decode() for files in (uploaded, written))
    assert uploaded == written
    assert said == named.replace("owner/name", "me/mine") != named


def test_a_bundle_is_downloaded_by_the_hubs_own_function(bundle, saved, monkeypatch):
    asked = []

    def download(name, file, **options):
        asked.append((name, file, options))
        return str(saved / file)

    monkeypatch.setattr("helpers.bundle.hf_hub_download", download)
    assert same(Bundle.from_pretrained("me/mine", revision="v1"), bundle)
    files = ("config.json", "model.safetensors")
    assert asked == [("me/mine", file, {"revision": "v1"}) for file in files]


def test_a_colleague_steers_with_a_bundle_alone(pipe, saved):
    from helpers.steering import addition, steer
    from helpers.trajectories import Tap

    bundle = Bundle.from_pretrained(saved)
    m, found = bundle.manifest, bundle.dictionary
    tap = Tap(m["hookpoint"], m["signal"], m["branch"])
    n = m["sampling"]["num_inference_steps"]
    delta = addition(found.directions(5), found.coordinates, m["steps"], n, 1.5)
    before, after = (
        steer(pipe, ["a red circle"], [0], tap, d, **m["sampling"]) for d in (0 * delta, delta)
    )
    assert np.abs(before - after).max() > 1e-3


# --- what can be wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", ["trajectories/manifest.json", "predictors.safetensors", "sae.safetensors"]
)
def test_a_piece_that_is_missing_is_named(run, tmp_path, missing):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        Bundle.from_folder(tmp_path / "run")


def test_pieces_that_do_not_belong_together_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "predictors.safetensors"
    fitted, record = Predictors.load(path)
    fitted.save(path, record | {"ridge": 1})
    with pytest.raises(ValueError, match="predictors.safetensors has changed"):
        Bundle.from_folder(tmp_path / "run")
    manifest = tmp_path / "run" / "trajectories" / "manifest.json"
    save_json(manifest, MANIFEST | {"seeds": []})
    with pytest.raises(ValueError, match="manifest.json has changed"):
        Bundle.from_folder(tmp_path / "run")


def test_a_manifest_of_other_sizes_is_refused(bundle):
    with pytest.raises(ValueError, match="^manifest's steps and channels is"):
        Bundle(bundle.dictionary, MANIFEST | {"channels": 7})


@pytest.mark.parametrize(
    "name, said",
    [
        ("nobody/nothing", "cannot find the requested files"),
        ("/absent/folder", "^/absent/folder is not a folder"),
        ("./absent", "^./absent is not"),
    ],
)
def test_a_name_that_cannot_be_found_is_an_error(monkeypatch, name, said):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=said):
        Bundle.from_pretrained(name)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def write(content):
    return lambda path: path.write_text(content)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("model.safetensors", Path.unlink),
        ("model.safetensors", cut),
        ("model.safetensors", flip),
        ("model.safetensors", lambda path: save_tensors(path, {"mu": torch.zeros(3, 32)})),
        ("config.json", Path.unlink),
        ("config.json", write("manifest: 64")),
        ("config.json", write("{}")),
        ("config.json", write("[]")),
        ("config.json", write('{"manifest": {"steps": [0, 1]}}')),
        ("config.json", lambda path: save_json(path, {"manifest": MANIFEST | {"channels": 31}})),
    ],
)
def test_a_damaged_bundle_is_named_in_one_sentence(saved, tmp_path, name, damage):
    shutil.copytree(saved, tmp_path / "bundle")
    damage(tmp_path / "bundle" / name)
    with pytest.raises((ValueError, FileNotFoundError), match=name) as refused:
        Bundle.from_pretrained(tmp_path / "bundle")
    assert "\n" not in str(refused.value)


def test_a_misspelt_option_is_an_error(saved):
    with pytest.raises(TypeError, match="devise"):
        Bundle.from_pretrained("me/mine", devise="cpu")


def test_the_manifest_is_what_json_keeps(saved, bundle):
    assert load_json(saved / "config.json") == {"manifest": bundle.manifest}
