import copy
import json
import os
import random
import shutil
import signal
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
import tqdm.auto
from conftest import SAMPLING, TOKENS, TUPLE
from stores import PROMPTS, SEEDS, SPLIT, contents, tiny_plan

from helpers import files, trajectories
from helpers.store.collect import collect, repair
from helpers.store.plan import SPLITS
from helpers.store.read import Store
from helpers.trajectories import Tap

SHARD = "shard-00001.safetensors"  # the third training image, number 3
TAPS = [  # of three kinds
    Tap("down_blocks.0.resnets.0"),
    Tap(TOKENS, "input"),
    Tap(TUPLE, "update", "unconditional"),
]


@pytest.fixture(scope="module")
def finished(pipe, tmp_path_factory):
    """A whole collection, only to be read."""
    folder = tmp_path_factory.mktemp("finished") / "t"
    collect(tiny_plan(folder), pipe)
    return folder


@pytest.fixture
def collected(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "t")


# --- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("store_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_collection_holds_what_record_gives(pipe, tmp_path, store_dtype):
    done = collect(tiny_plan(tmp_path, store_dtype=store_dtype), pipe)
    assert done["new_images"] == 5 and done["missing_images"] == 0 and done["new_seconds"] > 0
    shards = sorted(tmp_path.glob("*.safetensors"))
    for shard, numbers in zip(shards, [[0, 2], [3], [1], [4]], strict=True):
        prompts, seeds = ([of[i] for i in numbers] for of in (PROMPTS, SEEDS))
        images, h, _ = trajectories.record(pipe, prompts, seeds, TOKENS, [0, 2], **SAMPLING)
        tensors, _ = files.load_tensors(shard)
        assert tensors.keys() == {"h", "images"}
        assert tensors["h"].dtype == store_dtype and torch.equal(tensors["h"], h.to(store_dtype))
        assert np.abs(tensors["images"].numpy() / 255 - images).max() <= 0.5 / 255 + 1e-6


def test_the_manifest_adds_versions_and_each_shards_images_and_digest(finished, pipe):
    manifest = json.loads((finished / "manifest.json").read_text())
    versions = manifest.pop("versions")
    assert versions.keys() == {"python", "torch", "diffusers", "transformers"}
    assert versions["torch"] == torch.__version__
    shards = {p.name: files.digest(p) for p in finished.glob("*.safetensors")}
    assert manifest.pop("shards") == shards
    assert manifest.pop("images_of_shard") == [[0, 2], [3], [1], [4]]
    assert manifest == json.loads((finished / "begun.json").read_text())
    assert manifest == tiny_plan(finished).check(pipe)[finished]
    assert sorted(contents(finished)) == ["begun.json", "manifest.json", *sorted(shards)]


def test_where_no_terminal_is_no_bars_are_drawn(pipe, tmp_path, capsys):
    collect(tiny_plan(tmp_path / "quiet"), pipe)
    assert capsys.readouterr().err == ""


def test_collecting_again_makes_nothing_new(pipe, collected, monkeypatch):
    before = contents(collected)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # nor need it be written in
    assert collect(tiny_plan(collected), pipe)["new_images"] == 0
    assert contents(collected) == before


