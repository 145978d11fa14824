"""Moving features from the image of one prompt to that of another, after RIEBench's protocol.

Surkov et al. (2025), arXiv:2410.22366: a case is an image's prompt, the prompt after an edit, and
what to look for in both images, which are made from one seed. Latents are ranked by their share of
all that is active in the one region less that in the other; the first are added where they were,
the last taken away where they were, and the image is made again. Brackets in prompts are taken out
for drawing and for scoring alike. Unlike theirs, codes are those of the first pass, since a
trajectory's are known only after its last step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import maximum_filter

from helpers import steering
from helpers.checks import one_of, refuse
from helpers.dictionary import Dictionary
from helpers.files import load_json
from helpers.measure.encoders import Encoder
from helpers.measure.labels import token_shares
from helpers.measure.lpips import LPIPS
from helpers.trajectories import record

KINDS = ("change object", "add object", "delete object", "change content", "change pose")
KINDS += ("change color", "change material", "change background", "change style")  # numbered from 1
WRITTEN = {  # field of a case -> its name in the list
    "name": "id",
    "kind": "editing_type_id",
    "original": "original_prompt",
    "edited": "editing_prompt",
    "in_original": "original_gsam_prompt",
    "in_edited": "editing_gsam_prompt",
}
CHOICES = ("score", "random")


@dataclass(frozen=True)
class Case:
    """An edit: prompts without brackets, and what is to be found in their images."""

    name: str
    kind: str
    original: str
    edited: str
    in_original: str  # words; '~' before them means all else, '#everything' every token
    in_edited: str


@dataclass
class Bench:
    """What edits are made and scored with."""

    pipe: object
    store: object  # whose tap, steps, grid and sampling are used
    dictionaries: dict[str, Dictionary]
    encoder: Encoder
    lpips: LPIPS | None
    segment: object  # (image, text, name) -> mask (height, width), or None for all of an image
    seed: int  # of all images
    features: int  # latents added, and as many taken away
    choices: list[str]  # 'score', and 'random': as many active ones, the control
    strengths: list[float]  # times what was recorded


def read_cases(source: str, per_type: int) -> list[Case]:
    """The first `per_type` cases of each type; ValueError for one that lacks a field or a type."""
    if not Path(source).exists():
        refuse("cases", source, "a JSON file, as riebench.json of github.com/wendlerc/RIEBench")
    found, so_far = [], Counter()
    for entry in load_json(source):
        if missing := [name for name in WRITTEN.values() if name not in entry]:
            refuse(f"cases: {entry.get('id')}", list(entry), f"with {', '.join(missing)}")
        number = str(entry["editing_type_id"])
        one_of("editing_type_id", number, [str(i + 1) for i in range(len(KINDS))])
        values = {field: str(entry[name]) for field, name in WRITTEN.items()}
        for prompt in ("original", "edited"):
            values[prompt] = values[prompt].replace("[", "").replace("]", "").strip()
        so_far[number] += 1
        if so_far[number] <= per_type:
            found.append(Case(**values | {"kind": KINDS[int(number) - 1]}))
    return found


def scores(bench: Bench, case: Case) -> dict[str, dict[str, float]]:
    """Scores of each way to edit, and of the edited prompt's own image; ValueError if it fails."""
    store = bench.store
    if case.original == case.edited:
        raise ValueError("both prompts are the same")
    pair, sampling = [case.edited, case.original], store.sampling
    (edited, original), h, _ = record(
        bench.pipe, pair, [bench.seed] * 2, store.tap, store.steps, **sampling
    )
    regions = _regions(bench, case, edited, original)
    ways, deltas, rng = [], [], np.random.default_rng([bench.seed, *case.name.encode()])
    for name, dictionary in bench.dictionaries.items():
        coordinates = dictionary.coordinates
        z = dictionary.codes(coordinates.standardise(h.float().transpose(1, 2)).to(coordinates.mu))
        new, old = sources(case, z, regions)
        for choice in bench.choices:
            added, taken = choose(new, old, bench.features, choice, rng)
            codes = torch.cat([new[:, added], -old[:, taken]], 1)[None]
            u = dictionary.directions(torch.cat([added, taken]).tolist())
            for strength in bench.strengths:
                ways.append(f"{name}, {choice}, ×{strength:g}")
                steps = store.steps, sampling["num_inference_steps"]
                deltas.append(steering.scaling(codes, u, coordinates, *steps, 1 + strength))
    n = len(ways)
    where = bench.pipe, [case.original] * n, [bench.seed] * n, store.tap, torch.cat(deltas, 1)
    made = steering.steer(*where, **sampling)
    if not np.isfinite(made).all():
        raise ValueError("an edited image has pixels that are no numbers")
    return dict(zip([*ways, "edited prompt"], _scored(bench, pair, original, edited, made)))


