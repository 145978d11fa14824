import numpy as np
import pytest
import scipy.sparse

from helpers.measure import features
from helpers.measure.detection import Codes

MAPS = np.array([[1, 0, 0, 0], [0, 0, 1, 1], [1, 0.1, 0, 0], [0, 0, 1, 1.1], [0, 0, 0, 0]])
PROFILES = np.array([[1, 0], [0, 1], [1, 0.1], [1, 0], [1, 1]])
STRENGTH = np.array([1.0, 5, 2, 3, 9])


def codes(scale=(1, 2, 0)):
    """The same maps in three images, each with its own strength."""
    return Codes(scipy.sparse.csc_matrix(np.vstack([s * MAPS.T for s in scale])), len(scale))


def test_a_mean_map_is_the_mean_code_at_each_token():
    np.testing.assert_allclose(features.mean_maps(codes()), MAPS)


def test_latents_of_one_place_and_time_are_together_strongest_first():
    found = features.clusters(codes(), PROFILES, STRENGTH, n=3)
    assert [c.latents.tolist() for c in found] == [[1], [3], [2, 0]]  # latent 4 is silent
    assert found[1].map == pytest.approx(MAPS[3] / 2.1) and found[1].profile == pytest.approx(
        [1, 0]
    )
    assert all(c.map.sum() == pytest.approx(1) for c in found)
    assert len(features.clusters(codes(), PROFILES, STRENGTH, n=9)) == 4
    again = features.clusters(codes(), PROFILES, STRENGTH, n=3)
    assert [c.latents.tolist() for c in again] == [c.latents.tolist() for c in found]


def test_no_latent_that_fires_is_no_cluster():
    assert features.clusters(codes((0, 0)), PROFILES, STRENGTH) == []


def test_the_latent_most_alike_has_the_largest_cosine():
    assert features.most_alike(codes(), 0, codes()) == 0
    others = codes().values.toarray()[:, [4, 3, 2, 1]]
    assert features.most_alike(codes(), 0, Codes(scipy.sparse.csc_matrix(others), 3)) == 2


def test_examples_are_strong_in_all_dictionaries_and_spread_over_time():
    strong = np.arange(20.0)[::-1]
    own = Codes(scipy.sparse.csc_matrix(strong[:, None]), 20)
    hour = np.full(20, np.nan)
    assert features.examples([own, own], [0, 0], hour, 3) == [0, 1, 2]
    hour[::2] = [5, 4, 3, 2, 1, 0, 9, 9, 9, 9]
    assert features.examples([own], [0], hour, 2) == [10, 14]  # the first and last of eight
    other = Codes(scipy.sparse.csc_matrix(strong[::-1, None] ** 3), 20)
    assert features.examples([own, other], [0, 0], hour, 1) == features.examples(
        [own], [0], hour, 1
    )
