"""How well latents detect the labels that notebook 05 found them best at, on other images."""

import numpy as np

from helpers.measure import metrics
from helpers.measure.detection import Codes
from helpers.measure.labels import Labels

AT_ONCE = 64  # images that are read and labelled together


def labels_of(run, split: str, n_images: int) -> Labels:
    """What the run's truth says of the first images of a split, read some at a time."""
    store, parts = run.store, []
    prompts = store.prompts_of(split)[:n_images]
    for i in range(0, n_images, AT_ONCE):
        rows = slice(i, min(i + AT_ONCE, n_images))
        parts.append(run.truth.labels(prompts[rows], store.images(split, rows), store.grid))
    return joined(parts)


def joined(parts: list[Labels]) -> Labels:
    """Labels of consecutive images as one; things are numbered on."""
    starts = np.cumsum([0, *(len(p.has) for p in parts[:-1])])
    owners = [np.where(p.owner < 0, -1, p.owner + start) for p, start in zip(parts, starts)]
    applies = [np.ones_like(p.has) if p.applies is None else p.applies for p in parts]
    return Labels(
        names=parts[0].names,
        owner=np.concatenate(owners),
        has=np.concatenate([p.has for p in parts]),
        kind=np.concatenate([p.kind for p in parts]),
        applies=None if all(p.applies is None for p in parts) else np.concatenate(applies),
    )


def asked(found: dict, which: str) -> dict[int, list[str]]:
    """Which labels a latent is held against, of latents.json: latent -> labels.

    Each label's best latent of the SAE `which`, 'residual' or 'raw', and each residual latent's own
    best label; both were chosen on validation images.
    """
    out: dict[int, list[str]] = {}
    for label, of in found.get("best", {}).items():
        if of.get(which) is not None:
            out.setdefault(int(of[which]), []).append(label)
    for latent, (label, _) in found.get("labels", {}).items() if which == "residual" else ():
        if label not in out.setdefault(int(latent), []):
            out[int(latent)].append(label)
    return out


def scores(codes: Codes, labels: Labels, of_latents: dict[int, list[str]], seed=0) -> dict:
    """AUROC of latents for labels, latent -> label -> `metrics.Estimate`, over images resampled.

    Labels that all or no tokens have, and those that these images do not know, are left out.
    """
    contrasts, found = {}, {}
    for latent, names in sorted(of_latents.items()):
        if latent >= codes.values.shape[1]:
            continue
        z, own = codes.of(latent), {}
        for name in (n for n in names if n in labels.names):
            if name not in contrasts:
                contrasts[name] = labels.contrast(name)
            labelled, others = contrasts[name]
            among = np.nonzero(labelled | others)
            if labelled.any() and others.any():
                samples = z[among], labelled[among], among[0]
                resampled = metrics.resampled_auroc(*samples, len(z), n_resamples=300, seed=seed)
                own[name] = metrics.of_resampled(resampled)
        if own:
            found[latent] = dict(sorted(own.items(), key=lambda item: -item[1].value))
    return found
