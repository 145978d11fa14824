import copy
import json
import os
import re

import numpy as np
import pytest
import torch
from conftest import GRID, SAMPLING, TOKENS, TUPLE
from diffusers import HeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from stores import PROMPTS, SEEDS, tiny_plan

from helpers import files
from helpers.store.collect import collect, repair
from helpers.store.plan import SPLITS, image_bytes, load_record, refuse_other_settings, weights_of
from helpers.trajectories import Tap, bytes_per_image


@given(split=st.lists(st.sampled_from(SPLITS), min_size=1), batch_size=st.integers(1, 5))
def test_shards_are_neighbours_of_one_split_and_hold_every_image_once(split, batch_size):
    n = len(split)
    plan = tiny_plan("t", prompts=[""] * n, seeds=[*range(n)], splits=split, batch_size=batch_size)
    assert sorted(i for images in plan.shards for i in images) == list(range(n))
    for images in plan.shards:
        assert 1 <= len(images) <= batch_size and images == sorted(images)
        assert len({split[i] for i in images}) == 1
    assert sum(len(images) < batch_size for images in plan.shards) <= len(set(split))


def test_kept_tokens_are_a_subset_drawn_by_each_images_own_seed():
    plan = tiny_plan("t", tokens_per_image=5)  # shards hold images 0 and 2, 3, 1, 4
    first, second = plan.chosen_tokens(0, 16), plan.chosen_tokens(1, 16)
    for tokens in (*first, *second):
        assert len(tokens) == 5 and (tokens.diff() > 0).all() and 0 <= tokens[0] <= tokens[-1] < 16
    assert not torch.equal(first[0], first[1])
    assert plan.chosen_tokens(2, 16) is None and plan.chosen_tokens(3, 16) is None
    other = tiny_plan("t", tokens_per_image=5, batch_size=1, seeds=[99, *SEEDS[1:]])
    assert torch.equal(other.chosen_tokens(1, 16)[0], first[1])
    assert not torch.equal(other.chosen_tokens(0, 16)[0], first[0])
    assert tiny_plan("t").chosen_tokens(0, 16) is None


def test_sizes_count_tokens_and_images_that_are_kept(pipe):
    plan = tiny_plan("t", tokens_per_image=5, train_images=False)
    found, (few, whole) = (
        plan.shapes(pipe),
        (bytes_per_image(2, n, 32, torch.float32) for n in (5, 16)),
    )
    assert found == {Tap(TOKENS): (4, 4, 32)}
    sizes = [plan.bytes_of({split: 3}, found, pipe) for split in ("train", "test")]
    assert sizes == [(3 * few, 0), (3 * whole, 3 * 768)]
    twice = tiny_plan("t", "u", taps=[TOKENS, TOKENS])
    assert twice.bytes_of({"train": 1, "test": 1}, found, pipe) == (4 * whole, 4 * 768)
    assert image_bytes(pipe, {"height": 0, "width": 0}) == 3 * 16 * 16
    assert image_bytes(pipe, {"height": 16, "width": 24}) == 3 * 16 * 24


def test_the_record_holds_what_was_asked_and_what_the_pipeline_says(pipe):
    plan = tiny_plan("t", taps=[Tap(TOKENS, "input", "unconditional")])
    (record,) = plan.check(pipe).values()
    alphas = pipe.scheduler.alphas_cumprod.double()
    at = alphas[[int(t) for t in record["timesteps"]]]
    assert record.items() >= {"model": "tiny", "prompts": PROMPTS, "seeds": SEEDS}.items()
    assert record.items() >= Tap(TOKENS, "input", "unconditional")._asdict().items()
    assert record["sampling"] == SAMPLING | {"height": 0, "width": 0}
    assert (record["grid"], record["channels"]) == ([4, 4], 32)
    assert record["timesteps"] == pipe.scheduler.timesteps[[0, 2]].tolist()
    assert record["sigmas"] == pytest.approx(((1 - at) / at).sqrt().tolist())
    assert (record["scheduler"], record["weights"]) == ("DDIMScheduler", weights_of(pipe))


