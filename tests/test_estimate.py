import math
import sys

import pytest
import torch
from conftest import GRID, TUPLE

from helpers.files import load_tensors
from helpers.run import estimate, jobs
from helpers.run.parameters import NOTEBOOKS, parameters_of
from helpers.store.collect import collect

FIRST = {
    **{"device": "cpu", "dtype": "float32", "hookpoint": TUPLE, "num_inference_steps": 4},
    **{"height": 16, "width": 24, "steps": [0, 2, 3], "n_train": 10, "n_validation": 2},
    **{"n_test": 3, "tokens_per_image": 8, "train_images": False, "batch_size": 2},
    "prompts": "none",
}
THIRD = {"n_latents": 64, "n_updates": 10, "sae_batch_size": 32}


@pytest.fixture
def given(monkeypatch):
    """What a parameter file is to hold, by notebook; a test may add to it."""
    given = {"01": dict(FIRST), "03": dict(THIRD)}

    def parameters_for(notebook, _):
        (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
        return {name: default for name, (default, _) in parameters_of(path).items()} | given[
            notebook
        ]

    monkeypatch.setattr(estimate, "parameters_for", parameters_for)
    return given


def stored(folder):
    return [load_tensors(p)[0] for p in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize("further", [[], [GRID, "down_blocks.0.resnets.0"]])
def test_sizes_are_those_that_are_then_stored(given, pipe, tmp_path, further):
    """Also where a further tap has another grid: 4×6 tokens of 32 channels, and 8×12 of 16."""
    given["01"] |= {"run": str(tmp_path / "r")}
    given["01"]["also"] = {str(tmp_path / str(i)): name for i, name in enumerate(further)}
    needs = estimate.estimate("any", pipe)
    plan = jobs.plan_of(estimate.parameters_for("01", "any"))
    collect(plan, pipe)
    every = [t for folder in plan.taps for t in stored(folder)]
    assert needs["activations on disk, B"] == sum(t["h"].nbytes for t in every)
    pictures = sum(t["images"].nbytes for t in every if "images" in t)
    assert needs["images on disk, B"] == pictures > 0
    assert (needs["images"], needs["numbers a trajectory"]) == (15, 3 * 32)
    assert needs["SAE on disk, B"] == (2 * 96 + 1) * 64 * 4
    assert needs["moments on disk, B"] == 2 * 2 * 3 * 32 * 32 * 8
    assert needs["notebook 05 memory, B"] == 2 * 5 * 4 * 6 * 96 * 4


def test_operations_are_those_of_the_denoiser_for_every_step(given, pipe):
    with estimate.FlopCounterMode(display=False) as counted, torch.no_grad():
        pipe.unet(torch.zeros(2, 4, 8, 12), 1, torch.zeros(2, 32, 16))
    needs = estimate.estimate("any", pipe, tflops=2.0)
    assert needs["collecting an image, FLOP"] == 4 * counted.get_total_flops()
    hours = 15 * needs["collecting an image, FLOP"] / 2e12 / 3600
    assert math.isclose(needs["collecting hours"], hours)
    # by hand: 10 updates of 32 trajectories, 96 × 64 products, 2 operations each, encoder and twice
    assert math.isclose(needs["training hours"], 10 * 32 * 96 * 64 * 2 * 2 / 2e12 / 3600)


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


def test_a_wrong_hookpoint_is_named_with_the_usual_ones(given, pipe):
    given["01"]["also"] = {"other": "down_blocks"}
    with pytest.raises(ValueError, match=r"hookpoint is 'down_blocks'.*such as down_blocks\.\d"):
        estimate.estimate("any", pipe)


@pytest.mark.parametrize("tflops", ["0", "-3", "nan", "inf"])
def test_a_rate_that_cannot_be_is_named(given, monkeypatch, tflops):
    monkeypatch.setattr(sys, "argv", ["estimate", "any", f"--tflops={tflops}"])
    with pytest.raises(SystemExit, match=f"^error: tflops is {float(tflops)}"):
        estimate.main()


def test_figures_are_said_with_units():
    needs = {"images": 1500, "activations on disk, B": 41e9, "collecting an image, FLOP": 2.5e12}
    needs |= {"collecting hours": 3.25, "collecting GPU memory, B": 8e9, "SAE on disk, B": 3e6}
    lines = estimate.in_words(needs).splitlines()
    assert len(lines) == len(needs)
    said = {line[:33].strip(): line[33:].strip() for line in lines}
    assert said["images"] == "1,500"
    assert said["activations on disk"] == "41.00 GB"
    assert said["collecting an image"] == "2.50 TFLOP"
    assert said["collecting hours"] == "3.25"
    assert said["collecting GPU memory"] == "8.00 GB"
    assert said["SAE on disk"] == "3.00 MB"
