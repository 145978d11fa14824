import matplotlib.pyplot as plt
import numpy as np

from helpers.plots.sheet import beside_unsteered, sheet


def drawn(fig):
    """The texts of a sheet, with the column and row of the image that each stands in."""
    (ax,) = fig.axes
    return {t.get_text(): (t.get_position()[0] // 6, t.get_position()[1] // 6) for t in ax.texts}


def test_a_sheet_has_a_row_for_each_name_and_marks_in_the_corners_of_their_images():
    images = np.random.default_rng(0).random((3, 4, 4, 3))
    fig = sheet(
        {"before": images, "after": images[:2]},
        marks={"before": ["", "0.25", ""], "after": ["✓", ""]},
        titles=["a", "b", "c"],
    )
    shown = fig.axes[0].images[0].get_array()
    assert shown.shape == (4 + 2 + 4, 4 + 2 + 4 + 2 + 4, 3)
    assert np.array_equal(shown[:4, 6:10], (images[1] * 255).round())
    assert np.array_equal(shown[6:, 6:10], shown[:4, 6:10]) and (shown[6:, 12:] == 255).all()
    assert drawn(fig) == {
        **{"before": (-1, 0), "after": (-1, 1), "0.25": (1, 0), "✓": (0, 1)},
        **{"a": (0, -1), "b": (1, -1), "c": (2, -1)},
    }
    plt.close(fig)


def test_images_of_one_channel_are_grey_on_the_scale_of_images():
    """As they are, however narrow the range of their values."""
    fig = sheet({"dark": np.full((2, 4, 4, 1), 0.2), "one": np.full((1, 4, 4, 1), 0.4)})
    shown = fig.axes[0].images[0].get_array()
    assert (shown[:4, :4] == 51).all() and (shown[6:, :4] == 102).all()
    plt.close(fig)
    fig = beside_unsteered(np.full((4, 4, 1), 0.2), np.full((4, 4, 1), 0.4), "steered")
    for ax, value in zip(fig.axes, (0.2, 0.4)):
        (image,) = ax.images
        np.testing.assert_allclose(image.to_rgba(image.get_array())[..., :3], value, atol=1 / 255)
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
