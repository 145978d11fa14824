from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SAMPLING, TOKENS, some_predictors

from helpers import coordinates, dictionary, sae, steering
from helpers.hooks import Tap
from helpers.measure import experiment
from helpers.measure.experiment import Pool, Push
from helpers.measure.labels import Labels
from helpers.measure.natural import Natural
from helpers.measure.words import Words
from helpers.moments import accumulate

STORE = SimpleNamespace(tap=Tap(TOKENS), steps=[0, 2], grid=(4, 4), sampling=SAMPLING)
SEEDS = [3, 4, 5, 6]


@pytest.fixture(scope="module")
def residual():
    return coordinates.residual(some_predictors(2, 32))


@pytest.fixture(scope="module")
def pool(pipe, prompts):
    return Pool.make(pipe, STORE, prompts[:4], SEEDS, batch_size=3)


@pytest.fixture
def lab(pipe, residual, pool):
    u = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    return experiment.Experiment(
        *(pipe, STORE, residual, Words(), pool),
        directions={("a", "one"): u[0], ("a", "two"): u[1], ("b", "one"): u[2]},
        weights={"a": np.linspace(0, 1, 64).reshape(4, 16), "b": np.ones((4, 16))},
        batch_size=3,
    )


def by_hand(lab, push, i):
    """An image made alone, by a plain call of `steer`."""
    delta = steering.addition(
        lab.directions[push.target, push.direction], lab.coordinates, [0, 2], 3, push.strength
    )
    mask = np.ones(16) if push.everywhere else lab.weights[push.target][i]
    where = (lab.pipe, [lab.pool.prompts[i]], [SEEDS[i]], STORE.tap)
    mask = torch.from_numpy(mask).float()
    return steering.steer(*where, delta, mask=mask, window=push.window, **SAMPLING)[0]


def test_images_of_one_batch_are_each_steered_their_own_way(lab):
    pushes = [
        Push("a", "one", 2.0),
        Push("a", "two", 1.0, window=(1, 1)),
        Push("b", "one", 4.0, everywhere=True),
        Push("a", "one", 1.0, everywhere=True),
    ]
    lab.make({push: [1, 3] for push in pushes})
    for push in pushes:
        for image, i in zip(lab.images(push, [1, 3]), (1, 3)):
            np.testing.assert_allclose(image, by_hand(lab, push, i), atol=1e-5)
            assert abs(image - lab.pool.images[i]).max() > 1e-4


def test_one_batch_steers_in_all_ways(lab, residual):
    """Each image as if it were alone, by a plain call of `steer`."""
    lab.codes["a", "one"] = codes = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    pushes = [Push("a", "one", 3.0, way=way) for way in experiment.WAYS]
    lab.make({push: [1] for push in pushes})
    added, clamped, kept = (lab.images(push, [1])[0] for push in pushes)
    np.testing.assert_allclose(added, by_hand(lab, pushes[0], 1), atol=1e-5)
    where = (lab.pipe, [lab.pool.prompts[1]], [SEEDS[1]], STORE.tap)
    mask = torch.from_numpy(lab.weights["a"][1]).float()
    u = lab.directions["a", "one"]
    delta = steering.setting(codes[[1]], u, residual, [0, 2], 3, 3.0)
    image = steering.steer(*where, delta, mask=mask, **SAMPLING)[0]
    np.testing.assert_allclose(clamped, image, atol=1e-4)
    delta, centre = lab.addition(pushes[2]), steering.at_every_step(residual.mu, [0, 2], 3)
    settings = {"mask": mask, "keep_norm": True, "centre": centre}
    image = steering.steer(*where, delta, **settings, **SAMPLING)[0]
    np.testing.assert_allclose(kept, image, atol=1e-4)
    pairs = [(added, clamped), (added, kept), (clamped, kept)]
    assert min(abs(a - b).max() for a, b in pairs) > 1e-3


