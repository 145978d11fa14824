import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import SAMPLING, TOKENS
from test_jobs import fit, parameters, start

from helpers import sae, steering
from helpers.bundle import TOLD, Bundle
from helpers.files import load_json, save_json, save_tensors
from helpers.predictors import Predictors
from helpers.run import folder as runs
from helpers.run import jobs
from helpers.store import collect as stores


@pytest.fixture(scope="module")
def run(pipe, tmp_path_factory):
    """The folder of a tiny run after notebook 03."""
    p = parameters(tmp_path_factory.mktemp("bundle") / "run")
    folder = Path(p["run"])
    jobs.collect(p, pipe)
    fit(p)
    jobs.train(p)[0].save(
        folder / "sae.safetensors",
        {"predictors": runs.fingerprint(folder / "predictors.safetensors")},
    )
    return folder


@pytest.fixture(scope="module")
def parts(run):
    """The run's predictors, SAE and validation activations, (image, token, step, channel)."""
    store = stores.Store(run / "trajectories")
    h = torch.cat(list(store.shards("validation"))).transpose(1, 2)
    return (
        Predictors.load(run / "predictors.safetensors")[0],
        sae.SAE.load(run / "sae.safetensors")[0],
        h,
    )


@pytest.fixture(scope="module")
def bundle(run):
    return Bundle.from_run(str(run))


@pytest.fixture(scope="module")
def saved(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "mine"
    bundle.save_pretrained(folder)
    return folder


def test_a_bundle_knows_where_it_listens_and_nothing_of_the_images(run, bundle):
    manifest = load_json(run / "trajectories" / "manifest.json")
    assert bundle.manifest == {name: manifest[name] for name in TOLD}
    assert (
        bundle.manifest["hookpoint"] == TOKENS
        and bundle.manifest["steps"] == [0, 1, 2]
        and bundle.manifest["grid"] == [4, 4]
    )


def test_encode_decode_and_trajectories_are_those_of_the_parts(bundle, parts):
    predictors, model, h = parts
    codes = bundle.encode(h)
    y = predictors.residualize(predictors.standardise(h))
    with torch.no_grad():
        assert (
            torch.equal(codes, model.encode(y.flatten(0, 1)).view(*h.shape[:2], 64))
            and (codes > 0).any()
        )
        expected = predictors.unstandardise(predictors.restore(model.decode(codes.flatten(0, 1))))
        torch.testing.assert_close(bundle.decode(codes), expected.view_as(h))
        assert torch.equal(
            bundle.feature_trajectories(), predictors.feature_trajectories(model.W_dec)
        )
    assert not any(
        v.requires_grad for v in (codes, bundle.decode(codes), bundle.feature_trajectories())
    )
    assert (bundle.decode(codes) - h).norm() < (h - predictors.mu).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_shape_and_precision_is_encoded(bundle, parts, dtype):
    h = parts[2]
    codes = bundle.encode(h)
    torch.testing.assert_close(bundle.encode(h[0, 3]), codes[0, 3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bundle.encode(h[None]), codes[None])
    assert bundle.encode(h.to(dtype)).dtype == torch.float32
    assert ((bundle.encode(h.to(dtype)) > 0) == (codes > 0)).double().mean() > 0.97


def test_a_saved_bundle_comes_back_bit_for_bit(bundle, saved, parts):
    assert {p.suffix for p in saved.iterdir()} == {".safetensors", ".json", ".md"} and len(
        list(saved.iterdir())
    ) == 3
    loaded = Bundle.from_pretrained(str(saved))
    assert (
        loaded.manifest == bundle.manifest
        and not loaded.training
        and (loaded.sae.n_latents, loaded.sae.k) == (64, 4)
    )
    for name, value in bundle.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.sae.W_enc.T.is_contiguous() and torch.equal(
        loaded.encode(parts[2]), bundle.encode(parts[2])
    )
    for name, value in vars(parts[0]).items():
        assert torch.equal(getattr(loaded.predictors, name), value)


def test_no_path_and_no_prompt_goes_along(run, saved):
    written = "".join(p.read_text() for p in saved.iterdir() if p.suffix != ".safetensors")
    assert str(run.parent) not in written and "prompts" not in written and "seeds" not in written
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
    assert calls["uploaded"][1] == {p.name: p.read_bytes() for p in saved.iterdir()}


# --- what can be wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", ["trajectories/manifest.json", "predictors.safetensors", "sae.safetensors"]
)
def test_a_piece_that_is_missing_is_named(run, tmp_path, missing):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{missing} does not exist; run the notebook[^\n]*$"
    ):
        Bundle.from_run(str(tmp_path / "run"))


