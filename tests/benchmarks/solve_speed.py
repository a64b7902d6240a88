"""Seconds of the whole default reconstruction by stage, how they grow with the volume, and beside BART's l1-wavelet.

    python tests/benchmarks/solve_speed.py [--sizes 64 96 128 192] [--coils 8] [--beside-bart 96] [--device cpu]

A phantom in a cube, Poisson disc R = 4, noise lines. Stages: gathered k-space to coil maps and A^H y, CG-SENSE, 12
sweeps. BART: ecalib and `pics -R W:7:0:0.01 -i 50` on the same data. One run each after a small one that warms up.
`peak_over_kspace` is the memory beside the k-space of all coils, in units of it (on a GPU, of its own memory).
"""

from __future__ import annotations

import argparse
import time

import bart
import torch
from bench import Meter
from scans import save_table
from torch import Tensor

from recon_core.cg_sense import cg_sense
from recon_core.fft import fft
from recon_core.measure import measure
from recon_core.prior import load_prior
from recon_core.simulate import coil_sensitivity, phantom, sampling_mask
from recon_core.variational import reconstruct_variational

ACCELERATION, ACS = 4, 20


def main() -> None:
    """Print the table; results/solve_speed_<device>.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 192])
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--beside-bart", type=int, default=96, help="side of the cube that BART gets too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    prior, rows = load_prior("small", arguments.device), []
    ours(prior, *scan(48, arguments.coils), arguments.device)
    for side in arguments.sizes:
        kspace, mask, noise = scan(side, arguments.coils)
        row = {
            "side": side,
            "coils": arguments.coils,
            **ours(prior, kspace, mask, noise, arguments.device),
            "bart_s": "",
            "ours_over_bart": "",
        }
        row["peak_over_kspace"] = round(row.pop("peak_gib") * 2**30 / (8 * kspace.numel()), 2)
        row["us_per_voxel"] = round(1e6 * row["total_s"] / side**3, 2)
        if side == arguments.beside_bart and bart.available():
            row["bart_s"] = round(bart.wavelet(kspace, [0.01], acs=ACS)[0.01][1]["seconds"], 2)
            row["ours_over_bart"] = round(row["total_s"] / row["bart_s"], 2)
        rows.append(row)
        print(row, flush=True)
    print(save_table(f"solve_speed_{arguments.device}", rows))


def scan(side: int, coils: int) -> tuple[Tensor, Tensor, Tensor]:
    """k-space [coils z y x] (x in image space), mask [z y] and noise [coils samples] of a phantom in a cube."""
    shape, random = (side,) * 3, torch.Generator().manual_seed(0)
    mask = torch.from_numpy(sampling_mask(shape[:2], ACCELERATION, "poisson", ACS)).float()
    images = torch.stack([coil_sensitivity(c, coils, shape) for c in range(coils)]).mul_(phantom(shape))
    noise = lambda *size: 0.03 * torch.randn(size, dtype=torch.complex64, generator=random)
    return fft(images, (1, 2)).add_(noise(*images.shape)).mul_(mask[..., None]), mask, noise(coils, 4096)


def ours(prior, kspace: Tensor, mask: Tensor, noise: Tensor, device: str) -> dict[str, float]:
    """Seconds of each stage and of all."""
    with Meter(torch.device(device)) as meter:
        times = [clock(device)]
        measurement = measure(kspace, mask, (2.0, 2.0, 2.0), noise, device=device)
        times.append(clock(device))
        preview = cg_sense(measurement)
        times.append(clock(device))
        for _ in reconstruct_variational(measurement, prior, preview):
            pass
        times.append(clock(device))
    stages = {name: round(b - a, 2) for name, a, b in zip(("maps_s", "preview_s", "sweeps_s"), times, times[1:])}
    return {**stages, "total_s": round(times[-1] - times[0], 2), "peak_gib": meter.costs["peak_gib"]}


def clock(device: str) -> float:
    """Seconds, once the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
