import numpy as np
import pytest
import torch
from activations import D, S, recorded
from conftest import some_predictors

from helpers import coordinates, steering
from helpers.dictionary import Dictionary, Projection
from helpers.measure import natural
from helpers.measure.natural import Natural
from helpers.moments import accumulate


@pytest.fixture(scope="module")
def split():
    return recorded(300, seed=0, offset=5.0), recorded(200, seed=1, offset=5.0)


@pytest.fixture(scope="module")
def fitted(split):
    train, validation = split
    sums = accumulate([train[:100], train[100:]])
    return Natural.fit(sums, accumulate([validation], sums.shift), validation.split(60))


def tokens(h, s):
    return h[:, s].flatten(0, 1).double().numpy()


@pytest.mark.parametrize("s", range(S))
def test_distance_is_mahalanobis_over_the_root_of_the_channels(split, fitted, s):
    seen, held = tokens(split[0], s), tokens(split[1], s)
    C, weight = np.cov(seen.T, bias=True), fitted.shrinkage[s].item()
    C = (1 - weight) * C + weight * np.trace(C) / D * np.eye(D)
    off = held - seen.mean(0)
    expected = np.sqrt(np.einsum("nd,de,ne->n", off, np.linalg.inv(C), off) / D)
    found = fitted.distance(split[1][:, s], s)
    assert found.shape == (200, 5)
    np.testing.assert_allclose(found.flatten(), expected, rtol=1e-3)
    assert found.pow(2).mean().sqrt() == pytest.approx(1, abs=0.05)
    assert (found.flatten() <= fitted.limits[s]).double().mean() == pytest.approx(0.99, abs=0.002)


def test_what_leaves_the_data_is_far_and_what_follows_it_is_not(split, fitted):
    h = split[1][:, 1]
    values, vectors = np.linalg.eigh(np.cov(tokens(split[0], 1).T))
    along, across = torch.tensor(vectors[:, -1]).float(), torch.tensor(vectors[:, 0]).float()
    size = float(values[-1]) ** 0.5
    apart = [fitted.distance(h + size * v, 1).mean() / fitted.limits[1] for v in (along, across)]
    assert apart[0] < 1 < apart[1]


def test_few_tokens_are_shrunk_more_than_many(split):
    train, validation = split
    held = accumulate([validation])
    few = accumulate([train[:1]], held.shift)
    found = Natural.fit(few, held, [validation])
    many = Natural.fit(accumulate([train], held.shift), held, [validation])
    assert (found.shrinkage > many.shrinkage)[1:].all()  # the first step is white noise
    assert found.distance(validation[:, 0], 0).isfinite().all()


def test_half_precision_is_measured_in_single(fitted, split):
    h = split[1][:5, 2]
    half = fitted.distance(h.half(), 2)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, fitted.distance(h, 2), rtol=0.02, atol=0.02)


def test_a_subspace_holds_its_share_of_the_variance_and_no_more(split):
    found = natural.subspace(accumulate([split[0]]), share=0.9)
    for s, basis in enumerate(found):
        used = basis[:, basis.any(0)]
        torch.testing.assert_close(used.T @ used, torch.eye(used.shape[1]), atol=1e-5, rtol=0)
        x = tokens(split[0], s)
        x = x - x.mean(0)
        shares = [((x @ used[:, :r].numpy()) ** 2).sum() / (x**2).sum() for r in range(5)]
        r = used.shape[1]
        assert shares[r - 1] < 0.9 <= shares[r]
    u = torch.randn(S, D)
    inside = steering.onto(u, found)
    torch.testing.assert_close(steering.onto(inside, found), inside)
    whole = natural.subspace(accumulate([split[0]]), share=1.0)
    torch.testing.assert_close(steering.onto(u, whole), u, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="share is 1.5"):
        natural.subspace(accumulate([split[0]]), share=1.5)


def test_typical_codes_are_a_quantile_of_those_that_are_not_zero(split):
    raw = coordinates.raw(some_predictors(S, D))

    class Positive(Projection):
        def encode(self, y):
            return super().encode(y).clamp(min=0)

    made = Dictionary("d", raw, Positive(torch.cat([torch.eye(S * D), torch.zeros(1, S * D)])))
    z = made.codes(raw.standardise(split[1].transpose(1, 2)))
    found = natural.typical_codes(made, [3, 0], split[1].split(70), 0.5)
    expected = [np.median(z[..., i][z[..., i] > 0]) for i in (3, 0)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="latent is 12.*active"):
        natural.typical_codes(made, [0, 12], [split[1]])
    with pytest.raises(ValueError, match="latent is 13.*from 0 to 12"):
        natural.typical_codes(made, [13], [split[1]])
