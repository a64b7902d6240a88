"""The regularisation of CG-SENSE: PSNR with several strengths, on heads left out of training.

    python tests/benchmarks/cg_strength.py HEADS...

Strength s makes lambda = s (noise level / tissue brightness)^2 (recon_core/cg_sense.py). Slabs at 2 and 1 mm; the
magnitude inside the object. Rows are kept as they come.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from problems import simulated
from scans import read_table, save_table

from recon_core.cg_sense import cg_sense
from recon_core.metrics import psnr

STRENGTHS = (5, 10, 14, 20, 30, 50)
PROTOCOLS = [  # voxel size, readout positions, and of each: coils, acceleration, SNR, calibration lines
    (4.0, None, [(8, 4, 30, 12), (8, 2, 30, 12), (8, 8, 30, 8), (8, 4, 8, 12), (8, 4, 50, 12)]),
    (4.0, None, [(32, 4, 30, 12), (4, 4, 30, 12), (32, 2, 50, 12), (1, 2, 30, 12)]),
    (2.0, 24, [(8, 8, 30, 20), (8, 4, 30, 20), (8, 12, 30, 20), (8, 2, 50, 20), (32, 8, 20, 20), (8, 8, 10, 20)]),
    (1.0, 12, [(8, 8, 30, 24), (8, 4, 30, 24), (12, 12, 20, 24)]),
]


def main() -> None:
    """Run what the table does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", type=Path, nargs="+")
    heads = parser.parse_args().heads
    table = {protocol(row): row for row in read_table("cg_strength")}
    for voxel_mm, readout, scans in PROTOCOLS:
        for coils, acceleration, snr, acs in scans:
            for head in heads:
                problem = simulated(head, voxel_mm, coils, acceleration, snr, acs, readout=readout)
                if (key := protocol(problem.facts)) in table:
                    continue
                found = {}
                for s in STRENGTHS:
                    image = cg_sense(problem.measurement, strength=s)
                    found[f"strength {s}"] = round(psnr(image, problem.truth, problem.inside), 2)
                table[key] = {**problem.facts, **found}
                print("  ".join(f"{k} {v}" for k, v in table[key].items()), flush=True)
                save_table("cg_strength", list(table.values()), show=False)


def protocol(row: dict) -> tuple:
    """What tells the rows apart, of a row as it was read or of a problem's facts."""
    return (row["volume"], *(float(row[k]) for k in ("voxel_mm", "coils", "R", "snr")))


if __name__ == "__main__":
    main()
