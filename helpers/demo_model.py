"""The demo model: Stable Diffusion 1.5 in miniature, trained on `scenes`.

The parts and their names are those of SD 1.5 (CLIP tokenizer and text model, AutoencoderKL, a U-Net with
cross-attention, scaled-linear betas, epsilon prediction, classifier-free guidance), so whatever
works on this model works on that one by changing a path. Only the sizes differ, and the first
level has no attention, to halve the cost on a CPU.

Training is plain: the autoencoder on rendered scenes, then text encoder and U-Net together on cached
latents. Every batch is drawn from a generator seeded with (seed, step), so a run that was
stopped continues as if it had not been.
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from helpers import scenes
from helpers.files import load_tensors, save_tensors

MAX_TOKENS = 32


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the caption grammar is one token; other words fall to bytes."""
    words = sorted({w for values in scenes.ATTRIBUTES.values() for v in values for w in v.split()})
    words += ["a", "and", "at", "the", "on", "background"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator([words], trainers.BpeTrainer(end_of_word_suffix="</w>", vocab_size=2000, show_progress=False))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build(seed: int = 0) -> StableDiffusionPipeline:
    """An untrained pipeline, ready for `train_autoencoder` and `train_denoiser`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=scenes.IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=scenes.IMAGE_SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(  # SD 1.5's noise schedule
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def _to_model(images: np.ndarray) -> torch.Tensor:
    """Images in [0, 1], (n, height, width, 3) -> the autoencoder's input in [-1, 1], (n, 3, height, width)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1


def _rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Learning rate: linear warm-up, then a cosine down to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.505 + 0.495 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _train(modules, loss_of, steps, peak, checkpoint, every, ema_decay, label):
    """Adam on `loss_of(step)` with clipping, an exponential moving average, checkpoints and resume.

    Leaves the averaged weights in `modules`; returns the losses, (steps,), and the seconds spent.
    """
    checkpoint = Path(checkpoint)
    named = {f"{i}.{k}": p for i, m in enumerate(modules) for k, p in m.named_parameters()}
    average = {k: p.detach().clone() for k, p in named.items()}
    optimiser = torch.optim.AdamW(named.values(), lr=peak, weight_decay=0.01, betas=(0.9, 0.99))
    losses, seconds = [], 0.0
    if checkpoint.exists():
        saved, record = load_tensors(checkpoint)
        seconds, losses = record["seconds"], saved["losses"].tolist()
        moments = {}
        for i, (k, p) in enumerate(named.items()):
            p.data.copy_(saved[f"weight.{k}"])
            average[k].copy_(saved[f"average.{k}"])
            moments[i] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": saved[f"first.{k}"],
                "exp_avg_sq": saved[f"second.{k}"],
            }
        optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})

    def save():
        state = {f"weight.{k}": p for k, p in named.items()} | {f"average.{k}": a for k, a in average.items()}
        for k, p in named.items():
            if p in optimiser.state:
                state[f"first.{k}"] = optimiser.state[p]["exp_avg"]
                state[f"second.{k}"] = optimiser.state[p]["exp_avg_sq"]
            else:  # a parameter no loss has reached
                state[f"first.{k}"] = state[f"second.{k}"] = torch.zeros_like(p)
        save_tensors(checkpoint, state | {"losses": torch.tensor(losses)}, {"seconds": seconds})

    bar = tqdm(range(len(losses), steps), desc=label, initial=len(losses), total=steps, mininterval=2)
    for step in bar:
        start = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = _rate(step, steps, peak)
        loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimiser.step()
        with torch.no_grad():
            decay = min(ema_decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), list(named.values()), 1 - decay)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"{label}: the loss is {losses[-1]} at step {step}; the last checkpoint is {checkpoint}")
        seconds += time.perf_counter() - start
        if (step + 1) % every == 0 or step + 1 == steps:
            bar.set_postfix(loss=f"{np.mean(losses[-every:]):.4f}")
            save()
    for k, p in named.items():
        p.data.copy_(average[k])
    return np.array(losses), seconds


