import warnings

import numpy as np
import pipelines
import pytest
import torch
from conftest import SAMPLING, built
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from helpers.pipelines.generate import (
    arguments_of,
    generate,
    generate_all,
    switch_prompts,
    warn_of_long,
)

SEEDS = [10, 11, 12]


@pytest.mark.parametrize("model", pipelines.ALL)
def test_an_image_does_not_depend_on_its_batch(model):
    texts = ["1", "2", "goldfish"] if model == "dit" else ["a dog", "two cats", ""]
    together = generate(built(model), texts, SEEDS, **SAMPLING)
    assert together.dtype == np.float32 and together.shape[::3] == (3, 3)
    assert together.min() >= 0 and together.max() <= 1
    for i in range(3):
        alone = generate(built(model), [texts[i]], [SEEDS[i]], **SAMPLING)
        np.testing.assert_allclose(alone[0], together[i], atol=1e-4)
    assert min(np.abs(together[i] - together[i - 1]).max() for i in range(3)) > 1e-3


def test_an_image_depends_on_its_seed_and_on_its_prompt(pipe):
    images = generate(pipe, ["a dog", "a dog", "two cats"], [0, 1, 0], **SAMPLING)
    assert not np.allclose(images[0], images[1], atol=1e-3)
    assert not np.array_equal(images[0], images[2])


def test_batches_are_joined_in_order(pipe, prompts):
    joined = generate_all(pipe, prompts, range(5), 2, **SAMPLING)
    parts = [(prompts[:2], [0, 1]), (prompts[2:4], [2, 3]), (prompts[4:], [4])]
    assert np.array_equal(joined, np.concatenate([generate(pipe, *p, **SAMPLING) for p in parts]))


@pytest.mark.parametrize("model", ["sd1", "sdxl", "sd3"])
def test_switched_prompts_are_those_of_the_steps_before_and_after(model):
    """Against a denoiser that is handed, from a step on, the inputs of a run with the others."""
    pipe, before, after = built(model), ["a dog"] * 2, ["two cats", "a red house"]
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    sampling = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}
    texts, given, step = ("encoder_hidden_states", "added_cond_kwargs", "pooled_projections"), [], 0

    def note(_, args, kwargs):
        given.append({k: kwargs[k] for k in texts if k in kwargs})

    def swap(_, args, kwargs):
        nonlocal step
        step += 1
        return args, kwargs | (given[0] if step > 2 else {})

    ends = []
    for prompts, hook in ((after, note), (before, swap)):
        handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
        ends.append(generate(pipe, prompts, [3, 4], **sampling))
        handle.remove()
    switched = {s: switch_prompts(pipe, before, after, [3, 4], s, **sampling) for s in (0, 2, 4)}
    assert np.array_equal(switched[0], ends[0])
    assert np.array_equal(switched[2], ends[1])
    assert np.array_equal(switched[4], generate(pipe, before, [3, 4], **sampling))
    assert min(abs(switched[2] - switched[s]).max() for s in (0, 4)) > 1e-3


@pytest.mark.parametrize("model", ["flux", "pixart", "dit", "ddpm"])
def test_prompts_that_cannot_be_switched_on_the_way_are_refused(model):
    with pytest.raises(ValueError, match="model is .*callback_on_step_end"):
        switch_prompts(built(model), ["1"], ["2"], [0], 1, **SAMPLING)


# --- what is asked of a pipeline ----------------------------------------------------------------


def test_a_wanted_size_is_height_by_width_and_zero_is_the_models_own(pipe):
    tall = generate(pipe, ["a dog"], [0], height=32, width=16, **SAMPLING)
    assert tall.shape == (1, 32, 16, 3)
    own = arguments_of(pipe, ["a dog"], {"height": 0, "width": 0, "guidance_scale": 2.0})
    assert own == {"prompt": ["a dog"], "guidance_scale": 2.0}


@pytest.mark.parametrize(
    "size, named",
    [
        ({"height": 128}, "width is 0"),
        ({"height": 0, "width": 16}, "height is 0"),
        ({"height": -16, "width": 16}, "height is -16"),
        ({"height": 16, "width": 16.5}, "width is 16.5"),
        ({"height": 16, "width": 17}, "width is 17"),
        ({"height": 16, "width": "16"}, "width is '16'"),
        ({"height": 12, "width": 16}, "divisible by 8 but are 12"),  # diffusers' own
    ],
)
def test_a_size_that_cannot_be_drawn_is_named_before_anything_is_computed(
    pipe, monkeypatch, size, named
):
    monkeypatch.setattr(pipe, "encode_prompt", None)
    with pytest.raises(ValueError, match=named):
        generate(pipe, ["a dog"], [0], **size, **SAMPLING)


def test_a_size_that_would_be_rounded_down_is_refused():
    with pytest.raises(ValueError, match="height is 18; .*multiple of 4"):
        generate(built("flux"), ["a dog"], [0], height=18, width=16, **SAMPLING)


@pytest.mark.parametrize(
    "model, option", [("sd1", "true_cfg_scale"), ("dit", "height"), ("ddpm", "negative_prompt")]
)
def test_an_argument_that_the_pipeline_does_not_take_is_named(model, option):
    with pytest.raises(ValueError, match=f"sampling is '{option}'; .*num_inference_steps"):
        generate(built(model), ["1"], [0], **SAMPLING | {option: 16})