def test_a_latent_is_clamped_to_multiples_of_its_natural_code(lab, residual):
    dense = dictionary.Dictionary("d", residual, sae.SAE(64, 5, 2))
    push = lab.latent_push("b", dense, 3, 2.0, way="clamp", natural=0.5, name="mine")
    assert push == Push("b", "mine", 2.0, way="clamp")
    z = experiment.codes_of(dense, 3, lab.pool.h)
    x = residual.standardise(lab.pool.h.transpose(1, 2))
    torch.testing.assert_close(z, dense.codes(x)[..., 3])
    delta = steering.setting(z[[1]], dense.directions(3), residual, [0, 2], 3, 2.0 * 0.5)
    where = (lab.pipe, [lab.pool.prompts[1]], [SEEDS[1]], STORE.tap)
    image = steering.steer(*where, delta, **SAMPLING)[0]
    np.testing.assert_allclose(lab.images(push, [1])[0], image, atol=1e-4)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"way": "set"}, "way is 'set'.*'add', 'clamp', 'keep norm'"),
        ({"way": "clamp"}, r"direction is \('a', 'one'\).*codes are given"),
        ({"window": (0, 3)}, r"windows is \(0, 3\)"),
    ],
)
def test_a_push_that_cannot_be_made_is_named(lab, changes, named):
    with pytest.raises(ValueError, match=named):
        lab.images(replace(Push("a", "one", 2.0), **changes), [0])


@pytest.fixture
def calls(pipe):
    """A list that grows with every call of the denoiser that reaches its last layer."""
    made = []
    handle = pipe.unet.conv_out.register_forward_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


def test_late_windows_cost_only_their_own_steps(lab, calls):
    late = [Push("a", "one", 50.0, window=(2, 2)), Push("b", "one", 50.0, window=(2, 2))]
    early = Push("a", "one", 3.0)
    # in batches of three, the one image from the first step on is made with two others
    lab.make({late[0]: [0, 1, 2], early: [3], late[1]: [1, 2]})
    assert len(calls) == 3 + 1
    made = dict(lab.made)
    without = replace(lab, pool=replace(lab.pool, outputs=None), made={}, distances={})
    for push, i in made:
        image = without.images(push, [i])[0]
        np.testing.assert_allclose(made[push, i], image, atol=1e-5)
        assert abs(image - lab.pool.images[i]).max() > 1e-4
    assert len(calls) == 4 + 6 * 3


def test_the_distance_of_edited_tokens_is_the_largest_of_its_steps(lab, residual):
    h = lab.pool.h
    sums = accumulate([h])
    natural = Natural.fit(sums, sums, [h])
    lab = replace(lab, natural=natural, made={}, distances={})
    weak, strong, late = (
        Push("a", "one", 1e-9),
        Push("a", "one", 8.0),
        Push("a", "one", 8.0, window=(2, 2)),
    )
    lab.make({push: [1, 2] for push in (weak, strong, late)})
    each = torch.stack([natural.distance(h[:, s], s) / natural.limits[s] for s in (0, 1)])
    weights = torch.from_numpy(lab.weights["a"])
    plain = (each * weights).sum(-1) / weights.sum(-1)
    np.testing.assert_allclose(lab.distance(weak, [1, 2]), plain.amax(0)[[1, 2]], rtol=1e-3)
    edited = h[:, 1] + weights[..., None] * lab.addition(late)[2]
    expected = ((natural.distance(edited.float(), 1) / natural.limits[1]) * weights).sum(-1)
    expected = (expected / weights.sum(-1))[[1, 2]]
    np.testing.assert_allclose(lab.distance(late, [1, 2]), expected, rtol=1e-3)
    assert (lab.distance(strong, [1, 2]) > lab.distance(weak, [1, 2])).all()
    nowhere = replace(lab, weights={"a": np.zeros((4, 16))}, made={}, distances={})
    assert np.isnan(nowhere.distance(strong, [0])).all()
    unknown = replace(lab, natural=None, made={}, distances={})
    assert np.isnan(unknown.distance(strong, [0])).all()


def test_nothing_is_made_twice(lab, monkeypatch):
    push, batches = Push("a", "one", 2.0), []
    steer = steering.steer
    monkeypatch.setattr(
        steering,
        "steer",
        lambda pipe, texts, *a, **k: batches.append(len(texts)) or steer(pipe, texts, *a, **k),
    )
    lab.make({push: [0, 1], Push("a", "two", 2.0): [0, 1, 1]})
    lab.images(push, [1, 0, 1])
    lab.images(push, [2, 0])
    assert batches == [3, 1, 1] and lab.n_made == 4 + 5


