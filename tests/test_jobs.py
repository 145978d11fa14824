import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TOKENS

from helpers import predictors, sae
from helpers.demo import world as scenes
from helpers.files import load_json, load_tensors
from helpers.run import folder as runs
from helpers.run import jobs
from helpers.store import collect as stores

TESTS = Path(__file__).parent


def parameters(run, **changes):
    """All parameters of notebooks 01 to 03 for a tiny run in a folder of its own."""
    return {
        "run": str(run),
        "model": "tiny",
        "revision": "",
        "prompts": "scenes",
        "prompt_column": "prompt",
        "n_train": 6,
        "n_validation": 2,
        "n_test": 2,
        "hookpoint": TOKENS,
        "signal": "output",
        "branch": "conditional",
        "also": {},
        "num_inference_steps": 3,
        "n_keep": 3,
        "steps": [],
        "guidance_scale": 3.0,
        "pipeline_arguments": {},
        "height": 0,
        "width": 0,
        "batch_size": 2,
        "tokens_per_image": 0,
        "train_images": True,
        "store_dtype": "float32",
        "device": "cpu",
        "dtype": "float32",
        "seed": 0,
        "n_latents": 64,
        "k": 4,
        "n_updates": 12,
        "sae_batch_size": 32,
        "learning_rate": 5e-3,
        "dead_after": 64,
        "accumulate": 1,
    } | changes


def fit(p):
    """What notebook 02 does with the moments."""
    folder = runs.run_folder(p["run"])
    made_from = {"trajectories": runs.fingerprint(folder / "trajectories" / "manifest.json")}
    predictors.fit(*jobs.moments(p)).save(folder / "predictors.safetensors", made_from)


@pytest.fixture(scope="module")
def run(pipe, tmp_path_factory):
    """A tiny run after collecting, fitting and training in one process: its parameters, folder, SAE and history."""
    p = parameters(tmp_path_factory.mktemp("jobs") / "run")
    jobs.collect(p, pipe)
    fit(p)
    return p, Path(p["run"]), *jobs.train(p)


# --- what the jobs are told ---------------------------------------------------------------------


def test_prompts_seeds_and_splits_of_scenes():
    texts, seeds, split = jobs.prompts_of(parameters("/r", seed=2))
    assert split == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    assert seeds == [2_000_000 + i for i in range(10)]
    assert texts == [scenes.caption(s) for s in scenes.sample(10, np.random.default_rng([2, 10]))]


