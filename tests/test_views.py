import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.measure.features import Cluster
from helpers.plots import views

TIMESTEPS = [961.0, 481.0, 1.0]


def found(seed=0, n=2):
    rng = np.random.default_rng(seed)
    by_step = {name: rng.random(3) for name in ("effect", "onset", "random")}
    maps = {"evidence": rng.normal(size=(n, 3, 2, 4)), "codes": rng.random((n, 2, 4))}
    return {"latent": 7} | maps | by_step


@pytest.mark.parametrize("channels", [1, 3])
def test_evidence_is_shown_on_one_scale_for_all_steps_and_images(channels):
    images = np.full((2, 16, 32, channels), 0.5)
    of = {"raw concat": found(), "residual concat": found(1)}
    fig = views.latent_view("two latents", images, of, TIMESTEPS, marks=np.array([1.0, np.nan]))
    for part, values in zip(fig.subfigs, of.values()):
        maps, lines = part.subfigs
        limit = abs(values["evidence"]).max()
        rows = zip(maps.axes, images, values["evidence"], values["codes"])
        for ax, image, evidence, codes in rows:
            shown = ax.images
            assert np.array_equal(np.reshape(shown[0].get_array(), image.shape), image)
            assert shown[0].get_clim() == (0, 1)
            for of_step, drawn in zip(evidence, shown[1:7:2]):
                assert np.array_equal(drawn.get_array(), of_step)
                assert drawn.get_clim() == (-limit, limit)
            assert np.array_equal(shown[7].get_array(), codes)
            assert shown[7].get_clim() == (0, values["codes"].max())
            ends = [image.get_extent()[:2] for image in (shown[0], *shown[1::2])]
            assert all(right < left for (_, right), (left, _) in zip(ends, ends[1:]))
        effect, onset, random = lines.axes[0].lines
        assert effect.get_ydata().tolist() == values["effect"].tolist()
        assert onset.get_ydata().tolist() == values["onset"].tolist()
        assert random.get_ydata().tolist() == values["random"].tolist()
    first, second = fig.subfigs[0].subfigs[0].axes[:2]
    assert [t.get_text() for t in first.texts] == ["t = 961", "t = 481", "t = 1", "code"]
    (mark,) = first.lines  # below the middle of the second step's map
    assert mark.get_xdata() == sum(first.images[3].get_extent()[:2]) / 2 and not second.lines
    plt.close(fig)


def test_a_silent_latent_can_be_shown():
    silent = {name: 0 * np.asarray(v) for name, v in found().items()}
    fig = views.latent_view("silent", np.zeros((2, 16, 32, 3)), {"raw concat": silent}, TIMESTEPS)
    fig.draw_without_rendering()
    plt.close(fig)


def test_latents_are_drawn_by_the_step_of_their_peak_as_shares():
    fig, ax = plt.subplots()
    shown = views.shares_by_latent(ax, np.array([[0, 1, 3], [4, 0, 0], [2, 6, 0]]), "evidence")
    assert shown.get_array().tolist() == [[1, 0, 0], [0.25, 0.75, 0], [0, 0.25, 0.75]]
    plt.close(fig)


def test_correlations_are_drawn_with_their_numbers():
    fig, ax = plt.subplots()
    shown = views.correlations(ax, np.array([[0.5, np.nan], [-0.2, 0.1]]), ["a", "b"], "raw")
    assert shown.get_clim() == (-0.6, 0.6)
    assert [t.get_text() for t in ax.texts] == ["0.50", "nan", "-0.20", "0.10"]
    plt.close(fig)


@pytest.mark.parametrize("n", [0, 2])
def test_clusters_are_drawn_on_one_scale(n):
    maps = np.array([[0.5, 0.5, 0, 0, 0, 0, 0, 0], np.full(8, 0.125)])
    some = [Cluster(np.array([3, 1]), m, np.array([0.2, 0.8, 0])) for m in maps[:n]]
    fig = views.cluster_view(some, (2, 4), TIMESTEPS)
    fig.draw_without_rendering()
    drawn = [ax.images[0] for ax in fig.axes[:n]]
    assert all(image.get_clim() == (0, 0.5) for image in drawn)
    assert [i.get_array().ravel().tolist() for i in drawn] == maps[:n].tolist()
    plt.close(fig)


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_stand_beside_their_images_each_on_its_own_scale(channels):
    rng = np.random.default_rng(0)
    images, heat = rng.random((2, 16, 32, channels)), 5 + rng.random((2, 2, 4))
    columns = {"heat": heat, "flat": np.zeros((2, 2, 4)), "colours": rng.random((2, 2, 4, 3))}
    fig = plt.figure()
    views.maps_beside(fig, images, columns, ["red", "blue"])
    for i, ax in enumerate(fig.axes):
        given, seen, _, flat, _, coloured = ax.images  # the first two maps have edges over them
        assert np.array_equal(np.reshape(given.get_array(), images[i].shape), images[i])
        np.testing.assert_allclose(seen.get_array(), heat[i] - heat[i].min())
        assert seen.get_clim() == (0, np.ptp(heat[i])) and flat.get_clim() == (0, 1)
        assert np.array_equal(coloured.get_array(), columns["colours"][i])
        ends = [image.get_extent()[:2] for image in (given, seen, flat, coloured)]
        assert all(right < left for (_, right), (left, _) in zip(ends, ends[1:]))
    texts = [[t.get_text() for t in ax.texts] for ax in fig.axes]
    assert texts == [["heat", "flat", "colours", "red"], ["blue"]]
    plt.close(fig)
