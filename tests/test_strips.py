from types import SimpleNamespace

import numpy as np
import torch
from conftest import SAMPLING, TOKENS, some_predictors

from helpers.coordinates import residual
from helpers.dictionary import untrained
from helpers.explorer import strips
from helpers.pipelines.generate import generate
from helpers.trajectories import Tap


def found(folder):
    """What `strips.make` asks of records, of the tiny pipeline in conftest."""
    store = SimpleNamespace(
        **{"steps": [0, 2], "sampling": SAMPLING, "tap": Tap.of(TOKENS)},
        **{"prompts": ["a tree", "two cats"], "seeds": [3, 4]},
        indices=lambda split: np.array([1]),
    )
    array = {"images": np.array([[0, -1], [-1, -1]])}.get
    return SimpleNamespace(folder=folder, store=store, split="test", array=array)


def test_a_strip_is_the_examples_image_at_each_strength(pipe, tmp_path, no_hooks_left, monkeypatch):
    dictionary = untrained(residual(some_predictors(2, 32)), 2, 1.0)
    strip = strips.make(found(tmp_path), dictionary, pipe, 0, strengths=(4.0, 0.0))
    assert strip.strengths.tolist() == [0, 4] and strip.prompt == "two cats"
    plain = generate(pipe, ["two cats"], [4], **SAMPLING)[0]
    np.testing.assert_allclose(strip.images[0], plain, atol=0.01)
    assert abs(strip.images[1] - plain).max() > 0.02
    monkeypatch.setattr(strips.steering, "steer", lambda *_, **__: torch.zeros(0))
    again = strips.make(found(tmp_path), dictionary, pipe, 0, strengths=(0.0, 4.0))
    assert np.array_equal(again.images, strip.images)