def test_prompts_of_a_file_or_none_at_all(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    assert jobs.prompts_of(parameters("/r", prompts=str(tmp_path / "p.txt")))[0] == [
        f"prompt {i}" for i in range(10)
    ]
    assert jobs.prompts_of(parameters("/r", prompts="none"))[0] == [""] * 10
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    with pytest.raises(
        ValueError, match="number of prompts in .*p.txt.* is 2; it must be at least 10"
    ):
        jobs.prompts_of(parameters("/r", prompts=str(tmp_path / "p.txt")))


def test_arguments_of_the_pipelines_call():
    told = jobs.sampling_of(
        parameters("/r", height=16, pipeline_arguments={"negative_prompt": "blur"})
    )
    assert told == {
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 0,
        "negative_prompt": "blur",
    }


@pytest.mark.parametrize(
    "name", ["num_inference_steps", "guidance_scale", "height", "width", "batch_size", "seed"]
)
def test_pipeline_arguments_do_not_override_parameters(name):
    with pytest.raises(
        ValueError, match=f"^pipeline_arguments: '{name}' is a parameter of its own; give it there$"
    ):
        jobs.sampling_of(parameters("/r", pipeline_arguments={name: 4}))


@pytest.mark.parametrize(
    "name",
    [
        "prompt",
        "generator",
        "output_type",
        "class_labels",
        "return_dict",
        "num_images_per_prompt",
        "pipe",
        "accelerator",
    ],
)
def test_pipeline_arguments_that_collecting_sets_are_refused(name):
    with pytest.raises(
        ValueError,
        match=f"^pipeline_arguments: '{name}' is set by the collection itself; leave it out$",
    ):
        jobs.sampling_of(parameters("/r", pipeline_arguments={name: 4}))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"also": {"r": "mid_block"}}, "'r' is the run itself; give another name"),
        ({"also": {str(runs.run_folder("r")): "mid_block"}}, "'/.*r' is the run itself"),
        (
            {"also": {"r-unconditional": "mid_block"}, "branch": "both"},
            "'r-unconditional' is there already",
        ),
        (
            {"also": {"o": 5}},
            "'o' is 5; it must be a hookpoint, or hookpoint, signal and branch by name",
        ),
        ({"also": {"o": ["mid_block", "input"]}}, "'o' is .'mid_block', 'input'.; it must"),
        ({"also": {"o": {"signal": "input"}}}, "'o' is .*; it must be a hookpoint"),
        (
            {"also": {"o": {"hookpoint": "mid_block", "sginal": "input"}}},
            "'o' is .*sginal.*; it must be a hookpoint",
        ),
        ({"also": {"o": {"hookpoint": 3}}}, "'o' is .*; it must be a hookpoint"),
    ],
)
def test_a_further_tap_that_is_none_or_takes_anothers_place_is_named(changes, said):
    with pytest.raises(ValueError, match=f"^also: {said}"):
        jobs.taps_of(parameters("r", **changes))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {"r": (TOKENS, "output", "conditional")}),
        ({"branch": "unconditional", "signal": "input"}, {"r": (TOKENS, "input", "unconditional")}),
        (
            {"branch": "both"},
            {
                "r": (TOKENS, "output", "conditional"),
                "r-unconditional": (TOKENS, "output", "unconditional"),
            },
        ),
        (
            {"also": {"o": "mid_block"}},
            {"r": (TOKENS, "output", "conditional"), "o": ("mid_block", "output", "conditional")},
        ),
        (
            {"also": {"o": {"hookpoint": "mid_block", "signal": "update"}}},
            {"r": (TOKENS, "output", "conditional"), "o": ("mid_block", "update", "conditional")},
        ),
    ],
)
def test_each_tap_has_a_run_of_its_own(changes, expected):
    taps = jobs.taps_of(parameters("r", **changes))
    assert {folder.parent.name: tuple(tap) for folder, tap in taps.items()} == expected
    assert list(taps)[0] == runs.run_folder("r") / "trajectories" and all(
        f.name == "trajectories" for f in taps
    )


# --- in one process, as in a notebook -----------------------------------------------------------


def test_collecting_keeps_what_the_parameters_say(run):
    p, folder, _, _ = run
    store = stores.Store(folder / "trajectories")
    texts, seeds, split = jobs.prompts_of(p)
    assert (store.prompts, store.seeds, store.split.tolist()) == (texts, seeds, split)
    about = {
        "model": "tiny",
        "model_dtype": "float32",
        "revision": "",
        "hookpoint": TOKENS,
        "signal": "output",
        "dtype": "float32",
    }
    assert (
        store.manifest.items()
        >= (about | {"branch": "conditional", "steps": [0, 1, 2], "tokens_per_image": 0}).items()
    )
    assert len(store.manifest["shards"]) == 5


def test_other_branches_and_hookpoints_are_collected_in_the_same_pass(pipe, tmp_path, run):
    p = parameters(
        tmp_path / "r",
        branch="both",
        also={str(tmp_path / "o"): {"hookpoint": "mid_block", "signal": "input"}},
    )
    jobs.collect(p, pipe)
    first = next(stores.Store(run[1] / "trajectories").shards("train"))
    assert torch.equal(next(stores.Store(tmp_path / "r" / "trajectories").shards("train")), first)
    others = [stores.Store(tmp_path / name / "trajectories") for name in ("r-unconditional", "o")]
    assert [s.manifest["branch"] for s in others] == ["unconditional", "conditional"]
    assert [s.manifest["signal"] for s in others] == ["output", "input"]
    assert not any(torch.equal(next(s.shards("train")), first) for s in others)


def test_machines_that_share_a_disk_each_collect_a_part(pipe, tmp_path, run):
    p = parameters(tmp_path)
    first = jobs.collect(p, pipe, shard_index=1, num_shards=2)
    assert first["missing"] == 3 and not (tmp_path / "trajectories" / "manifest.json").exists()
    assert jobs.collect(p, pipe, shard_index=0, num_shards=2)["missing"] == 0
    for name in (*load_json(run[1] / "trajectories" / "manifest.json")["shards"], "manifest.json"):
        assert (tmp_path / "trajectories" / name).read_bytes() == (
            run[1] / "trajectories" / name
        ).read_bytes()


