import numpy as np
import pytest
import torch
from conftest import SAMPLING, TOKENS, TUPLE, built, hooks_on
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from helpers import steering
from helpers.pipelines.generate import generate
from helpers.pipelines.loading import denoiser_of
from helpers.pipelines.replay import Outputs, record_outputs, replay

SCHEDULERS = {
    "DDIM": None,
    "Euler ancestral": EulerAncestralDiscreteScheduler,
    "DPM multistep": DPMSolverMultistepScheduler,
    "Heun": HeunDiscreteScheduler,
    "PNDM": PNDMScheduler,
}
TEXTS, SEEDS = ["a red circle", "two cats", "a tree"], [3, 4, 5]
N = 6
SAMPLING = SAMPLING | {"num_inference_steps": N}


@pytest.fixture(params=SCHEDULERS)
def pipe(request):
    pipe = built("sd1")
    before, kind = pipe.scheduler, SCHEDULERS[request.param]
    if kind is not None:
        options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
        pipe.scheduler = kind.from_config(before.config, **options)
    yield pipe
    pipe.scheduler = before
    assert hooks_on(pipe.unet) == 0 and "forward" not in vars(pipe.unet)


def counting(pipe, make):
    """What `make()` gives, and how many calls of the denoiser reached its last layer."""
    calls, last = [], getattr(denoiser_of(pipe), "conv_out", None) or denoiser_of(pipe).proj_out
    handle = last.register_forward_hook(lambda *_: calls.append(1))
    try:
        return make(), len(calls)
    finally:
        handle.remove()


def recorded(pipe, texts=TEXTS, seeds=SEEDS, **sampling):
    with record_outputs(denoiser_of(pipe), pipe.scheduler, len(texts)) as outputs:
        images = generate(pipe, texts, seeds, **sampling or SAMPLING)
    return images, outputs


def steered(pipe, first, texts=TEXTS, seeds=SEEDS, **changes):
    delta = 3 * torch.randn(N, 32, generator=torch.Generator().manual_seed(0))
    settings = {"window": (first, N - 1)} | SAMPLING | changes
    return steering.steer(pipe, texts, seeds, TOKENS, delta, **settings)


@pytest.mark.parametrize("first", [1, 4])
def test_an_edit_is_the_same_to_the_last_bit_and_costs_its_own_steps(pipe, first):
    plain, outputs = recorded(pipe)
    whole, all_calls = counting(pipe, lambda: steered(pipe, first))

    def again():
        with replay(pipe.unet, pipe.scheduler, outputs, first, [0, 1, 2]):
            return steered(pipe, first)

    images, calls = counting(pipe, again)
    assert np.array_equal(images, whole) and not np.array_equal(images, plain)
    early = sum(step < first for step, _, _ in outputs.calls)
    assert early >= first and calls == all_calls - early
    assert len(outputs.calls) == all_calls == outputs.rows.shape[1]


def test_nothing_is_computed_where_all_is_replayed(pipe):
    plain, outputs = recorded(pipe)

    def again():
        with replay(pipe.unet, pipe.scheduler, outputs, N, [0, 1, 2]):
            return generate(pipe, TEXTS, SEEDS, **SAMPLING)

    images, calls = counting(pipe, again)
    assert np.array_equal(images, plain) and calls == 0


def test_some_images_of_several_batches_are_replayed_in_any_order():
    pipe = built("sd1")
    parts = [recorded(pipe, TEXTS[b], SEEDS[b])[1] for b in (slice(2), slice(2, 3))]
    outputs = Outputs.joined(parts)
    assert len(outputs.rows) == len(outputs.latents) == 3
    picks = [2, 0, 2]
    texts, seeds = [TEXTS[i] for i in picks], [SEEDS[i] for i in picks]
    with replay(pipe.unet, pipe.scheduler, outputs, 3, picks):
        images = steered(pipe, 3, texts, seeds)
    np.testing.assert_allclose(images, steered(pipe, 3, texts, seeds), atol=1e-5)


@pytest.mark.parametrize(
    "model, options",
    [
        ("sdxl", {}),
        ("sd3", {}),
        ("flux", {"true_cfg_scale": 3.0, "negative_prompt": "gray"}),  # two calls a step
        ("dit", {}),
        ("ddpm", {}),
        ("pixart", {"height": 64, "width": 64, "use_resolution_binning": False}),
    ],
)
def test_families_take_what_is_replayed_as_their_models_output(model, options):
    pipe, texts = built(model), ["1", "2"]
    sampling = SAMPLING | options
    plain, outputs = recorded(pipe, texts, SEEDS[:2], **sampling)
    denoiser, calls = denoiser_of(pipe), []
    inner = next(m for name, m in denoiser.named_modules() if name.endswith("blocks.0"))
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    with replay(denoiser, pipe.scheduler, outputs, 4, [0, 1]):
        images = generate(pipe, texts, SEEDS[:2], **sampling)
    handle.remove()
    late = sum(step >= 4 for step, _, _ in outputs.calls)
    assert np.array_equal(images, plain) and len(calls) == late > 0


def test_models_in_another_memory_order_are_replayed_to_the_last_bit():
    import copy

    pipe = copy.deepcopy(built("sd1"))
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    plain, outputs = recorded(pipe)
    assert outputs.channels_last
    with replay(pipe.unet, pipe.scheduler, outputs, 3, [0, 1, 2]):
        assert np.array_equal(generate(pipe, TEXTS, SEEDS, **SAMPLING), plain)


def test_any_module_in_a_loop_can_be_replayed():
    net, timesteps = torch.nn.Bilinear(4, 1, 4), torch.linspace(1, 0.1, 5)
    forward = net.forward
    net.forward = lambda x, t: forward(x, t.expand(len(x), 1))

    def sample(seen):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for t in timesteps:
                seen.append(x)
                x = x - net(x, t) / 5
        return x

    with record_outputs(net, timesteps, n_images=3) as outputs:
        x = sample([])
    own = net.forward
    with replay(net, timesteps, outputs, 3, [0, 1, 2]):
        assert torch.equal(sample([]), x)
    assert net.forward is own


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seeds": [3, 4, 6]}, "seeds is 'of other images'"),
        ({"num_inference_steps": 7}, "timestep is .*the recorded images"),
    ],
)
def test_other_images_are_refused_and_nothing_is_left_behind(changes, named):
    pipe = built("sd1")
    _, outputs = recorded(pipe)
    sampling = {"seeds": SEEDS} | SAMPLING | changes
    with pytest.raises(ValueError, match=named):
        with replay(pipe.unet, pipe.scheduler, outputs, 3, [0, 1, 2]):
            generate(pipe, TEXTS, **sampling)
    assert hooks_on(pipe.unet) == 0 and "forward" not in vars(pipe.unet)


def test_recording_changes_nothing_and_copies(pipe):
    plain = generate(pipe, TEXTS, SEEDS, **SAMPLING)
    images, outputs = recorded(pipe)
    assert np.array_equal(images, plain)
    assert outputs.rows.shape[::2] == (3, 2, 8) and outputs.rows.is_contiguous()
    tap = TUPLE  # an edit from the first step on, in a replay of nothing, is the edit alone
    delta = torch.ones(N, 32)
    with replay(pipe.unet, pipe.scheduler, outputs, 0, [0, 1, 2]):
        edited = steering.steer(pipe, TEXTS, SEEDS, tap, delta, **SAMPLING)
    assert np.array_equal(edited, steering.steer(pipe, TEXTS, SEEDS, tap, delta, **SAMPLING))
