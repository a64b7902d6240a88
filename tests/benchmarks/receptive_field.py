"""How far the prior looks: the radius that holds most of a denoised pixel's dependence on the noisy slice.

    python tests/benchmarks/receptive_field.py VOLUME [--prior small] [--voxel-mm 2] [--pixels 24]

For pixels of tissue in the middle slices of three orientations: squared gradient of the denoised pixel with respect to
the noisy slice, summed over rings around it; results/receptive_field.csv has the radii that hold 50, 90 and 99 %.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from denoising import complex_volume
from scans import save_table
from torch import Tensor

from recon_core.prior import Prior, load_prior

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
SHARES = (0.5, 0.9, 0.99)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path)
    parser.add_argument("--prior", default="small")
    parser.add_argument("--voxel-mm", type=float, default=2.0)
    parser.add_argument("--pixels", type=int, default=24, help="per noise level")
    arguments = parser.parse_args()
    prior, rows = load_prior(arguments.prior, half=False), []
    volume, _ = complex_volume(arguments.volume, arguments.voxel_mm)
    for sigma in SIGMAS:
        random = torch.Generator().manual_seed(0)
        rings = sum(ring_energy(prior, volume, sigma, n % 3, random) for n in range(arguments.pixels))
        held = rings.cumsum(0) / rings.sum()
        pixels = {f"pixels_{share:.0%}": int((held < share).sum()) for share in SHARES}
        rows.append({"voxel_mm": arguments.voxel_mm, "sigma": sigma, **pixels})
    print(save_table("receptive_field", rows))


def ring_energy(prior: Prior, volume: Tensor, sigma: float, axis: int, random: torch.Generator) -> Tensor:
    """Squared gradient per distance in whole pixels from a random pixel of tissue."""
    plane = volume.select(axis, volume.shape[axis] // 2)
    tissue = (plane.abs() > 0.5).nonzero()
    y, x = tissue[int(torch.randint(len(tissue), (), generator=random))].tolist()
    clean = torch.view_as_real(plane).permute(2, 0, 1)[None]
    noisy = (clean + sigma * torch.randn(clean.shape, generator=random)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(prior(noisy, sigma)[0, 0, y, x], noisy)
    height, width = plane.shape
    distance = torch.hypot(torch.arange(height)[:, None] - y, (torch.arange(width) - x).float()).round().long()
    return torch.zeros(2 * max(volume.shape)).index_add_(0, distance.flatten(), gradient[0].square().sum(0).flatten())


if __name__ == "__main__":
    main()