def test_pieces_that_do_not_belong_together_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "predictors.safetensors"
    fitted, record = Predictors.load(path)
    fitted.save(path, record | {"ridge": 1})
    with pytest.raises(
        ValueError, match="predictors.safetensors has changed.*run 03_train_residual_sae again$"
    ):
        Bundle.from_run(str(tmp_path / "run"))
    manifest = tmp_path / "run" / "trajectories" / "manifest.json"
    save_json(manifest, load_json(manifest) | {"seeds": []})
    with pytest.raises(ValueError, match="manifest.json has changed.*run 02_fit_predictors again$"):
        Bundle.from_run(str(tmp_path / "run"))


@pytest.mark.parametrize(
    "name, said",
    [
        ("nobody/nothing", "cannot find the requested files"),
        ("/absent/folder", "^/absent/folder is not a folder; "),
        ("./absent", "^./absent is not"),
    ],
)
def test_a_name_that_cannot_be_found_is_an_error(monkeypatch, name, said):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=said):
        Bundle.from_pretrained(name)


def change(**values):
    return lambda path: save_json(path, load_json(path) | values)


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("model.safetensors", Path.unlink, "does not exist"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
        (
            "model.safetensors",
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
            "is damaged",
        ),
        (
            "model.safetensors",
            lambda path: save_tensors(path, {"mu": torch.zeros(3, 32)}),
            "does not fit the config.json",
        ),
        ("config.json", Path.unlink, "does not exist"),
        ("config.json", lambda path: path.write_text("n_latents: 64"), "is damaged"),
        (
            "config.json",
            lambda path: path.write_text("{}"),
            "is not a bundle's .it has no 'manifest'",
        ),
        (
            "config.json",
            lambda path: path.write_text("[]"),
            "is not a bundle's .it has no 'manifest'",
        ),
        ("config.json", change(k="4"), "is not a bundle's .it has no 'k'"),
        (
            "config.json",
            change(manifest={"steps": [0, 1]}),
            "is not a bundle's .it has no 'channels'",
        ),
        ("config.json", change(n_latents=63), "model.safetensors does not fit the config.json"),
        ("config.json", change(n_latents=10**15), "model.safetensors does not fit the config.json"),
    ],
)
def test_a_damaged_bundle_is_named_in_one_sentence(saved, tmp_path, name, damage, said):
    shutil.copytree(saved, tmp_path / "bundle")
    damage(tmp_path / "bundle" / name)
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"^{tmp_path}/bundle/.*{said}"
    ) as refused:
        Bundle.from_pretrained(tmp_path / "bundle")
    assert "\n" not in str(refused.value)


def test_a_bundle_goes_where_it_is_told(saved):
    assert Bundle.from_pretrained(saved, map_location="meta").mu.is_meta
    with pytest.raises(TypeError, match="devise"):
        Bundle.from_pretrained(saved, devise="cpu")


# --- steering with it ---------------------------------------------------------------------------

STEERED = """
import numpy as np
import pipelines
from helpers import steering
from helpers.bundle import Bundle

pipe, bundle = pipelines.stable_diffusion(), Bundle.from_pretrained("mine")
m = bundle.manifest
u = bundle.feature_trajectories()[5]
delta = steering.addition(u, bundle.predictors, m["steps"], m["sampling"]["num_inference_steps"], 1.5)
images = steering.steer(pipe, ["a red circle"] * 2, [0, 1], m["hookpoint"], delta, signal=m["signal"], branch=m["branch"], **m["sampling"])
np.save("steered.npy", images)
"""


def test_a_colleague_steers_with_a_bundle_alone(pipe, bundle, saved, parts, tmp_path):
    shutil.copytree(saved, tmp_path / "mine")
    (tmp_path / "colleague.py").write_text(STEERED)
    start("colleague.py", folder=tmp_path)
    steered = np.load(tmp_path / "steered.npy")
    predictors, model, _ = parts
    u = predictors.feature_trajectories(model.W_dec.detach())[5]
    sampling = SAMPLING | {"height": 0, "width": 0}
    delta = steering.addition(u, predictors, [0, 1, 2], 3, 1.5)
    expected = steering.steer(pipe, ["a red circle"] * 2, [0, 1], TOKENS, delta, **sampling)
    assert (
        json.loads((tmp_path / "mine" / "config.json").read_text())["manifest"]["sampling"]
        == sampling
    )
    np.testing.assert_allclose(steered, expected, atol=1e-5)
    assert (
        abs(
            steered
            - steering.steer(pipe, ["a red circle"] * 2, [0, 1], TOKENS, 0 * delta, **sampling)
        ).max()
        > 1e-3
    )
