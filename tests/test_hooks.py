import functools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pipelines
import pytest
import torch
from conftest import GRID, SAMPLING, TOKENS, TUPLE, built, hooks_on
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModelOutput

from helpers import hooks
from helpers.hooks import SIGNALS, Tap, listen
from helpers.pipelines.calls import BRANCHES
from helpers.pipelines.generate import generate
from helpers.pipelines.loading import denoiser_of
from helpers.trajectories import record, record_all, shapes

HEIGHT, WIDTH = 8, 16
TIMES = [1.0, 0.5]


def heard(denoiser, times, tap, run, **options):
    """What a listener is told while `run()` goes on: (activation, call) each time."""
    told = []
    with listen(denoiser, times, tap, lambda t, call: told.append((t.clone(), call)), **options):
        run()
    return told


# --- a toy denoiser -----------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Passes a grid (row, channel, height, width) on in one of the forms that layers use."""

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
    forms = ("grid", "tuple", "output", "tokens")

    def __init__(self):
        super().__init__()
        for form in (*self.forms, "flat"):
            setattr(self, form, Layer(form))
        self.coarse = Layer("tokens")

    def forward(self, sample, timestep):
        out = {form: getattr(self, form)(sample) for form in (*self.forms, "flat")}
        return out | {"coarse": self.coarse(sample[..., ::2, ::2])}


@pytest.fixture
def toy():
    return Toy()


