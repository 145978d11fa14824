"""The generator as examiner: does a prompt that says a feature's name make the feature fire?

A judge of images finds what goes along with a feature; here the name is a cause. Prompts that say
it and prompts that do not are given to the studied model itself, and the feature is listened to
while it draws them. That tests the name and the model together: a name may be right and the model
unable to draw it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from helpers.checks import in_range, refuse
from helpers.measure import metrics
from helpers.measure.metrics import Estimate
from helpers.naming import scores
from helpers.naming.scores import Score
from helpers.trajectories import record


@dataclass(frozen=True)
class Examined:
    """How a feature fired for prompts that should and should not make it; intervals over images."""

    score: Score  # AUC of strengths; balanced accuracy of firing at all
    fires: dict[str, Estimate]  # share of images in which it fires, 'should' and 'should_not'
    strength: dict[str, np.ndarray]  # its largest code in each image, (image,)


def examine(prompts: dict[str, list[str]], fire) -> Examined:
    """Hold prompts 'should' and 'should_not' against `fire(prompts)`, strengths (prompt,)."""
    if set(prompts) != {"should", "should_not"} or not all(map(len, prompts.values())):
        refuse("prompts", {k: len(v) for k, v in prompts.items()}, "some of should and should_not")
    counts = [len(prompts[side]) for side in ("should", "should_not")]
    together = np.asarray(fire([*prompts["should"], *prompts["should_not"]]), float)
    if together.shape != (sum(counts),):
        refuse("shape of what fire gives", together.shape, f"({sum(counts)},)")
    yes, no = together[: counts[0]], together[counts[0] :]
    both = scores.balanced(yes > 0, ~(no > 0))
    fires = {"should": metrics.share(yes > 0), "should_not": metrics.share(no > 0)}
    found = Score(scores.auc(yes, no), both, tuple(counts))
    return Examined(found, fires, {"should": yes, "should_not": no})


def firing(pipe, dictionary, latents, tap, steps, *, seed=0, batch_size=8, **sampling):
    """`fire` for the model itself: prompts -> largest codes (prompt, latent) of some latents.

    A single latent, an int, gives (prompt,). Images are generated from seeds `seed`, `seed` + 1 and
    so on, with the settings of `sampling`, and recorded at the dictionary's tap and steps.
    """
    in_range("batch_size", batch_size, 1)
    columns = torch.as_tensor(latents)
    dictionary.check(columns)

    def fire(prompts: list[str]) -> np.ndarray:
        found = []
        for start in tqdm(range(0, len(prompts), batch_size), "images to examine", disable=None):
            batch = prompts[start : start + batch_size]
            seeds = range(seed + start, seed + start + len(batch))
            _, h, _ = record(pipe, batch, seeds, tap, steps, **sampling)
            x = h.transpose(1, 2)  # (image, token, step, channel)
            mu = dictionary.coordinates.mu
            x = dictionary.coordinates.standardise(x.to(mu.device, torch.float32))
            codes = [dictionary.codes(of_image).amax(0) for of_image in x]  # dense for a moment
            found.append(torch.stack(codes)[:, columns].float().cpu().numpy())
        return np.concatenate(found)

    return fire
