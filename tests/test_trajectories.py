import numpy as np
import pytest
import torch
from conftest import GRID, SAMPLING, TOKENS, TUPLE, built, hooks_on
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)

from helpers import trajectories
from helpers.hooks import SIGNALS, Tap
from helpers.pipelines.calls import BRANCHES
from helpers.pipelines.generate import generate
from helpers.trajectories import Recorder, record, record_all

# --- which steps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, n, n_keep, expected",
    [
        ([], 20, 5, [0, 5, 10, 14, 19]),
        ([], 4, 4, [0, 1, 2, 3]),
        ([], 10, 2, [0, 9]),
        ([7, 2], 10, 99, [2, 7]),
    ],
)
def test_kept_steps(steps, n, n_keep, expected):
    assert trajectories.kept_steps(steps, n, n_keep) == expected


@pytest.mark.parametrize("steps", [[0, 7], [-1, 2], [0, 1.5], [3], [3, 3]])
def test_steps_that_do_not_exist_or_do_not_suffice_are_named(steps):
    with pytest.raises(ValueError, match=r"steps is \[.*0 to 3"):
        trajectories.kept_steps(steps, 4, 2)


@pytest.mark.parametrize("n_keep", [0, 1, 6, 10**8, 2.5])
def test_more_or_fewer_steps_than_there_are_blame_n_keep(n_keep):
    with pytest.raises(ValueError, match=f"n_keep is {n_keep}; .*2 to num_inference_steps=5"):
        trajectories.kept_steps([], 5, n_keep)


def test_one_step_is_no_trajectory():
    with pytest.raises(ValueError, match="num_inference_steps is 1"):
        trajectories.kept_steps([], 1, 2)


# --- under a pipeline ---------------------------------------------------------------------------


def direct_activations(pipe, prompt, seed, hookpoint):
    """What the layer gives at the first step for the prompt alone, by calling the U-Net."""
    pipe.scheduler.set_timesteps(SAMPLING["num_inference_steps"])
    t = pipe.scheduler.timesteps[0]
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    latents = pipe.scheduler.scale_model_input(noise * pipe.scheduler.init_noise_sigma, t)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=32, return_tensors="pt").input_ids
    seen = []
    module = pipe.unet.get_submodule(hookpoint)
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        pipe.unet(latents, t, encoder_hidden_states=pipe.text_encoder(ids)[0])
    handle.remove()
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return out[0] if out.ndim == 3 else out[0].flatten(1).T


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_record_keeps_the_conditional_branch_with_and_without_guidance(pipe, guidance_scale):
    texts, names = ["a dog", "two cats"], [TOKENS, TUPLE, GRID]
    sampling = SAMPLING | {"guidance_scale": guidance_scale}
    _, recorded, _ = record_all(pipe, texts, [5, 6], names, [0, 2], **sampling)
    for hookpoint, h in zip(names, recorded):
        assert h.shape == (2, 2, 16, 32)
        for i, text in enumerate(texts):
            expected = direct_activations(pipe, text, 5 + i, hookpoint)
            torch.testing.assert_close(h[i, 0], expected, atol=1e-4, rtol=1e-4)
    unconditional = direct_activations(pipe, "", 5, TOKENS)
    assert not torch.allclose(recorded[0][0, 0], unconditional, atol=1e-4)


def test_recording_changes_no_image_and_says_where_it_listened(pipe):
    texts = ["a dog", "two cats"]
    images, _, where = record(pipe, texts, [0, 1], TOKENS, [0, 2], **SAMPLING)
    assert np.array_equal(images, generate(pipe, texts, [0, 1], **SAMPLING))
    alphas = pipe.scheduler.alphas_cumprod.double()
    timesteps = pipe.scheduler.timesteps[[0, 2]]
    assert where["grid"] == [4, 4]
    assert where["timesteps"] == timesteps.tolist()
    np.testing.assert_allclose(where["sigmas"], (1 / alphas[timesteps] - 1).sqrt(), rtol=1e-9)


