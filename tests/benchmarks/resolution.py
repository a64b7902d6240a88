"""A prior of one voxel size, a prior of all, and what is tried in place of the latter: interpolation, neural fields, Gaussians.

    python tests/benchmarks/resolution.py VOLUME --one ONE.safetensors --all ALL.safetensors [--voxel-mm 1 2 4] [--one-mm 2]

The two priors are trained alike but for the voxel sizes (`slicediff train` with `voxel_mm` in a --config file). Slice
diffusion, and the method as published on voxels, with each; then, with the prior of one size, the published method on
representations that let the prior see the volume in voxels of its own size. Slabs in the middle of the volume, so that a
CPU can do it; PSNR of the magnitude inside the object.
Rows are kept as they come; a run goes on with the table of its --name, and one with another --one and --one-mm adds to it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from problems import Problem, simulated
from scans import read_table, save_table

from recon_core.cg_sense import cg_sense
from recon_core.methods import METHODS
from recon_core.metrics import psnr
from recon_core.prior import load_prior

WAYS = {  # method, whether the prior sees voxels of the size it knows
    "slice diffusion": ("diffusion", False),
    "as published": ("faithful", False),
    "interpolated": ("faithful", True),
    "neural field": ("field", True),
    "Gaussians": ("gaussians", True),
}
PROTOCOLS = {4.0: (4.0, 12, 24), 2.0: (8.0, 20, 48), 1.0: (8.0, 24, 32)}  # voxel size: acceleration, calibration lines, readout positions


def main() -> None:
    """Run what the table does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path)
    parser.add_argument("--one", type=Path, required=True, help="prior trained on one voxel size")
    parser.add_argument("--all", type=Path, required=True, help="prior trained on many")
    parser.add_argument("--one-mm", type=float, default=2.0, help="the one voxel size")
    parser.add_argument("--voxel-mm", type=float, nargs="+", default=[4.0, 2.0, 1.0], choices=list(PROTOCOLS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="resolution")
    arguments = parser.parse_args()
    table = {(row["volume"], float(row["voxel_mm"]), row["way"], row["prior"]): row for row in read_table(arguments.name)}
    one = f"{arguments.one_mm:g} mm"
    priors = {one: load_prior(arguments.one, arguments.device), "all": load_prior(arguments.all, arguments.device)}
    for voxel_mm in arguments.voxel_mm:
        acceleration, acs, readout = PROTOCOLS[voxel_mm]
        problem = simulated(arguments.volume, voxel_mm, 8, acceleration, 30.0, acs, readout=readout, device=arguments.device)
        for way in arguments.ways:
            resamples = WAYS[way][1]
            for name in (one,) if resamples else priors:
                key = (problem.facts["volume"], voxel_mm, way, name)
                if key in table or (way == "interpolated" and voxel_mm == arguments.one_mm):
                    continue
                table[key] = run(problem, way, priors[name], arguments.one_mm if resamples else 0.0) | {"prior": name}
                print("  ".join(f"{k} {v}" for k, v in table[key].items()), flush=True)
                save_table(arguments.name, list(table.values()), show=False)


def run(problem: Problem, way: str, prior, prior_voxel_mm: float) -> dict:
    """One reconstruction."""
    method = METHODS[WAYS[way][0]]
    config = replace(method.config, prior_voxel_mm=prior_voxel_mm) if prior_voxel_mm else method.config
    start, began = cg_sense(problem.measurement), time.monotonic()
    for state in method.run(problem.measurement, prior, start, config, 0):
        pass
    found = {"way": way, "cg": round(psnr(start.cpu(), problem.truth, problem.inside), 2), "psnr": round(psnr(state.volume.cpu(), problem.truth, problem.inside), 2)}
    return {**problem.facts, **found, "evaluations": state.network_evaluations, "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    main()