def test_moments_are_those_of_all_shards_and_are_only_read_the_second_time(run, monkeypatch):
    p, folder, _, _ = run
    store = stores.Store(folder / "trajectories")
    first = next(store.shards("train")).double().permute(1, 0, 2, 3).flatten(1, 2).mean(1)
    expected = [
        predictors.accumulate(store.shards(split), first) for split in ("train", "validation")
    ]
    monkeypatch.setattr(predictors, "accumulate", None)
    for found, summed in zip(jobs.moments(p), expected):
        for name, value in vars(summed).items():
            assert torch.equal(torch.as_tensor(getattr(found, name)), torch.as_tensor(value)), name


def test_moments_of_another_collection_are_made_anew(pipe, tmp_path):
    p = parameters(tmp_path)
    jobs.collect(p, pipe)
    before, _ = jobs.moments(p)
    manifest = tmp_path / "trajectories" / "manifest.json"
    manifest.write_text(json.dumps(load_json(manifest) | {"noted": "later"}))
    (tmp_path / "moments" / "validation.safetensors").unlink()
    after, _ = jobs.moments(p)
    assert torch.equal(before.square, after.square)
    record = predictors.Moments.load(tmp_path / "moments" / "train.safetensors")[1]
    assert record == {"trajectories": runs.fingerprint(manifest)}


def test_training_is_that_of_the_residualized_batches(run):
    p, folder, trained, history = run
    store, (fitted, _) = (
        stores.Store(folder / "trajectories"),
        predictors.Predictors.load(folder / "predictors.safetensors"),
    )
    again, other = sae.train(
        fitted.batches(store, "train", 32, 0),
        96,
        64,
        4,
        n_steps=12,
        learning_rate=5e-3,
        dead_after=64,
        seed=0,
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(trained.state_dict().values(), again.state_dict().values())
    )
    assert history.fvu == other.fvu


def test_a_finished_training_is_only_loaded_unless_the_predictors_changed(run, monkeypatch):
    p, folder, trained, history = run
    monkeypatch.setattr(stores.Store, "batches", None)
    again, same = jobs.train(p)
    assert torch.equal(again.W_dec, trained.W_dec) and asdict(same) | {"seconds": 0} == asdict(
        history
    ) | {"seconds": 0}
    path = folder / "predictors.safetensors"
    before = path.read_bytes()
    try:
        fitted, record = predictors.Predictors.load(path)
        fitted.save(path, record | {"ridge": 1})
        with pytest.raises(TypeError):  # it wants batches
            jobs.train(p)
        fitted.save(path, {"trajectories": "another"})
        with pytest.raises(ValueError, match="run 02_fit_predictors again"):
            jobs.train(p)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("job", [jobs.moments, jobs.train])
def test_a_job_whose_input_is_missing_says_so(tmp_path, job):
    with pytest.raises(FileNotFoundError, match="run 01_collect_trajectories first"):
        job(parameters(tmp_path))


def test_an_empty_split_is_refused(pipe, tmp_path):
    stores.collect(
        tmp_path / "trajectories",
        pipe,
        ["a dog"] * 2,
        [0, 1],
        ["train"] * 2,
        hookpoint=TOKENS,
        steps=[0, 2],
        batch_size=2,
        num_inference_steps=3,
    )
    with pytest.raises(ValueError, match="no trajectories"):
        jobs.moments(parameters(tmp_path))


