import numpy as np
import pytest
import torch
from activations import S, flat, recorded
from hypothesis import given
from hypothesis import strategies as st

from helpers.files import save_tensors
from helpers.moments import Moments, accumulate, accumulate_once, cached

SUMS = ("total", "square", "cross", "cross2")


def same(one, other, rtol=0.0, atol=0.0):
    assert one.count == other.count and isinstance(one.count, int)
    for name in SUMS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=rtol, atol=atol)


def test_moments_are_the_sums_they_claim_to_be():
    h = recorded(offset=100)
    m = accumulate([h])
    x = flat(h) - m.shift.numpy()
    assert m.count == 60 and m.total.dtype == torch.float64
    np.testing.assert_allclose(m.total, x.sum(0), atol=1e-9)
    for s in range(S):
        np.testing.assert_allclose(m.square[s], x[:, s].T @ x[:, s], atol=1e-9)
        if s:
            np.testing.assert_allclose(m.cross[s], x[:, s - 1].T @ x[:, s], atol=1e-9)
    np.testing.assert_allclose(m.cross2[2], x[:, 0].T @ x[:, 2], atol=1e-9)
    assert not m.cross[0].any() and not m.cross2[:2].any()


@given(seed=st.integers(0, 10_000), cuts=st.sets(st.integers(1, 11)))
def test_moments_do_not_depend_on_how_images_are_cut_into_shards(seed, cuts):
    h = recorded(seed=seed)
    whole = accumulate([h])
    bounds = [0, *sorted(cuts), len(h)]
    shards = [h[a:b] for a, b in zip(bounds, bounds[1:])]
    parts = [accumulate([shard], whole.shift) for shard in shards]
    for other in (accumulate(shards, whole.shift), sum(parts[1:], parts[0])):
        same(other, whole, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_shards_of_fewer_rows_than_channels_are_summed_all_the_same(n):
    h = torch.randn(n, 2, 4, 20, generator=torch.Generator().manual_seed(0)) + 5
    m, x = accumulate(h.split(1)), flat(h)
    first = accumulate([h[:1]])
    assert m.count == n * 4 and torch.equal(m.shift, first.shift)
    x = x - m.shift.numpy()
    np.testing.assert_allclose(m.total, x.sum(0), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(m.square[1], x[:, 1].T @ x[:, 1], rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(m.cross[1], x[:, 0].T @ x[:, 1], rtol=1e-12, atol=1e-10)


def test_moments_with_different_shifts_do_not_add():
    with pytest.raises(ValueError, match="shift"):
        accumulate([recorded()]) + accumulate([recorded(seed=1)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value):
    h = recorded()
    h[3, 1, 2, 0] = value
    with pytest.raises(ValueError, match="NaN"):
        accumulate([h])


def test_no_trajectories_are_refused():
    with pytest.raises(ValueError, match="no trajectories"):
        accumulate(iter([]))


def test_the_shift_is_the_first_shards_mean():
    h = recorded(offset=50)
    np.testing.assert_allclose(accumulate([h[:6], h[6:]]).shift, flat(h[:6]).mean(0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "mps"])  # MPS has no float64, so the CPU does it
def test_moments_are_float64_on_the_cpu_whatever_they_are_summed_from(dtype, device):
    h = recorded().to(dtype)
    m = accumulate([h], device=device)
    for name in ("shift", *SUMS):
        assert getattr(m, name).dtype == torch.float64 and getattr(m, name).device.type == "cpu"
    same(m, accumulate([h.double()]))


def test_accumulating_leaves_the_shards_as_they_are():
    h = recorded().double()
    before = h.clone()
    accumulate([h])
    assert torch.equal(h, before)


class Processes:
    """An accelerator of several processes, each of which holds one of the given moments."""

    device = torch.device("cpu")

    def __init__(self, parts):
        self.parts, self.fields = parts, iter(("count", *SUMS))

    def reduce(self, value, how):
        name = next(self.fields)
        assert how == "sum" and torch.equal(value, torch.as_tensor(getattr(self.parts[0], name)))
        return sum(torch.as_tensor(getattr(part, name)) for part in self.parts)


def test_moments_of_several_processes_add_up_and_an_idle_one_adds_nothing():
    h = recorded(offset=3)
    whole = accumulate([h])
    idle = Moments.none(whole.shift)
    parts = [accumulate([h[:5]], whole.shift), accumulate([h[5:]], whole.shift), idle]
    same(parts[0].summed(Processes(parts)), whole, rtol=1e-12, atol=1e-10)
    same(whole + idle, whole)


def test_moments_come_back_from_their_file(tmp_path):
    moments = accumulate([recorded()])
    moments.save(tmp_path / "m.safetensors", {"trajectories": "12ab"})
    loaded, record = Moments.load(tmp_path / "m.safetensors")
    assert record == {"trajectories": "12ab"} and torch.equal(loaded.shift, moments.shift)
    same(loaded, moments)


def test_a_file_that_holds_no_moments_is_named(tmp_path):
    save_tensors(tmp_path / "part.safetensors", {"count": torch.tensor(3)})
    with pytest.raises(ValueError, match="part.safetensors does not hold moments"):
        Moments.load(tmp_path / "part.safetensors")


def test_a_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    accumulate([recorded()]).save(path)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="m.safetensors is damaged"):
        Moments.load(path)


def test_cached_moments_are_made_once_for_the_same_origin(tmp_path):
    made = []

    def make():
        made.append(accumulate([recorded(seed=len(made))]))
        return made[-1]

    path = tmp_path / "moments" / "train.safetensors"
    first = cached(path, {"trajectories": "a"}, make)
    same(cached(path, {"trajectories": "a"}, make), first)
    assert len(made) == 1
    other = cached(path, {"trajectories": "b"}, make)
    assert len(made) == 2 and not torch.equal(other.total, first.total)
    same(cached(path, {"trajectories": "b"}, make), other)


def test_where_moments_cannot_be_kept_they_are_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OSError, match=f"^run: {tmp_path} cannot be written; .* is read-only$"):
        cached(tmp_path / "train.safetensors", {}, lambda: pytest.fail("they were"))


def test_accumulating_once_reads_the_shards_of_an_origin_only_once(tmp_path):
    path, h = tmp_path / "train.safetensors", recorded()
    shift = torch.ones(h.shape[1], h.shape[3], dtype=torch.float64)
    first = accumulate_once(path, {"trajectories": "a"}, h.split(5), shift)
    same(first, accumulate(h.split(5), shift))
    unread = iter(h.split(5))
    same(accumulate_once(path, {"trajectories": "a"}, unread, shift), first)
    assert len(list(unread)) == 3
