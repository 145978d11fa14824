"""All that must be tried on CUDA: `make gpu`, which writes figures/bench/gpu.json.

Each test also runs on the CPU at a tiny size, in the ordinary suite, so that its logic is known to
work before a GPU is at hand. Without one, `python -m tests.test_gpu` says so and exits with 0.
"""

import platform
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from helpers import moments, steering
from helpers.files import save_json
from helpers.pipelines.generate import generate
from helpers.pipelines.replay import record_outputs, replay
from helpers.run.folder import load_model
from helpers.run.parameters import ROOT, analysis_notebooks, parameters_of
from helpers.store.collect import collect
from helpers.store.plan import Plan
from helpers.store.read import Store
from helpers.training.loop import TrainConfig, train
from helpers.trajectories import record

TABLE = ROOT / "figures" / "bench" / "gpu.json"
TAP = "up_blocks.1.attentions.1"
COLOURS = ("red", "green", "blue", "yellow")
SIZES = {
    "cpu": {
        "images": 2,
        "sampling": {"num_inference_steps": 2, "guidance_scale": 3.0},
        "rounds": 2,
        "trajectories": (2, 3, 50, 16),
        "sae": {"d": 32, "m": 64, "k": 4, "batch": 64, "updates": 8},
    },
    "cuda": {
        "images": 32,
        "sampling": {"num_inference_steps": 25, "guidance_scale": 3.0},
        "rounds": 7,
        "trajectories": (64, 5, 256, 1280),
        "sae": {"d": 6400, "m": 8192, "k": 32, "batch": 4096, "updates": 60},
    },
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device here")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as the CPU computes
    return request.param


@pytest.fixture(scope="module")
def measured():
    """What CUDA was measured to do, by line; written to figures/bench/gpu.json at the end."""
    lines: dict[str, dict] = {}
    yield lines
    if lines:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        save_json(TABLE, about | {"python": platform.python_version(), "lines": lines})


def note(measured, device, line, **figures):
    print(f"{line} on {device}:", figures)
    if device == "cuda":
        measured[line] = figures


def prompts(n):
    circle = "a large {} solid circle at the left on a white background"
    return [circle.format(COLOURS[i % 4]) for i in range(n)]


def apart(a, b) -> float:
    """RMS of a difference, relative to that of the second."""
    a, b = (torch.as_tensor(v).double().cpu() for v in (a, b))
    return ((a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt()).item()


def seconds(work, rounds, device) -> list[float]:
    """Seconds of each round, less a first one that warms up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-3), ("float16", 0.1)])
def test_activations_and_images_are_those_of_the_cpu(device, measured, dtype, tolerance):
    if (device, dtype) == ("cpu", "float16"):
        pytest.skip("a CPU's float16 is no aim")
    size = SIZES[device]
    n, steps = min(size["images"], 8), [0, size["sampling"]["num_inference_steps"] - 1]
    run = {}
    for name, model in (
        ("cpu", load_model("demo", "cpu")),
        (device, load_model("demo", device, dtype)),
    ):
        run[name] = record(model, prompts(n), range(n), TAP, steps, **size["sampling"])
    (images, h, _), (reference, wanted, _) = run[device], run["cpu"]
    difference = {"activations": apart(h, wanted), "images": apart(images, reference)}
    note(measured, device, f"same as on the CPU, {dtype}", **difference)
    assert max(difference.values()) < tolerance


def test_recording_costs_little(device, measured):
    size = SIZES[device]
    pipe, n, sampling = load_model("demo", device), size["images"], size["sampling"]
    steps = list(range(0, sampling["num_inference_steps"], 5))
    sides = {
        "plain": lambda: generate(pipe, prompts(n), range(n), **sampling),
        "recorded": lambda: record(pipe, prompts(n), range(n), TAP, steps, **sampling),
    }
    taken = {name: seconds(work, size["rounds"], device) for name, work in sides.items()}
    ratio = float(np.median(np.divide(taken["recorded"], taken["plain"])))
    per_second = {name: n / float(np.median(t)) for name, t in taken.items()}
    note(measured, device, "recording / plain", ratio=ratio, images_per_second=per_second)
    assert ratio < (1.1 if device == "cuda" else 10)


def test_a_store_is_collected_and_read(device, measured, tmp_path):
    size = SIZES[device]
    n, last = size["images"], size["sampling"]["num_inference_steps"] - 1
    splits = ["train"] * (n - 1) + ["test"]
    taps = {tmp_path / "store": TAP}
    plan = Plan(taps, prompts(n), list(range(n)), splits, [0, last], size["sampling"], batch_size=8)
    start = time.perf_counter()
    collect(plan, load_model("demo", device))
    taken = time.perf_counter() - start
    store = Store(tmp_path / "store")
    batches = store.batches("train", 64)
    read = seconds(lambda: next(batches).to(device), 3 * size["rounds"], device)
    n_bytes = 64 * store.n_steps * store.channels * store.dtype.itemsize
    rate = n_bytes / float(np.median(read)) / 1e9
    note(measured, device, "store", images_per_second=n / taken, gigabytes_per_second_read=rate)
    h = next(iter(store.shards("test"))).float()
    _, wanted, _ = record(
        load_model("demo", "cpu"), prompts(n)[-1:], [n - 1], TAP, [0, last], **size["sampling"]
    )
    assert apart(h, wanted) < (0.1 if device == "cuda" else 1e-3)


def test_moments_are_those_of_the_cpu(device, measured):
    size = SIZES[device]
    h = torch.randn(size["trajectories"], generator=torch.Generator().manual_seed(0))
    shards = [h, 2 * h.flip(0) + 1]
    wanted, found = moments.accumulate(shards), moments.accumulate(shards, device=device)
    for name in ("total", "square", "cross"):
        assert apart(getattr(found, name), getattr(wanted, name)) < 1e-10
    taken = {
        place: min(seconds(lambda on=place: moments.accumulate(shards, device=on), 2, place))
        for place in (device, "cpu")
    }
    note(measured, device, "moments", seconds=taken)


def test_a_dictionary_trains_as_on_the_cpu(device):
    size = SIZES["cpu"]["sae"]
    data = batches(size, "cpu")
    config = TrainConfig(size["m"], size["k"], n_updates=20, batch_size=size["batch"])
    found, wanted = (train(data * 5, size["d"], config, device=d)[0] for d in (device, "cpu"))
    assert apart(found.W_dec.detach(), wanted.W_dec.detach()) < 1e-2
    assert apart(found.threshold, wanted.threshold) < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_near_the_rate_of_the_matrix_product(device, measured, dtype):
    size = SIZES[device]["sae"]
    data, marks = batches(size, device), []
    warm, last = size["updates"] // 4, size["updates"] - 1

    def stream():  # when a batch is asked for, the update with the one before is under way
        for i in range(size["updates"]):
            if i in (warm, last):
                if device == "cuda":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())
            yield data[i % len(data)]

    config = TrainConfig(
        size["m"], size["k"], size["updates"], size["batch"], dtype=dtype, learning_rate=1e-3
    )
    model, history = train(stream(), size["d"], config, device=device)
    update = (marks[1] - marks[0]) / (last - warm)
    kind = getattr(torch, dtype)
    y, W = data[0].to(kind), model.W_enc.detach().to(device, kind)
    product = float(np.median(seconds(lambda: y @ W, 20, device)))
    figures = {
        "share_of_matrix_rate": product / update,
        "examples_per_second": size["batch"] / update,
        "product_teraflops": 2 * size["batch"] * size["d"] * size["m"] / product / 1e12,
        "fvu": history.fvu[-1],
    }
    note(measured, device, f"SAE training, {dtype}", **figures)
    assert history.fvu[-1] < 1


def batches(size, device):
    """Four batches with a sparse dictionary behind them, (batch, d)."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(size["d"], size["d"], generator=g), dim=1)
    codes = torch.rand(4, size["batch"], size["d"], generator=g)
    codes = codes * (torch.rand(codes.shape, generator=g) < size["k"] / size["d"])
    return list((codes @ rows).to(device))


def test_steering_is_that_of_the_cpu(device, measured):
    size = SIZES[device]
    n, T = min(size["images"], 4), size["sampling"]["num_inference_steps"]
    g = torch.Generator().manual_seed(0)
    pipes = {d: load_model("demo", d, "float32") for d in (device, "cpu")}
    channels, tokens = shape_of(pipes["cpu"], size["sampling"])
    delta, mask = torch.randn(T, channels, generator=g), torch.rand(n, tokens, generator=g)
    made = {
        d: steering.steer(p, prompts(n), range(n), TAP, delta, mask=mask, **size["sampling"])
        for d, p in pipes.items()
    }
    plain = generate(pipes["cpu"], prompts(n), range(n), **size["sampling"])
    note(measured, device, "steered images, float32", images=apart(made[device], made["cpu"]))
    assert apart(made[device], made["cpu"]) < 5e-3
    assert apart(made["cpu"], plain) > 0.01


def test_an_edit_of_the_last_step_replays_those_before(device, measured):
    size = SIZES[device]
    n, T = min(size["images"], 4), size["sampling"]["num_inference_steps"]
    pipe = load_model("demo", device, "float32")
    channels, _ = shape_of(pipe, size["sampling"])
    delta, where = torch.ones(T, channels), (pipe, prompts(n), range(n), TAP)
    late = {"window": (T - 1, T - 1)} | size["sampling"]
    with record_outputs(pipe.unet, pipe.scheduler, n) as outputs:
        generate(pipe, prompts(n), range(n), **size["sampling"])

    def replayed():
        with replay(pipe.unet, pipe.scheduler, outputs, T - 1, list(range(n))):
            return steering.steer(*where, delta, **late)

    difference = apart(replayed(), steering.steer(*where, delta, **late))
    rounds = size["rounds"], device
    whole = np.median(seconds(lambda: steering.steer(*where, delta, **late), *rounds))
    share = float(np.median(seconds(replayed, *rounds)) / whole)
    note(measured, device, "replay up to the last step", images=difference, time_share=share)
    assert difference < 1e-6


def shape_of(pipe, sampling):
    _, h, _ = record(pipe, prompts(1), [0], TAP, [0], **sampling)
    return h.shape[3], h.shape[2]


@pytest.mark.gpu
@pytest.mark.process
def test_the_notebooks_run_on_cuda(measured, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    from test_notebooks import papermill

    for notebook in analysis_notebooks():
        cells = nbformat.read(notebook, as_version=4).cells
        (mock,) = [c.metadata["nbmake"]["mock"] for c in cells if "nbmake" in c.metadata]
        given = mock | {"run": str(tmp_path / "run"), "device": "cuda"}
        start = time.perf_counter()
        done = papermill(tmp_path, notebook.name[:2], **given)
        assert done.returncode == 0, done.stderr[-2000:]
        note(measured, "cuda", notebook.stem, seconds=time.perf_counter() - start)
        assert set(given) <= set(parameters_of(notebook))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit(print("there is no CUDA device here, so nothing was tried"))
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(pytest.main([__file__, "-m", "gpu", "-s"]))
