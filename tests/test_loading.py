import copy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLING, built
from diffusers import StableDiffusionPAGPipeline

from helpers.files import load_json, save_json
from helpers.pipelines.generate import generate
from helpers.pipelines.loading import check_weights, denoiser_of, load_pipeline, resolved_revision


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """A folder that holds the tiny pipeline."""
    path = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(path)
    return path


def test_a_pipeline_in_a_folder_is_loaded_as_it_was_saved(pipe, folder):
    loaded = load_pipeline(str(folder), "cpu", "float32")
    images = [generate(p, ["a dog"], [0], **SAMPLING) for p in (pipe, loaded)]
    np.testing.assert_allclose(*images, atol=1e-5)
    assert loaded.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert load_pipeline(folder, "cpu", "bfloat16").unet.dtype == torch.bfloat16


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"model is '{tmp_path}'"):
        load_pipeline(tmp_path, "cpu")


@pytest.mark.parametrize("how", ["not there", "not listed"])
def test_a_folder_without_a_denoiser_is_told_so(folder, tmp_path, how):
    shutil.copytree(folder, tmp_path / "m")
    index = tmp_path / "m" / "model_index.json"
    if how == "not there":
        shutil.rmtree(tmp_path / "m" / "unet")
    else:
        save_json(index, {k: v for k, v in load_json(index).items() if k != "unet"})
    with pytest.raises(ValueError, match="model is .*/m'; .*it has no `?unet"):
        load_pipeline(tmp_path / "m", "cpu")


def test_weights_that_are_no_numbers_are_named_when_they_are_loaded(pipe, tmp_path):
    broken = copy.deepcopy(pipe)
    with torch.no_grad():
        broken.text_encoder.get_submodule("final_layer_norm").bias[1] = torch.inf
    broken.save_pretrained(tmp_path)
    said = "finite weights, and text_encoder.*final_layer_norm.bias is not, in float32$"
    with pytest.raises(ValueError, match=f"^model is '{tmp_path}'; .*{said}"):
        load_pipeline(tmp_path, "cpu")
    check_weights(pipe.to("cpu"))


def test_weights_that_are_not_safetensors_are_refused(folder, tmp_path):
    built("ddpm").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=f"model is '{tmp_path}'.*safetensors"):
        load_pipeline(tmp_path, "cpu")


@pytest.mark.process
def test_loading_says_nothing(folder):
    code = f"from helpers.pipelines.loading import load_pipeline; load_pipeline({str(folder)!r})"
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_revision_of_a_folder_is_empty_and_of_an_unknown_model_the_given_one(folder):
    assert resolved_revision(folder, "main") == ""
    assert resolved_revision("nobody/has-this-model", "v1") == "v1"


def test_the_denoiser_is_the_unet_or_the_transformer(pipe):
    assert denoiser_of(pipe) is pipe.unet
    assert denoiser_of(built("sd3")) is built("sd3").transformer
    with pytest.raises(ValueError, match="model is 'object'"):
        denoiser_of(object())


def test_perturbed_attention_guidance_is_refused(pipe):
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    with pytest.raises(ValueError, match="model is 'StableDiffusionPAGPipeline'"):
        denoiser_of(StableDiffusionPAGPipeline(**parts, requires_safety_checker=False))
