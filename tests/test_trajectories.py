import numpy as np
import pipelines
import pytest
import torch
from conftest import GRID, SAMPLING, TOKENS, TUPLE, built, hooks_on
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from helpers import hooks, trajectories

SEEDS = [10, 11, 12, 13, 14]


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


@pytest.mark.parametrize(
    "steps, n_keep, named",
    [([0, 7], 2, "step 7"), ([-1, 2], 2, "step -1"), ([0, 1.5], 2, "step 1.5"), ([3], 2, r"\[3\]")],
)
def test_steps_that_do_not_exist_or_do_not_suffice_are_named(steps, n_keep, named):
    with pytest.raises(ValueError, match=named + ".*0 to 3"):
        trajectories.kept_steps(steps, 4, n_keep)


@pytest.mark.parametrize("n_keep", [0, 1, 6, 10**8, 2.5])
def test_more_or_fewer_steps_than_there_are_blame_n_keep(n_keep):
    with pytest.raises(
        ValueError, match=f"n_keep is {n_keep}; with num_inference_steps=5 it must lie in 2 to 5"
    ):
        trajectories.kept_steps([], 5, n_keep)


def test_one_step_is_no_trajectory():
    with pytest.raises(
        ValueError, match="num_inference_steps is 1; a trajectory needs at least two steps"
    ):
        trajectories.kept_steps([], 1, 2)


# --- generating ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", pipelines.ALL)
def test_an_image_does_not_depend_on_its_batch(model):
    texts = ["1", "2", "goldfish"] if model == "dit" else ["a dog", "two cats", ""]
    together = trajectories.generate(built(model), texts, SEEDS[:3], **SAMPLING)
    assert together.dtype == np.float32 and together.shape[::3] == (3, 3)
    assert together.min() >= 0 and together.max() <= 1
    for i in range(3):
        alone = trajectories.generate(built(model), [texts[i]], [SEEDS[i]], **SAMPLING)
        np.testing.assert_allclose(alone[0], together[i], atol=1e-4)
    assert min(np.abs(together[i] - together[i - 1]).max() for i in range(3)) > 1e-3


def test_an_image_depends_on_its_seed_and_on_its_prompt(pipe, prompts):
    images = trajectories.generate(
        pipe, [prompts[0], prompts[0], prompts[1]], [0, 1, 0], **SAMPLING
    )
    assert not np.allclose(images[0], images[1], atol=1e-3)
    assert not np.array_equal(images[0], images[2])


def test_a_wanted_size_is_height_by_width_and_zero_is_the_models_own(pipe, prompts):
    assert trajectories.generate(pipe, prompts[:1], [0], height=16, width=32, **SAMPLING).shape == (
        1,
        16,
        32,
        3,
    )
    own = trajectories.generate(pipe, prompts[:1], [0], height=0, width=0, **SAMPLING)
    assert np.array_equal(own, trajectories.generate(pipe, prompts[:1], [0], **SAMPLING))


def test_a_class_is_given_by_number_or_name():
    by_name, by_number = (
        trajectories.generate(built("dit"), [c], [0], **SAMPLING) for c in ("goldfish", "1")
    )
    assert np.array_equal(by_name, by_number)


@pytest.mark.parametrize(
    "size, named",
    [
        ({"height": 128}, "width is 0 while height is 128; give both in pixels, or 0 for both"),
        ({"height": 0, "width": 16}, "height is 0 while width is 16; give both"),
        ({"height": -16, "width": 16}, "height is -16; valid are positive multiples of 2 pixels"),
        ({"height": 16, "width": 16.5}, "width is 16.5; valid are"),
        ({"height": 16, "width": 17}, "width is 17; valid are"),
        ({"height": 16, "width": "16"}, "width is 16; valid are"),
        ({"height": 12, "width": 16}, "divisible by 8 but are 12"),  # diffusers' own
    ],
)
def test_a_size_that_cannot_be_drawn_is_named_before_anything_is_computed(
    pipe, prompts, monkeypatch, size, named
):
    monkeypatch.setattr(pipe, "encode_prompt", None)
    with pytest.raises(ValueError, match=named):
        trajectories.generate(pipe, prompts[:1], [0], **size, **SAMPLING)


