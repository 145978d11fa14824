"""The demo model: Stable Diffusion 1.5 in miniature, trained on `scenes`.

The parts and their names are those of SD 1.5 (CLIP tokenizer and text model, AutoencoderKL, a U-Net with
cross-attention, scaled-linear betas, epsilon prediction, classifier-free guidance), so whatever
works on this model works on that one by changing a path. Only the sizes differ, and the first
level has no attention, to halve the cost on a CPU.

Training is plain: the autoencoder on rendered scenes, then text encoder and U-Net together on cached
latents. Every batch is drawn from a generator seeded with (seed, step), so a run that was
stopped continues as if it had not been.

Judging is counting: the reader of `scenes` looks at generated images and `judge` compares what it found
with what the caption asked for, on captions that no training batch contained.
"""

from __future__ import annotations

import copy
import functools
import math
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from helpers.demo import world as scenes
from helpers.files import load_tensors, save_tensors
from helpers.measure import metrics
from helpers.run.folder import require
from helpers.trajectories import generate

MAX_TOKENS = 32
MAX_BYTES = 25e6  # of the shipped weights: small enough to live in the repository
AIMS = {  # share that should be right, over all captions judged; 'all' (the whole scene) over those with one object
    "colour_at_place": 0.95,
    "position": 0.95,
    "shape": 0.90,
    "size": 0.90,
    "texture": 0.80,
    "all": 0.75,
}
NAMES = {
    "colour_at_place": "colour at its place",
    "count": "number of objects",
    "all": "everything at once",
}


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the caption grammar is one token; other words fall to bytes."""
    words = sorted({w for values in scenes.ATTRIBUTES.values() for v in values for w in v.split()})
    words += ["a", "and", "at", "the", "on", "background"]
    merges = _merges(words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (
        alphabet
        + [c + "</w>" for c in alphabet]
        + ["".join(m) for m in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token, the most frequent pair first (Sennrich et al. 2016, arXiv:1508.07909).

    Ties go to the pair whose parts came up first. (The trainer in `tokenizers` breaks them differently in every process, and then a
    checkpoint's token embeddings no longer belong to the words they were trained for.)
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


# --- training -----------------------------------------------------------------------------------


def _to_model(images: np.ndarray) -> torch.Tensor:
    """Images in [0, 1], (n, height, width, 3) -> the autoencoder's input in [-1, 1], (n, 3, height, width)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1


def _autocast(device: torch.device):
    """bfloat16 on a CPU, and on a CUDA card that has it in hardware; float32 elsewhere."""
    has_it = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=has_it)


def _rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Learning rate: linear warm-up, then a cosine down to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.505 + 0.495 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _refuse_others(path: Path, made_with: dict, wanted: dict) -> None:
    """ValueError, naming the parameter, if the file at `path` says that it was made with another value of it."""
    for name, value in wanted.items():
        if made_with.get(name, value) != value:
            raise ValueError(
                f"{name} is {value}, but {path.name} was made with {made_with[name]}; give that value or another run name"
            )


