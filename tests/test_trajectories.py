import copy
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import GRID, SAMPLING, TOKENS, TUPLE, take
from diffusers import HeunDiscreteScheduler

from helpers import files, trajectories

SPLIT = ["train", "validation", "train", "train", "test"]
SEEDS = [10, 11, 12, 13, 14]
SHARD = "shard-00001.safetensors"


@pytest.fixture
def collect(pipe, prompts):
    def run(folder, **changes):
        values = {
            "pipe": pipe, "prompts": prompts, "seeds": SEEDS, "split_of": SPLIT, "hookpoint": TOKENS, "steps": [0, 2],
            "batch_size": 2, "store_dtype": torch.float32, "record_of": {"model": "tiny"},
        }  # fmt: skip
        return trajectories.collect(folder, **values | SAMPLING | changes)

    return run


@pytest.fixture
def collected(collect, tmp_path):
    collect(tmp_path / "t")
    return tmp_path / "t"


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


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)


# --- which steps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, n, n_keep, expected",
    [
        ([], 20, 5, [0, 5, 10, 14, 19]),
        ([], 4, 4, [0, 1, 2, 3]),
        ([], 10, 2, [0, 9]),
        ([7, 2], 10, 99, [2, 7]),
    ],
)
def test_kept_steps(steps, n, n_keep, expected):
    assert trajectories.kept_steps(steps, n, n_keep) == expected


@pytest.mark.parametrize(
    "steps, n_keep, named",
    [([0, 7], 2, "step 7"), ([-1, 2], 2, "step -1"), ([3], 2, r"\[3\]"), ([], 1, r"\[0\]"), ([], 9, "different")],
)
def test_steps_that_do_not_exist_or_do_not_suffice_are_named(steps, n_keep, named):
    with pytest.raises(ValueError, match=named + ".*0 to 3"):
        trajectories.kept_steps(steps, 4, n_keep)


# --- generating ---------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_batch(pipe, prompts):
    together = trajectories.generate(pipe, prompts[:3], SEEDS[:3], **SAMPLING)
    assert together.dtype == np.float32 and together.shape == (3, 16, 16, 3)
    assert together.min() >= 0 and together.max() <= 1
    for i in range(3):
        alone = trajectories.generate(pipe, [prompts[i]], [SEEDS[i]], **SAMPLING)
        np.testing.assert_allclose(alone[0], together[i], atol=1e-4)


def test_an_image_depends_on_its_seed_and_on_its_prompt(pipe, prompts):
    images = trajectories.generate(pipe, [prompts[0], prompts[0], prompts[1]], [0, 1, 0], **SAMPLING)
    assert not np.allclose(images[0], images[1], atol=1e-3)
    assert not np.array_equal(images[0], images[2])


def test_a_wanted_size_is_height_by_width(pipe, prompts):
    assert trajectories.generate(pipe, prompts[:1], [0], height=16, width=32, **SAMPLING).shape == (1, 16, 32, 3)


def direct_activations(pipe, prompt, seed, hookpoint):
    """What the layer gives at the first step for the prompt alone, by calling the U-Net."""
    pipe.scheduler.set_timesteps(SAMPLING["num_inference_steps"])
    t = pipe.scheduler.timesteps[0]
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed)) * pipe.scheduler.init_noise_sigma
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=32, return_tensors="pt").input_ids
    kept = []
    handle = pipe.unet.get_submodule(hookpoint).register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        pipe.unet(pipe.scheduler.scale_model_input(latents, t), t, encoder_hidden_states=pipe.text_encoder(ids)[0])
    handle.remove()
    out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return out[0] if out.ndim == 3 else out[0].flatten(1).T


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("hookpoint", [TOKENS, TUPLE, GRID])
def test_record_keeps_the_conditional_branch_with_and_without_guidance(pipe, prompts, hookpoint, guidance_scale):
    sampling = SAMPLING | {"guidance_scale": guidance_scale}
    _, h, _ = trajectories.record(pipe, prompts[:2], [5, 6], hookpoint=hookpoint, steps=[0, 2], **sampling)
    assert h.shape == (2, 2, 16, 32)
    for i in range(2):
        torch.testing.assert_close(h[i, 0], direct_activations(pipe, prompts[i], 5 + i, hookpoint), atol=1e-4, rtol=1e-4)
    unconditional = direct_activations(pipe, "", 5, hookpoint)
    assert hookpoint == GRID or not torch.allclose(h[0, 0], unconditional, atol=1e-4)


