import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.naming import examples
from helpers.naming.examples import choose

STRENGTH = np.array([0, 5, 0, 3, 0, 1, 4, 2, 0, 0, 0, 0.0])
NEAREST = np.array([2, 9, 0, 9, 3, 9, 9, 9, 0, 1, 0, 0.0])


def test_a_choice_worked_by_hand():
    found = choose(STRENGTH, NEAREST, n_described=3, n_judged=2)
    assert found.described.tolist() == [1, 3, 5]  # strengths 5, 3, 1 of 5 … 1
    assert found.matching.tolist() == [6, 7]
    assert found.hard.tolist() == [4, 0]  # silent, and the nearest feature fires most
    assert len(found.random) == 2 and set(found.random) <= {2, 8, 9, 10, 11}
    assert found.n_judged == 6


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 12), st.integers(1, 12))
def test_no_image_serves_twice_and_each_is_of_its_kind(seed, n, n_described, n_judged):
    rng = np.random.default_rng(seed)
    strength = np.maximum(rng.standard_normal(n), 0)
    strength[:2] = 1
    nearest = np.maximum(rng.standard_normal(n), 0)
    sizes = {"n_described": n_described, "n_judged": n_judged}
    found = choose(strength, nearest, **sizes, seed=seed)
    every = np.concatenate(list(vars(found).values()))
    assert len(set(every.tolist())) == len(every)
    assert 1 <= len(found.described) <= n_described and 1 <= len(found.matching) <= n_judged
    assert (strength[np.r_[found.described, found.matching]] > 0).all()
    assert (strength[np.r_[found.random, found.hard]] == 0).all() and (
        nearest[found.hard] > 0
    ).all()
    assert len(found.hard) <= n_judged and len(found.random) <= n_judged
    n_silent = int((strength == 0).sum())
    assert len(found.random) >= min(n_judged, n_silent - n_silent // 2)


def test_a_feature_that_fires_nearly_always_has_hardly_any_images_of_silence():
    found = choose(np.arange(10.0), n_described=4, n_judged=4)
    assert found.random.tolist() == [0] and len(found.hard) == 0


@pytest.mark.parametrize(
    "strength, nearest, said",
    [
        ([0, 0, 1.0], None, "above 0 in 1'; it must be above 0 in two images"),
        ([0, np.nan, 1.0], None, "strength is nan"),
        ([[1.0, 2.0]], None, "shape of strength"),
        ([1.0, 2.0, 0], [1.0], "nearest is 'of 1 images'"),
    ],
)
def test_what_no_name_can_come_from_is_refused(strength, nearest, said):
    with pytest.raises(ValueError, match=said):
        choose(strength, nearest)


def test_a_pixel_has_the_value_of_the_token_that_holds_its_centre():
    maps = np.array([[[1, 2, 3], [4, 5, 6]]])
    assert examples.at_pixels(maps, (3, 4)).tolist() == [
        [[1, 2, 2, 3], [4, 5, 5, 6], [4, 5, 5, 6]]  # centres on an edge belong to what follows
    ]


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 5)])
def test_a_panel_shows_the_image_and_where_the_feature_is_active(channels, grid):
    rng = np.random.default_rng(0)
    images = rng.uniform(0.1, 1, (2, 10, 12, channels)).astype(np.float32)
    maps = rng.random((2, *grid)) * 0.2
    shown = examples.panels(images, maps)
    assert shown.shape == (2, 10, 2 * 12 + examples.GAP, 3) and shown.dtype == np.float32
    image, lit = examples.unpanel(shown[1])
    np.testing.assert_array_equal(image, np.broadcast_to(images[1], (10, 12, 3)))
    np.testing.assert_allclose(
        lit, examples.at_pixels(maps, (10, 12))[1] / maps[1].max(), atol=1e-5
    )


def test_a_silent_image_is_dark_and_a_black_one_shows_no_map():
    dark = examples.panels(np.ones((1, 4, 4, 3)), np.zeros((1, 2, 2)))
    assert dark[0, :, -4:] == pytest.approx(examples.DIM)
    assert examples.unpanel(dark[0])[1] == pytest.approx(0, abs=1e-6)
    assert (
        examples.unpanel(examples.panels(np.zeros((1, 4, 4, 3)), np.ones((1, 2, 2)))[0])[1] == 0
    ).all()


def test_panels_name_the_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="shape of images"):
        examples.panels(np.zeros((1, 4, 4, 2)), np.zeros((1, 2, 2)))
    with pytest.raises(ValueError, match="shape of maps is .*2, rows, columns"):
        examples.panels(np.zeros((2, 4, 4, 3)), np.zeros((1, 2, 2)))


def least_overlap(a):
    """The same by trying every shift."""
    rows, columns = a.shape
    shifts = [(r, c) for r in range(rows) for c in range(columns)]
    return min((a * np.roll(a, s, (0, 1))).sum() for s in shifts)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 7))
def test_a_moved_map_covers_itself_least_and_keeps_its_values(seed, rows, columns):
    rng = np.random.default_rng(seed)
    maps = rng.random((3, rows, columns)) * (rng.random((3, rows, columns)) < 0.4)
    out, can = examples.moved(maps, seed)
    for before, after, possible in zip(maps, out, can):
        assert np.array_equal(np.sort(before, None), np.sort(after, None))
        assert (before * after).sum() == pytest.approx(least_overlap(before), abs=1e-5)
        assert possible == ((before * after).sum() < (before**2).sum() / 2)


def test_maps_without_a_place_cannot_be_moved():
    maps = np.stack([np.ones((4, 4)), np.zeros((4, 4)), np.eye(4)])
    assert examples.moved(maps)[1].tolist() == [False, False, True]
    assert examples.moved(np.ones((2, 1, 1)))[1].tolist() == [False, False]