# --- what cannot be collected -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"prompts": [], "seeds": [], "splits": []}, r"seeds .*\(0, 0, 0\)"),
        ({"seeds": [1]}, r"prompts, seeds and splits is \(5, 1, 5\)"),
        ({"splits": ["train"] * 4 + ["tset"]}, "split is 'tset'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"taps": [Tap(TOKENS, branch="both")]}, "branch is 'both'"),
        ({"store_dtype": "float16"}, "store_dtype is 'float16'; .*torch.float16"),
    ],
)
def test_a_plan_that_cannot_be_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        tiny_plan("t", **changes)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"taps": ["mid_block.atentions.0"]}, "mid_block.atentions.0.*mid_block.attentions.0"),
        ({"taps": ["down_blocks"]}, r"'down_blocks'.*such as down_blocks\.\d"),
        ({"taps": [Tap("conv_in", "update")]}, "conv_in.*update"),
        ({"taps": [Tap(TOKENS, "outputs")]}, "signal.*outputs"),
        ({"steps": [0, 9]}, r"steps.*\[9\].*2"),
        ({"tokens_per_image": 17}, "tokens_per_image is 17.*16"),
        ({"tokens_per_image": -1}, "tokens_per_image is -1"),
        ({"sampling": SAMPLING | {"clip_skp": 1}}, "clip_skp"),
        ({"sampling": SAMPLING | {"height": 16}}, "width"),
        (
            {"sampling": SAMPLING | {"clip_skip": 9}},
            "called with is .*'clip_skip': 9.*Pipeline takes",
        ),
    ],
)
def test_what_a_pipeline_does_not_have_is_named_before_anything_is_written(
    pipe, tmp_path, changes, named
):
    plan = tiny_plan(tmp_path / "t", **changes)
    for only_check in (True, False):
        with pytest.raises(ValueError, match=named):
            collect(plan, pipe, only_check=only_check)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signal", ["output", "update"])
@pytest.mark.parametrize(
    "name", ["down_blocks.0.resnets", f"{TOKENS}.atn2.to_k", "up_blocks.1.resnets.7"]
)
def test_the_hookpoints_that_are_advised_instead_are_not_refused_next(pipe, name, signal):
    with pytest.raises(ValueError, match=f"^hookpoint is '{name}'; .*such as ") as refused:
        tiny_plan("t", taps=[Tap(name, signal)]).check(pipe)
    advised = str(refused.value).partition("such as ")[2].split(", ")
    assert len(advised) > 1
    tiny_plan(*advised, taps=[Tap(hookpoint, signal) for hookpoint in advised]).shapes(pipe)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "t", tmp_path / "file", "/dev/null/x/t"):
        with pytest.raises(OSError, match=f"^run: {folder} cannot be written.* no folder"):
            tiny_plan(folder).check_folders()
    tiny_plan(tmp_path / "t").check_folders()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match=f"^run: {tmp_path}/t .*read-only"):
        tiny_plan(tmp_path / "t").check_folders()
    (tmp_path / "manifest.json").write_text("{}")
    tiny_plan(tmp_path).check_folders()  # one that is finished need not be written


# --- folders begun with other settings ----------------------------------------------------------


@pytest.fixture(scope="module")
def begun(pipe, tmp_path_factory):
    """A folder that says what it was begun with, as in the middle of a collection."""
    folder = tmp_path_factory.mktemp("begun")
    plan = tiny_plan(folder, sampling=SAMPLING | {"negative_prompt": "gray"})
    files.save_json(folder / "begun.json", plan.check(pipe)[folder])
    return folder


