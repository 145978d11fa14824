import numpy as np
import pytest
from scipy.stats import ttest_1samp

from helpers.measure import frontier
from helpers.measure.metrics import Estimate


def test_a_curve_is_read_at_a_change_worked_by_hand():
    effect, change = [0.2, 0.6, 0.4], [1.0, 3.0, 5.0]
    assert frontier.at_change(effect, change, 0.5) == pytest.approx(0.1)  # on the way from nothing
    assert frontier.at_change(effect, change, 2.0) == pytest.approx(0.4)
    assert frontier.at_change(effect, change, 4.0) == pytest.approx(0.5)
    assert frontier.at_change(effect, change, 9.0) == pytest.approx(0.4)  # held at its strongest


def test_the_area_up_to_a_change_worked_by_hand():
    effect, change = [0.2, 0.6, 0.4], [1.0, 3.0, 5.0]
    assert frontier.area(effect, change, 1.0) == pytest.approx(0.1)
    assert frontier.area(effect, change, 3.0) == pytest.approx((0.1 + 2 * 0.4) / 3)
    assert frontier.area(effect, change, 2.0) == pytest.approx((0.1 + 0.3) / 2)
    held = (0.1 + 2 * 0.4 + 2 * 0.5 + 2 * 0.4) / 7
    assert frontier.area(effect, change, 7.0) == pytest.approx(held)


def test_area_is_the_mean_of_what_the_curve_shows_at_every_change():
    rng = np.random.default_rng(0)
    effect, change = rng.random(6), np.sort(rng.random(6))
    levels = np.linspace(0, 0.7, 20001)[1:]
    mean = np.mean([frontier.at_change(effect, change, level) for level in levels])
    assert frontier.area(effect, change, 0.7) == pytest.approx(mean, abs=1e-3)


def test_what_comes_after_a_stronger_change_is_no_part_of_a_curve():
    """Saturated images may change less again: the way there counts, not the way back."""
    there, back = [0.2, 0.6, 0.1], [1.0, 3.0, 2.0]
    for level in (0.5, 2.0, 3.0, 4.0):
        expected = frontier.at_change(there[:2], back[:2], level)
        assert frontier.at_change(there, back, level) == expected
        assert frontier.area(there, back, level) == frontier.area(there[:2], back[:2], level)


def test_what_was_not_measured_is_left_out():
    nan = float("nan")
    assert frontier.at_change([0.2, nan, 0.4], [1, 2, 3], 2) == pytest.approx(0.3)
    assert np.isnan(frontier.at_change([nan], [nan], 2))
    assert np.isnan(frontier.area([nan], [nan], 2))


def test_the_best_strength_is_the_weakest_of_equals_among_those_allowed():
    assert frontier.best([0.1, 0.5, 0.5]) == 1
    assert frontier.best([0.1, 0.5, 0.9], [True, True, False]) == 1
    assert frontier.best([0.1, 0.5], [False, False]) == 0
    assert frontier.best([float("nan"), 0.1]) == 1


def test_each_half_is_measured_at_the_strength_that_the_other_chose():
    judged = np.array([[0.0, 0.3, 0.9], [0.8, 0.1, 0.2]])
    value, places = frontier.crossed(judged, judged)
    assert places == [0, 2] and value == pytest.approx((0.0 + 0.2) / 2)
    kept = np.array([[1.0, 0.9, 0.5], [1.0, 0.8, 0.4]])
    assert frontier.crossed(judged, kept)[0] == pytest.approx((1.0 + 0.4) / 2)
    allowed = np.array([[True, True, False], [True, True, True]])
    assert frontier.crossed(judged, judged, allowed)[1] == [0, 1]


def test_a_choice_among_noise_gains_nothing_when_it_is_crossed():
    """The control: the best of many strengths on the same images looks better than it is."""
    noise = np.random.default_rng(0).random((2000, 2, 8))
    crossed = np.mean([frontier.crossed(halves, halves)[0] for halves in noise])
    assert crossed == pytest.approx(0.5, abs=0.02) and noise.max(2).mean() > 0.8


def test_students_interval_and_p_are_scipys():
    values = np.array([0.1, 0.3, 0.2, 0.25, 0.05])
    estimate, p = frontier.student(values)
    expected = ttest_1samp(values, 0)
    assert p == pytest.approx(expected.pvalue)
    assert estimate[1:] == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert frontier.student([*values, float("nan")]) == frontier.student(values)


def test_one_training_or_none_has_no_interval_and_no_test():
    estimate, p = frontier.student([0.5])
    assert estimate.value == 0.5 and np.isnan([estimate.low, estimate.high, p]).all()
    assert np.isnan(frontier.student([])[0].value)
    assert frontier.student([0.0, 0.0, 0.0])[1] == 1.0


def test_a_ratio_holds_those_multiples_at_which_the_difference_may_be_zero():
    rng = np.random.default_rng(1)
    theirs = 0.3 + 0.03 * rng.standard_normal(6)
    ours = 1.6 * theirs + 0.02 * rng.standard_normal(6)
    found = frontier.times(ours, theirs)
    assert found.low < found.value < found.high
    for end in (found.low, found.high):
        assert ttest_1samp(ours - end * theirs, 0).pvalue == pytest.approx(0.05, abs=1e-6)


def test_a_ratio_to_what_may_be_nothing_has_no_ends():
    found = frontier.times([0.2, 0.3, 0.4], [0.1, -0.1, 0.05])
    assert np.isfinite(found.value) and np.isnan(found[1:]).all()
    assert np.isnan(frontier.times([1.0, 2.0], [0.0, 0.0]).value)


def test_fiellers_interval_covers():
    rng, covered = np.random.default_rng(2), 0
    for _ in range(400):
        both = rng.multivariate_normal([0.3, 0.2], [[0.004, 0.002], [0.002, 0.003]], 5)
        found = frontier.times(*both.T)
        covered += not found.low > 1.5 and not found.high < 1.5
    assert 0.92 <= covered / 400 <= 0.98


def test_holms_correction_worked_by_hand():
    nan = float("nan")
    found = frontier.holm([0.01, nan, 0.04, 0.03])
    np.testing.assert_allclose(found, [0.03, nan, 0.06, 0.06])
    assert frontier.holm([0.5, 0.6]).tolist() == [1.0, 1.0]
    assert isinstance(frontier.student([1.0, 2.0])[0], Estimate)
