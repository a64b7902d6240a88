"""Training batches per second, made in the loop and by threads ahead of it, beside what a network would take.

    python tests/benchmarks/batch_speed.py VOLUMES... [--batch 32] [--steps 120] [--workers 0 1 2 4] [--network-ms 12]

`--network-ms` is how long the loop does nothing between two batches, as it does while a GPU computes a step. The
first batch waits for the whole pool; it is timed by itself. Prints only: the numbers are those of the volumes given.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from gadgets.training import load_volumes
from recon_core.train import TrainOptions, draw_batch
from recon_core.volumes import SlicePool


def main() -> None:
    """One line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", type=Path, nargs="+")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--network-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    volumes, options = load_volumes(arguments.volumes), TrainOptions(batch=arguments.batch)
    for workers in arguments.workers:
        pool = SlicePool(volumes, options.voxel_mm, options.crop)
        first_s, rest_s = measure(pool, options, arguments.steps, workers, arguments.network_ms / 1000)
        volumes_per_s = arguments.steps / pool.refresh / rest_s
        print(f"workers {workers}  first batch {first_s:.1f} s, then {arguments.steps / rest_s:.1f} batches/s ({volumes_per_s:.2f} volumes/s)", flush=True)


def measure(pool: SlicePool, options: TrainOptions, steps: int, workers: int, network_s: float) -> tuple[float, float]:
    """Seconds until the first batch, and for `steps` after it."""
    began = time.perf_counter()
    with pool.ahead(lambda step: draw_batch(pool, step, options), range(steps + 1), workers) as batches:
        next(batches)
        first = time.perf_counter()
        for _ in batches:
            time.sleep(network_s)
        return first - began, time.perf_counter() - first


if __name__ == "__main__":
    main()
