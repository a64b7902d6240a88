"""Volumes of one scan that are single planes or thin slabs: each learned from by itself, and as a series.

A series hands on what it has learned.

    python tests/benchmarks/series.py HEAD [--raw FOLDER] [--repetitions 4]

Repetitions: the middle readout positions of the head at 2 mm, 8 coils, R = 6, SNR 20, each with a sampling pattern and
noise of its own. With --raw also the measured plane of two flip angles at R = 8. PSNR inside the object of the first
image and after learning, and the seconds in between.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from problems import Problem, measured, simulated
from scans import save_table

from recon_core.adaptation import AdaptedConfig, reconstruct_adapted
from recon_core.cg_sense import cg_sense
from recon_core.metrics import psnr
from recon_core.prior import load_prior

POSITIONS = (1, 8)  # along the readout


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", type=Path)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--repetitions", type=int, default=4)
    arguments = parser.parse_args()
    scans, seeds = [], range(arguments.repetitions)
    for readout in POSITIONS:
        scans.append([simulated(arguments.head, 2.0, 8, 6, 20.0, 20, seed=seed, readout=readout) for seed in seeds])
    if arguments.raw:
        planes = (p for p in measured(arguments.raw) if p.facts["volume"].startswith("brain_13ch"))
        scans.append([plane for plane in planes if plane.facts["R"] == 8])
    rows = []
    for scan in scans:
        for row in compared(scan):
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            save_table("series", rows, show=False)


def compared(scan: list[Problem]) -> Iterator[dict]:
    """A row for each volume of a scan."""
    prior, learned = load_prior("small"), None
    for number, problem in enumerate(scan):
        alone, taught = image_of(problem, prior, None)
        series, taught = (alone, taught) if number == 0 else image_of(problem, prior, learned)
        learned = learned if taught is None else taught
        yield problem.facts | {
            "number": number,
            "first": alone[0],
            "alone": alone[1],
            "alone_s": alone[2],
            "series": series[1],
            "series_s": series[2],
        }


def image_of(
    problem: Problem, prior: torch.nn.Module, learned: torch.nn.Module | None
) -> tuple[tuple[float, float, float], torch.nn.Module | None]:
    """PSNR of the first and of the last image and the seconds between them; and what was learned.

    Learning begins with `learned`, if given.
    """
    measurement = problem.measurement
    score = lambda state: round(psnr(measurement.image_of(state.volume), problem.truth, problem.inside), 2)
    config = AdaptedConfig(learned=learned)
    for state in reconstruct_adapted(measurement, prior, cg_sense(measurement), config):
        if state.sweep == config.sweeps:
            first, began = score(state), time.perf_counter()
    return (first, score(state), round(time.perf_counter() - began, 1)), state.learned


if __name__ == "__main__":
    main()
