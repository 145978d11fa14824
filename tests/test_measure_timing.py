import numpy as np
import pytest
import torch
from conftest import some_predictors
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy, spearmanr

from helpers import coordinates
from helpers.dictionary import untrained
from helpers.measure import timing

STEPS = [0, 6, 12, 24]
evidences = st.lists(st.floats(-3, 3), min_size=4, max_size=4).map(np.array)


def naive_crossing(evidence, steps, share):
    """Walks back from the last step for as long as the sum so far is large enough."""
    sums = [sum(evidence[: s + 1]) for s in range(len(evidence))]
    if sums[-1] <= 0:
        return np.nan
    s = len(sums) - 1
    while s > 0 and sums[s - 1] >= share * sums[-1]:
        s -= 1
    if s == 0:
        return steps[0]
    part = (share * sums[-1] - sums[s - 1]) / (sums[s] - sums[s - 1])
    return steps[s - 1] + part * (steps[s] - steps[s - 1])


@pytest.mark.parametrize(
    ("evidence", "at"),
    [
        ([4, 0, 0, 0], 0),
        ([0, 0, 0, 4], 18),  # halfway between the last two kept steps
        ([1, 1, 1, 1], 6),
        ([0, 3, 0, 1], 4),  # two thirds of the way to step 6
        ([3, -3, 0, 4], 18),  # what is lost again does not count
        ([1, -2, 0, 0], np.nan),
        ([0, 0, 0, 0], np.nan),
    ],
)
def test_the_step_at_which_evidence_crosses_half_of_its_sum(evidence, at):
    assert timing.crossing(evidence, STEPS) == pytest.approx(at, nan_ok=True)


@given(evidences, st.floats(0.05, 0.95))
def test_crossings_are_those_of_a_walk_back(evidence, share):
    expected = naive_crossing(list(evidence), STEPS, share)
    if np.isnan(expected) or evidence.sum() > 1e-6:
        found = timing.crossing(np.stack([evidence, 2 * evidence]), STEPS, share)
        assert found == pytest.approx([expected] * 2, nan_ok=True, abs=1e-6)


def test_shares_durations_and_entropies_by_hand():
    evidence = np.array([[0, 4, 0, 0], [1, 1, 1, 1], [3, 1, -9, 0], [-1, -1, 0, 0]])
    assert timing.peak_share(evidence) == pytest.approx([1, 0.25, 0.75, np.nan], nan_ok=True)
    assert timing.duration(evidence) == pytest.approx([0.5, 2, 2 / 3, np.nan], nan_ok=True)
    maps = np.array([[0, 0, 5.0, 0], [1, 1, 1, 1], [3, 3, 0, 0], [0, 0, 0, 0]])
    assert timing.entropy(maps) == pytest.approx([0, 1, 0.5, np.nan], nan_ok=True)


@given(evidences, st.permutations(range(4)))
def test_how_confined_evidence_is_does_not_depend_on_the_order_of_steps(evidence, order):
    for measure in (timing.peak_share, timing.duration):
        whole, mixed = measure(np.stack([evidence, evidence[list(order)]]))
        assert whole == pytest.approx(mixed, nan_ok=True)


S, D, M = 3, 4, 6


def a_dictionary(space="residual"):
    p = some_predictors(S, D)
    x = torch.randn(200, S, D, generator=torch.Generator().manual_seed(1))
    return untrained(getattr(coordinates, space)(p), M, 2).calibrate(x)


def images(n=5, n_tokens=7, seed=0):
    return torch.randn(n, n_tokens, S, D, generator=torch.Generator().manual_seed(seed))


def test_onset_is_the_decoder_row_in_units_of_x_and_effect_what_becomes_of_it():
    found = a_dictionary()
    effect, onset = timing.sizes(found)
    p = some_predictors(S, D)
    w = found.coder.W_dec.view(M, S, D) * p.rho[:, None]
    u = [w[:, 0]]
    for s in (1, 2):
        u.append(u[-1] @ p.A[s] + w[:, s])
    np.testing.assert_allclose(onset, w.norm(dim=-1), rtol=1e-5)
    np.testing.assert_allclose(effect, torch.stack(u, 1).norm(dim=-1), rtol=1e-5)
    np.testing.assert_allclose(
        timing.sizes(a_dictionary("raw"))[0], timing.sizes(a_dictionary("raw"))[1]
    )
    assert timing.sizes(found, [4, 1])[0] == pytest.approx(effect[[4, 1]])


