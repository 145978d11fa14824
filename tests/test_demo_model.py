import copy

import numpy as np
import pytest
import torch

from helpers.demo import model as demo_model
from helpers.demo import world as scenes


def test_every_word_of_a_caption_is_one_token():
    tokenizer = demo_model.build_tokenizer()
    for scene in scenes.sample(50, np.random.default_rng(0)):
        text = scenes.caption(scene)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= demo_model.MAX_TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_other_words_fall_to_bytes_and_come_back():
    tokenizer = demo_model.build_tokenizer()
    ids = tokenizer("a zebra").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1] and len(ids) > 4
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a zebra"


LATENTS, CAPTIONS = (
    torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    ["a red circle"] * 8,
)


class Stopped(Exception):
    pass


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(pipe, tmp_path, monkeypatch):
    first, second, third = (copy.deepcopy(pipe) for _ in range(3))
    settings = {"steps": 252, "batch_size": 2, "seed": 3}
    losses, _ = demo_model.train_denoiser(
        first, LATENTS, CAPTIONS, checkpoint=tmp_path / "whole", **settings
    )
    add_noise, calls = second.scheduler.add_noise, []

    def stop_in_the_last_step(*args):
        calls.append(1)
        if len(calls) == 252:
            raise Stopped
        return add_noise(*args)

    monkeypatch.setattr(second.scheduler, "add_noise", stop_in_the_last_step)
    with pytest.raises(Stopped):
        demo_model.train_denoiser(
            second, LATENTS, CAPTIONS, checkpoint=tmp_path / "stopped", **settings
        )
    again, _ = demo_model.train_denoiser(
        third, LATENTS, CAPTIONS, checkpoint=tmp_path / "stopped", **settings
    )
    np.testing.assert_allclose(again, losses, rtol=1e-6)
    for module in ("unet", "text_encoder"):
        for a, b in zip(
            getattr(first, module).parameters(), getattr(third, module).parameters(), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name, value", [("batch_size", 3), ("seed", 1), ("learning_rate", 1e-4), ("steps", 3)]
)
def test_a_checkpoint_made_otherwise_is_refused_by_name(pipe, tmp_path, name, value):
    settings = {
        "steps": 2,
        "batch_size": 2,
        "seed": 0,
        "learning_rate": 1e-3,
        "checkpoint": tmp_path / "c",
    }
    demo_model.train_denoiser(copy.deepcopy(pipe), LATENTS, CAPTIONS, **settings)
    with pytest.raises(ValueError, match=f"^{name} is {value}, but c was made with"):
        demo_model.train_denoiser(
            copy.deepcopy(pipe), LATENTS, CAPTIONS, **settings | {name: value}
        )
