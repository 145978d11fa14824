"""The demo model: Stable Diffusion 1.5 in miniature.

The parts and their names are those of SD 1.5 (CLIP tokenizer and text model, AutoencoderKL, a U-Net
with cross-attention, scaled-linear betas, epsilon prediction, classifier-free guidance), so what
works on this model works on that one by changing a path. Only the sizes differ, and the first level
has no attention, which halves the cost on a CPU.
"""

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from helpers.demo import world
from helpers.files import load_json, save_json

MAX_TOKENS = 32  # of a prompt
MAX_BYTES = 25e6  # of the shipped weights: small enough to live in the repository


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each word of a caption; other words fall to bytes."""
    words = sorted({w for values in world.NAMED.values() for v in values for w in v.split()})
    merges = _merges([*words, "a", "an", "and", "at", "the", "on", "thing", "background"])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until every word is one token.

    Ties go to the pair whose parts came up first: the trainer in `tokenizers` breaks them anew in
    every process, which detaches trained embeddings from their words. Sennrich et al. (2016),
    arXiv:1508.07909.
    """
    split = [[*w[:-1], w[-1] + "</w>"] for w in words]
    order = {c: i for i, c in enumerate(sorted(set("".join(words))))}
    for parts in split:
        order.setdefault(parts[-1], len(order))
    merges = []
    while pairs := Counter(pair for parts in split for pair in zip(parts, parts[1:])):
        best = min(pairs, key=lambda p: (-pairs[p], order[p[0]], order[p[1]]))
        merges.append(best)
        order.setdefault("".join(best), len(order))
        for parts in split:
            for i in reversed(range(len(parts) - 1)):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
    return merges


def build(seed: int = 0) -> StableDiffusionPipeline:
    """An untrained pipeline, for `helpers.demo.train`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        **{name: getattr(tokenizer, name) for name in special},
    )
    text_encoder = CLIPTextModel(text)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=world.IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=world.IMAGE_SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    rest = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = DDIMScheduler(**schedule, **rest)  # SD 1.5's
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def save(pipe: StableDiffusionPipeline, folder) -> int:
    """Write a pipeline as float16 safetensors that load in any precision; returns their bytes."""
    folder = Path(folder)
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(folder, safe_serialization=True)
    # diffusers reads a U-Net in float32, transformers a text encoder as its configuration says
    config = folder / "text_encoder" / "config.json"
    save_json(config, load_json(config) | {"dtype": "float32"})
    files = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")]
    for path in files:
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    return sum(p.stat().st_size for p in files)


def to_model(images: np.ndarray) -> torch.Tensor:
    """Images (n, 64, 64, 3) in [0, 1] as the autoencoder takes them: (n, 3, 64, 64), in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1


@torch.no_grad()
def encode(vae, images: np.ndarray, batch_size: int = 64) -> torch.Tensor:
    """Mean latents, unscaled, (n, 4, 16, 16), float32 on the CPU, of images (n, 64, 64, 3)."""
    batches = to_model(images).split(batch_size)
    means = [vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mean for x in batches]
    return torch.cat([m.float().cpu() for m in means])


@torch.no_grad()
def decode(vae, latents: torch.Tensor, batch_size: int = 64) -> np.ndarray:
    """Images, (n, 64, 64, 3), float32 in [0, 1], of unscaled latents (n, 4, 16, 16)."""
    batches = latents.split(batch_size)
    images = [vae.decode(z.to(vae.device, vae.dtype)).sample.float().cpu() for z in batches]
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
