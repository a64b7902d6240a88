"""One setting for every protocol: gain over CG-SENSE, and what tuning the prior's weight by the answer would add.

    python tests/benchmarks/robustness.py VOLUMES... [--coils 1 4 12 32] [--snr 8 20 50] [--accelerations 2 4 8 12]
                                          [--voxel-mm 1 2 4] [--weights 0.35 0.7 1.4]

The rules of VariationalConfig come from this table on heads left out of training; test volumes have no place here. PSNR
of the magnitude inside the object. Every row is kept as it comes; a run goes on with the table of its --name: other
weights, readout or prior want another name.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from problems import Problem, simulated
from scans import read_table, save_table

from recon_core.cg_sense import STRENGTH_AS_IMAGE, cg_sense
from recon_core.metrics import psnr
from recon_core.prior import load_prior
from recon_core.variational import VariationalConfig, reconstruct_variational


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", type=Path, nargs="+")
    parser.add_argument("--coils", type=int, nargs="+", default=[1, 4, 12, 32])
    parser.add_argument("--snr", type=float, nargs="+", default=[8.0, 20.0, 50.0])
    parser.add_argument("--accelerations", type=float, nargs="+", default=[2.0, 4.0, 8.0, 12.0])
    parser.add_argument("--voxel-mm", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.35, 0.7, 1.4])
    parser.add_argument("--readout", type=int, help="only so many readout positions, in the middle of the volume")
    parser.add_argument("--prior", default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="robustness")
    arguments = parser.parse_args()
    axes = (arguments.volumes, arguments.voxel_mm, arguments.coils, arguments.accelerations, arguments.snr)
    prior = load_prior(arguments.prior, arguments.device)
    table = {cell_of(row): row for row in read_table(arguments.name)}
    how = {"readout": arguments.readout, "device": arguments.device}
    for path, voxel_mm, coils, acceleration, snr in itertools.product(*axes):
        acs = 12 if voxel_mm > 3 else 16 if voxel_mm > 1.5 else 24
        try:
            problem = simulated(path, voxel_mm, coils, acceleration, snr, acs, **how)
        except ValueError as error:  # calibration lines alone exceed what the acceleration leaves
            print(path.name, voxel_mm, coils, acceleration, snr, error)
            continue
        if (key := cell_of(problem.facts)) in table:
            continue
        table[key] = run(prior, problem, arguments.weights)
        print("  ".join(f"{k} {v}" for k, v in table[key].items()), flush=True)
        save_table(arguments.name, [table[k] for k in sorted(table)], show=False)
    summarise(list(table.values()), arguments.weights)


def cell_of(row: dict) -> tuple:
    """The protocol of a row of the table, or of a problem's facts.

    Volume, voxel size, coils, acceleration asked for, SNR.
    """
    voxel_mm, coils, acceleration, snr = (float(row[k]) for k in ("voxel_mm", "coils", "R", "snr"))
    return (row["volume"], voxel_mm, coils, float(round(acceleration)), snr)


def run(prior, problem: Problem, weights: list[float]) -> dict:
    """One protocol with every weight."""
    preview = cg_sense(problem.measurement)
    classical = cg_sense(problem.measurement, strength=STRENGTH_AS_IMAGE)
    row = {**problem.facts, "cg": round(psnr(classical.cpu(), problem.truth, problem.inside), 2)}
    for weight in weights:
        config = VariationalConfig(prior_weight=weight)
        for state in reconstruct_variational(problem.measurement, prior, preview, config):
            pass
        row[f"weight {weight:g}"] = round(psnr(state.volume.cpu(), problem.truth, problem.inside), 2)
        row[f"misfit {weight:g}"] = round(problem.measurement.misfit(state.volume), 3)
    return row


def summarise(rows: list[dict], weights: list[float]) -> None:
    """Gain over CG-SENSE and distance from the best weight, for each weight over all rows."""
    rows = [{k: float(v) for k, v in row.items() if k == "cg" or k.startswith("weight ")} for row in rows]
    best = [max(row[f"weight {w:g}"] for w in weights) for row in rows]
    for weight in weights:
        short = [b - row[f"weight {weight:g}"] for b, row in zip(best, rows)]
        gain = [row[f"weight {weight:g}"] - row["cg"] for row in rows]
        print(
            f"weight {weight:g}: gain over CG-SENSE {min(gain):.2f} to {max(gain):.2f} dB, "
            f"median {np.median(gain):.2f}; "
            f"short of the best weight by {np.median(short):.2f} dB in the median, {max(short):.2f} at most"
        )


if __name__ == "__main__":
    main()