def numbered(rows=2):
    """Latents whose channel 0 holds 100 · row + column, channel 1 the place in the batch."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    batch = [torch.stack([100 * y + x, torch.full_like(x, i)]) for i in range(rows)]
    return torch.stack(batch).float()


@pytest.mark.parametrize("form", Toy.forms)
def test_tokens_come_in_reading_order_of_an_upright_grid(toy, form):
    [(tokens, call)] = heard(toy, TIMES, form, lambda: toy(numbered(), 1.0))
    assert call.grid == (HEIGHT, WIDTH) and tokens.shape == (2, HEIGHT * WIDTH, 2)
    assert tokens[1, 3 * WIDTH + 11].tolist() == [311, 1]


def test_a_coarser_layers_grid_keeps_the_latents_proportion(toy):
    [(tokens, call)] = heard(toy, TIMES, "coarse", lambda: toy(numbered(), 1.0))
    assert call.grid == (4, 8)
    assert tokens[0, 2 * 8 + 5, 0] == 410


@pytest.mark.parametrize("form", Toy.forms)
@pytest.mark.parametrize("signal", ["output", "input"])
def test_what_on_call_returns_takes_the_place_of_one_token(toy, form, signal):
    def edit(tokens, call):
        tokens = tokens.clone()
        tokens[1, 2 * WIDTH + 5] = -1
        return tokens

    with listen(toy, TIMES, Tap(form, signal), edit):
        out = toy(numbered(), 1.0)[form]
    x = out if isinstance(out, torch.Tensor) else out[0]
    x = x.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH)) if form == "tokens" else x
    expected = numbered()
    expected[1, :, 2, 5] = -1
    assert torch.equal(x, expected)
    assert form != "tuple" or out[1] == "kept"
    assert form != "output" or isinstance(out, Transformer2DModelOutput)


def test_a_layer_without_tokens_is_refused_by_name_or_skipped(toy):
    for signal in ("output", "update"):
        with pytest.raises(ValueError, match=f"hookpoint is 'flat'.*{signal}"):
            heard(toy, TIMES, Tap("flat", signal), lambda: toy(numbered(), 1.0))
    assert heard(toy, TIMES, "flat", lambda: toy(numbered(), 1.0), skip_unfit=True) == []
    assert hooks_on(toy) == 0


@pytest.mark.parametrize("rows, n_images, split", [(2, 2, False), (2, None, False), (4, 2, True)])
def test_rows_of_a_branch(toy, rows, n_images, split):
    run = functools.partial(toy, numbered(rows), 1.0)
    [(tokens, call)] = heard(toy, TIMES, "grid", run, n_images=n_images)
    conditional, unconditional = map(hooks.by_branch(tokens, call).get, BRANCHES)
    assert conditional[:, 0, 1].tolist() == [rows - 2, rows - 1]
    assert unconditional[:, 0, 1].tolist() == [0, 1] if split else unconditional is None


class Wrap(torch.nn.Module):
    """A denoiser of one block, which is handed what `into` makes of the latents."""

    def __init__(self, block, into=lambda x: x):
        super().__init__()
        self.block, self.into = block, into

    def forward(self, hidden_states, timestep, encoder_hidden_states=None):
        return self.block(self.into(hidden_states))


def test_an_update_is_right_where_the_module_writes_over_its_input():
    denoiser = Wrap(torch.nn.LeakyReLU(0.5, inplace=True), lambda x: x - 100)
    run = functools.partial(denoiser, numbered(1), 1.0)
    [(update, _)] = heard(denoiser, TIMES, Tap("block", "update"), run)
    entering = (numbered(1) - 100).flatten(2).transpose(1, 2)
    assert torch.equal(update, torch.where(entering < 0, -entering / 2, 0))


def test_a_group_norm_over_channels_and_tokens_is_refused():
    norm = torch.nn.GroupNorm(2, HEIGHT * WIDTH)  # (row, channel, token), as many of both
    denoiser = Wrap(norm, lambda x: x.flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="hookpoint is 'block'"):
        heard(denoiser, TIMES, "block", lambda: denoiser(numbered(), 1.0))


def test_the_shape_of_packed_tokens_is_guessed_only_where_there_is_no_text():
    denoiser, packed = Wrap(torch.nn.Identity()), torch.ones(1, 9, 4)
    [(_, call)] = heard(denoiser, TIMES, "block", lambda: denoiser(packed, 1.0))
    assert call.grid == (3, 3)
    with pytest.raises(ValueError, match="hookpoint is 'block'"):
        heard(denoiser, TIMES, "block", lambda: denoiser(packed, 1.0, packed))


class Joined(torch.nn.Module):
    """Returns its tokens, and once more behind five of text."""

    def forward(self, x):
        return x, torch.cat([x[:, :5], x], 1)


def test_of_two_tensors_with_the_image_the_one_without_text_is_taken():
    denoiser = Wrap(Joined(), lambda x: x.flatten(2).transpose(1, 2))
    denoiser.config = SimpleNamespace(patch_size=1)
    run = functools.partial(denoiser, numbered(), 1.0, torch.zeros(2, 5, 4))
    with listen(denoiser, TIMES, "block", lambda t, call: torch.zeros_like(t)):
        alone, joined = run()
    assert not alone.any() and joined.any()


# --- every family of models against naive hooks -------------------------------------------------


class Fact(NamedTuple):
    """How a module takes and gives the image, as its source says; what the helpers must find."""

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
        rows, columns = tensor.shape[2:]
        return torch.stack([tensor[:, :, y, x] for y in range(rows) for x in range(columns)], 1)

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


FACTS = {
    f"{f.model}-{f.hookpoint}": f
    for f in (
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
    )
}
SQUARE_ONLY = ("dit", "ddpm")
WITHOUT_BRANCHES = ("flux", "ddpm")  # with these settings
# pixels of an image that is not square, and how to ask for it
TALL = {"pixart": {"height": 96, "width": 64, "use_resolution_binning": False}}
SQUARE = {"pixart": (256, 256), "ddpm": (8, 8)}
PROMPTS = {"dit": ["1", "2"]}
SEEDS = [5, 6]


class Asked(NamedTuple):
    """Two images of a family: what to generate them from, and the denoiser that is called."""

    pipe: object
    prompts: list[str]
    sampling: dict
    pixels: tuple[int, int]
    denoiser: torch.nn.Module

    def images(self, **more):
        return generate(self.pipe, self.prompts, SEEDS, **self.sampling | more)

    def record(self, tap, steps, **more):
        """Activations alone."""
        return record(self.pipe, self.prompts, SEEDS, tap, steps, **self.sampling | more)[1]


def asked(model, tall):
    size = TALL.get(model, {"height": 24, "width": 16}) if tall else {}
    pixels = (size["height"], size["width"]) if tall else SQUARE.get(model, (16, 16))
    prompts = PROMPTS.get(model, ["a dog", "two cats"])
    pipe = built(model)
    return Asked(pipe, prompts, SAMPLING | size, pixels, denoiser_of(pipe))


def conditional(model, rows):
    """The conditional half of a batch under guidance."""
    half = len(rows) // 2
    return rows if model in WITHOUT_BRANCHES else rows[:half] if model == "dit" else rows[half:]


class naive:
    """While it lasts, keeps what a plain hook on the fact's module sees: (output, input) a call."""

    def __init__(self, fact, denoiser):
        self.fact, self.seen = fact, []
        self.module = denoiser.get_submodule(fact.hookpoint)

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self.keep, with_kwargs=True)
        return self.seen

    def keep(self, _, args, kwargs, output):
        both = self.fact.leaving(output), self.fact.entering(args, kwargs)
        self.seen.append([self.fact.tokens(t).clone() for t in both])

    def __exit__(self, *_):
        self.handle.remove()


