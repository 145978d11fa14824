import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn import Linear, ModuleList, Parameter

from helpers.demo import model, train, world
from helpers.demo.train import Schedule
from helpers.files import load_tensors


def small_network():
    torch.manual_seed(0)
    return ModuleList([Linear(3, 2), Linear(2, 1)])


def losses_of(network, schedule, stop_at=None):
    """A loss whose batch follows from seed and step; it stops the training at one step."""

    def loss_of(step):
        if step == stop_at:
            raise KeyboardInterrupt
        g = torch.Generator().manual_seed(schedule.seed * 1000 + step)
        x = torch.randn(schedule.batch_size, 3, generator=g)
        return (network[1](torch.tanh(network[0](x))) - x.sum(1, keepdim=True)).pow(2).mean()

    return loss_of


def trained(schedule, checkpoint, stop_at=None):
    network = small_network()
    loss_of = losses_of(network, schedule, stop_at)
    losses, _ = train.train(network, loss_of, schedule, checkpoint, every=4, ema_decay=0.5)
    return network.state_dict(), losses


SCHEDULE = Schedule(steps=11, batch_size=4, seed=3, learning_rate=0.1)


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    weights, losses = trained(SCHEDULE, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(SCHEDULE, tmp_path / "stopped", stop_at=10)
    assert len(load_tensors(tmp_path / "stopped")[0]["losses"]) == 8
    weights_again, losses_again = trained(SCHEDULE, tmp_path / "stopped")
    np.testing.assert_allclose(losses_again, losses, rtol=1e-6)  # a checkpoint holds float32
    whole, stopped = (load_tensors(tmp_path / name)[0] for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_a_finished_training_is_not_repeated(tmp_path):
    weights, losses = trained(SCHEDULE, tmp_path / "c")
    before = (tmp_path / "c").stat().st_mtime_ns
    weights_again, losses_again = trained(SCHEDULE, tmp_path / "c", stop_at=0)
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert len(losses_again) == 11 and (tmp_path / "c").stat().st_mtime_ns == before


def test_the_weights_left_are_a_moving_average_of_the_weights_trained(tmp_path):
    """Against plain loops: Adam with decoupled decay, clipped gradients, warm-up, average."""
    network = small_network()
    loss_of = losses_of(network, SCHEDULE)
    weights = list(network.parameters())
    average = [w.detach().clone() for w in weights]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(SCHEDULE.steps):
        grads = torch.autograd.grad(loss_of(step), weights)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        rate, decay = 0.1 * (step + 1) / 200, min(0.5, (step + 1) / (step + 10))
        for i, (w, g) in enumerate(zip(weights, grads)):
            g = g * min(1.0, 1 / (norm + 1e-6))
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.99 * second[i] + 0.01 * g**2
            m, v = first[i] / (1 - 0.9 ** (step + 1)), second[i] / (1 - 0.99 ** (step + 1))
            w.data = w.data * (1 - 0.01 * rate) - rate * m / (v.sqrt() + 1e-8)
            average[i] = decay * average[i] + (1 - decay) * w.data
    left, _ = trained(SCHEDULE, tmp_path / "c")
    for a, b in zip(average, left.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, value", [("batch_size", 3), ("seed", 1), ("learning_rate", 0.01), ("steps", 12)]
)
def test_a_checkpoint_made_otherwise_is_refused_by_name(tmp_path, name, value):
    trained(SCHEDULE, tmp_path / "c")
    other = Schedule(**{**vars(SCHEDULE), name: value})
    with pytest.raises(ValueError, match=f"^{name} is {value}; .*{getattr(SCHEDULE, name)}"):
        trained(other, tmp_path / "c")


@pytest.mark.parametrize(
    "name, value", [("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", 2)]
)
def test_a_schedule_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}"):
        Schedule(**({"steps": 2, "batch_size": 2} | {name: value}))


def test_the_learning_rate_rises_and_falls_as_a_cosine():
    schedule = Schedule(steps=1200, batch_size=1, learning_rate=0.01)
    rates = [schedule.rate(step) for step in (0, 99, 199, 200, 700, 1200)]
    np.testing.assert_allclose(rates, [0.00005, 0.005, 0.01, 0.01, 0.00505, 0.0001])


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    network = small_network()
    bad = lambda step: network[0].weight.sum() * (float("nan") if step == 2 else 1)  # noqa: E731
    with pytest.raises(FloatingPointError, match="nan at step 2"):
        train.train(network, bad, SCHEDULE, tmp_path / "c", every=4, ema_decay=0.5)


class PredictsNothing(torch.nn.Module):
    """A U-Net that predicts noise of zero, whatever it is given."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = Parameter(torch.zeros(()))

    def forward(self, noisy, timesteps, context):
        return SimpleNamespace(sample=noisy * 0 + self.weight * 0)


class TextEncoder(torch.nn.Module):
    """Remembers the tokens it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.given = Parameter(torch.zeros(())), []

    def forward(self, ids):
        self.given.append(ids)
        return (self.weight * 0,)


@pytest.fixture
def blind():
    """A pipeline whose denoiser sees nothing, so that its losses can be worked out."""
    return SimpleNamespace(
        unet=PredictsNothing(),
        text_encoder=TextEncoder(),
        tokenizer=model.build_tokenizer(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear"),
    )


LATENTS = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
CAPTIONS = [f"a red circle{' at' * i}" for i in range(8)]


def test_the_noise_error_is_weighted_by_the_signal_to_noise_ratio(blind, tmp_path):
    schedule = Schedule(steps=4, batch_size=5, seed=2)
    losses, _ = train.train_denoiser(blind, LATENTS, CAPTIONS, schedule, tmp_path / "c")
    alphas = blind.scheduler.alphas_cumprod
    for step, loss in enumerate(losses):
        g = torch.Generator().manual_seed(2 * 1_000_003 + step)
        torch.randint(8, (5,), generator=g)  # which latents
        timesteps = torch.randint(1000, (5,), generator=g)
        noise = torch.randn((5, 4, 8, 8), generator=g)
        expected = 0.0
        for t, e in zip(timesteps, noise):
            snr = alphas[t] / (1 - alphas[t])
            expected += min(snr + 1, 5) / snr * e.pow(2).mean() / 5
        assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("share, empty", [(0.0, 0), (1.0, 40), (0.5, range(8, 33))])
def test_a_share_of_captions_is_dropped(blind, tmp_path, share, empty):
    schedule = Schedule(steps=4, batch_size=10)
    train.train_denoiser(blind, LATENTS, CAPTIONS, schedule, tmp_path / "c", drop_caption=share)
    lengths = (torch.cat(blind.text_encoder.given) != blind.tokenizer.pad_token_id).sum(1)
    assert int((lengths == 1).sum()) in ([empty] if isinstance(empty, int) else empty)


def test_what_cannot_be_is_refused_by_name(blind, tmp_path):
    with pytest.raises(ValueError, match="drop_caption is 1.5"):
        train.train_denoiser(
            blind, LATENTS, CAPTIONS, Schedule(2, 2), tmp_path / "c", drop_caption=1.5
        )
    with pytest.raises(ValueError, match="captions is 3"):
        train.train_denoiser(blind, LATENTS, CAPTIONS[:3], Schedule(2, 2), tmp_path / "c")


def test_a_denoiser_learns_and_is_left_ready_to_draw(pipe, tmp_path):
    pipe = copy.deepcopy(pipe)
    before = pipe.unet.conv_in.weight.detach().clone(), pipe.vae.decoder.conv_in.weight.clone()
    captions = ["a red circle at the left"] * 8
    train.train_denoiser(pipe, LATENTS, captions, Schedule(2, 2), tmp_path / "c")
    assert not torch.equal(pipe.unet.conv_in.weight, before[0])
    assert torch.equal(pipe.vae.decoder.conv_in.weight, before[1])
    assert not pipe.unet.training and not pipe.text_encoder.training


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A pipeline whose autoencoder was trained for two steps, its folder, and the scenes it saw."""
    pipe, folder = model.build(0), tmp_path_factory.mktemp("autoencoder")
    seen, sample = [], world.sample

    def remember(n, *args):
        seen.extend(scenes := sample(min(n, 32), *args))  # fewer than 256 for the scaling factor
        return scenes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "sample", remember)
        train.train_autoencoder(pipe, Schedule(2, 2, 5), folder / "c")
    return pipe, folder, seen


def test_the_autoencoder_sees_training_scenes_alone(autoencoder):
    _, _, seen = autoencoder
    assert len(set(seen)) > 30 and {world.split(s) for s in seen} == {"train"}


def said(scene):
    """All that a caption could name of a scene; None where it does not."""
    things = [getattr(o, a) for o in scene.objects for a in world.NAMED if a != "background"]
    return [scene.background, *things]


def test_latents_are_drawn_once_and_have_about_unit_spread(autoencoder, monkeypatch):
    pipe, folder, _ = autoencoder
    latents, captions = train.cache_latents(pipe, 40, folder / "latents", seed=1)
    assert latents.shape == (40, 4, 16, 16) and latents.dtype == torch.float16
    assert latents.float().std() == pytest.approx(1, abs=0.2)
    assert len(captions) == 160 and len(set(captions)) > 80  # four of each scene
    told = [world.parse(c) for c in captions]
    assert "held_out" not in {world.split(s) for s in told}
    complete = [s for s in told if s.objects and None not in said(s)]
    assert 3 < len(complete) and {world.split(s) for s in complete} == {"train"}
    for first, *others in zip(*(told[i : i + 40] for i in range(0, 160, 40))):
        places = {s.background for s in (first, *others)} - {None}
        assert len(places) <= 1  # of one scene, the latent's
    monkeypatch.setattr(world, "render", None)  # not drawn again
    again, captions_again = train.cache_latents(pipe, 40, folder / "latents", seed=1)
    assert torch.equal(latents, again) and captions == captions_again
    for other in ({"n": 41, "seed": 1}, {"n": 40, "seed": 2}):
        with pytest.raises(ValueError, match="^(n is 41|seed is 2);"):
            train.cache_latents(pipe, path=folder / "latents", **other)