def _train(modules, loss_of, steps, batch_size, seed, peak, checkpoint, every, ema_decay, label):
    """Adam on `loss_of(step)` with clipping, an exponential moving average, checkpoints and resume.

    Leaves the averaged weights in `modules`; returns the losses, (steps,), and the seconds spent. Raises
    ValueError, naming the parameter, for a value out of range or other than the checkpoint's.
    """
    require("steps", steps, 1)
    require("batch_size", batch_size, 1)
    require("learning_rate", peak, 1e-8, 1)
    checkpoint = Path(checkpoint)
    settings = {"steps": steps, "batch_size": batch_size, "seed": seed, "learning_rate": peak}
    named = {f"{i}.{k}": p for i, m in enumerate(modules) for k, p in m.named_parameters()}
    average = {k: p.detach().clone() for k, p in named.items()}
    optimiser = torch.optim.AdamW(named.values(), lr=peak, weight_decay=0.01, betas=(0.9, 0.99))
    losses, seconds = [], 0.0
    if checkpoint.exists():
        saved, record = load_tensors(checkpoint)
        seconds, losses = record["seconds"], saved["losses"].tolist()
        _refuse_others(checkpoint, record, settings)
        if len(losses) > steps:
            raise ValueError(
                f"steps is {steps}, but {checkpoint.name} holds {len(losses)}; give at least that or another run name"
            )
        moments = {}
        for i, (k, p) in enumerate(named.items()):
            p.data.copy_(saved[f"weight.{k}"])
            average[k].copy_(saved[f"average.{k}"])
            moments[i] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": saved[f"first.{k}"],
                "exp_avg_sq": saved[f"second.{k}"],
            }
        optimiser.load_state_dict(
            {"state": moments, "param_groups": optimiser.state_dict()["param_groups"]}
        )

    def save():
        state = {f"weight.{k}": p for k, p in named.items()} | {
            f"average.{k}": a for k, a in average.items()
        }
        for k, p in named.items():
            if p in optimiser.state:
                state[f"first.{k}"] = optimiser.state[p]["exp_avg"]
                state[f"second.{k}"] = optimiser.state[p]["exp_avg_sq"]
            else:  # a parameter no loss has reached
                state[f"first.{k}"] = state[f"second.{k}"] = torch.zeros_like(p)
        save_tensors(
            checkpoint, state | {"losses": torch.tensor(losses)}, settings | {"seconds": seconds}
        )

    bar = tqdm(
        range(len(losses), steps), desc=label, initial=len(losses), total=steps, mininterval=2
    )
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
            raise FloatingPointError(
                f"{label}: the loss is {losses[-1]} at step {step}; the last checkpoint is {checkpoint}"
            )
        seconds += time.perf_counter() - start
        if (step + 1) % every == 0 or step + 1 == steps:
            bar.set_postfix(loss=f"{np.mean(losses[-every:]):.4f}")
            save()
    for k, p in named.items():
        p.data.copy_(average[k])
    return np.array(losses), seconds


def train_autoencoder(
    pipe, steps: int, batch_size: int, checkpoint, seed: int = 0, learning_rate: float = 1e-3
):
    """Train `pipe.vae` on freshly rendered scenes; set its `scaling_factor` to 1 / standard deviation of its latents.

    The loss is the mean absolute error, objects counted five times, plus 5e-4 × the mean KL divergence.
    Returns the losses (steps,) and the seconds spent, with those of the checkpoint it goes on from.
    """
    vae = pipe.vae.train()

    def loss_of(step):
        rng = np.random.default_rng([seed, 1, step])
        torch.manual_seed(seed * 1_000_003 + step)
        images, masks = scenes.render(scenes.sample(batch_size, rng, ("train",)), rng)
        x = _to_model(images).to(vae.device)
        weight = 1 + 4 * torch.from_numpy(masks.max(axis=1, keepdims=True)).to(vae.device)
        with _autocast(vae.device):
            posterior = vae.encode(x).latent_dist
            x_hat = vae.decode(posterior.sample()).sample
        kl = (
            0.5
            * (
                posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()
            ).mean()
        )
        return ((x_hat.float() - x).abs() * weight).mean() + 5e-4 * kl

    result = _train(
        [vae],
        loss_of,
        steps,
        batch_size,
        seed,
        learning_rate,
        checkpoint,
        200,
        0.998,
        "autoencoder",
    )
    vae.eval()
    rng = np.random.default_rng([seed, 2])
    latents = encode(vae, scenes.render(scenes.sample(256, rng, ("train",)), rng)[0])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return result


