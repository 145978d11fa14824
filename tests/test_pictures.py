import matplotlib
import numpy as np
import pytest

from helpers.explorer import pictures
from helpers.explorer.record import Examples


def test_a_map_is_enlarged_by_the_tokens_that_hold_pixels_centres():
    found = pictures.enlarged(np.array([[1, 2], [3, 4]]), 2, 5)
    assert found.tolist() == [[1, 1, 2, 2, 2], [3, 3, 4, 4, 4]]


@pytest.mark.parametrize("channels", [1, 3])
def test_flat_images_leave_a_maps_colours_as_they_are(channels):
    image, heat = np.full((4, 6, channels), 0.3), np.array([[0.0, 1.0]])
    found = pictures.heated(image, heat)
    assert found.shape == (4, 6, 3) and found.dtype == np.uint8
    for x, value in ((0, 0.0), (5, 1.0)):
        expected = np.array(matplotlib.colormaps["magma"](value)[:3]) * 255
        assert abs(found[0, x] - expected).max() <= 1
    signed = pictures.heated(image, np.array([[-2.0, 2.0]]), limit=2.0, signed=True)
    assert signed[0, 0, 2] > signed[0, 0, 0] and signed[0, 5, 0] > signed[0, 5, 2]
    grey = pictures.heated(image, np.array([[0.0]]), limit=2.0, signed=True)
    assert grey.min() > 240


def test_edges_are_drawn_into_maps():
    image = np.zeros((4, 6, 3))
    image[:, 3:] = 1
    found = pictures.heated(image, np.zeros((1, 1)))
    assert (found[:, 2] > 100).all() and found[:, [0, 1, 4, 5]].max() < 10


def test_pictures_are_put_beside_and_above_one_another():
    a, b = np.zeros((2, 3, 3), np.uint8), np.full((2, 4, 3), 9, np.uint8)
    found = pictures.beside(a, b)
    assert found.shape == (2, 9, 3) and found[0, :, 0].tolist() == [0] * 3 + [255] * 2 + [9] * 4
    assert pictures.above(a, a).shape == (6, 3, 3) and (pictures.above(a, a)[2:4] == 255).all()


def test_examples_stand_above_their_maps_and_before_their_evidence():
    image, evidence = np.full((2, 4, 6, 3), 0.5), np.zeros((1, 12, 2, 3))
    of = Examples(np.array([1, 2]), np.ones(2), ["", ""], image, np.ones((2, 2, 3)), evidence)
    assert [p.shape for p in pictures.examples(of)] == [(10, 6, 3)] * 2
    (row,) = pictures.over_time(of, 1.0)
    assert row.shape == (4, 9 * 6 + 8 * 2, 3) and (row[:, :6] == 128).all()
    assert pictures.limit_of({"random": of}) > 0


def test_of_many_steps_some_are_drawn():
    assert pictures.shown_steps(3) == [0, 1, 2] and pictures.shown_steps(1) == [0]
    some = pictures.shown_steps(50)
    assert len(some) == 8 and some[0] == 0 and some[-1] == 49


def test_where_a_map_is_largest_is_said_in_words():
    heat = np.zeros((6, 6))
    assert pictures.place(heat) == ""
    for at, words in (
        ((0, 0), "upper left"),
        ((5, 3), "lower"),
        ((2, 5), "right"),
        ((2, 2), "centre"),
    ):
        assert pictures.place(heat + np.eye(6)[at[0]][:, None] * np.eye(6)[at[1]]) == words
