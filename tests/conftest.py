from itertools import islice

import matplotlib
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import settings
from transformers import CLIPTextConfig, CLIPTextModel

from helpers import scenes
from helpers.demo_model import MAX_TOKENS, build_tokenizer
from helpers.predictors import Predictors

matplotlib.use("Agg")
torch.set_num_threads(1)
settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

TOKENS = "mid_block.attentions.0.transformer_blocks.0"  # (row, token, channel)
GRID = "mid_block.resnets.0"  # (row, channel, height, width)
TUPLE = "mid_block.attentions.0"  # a tuple that holds a grid
SAMPLING = {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="session")
def pipe():
    """A random pipeline of 16×16 images and 8×8 latents; its middle block has 4×4 tokens of 32 channels."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=(8, 8),
        norm_num_groups=4, sample_size=16, mid_block_add_attention=False,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    built = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="session")
def prompts():
    return [scenes.caption(s) for s in scenes.sample(5, np.random.default_rng(0))]


@pytest.fixture
def no_hooks_left(pipe):
    """Fails a test that leaves a hook anywhere in the pipeline's denoiser."""
    yield
    assert hooks_on(pipe.unet) == 0


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def some_predictors(n_steps=3, d=4, seed=0):
    """Predictors of no particular origin; each A has spectral norm below one."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(n_steps, d, d, generator=g)
    A = 0.9 * A / torch.linalg.matrix_norm(A, 2)[:, None, None]
    A[0] = 0
    b = torch.randn(n_steps, d, generator=g)
    b[0] = 0
    return Predictors(
        mu=torch.randn(n_steps, d, generator=g),
        scale=torch.rand(n_steps, generator=g) + 0.5,
        A=A,
        b=b,
        rho=torch.cat([torch.ones(1), torch.rand(n_steps - 1, generator=g) + 0.1]),
        strength=torch.zeros(n_steps),
    )


def take(n, iterator):
    return list(islice(iterator, n))