def test_a_size_that_would_be_rounded_down_is_refused():
    with pytest.raises(ValueError, match="height is 18; valid are positive multiples of 4"):
        trajectories.generate(built("flux"), ["a dog"], [0], height=18, width=16, **SAMPLING)


@pytest.mark.parametrize(
    "model, option", [("sd1", "true_cfg_scale"), ("dit", "height"), ("ddpm", "negative_prompt")]
)
def test_an_argument_that_the_pipeline_does_not_take_is_named(model, option):
    with pytest.raises(
        ValueError,
        match=f"sampling: {type(built(model)).__name__} does not take {option}; valid are .*num_inference",
    ):
        trajectories.generate(built(model), ["1"], [0], **SAMPLING | {option: 16})


def test_one_negative_prompt_is_for_every_image(pipe, prompts):
    both, one = (
        trajectories.generate(pipe, prompts[:2], [0, 1], negative_prompt=n, **SAMPLING)
        for n in (["gray"] * 2, "gray")
    )
    assert np.array_equal(both, one)


@pytest.mark.parametrize("given", ["PIL", "array", "tensor"])
def test_one_image_is_for_every_prompt_and_none_depends_on_its_batch(pipe, prompts, given):
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    inpaint = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(16, 16).tril()
    if given == "PIL":
        image, mask = (
            Image.fromarray((255 * t.numpy()).astype(np.uint8))
            for t in (image.permute(1, 2, 0), mask)
        )
    if given == "array":
        image, mask = image.permute(1, 2, 0).numpy(), mask.numpy()
    options = {
        "image": image,
        "mask_image": mask,
        "height": 16,
        "width": 16,
        "strength": 0.7,
    } | SAMPLING
    together = trajectories.generate(inpaint, prompts[:2], [0, 1], **options)
    np.testing.assert_allclose(
        together[1], trajectories.generate(inpaint, prompts[1:2], [1], **options)[0], atol=1e-4
    )