CHANGES = {
    "prompts[0]": {"prompts": ["a dog", *PROMPTS[1:]]},
    "the number of prompts": {"prompts": PROMPTS * 2, "seeds": SEEDS * 2, "splits": ["test"] * 10},
    "seeds[4]": {"seeds": [*SEEDS[:4], 0]},
    "split[1]": {"splits": ["train"] * 5},
    "steps[1]": {"steps": [0, 1]},
    "batch_size": {"batch_size": 3},
    "store_dtype": {"store_dtype": torch.float16},
    "dtype": {"about": {"model": "tiny", "model_dtype": "float16"}},
    "model": {"about": {"model": "other"}},
    "tokens_per_image": {"tokens_per_image": 5},
    "train_images": {"train_images": False},
    "hookpoint": {"taps": [GRID]},
    "signal": {"taps": [Tap(TOKENS, "input")]},
    "branch": {"taps": [Tap(TOKENS, branch="unconditional")]},
    "num_inference_steps": {"sampling": {"num_inference_steps": 4}},
    "height": {"sampling": {"height": 32, "width": 32}},
    "negative_prompt": {"sampling": {"negative_prompt": None}},
    "eta": {"sampling": {"eta": 0.5}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_made_otherwise_is_refused_by_name(pipe, begun, name):
    changes = copy.copy(CHANGES[name])
    changes["sampling"] = SAMPLING | {"negative_prompt": "gray"} | changes.get("sampling", {})
    with pytest.raises(ValueError, match=f"^{re.escape(name)} is .*another run$"):
        tiny_plan(begun, **changes).check(pipe)


def test_an_argument_that_was_given_before_and_now_is_not_is_named(pipe, begun):
    with pytest.raises(ValueError, match="^negative_prompt is None.*'gray'"):
        tiny_plan(begun).check(pipe)


def test_another_scheduler_is_refused(pipe, begun, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    with pytest.raises(ValueError, match="^scheduler is 'HeunDiscreteScheduler'"):
        tiny_plan(begun, sampling=SAMPLING | {"negative_prompt": "gray"}).check(pipe)


LONG = "a lighthouse at the end of a long pier in a storm, by night, "


@pytest.mark.parametrize(
    "name, before, now, said",
    [
        ("prompts", [LONG] * 5, [LONG] * 3 + ["a dog", LONG], r"prompts\[3\] is 'a dog'.*a light"),
        ("prompts", [LONG] * 2, [LONG, LONG + "x"], r"prompts\[1\] is '….*by night, x'"),
        ("negative_prompt", LONG + "in oil", LONG + "in ink", "is '….*in ink'.*'….*in oil'"),
        ("negative_prompt", LONG, None, "negative_prompt is None.*a light"),
        ("seeds", [*range(100)], [*range(99), 7], r"seeds\[99\] is 7.*99"),
    ],
)
def test_it_is_said_where_long_values_differ(begun, tmp_path, name, before, now, said):
    record = load_record(begun / "begun.json")
    told, asked = ({**record, "sampling": {**record["sampling"]}} for _ in range(2))
    for of, value in ((told, before), (asked, now)):
        (of if name in of else of["sampling"])[name] = value
    files.save_json(tmp_path / "begun.json", told)
    with pytest.raises(ValueError, match=said) as refused:
        refuse_other_settings(tmp_path, asked)
    assert len(str(refused.value)) < 250 + len(str(tmp_path))


def test_settings_that_json_turns_into_others_are_still_the_same(pipe, tmp_path):
    plan = tiny_plan(
        tmp_path,
        about={"sizes": (1, 2), "of": {3: "three"}},
        steps=np.array([0, 2]),
        seeds=np.array(SEEDS),
        sampling=SAMPLING | {"guidance_rescale": np.float64(0.5)},
    )
    files.save_json(tmp_path / "begun.json", plan.check(pipe)[tmp_path])
    plan.check(pipe)


@pytest.mark.parametrize("name", ["manifest.json", "begun.json"])
@pytest.mark.parametrize(
    "content, lacks",
    [("[]", "prompts"), ("{}", "prompts"), ("3", "prompts"), ("steps", "steps")],
)
def test_a_record_of_the_wrong_shape_is_named(pipe, begun, tmp_path, name, content, lacks):
    record = json.loads((begun / "begun.json").read_text())
    if content == "steps":
        content = json.dumps({k: v for k, v in record.items() if k != "steps"})
    (tmp_path / name).write_text(content)
    for read in (lambda: repair(tmp_path, pipe), lambda: tiny_plan(tmp_path).check(pipe)):
        with pytest.raises(ValueError, match=f"{name} is damaged .it has no '{lacks}'"):
            read()


# --- weights ------------------------------------------------------------------------------------


def test_weights_are_told_apart_and_not_by_layout_or_name(pipe):
    same, other = copy.deepcopy(pipe), copy.deepcopy(pipe)
    same.unet.to(memory_format=torch.channels_last)
    with torch.no_grad():
        next(p for p in other.unet.mid_block.parameters() if p.ndim == 1)[3] += 0.1
    assert weights_of(same) == weights_of(pipe) != weights_of(other)
    with torch.no_grad():
        next(same.text_encoder.parameters()).mul_(2)
    assert weights_of(same) != weights_of(pipe)
    assert weights_of(same.to("meta")) == ""


def test_a_plan_comes_back_from_its_record(pipe, tmp_path):
    taps = {tmp_path / "a": Tap(TUPLE, "update", "unconditional"), tmp_path / "b": Tap(TOKENS)}
    plan = tiny_plan(
        *taps,
        taps=taps.values(),
        sampling=SAMPLING | {"negative_prompt": "gray"},
        tokens_per_image=3,
        train_images=False,
        store_dtype=torch.bfloat16,
    )
    for folder, record in plan.check(pipe).items():
        again = type(plan).of_record(folder, json.loads(json.dumps(record)))
        assert again.taps == {folder: taps[folder]} and again.about == {"model": "tiny"}
        assert again.check(pipe) == {folder: record}
