from typing import NamedTuple

import numpy as np
import pipelines
import pytest
import torch
from conftest import GRID, SAMPLING, TOKENS, TUPLE, built, hooks_on
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    Flux2Transformer2DModel,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LuminaNextDiT2DModel,
    PNDMScheduler,
    QwenImageTransformer2DModel,
    StableDiffusionPAGPipeline,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModelOutput

from helpers import hooks
from helpers.trajectories import Recorder, Tap, generate, record, record_all, times_of

HEIGHT, WIDTH = 8, 16


# --- a toy denoiser -----------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Passes a grid (row, channel, height, width) on in one of the forms that denoisers' layers use."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        if self.form == "tokens":
            return x.flatten(2).transpose(1, 2)
        return {
            "grid": x,
            "tuple": (x, "kept"),
            "output": Transformer2DModelOutput(sample=x),
            "flat": x.flatten(1),
        }[self.form]


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for form in ("grid", "tuple", "output", "tokens", "flat"):
            setattr(self, form, Layer(form))
        self.coarse = Layer("tokens")

    def forward(self, sample, timestep):
        out = {
            form: getattr(self, form)(sample)
            for form in ("grid", "tuple", "output", "tokens", "flat")
        }
        return out | {"coarse": self.coarse(sample[..., ::2, ::2])}


@pytest.fixture
def toy():
    return Toy()


@pytest.fixture
def scheduler():
    made = DDIMScheduler()
    made.set_timesteps(5)
    return made


