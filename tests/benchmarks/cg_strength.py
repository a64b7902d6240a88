"""The regularisation of CG-SENSE: PSNR with several strengths, on heads left out of training.

    python tests/benchmarks/cg_strength.py HEADS...

Strength s makes lambda = s (noise level / tissue brightness)^2 (recon_core/cg_sense.py). Slabs at 2 and 1 mm; the magnitude inside
the object. Rows are kept as they come.
"""

from __future__ import annotations

import sys
from pathlib import Path

from problems import simulated
from scans import read_table, save_table

from recon_core.cg_sense import cg_sense
from recon_core.metrics import psnr

STRENGTHS = (5, 10, 14, 20, 30, 50)
PROTOCOLS = [  # voxel size, readout positions, and of each: coils, acceleration, SNR, calibration lines
    (4.0, None, [(8, 4, 30, 12), (8, 2, 30, 12), (8, 8, 30, 8), (8, 4, 8, 12), (8, 4, 50, 12), (32, 4, 30, 12), (4, 4, 30, 12), (32, 2, 50, 12), (1, 2, 30, 12)]),
    (2.0, 24, [(8, 8, 30, 20), (8, 4, 30, 20), (8, 12, 30, 20), (8, 2, 50, 20), (32, 8, 20, 20), (8, 8, 10, 20)]),
    (1.0, 12, [(8, 8, 30, 24), (8, 4, 30, 24), (12, 12, 20, 24)]),
]


def main(heads: list[Path]) -> None:
    """Run what the table does not have yet."""
    rows = read_table("cg_strength")
    known = {(row["volume"], *(float(row[k]) for k in ("voxel_mm", "coils", "snr")), round(float(row["R"]))) for row in rows}
    for voxel_mm, readout, scans in PROTOCOLS:
        for coils, acceleration, snr, acs in scans:
            for head in heads:
                if (head.name.split(".")[0], voxel_mm, coils, snr, acceleration) not in known:
                    problem = simulated(head, voxel_mm, coils, acceleration, snr, acs, readout=readout)
                    found = {f"strength {s}": round(psnr(cg_sense(problem.measurement, strength=s), problem.truth, problem.inside), 2) for s in STRENGTHS}
                    rows.append({**problem.facts, **found})
                    print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
                    save_table("cg_strength", rows, show=False)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
