"""What is shown of every latent of a dictionary: built in two passes, kept on disk, read singly.

`build` streams over a split's images once for statistics and examples, then reads the examples
again for their maps. In `runs/<run>/records/<dictionary>/` it leaves `index.safetensors`, with the
numbers of all latents, and `maps-*.safetensors`, each with those of some. Names and strips of
steered images, made elsewhere, lie beside them where there are any:

    names.json              {"12": {"name": "red, anywhere", "score": [0.8, 0.7, 0.9]}, …}
    strips/12.safetensors   written by `strips.make`
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import scipy.sparse
import torch

from helpers.checks import in_range, refuse
from helpers.explorer import labelled, nearest, stream
from helpers.explorer.examples import USUAL, Counts, chosen
from helpers.explorer.record import (
    STATISTICS,
    Examples,
    Name,
    Near,
    Record,
    load_strip,
    read_names,
    title,
    write_names,
)
from helpers.files import in_units, load_rows, load_tensors, save_tensors
from helpers.measure import timing
from helpers.measure.metrics import Estimate
from helpers.measure.reconstruction import standardised

BLOCK = 2**28  # bytes of maps and evidence that are held at once and lie in one file
N_NEAR = 8
SPARSE = ("data", "indices", "indptr")  # of a matrix


def folder_of(run, dictionary: str = "residual") -> Path:
    return run.folder / "records" / dictionary.replace(" ", "_")


def dictionary_of(run, dictionary: str):
    """'residual' is the run's own dictionary, all else a baseline's name, such as 'raw concat'."""
    return run.dictionary if dictionary == "residual" else run.baseline(dictionary)


def build(run, dictionary="residual", *, split="test", counts=USUAL, seed=0) -> Records:
    """Make the records of a run, or what is missing of them, and load them.

    `run` is a `helpers.run.folder.Run` after notebook 03; with 05's latents.json, latents have
    scores for labels. What was made from the same files with the same settings is kept, so that a
    build that was stopped goes on with its next file of maps.
    """
    if not run.store.n_images(split):
        refuse("split", split, "one that images were collected for")
    found, folder = dictionary_of(run, dictionary), folder_of(run, dictionary)
    settings = _made_from(run, dictionary) | {"split": split, "counts": counts._asdict()}
    settings |= {"seed": seed, "dictionary name": found.name, "n_latents": found.n_latents}
    n_maps = counts.slots["top"].stop + len(counts.with_evidence) * run.store.n_steps
    per_latent = 2 * run.store.n_tokens * n_maps
    n = max(1, BLOCK // per_latent)
    blocks = [range(i, min(i + n, found.n_latents)) for i in range(0, found.n_latents, n)]
    size = in_units(per_latent * found.n_latents)
    if not _is_made(folder / "index.safetensors", settings):
        print(f"records of {found.n_latents} latents: {size} of maps in {folder}")
        _write_index(run, found, dictionary, folder / "index.safetensors", settings, counts)
    for own in blocks:
        _write_maps(run, found, folder, own, settings, counts)
    for path in set(folder.glob("maps-*")) - {maps_path(folder, own.start) for own in blocks}:
        path.unlink()
    return load(run, dictionary)


def maps_path(folder: Path, first: int) -> Path:
    return folder / f"maps-{first:06d}.safetensors"


def save_names(run, dictionary: str, names: dict[int, Name]) -> Path:
    """Give latents names, which pages and cards show from then on; returns the file's path."""
    path = folder_of(run, dictionary) / "names.json"
    write_names(path, names, _dictionary_made_from(run, dictionary))
    return path


def _dictionary_made_from(run, dictionary: str) -> dict[str, str]:
    return run.made_from("dictionary" if dictionary == "residual" else dictionary)


def _made_from(run, dictionary: str) -> dict:
    found = _dictionary_made_from(run, dictionary) | run.made_from("trajectories")
    return found | (run.made_from("latents") if run.path("latents").exists() else {})


def _is_made(path: Path, settings: dict) -> bool:
    try:
        record = load_tensors(path)[1]
    except (FileNotFoundError, ValueError):
        return False
    return all(record.get(name) == value for name, value in settings.items())


