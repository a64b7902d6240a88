"""Training batches per second, made in the loop, by threads ahead of it and by threads in a process of their own.

    python tests/benchmarks/batch_speed.py VOLUMES... [--batch 32] [--steps 120] [--workers 0 1 2 4] [--launches 1000]

Between two batches the loop does what it does beside a GPU: it launches `--launches` small operations. `loop` is how
long that takes, which whoever else wants the interpreter prolongs. The first batch waits for the whole pool; it is
timed by itself. Prints only: the numbers are those of the volumes given.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from gadgets.training import load_volumes
from recon_core.batches import Batches
from recon_core.train import TrainOptions
from recon_core.volumes import SlicePool


def main() -> None:
    """One line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", type=Path, nargs="+")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--launches", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    volumes, options = load_volumes(arguments.volumes), TrainOptions(batch=arguments.batch)
    for workers, elsewhere in ((n, where) for n in arguments.workers for where in ((False, True) if n else (False,))):
        batches = Batches(SlicePool(volumes, options.voxel_mm, options.crop), options.batch)
        first_s, rest_s, loop_s = measure(batches, arguments.steps, workers, elsewhere, arguments.launches)
        where = "in a process of their own" if elsewhere else "beside the loop"
        print(
            f"{workers} threads {where}: first batch {first_s:.1f} s, then {arguments.steps / rest_s:.1f} batches/s, "
            f"loop {1000 * loop_s / arguments.steps:.1f} ms",
            flush=True,
        )


def measure(batches: Batches, steps: int, workers: int, elsewhere: bool, launches: int) -> tuple[float, float, float]:
    """Seconds until the first batch, for `steps` after it, and of the loop's own operations among them."""
    began, loop_s, little = time.perf_counter(), 0.0, torch.zeros(8)
    with batches.ahead(range(steps + 1), workers, elsewhere=elsewhere) as made:
        next(made)
        first = time.perf_counter()
        for _ in made:
            start = time.perf_counter()
            for _ in range(launches):
                little.add_(1)
            loop_s += time.perf_counter() - start
        return first - began, time.perf_counter() - first, loop_s


if __name__ == "__main__":
    main()
