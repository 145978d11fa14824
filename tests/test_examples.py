import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helpers.explorer.examples import Counts, Kept, chosen, quantiles


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 20))
def test_the_largest_keys_of_all_that_was_offered_are_kept(seed, n, n_images):
    rng = np.random.default_rng(seed)
    keys = rng.permutation(n_images * 4).reshape(n_images, 4).astype(np.float32)
    keys[rng.random(keys.shape) < 0.3] = -np.inf
    codes = rng.random(keys.shape).astype(np.float32)
    kept = Kept(n, 4)
    for image in range(n_images):
        kept.offer(image, keys[image], codes[image])
    images, of = kept.ordered()
    assert images.shape == of.shape == (4, n)
    for latent in range(4):
        order = [i for i in np.argsort(-keys[:, latent]) if keys[i, latent] > -np.inf][:n]
        assert images[latent].tolist() == order + [-1] * (n - len(order))
        assert np.array_equal(of[latent, : len(order)], codes[order, latent])


def test_quantiles_stand_in_the_middle_of_equal_parts():
    images = np.array([[10, 11, 12, 13, 14, 15], [7, -1, 8, -1, -1, -1], [-1] * 6])
    codes = np.array([[3, 6, 1, 2, 5, 4], [1, 0, 2, 0, 0, 0], [0] * 6], float)
    found, of = quantiles(images, codes, 3)
    # by strength 11, 14, 15, 10, 13, 12: the second of each pair
    assert found.tolist() == [[14, 10, 12], [8, 7, -1], [-1, -1, -1]]
    assert of.tolist() == [[5, 3, 1], [2, 1, 0], [0, 0, 0]]
    assert quantiles(images, codes, 10)[0][0, :6].tolist() == [11, 14, 15, 10, 13, 12]


def test_a_latents_examples_stand_in_the_places_of_their_kinds():
    counts = Counts(random=2, quantile=3, top=1, sample=4, evidence=2)
    assert counts.slots == {"random": slice(0, 2), "quantile": slice(2, 5), "top": slice(5, 6)}
    assert counts.with_evidence == [0, 1, 5]
    top, sample = Kept(1, 1), Kept(4, 1)
    for image, (key, code) in enumerate([(0.2, 9), (0.9, 1), (0.8, 5)]):
        top.offer(image, np.array([code]), np.array([code]))
        sample.offer(image, np.array([key]), np.array([code]))
    images, codes = chosen(top, sample, counts)
    assert images.tolist() == [[1, 2, 0, 2, 1, 0]] and codes.tolist() == [[1, 5, 9, 5, 1, 9]]
