import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.sae import SAE

D, M, K = 16, 24, 3


def random_sae(seed=0, n_latents=M):
    """An SAE with weights of no particular origin, and a threshold of its own for each latent."""
    sae = SAE(D, n_latents, K, seed)
    g = torch.Generator().manual_seed(seed + 1)
    sae.b_enc.data = 0.1 * torch.randn(n_latents, generator=g)
    sae.b_dec.data = torch.randn(D, generator=g)
    sae.threshold = torch.rand(n_latents, generator=g)
    return sae.requires_grad_(False)


@pytest.mark.parametrize(
    "n_latents, k, named", [(8, 9, "k is 9"), (8, 0, "k is 0"), (0, 1, "n_latents is 0")]
)
def test_sizes_that_cannot_be_are_refused_by_name(n_latents, k, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        SAE(4, n_latents, k)


def test_the_encoder_starts_as_the_decoders_transpose():
    sae = SAE(D, M, K, seed=3)
    assert torch.equal(sae.W_enc, sae.W_dec.T) and sae.W_enc.T.is_contiguous()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
    assert not torch.equal(sae.W_dec, SAE(D, M, K, seed=4).W_dec)


def test_codes_and_reconstruction_follow_the_formula():
    sae, y = random_sae(), torch.randn(7, D)
    W_enc, b_enc, W_dec, b_dec, threshold = (
        getattr(sae, n).double().numpy() for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )
    pre = np.maximum((y.double().numpy() - b_dec) @ W_enc + b_enc, 0)
    z = pre * (pre > threshold)
    np.testing.assert_allclose(sae.preactivations(y), pre, atol=1e-5)
    np.testing.assert_allclose(sae.encode(y), z, atol=1e-5)
    np.testing.assert_allclose(sae(y), z @ W_dec + b_dec, atol=1e-5)
    assert 0 < (z > 0).mean() < (pre > 0).mean()


@given(seed=st.integers(0, 1000), order=st.permutations(range(12)), cut=st.integers(1, 11))
def test_a_code_does_not_depend_on_its_batch(seed, order, cut):
    sae = random_sae(seed)
    y = torch.randn(12, D, generator=torch.Generator().manual_seed(seed))
    order = torch.tensor(order)
    together = sae.encode(y)
    apart = torch.cat([sae.encode(y[order[:cut]]), sae.encode(y[order[cut:]])])
    torch.testing.assert_close(apart, together[order])
    torch.testing.assert_close(sae.encode(torch.cat([y, 100 * y]))[:12], together)


@pytest.mark.parametrize("k", [K, 1.6, 0.4])
@pytest.mark.parametrize("n", [7, 3000])
def test_set_threshold_leaves_k_active_on_average(n, k):
    sae = SAE(D, M, k, seed=1)
    y = torch.randn(n, D, generator=torch.Generator().manual_seed(2))
    assert sae.set_threshold(y) is sae
    assert (sae.encode(y) > 0).sum() == round(k * n)
    every = sae.preactivations(y).flatten().sort(descending=True).values  # all at once
    assert (sae.threshold == every[round(k * n)]).all() and sae.threshold.shape == (M,)


def test_set_threshold_where_fewer_than_k_are_positive_keeps_them_all():
    sae = SAE(D, M, M)
    y = torch.randn(50, D, generator=torch.Generator().manual_seed(3))
    sae.set_threshold(y)
    assert not sae.threshold.any() and torch.equal(sae.encode(y), sae.preactivations(y))


def test_set_threshold_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        SAE(D, M, K).set_threshold(torch.full((4, D), float("nan")))
