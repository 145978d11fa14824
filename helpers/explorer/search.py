"""Finding latents, and a view's state as text that can be printed and opened again.

demo/residual/latent=12&find=red&sort=-peak
"""

import math
import re
from dataclasses import dataclass, fields
from urllib.parse import parse_qsl, quote, unquote, urlencode

import numpy as np

from helpers.checks import in_range, one_of, refuse
from helpers.explorer.record import STATISTICS

REGION = "painted share"  # of a latent's mean code, how much lies within the painted tokens
SORTS = ("latent", *STATISTICS, REGION)


@dataclass(frozen=True)
class State:
    """What a view shows: a latent, the search that led to it, and what it is steered with."""

    run: str = "demo"
    dictionary: str = "residual"
    latent: int = 0
    find: str = ""  # as `find` takes it
    sort: str = ""
    prompt: str = ""
    seed: int = 0
    strength: float = 0.0
    first: int = 0  # denoising steps between which to steer, both included
    last: int = -1  # -1 is the sampler's last
    mask: tuple[int, ...] = ()  # numbers of the painted tokens, ascending; none: everywhere

    def __str__(self) -> str:
        """The text: run, dictionary and latent always, all else where it is not the usual."""
        shown = {"latent": self.latent}
        for f in fields(self)[3:]:
            value = getattr(self, f.name)
            if value != f.default:
                shown[f.name] = ranges(value) if f.name == "mask" else value
        path = "/".join(quote(part, safe="") for part in (self.run, self.dictionary))
        return f"{path}/{urlencode(shown, safe=',=')}"

    @staticmethod
    def parse(text: str) -> "State":
        """The state that a text tells; ValueError names what is wrong with it."""
        run, slash, rest = text.strip().partition("/")
        dictionary, second, rest = rest.partition("/")
        if not (run and slash and dictionary and second):
            refuse("state", text, "like 'demo/residual/latent=12&sort=peak'")
        known = {f.name: f.type for f in fields(State)[2:]}
        found: dict = {"run": unquote(run), "dictionary": unquote(dictionary)}
        for name, value in parse_qsl(rest, keep_blank_values=True):
            kind = known[one_of("state's parameter", name, known)]
            found[name] = numbers(value) if name == "mask" else _read(name, value, kind)
        if found.get("sort"):
            check_sort(found["sort"])
        return State(**found)


def _read(name: str, value: str, kind):
    try:
        found = kind(value)
    except ValueError:
        refuse(name, value, f"a number ({kind.__name__})")
    if kind is float and not math.isfinite(found):
        refuse(name, value, "finite")
    return found


def ranges(numbers_: tuple[int, ...]) -> str:
    """Numbers as text, such as '0-3,8': runs of neighbours by their ends."""
    parts: list[list[int]] = []
    for i in sorted(set(numbers_)):
        if parts and i == parts[-1][-1] + 1:
            parts[-1][1:] = [i]
        else:
            parts.append([i])
    return ",".join("-".join(map(str, part)) for part in parts)


def numbers(text: str) -> tuple[int, ...]:
    """The numbers that `ranges` wrote; ValueError for other text."""
    found: set[int] = set()
    for part in text.split(",") if text else ():
        if not re.fullmatch(r"\d{1,7}(-\d{1,7})?", part):
            refuse("mask", text, "numbers of tokens and ranges of them, such as '0-3,8'")
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    return tuple(sorted(found))


def check_sort(sort: str) -> str:
    """A statistic's name or 'latent', descending with a '-' in front; else ValueError."""
    one_of("sort", sort.removeprefix("-"), SORTS)
    return sort


def find(records, query: str = "", sort: str = "", region=None) -> list[int]:
    """Latents that a query names, best match first, or in the order of a statistic.

    `query`: nothing, an index ('12'), 'like 12', or text: part of a name, a label ('colour=red') or
    its value, a word of the prompts. By a word come latents whose examples have it more often than
    all prompts do, by how much more. `sort`: one of SORTS, '-peak' for the largest first; latents
    of which there is nothing to say come last. `region`, for 'painted share': bool (rows, columns).
    """
    found = _matching(records, query.strip())
    if sort:
        name = check_sort(sort).removeprefix("-")
        if name == REGION:
            values = inside(records, region)[found]
        else:
            values = found if name == "latent" else records.table[name][found]
        order = np.argsort(-values if sort[0] == "-" else values, kind="stable")  # NaN comes last
        found = found[order]
    return found.tolist()


def inside(records, region) -> np.ndarray:
    """Share of each latent's mean code that lies within a region, bool (rows, columns): (latent,).

    0 for latents that never fire. ValueError where no token is painted.
    """
    if region is None or not np.any(region):
        refuse("mask", (), f"painted where the order is by {REGION}")
    region, mean_map = np.asarray(region, bool), records.array("mean_map")
    if region.shape != tuple(records.store.grid):
        refuse("region", region.shape, f"of the token grid, {tuple(records.store.grid)}")
    return mean_map[:, region.ravel()].sum(1) / np.maximum(mean_map.sum(1), 1e-12)


def _matching(records, query: str) -> np.ndarray:
    if not query:
        return np.arange(records.n_latents)
    if query.isdecimal():
        return np.array([in_range("latent", int(query), 0, records.n_latents - 1)])
    like = re.fullmatch(r"like\s+(\d+)", query, re.IGNORECASE)
    if like:
        latent = in_range("latent", int(like[1]), 0, records.n_latents - 1)
        near = [n.latent for own in records.near(latent).values() for n in own]
        return np.array([*dict.fromkeys(near)], int)
    relevance = _word(records, query)  # below 1
    for latent, own in records.labels.items():
        at = [e.value for label, e in own.items() if _is_label(query, label)]
        relevance[latent] = max([relevance[latent], *(1 + v for v in at)])
    for latent, name in records.names.items():
        if query.casefold() in name.text.casefold():
            relevance[latent] += 2
    found = np.flatnonzero(relevance > 0)
    return found[np.argsort(-relevance[found], kind="stable")]


def _is_label(query: str, label: str) -> bool:
    return query.casefold() in (label.casefold(), *label.casefold().split("=", 1))


def _word(records, query: str) -> np.ndarray:
    """By how much the share of a latent's examples with these words exceeds all prompts' share."""
    word = re.compile(rf"\b{re.escape(query)}\b", re.IGNORECASE)
    has = np.array([bool(word.search(prompt)) for prompt in records.prompts])
    images = records.array("images")
    there = images >= 0
    share = (has[images] & there).sum(1) / np.maximum(there.sum(1), 1)
    return np.where(share > has.mean(), share - has.mean(), 0)


def best(records, n: int = 12) -> list[int]:
    """n latents to show first: the best of each label by its interval's lower end, then others.

    Of those without a label, the ones that do most: share of tokens · largest code · effect.
    """
    every = records.labels.items()
    ranked = [(e.low, latent, label) for latent, own in every for label, e in own.items()]
    of_label: dict[str, int] = {}
    for low, latent, label in sorted(ranked, key=lambda of: (-of[0], of[1])):
        if low > 0.5 and latent not in of_label.values():
            of_label.setdefault(label, latent)
    size = np.linalg.norm(records.array("effect"), axis=1)
    strength = records.table["firing rate"] * records.table["largest code"] * size
    others = [i for i in np.argsort(-strength, kind="stable").tolist() if strength[i] > 0]
    return [*dict.fromkeys([*of_label.values(), *others])][:n]
