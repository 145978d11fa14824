import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import some_predictors
from sklearn.metrics import roc_auc_score

from helpers import coordinates
from helpers.dictionary import neurons, untrained
from helpers.measure.detection import Codes, Detection, aurocs, choose, detect, encode, holds_at_top
from helpers.measure.labels import Labels

NAMES = ["colour=red", "colour=blue", "background=sky"]


def sparse(values):
    return scipy.sparse.csc_matrix(np.array(values, float))


def random_labels(n_images, seed=0):
    """Two objects and a background in each image of eight tokens, some of which are nobody's."""
    rng = np.random.default_rng(seed)
    owner = 3 * np.arange(n_images)[:, None] + rng.integers(0, 3, size=(n_images, 8))
    owner[rng.random(owner.shape) < 0.2] = -1
    objects = np.tile([True, True, False], n_images)
    red, sky = rng.random((2, 3 * n_images)) < 0.4
    has = np.stack([red & objects, ~red & objects, sky & ~objects], axis=1)
    return Labels(NAMES, owner, has, (~objects).astype(int))


def random_codes(n_images, n_latents=5, seed=1, two_sided=False):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(8 * n_images, n_latents)).round(1)
    if two_sided:
        return Codes(values, n_images, two_sided=True)
    return Codes(sparse(np.maximum(values - 0.5, 0)), n_images)


def informed(labels, two_sided=False):
    """Codes of which latent 3 tells red objects, and does so by being small if two-sided."""
    codes = random_codes(len(labels.owner), two_sided=two_sided)
    values = codes.values if two_sided else codes.values.toarray()
    red = labels.contrast("colour=red")[0].ravel()
    values[:, 3] = -2.0 * red if two_sided else red * (1 + np.arange(len(red)) % 3)
    return Codes(values if two_sided else sparse(values), codes.n_images, two_sided)


def test_codes_by_image():
    # two images of two tokens; latent 0 is strongest in image 1, latent 2 never fires
    codes = Codes(sparse([[1, 0, 0], [0, 2, 0], [3, 0, 0], [0, 1, 0]]), n_images=2)
    assert codes.of(0).tolist() == [[1, 0], [3, 0]]
    assert codes.fires().tolist() == [True, True, False]
    assert codes.top_images(0, 2).tolist() == [1, 0] and codes.top_images(1, 1).tolist() == [0]
    dense = Codes(codes.values.toarray(), 2, two_sided=True)
    assert dense.of(1).tolist() == codes.of(1).tolist()
    assert dense.fires().tolist() == codes.fires().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_dictionaries_are_encoded_in_one_pass(dtype):
    p = some_predictors(n_steps=2, d=3)
    x = torch.randn(5, 4, 2, 3, generator=torch.Generator().manual_seed(0))  # image token step d
    sae = untrained(coordinates.residual(p), 7, 2).calibrate(x.flatten(0, 1))
    found = encode({"SAE": sae, "neurons": neurons(p)}, iter(x.split(2)), dtype)
    error = abs(found["SAE"].values.toarray() - sae.codes(x).flatten(0, 1).numpy())
    assert (error < 1e-6).all() if dtype == torch.float32 else 0 < (error > 0.05).mean() < 0.1
    assert 0 < found["SAE"].values.nnz < 20 * 7 and not found["SAE"].two_sided
    np.testing.assert_array_equal(found["neurons"].values, x.flatten(0, 1).flatten(1).numpy())
    assert found["neurons"].two_sided and found["neurons"].n_images == 5
    assert sae.coder.W_dec.dtype == torch.float32


@pytest.mark.parametrize("two_sided", [False, True])
def test_auroc_is_scikit_learns_among_tokens_of_the_labels_kind(two_sided):
    labels, codes = random_labels(6), random_codes(6, two_sided=two_sided)
    shuffled = labels.shuffled(np.random.default_rng(0))
    found = aurocs(codes, [labels, shuffled], NAMES[::-1])
    assert found.shape == (2, 5, 3)
    for labelling, of_labelling in zip((labels, shuffled), found):
        for latent in range(5):
            for name, value in zip(NAMES[::-1], of_labelling[latent]):
                labelled, others = labelling.contrast(name)
                among = labelled | others
                naive = roc_auc_score(labelled[among], codes.of(latent)[among])
                assert value == pytest.approx(naive)


def test_a_label_that_nothing_has_tells_nothing():
    labels = random_labels(3)
    labels.has[:, 2] = False
    assert (aurocs(random_codes(3), [labels], NAMES)[0, :, 2] == 0.5).all()


def test_a_code_that_is_mostly_cut_off_is_punished_for_it():
    # one thing has the label at four tokens; the code is never wrong but fires at one of them only
    labels = Labels(
        ["a=1", "a=2"], np.array([[0, 0, 0, 0, 1, 1]]), np.eye(2, dtype=bool), np.zeros(2, int)
    )
    before = Codes(np.array([[4.0], [3], [2], [1], [0], [-1]]), 1, two_sided=True)
    after = Codes(sparse(before.values * (before.values > 3)), 1)
    assert aurocs(before, [labels], ["a=1"]).item() == 1
    assert aurocs(after, [labels], ["a=1"]).item() == (2 + 6 / 2) / 8  # 2 of 8 pairs won, 6 tied


@pytest.mark.parametrize("two_sided, sign", [(False, 1), (True, -1)])
def test_the_best_latent_is_chosen_and_turned_round_if_it_may_be(two_sided, sign):
    labels = random_labels(6)
    latent, auroc, signs = choose(informed(labels, two_sided), [labels], NAMES)
    assert latent[0, 0] == 3 and auroc[0, 0] == 1 and signs[0, 0] == sign
    assert two_sided or (signs == 1).all()


