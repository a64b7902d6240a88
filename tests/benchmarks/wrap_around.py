"""Objects that reach beyond the field of view along the phase encodes: one set of coil maps, and two.

    python tests/benchmarks/wrap_around.py VOLUMES...

The field of view is that share of the object's own extent along z or y (1: it just fits), so that the ends of the object lie over
its opposite sides. PSNR of CG-SENSE and of slice diffusion with `small` against the root sum of squares of the noise-free coils,
inside the object; `overlap` is the share of the object that the calibration lines show to lie over other parts of it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from scans import save_table
from torch import Tensor

from gadgets.simulation.scan import Noise, SimulateOptions, coil_images, load_object
from recon_core.cg_sense import cg_sense
from recon_core.fft import fft
from recon_core.measure import measure
from recon_core.metrics import object_mask, psnr
from recon_core.prior import load_prior
from recon_core.scale import intensity_scale
from recon_core.simulate import sampling_mask
from recon_core.variational import reconstruct_variational

COILS, ACCELERATION, SNR, ACS = 8, 6, 30.0, 20
EDGE = 0.1  # of the brightest voxel: where an object ends
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
            images, size = seen(path, arguments.voxel_mm, shares)
            try:
                found = compared(images, size, prior)
            except ValueError as error:  # so small a field of view has no room for the calibration lines
                print(f"{path.name} in {shares}: {error}", flush=True)
                continue
            rows.append({"volume": path.name.split(".")[0], "voxel_mm": arguments.voxel_mm, "fov_z": shares[0], "fov_y": shares[1]} | found)
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
            save_table("wrap_around", rows, show=False)


def seen(path: Path, voxel_mm: float, shares: tuple[float, float]) -> tuple[Tensor, tuple[float, float, float]]:
    """Coil images [coils z y x] in a field of view of `shares` (z, y) of the object's extent, and the voxel size."""
    data, size, _, _ = load_object(path)
    images, size = coil_images(data, size, SimulateOptions(voxel_mm=voxel_mm, coils=COILS, seed=0))
    for axis, share in enumerate(shares, start=1):
        profile = images.norm(dim=0).amax(dim=[a for a in range(3) if a != axis - 1])
        there = (profile > EDGE * profile.max()).nonzero()[:, 0]
        extent = int(there[-1] - there[0]) + 1
        images = wrapped(images.narrow(axis, int(there[0]), extent), axis, int(share * extent) // 2 * 2)
    return images, size


def wrapped(images: Tensor, axis: int, length: int) -> Tensor:
    """`images` in the middle of a field of view of `length` voxels along `axis`, whatever lies beyond it added at the opposite side."""
    out = images.new_zeros([length if a == axis else n for a, n in enumerate(images.shape)])
    place = torch.arange(images.shape[axis]) - images.shape[axis] // 2 + length // 2
    return out.index_add_(axis, place % length, images)


def compared(images: Tensor, size: tuple[float, float, float], prior) -> dict[str, float | str]:
    """Matrix, overlap and PSNR with one and two sets of maps."""
    truth = images.norm(dim=0)
    inside, noise = object_mask(truth), Noise(COILS, intensity_scale(truth, size) / SNR, 0)
    mask = torch.from_numpy(sampling_mask(truth.shape[:2], ACCELERATION, "poisson", ACS))
    kspace = fft(images, (1, 2)) * mask[..., None]
    kspace[:, mask] += torch.from_numpy(noise.draw(int(mask.sum()) * truth.shape[2]).reshape(COILS, -1, truth.shape[2]))
    lines, found = torch.from_numpy(noise.draw(4096)), {"matrix": "x".join(map(str, reversed(truth.shape)))}
    for sets in (1, 2):
        scan = measure(kspace, mask.float(), size, lines, sets=sets)
        told = re.search(r"about (\d+)%", " ".join(scan.warnings))
        start = cg_sense(scan)
        for state in reconstruct_variational(scan, prior, start):
            pass
        scores = {"cg": start, "diffusion": state.volume}
        found |= {"overlap": int(told[1]) / 100 if told else ""} | {f"{name}_{sets}": round(psnr(scan.image_of(volume), truth, inside), 2) for name, volume in scores.items()}
    return found


if __name__ == "__main__":
    main()