@pytest.mark.parametrize(
    "scheduler_class, options",
    [
        (DDPMScheduler, {"clip_sample": False}),
        (EulerAncestralDiscreteScheduler, {}),
        (LCMScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_noise_that_schedulers_add_follows_the_seeds(
    pipe, prompts, monkeypatch, scheduler_class, options
):
    monkeypatch.setattr(
        pipe, "scheduler", scheduler_class.from_config(pipe.scheduler.config, **options)
    )
    first, again = (trajectories.generate(pipe, prompts[:1], [0], **SAMPLING) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), FlowMatchLCMScheduler()],
)
def test_a_scheduler_that_draws_from_the_global_generator_is_refused(monkeypatch, scheduler):
    pipe = built("sd3")
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    with pytest.raises(
        ValueError, match=f"{type(scheduler).__name__}, draws from torch's global generator"
    ):
        trajectories.generate(pipe, ["a dog"], [0], **SAMPLING)


@pytest.mark.parametrize("classes", [None, 10])
def test_a_consistency_model_makes_one_image_a_seed_with_classes_or_without(classes):
    unet = built("ddpm").unet
    made = type(unet).from_config(unet.config, num_class_embeds=classes).eval()
    pipe = ConsistencyModelPipeline(made, CMStochasticIterativeScheduler())
    images = trajectories.generate(pipe, ["1", "2", "1"], [3, 3, 4], num_inference_steps=2)
    assert images.shape == (3, 8, 8, 3) and not np.array_equal(images[0], images[2])
    assert np.array_equal(images[0], images[1]) == (classes is None)
    if classes:
        with pytest.raises(
            ValueError, match="class 'red': ConsistencyModelPipeline knows no names"
        ):
            trajectories.generate(pipe, ["red"], [3], num_inference_steps=2)


def test_a_pipeline_that_hands_out_no_images_is_named():
    class Film:
        components, scheduler = {}, None

        def set_progress_bar_config(self, **_):
            pass

        def __call__(self, prompt, generator, output_type):
            return {"frames": prompt}

    with pytest.raises(ValueError, match="model Film makes no images but frames"):
        trajectories.generate(Film(), ["a dog"], [0])


def test_images_are_float32_or_the_dtype_is_named():
    half = pipelines.stable_diffusion().to(torch.bfloat16)
    assert trajectories.generate(half, ["a dog"], [0], **SAMPLING).dtype == np.float32
    with pytest.raises(ValueError, match="dtype 'bfloat16': DDPMPipeline cannot"):
        trajectories.generate(pipelines.ddpm().to(torch.bfloat16), ["a dog"], [0], **SAMPLING)


# --- recording ----------------------------------------------------------------------------------


def direct_activations(pipe, prompt, seed, hookpoint):
    """What the layer gives at the first step for the prompt alone, by calling the U-Net."""
    pipe.scheduler.set_timesteps(SAMPLING["num_inference_steps"])
    t = pipe.scheduler.timesteps[0]
    latents = (
        torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
        * pipe.scheduler.init_noise_sigma
    )
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=32, return_tensors="pt").input_ids
    kept = []
    handle = pipe.unet.get_submodule(hookpoint).register_forward_hook(
        lambda m, a, out: kept.append(out)
    )
    with torch.no_grad():
        pipe.unet(
            pipe.scheduler.scale_model_input(latents, t),
            t,
            encoder_hidden_states=pipe.text_encoder(ids)[0],
        )
    handle.remove()
    out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return out[0] if out.ndim == 3 else out[0].flatten(1).T


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("hookpoint", [TOKENS, TUPLE, GRID])
def test_record_keeps_the_conditional_branch_with_and_without_guidance(
    pipe, prompts, hookpoint, guidance_scale
):
    sampling = SAMPLING | {"guidance_scale": guidance_scale}
    _, h, _ = trajectories.record(
        pipe, prompts[:2], [5, 6], hookpoint=hookpoint, steps=[0, 2], **sampling
    )
    assert h.shape == (2, 2, 16, 32)
    for i in range(2):
        torch.testing.assert_close(
            h[i, 0], direct_activations(pipe, prompts[i], 5 + i, hookpoint), atol=1e-4, rtol=1e-4
        )
    unconditional = direct_activations(pipe, "", 5, hookpoint)
    assert hookpoint == GRID or not torch.allclose(h[0, 0], unconditional, atol=1e-4)


def test_recording_changes_no_image_and_says_where_it_listened(pipe, prompts):
    images, _, where = trajectories.record(
        pipe, prompts[:2], [0, 1], hookpoint=TOKENS, steps=[0, 2], **SAMPLING
    )
    assert np.array_equal(images, trajectories.generate(pipe, prompts[:2], [0, 1], **SAMPLING))
    alphas = pipe.scheduler.alphas_cumprod.double()
    timesteps = pipe.scheduler.timesteps[[0, 2]]
    assert where["grid"] == [4, 4]
    assert where["timesteps"] == timesteps.tolist()
    np.testing.assert_allclose(where["sigmas"], (1 / alphas[timesteps] - 1).sqrt(), rtol=1e-9)


@pytest.mark.parametrize(
    "hookpoint, grid", [(TOKENS, [4, 8]), (TUPLE, [4, 8]), ("conv_out", [8, 16])]
)
def test_grids_of_images_that_are_not_square_are_upright(pipe, prompts, hookpoint, grid):
    _, h, where = trajectories.record(
        pipe, prompts[:1], [0], hookpoint=hookpoint, steps=[0, 1], height=16, width=32, **SAMPLING
    )
    assert where["grid"] == grid and h.shape[2] == grid[0] * grid[1]