def test_recording_changes_no_image_and_says_where_it_listened(pipe, prompts):
    images, _, where = trajectories.record(pipe, prompts[:2], [0, 1], hookpoint=TOKENS, steps=[0, 2], **SAMPLING)
    assert np.array_equal(images, trajectories.generate(pipe, prompts[:2], [0, 1], **SAMPLING))
    alphas = pipe.scheduler.alphas_cumprod.double()
    timesteps = pipe.scheduler.timesteps[[0, 2]]
    assert where["grid"] == [4, 4]
    assert where["timesteps"] == timesteps.tolist()
    np.testing.assert_allclose(where["sigmas"], (1 / alphas[timesteps] - 1).sqrt(), rtol=1e-9)


@pytest.mark.parametrize("hookpoint, grid", [(TOKENS, [4, 8]), (TUPLE, [4, 8]), ("conv_out", [8, 16])])
def test_grids_of_images_that_are_not_square_are_upright(pipe, prompts, hookpoint, grid):
    _, h, where = trajectories.record(
        pipe, prompts[:1], [0], hookpoint=hookpoint, steps=[0, 1], height=16, width=32, **SAMPLING
    )
    assert where["grid"] == grid and h.shape[2] == grid[0] * grid[1]


def test_solvers_with_two_calls_a_step_are_recorded_once_a_step(pipe, prompts, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    _, h, where = trajectories.record(pipe, prompts[:1], [0], hookpoint=TOKENS, steps=[0, 1, 2], **SAMPLING)
    assert h.shape == (1, 3, 16, 32) and where["timesteps"] == [999.0, 499.5, 0.0]


def test_shapes_of_hookpoints(pipe, prompts):
    sampling = SAMPLING | {"height": 16, "width": 32}
    expected = {TOKENS: (4, 8, 32), "conv_in": (8, 16, 16), "conv_out": (8, 16, 4)}
    assert trajectories.shapes(pipe, list(expected), prompts[0], **sampling) == expected


@pytest.mark.usefixtures("no_hooks_left")
@pytest.mark.parametrize("name", ["time_embedding", TOKENS + ".attn2.to_k", "down_blocks"])
def test_layers_without_a_grid_of_tokens_have_no_shape(pipe, prompts, name):
    assert trajectories.shapes(pipe, [name, "conv_in"], prompts[0], **SAMPLING) == {"conv_in": (8, 8, 16)}


def test_the_usual_hookpoints_come_in_the_networks_order(pipe, prompts):
    found = trajectories.hookpoints(pipe, prompts[0], **SAMPLING)
    order = ["down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.1.resnets.1"]
    assert [n for n in found if n in order] == order
    assert found["mid_block.attentions.0"] == (4, 4, 32) and found["up_blocks.1.resnets.1"] == (8, 8, 16)


# --- collecting ---------------------------------------------------------------------------------


def test_a_collection_holds_what_record_gives(collect, pipe, prompts, tmp_path):
    manifest = collect(tmp_path)
    assert manifest["new_images"] == 5 and len(manifest["shards"]) == 3
    store = trajectories.Store(tmp_path)
    store.verify()
    images, h, _ = trajectories.record(pipe, prompts[2:4], SEEDS[2:4], hookpoint=TOKENS, steps=[0, 2], **SAMPLING)
    tensors, _ = files.load_tensors(tmp_path / SHARD)
    assert torch.equal(tensors["h"], h)
    assert np.abs(tensors["images"].numpy() / 255 - images).max() <= 0.5 / 255 + 1e-6
    assert (store.n_steps, store.n_tokens, store.channels, store.grid) == (2, 16, 32, (4, 4))
    assert (store.prompts, store.seeds, store.steps) == (prompts, SEEDS, [0, 2])
    assert store.timesteps == pipe.scheduler.timesteps[[0, 2]].tolist()


def test_collecting_again_makes_nothing_new(collect, collected):
    before = {p: p.stat().st_mtime_ns for p in collected.glob("*.safetensors")}
    assert collect(collected)["new_images"] == 0
    assert {p: p.stat().st_mtime_ns for p in collected.glob("*.safetensors")} == before


def lose(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [lose, cut, empty])
@pytest.mark.parametrize("finished", [True, False])
def test_a_lost_or_truncated_shard_is_collected_again_with_the_same_bytes(collect, collected, damage, finished):
    names = [SHARD, "manifest.json"]
    before = [(collected / n).read_bytes() for n in names]
    damage(collected / SHARD)
    if not finished:
        (collected / "manifest.json").unlink()
    assert collect(collected)["new_images"] == 2
    assert [(collected / n).read_bytes() for n in names] == before
    trajectories.Store(collected).verify()


def test_verify_names_a_shard_with_a_flipped_byte(collected):
    flip_a_byte(collected / SHARD)
    with pytest.raises(ValueError, match=SHARD + " is damaged"):
        trajectories.Store(collected).verify()


def test_verify_names_a_missing_shard(collected):
    (collected / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=SHARD + " is missing"):
        trajectories.Store(collected).verify()


def test_collecting_again_does_not_take_a_flipped_byte_for_whole(collect, collected):
    before = (collected / SHARD).read_bytes()
    flip_a_byte(collected / SHARD)
    collect(collected)
    assert (collected / SHARD).read_bytes() == before


CHANGES = {
    "prompts": ["a dog"] * 5, "seeds": [1, 2, 3, 4, 5], "split_of": ["train"] * 5, "hookpoint": GRID, "steps": [0, 1],
    "batch_size": 3, "store_dtype": torch.float16, "record_of": {"model": "other"}, "num_inference_steps": 4,
    "guidance_scale": 2.0, "height": 32,
}  # fmt: skip
NAMED = {"split_of": "split", "store_dtype": "dtype", "record_of": "model"}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_made_otherwise_is_refused_by_name_and_left_alone(collect, collected, name, finished):
    if not finished:
        (collected / "manifest.json").unlink()
    before = {p: p.read_bytes() for p in collected.iterdir()}
    with pytest.raises(ValueError, match=f"^{NAMED.get(name, name)} is .*another run name"):
        collect(collected, **{name: CHANGES[name]})
    assert {p: p.read_bytes() for p in collected.iterdir()} == before


def test_a_folder_made_with_another_scheduler_is_refused(collect, collected, pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    with pytest.raises(ValueError, match="^scheduler is 'HeunDiscreteScheduler'"):
        collect(collected)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"prompts": []}, "prompts"),
        ({"hookpoint": "mid_block.atentions.0"}, "'mid_block.atentions.0'.*mid_block.attentions.0"),
        ({"hookpoint": "down_blocks"}, "'down_blocks' is never called.*down_blocks.0.resnets.0"),
        ({"steps": [0, 9]}, r"\[9\].*0 to 2"),
    ],
)
def test_what_cannot_be_collected_is_named_and_does_not_spoil_the_folder(collect, tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        collect(tmp_path / "t", **changes)
    assert collect(tmp_path / "t")["new_images"] == 5


def test_activations_too_large_for_float16_are_refused_and_the_advice_works(collect, pipe, tmp_path):
    loud = copy.deepcopy(pipe)
    with torch.no_grad():
        loud.unet.get_submodule(TUPLE).proj_out.weight *= 1e7
    loud.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="store_dtype.*float16.*float32"):
        collect(tmp_path / "t", pipe=loud, hookpoint=TUPLE, store_dtype=torch.float16)
    assert collect(tmp_path / "t", pipe=loud, hookpoint=TUPLE, store_dtype=torch.float32)["new_images"] == 5