def _write_index(run, found, dictionary, path: Path, settings: dict, counts: Counts) -> None:
    split, seed = settings["split"], settings["seed"]
    shards = standardised(run.store, split, run.predictors)
    seen = stream.watch(found, shards, run.store.n_images(split), counts, seed)
    images, codes = chosen(seen.top, seen.sample, counts)
    effect, onset = timing.sizes(found)
    tensors = {
        **{name: getattr(seen, name) for name in ("active", "fired", "mean_map", "profile")},
        **{"largest": seen.top.codes.max(0), "effect": effect, "onset": onset},
        **{"images": images, "codes": codes},
        **{f"strength, {part}": getattr(seen.strength, part) for part in SPARSE},
    }
    near = {
        "by trajectory": nearest.by_trajectory(found, N_NEAR),
        "by co-firing": nearest.by_firing(seen.codes, N_NEAR),
    }
    for name, (latents, values) in near.items():
        tensors |= {f"{name}, latents": latents, f"{name}, similarity": values}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in tensors.items()}
    measured = {"labels": _labels(run, dictionary, seen.codes, split, seed)}
    save_tensors(path, tensors, settings | measured | {"n_measured": seen.codes.n_images})


def _labels(run, dictionary: str, codes, split: str, seed: int) -> dict:
    if not run.path("latents").exists():
        return {}
    of_latents = labelled.asked(run.latents, dictionary.split()[0])
    if not of_latents:
        return {}
    labels = labelled.labels_of(run, split, codes.n_images)
    return labelled.scores(codes, labels, of_latents, seed)


def _write_maps(run, found, folder: Path, own: range, settings: dict, counts: Counts) -> None:
    """Maps and evidence of some latents, unless they are there."""
    path = maps_path(folder, own.start)
    settings = settings | {"latents": [own.start, own.stop]}
    if _is_made(path, settings):
        return
    index, _ = load_tensors(folder / "index.safetensors")
    images, largest = (index[name][own.start : own.stop] for name in ("images", "largest"))

    def read(image: int) -> torch.Tensor:
        h = run.store.activations(settings["split"], [image])[0].transpose(0, 1)
        return run.predictors.standardise(h.to(run.predictors.mu.device))

    given = list(own), images.numpy(), largest, counts.with_evidence
    maps, evidence = stream.maps(found, read, *given)
    save_tensors(path, {"maps": maps, "evidence": evidence}, settings)


def load(run, dictionary: str = "residual") -> Records:
    """The records that `build` made of a run.

    FileNotFoundError if there are none; ValueError if the run's files have changed since.
    """
    folder = folder_of(run, dictionary)
    again = "build them again, by `python -m helpers.explorer.cards`"
    if not (folder / "index.safetensors").exists():
        raise FileNotFoundError(f"{folder} holds no finished records; {again}")
    records = Records(run, dictionary, folder)
    for name, value in _made_from(run, dictionary).items():
        if records.about.get(name) != value:
            raise ValueError(f"{name} has changed since the records in {folder} were made; {again}")
    return records


