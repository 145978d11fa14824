import pytest
import torch
from conftest import SAMPLING, built, hooks_on

from helpers.companions.attention import places, word_maps
from helpers.pipelines.generate import generate

GRID = (8, 8)


def maps_of(pipe, prompts, seeds=None, **sampling):
    seeds = seeds or list(range(len(prompts)))
    with word_maps(pipe.unet, pipe.scheduler, GRID, n_images=len(prompts)) as maps:
        images = generate(pipe, prompts, seeds, **SAMPLING | sampling)
    return images, maps


class Naive:
    """An attention processor that writes softmax(q kᵀ / √d) v out, head by head, and keeps it."""

    def __init__(self):
        self.kept = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        out, d = torch.empty_like(q), q.shape[-1] // attn.heads
        of_heads = []
        for head in range(attn.heads):
            own = slice(head * d, (head + 1) * d)
            for row in range(len(q)):
                scores = torch.softmax(q[row, :, own] @ k[row, :, own].T / d**0.5, dim=1)
                out[row, :, own] = scores @ v[row, :, own]
                of_heads.append((row, scores))
        if encoder_hidden_states is not None:
            self.kept.append(of_heads)
        return attn.to_out[0](out)


def test_maps_are_those_of_an_attention_written_out(pipe, prompts, no_hooks_left):
    images, maps = maps_of(pipe, prompts[:2])
    own, naive = pipe.unet.attn_processors, Naive()
    pipe.unet.set_attn_processor(naive)
    try:
        again = generate(pipe, prompts[:2], [0, 1], **SAMPLING)
    finally:
        pipe.unet.set_attn_processor(own)
    torch.testing.assert_close(torch.from_numpy(again), torch.from_numpy(images), atol=1e-5, rtol=0)
    assert sorted(maps) == [0, 1, 2]
    n_layers = len(naive.kept) // 3
    for step in maps:
        wanted = torch.zeros_like(maps[step])
        for layer in naive.kept[step * n_layers : (step + 1) * n_layers]:
            for row, scores in layer:
                side = int(len(scores) ** 0.5)
                if row >= 2:  # unconditional rows come first
                    small = scores.T.reshape(1, -1, side, side)
                    how = {"mode": "bicubic", "antialias": True}
                    large = torch.nn.functional.interpolate(small, GRID, **how)
                    wanted[row - 2] += large[0].clamp(min=0)
        torch.testing.assert_close(maps[step], wanted, atol=1e-5, rtol=1e-4)


def test_each_place_shares_out_one_unit_a_head_and_layer(pipe, prompts):
    _, maps = maps_of(pipe, prompts[:2])
    heads = [m.heads for m in pipe.unet.modules() if getattr(m, "is_cross_attention", False)]
    assert maps[1].shape == (2, pipe.tokenizer.model_max_length, *GRID)
    total = maps[1].sum(1)
    torch.testing.assert_close(total, torch.full_like(total, sum(heads)), rtol=1e-2, atol=0)


def test_the_conditional_branch_is_kept_and_a_map_does_not_depend_on_its_batch(pipe, prompts):
    _, together = maps_of(pipe, prompts[:3])
    _, alone = maps_of(pipe, prompts[2:3], [2])
    torch.testing.assert_close(together[2][2:], alone[2], atol=1e-5, rtol=1e-4)
    _, unguided = maps_of(pipe, prompts[:3], guidance_scale=1.0)  # begins from the same noise
    torch.testing.assert_close(together[0], unguided[0], atol=1e-5, rtol=1e-4)
    assert abs(together[2] - unguided[2]).max() > 1e-4


def test_hooks_go_whatever_happens_and_other_models_are_refused(pipe, prompts):
    with pytest.raises(KeyboardInterrupt):
        with word_maps(pipe.unet, pipe.scheduler, GRID, n_images=1):
            raise KeyboardInterrupt
    assert hooks_on(pipe.unet) == 0
    ddpm = built("ddpm")
    with pytest.raises(ValueError, match="model is 'UNet2DModel'; .*cross-attention"):
        with word_maps(ddpm.unet, ddpm.scheduler, GRID, n_images=1):
            pass


def test_places_of_words(pipe):
    tokenizer = pipe.tokenizer  # its tokens are letters, after one that starts the prompt
    assert places(tokenizer, "a red circle", "red") == [2, 3, 4]
    assert places(tokenizer, "red or red", "red") == [1, 2, 3, 6, 7, 8]
    assert places(tokenizer, "a reddish tree", "red") == []
    assert places(tokenizer, "", "red") == []
