"""The long work of notebooks 01 to 03 on several processes or machines; the notebooks then find it done.

    accelerate launch --num_processes 8 -m helpers.run.jobs collect sd15
    accelerate launch --num_processes 8 -m helpers.run.jobs moments sd15
    accelerate launch --num_processes 8 -m helpers.run.jobs train sd15

(without a GPU: `torchrun --nproc_per_node 2 -m helpers.run.jobs …`, since accelerate alone starts one process there). The last argument is a file of notebooks/parameters, as for `make run`. From a notebook, before anything has used the GPU:
`accelerate.notebook_launcher(jobs.collect, (runs.parameters_for("01", "sd15"),), num_processes=8)`. Machines that
share a disk each take a part of a collection: add `--shard_index 0 --num_shards 4` on the first of four.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from helpers import predictors, sae, trajectories
from helpers.demo import world as scenes
from helpers.run import folder as runs
from helpers.run.prompts import read_prompts
from helpers.store import collect as stores

LEAST = {  # of the parameters of notebooks 01 and 03, the least that can be worked with
    "collect": {
        "n_train": 1,
        "n_validation": 1,
        "n_test": 1,
        "num_inference_steps": 1,
        "n_keep": 1,
        "batch_size": 1,
        "tokens_per_image": 0,
        "height": 0,
        "width": 0,
        "seed": 0,
    },
    "train": {
        "n_latents": 1,
        "k": 1,
        "n_updates": 1,
        "sae_batch_size": 1,
        "dead_after": 1,
        "accumulate": 1,
        "seed": 0,
    },
}


def require(job: str, parameters: dict) -> None:
    """ValueError, naming it, for a parameter of 'collect' or 'train' below what can be worked with."""
    for name, low in LEAST[job].items():
        runs.require(name, parameters[name], low, 2**32 - 1 if name == "seed" else None)


def _accelerator(parameters: dict) -> Accelerator | None:
    """What binds a launcher's processes together, on GPUs or, where `device` comes to that, on the CPU; None for a single process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    if (
        multiprocessing.parent_process()
    ):  # forked by a notebook: the parent's threads are not here, and would be waited for in vain
        torch.set_num_threads(1)
    patient = InitProcessGroupKwargs(
        timeout=timedelta(weeks=1)
    )  # shares of a collection may take hours more or less than others
    return Accelerator(
        cpu=not runs.choose_device(parameters["device"]).startswith("cuda"),
        kwargs_handlers=[patient],
    )


def _share(accelerator) -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)


def prompts_of(parameters: dict) -> tuple[list[str], list[int], list[str]]:
    """Prompts, seeds and splits of a run's images, from notebook 01's parameters; image i has seed `seed * 1000000 + i`."""
    import numpy as np

    require("collect", parameters)
    p = parameters
    split = [name for name in stores.SPLITS for _ in range(p[f"n_{name}"])]
    n = len(split)
    if p["prompts"] == "scenes":
        texts = [
            scenes.caption(s) for s in scenes.sample(n, np.random.default_rng([p["seed"], 10]))
        ]
    elif p["prompts"] == "none":
        texts = [""] * n
    else:
        texts = read_prompts(p["prompts"], n, p["prompt_column"])
        runs.require(
            f"the number of prompts in {p['prompts']!r} (n_train + n_validation + n_test make {n})",
            len(texts),
            n,
        )
    return texts, [p["seed"] * 1_000_000 + i for i in range(n)], split


SET_HERE = (
    "prompt",
    "class_labels",
    "generator",
    "output_type",
    "return_dict",
    "num_images_per_prompt",
)  # of a pipeline's call


def sampling_of(parameters: dict) -> dict:
    """Arguments of the pipeline's call, from notebook 01's parameters; ValueError for one in `pipeline_arguments` that is not to be given there."""
    own = {
        name: parameters[name]
        for name in ("num_inference_steps", "guidance_scale", "height", "width")
    }
    for name in parameters["pipeline_arguments"]:
        if name in parameters:
            raise ValueError(
                f"pipeline_arguments: {name!r} is a parameter of its own; give it there"
            )
        if name in SET_HERE or name in inspect.signature(stores.collect).parameters:
            raise ValueError(
                f"pipeline_arguments: {name!r} is set by the collection itself; leave it out"
            )
    return own | parameters["pipeline_arguments"]


def taps_of(parameters: dict) -> dict[Path, trajectories.Tap]:
    """Folders and taps of a run: its own first, then those of `branch` both and of `also`, each a run of its own.

    ValueError, naming it, for an entry of `also` that describes no tap, or whose run is taken.
    """
    p = parameters
    own = trajectories.Tap(
        p["hookpoint"], p["signal"], "conditional" if p["branch"] == "both" else p["branch"]
    )
    taps = {runs.run_folder(p["run"]) / "trajectories": own}
    if p["branch"] == "both":
        taps[runs.run_folder(f"{p['run']}-unconditional") / "trajectories"] = own._replace(
            branch="unconditional"
        )
    for run, tap in p["also"].items():
        folder, told = (
            runs.run_folder(run) / "trajectories",
            {"hookpoint": tap} if isinstance(tap, str) else tap,
        )
        if folder in taps:
            raise ValueError(
                f"also: {run!r} is {'the run itself' if taps[folder] is own else 'there already'}; give another name"
            )
        if (
            not isinstance(told, dict)
            or "hookpoint" not in told
            or not set(told) <= set(own._fields)
            or not all(isinstance(v, str) for v in told.values())
        ):
            raise ValueError(
                f"also: {run!r} is {tap!r}; it must be a hookpoint, or hookpoint, signal and branch by name"
            )
        taps[folder] = trajectories.Tap(**told)
    return taps


