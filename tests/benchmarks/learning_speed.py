"""Seconds of a round in which a prior learns from a single plane, and of one that evaluates the network twice a sweep.

    python tests/benchmarks/learning_speed.py [VOLUME] [--voxel-mm 2] [--priors small base] [--rounds 3]

Learning takes the evaluation that a sweep makes anyway; `twice` makes another one for it, as a solver that knows
nothing of learning would have to. Both learn the same, in turns, on the scan's own mesh and on the finer one (`all` is
a pair of rounds).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from unittest import mock

import torch
from problems import simulated
from scans import save_table

import gadgets
from recon_core import pupil
from recon_core.cg_sense import cg_sense
from recon_core.prior import load_prior
from recon_core.pupil import Pupil
from recon_core.variational import VariationalConfig, denoise_in_pose

EXAMPLE = Path(gadgets.__file__).parent / "example" / "head_2mm.nii.gz"
once = pupil._keeping_graph


def twice(given, volume, *how) -> int:
    """The sweep's evaluation and, of the same slices, that which is learned from."""
    sweep = volume.clone()
    denoise_in_pose(sweep, *how)
    spent = once(given, volume, *how)
    volume.copy_(sweep)
    return spent


def main() -> None:
    """Print the table and write it to results/learning_speed_<device>.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path, nargs="?", default=EXAMPLE)
    parser.add_argument("--voxel-mm", type=float, default=2.0)
    parser.add_argument("--priors", nargs="+", default=["small", "base"])
    parser.add_argument("--rounds", type=int, default=3, help="on each mesh, of which the least counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    how = {"readout": 1, "device": arguments.device}
    problem, rows = simulated(arguments.volume, arguments.voxel_mm, 8, 8.0, 30.0, 20, **how), []
    for name in arguments.priors:
        prior, start = load_prior(name, arguments.device), cg_sense(problem.measurement)
        pupils = {way: Pupil(problem.measurement, prior, start, VariationalConfig(), 0) for way in (once, twice)}
        seconds = {way: [[], []] for way in pupils}
        for number in range(2 * (1 + arguments.rounds)):
            for way, learner in pupils.items():
                with mock.patch.object(pupil, "_keeping_graph", way):
                    began = time.perf_counter()
                    learner.learn()
                    if arguments.device == "cuda":
                        torch.cuda.synchronize()
                    seconds[way][number % 2].append(time.perf_counter() - began)
        least = {way: [min(taken[1:]) for taken in meshes] for way, meshes in seconds.items()}  # the first warms up
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        facts = {"device": device, "matrix": problem.facts["matrix"], "coils": 8, "prior": name}
        costs = {
            "own_mesh_s": least[once][0],
            "finer_mesh_s": least[once][1],
            "all_s": sum(least[once]),
            "twice_all_s": sum(least[twice]),
        }
        facts |= {k: round(v, 3) for k, v in costs.items()}
        rows.append({**facts, "ratio": round(sum(least[once]) / sum(least[twice]), 2)})
    print(save_table(f"learning_speed_{arguments.device}", rows))


if __name__ == "__main__":
    main()
