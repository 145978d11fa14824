"""Working off many cells of a study in several processes, from the shell, within a budget."""

import argparse
import multiprocessing
import os
import sys
import time

import torch


class Workers:
    """`workers(function, arguments)` yields (number, result) of each as it comes.

    From n processes, with a thread each, or from here.
    """

    def __init__(self, n: int):
        self.n = n

    def __enter__(self):
        self.pool = None
        if self.n > 1:
            os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
            spawn = multiprocessing.get_context("spawn")
            self.pool = spawn.Pool(self.n, torch.set_num_threads, (1,))
        return self

    def __call__(self, function, arguments: list):
        calls = [(i, function, *a) for i, a in enumerate(arguments)]
        return self.pool.imap_unordered(_call, calls) if self.pool else map(_call, calls)

    def __exit__(self, *error):
        if self.pool:
            self.pool.terminate()


def _call(call: tuple):
    i, function, *arguments = call
    return i, function(*arguments)


def work_off(workers: Workers, function, arguments: list, sizes: list | None = None) -> None:
    """Print the line that each call returns, with the minutes that what is left will take.

    `sizes`: how long each takes, in any unit, if not all alike. A call without a line was not made.
    """
    sizes, start, done = sizes or [1] * len(arguments), time.perf_counter(), 0
    for n, (i, line) in enumerate(filter(lambda found: found[1], workers(function, arguments)), 1):
        done += sizes[i]
        left = (time.perf_counter() - start) / done * (sum(sizes) - done) / 60
        print(f"[{n}/{len(arguments)}] {line}; {left:.0f} min left", flush=True)


def command(module: str, told: str, load, run) -> None:
    """The shell's command for a study: `run` what `load` reads, or say in a sentence why not."""
    parser = argparse.ArgumentParser(f"python -m helpers.run.{module}", description=told)
    parser.add_argument("sweep", help="a file in notebooks/parameters/sweeps, or a path to one")
    n = 1 if torch.cuda.is_available() else os.cpu_count()
    words = f"with a thread each, if several (here {n})"
    parser.add_argument("--processes", type=int, default=n, help=words)
    words = "seconds after which no cell is begun"
    parser.add_argument("--budget", type=float, default=float("inf"), help=words)
    given = parser.parse_args()
    try:
        print(f"wrote {run(load(given.sweep), given.processes, given.budget)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
