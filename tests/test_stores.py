import copy
import json
import os
import random
import shutil
import signal
import threading
import time
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
import torch
import tqdm.auto
from conftest import GRID, SAMPLING, TOKENS, TUPLE, take
from diffusers import HeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from helpers import files, trajectories
from helpers.store import collect as stores

SPLIT = ["train", "validation", "train", "train", "test"]
SEEDS = [10, 11, 12, 13, 14]
SHARD = "shard-00001.safetensors"  # the third training image, number 3


@pytest.fixture(scope="module")
def collect(pipe, prompts):
    def run(folder, **changes):
        values = {
            "pipe": pipe,
            "prompts": prompts,
            "seeds": SEEDS,
            "split_of": SPLIT,
            "hookpoint": TOKENS,
            "steps": [0, 2],
            "batch_size": 2,
            "store_dtype": torch.float32,
            "record_of": {"model": "tiny"},
        }
        return stores.collect(folder, **values | SAMPLING | changes)

    return run


@pytest.fixture(scope="module")
def finished(collect, tmp_path_factory):
    """A whole collection, only to be read."""
    collect(tmp_path_factory.mktemp("finished") / "t")
    return tmp_path_factory.getbasetemp() / "finished0" / "t"


@pytest.fixture
def collected(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "t")


@pytest.fixture
def returns():
    """A limit for code that might never return: five seconds of this process, however busy the machine."""

    def late(*_):
        raise TimeoutError("still running")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, 5)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def contents(folder):
    """Every file in a folder, hidden ones too, and its bytes."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def shards_in(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


# --- collecting ---------------------------------------------------------------------------------


@given(split=st.lists(st.sampled_from(stores.SPLITS)), batch_size=st.integers(1, 5))
def test_shards_are_neighbours_of_one_split_and_hold_every_image_once(split, batch_size):
    shards = stores.shards_of(split, batch_size)
    assert sorted(i for images in shards for i in images) == list(range(len(split)))
    for images in shards:
        assert (
            1 <= len(images) <= batch_size
            and images == sorted(images)
            and len({split[i] for i in images}) == 1
        )
    full = [len(images) for images in shards]
    assert sum(n < batch_size for n in full) <= len(set(split))


@pytest.mark.parametrize("store_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_collection_holds_what_record_gives(collect, pipe, prompts, tmp_path, store_dtype):
    manifest = collect(tmp_path, store_dtype=store_dtype)
    assert manifest["new_images"] == 5 and manifest["missing"] == 0
    store = stores.Store(tmp_path)
    store.verify()
    for shard, numbers in zip(
        sorted(tmp_path.glob("*.safetensors")), [[0, 2], [3], [1], [4]], strict=True
    ):
        images, h, _ = trajectories.record(
            pipe,
            [prompts[i] for i in numbers],
            [SEEDS[i] for i in numbers],
            hookpoint=TOKENS,
            steps=[0, 2],
            **SAMPLING,
        )
        tensors, _ = files.load_tensors(shard)
        assert tensors.keys() == {"h", "images"}
        assert tensors["h"].dtype == store_dtype and torch.equal(tensors["h"], h.to(store_dtype))
        assert np.abs(tensors["images"].numpy() / 255 - images).max() <= 0.5 / 255 + 1e-6
    assert (store.n_steps, store.n_tokens, store.channels, store.grid) == (2, 16, 32, (4, 4))
    assert (store.prompts, store.seeds, store.steps) == (prompts, SEEDS, [0, 2])
    assert store.timesteps == pipe.scheduler.timesteps[[0, 2]].tolist()


def test_the_manifest_tells_what_was_asked_the_versions_and_each_shards_images_and_digest(
    finished, prompts, pipe
):
    manifest = json.loads((finished / "manifest.json").read_text())
    alphas, timesteps = pipe.scheduler.alphas_cumprod.double(), manifest["timesteps"]
    expected = {
        "hookpoint": TOKENS,
        "signal": "output",
        "branch": "conditional",
        "steps": [0, 2],
        "prompts": prompts,
        "seeds": SEEDS,
        "split": SPLIT,
        "batch_size": 2,
        "dtype": "float32",
        "tokens_per_image": 0,
        "train_images": True,
        "model": "tiny",
        "scheduler": "DDIMScheduler",
        "sampling": SAMPLING | {"height": 0, "width": 0},
        "grid": [4, 4],
        "channels": 32,
        "timesteps": timesteps,
        "sigmas": pytest.approx(
            [((1 - alphas[int(t)]) / alphas[int(t)]).sqrt().item() for t in timesteps]
        ),
        "images_of_shard": [[0, 2], [3], [1], [4]],
        "versions": manifest["versions"],
        "shards": manifest["shards"],
        "weights": stores.weights_of(pipe),
    }
    assert manifest == expected
    assert manifest["versions"].keys() == {"python", "torch", "diffusers", "transformers"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["shards"] == {p.name: files.digest(p) for p in finished.glob("*.safetensors")}
    assert sorted(contents(finished)) == [
        "begun.json",
        "manifest.json",
        *(f"shard-0000{i}.safetensors" for i in range(4)),
    ]


def test_collecting_again_makes_nothing_new(collect, collected):
    before = {p: p.stat().st_mtime_ns for p in collected.glob("*.safetensors")}
    assert collect(collected)["new_images"] == 0
    assert {p: p.stat().st_mtime_ns for p in collected.glob("*.safetensors")} == before


def test_a_finished_manifest_keeps_the_versions_that_made_it(collect, collected):
    manifest = json.loads((collected / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    files.save_json(collected / "manifest.json", manifest)
    assert collect(collected)["versions"]["torch"] == "1.0"
    assert json.loads((collected / "manifest.json").read_text()) == manifest


KINDS = [(torch.float16, 0), (torch.bfloat16, 5), (torch.float32, 5)]
ALSO = {
    "grid": trajectories.Tap("down_blocks.0.resnets.0"),
    "input": trajectories.Tap(TOKENS, "input"),
    "update": trajectories.Tap(TUPLE, "update", "unconditional"),
}


@pytest.mark.parametrize("store_dtype, tokens_per_image", KINDS)
def test_taps_recorded_together_equal_each_recorded_alone(
    collect, tmp_path, store_dtype, tokens_per_image
):
    options = {"store_dtype": store_dtype, "tokens_per_image": tokens_per_image}
    collect(
        tmp_path / "first", also={tmp_path / name: tap for name, tap in ALSO.items()}, **options
    )
    for name, tap in {"first": trajectories.Tap(TOKENS), **ALSO}.items():
        collect(tmp_path / "alone" / name, **tap._asdict(), **options)
        assert contents(tmp_path / name) == contents(tmp_path / "alone" / name)
    assert stores.Store(tmp_path / "grid").grid == (8, 8)


def test_a_further_tap_is_collected_where_the_first_is_whole(collect, collected, tmp_path):
    before = contents(collected)
    assert collect(collected, also={tmp_path / "grid": ALSO["grid"]})["new_images"] == 5
    assert contents(collected) == before
    assert collect(collected, also={tmp_path / "grid": ALSO["grid"]})["new_images"] == 0
    collect(tmp_path / "alone", **ALSO["grid"]._asdict())
    assert contents(tmp_path / "grid") == contents(tmp_path / "alone")


def test_some_tokens_of_training_images_and_all_of_the_others(collect, finished, tmp_path):
    collect(tmp_path / "some", tokens_per_image=5)
    some, full = stores.Store(tmp_path / "some"), stores.Store(finished)
    tokens = some.tokens("train")
    assert tokens.shape == (3, 5) and some.tokens_kept("train") == 5
    assert (np.diff(tokens) > 0).all() and tokens.min() >= 0 and tokens.max() < 16
    assert len({tuple(t) for t in tokens.tolist()}) == 3  # each image's own
    kept, every = (torch.cat(list(s.shards("train"))) for s in (some, full))
    assert torch.equal(kept, torch.stack([every[i][:, tokens[i]] for i in range(3)]))
    for split in ("validation", "test"):
        assert some.tokens(split).tolist() == full.tokens(split).tolist() == [[*range(16)]]
        assert some.tokens_kept(split) == 16
        assert torch.equal(*(next(s.shards(split)) for s in (some, full)))
    batch = next(some.batches("train", 15))
    assert rows(batch) == rows(kept.transpose(1, 2).flatten(0, 1))
    assert "tokens" not in files.load_tensors(tmp_path / "some" / "shard-00002.safetensors")[0]


def test_which_tokens_are_kept_is_told_by_the_seed_alone(collect, tmp_path):
    for name, changes in {
        "a": {"batch_size": 1},
        "b": {"prompts": ["a dog"] * 5, "hookpoint": GRID},
    }.items():
        collect(tmp_path / name, tokens_per_image=5, **changes)
    collect(tmp_path / "c", tokens_per_image=5, seeds=[99, 98, *SEEDS[2:]])
    a, b, c = (stores.Store(tmp_path / name).tokens("train") for name in "abc")
    assert np.array_equal(a, b) and np.array_equal(a[1:], c[1:]) and not np.array_equal(a[0], c[0])


@pytest.mark.parametrize("n", [1, 16])
def test_one_token_or_all_of_them_can_be_kept(collect, tmp_path, n):
    collect(tmp_path, tokens_per_image=n)
    store = stores.Store(tmp_path)
    assert store.tokens("train").shape == (3, n) and next(store.batches("train", 2)).shape == (
        2,
        2,
        32,
    )


def test_training_images_can_be_left_out(collect, finished, tmp_path):
    collect(tmp_path, train_images=False)
    store, full = stores.Store(tmp_path), stores.Store(finished)
    with pytest.raises(
        ValueError, match="train_images was false.*valid splits are validation, test"
    ):
        store.images("train")
    for split in ("validation", "test"):
        assert np.array_equal(store.images(split), full.images(split))
    assert torch.equal(*(torch.cat(list(s.shards("train"))) for s in (store, full)))
    assert "images" not in files.load_tensors(tmp_path / SHARD)[0]


# --- damage -------------------------------------------------------------------------------------


def lose(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)


DAMAGES = pytest.mark.parametrize("damage", [lose, cut, empty, flip])


@DAMAGES
@pytest.mark.parametrize("again", ["collect", "repair"])
def test_a_damaged_shard_is_collected_again_with_the_same_bytes(
    collect, pipe, collected, damage, again
):
    before = contents(collected)
    damage(collected / SHARD)
    done = collect(collected) if again == "collect" else stores.repair(collected, pipe)
    assert done["new_images"] == 1 and done["missing"] == 0
    assert contents(collected) == before
    stores.Store(collected).verify()


@pytest.mark.parametrize("damage", [lose, cut, empty])
@pytest.mark.parametrize("again", ["collect", "repair"])
def test_an_unfinished_folder_with_a_damaged_shard_is_finished(
    collect, pipe, collected, damage, again
):
    before = contents(collected)
    damage(collected / SHARD)
    (collected / "manifest.json").unlink()
    assert (collect(collected) if again == "collect" else stores.repair(collected, pipe))[
        "new_images"
    ] == 1
    assert contents(collected) == before


def test_a_flipped_byte_is_not_certified_when_the_manifest_is_lost(collect, collected):
    before = contents(collected)
    flip(collected / SHARD)
    (collected / "manifest.json").unlink()
    assert collect(collected)["new_images"] == 1
    assert contents(collected) == before


def test_repair_restores_each_tap_with_its_own_settings(collect, pipe, tmp_path):
    options = {
        "tokens_per_image": 5,
        "train_images": False,
        "store_dtype": torch.bfloat16,
        "negative_prompt": "gray",
    }
    collect(
        tmp_path / "first", also={tmp_path / name: tap for name, tap in ALSO.items()}, **options
    )
    for name in ("first", *ALSO):
        before = contents(tmp_path / name)
        flip(tmp_path / name / SHARD)
        lose(tmp_path / name / "shard-00002.safetensors")
        assert stores.repair(tmp_path / name, pipe)["new_images"] == 2
        assert contents(tmp_path / name) == before


READERS = {
    "verify": lambda store: store.verify(),
    "shards": lambda store: list(store.shards("train")),
    "images": lambda store: store.images("train"),
    "tokens": lambda store: store.tokens("train"),
    "batches": lambda store: take(4, store.batches("train", 4, buffer_bytes=1)),
}


@pytest.fixture(scope="module")
def some_tokens(collect, tmp_path_factory):
    collect(tmp_path_factory.mktemp("some") / "t", tokens_per_image=5)
    return tmp_path_factory.getbasetemp() / "some0" / "t"


@pytest.mark.usefixtures("returns")
@pytest.mark.parametrize(
    "damage, error, named",
    [
        (flip, ValueError, "damaged"),
        (cut, ValueError, "damaged"),
        (lose, FileNotFoundError, "missing"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_shard_is_named_by_whoever_reads_it(
    some_tokens, tmp_path, reader, damage, error, named
):
    folder = shutil.copytree(some_tokens, tmp_path / "t")
    READERS[reader](stores.Store(folder))
    damage(folder / SHARD)
    with pytest.raises(error, match=f"{SHARD} is {named}"):
        READERS[reader](stores.Store(folder))


def lose_shard(manifest):
    manifest["shards"].pop(SHARD)


@pytest.mark.parametrize("name", ["manifest.json", "begun.json"])
@pytest.mark.parametrize(
    "content, lacks",
    [
        ("[]", "prompts"),
        ("{}", "prompts"),
        ("3", "prompts"),
        (lambda m: m.pop("steps"), "steps"),
        (lambda m: m.pop("shards", None), "shards"),
        (lose_shard, SHARD),
    ],
)
def test_a_manifest_of_the_wrong_shape_is_named(collect, pipe, collected, name, content, lacks):
    path = collected / name
    if callable(content):
        if name == "begun.json" and lacks != "steps":
            return
        told = json.loads(path.read_text())
        content(told)
        content = json.dumps(told)
    if name == "begun.json":
        (collected / "manifest.json").unlink()
    path.write_text(content)
    readers = [lambda: stores.repair(collected, pipe), lambda: collect(collected)] + (
        [lambda: stores.Store(collected)] if name == "manifest.json" else []
    )
    for read in readers:
        with pytest.raises(ValueError, match=f"{name} is damaged .it has no '{lacks}'.; delete it"):
            read()


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_no_collection_is_not_repaired(pipe, tmp_path, there):
    with pytest.raises(FileNotFoundError, match="^/.* is no collection; valid is a folder"):
        stores.repair(tmp_path if there else tmp_path / "absent", pipe)


# --- the same weights ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(pipe):
    """The same pipeline but for one bias."""
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        next(p for p in other.unet.mid_block.parameters() if p.ndim == 1)[3] += 0.1
    other.set_progress_bar_config(disable=True)
    return other


def test_weights_are_told_apart_and_not_by_layout_or_name(pipe, other):
    same = copy.deepcopy(pipe)
    same.unet.to(memory_format=torch.channels_last)
    assert stores.weights_of(same) == stores.weights_of(pipe) != stores.weights_of(other)
    with torch.no_grad():
        next(same.text_encoder.parameters()).mul_(2)
    assert stores.weights_of(same) != stores.weights_of(pipe)
    assert stores.weights_of(same.to("meta")) == ""


@pytest.mark.parametrize("unfinished", [True, False])
def test_shards_of_other_weights_are_not_mixed_in(collect, other, collected, unfinished):
    flip(collected / SHARD)
    if unfinished:
        (collected / "manifest.json").unlink()
    before = contents(collected)
    for again in (lambda: collect(collected, pipe=other), lambda: stores.repair(collected, other)):
        with pytest.raises(
            ValueError, match="^model: its weights are not those that .* was made with; give"
        ):
            again()
    assert contents(collected) == before


def test_a_folder_that_does_not_tell_its_weights_goes_on(collect, pipe, other, collected):
    for name in ("manifest.json", "begun.json"):
        told = json.loads((collected / name).read_text())
        files.save_json(collected / name, {k: v for k, v in told.items() if k != "weights"})
    before = contents(collected)
    assert (
        collect(collected, pipe=other)["new_images"]
        == 0
        == stores.repair(collected, other)["new_images"]
    )
    flip(collected / SHARD)
    assert stores.repair(collected, pipe)["new_images"] == 1
    assert contents(collected) == before


def test_damage_to_another_split_does_not_matter_to_a_reader(collected):
    flip(collected / "shard-00003.safetensors")  # the test image
    store = stores.Store(collected)
    assert len(list(store.shards("train"))) == 2 and len(store.images("validation")) == 1


def test_an_unfinished_folder_is_not_a_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="run: .*01_collect_trajectories"):
        stores.Store(tmp_path)


# --- other settings, other machines, no room ----------------------------------------------------

CHANGES = {
    "prompts": ["a dog"] * 5,
    "seeds": [1, 2, 3, 4, 5],
    "split_of": ["train"] * 5,
    "hookpoint": GRID,
    "steps": [0, 1],
    "batch_size": 3,
    "store_dtype": torch.float16,
    "record_of": {"model": "other"},
    "num_inference_steps": 4,
    "guidance_scale": 2.0,
    "height": 32,
    "signal": "input",
    "branch": "unconditional",
    "tokens_per_image": 5,
    "train_images": False,
    "negative_prompt": "gray",
}
NAMED = {"split_of": "split", "store_dtype": "dtype", "record_of": "model"}


@pytest.mark.parametrize("unfinished", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_made_otherwise_is_refused_by_name_and_left_alone(
    collect, collected, name, unfinished
):
    if unfinished:
        (collected / "manifest.json").unlink()
    before = contents(collected)
    with pytest.raises(ValueError, match=f"^{NAMED.get(name, name)} is .*another run name"):
        collect(collected, **{name: CHANGES[name]})
    assert contents(collected) == before


def test_an_argument_that_was_given_before_and_now_is_not_is_named(collect, tmp_path):
    collect(tmp_path, negative_prompt="gray")
    with pytest.raises(ValueError, match="^negative_prompt is None, but .* was made with 'gray'"):
        collect(tmp_path)


LONG = "a lighthouse at the end of a long pier in a storm, by night, "
DIFFERENCES = {
    "more": (
        "prompts",
        [LONG] * 5,
        [LONG] * 6,
        "prompts has 6 entries, but .* was made with 5; give",
    ),
    "one": (
        "prompts",
        [LONG] * 5,
        [LONG] * 3 + ["a dog", LONG],
        "prompts is 'a dog' at entry 3, but .* was made with 'a lighthouse at the end of .*… there; give",
    ),
    "ends": (
        "negative_prompt",
        LONG + "in oil",
        LONG + "in ink",
        "negative_prompt is …storm, by night, in ink', but .* was made with …storm, by night, in oil'; give",
    ),
    "within": (
        "prompts",
        [LONG] * 5,
        [LONG] * 4 + [LONG + "x"],
        "prompts is … a storm, by night, x' at entry 4, but .* was made with … a storm, by night, ' there; give",
    ),
    "nothing": (
        "negative_prompt",
        LONG,
        None,
        "negative_prompt is None, but .* was made with 'a light",
    ),
    "long numbers": (
        "seeds",
        [*range(100)],
        [*range(99), 7],
        "seeds is 7 at entry 99, but .* was made with 99 there; give",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_it_is_said_where_long_values_differ(collected, case):
    name, before, now, said = DIFFERENCES[case]
    told = json.loads((collected / "manifest.json").read_text())
    (told if name in told else told["sampling"])[name] = before
    for file in ("manifest.json", "begun.json"):
        files.save_json(collected / file, told)
    with pytest.raises(ValueError, match=said) as refused:
        stores.refuse_others(
            collected,
            {
                name: now,
                "sampling": told["sampling"] | ({name: now} if name == "negative_prompt" else {}),
            },
        )
    assert len(str(refused.value)) < 300 + len(str(collected))


def test_two_taps_cannot_share_a_folder(collect, tmp_path):
    with pytest.raises(ValueError, match="^also: .*t is the folder of the first tap"):
        collect(tmp_path / "t", also={str(tmp_path / "t"): ALSO["grid"]})


def test_a_run_that_cannot_be_a_folder_is_named(collect, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder, why in (
        (tmp_path / "file" / "t", "file is no folder"),
        (tmp_path / "file", "file is no folder"),
        ("/dev/null/x/t", "/dev/null is no folder"),
    ):
        with pytest.raises(OSError, match=f"^run: {folder} cannot be written, since .*{why}"):
            collect(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        OSError, match=f"^run: {tmp_path}/t cannot be written, since {tmp_path} is read-only"
    ):
        collect(tmp_path / "t")


def test_a_finished_folder_need_not_be_written(collect, collected, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert collect(collected)["new_images"] == 0


def test_a_further_taps_folder_made_otherwise_is_refused_before_anything_is_written(
    collect, finished, tmp_path
):
    with pytest.raises(ValueError, match="^hookpoint is "):
        collect(tmp_path / "t", also={finished: ALSO["grid"]})
    assert not (tmp_path / "t").exists()


def test_settings_that_json_turns_into_others_are_still_the_same(collect, tmp_path):
    values = {
        "record_of": {"sizes": (1, 2), "of": {3: "three"}},
        "steps": np.array([0, 2]),
        "seeds": np.array(SEEDS),
        "guidance_rescale": np.float64(0.5),
    }
    assert collect(tmp_path, **values)["new_images"] == 5
    assert collect(tmp_path, **values)["new_images"] == 0


def test_a_folder_made_with_another_scheduler_is_refused(collect, collected, pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    with pytest.raises(ValueError, match="^scheduler is 'HeunDiscreteScheduler'"):
        collect(collected)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"prompts": []}, "prompts"),
        ({"seeds": [1]}, "prompts, seeds and split_of have 5, 1 and 5"),
        ({"split_of": ["train"] * 4 + ["tset"]}, "splits are train, validation, test"),
        ({"hookpoint": "mid_block.atentions.0"}, "'mid_block.atentions.0'.*mid_block.attentions.0"),
        ({"hookpoint": "down_blocks"}, "'down_blocks' is never called.*down_blocks.0.resnets.0"),
        ({"hookpoint": "conv_in", "signal": "update"}, "'conv_in'.*its update is no grid"),
        ({"also": {"elsewhere": ("conv_inn",)}}, "'conv_inn'.*conv_in"),
        ({"steps": [0, 9]}, r"\[9\].*0 to 2"),
        ({"signal": "outputs"}, "signal 'outputs' is not one of output, input, update"),
        ({"branch": "both"}, "branch 'both' is not one of conditional, unconditional"),
        ({"branch": "unconditional", "guidance_scale": 1.0}, "branch 'unconditional' is not run"),
        ({"tokens_per_image": 17}, "tokens_per_image is 17;.*has 16 tokens"),
        ({"tokens_per_image": -1}, "tokens_per_image is -1"),
        ({"num_shards": 0}, "^num_shards is 0; it must be at least 1$"),
        ({"shard_index": 2, "num_shards": 2}, "shard_index is 2; with num_shards=2.*0 to 1"),
        ({"clip_skp": 1}, "StableDiffusionPipeline does not take clip_skp; valid are .*clip_skip"),
    ],
)
def test_what_cannot_be_collected_is_named_and_does_not_spoil_the_folder(
    collect, tmp_path, changes, named
):
    if (
        changes.get("branch") != "unconditional"
    ):  # which is found out only where guidance should have run it
        with pytest.raises(ValueError, match=named):
            collect(tmp_path / "t", only_check=True, **changes)
    with pytest.raises(ValueError, match=named):
        collect(tmp_path / "t", **changes)
    assert "new_images" not in collect(tmp_path / "t", only_check=True)
    assert not list((tmp_path / "t").glob("*.safetensors"))
    assert collect(tmp_path / "t")["new_images"] == 5


def test_activations_too_large_for_float16_are_refused_and_the_advice_works(
    collect, pipe, tmp_path
):
    loud = copy.deepcopy(pipe)
    with torch.no_grad():
        loud.unet.get_submodule(TUPLE).proj_out.weight *= 1e7
    loud.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="store_dtype.*float16.*float32"):
        collect(tmp_path / "t", pipe=loud, hookpoint=TUPLE, store_dtype=torch.float16)
    assert (
        collect(tmp_path / "t", pipe=loud, hookpoint=TUPLE, store_dtype=torch.float32)["new_images"]
        == 5
    )


def test_activations_that_overflow_in_the_model_are_refused(collect, pipe, tmp_path):
    broken = copy.deepcopy(pipe)
    with torch.no_grad():
        broken.unet.get_submodule(TUPLE).proj_out.bias[3] = torch.nan
    broken.set_progress_bar_config(disable=True)
    with pytest.raises(
        ValueError, match="dtype: the activations of .* hold NaN or infinity in float32"
    ):
        collect(tmp_path / "t", pipe=broken, hookpoint=TUPLE)


IMAGE = 16 * 16 * 3
ROOMS = {  # tokens of each of the five images, and how many of them are stored as pictures
    "all": ({}, [16] * 5, 5),
    "some tokens": ({"tokens_per_image": 5}, [5, 16, 5, 5, 16], 5),
    "no training images": ({"train_images": False}, [16] * 5, 2),
}


@pytest.mark.parametrize("case", ROOMS)
def test_too_little_disk_is_refused_before_anything_is_written(
    collect, tmp_path, monkeypatch, case
):
    options, tokens, pictures = ROOMS[case]
    need = (
        sum(trajectories.bytes_per_image(2, n, 32, torch.float32) for n in tokens)
        + pictures * IMAGE
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(OSError, match="n_train: 5 images need .*tokens_per_image"):
        collect(tmp_path / "t", **options)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda _: usage._replace(free=need))
    collect(tmp_path / "t", **options)
    written = sum(
        t.nbytes
        for p in tmp_path.rglob("*.safetensors")
        for name, t in files.load_tensors(p)[0].items()
        if name != "tokens"
    )
    assert written == need


@pytest.mark.parametrize("share", [{"accelerator": True}, {"shard_index": 1, "num_shards": 2}])
def test_each_process_counts_the_room_that_all_of_them_need(collect, tmp_path, monkeypatch, share):
    need = 5 * (trajectories.bytes_per_image(2, 16, 32, torch.float32) + IMAGE)
    usage = shutil.disk_usage(tmp_path)
    share = {"accelerator": Process(1)} if "accelerator" in share else share
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(
        OSError, match=r"n_train: 5 images need 24.32 kB in .*, which has 24.32 kB free; choose"
    ):
        collect(tmp_path / "t", **share)
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda _: usage._replace(free=need))
    assert collect(tmp_path / "t", **share)["missing"] == 2


@DAMAGES
def test_a_shard_damaged_before_the_folder_is_finished_is_collected_again(
    collect, finished, tmp_path, damage
):
    collect(tmp_path, shard_index=1, num_shards=2)
    damage(tmp_path / SHARD)
    assert collect(tmp_path)["new_images"] == 4
    assert contents(tmp_path) == contents(finished)


def test_what_another_machine_is_writing_is_let_be(collect, tmp_path):
    theirs, ours, other = (
        tmp_path / f".{name}.1.part" for name in (SHARD, "shard-00000.safetensors", "begun.json")
    )
    for path in (theirs, ours, other):
        path.write_bytes(b"half")
    collect(tmp_path, shard_index=0, num_shards=2)
    assert theirs.exists() and other.exists() and not ours.exists()
    collect(tmp_path)
    assert not theirs.exists() and not other.exists()


def test_a_folder_is_looked_through_once_however_many_shards_it_lacks(
    collect, tmp_path, monkeypatch
):
    looked, glob = [], files.Path.glob
    monkeypatch.setattr(
        files.Path, "glob", lambda folder, pattern: looked.append(folder) or glob(folder, pattern)
    )
    collect(tmp_path, batch_size=1)
    assert looked == [tmp_path]


def test_images_are_matched_to_their_shards_in_one_go(many, monkeypatch):
    class Counted(tuple):
        seen = 0

        def __iter__(self):
            Counted.seen += 1
            return super().__iter__()

    store = stores.Store(many)
    store._read([Counted((i % 8, 0)) for i in range(40)], 16)
    assert Counted.seen <= 2 * 40


class Process(NamedTuple):
    """As much of an accelerate.Accelerator as collecting uses."""

    process_index: int
    num_processes: int = 2

    @property
    def is_main_process(self):
        return self.process_index == 0

    def wait_for_everyone(self):
        pass


def test_processes_and_machines_share_out_the_batches(collect, finished, tmp_path):
    new = [
        collect(tmp_path, accelerator=Process(p), shard_index=m, num_shards=2)["new_images"]
        for m, p in ((1, 1), (1, 0), (0, 1), (0, 0))
    ]
    assert new == [1, 1, 1, 2]
    assert contents(tmp_path) == contents(finished)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_machines_that_share_a_folder_make_what_one_makes(collect, finished, tmp_path, order):
    first = collect(tmp_path, shard_index=order[0], num_shards=2)
    assert (first["new_images"], first["missing"]) == ((3, 2) if order[0] == 0 else (2, 2))
    assert not (tmp_path / "manifest.json").exists()
    for path in tmp_path.glob("*.safetensors"):
        assert path.with_suffix(".sha256").read_text() == f"{files.digest(path)}  {path.name}\n"
    assert collect(tmp_path, shard_index=order[0], num_shards=2)["new_images"] == 0
    assert collect(tmp_path, shard_index=order[1], num_shards=2)["missing"] == 0
    assert contents(tmp_path) == contents(finished)


# --- killed at any moment -----------------------------------------------------------------------


def test_a_collection_killed_at_any_moment_goes_on_to_the_same_bytes(
    collect, prompts, tmp_path, monkeypatch
):
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda f: (time.sleep(0.004), fsync(f))
    )  # so that a kill may fall between two files

    def run(name):
        collect(
            tmp_path / name,
            prompts=prompts * 2,
            seeds=range(10),
            split_of=SPLIT * 2,
            steps=[0, 1],
            also={tmp_path / f"{name}-also": ALSO["grid"]},
            num_inference_steps=2,
            guidance_scale=1.0,
        )

    begin = time.perf_counter()
    run("whole")
    duration = time.perf_counter() - begin
    chance, killed, n = random.Random(0), 0, 0
    expected = contents(tmp_path / "whole"), contents(tmp_path / "whole-also")
    deadline = begin + 120
    while killed < 20 and time.perf_counter() < deadline:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                # the bars' own lock is the parent's, too: a kill would leave it locked
                for bars in (tqdm.std.tqdm, tqdm.auto.tqdm):
                    bars.set_lock(threading.RLock())
                run(f"killed-{n}")
                status = 0
            finally:
                os._exit(status)
        time.sleep(chance.uniform(0, 1.2 * duration))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)  # it never fails by itself
        killed += status == signal.SIGKILL
        if (tmp_path / f"killed-{n}" / "manifest.json").exists():  # begin anew with the next kill
            n += 1
    for i in range(n + 1):
        run(f"killed-{i}")
        assert (
            contents(tmp_path / f"killed-{i}"),
            contents(tmp_path / f"killed-{i}-also"),
        ) == expected
    assert killed == 20


# --- reading ------------------------------------------------------------------------------------


def test_the_splits_share_out_every_image_once(finished):
    store = stores.Store(finished)
    assert {s: store.indices(s).tolist() for s in stores.SPLITS} == {
        "train": [0, 2, 3],
        "validation": [1],
        "test": [4],
    }
    for split in stores.SPLITS:
        assert (
            sum(len(h) for h in store.shards(split))
            == len(store.images(split))
            == len(store.indices(split))
        )


@pytest.mark.parametrize(
    "rows", [slice(None), slice(4), [5], [22, 0, 7, 7], np.array([3, 21]), slice(20, 2, -6), []]
)
def test_some_images_of_a_split(many, rows):
    every = (
        np.concatenate(
            [files.load_tensors(p)[0]["images"].numpy() for p in sorted(many.glob("*.safetensors"))]
        )[:23].astype(np.float32)
        / 255
    )
    found = stores.Store(many).images("train", rows)
    assert (
        found.dtype == np.float32
        and np.array_equal(found, every[rows])
        and found.shape[1:] == (16, 16, 3)
    )


def test_only_the_shards_of_the_images_asked_for_are_read(many, tmp_path):
    folder = shutil.copytree(many, tmp_path / "t")
    for path in sorted(folder.glob("*.safetensors"))[1:]:
        path.unlink()
    assert len(stores.Store(folder).images("train", slice(3))) == 3


def test_images_are_held_in_memory_once(many, tmp_path):
    large = stores.Store(shutil.copytree(many, tmp_path / "t"))
    for name in large.manifest["shards"]:
        files.save_tensors(
            tmp_path / "t" / name, {"images": torch.zeros(3, 128, 128, 3, dtype=torch.uint8)}
        )
    files.save_json(
        tmp_path / "t" / "manifest.json",
        large.manifest
        | {
            "shards": {
                name: files.digest(tmp_path / "t" / name) for name in large.manifest["shards"]
            }
        },
    )
    large = stores.Store(tmp_path / "t")
    tracemalloc.start()
    held = large.images("train").nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * held


def test_processes_share_out_the_shards(many):
    store = stores.Store(many)
    whole = list(store.shards("train"))
    shares = [list(store.shards("train", (i, 3))) for i in range(3)]
    assert [len(s) for s in shares] == [3, 3, 2]
    for i, h in enumerate(whole):
        assert torch.equal(shares[i % 3][i // 3], h)


@pytest.mark.parametrize("read", ["indices", "shards", "images", "tokens", "batches"])
@pytest.mark.usefixtures("returns")
def test_an_unknown_split_is_named(finished, read):
    store = stores.Store(finished)
    arguments = (2,) if read == "batches" else ()
    with pytest.raises(ValueError, match="split 'tets' is not one of train"):
        result = getattr(store, read)("tets", *arguments)
        take(1, result)


@pytest.mark.usefixtures("returns")
def test_batches_of_an_empty_split_are_refused_by_name(collect, tmp_path):
    collect(tmp_path / "t", split_of=["train"] * 5)
    with pytest.raises(ValueError, match="test"):
        next(stores.Store(tmp_path / "t").batches("test", 2))


def rows(x):
    return sorted(map(tuple, x.flatten(1).tolist()))


PER_IMAGE = 2 * 16 * 32 * 4  # bytes
N = 23 * 16  # trajectories in `many`
BUFFERS = [1, 4 * PER_IMAGE, 7 * PER_IMAGE + 5, 2**30]


@pytest.fixture(scope="module")
def many(pipe, tmp_path_factory):
    """23 training images in 8 shards."""
    folder, n = tmp_path_factory.mktemp("many"), 26
    split = ["train"] * 20 + ["validation"] * 2 + ["train"] * 3 + ["test"]
    stores.collect(
        folder,
        pipe,
        ["a dog"] * n,
        range(n),
        split,
        hookpoint=TOKENS,
        steps=[0, 1],
        batch_size=3,
        store_dtype=torch.float32,
        num_inference_steps=2,
        guidance_scale=1.0,
    )
    return folder


@pytest.fixture(scope="module")
def every(many):
    """All training trajectories, and the number of each one's shard."""
    shards = [h.transpose(1, 2).flatten(0, 1) for h in stores.Store(many).shards("train")]
    of_shard = {tuple(t): i for i, h in enumerate(shards) for t in h.flatten(1).tolist()}
    assert len(of_shard) == N and len(shards) == 8
    return torch.cat(shards), of_shard


