"""The long work of notebooks 01 to 03 on several processes; the notebooks then find it done.

    accelerate launch --num_processes 8 -m helpers.run.jobs collect sd15
    accelerate launch --num_processes 8 -m helpers.run.jobs moments sd15
    accelerate launch --num_processes 8 -m helpers.run.jobs train sd15

Without a GPU: `torchrun --nproc_per_node 2 -m helpers.run.jobs …`, since accelerate alone starts
one process there. The last argument is a file of notebooks/parameters, as for `make run`. Machines
that share a disk each take a part of a collection: `--shard_index 0 --num_shards 4` on the first of
four. From a notebook, before anything has used the GPU:
`accelerate.notebook_launcher(jobs.collect, (parameters_for("01", "sd15"),), num_processes=8)`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from helpers.checks import choose_device, choose_dtype, in_range, refuse
from helpers.coordinates import residual
from helpers.demo import world
from helpers.dictionary import Dictionary
from helpers.moments import Moments, accumulate, cached
from helpers.pipelines.loading import resolved_revision
from helpers.run.folder import Run, load_model, peak_memory, run_folder
from helpers.run.parameters import parameters_for
from helpers.run.prompts import read_prompts
from helpers.store import collect as collecting
from helpers.store.plan import SPLITS, Plan
from helpers.training.dictionaries import train_dictionary
from helpers.training.loop import History, TrainConfig
from helpers.trajectories import Tap, kept_steps

SET_BY_COLLECTING = (  # not to be given as arguments of a pipeline's call
    *("pipe", "prompt", "class_labels", "seeds", "generator", "taps", "tokens"),
    *("output_type", "return_dict", "num_images_per_prompt"),
)


def plan_of(parameters: dict) -> Plan:
    """The collection that notebook 01's parameters ask for; ValueError names one that cannot be.

    A hub model's revision is on record once the model has been loaded, so load it before.
    """
    p = parameters
    prompts, seeds, splits = prompts_of(p)
    return Plan(
        taps=taps_of(p),
        prompts=prompts,
        seeds=seeds,
        splits=splits,
        steps=kept_steps(p["steps"], p["num_inference_steps"], p["n_keep"]),
        sampling=sampling_of(p),
        batch_size=p["batch_size"],
        store_dtype=choose_dtype(p["store_dtype"], name="store_dtype"),
        tokens_per_image=p["tokens_per_image"],
        train_images=p["train_images"],
        about={"model": p["model"], "model_dtype": p["dtype"]} | _revision_of(p),
    )


def prompts_of(parameters: dict) -> tuple[list[str], list[int], list[str]]:
    """Prompt, seed and split of each image; image i has seed `seed` · 1000000 + i."""
    p = parameters
    splits = [split for split in SPLITS for _ in range(p[f"n_{split}"])]
    n = len(splits)
    if p["prompts"] == "scenes":
        scenes = world.sample(n, np.random.default_rng([p["seed"], 10]))
        prompts = [world.caption(scene) for scene in scenes]
    elif p["prompts"] == "none":
        prompts = [""] * n
    else:
        prompts = read_prompts(p["prompts"], n, p["prompt_column"])
        if len(prompts) < n:
            wanted = f"at least {n}, which n_train + n_validation + n_test make"
            refuse(f"the number of prompts in {p['prompts']!r}", len(prompts), wanted)
    return prompts, [p["seed"] * 1_000_000 + i for i in range(n)], splits


def sampling_of(parameters: dict) -> dict:
    """Arguments of the pipeline's call; ValueError for what `pipeline_arguments` may not set."""
    named = ("num_inference_steps", "guidance_scale", "height", "width")
    for name in parameters["pipeline_arguments"]:
        if name in parameters or name in SET_BY_COLLECTING:
            refuse("pipeline_arguments", name, "left out: it is a parameter, or set by collecting")
    return {name: parameters[name] for name in named} | parameters["pipeline_arguments"]


def taps_of(parameters: dict) -> dict[Path, Tap]:
    """Folders and taps of a run: its own first, then those of `branch` both and of `also`.

    ValueError for an entry of `also` that describes no tap, or whose run is taken.
    """
    p = parameters
    branch = "conditional" if p["branch"] == "both" else p["branch"]
    own = Tap(p["hookpoint"], p["signal"], branch)
    taps = {_trajectories(p["run"]): own}
    if p["branch"] == "both":
        taps[_trajectories(f"{p['run']}-unconditional")] = own._replace(branch="unconditional")
    for run, given in p["also"].items():
        if _trajectories(run) in taps:
            refuse("also", run, "a run that no other tap is written to")
        tap = {"hookpoint": given} if isinstance(given, str) else given
        try:
            taps[_trajectories(run)] = Tap(**tap)
            described = all(isinstance(value, str) for value in tap.values())
        except TypeError:
            described = False
        if not described:
            refuse(f"also: {run}", given, "a hookpoint, or hookpoint, signal and branch by name")
    return taps


