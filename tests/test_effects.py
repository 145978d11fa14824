import numpy as np
import pytest

from helpers.measure import effects, metrics
from helpers.measure.words import Words


class Reader:
    """A truth that takes an image's mean for what it shows."""

    def outcome(self, target, before, after):
        level = float(target.split("=")[1])
        return {
            "success": after.mean((1, 2, 3)) >= level,
            "kept": np.linspace(0, 1, len(after)),
        }


@pytest.mark.parametrize(
    "grid, size", [((2, 2), (4, 6)), ((8, 8), (64, 64)), ((17, 17), (520, 520)), ((3, 5), (16, 24))]
)
def test_weights_at_pixels_are_those_of_the_token_that_holds_the_pixels_centre(grid, size):
    weights = np.random.default_rng(0).random((2, grid[0] * grid[1]))
    expected = np.empty((2, *size))
    for y in range(size[0]):
        for x in range(size[1]):
            row = int((y + 0.5) * grid[0] / size[0])
            column = int((x + 0.5) * grid[1] / size[1])
            expected[:, y, x] = weights[:, row * grid[1] + column]
    before, after = np.random.default_rng(1).random((2, 2, *size, 3))
    change, total = effects.measure(Words(), "word=dog", before, after, weights, grid)["inside"]
    changes = abs(after - before).mean(-1)
    np.testing.assert_allclose(change, (changes * expected).sum((1, 2)))
    np.testing.assert_allclose(total, expected.sum((1, 2)))


def test_change_inside_and_outside_worked_by_hand():
    before = np.zeros((2, 2, 4, 3))
    after = before.copy()
    after[0, :, :2] = 0.5  # the left half of the first image, and one corner of the second
    after[1, 1, 3, 0] = 0.3
    weights = np.array([[1.0, 0.0], [0.25, 0.5]])  # left and right token
    found = effects.measure(Words(), "level=0.2", before, after, weights, (1, 2))
    assert set(found) == {"inside", "outside"}
    np.testing.assert_allclose(found["inside"], [[4 * 0.5, 0.1 * 0.5], [4, 4 * 0.25 + 4 * 0.5]])
    np.testing.assert_allclose(found["outside"], [[0, 0.1 * 0.5], [4, 4 * 0.75 + 4 * 0.5]])
    summary = effects.summary(found)
    assert summary["inside"].value == pytest.approx(2.05 / 7)
    assert effects.headline(summary) == ("inside", "outside")


def test_success_counts_as_much_as_was_kept():
    before, after = np.zeros((3, 2, 2, 3)), np.ones((3, 2, 2, 3))
    after[2] = 0
    found = effects.measure(Reader(), "level=0.5", before, after, np.ones((3, 1)), (1, 1))
    np.testing.assert_array_equal(found["success"], [True, True, False])
    np.testing.assert_array_equal(found[effects.GAIN], [0, 0.5, 0])
    summary = effects.summary(found)
    assert summary["success"] == metrics.share([True, True, False])
    assert summary["kept"] == metrics.share([0, 0.5, 1])
    assert effects.headline(summary) == ("success", "kept")


def test_what_has_no_label_is_not_judged():
    before, after = np.zeros((2, 2, 2, 3)), np.ones((2, 2, 2, 3))
    found = effects.measure(Reader(), "cluster 1", before, after, np.eye(2), (1, 2))
    assert set(found) == {"inside", "outside"}
    assert effects.summary(found)["inside"].value == 1


def test_what_was_to_go_and_is_read_is_still_there():
    before, after = np.zeros((2, 2, 2, 3)), np.ones((2, 2, 2, 3)) * [[[[1]]], [[[0]]]]
    found = effects.measure(Reader(), "level=0.5", before, after, np.ones((2, 1)), (1, 1))
    left = effects.left_over(found)
    assert set(left) == {"still there", "kept", "inside", "outside"}
    assert left["still there"] == metrics.share([True, False])


def test_targets_join_to_one():
    before, after = np.zeros((2, 2, 2, 3)), np.ones((2, 2, 2, 3))
    each = [
        effects.measure(Reader(), "level=0.5", before, after * level, np.ones((2, 1)), (1, 1))
        for level in (0, 1)
    ]
    each[1]["kept size"] = np.ones(2, bool)  # measured for one of them alone
    both = effects.joined(each)
    assert "kept size" not in both
    assert effects.summary(both)["success"] == metrics.share([False, False, True, True])
    assert effects.summary(both)["inside"].value == 0.5
    assert effects.joined([]) == {}


def test_the_measures_shown_are_those_asked_for_that_are_there_or_the_headline():
    summarised = {"success": metrics.Estimate(0.5, 0.25, 0.75), "kept": metrics.Estimate(1, 0.5, 1)}
    assert effects.some(summarised, "kept", "size") == {"kept": summarised["kept"]}
    assert effects.some(summarised, "size") == effects.some(summarised) == summarised


def response(gains):
    return {s: {effects.GAIN: metrics.Estimate(g, 0, 1)} for s, g in gains.items()}


def test_the_strength_is_that_of_the_largest_gain_and_of_equals_the_weakest():
    assert effects.best_strength(response({1.0: 0.2, 2.0: 0.5, 4.0: 0.5, 8.0: 0.1})) == 2.0
    assert effects.best_strength({4.0: {}, 1.0: {}, 2.0: {}}) == 2.0  # nothing to judge by


@pytest.mark.parametrize(
    "strength, words", [(1, "the weakest tried"), (2, ""), (4, "the strongest tried")]
)
def test_a_strength_at_the_edge_of_those_tried_is_flagged(strength, words):
    assert effects.edge(strength, [1, 2, 4]) == words
    assert effects.edge(strength, [strength]) == ""


def test_directions_are_compared_by_image_on_each_target_and_on_all():
    gains = {
        ("a", "ours"): [1.0, 1.0, 1.0, 0.5],
        ("a", "theirs"): [0.0, 0.0, 0.0, 0.0],
        ("b", "ours"): [0.0, 0.5],
        ("b", "theirs"): [1.0, 0.5],
        ("b", "other"): [0.0, 0.5],
    }
    found = effects.compared({k: {effects.GAIN: np.array(v)} for k, v in gains.items()}, "ours")
    assert found["a", "theirs"] == metrics.paired([1, 1, 1, 0.5], [0, 0, 0, 0])
    assert found[effects.ALL, "theirs"].value == pytest.approx((3.5 - 1) / 6)
    assert found[effects.ALL, "other"] == found["b", "other"]
    verdicts = effects.verdicts(found)
    assert list(verdicts) == ["theirs", "other"]
    assert (verdicts["theirs"]["ahead"], verdicts["theirs"]["of"]) == (1, 2)
    assert verdicts["other"]["behind"] == 0
    assert verdicts["theirs"]["difference"] == found[effects.ALL, "theirs"]


def test_where_nothing_is_judged_nothing_is_compared():
    assert effects.compared({("a", "ours"): {}, ("a", "theirs"): {}}, "ours") == {}
    assert effects.verdicts({}) == {}