def test_a_finished_manifest_keeps_the_versions_that_made_it(pipe, collected):
    manifest = json.loads((collected / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    files.save_json(collected / "manifest.json", manifest)
    collect(tiny_plan(collected), pipe)
    assert json.loads((collected / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize("store_dtype, kept", [(torch.float16, 0), (torch.bfloat16, 5)])
def test_taps_recorded_together_equal_each_recorded_alone(pipe, tmp_path, store_dtype, kept):
    options = {"store_dtype": store_dtype, "tokens_per_image": kept}
    names = ["output", "input", "update"]
    collect(tiny_plan(*(tmp_path / name for name in names), taps=TAPS, **options), pipe)
    for name, tap in zip(names, TAPS):
        alone = tmp_path / "alone" / name
        collect(tiny_plan(alone, taps=[tap], **options), pipe)
        assert contents(tmp_path / name) == contents(alone)


def test_a_further_tap_is_collected_where_the_first_is_whole(pipe, collected, tmp_path):
    before = contents(collected)
    both = tiny_plan(collected, tmp_path / "grid", taps=[TOKENS, TAPS[0]])
    assert collect(both, pipe)["new_images"] == 5
    assert contents(collected) == before
    assert collect(both, pipe)["new_images"] == 0
    collect(tiny_plan(tmp_path / "alone", taps=TAPS[:1]), pipe)
    assert contents(tmp_path / "grid") == contents(tmp_path / "alone")


def test_a_further_folder_made_otherwise_is_refused_before_anything_is_written(
    pipe, finished, tmp_path
):
    plan = tiny_plan(tmp_path / "t", finished, taps=[TOKENS, TAPS[0]])
    with pytest.raises(ValueError, match="^hookpoint is "):
        collect(plan, pipe)
    assert not (tmp_path / "t").exists()


def test_a_branch_that_guidance_does_not_run_is_named_and_the_folder_not_spoilt(pipe, tmp_path):
    off = SAMPLING | {"guidance_scale": 1.0}
    plan = tiny_plan(tmp_path, taps=[Tap(TOKENS, branch="unconditional")], sampling=off)
    with pytest.raises(ValueError, match="branch.*unconditional"):
        collect(plan, pipe)
    assert collect(tiny_plan(tmp_path), pipe)["new_images"] == 5


def test_activations_too_large_for_float16_are_refused_and_the_advice_works(pipe, tmp_path):
    loud = copy.deepcopy(pipe)
    with torch.no_grad():
        loud.unet.get_submodule(TUPLE).proj_out.weight *= 1e7
    with pytest.raises(ValueError, match="store_dtype.*float16.*float32"):
        collect(tiny_plan(tmp_path, taps=[TUPLE], store_dtype=torch.float16), loud)
    assert collect(tiny_plan(tmp_path, taps=[TUPLE]), loud)["new_images"] == 5


def test_activations_that_overflow_in_the_model_are_refused(pipe, tmp_path):
    broken = copy.deepcopy(pipe)
    with torch.no_grad():
        broken.unet.get_submodule(TUPLE).proj_out.bias[3] = torch.nan
    with pytest.raises(ValueError, match=rf"^model is .*finite.*unet.{TUPLE}.proj_out.bias is not"):
        collect(tiny_plan(tmp_path, taps=[TUPLE]), broken)
    with torch.no_grad():
        broken.unet.get_submodule(TUPLE).proj_out.bias[3] = 3e38
        broken.unet.get_submodule(TUPLE).proj_out.weight[3] = 1e38
    with pytest.raises(ValueError, match="^dtype is .*float32.*NaN"):
        collect(tiny_plan(tmp_path, taps=[TUPLE]), broken)


# --- damage -------------------------------------------------------------------------------------


def lose(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)


DAMAGES = pytest.mark.parametrize("damage", [lose, cut, flip])


@DAMAGES
@pytest.mark.parametrize("unfinished", [True, False])
@pytest.mark.parametrize("again", ["collect", "repair"])
def test_a_damaged_shard_is_collected_again_with_the_same_bytes(
    pipe, collected, damage, unfinished, again
):
    before = contents(collected)
    damage(collected / SHARD)
    if unfinished:
        (collected / "manifest.json").unlink()
    run = {"collect": lambda: collect(tiny_plan(collected), pipe)}
    done = run.get(again, lambda: repair(collected, pipe))()
    assert done["new_images"] == 1 and done["missing_images"] == 0
    assert contents(collected) == before
    for split in SPLITS:
        list(Store(collected).shards(split))


def test_repair_restores_each_tap_with_its_own_settings(pipe, tmp_path):
    folders = [tmp_path / name for name in ("output", "input", "update")]
    plan = tiny_plan(
        *folders,
        taps=TAPS,
        tokens_per_image=5,
        train_images=False,
        store_dtype=torch.bfloat16,
        sampling=SAMPLING | {"negative_prompt": "gray"},
    )
    collect(plan, pipe)
    for folder in folders:
        before = contents(folder)
        flip(folder / SHARD)
        lose(folder / "shard-00002.safetensors")
        assert repair(folder, pipe)["new_images"] == 2
        assert contents(folder) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_no_collection_is_not_repaired(pipe, tmp_path, there):
    folder = tmp_path if there else tmp_path / "absent"
    with pytest.raises(FileNotFoundError, match=f"^{folder} is no collection"):
        repair(folder, pipe)


@pytest.fixture(scope="module")
def other(pipe):
    """The same pipeline but for one bias."""
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        next(p for p in other.unet.mid_block.parameters() if p.ndim == 1)[3] += 0.1
    return other


@pytest.mark.parametrize("unfinished", [True, False])
def test_shards_of_other_weights_are_not_mixed_in(other, collected, unfinished):
    flip(collected / SHARD)
    if unfinished:
        (collected / "manifest.json").unlink()
    before = contents(collected)
    for again in (lambda: collect(tiny_plan(collected), other), lambda: repair(collected, other)):
        with pytest.raises(ValueError, match="^weights is "):
            again()
    assert contents(collected) == before


def test_a_folder_that_does_not_tell_its_weights_goes_on(pipe, other, collected):
    for name in ("manifest.json", "begun.json"):
        record = json.loads((collected / name).read_text())
        files.save_json(collected / name, {k: v for k, v in record.items() if k != "weights"})
    before = contents(collected)
    assert collect(tiny_plan(collected), other)["new_images"] == 0
    assert repair(collected, other)["new_images"] == 0
    flip(collected / SHARD)
    assert repair(collected, pipe)["new_images"] == 1
    assert contents(collected) == before


# --- room on the disk ---------------------------------------------------------------------------

ROOMS = {  # tokens of each of the five images, and how many of them are stored as pictures
    "all": ({}, [16] * 5, 5),
    "some tokens, no training images": (
        {"tokens_per_image": 5, "train_images": False},
        [5, 16, 5, 5, 16],
        2,
    ),
}


def free(monkeypatch, size):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))


@pytest.mark.parametrize("case", ROOMS)
def test_too_little_disk_is_refused_before_anything_is_written(pipe, tmp_path, monkeypatch, case):
    options, tokens, pictures = ROOMS[case]
    need = sum(trajectories.bytes_per_image(2, n, 32, torch.float32) for n in tokens)
    need += pictures * 16 * 16 * 3
    plan = tiny_plan(tmp_path / "t", **options)
    free(monkeypatch, need - 1)
    with pytest.raises(OSError, match="n_train: 5 images need .*tokens_per_image"):
        collect(plan, pipe)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    free(monkeypatch, need)
    collect(plan, pipe)
    stored = [files.load_tensors(p)[0] for p in tmp_path.rglob("*.safetensors")]
    assert sum(t.nbytes for s in stored for name, t in s.items() if name != "tokens") == need


class Process(NamedTuple):
    """As much of an accelerate.Accelerator as collecting uses."""

    process_index: int
    num_processes: int = 2

    @property
    def is_main_process(self):
        return self.process_index == 0

    def wait_for_everyone(self):
        pass


@pytest.mark.parametrize("share", [{"accelerator": Process(1)}, {"share": (1, 2)}])
def test_each_process_counts_the_room_that_all_of_them_need(pipe, tmp_path, monkeypatch, share):
    need = 5 * (trajectories.bytes_per_image(2, 16, 32, torch.float32) + 16 * 16 * 3)
    free(monkeypatch, need - 1)
    with pytest.raises(OSError, match="5 images need 24.32 kB"):
        collect(tiny_plan(tmp_path), pipe, **share)
    free(monkeypatch, need)
    assert collect(tiny_plan(tmp_path), pipe, **share)["missing_images"] == 3


# --- several processes and machines -------------------------------------------------------------


def test_processes_and_machines_share_out_the_batches(pipe, finished, tmp_path):
    new = [
        collect(tiny_plan(tmp_path), pipe, accelerator=Process(p), share=(m, 2))["new_images"]
        for m, p in ((1, 1), (1, 0), (0, 1), (0, 0))
    ]
    assert new == [1, 1, 1, 2]
    assert contents(tmp_path) == contents(finished)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_machines_that_share_a_folder_make_what_one_makes(pipe, finished, tmp_path, order):
    plan = tiny_plan(tmp_path)
    first = collect(plan, pipe, share=(order[0], 2))
    assert (first["new_images"], first["missing_images"]) == ((3, 2) if order[0] == 0 else (2, 3))
    assert not (tmp_path / "manifest.json").exists()
    for path in tmp_path.glob("*.safetensors"):
        assert path.with_suffix(".sha256").read_text() == f"{files.digest(path)}  {path.name}\n"
    assert collect(plan, pipe, share=(order[0], 2))["new_images"] == 0
    assert collect(plan, pipe, share=(order[1], 2))["missing_images"] == 0
    assert contents(tmp_path) == contents(finished)


@pytest.mark.parametrize(
    "share, named", [((0, 0), "num_shards is 0"), ((2, 2), "shard_index is 2.*1$")]
)
def test_a_part_that_cannot_be_is_named(pipe, tmp_path, share, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        collect(tiny_plan(tmp_path), pipe, share=share)


@DAMAGES
def test_a_shard_damaged_before_the_folder_is_finished_is_collected_again(
    pipe, finished, tmp_path, damage
):
    collect(tiny_plan(tmp_path), pipe, share=(1, 2))
    damage(tmp_path / SHARD)
    assert collect(tiny_plan(tmp_path), pipe)["new_images"] == 4
    assert contents(tmp_path) == contents(finished)


def test_what_another_machine_is_writing_is_let_be(pipe, tmp_path):
    names = (SHARD, "shard-00000.safetensors", "begun.json")
    theirs, ours, other = (tmp_path / f".{name}.1.part" for name in names)
    inner, foreign = tmp_path / ".tmpRFXb3f", tmp_path / ".keep"  # of safetensors, of a person
    for path in (theirs, ours, other, inner, foreign):
        path.write_bytes(b"half")
    collect(tiny_plan(tmp_path), pipe, share=(0, 2))
    assert theirs.exists() and other.exists() and inner.exists() and not ours.exists()
    collect(tiny_plan(tmp_path), pipe)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == [foreign]


def test_a_folder_is_looked_through_once_however_many_shards_it_lacks(pipe, tmp_path, monkeypatch):
    looked, glob = [], files.Path.glob
    monkeypatch.setattr(
        files.Path, "glob", lambda folder, pattern: looked.append(folder) or glob(folder, pattern)
    )
    collect(tiny_plan(tmp_path, batch_size=1), pipe)
    assert looked == [tmp_path]


# --- killed at any moment -----------------------------------------------------------------------


@pytest.mark.process
def test_a_collection_killed_at_any_moment_goes_on_to_the_same_bytes(pipe, tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda f: (time.sleep(0.004), fsync(f))
    )  # so that a kill may fall between two files

    def run(name):
        plan = tiny_plan(
            tmp_path / name,
            tmp_path / f"{name}-also",
            taps=[TOKENS, TAPS[0]],
            prompts=PROMPTS * 2,
            seeds=range(10),
            splits=SPLIT * 2,
            steps=[0, 1],
            sampling={"num_inference_steps": 2, "guidance_scale": 1.0},
        )
        collect(plan, pipe)

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
        for made, whole in zip((f"killed-{i}", f"killed-{i}-also"), expected):
            assert contents(tmp_path / made) == whole
    assert killed == 20
