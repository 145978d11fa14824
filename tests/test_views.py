import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.plots.views import latent_view

IMAGES = np.full((3, 16, 32, 3), 0.5)
CODES = np.arange(24.0).reshape(3, 2, 4)
NORMS, TIMESTEPS = np.array([1.0, 3.0]), [961.0, 1.0]


def test_a_latent_is_shown_by_its_effect_at_the_step_and_its_norms():
    fig = latent_view(7, 1, IMAGES, CODES, NORMS, TIMESTEPS)
    left, right = fig.subfigs
    assert left.get_suptitle() == "latent 7 at t = 1: top test images"
    for ax, codes in zip(left.axes[3:6], CODES):
        assert np.array_equal(ax.images[0].get_array(), 3 * codes)
        assert ax.images[0].get_clim() == (0, 23 * 3)
    (ax,) = right.axes
    norms, here = ax.lines
    assert norms.get_xydata().tolist() == [[961, 1], [1, 3]] and here.get_xdata() == [1, 1]
    plt.close(fig)


@pytest.mark.parametrize("step", [-1, 2])
def test_a_step_that_is_not_there_is_refused(step):
    with pytest.raises(ValueError, match="step .*0 to 1"):
        latent_view(7, step, IMAGES, CODES, NORMS, TIMESTEPS)
