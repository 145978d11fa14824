"""Judging the demo model by counting: does what it draws show what its captions say?

The reader looks at images made for captions that no training batch contained, and what it finds is
held against the caption. The control holds it against another image's caption.
"""

import functools
import math
from itertools import product
from pathlib import Path
from string import Template

import numpy as np
from scipy.stats import entropy
from tabulate import tabulate

from helpers.checks import in_range, refuse
from helpers.demo import reader, world
from helpers.demo.model import decode
from helpers.demo.reader import Reading
from helpers.demo.world import Scene
from helpers.measure import metrics
from helpers.measure.metrics import Estimate
from helpers.pipelines.generate import generate, generate_all

NAMES = {a: a for a in world.ATTRIBUTES} | {"colour_at_place": "colour at its place"}
NAMES |= {"count": "number of objects", "all": "everything at once"}
# shares that should be right; 'all', the whole scene, of captions with one object
AIMS = {"colour_at_place": 0.95, "position": 0.95, "shape": 0.9, "size": 0.9}
AIMS |= {"texture": 0.8, "all": 0.75}


def scenes_to_judge(n_captions: int, seed: int) -> list[Scene]:
    """Complete scenes of different captions, equally many of each of `groups`."""
    in_range("n_captions", n_captions, 4, 1200)  # there are no more unseen ones of one object
    if n_captions % 4:
        refuse("n_captions", n_captions, "a multiple of 4")
    rng = np.random.default_rng([seed, 4])
    scenes: dict[str, Scene] = {}  # by caption
    for i, (split, two) in enumerate(product(("unseen", "held_out"), (0.0, 1.0)), 1):
        while len(scenes) < i * n_captions // 4:
            scenes |= {world.caption(s): s for s in world.sample(1, rng, (split,), two)}
    return list(scenes.values())


def groups(wanted: list[Scene]) -> dict[tuple[str, str], np.ndarray]:
    """(split, 'one object' or 'two objects') -> which scenes belong there, bool, (n,)."""
    kinds = [(world.split(s), ("one object", "two objects")[len(s.objects) - 1]) for s in wanted]
    return {kind: np.array([k == kind for k in kinds]) for kind in dict.fromkeys(kinds)}


def named(scenes: list[Scene]) -> list[Scene]:
    """What the scenes' captions say of them: images made from captions can be held to no more."""
    return [world.parse(world.caption(s)) for s in scenes]


def judge(wanted: list[Scene], readings: list[Reading]) -> dict[str, np.ndarray]:
    """`reader.judge` for many: attribute -> share of each scene's objects that are right, (n,)."""
    each = [reader.judge(s, r) for s, r in zip(wanted, readings, strict=True)]
    return {attribute: np.array([j[attribute] for j in each]) for attribute in each[0]}


def estimate(shares: np.ndarray) -> Estimate:
    """Mean over those scenes of which a caption gives the attribute; `metrics.share`'s interval."""
    given = shares[~np.isnan(shares)]
    return metrics.share(given == 1 if np.isin(given, (0, 1)).all() else given)


def estimates(judgements: dict[str, np.ndarray]) -> dict[str, Estimate]:
    """`estimate` for each attribute that some caption gives."""
    given = {a: shares for a, shares in judgements.items() if not np.isnan(shares).all()}
    return {a: estimate(shares) for a, shares in given.items()}


def by_group(judgements: dict, wanted: list[Scene]):
    """`estimates` within each of `groups`."""
    return {
        group: estimates({a: v[members] for a, v in judgements.items()})
        for group, members in groups(wanted).items()
    }


def by_chance(wanted: list[Scene], readings: list[Reading]) -> dict[str, np.ndarray]:
    """The control: each reading judged by the caption of the next image of its group."""
    other = np.arange(len(wanted))
    for members in groups(wanted).values():
        other[members] = np.roll(np.nonzero(members)[0], -1)
    return judge([wanted[i] for i in other], readings)


def against_aims(
    judgements: dict[str, np.ndarray], wanted: list[Scene]
) -> dict[str, tuple[Estimate, float, bool]]:
    """For each of `AIMS`: what was measured, the aim, and whether the measured share reaches it."""
    one = np.array([len(s.objects) == 1 for s in wanted])
    measured = {a: estimate(judgements[a][one] if a == "all" else judgements[a]) for a in AIMS}
    return {a: (e, AIMS[a], e.value >= AIMS[a]) for a, e in measured.items()}


