from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.measure.labels import Labels, token_shares


def naive_shares(mask, grid):
    """Every pixel counts for the token that holds its centre."""
    height, width = mask.shape
    total, area = np.zeros(grid), np.zeros(grid)
    for y in range(height):
        for x in range(width):
            at = int((y + 0.5) * grid[0] / height), int((x + 0.5) * grid[1] / width)
            total[at] += mask[y, x]
            area[at] += 1
    return total / area


@given(
    seed=st.integers(0, 1000),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 16)),
)
def test_a_tokens_share_is_the_mean_of_its_patch(seed, grid):
    mask = np.random.default_rng(seed).random((8, 16)) < 0.5
    naive = naive_shares(mask, grid)
    np.testing.assert_allclose(token_shares(mask, grid), naive, atol=1e-6)


def test_shares_of_a_grid_that_does_not_divide_the_image():
    mask = np.zeros((520, 520), bool)
    mask[:, :260] = True
    shares = token_shares(mask, (17, 17))
    assert shares.shape == (17, 17)
    assert (shares[:, :8] == 1).all() and (shares[:, 9:] == 0).all()
    assert shares[:, 8] == pytest.approx(0.5, abs=0.04)  # one of its 30 or 31 columns of pixels


def test_half_a_patch_of_three_pixels_by_six_is_exactly_a_half():
    mask = np.zeros((6, 3), bool)
    mask[[0, 2, 3]] = True
    assert token_shares(mask, (1, 1))[0, 0] == 0.5


@pytest.fixture
def labels():
    """Two images of four tokens: a red and a blue thing and white; a blue thing on sky."""
    return Labels(
        names=["colour=red", "colour=blue", "background=white", "background=sky", "colour=none"],
        owner=np.array([[0, 1, 2, -1], [3, 4, 4, 4]]),
        has=np.eye(5, dtype=bool)[[0, 1, 2, 1, 3]],
        kind=np.array([0, 0, 1, 0, 1]),
    )


def test_labels_of_tokens_are_those_of_what_owns_them(labels):
    red, blue, white, sky, none = np.moveaxis(labels.at_tokens(), -1, 0).astype(int).tolist()
    assert red == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert blue == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert white == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert sky == [[0, 0, 0, 0], [0, 1, 1, 1]]
    assert none == [[0] * 4] * 2
    assert labels.among("colour=red").astype(int).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert [labels.kind_of(name) for name in labels.names] == [0, 0, 1, 1, 0]


def test_a_label_is_contrasted_with_others_of_its_kind_only(labels):
    having, lacking = (v.astype(int).tolist() for v in labels.contrast("colour=blue"))
    assert having == [[0, 1, 0, 0], [1, 0, 0, 0]] and lacking == [[1, 0, 0, 0], [0, 0, 0, 0]]
    having, lacking = (v.astype(int).tolist() for v in labels.contrast("background=sky"))
    assert having == [[0, 0, 0, 0], [0, 1, 1, 1]] and lacking == [[0, 0, 1, 0], [0, 0, 0, 0]]


def test_what_could_not_carry_a_label_is_not_compared(labels):
    applies = np.ones((5, 5), bool)
    applies[3, 0] = False  # the second image's blue thing has, say, no turn
    having, lacking = replace(labels, applies=applies).contrast("colour=red")
    assert np.argwhere(having).tolist() == [[0, 0]] and np.argwhere(lacking).tolist() == [[0, 1]]


def test_labels_of_some_tokens_only(labels):
    few = labels.only(np.array([[3, 1], [0, 2]]))
    assert few.owner.tolist() == [[-1, 1], [3, 4]]
    assert few.at_tokens()[..., 1].tolist() == [[False, True], [True, False]]


def test_nothing_has_no_labels():
    nothing = Labels(["a=b"], np.full((2, 3), -1), np.zeros((0, 1), bool), np.zeros(0, int))
    assert nothing.at_tokens().shape == (2, 3, 1) and not nothing.at_tokens().any()
    assert not np.any(nothing.contrast("a=b"))


@given(seed=st.integers(0, 1000))
def test_shuffling_exchanges_labels_among_things_of_one_kind(seed):
    things = np.arange(16)
    has = np.eye(16, dtype=bool)
    made = Labels([f"a={i}" for i in things], things[None], has, things % 2)
    other = made.shuffled(np.random.default_rng(seed))
    assert np.array_equal(made.owner, other.owner) and np.array_equal(made.kind, other.kind)
    assert sorted(other.has.argmax(1)) == list(things) and (other.has.sum(1) == 1).all()
    assert (other.has.argmax(1) % 2 == things % 2).all()
    assert not np.array_equal(made.has, other.has) and np.array_equal(has, made.has)
