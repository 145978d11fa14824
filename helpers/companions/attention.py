"""Where words look: cross-attention maps, summed over heads and layers, of each denoising step.

Their sum over steps is the heat map of DAAM (Tang et al. 2022, arXiv:2210.04885).
"""

from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from helpers.checks import refuse
from helpers.hooks import Tap, by_branch, listen


@contextmanager
def word_maps(denoiser, scheduler, grid: tuple[int, int], *, n_images: int):
    """While one batch is made, how much image tokens attend to each token of their prompts.

    Yields a dict, filled as the model samples: step -> (image, text token, row, column), float32 on
    the CPU, of the conditional branch; a solver's second evaluation of a step is passed over. Maps
    of other layers' grids are brought to `grid` by bicubic interpolation, as in DAAM. ValueError
    for a model without cross-attention.
    """
    layers = {n: m for n, m in denoiser.named_modules() if getattr(m, "is_cross_attention", False)}
    if not layers:
        refuse("model", type(denoiser).__name__, "one with cross-attention, such as a U-Net's")
    maps, asked = {}, {}

    def keep(name, queries, call):
        asked[name] = by_branch(queries, call).get("conditional"), call

    def add(name, _, args, keys):
        """Add a layer's weights when it has made its keys, which it does after its queries."""
        layer, (queries, call) = layers[name], asked.pop(name)
        if queries is None or call.repeated:
            return
        keys = by_branch(keys, call)["conditional"]
        weights = layer.get_attention_scores(*map(layer.head_to_batch_dim, (queries, keys)))
        summed = weights.float().unflatten(0, (len(queries), -1)).sum(1)  # (image, token, word)
        summed = summed.mT.unflatten(2, call.grid)
        if call.grid != grid:
            how = {"mode": "bicubic", "antialias": True}
            summed = torch.nn.functional.interpolate(summed, grid, **how).clamp(min=0)
        maps[call.step] = maps.get(call.step, 0) + summed.cpu()

    with ExitStack() as stack:
        for name, layer in layers.items():
            tap, to_keep = Tap(f"{name}.to_q"), partial(keep, name)
            stack.enter_context(listen(denoiser, scheduler, tap, to_keep, n_images=n_images))
            # keys are text: they have no grid to listen to
            stack.callback(layer.to_k.register_forward_hook(partial(add, name)).remove)
        yield maps


def places(tokenizer, prompt: str, word: str) -> list[int]:
    """Which tokens of an encoded prompt spell a word, wherever it stands; none if it does not."""
    given = tokenizer(prompt, truncation=True).input_ids
    own = tokenizer(word, add_special_tokens=False).input_ids
    starts = [i for i in range(len(given)) if given[i : i + len(own)] == own]
    return [i + j for i in starts for j in range(len(own))]
