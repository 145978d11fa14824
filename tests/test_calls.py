import pytest
import torch
from conftest import SAMPLING
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LuminaNextDiT2DModel,
    PNDMScheduler,
)

from helpers.pipelines.calls import CallReader, numbered
from helpers.pipelines.generate import generate

LATENTS = torch.arange(32.0).reshape(2, 1, 4, 4)
BOTH = ("unconditional", "conditional")


class Denoiser(torch.nn.Module):
    def forward(self, sample, timestep):
        return sample


class DiTTransformer2DModel(Denoiser):  # the name alone says which branch comes first
    pass


def read(inputs, scheduler, n_images=None, denoiser=None):
    """What is read of calls with these (latents, timestep), one after the other."""
    reader = CallReader(denoiser or Denoiser(), scheduler, n_images)
    readings = []
    for latents, timestep in inputs:
        reader.note(None, (latents, timestep), {})
        readings.append(reader.now)
    return readings


@pytest.fixture
def scheduler():
    made = DDIMScheduler()
    made.set_timesteps(5)
    return made


# --- steps --------------------------------------------------------------------------------------


def test_the_step_is_read_from_the_timestep_not_counted(scheduler):
    t = scheduler.timesteps
    found = read([(LATENTS + i, t[s]) for i, s in enumerate((3, 0, 0, 4))], scheduler)
    assert [(r.step, r.timestep, r.repeated) for r in found] == [
        (3, t[3], False),
        (0, t[0], False),
        (0, t[0], True),
        (4, t[4], False),
    ]


@pytest.mark.parametrize(
    "scheduler_class, options, steps, repeated",
    [
        (DDIMScheduler, {}, [0, 1, 2, 3], []),
        (EulerDiscreteScheduler, {}, [0, 1, 2, 3], []),
        (DPMSolverMultistepScheduler, {}, [0, 1, 2, 3], []),
        (PNDMScheduler, {"skip_prk_steps": True}, [0, 1, 1, 2, 3], [2]),
        (HeunDiscreteScheduler, {}, [0, 1, 1, 2, 2, 3, 3], [2, 4, 6]),
        (KDPM2DiscreteScheduler, {}, [0, 1, 1, 2, 2, 3, 3], [2, 4, 6]),
    ],
)
def test_steps_under_schedulers_that_call_once_or_twice(
    pipe, monkeypatch, scheduler_class, options, steps, repeated
):
    made = scheduler_class.from_config(pipe.scheduler.config, **options)
    monkeypatch.setattr(pipe, "scheduler", made)
    reader, found = CallReader(pipe.unet, made, 1), []

    def hook(*call):
        reader.note(*call)
        found.append(reader.now)

    handle = pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        generate(pipe, ["a dog"], [0], **SAMPLING | {"num_inference_steps": 4})
    finally:
        handle.remove()
    timesteps = made.timesteps.tolist()
    assert [r.step for r in found] == steps
    assert [i for i, r in enumerate(found) if r.repeated] == repeated
    assert [r.timestep for r in found] == timesteps == sorted(timesteps, reverse=True)
    assert {r.branches for r in found} == {BOTH}
    assert [listed.tolist() for listed in numbered(made)] == [timesteps, steps]


def test_steps_whose_rounded_timesteps_are_equal_are_told_apart():
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    karras = DPMSolverMultistepScheduler(**betas, use_karras_sigmas=True)
    karras.set_timesteps(50)
    assert karras.timesteps[-3:].tolist() == [1, 1, 0] == numbered(karras)[0][-3:].tolist()
    assert numbered(karras)[1].tolist() == [*range(50)]
    reader = CallReader(Denoiser(), karras, None)
    for step, t in enumerate(karras.timesteps):
        reader.note(None, (LATENTS, t.clone()), {})
        assert (reader.now.step, reader.now.repeated) == (step, False)
        karras.step(LATENTS, t, LATENTS)


@pytest.mark.parametrize("divisor", [1000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_steps_when_the_timestep_is_rounded_and_a_thousandth(kind, dtype, divisor):
    scheduler = kind(shift=3.0)
    scheduler.set_timesteps(100)
    listed = scheduler.timesteps.tolist()
    distinct = sorted(set(listed), reverse=True)
    reader, latents = CallReader(Denoiser(), scheduler, None), torch.ones(1, 1, 2, 2, dtype=dtype)
    for t in scheduler.timesteps:
        reader.note(None, (latents, t.expand(1).to(dtype) / divisor), {})
        assert reader.now.step == distinct.index(t)
        latents = scheduler.step(latents, t, latents, return_dict=False)[0]


@pytest.mark.parametrize("divisor, last", [(1000, 1.0), (1, 1.0), (1000, 0.1)])
def test_a_last_timestep_of_one_is_not_a_first_of_a_thousand_divided(divisor, last):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5, last / 1000])
    reader = CallReader(Denoiser(), scheduler, None)
    for step, t in enumerate(scheduler.timesteps):
        reader.note(None, (LATENTS, t.repeat(1) / divisor), {})
        assert reader.now.step == step
        scheduler.step(LATENTS, t, LATENTS)


