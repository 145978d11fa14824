import json
import os
import shutil
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

from helpers import moments, predictors
from helpers.coordinates import residual
from helpers.demo import world
from helpers.files import load_json, load_tensors
from helpers.run import jobs
from helpers.run.folder import fingerprint, run_folder
from helpers.run.parameters import NOTEBOOKS, parameters_of
from helpers.store.read import Store
from helpers.training.dictionaries import train_dictionary
from helpers.training.loop import TrainConfig
from helpers.trajectories import Tap

TESTS = Path(__file__).parent
TINY = {
    **{"model": "tiny", "device": "cpu", "dtype": "float32", "hookpoint": TOKENS},
    **{"n_train": 6, "n_validation": 2, "n_test": 2, "batch_size": 2, "store_dtype": "float32"},
    **{"num_inference_steps": 3, "n_keep": 3, "ridge_strengths": [0.1, 1.0]},
    **{"n_latents": 64, "k": 4, "n_updates": 12, "sae_batch_size": 32, "dead_after": 64},
}


def parameters(run, **changes):
    """All parameters of notebooks 01 to 03 for a tiny run in a folder of its own."""
    defaults = {}
    for path in sorted(NOTEBOOKS.glob("0[123]_*.ipynb")):
        defaults |= {name: default for name, (default, _) in parameters_of(path).items()}
    return defaults | TINY | {"run": str(run)} | changes


def fit(p):
    """What notebook 02 does with the moments."""
    folder = run_folder(p["run"])
    made_from = {"trajectories": fingerprint(folder / "trajectories" / "manifest.json")}
    predictors.fit(*jobs.moments(p)).save(folder / "predictors.safetensors", made_from)


@pytest.fixture(scope="module")
def run(pipe, tmp_path_factory):
    """A tiny run after collecting, fitting and training in one process, and what came out."""
    p = parameters(tmp_path_factory.mktemp("jobs") / "run")
    jobs.collect(p, pipe)
    fit(p)
    return p, Path(p["run"]), *jobs.train(p)


# --- what notebook 01's parameters ask for ------------------------------------------------------


def test_prompts_seeds_and_splits_of_scenes():
    prompts, seeds, splits = jobs.prompts_of(parameters("/r", seed=2, prompts="full"))
    assert splits == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    assert seeds == [2_000_000 + i for i in range(10)]
    assert prompts == [world.caption(s) for s in world.sample(10, np.random.default_rng([2, 10]))]


def test_open_captions_say_parts_of_what_full_ones_say():
    given = {w: jobs.prompts_of(parameters("/r", prompts=w))[0] for w in ("scenes", "full")}
    assert given["scenes"] != given["full"]
    for part, whole in zip(given["scenes"], given["full"]):
        assert {*part.split()} <= {*whole.split(), "thing", "a", "an"}


def test_prompts_of_a_file_or_none_at_all(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    p = parameters("/r", prompts=str(tmp_path / "p.txt"))
    assert jobs.prompts_of(p)[0] == [f"prompt {i}" for i in range(10)]
    assert jobs.prompts_of(parameters("/r", prompts="none"))[0] == [""] * 10
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="number of prompts in .*p.txt.* is 2.* 10"):
        jobs.prompts_of(p)


def test_arguments_of_the_pipelines_call():
    p = parameters("/r", height=16, pipeline_arguments={"negative_prompt": "blur"})
    own = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 0}
    assert jobs.sampling_of(p) == own | {"negative_prompt": "blur"}


