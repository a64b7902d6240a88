"""How strongly the prior should pull: the solver on volumes left out of training, over protocols and weights.

    python tests/benchmarks/prior_weight.py VOLUMES... [--weights 0.25 0.5 1] [--prior small] [--sweeps N]

The default of VariationalConfig.prior_weight comes from this table; test volumes have no place here.
Everyone gets coil maps from the calibration lines and PSNR of the magnitude inside the object.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scans import save_table

from recon_core.cg_sense import cg_sense
from recon_core.fft import fft
from recon_core.measurement import measure
from recon_core.metrics import object_mask, psnr
from recon_core.prior import load_prior
from recon_core.scale import intensity_scale
from recon_core.simulate import coil_sensitivity, sampling_mask, smooth_phase
from recon_core.variational import VariationalConfig, reconstruct_variational
from recon_core.volumes import read_volume, resample

CASES = (  # voxel_mm, coils, acceleration, SNR, ACS
    (2.0, 8, 6, 30.0, 24),
    (3.0, 8, 6, 30.0, 16),
    (3.0, 8, 8, 10.0, 16),
    (3.0, 4, 4, 60.0, 16),
    (3.0, 1, 3, 30.0, 16),
    (3.0, 1, 1, 10.0, 16),
    (4.0, 8, 4, 40.0, 12),
)



def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("volumes", type=Path, nargs="+")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--sweeps", type=int, default=VariationalConfig.sweeps)
    parser.add_argument("--prior", default="small")
    arguments = parser.parse_args()
    prior, rows = load_prior(arguments.prior), []
    for path in arguments.volumes:
        for case in CASES:
            measurement, truth = simulated(path, *case)
            preview, inside = cg_sense(measurement), object_mask(truth)
            row = {"volume": path.name.split(".")[0], **dict(zip(("voxel_mm", "coils", "R", "snr", "acs"), case)), "cg": round(psnr(preview, truth, inside), 2)}
            for weight in arguments.weights:
                config = VariationalConfig(sweeps=arguments.sweeps, prior_weight=weight)
                for state in reconstruct_variational(measurement, prior, preview, config):
                    pass
                row[f"weight {weight:g}"] = round(psnr(state.volume, truth, inside), 2)
                row[f"misfit {weight:g}"] = round(measurement.misfit(state.volume), 3)
            rows.append(row)
            print(row, flush=True)
    path = save_table("prior_weight", rows)
    best = [max(row[f"weight {w:g}"] for w in arguments.weights) for row in rows]
    for weight in arguments.weights:
        short = [b - row[f"weight {weight:g}"] for b, row in zip(best, rows)]
        gain = [row[f"weight {weight:g}"] - row["cg"] for row in rows]
        print(f"weight {weight:g}: gain over CG-SENSE {min(gain):.2f} to {max(gain):.2f} dB; short of the best weight by {np.median(short):.2f} dB in the median, {max(short):.2f} at most")
    print(path)


def simulated(path: Path, voxel_mm: float, coils: int, acceleration: float, snr: float, acs: int):
    """The measurement of a volume, and the noise-free truth [z y x]."""
    volume, size = read_volume(path)
    volume, size = resample(torch.from_numpy(np.asarray(volume, np.float32)), size, [voxel_mm] * 3)
    volume, shape = volume / intensity_scale(volume, size), tuple(volume.shape)
    image = torch.polar(volume, smooth_phase(shape, seed=1))
    fields = torch.stack([coil_sensitivity(i, coils, shape) for i in range(coils)])
    fields = fields / fields.abs().square().sum(0).sqrt().median()
    noise = torch.Generator().manual_seed(0)
    kspace = fft(fields * image, (1, 2))
    kspace = kspace + torch.randn(kspace.shape, dtype=torch.complex64, generator=noise) * 2**0.5 / snr
    lines = torch.randn((coils, 4096), dtype=torch.complex64, generator=noise) * 2**0.5 / snr
    mask = torch.from_numpy(sampling_mask(shape[:2], acceleration, "poisson", acs))
    return measure(kspace * mask[..., None], mask.float(), size, lines), volume * fields.abs().square().sum(0).sqrt()


if __name__ == "__main__":
    main()