def numbered(rows=2):
    """Channel 0 holds 100 · row + column, channel 1 the batch row."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    return torch.stack(
        [torch.stack([100 * y + x, torch.full_like(x, i)]) for i in range(rows)]
    ).float()


def heard(denoiser, scheduler, hookpoint, run, **options):
    """What a listener is told while `run()` goes on: (activation, call) each time."""
    seen = []
    with hooks.listen(
        denoiser, scheduler, hookpoint, lambda t, call: seen.append((t.clone(), call)), **options
    ):
        run()
    return seen


FORMS = ["grid", "tuple", "output", "tokens"]


@pytest.mark.parametrize("form", FORMS)
def test_tokens_come_in_reading_order_of_an_upright_grid(toy, scheduler, form):
    [(tokens, call)] = heard(toy, scheduler, form, lambda: toy(numbered(), scheduler.timesteps[0]))
    assert call.grid == (HEIGHT, WIDTH) and tokens.shape == (2, HEIGHT * WIDTH, 2)
    assert tokens[1, 3 * WIDTH + 11].tolist() == [311, 1]


def test_a_coarser_layers_grid_keeps_the_latents_proportion(toy, scheduler):
    [(tokens, call)] = heard(
        toy, scheduler, "coarse", lambda: toy(numbered(), scheduler.timesteps[0])
    )
    assert call.grid == (4, 8)
    assert tokens[0, 2 * 8 + 5, 0] == 410


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signal", ["output", "input"])
def test_what_on_call_returns_takes_the_place_of_one_token(toy, scheduler, form, signal):
    def edit(tokens, call):
        tokens = tokens.clone()
        tokens[1, 2 * WIDTH + 5] = -1
        return tokens

    with hooks.listen(toy, scheduler, form, edit, signal=signal):
        out = toy(numbered(), scheduler.timesteps[0])[form]
    x = out if isinstance(out, torch.Tensor) else out[0]
    x = x.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH)) if form == "tokens" else x
    expected = numbered()
    expected[1, :, 2, 5] = -1
    assert torch.equal(x, expected)
    if form == "tuple":
        assert out[1] == "kept"
    if form == "output":
        assert isinstance(out, Transformer2DModelOutput)


def test_a_layer_without_tokens_is_refused_by_name_or_skipped(toy, scheduler):
    def run():
        toy(numbered(), scheduler.timesteps[0])

    with pytest.raises(ValueError, match="hookpoint 'flat': its output.*not a grid"):
        heard(toy, scheduler, "flat", run)
    with pytest.raises(ValueError, match="hookpoint 'flat': its update"):
        heard(toy, scheduler, "flat", run, signal="update")
    assert heard(toy, scheduler, "flat", run, skip_unfit=True) == []
    assert hooks_on(toy) == 0


@pytest.mark.parametrize(
    "rows, n_images, branches",
    [
        (2, 2, ("conditional",)),
        (2, None, ("conditional",)),
        (2, 1, ("unconditional", "conditional")),
        (4, 2, ("unconditional", "conditional")),
    ],
)
def test_branches_are_told_from_the_number_of_images(toy, scheduler, rows, n_images, branches):
    run = lambda: toy(numbered(rows), scheduler.timesteps[0])  # noqa: E731
    [(tokens, call)] = heard(toy, scheduler, "grid", run, n_images=n_images)
    assert call.branches == branches
    wanted = [hooks.rows_of(tokens, call, b) for b in hooks.BRANCHES]
    own = rows // len(branches)
    assert wanted[0][:, 0, 1].tolist() == [*range(rows)][-own:]
    assert wanted[1] is None if len(branches) == 1 else wanted[1][:, 0, 1].tolist() == [*range(own)]


def test_more_rows_than_guidance_gives_are_refused(toy, scheduler):
    with pytest.raises(ValueError, match="given 6 rows for 2 images"):
        heard(toy, scheduler, "grid", lambda: toy(numbered(6), scheduler.timesteps[0]), n_images=2)


def test_the_step_is_read_from_the_timestep_not_counted(toy, scheduler):
    def run():
        for call, step in enumerate((3, 0, 0, 4)):
            toy(sample=numbered() + call, timestep=scheduler.timesteps[step])

    timesteps = scheduler.timesteps.tolist()
    seen = [(c.step, c.timestep, c.repeated) for _, c in heard(toy, scheduler, "grid", run)]
    assert seen == [
        (3, timesteps[3], False),
        (0, timesteps[0], False),
        (0, timesteps[0], True),
        (4, timesteps[4], False),
    ]


def test_the_same_latents_again_are_the_other_branch_and_no_repetition(toy, scheduler):
    def run():
        for latents, step in (
            (numbered(), 1),
            (numbered(), 1),
            (numbered() + 1, 1),
            (numbered() + 1, 1),
            (numbered() + 1, 2),
        ):
            toy(latents, scheduler.timesteps[step])

    calls = [c for _, c in heard(toy, scheduler, "grid", run)]
    assert [c.branches[0] for c in calls] == [
        "conditional",
        "unconditional",
        "conditional",
        "unconditional",
        "conditional",
    ]
    assert [c.repeated for c in calls] == [False, False, True, True, False]


def test_latents_that_a_loop_changes_in_place_are_other_latents(toy, scheduler):
    def run():
        latents = numbered()
        toy(latents, scheduler.timesteps[1])
        toy(latents.add_(1), scheduler.timesteps[1])

    calls = [c for _, c in heard(toy, scheduler, "grid", run)]
    assert [(c.branches, c.repeated) for c in calls] == [
        (("conditional",), False),
        (("conditional",), True),
    ]


class InPlace(torch.nn.Module):
    """One block, which writes over what it is given."""

    def __init__(self):
        super().__init__()
        self.block = torch.nn.LeakyReLU(0.5, inplace=True)

    def forward(self, x, t):
        return self.block(x - 100)


def test_an_update_is_right_where_the_module_writes_over_its_input(scheduler):
    denoiser = InPlace()
    [(update, _)] = heard(
        denoiser,
        scheduler,
        "block",
        lambda: denoiser(numbered(1), scheduler.timesteps[0]),
        signal="update",
    )
    entering = (numbered(1) - 100).flatten(2).transpose(1, 2)
    assert torch.equal(update, torch.where(entering < 0, -entering / 2, 0))


# --- which step is running ----------------------------------------------------------------------

SCHEDULERS = pytest.mark.parametrize(
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


@SCHEDULERS
def test_steps_under_schedulers_that_call_once_or_twice(
    pipe, prompts, monkeypatch, scheduler_class, options, steps, repeated
):
    monkeypatch.setattr(
        pipe, "scheduler", scheduler_class.from_config(pipe.scheduler.config, **options)
    )
    raw = []  # what a naive hook sees
    handle = pipe.unet.get_submodule(GRID).register_forward_hook(
        lambda m, args, out: raw.append(out.clone())
    )
    try:
        recorder = Recorder(pipe.unet, pipe.scheduler, GRID, [0, 1, 2, 3], n_images=1)
        run = lambda: generate(pipe, prompts[:1], [0], **SAMPLING | {"num_inference_steps": 4})  # noqa: E731
        with recorder:
            calls = [call for _, call in heard(pipe.unet, pipe.scheduler, GRID, run, n_images=1)]
    finally:
        handle.remove()
    timesteps = pipe.scheduler.timesteps.tolist()
    assert [c.step for c in calls] == steps
    assert [i for i, c in enumerate(calls) if c.repeated] == repeated
    assert [c.timestep for c in calls] == timesteps == sorted(timesteps, reverse=True)
    last_of = {step: i for i, step in enumerate(steps)}  # what is kept of a step is its last call
    assert hooks.steps_of(pipe.scheduler).tolist() == [timesteps[last_of[s]] for s in range(4)]
    expected = torch.stack([raw[last_of[s]][1].flatten(1).T for s in range(4)])
    assert torch.equal(recorder.trajectories()[0], expected)


def test_steps_whose_rounded_timesteps_are_equal_are_told_apart(pipe, prompts, monkeypatch):
    karras = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    monkeypatch.setattr(pipe, "scheduler", karras)
    run = lambda: generate(pipe, prompts[:1], [0], num_inference_steps=50, guidance_scale=1.0)  # noqa: E731
    calls = [call for _, call in heard(pipe.unet, karras, GRID, run)]
    assert karras.timesteps[-3:].tolist() == [1, 1, 0] == hooks.steps_of(karras)[-3:].tolist()
    assert [c.step for c in calls] == list(range(50)) and not any(c.repeated for c in calls)
    assert times_of(karras, [47, 48, 49])["sigmas"] == karras.sigmas[47:50].tolist()


class Flow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torch.nn.Identity()

    def forward(self, hidden_states, timestep):
        return self.block(hidden_states) * timestep.flatten()[0]


@pytest.mark.parametrize("n", [50, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "scheduler_class", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler]
)
@pytest.mark.parametrize("divisor", [1000, 1])
def test_steps_when_the_timestep_is_rounded_and_a_thousandth(scheduler_class, dtype, n, divisor):
    scheduler, flow, latents = (
        scheduler_class(shift=3.0),
        Flow(),
        torch.ones(1, 4, 4, 4, dtype=dtype),
    )
    scheduler.set_timesteps(n)

    def run(latents):
        for t in scheduler.timesteps:
            velocity = flow(latents, t.expand(1).to(dtype) / divisor)
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]

    calls = [call for _, call in heard(flow, scheduler, "block", lambda: run(latents))]
    listed = scheduler.timesteps.tolist()
    distinct = sorted(set(listed), reverse=True)
    assert len(distinct) == n
    assert [c.step for c in calls] == [distinct.index(t) for t in listed]


@pytest.mark.parametrize("divisor, last", [(1000, 1.0), (1, 1.0), (1000, 0.1)])
def test_a_last_timestep_of_one_is_not_a_first_of_a_thousand_divided(divisor, last):
    scheduler, flow, latents = FlowMatchEulerDiscreteScheduler(), Flow(), torch.ones(1, 4, 4, 4)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, last / 1000])

    def run(latents):
        for t in scheduler.timesteps:
            latents = scheduler.step(
                flow(latents, t.repeat(1) / divisor), t, latents, return_dict=False
            )[0]

    assert [c.step for _, c in heard(flow, scheduler, "block", lambda: run(latents))] == [0, 1, 2]


@pytest.mark.parametrize("at", [1, 5])
def test_a_number_beside_the_schedulers_list_is_no_entry_of_it(at):
    beside = torch.tensor([900.0, 100.0, 500.0, 300.0, 100.0, 910.0])
    listed = beside[0:5:2]  # 900, 500, 100, in the same storage
    assert hooks._step(beside[at], listed, *hooks.numbered(listed))[0] == {1: 2, 5: 0}[at]


@pytest.mark.parametrize("n", [9, 10])
def test_a_scheduler_with_more_timesteps_than_steps_is_refused(n):
    scheduler = PNDMScheduler(skip_prk_steps=False)
    scheduler.set_timesteps(n)
    with pytest.raises(
        ValueError,
        match=f"scheduler PNDMScheduler lists .* different timesteps for num_inference_steps={n}",
    ):
        hooks.steps_of(scheduler)


# --- every family of models against naive hooks -------------------------------------------------


class Fact(NamedTuple):
    """How a module's forward takes and gives the image, as its source says; checked against what the helpers find out."""

    model: str
    hookpoint: str
    enters: int | str  # place or name of the argument
    leaves: int | None  # position in the tuple, None for a bare tensor
    shrinks: int = 4  # pixels to a side of a token
    text: int = 0  # text tokens before the image's

    def entering(self, args, kwargs):
        return args[self.enters] if isinstance(self.enters, int) else kwargs[self.enters]

    def leaving(self, output):
        return output if self.leaves is None else output[self.leaves]

    def tokens(self, tensor):
        """(row, token, channel) of the image."""
        if tensor.ndim == 3:
            return tensor[:, self.text :]
        return torch.stack(
            [tensor[:, :, y, x] for y in range(tensor.shape[2]) for x in range(tensor.shape[3])],
            dim=1,
        )

    def changed(self, tensor, change):
        """The tensor with `change` made to its image tokens."""
        new = tensor.clone()
        if tensor.ndim == 3:
            new[:, self.text :] = change(tensor[:, self.text :])
            return new
        columns = tensor.shape[3]
        for i, token in enumerate(change(self.tokens(tensor)).unbind(1)):
            new[:, :, i // columns, i % columns] = token
        return new


FACTS = [
    Fact("sd1", "down_blocks.0.resnets.0", 0, None, shrinks=2),
    Fact("sd1", TUPLE, 0, 0),
    Fact("sd1", TOKENS, 0, None),
    Fact("sd1", "down_blocks.1", "hidden_states", 0),
    Fact("sd2", TUPLE, 0, 0),
    Fact("sdxl", "up_blocks.0.attentions.1", 0, 0),
    Fact("sdxl", "mid_block.attentions.0.transformer_blocks.1", 0, None),
    Fact("sd3", "transformer_blocks.0", "hidden_states", 1),
    Fact("sd3", "transformer_blocks.1", "hidden_states", 1),
    Fact("sd3", "transformer_blocks.0.attn", "hidden_states", 0),
    Fact("sd3", "transformer_blocks.1.attn", "hidden_states", 0),
    Fact("flux", "transformer_blocks.1", "hidden_states", 1),
    Fact("flux", "transformer_blocks.0.attn", "hidden_states", 0),
    Fact("flux", "single_transformer_blocks.0", "hidden_states", 1),
    Fact("flux", "single_transformer_blocks.1", "hidden_states", 1),
    Fact("flux", "single_transformer_blocks.1.attn", "hidden_states", None, text=512),
    Fact("pixart", "transformer_blocks.1", 0, None, shrinks=16),
    Fact("dit", "transformer_blocks.0", 0, None),
    Fact("ddpm", "mid_block.attentions.0", 0, None, shrinks=2),
    Fact("ddpm", "down_blocks.0.resnets.0", 0, None, shrinks=1),
]
WITHOUT_BRANCHES = ("flux", "ddpm")  # with these settings
# pixels of an image that is not square, and how to ask for it
TALL = {"pixart": {"height": 96, "width": 64, "use_resolution_binning": False}}
SQUARE = {"pixart": (256, 256), "ddpm": (8, 8)}
SIZES = [
    (f, tall) for f in FACTS for tall in (False, True) if not tall or f.model not in ("dit", "ddpm")
]
PROMPTS = {"dit": ["1", "2"]}


def name_of(value):
    return f"{value.model}-{value.hookpoint}" if isinstance(value, Fact) else None


def asked(model, tall):
    """Pipeline, prompts, seeds and sampling of two images of a family, and their height and width."""
    size = TALL.get(model, {"height": 24, "width": 16}) if tall else {}
    pixels = (size["height"], size["width"]) if tall else SQUARE.get(model, (16, 16))
    return built(model), PROMPTS.get(model, ["a dog", "two cats"]), [5, 6], SAMPLING | size, pixels


def conditional(model, rows):
    """The conditional half of a batch under guidance."""
    half = len(rows) // 2
    return rows if model in WITHOUT_BRANCHES else rows[:half] if model == "dit" else rows[half:]


@pytest.mark.parametrize("fact, tall", SIZES, ids=name_of)
def test_what_is_recorded_is_what_a_naive_hook_sees(fact, tall):
    pipe, prompts, seeds, sampling, (height, width) = asked(fact.model, tall)
    raw = []

    def naive(_, args, kwargs, output):
        raw.append(
            [fact.tokens(t).clone() for t in (fact.leaving(output), fact.entering(args, kwargs))]
        )

    steps, signals = (
        [0, 2],
        hooks.SIGNALS[: 2 if fact.hookpoint == "down_blocks.1" else 3],
    )  # its widths differ
    module = hooks.denoiser_of(pipe).get_submodule(fact.hookpoint)
    handle = module.register_forward_hook(naive, with_kwargs=True)
    try:
        images, h, where = record_all(
            pipe, prompts, seeds, [Tap(fact.hookpoint, s) for s in signals], steps, **sampling
        )
    finally:
        handle.remove()
    assert images.shape[:3] == (2, height, width)
    assert [w["grid"] for w in where] == [[height // fact.shrinks, width // fact.shrinks]] * len(
        signals
    )
    assert len(raw) == 3 and h[0].shape[2] == (height // fact.shrinks) * (width // fact.shrinks)
    for i, step in enumerate(steps):
        output, entering = (conditional(fact.model, t) for t in raw[step])
        for recorded, expected in zip(
            h, (output, entering, output - entering if len(signals) == 3 else None)
        ):
            assert torch.equal(recorded[:, i], expected)
    assert not torch.equal(h[0][0], h[0][1])


@pytest.mark.parametrize("fact", [f for f in FACTS if f.model == "flux"], ids=name_of)
def test_text_is_left_out_even_if_it_has_as_many_tokens_as_the_image(fact):
    pipe, prompts, seeds, sampling, _ = asked("flux", False)
    fact, raw = fact._replace(text=fact.text and 16), []
    handle = pipe.transformer.get_submodule(fact.hookpoint).register_forward_hook(
        lambda m, args, kwargs, out: raw.append(
            [fact.tokens(t).clone() for t in (fact.leaving(out), fact.entering(args, kwargs))]
        ),
        with_kwargs=True,
    )
    taps = [Tap(fact.hookpoint, "output"), Tap(fact.hookpoint, "input")]
    try:
        _, h, _ = record_all(pipe, prompts, seeds, taps, [0, 2], max_sequence_length=16, **sampling)
    finally:
        handle.remove()
    for recorded, expected in zip(h, zip(*raw)):
        assert torch.equal(recorded, torch.stack([expected[0], expected[2]], 1))


HEADS = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
QWEN = (
    QwenImageTransformer2DModel,
    HEADS
    | {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
)
AURA = (
    AuraFlowTransformer2DModel,
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "out_channels": 4,
        "pos_embed_max_size": 16,
    },
)
FLUX2 = (
    Flux2Transformer2DModel,
    HEADS
    | {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 32,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    },
)
COGVIEW = (
    CogView4Transformer2DModel,
    {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "text_embed_dim": 32,
        "time_embed_dim": 8,
        "condition_dim": 4,
        "pos_embed_max_size": 32,
        "sample_size": 8,
    },
)
OTHERS = {  # the class, the hookpoint, how many tokens of text, which of its outputs is the image, how many tokens stand before it
    "qwen, wide": (QWEN, "transformer_blocks.0", 9, 1, 0),
    "qwen's attention": (QWEN, "transformer_blocks.0.attn", 16, 0, 0),
    "aura, joint": (AURA, "joint_transformer_blocks.0", 7, 1, 0),
    "aura, single": (AURA, "single_transformer_blocks.0", 7, None, 15),
    "flux 2": (FLUX2, "transformer_blocks.0", 7, 1, 0),
    "flux 2, single": (FLUX2, "single_transformer_blocks.0", 7, None, 7),
    "cogview": (COGVIEW, "transformer_blocks.0", 16, 0, 0),
}


def call_of(denoiser, text, reference=0):
    """Arguments as the pipeline gives them for one image of 2×8 tokens, and `reference` more."""
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(8), indexing="ij")
    ids = torch.stack([0 * rows, rows, columns, 0 * rows], -1).reshape(1, 16, 4)
    packed = torch.randn(1, 16 + reference, 16)
    given = {"timestep": torch.tensor([1.0]), "encoder_hidden_states": torch.randn(1, text, 32)}
    own = {
        "Qwen": {
            "hidden_states": packed,
            "img_shapes": [[(1, 2, 8)]],
            "encoder_hidden_states_mask": torch.ones(1, text),
        },
        "Flux": {
            "hidden_states": packed,
            "img_ids": ids,
            "txt_ids": torch.zeros(1, text, 4),
            "guidance": torch.ones(1),
        },
        "Aura": {"hidden_states": torch.randn(1, 4, 4, 16)},
        "CogV": {
            "hidden_states": torch.randn(1, 4, 4, 16),
            **{k: torch.ones(1, 2) for k in ("original_size", "target_size", "crop_coords")},
        },
    }
    return given | own[type(denoiser).__name__[:4]]


@pytest.mark.parametrize("what", OTHERS)
def test_other_transformers_give_the_image_and_its_grid(what):
    (kind, config), hookpoint, text, at, before = OTHERS[what]
    torch.manual_seed(0)
    denoiser, raw = kind(**config).eval(), []
    denoiser.get_submodule(hookpoint).register_forward_hook(
        lambda m, args, out: raw.append(out if at is None else out[at])
    )
    with torch.no_grad():
        [(tokens, call)] = heard(
            denoiser, [1.0, 0.5], hookpoint, lambda: denoiser(**call_of(denoiser, text))
        )
    assert call.grid == (2, 8) and torch.equal(tokens, raw[0][:, before:])


class Packed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torch.nn.Identity()

    def forward(self, hidden_states, timestep, encoder_hidden_states=None):
        return self.block(hidden_states)


def test_the_shape_of_packed_tokens_is_guessed_only_where_there_is_no_text():
    denoiser, packed = Packed(), torch.ones(1, 9, 4)
    [(_, call)] = heard(denoiser, [1.0, 0.5], "block", lambda: denoiser(packed, torch.tensor(1.0)))
    assert call.grid == (3, 3)
    with pytest.raises(ValueError, match="hookpoint 'block': its output"):
        heard(denoiser, [1.0, 0.5], "block", lambda: denoiser(packed, torch.tensor(1.0), packed))


def test_reference_images_beside_the_image_are_refused():
    denoiser = QWEN[0](**QWEN[1])
    with pytest.raises(ValueError, match="given 25 tokens for a grid of 2 × 8; valid is one image"):
        heard(
            denoiser,
            [1.0, 0.5],
            "transformer_blocks.0",
            lambda: denoiser(**call_of(denoiser, 9, reference=9)),
        )


def test_usual_hookpoints_of_auraflow_are_its_blocks():
    assert hooks.usual(AURA[0](**AURA[1])) == [
        "joint_transformer_blocks.0",
        "single_transformer_blocks.0",
    ]


def test_a_denoiser_that_is_given_reversed_time_is_refused_by_name():
    lumina = LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
    )
    with pytest.raises(
        ValueError, match="its denoiser LuminaNextDiT2DModel is given 1 - timestep / 1000"
    ):
        heard(lumina, [1.0, 0.5], "layers.0", lambda: None)


def test_perturbed_attention_guidance_is_refused(pipe):
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    with pytest.raises(
        ValueError, match="model StableDiffusionPAGPipeline runs perturbed-attention guidance"
    ):
        hooks.denoiser_of(StableDiffusionPAGPipeline(**parts, requires_safety_checker=False))


@pytest.mark.parametrize("signal", hooks.SIGNALS)
def test_the_extra_pass_of_skip_layer_guidance_is_not_heard(signal):
    pipe, prompts, seeds, sampling, _ = asked("sd3", False)
    where = {"hookpoint": "transformer_blocks.1", "steps": [0, 1, 2], "signal": signal}
    skipping = {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 0.9,
    }
    plain = record(pipe, prompts, seeds, **where, **sampling)[1]
    skipped = record(
        pipe, prompts, seeds, **where, **skipping, skip_layer_guidance_scale=0.0, **sampling
    )[1]
    torch.testing.assert_close(skipped, plain, atol=1e-4, rtol=1e-4)


class Any(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torch.nn.Identity()

    def forward(self, *args):
        return self.block(args[0])


def test_latents_that_are_not_one_tensor_are_refused_in_one_sentence(scheduler):
    denoiser = Any()
    with pytest.raises(
        ValueError,
        match="model: its denoiser was given a tuple for its latents; valid is a forward that names",
    ):
        heard(denoiser, scheduler, "block", lambda: denoiser(numbered(), scheduler.timesteps[0]))


@pytest.mark.parametrize(
    "model, hookpoint, options",
    [
        (
            "sd1",
            TOKENS + ".attn2.to_k",
            {"height": 16, "width": 32},
        ),  # 32 tokens of text, 4×8 of the image
        ("sd1", TOKENS + ".attn2.to_v", {"height": 16, "width": 32}),
        ("flux", "transformer_blocks.0.attn.to_add_out", {"max_sequence_length": 16}),
        ("flux", "transformer_blocks.0.attn.add_k_proj", {"max_sequence_length": 16}),
        ("flux", "transformer_blocks.0.ff_context", {"max_sequence_length": 16}),
        ("flux", "context_embedder", {"max_sequence_length": 16}),
    ],
)
def test_text_alone_is_no_image_even_if_it_has_as_many_tokens(model, hookpoint, options):
    pipe, prompts, seeds, sampling, _ = asked(model, False)
    with pytest.raises(ValueError, match=f"hookpoint {hookpoint!r}: its output.*not a grid"):
        record(pipe, prompts, seeds, hookpoint=hookpoint, steps=[0, 1], **options, **sampling)


class Grouped(torch.nn.Module):
    """A group norm over (row, channel, token), as in the attentions of U-Nets; as many channels as tokens."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(2, HEIGHT * WIDTH)

    def forward(self, x, t):
        return self.norm(x.flatten(2).transpose(1, 2))


def test_a_group_norm_over_channels_and_tokens_is_refused(scheduler):
    denoiser = Grouped()
    with pytest.raises(ValueError, match="hookpoint 'norm': its output"):
        heard(denoiser, scheduler, "norm", lambda: denoiser(numbered(), scheduler.timesteps[0]))


# the last module that holds a token of each place
LAST = {"sd3": "proj_out", "flux": "proj_out", "pixart": "proj_out", "dit": "proj_out_2"}


@pytest.mark.parametrize(
    "model, tall",
    [(m, t) for m in pipelines.ALL for t in (False, True) if not t or m not in ("dit", "ddpm")],
)
def test_an_edited_token_changes_the_latents_at_its_upright_place(model, tall, monkeypatch):
    pipe, prompts, seeds, sampling, _ = asked(model, tall)
    finished = []

    def run():
        images = generate(pipe, prompts, seeds, **sampling)
        return images.transpose(0, 3, 1, 2) if model == "ddpm" else finished.pop()

    if model != "ddpm":
        decode = pipe.vae.decode
        monkeypatch.setattr(
            pipe.vae,
            "decode",
            lambda z, *a, **k: finished.append(z.numpy().copy()) or decode(z, *a, **k),
        )
    plain = run()
    side = 2 if model in LAST else 1
    rows, columns = (n // side for n in plain.shape[2:])
    row, column = rows // 2, columns - 2

    def edit(tokens, call):
        assert call.grid == (rows, columns)
        if call.step == 2:
            tokens = tokens.clone()
            tokens[:, row * columns + column] += 0.5
            return tokens

    with hooks.listen(
        hooks.denoiser_of(pipe), pipe.scheduler, LAST.get(model, "conv_out"), edit, n_images=2
    ):
        changed = run()
    for moved in (changed != plain).any(1):
        assert {(y // side, x // side) for y, x in np.argwhere(moved)} == {(row, column)}


@pytest.mark.parametrize(
    "model, hookpoint",
    [
        ("sd3", "transformer_blocks.0.ff_context"),
        ("sd3", "transformer_blocks.0.attn.to_add_out"),
        ("sd3", "context_embedder"),
        ("sd3", "time_text_embed"),
        ("flux", "transformer_blocks.0.ff_context"),
        ("flux", "transformer_blocks.0.attn.norm_q"),
        ("flux", "context_embedder"),
        ("pixart", "caption_projection"),
        ("sd1", TOKENS + ".attn2.to_k"),
        ("sdxl", "add_embedding"),
    ],
)
@pytest.mark.parametrize("signal", hooks.SIGNALS)
def test_what_holds_no_image_tokens_is_refused_by_name(model, hookpoint, signal):
    pipe, prompts, seeds, sampling, _ = asked(model, False)
    with pytest.raises(ValueError, match=f"hookpoint {hookpoint!r}: its {signal}.*not a grid"):
        record(pipe, prompts, seeds, hookpoint=hookpoint, steps=[0, 1], signal=signal, **sampling)
    assert hooks_on(hooks.denoiser_of(pipe)) == 0


# --- branches of guidance -----------------------------------------------------------------------

GUIDED = [
    f
    for f in FACTS
    if (f.model, f.hookpoint)
    in {
        ("sd1", TUPLE),
        ("sd2", TUPLE),
        ("sdxl", "up_blocks.0.attentions.1"),
        ("sd3", "transformer_blocks.1"),
        ("pixart", "transformer_blocks.1"),
        ("flux", "transformer_blocks.1"),
        ("flux", "single_transformer_blocks.1.attn"),
        ("dit", "transformer_blocks.0"),
    }
]


@pytest.mark.parametrize("fact", GUIDED, ids=name_of)
def test_each_branch_is_what_its_own_prompt_gives_without_guidance(fact):
    pipe, prompts, seeds, _, _ = asked(fact.model, False)
    where = {
        "hookpoint": fact.hookpoint,
        "steps": [0],
        "num_inference_steps": 2,
    }  # later latents differ under guidance
    guided, plain = {"guidance_scale": 3.0, "negative_prompt": "gray"}, {"guidance_scale": 1.0}
    if fact.model == "flux":
        guided, plain = (
            {"true_cfg_scale": 3.0, "negative_prompt": "gray", "guidance_scale": 2.0},
            {"guidance_scale": 2.0},
        )
    if fact.model == "dit":
        guided.pop("negative_prompt")
    negative = ["1000" if fact.model == "dit" else "gray"] * 2  # DiT's null class
    of = {b: record(pipe, prompts, seeds, branch=b, **where, **guided)[1] for b in hooks.BRANCHES}
    assert not torch.allclose(of["conditional"], of["unconditional"], atol=1e-3)
    for branch, texts in (("conditional", prompts), ("unconditional", negative)):
        _, alone, _ = record(pipe, texts, seeds, **where, **plain)
        torch.testing.assert_close(of[branch], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("branch", hooks.BRANCHES)
def test_two_calls_a_step_are_the_two_branches_of_flux(branch):
    pipe, prompts, seeds, sampling, _ = asked("flux", True)
    raw = []
    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(
        lambda m, args, out: raw.append(out[1].clone())
    )
    try:
        _, h, _ = record(
            pipe,
            prompts,
            seeds,
            hookpoint="transformer_blocks.1",
            steps=[0, 1, 2],
            branch=branch,
            true_cfg_scale=2.0,
            negative_prompt="gray",
            **sampling,
        )
    finally:
        handle.remove()
    assert len(raw) == 6
    assert torch.equal(h, torch.stack(raw[hooks.BRANCHES.index(branch) :: 2], 1))


@pytest.mark.parametrize(
    "model, guidance_scale",
    [("sd1", 1.0), ("dit", 1.0), ("sd3", 1.0), ("flux", 3.0), ("ddpm", 3.0)],
)
def test_without_guidance_there_is_no_unconditional_branch(model, guidance_scale):
    pipe, prompts, seeds, sampling, _ = asked(model, False)
    hookpoint = next(f.hookpoint for f in FACTS if f.model == model)
    options = (
        {"hookpoint": hookpoint, "steps": [0, 1]} | sampling | {"guidance_scale": guidance_scale}
    )
    with pytest.raises(
        ValueError, match="branch 'unconditional' is not run by this pipeline.*valid is conditional"
    ):
        record(pipe, prompts, seeds, branch="unconditional", **options)
    with pytest.raises(ValueError, match="branch 'both' is not one of conditional, unconditional"):
        record(pipe, prompts, seeds, branch="both", **options)


# --- edits --------------------------------------------------------------------------------------


def bent(tokens, call=None):
    """A change that no layer norm undoes."""
    return tokens * torch.linspace(-1, 1, tokens.shape[-1]) + 1


@pytest.mark.parametrize("signal", hooks.SIGNALS)
@pytest.mark.parametrize(
    "fact",
    [f for f in FACTS if f.hookpoint != "down_blocks.1" and "resnets" not in f.hookpoint],
    ids=name_of,
)
def test_an_edit_changes_the_image_as_a_naive_hook_does(fact, signal):
    pipe, prompts, seeds, sampling, _ = asked(fact.model, fact.model not in ("dit", "ddpm"))
    denoiser = hooks.denoiser_of(pipe)
    module = denoiser.get_submodule(fact.hookpoint)

    def before(_, args, kwargs):
        new = fact.changed(fact.entering(args, kwargs), bent)
        if fact.enters == "hidden_states":
            return args, kwargs | {"hidden_states": new}
        return (new, *args[1:]), kwargs

    def after(_, args, kwargs, output):
        entering = fact.tokens(fact.entering(args, kwargs))
        change = bent if signal == "output" else lambda t: entering + bent(t - entering)
        new = fact.changed(fact.leaving(output), change)
        return (
            new
            if fact.leaves is None
            else tuple(new if i == fact.leaves else v for i, v in enumerate(output))
        )

    register = (
        module.register_forward_pre_hook if signal == "input" else module.register_forward_hook
    )
    handle = register(before if signal == "input" else after, with_kwargs=True)
    try:
        expected = generate(pipe, prompts, seeds, **sampling)
    finally:
        handle.remove()
    with hooks.listen(denoiser, pipe.scheduler, fact.hookpoint, bent, n_images=2, signal=signal):
        edited = generate(pipe, prompts, seeds, **sampling)
    change = np.abs(edited - generate(pipe, prompts, seeds, **sampling)).max()
    assert change > 1e-3 and np.abs(edited - expected).max() < change / 100


@pytest.mark.parametrize("signal", hooks.SIGNALS)
@pytest.mark.parametrize("hookpoint", [TOKENS, TUPLE])
def test_a_listener_that_returns_its_tokens_changes_no_image(pipe, prompts, hookpoint, signal):
    plain = generate(pipe, prompts[:2], [0, 1], **SAMPLING)
    with hooks.listen(
        pipe.unet, pipe.scheduler, hookpoint, lambda t, c: t, n_images=2, signal=signal
    ):
        same = generate(pipe, prompts[:2], [0, 1], **SAMPLING)
    if signal == "update":  # input + (output - input) is rounded
        np.testing.assert_allclose(same, plain, atol=1e-5)
    else:
        assert np.array_equal(same, plain)


# --- hooks come and go --------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("where", ["on_call", "sampling"])
@pytest.mark.parametrize("signal, hooks_during", [("output", 2), ("input", 2), ("update", 3)])
def test_hooks_are_gone_after_an_exception(pipe, prompts, monkeypatch, where, signal, hooks_during):
    during = []

    def stop(*_, **__):
        during.append(hooks_on(pipe.unet))
        raise Stop

    if where == "sampling":
        monkeypatch.setattr(pipe.scheduler, "step", stop)
    on_call = stop if where == "on_call" else lambda t, c: None
    with (
        pytest.raises(Stop),
        hooks.listen(pipe.unet, pipe.scheduler, TUPLE, on_call, n_images=1, signal=signal),
    ):
        generate(pipe, prompts[:1], [0], **SAMPLING)
    assert during == [hooks_during]


@pytest.mark.usefixtures("no_hooks_left")
def test_hooks_are_gone_after_sampling(pipe, prompts):
    assert (
        len(
            heard(
                pipe.unet,
                pipe.scheduler,
                TOKENS,
                lambda: generate(pipe, prompts[:1], [0], **SAMPLING),
            )
        )
        == 3
    )


@pytest.mark.parametrize(
    "way",
    ["torch.compile(module)", "module.compile()", "one block", "torch.compile(module.forward)"],
)
def test_a_compiled_denoiser_is_refused_in_one_sentence(toy, scheduler, way):
    if way == "one block":
        toy.grid.compile()
    elif way == "module.compile()":
        toy.compile()
    elif way == "torch.compile(module.forward)":
        toy.forward = torch.compile(toy.forward)
    compiled = torch.compile(toy) if way == "torch.compile(module)" else toy
    with pytest.raises(
        ValueError, match="model: its denoiser is compiled by torch.compile"
    ) as refused:
        heard(compiled, scheduler, "grid", lambda: None)
    assert "\n" not in str(refused.value)
    assert hooks_on(compiled) == 0


@pytest.mark.usefixtures("no_hooks_left")
def test_an_update_between_widths_is_refused_by_name(pipe, prompts):
    with pytest.raises(ValueError, match="hookpoint 'down_blocks.1': its update"):
        record(
            pipe,
            prompts[:1],
            [0],
            hookpoint="down_blocks.1",
            steps=[0, 1],
            signal="update",
            **SAMPLING,
        )


def test_an_unknown_signal_is_named(toy, scheduler):
    with pytest.raises(ValueError, match="signal 'putout' is not one of output, input, update"):
        heard(toy, scheduler, "grid", lambda: None, signal="putout")


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, near",
    [
        ("mid_block.atentions.0", "mid_block.attentions.0"),
        ("", "attentions"),
        ("zzz", "attentions"),
    ],
)
def test_an_unknown_hookpoint_is_named_with_ones_that_exist(pipe, name, near):
    with pytest.raises(ValueError) as refused:
        hooks.find(pipe.unet, name)
    assert repr(name) in str(refused.value) and near in str(refused.value)


def test_find_gives_the_module_of_that_name(pipe):
    assert hooks.find(pipe.unet, "mid_block.attentions.0") is pipe.unet.mid_block.attentions[0]


USUAL = {
    "sd1": {"down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.1.resnets.1"},
    "sd3": {"transformer_blocks.0", "transformer_blocks.1"},
    "flux": {
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    },
    "dit": {"transformer_blocks.0", "transformer_blocks.1"},
}


@pytest.mark.parametrize("model", USUAL)
def test_the_usual_hookpoints_are_blocks_not_what_is_inside_them(model):
    names = hooks.usual(hooks.denoiser_of(built(model)))
    assert USUAL[model] <= set(names) and not [
        n for n in names if "attentions" in n and "transformer_blocks" in n
    ]
    assert len(names) == len(USUAL[model]) or model == "sd1"


def test_a_denoiser_without_known_blocks_is_offered_by_its_numbered_modules():
    toy = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.ReLU()))
    assert hooks.usual(toy) == ["0", "1", "1.0"]


def test_the_denoiser_is_the_unet_or_the_transformer(pipe):
    class Transformers:
        unet = None
        transformer = torch.nn.Linear(1, 1)

    assert hooks.denoiser_of(pipe) is pipe.unet
    assert hooks.denoiser_of(Transformers()) is Transformers.transformer
    with pytest.raises(ValueError, match="model object"):
        hooks.denoiser_of(object())


def test_a_timestep_that_the_scheduler_does_not_list_is_refused(toy, scheduler):
    with (
        pytest.raises(ValueError, match="timestep -3, which is none of the scheduler's"),
        hooks.listen(toy, scheduler, "grid", lambda *_: None),
    ):
        toy(numbered(), torch.tensor(-3.0))
