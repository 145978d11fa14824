import numpy as np
import pytest
from activations import recorded
from scipy.stats import pearsonr, rankdata

from helpers.measure import decisions
from helpers.measure.labels import Labels

NAMES = ["colour=red", "colour=blue", "shape=cross", "shape=circle", "background=sky"]
STEPS = [0, 4, 8]
KINDS = ("own", "specific", "other")


def things(n_images, seed=0):
    """Two objects and a background in each image of six tokens; some tokens are nobody's."""
    rng = np.random.default_rng(seed)
    owner = 3 * np.arange(n_images)[:, None] + np.array([0, 0, 1, 1, 2, 0])
    owner[:, -1] = -1
    has = np.zeros((3 * n_images, 5), bool)
    objects = np.arange(3 * n_images) % 3 < 2
    red, cross = rng.random((2, 3 * n_images)) < 0.5
    has[objects, :4] = np.stack([red, ~red, cross, ~cross], 1)[objects]
    has[~objects, 4] = True
    return Labels(NAMES, owner, has, (~objects).astype(int))


def test_things_their_images_their_values_and_what_their_tokens_add_up_to():
    labels = things(2)
    assert decisions.image_of(labels).tolist() == [0, 0, 0, 1, 1, 1]
    own = decisions.own_label(labels)
    for thing, has in enumerate(labels.has):
        carried = [i for i in (own[a][thing] for a in ("colour", "shape", "background")) if i >= 0]
        assert carried == np.nonzero(has)[0].tolist()
    values = np.arange(24.0).reshape(2, 6, 2)
    found = decisions.of_things(values, labels)
    assert found[0].tolist() == (values[0, 0] + values[0, 1]).tolist()
    assert found[5].tolist() == values[1, 4].tolist() and found.shape == (6, 2)


def test_means_over_things_and_when_something_was_decided_in_an_image():
    labels = things(2)
    values = np.arange(24.0).reshape(2, 6, 2)
    found = decisions.mean_of_things(values, labels)
    assert found[1].tolist() == values[0, 2:4].mean(0).tolist()
    none = Labels(NAMES, np.full((2, 6), -1), labels.has, labels.kind)
    assert not decisions.mean_of_things(values, none).any()
    decided = {"background": np.array([np.nan, np.nan, 3, np.nan, np.nan, 7])}
    found = decisions.in_images(decided, labels, "background=sky", 3)
    assert found == pytest.approx([3, 7, np.nan], nan_ok=True)
    assert np.isnan(decisions.in_images(decided, labels, "colour=red", 3)).all()


def test_the_half_step_is_that_of_the_things_own_label():
    labels = things(2)
    evidence = np.zeros((6, 3, 5))
    for label in range(5):
        evidence[:, label % 3, label] = 1 + label  # all at one step
    half = decisions.half_steps(evidence, labels, STEPS)
    for thing, label in enumerate(decisions.own_label(labels)["shape"]):
        expected = [0, 2, 6, 0, 2][label] if label >= 0 else np.nan  # halfway from the step before
        assert half["shape"][thing] == pytest.approx(expected, nan_ok=True)


def timed(labels, decided, follows):
    """Evidence for an attribute comes when it was decided where `follows`, else when it likes."""
    rng = np.random.default_rng(1)
    return {
        a: v + 0.5 * rng.random(len(v)) if a in follows else 24 * rng.random(len(v))
        for a, v in decided.items()
    }


def drawn(labels, seed=2):
    rng = np.random.default_rng(seed)
    own = decisions.own_label(labels)
    return {a: np.where(v < 0, np.nan, 24 * rng.random(len(v))) for a, v in own.items()}


def test_evidence_that_follows_decisions_is_told_from_evidence_that_does_not():
    labels = things(60)
    decided = drawn(labels)
    found = decisions.agreement(decided, timed(labels, decided, ["colour"]), labels)
    own, specific, other = (getattr(found, k)("colour").estimate() for k in KINDS)
    assert own.low > 0.9 and specific.low > 0.5 and other.low < 0 < other.high
    own = found.own("shape").estimate()
    assert own.low < 0 < own.high
    assert found.attributes == ["colour", "shape"]
    assert found.n["colour", "shape"] == 120 and found.n["background", "background"] == 60
    assert np.isnan(found.other("background").value)  # things of one attribute have no other
    matrix = found.matrix(["colour", "shape"])
    assert matrix[0, 0] == found.own("colour").value and matrix.shape == (2, 2)


def test_the_control_can_fail():
    """Where a whole thing is early or late, evidence for all attributes follows all decisions."""
    labels = things(60)
    hour = 24 * np.random.default_rng(9).random(180)
    own = decisions.own_label(labels)
    decided = {a: np.where(v < 0, np.nan, hour) for a, v in own.items()}
    found = decisions.agreement(decided, timed(labels, decided, own), labels)
    assert found.own("colour", "shape").estimate().low > 0.9
    assert found.specific("colour", "shape").estimate().high < 0.1


def test_a_label_with_an_hour_of_its_own_shows_nothing():
    labels = things(60)
    red = labels.has[:, 0]
    rng = np.random.default_rng(9)
    decided = {"colour": 10.0 * red + rng.random(180)}
    half = {"colour": 10.0 * red + rng.random(180)}
    assert decisions.agreement(decided, half, labels).own("colour").estimate().high < 0.4


def test_correlations_are_those_of_ranks_within_labels():
    labels = things(30)
    decided, half = drawn(labels, 3), drawn(labels, 4)
    decided["colour"][:7] = np.nan
    own, ranks = decisions.own_label(labels)["colour"], []
    for steps in (decided["colour"], half["colour"]):
        ranks.append(np.full(90, np.nan))
        for label in (0, 1):
            mine = (own == label) & ~np.isnan(steps)
            ranks[-1][mine] = (rankdata(steps[mine]) - 0.5) / mine.sum()
    both = ~np.isnan(ranks[0]) & ~np.isnan(ranks[1])
    expected = pearsonr(ranks[0][both] - 0.5, ranks[1][both] - 0.5).statistic
    assert decisions.agreement(decided, half, labels).own("colour").value == pytest.approx(expected)


def test_too_few_things_say_nothing():
    labels = things(4)
    decided = drawn(labels)
    assert np.isnan(decisions.agreement(decided, decided, labels).own("colour").value)


def test_a_probe_knows_a_value_from_the_step_on_at_which_it_is_there():
    labels, other = things(60), things(40, seed=1)
    x = []
    for of in (labels, other):
        h = recorded(len(of.owner), seed=len(of.owner))[..., :3, :].transpose(1, 2).numpy()
        h = 0.01 * h.reshape(len(of.has), 3, -1)
        colour = decisions.own_label(of)["colour"]
        h[:, 1:, 0] += np.where(colour == 0, 5, -5)[:, None]  # from the second kept step on
        x.append(h)
    found = decisions.right_from(x[0], labels, x[1], other, STEPS)
    known = decisions.own_label(other)["colour"] >= 0
    assert set(found["colour"][known]) <= {0, 4} and (found["colour"][known] == 4).mean() > 0.3
    assert np.isnan(found["colour"][~known]).all()
    assert np.isnan(found["shape"][known]).mean() > 0.2
    assert np.isnan(found["background"]).all()  # of one value there is nothing to tell
