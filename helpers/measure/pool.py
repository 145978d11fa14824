"""A pool of images before any steering, with all that steering them needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from helpers.files import load_tensors, save_tensors
from helpers.pipelines.loading import denoiser_of
from helpers.pipelines.replay import Outputs, record_outputs
from helpers.trajectories import record


@dataclass(frozen=True)
class Pool:
    """Images as they are unsteered: what each steered one is compared with."""

    prompts: list[str]
    seeds: list[int]
    images: np.ndarray  # float32, (image, height, width, 3), in [0, 1]
    h: torch.Tensor  # recorded with them, raw, (image, step, token, channel)
    outputs: Outputs | None = None  # of the denoiser, to replay steps before any steering

    @classmethod
    def make(cls, pipe, store, prompts, seeds, batch_size: int) -> Pool:
        """Generate and record images with the settings of a store, at its tap and steps."""
        made, starts = [], range(0, len(prompts), batch_size)
        for i in tqdm(starts, "unsteered images", leave=False, disable=None):
            batch = [values[i : i + batch_size] for values in (prompts, seeds)]
            with record_outputs(denoiser_of(pipe), pipe.scheduler, len(batch[0])) as outputs:
                images, h, _ = record(pipe, *batch, store.tap, store.steps, **store.sampling)
            made.append((images, h, outputs))
        images, h, outputs = zip(*made)
        together = np.concatenate(images), torch.cat(h), Outputs.joined(outputs)
        return cls(list(prompts), list(seeds), *together)

    def save(self, path: str | Path) -> None:
        """Write all of it as one safetensors file, atomically."""
        tensors = {"images": torch.from_numpy(self.images), "h": self.h}
        own = {"prompts": self.prompts, "seeds": self.seeds, "outputs": None}
        if self.outputs is not None:
            parts = vars(self.outputs).items()
            tensors |= {name: part for name, part in parts if isinstance(part, torch.Tensor)}
            own["outputs"] = {name: part for name, part in parts if name not in tensors}
        save_tensors(path, tensors, own)

    @classmethod
    def load(cls, path: str | Path) -> Pool:
        """Read what `save` wrote."""
        tensors, own = load_tensors(path)
        images, h, outputs = tensors.pop("images").numpy(), tensors.pop("h"), own.pop("outputs")
        if outputs is not None:
            outputs = Outputs(**tensors | outputs)
            outputs.calls = [tuple(call) for call in outputs.calls]
        return cls(own["prompts"], own["seeds"], images, h, outputs)
