"""Training the demo model: the autoencoder on drawn scenes, then the denoiser on its latents.

Text encoder and U-Net are trained together. Every batch is drawn from a generator seeded with
(seed, step), so a training that was stopped goes on, from its checkpoint, as if it had not been.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import Module, ModuleList
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from helpers.checks import in_range, refuse
from helpers.demo import world
from helpers.demo.model import MAX_TOKENS, encode, to_model
from helpers.files import load_tensors, save_tensors


@dataclass(frozen=True)
class Schedule:
    """How a network is trained; a checkpoint made with another schedule is refused."""

    steps: int  # batches in all
    batch_size: int  # scenes, or latents, in one of them
    seed: int = 0  # what batches and noise are drawn with, together with the step
    learning_rate: float = 1e-3  # peak: after 200 steps; then a cosine down to 1 % of it

    def __post_init__(self):
        in_range("steps", self.steps, 1)
        in_range("batch_size", self.batch_size, 1)
        in_range("learning_rate", self.learning_rate, 1e-8, 1)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < 200:
            return self.learning_rate * (step + 1) / 200
        done = (step - 200) / max(1, self.steps - 200)
        return self.learning_rate * (0.505 + 0.495 * math.cos(math.pi * done))


def train_autoencoder(pipe, schedule: Schedule, checkpoint) -> tuple[np.ndarray, float]:
    """Train `pipe.vae` on freshly drawn scenes, then set its `scaling_factor`.

    The loss is the mean absolute error, objects counted five times, plus 5e-4 times the mean KL
    divergence. The factor is 1 / standard deviation of the latents. Returns what `train` returns.
    """
    vae = pipe.vae.train()

    def loss_of(step):
        rng = np.random.default_rng([schedule.seed, 1, step])
        torch.manual_seed(schedule.seed * 1_000_003 + step)
        images, masks = world.render(world.sample(schedule.batch_size, rng, ("train",)), rng)
        x = to_model(images).to(vae.device)
        weight = 1 + 4 * torch.from_numpy(masks.max(axis=1, keepdims=True)).to(vae.device)
        with _autocast(vae.device):
            posterior = vae.encode(x).latent_dist
            x_hat = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + posterior.var.float() - 1 - logvar).mean()
        return ((x_hat.float() - x).abs() * weight).mean() + 5e-4 * kl

    result = train(ModuleList([vae]), loss_of, schedule, checkpoint, every=200, ema_decay=0.998)
    vae.eval()
    rng = np.random.default_rng([schedule.seed, 2])
    latents = encode(vae, world.render(world.sample(256, rng, ("train",)), rng)[0])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return result


def cache_latents(pipe, n: int, path, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Scaled latents, float16, (n, 4, 16, 16), of n training scenes, and their captions.

    Four captions a scene, each leaving something else open; caption i is of latent i mod n. Latents
    are encoded once, into the file `path`.
    """
    in_range("n", n, 1)
    rng = np.random.default_rng([seed, 3])
    scenes = world.sample(n, rng, ("train",))
    path = Path(path)
    if not path.exists():
        parts = []
        for i in tqdm(range(0, n, 512), desc="encoding scenes", disable=None):
            images, _ = world.render(scenes[i : i + 512], rng)
            with _autocast(pipe.vae.device):
                parts.append((encode(pipe.vae, images) * pipe.vae.config.scaling_factor).half())
        save_tensors(path, {"latents": torch.cat(parts)}, {"seed": seed})
    tensors, record = load_tensors(path)
    _refuse_others(path, record | {"n": len(tensors["latents"])}, {"n": n, "seed": seed})
    rng = np.random.default_rng([seed, 7])
    captions = [world.caption(world.leave_open(s, rng, 0.5)) for _ in range(4) for s in scenes]
    return tensors["latents"], captions


