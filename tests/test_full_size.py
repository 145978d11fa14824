"""Stable Diffusion 1.5's true architecture at full size, random weights, through notebooks 01 to 06: `make slow`."""

import re
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
from helpers.run import folder as runs

pytestmark = pytest.mark.slow


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
    said = estimate.estimate(name, full_size)
    p = runs.parameters_for("01", name)
    assert (
        said["activations on disk"]
        == (p["n_train"] + p["n_validation"] + p["n_test"]) * 5 * 64 * 1280 * 2
    )
    assert said["dimensions"] == 6400 and hooks_on(full_size.unet) == 0
    print(f"\n{name}\n{estimate.say(said)}")


def test_notebooks_at_full_size(full_size, tmp_path, capsys):
    full_size.to(torch.float16).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a lighthouse in a storm\na bowl of ripe cherries\n" * 3)
    values = {
        "run": str(tmp_path / "run"),
        "model": str(tmp_path / "model"),
        "prompts": str(tmp_path / "prompts.txt"),
        "dtype": "float32",
        "n_train": 2,
        "n_validation": 2,
        "n_test": 2,
        "num_inference_steps": 3,
        "n_keep": 3,
        "hookpoint": "mid_block.attentions.0",
        "height": 128,
        "width": 192,
        "batch_size": 2,
        "n_timings": 1,
        "n_latents": 512,
        "k": 8,
        "n_updates": 4,
        "sae_batch_size": 8,
        "n_updates_ablation": 2,
        "ablate_k": [4],
        "ablate_n_latents": [256],
        "ablate_n_keep": [2],
        "n_replaced": 1,
        "n_steered": 2,
        "strengths": [2.0],
        "n_shuffles": 2,
    }
    for notebook in runs.analysis_notebooks():
        known = runs.parameters_of(notebook)
        done = papermill(
            tmp_path, notebook.stem[:2], **{k: v for k, v in values.items() if k in known}
        )
        assert done.returncode == 0, done.stderr[-2000:]
    manifest = files.load_json(tmp_path / "run" / "trajectories" / "manifest.json")
    assert (manifest["grid"], manifest["channels"]) == ([2, 3], 1280) and len(
        manifest["timesteps"]
    ) == 3
    shown = (tmp_path / "03.ipynb").read_text()
    with capsys.disabled():
        print(
            "\npeak memory of a notebook:",
            f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB;",
            re.search(r"so far ([^\\]+)", shown)[1],
            "in 03",
        )
