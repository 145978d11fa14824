import json
import shutil
import signal
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import TOKENS, take
from hypothesis import given
from hypothesis import strategies as st
from stores import PROMPTS, SEEDS, tiny_plan

from helpers import files
from helpers.store import read
from helpers.store.collect import collect, repair
from helpers.store.plan import SPLITS
from helpers.store.read import Store
from helpers.trajectories import Tap

SHARD = "shard-00001.safetensors"  # the third training image, number 3
PER_IMAGE = 2 * 16 * 32 * 4  # bytes
N = 23 * 16  # training trajectories in `many`
BUFFERS = [1, 4 * PER_IMAGE, 7 * PER_IMAGE + 5, 2**30]


@pytest.fixture(scope="module")
def finished(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "t"
    collect(tiny_plan(folder), pipe)
    return folder


@pytest.fixture(scope="module")
def some_tokens(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("some") / "t"
    collect(tiny_plan(folder, tokens_per_image=5), pipe)
    return folder


@pytest.fixture(scope="module")
def many(pipe, tmp_path_factory):
    """23 training images in 8 shards."""
    folder, n = tmp_path_factory.mktemp("many"), 26
    plan = tiny_plan(
        folder,
        prompts=["a dog"] * n,
        seeds=range(n),
        splits=["train"] * 20 + ["validation"] * 2 + ["train"] * 3 + ["test"],
        steps=[0, 1],
        batch_size=3,
        sampling={"num_inference_steps": 2, "guidance_scale": 1.0},
    )
    collect(plan, pipe)
    return folder


@pytest.fixture(scope="module")
def every(many):
    """All training trajectories, and the number of each one's shard."""
    shards = [h.transpose(1, 2).flatten(0, 1) for h in Store(many).shards("train")]
    of_shard = {tuple(t): i for i, h in enumerate(shards) for t in h.flatten(1).tolist()}
    assert len(of_shard) == N and len(shards) == 8
    return torch.cat(shards), of_shard


@pytest.fixture
def returns():
    """A limit for code that might never return: five seconds of this process's time."""

    def late(*_):
        raise TimeoutError("still running")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, 5)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def rows(x):
    return sorted(map(tuple, x.flatten(1).tolist()))


# --- a split ------------------------------------------------------------------------------------


def test_a_store_says_what_was_recorded(finished, pipe):
    store = Store(finished)
    assert store.tap == Tap(TOKENS, "output", "conditional")
    assert (store.n_steps, store.n_tokens, store.channels, store.grid) == (2, 16, 32, (4, 4))
    assert (store.prompts, store.seeds, store.steps) == (PROMPTS, SEEDS, [0, 2])
    assert store.timesteps == pipe.scheduler.timesteps[[0, 2]].tolist()
    assert store.prompts_of("train") == [PROMPTS[0], PROMPTS[2], PROMPTS[3]]


def test_the_splits_share_out_every_image_once(finished):
    store = Store(finished)
    indices = {split: store.indices(split).tolist() for split in SPLITS}
    assert indices == {"train": [0, 2, 3], "validation": [1], "test": [4]}
    for split in SPLITS:
        assert store.n_images(split) == len(indices[split]) == len(store.images(split))
        assert sum(len(h) for h in store.shards(split)) == len(indices[split])


def test_some_tokens_of_training_images_and_all_of_the_others(some_tokens, finished):
    some, full = Store(some_tokens), Store(finished)
    tokens = some.tokens("train")
    assert tokens.shape == (3, 5) and some.tokens_kept("train") == 5
    kept, every = (torch.cat(list(s.shards("train"))) for s in (some, full))
    assert torch.equal(kept, torch.stack([every[i][:, tokens[i]] for i in range(3)]))
    for split in ("validation", "test"):
        assert some.tokens(split).tolist() == full.tokens(split).tolist() == [[*range(16)]]
        assert some.tokens_kept(split) == 16
        assert torch.equal(*(next(s.shards(split)) for s in (some, full)))
    assert rows(next(some.batches("train", 15))) == rows(kept.transpose(1, 2).flatten(0, 1))


def test_training_images_can_be_left_out(pipe, finished, tmp_path):
    collect(tiny_plan(tmp_path, train_images=False), pipe)
    store, full = Store(tmp_path), Store(finished)
    with pytest.raises(ValueError, match="train_images was false"):
        store.images("train")
    for split in ("validation", "test"):
        assert np.array_equal(store.images(split), full.images(split))
    assert torch.equal(*(torch.cat(list(s.shards("train"))) for s in (store, full)))


@pytest.mark.parametrize(
    "rows", [slice(None), slice(4), [5], [22, 0, 7, 7], np.array([3, 21]), slice(20, 2, -6), []]
)
def test_some_images_of_a_split(many, rows):
    shards = [files.load_tensors(p)[0]["images"] for p in sorted(many.glob("*.safetensors"))]
    every = np.concatenate(shards)[:23].astype(np.float32) / 255
    found = Store(many).images("train", rows)
    assert found.dtype == np.float32 and found.shape[1:] == (16, 16, 3)
    assert np.array_equal(found, every[rows])


@pytest.mark.parametrize("rows", [[5], [22, 0, 7, 7], []])
def test_activations_of_some_images_of_a_split(many, rows):
    store = Store(many)
    every = torch.cat(list(store.shards("train")))
    found = store.activations("train", rows)
    assert found.dtype == torch.float32 and torch.equal(found, every[rows])


def test_only_the_shards_of_the_images_asked_for_are_read(many, tmp_path):
    folder = shutil.copytree(many, tmp_path / "t")
    for path in sorted(folder.glob("*.safetensors"))[1:]:
        path.unlink()
    assert len(Store(folder).images("train", slice(3))) == 3


def test_images_are_held_in_memory_once(many, tmp_path):
    folder = shutil.copytree(many, tmp_path / "t")
    manifest = Store(folder).manifest
    for name in manifest["shards"]:
        images = torch.zeros(3, 128, 128, 3, dtype=torch.uint8)
        files.save_tensors(folder / name, {"images": images})
        manifest["shards"][name] = files.digest(folder / name)
    files.save_json(folder / "manifest.json", manifest)
    large = Store(folder)
    tracemalloc.start()
    held = large.images("train").nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * held


def test_processes_share_out_the_shards(many):
    store = Store(many)
    whole = list(store.shards("train"))
    shares = [list(store.shards("train", (i, 3))) for i in range(3)]
    assert [len(s) for s in shares] == [3, 3, 2]
    for i, h in enumerate(whole):
        assert torch.equal(shares[i % 3][i // 3], h)


@pytest.mark.parametrize("name", ["indices", "shards", "images", "tokens", "batches"])
@pytest.mark.usefixtures("returns")
def test_an_unknown_split_is_named(finished, name):
    arguments = (2,) if name == "batches" else ()
    with pytest.raises(ValueError, match="split is 'tets'.*'train'"):
        take(1, getattr(Store(finished), name)("tets", *arguments))


@pytest.mark.usefixtures("returns")
def test_an_empty_split_is_named(pipe, tmp_path):
    collect(tiny_plan(tmp_path, splits=["train"] * 5), pipe)
    for read_from in (lambda s: next(s.batches("test", 2)), lambda s: s.images("test")):
        with pytest.raises(ValueError, match="split is 'test'"):
            read_from(Store(tmp_path))


# --- what cannot be read ------------------------------------------------------------------------

READERS = {
    "shards": lambda store: list(store.shards("train")),
    "images": lambda store: store.images("train"),
    "tokens": lambda store: store.tokens("train"),
    "batches": lambda store: take(4, store.batches("train", 4, buffer_bytes=1)),
}


def lose(path):
    path.unlink()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)


@pytest.mark.usefixtures("returns")
@pytest.mark.parametrize(
    "damage, error, named", [(flip, ValueError, "damaged"), (lose, FileNotFoundError, "missing")]
)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_shard_is_named_by_whoever_reads_it(
    some_tokens, tmp_path, reader, damage, error, named
):
    folder = shutil.copytree(some_tokens, tmp_path / "t")
    READERS[reader](Store(folder))
    damage(folder / SHARD)
    with pytest.raises(error, match=f"{SHARD} is {named}"):
        READERS[reader](Store(folder))


def test_damage_to_another_split_does_not_matter_to_a_reader(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "t")
    flip(folder / "shard-00003.safetensors")  # the test image
    store = Store(folder)
    assert len(list(store.shards("train"))) == 2 and len(store.images("validation")) == 1


def test_an_unfinished_folder_is_not_a_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="run: .*01_collect_trajectories"):
        Store(tmp_path)


@pytest.mark.parametrize("lacks", ["steps", "shards", SHARD])
def test_a_manifest_of_the_wrong_shape_is_named(finished, pipe, tmp_path, lacks):
    folder = shutil.copytree(finished, tmp_path / "t")
    manifest = json.loads((folder / "manifest.json").read_text())
    (manifest["shards"] if lacks == SHARD else manifest).pop(lacks)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for read_it in (lambda: Store(folder), lambda: repair(folder, pipe)):
        with pytest.raises(ValueError, match=f"manifest.json is damaged .it has no '{lacks}'"):
            read_it()


# --- shuffled batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_bytes", BUFFERS)
@pytest.mark.parametrize("batch_size", [7, 16, 120, 500])
def test_batches_go_through_every_trajectory_once_an_epoch(many, every, batch_size, buffer_bytes):
    epochs = 3
    batches = Store(many).batches("train", batch_size, 3, buffer_bytes=buffer_bytes)
    batches = take(-(-epochs * N // batch_size), batches)
    assert {tuple(b.shape) for b in batches} == {(batch_size, 2, 32)}
    drawn = torch.cat(batches)
    assert drawn.dtype == torch.float32
    for epoch in range(epochs):
        assert rows(drawn[N * epoch : N * (epoch + 1)]) == rows(every[0])
    assert not torch.equal(drawn[:N], drawn[N : 2 * N])


def test_batches_are_shuffled_by_their_seed(many):
    def draw(seed):
        return torch.stack(take(6, Store(many).batches("train", 16, seed)))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert not torch.equal(*draw(0).unflatten(0, (2, 3)))


@given(
    start=st.integers(0, 60),
    batch_size=st.sampled_from([5, 16, 46, 92]),
    buffer_bytes=st.sampled_from(BUFFERS),
    seed=st.integers(0, 3),
)
def test_a_later_start_leaves_batches_out(many, start, batch_size, buffer_bytes, seed):
    options = {"batch_size": batch_size, "seed": seed, "buffer_bytes": buffer_bytes}
    whole = take(start + 3, Store(many).batches("train", **options))
    late = take(3, Store(many).batches("train", start=start, **options))
    assert torch.equal(torch.stack(late), torch.stack(whole[start:]))


@given(
    n=st.sampled_from([1, 2, 3, 4]), buffer_bytes=st.sampled_from(BUFFERS), start=st.integers(0, 30)
)
def test_the_shares_of_the_processes_make_up_each_batch(many, n, buffer_bytes, start):
    options = {"batch_size": 24, "seed": 1, "buffer_bytes": buffer_bytes, "start": start}
    shares = [take(3, Store(many).batches("train", share=(i, n), **options)) for i in range(n)]
    whole = take(3, Store(many).batches("train", **options))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(p) for p in parts} == {24 // n}
        assert torch.equal(torch.cat(parts), batch)


def test_a_batch_that_processes_cannot_share_is_refused(finished):
    with pytest.raises(ValueError, match="sae_batch_size is 10.* 3"):
        next(Store(finished).batches("train", 10, share=(0, 3)))


def test_a_batch_draws_from_many_shards(many, every):
    first = next(Store(many).batches("train", 64, buffer_bytes=12 * PER_IMAGE))
    shards = [every[1][tuple(t)] for t in first.flatten(1).tolist()]
    assert len(set(shards)) >= 6
    assert sum(a == b for a, b in zip(shards, shards[1:])) < 32  # and not shard after shard


def test_each_epoch_brings_other_images_together(many):
    order = Store(many).batches("train", 64, buffer_bytes=4 * PER_IMAGE)
    drawn = torch.cat(take(2 * N // 64 + 1, order))
    first = [rows(drawn[start : start + 64]) for start in (0, N)]  # all of the first four images
    assert len({row for r in first for row in r}) > 64


@pytest.fixture
def images_read(monkeypatch):
    """The row of each image that is read from a shard, as it is read."""
    found, load_rows = [], files.load_rows

    def counted(path, name, numbers):
        found.extend(numbers)
        return load_rows(path, name, numbers)

    monkeypatch.setattr(read, "load_rows", counted)
    return found


def test_only_about_two_buffers_are_read_ahead(many, images_read):
    batches = Store(many).batches("train", 8, buffer_bytes=4 * PER_IMAGE)
    for given_out in range(8, 3 * N, 8):
        next(batches)
        assert len(images_read) * 16 <= given_out + 2 * 4 * 16
    assert len(images_read) >= 2 * 23


def test_a_small_split_is_read_once(many, images_read):
    take(5 * N // 16, Store(many).batches("train", 16))
    assert len(images_read) == 23


def test_images_are_matched_to_their_shards_in_one_go(many):
    class Counted(tuple):
        seen = 0

        def __iter__(self):
            Counted.seen += 1
            return super().__iter__()

    Store(many)._read([Counted((i % 8, 0)) for i in range(40)], 16)
    assert Counted.seen <= 2 * 40


def test_no_reader_is_left_behind(many):
    before = threading.active_count()
    batches = Store(many).batches("train", 16, buffer_bytes=1)
    next(batches)
    batches.close()
    assert threading.active_count() == before