@pytest.mark.parametrize("shuffle", [False, True])
def test_sums_over_active_codes_are_those_of_a_loop(shuffle):
    found, x = a_dictionary(), images()
    generator = torch.Generator().manual_seed(3) if shuffle else None
    timed = timing.measure(found, x.split(2), generator)
    z, e = found.codes(x), found.evidence(x)
    sums, shares = np.zeros((5, M, S)), []
    for i, t, m in z.nonzero().tolist():
        own = e[i, t, :, m].clamp(min=0).numpy()
        sums[i, m] += own
        shares.append(own.max() / own.sum())
    assert timed.confined.value == pytest.approx(np.mean(shares))
    np.testing.assert_allclose(timed.evidence.sum(2), sums.sum(2), rtol=1e-4)
    assert np.allclose(timed.evidence, sums, rtol=1e-4) == (not shuffle)
    for i, m in np.ndindex(5, M):
        of_map = z[i, :, m].numpy()
        expected = entropy(of_map) / np.log(7) if of_map.any() else np.nan
        assert timed.entropy[i, m] == pytest.approx(expected, nan_ok=True, abs=1e-6)
    assert timed.fires().tolist() == z.flatten(0, 1).bool().any(0).tolist()


def made(profiles, entropies, n_images=8, noise=0.0):
    """Every image has the same latents, but for some noise."""
    rng = np.random.default_rng(0)
    evidence = np.tile(profiles, (n_images, 1, 1)).astype(float)
    evidence += noise * rng.random(evidence.shape)
    spread = np.tile(entropies, (n_images, 1)).astype(float)
    return timing.Timing(
        evidence, spread + noise * rng.random(spread.shape), np.ones((n_images, 2))
    )


def test_lifetimes_of_latents():
    timed = made([[2, 2, 0, 0], [0, 0, 0, 4], [0, 0, 0, 0]], [0.5, 0.2, np.nan])
    found = timed.lifetimes(STEPS)
    assert found["onset"] == pytest.approx([0, 13.2, np.nan], nan_ok=True)
    assert found["peak"] == pytest.approx([0, 24, np.nan], nan_ok=True)
    assert found["duration"] == pytest.approx([1, 0.5, np.nan], nan_ok=True)
    assert found["entropy"] == pytest.approx([0.5, 0.2, np.nan], nan_ok=True)
    assert timed.fires(8).tolist() == [True, True, False] and not timed.fires(9).any()


def test_where_latents_peak_and_how_much_is_there():
    timed = made([[3, 1, 0, 0], [0, 0, 0, 4], [0, 1, 1, 2], [0, 0, 0, 0]], [0.5, 0.2, 0.1, np.nan])
    assert timed.profile.tolist() == (8 * timed.evidence[0]).tolist()
    assert timed.peaks() == pytest.approx([1 / 3, 0, 0, 2 / 3])
    assert timed.of_latents() == {"in peak step": 0.75, "duration": pytest.approx(2 / 3)}
    silent = made([[0.0] * 4], [np.nan])
    assert silent.of_latents() == {"in peak step": None, "duration": None}
    assert silent.peaks().tolist() == [0] * 4


def test_an_image_counts_as_often_as_it_was_drawn():
    timed = made(np.eye(4)[:2], [0.1, 0.3], n_images=3, noise=0.5)
    twice = timing.Timing(
        timed.evidence[[0, 2, 2]], timed.entropy[[0, 2, 2]], timed.shares[[0, 2, 2]]
    )
    drawn = timed.lifetimes(STEPS, np.array([1.0, 0, 2]))
    for name, values in twice.lifetimes(STEPS).items():
        assert drawn[name] == pytest.approx(values)


def test_early_features_that_last_and_are_diffuse_are_found():
    late = np.arange(12) % 4
    profiles = np.array([np.where(np.arange(4) == p, 9, 4 - p) for p in late])
    timed = made(profiles, 0.9 - 0.2 * late, noise=0.05)
    found = timed.early_last(STEPS, n_resamples=50)
    assert found["duration"].high < -0.8 and found["entropy"].high < -0.8
    opposite = made(profiles, 0.2 * late, noise=0.05).early_last(STEPS, n_resamples=50)
    assert opposite["entropy"].low > 0.8


def test_latents_without_any_such_order_have_an_interval_around_zero():
    rng = np.random.default_rng(4)
    evidence, spread = rng.random((30, 40, 4)), rng.random((30, 40))
    found = timing.Timing(evidence, spread, np.ones((30, 2))).early_last(STEPS, n_resamples=100)
    assert found["entropy"].low < 0 < found["entropy"].high


def test_rank_correlation_is_scipys_where_both_are_numbers():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30)).round(1)
    assert timing.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    a[:3], b[5] = np.nan, np.nan
    own = np.r_[3:5, 6:30]
    assert timing.spearman(a, b) == pytest.approx(spearmanr(a[own], b[own]).statistic)
    assert np.isnan(timing.spearman(np.ones(5), np.arange(5)))
