import sys

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from helpers.measure.metrics import Estimate
from helpers.plots import style


@pytest.fixture
def fig():
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1], [0, 1], label="λ")
    ax.legend()
    yield fig
    plt.close(fig)


def test_the_style_makes_fonts_that_journals_take_and_needs_no_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    with plt.rc_context():
        style.use_style()
        assert plt.rcParams["pdf.fonttype"] == 42 and 7 <= plt.rcParams["font.size"] <= 9


def test_every_method_has_a_colour_of_its_own():
    colours = [to_rgb(style.colour(name)) for name in style.COLOURS]
    assert len(set(colours)) == len(colours)
    assert style.colour("raw latent") == style.colour("raw concat") != style.colour("ridge")


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="^method is 'residual concut'.* residual concat"):
        style.colour("residual concut")


def test_the_same_figure_gives_the_same_bytes_and_says_where_it_is_from(tmp_path, fig):
    for folder in ("a", "b"):
        style.save_figure(fig, tmp_path / folder / "new", "f", notebook="05", commit="abc")
    assert sorted(p.name for p in (tmp_path / "a" / "new").iterdir()) == ["f.pdf", "f.png"]
    for suffix in ("pdf", "png"):
        a, b = ((tmp_path / folder / "new" / f"f.{suffix}").read_bytes() for folder in "ab")
        assert a == b and b"CreationDate" not in a
    about = "commit=abc; notebook=05"
    assert Image.open(tmp_path / "a" / "new" / "f.png").text["Description"] == about
    assert about.encode() in (tmp_path / "a" / "new" / "f.pdf").read_bytes()


def test_a_figure_that_cannot_be_saved_leaves_the_old_one_and_nothing_beside_it(
    tmp_path, monkeypatch, fig
):
    style.save_figure(fig, tmp_path, "f")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="f.pdf cannot be written: No space left"):
        style.save_figure(fig, tmp_path, "f")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_figure_that_cannot_be_written_names_what_is_in_the_way(tmp_path, fig):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file cannot be made"):
        style.save_figure(fig, tmp_path / "file", "x")
    (tmp_path / "x.pdf").mkdir()
    with pytest.raises(OSError, match="x.pdf cannot be written"):
        style.save_figure(fig, tmp_path, "x")
    assert not list(tmp_path.glob(".x*"))


def test_lines_carry_their_intervals_as_a_band(fig):
    (ax,) = fig.axes
    estimates = [Estimate(0.5, 0.4, 0.7), Estimate(0.2, 0.1, 0.3)]
    style.with_interval(ax, [1, 2], estimates, "EV", marker="s")
    line = ax.lines[-1]
    assert line.get_ydata().tolist() == [0.5, 0.2] and line.get_label() == "EV"
    assert line.get_marker() == "s"
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band.round(6)} == {(1, 0.4), (1, 0.7), (2, 0.1), (2, 0.3)}
