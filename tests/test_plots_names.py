import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.measure.metrics import NOTHING, Estimate
from helpers.plots.names import examples_view, scores_view


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_each_score_is_a_mark_on_its_line_and_names_have_intervals():
    own, other = Estimate(0.8, 0.6, 0.9), Estimate(0.4, 0.3, 0.5)
    rows = [
        ("all", {"its name": {"a": own}, "another's": {}}, True),
        ("red", {"its name": {"a": own, "b": NOTHING}, "another's": {"a": other}}, False),
    ]
    fig = scores_view(rows, {"a": "first", "b": "second"})
    first, second = fig.axes
    marks = {line.get_label(): line.get_xydata().tolist() for line in first.lines}
    assert marks["its name"] == [[0.8, 0], [0.8, 1]] and marks["another's"] == [[0.4, 1]]
    assert sum(list(line.get_xdata()) == [0.6, 0.9] for line in first.lines) == 2
    assert len(second.lines) == 1 and second.get_title() == "second"  # only the line at 0.5
    assert [t.get_fontweight() for t in first.get_yticklabels()] == ["bold", "normal"]


def test_examples_stand_above_what_is_lit_in_them():
    images = np.linspace(0, 1, 3)[:, None, None, None] * np.ones((1, 4, 6, 3))
    fig = examples_view({"three": (images, images / 2), "one": (images[2:], images[2:] / 2)})
    three, one = (np.asarray(ax.images[0].get_array()) for ax in fig.axes)
    assert three.shape == one.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)
    assert three[0, 8, 0] == 128 and three[6, 8, 0] == 64  # the middle one, and its lower half
    assert one[0, 0, 0] == 255 and one[6, 0, 0] == 128 and one[6, 8, 0] == 255  # white where none
