import matplotlib.pyplot as plt
import numpy as np

from helpers.plots.sheet import beside_unsteered, sheet


def test_a_sheet_has_a_row_for_each_name_and_a_tick_where_asked():
    images = np.random.default_rng(0).random((3, 4, 4, 3))
    fig = sheet(
        {"before": images, "after": images[:2]},
        ticks={"after": [True, False]},
        titles=["a", "b", "c"],
        title="all",
    )
    axes = np.reshape(fig.axes, (2, 3))
    assert [len(ax.images) for ax in fig.axes] == [1, 1, 1, 1, 1, 0]
    assert [ax.get_title() for ax in axes[0]] == ["a", "b", "c"]
    assert [[t.get_text() for t in ax.texts] for ax in axes[1]] == [["after", "✓"], [], []]
    assert [t.get_text() for t in axes[0, 0].texts] == ["before"]
    plt.close(fig)


def test_a_steered_image_stands_beside_the_mean_change_of_their_channels():
    before, after = np.random.default_rng(0).random((2, 4, 5, 3))
    fig = beside_unsteered(before, after, "latent 3")
    assert [ax.get_title() for ax in fig.axes[:3]] == ["unsteered", "latent 3", "absolute change"]
    np.testing.assert_array_equal(fig.axes[1].images[0].get_array(), after)
    change = fig.axes[2].images[0].get_array()
    assert change.shape == (4, 5)
    np.testing.assert_allclose(change[1, 2], abs(after[1, 2] - before[1, 2]).sum() / 3)
    plt.close(fig)
