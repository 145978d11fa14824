"""One pass over a split's images for what all latents do, another over the images to be shown.

Both hold one image's codes at a time, dense, and its evidence in parts.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import scipy.sparse
import torch
from tqdm.auto import tqdm

from helpers.explorer.examples import Counts, Kept
from helpers.measure.detection import Codes

PART = 2**24  # numbers of evidence that are held at once
CODES = 2**26  # active codes that are kept for what is measured over all tokens: 0.5 GB


@dataclass
class Seen:
    """What one pass over images found of every latent."""

    active: np.ndarray  # share of tokens at which its code is not zero, (latent,)
    fired: np.ndarray  # share of images in which it fires, (latent,)
    mean_map: np.ndarray  # its mean code over images, float32, (latent, token)
    profile: np.ndarray  # positive evidence of its active codes by step, (latent, step)
    top: Kept
    sample: Kept
    codes: Codes  # their sizes, of the first images, as many as `CODES` allows
    strength: scipy.sparse.csc_matrix  # the largest code in each of those, (image, latent)


def has_evidence(dictionary) -> bool:
    """Whether codes are thresholded sums over steps, so that there is evidence to show."""
    return getattr(dictionary.coder, "W_enc", None) is not None


@torch.no_grad()
def watch(dictionary, shards, n_images: int, counts: Counts, seed=0, n_codes=CODES) -> Seen:
    """See all images of standardised `shards` (image, token, step, channel) once, in their order.

    Codes of dense dictionaries count by their size. The random sample follows from `seed` alone.
    """
    n = dictionary.n_latents
    top, sample = Kept(counts.top, n), Kept(counts.sample, n)
    active, fired, total = np.zeros(n), np.zeros(n), np.zeros((n, 1), np.float32)
    profile = np.zeros((n, dictionary.coordinates.n_steps))
    kept, strengths, room = [], [], n_codes
    bar = tqdm(chain.from_iterable(shards), "watching", n_images, unit="image", disable=None)
    for image, x in enumerate(bar):
        z = dictionary.codes(x).float()  # (token, latent)
        if has_evidence(dictionary):
            _add_evidence(profile, dictionary, x, z)
        z = z.abs().cpu().numpy()
        strength, firing = z.max(0), (z > 0).sum(0)
        active, fired = active + firing / len(z), fired + (firing > 0)
        total = np.add(total, z.T, out=total if image else None)
        keys = np.random.default_rng([seed, image]).random(n, np.float32)
        top.offer(image, np.where(firing > 0, strength, -np.inf), strength)
        sample.offer(image, np.where(firing > 0, keys, -np.inf), strength)
        if room > 0:
            kept.append(scipy.sparse.csr_matrix(z))
            strengths.append(scipy.sparse.csr_matrix(strength[None]))
            room -= firing.sum()
    found = Codes(scipy.sparse.vstack(kept).tocsc(), len(kept))
    total /= n_images
    strength = scipy.sparse.vstack(strengths).tocsc()
    return Seen(active / n_images, fired / n_images, total, profile, top, sample, found, strength)


def _add_evidence(profile: np.ndarray, dictionary, x: torch.Tensor, z: torch.Tensor) -> None:
    """Add an image's positive evidence of active codes to `profile` (latent, step)."""
    latents = (z != 0).any(0).nonzero()[:, 0]
    for own in latents.split(max(1, PART // (len(z) * profile.shape[1]))):
        e = dictionary.evidence(x, own.tolist()) * z[:, None, own].sign()  # 0 where it is silent
        profile[own.cpu().numpy()] += e.clamp(min=0).sum(0).T.double().cpu().numpy()


@torch.no_grad()
def maps(dictionary, read, latents, images, largest, with_evidence: list[int]) -> tuple:
    """Maps of latents at their examples, and evidence by step at some of these.

    read(image) gives its standardised activations (token, step, channel); `images` (latent,
    example), -1 for none; `largest` (latent,), which a map of 1 stands for. Two float16 tensors:
    (latent, example, token), in [0, 1], and (latent, example `with_evidence`, step, token).
    """
    first = read(max(0, int(images.max(initial=0))))
    n_tokens, n_steps = first.shape[:2]
    found = torch.zeros(*images.shape, n_tokens, dtype=torch.float16)
    shape = len(latents), len(with_evidence), n_steps, n_tokens
    evidence = torch.zeros(shape, dtype=torch.float16)
    latents, largest = torch.as_tensor(latents), torch.as_tensor(largest).clamp(min=1e-12)
    places = {slot: place for place, slot in enumerate(with_evidence)}
    for image in tqdm(np.unique(images[images >= 0]), "maps", unit="image", disable=None):
        x = read(int(image))
        rows, slots = map(torch.from_numpy, np.nonzero(images == image))
        z = dictionary.codes(x).float().abs().cpu()[:, latents[rows]]
        found[rows, slots] = (z / largest[rows]).clamp(max=1).T.half()
        shown = [i for i, slot in enumerate(slots.tolist()) if slot in places]
        if shown and has_evidence(dictionary):
            e = dictionary.evidence(x, latents[rows[shown]].tolist())  # (token, step, latent)
            at = torch.tensor([places[slots[i].item()] for i in shown])
            evidence[rows[shown], at] = e.permute(2, 1, 0).half().cpu()
    return found, evidence