def test_solvers_with_two_calls_a_step_are_recorded_once_a_step(pipe, prompts, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    _, h, where = trajectories.record(
        pipe, prompts[:1], [0], hookpoint=TOKENS, steps=[0, 1, 2], **SAMPLING
    )
    assert h.shape == (1, 3, 16, 32) and where["timesteps"] == [999.0, 499.5, 0.0]
    assert where["sigmas"] == pipe.scheduler.sigmas[[0, 1, 3]].tolist()


def test_sigmas_are_the_schedulers_own_if_it_has_them(pipe, prompts, monkeypatch):
    monkeypatch.setattr(
        pipe, "scheduler", EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    )
    where = trajectories.record(pipe, prompts[:1], [0], hookpoint=TOKENS, steps=[0, 2], **SAMPLING)[
        2
    ]
    assert where["sigmas"] == pipe.scheduler.sigmas[[0, 2]].tolist()
    flow = built("flux")
    where = trajectories.record(
        flow, prompts[:1], [0], hookpoint="transformer_blocks.0", steps=[0, 2], **SAMPLING
    )[2]
    np.testing.assert_allclose(where["sigmas"], np.array(where["timesteps"]) / 1000, rtol=1e-6)


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("steps", [[0, 9], [-1, 1]])
def test_steps_that_were_never_run_are_named(pipe, prompts, steps):
    with pytest.raises(ValueError, match=rf"steps \[{max(steps, key=abs)}\].*0 to 2"):
        trajectories.record(pipe, prompts[:1], [0], hookpoint=TOKENS, steps=steps, **SAMPLING)


def test_a_hookpoint_that_is_never_called_is_named(pipe, prompts):
    with pytest.raises(ValueError, match="hookpoint 'down_blocks' was never called"):
        trajectories.record(
            pipe, prompts[:1], [0], hookpoint="down_blocks", steps=[0, 1], **SAMPLING
        )


class Own(torch.nn.Module):
    """A denoiser of no library: 2×2 patches as tokens, a block, and back; adds the time."""

    def __init__(self):
        super().__init__()
        self.patches, self.block = torch.nn.Conv2d(3, 8, 2, 2), torch.nn.Linear(8, 8)

    def forward(self, x, t):
        tokens = self.block(self.patches(x).flatten(2).transpose(1, 2)) + t / 1000
        return tokens.mean((1, 2))[:, None, None, None] * x

    def naive(self, x, t, signal):
        """Tokens of the block, by loops over the patches."""
        weight = self.patches.weight.flatten(1)
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        patches = [
            x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1)
            for r in range(rows)
            for c in range(columns)
        ]
        entering = torch.stack(patches, 1) @ weight.T + self.patches.bias
        leaving = entering @ self.block.weight.T + self.block.bias
        return {"input": entering, "output": leaving, "update": leaving - entering}[signal]


@pytest.mark.parametrize("signal", hooks.SIGNALS)
@pytest.mark.parametrize(
    "timesteps",
    [
        [999, 749, 499, 249, 0],
        torch.linspace(1, 0, 5),
        [1.0, 0.75, 0.5, 0.25, 0.0],
        np.linspace(1, 0, 1001)[::250],
        torch.logspace(2, -2, 5),
    ],
    ids=["list", "tensor from 1 to 0", "list from 1 to 0", "array", "noise levels"],
)
def test_a_denoiser_in_a_loop_of_ones_own(signal, timesteps):
    torch.manual_seed(0)
    denoiser, x, expected = Own(), torch.randn(2, 3, 4, 6), []
    with (
        torch.no_grad(),
        trajectories.Recorder(denoiser, timesteps, "block", [0, 3, 4], signal=signal) as recorder,
    ):
        for t in timesteps:
            expected.append(denoiser.naive(x, t, signal))
            x -= 0.2 * denoiser(x, torch.as_tensor(t))  # in place
    assert recorder.grid == (2, 3) and hooks_on(denoiser) == 0
    torch.testing.assert_close(
        recorder.trajectories(), torch.stack([expected[s] for s in (0, 3, 4)], 1)
    )


