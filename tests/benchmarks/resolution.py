"""A prior of one voxel size, a prior of all, and what is tried in place of the latter.

In its place: interpolation, neural fields, Gaussians, function space.

    python tests/benchmarks/resolution.py VOLUME --one ONE.safetensors --all ALL.safetensors [--voxel-mm 1 2 4]
                                          [--one-mm 2]

The two priors are trained alike but for the voxel sizes (`slicediff train` with `voxel_mm` in a --config file). Slice
diffusion, and the method as published on voxels, with each; then, with the prior of one size, the published method on
representations that let the prior see the volume in voxels of its own size, and with the shipped prior in function
space, which was trained on voxels of 2 mm and is told those of the scan. Slabs in the middle of the volume, so that a
CPU can do it; PSNR of the magnitude inside the object. Rows are kept as they come; a run goes on with the table of its
--name, and one with another --one and --one-mm adds to it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from problems import Problem, simulated
from scans import read_table, save_table

from recon_core.cg_sense import STRENGTH_AS_IMAGE, cg_sense
from recon_core.methods import METHODS, Method
from recon_core.metrics import psnr
from recon_core.prior import load_prior

WAYS = {  # method, its priors, whether they see voxels of the size they know
    "slice diffusion": ("diffusion", ("one", "all"), False),
    "as published": ("faithful", ("one", "all"), False),
    "interpolated": ("faithful", ("one",), True),
    "neural field": ("field", ("one",), True),
    "Gaussians": ("gaussians", ("one",), True),
    "function space": ("operator", ("operator",), False),
}
# voxel size: acceleration, calibration lines, readout positions
PROTOCOLS = {4.0: (4.0, 12, 24), 2.0: (8.0, 20, 48), 1.0: (8.0, 24, 32)}


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
    table = {}
    for row in read_table(arguments.name):
        table[row["volume"], float(row["voxel_mm"]), row["way"], row["prior"]] = row
    paths = {"one": arguments.one, "all": arguments.all, "operator": "operator"}
    priors = {name: load_prior(path, arguments.device) for name, path in paths.items()}
    for voxel_mm in arguments.voxel_mm:
        acceleration, acs, readout = PROTOCOLS[voxel_mm]
        how = {"readout": readout, "device": arguments.device}
        problem = simulated(arguments.volume, voxel_mm, 8, acceleration, 30.0, acs, **how)
        for way in arguments.ways:
            method, known, resamples = WAYS[way]
            for name in known:
                label = f"{arguments.one_mm:g} mm" if name == "one" else name
                key = (problem.facts["volume"], problem.facts["voxel_mm"], way, label)
                if key in table or (way == "interpolated" and voxel_mm == arguments.one_mm):
                    continue
                found = run(problem, METHODS[method], priors[name], arguments.one_mm if resamples else 0.0)
                table[key] = {**problem.facts, "way": way, **found, "prior": label}
                print("  ".join(f"{k} {v}" for k, v in table[key].items()), flush=True)
                save_table(arguments.name, list(table.values()), show=False)


def run(problem: Problem, method: Method, prior, prior_voxel_mm: float) -> dict:
    """One reconstruction."""
    config = replace(method.config, prior_voxel_mm=prior_voxel_mm) if prior_voxel_mm else method.config
    start, began = cg_sense(problem.measurement), time.monotonic()
    for state in method.run(problem.measurement, prior, start, config, 0):
        pass
    classical = cg_sense(problem.measurement, strength=STRENGTH_AS_IMAGE)
    score = lambda volume: round(psnr(volume.cpu(), problem.truth, problem.inside), 2)
    found = {"cg": score(classical), "psnr": score(state.volume)}
    return {**found, "evaluations": state.network_evaluations, "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    main()