def spread(readings: list[Reading]) -> dict[str, float]:
    """How evenly the values of attributes are spread: entropy as a share of its largest, 0 to 1."""
    found = [thing for _, thing in reader.things(readings)]
    out = {}
    for attribute, values in world.ATTRIBUTES.items():
        read = [getattr(thing, attribute, None) for thing in found]
        counts = [read.count(v) for v in values]
        out[attribute] = float(entropy(counts) / np.log(len(values))) if any(counts) else math.nan
    return out


def evaluate(pipe, wanted: list[Scene], seeds, batch_size: int = 50, **sampling):
    """Images for the scenes' captions, (n, 64, 64, 3) in [0, 1], their readings and `judge`'s.

    They are judged by what is `named`.
    """
    captions = [world.caption(s) for s in wanted]
    images = generate_all(pipe, captions, seeds, batch_size, desc="sampling", **sampling)
    readings = reader.read(images)
    return images, readings, judge(named(wanted), readings)


def predicted_images(pipe, prompts: list[str], seeds, **sampling) -> np.ndarray:
    """The finished image that the model predicts at each step: (step, n, 64, 64, 3), in [0, 1].

    The scheduler's `pred_original_sample`, equation 9 of Song et al. (2021), arXiv:2010.02502,
    decoded.
    """
    clean, step = [], pipe.scheduler.step

    @functools.wraps(step)
    def remember(*args, **kwargs):
        result = step(*args, **kwargs)
        clean.append(result[1] / pipe.vae.config.scaling_factor)
        return result

    pipe.scheduler.step = remember
    try:
        generate(pipe, prompts, seeds, **sampling)
    finally:
        del pipe.scheduler.step
    return np.stack([decode(pipe.vae, c) for c in clean])


def percent(estimate: Estimate) -> str:
    """An estimate and its interval in percent; a dash where there was nothing to measure."""
    if math.isnan(estimate.value):
        return "–"
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * v for v in estimate))


def table(columns: dict[str, dict[str, Estimate]], first: str = "attribute") -> str:
    """A Markdown table of estimates in percent: attributes down, named columns across."""
    attributes = next(iter(columns.values()))
    rows = [[NAMES[a], *(percent(c[a]) for c in columns.values())] for a in attributes]
    return tabulate(rows, [first, *columns], "github", disable_numparse=True)


def quality_table(quality: dict[tuple[str, str], dict[str, Estimate]]) -> str:
    """A Markdown table of what `by_group` gives."""
    columns = {f"{split.replace('_', ' ')}, {kind}": v for (split, kind), v in quality.items()}
    return table(columns, "right, of what the caption asks")


def aims_table(aims: dict[str, tuple[Estimate, float, bool]]) -> str:
    """A Markdown table of what `against_aims` gives."""
    rows = []
    for a, (measured, aim, met) in aims.items():
        on = "one-object captions" if a == "all" else "all captions"
        aim = f"≥ {100 * aim:.0f} %"
        rows.append([NAMES[a], on, percent(measured), aim, "met" if met else "not met"])
    header = ["attribute", "judged on", "measured", "aim", ""]
    return tabulate(rows, header, "github", disable_numparse=True)


def model_card(parameters: dict, seconds: dict[str, float], size: int, found: dict) -> str:
    """README.md of the pipeline's folder: `card.md` with what notebook 00 measured.

    Of its `parameters`, `device` is the one used; `seconds` are of 'autoencoder' and 'denoiser';
    `size` is in bytes; `found` has 'quality' and 'chance' of `by_group`, 'aims' of `against_aims`.
    """
    missed = [NAMES[a] for a, (_, _, met) in found["aims"].items() if not met]
    chance = {group: {a: v[a] for a in AIMS} for group, v in found["chance"].items()}
    numbers = {k: f"{v:,}" if isinstance(v, int) else v for k, v in parameters.items()}
    return Template((Path(__file__).parent / "card.md").read_text()).substitute(
        numbers,
        device=parameters["device"].upper(),
        megabytes=f"{size / 1e6:.1f}",
        example=world.caption(world.EXAMPLE),
        held_out=", ".join(f"{colour} {shape}" for colour, shape in world.HELD_OUT),
        **{f"{network}_minutes": f"{s / 60:.0f}" for network, s in seconds.items()},
        quality=quality_table(found["quality"]),
        aims=aims_table(found["aims"]),
        chance=quality_table(chance),
        missed=", ".join(missed) or "none",
    )