OWN_SIZE = ("dit", "ddpm", "pixart")  # the first two draw no other


@pytest.mark.parametrize(
    "name, tall",
    [(name, True) for name in FACTS if not name.startswith(SQUARE_ONLY)]
    + [(name, False) for name in FACTS if name.startswith(OWN_SIZE)],
)
def test_what_is_recorded_is_what_a_naive_hook_sees(name, tall):
    fact, steps = FACTS[name], [0, 2]
    asks = asked(fact.model, tall)
    signals = SIGNALS[: 2 if fact.hookpoint == "down_blocks.1" else 3]  # its widths differ
    taps = [Tap(fact.hookpoint, signal) for signal in signals]
    with naive(fact, asks.denoiser) as seen:
        images, h, where = record_all(asks.pipe, asks.prompts, SEEDS, taps, steps, **asks.sampling)
    rows, columns = (n // fact.shrinks for n in asks.pixels)
    assert images.shape[:3] == (2, *asks.pixels)
    assert [w["grid"] for w in where] == [[rows, columns]] * len(taps)
    assert len(seen) == 3 and h[0].shape[2] == rows * columns
    for i, step in enumerate(steps):
        output, entering = (conditional(fact.model, t) for t in seen[step])
        expected = {"output": output, "input": entering}
        if len(signals) == 3:
            expected["update"] = output - entering
        for signal, recorded in zip(signals, h):
            assert torch.equal(recorded[:, i], expected[signal])
    assert not torch.equal(h[0][0], h[0][1])


@pytest.mark.parametrize("name", [name for name in FACTS if name.startswith("flux")])
def test_text_is_left_out_even_if_it_has_as_many_tokens_as_the_image(name):
    fact, asks = FACTS[name], asked("flux", False)
    fact = fact._replace(text=fact.text and 16)
    taps, more = [Tap(name.split("-")[1], s) for s in SIGNALS[:2]], {"max_sequence_length": 16}
    with naive(fact, asks.denoiser) as seen:
        h = record_all(asks.pipe, asks.prompts, SEEDS, taps, [0, 2], **asks.sampling, **more)[1]
    for recorded, expected in zip(h, zip(*seen)):
        assert torch.equal(recorded, torch.stack([expected[0], expected[2]], 1))


HEADS = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
PACKED = HEADS | {"in_channels": 16, "joint_attention_dim": 32}
QWEN = functools.partial(
    QwenImageTransformer2DModel, **PACKED, patch_size=2, out_channels=4, axes_dims_rope=(4, 6, 6)
)
FLUX2 = functools.partial(
    Flux2Transformer2DModel,
    **PACKED | {"num_layers": 1, "num_single_layers": 1},
    patch_size=1,
    timestep_guidance_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
)
GRIDS = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
AURA = functools.partial(
    AuraFlowTransformer2DModel,
    **GRIDS,
    num_mmdit_layers=1,
    num_single_dit_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    caption_projection_dim=32,
    pos_embed_max_size=16,
)
COGVIEW = functools.partial(
    CogView4Transformer2DModel,
    **GRIDS,
    num_layers=1,
    attention_head_dim=8,
    num_attention_heads=4,
    text_embed_dim=32,
    time_embed_dim=8,
    condition_dim=4,
    pos_embed_max_size=32,
)
# what builds it, the hookpoint, tokens of text, place of the image in the output, tokens before it
OTHERS = {
    "qwen, wide": (QWEN, "transformer_blocks.0", 9, 1, 0),
    "qwen's attention": (QWEN, "transformer_blocks.0.attn", 16, 0, 0),
    "aura, joint": (AURA, "joint_transformer_blocks.0", 7, 1, 0),
    "aura, single": (AURA, "single_transformer_blocks.0", 7, None, 15),
    "flux 2": (FLUX2, "transformer_blocks.0", 7, 1, 0),
    "flux 2, single": (FLUX2, "single_transformer_blocks.0", 7, None, 7),
    "cogview": (COGVIEW, "transformer_blocks.0", 16, 0, 0),
}


def inputs_of(denoiser, text, reference=0):
    """Arguments as the pipeline gives them for one image of 2×8 tokens, and `reference` more."""
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(8), indexing="ij")
    ids = torch.stack([0 * rows, rows, columns, 0 * rows], -1).reshape(1, 16, 4)
    packed = {"hidden_states": torch.randn(1, 16 + reference, 16)}
    upright = {"hidden_states": torch.randn(1, 4, 4, 16)}
    sizes = ("original_size", "target_size", "crop_coords")
    own = {
        "Qwen": packed
        | {"img_shapes": [[(1, 2, 8)]], "encoder_hidden_states_mask": torch.ones(1, text)},
        "Flux": packed
        | {"img_ids": ids, "txt_ids": torch.zeros(1, text, 4), "guidance": torch.ones(1)},
        "Aura": upright,
        "CogV": upright | {size: torch.ones(1, 2) for size in sizes},
    }
    given = {"timestep": torch.tensor([1.0]), "encoder_hidden_states": torch.randn(1, text, 32)}
    return given | own[type(denoiser).__name__[:4]]