def test_too_little_disk_is_refused_before_anything_is_written(collect, tmp_path, monkeypatch):
    need = 5 * trajectories.bytes_per_image(2, 16, 32, torch.float32)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(trajectories.shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(OSError, match="n_prompts: 5 images"):
        collect(tmp_path / "t")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_bytes_per_image_is_what_a_shard_grows_by(collect, tmp_path):
    collect(tmp_path / "t")
    tensors, _ = files.load_tensors(tmp_path / "t" / SHARD)
    assert tensors["h"].nbytes == 2 * trajectories.bytes_per_image(2, 16, 32, torch.float32)


# --- reading ------------------------------------------------------------------------------------


def test_the_splits_share_out_every_image_once(collected):
    store = trajectories.Store(collected)
    assert {s: store.indices(s).tolist() for s in trajectories.SPLITS} == {"train": [0, 2, 3], "validation": [1], "test": [4]}
    for split in trajectories.SPLITS:
        assert sum(len(h) for h in store.shards(split)) == len(store.images(split)) == len(store.indices(split))


@pytest.mark.parametrize("read", ["indices", "shards", "images", "batches"])
@pytest.mark.usefixtures("returns")
def test_an_unknown_split_is_named(collected, read):
    store = trajectories.Store(collected)
    arguments = (2,) if read == "batches" else ()
    with pytest.raises(ValueError, match="split 'tets' is not one of train"):
        result = getattr(store, read)("tets", *arguments)
        take(1, result)


@pytest.mark.usefixtures("returns")
def test_batches_of_an_empty_split_are_refused_by_name(collect, tmp_path):
    collect(tmp_path / "t", split_of=["train"] * 5)
    with pytest.raises(ValueError, match="test"):
        next(trajectories.Store(tmp_path / "t").batches("test", 2))


def rows(x):
    return sorted(map(tuple, x.flatten(1).tolist()))


@pytest.mark.parametrize("buffer_shards", [1, 2, 64])
@pytest.mark.parametrize("batch_size", [7, 16, 48, 60])
def test_batches_go_through_every_trajectory_once_an_epoch(collected, batch_size, buffer_shards):
    store = trajectories.Store(collected)
    every = torch.cat([h.transpose(1, 2).flatten(0, 1) for h in store.shards("train")])
    assert every.shape == (48, 2, 32)
    epochs = 5
    batches = take(-(-epochs * 48 // batch_size), store.batches("train", batch_size, 3, buffer_shards))
    assert {tuple(b.shape) for b in batches} == {(batch_size, 2, 32)} and batches[0].dtype == torch.float32
    drawn = torch.cat(batches)
    for epoch in range(epochs):
        assert rows(drawn[48 * epoch : 48 * (epoch + 1)]) == rows(every)


def test_batches_are_shuffled_by_their_seed(collected):
    def draw(seed):
        return torch.stack(take(6, trajectories.Store(collected).batches("train", 16, seed)))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert not torch.equal(*draw(0).unflatten(0, (2, 3)))


def test_an_unfinished_folder_is_not_a_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="run: .*01_collect_trajectories"):
        trajectories.Store(tmp_path)


# --- prompts and pictures -----------------------------------------------------------------------


def test_prompts_are_the_lines_that_hold_something(tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n\n  a cät \n   \n", encoding="utf-8")
    assert trajectories.read_prompts(tmp_path / "p.txt") == ["a dog", "a cät"]


def test_a_prompt_file_that_is_missing_or_empty_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="empty.txt"):
        trajectories.read_prompts(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError, match="absent.txt.*'scenes'"):
        trajectories.read_prompts(tmp_path / "absent.txt")


def test_pictures_keep_orientation_and_proportion():
    image = np.zeros((2, 4, 3))
    image[0, 3] = [1, 0.5, 2]
    small, large = trajectories.to_pil(image), trajectories.to_pil(image, 6)
    assert small.size == (4, 2) and small.getpixel((3, 0)) == (255, 128, 255)
    assert large.size == (12, 6) and large.getpixel((11, 2)) == (255, 128, 255) and large.getpixel((11, 3)) == (0, 0, 0)
