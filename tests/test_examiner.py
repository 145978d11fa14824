import numpy as np
import pytest
import torch

from helpers.coordinates import raw
from helpers.dictionary import untrained
from helpers.moments import accumulate
from helpers.naming import examiner
from helpers.predictors import identity
from helpers.trajectories import record

PROMPTS = {"should": ["a red cat", "a cat", "cats"], "should_not": ["a dog", "a cat's dog"]}


def test_a_name_is_held_against_what_fires():
    strength = {"a red cat": 3.0, "a cat": 1.0, "cats": 0.0, "a dog": 0.0, "a cat's dog": 2.0}
    found = examiner.examine(PROMPTS, lambda prompts: [strength[p] for p in prompts])
    assert found.score.auc.value == pytest.approx((2 + 1 + 0.5) / 6)
    assert found.score.balanced.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.fires["should"].value == pytest.approx(2 / 3)
    assert found.fires["should_not"].value == 0.5 and found.score.n == (3, 2)
    assert found.strength["should"].tolist() == [3, 1, 0]


def test_a_feature_that_always_fires_alike_gets_one_half():
    found = examiner.examine(PROMPTS, lambda prompts: np.ones(len(prompts)))
    assert found.score.auc.value == found.score.balanced.value == 0.5


@pytest.mark.parametrize("prompts", [{}, {"should": ["a"]}, {"should": ["a"], "should_not": []}])
def test_prompts_of_both_kinds_are_needed(prompts):
    with pytest.raises(ValueError, match="prompts is"):
        examiner.examine(prompts, len)


def test_what_fire_gives_is_one_number_a_prompt():
    with pytest.raises(ValueError, match=r"shape of what fire gives is \(4,\)"):
        examiner.examine(PROMPTS, lambda prompts: np.ones(4))


TAP, STEPS = "mid_block.attentions.0.transformer_blocks.0", [0, 2]
SAMPLING = {"num_inference_steps": 3, "guidance_scale": 3.0}


def test_the_model_itself_is_listened_to_whatever_the_batch(pipe):
    prompts = ["a dog", "a cat", "two cats"]
    _, h, _ = record(pipe, prompts, [4, 5, 6], TAP, STEPS, **SAMPLING)
    coordinates = raw(identity(accumulate([h])))
    dictionary = untrained(coordinates, 32, 4).calibrate(
        coordinates.standardise(h.transpose(1, 2)).flatten(0, 1)
    )
    x = coordinates.standardise(h.transpose(1, 2))
    expected = torch.stack([dictionary.codes(x[i]).max(0).values for i in range(3)]).numpy()
    assert (expected > 0).any()
    options = {"seed": 4, "batch_size": 2} | SAMPLING
    fire = examiner.firing(pipe, dictionary, [3, 30], TAP, STEPS, **options)
    np.testing.assert_allclose(fire(prompts), expected[:, [3, 30]], atol=1e-4)
    best = int(expected.max(0).argmax())
    one = examiner.firing(pipe, dictionary, best, TAP, STEPS, **options)(prompts)
    np.testing.assert_allclose(one, expected[:, best], atol=1e-4)
    assert one.shape == (3,) and one.max() > 0


def test_a_latent_that_there_is_not_is_refused(pipe):
    h = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    dictionary = untrained(raw(identity(accumulate([h]))), 32, 4)
    with pytest.raises(ValueError, match="latent is 32"):
        examiner.firing(pipe, dictionary, 32, TAP, STEPS)
