import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.plots import images

IMAGE = np.full((16, 32, 3), 0.5)


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


@pytest.fixture(autouse=True)
def the_style_is_left_alone():
    before = dict(plt.rcParams)
    yield
    assert dict(plt.rcParams) == before


def pixels(fig):
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[..., :3].astype(int)


def test_a_heat_map_lies_upright_over_its_image(ax):
    heat = np.arange(8.0).reshape(2, 4)
    shown = images.overlay(ax, IMAGE, heat, vmax=7)
    below, above = ax.images
    assert below is shown and below.get_alpha() is None  # in the colours of its colour bar
    assert np.array_equal(below.get_array(), heat) and above.get_array().shape == (16, 32, 4)
    assert above.origin == below.origin == "upper"
    assert above.get_extent() == below.get_extent() == [0, 32, 16, 0]
    assert ax.get_xlim() == (0, 32) and ax.get_ylim() == (16, 0)
    assert shown.get_clim() == (0, 7)


def test_lines_over_a_heat_map_stand_where_the_image_has_edges(ax):
    image = np.zeros((16, 32, 3))
    image[:, 20:] = 1
    images.overlay(ax, image, np.zeros((2, 4)), vmax=1)
    opacity = ax.images[1].get_array()[..., 3]
    assert (opacity[:, 19:21] > 0.4).all()
    assert not opacity[:, :19].any() and not opacity[:, 21:].any()


@pytest.mark.parametrize("row, column", [(0, 3), (1, 0)])
def test_a_hot_token_is_drawn_where_it_is(row, column):
    heat = np.zeros((2, 4))
    heat[row, column] = 1
    fig = plt.figure(figsize=(3.2, 1.6), dpi=100)
    images.overlay(fig.add_axes((0, 0, 1, 1)), IMAGE, heat, vmax=1)
    bright = pixels(fig).sum(2).reshape(2, 80, 4, 80).mean((1, 3))
    plt.close(fig)
    assert np.unravel_index(bright.argmax(), bright.shape) == (row, column)
    assert np.ptp(np.sort(bright.ravel())[:-1]) < 0.2 * (bright.max() - bright.min())


def test_a_strip_shows_the_image_and_every_step_side_by_side_on_one_scale(ax):
    heat = np.stack([np.full((2, 4), v) for v in (1.0, 5.0, 2.0)])
    shown = images.heat_strip(ax, IMAGE, heat, [667.0, 334.0, 1.4], vmax=5)
    image, *pairs = ax.images
    assert np.array_equal(image.get_array(), IMAGE) and image.get_extent() == [0, 32, 16, 0]
    right = 32
    for below, above, of_step in zip(pairs[::2], pairs[1::2], heat):
        assert np.array_equal(below.get_array(), of_step)
        assert below.get_clim() == (0, 5) == shown.get_clim()
        assert below.get_extent() == above.get_extent()
        assert below.get_extent()[0] > right and below.get_extent()[2:] == [16, 0]
        right = below.get_extent()[1]
    assert ax.get_xlim() == (0, right) and ax.get_ylim() == (16, 0) and not ax.axison
    assert [t.get_text() for t in ax.texts] == ["t = 667", "t = 334", "t = 1"]


def test_an_image_is_shown_upright_without_axes(ax):
    image = np.random.default_rng(0).random((16, 32, 3))
    images.show_image(ax, image, "a title")
    assert np.array_equal(ax.images[0].get_array(), image)
    assert ax.get_ylim()[0] > ax.get_ylim()[1] and not ax.axison and ax.get_title() == "a title"


def test_an_image_of_one_channel_is_grey_on_the_scale_of_images():
    fig = plt.figure(figsize=(0.4, 0.2), dpi=100)
    images.show_image(fig.add_axes((0, 0, 1, 1)), np.full((2, 4, 1), 0.25))
    drawn = pixels(fig)
    plt.close(fig)
    assert (abs(drawn - 64) <= 1).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_lie_in_reading_order_with_a_white_gap(channels):
    pictures = np.stack([np.full((3, 5, channels), v) for v in (0.0, 0.2, 0.4)])
    sheet = np.asarray(images.tile(pictures, 2))
    assert sheet.shape == (8, 12, 3)
    assert (sheet[:3, :5] == 0).all() and (sheet[:3, 7:] == 51).all()
    assert (sheet[5:, :5] == 102).all() and (sheet[5:, 7:] == 255).all()
    assert (sheet[3:5] == 255).all() and (sheet[:, 5:7] == 255).all()
