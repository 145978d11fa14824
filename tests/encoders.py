"""Tiny encoders of random weights, from the real classes of transformers; nothing is downloaded."""

import functools

import torch
import transformers as t
from pipelines import _clip

from helpers.measure.encoders import Encoder, Segmenter

SIZE, WIDTH = 32, 16  # pixels, numbers an image becomes
SMALL = {
    **{"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2},
}
VISION = SMALL | {"image_size": SIZE, "patch_size": 8}
SQUARE = {"height": SIZE, "width": SIZE}


def clip(tokenizer, text):
    config = t.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=WIDTH)
    pixels = t.CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SQUARE)
    return t.CLIPModel(config), t.CLIPProcessor(pixels, tokenizer)


def siglip(tokenizer, text):
    config = t.SiglipConfig(text_config=text, vision_config=VISION)
    return t.SiglipModel(config), t.SiglipProcessor(
        t.SiglipImageProcessorPil(size=SQUARE), tokenizer
    )


def dino(*_):
    pixels = t.BitImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SQUARE)
    return t.Dinov2Model(t.Dinov2Config(**VISION)), pixels


def clipseg(tokenizer, text):
    config = t.CLIPSegConfig(
        text_config=text,
        vision_config=VISION,
        projection_dim=WIDTH,
        extract_layers=[0, 1],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    pixels = t.ViTImageProcessorPil(size=SQUARE)
    return t.CLIPSegForImageSegmentation(config), t.CLIPSegProcessor(pixels, tokenizer)


KINDS = {"clip": clip, "siglip": siglip, "dino": dino, "clipseg": clipseg}


def parts(kind: str):
    """A model and its processor, the same ones each time."""
    torch.manual_seed(0)
    tokenizer, text_model = _clip()
    text = SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    of_text = text_model.config
    text |= {"eos_token_id": of_text.eos_token_id, "bos_token_id": of_text.bos_token_id}
    return KINDS[kind](tokenizer, text | {"pad_token_id": of_text.pad_token_id})


@functools.cache
def encoder(kind: str):
    """The tiny encoder, or the segmenter, of that name."""
    return (Segmenter if kind == "clipseg" else Encoder)(*parts(kind))
