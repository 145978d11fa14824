import numpy as np
import pytest
import torch
from conftest import TOKENS, built, hooks_on
from diffusers import EulerDiscreteScheduler

from helpers.companions import inversion
from helpers.companions.inversion import encoded, invert, shared

SAMPLING = {"num_inference_steps": 5, "guidance_scale": 1.0}
STEPS = [0, 2, 4]


def images_of(n=2):
    return np.random.default_rng(0).random((n, 16, 16, 3), np.float32)


def naive(pipe, images, prompts, unit):
    """DDIM's formula backwards, a line a step: states, noisiest last, and what a unit heard."""
    x, heard, states = encoded(pipe, images), [], []
    text = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    handle = unit.register_forward_hook(lambda *a: heard.append(a[2].clone()))
    alphas, times = pipe.scheduler.alphas_cumprod, [1, 201, 401, 601, 801]
    with torch.no_grad():
        for t in times:
            noise = pipe.unet(x, t, encoder_hidden_states=text).sample
            states.append(x)
            a, b = alphas[t], alphas[min(t + 200, 999)]
            x = b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
    handle.remove()
    return states, heard


def test_inversion_is_ddims_formula_backwards(pipe, prompts, no_hooks_left):
    images, forward = images_of(), pipe.scheduler
    states, heard = naive(pipe, images, prompts[:2], pipe.unet.get_submodule(TOKENS))
    h, noise = invert(pipe, images, prompts[:2], TOKENS, STEPS, **SAMPLING)
    assert pipe.scheduler is forward
    torch.testing.assert_close(noise, states[-1], atol=1e-4, rtol=1e-4)
    wanted = torch.stack([heard[4 - step] for step in STEPS], dim=1)
    torch.testing.assert_close(h, wanted, atol=1e-4, rtol=1e-4)


def test_many_steps_lead_to_the_noise_that_makes_the_latents_and_fresh_noise_does_not(
    pipe, prompts, monkeypatch
):
    many = {"num_inference_steps": 50, "guidance_scale": 1.0}
    made = many | {"prompt": prompts[:2], "output_type": "latent"}
    drawn = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    latents = pipe(**made, latents=drawn).images
    monkeypatch.setattr(inversion, "encoded", lambda *_: latents)  # a random VAE inverts nothing
    error = {}
    for fresh in (False, True):
        _, noise = invert(pipe, images_of(), prompts[:2], TOKENS, [0], fresh_noise=fresh, **many)
        error[fresh] = float((pipe(**made, latents=noise).images - latents).pow(2).mean())
    assert error[False] < 0.1 * error[True]


def test_fresh_noise_is_the_image_and_noise_in_the_schedulers_shares(pipe, prompts):
    images = images_of()
    _, noise = invert(pipe, images, prompts[:2], TOKENS, [0], fresh_noise=True, **SAMPLING)
    share = pipe.scheduler.alphas_cumprod[801]
    drawn = torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(1))
    wanted = share.sqrt() * encoded(pipe, images)[1] + (1 - share).sqrt() * drawn
    torch.testing.assert_close(noise[1], wanted)


def test_what_cannot_be_inverted_is_refused(pipe, prompts):
    ddpm = built("ddpm")
    with pytest.raises(ValueError, match="model is 'DDPMPipeline'; .*vae"):
        invert(ddpm, images_of(), [""] * 2, TOKENS, [0], **SAMPLING)
    forward = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(forward.config, timestep_spacing="linspace")
    try:
        with pytest.raises(ValueError, match="EulerDiscreteScheduler.*DDIM"):
            invert(pipe, images_of(), prompts[:2], TOKENS, [0], **SAMPLING)
    finally:
        pipe.scheduler = forward
    assert hooks_on(pipe.unet) == 0


def test_shared_codes_by_hand():
    z = torch.tensor([[[1.0, 0, 2]], [[0, 0, 0]]])
    other = torch.tensor([[[3.0, 1, 0]], [[0, 0, 0]]])
    assert shared(z, z)[0] == 1 and shared(z, other)[0] == pytest.approx(1 / 3)
    assert np.isnan(shared(z, other)[1])
