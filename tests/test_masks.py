import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.companions import masks
from helpers.measure.labels import Labels


def naive_iou(heat, cut, mask, valid):
    low, high = min(heat), max(heat)
    found = [high > low and (v - low) / (high - low) >= cut for v in heat]
    both = sum(f and m and v for f, m, v in zip(found, mask, valid))
    either = sum((f or m) and v for f, m, v in zip(found, mask, valid))
    return both / max(either, 1)


def random_maps(n, seed):
    rng = np.random.default_rng(seed)
    maps = rng.random((n, 7)).round(1)
    return maps, rng.random((n, 7)) < 0.4, rng.random((n, 7)) < 0.8, rng.integers(4, size=n)


@given(seed=st.integers(0, 1000))
def test_overlaps_are_those_counted_one_by_one(seed):
    maps, true, valid, _ = random_maps(5, seed)
    found = masks.overlaps(maps, true, valid)
    for c, i, j in np.ndindex(found.shape):
        wanted = naive_iou(maps[i], masks.CUTS[c], true[j], valid[j])
        assert found[c, i, j] == pytest.approx(wanted), (c, i, j)


@given(seed=st.integers(0, 1000))
def test_each_half_of_the_images_is_cut_where_the_other_half_says(seed):
    maps, true, valid, images = random_maps(8, seed)
    found, chance = masks.found_and_chance(maps, true, valid, images)
    order = sorted(set(images))
    half = [order.index(i) % 2 for i in images]
    for j in range(8):
        others = [k for k in range(8) if half[k] != half[j]]
        cuts = [
            sum(naive_iou(maps[k], c, true[k], valid[k]) for k in others) if others else c == 0.5
            for c in masks.CUTS.round(2)
        ]
        cut = masks.CUTS[int(np.argmax(cuts))]
        assert found[j] == pytest.approx(naive_iou(maps[j], cut, true[j], valid[j]))
        strangers = [k for k in range(8) if images[k] != images[j]]
        each = [naive_iou(maps[k], cut, true[j], valid[j]) for k in strangers]
        assert chance[j] == pytest.approx(np.mean(each)) if each else np.isnan(chance[j])


def test_a_map_that_knows_its_mask_is_above_chance_and_one_that_does_not_is_not():
    rng = np.random.default_rng(0)
    true, valid, images = rng.random((200, 64)) < 0.2, np.ones((200, 64), bool), np.arange(200)
    knows = true + 0.3 * rng.random((200, 64))
    found, chance = masks.found_and_chance(knows, true, valid, images)
    assert found.mean() > 0.95 and chance.mean() < 0.3
    found, chance = masks.found_and_chance(rng.random((200, 64)), true, valid, images)
    assert found.mean() == pytest.approx(chance.mean(), abs=0.02)


def test_values_of_an_image_are_averaged_and_an_image_without_any_has_none():
    out = masks.per_image(np.array([0.2, 0.4, 1.0]), np.array([0, 0, 2]), 4)
    np.testing.assert_allclose(out, [0.3, np.nan, 1.0, np.nan])


@pytest.fixture
def labels():
    """Two images of four tokens: red, blue, white and nobody's; a thing of no colour on sky."""
    return Labels(
        names=["shape=circle", "colour=red", "colour=blue", "background=sky"],
        owner=np.array([[0, 1, 2, -1], [3, 4, 4, 4]]),
        has=np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], bool),
        kind=np.array([0, 0, 1, 0, 1]),
    )


def test_classes_by_hand(labels):
    assert masks.classes(labels, "colour").tolist() == [[1, 2, 0, -1], [-1, 0, 0, 0]]
    assert masks.classes(labels, "shape").tolist() == [[1, -1, 0, -1], [1, 0, 0, 0]]


def test_mean_iou_by_hand():
    known = np.array([[0, 0, 1, -1], [0, 1, 1, -1]])
    found = np.array([[0, 1, 1, 1], [0, 1, 1, 0]])
    # class 0: 2 of 3 tokens, class 1: 3 of 4; what nobody owns counts nowhere
    estimate = masks.mean_iou(np.tile(found, (30, 1)), np.tile(known, (30, 1)))
    assert estimate.value == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert estimate.low < estimate.value < estimate.high < estimate.low + 0.3
    assert masks.mean_iou(known, known) == (1, 1, 1)


def test_a_probe_reads_what_is_there_and_nothing_from_exchanged_masks():
    rng = np.random.default_rng(0)
    known = rng.integers(-1, 3, size=(40, 6))
    x = np.eye(4)[known + 1] @ rng.normal(size=(4, 5)) + 0.1 * rng.normal(size=(40, 6, 5))
    given, asked = slice(30), slice(30, None)
    found = masks.probe(x[given], known[given], x[asked])
    assert found.shape == (10, 6) and masks.mean_iou(found, known[asked]).value > 0.95
    exchanged = (known[given][rng.permutation(30)] for _ in range(20))
    guessed = [masks.probe(x[given], other, x[asked]) for other in exchanged]
    assert np.mean([masks.mean_iou(g, known[asked]).value for g in guessed]) < 0.4