def test_any_latent_can_be_pushed_and_the_directions_given_stay_as_they_were(lab, residual):
    given = dict(lab.directions)
    again = replace(lab, directions=given, made={})
    dense = dictionary.Dictionary("d", residual, sae.SAE(64, 5, 2))
    push = again.latent_push("a", dense, 3, 2.0)
    assert push == Push("a", "latent 3", 2.0)
    assert torch.equal(again.directions["a", "latent 3"], dense.directions(3))
    assert given == lab.directions
    with pytest.raises(ValueError, match="latent is 5.*from 0 to 4"):
        again.latent_push("a", dense, 5, 2.0)


def test_adding_nothing_changes_nothing(lab):
    lab.weights["a"] = np.zeros((4, 16))
    np.testing.assert_allclose(
        lab.images(Push("a", "one", 8.0), [0, 1]), lab.pool.images[:2], atol=1e-5
    )
    found = lab.measure(Push("a", "one", 8.0, everywhere=True), [0, 1])
    assert (found["outside"][0] > 0).all() and (found["inside"][1] == 0).all()


def test_in_mode_residual_only_what_a_step_adds_is_added(lab, residual):
    lab.mode = "residual"
    u = steering.only_new(lab.directions["a", "one"], residual)
    expected = steering.addition(u, residual, [0, 2], 3, 2.0)
    torch.testing.assert_close(lab.addition(Push("a", "one", 2.0)), expected)


def test_taking_latents_out_takes_away_what_they_add(lab, residual):
    trained = dictionary.Dictionary("test", residual, sae.SAE(residual.d_in, 20, 8))
    picks = {"a": [0, 2], "b": [1]}
    x = residual.standardise(lab.pool.h[[0, 2]].transpose(1, 2))
    z = trained.codes(x)
    latents = z.sum((0, 1)).topk(3).indices.tolist()
    others = z.clone()
    others[..., latents] = 0
    change = (trained.rebuild(others) - trained.rebuild(z)) * residual.scale[:, None]
    delta = steering.at_every_step(change.permute(2, 0, 1, 3), [0, 2], 3)
    texts, seeds = [lab.pool.prompts[i] for i in (0, 2)], [SEEDS[i] for i in (0, 2)]
    expected = steering.steer(lab.pipe, texts, seeds, STORE.tap, delta, **SAMPLING)
    found = lab.without_latents(picks, trained, {"a": latents, "b": latents[:1]})
    np.testing.assert_allclose(found["a"], expected, atol=1e-4)
    assert abs(found["a"] - lab.pool.images[[0, 2]]).max() > 1e-3
    assert found["b"].shape[0] == 1 and lab.n_made == 4 + 3


def test_projecting_out_a_difference_of_class_means(lab, residual):
    means = {t: experiment.ClassMeans(*torch.randn(2, 2, 32)) for t in "ab"}
    found = lab.without_direction({"b": [2], "a": [1, 3]}, means, amount=2.0)
    lacking = residual.unstandardise(means["a"].lacking)
    direction = residual.scale[:, None] * means["a"].difference
    direction, centre = (steering.at_every_step(v, [0, 2], 3) for v in (direction, lacking))
    texts, seeds = [lab.pool.prompts[i] for i in (1, 3)], [SEEDS[i] for i in (1, 3)]
    expected = steering.project_out(
        *(lab.pipe, texts, seeds, STORE.tap, direction, centre),
        amount=2.0,
        mask=torch.from_numpy(lab.weights["a"][[1, 3]]).float(),
        **SAMPLING,
    )
    np.testing.assert_allclose(found["a"], expected, atol=1e-4)
    assert abs(found["b"] - lab.pool.images[[2]]).max() > 1e-4