@pytest.mark.parametrize("n", [1001, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_step_of_a_fine_loop_from_one_to_zero_is_told_apart(n, dtype):
    denoiser, x, timesteps = (
        Own(),
        torch.zeros(1, 3, 4, 4),
        torch.linspace(1, 0, n, dtype=torch.float64).to(dtype),
    )
    with (
        trajectories.Recorder(denoiser, timesteps, "patches", range(n)) as recorder,
        torch.no_grad(),
    ):
        for i, t in enumerate(timesteps):
            denoiser(x + i, t.float())
    h = recorder.trajectories()
    with torch.no_grad():
        expected = torch.stack(
            [denoiser.patches(x + i).flatten(2).transpose(1, 2)[0] for i in range(n)]
        )
    torch.testing.assert_close(h[0], expected)


def test_a_loop_that_hands_over_reversed_times_is_refused_and_a_second_run_is_not():
    denoiser, x, timesteps = Own(), torch.zeros(1, 3, 4, 4), torch.linspace(0.9, 0.1, 5)
    for start in (0, 2):
        with (
            trajectories.Recorder(denoiser, timesteps, "block", [2, 4]) as recorder,
            torch.no_grad(),
        ):
            for i, t in enumerate([*timesteps[start:], *timesteps[start:]]):
                denoiser(x + i, t)
        assert recorder.trajectories().shape == (1, 2, 4, 8)
    with trajectories.Recorder(denoiser, timesteps, "block", [2, 4]), torch.no_grad():
        denoiser(x, 1 - timesteps[0])
        with pytest.raises(ValueError, match="given timestep 0.3, step 3, after step 4; valid are"):
            denoiser(x, 1 - timesteps[1])


def test_guidance_in_a_loop_of_ones_own_by_rows_or_by_calls():
    torch.manual_seed(0)
    denoiser, x, timesteps = Own(), torch.randn(2, 3, 4, 4), [3, 2, 1]
    found = {}
    for branch in hooks.BRANCHES:
        with (
            torch.no_grad(),
            trajectories.Recorder(
                denoiser, timesteps, "block", [0, 1, 2], n_images=2, branch=branch
            ) as recorder,
        ):
            for t in timesteps:
                denoiser(torch.cat([x, x + 1]), torch.tensor(t))
        found[branch] = recorder.trajectories()
    with torch.no_grad():
        for branch, rows in (("unconditional", x), ("conditional", x + 1)):
            torch.testing.assert_close(
                found[branch], denoiser.naive(rows, 0, "output")[:, None].expand(-1, 3, -1, -1)
            )


def test_some_tokens_of_each_image(pipe, prompts):
    tokens = torch.tensor([[3, 0, 9], [15, 15, 1]])
    with trajectories.Recorder(
        pipe.unet, pipe.scheduler, TOKENS, [0, 2], n_images=2, tokens=tokens
    ) as some:
        _, h, _ = trajectories.record(
            pipe, prompts[:2], [0, 1], hookpoint=TOKENS, steps=[0, 2], **SAMPLING
        )
    assert torch.equal(some.trajectories(), torch.stack([h[i][:, tokens[i]] for i in range(2)]))


def test_shapes_of_hookpoints(pipe, prompts):
    sampling = SAMPLING | {"height": 16, "width": 32}
    expected = {TOKENS: (4, 8, 32), "conv_in": (8, 16, 16), "conv_out": (8, 16, 4)}
    assert trajectories.shapes(pipe, list(expected), prompts[0], **sampling) == expected
    taps = [
        trajectories.Tap("conv_in", "input"),
        trajectories.Tap("conv_in", "output"),
        trajectories.Tap("conv_in", "update"),
    ]
    assert trajectories.shapes(pipe, taps, prompts[0], **sampling) == {
        taps[0]: (8, 16, 4),
        taps[1]: (8, 16, 16),
    }


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("name", ["time_embedding", TOKENS + ".attn2.to_k", "down_blocks"])
def test_layers_without_a_grid_of_tokens_have_no_shape(pipe, prompts, name):
    assert trajectories.shapes(pipe, [name, "conv_in"], prompts[0], **SAMPLING) == {
        "conv_in": (8, 8, 16)
    }


def test_the_usual_hookpoints_come_in_the_networks_order(pipe, prompts):
    found = trajectories.hookpoints(pipe, prompts[0], **SAMPLING)
    order = [
        "down_blocks.0.resnets.0",
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.resnets.1",
    ]
    assert [n for n in found if n in order] == order
    assert found["mid_block.attentions.0"] == (4, 4, 32) and found["up_blocks.1.resnets.1"] == (
        8,
        8,
        16,
    )
    blocks = [
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    ]
    assert list(trajectories.hookpoints(built("flux"), "a dog", **SAMPLING).items()) == [
        (b, (4, 4, 32)) for b in blocks
    ]