@pytest.mark.parametrize("name", OTHERS)
def test_other_transformers_give_the_image_and_its_grid(name):
    build, hookpoint, text, place, before = OTHERS[name]
    torch.manual_seed(0)
    denoiser, seen = build().eval(), []
    denoiser.get_submodule(hookpoint).register_forward_hook(
        lambda m, args, out: seen.append(out if place is None else out[place])
    )
    with torch.no_grad():
        run = functools.partial(denoiser, **inputs_of(denoiser, text))
        [(tokens, call)] = heard(denoiser, TIMES, hookpoint, run)
    assert call.grid == (2, 8) and torch.equal(tokens, seen[0][:, before:])


def test_reference_images_beside_the_image_are_refused():
    denoiser = QWEN()
    run = functools.partial(denoiser, **inputs_of(denoiser, 9, reference=9))
    with pytest.raises(ValueError, match="image tokens is 25; .*2 × 8"):
        heard(denoiser, TIMES, "transformer_blocks.0", run)


def test_the_extra_pass_of_skip_layer_guidance_is_not_heard():
    asks, tap = asked("sd3", False), Tap("transformer_blocks.1", "update")
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_scale": 0.0}
    window = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}
    skipped = asks.record(tap, [0, 1, 2], **skipping, **window)
    torch.testing.assert_close(skipped, asks.record(tap, [0, 1, 2]), atol=1e-4, rtol=1e-4)


