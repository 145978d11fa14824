import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.measure.metrics import Z
from helpers.naming import scores
from helpers.naming.examples import Examples, unpanel

ANSWERS = st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0, float("nan")]), min_size=1, max_size=9)


def naive_auc(a, b):
    return np.mean([[(x > y) + (x == y) / 2 for y in b] for x in a])


@given(ANSWERS, ANSWERS)
def test_figures_are_those_of_all_pairs_and_of_counting(matching, others):
    found = scores.score(matching, others)
    a, b = ([0.5 if np.isnan(v) else v for v in side] for side in (matching, others))
    assert found.auc.value == pytest.approx(naive_auc(a, b))
    yes = np.mean([0.5 if v == 0.5 else v > 0.5 for v in a])
    no = np.mean([0.5 if v == 0.5 else v < 0.5 for v in b])
    assert found.balanced.value == pytest.approx((yes + no) / 2)
    assert found.n == (len(a), len(b))
    assert found.unanswered == np.isnan(matching).sum() + np.isnan(others).sum()
    for value, low, high in (found.auc, found.balanced):
        assert 0 <= low <= value <= high <= 1 and high - low > 0.05


@pytest.mark.parametrize("answer", [0.0, 0.3, 0.5, 1.0, float("nan")])
def test_a_constant_judge_gets_one_half(answer):
    for found in (
        scores.score([answer] * 7, [answer] * 4),
        scores.paired([answer] * 7, [answer] * 7),
    ):
        assert found.auc.value == found.balanced.value == 0.5
        assert found.auc.low < 0.5 < found.auc.high


def test_a_perfect_judge_of_few_images_is_not_certain():
    few, many = (scores.score([1.0] * n, [0.0] * n) for n in (3, 100))
    assert few.auc.value == many.auc.value == few.balanced.value == 1
    assert few.auc.low < 0.75 < 0.95 < many.auc.low < 1 == many.auc.high
    assert few.balanced.low < 0.8 < 0.95 < many.balanced.low
    wrong = scores.score([0.0] * 3, [1.0] * 3).auc
    assert (wrong.value, wrong.low) == (0, 0) and wrong.high == pytest.approx(1 - few.auc.low)


def test_the_interval_of_a_perfect_auc_solves_newcombes_equation():
    low, n, m = scores.auc([1.0] * 10, [0.0] * 15).low, 10, 15
    spread = 1 + ((n + m) / 2 - 1) * ((1 - low) / (2 - low) + low / (1 + low))
    assert 1 - low == pytest.approx(Z * np.sqrt(low * (1 - low) * spread / (n * m)), abs=1e-6)


def test_the_intervals_hold_the_truth_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), {"auc": [], "balanced": []}
    for _ in range(300):
        a, b = rng.random(12) ** 0.5, rng.random(12)  # P(a > b) = 2/3; P(a > ½) = ¾, P(b < ½) = ½
        found = scores.score(a, b)
        hits["auc"].append(found.auc.low <= 2 / 3 <= found.auc.high)
        hits["balanced"].append(found.balanced.low <= 5 / 8 <= found.balanced.high)
    assert 0.92 <= np.mean(hits["auc"]) <= 0.99 and 0.92 <= np.mean(hits["balanced"]) <= 0.995


@pytest.mark.parametrize("sides", [([], [1.0]), ([1.0], []), ([], [])])
def test_without_images_of_either_kind_there_is_no_score(sides):
    found = scores.score(*sides)
    assert np.isnan(found.auc.value) and np.isnan(found.balanced.value)


def test_pairs_are_compared_within_their_image():
    found = scores.paired([0.9, 0.2, 0.7, float("nan")], [0.8, 0.1, 0.7, 0.5])
    assert found.auc.value == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    rights = [(1 + 0) / 2, (0 + 1) / 2, (1 + 0) / 2, (0.5 + 0.5) / 2]
    assert found.balanced.value == pytest.approx(np.mean(rights)) and found.unanswered == 1


EXAMPLES = Examples(*(np.array(i) for i in ([0, 1], [2, 3], [4, 5], [6])))


def test_detection_asks_once_about_each_judged_image_and_of_no_described_one():
    images, asked = np.arange(7.0)[:, None, None, None] * np.ones((1, 2, 2, 3)), []

    def judge(image, name):
        asked.append(int(image[0, 0, 0]))
        return {2: 1.0, 3: 0.6, 4: 0.0, 5: 0.1, 6: 0.9}[asked[-1]]

    found = scores.detection(judge, "cat", images, EXAMPLES)
    assert sorted(asked) == [2, 3, 4, 5, 6]
    assert found["random"].auc.value == 1 and found["random"].balanced.value == 1
    assert found["hard"].auc.value == 0.5 and found["hard"].balanced.value == 0.5


def test_localisation_tells_a_judge_who_looks_at_the_map_from_one_who_does_not():
    images = np.full((3, 8, 8, 1), 0.5)
    maps = np.zeros((3, 4, 4))
    maps[0, 0, 0] = maps[1, 0, 1] = 1
    maps[2] = 1  # everywhere, so that it cannot be moved

    def looks(panel, name):
        image, lit = unpanel(panel)
        return float(lit[:2, :4].mean() > 0.1)

    found = scores.localisation(looks, "top left", images, maps)
    assert found.n == (2, 2) and found.auc.value == 1 and found.balanced.value >= 0.75
    blind = scores.localisation(lambda panel, name: 0.7, "top left", images, maps)
    assert blind.auc.value == blind.balanced.value == 0.5
    assert scores.localisation(looks, "x", images[2:], maps[2:]) == scores.NO_SCORE


@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 5))
def test_coherence_is_the_mean_cosine_of_all_pairs(seed, n, d):
    e = np.random.default_rng(seed).standard_normal((n, d))
    unit = e / np.linalg.norm(e, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(n) for j in range(n) if i != j]
    assert scores.coherence(e) == pytest.approx(np.mean(pairs), abs=1e-9)


def test_one_image_has_no_coherence():
    assert np.isnan(scores.coherence(np.ones((1, 3))))
