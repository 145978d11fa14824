from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from explored import tiny_run

from helpers.explorer import page, records
from helpers.explorer.examples import Counts
from helpers.explorer.record import Name, Strip
from helpers.measure.metrics import NOTHING, Estimate

COUNTS = Counts(random=3, quantile=4, top=2, sample=6)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    run = tiny_run(tmp_path_factory.mktemp("run"))
    run.dictionary.coder.threshold[7] = 1e9
    return records.build(run, counts=COUNTS)


@pytest.fixture(scope="module")
def record(built):
    return built.record(2)


def texts(fig):
    """Everything written on a figure's panels, from top to bottom."""
    found = []
    for part in fig.subfigs:
        for ax in part.axes:
            found += [ax.get_title(), *(t.get_text() for t in ax.texts)]
            found += [t.get_text() for t in ax.get_yticklabels()]
    return [t.strip() for t in found if t.strip()]


def test_panels_come_in_order_and_say_what_the_record_holds(record):
    fig = page.draw(record)
    said = texts(fig)
    order = ["firing rate", "random images in which it fires", "its strongest images"]
    order += ["evidence, step by step", "t = 961", "nearest by trajectory"]
    assert [said.index(t) for t in order] == sorted(said.index(t) for t in order)
    assert fig.get_suptitle() == "tiny, residual, latent 2: word=red"
    assert page.in_words("firing rate", record.statistics["firing rate"]) in said
    assert "AUROC, word=red" in said and str(record.labels["word=red"]) in said
    lines = next(ax for part in fig.subfigs for ax in part.axes if ax.lines)
    assert [line.get_ydata().tolist() for line in lines.lines] == [
        record.effect.tolist(),
        record.onset.tolist(),
    ]
    plt.close(fig)


def test_a_name_and_a_strip_are_shown_where_they_are_given(record):
    assert not any(t.startswith("steered") for t in texts(page.draw(record)))
    strip = Strip(np.array([-1, 0, 2.5]), np.zeros((3, 6, 7, 3)), "a cat")
    named = replace(record, name=Name("warm", Estimate(0.8, 0.7, 0.9)), strip=strip)
    fig = page.draw(named)
    said = texts(fig)
    assert {"warm", "0.800 [0.700, 0.900]", "×-1", "×2.5"} <= {*said}
    assert "steered along it: “a cat”" in said and fig.get_suptitle().endswith("latent 2: warm")
    plt.close("all")


@pytest.mark.parametrize("channels", [1, 3])
def test_any_channels_and_latents_that_never_fire_are_drawn(tmp_path, channels):
    run = tiny_run(tmp_path, channels, labels=False)
    run.dictionary.coder.threshold[7] = 1e9
    built = records.build(run, counts=COUNTS)
    fig = page.draw(built.record(7))
    assert "top: it fires in none of these images" in texts(fig)
    assert "evidence, step by step" not in texts(fig)
    fig.draw_without_rendering()
    page.draw(built.record(3)).draw_without_rendering()
    plt.close("all")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("firing rate", 0.01234, "1.23%"),
        ("images", 0.5, "50%"),
        ("peak", 12.0, "12"),
        ("label score", 0.87654, "0.877"),
        ("onset", float("nan"), "–"),
    ],
)
def test_statistics_in_words(name, value, words):
    assert page.in_words(name, value) == words


def test_a_score_that_nobody_knows_is_a_dash(record):
    said = page.statistics(replace(record, name=Name("x", NOTHING)))
    assert said["name's score"] == "–" and said["name"] == "x"
    assert page.statistics(replace(record, name=Name("x")))["name's score"] == "–"


def test_latents_are_listed_with_the_statistic_they_are_sorted_by(built):
    rate, score = (built.table[name][2] for name in ("firing rate", "label score"))
    assert page.row(built, 2).split() == ["2", "word=red", page.in_words("firing rate", rate)]
    assert page.row(built, 2, "-label score").split()[2] == f"{score:.3f}"
    assert page.row(built, 7, "latent").split() == ["7", "–", "0.00%"]
    assert len({len(page.row(built, i)) for i in range(16)}) == 1


def test_the_overview_has_all_statistics_in_words(built):
    red, silent = page.overview(built, [2, 7])
    assert list(red)[:2] == ["latent", "name or label"] and list(red)[2:] == list(built.table)
    assert (red["latent"], red["name or label"]) == (2, "word=red")
    assert silent["images"] == "0.00%" and silent["peak"] == "–"
