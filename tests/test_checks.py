import re

import pytest
import torch

from helpers import checks


def test_a_refusal_is_one_sentence_with_parameter_value_and_what_is_valid():
    with pytest.raises(ValueError, match=r"^k is 33; it must be from 1 to 32$"):
        checks.refuse("k", 33, "from 1 to 32")
    with pytest.raises(ValueError, match=r"^run is 'a b'; it must be a folder's name$"):
        checks.refuse("run", "a b", "a folder's name")


def test_a_long_value_loses_its_middle():
    with pytest.raises(ValueError) as refused:
        checks.refuse("prompts", "/far" + "x" * 500 + "/captions.csv", "a file")
    sentence = str(refused.value)
    assert sentence.startswith("prompts is '/farxx") and "xx/captions.csv'; it must" in sentence
    assert len(sentence) < 160


@pytest.mark.parametrize("value", [1, 1.5, 3, True])
def test_a_number_in_its_range_comes_back(value):
    assert checks.in_range("k", value, 1, 3) is value


@pytest.mark.parametrize("value", [0, 3.1, -1, float("nan"), float("inf"), "2", None, [2]])
def test_what_is_not_in_its_range_is_refused(value):
    for high, valid in ((3, "from 1 to 3"), (float("inf"), "at least 1")):
        if value != 3.1 or high == 3:
            sentence = f"k is {value!r}; it must be {valid}"
            with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
                checks.in_range("k", value, 1, high)


def test_positive_numbers():
    assert checks.positive("rate", 1e-9) == 1e-9
    for value in (0, -1, float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="^rate is .*; it must be above 0$"):
            checks.positive("rate", value)


def test_one_of_several():
    assert checks.one_of("mode", "a", (c for c in "ab")) == "a"
    with pytest.raises(ValueError, match="^mode is 'c'; it must be one of 'a', 'b'$"):
        checks.one_of("mode", "c", "ab")


def test_the_nearest_names_or_else_the_first():
    known = ["n_latents", "n_updates", "batch_size", "k", "seed"]
    assert checks.nearest("n_latent", known).split(", ")[0] == "n_latents"
    assert checks.nearest("zzz", known, 2) == "n_latents, n_updates"
    assert checks.nearest(3, known, 1) == "n_latents"


@pytest.mark.parametrize(
    "cuda, mps, chosen", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device_is_chosen_and_absent_ones_are_refused(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert checks.choose_device("auto") == chosen and checks.choose_device("cpu") == "cpu"
    for device, there in (("cuda:1", cuda), ("mps", mps)):
        if there:
            assert checks.choose_device(device) == device
        else:
            with pytest.raises(ValueError, match=f"^device is '{device}'; .*'auto' or .*'cpu'"):
                checks.choose_device(device)


@pytest.mark.parametrize("device", ["gpu", "tpu", "", "CUDA", "cpu:", "cpu:x", 0, None])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match="^device is "):
        checks.choose_device(device)


def test_dtypes_by_name():
    assert checks.choose_dtype("bfloat16", torch.float16) == torch.bfloat16
    assert checks.choose_dtype("auto") == torch.float32
    assert checks.choose_dtype("auto", torch.float16) == torch.float16
    for name in ("float8", "fp16", "", "torch.float32", None):
        with pytest.raises(ValueError, match="^store_dtype is .*'float32', 'float16', 'bfloat16'"):
            checks.choose_dtype(name, name="store_dtype")


def test_a_tensor_must_be_finite():
    given = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert checks.finite("delta", given) is given
    for value, shown in ((torch.nan, "nan"), (-torch.inf, "-inf")):
        given[1, 0] = value
        with pytest.raises(ValueError, match=f"delta is {shown}; it must be finite"):
            checks.finite("delta", given)