def sources(case: Case, z: torch.Tensor, regions) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes to add and to take away, each (token, latent), of the codes z of (edited, original).

    What is deleted makes room for the mean of all else in its own image.
    """
    at_edited, at_original = (torch.from_numpy(r).to(z.device) for r in regions)
    old = z[1] * at_original[:, None]
    if case.kind == "delete object":
        return z[1][at_edited].mean(0) * at_original[:, None], old
    return z[0] * at_edited[:, None], old


def choose(new, old, n: int, choice: str, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """n latents to add and n to take away: by share of what is active, or active ones at random."""
    shares = []
    for codes in (new, old):
        if not (total := codes.sum()) > 0:
            raise ValueError("no latent is active where the edit is")
        shares.append(codes.sum(0) / total)
    if choice == "random":
        picked = (rng.permutation(s.cpu().numpy().nonzero()[0])[:n] for s in shares)
        return tuple(torch.from_numpy(latents) for latents in picked)
    order = (shares[0] - shares[1]).argsort(descending=True).cpu()
    return order[:n], order[-n:]


def _regions(bench: Bench, case: Case, edited, original) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, bool, of the edited prompt's image and of the original's, that the edit is about."""
    if case.kind == "delete object":
        there = _tokens(bench, original, case.in_original, f"{case.name}_original")
        if there.all():
            raise ValueError("what is to be deleted is all of the image")
        return ~there, there
    new = _tokens(bench, edited, case.in_edited, f"{case.name}_edited")
    if case.kind == "add object":
        return new, new
    return new, _tokens(bench, original, case.in_original, f"{case.name}_original")


def _tokens(bench: Bench, image: np.ndarray, text: str, name: str) -> np.ndarray:
    """Tokens, bool, in which most is covered by the thing found, its edge moved out a little."""
    grid = bench.store.grid
    if text == "#everything" or bench.segment is None:
        return np.ones(grid[0] * grid[1], bool)
    others, wanted = text.startswith("~"), text.removeprefix("~")
    if "background" in text:
        others, wanted = True, "foreground"
    mask = bench.segment(image, wanted, name)
    shares = token_shares(maximum_filter(mask, 31 * len(mask) // 512 | 1), grid).ravel()
    tokens = (shares > 0) & (shares >= min(0.5, shares.max()))
    if not tokens.any() or (others and tokens.all()):
        raise ValueError(f"nothing of {text!r} is found in the image")
    return ~tokens if others else tokens


def _scored(bench: Bench, texts: list[str], original, edited, made) -> list[dict[str, float]]:
    """Scores of each edited image, and of the edited prompt's own last."""
    images = np.stack([*made, edited])
    t, x = bench.encoder.texts(texts), bench.encoder.images(images)
    before = bench.encoder.images(np.stack([edited, original]))
    near = torch.cat([x @ t.T, x @ before.T], 1).cpu().numpy()
    names = [f"CLIP-{kind} to {side}" for kind in "TI" for side in ("edited", "original")]
    found = dict(zip(names, near.T)) | {"ΔCLIP-T": near[:, 0] - float(before[1] @ t[0])}
    for side, reference in (("edited", edited), ("original", original)):
        if bench.lpips is not None:
            found[f"LPIPS to {side}"] = bench.lpips(images, np.stack([reference] * len(images)))
    return [{n: float(v[i]) for n, v in found.items()} for i in range(len(images))]