def test_latents_are_aligned_by_the_cosine_over_the_whole_trajectory():
    direction = torch.tensor([[1.0, 0], [1, 0]])
    u = torch.stack([direction * 7, torch.tensor([[1.0, 0], [0, 0]]), -direction])
    assert experiment.aligned(u, direction, 0.9) == [0]
    assert experiment.aligned(u, direction, 0.7) == [0, 1]


def test_class_means_worked_by_hand(residual):
    names = ["colour=red", "colour=blue", "background=sky", "colour=green"]
    owner = np.array([[0, 1, 2, -1], [3, 3, 4, 4]])
    has = np.zeros((5, 4), bool)
    has[0, 0] = has[1, 1] = has[3, 0] = has[2, 2] = True
    labels = Labels(names, owner, has, np.array([0, 0, 1, 0, 1]))
    h = torch.randn(2, 2, 4, 32)
    found = experiment.class_means(iter(h.split(1)), labels, names, residual)
    x = residual.standardise(h.transpose(1, 2))  # (image, token, step, channel)
    assert list(found) == ["colour=red", "colour=blue", "background=sky"]
    red = (x[0, 0] + x[1, 0] + x[1, 1]) / 3
    torch.testing.assert_close(found["colour=red"].lacking, x[0, 1])
    torch.testing.assert_close(found["colour=red"].difference, red - x[0, 1])
    torch.testing.assert_close(found["background=sky"].lacking, (x[1, 2] + x[1, 3]) / 2)


BEST = {
    f"{label}": {
        "residual": 0,
        "raw": 1,
        "validation_auroc": {"residual": a, "raw": b, "neurons": 1},
    }
    for label, a, b in (
        ("colour=red", 0.6, 0.9),
        ("colour=blue", 0.8, 0.8),
        ("shape=cross", 0.5, 0.5),
        ("background=sky", 0.9, 0.9),
    )
}


def test_targets_are_the_best_detected_each_of_another_attribute():
    found = {"best": BEST, "strongest": [{"name": "cluster 1", "residual": 5, "raw": 6}]}
    chosen = experiment.choose_targets(found, [], 2)
    assert list(chosen) == ["background=sky", "colour=blue"]
    assert chosen["colour=blue"] is BEST["colour=blue"]
    given = ["colour=red", "colour=blue", "colour=red"]
    assert list(experiment.choose_targets(found, given, 1)) == ["colour=red", "colour=blue"]
    with pytest.raises(ValueError, match="targets is 'colour=rad'.*colour=red"):
        experiment.choose_targets(found, ["colour=rad"], 1)


def test_a_label_that_validation_images_cannot_rank_comes_last():
    unknown = {"residual": 2, "raw": 3, "validation_auroc": {"residual": None, "raw": None}}
    found = {"best": {"mark=plain": unknown} | BEST, "strongest": []}
    assert list(experiment.choose_targets(found, [], 4))[-1] == "mark=plain"


def test_without_labels_the_strongest_features_are_the_targets():
    strongest = [{"name": f"cluster {i}", "residual": i, "raw": 2 * i} for i in (1, 2, 3)]
    found = {"best": {}, "strongest": strongest}
    chosen = experiment.choose_targets(found, [], 2)
    assert chosen == {"cluster 1": strongest[0], "cluster 2": strongest[1]}
    assert list(experiment.choose_targets(found, ["cluster 3"], 2)) == ["cluster 3"]
    with pytest.raises(ValueError, match="targets is 'half=upper'.*cluster"):
        experiment.choose_targets(found, ["half=upper"], 1)


def test_the_region_of_a_feature_is_where_its_latent_is_active(residual, pool):
    dense = dictionary.Dictionary("d", residual, sae.SAE(64, 5, 2))
    x = residual.standardise(pool.h.transpose(1, 2))
    dense.calibrate(x.flatten(0, 1))
    y = residual.residualize(x)
    expected = y @ dense.coder.W_enc[:, 3] > dense.coder.threshold[3]  # the biases are still zero
    with pytest.raises(ValueError, match="latent is 5.*from 0 to 4"):
        experiment.where_active(dense, 5, pool.h)
    region = experiment.where_active(dense, 3, pool.h)
    assert np.array_equal(region, expected.numpy()) and 0 < region.mean() < 1
