import pytest
import torch
from conftest import some_predictors

from helpers import coordinates
from helpers.coders.topk import TopK
from helpers.dictionary import Dictionary


def test_the_k_largest_codes_of_each_input_are_kept():
    coder = TopK(4, 4, 2)
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(4))
        coder.b_enc.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
        coder.b_dec.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    y = torch.tensor([[4.0, 2.0, 1.5, 0.1], [0.0, -1.0, -3.0, 0.5]])
    # before: [3, 2, 2.5, 0.1] and [-1, -1, -2, 0.5]
    expected = torch.tensor([[3.0, 0.0, 2.5, 0.0], [0.0, 0.0, 0.0, 0.5]])
    torch.testing.assert_close(coder.encode(y), expected)
    before = coder.encode(y)
    assert coder.set_threshold(y) is coder
    assert torch.equal(coder.encode(y), before)


def test_a_dictionary_of_it_comes_back_from_its_file(tmp_path):
    found = Dictionary("top", coordinates.residual(some_predictors()), TopK(12, 20, 3))
    x = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0))
    codes = found.calibrate(x).codes(x)
    assert ((codes > 0).sum(1) <= 3).all() and (codes > 0).any()
    found.save(tmp_path / "d.safetensors")
    again, _ = Dictionary.load(tmp_path / "d.safetensors")
    assert isinstance(again.coder, TopK) and again.coder.k == 3
    assert torch.equal(again.codes(x), codes) and torch.equal(again(x), found(x))


@pytest.mark.parametrize("k", [2.5, 0, 9])
def test_k_that_cannot_be_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}; it must be"):
        TopK(4, 8, k)