# with as many tokens of text as of the image, and what is no grid of tokens at all
NO_IMAGE = {
    "sd1": (
        {"height": 16, "width": 32},  # 32 tokens of text, 4×8 of the image
        ["attn2.to_k", "attn2.to_v"],
    ),
    "sdxl": ({}, ["add_embedding"]),
    "sd3": (
        {},
        [f"transformer_blocks.0.{n}" for n in ("ff_context", "attn.to_add_out")]
        + ["context_embedder", "time_text_embed"],
    ),
    "flux": (
        {"max_sequence_length": 16},
        [
            f"transformer_blocks.0.{n}"
            for n in ("ff_context", "attn.norm_q", "attn.to_add_out", "attn.add_k_proj")
        ]
        + ["context_embedder"],
    ),
    "pixart": ({}, ["caption_projection"]),
}


@pytest.mark.parametrize("model", NO_IMAGE)
def test_what_holds_no_image_tokens_has_no_shape_and_is_refused(model):
    more, names = NO_IMAGE[model]
    names = [f"{TOKENS}.{name}" if model == "sd1" else name for name in names]
    asks = asked(model, False)
    taps = [Tap(name, signal) for name in names for signal in SIGNALS]
    assert shapes(asks.pipe, taps, asks.prompts[0], **asks.sampling | more) == {}
    for signal in SIGNALS:
        with pytest.raises(ValueError, match=f"hookpoint is '{names[0]}'.*{signal}"):
            asks.record(Tap(names[0], signal), [0, 1], **more)
    assert hooks_on(asks.denoiser) == 0


def test_an_update_between_widths_is_refused_by_name():
    with pytest.raises(ValueError, match="hookpoint is 'down_blocks.1'.*update"):
        asked("sd1", False).record(Tap("down_blocks.1", "update"), [0, 1])


# the last module that holds a token of each place
LAST = {"sd3": "proj_out", "flux": "proj_out", "pixart": "proj_out", "dit": "proj_out_2"}


