import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from helpers.measure.metrics import Estimate
from helpers.plots import style as plotting

IMAGE = np.full((16, 32, 3), 0.5)


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


@pytest.fixture(autouse=True)
def style_is_left_alone():
    before = dict(plt.rcParams)
    yield
    assert dict(plt.rcParams) == before


def pixels(fig):
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[..., :3].astype(int)


def test_the_style_makes_fonts_that_journals_take():
    with plt.rc_context():
        plotting.use_style()
        assert plt.rcParams["pdf.fonttype"] == 42 and 7 <= plt.rcParams["font.size"] <= 9


def test_a_heat_map_lies_upright_over_its_image(ax):
    heat = np.arange(8.0).reshape(2, 4)
    shown = plotting.overlay(ax, IMAGE, heat, vmax=7)
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
    plotting.overlay(ax, image, np.zeros((2, 4)), vmax=1)
    opacity = ax.images[1].get_array()[..., 3]
    assert (
        (opacity[:, 19:21] > 0.4).all() and not opacity[:, :19].any() and not opacity[:, 21:].any()
    )


@pytest.mark.parametrize("row, column", [(0, 3), (1, 0), (1, 2)])
def test_a_hot_token_is_drawn_where_it_is(row, column):
    heat = np.zeros((2, 4))
    heat[row, column] = 1
    fig = plt.figure(figsize=(3.2, 1.6), dpi=100)
    plotting.overlay(fig.add_axes((0, 0, 1, 1)), IMAGE, heat, vmax=1)
    bright = pixels(fig).sum(2).reshape(2, 80, 4, 80).mean((1, 3))
    plt.close(fig)
    assert np.unravel_index(bright.argmax(), bright.shape) == (row, column)
    assert np.ptp(np.sort(bright.ravel())[:-1]) < 0.2 * (bright.max() - bright.min())


def test_a_strip_shows_the_image_and_every_step_on_one_scale():
    heat = np.stack([np.full((2, 4), v) for v in (1.0, 5.0, 2.0)])
    fig, axes = plt.subplots(1, 4)
    shown = plotting.heat_strip(axes, IMAGE, heat, [667.0, 334.0, 1.4])
    assert np.array_equal(axes[0].images[0].get_array(), IMAGE)
    for ax, h, title in zip(axes[1:], heat, ("t = 667", "t = 334", "t = 1")):
        assert np.array_equal(ax.images[0].get_array(), h)
        assert ax.images[0].get_clim() == (0, 5) == shown.get_clim()
        assert ax.images[0].get_extent() == [0, 32, 16, 0] and ax.images[0].origin == "upper"
        assert ax.get_title() == title
    plt.close(fig)


@pytest.mark.parametrize(
    "heat, vmax, expected", [(0.0, None, 1.0), (3.0, 10.0, 10.0), (3.0, None, 3.0)]
)
def test_the_scale_of_a_strip(heat, vmax, expected):
    fig, axes = plt.subplots(1, 2)
    shown = plotting.heat_strip(
        axes, IMAGE, np.full((1, 2, 4), heat), [1.0], vmax=vmax, titles=False
    )
    assert shown.get_clim() == (0, expected) and axes[1].get_title() == ""
    plt.close(fig)


def test_an_image_is_shown_upright_without_axes(ax):
    image = np.random.default_rng(0).random((16, 32, 3))
    plotting.show_image(ax, image, "a title")
    assert np.array_equal(ax.images[0].get_array(), image)
    assert ax.get_ylim()[0] > ax.get_ylim()[1] and not ax.axison and ax.get_title() == "a title"


ESTIMATES = [Estimate(0.5, 0.4, 0.7), Estimate(0.2, 0.1, 0.3)]


def test_lines_carry_their_intervals_as_a_band(ax):
    plotting.with_interval(ax, [1, 2], ESTIMATES, "EV")
    assert ax.lines[0].get_ydata().tolist() == [0.5, 0.2] and ax.lines[0].get_label() == "EV"
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band.round(6)} == {(1, 0.4), (1, 0.7), (2, 0.1), (2, 0.3)}


def figure():
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1], [0, 1], label="λ")
    ax.legend()
    return fig


def test_the_same_figure_gives_the_same_bytes_and_says_where_it_is_from(tmp_path):
    for folder in ("a", "b"):
        fig = figure()
        plotting.save_figure(fig, tmp_path / folder / "new", "f", notebook="05", commit="abc")
        plt.close(fig)
    assert sorted(p.name for p in (tmp_path / "a" / "new").iterdir()) == ["f.pdf", "f.png"]
    for suffix in ("pdf", "png"):
        a, b = ((tmp_path / folder / "new" / f"f.{suffix}").read_bytes() for folder in "ab")
        assert a == b and b"CreationDate" not in a
    assert (
        Image.open(tmp_path / "a" / "new" / "f.png").text["Description"]
        == "commit=abc; notebook=05"
    )
    assert b"commit=abc; notebook=05" in (tmp_path / "a" / "new" / "f.pdf").read_bytes()


def test_a_figure_that_cannot_be_saved_leaves_the_old_one_and_nothing_beside_it(
    tmp_path, monkeypatch
):
    fig = figure()
    plotting.save_figure(fig, tmp_path, "f")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError):
        plotting.save_figure(fig, tmp_path, "f")
    plt.close(fig)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_png_bytes_are_a_picture_and_the_figure_is_closed():
    fig = figure()
    picture = Image.open(io.BytesIO(plotting.png(fig, dpi=50)))
    assert picture.format == "PNG" and picture.size == (100, 50)
    assert not plt.fignum_exists(fig.number)


def test_tiles_lie_in_reading_order_with_a_white_gap():
    images = np.stack([np.full((3, 5, 3), v) for v in (0.0, 0.2, 0.4)])
    sheet = np.asarray(plotting.tile(images, 2))
    assert sheet.shape == (8, 12, 3)
    assert (
        (sheet[:3, :5] == 0).all() and (sheet[:3, 7:] == 51).all() and (sheet[5:, :5] == 102).all()
    )
    assert (
        (sheet[3:5] == 255).all() and (sheet[:, 5:7] == 255).all() and (sheet[5:, 7:] == 255).all()
    )


def test_a_figure_that_cannot_be_written_is_told_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError,
        match=r"^figures: .*file cannot be made \(.*\); give another run, or make the folder writable$",
    ):
        plotting.save_figure(figure(), tmp_path / "file", "x")
    (tmp_path / "x.pdf").mkdir()
    with pytest.raises(
        OSError, match=r"^figures: .*x.pdf could not be written \(.*\); free some disk space"
    ):
        plotting.save_figure(figure(), tmp_path, "x")
    assert not list(tmp_path.glob(".x*"))
