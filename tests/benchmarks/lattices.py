"""Regular undersampling whose calibration is a scan of its own: CG-SENSE and slice diffusion.

Both with the image of the calibration and without.

    python tests/benchmarks/lattices.py gadgets/example/head_2mm.nii.gz

The volume is seen by 8 coils at --voxel-mm and each --snr, 30 readout positions. Lattices have k = 0 on them or as far
from them as can be (`offset`, lines); the calibration is 20 x 20 lines of the same contrast, of another one with
inverted brightness, or with another phase, as another echo time makes it: 3 radians from the middle to the edge along
both phase encodes (`calibration`). `pulls` says what Tikhonov's term pulls towards, and where the conjugate gradients
begin: the calibration's image (the default) or, as for other scans, zero. Written to results/lattices.csv: PSNR inside
the object, and the brightness there over the true one, of CG-SENSE and of slice diffusion after it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from problems import middle
from scans import save_table
from torch import Tensor

from gadgets.simulation.scan import Noise, SimulateOptions, coil_images, load_object
from recon_core.cg_sense import cg_sense
from recon_core.fft import centre_block, fft
from recon_core.measure import measure
from recon_core.measurement import Measurement
from recon_core.metrics import object_mask, psnr
from recon_core.prior import load_prior
from recon_core.scale import intensity_scale
from recon_core.variational import reconstruct_variational

COILS, READOUT, ACS = 8, 30, (20, 20)
LATTICES = [
    ((1, 2), (0, 1)),
    ((1, 3), (0, 1)),
    ((2, 2), (0, 0)),
    ((2, 2), (1, 1)),
    ((1, 4), (0, 0)),
    ((1, 4), (0, 2)),
    ((2, 3), (1, 1)),
]


def main() -> None:
    """Measure and print all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path)
    parser.add_argument("--voxel-mm", type=float, default=3.0)
    parser.add_argument("--snr", type=float, nargs="+", default=[30.0, 10.0])
    arguments = parser.parse_args()
    prior, rows = load_prior("small"), []
    calibrations = ("same contrast", "another contrast", "another phase")
    for snr, calibration, (steps, offset) in product(arguments.snr, calibrations, LATTICES):
        scan, whole, truth = separately_calibrated(
            arguments.volume, arguments.voxel_mm, snr, steps, offset, calibration
        )
        for pulls, there in (("calibration", scan), ("zero", replace(scan, calibrated=None))):
            row = {
                "volume": arguments.volume.name.split(".")[0],
                "voxel_mm": arguments.voxel_mm,
                "snr": snr,
                "coils": COILS,
                "lattice": "x".join(map(str, steps)),
                "offset": "x".join(map(str, offset)),
                "calibration": calibration,
                "pulls": pulls,
            }
            start = cg_sense(there)
            for state in reconstruct_variational(there, prior, start):
                pass
            rows.append(row | judged("cg", start, whole, truth) | judged("diffusion", state.volume, whole, truth))
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    save_table("lattices", rows)


def separately_calibrated(
    path: Path, voxel_mm: float, snr: float, steps: tuple[int, int], offset: tuple[int, int], calibration: str
) -> tuple[Measurement, Tensor, Tensor]:
    """Every so many-th line (z, y), `offset` lines away from k = 0, and its calibration.

    Also CG-SENSE of all lines, and the true magnitude [z y x].
    """
    data, size, _, _ = load_object(path)
    images, size = coil_images(data, size, SimulateOptions(voxel_mm=voxel_mm, coils=COILS, seed=0))
    images = images[..., middle(images.shape[3], READOUT)].contiguous()
    truth = images.norm(dim=0)
    noise = Noise(COILS, intensity_scale(truth, size) / snr, 0)
    noisy = lambda coils: fft(coils, (1, 2)) + torch.from_numpy(noise.draw(truth.numel()).reshape(COILS, *truth.shape))
    lattice = torch.zeros(truth.shape[:2])
    lattice[tuple(slice((n // 2 + away) % step, None, step) for n, step, away in zip(lattice.shape, steps, offset))] = 1
    square = centre_block(lattice.shape, ACS).float()
    changes = {
        "another contrast": (1 - truth / truth.max()).square(),
        "another phase": other_phase(truth.shape[:2])[..., None],
    }
    separate = noisy(images * changes.get(calibration, 1)) * square[..., None]
    lines, kspace, calibrated = torch.from_numpy(noise.draw(4096)), noisy(images), (separate, square)
    scan = measure(kspace * lattice[..., None], lattice, size, lines, calibrated)
    return scan, cg_sense(measure(kspace, torch.ones_like(lattice), size, lines, calibrated)), truth


def other_phase(shape: tuple[int, int]) -> Tensor:
    """exp(i 3 (z^2 + y)) [z y], z and y from -1 to 1."""
    z, y = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    return torch.exp(3j * (z**2 + y))


def judged(name: str, image: Tensor, whole: Tensor, truth: Tensor) -> dict:
    """PSNR of an image, and its brightness over that of the image of all lines."""
    inside = object_mask(truth)
    like = lambda volume: float((volume.abs() * truth)[inside].sum())
    return {
        f"{name} psnr": round(psnr(image, truth, inside), 2),
        f"{name} brightness": round(like(image) / like(whole), 3),
    }


if __name__ == "__main__":
    main()
