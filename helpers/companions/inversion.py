"""Features of a given image: DDIM run from the image to the noise, recorded on the way.

Song et al. (2021, arXiv:2010.02502): the sampler's steps in reverse, the noise predicted at x_t
serving for the step to the next noisier state, so that the model is asked about pairs (x_t, t) as
in sampling. The prompt it is asked with may be another than the one that made the image.
"""

import numpy as np
import torch
from diffusers import DDIMInverseScheduler

from helpers.checks import refuse
from helpers.trajectories import record


class _Reverse(DDIMInverseScheduler):
    """Timesteps ascend; `step` leads from x_t to the next noisier state, and keeps the noisiest.

    With `fresh` = (image, noise), latents, each state is the image with that same noise instead.
    """

    fresh = noisiest = None

    def step(self, model_output, timestep, sample, return_dict=True):
        above = int(timestep) + self.config.num_train_timesteps // self.num_inference_steps
        if above >= self.config.num_train_timesteps:  # sampling begins here
            self.noisiest = sample
            return (sample,)
        if self.fresh is not None:
            share = self.alphas_cumprod[above]
            return (share.sqrt() * self.fresh[0] + (1 - share).sqrt() * self.fresh[1],)
        return super().step(model_output, above, sample, return_dict=False)


def invert(pipe, images, prompts, tap, steps, *, fresh_noise: bool = False, **sampling):
    """Raw activations of given images, (image, step, token, channel), and the noise they lead to.

    images: float32, (image, height, width, 3), in [0, 1]. The noise, latents for the pipeline's
    call, makes them again, nearly, with the same prompts and guidance. With `fresh_noise`, the
    control, images are given noise of seeds 0, 1, … instead of what the model's predictions lead
    to. The rest is as in `record`. ValueError for a model without latents, and for a scheduler
    whose timesteps are not DDIM's.
    """
    if getattr(pipe, "vae", None) is None:
        refuse("model", type(pipe).__name__, "a pipeline with a `vae`, such as Stable Diffusion's")
    forward, n = pipe.scheduler, sampling["num_inference_steps"]
    reverse = _Reverse.from_config(forward.config)
    try:
        for scheduler in (forward, reverse):
            scheduler.set_timesteps(n)
        alike = forward.timesteps.tolist() == reverse.timesteps.flip(0).tolist()
    except ValueError:  # they are spaced as DDIM's cannot be
        alike = False
    if not alike:
        refuse("scheduler", type(forward).__name__, "one with DDIM's timesteps: DDIMScheduler")
    latents = encoded(pipe, images)
    if fresh_noise:
        made = [torch.Generator().manual_seed(i) for i in range(len(images))]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in made])
        reverse.fresh = latents, noise.to(latents)
    pipe.scheduler = reverse
    try:
        mirrored = [n - 1 - step for step in steps]
        given = (pipe, prompts, range(len(images)), tap, mirrored)
        _, h, _ = record(*given, latents=latents, **sampling)
    finally:
        pipe.scheduler = forward
    return h, reverse.noisiest


@torch.no_grad()
def encoded(pipe, images: np.ndarray) -> torch.Tensor:
    """Latents, scaled as the denoiser takes them, of images (image, height, width, 3) in [0, 1]."""
    vae, pixels = pipe.vae, torch.from_numpy(np.moveaxis(images, -1, 1)) * 2 - 1
    mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
    return (mean - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor


def shared(z, other) -> np.ndarray:
    """Of the codes active in one or the other, the share active in both: float, (image,).

    z, other: codes of the same tokens, (image, token, latent); NaN where none is active.
    """
    a, b = ((v != 0).flatten(1) for v in (z, other))
    return ((a & b).sum(1) / (a | b).sum(1)).cpu().numpy()