def train_autoencoder(pipe, steps: int, batch_size: int, checkpoint, seed: int = 0, learning_rate: float = 1e-3):
    """Train `pipe.vae` on freshly rendered scenes; set its `scaling_factor` to 1 / standard deviation of its latents.

    The loss is the mean absolute error, objects counted five times, plus 5e-4 × the mean KL divergence.
    Returns the losses (steps,) and the seconds spent.
    """
    vae = pipe.vae.train()

    def loss_of(step):
        rng = np.random.default_rng([seed, 1, step])
        torch.manual_seed(seed * 1_000_003 + step)
        images, masks = scenes.render(scenes.sample(batch_size, rng, ("train",)), rng)
        x = _to_model(images)
        weight = 1 + 4 * torch.from_numpy(masks.max(axis=1, keepdims=True))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            x_hat = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return ((x_hat.float() - x).abs() * weight).mean() + 5e-4 * kl

    result = _train([vae], loss_of, steps, learning_rate, checkpoint, 200, 0.998, "autoencoder")
    vae.eval()
    rng = np.random.default_rng([seed, 2])
    latents = encode(vae, scenes.render(scenes.sample(256, rng, ("train",)), rng)[0])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return result


@torch.no_grad()
def encode(vae, images: np.ndarray, batch_size: int = 64) -> torch.Tensor:
    """Mean latents, unscaled, (n, 4, 16, 16) float32, of images (n, 64, 64, 3) in [0, 1]."""
    return torch.cat(
        [vae.encode(_to_model(images[i : i + batch_size])).latent_dist.mean for i in range(0, len(images), batch_size)]
    )


def cache_latents(pipe, n: int, path, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Render n training scenes and encode them, once: scaled latents (n, 4, 16, 16) float16, and captions."""
    rng = np.random.default_rng([seed, 3])
    chosen = scenes.sample(n, rng, ("train",))
    path = Path(path)
    if not path.exists():
        parts = []
        for i in tqdm(range(0, n, 512), desc="encoding scenes"):
            images, _ = scenes.render(chosen[i : i + 512], rng)
            with torch.autocast("cpu", torch.bfloat16):
                parts.append((encode(pipe.vae, images).float() * pipe.vae.config.scaling_factor).half())
        save_tensors(path, {"latents": torch.cat(parts)})
    return load_tensors(path)[0]["latents"], [scenes.caption(s) for s in chosen]


def train_denoiser(
    pipe, latents, captions, steps: int, batch_size: int, checkpoint, seed: int = 0, learning_rate: float = 1e-3,
    drop_caption: float = 0.1,
):  # fmt: skip
    """Train text encoder and U-Net together to predict the noise in `latents`, (n, 4, 16, 16), scaled.

    A share `drop_caption` of the captions is replaced by the empty one, for classifier-free guidance. The error
    at a timestep of signal-to-noise ratio SNR is weighted by min(SNR + 0.1, 5) / SNR: Min-SNR-5 (Hang et
    al. 2023, arXiv:2303.09556) with a floor, without which the layout, decided at SNR < 0.1, is hardly learnt.
    Returns the losses (steps,) and the seconds spent.
    """
    unet, text_encoder = pipe.unet.train(), pipe.text_encoder.train()
    ids = pipe.tokenizer(
        [*captions, ""], padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    alphas = pipe.scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = (snr + 0.1).clamp(max=5) / snr

    def loss_of(step):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pick = torch.randint(len(captions), (batch_size,), generator=g)
        timesteps = torch.randint(len(alphas), (batch_size,), generator=g)
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=g)
        dropped = torch.rand(batch_size, generator=g) < drop_caption
        clean = latents[pick].float()
        noisy = pipe.scheduler.add_noise(clean, noise, timesteps)
        context = text_encoder(torch.where(dropped[:, None], ids[-1], ids[pick]))[0]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, timesteps, context).sample
        error = (predicted.float() - noise).pow(2).mean((1, 2, 3))
        return (weights[timesteps] * error).mean()

    result = _train([text_encoder, unet], loss_of, steps, learning_rate, checkpoint, 250, 0.999, "denoiser")
    unet.eval(), text_encoder.eval()
    return result


def save(pipe, folder) -> None:
    """Write the pipeline as float16 safetensors; `StableDiffusionPipeline.from_pretrained(folder)` reads it."""
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(folder, safe_serialization=True)