WRONG = {  # parameters, how they are asked for, and what is said
    "n_train": ({"n_train": -2}, jobs.prompts_of, "n_train is -2; it must be at least 1"),
    "n_validation": ({"n_validation": 0}, jobs.collect, "n_validation is 0; it must be at least 1"),
    "batch_size": ({"batch_size": 0}, jobs.collect, "batch_size is 0; it must be at least 1"),
    "tokens_per_image": (
        {"tokens_per_image": -1},
        jobs.collect,
        "tokens_per_image is -1; it must be at least 0",
    ),
    "seed": (
        {"seed": 2**60},
        jobs.collect,
        f"seed is {2**60}; it must be at least 0 and at most {2**32 - 1}",
    ),
    "run": (
        {"run": "/dev/null/x"},
        jobs.collect,
        "run: /dev/null/x/trajectories cannot be written, since /dev/null is no folder; .*",
    ),
    "store_dtype": ({"store_dtype": "int8"}, jobs.collect, "dtype 'int8' is not one of .*"),
    "n_updates": ({"n_updates": 0}, jobs.train, "n_updates is 0; it must be at least 1"),
    "sae_batch_size": (
        {"sae_batch_size": 0},
        jobs.train,
        "sae_batch_size is 0; it must be at least 1",
    ),
    "dead_after": ({"dead_after": 0}, jobs.train, "dead_after is 0; it must be at least 1"),
    "accumulate": ({"accumulate": -1}, jobs.train, "accumulate is -1; it must be at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_named_before_a_model_is_loaded(tmp_path, monkeypatch, case):
    changes, job, said = WRONG[case]
    monkeypatch.setattr(runs, "load_pipeline", None)
    with pytest.raises((ValueError, OSError), match=f"^{said}$"):
        job(parameters(tmp_path / "r") | changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "share, said",
    [
        ((0, 0), "num_shards is 0; it must be at least 1"),
        ((2, 2), "shard_index is 2; it must be at least 0 and at most 1"),
        ((-1, 2), "shard_index is -1"),
    ],
)
def test_a_machines_part_that_cannot_be_is_named_before_a_model_is_loaded(
    tmp_path, monkeypatch, share, said
):
    monkeypatch.setattr(runs, "load_pipeline", None)
    monkeypatch.setattr(runs, "parameters_for", lambda *_: parameters(tmp_path / "r"))
    monkeypatch.setattr(
        sys,
        "argv",
        ["jobs", "collect", "any", f"--shard_index={share[0]}", f"--num_shards={share[1]}"],
    )
    with pytest.raises(SystemExit, match=f"^error: {said}"):
        jobs.main()


# --- from the shell -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, said",
    [
        (["collect", "sd99"], "there is no parameter file sd99.yaml; valid are "),
        (["train", "absent/file.yaml"], "there is no parameter file file.yaml"),
        (
            ["moments", "{tmp}/odd.yaml"],
            "no notebook has a parameter 'n_trian'; did you mean n_train",
        ),
        (["moments", "{tmp}/empty.yaml"], "run 01_collect_trajectories first"),
    ],
)
def test_a_job_from_the_shell_ends_with_one_sentence(tmp_path, monkeypatch, given, said):
    (tmp_path / "odd.yaml").write_text("n_trian: 3\n")
    (tmp_path / "empty.yaml").write_text(f"run: {tmp_path / 'nothing'}\n")
    monkeypatch.setattr(sys, "argv", ["jobs", *(g.format(tmp=tmp_path) for g in given)])
    with pytest.raises(SystemExit) as end:
        jobs.main()
    assert (
        str(end.value).startswith("error: ")
        and said in str(end.value)
        and "\n" not in str(end.value)
    )


def test_an_unknown_job_is_named_with_the_valid_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jobs", "fit", "demo"])
    with pytest.raises(SystemExit):
        jobs.main()
    said = capsys.readouterr().err
    assert all(word in said for word in ("'fit'", "collect", "moments", "train"))


# --- in two processes ---------------------------------------------------------------------------


def start(*command, folder):
    """Run Python as a user would, without a GPU; returns what it wrote to stdout and stderr."""
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=env,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=150)
    finally:
        if child.poll() is None:  # late: its own children must not outlive it
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 0, err[-4000:]
    return out, err


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


LAUNCHED = """
import json, sys
import pipelines
from helpers.run import jobs
from test_jobs import fit

p = json.load(open("p.json"))
jobs.collect(p, pipelines.stable_diffusion())
if jobs._share(jobs._accelerator(p))[0] == 0:
    print("moments of", jobs.moments(p)[0].count)
else:
    jobs.moments(p)
if jobs._share(jobs._accelerator(p))[0] == 0:
    fit(p)
jobs._accelerator(p).wait_for_everyone()
sys.argv = ["jobs", "train", "p.yaml"]
jobs.main()
"""