@pytest.mark.parametrize("name", ["num_inference_steps", "seed", "prompt", "generator", "tokens"])
def test_pipeline_arguments_that_are_set_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match=f"^pipeline_arguments is '{name}'"):
        jobs.sampling_of(parameters("/r", pipeline_arguments={name: 4}))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"also": {"r": "mid_block"}}, "also is 'r'"),
        ({"also": {str(run_folder("r")): "mid_block"}}, "also is '/.*r'"),
        (
            {"also": {"r-unconditional": "mid_block"}, "branch": "both"},
            "also is 'r-unconditional'",
        ),
        ({"also": {"o": 5}}, "also: o is 5"),
        ({"also": {"o": ["mid_block", "input"]}}, "also: o is .'mid_block', 'input'"),
        ({"also": {"o": {"signal": "input"}}}, "also: o is "),
        ({"also": {"o": {"hookpoint": "mid_block", "sginal": "input"}}}, "also: o is .*sginal"),
        ({"also": {"o": {"hookpoint": 3}}}, "also: o is "),
    ],
)
def test_a_further_tap_that_is_none_or_takes_anothers_place_is_named(changes, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        jobs.taps_of(parameters("r", **changes))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {"r": Tap(TOKENS)}),
        (
            {"branch": "unconditional", "signal": "input"},
            {"r": Tap(TOKENS, "input", "unconditional")},
        ),
        (
            {"branch": "both"},
            {"r": Tap(TOKENS), "r-unconditional": Tap(TOKENS, branch="unconditional")},
        ),
        ({"also": {"o": "mid_block"}}, {"r": Tap(TOKENS), "o": Tap("mid_block")}),
        (
            {"also": {"o": {"hookpoint": "mid_block", "signal": "update"}}},
            {"r": Tap(TOKENS), "o": Tap("mid_block", "update")},
        ),
    ],
)
def test_each_tap_has_a_run_of_its_own(changes, expected):
    taps = jobs.taps_of(parameters("r", **changes))
    assert list(taps)[0] == run_folder("r") / "trajectories"
    assert {folder.parent.name: tap for folder, tap in taps.items()} == expected


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"run": "/dev/null/x"}, "^run: /dev/null/x/trajectories cannot be written"),
        ({"store_dtype": "int8"}, "^store_dtype is 'int8'"),
        ({"steps": [0, 3]}, "^steps is "),
        ({"prompts": "absent.txt"}, "absent.txt"),
    ],
)
def test_what_cannot_be_collected_is_named_before_a_model_is_loaded(
    tmp_path, monkeypatch, changes, named
):
    monkeypatch.setattr(jobs, "load_model", None)
    with pytest.raises((ValueError, OSError), match=named):
        jobs.collect(parameters(tmp_path / "r") | changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompts", ["scenes", "full"])
def test_the_disk_is_looked_at_before_all_captions_are_made(pipe, tmp_path, monkeypatch, prompts):
    p, made, sample = parameters(tmp_path / "r", prompts=prompts), [], world.sample
    monkeypatch.setattr(world, "sample", lambda n, rng: made.append(n) or sample(n, rng))
    room, usage = [6 * (3 * 16 * 32 * 4 + 3 * 16 * 16)], shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=room[0]))
    for ask in (jobs.plan_of, jobs.collect):
        with pytest.raises(OSError, match="^n_train: 1000000004 images need .* TB .*41.47 kB free"):
            ask(p | {"n_train": 10**9}, pipe)
    assert set(made) == {3}
    assert jobs.collect(p | {"n_train": 2}, pipe)["new_images"] == 6
    room[0] = 0  # what is there already needs no more
    assert len(jobs.plan_of(p | {"n_train": 2}, pipe).prompts) == 6


# --- in one process, as in a notebook -----------------------------------------------------------


def test_collecting_keeps_what_the_parameters_say(run):
    p, folder, _, _ = run
    store = Store(folder / "trajectories")
    assert (store.prompts, store.seeds, store.split.tolist()) == jobs.prompts_of(p)
    assert store.tap == Tap(TOKENS) and store.steps == [0, 1, 2]
    about = {"model": "tiny", "model_dtype": "float32", "revision": "", "dtype": "float32"}
    assert store.manifest.items() >= about.items()
    assert len(store.manifest["shards"]) == 5


def test_other_branches_and_hookpoints_are_collected_in_the_same_pass(pipe, tmp_path, run):
    also = {str(tmp_path / "o"): {"hookpoint": "mid_block", "signal": "input"}}
    jobs.collect(parameters(tmp_path / "r", branch="both", also=also), pipe)
    first = next(Store(run[1] / "trajectories").shards("train"))
    assert torch.equal(next(Store(tmp_path / "r" / "trajectories").shards("train")), first)
    others = [Store(tmp_path / name / "trajectories") for name in ("r-unconditional", "o")]
    assert [s.tap for s in others] == [
        Tap(TOKENS, "output", "unconditional"),
        Tap("mid_block", "input", "conditional"),
    ]
    assert not any(torch.equal(next(s.shards("train")), first) for s in others)


