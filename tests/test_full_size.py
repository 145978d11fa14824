"""Stable Diffusion 1.5 at full size, random weights, through notebooks 01 to 07: `make slow`."""

import resource

import pytest
import torch
from conftest import hooks_on
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from test_notebooks import papermill
from transformers import CLIPTextConfig, CLIPTextModel

from helpers import files
from helpers.demo.model import build_tokenizer
from helpers.run import estimate
from helpers.run.parameters import analysis_notebooks, parameters_for, parameters_of

pytestmark = [pytest.mark.slow, pytest.mark.process]
SMALL = {
    **{"dtype": "float32", "n_train": 2, "n_validation": 2, "n_test": 2, "batch_size": 2},
    **{"num_inference_steps": 3, "n_keep": 3, "hookpoint": "mid_block.attentions.0"},
    **{"height": 128, "width": 192, "n_timings": 1, "n_shuffles": 2},
    **{"n_latents": 512, "k": 8, "n_updates": 4, "sae_batch_size": 8},
    **{"ablate_k": [4], "ablate_n_latents": [256], "ablate_n_keep": [2], "n_replaced": 1},
    **{"n_steered": 2, "strengths": [2.0]},
}


@pytest.fixture(scope="module")
def full_size():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["sd15", "sd15-small"])
def test_estimate_at_full_size(full_size, name):
    assert round(sum(p.numel() for p in full_size.unet.parameters()) / 1e6) == 860  # as published
    needs, p = estimate.estimate(name, full_size), parameters_for("01", name)
    n_images = p["n_train"] + p["n_validation"] + p["n_test"]
    assert needs["activations on disk, B"] == n_images * 5 * 64 * 1280 * 2
    assert needs["numbers a trajectory"] == 6400 and hooks_on(full_size.unet) == 0
    print(f"\n{name}\n{estimate.in_words(needs)}")


def test_notebooks_at_full_size(full_size, tmp_path, capsys):
    full_size.to(torch.float16).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a lighthouse in a storm\na bowl of ripe cherries\n" * 3)
    places = {name: str(tmp_path / name) for name in ("run", "model")}
    values = SMALL | places | {"prompts": str(tmp_path / "prompts.txt")}
    for notebook in analysis_notebooks():
        known = parameters_of(notebook)
        given = {name: value for name, value in values.items() if name in known}
        done = papermill(tmp_path, notebook.stem[:2], **given)
        assert done.returncode == 0, done.stderr[-2000:]
    manifest = files.load_json(tmp_path / "run" / "trajectories" / "manifest.json")
    assert (manifest["grid"], manifest["channels"]) == ([2, 3], 1280)
    assert len(manifest["timesteps"]) == 3
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    with capsys.disabled():
        print(f"\npeak memory of a notebook: {peak:.2f} GB")
