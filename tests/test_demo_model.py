from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from helpers.demo import model, reader, world
from helpers.files import load_json
from helpers.pipelines.generate import generate
from helpers.pipelines.loading import load_pipeline

WEIGHTS = Path(model.__file__).parent / "weights"


def test_every_word_of_a_caption_is_one_token():
    tokenizer = model.build_tokenizer()
    rng = np.random.default_rng(0)
    for scene in world.sample(100, rng):
        text = world.caption(world.leave_open(scene, rng))
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= model.MAX_TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_other_words_fall_to_bytes_and_come_back():
    tokenizer = model.build_tokenizer()
    ids = tokenizer("a zebra").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1] and len(ids) > 4
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a zebra"


def test_the_tokenizer_is_the_one_the_shipped_model_was_trained_with():
    shipped = load_json(WEIGHTS / "tokenizer" / "tokenizer.json")["model"]
    assert model.build_tokenizer().get_vocab() == shipped["vocab"]


def plain(folder, prompts, seeds, **sampling):
    """What anyone gets who loads a folder with diffusers."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(prompts, generator=generators, output_type="np", **sampling).images


def test_the_shipped_model_draws_the_same_in_plain_diffusers():
    prompts = [world.caption(world.EXAMPLE), "a small blue solid square at the bottom"]
    prompts[1] += " on a gray background"
    scenes, seeds = [world.parse(p) for p in prompts], [3, 4]
    sampling = {"num_inference_steps": 6, "guidance_scale": 3.0}
    images = plain(WEIGHTS, prompts, seeds, **sampling)
    ours = generate(load_pipeline(WEIGHTS, "cpu", "float32"), prompts, seeds, **sampling)
    np.testing.assert_allclose(images, ours, atol=1e-4)
    judged = [reader.judge(s, r) for s, r in zip(scenes, reader.read(images))]
    assert [j["colour_at_place"] for j in judged] == [j["shape"] for j in judged] == [1, 1]


def test_what_is_saved_is_float16_and_loads_anywhere(pipe, tmp_path):
    size = model.save(pipe, tmp_path)
    weights = sum(
        p.numel() for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()
    )
    on_disk = sum(p.stat().st_size for p in tmp_path.rglob("*.*"))
    assert 2 * weights < size < 2.5 * weights + 1e5 and size <= on_disk
    sampling = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16}
    images = plain(tmp_path, ["a red circle"], [0], **sampling)
    np.testing.assert_allclose(images, generate(pipe, ["a red circle"], [0], **sampling), atol=0.05)
    assert next(pipe.unet.parameters()).dtype == torch.float32  # what was saved stays as it was
    assert load_pipeline(tmp_path, "cpu", "bfloat16").text_encoder.dtype == torch.bfloat16


def test_the_autoencoder_keeps_what_images_show():
    vae = load_pipeline(WEIGHTS, "cpu", "float32").vae
    scenes = world.sample(6, np.random.default_rng(2))
    images, _ = world.render(scenes, np.random.default_rng(2))
    latents = model.encode(vae, images, batch_size=4)
    again = model.decode(vae, latents, batch_size=4)
    assert latents.shape == (6, 4, 16, 16) and latents.dtype == torch.float32
    assert again.shape == images.shape and again.dtype == np.float32
    assert again.min() >= 0 and again.max() <= 1
    assert abs(again - images).mean() < 0.02 < abs(again - images[::-1]).mean()


def test_untrained_weights_follow_the_seed():
    first, same, other = (model.build(seed).unet.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
