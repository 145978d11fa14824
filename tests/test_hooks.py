import pytest
import torch
from conftest import GRID, SAMPLING, TOKENS, TUPLE, hooks_on
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModelOutput

from helpers import hooks, trajectories

HEIGHT, WIDTH = 8, 16


class Layer(torch.nn.Module):
    """Passes a grid (row, channel, height, width) on in one of the forms that denoisers' layers use."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        if self.form == "tokens":
            return x.flatten(2).transpose(1, 2)
        return {"grid": x, "tuple": (x, "kept"), "output": Transformer2DModelOutput(sample=x), "flat": x.flatten(1)}[self.form]


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for form in ("grid", "tuple", "output", "tokens", "flat"):
            setattr(self, form, Layer(form))
        self.coarse = Layer("tokens")

    def forward(self, sample, timestep):
        out = {form: getattr(self, form)(sample) for form in ("grid", "tuple", "output", "tokens", "flat")}
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
    return torch.stack([torch.stack([100 * y + x, torch.full_like(x, i)]) for i in range(rows)]).float()


FORMS = ["grid", "tuple", "output", "tokens"]


@pytest.mark.parametrize("form", FORMS)
def test_tokens_come_in_reading_order_of_an_upright_grid(toy, scheduler, form):
    seen = []
    with hooks.listen(toy, scheduler, form, 2, lambda tokens, call: seen.append((tokens, call.grid))):
        toy(numbered(), scheduler.timesteps[0])
    tokens, grid = seen[0]
    assert grid == (HEIGHT, WIDTH) and tokens.shape == (2, HEIGHT * WIDTH, 2)
    assert tokens[1, 3 * WIDTH + 11].tolist() == [311, 1]


def test_a_coarser_layers_grid_keeps_the_latents_proportion(toy, scheduler):
    seen = []
    with hooks.listen(toy, scheduler, "coarse", 2, lambda tokens, call: seen.append((tokens, call.grid))):
        toy(numbered(), scheduler.timesteps[0])
    tokens, grid = seen[0]
    assert grid == (4, 8)
    assert tokens[0, 2 * 8 + 5, 0] == 410


@pytest.mark.parametrize("form", FORMS)
def test_what_on_call_returns_takes_the_place_of_one_token(toy, scheduler, form):
    def edit(tokens, call):
        tokens = tokens.clone()
        tokens[1, 2 * WIDTH + 5] = -1
        return tokens

    with hooks.listen(toy, scheduler, form, 2, edit):
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


def test_a_layer_without_tokens_is_refused_by_name(toy, scheduler):
    with pytest.raises(ValueError, match="hookpoint 'flat'"), hooks.listen(toy, scheduler, "flat", 2, lambda *_: None):
        toy(numbered(), scheduler.timesteps[0])


@pytest.mark.parametrize("n_images, branches", [(2, 1), (1, 2)])
def test_branches_are_told_from_the_number_of_images(toy, scheduler, n_images, branches):
    seen = []
    with hooks.listen(toy, scheduler, "grid", n_images, lambda t, call: seen.append((hooks.conditional(t, call), call))):
        toy(numbered(), scheduler.timesteps[0])
    rows, call = seen[0]
    assert call.branches == branches
    assert rows[:, 0, 1].tolist() == [[0, 1], [1]][branches - 1]


def test_the_step_is_read_from_the_timestep_not_counted(toy, scheduler):
    seen = []
    with hooks.listen(toy, scheduler, "grid", 2, lambda t, call: seen.append((call.step, call.timestep, call.repeated))):
        for step in (3, 0, 0, 4):
            toy(sample=numbered(), timestep=scheduler.timesteps[step])
    timesteps = scheduler.timesteps.tolist()
    assert seen == [(3, timesteps[3], False), (0, timesteps[0], False), (0, timesteps[0], True), (4, timesteps[4], False)]


@pytest.mark.parametrize(
    "scheduler_class, options, steps, repeated",
    [
        (DDIMScheduler, {}, [0, 1, 2, 3], []),
        (EulerDiscreteScheduler, {}, [0, 1, 2, 3], []),
        (DPMSolverMultistepScheduler, {}, [0, 1, 2, 3], []),
        (PNDMScheduler, {"skip_prk_steps": True}, [0, 1, 1, 2, 3], [2]),
        (HeunDiscreteScheduler, {}, [0, 1, 1, 2, 2, 3, 3], [2, 4, 6]),
    ],
)
def test_steps_under_schedulers_that_call_once_or_twice(pipe, prompts, monkeypatch, scheduler_class, options, steps, repeated):
    monkeypatch.setattr(pipe, "scheduler", scheduler_class.from_config(pipe.scheduler.config, **options))
    seen = []
    sampling = SAMPLING | {"num_inference_steps": 4}
    trajectories.generate(pipe, prompts[:1], [0], hookpoint=GRID, on_call=lambda t, c: seen.append(c), **sampling)
    timesteps = pipe.scheduler.timesteps.tolist()
    assert [c.step for c in seen] == steps
    assert [i for i, c in enumerate(seen) if c.repeated] == repeated
    assert [c.timestep for c in seen] == timesteps
    assert len(hooks.steps_of(pipe.scheduler)) == 4
    assert timesteps == sorted(timesteps, reverse=True)


class Stop(Exception):
    pass


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("where", ["on_call", "sampling"])
def test_hooks_are_gone_after_an_exception(pipe, prompts, monkeypatch, where):
    during = []

    def stop(*_, **__):
        during.append(hooks_on(pipe.unet))
        raise Stop

    if where == "sampling":
        monkeypatch.setattr(pipe.scheduler, "step", stop)
    on_call = stop if where == "on_call" else lambda t, c: None
    with pytest.raises(Stop):
        trajectories.generate(pipe, prompts[:1], [0], hookpoint=TUPLE, on_call=on_call, **SAMPLING)
    assert during == [2]


@pytest.mark.usefixtures("no_hooks_left")
def test_hooks_are_gone_after_sampling(pipe, prompts):
    calls = []
    trajectories.generate(pipe, prompts[:1], [0], hookpoint=TOKENS, on_call=lambda t, c: calls.append(c), **SAMPLING)
    assert len(calls) == 3


def test_a_listener_that_returns_its_tokens_changes_no_image(pipe, prompts):
    plain = trajectories.generate(pipe, prompts[:2], [0, 1], **SAMPLING)
    for hookpoint in (GRID, TUPLE, TOKENS):
        heard = trajectories.generate(pipe, prompts[:2], [0, 1], hookpoint=hookpoint, on_call=lambda t, c: t, **SAMPLING)
        assert (heard == plain).all(), hookpoint


@pytest.mark.parametrize(
    "name, near", [("mid_block.atentions.0", "mid_block.attentions.0"), ("", "attentions"), ("zzz", "attentions")]
)
def test_an_unknown_hookpoint_is_named_with_ones_that_exist(pipe, name, near):
    with pytest.raises(ValueError) as refused:
        hooks.find(pipe.unet, name)
    assert repr(name) in str(refused.value) and near in str(refused.value)


def test_find_gives_the_module_of_that_name(pipe):
    assert hooks.find(pipe.unet, "mid_block.attentions.0") is pipe.unet.mid_block.attentions[0]


def test_the_denoiser_is_the_unet_or_the_transformer(pipe):
    class Transformers:
        unet = None
        transformer = torch.nn.Linear(1, 1)

    assert hooks.denoiser_of(pipe) is pipe.unet
    assert hooks.denoiser_of(Transformers()) is Transformers.transformer
    with pytest.raises(ValueError, match="model object"):
        hooks.denoiser_of(object())