@pytest.fixture(scope="module")
def launched(run, tmp_path_factory):
    """The same run made by `accelerate launch` with two processes, one of them idle at validation: its folder, and what they wrote."""
    folder = tmp_path_factory.mktemp("launched")
    p = run[0] | {"run": str(folder / "run")}
    (folder / "p.json").write_text(json.dumps(p))
    (folder / "p.yaml").write_text(yaml.safe_dump(p))
    (folder / "two.py").write_text(LAUNCHED)
    said = start(
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        2,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        free_port(),
        "two.py",
        folder=folder,
    )
    return folder / "run", *said


def test_two_processes_collect_the_same_bytes(run, launched):
    own, other = run[1] / "trajectories", launched[0] / "trajectories"
    assert sorted(p.name for p in own.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in own.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_two_processes_sum_the_same_moments_and_fit_the_same_predictors(run, launched):
    for split in ("train", "validation"):
        (one, record), (two, other) = (
            predictors.Moments.load(f / "moments" / f"{split}.safetensors")
            for f in (run[1], launched[0])
        )
        assert record == other and one.count == two.count and torch.equal(one.shift, two.shift)
        for name in ("total", "square", "cross"):
            a, b = getattr(one, name), getattr(two, name)
            assert (a - b).norm() <= 1e-12 * a.norm(), name
    one, two = (
        predictors.fit(
            *(
                predictors.Moments.load(f / "moments" / f"{s}.safetensors")[0]
                for s in ("train", "validation")
            ),
            dtype=torch.float64,
        )
        for f in (run[1], launched[0])
    )
    for name in ("mu", "scale", "A", "b", "rho", "strength"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a - b).norm() <= 1e-10 * a.norm(), name


def test_two_processes_train_nearly_the_same_sae(run, launched):
    _, _, trained, history = run
    (path,) = (launched[0] / "checkpoints").iterdir()
    tensors, saved = load_tensors(path)
    np.testing.assert_allclose(saved["history"]["fvu"], history.fvu, rtol=1e-4)
    assert saved["history"]["alive"] == history.alive
    for name, value in trained.state_dict().items():
        assert (tensors[name] - value).norm() <= 1e-3 * value.norm(), name


def test_afterwards_one_process_finds_it_done(run, launched, monkeypatch):
    p = run[0] | {"run": str(launched[0])}
    monkeypatch.setattr(stores.Store, "batches", None)
    monkeypatch.setattr(predictors, "accumulate", None)
    assert jobs.moments(p)[0].count == 96
    loaded, history = jobs.train(p)
    assert history.step[-1] == 11 and not loaded.training


def test_only_the_first_of_two_processes_shows_its_progress(launched):
    _, out, err = launched
    assert "moments of 96\n" in out and out.count("train: done; this process held at most") == 1
    assert err.count("collecting:   0%") == 1 and err.count("SAE: 100%") == 1
    assert "Traceback" not in err and "Warning" not in err


NOTEBOOK = """
import json, sys
import torch
from accelerate import notebook_launcher
from helpers.run import jobs

p, port = json.load(open(sys.argv[1])), sys.argv[2]
torch.set_num_threads(2)
(torch.randn(1000, 1000) @ torch.randn(1000, 1000)).relu().sum()  # the notebook has used its threads
alone = jobs.moments(p)[0].count  # and has run a job by itself
notebook_launcher(jobs.moments, (p | {"run": p["run"] + "-2"},), num_processes=2, use_port=port)
notebook_launcher(jobs.train, (p,), num_processes=2, use_port=port)
print("alone", alone)
"""


def test_a_notebook_launches_two_processes(run, tmp_path):
    p = run[0] | {"run": str(tmp_path / "run"), "n_updates": 3}
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trajectories").symlink_to(run[1] / "trajectories")
    (tmp_path / "run" / "predictors.safetensors").symlink_to(run[1] / "predictors.safetensors")
    (tmp_path / "p.json").write_text(json.dumps(p))
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    out, err = start("notebook.py", "p.json", free_port(), folder=tmp_path)
    assert out.splitlines()[-1] == "alone 96" and "Traceback" not in err and "Warning" not in err
    one, two = (
        predictors.Moments.load(tmp_path / name / "moments" / "train.safetensors")[0]
        for name in ("run", "run-2")
    )
    assert (
        one.count == two.count == 96
        and (one.square - two.square).norm() <= 1e-12 * one.square.norm()
    )
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert load_tensors(path)[1]["done"] == 3
