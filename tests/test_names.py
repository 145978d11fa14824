import numpy as np
import pytest

from helpers.measure.metrics import Estimate
from helpers.naming import names
from helpers.naming.examples import Examples, unpanel
from helpers.naming.scores import Score

IMAGES = np.linspace(0.1, 1, 8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.float32)
MAPS = np.zeros((8, 4, 4))
MAPS[:4, 0, 0] = 1
EXAMPLES = Examples(*(np.array(i) for i in ([0, 1], [2, 3], [5, 4], [6, 7])))


def callables(asked):
    """Somebody for whom the dark images, and what is lit at the top left, are 'dark'."""

    def describe(panels):
        asked.append(len(panels))
        return {"patterns": "all dark", "name": "dark"}

    def judge(image, name):
        return float(image.mean() < 0.4 and name == "dark")

    return describe, judge, lambda panel, name: float(unpanel(panel)[1][0, 0])


def test_a_feature_is_described_from_some_images_and_scored_on_others():
    asked = []
    found = names.describe_and_score(*callables(asked), IMAGES, MAPS, EXAMPLES)
    assert (found.name, found.patterns, asked) == ("dark", "all dark", [2])
    assert found.random.balanced.value == 0.75  # image 3 is too bright
    assert found.hard.auc.value == 0.75 and found.localisation.auc.value == 1


def test_a_feature_without_a_name_has_no_score_and_asks_nobody():
    def never(*_):
        raise AssertionError

    nameless = lambda panels: {"patterns": "", "name": ""}  # noqa: E731
    found = names.describe_and_score(nameless, never, never, IMAGES, MAPS, EXAMPLES)
    assert found.name == "" and np.isnan(found.random.auc.value) and found.hard.n == (0, 0)


def test_names_that_are_given_are_scored_in_place_of_those_that_would_be_found():
    asked = []
    given = lambda _: callables(asked), lambda _: EXAMPLES, IMAGES, lambda _: MAPS  # noqa: E731
    found = names.score_names({5: "dark", 2: "bright", 9: ""}, *given)
    assert asked == [] and [f.name for f in found.values()] == ["dark", "bright", ""]
    own = names.describe_and_score(*callables([]), IMAGES, MAPS, EXAMPLES)
    assert (found[5].random, found[5].localisation) == (own.random, own.localisation)
    assert found[2].hard.auc.value == 0.5 and np.isnan(found[9].hard.auc.value)


def test_means_of_scores_have_intervals_over_features_even_where_all_are_alike():
    def score(value):
        return (Score(Estimate(value, 0, 1), Estimate(value, 0, 1), (9, 9)),) * 3

    alike = names.summary([score(1.0)] * 5)["hard AUC"]
    assert alike.value == 1 and alike.low < 0.8
    apart = names.summary([score(v) for v in (0.6, 0.7, 0.8)])["random AUC"]
    assert apart.value == pytest.approx(0.7) and 0.59 < apart.low < 0.7 < apart.high < 0.81


@pytest.mark.parametrize("workers", (1, 3))
def test_many_features_are_named_in_order_and_summarised_over_features(workers):
    asked = []
    given = lambda _: callables(asked), lambda _: EXAMPLES, lambda _: MAPS  # noqa: E731
    found = names.name_features([5, 2, 9], *given[:2], IMAGES, given[2], workers=workers)
    assert list(found) == [5, 2, 9] and asked == [2, 2, 2]
    means = names.summary(found.values())
    assert means["random balanced accuracy"].value == 0.75 and means["hard AUC"].value == 0.75
    nobody = names.Named("", "", *[names.NO_SCORE] * 3)
    assert names.summary([*found.values(), nobody]) == means
    assert np.isnan(names.summary([nobody])["hard AUC"].value)