@pytest.mark.parametrize("two_sided", [False, True])
def test_latents_are_chosen_on_validation_images_and_measured_on_test_images(two_sided):
    labels = {"validation": random_labels(12), "test": random_labels(9, seed=5)}
    codes = {split: informed(v, two_sided) for split, v in labels.items()}
    found = detect(codes, labels, NAMES, n_shuffles=40)
    assert found.latent["colour=red"] == 3 and found.validation["colour=red"] == 1
    assert found.auroc("colour=red") == (1, 1, 1)
    best = found.latent["background=sky"]
    assert best == choose(codes["validation"], [labels["validation"]], NAMES)[0][0, 2]
    on_test = aurocs(codes["test"], [labels["test"]], NAMES)[0]
    np.testing.assert_array_equal(found.on_test["background=sky"], on_test[:, 2])
    value = found.auroc("background=sky").value
    assert (
        value == pytest.approx(on_test[best, 2])
        or two_sided
        and value == pytest.approx(1 - on_test[best, 2])
    )
    both = found.auroc("colour=red", "background=sky").value
    assert both == pytest.approx((1 + value) / 2)


def test_a_latent_chosen_on_luck_is_no_better_than_guessing_on_test_images():
    labels = {"validation": random_labels(4), "test": random_labels(300, seed=5)}
    codes = {
        split: random_codes(len(v.owner), 200, seed=i)
        for i, (split, v) in enumerate(labels.items())
    }
    found = detect(codes, labels, NAMES, n_shuffles=1)
    assert min(found.validation.values()) > 0.6
    assert found.auroc(*NAMES).value == pytest.approx(0.5, abs=0.05)


def test_the_control_measures_latents_of_shuffled_labels_on_true_ones():
    labels = {"validation": random_labels(12), "test": random_labels(9, seed=5)}
    codes = {split: informed(v) for split, v in labels.items()}
    found = detect(codes, labels, NAMES, n_shuffles=30, seed=3)
    rng, reached = np.random.default_rng(3), []
    for _ in range(30):
        shuffled = labels["validation"].shuffled(rng)
        latents, _, _ = choose(codes["validation"], [shuffled], NAMES)
        reached.append([found.on_test[n][i] for n, i in zip(NAMES, latents[0])])
    for name, values in zip(NAMES, np.array(reached).T):
        np.testing.assert_array_equal(found.shuffled[name], values)
    band = found.arbitrary("colour=red")
    assert band.value == pytest.approx(np.mean(reached, axis=0)[0]) and band.value < 0.9


def test_the_control_can_fail():
    """Where every latent tells the label, one that was not chosen for it does so, too."""
    labels = {"validation": random_labels(12), "test": random_labels(9, seed=5)}
    codes = {}
    for split, v in labels.items():
        red = v.contrast("colour=red")[0].reshape(-1, 1)
        noise = np.random.default_rng(0).random((len(red), 4))
        codes[split] = Codes(sparse(red + 0.01 * noise * red), len(v.owner))
    found = detect(codes, labels, ["colour=red"], n_shuffles=20)
    assert found.arbitrary("colour=red") == (1, 1, 1)


def made(resampled):
    resampled = {k: np.array(v) for k, v in resampled.items()}
    return Detection({}, {}, resampled, shuffled=resampled, on_test={})


def test_dictionaries_are_compared_on_the_same_resampled_images():
    a = made({"x": [0.8, 0.7, 0.9], "y": [0.6, 0.6, 0.6]})
    b = made({"x": [0.5, 0.4, 0.6], "y": [0.6, 0.5, 0.5]})
    assert a.less(b, "x") == pytest.approx((0.3, 0.3, 0.3))
    assert a.less(b, "x", "y").value == pytest.approx(0.15)
    assert a.auroc("x", "y").value == pytest.approx(0.7)


def test_labels_that_cannot_be_tested_take_no_part_in_a_mean():
    nan = float("nan")
    a, b = made({"x": [0.8, 0.7, 0.9], "y": [nan] * 3}), made({"x": [0.5] * 3, "y": [nan] * 3})
    assert a.auroc("x", "y").value == 0.8 and a.less(b, "x", "y").value == pytest.approx(0.3)
    assert a.arbitrary("x", "y").value == pytest.approx(0.8)
    assert np.isnan(a.auroc("y").value) and np.isnan(a.arbitrary("y").value)


def test_how_often_a_label_holds_where_a_latent_is_strongest():
    # three images of three tokens; things: red, blue, sky, and red in the third image
    owner = np.array([[0, 1, 2], [1, 1, -1], [3, 3, 2]])
    has = np.eye(3, dtype=bool)[[0, 1, 2, 0]]
    labels = Labels(NAMES, owner, has, np.array([0, 0, 1, 0]))
    z = [[3, 1, 0], [0, 2, 1], [0, 0, 0]]
    codes = Codes(sparse(np.reshape(z, (9, 1))), 3)
    holds, anywhere = holds_at_top(codes, labels, "colour=red", 0)
    assert holds.tolist() == [True, False]  # the third image has no code
    assert anywhere == 3 / 6  # red and blue tokens; the sky is of another kind
    assert holds_at_top(codes, labels, "colour=red", 0, n=1)[0].tolist() == [True]
    silent = Codes(sparse(np.zeros((9, 1))), 3)
    assert len(holds_at_top(silent, labels, "colour=red", 0)[0]) == 0