def test_grids_of_images_that_are_not_square_are_upright(pipe):
    names = [TOKENS, TUPLE, "conv_out"]
    size = {"height": 16, "width": 32}
    _, recorded, where = record_all(pipe, ["a dog"], [0], names, [0, 1], **size, **SAMPLING)
    assert [w["grid"] for w in where] == [[4, 8], [4, 8], [8, 16]]
    assert [h.shape[2] for h in recorded] == [32, 32, 128]


@pytest.mark.parametrize(
    "scheduler_class, last",
    [
        (DDIMScheduler, [0, 1, 2]),
        (PNDMScheduler, [0, 2, 3]),
        (HeunDiscreteScheduler, [0, 2, 4]),
        (KDPM2DiscreteScheduler, [0, 2, 4]),
    ],
)
def test_of_a_step_its_last_evaluation_is_recorded(pipe, monkeypatch, scheduler_class, last):
    made = scheduler_class.from_config(pipe.scheduler.config, skip_prk_steps=True)
    monkeypatch.setattr(pipe, "scheduler", made)
    seen = []
    module = pipe.unet.get_submodule(GRID)
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    try:
        _, h, where = record(pipe, ["a dog"], [0], GRID, [0, 1, 2], **SAMPLING)
    finally:
        handle.remove()
    assert torch.equal(h[0], torch.stack([seen[i][1].flatten(1).T for i in last]))
    assert where["timesteps"] == made.timesteps[last].tolist()


def test_sigmas_are_the_schedulers_own_if_it_has_them(pipe, monkeypatch):
    for scheduler_class, last in (
        (EulerDiscreteScheduler, [0, 2]),
        (HeunDiscreteScheduler, [0, 3]),
    ):
        made = scheduler_class.from_config(pipe.scheduler.config)
        monkeypatch.setattr(pipe, "scheduler", made)
        where = record(pipe, ["a dog"], [0], TOKENS, [0, 2], **SAMPLING)[2]
        assert where["sigmas"] == made.sigmas[last].tolist()
    where = record(built("flux"), ["a dog"], [0], "transformer_blocks.0", [0, 2], **SAMPLING)[2]
    np.testing.assert_allclose(where["sigmas"], np.array(where["timesteps"]) / 1000, rtol=1e-6)


@pytest.mark.usefixtures("no_hooks_left")
def test_what_was_never_run_is_named(pipe):
    for steps in ([0, 9], [-1, 1]):
        with pytest.raises(ValueError, match=rf"steps is \[{max(steps, key=abs)}\].*0 to 2"):
            record(pipe, ["a dog"], [0], TOKENS, steps, **SAMPLING)
    with pytest.raises(ValueError, match="hookpoint is 'down_blocks'"):
        record(pipe, ["a dog"], [0], "down_blocks", [0, 1], **SAMPLING)
    with pytest.raises(ValueError, match="branch is 'both'"):
        record(pipe, ["a dog"], [0], Tap(TOKENS, branch="both"), [0, 1], **SAMPLING)


def test_some_tokens_of_each_image(pipe):
    texts, tokens = ["a dog", "two cats"], torch.tensor([[3, 0, 9], [15, 15, 1]])
    taps = [TOKENS, TOKENS]
    _, (every, some), _ = record_all(pipe, texts, [0, 1], taps, [0, 2], [None, tokens], **SAMPLING)
    assert torch.equal(some, torch.stack([every[i][:, tokens[i]] for i in range(2)]))


# --- in a loop of one's own ---------------------------------------------------------------------


class Own(torch.nn.Module):
    """A denoiser of no library: 2×2 patches as tokens, a block, and back; adds the time."""

    def __init__(self):
        super().__init__()
        self.patches, self.block = torch.nn.Conv2d(3, 8, 2, 2), torch.nn.Linear(8, 8)

    def forward(self, x, t):
        tokens = self.block(self.patches(x).flatten(2).transpose(1, 2)) + t / 1000
        return tokens.mean((1, 2))[:, None, None, None] * x

    def naive(self, x, signal):
        """Tokens of the block, by loops over the patches."""
        weight = self.patches.weight.flatten(1)
        corners = [(r, c) for r in range(0, x.shape[2], 2) for c in range(0, x.shape[3], 2)]
        patches = [x[:, :, r : r + 2, c : c + 2].flatten(1) for r, c in corners]
        entering = torch.stack(patches, 1) @ weight.T + self.patches.bias
        leaving = entering @ self.block.weight.T + self.block.bias
        return {"input": entering, "output": leaving, "update": leaving - entering}[signal]


