import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.demo import world as scenes
from helpers.measure import labels


def naive_shares(mask, grid):
    rows, columns = np.array(mask.shape) // grid
    return np.array(
        [
            [
                mask[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns].mean()
                for c in range(grid[1])
            ]
            for r in range(grid[0])
        ]
    )


@given(
    seed=st.integers(0, 1000),
    grid=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16])),
)
def test_a_tokens_share_is_the_mean_of_its_patch(seed, grid):
    mask = np.random.default_rng(seed).random((8, 16)) < 0.5
    np.testing.assert_allclose(
        labels.token_shares(mask, grid), naive_shares(mask, grid), atol=1e-12
    )


def found(rows, columns, colour="red", shape="circle"):
    mask = np.zeros((64, 64), bool)
    mask[rows, columns] = True
    return scenes.Found(shape, colour, "small", "solid", "left", mask, 1.0)


def test_labels_of_readings_worked_by_hand():
    one = found(slice(0, 32), slice(0, 40))  # covers token 0 of 2×2, a quarter of token 1
    reading = scenes.Reading((one,), "sky")
    made = labels.from_readings(
        [reading, scenes.Reading((), None), scenes.Reading((), "white")], (2, 2)
    )
    at = {name: made.at_tokens()[:, :, i].tolist() for i, name in enumerate(made.names)}
    none, every = [False] * 4, [True] * 4
    assert at["colour=red"] == at["shape=circle"] == [[True, False, False, False], none, none]
    assert at["background=sky"] == [[False, False, True, True], none, none]
    assert at["background=white"] == [none, none, every]
    assert at["colour=blue"] == [none] * 3
    assert made.of_kind(0).tolist() == [[True, False, False, False], none, none]
    assert (
        made.kind_of(made.names.index("colour=red")) == 0
        and made.kind_of(made.names.index("background=sky")) == 1
    )


def test_readings_of_nothing_give_no_labels():
    made = labels.from_readings([scenes.Reading((), None)] * 2, (2, 2))
    assert made.at_tokens().shape == (2, 4, len(made.names)) and not made.at_tokens().any()


def test_grids_that_are_not_square_are_upright():
    reading = scenes.Reading((found(slice(0, 16), slice(32, 64)),), "sky")
    made = labels.from_readings([reading], (4, 2))
    red = made.at_tokens()[0, :, made.names.index("colour=red")].reshape(4, 2)
    assert np.argwhere(red).tolist() == [[0, 1]]


@given(seed=st.integers(0, 1000))
def test_shuffling_exchanges_labels_among_things_of_one_kind(seed):
    rng = np.random.default_rng(seed)
    colours = list(scenes.COLOURS)
    readings = [
        scenes.Reading(
            (found(slice(0, 32), slice(0, 32), colours[i % 6]),), ("white", "sky")[i % 2]
        )
        for i in range(12)
    ]
    made = labels.from_readings(readings, (2, 2))
    other = made.shuffled(rng)
    assert np.array_equal(made.owner, other.owner) and np.array_equal(made.kind, other.kind)
    for kind in (0, 1):
        before, after = (sorted(map(tuple, x.has[made.kind == kind])) for x in (made, other))
        assert before == after
    assert not np.array_equal(made.has, other.has)


def test_words_are_those_neither_rare_nor_everywhere():
    prompts = [
        "a photo of a Dog, dog",
        "a photo of a cat",
        "a photo of a bird",
        "a photo of a dog and an ox",
    ]
    made = labels.from_words(prompts, 3)
    assert set(made.names) == {"word=dog", "word=cat", "word=bird", "word=and"}
    dog = made.at_tokens()[:, :, made.names.index("word=dog")]
    assert dog.tolist() == [[True] * 3, [False] * 3, [False] * 3, [True] * 3]
    assert made.of_kind(2).all()


@pytest.mark.parametrize("most", [1, 2])
def test_only_the_commonest_words_are_taken(most):
    made = labels.from_words(["dog cat", "dog cat", "dog", "x", "x", "x", "x"], 1, most)
    assert made.names == ["word=dog", "word=cat"][:most]


def test_classes_by_number_are_words_too():
    assert labels.from_words(["207", "3", "207", "9"], 1).names == ["word=207", "word=3", "word=9"]


@pytest.mark.parametrize("prompts", [["", "", ""], ["a dog", "a dog", "a dog"]])
def test_without_telling_words_a_token_is_in_the_upper_or_the_lower_half(prompts):
    made = labels.from_words(prompts, 6)
    assert made.names == ["half=upper", "half=lower"]
    assert made.at_tokens().tolist() == [[[True, False]] * 3 + [[False, True]] * 3] * 3
    assert made.of_kind(made.kind_of(0)).all()
    mixed = made.shuffled(np.random.default_rng(0))
    assert (mixed.owner == made.owner).all() and mixed.has.sum() == 6
