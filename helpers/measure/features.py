"""What latents do, where nobody has named it: clusters of their maps, and the strongest of each."""

from typing import NamedTuple

import numpy as np
import scipy.sparse
from scipy.stats import rankdata

from helpers.measure.detection import Codes


class Cluster(NamedTuple):
    """Latents that are active in the same places and get their evidence at the same steps."""

    latents: np.ndarray  # strongest first
    map: np.ndarray  # mean over its latents of where each is active, (token,), summing to 1
    profile: np.ndarray  # mean over its latents of the steps' shares of evidence, (step,)


def mean_maps(codes: Codes) -> np.ndarray:
    """Where each latent is active: its mean code over images, float, (latent, token)."""
    n_tokens = codes.values.shape[0] // codes.n_images
    token = np.tile(np.arange(n_tokens), codes.n_images)
    at = scipy.sparse.csr_matrix((np.ones(len(token)), (token, np.arange(len(token)))))
    total = at @ codes.values
    return np.asarray(total.todense() if scipy.sparse.issparse(total) else total).T / codes.n_images


def clusters(codes: Codes, profiles, strength, n: int = 6, seed: int = 0) -> list[Cluster]:
    """At most n clusters of latents by their mean maps and profiles of evidence, by k-means.

    `profiles` (latent, step) is evidence summed by step, `strength` (latent,) what a latent does in
    all. Maps and profiles count alike, each as roots of shares (so that distances are Hellinger's).
    Silent latents take no part; clusters are ordered by their strongest latent.
    """
    from sklearn.cluster import KMeans

    maps = mean_maps(codes)
    active = np.nonzero((maps.sum(1) > 0) & (np.sum(profiles, 1) > 0))[0]
    if len(active) == 0:
        return []
    maps, profiles = (np.asarray(v, float)[active] for v in (maps, profiles))
    maps, profiles = (v / v.sum(1, keepdims=True) for v in (maps, profiles))
    x = np.sqrt(np.hstack([maps, profiles]))
    member = KMeans(min(n, len(np.unique(x, axis=0))), n_init=4, random_state=seed).fit_predict(x)
    found = []
    for cluster in np.unique(member):
        own = np.nonzero(member == cluster)[0]
        own = own[np.argsort(-np.asarray(strength)[active[own]], kind="stable")]
        found.append(Cluster(active[own], maps[own].mean(0), profiles[own].mean(0)))
    return sorted(found, key=lambda c: -strength[c.latents[0]])


def most_alike(codes: Codes, latent: int, others: Codes) -> int:
    """The latent of other codes, of the same tokens, with the largest cosine to this one's."""
    column = codes.of(latent).ravel()
    norms = np.sqrt(np.asarray(others.values.multiply(others.values).sum(0)).ravel())
    return int(np.argmax((others.values.T @ column) / np.maximum(norms, 1e-12)))


def examples(codes: list[Codes], latents: list[int], hour: np.ndarray, n: int) -> list[int]:
    """n images on which latents of several dictionaries are strongest together.

    Of the strongest 4 n whose `hour` (image,) is known, they are spread evenly from the earliest to
    the latest; where it is known of fewer than n, it is left aside.
    """
    strong = sum(rankdata(c.of(latent).max(1)) for c, latent in zip(codes, latents))
    top = np.argsort(-strong, kind="stable")
    known = top[~np.isnan(hour[top])][: 4 * n]
    if len(known) < n:
        return top[:n].tolist()
    known = known[np.argsort(hour[known], kind="stable")]
    return known[np.linspace(0, len(known) - 1, n).astype(int)].tolist()
