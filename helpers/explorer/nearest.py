"""Which features are alike: in what they do, and in where they fire."""

import numpy as np
import scipy.sparse
import torch

from helpers.measure.detection import Codes

ROWS = 512  # latents that are compared with all others at once


def by_trajectory(dictionary, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n other latents whose feature trajectories have the largest cosine to each one's.

    Over all kept steps at once, in standardised units: latents (latent, n), int32, and cosines.
    """
    every = range(dictionary.n_latents)
    parts = [dictionary.directions(list(every[i : i + ROWS])) for i in every[::ROWS]]
    u = torch.nn.functional.normalize(torch.cat([p.flatten(1).float() for p in parts]), dim=1)
    return _nearest(((u[i : i + ROWS] @ u.T).cpu().numpy() for i in every[::ROWS]), n)


def by_firing(codes: Codes, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n other latents that fire at most of the same tokens: |A ∩ B| / √(|A| |B|).

    The cosine of two sets (Ochiai): latents (latent, n), int32, and coefficients; silent ones: 0.
    """
    fires = scipy.sparse.csc_matrix(codes.values != 0, dtype=np.float32)
    size = np.sqrt(np.maximum(np.asarray(fires.sum(0)).ravel(), 1))
    fires = (fires @ scipy.sparse.diags_array(1 / size)).tocsc()
    every = range(fires.shape[1])
    return _nearest(((fires[:, i : i + ROWS].T @ fires).toarray() for i in every[::ROWS]), n)


def _nearest(blocks, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n largest of each row but the row's own, largest first; rows come in blocks."""
    latents, values, first = [], [], 0
    for block in blocks:
        rows = np.arange(len(block))
        block[rows, first + rows] = -np.inf
        order = np.argsort(-block, axis=1, kind="stable")[:, : min(n, block.shape[1] - 1)]
        latents.append(order.astype(np.int32))
        values.append(np.take_along_axis(block, order, 1).astype(np.float32))
        first += len(block)
    return np.concatenate(latents), np.concatenate(values)