TIMES = {
    "list": [999, 749, 499, 249, 0],
    "tensor from 1 to 0": torch.linspace(1, 0, 5),
    "list from 1 to 0": [1.0, 0.75, 0.5, 0.25, 0.0],
    "array": np.linspace(1, 0, 1001)[::250],
    "noise levels": torch.logspace(2, -2, 5),
}


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("times", TIMES)
def test_a_denoiser_in_a_loop_of_ones_own(signal, times):
    torch.manual_seed(0)
    times = TIMES[times]
    denoiser, x, expected = Own(), torch.randn(2, 3, 4, 6), []
    recorder = Recorder(denoiser, times, Tap("block", signal), [0, 3, 4])
    with torch.no_grad(), recorder:
        for t in times:
            expected.append(denoiser.naive(x, signal))
            x -= 0.2 * denoiser(x, torch.as_tensor(t))  # in place
    assert recorder.grid == (2, 3) and hooks_on(denoiser) == 0
    expected = torch.stack([expected[step] for step in (0, 3, 4)], 1)
    torch.testing.assert_close(recorder.trajectories(), expected)


def test_guidance_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    denoiser, x, times = Own(), torch.randn(2, 3, 4, 6), [3, 2, 1]
    rows = {"unconditional": x, "conditional": x + 1}
    for branch in BRANCHES:
        tap = Tap("block", branch=branch)
        with torch.no_grad(), Recorder(denoiser, times, tap, [0, 1, 2], n_images=2) as recorder:
            for t in times:
                denoiser(torch.cat([*rows.values()]), torch.tensor(t))
            expected = denoiser.naive(rows[branch], "output")[:, None].expand(-1, 3, -1, -1)
        torch.testing.assert_close(recorder.trajectories(), expected)


# --- where to listen ----------------------------------------------------------------------------


def test_shapes_of_taps(pipe):
    sampling = SAMPLING | {"height": 16, "width": 32}
    expected = {TOKENS: (4, 8, 32), "conv_in": (8, 16, 16), "conv_out": (8, 16, 4)}
    assert trajectories.shapes(pipe, list(expected), "a dog", **sampling) == expected
    taps = [Tap("conv_in", signal) for signal in SIGNALS]  # its update lies between two widths
    found = trajectories.shapes(pipe, taps, "a dog", **sampling)
    assert found == {taps[0]: (8, 16, 16), taps[1]: (8, 16, 4)}


@pytest.mark.usefixtures("no_hooks_left")
def test_layers_that_are_not_called_or_have_no_grid_of_tokens_have_no_shape(pipe):
    names = ["time_embedding", "down_blocks", "conv_in"]
    assert trajectories.shapes(pipe, names, "a dog", **SAMPLING) == {"conv_in": (8, 8, 16)}


def test_the_usual_hookpoints_come_in_the_networks_order(pipe):
    found = trajectories.hookpoints(pipe, "a dog", **SAMPLING)
    order = [
        "down_blocks.0.resnets.0",
        "down_blocks.1.attentions.0",
        TUPLE,
        "up_blocks.1.resnets.1",
    ]
    assert [name for name in found if name in order] == order
    assert found[TUPLE] == (4, 4, 32) and found["up_blocks.1.resnets.1"] == (8, 8, 16)
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    both = [*blocks, *(f"single_{block}" for block in blocks)]
    flux = trajectories.hookpoints(built("flux"), "a dog", **SAMPLING)
    assert list(flux.items()) == [(block, (4, 4, 32)) for block in both]


def test_bytes_per_image():
    assert trajectories.bytes_per_image(3, 16, 32, torch.float16) == 3 * 16 * 32 * 2
