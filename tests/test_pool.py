from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SAMPLING, TOKENS

from helpers.hooks import Tap
from helpers.measure.pool import Pool
from helpers.pipelines.generate import generate

STORE = SimpleNamespace(tap=Tap(TOKENS), steps=[0, 2], grid=(4, 4), sampling=SAMPLING)
SEEDS = [3, 4, 5, 6]


@pytest.fixture(scope="module")
def pool(pipe, prompts):
    return Pool.make(pipe, STORE, prompts[:4], SEEDS, batch_size=3)


def test_a_pool_is_generated_recorded_and_can_be_replayed(pipe, prompts, pool):
    plain = generate(pipe, prompts[:4], SEEDS, **SAMPLING)
    np.testing.assert_allclose(pool.images, plain, atol=1e-5)
    assert pool.h.shape == (4, 2, 16, 32)
    assert pool.outputs.rows.shape == (4, 3, 2, 4, 8, 8)  # image, call, branch, latents
    assert [step for step, _, _ in pool.outputs.calls] == [0, 1, 2]


def test_a_pool_comes_back_from_its_file(pool, tmp_path):
    pool.save(tmp_path / "pool.safetensors")
    again = Pool.load(tmp_path / "pool.safetensors")
    assert again.prompts == pool.prompts and again.seeds == pool.seeds
    assert np.array_equal(again.images, pool.images) and torch.equal(again.h, pool.h)
    assert again.outputs.calls == pool.outputs.calls
    assert torch.equal(again.outputs.rows, pool.outputs.rows)
    assert torch.equal(again.outputs.latents, pool.outputs.latents)
    bare = Pool(pool.prompts, pool.seeds, pool.images, pool.h)
    bare.save(tmp_path / "bare.safetensors")
    assert Pool.load(tmp_path / "bare.safetensors").outputs is None