def train_denoiser(
    pipe,
    latents,
    captions,
    schedule: Schedule,
    checkpoint,
    *,
    drop_caption=0.1,
) -> tuple[np.ndarray, float]:
    """Train text encoder and U-Net to predict the noise in `latents`, (n, 4, 16, 16), scaled.

    Captions are as `cache_latents` gives them. A share `drop_caption` of them is replaced by the
    empty one, for classifier-free guidance. The error at a timestep of signal-to-noise ratio SNR is
    weighted by min(SNR + 1, 5) / SNR: Min-SNR-5 (Hang et al. 2023, arXiv:2303.09556) with a floor,
    without which the layout, decided at SNR < 0.1, is hardly learnt. Returns what `train` returns.
    """
    in_range("drop_caption", drop_caption, 0, 1)
    if not captions or len(captions) % len(latents):
        refuse("number of captions", len(captions), f"a multiple of {len(latents)}, the latents'")
    unet, text_encoder = pipe.unet.train(), pipe.text_encoder.train()
    padding = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True}
    ids = pipe.tokenizer([*captions, ""], return_tensors="pt", **padding).input_ids
    alphas = pipe.scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = (snr + 1).clamp(max=5) / snr
    device, n = unet.device, schedule.batch_size

    def loss_of(step):
        g = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
        pick = torch.randint(len(captions), (n,), generator=g)
        timesteps = torch.randint(len(alphas), (n,), generator=g)
        noise = torch.randn((n, *latents.shape[1:]), generator=g)
        dropped = torch.rand(n, generator=g) < drop_caption
        noisy = pipe.scheduler.add_noise(latents[pick % len(latents)].float(), noise, timesteps)
        said = torch.where(dropped[:, None], ids[-1], ids[pick]).to(device)
        with _attention(device):
            context = text_encoder(said)[0]
            with _autocast(device):
                predicted = unet(noisy.to(device), timesteps.to(device), context).sample
        error = (predicted.float() - noise.to(device)).pow(2).mean((1, 2, 3))
        return (weights[timesteps].to(device) * error).mean()

    network = ModuleList([text_encoder, unet])
    result = train(network, loss_of, schedule, checkpoint, every=250, ema_decay=0.999)
    network.eval()
    return result


def _autocast(device: torch.device):
    """bfloat16 on a CPU, and on a CUDA card that has it in hardware; float32 elsewhere."""
    has_it = device.type == "cpu"
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=has_it)


def _attention(device: torch.device):
    """On a CPU, attention in single products, whose gradient takes a fifth of the fused one's time.

    A training step of the demo model then takes three quarters of its time.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def train(
    network: Module, loss_of, schedule: Schedule, checkpoint, *, every: int, ema_decay: float
) -> tuple[np.ndarray, float]:
    """AdamW on `loss_of(step)`; returns losses, (step,), and seconds, of earlier calls included.

    The file `checkpoint` is written every `every` steps; if it is there, training goes on from it.
    `network` is left with an exponential moving average of its weights: decay `ema_decay`, but
    n / (n + 9) at first, at step n, so as to forget the initial weights. Raises FloatingPointError
    if the loss is not finite.
    """

    def update(averaged, current, n):
        get_ema_multi_avg_fn(min(ema_decay, int(n) / (int(n) + 9)))(averaged, current, n)

    checkpoint = Path(checkpoint)
    average = AveragedModel(network, multi_avg_fn=update)
    average.update_parameters(network)  # copies: the initial weights take part in the average
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=schedule.learning_rate, weight_decay=0.01, betas=(0.9, 0.99)
    )
    state = _state(network, average, optimiser)
    losses, seconds = [], 0.0
    if checkpoint.exists():
        saved, record = load_tensors(checkpoint)
        _refuse_others(checkpoint, record, asdict(schedule))
        losses, seconds = saved.pop("losses").tolist(), record["seconds"]
        for name, tensor in saved.items():
            state[name].copy_(tensor)
        for counter in (average.n_averaged, *(s["step"] for s in optimiser.state.values())):
            counter.add_(len(losses))
    shown = {"initial": len(losses), "mininterval": 2, "disable": None}
    bar = tqdm(desc=checkpoint.stem, total=schedule.steps, **shown)
    for step in range(len(losses), schedule.steps):
        start = time.perf_counter()
        optimiser.param_groups[0]["lr"] = schedule.rate(step)
        loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(network)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"{checkpoint.stem}: the loss is {losses[-1]} at step {step}")
        seconds += time.perf_counter() - start
        bar.update()
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            bar.set_postfix(loss=f"{np.mean(losses[-every:]):.4f}")
            record = asdict(schedule) | {"seconds": seconds}
            save_tensors(checkpoint, state | {"losses": torch.tensor(losses)}, record)
    network.load_state_dict(average.module.state_dict())
    return np.array(losses), seconds


def _state(network, average, optimiser) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, by name: weights, their average and AdamW's moments, from zero."""
    state = {}
    for (name, weight), mean in zip(network.named_parameters(), average.module.parameters()):
        first, second = torch.zeros_like(weight.data), torch.zeros_like(weight.data)
        adam = {"step": torch.tensor(0.0), "exp_avg": first, "exp_avg_sq": second}
        optimiser.state[weight] = adam
        tensors = {"weight": weight.data, "average": mean.data, "first": first, "second": second}
        state |= {f"{kind}.{name}": tensor for kind, tensor in tensors.items()}
    return state


def _refuse_others(path: Path, record: dict, wanted: dict) -> None:
    """ValueError, naming the parameter, if a file was made with another value of it."""
    for name, value in wanted.items():
        if record.get(name, value) != value:
            refuse(name, value, f"{record[name]!r}, as in {path.name}, or give another run")
