"""The long work of notebooks 01 to 03 on several processes or machines; the notebooks then find it done.

    accelerate launch --num_processes 8 -m helpers.jobs collect sd15
    accelerate launch --num_processes 8 -m helpers.jobs moments sd15
    accelerate launch --num_processes 8 -m helpers.jobs train sd15

(without a GPU: `torchrun --nproc_per_node 2 -m helpers.jobs …`, since accelerate alone starts one process there). The last argument is a file of notebooks/parameters, as for `make run`. From a notebook, before anything has used the GPU:
`accelerate.notebook_launcher(jobs.collect, (runs.parameters_for("01", "sd15"),), num_processes=8)`. Machines that
share a disk each take a part of a collection: add `--shard_index 0 --num_shards 4` on the first of four.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from helpers import predictors, runs, sae, scenes, stores, trajectories
from helpers.prompts import read_prompts


def _accelerator(parameters: dict) -> Accelerator | None:
    """What binds a launcher's processes together, on GPUs or, where `device` comes to that, on the CPU; None for a single process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    if multiprocessing.parent_process():  # forked by a notebook: the parent's threads are not here, and would be waited for in vain
        torch.set_num_threads(1)
    patient = InitProcessGroupKwargs(timeout=timedelta(weeks=1))  # shares of a collection may take hours more or less than others
    return Accelerator(cpu=not runs.choose_device(parameters["device"]).startswith("cuda"), kwargs_handlers=[patient])


def _share(accelerator) -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)


def prompts_of(parameters: dict) -> tuple[list[str], list[int], list[str]]:
    """Prompts, seeds and splits of a run's images, from notebook 01's parameters; image i has seed `seed * 1000000 + i`."""
    import numpy as np

    p, parts = parameters, ("train", "validation", "test")
    split = [name for name in parts for _ in range(p[f"n_{name}"])]
    n = len(split)
    if p["prompts"] == "scenes":
        texts = [scenes.caption(s) for s in scenes.sample(n, np.random.default_rng([p["seed"], 10]))]
    elif p["prompts"] == "none":
        texts = [""] * n
    else:
        texts = read_prompts(p["prompts"], n, p["prompt_column"])
        runs.require(f"the number of prompts in {p['prompts']!r} (n_train + n_validation + n_test make {n})", len(texts), n)
    return texts, [p["seed"] * 1_000_000 + i for i in range(n)], split


def sampling_of(parameters: dict) -> dict:
    """Arguments of the pipeline's call, from notebook 01's parameters."""
    return {name: parameters[name] for name in ("num_inference_steps", "guidance_scale", "height", "width")} | parameters["pipeline_arguments"]


def taps_of(parameters: dict) -> dict[Path, trajectories.Tap]:
    """Folders and taps of a run: its own first, then those of `branch` both and of `also`, each a run of its own."""
    p = parameters
    own = trajectories.Tap(p["hookpoint"], p["signal"], "conditional" if p["branch"] == "both" else p["branch"])
    taps = {p["run"]: own}
    if p["branch"] == "both":
        taps[f"{p['run']}-unconditional"] = own._replace(branch="unconditional")
    for run, tap in p["also"].items():
        taps[run] = trajectories.Tap(**{"hookpoint": tap} if isinstance(tap, str) else tap)
    return {runs.run_folder(run) / "trajectories": tap for run, tap in taps.items()}


def collect(parameters: dict, pipe=None, shard_index: int = 0, num_shards: int = 1) -> dict:
    """Collect a run's trajectories with notebook 01's parameters, each process its share of the batches; see `stores.collect`."""
    p, accelerator = parameters, _accelerator(parameters)
    pipe = pipe or runs.load_pipeline(p["model"], str(accelerator.device) if accelerator else p["device"], p["dtype"], p["revision"])
    (folder, tap), *also = taps_of(p).items()
    texts, seeds, split = prompts_of(p)
    about = {"model": p["model"], "model_dtype": p["dtype"], "revision": runs.resolved_revision(p["model"], p["revision"])}
    return stores.collect(
        folder, pipe, texts, seeds, split, **tap._asdict(), steps=trajectories.kept_steps(p["steps"], p["num_inference_steps"], p["n_keep"]),
        batch_size=p["batch_size"], store_dtype=runs.choose_dtype(p["store_dtype"]), tokens_per_image=p["tokens_per_image"],
        train_images=p["train_images"], also=dict(also), record_of=about, accelerator=accelerator, shard_index=shard_index, num_shards=num_shards,
        **sampling_of(p),
    )  # fmt: skip


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
        shift = found["train"].shift if found else predictors.accumulate(itertools.islice(store.shards(split), 1)).shift
        idle = share[0] >= sum(store.split[images[0]] == split for images in store.manifest["images_of_shard"]) > 0  # more processes than shards
        part = predictors.Moments.none(shift) if idle else predictors.accumulate(store.shards(split, share), shift, device)
        found[split] = part.summed(accelerator) if accelerator else part
        if share[0] == 0:
            found[split].save(path, record)
        if accelerator:
            accelerator.wait_for_everyone()
    return found["train"], found["validation"]


def train(parameters: dict) -> tuple[sae.SAE, sae.History]:
    """Train a run's residual SAE with notebook 03's parameters, data parallel; its checkpoints let the notebook find it done."""
    p, accelerator = parameters, _accelerator(parameters)
    folder, device = runs.run_folder(p["run"]), accelerator.device if accelerator else runs.choose_device(p["device"])
    store = stores.Store(folder / "trajectories")
    fitted, made_from = predictors.Predictors.load(folder / "predictors.safetensors")
    runs.require_same(made_from, "trajectories", store.folder / "manifest.json", "02_fit_predictors")
    return sae.train(
        lambda start: fitted.to(device).batches(store, "train", p["sae_batch_size"], p["seed"], start, _share(accelerator), device),
        store.n_steps * store.channels, p["n_latents"], p["k"], n_steps=p["n_updates"], learning_rate=p["learning_rate"], dead_after=p["dead_after"],
        seed=p["seed"], device=device, dtype=runs.choose_dtype(p["dtype"]), accumulate=p["accumulate"], checkpoints=folder / "checkpoints",
        record={"predictors": runs.fingerprint(folder / "predictors.safetensors"), "batch_size": p["sae_batch_size"]},
        accelerator=accelerator,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="accelerate launch -m helpers.jobs", description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=("collect", "moments", "train"))
    parser.add_argument("parameters", help="a file in notebooks/parameters, without .yaml, or a path to one")
    parser.add_argument("--shard_index", type=int, default=0, help="collect: this machine's part")
    parser.add_argument("--num_shards", type=int, default=1, help="collect: how many machines share the folder")
    given = parser.parse_args()
    notebook = {"collect": "01", "moments": "02", "train": "03"}[given.job]
    try:
        parameters = runs.parameters_for(notebook, given.parameters)
        if given.job == "collect":
            collect(parameters, shard_index=given.shard_index, num_shards=given.num_shards)
        else:
            {"moments": moments, "train": train}[given.job](parameters)
        if os.environ.get("RANK", "0") == "0":
            print(f"{given.job}: done; this process held at most {runs.peak_memory(runs.choose_device(parameters['device']))}", flush=True)
        if accelerator := _accelerator(parameters):
            accelerator.wait_for_everyone()
            torch.distributed.destroy_process_group()  # else gloo may abort at exit, and NCCL complains
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
