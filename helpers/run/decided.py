"""When what a run's test images show was decided: found once for a study, kept beside the run.

In the demo world only; of other images nobody knows (see `helpers.demo.truth.Scenes.decided`).
"""

import numpy as np
import torch

from helpers.files import load_tensors, save_tensors
from helpers.run.folder import Run

FILE = "decided.safetensors"


def find(run: Run, others: list[Run] = ()) -> None:
    """Write the file of a run, and of others that recorded the same images, unless it is there."""
    if not hasattr(run.truth, "decided") or all(read(one) for one in (run, *others)):
        return
    store = run.store
    seeds = [store.seeds[i] for i in store.indices("test")]
    asked = store.prompts_of("test"), seeds, store.images("test")
    found = run.truth.decided(run.pipeline(), *asked, store.sampling)
    for one in (run, *others):
        tensors = {attribute: torch.from_numpy(step) for attribute, step in found.items()}
        save_tensors(one.folder / FILE, tensors, one.made_from("trajectories"))


def read(run: Run) -> dict[str, np.ndarray]:
    """Attribute -> denoising step, float64, (thing,), NaN where never; empty if it is not known."""
    if not (run.folder / FILE).exists():
        return {}
    found, record = load_tensors(run.folder / FILE)
    same = record == run.made_from("trajectories")
    return {attribute: step.numpy() for attribute, step in found.items()} if same else {}
