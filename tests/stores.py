"""A tiny collection for tests that need a store: five images of the tiny pipeline in conftest."""

from conftest import SAMPLING, TOKENS

from helpers.store.plan import Plan

SPLIT = ["train", "validation", "train", "train", "test"]
SEEDS = [10, 11, 12, 13, 14]
PROMPTS = ["a red circle", "two cats", "", "a green dog, striped", "3 small boats at sea"]


def tiny_plan(*folders, taps=(TOKENS,), sampling=SAMPLING, **changes):
    """A plan of five images in four shards; each of `folders` is for the tap at its place."""
    import torch

    values = {
        "taps": dict(zip(folders, taps, strict=True)),
        "prompts": PROMPTS,
        "seeds": SEEDS,
        "splits": SPLIT,
        "steps": [0, 2],
        "sampling": dict(sampling),
        "batch_size": 2,
        "store_dtype": torch.float32,
        "about": {"model": "tiny"},
    }
    return Plan(**values | changes)


def contents(folder):
    """Every file in a folder, hidden ones too, and its bytes."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}
