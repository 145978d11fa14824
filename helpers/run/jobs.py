"""The long work of notebooks 01 to 03 on several processes; the notebooks then find it done.

    accelerate launch --num_processes 8 -m helpers.run.jobs collect sd15
    accelerate launch --num_processes 8 -m helpers.run.jobs moments sd15
    accelerate launch --num_processes 8 -m helpers.run.jobs train sd15

Without a GPU, `torchrun --nproc_per_node 2` starts two processes, accelerate only one. Machines
that share a disk each collect a part: `--shard_index 0 --num_shards 4` on the first of four. From a
notebook, before anything has used the GPU:
`accelerate.notebook_launcher(jobs.collect, (parameters_for("01", "sd15"),), num_processes=8)`.
"""

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

MADE = ("scenes", "full", "none")  # prompts of which there are as many as are asked for
SET_BY_COLLECTING = (  # not to be given as arguments of a pipeline's call
    *("pipe", "prompt", "class_labels", "seeds", "generator", "taps", "tokens"),
    *("output_type", "return_dict", "num_images_per_prompt"),
)


def plan_of(parameters: dict, pipe=None) -> Plan:
    """The collection that notebook 01's parameters ask for; ValueError names one that cannot be.

    A hub model's revision is on record once the model has been loaded, so load it before. With the
    pipeline, captions are not made before the disk is known to have room for all images.
    """
    p = parameters
    if pipe is not None and p["prompts"] in MADE:
        few, n_of = plan_of(one_each(p)), {split: p[f"n_{split}"] for split in SPLITS}
        shards = (path for folder in few.taps for path in folder.glob("shard-*.safetensors"))
        there = sum(path.stat().st_size for path in shards)
        need = sum(few.bytes_of(n_of, few.shapes(pipe), pipe)) - there
        collecting.check_room(next(iter(few.taps)), need, sum(n_of.values()))
    revision = resolved_revision(p["model"], p["revision"])
    return Plan(
        taps_of(p),
        *prompts_of(p),
        steps=kept_steps(p["steps"], p["num_inference_steps"], p["n_keep"]),
        sampling=sampling_of(p),
        store_dtype=choose_dtype(p["store_dtype"], name="store_dtype"),
        about={"model": p["model"], "model_dtype": p["dtype"], "revision": revision},
        **{name: p[name] for name in ("batch_size", "tokens_per_image", "train_images")},
    )


def one_each(parameters: dict) -> dict:
    """These parameters for one image of each split."""
    return parameters | {f"n_{split}": 1 for split in SPLITS}


def prompts_of(parameters: dict) -> tuple[list[str], list[int], list[str]]:
    """Prompt, seed and split of each image; image i has seed `seed` · 1000000 + i."""
    p = parameters
    n = sum(p[f"n_{split}"] for split in SPLITS)
    if p["prompts"] in ("scenes", "full"):
        scenes = world.sample(n, np.random.default_rng([p["seed"], 10]))
        if p["prompts"] == "scenes":
            rng = np.random.default_rng([p["seed"], 11])
            scenes = [world.leave_open(scene, rng) for scene in scenes]
        prompts = [world.caption(scene) for scene in scenes]
    elif p["prompts"] == "none":
        prompts = [""] * n
    else:
        prompts = read_prompts(p["prompts"], n, p["prompt_column"])
    if len(prompts) < n:
        wanted = f"at least {n}, which n_train + n_validation + n_test make"
        refuse(f"the number of prompts in {p['prompts']!r}", len(prompts), wanted)
    splits = [split for split in SPLITS for _ in range(p[f"n_{split}"])]
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
    both = p["branch"] == "both"
    own = Tap(p["hookpoint"], p["signal"], "conditional" if both else p["branch"])
    taps = {run_folder(p["run"]): own}
    if both:
        taps[run_folder(f"{p['run']}-unconditional")] = own._replace(branch="unconditional")
    for run, given in p["also"].items():
        if run_folder(run) in taps:
            refuse("also", run, "a run that no other tap is written to")
        tap = {"hookpoint": given} if isinstance(given, str) else given
        named = isinstance(tap, dict) and "hookpoint" in tap and set(tap) <= set(Tap._fields)
        if not named or not all(isinstance(value, str) for value in tap.values()):
            refuse(f"also: {run}", given, "a hookpoint, or hookpoint, signal and branch by name")
        taps[run_folder(run)] = Tap(**tap)
    return {folder / "trajectories": tap for folder, tap in taps.items()}


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
    made = p["prompts"] in MADE
    plan = plan_of(one_each(p) if made else p)  # all that can be wrong, before a model is loaded
    plan.check_folders()
    accelerator = accelerator_of(p)
    device = str(accelerator.device) if accelerator else p["device"]
    pipe = pipe or load_model(p["model"], device, p["dtype"], p["revision"])
    plan = plan_of(p, pipe) if made else plan
    plan.about["revision"] = resolved_revision(p["model"], p["revision"])
    return collecting.collect(plan, pipe, accelerator=accelerator, share=share)


def moments(parameters: dict) -> tuple[Moments, Moments]:
    """Sums over training and validation images, each process its share; notebook 02 finds them."""
    run, accelerator = Run("02_fit_predictors", parameters), accelerator_of(parameters)
    store, device = run.store, accelerator.device if accelerator else run.device

    def summed(split: str, shift: torch.Tensor | None) -> Moments:
        if accelerator is None:
            return accumulate(store.shards(split), shift, device)
        if shift is None:  # the first shard's mean, which all processes need
            shift = accumulate(itertools.islice(store.shards(split), 1)).shift
        own = store.shards(split, (accelerator.process_index, accelerator.num_processes))
        first = list(itertools.islice(own, 1))  # none where there are more processes than shards
        own = itertools.chain(first, own)
        sums = accumulate(own, shift, device) if first else Moments.none(shift)
        return sums.summed(accelerator)

    def sums_of(split: str, shift=None) -> Moments:
        path = run.folder / "moments" / f"{split}.safetensors"
        return cached(path, run.made_from("trajectories"), lambda: summed(split, shift))

    train = sums_of("train")
    return train, sums_of("validation", train.shift)


def train(parameters: dict) -> tuple[Dictionary, History]:
    """Train a run's residual dictionary, data parallel; by its checkpoints notebook 03 finds it."""
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
    jobs = {"collect": ("01", collect), "moments": ("02", moments), "train": ("03", train)}
    launcher, told = "accelerate launch -m helpers.run.jobs", __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(launcher, description=told)
    parser.add_argument("job", choices=jobs)
    parser.add_argument("parameters", help="a file in notebooks/parameters, or a path to one")
    parser.add_argument("--shard_index", type=int, default=0, help="collect: this machine's part")
    parser.add_argument("--num_shards", type=int, default=1, help="collect: machines on one disk")
    given = parser.parse_args()
    notebook, job = jobs[given.job]
    share = {"share": (given.shard_index, given.num_shards)} if given.job == "collect" else {}
    try:
        parameters = parameters_for(notebook, given.parameters)
        job(parameters, **share)
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
