import numpy as np
import pytest
import torch
from conftest import some_predictors

from helpers.companions.labelled import labelled, separation
from helpers.measure.labels import Labels
from helpers.measure.metrics import auroc

NAMES = ["colour=red", "colour=blue", "colour=none"]


def world(n_images=60, seed=0):
    """Trajectories (image, token, step, channel) in which red is said at step 1, and labels."""
    rng = np.random.default_rng(seed)
    has = np.eye(3, dtype=bool)[rng.integers(2, size=n_images)]
    x = rng.normal(size=(n_images, 5, 3, 4)).astype(np.float32)
    x[:, :3, 1, 2] += 3 * has[:, None, 0]
    owner = np.repeat(np.arange(n_images)[:, None], 5, axis=1)
    owner[:, 3:] = -1  # two of five tokens are nobody's
    return x, Labels(NAMES, owner, has, np.zeros(n_images, int))


def codes_of(dictionary, x, labels, name):
    """AUROC on the tokens of a label's kind, from its own latent's codes."""
    has, lacks = labels.contrast(name)
    z = dictionary.codes(torch.from_numpy(x))[..., NAMES.index(name)].numpy()
    both = has | lacks
    return auroc(z[both][:, None], has[both][:, None])[0, 0]


def test_a_labelled_direction_finds_where_and_when_a_label_is_said():
    predictors, (x, labels) = some_predictors(), world()
    found = labelled(predictors, x, labels, NAMES)
    assert found.two_sided and found.n_latents == 3
    w = found.directions()[0]  # raw coordinates: the direction is the weight
    assert w.flatten().argmax() == 4 + 2 and w[1].norm() > 5 * w[[0, 2]].norm(dim=1).max() / 2
    again = world(seed=1)
    assert codes_of(found, *again, "colour=red") > 0.95
    torch.testing.assert_close(found.directions()[1], -w)  # blue is not red
    assert not found.directions()[2].any()  # nothing has it


def test_it_is_the_minimum_of_the_penalised_logistic_loss():
    predictors, (x, labels) = some_predictors(), world()
    w = labelled(predictors, x, labels, NAMES).directions()[0].flatten().double()
    has, lacks = labels.contrast("colour=red")
    rows = torch.from_numpy(np.concatenate([x[has], x[lacks]]).reshape(-1, 12)).double()
    sign = torch.cat([torch.ones(has.sum()), -torch.ones(lacks.sum())])

    def loss(v, b):
        return v @ v / 2 + 0.01 * torch.nn.functional.softplus(-sign * (rows @ v + b)).sum()

    v, b = torch.zeros(12, dtype=torch.double), torch.zeros(1, dtype=torch.double)
    for parameter in (v, b):
        parameter.requires_grad_()
    search = torch.optim.LBFGS([v, b], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        value = loss(v, b).sum()
        value.backward()
        return value

    search.step(closure)
    torch.testing.assert_close(w, v.detach(), atol=2e-3, rtol=0)


def test_exchanged_labels_give_directions_that_tell_nothing_on_average():
    predictors, (x, labels) = some_predictors(), world()
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        exchanged = labelled(predictors, x, labels.shuffled(rng), NAMES)
        found.append(codes_of(exchanged, *world(seed=1), "colour=red"))
    assert abs(np.mean(found) - 0.5) < 0.15


def test_separation_by_hand():
    evidence = np.array(
        [[[1.0, 3.0], [0.0, 1.0], [9.0, 9.0]]]
    )  # one image, three tokens, two steps
    has, lacks = np.array([[True, False, False]]), np.array([[False, True, False]])
    np.testing.assert_allclose(separation(evidence, has, lacks), [1 / 3, 2 / 3])
    assert np.isnan(separation(evidence, lacks, has)).all()
    x, labels = world()
    found = labelled(some_predictors(), x, labels, NAMES)
    e = found.evidence(torch.from_numpy(x)).numpy()[..., 0]
    assert separation(e, *labels.contrast("colour=red")) == pytest.approx([0, 1, 0], abs=0.1)