def collect(
    parameters: dict, pipe=None, shard_index: int = 0, num_shards: int = 1, only_check: bool = False
) -> dict:
    """Collect a run's trajectories with notebook 01's parameters, each process its share of the batches; see `stores.collect`."""
    p = parameters
    require("collect", p)
    runs.require("num_shards", num_shards, 1)
    runs.require("shard_index", shard_index, 0, num_shards - 1)
    steps, precision, sampling = (
        trajectories.kept_steps(p["steps"], p["num_inference_steps"], p["n_keep"]),
        runs.choose_dtype(p["store_dtype"]),
        sampling_of(p),
    )
    taps = taps_of(p)
    for f in taps:
        stores.require_folder(f)
    (folder, tap), *also = taps.items()
    texts, seeds, split = prompts_of(p)  # all that can be wrong, before a model is loaded
    accelerator = _accelerator(p)
    pipe = pipe or runs.load_pipeline(
        p["model"],
        str(accelerator.device) if accelerator else p["device"],
        p["dtype"],
        p["revision"],
    )
    about = {
        "model": p["model"],
        "model_dtype": p["dtype"],
        "revision": runs.resolved_revision(p["model"], p["revision"]),
    }
    return stores.collect(
        folder,
        pipe,
        texts,
        seeds,
        split,
        **tap._asdict(),
        steps=steps,
        batch_size=p["batch_size"],
        store_dtype=precision,
        tokens_per_image=p["tokens_per_image"],
        train_images=p["train_images"],
        also=dict(also),
        record_of=about,
        accelerator=accelerator,
        shard_index=shard_index,
        num_shards=num_shards,
        only_check=only_check,
        **sampling,
    )


def moments(parameters: dict) -> tuple[predictors.Moments, predictors.Moments]:
    """Sums over a run's training and validation images, each process its share of the shards; kept in `runs/<run>/moments/`, and only read if there."""
    accelerator = _accelerator(parameters)
    folder, share = runs.run_folder(parameters["run"]), _share(accelerator)
    store = stores.Store(folder / "trajectories")
    device = accelerator.device if accelerator else runs.choose_device(parameters["device"])
    record = {"trajectories": runs.fingerprint(store.folder / "manifest.json")}
    found: dict[str, predictors.Moments] = {}
    for split in ("train", "validation"):
        path = folder / "moments" / f"{split}.safetensors"
        if path.exists() and (loaded := predictors.Moments.load(path))[1] == record:
            found[split] = loaded[0]
            continue
        shift = (
            found["train"].shift
            if found
            else predictors.accumulate(itertools.islice(store.shards(split), 1)).shift
        )
        idle = (
            share[0]
            >= sum(store.split[images[0]] == split for images in store.manifest["images_of_shard"])
            > 0
        )  # more processes than shards
        part = (
            predictors.Moments.none(shift)
            if idle
            else predictors.accumulate(store.shards(split, share), shift, device)
        )
        found[split] = part.summed(accelerator) if accelerator else part
        if share[0] == 0:
            found[split].save(path, record)
        if accelerator:
            accelerator.wait_for_everyone()
    return found["train"], found["validation"]


def train(parameters: dict) -> tuple[sae.SAE, sae.History]:
    """Train a run's residual SAE with notebook 03's parameters, data parallel; its checkpoints let the notebook find it done."""
    p = parameters
    require("train", p)
    accelerator = _accelerator(p)
    folder, device = (
        runs.run_folder(p["run"]),
        accelerator.device if accelerator else runs.choose_device(p["device"]),
    )
    store = stores.Store(folder / "trajectories")
    fitted, made_from = predictors.Predictors.load(folder / "predictors.safetensors")
    runs.require_same(
        made_from, "trajectories", store.folder / "manifest.json", "02_fit_predictors"
    )
    return sae.train(
        lambda start: fitted.to(device).batches(
            store, "train", p["sae_batch_size"], p["seed"], start, _share(accelerator), device
        ),
        store.n_steps * store.channels,
        p["n_latents"],
        p["k"],
        n_steps=p["n_updates"],
        learning_rate=p["learning_rate"],
        dead_after=p["dead_after"],
        seed=p["seed"],
        device=device,
        dtype=runs.choose_dtype(p["dtype"]),
        accumulate=p["accumulate"],
        checkpoints=folder / "checkpoints",
        record={
            "predictors": runs.fingerprint(folder / "predictors.safetensors"),
            "batch_size": p["sae_batch_size"],
        },
        accelerator=accelerator,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m helpers.run.jobs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("job", choices=("collect", "moments", "train"))
    parser.add_argument(
        "parameters", help="a file in notebooks/parameters, without .yaml, or a path to one"
    )
    parser.add_argument("--shard_index", type=int, default=0, help="collect: this machine's part")
    parser.add_argument(
        "--num_shards", type=int, default=1, help="collect: how many machines share the folder"
    )
    given = parser.parse_args()
    notebook = {"collect": "01", "moments": "02", "train": "03"}[given.job]
    try:
        parameters = runs.parameters_for(notebook, given.parameters)
        if given.job == "collect":
            collect(parameters, shard_index=given.shard_index, num_shards=given.num_shards)
        else:
            {"moments": moments, "train": train}[given.job](parameters)
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{given.job}: done; this process held at most {runs.peak_memory(runs.choose_device(parameters['device']))}",
                flush=True,
            )
        if accelerator := _accelerator(parameters):
            accelerator.wait_for_everyone()
            torch.distributed.destroy_process_group()  # else gloo may abort at exit, and NCCL complains
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