@pytest.mark.parametrize("buffer_bytes", BUFFERS)
@pytest.mark.parametrize("batch_size", [7, 16, 120, 500])
def test_batches_go_through_every_trajectory_once_an_epoch(many, every, batch_size, buffer_bytes):
    epochs = 3
    batches = take(
        -(-epochs * N // batch_size),
        stores.Store(many).batches("train", batch_size, 3, buffer_bytes=buffer_bytes),
    )
    assert {tuple(b.shape) for b in batches} == {(batch_size, 2, 32)} and batches[
        0
    ].dtype == torch.float32
    drawn = torch.cat(batches)
    for epoch in range(epochs):
        assert rows(drawn[N * epoch : N * (epoch + 1)]) == rows(every[0])
    assert not torch.equal(drawn[:N], drawn[N : 2 * N])


def test_batches_are_shuffled_by_their_seed(many):
    def draw(seed):
        return torch.stack(take(6, stores.Store(many).batches("train", 16, seed)))

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
    whole = take(start + 3, stores.Store(many).batches("train", **options))
    late = take(3, stores.Store(many).batches("train", start=start, **options))
    assert torch.equal(torch.stack(late), torch.stack(whole[start:]))


@given(
    n=st.sampled_from([1, 2, 3, 4]), buffer_bytes=st.sampled_from(BUFFERS), start=st.integers(0, 30)
)
def test_the_shares_of_the_processes_make_up_each_batch(many, n, buffer_bytes, start):
    options = {"batch_size": 24, "seed": 1, "buffer_bytes": buffer_bytes, "start": start}
    shares = [
        take(3, stores.Store(many).batches("train", share=(i, n), **options)) for i in range(n)
    ]
    for whole, *parts in zip(
        take(3, stores.Store(many).batches("train", **options)), *shares, strict=True
    ):
        assert {len(p) for p in parts} == {24 // n}
        assert torch.equal(torch.cat(parts), whole)


def test_a_batch_that_processes_cannot_share_is_refused(finished):
    with pytest.raises(ValueError, match="sae_batch_size is 10.*number of processes, 3"):
        next(stores.Store(finished).batches("train", 10, share=(0, 3)))


def test_a_batch_draws_from_many_shards(many, every):
    first = next(stores.Store(many).batches("train", 64, buffer_bytes=12 * PER_IMAGE))
    shards = {every[1][tuple(t)] for t in first.flatten(1).tolist()}
    assert len(shards) >= 6
    mixed = [every[1][tuple(t)] for t in first.flatten(1).tolist()]
    assert sum(a == b for a, b in zip(mixed, mixed[1:])) < 32  # and not shard after shard


def test_each_epoch_brings_other_images_together(many, every):
    order = stores.Store(many).batches("train", 64, buffer_bytes=4 * PER_IMAGE)
    drawn = torch.cat(take(2 * N // 64 + 1, order))
    first = [rows(drawn[start : start + 64]) for start in (0, N)]  # all of the first four images
    assert len({row for r in first for row in r}) > 64


def test_only_about_two_buffers_are_read_ahead(many, monkeypatch):
    read, load_rows = [], stores.load_rows

    def counted(path, name, numbers):
        read.extend(numbers)
        return load_rows(path, name, numbers)

    monkeypatch.setattr(stores, "load_rows", counted)
    batches = stores.Store(many).batches("train", 8, buffer_bytes=4 * PER_IMAGE)
    for given_out in range(8, 3 * N, 8):
        next(batches)
        assert len(read) * 16 <= given_out + 2 * 4 * 16
    assert len(read) >= 2 * 23


def test_a_small_split_is_read_once(many, monkeypatch):
    read, load_rows = [], stores.load_rows
    monkeypatch.setattr(stores, "load_rows", lambda *a: read.extend(a[2]) or load_rows(*a))
    take(5 * N // 16, stores.Store(many).batches("train", 16))
    assert len(read) == 23


def test_no_reader_is_left_behind(many):
    before = threading.active_count()
    batches = stores.Store(many).batches("train", 16, buffer_bytes=1)
    next(batches)
    batches.close()
    assert threading.active_count() == before
