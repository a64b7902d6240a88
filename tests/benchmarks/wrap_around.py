"""Objects that reach beyond the field of view along the phase encodes: one set of coil maps, and two.

    python tests/benchmarks/wrap_around.py VOLUMES...

The field of view is that share of the object's own extent along z or y (1: it just fits), so that the ends of the
object lie over its opposite sides. PSNR of CG-SENSE and of slice diffusion with `small` against the root sum of squares
of the noise-free coils, inside the object; `overlap` is the share of the object that the calibration lines show to lie
over other parts of it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from problems import simulated
from scans import save_table

from recon_core.cg_sense import cg_sense
from recon_core.metrics import psnr
from recon_core.prior import load_prior
from recon_core.variational import reconstruct_variational

COILS, ACCELERATION, SNR, ACS = 8, 6, 30.0, 20
FIELDS_OF_VIEW = [(1.0, 1.0), (1.0, 0.9), (1.0, 0.75), (0.85, 0.85), (0.75, 0.75)]


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volumes", type=Path, nargs="+")
    parser.add_argument("--voxel-mm", type=float, default=3.0)
    arguments = parser.parse_args()
    prior, rows = load_prior("small"), []
    for path in arguments.volumes:
        for shares in FIELDS_OF_VIEW:
            try:
                found = compared(path, arguments.voxel_mm, shares, prior)
            except ValueError as error:  # so small a field of view has no room for the calibration lines
                print(f"{path.name} in {shares}: {error}", flush=True)
                continue
            facts = {"volume": path.name.split(".")[0], "voxel_mm": arguments.voxel_mm}
            rows.append({**facts, "fov_z": shares[0], "fov_y": shares[1], **found})
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
            save_table("wrap_around", rows, show=False)


def compared(path: Path, voxel_mm: float, shares: tuple[float, float], prior) -> dict[str, float | str]:
    """Matrix, overlap and PSNR with one and two sets of maps.

    The field of view is `shares` (z, y) of the object's extent.
    """
    found = {}
    for sets in (1, 2):
        problem = simulated(path, voxel_mm, COILS, ACCELERATION, SNR, ACS, extent=shares, sets=sets)
        scan = problem.measurement
        told = re.search(r"about (\d+)%", " ".join(scan.warnings))
        start = cg_sense(scan)
        for state in reconstruct_variational(scan, prior, start):
            pass
        found |= {"matrix": problem.facts["matrix"], "overlap": int(told[1]) / 100 if told else ""}
        for name, volume in (("cg", start), ("diffusion", state.volume)):
            found[f"{name}_{sets}"] = round(psnr(scan.image_of(volume), problem.truth, problem.inside), 2)
    return found


if __name__ == "__main__":
    main()