def test_classes_are_given_by_number_or_name():
    asked = arguments_of(built("dit"), ["goldfish", "1", "Carassius"], {})
    assert asked == {"class_labels": [1, 1, 1]}


def test_an_unconditional_pipeline_is_asked_for_a_number_of_images():
    asked = arguments_of(built("ddpm"), ["a", "b"], SAMPLING)
    assert asked == {"batch_size": 2, "num_inference_steps": 3}


def test_one_negative_prompt_is_for_every_image(pipe):
    one, two = (arguments_of(pipe, ["a", "b"], {"negative_prompt": n}) for n in ("c", ["c", "c"]))
    assert one == two and one["negative_prompt"] == ["c", "c"]


@pytest.mark.parametrize("given", ["PIL", "array", "tensor"])
def test_one_image_is_for_every_prompt_and_none_depends_on_its_batch(pipe, given):
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    inpaint = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(16, 16).tril()
    if given != "tensor":
        image, mask = image.permute(1, 2, 0).numpy(), mask.numpy()
    if given == "PIL":
        image, mask = (Image.fromarray((255 * t).astype(np.uint8)) for t in (image, mask))
    options = {"image": image, "mask_image": mask, "height": 16, "width": 16, "strength": 0.7}
    together = generate(inpaint, ["a dog", "two cats"], [0, 1], **options | SAMPLING)
    alone = generate(inpaint, ["two cats"], [1], **options | SAMPLING)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-4)


# --- noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler_class, options",
    [
        (DDPMScheduler, {"clip_sample": False}),
        (EulerAncestralDiscreteScheduler, {}),
        (LCMScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_noise_that_schedulers_add_follows_the_seeds(pipe, monkeypatch, scheduler_class, options):
    made = scheduler_class.from_config(pipe.scheduler.config, **options)
    monkeypatch.setattr(pipe, "scheduler", made)
    first, again = (generate(pipe, ["a dog"], [0], **SAMPLING) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), FlowMatchLCMScheduler()],
)
def test_a_scheduler_that_draws_from_the_global_generator_is_refused(monkeypatch, scheduler):
    pipe = built("sd3")
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    with pytest.raises(ValueError, match=f"scheduler is '{type(scheduler).__name__}'"):
        generate(pipe, ["a dog"], [0], **SAMPLING)


@pytest.mark.parametrize(
    "model, scheduler", [("sd1", FlowMatchEulerDiscreteScheduler), ("flux", EulerDiscreteScheduler)]
)
def test_a_scheduler_that_the_pipeline_cannot_run_is_named(monkeypatch, model, scheduler):
    monkeypatch.setattr(built(model), "scheduler", scheduler())
    with pytest.raises(ValueError, match=f"^scheduler is '{scheduler.__name__}'; .*Pipeline can"):
        generate(built(model), ["a dog"], [0], **SAMPLING)


# --- prompts that are too long


@pytest.mark.parametrize("model, most", [("sd1", 32), ("sd3", 256), ("pixart", 20)])
def test_prompts_that_lose_their_end_are_counted_in_one_line(model, most, capfd):
    pipe, fits = built(model), "a" * (most - 3)
    prompts = [fits, *("b" * most + str(i) for i in range(5))]
    options = {"max_sequence_length": 20} if model == "pixart" else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_long(pipe, prompts[:1], options)
        warn_of_long(pipe, prompts, options)
    (line,) = [str(w.message) for w in said]
    assert (
        line.startswith(f"5 of 6 prompts are cut after {most} tokens") and "number 1 ('bbb" in line
    )
    assert "3 ('bbb" in line and "4 ('bbb" not in line and "\n" not in line
    generate(pipe, prompts[1:2], [0], **SAMPLING | options)
    assert "truncated" not in capfd.readouterr().err


# --- pipelines of other kinds -------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 10])
def test_a_consistency_model_makes_one_image_a_seed_with_classes_or_without(classes):
    unet = built("ddpm").unet
    made = type(unet).from_config(unet.config, num_class_embeds=classes).eval()
    pipe = ConsistencyModelPipeline(made, CMStochasticIterativeScheduler())
    images = generate(pipe, ["1", "2", "1"], [3, 3, 4], num_inference_steps=2)
    assert images.shape == (3, 8, 8, 3) and not np.array_equal(images[0], images[2])
    assert np.array_equal(images[0], images[1]) == (classes is None)
    if classes:
        with pytest.raises(ValueError, match="class is 'red'"):
            generate(pipe, ["red"], [3], num_inference_steps=2)


def test_a_pipeline_that_hands_out_no_images_is_named():
    class Film:
        components, scheduler = {}, None

        def set_progress_bar_config(self, **_):
            pass

        def __call__(self, prompt, generator, output_type):
            return {"frames": prompt}

    with pytest.raises(ValueError, match="model is 'Film'; .*frames"):
        generate(Film(), ["a dog"], [0])


def test_images_are_float32_or_the_dtype_is_named():
    half = pipelines.stable_diffusion().to(torch.bfloat16)
    assert generate(half, ["a dog"], [0], **SAMPLING).dtype == np.float32
    with pytest.raises(ValueError, match="dtype is 'bfloat16'; .*DDPMPipeline"):
        generate(pipelines.ddpm().to(torch.bfloat16), ["a dog"], [0], **SAMPLING)