@pytest.mark.parametrize("n", [1001, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_step_of_a_fine_loop_from_one_to_zero_is_told_apart(n, dtype):
    times = torch.linspace(1, 0, n, dtype=torch.float64).to(dtype)
    found = read([(LATENTS, t.float()) for t in times], times)
    assert [r.step for r in found] == list(range(n))


@pytest.mark.parametrize("place, step", [(1, 2), (5, 0)])
def test_a_number_beside_the_schedulers_list_is_no_entry_of_it(place, step):
    memory = torch.tensor([900.0, 100.0, 500.0, 300.0, 100.0, 910.0])
    [found] = read([(LATENTS, memory[place])], memory[0:5:2])  # 900, 500, 100, in the same storage
    assert found.step == step


def test_a_loop_may_run_again_from_its_start_but_not_backwards():
    times = torch.linspace(0.9, 0.1, 5)
    for start in (0, 2):
        again = [*times[start:], *times[start:]]
        assert [r.step for r in read([(LATENTS, t) for t in again], times)] == [
            *range(start, 5)
        ] * 2
    reversed_times = [(LATENTS, 1 - times[0]), (LATENTS, 1 - times[1])]
    with pytest.raises(ValueError, match="timestep is 0.3"):
        read(reversed_times, times)


@pytest.mark.parametrize("n", [9, 10])
def test_a_scheduler_with_more_timesteps_than_steps_is_refused(n):
    scheduler = PNDMScheduler(skip_prk_steps=False)
    scheduler.set_timesteps(n)
    with pytest.raises(ValueError, match="scheduler is 'PNDMScheduler'"):
        numbered(scheduler)


def test_a_timestep_that_the_scheduler_does_not_list_is_refused(scheduler):
    with pytest.raises(ValueError, match="timestep is -3"):
        read([(LATENTS, torch.tensor(-3.0))], scheduler)


def test_a_denoiser_that_is_given_reversed_time_is_refused_by_name(scheduler):
    size = {
        "sample_size": 8,
        "patch_size": 2,
        "hidden_size": 24,
        "num_layers": 1,
        "multiple_of": 16,
    }
    heads = {"num_attention_heads": 3, "num_kv_heads": 1, "cross_attention_dim": 32}
    with pytest.raises(ValueError, match="denoiser is 'LuminaNextDiT2DModel'"):
        CallReader(LuminaNextDiT2DModel(**size, **heads), scheduler, None)


# --- branches of guidance -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, n_images, denoiser, branches",
    [
        (2, 2, Denoiser(), BOTH[1:]),
        (2, None, Denoiser(), BOTH[1:]),
        (2, 1, Denoiser(), BOTH),
        (4, 2, Denoiser(), BOTH),
        (4, 2, DiTTransformer2DModel(), BOTH[::-1]),
    ],
)
def test_branches_are_told_from_the_number_of_images(rows, n_images, denoiser, branches, scheduler):
    latents = torch.zeros(rows, 1, 4, 4)
    [found] = read([(latents, scheduler.timesteps[0])], scheduler, n_images, denoiser)
    assert found.branches == branches


def test_more_rows_than_guidance_gives_are_refused(scheduler):
    with pytest.raises(ValueError, match="rows is 6"):
        read([(torch.zeros(6, 1, 4, 4), scheduler.timesteps[0])], scheduler, n_images=2)


def test_the_same_latents_again_are_the_other_branch_and_no_repetition(scheduler):
    t = scheduler.timesteps
    calls = [(LATENTS, t[1]), (LATENTS, t[1]), (LATENTS + 1, t[1]), (LATENTS + 1, t[1])]
    found = read([*calls, (LATENTS + 1, t[2])], scheduler)
    assert [r.branches for r in found] == [*[("conditional",), ("unconditional",)] * 2, BOTH[1:]]
    assert [r.repeated for r in found] == [False, False, True, True, False]


def test_latents_that_a_loop_changes_in_place_are_other_latents(scheduler):
    latents, t = LATENTS.clone(), scheduler.timesteps[1]
    reader = CallReader(Denoiser(), scheduler, None)
    for repeated in (False, True):
        reader.note(None, (latents, t), {})
        assert (reader.now.branches, reader.now.repeated) == (BOTH[1:], repeated)
        latents.add_(1)


def test_the_same_noise_in_a_new_run_of_one_step_is_no_other_branch(scheduler):
    reader = CallReader(Denoiser(), scheduler, None)
    for _ in range(2):
        scheduler.set_timesteps(1)
        reader.note(None, (LATENTS, scheduler.timesteps[0]), {})
        assert (reader.now.branches, reader.now.repeated) == (BOTH[1:], False)


def test_latents_that_are_not_one_tensor_are_refused(scheduler):
    class Any(torch.nn.Module):
        def forward(self, *args):
            return args[0]

    with pytest.raises(ValueError, match="input is 'tuple'"):
        read([(LATENTS, scheduler.timesteps[0])], scheduler, denoiser=Any())