@pytest.mark.parametrize("model", pipelines.ALL)
def test_an_edited_token_changes_the_latents_at_its_upright_place(model, monkeypatch):
    asks = asked(model, model not in SQUARE_ONLY)
    finished = []
    if model != "ddpm":
        vae, decode = asks.pipe.vae, asks.pipe.vae.decode

        def noted(z, *args, **kwargs):
            finished.append(z.numpy().copy())
            return decode(z, *args, **kwargs)

        monkeypatch.setattr(vae, "decode", noted)

    def latents():
        images = asks.images()
        return finished.pop() if finished else images.transpose(0, 3, 1, 2)

    plain = latents()
    side = 2 if model in LAST else 1
    rows, columns = (n // side for n in plain.shape[2:])
    row, column = rows // 2, columns - 2

    def edit(tokens, call):
        assert call.grid == (rows, columns)
        if call.step == 2:
            tokens = tokens.clone()
            tokens[:, row * columns + column] += 0.5
            return tokens

    tap = LAST.get(model, "conv_out")
    with listen(asks.denoiser, asks.pipe.scheduler, tap, edit, n_images=2):
        changed = latents()
    for moved in (changed != plain).any(1):
        assert {(y // side, x // side) for y, x in np.argwhere(moved)} == {(row, column)}


# --- branches of guidance -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        f"sd1-{TUPLE}",
        "sdxl-up_blocks.0.attentions.1",
        "sd3-transformer_blocks.1",
        "pixart-transformer_blocks.1",
        "flux-transformer_blocks.1",
        "dit-transformer_blocks.0",
    ],
)
def test_each_branch_is_what_its_own_prompt_gives_without_guidance(name):
    fact = FACTS[name]
    asks = asked(fact.model, False)
    guided, plain = {"negative_prompt": "gray"}, {"guidance_scale": 1.0}
    if fact.model == "flux":  # its guidance_scale is an input of the network
        guided |= {"true_cfg_scale": 3.0, "guidance_scale": 2.0}
        plain = {"guidance_scale": 2.0}
    if fact.model == "dit":  # classes; 1000 stands for none
        guided = {}
    negative = ["1000" if fact.model == "dit" else "gray"] * 2
    taps = [Tap(fact.hookpoint, branch=branch) for branch in BRANCHES]
    # the first step alone: later latents differ under guidance
    sampling = asks.sampling | {"num_inference_steps": 2}
    _, both, _ = record_all(asks.pipe, asks.prompts, SEEDS, taps, [0], **sampling | guided)
    assert not torch.allclose(*both, atol=1e-3)
    for h, texts in zip(both, (asks.prompts, negative)):
        _, alone, _ = record(asks.pipe, texts, SEEDS, fact.hookpoint, [0], **sampling | plain)
        torch.testing.assert_close(h, alone, atol=1e-4, rtol=1e-4)


def test_two_calls_a_step_are_the_two_branches_of_flux():
    fact, asks = FACTS["flux-transformer_blocks.1"], asked("flux", True)
    taps = [Tap(fact.hookpoint, branch=branch) for branch in BRANCHES]
    guided = asks.sampling | {"true_cfg_scale": 2.0, "negative_prompt": "gray"}
    with naive(fact, asks.denoiser) as seen:
        _, h, _ = record_all(asks.pipe, asks.prompts, SEEDS, taps, [0, 1, 2], **guided)
    outputs = [output for output, _ in seen]
    assert len(outputs) == 6
    for i in range(2):
        assert torch.equal(h[i], torch.stack(outputs[i::2], 1))


@pytest.mark.parametrize(
    "name, scale",
    [(f"sd1-{TUPLE}", 1.0), ("flux-transformer_blocks.1", 3.0), ("ddpm-mid_block.attentions.0", 3)],
)
def test_without_guidance_there_is_no_unconditional_branch(name, scale):
    fact = FACTS[name]
    with pytest.raises(ValueError, match="branch is 'unconditional'"):
        tap = Tap(fact.hookpoint, branch="unconditional")
        asked(fact.model, False).record(tap, [0, 1], guidance_scale=scale)


# --- edits --------------------------------------------------------------------------------------


def bent(tokens, call=None):
    """A change that no layer norm undoes."""
    return tokens * torch.linspace(-1, 1, tokens.shape[-1]) + 1


@functools.cache
def plain_images(model):
    return asked(model, model not in SQUARE_ONLY).images()


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(
    "name",
    [
        f"sd1-{TUPLE}",
        f"sd1-{TOKENS}",
        "sd3-transformer_blocks.0",
        "sd3-transformer_blocks.0.attn",
        "flux-single_transformer_blocks.1.attn",
        "pixart-transformer_blocks.1",
        "dit-transformer_blocks.0",
        "ddpm-mid_block.attentions.0",
    ],
)
def test_an_edit_changes_the_image_as_a_naive_hook_does(name, signal):
    fact = FACTS[name]
    asks = asked(fact.model, fact.model not in SQUARE_ONLY)
    module = asks.denoiser.get_submodule(fact.hookpoint)

    def before(_, args, kwargs):
        new = fact.changed(fact.entering(args, kwargs), bent)
        if fact.enters == "hidden_states":
            return args, kwargs | {"hidden_states": new}
        return (new, *args[1:]), kwargs

    def after(_, args, kwargs, output):
        entering = fact.tokens(fact.entering(args, kwargs))
        change = bent if signal == "output" else lambda t: entering + bent(t - entering)
        new = fact.changed(fact.leaving(output), change)
        if fact.leaves is None:
            return new
        return tuple(new if i == fact.leaves else v for i, v in enumerate(output))

    if signal == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        expected = asks.images()
    finally:
        handle.remove()
    tap = Tap(fact.hookpoint, signal)
    with listen(asks.denoiser, asks.pipe.scheduler, tap, bent, n_images=2):
        edited = asks.images()
    change = np.abs(edited - plain_images(fact.model)).max()
    assert change > 1e-3 and np.abs(edited - expected).max() < change / 100


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_listener_that_returns_its_tokens_changes_no_image(pipe, signal):
    asks = asked("sd1", False)
    for hookpoint in (TOKENS, TUPLE):
        tap = Tap(hookpoint, signal)
        with listen(pipe.unet, pipe.scheduler, tap, lambda t, call: t, n_images=2):
            same = asks.images()
        if signal == "update":  # input + (output - input) is rounded
            np.testing.assert_allclose(same, asks.images(), atol=1e-5)
        else:
            assert np.array_equal(same, asks.images())


# --- hooks come and go --------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("where", ["on_call", "sampling"])
@pytest.mark.parametrize("signal, hooks_during", [("output", 2), ("input", 2), ("update", 3)])
def test_hooks_are_gone_after_an_exception(pipe, monkeypatch, where, signal, hooks_during):
    during = []

    def stop(*_, **__):
        during.append(hooks_on(pipe.unet))
        raise Stop

    if where == "sampling":
        monkeypatch.setattr(pipe.scheduler, "step", stop)
    on_call = stop if where == "on_call" else lambda t, call: None
    with pytest.raises(Stop), listen(pipe.unet, pipe.scheduler, Tap(TUPLE, signal), on_call):
        generate(pipe, ["a dog"], [0], **SAMPLING)
    assert during == [hooks_during]


@pytest.mark.usefixtures("no_hooks_left")
def test_hooks_are_gone_after_sampling(pipe):
    run = functools.partial(generate, pipe, ["a dog"], [0], **SAMPLING)
    assert len(heard(pipe.unet, pipe.scheduler, GRID, run)) == 3


def test_a_compiled_denoiser_is_refused():
    block, whole, forward = Toy(), Toy(), Toy()
    block.grid.compile()
    whole.compile()
    forward.forward = torch.compile(forward.forward)
    for compiled in (block, whole, forward, torch.compile(Toy())):
        with pytest.raises(ValueError, match="model is .*torch.compile"):
            heard(compiled, TIMES, "grid", lambda: None)
        assert hooks_on(compiled) == 0


# --- names --------------------------------------------------------------------------------------


def test_an_unknown_signal_is_named(toy):
    with pytest.raises(ValueError, match="signal is 'putout'"):
        heard(toy, TIMES, Tap("grid", "putout"), lambda: None)


def test_a_tap_is_a_tap_its_parts_or_the_name_of_a_module():
    tap = Tap("mid_block", "update", "unconditional")
    assert Tap.of(tap) == tap == Tap.of(list(tap))
    assert Tap.of("mid_block") == ("mid_block", "output", "conditional")


@pytest.mark.parametrize(
    "name, near",
    [
        ("mid_block.atentions.0", "mid_block.attentions.0"),
        ("", "attentions"),
        ("zzz", "attentions"),
    ],
)
def test_an_unknown_hookpoint_is_named_with_ones_that_exist(pipe, name, near):
    with pytest.raises(ValueError, match=f"hookpoint is '{name}'.*{near}"):
        hooks.find(pipe.unet, name)


def test_find_gives_the_module_of_that_name(pipe):
    assert hooks.find(pipe.unet, "mid_block.attentions.0") is pipe.unet.mid_block.attentions[0]


BLOCKS = ["transformer_blocks.0", "transformer_blocks.1"]
USUAL = {"sd3": BLOCKS, "flux": [*BLOCKS, *(f"single_{b}" for b in BLOCKS)], "dit": BLOCKS}


@pytest.mark.parametrize("model", USUAL)
def test_the_usual_hookpoints_of_transformers_are_their_blocks(model):
    assert sorted(hooks.usual(denoiser_of(built(model)))) == sorted(USUAL[model])


def test_the_usual_hookpoints_of_a_unet_are_not_inside_its_attentions(pipe):
    names = hooks.usual(pipe.unet)
    expected = {"down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.1.resnets.1"}
    assert expected <= set(names) and not any("transformer_blocks" in name for name in names)


def test_the_usual_hookpoints_of_other_denoisers():
    assert hooks.usual(AURA()) == ["joint_transformer_blocks.0", "single_transformer_blocks.0"]
    plain = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.ReLU()))
    assert hooks.usual(plain) == ["0", "1", "1.0"]
