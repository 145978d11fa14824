"""Tiny pipelines of random weights, one per family of models; nothing is downloaded.

They are built from the real classes of diffusers. Images are 16×16 pixels and latents 8×8 unless a
docstring says otherwise; where the pipeline takes a height and a width, 16×24 works as well. All
modules are in evaluation mode, so an image depends on its generator and its prompt alone.
"""

import string

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_WIDTH, T5_WIDTH, MAX_TOKENS = 16, 32, 32
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _clip(kind=CLIPTextModel):
    """A tokenizer whose tokens are letters, and a text model of the given class."""
    letters = string.ascii_letters + string.digits + string.punctuation
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=CLIP_WIDTH,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, kind(config)


def _t5():
    """A tokenizer whose tokens are letters, digits and punctuation, and a T5 encoder."""
    letters = string.ascii_letters + string.digits + string.punctuation
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((c, -3.0) for c in letters),
    ]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, T5EncoderModel(config)


def _vae(levels=2, **config):
    """An autoencoder that shrinks by 2 ** (levels - 1)."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[8] * levels,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
        **config,
    )


def _unet(**config):
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "cross_attention_dim": CLIP_WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        }
        | config
    )


def _ddim(**config):
    return DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **config
    )


def _ready(pipe):
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion():
    """Stable Diffusion 1.x."""
    torch.manual_seed(0)
    tokenizer, text = _clip()
    return _ready(
        StableDiffusionPipeline(
            _vae(), text, tokenizer, _unet(), _ddim(), None, None, requires_safety_checker=False
        )
    )


def stable_diffusion_2():
    """Stable Diffusion 2.x: predicts v; heads per level, linear projections around the blocks."""
    torch.manual_seed(0)
    tokenizer, text = _clip()
    unet = _unet(attention_head_dim=[2, 4], use_linear_projection=True)
    scheduler = _ddim(prediction_type="v_prediction")
    return _ready(
        StableDiffusionPipeline(
            _vae(), text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
    )


def sdxl():
    """Stable Diffusion XL: two text encoders, sizes embedded with the time, blocks per level."""
    torch.manual_seed(0)
    tokenizer, text = _clip()
    tokenizer_2, text_2 = _clip(CLIPTextModelWithProjection)
    unet = _unet(
        attention_head_dim=[2, 4],
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2],
        cross_attention_dim=2 * CLIP_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
    )
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    return _ready(
        StableDiffusionXLPipeline(
            _vae(), text, text_2, tokenizer, tokenizer_2, unet, scheduler, add_watermarker=False
        )
    )


def sd3():
    """Stable Diffusion 3: three text encoders; 4×4 image tokens; the last block drops the text."""
    torch.manual_seed(0)
    tokenizer, text = _clip(CLIPTextModelWithProjection)
    tokenizer_2, text_2 = _clip(CLIPTextModelWithProjection)
    tokenizer_3, text_3 = _t5()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=16,
    )
    vae = _vae(
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _ready(
        StableDiffusion3Pipeline(
            transformer, scheduler, vae, text, tokenizer, text_2, tokenizer_2, text_3, tokenizer_3
        )
    )


def flux():
    """FLUX.1 dev: 4×4 tokens of 2×2 latent pixels, two blocks of two streams, two of one."""
    torch.manual_seed(0)
    tokenizer, text = _clip()
    tokenizer_2, text_2 = _t5()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae = _vae(
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae, text, tokenizer, text_2, tokenizer_2, transformer)
    pipe.default_sample_size = 8  # the pipeline's own is always 128
    return _ready(pipe)


def pixart():
    """PixArt-α, for images of 256×256 pixels and latents of 32×32, the least that it lists.

    Every height and width is mapped to its list of aspect ratios, so 16×24 is drawn as 208×304 and
    then resized, unless `use_resolution_binning=False`; then the latents are an eighth of what was
    asked for: 64×96 gives 8×12.
    """
    torch.manual_seed(0)
    tokenizer, text = _t5()
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        cross_attention_dim=32,
        caption_channels=T5_WIDTH,
    )
    return _ready(
        PixArtAlphaPipeline(
            tokenizer, text, _vae(levels=4), transformer, DPMSolverMultistepScheduler()
        )
    )


def dit():
    """DiT, for one of 1000 classes, two of which have names here; 4×4 tokens, square only."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
    )
    return _ready(
        DiTPipeline(
            transformer,
            _vae(),
            DDIMScheduler(clip_sample=False),
            {0: "tench", 1: "goldfish, Carassius"},
        )
    )


def ddpm(channels=3):
    """An unconditional model of 8×8 pixels, square only, with attention in its second level."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return _ready(DDPMPipeline(unet, DDPMScheduler()))


ALL = {
    "sd1": stable_diffusion,
    "sd2": stable_diffusion_2,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "dit": dit,
    "ddpm": ddpm,
}