def _trajectories(run: str) -> Path:
    return run_folder(run) / "trajectories"


def _revision_of(p: dict) -> dict:
    return {"revision": resolved_revision(p["model"], p["revision"])}


def accelerator_of(parameters: dict) -> Accelerator | None:
    """What binds a launcher's processes together, on GPUs or on the CPU; None for a single one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    if multiprocessing.parent_process():  # forked by a notebook, whose threads are not here:
        torch.set_num_threads(1)  # they would be waited for in vain
    # shares of a collection may take hours more or less than others
    patient = InitProcessGroupKwargs(timeout=timedelta(weeks=1))
    on_cpu = not choose_device(parameters["device"]).startswith("cuda")
    return Accelerator(cpu=on_cpu, kwargs_handlers=[patient])


def collect(parameters: dict, pipe=None, share: tuple[int, int] = (0, 1)) -> dict:
    """Collect with notebook 01's parameters, each process its part; see `store.collect.collect`."""
    p = parameters
    in_range("num_shards", share[1], 1)
    in_range("shard_index", share[0], 0, share[1] - 1)
    plan = plan_of(p)  # all that can be wrong, before a model is loaded
    plan.check_folders()
    accelerator = accelerator_of(p)
    device = str(accelerator.device) if accelerator else p["device"]
    pipe = pipe or load_model(p["model"], device, p["dtype"], p["revision"])
    plan.about |= _revision_of(p)
    return collecting.collect(plan, pipe, accelerator=accelerator, share=share)


def moments(parameters: dict) -> tuple[Moments, Moments]:
    """Sums over a run's training and validation images, each process its share of the shards.

    They are kept in `runs/<run>/moments/`, where notebook 02 finds them.
    """
    run, accelerator = Run("02_fit_predictors", parameters), accelerator_of(parameters)
    store, device = run.store, accelerator.device if accelerator else run.device

    def summed(split: str, shift: torch.Tensor | None) -> Moments:
        if accelerator is None:
            return accumulate(store.shards(split), shift, device)
        if shift is None:  # the first shard's mean, which all processes need
            shift = accumulate(itertools.islice(store.shards(split), 1)).shift
        own = store.shards(split, (accelerator.process_index, accelerator.num_processes))
        first = next(own, None)  # None where there are more processes than shards
        if first is None:
            return Moments.none(shift).summed(accelerator)
        return accumulate(itertools.chain([first], own), shift, device).summed(accelerator)

    def sums_of(split: str, shift=None) -> Moments:
        path = run.folder / "moments" / f"{split}.safetensors"
        return cached(path, run.made_from("trajectories"), lambda: summed(split, shift))

    train = sums_of("train")
    return train, sums_of("validation", train.shift)


def train(parameters: dict) -> tuple[Dictionary, History]:
    """Train a run's residual dictionary with notebook 03's parameters, data parallel.

    Its checkpoints let the notebook find it done.
    """
    run, accelerator = Run("03_train_residual_sae", parameters), accelerator_of(parameters)
    return train_dictionary(
        run.store,
        residual(run.predictors, parameters["block_exponent"]),
        TrainConfig.of(parameters),
        name="residual concat",
        checkpoints=run.folder / "checkpoints",
        made_from=run.made_from("predictors"),
        device=accelerator.device if accelerator else run.device,
        accelerator=accelerator,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m helpers.run.jobs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("job", choices=("collect", "moments", "train"))
    parser.add_argument("parameters", help="a file in notebooks/parameters, or a path to one")
    parser.add_argument("--shard_index", type=int, default=0, help="collect: this machine's part")
    parser.add_argument("--num_shards", type=int, default=1, help="collect: machines on one disk")
    given = parser.parse_args()
    notebook = {"collect": "01", "moments": "02", "train": "03"}[given.job]
    try:
        parameters = parameters_for(notebook, given.parameters)
        if given.job == "collect":
            collect(parameters, share=(given.shard_index, given.num_shards))
        else:
            {"moments": moments, "train": train}[given.job](parameters)
        if os.environ.get("RANK", "0") == "0":
            held = peak_memory(choose_device(parameters["device"]))
            print(f"{given.job}: done; this process held at most {held}", flush=True)
        if accelerator := accelerator_of(parameters):
            accelerator.wait_for_everyone()
            torch.distributed.destroy_process_group()  # else gloo may abort at exit
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
