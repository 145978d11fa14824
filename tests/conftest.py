import functools
import os
from itertools import islice

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)
settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

TOKENS = "mid_block.attentions.0.transformer_blocks.0"  # (row, token, channel)
GRID = "mid_block.resnets.0"  # (row, channel, height, width)
TUPLE = "mid_block.attentions.0"  # a tuple that holds a grid
SAMPLING = {"num_inference_steps": 3, "guidance_scale": 3.0}


@functools.cache
def built(name):
    """The tiny pipeline of that name in `pipelines.ALL`, shared: tests leave it as it is."""
    import pipelines  # here, because reading diffusers takes seconds that many tests do not need

    return pipelines.ALL[name]()


@pytest.fixture(scope="session")
def pipe():
    """A tiny Stable Diffusion: 16×16 images, 8×8 latents, 4×4 tokens of 32 channels midway."""
    return built("sd1")


@pytest.fixture(scope="session")
def prompts():
    return ["a red circle", "two cats", "a tree", "a green dog, striped", "3 small boats at sea"]


@pytest.fixture
def no_hooks_left(pipe):
    """Fails a test that leaves a hook anywhere in the pipeline's denoiser."""
    yield
    assert hooks_on(pipe.unet) == 0


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def some_predictors(n_steps=3, d=4, seed=0):
    """Predictors of no particular origin; each A has spectral norm below one."""
    from helpers.predictors import Predictors

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