def test_machines_that_share_a_disk_each_collect_a_part(pipe, tmp_path, run):
    p = parameters(tmp_path)
    assert jobs.collect(p, pipe, share=(1, 2))["missing_images"] == 6
    assert jobs.collect(p, pipe, share=(0, 2))["missing_images"] == 0
    for path in (run[1] / "trajectories").iterdir():
        assert (tmp_path / "trajectories" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "share, named", [((0, 0), "num_shards is 0"), ((2, 2), "shard_index is 2"), ((-1, 2), "is -1")]
)
def test_a_machines_part_that_cannot_be_is_named_before_a_model_is_loaded(
    tmp_path, monkeypatch, share, named
):
    monkeypatch.setattr(jobs, "load_model", None)
    monkeypatch.setattr(jobs, "parameters_for", lambda *_: parameters(tmp_path / "r"))
    given = ["jobs", "collect", "x", f"--shard_index={share[0]}", f"--num_shards={share[1]}"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match=f"^error: .*{named}"):
        jobs.main()


def test_moments_are_those_of_all_shards_and_are_only_read_the_second_time(run, monkeypatch):
    p, folder, _, _ = run
    store = Store(folder / "trajectories")
    train = moments.accumulate(store.shards("train"))
    expected = train, moments.accumulate(store.shards("validation"), train.shift)
    monkeypatch.setattr(jobs, "accumulate", None)
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
    record = moments.Moments.load(tmp_path / "moments" / "train.safetensors")[1]
    assert record == {"trajectories": fingerprint(manifest)}


def test_training_is_that_of_the_residual_coordinates(run):
    p, folder, trained, history = run
    fitted, _ = predictors.Predictors.load(folder / "predictors.safetensors")
    config = TrainConfig(64, 4, 12, 32, learning_rate=p["learning_rate"], dead_after=64)
    store = Store(folder / "trajectories")
    again, other = train_dictionary(store, residual(fitted), config, name="residual concat")
    for a, b in zip(trained.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert history.fvu == other.fvu


def test_a_finished_training_is_only_loaded_unless_the_predictors_changed(run, monkeypatch):
    p, folder, trained, history = run
    monkeypatch.setattr(Store, "batches", None)
    again, same = jobs.train(p)
    assert torch.equal(again.coder.W_dec, trained.coder.W_dec)
    assert asdict(same) | {"seconds": 0} == asdict(history) | {"seconds": 0}
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


def test_notebooks_find_done_what_the_jobs_did(pipe, tmp_path):
    from test_notebooks import run_here

    def files_in(folder):
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / folder).iterdir()}

    p = parameters(tmp_path)
    jobs.collect(p, pipe)
    for notebook, job, folder in (
        ("02", jobs.moments, "moments"),
        ("03", jobs.train, "checkpoints"),
    ):
        job(p)
        made = files_in(folder)
        (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
        run_here(notebook, **{name: p[name] for name in parameters_of(path)})
        assert files_in(folder) == made


@pytest.mark.parametrize("job", [jobs.moments, jobs.train])
def test_a_job_whose_input_is_missing_says_so(tmp_path, job):
    with pytest.raises(FileNotFoundError, match="run 01_collect_trajectories"):
        job(parameters(tmp_path))


# --- from the shell -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, named",
    [
        (["collect", "sd99"], "sd99"),
        (["train", "absent/file.yaml"], "file.yaml"),
        (["moments", "{tmp}/odd.yaml"], "n_trian.*n_train"),
        (["collect", "{tmp}/none.yaml"], "n_train is 0"),
        (["train", "{tmp}/updates.yaml"], "n_updates is -3"),
        (["moments", "{tmp}/empty.yaml"], "run 01_collect_trajectories"),
    ],
)
def test_a_job_from_the_shell_ends_with_one_sentence(tmp_path, monkeypatch, given, named):
    (tmp_path / "odd.yaml").write_text("n_trian: 3\n")
    (tmp_path / "none.yaml").write_text("n_train: 0\n")
    (tmp_path / "updates.yaml").write_text("n_updates: -3\n")
    (tmp_path / "empty.yaml").write_text(f"run: {tmp_path / 'nothing'}\n")
    monkeypatch.setattr(sys, "argv", ["jobs", *(g.format(tmp=tmp_path) for g in given)])
    with pytest.raises(SystemExit, match=f"^error: .*{named}") as end:
        jobs.main()
    assert "\n" not in str(end.value)


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
    child = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=300)
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
train, _ = jobs.moments(p)
accelerator = jobs.accelerator_of(p)
if accelerator.is_main_process:
    print("moments of", train.count)
    fit(p)