@torch.no_grad()
def encode(vae, images: np.ndarray, batch_size: int = 64) -> torch.Tensor:
    """Mean latents, unscaled, (n, 4, 16, 16) float32 on the CPU, of images (n, 64, 64, 3) in [0, 1]."""
    parts = []
    for i in range(0, len(images), batch_size):
        x = _to_model(images[i : i + batch_size]).to(vae.device, vae.dtype)
        parts.append(vae.encode(x).latent_dist.mean.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def decode(vae, latents: torch.Tensor, batch_size: int = 64) -> np.ndarray:
    """Images, (n, 64, 64, 3) float32 in [0, 1], of unscaled latents (n, 4, 16, 16)."""
    parts = []
    for i in range(0, len(latents), batch_size):
        x = vae.decode(latents[i : i + batch_size].to(vae.device, vae.dtype)).sample
        parts.append((x.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


def cache_latents(pipe, n: int, path, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Render n training scenes and encode them, once: scaled latents (n, 4, 16, 16) float16, and captions."""
    require("n", n, 1)
    rng = np.random.default_rng([seed, 3])
    chosen = scenes.sample(n, rng, ("train",))
    path = Path(path)
    if not path.exists():
        parts = []
        for i in tqdm(range(0, n, 512), desc="encoding scenes"):
            images, _ = scenes.render(chosen[i : i + 512], rng)
            with _autocast(pipe.vae.device):
                parts.append((encode(pipe.vae, images) * pipe.vae.config.scaling_factor).half())
        save_tensors(path, {"latents": torch.cat(parts)}, {"seed": seed})
    tensors, record = load_tensors(path)
    _refuse_others(path, record | {"n": len(tensors["latents"])}, {"n": n, "seed": seed})
    return tensors["latents"], [scenes.caption(s) for s in chosen]


def train_denoiser(
    pipe,
    latents,
    captions,
    steps: int,
    batch_size: int,
    checkpoint,
    seed: int = 0,
    learning_rate: float = 1e-3,
    drop_caption: float = 0.1,
    layout_from: int = 1750,
):
    """Train text encoder and U-Net together to predict the noise in `latents`, (n, 4, 16, 16), scaled.

    A share `drop_caption` of the captions is replaced by the empty one, for classifier-free guidance. The error
    at a timestep of signal-to-noise ratio SNR is weighted by min(SNR + floor, 5) / SNR: Min-SNR-5 (Hang et
    al. 2023, arXiv:2303.09556) with a floor, without which the layout, decided at SNR < 0.1, is hardly learnt. The floor
    is 0.1, and 1 from step `layout_from` on.
    Returns the losses (steps,) and the seconds spent, with those of the checkpoint it goes on from.
    """
    require("drop_caption", drop_caption, 0, 1)
    require("layout_from", layout_from, 0)
    if len(latents) != len(captions):
        raise ValueError(
            f"captions has {len(captions)} entries; it must have one for each of the {len(latents)} latents"
        )
    unet, text_encoder = pipe.unet.train(), pipe.text_encoder.train()
    ids = pipe.tokenizer(
        [*captions, ""],
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    alphas = pipe.scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = [(snr + floor).clamp(max=5) / snr for floor in (0.1, 1.0)]
    device = unet.device

    def loss_of(step):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pick = torch.randint(len(captions), (batch_size,), generator=g)
        timesteps = torch.randint(len(alphas), (batch_size,), generator=g)
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=g)
        dropped = torch.rand(batch_size, generator=g) < drop_caption
        clean = latents[pick].float()
        noisy = pipe.scheduler.add_noise(clean, noise, timesteps)
        context = text_encoder(torch.where(dropped[:, None], ids[-1], ids[pick]).to(device))[0]
        with _autocast(device):
            predicted = unet(noisy.to(device), timesteps.to(device), context).sample
        error = (predicted.float() - noise.to(device)).pow(2).mean((1, 2, 3))
        return (weights[step >= layout_from][timesteps].to(device) * error).mean()

    result = _train(
        [text_encoder, unet],
        loss_of,
        steps,
        batch_size,
        seed,
        learning_rate,
        checkpoint,
        250,
        0.999,
        "denoiser",
    )
    unet.eval(), text_encoder.eval()
    return result


def save(pipe, folder) -> int:
    """Write the pipeline as float16 safetensors; `StableDiffusionPipeline.from_pretrained(folder)` reads it. Returns its bytes."""
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(folder, safe_serialization=True)
    files = [p for p in Path(folder).rglob("*") if p.suffix in (".safetensors", ".json")]
    for path in files:
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    return sum(p.stat().st_size for p in files)


# --- judging ------------------------------------------------------------------------------------


def scenes_to_judge(n_captions: int, seed: int) -> list[scenes.Scene]:
    """`n_captions` different scenes that training never saw: a quarter each of {unseen, held_out} × {one, two objects}.

    Raises ValueError unless it is a multiple of 4 from 4 to 1200: the world has no more unseen one-object scenes.
    """
    require("n_captions", n_captions, 4, 1200)
    if n_captions % 4:
        raise ValueError(f"n_captions is {n_captions}; it must be a multiple of 4")
    rng = np.random.default_rng([seed, 4])
    chosen: dict[scenes.Scene, None] = {}  # a set that keeps its order
    for split in ("unseen", "held_out"):
        for two in (0.0, 1.0):
            full = len(chosen) + n_captions // 4
            while len(chosen) < full:
                chosen |= dict.fromkeys(scenes.sample(1, rng, (split,), two))
    return list(chosen)


def groups(wanted: list[scenes.Scene]) -> dict[tuple[str, str], np.ndarray]:
    """(split, 'one object' or 'two objects') -> which scenes belong there, bool, (n,)."""
    kinds = [(scenes.split(s), ("one object", "two objects")[len(s.objects) - 1]) for s in wanted]
    return {kind: np.array([k == kind for k in kinds]) for kind in dict.fromkeys(kinds)}


def judge(wanted: list[scenes.Scene], readings: list[scenes.Reading]) -> dict[str, np.ndarray]:
    """`scenes.judge` for many: attribute -> share of each scene's objects that are right, (n,)."""
    each = [scenes.judge(s, r) for s, r in zip(wanted, readings, strict=True)]
    return {attribute: np.array([j[attribute] for j in each]) for attribute in each[0]}


def estimate(shares: np.ndarray, seed: int = 0) -> metrics.Estimate:
    """Mean over scenes of what `judge` gives: with Wilson's interval where every scene is right or wrong, else by resampling scenes."""
    return (
        metrics.share(shares == 1)
        if np.isin(shares, (0, 1)).all()
        else metrics.mean(shares, seed=seed)
    )


def evaluate(pipe, wanted: list[scenes.Scene], seeds, batch_size: int = 50, **sampling):
    """Generate an image per scene from its caption and seed, read it, and judge it by its caption.

    Returns
    -------
    images : float32, (n, 64, 64, 3), in [0, 1]
    readings : list of `scenes.Reading`
    judgements : dict, as `judge` returns it
    """
    require("batch_size", batch_size, 1)
    captions = [scenes.caption(s) for s in wanted]
    starts = tqdm(range(0, len(captions), batch_size), desc="sampling")
    images = np.concatenate(
        [
            generate(pipe, captions[i : i + batch_size], seeds[i : i + batch_size], **sampling)
            for i in starts
        ]
    )
    readings = scenes.read(images)
    return images, readings, judge(wanted, readings)


def by_chance(wanted: list[scenes.Scene], readings: list[scenes.Reading]) -> dict[str, np.ndarray]:
    """The control: each reading judged by the caption of the next image of its group, so what is right is so by luck."""
    other = np.arange(len(wanted))
    for members in groups(wanted).values():
        other[members] = np.roll(np.nonzero(members)[0], -1)
    return judge([wanted[i] for i in other], readings)


def against_aims(
    judgements: dict[str, np.ndarray], wanted: list[scenes.Scene]
) -> dict[str, tuple[metrics.Estimate, float, bool]]:
    """What was measured, the aim, and whether it is met, for each of `AIMS`; met means the measured share reaches it."""
    one = np.array([len(s.objects) == 1 for s in wanted])
    measured = {a: estimate(judgements[a][one] if a == "all" else judgements[a]) for a in AIMS}
    return {a: (e, AIMS[a], e.value >= AIMS[a]) for a, e in measured.items()}


def predicted_images(pipe, wanted: list[scenes.Scene], seeds, **sampling) -> np.ndarray:
    """The finished image as the model foresees it at each denoising step: float32, (step, n, 64, 64, 3), in [0, 1].

    It is the scheduler's `pred_original_sample`, (latents - sqrt(1 - alpha_bar) · predicted noise) / sqrt(alpha_bar)
    (Song et al. 2021, arXiv:2010.02502, equation 9), decoded.
    """
    clean, step = [], pipe.scheduler.step

    @functools.wraps(step)
    def remember(*args, **kwargs):
        result = step(*args, **kwargs)
        clean.append(result[1] / pipe.vae.config.scaling_factor)
        return result

    pipe.scheduler.step = remember
    try:
        generate(pipe, [scenes.caption(s) for s in wanted], seeds, **sampling)
    finally:
        del pipe.scheduler.step
    return np.stack([decode(pipe.vae, c) for c in clean])


# --- reporting ----------------------------------------------------------------------------------


def percent(estimate: metrics.Estimate) -> str:
    """An estimate and its interval in percent; a dash where there was nothing to measure."""
    if math.isnan(estimate.value):
        return "–"
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * v for v in estimate))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        "| " + " | ".join(map(str, r)) + " |" for r in [header, ["---"] * len(header), *rows]
    )


def quality_table(quality: dict[tuple[str, str], dict[str, metrics.Estimate]]) -> str:
    """A Markdown table: attributes down, groups of captions across."""
    attributes = list(next(iter(quality.values())))
    header = [
        "right, of what the caption asks",
        *(f"{split.replace('_', ' ')}, {kind}" for split, kind in quality),
    ]
    return table(
        header, [[NAMES.get(a, a), *(percent(g[a]) for g in quality.values())] for a in attributes]
    )


def aims_table(aims: dict[str, tuple[metrics.Estimate, float, bool]]) -> str:
    """A Markdown table of `against_aims`."""
    where = {"all": "one-object captions"}
    rows = [
        [
            NAMES.get(a, a),
            where.get(a, "all captions"),
            percent(e),
            f"≥ {100 * aim:.0f} %",
            "met" if met else "not met",
        ]
        for a, (e, aim, met) in aims.items()
    ]
    return table(["attribute", "judged on", "measured", "aim", ""], rows)


def show_scene(
    ax, image: np.ndarray, scene: scenes.Scene, judgements: dict | None = None, i: int = 0
) -> None:
    """An image over its caption; with judgements, framed by whether image i is right, and what is wrong named."""
    ax.imshow(image, interpolation="nearest")
    ax.set_xticks([]), ax.set_yticks([])
    ax.spines[:].set_visible(judgements is not None)
    ax.set_xlabel(textwrap.fill(scenes.caption(scene), 26), fontsize=5.5)
    if judgements is not None:
        wrong = [a for a in scenes.ATTRIBUTES if judgements[a][i] < 1] + ["count"] * bool(
            judgements["count"][i] < 1
        )
        colour = "#D55E00" if wrong else "#009E73"
        ax.spines[:].set(color=colour, linewidth=1.5)
        ax.set_title(
            textwrap.fill("✗ " + ", ".join(wrong), 29) if wrong else "✓", color=colour, fontsize=6
        )


def quality_bars(ax, quality: dict, chance: dict, kind: str) -> None:
    """Bars per attribute for the scenes of one kind ('one object'): unseen and held out, intervals, chance, aims."""
    splits = {
        s: c for s, c in (("unseen", "#0072B2"), ("held_out", "#E69F00")) if (s, kind) in quality
    }
    for j, (split, colour) in enumerate(splits.items()):
        value, low, high = np.array(list(quality[split, kind].values())).T
        y = np.arange(len(value)) + 0.38 * (j - 0.5)
        error = np.clip([value - low, high - value], 0, None)
        ax.barh(
            y,
            value,
            0.36,
            xerr=error,
            color=colour,
            error_kw={"lw": 0.8},
            label=split.replace("_", " "),
        )
        guess = [e.value for e in chance[split, kind].values()]
        ax.plot(
            guess,
            y,
            "|",
            color="black",
            markersize=5,
            markeredgewidth=1.2,
            label=None if j else "chance",
        )
    names = list(next(iter(quality.values())))
    aims = [
        (i, AIMS[a])
        for i, a in enumerate(names)
        if a in AIMS and (a != "all" or kind == "one object")
    ]
    ax.plot(
        *zip(*[(aim, i) for i, aim in aims]),
        "D",
        color="white",
        markeredgecolor="black",
        markersize=3.5,
        linestyle="",
        label="aim",
    )
    ax.set_yticks(range(len(names)), [NAMES.get(a, a) for a in names])
    ax.set(xlim=(0, 1.02), ylim=(len(names) - 0.4, -0.6), xlabel="share right", title=kind)


def model_card(
    parameters: dict, seconds: dict[str, float], size: int, quality, aims, chance
) -> str:
    """README.md of the pipeline's folder, from what notebook 00 was given and measured.

    Parameters
    ----------
    parameters : the notebook's parameters by name, `device` being the one that was used
    seconds : training time of 'autoencoder' and 'denoiser'
    size : bytes of the weights and configuration
    quality, chance : as for `quality_table`
    aims : as `against_aims` returns them
    """
    p = parameters
    pairs = ", ".join(f"{colour} {shape}" for colour, shape in scenes.HELD_OUT)
    example = scenes.Scene(
        (scenes.Object("circle", "red", "large", "striped", "top left"),), "white"
    )
    missed = ", ".join(NAMES.get(a, a) for a, (_, _, met) in aims.items() if not met)
    only_aimed = {g: {a: e[a] for a in AIMS} for g, e in chance.items()}
    return f"""---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
---
# Demo model

Stable Diffusion 1.5 in miniature: a CLIP tokenizer and text model, an `AutoencoderKL`, a U-Net with cross-attention and a DDIM
scheduler, {size / 1e6:.1f} MB of float16 safetensors. It draws 64 × 64 pixel scenes of one or two objects from captions such as
"{scenes.caption(example)}". It exists so that every notebook of this
repository runs in minutes on a laptop, on images whose truth is known.

## Data
Scenes drawn by `helpers/demo/world.py`, nothing else: no photographs, no text from the web. {p["n_scenes"]:,} training scenes for the
denoiser, fresh ones in every batch for the autoencoder. Kept out of training: every scene with one of the pairs {pairs}
("held out"), and a tenth of the other captions, chosen by hash ("unseen").

## Training
`notebooks/00_demo_model.ipynb`, seed {p["seed"]}: autoencoder, {p["n_autoencoder_steps"]:,} batches of {p["autoencoder_batch_size"]},
{seconds["autoencoder"] / 60:.0f} minutes; text encoder and U-Net together, {p["n_denoiser_steps"]:,} batches of {p["batch_size"]},
{seconds["denoiser"] / 60:.0f} minutes, on {p["device"].upper()}. AdamW, peak learning rate 1e-3, cosine schedule, averaged weights.
{p["remark"]}

## Quality
{p["n_captions"]} captions that training never saw, one image each, DDIM with {p["num_inference_steps"]} steps, guidance
{p["guidance_scale"]}; read and judged by `helpers/demo/world.py`. Shares of objects, with 95 % bootstrap intervals over images.

{quality_table(quality)}

Against what was aimed at before the training:

{aims_table(aims)}

By chance, the same images judged by other images' captions:

{quality_table(only_aimed)}

## Limits
It knows only the captions of this grammar; other words are noise to it. It draws at 64 × 64 pixels alone. It is a subject for
interpretability research on a model whose answers can be checked, not an image generator. The reader has errors of its own
(notebook 00 gives them), which count against the model here.

Aims not met: {missed or "none"}.

## Licence
MIT.
"""
