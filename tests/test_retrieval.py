import numpy as np
import pytest
import torch
from encoders import encoder

from helpers.naming import retrieval


class Colours:
    """An encoder that sees an image's mean colour."""

    def images(self, images):
        x = torch.from_numpy(np.ascontiguousarray(images)).double().mean((1, 2))
        return x / x.norm(dim=1, keepdim=True)


def test_patches_tile_the_image_where_the_grid_does_not_divide_it():
    image = np.arange(5 * 7).reshape(1, 5, 7, 1)
    found = retrieval.patches(image, (2, 3))
    assert len(found) == 6 and found[0].shape == (2, 2, 1) and found[5].shape == (3, 2, 1)
    assert sorted(np.concatenate([p.ravel() for p in found]).tolist()) == list(range(35))
    with pytest.raises(ValueError, match="grid is"):
        retrieval.patches(image, (6, 1))


def quarters(*colours):
    """Images of four colours each, (image, 4, 4, 3)."""
    quarter = np.array(colours, np.float32).reshape(-1, 2, 2, 3)
    return quarter.repeat(2, 1).repeat(2, 2)


RED, GREEN, BLUE = np.eye(3, dtype=np.float32)


def test_a_features_vector_is_that_of_what_it_is_active_on():
    images = quarters([RED, GREEN, BLUE, BLUE], [GREEN, GREEN, RED, BLUE])
    embedded = retrieval.embed(Colours(), images, (2, 2))
    assert embedded.shape == (2, 4, 3)
    maps = np.zeros((2, 2, 2))
    maps[0, 0, 0], maps[1, 1, 0], maps[1, 1, 1] = 1, 1, 0.5
    found = retrieval.feature_vector(embedded, maps, (2, 2))
    np.testing.assert_allclose(found, np.array([2, 0, 0.5]) / np.hypot(2, 0.5), atol=1e-6)
    finer = maps.repeat(3, 1).repeat(3, 2)
    np.testing.assert_allclose(retrieval.feature_vector(embedded, finer, (2, 2)), found, atol=1e-6)
    with pytest.raises(ValueError, match="maps is 'zero everywhere'"):
        retrieval.feature_vector(embedded, 0 * maps, (2, 2))


def test_patches_of_any_sizes_go_through_a_real_encoder():
    images = np.random.default_rng(0).random((2, 9, 10, 1), np.float32)
    found = retrieval.embed(encoder("clip"), images, (2, 3))
    assert found.shape == (2, 6, 16)
    np.testing.assert_allclose(np.linalg.norm(found, axis=2), 1, atol=1e-5)
    crop = np.broadcast_to(images[1, 4:, 3:7], (5, 4, 3))
    np.testing.assert_allclose(found[1, 4], encoder("clip").images(crop[None])[0], atol=1e-5)


def test_a_pair_of_texts_leaves_out_what_is_common():
    vectors = np.array([[0.8, 0.6], [0.6, 0.8]])
    texts = np.array([[1.0, 0.0]])
    assert retrieval.similarity(vectors, texts).tolist() == [[0.8, 0.6]]
    against = np.array([0.0, 1.0])
    np.testing.assert_allclose(retrieval.similarity(vectors, texts, against), [[0.2, -0.2]])


def test_retrieval_is_one_for_the_first_and_a_half_for_ties():
    found = retrieval.retrieved(np.array([[3, 1, 2.0], [5, 5, 5], [9, 8, 7]]))
    assert found.tolist() == [1, 0.5, 0]
    assert np.isnan(retrieval.retrieved(np.ones((1, 1)))).all()
    with pytest.raises(ValueError, match="square"):
        retrieval.retrieved(np.ones((2, 3)))