accelerator.wait_for_everyone()
sys.argv = ["jobs", "train", "p.yaml"]
jobs.main()
"""


@pytest.fixture(scope="module")
def launched(run, tmp_path_factory):
    """The same run made by two processes, one of them idle at validation; and what they wrote."""
    folder = tmp_path_factory.mktemp("launched")
    p = run[0] | {"run": str(folder / "run")}
    (folder / "p.json").write_text(json.dumps(p))
    (folder / "p.yaml").write_text(yaml.safe_dump(p))
    (folder / "two.py").write_text(LAUNCHED)
    options = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", free_port()]
    said = start("-m", "accelerate.commands.launch", *options, "two.py", folder=folder)
    return folder / "run", *said


@pytest.mark.process
def test_two_processes_collect_the_same_bytes(run, launched):
    own, other = run[1] / "trajectories", launched[0] / "trajectories"
    assert sorted(p.name for p in own.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in own.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.process
def test_two_processes_sum_the_same_moments_and_fit_the_same_predictors(run, launched):
    fitted = []
    for folder in (run[1], launched[0]):
        paths = [folder / "moments" / f"{s}.safetensors" for s in ("train", "validation")]
        fitted.append([moments.Moments.load(path) for path in paths])
    for (one, record), (two, other) in zip(*fitted):
        assert record == other and one.count == two.count and torch.equal(one.shift, two.shift)
        for name in ("total", "square", "cross"):
            a, b = getattr(one, name), getattr(two, name)
            assert (a - b).norm() <= 1e-12 * a.norm(), name
    one, two = (predictors.fit(*(m for m, _ in of), dtype=torch.float64) for of in fitted)
    for name in ("mu", "scale", "A", "b", "rho", "strength"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a - b).norm() <= 1e-10 * a.norm(), name


@pytest.mark.process
def test_two_processes_train_nearly_the_same_sae(run, launched):
    _, _, trained, history = run
    (path,) = (launched[0] / "checkpoints").iterdir()
    tensors, saved = load_tensors(path)
    np.testing.assert_allclose(saved["history"]["fvu"], history.fvu, rtol=1e-4)
    assert saved["history"]["alive"] == history.alive
    for name, value in trained.coder.state_dict().items():
        assert (tensors[name] - value).norm() <= 1e-3 * value.norm(), name


@pytest.mark.process
def test_afterwards_one_process_finds_it_done(run, launched, monkeypatch):
    p = run[0] | {"run": str(launched[0])}
    monkeypatch.setattr(Store, "batches", None)
    monkeypatch.setattr(jobs, "accumulate", None)
    assert jobs.moments(p)[0].count == 96
    _, history = jobs.train(p)
    assert history.step[-1] == 11


@pytest.mark.process
def test_only_the_first_of_two_processes_says_what_was_done(launched):
    _, out, err = launched
    assert "moments of 96\n" in out and out.count("train: done; this process held at most") == 1
    assert "Traceback" not in err
    assert err.count("Warning") == err.count("7 of 10 prompts are cut after 32 tokens") == 1
    assert "collecting:" not in err and "it/s" not in err  # no bars where there is no terminal


NOTEBOOK = """
import json, sys
import torch
from accelerate import notebook_launcher
from helpers.run import jobs

p, port = json.load(open(sys.argv[1])), sys.argv[2]
torch.set_num_threads(2)
(torch.randn(1000, 1000) @ torch.randn(1000, 1000)).relu().sum()  # it has used its threads
alone = jobs.moments(p)[0].count  # and has run a job by itself
notebook_launcher(jobs.moments, (p | {"run": p["run"] + "-2"},), num_processes=2, use_port=port)
notebook_launcher(jobs.train, (p,), num_processes=2, use_port=port)
print("alone", alone)
"""


@pytest.mark.process
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
        moments.Moments.load(tmp_path / name / "moments" / "train.safetensors")[0]
        for name in ("run", "run-2")
    )
    assert one.count == two.count == 96
    assert (one.square - two.square).norm() <= 1e-12 * one.square.norm()
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert load_tensors(path)[1]["done"] == 3