class Records:
    """The records of a dictionary: some numbers of all latents at once, all of one by `record`."""

    def __init__(self, run, dictionary: str, folder: Path):
        self.run, self.dictionary, self.folder, self.store = run, dictionary, folder, run.store
        self._index, self.about = load_tensors(folder / "index.safetensors")
        self.split, self.counts = self.about["split"], Counts(**self.about["counts"])
        self.n_latents = self.about["n_latents"]
        self._blocks = sorted(int(p.stem.split("-")[1]) for p in folder.glob("maps-*.safetensors"))
        self.labels: dict[int, dict[str, Estimate]] = {
            int(latent): _best_first({n: Estimate(*map(_number, e)) for n, e in own.items()})
            for latent, own in self.about["labels"].items()
        }

    def array(self, name: str) -> np.ndarray:
        """Of all latents: 'images' and 'codes' of examples, 'profile', 'mean_map', …"""
        return self._index[name].numpy()

    @cached_property
    def prompts(self) -> list[str]:
        return self.store.prompts_of(self.split)

    @cached_property
    def names(self) -> dict[int, Name]:
        made_from = _dictionary_made_from(self.run, self.dictionary)
        return read_names(self.folder / "names.json", made_from)

    @cached_property
    def strength(self) -> scipy.sparse.csc_matrix:
        """Largest code of each latent in each image, (image, latent), of the first images.

        Those with which labels were compared: all of the split, unless it has too many codes.
        """
        parts = tuple(self.array(f"strength, {part}") for part in SPARSE)
        return scipy.sparse.csc_matrix(parts, (self.about["n_measured"], self.n_latents))

    @cached_property
    def table(self) -> dict[str, np.ndarray]:
        """Each of STATISTICS of all latents, float (latent,), NaN where there is nothing to say."""
        active, profile = self.array("active"), self.array("profile")
        steps, silent = np.asarray(self.store.steps, float), profile.sum(1) == 0
        score = [next(iter(self.labels.get(i, {}).values()), (np.nan,))[0] for i in self.latents]
        of_name = {i: name.score.value for i, name in self.names.items() if name.score}
        columns = (
            *(active, active / max(active.sum(), 1e-12), self.array("fired")),
            *(self.array("largest"), timing.crossing(profile, steps, 0.1)),
            *(np.where(silent, np.nan, steps[profile.argmax(1)]), timing.duration(profile)),
            *(np.array(score), np.array([of_name.get(i, np.nan) for i in self.latents])),
        )
        return dict(zip(STATISTICS, columns))

    @property
    def latents(self) -> range:
        return range(self.n_latents)

    def title(self, latent: int) -> str:
        """What a latent is called, as `record.title` chooses."""
        return title(self.names.get(latent), self.labels.get(latent, {}))

    def near(self, latent: int) -> dict[str, list[Near]]:
        """The nearest latents by each measure, the nearest first."""
        found = {}
        for name in ("by trajectory", "by co-firing"):
            columns = (self.array(f"{name}, {what}")[latent] for what in ("latents", "similarity"))
            pairs = zip(*(column.tolist() for column in columns))
            found[name] = [Near(i, value, self.title(i)) for i, value in pairs if value > 0]
        return found

    def record(self, latent: int) -> Record:
        """Everything about one latent; ValueError for one that there is not."""
        in_range("latent", latent, 0, self.n_latents - 1)
        strip = self.folder / "strips" / f"{latent}.safetensors"
        profile = self.array("profile")[latent]
        return Record(
            **{"run": self.run.name, "dictionary": self.dictionary, "split": self.split},
            latent=latent,
            statistics={name: float(values[latent]) for name, values in self.table.items()},
            labels=self.labels.get(latent, {}),
            examples=self._examples(latent),
            **{"steps": self.store.steps, "timesteps": self.store.timesteps},
            profile=profile / max(profile.sum(), 1e-12),
            **{name: self.array(name)[latent] for name in ("effect", "onset")},
            nearest=self.near(latent),
            name=self.names.get(latent),
            strip=load_strip(strip) if strip.exists() else None,
        )

    def _examples(self, latent: int) -> dict[str, Examples]:
        first = max(i for i in self._blocks if i <= latent)
        path, grid = maps_path(self.folder, first), self.store.grid
        read = (load_rows(path, name, [latent - first])[0] for name in ("maps", "evidence"))
        maps, evidence = (found.float().numpy() for found in read)
        slots, with_evidence = self.counts.slots, np.array(self.counts.with_evidence)
        found = {}
        for kind, own in slots.items():
            images, codes = (self.array(name)[latent, own] for name in ("images", "codes"))
            there = images >= 0
            own_evidence = evidence[(with_evidence >= own.start) & (with_evidence < own.stop)]
            own_evidence = own_evidence[: there.sum()]
            found[kind] = Examples(
                images=images[there],
                codes=codes[there],
                prompts=[self.prompts[i] for i in images[there]],
                pictures=self._pictures(images[there].tolist()),
                maps=maps[own][there].reshape(-1, *grid),
                evidence=own_evidence.reshape(*own_evidence.shape[:2], *grid),
            )
        return found

    def _pictures(self, images: list[int]) -> np.ndarray:
        return self.store.images(self.split, images or [0])[: len(images)]


def _best_first(scores: dict[str, Estimate]) -> dict[str, Estimate]:
    """Scores by value: a record's names come back from its file in the order of the alphabet."""
    return dict(sorted(scores.items(), key=lambda item: -np.nan_to_num(item[1].value, nan=-1)))


def _number(value) -> float:
    return float("nan") if value is None else float(value)
