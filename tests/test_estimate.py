import sys

import pipelines
import pytest
import torch

from helpers.run import estimate
from helpers.run import folder as runs
from helpers.store import collect as stores

FIRST = {
    "run": "r",
    "model": "demo",
    "device": "cpu",
    "dtype": "float32",
    "revision": "",
    "hookpoint": "mid_block.attentions.0",
    "signal": "output",
    "branch": "conditional",
    "also": {},
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "height": 16,
    "width": 24,
    "pipeline_arguments": {},
    "steps": [0, 2, 3],
    "n_keep": 5,
    "n_train": 10,
    "n_validation": 2,
    "n_test": 3,
    "store_dtype": "float16",
    "tokens_per_image": 8,
    "train_images": False,
    "batch_size": 2,
    "seed": 0,
}
THIRD = {
    "n_latents": 64,
    "k": 4,
    "n_updates": 10,
    "sae_batch_size": 32,
    "accumulate": 1,
    "dead_after": 64,
    "seed": 0,
}


@pytest.fixture
def given(monkeypatch):
    monkeypatch.setattr(
        runs, "parameters_for", lambda notebook, name: FIRST if notebook == "01" else THIRD
    )


def test_sizes_are_those_that_are_then_stored(given, tmp_path):
    pipe = pipelines.stable_diffusion()
    said = estimate.estimate("any", pipe)
    split = ["train"] * 10 + ["validation"] * 2 + ["test"] * 3
    stores.collect(
        tmp_path,
        pipe,
        ["a dog"] * 15,
        range(15),
        split,
        hookpoint=FIRST["hookpoint"],
        steps=FIRST["steps"],
        batch_size=5,
        tokens_per_image=8,
        train_images=False,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=24,
    )
    stored = [stores.load_tensors(p)[0] for p in sorted(tmp_path.glob("*.safetensors"))]
    assert said["activations on disk"] == sum(t["h"].nbytes for t in stored)
    assert said["images on disk"] == sum(t["images"].nbytes for t in stored if "images" in t)
    assert (said["images"], said["dimensions"]) == (15, 3 * 32)


def test_operations_are_those_of_the_denoiser_for_every_step(given):
    pipe = pipelines.stable_diffusion()
    with estimate.FlopCounterMode(display=False) as counted, torch.no_grad():
        pipe.unet(torch.zeros(2, 4, 8, 12), 1, torch.zeros(2, 32, 16))
    assert estimate.estimate("any", pipe)["operations an image"] == 4 * counted.get_total_flops()


def test_peak_memory_counts_what_is_alive_at_once():
    with estimate.PeakMemory() as counted:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b[:10]  # a view takes nothing
        d = b * 2
    assert counted.peak == 8000 and counted.alive == 8000
    del b, c, d
    assert counted.alive == 0


def test_what_was_there_before_takes_nothing():
    weight = torch.zeros(1000)
    with estimate.PeakMemory() as counted:
        view = weight.view(10, 100).t()
        more = view + 1
    assert counted.peak == more.nbytes == 4000


def test_a_wrong_hookpoint_is_named(given, monkeypatch):
    monkeypatch.setitem(FIRST, "hookpoint", "mid_block.attention.0")
    with pytest.raises(ValueError, match="mid_block.attention.0"):
        estimate.estimate("any", pipelines.stable_diffusion())


@pytest.mark.parametrize(
    "name, value", [("n_train", -5), ("batch_size", 0), ("accumulate", 0), ("n_updates", -1)]
)
def test_sizes_that_cannot_be_are_named(given, monkeypatch, name, value):
    monkeypatch.setitem(FIRST if name in FIRST else THIRD, name, value)
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be at least 1$"):
        estimate.estimate("any", object())


@pytest.mark.parametrize("tflops", ["0", "-3", "nan", "inf"])
def test_a_rate_that_cannot_be_is_named(given, monkeypatch, tflops):
    monkeypatch.setattr(sys, "argv", ["estimate", "any", f"--tflops={tflops}"])
    with pytest.raises(
        SystemExit, match=f"^error: tflops is {float(tflops)}; it must be a number above 0$"
    ):
        estimate.main()


def test_figures_are_said_with_units():
    said = estimate.say(
        {
            "images": 15,
            "activations on disk": 41e9,
            "its checkpoint on disk": 3e6,
            "operations an image": 2.5e12,
            "collecting, hours": 3.25,
        }
    )
    assert [line.split()[-2:] for line in said.splitlines()][1:4] == [
        ["41.00", "GB"],
        ["3.00", "MB"],
        ["2.50", "TFLOP"],
    ]
