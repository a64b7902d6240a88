"""What the prior believes: slices noised to several levels and drawn back from there.

    python tests/benchmarks/samples.py VOLUME OUT.png [--prior small-white] [--voxel-mm 2] [--sigmas 0.3 0.6 1 2]

From each noise level the probability-flow equation is followed down (Heun steps of arXiv 2206.00364,
algorithm 1); at the largest level hardly anything of the slice is left and the picture is the prior's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from denoising import complex_volume
from matplotlib.figure import Figure
from torch import Tensor

from recon_core.prior import Prior, load_prior


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("volume", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prior", default="small-white")
    parser.add_argument("--voxel-mm", type=float, default=2.0)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.3, 0.6, 1.0, 2.0])
    arguments = parser.parse_args()
    prior = load_prior(arguments.prior)
    if prior.in_function_space:
        parser.error("a prior in function space does not know white noise; take another --prior")
    volume, size = complex_volume(arguments.volume, arguments.voxel_mm)
    figure = Figure(figsize=(2.2 * (1 + 2 * len(arguments.sigmas)), 7))
    axes = figure.subplots(3, 1 + 2 * len(arguments.sigmas))
    for axis, row in enumerate(axes):
        plane = volume.select(axis, volume.shape[axis] // 2)
        clean = torch.view_as_real(plane).permute(2, 0, 1)[None]
        shown = {"clean": clean}
        for sigma in arguments.sigmas:
            random = torch.Generator().manual_seed(axis)
            shown[f"+ noise {sigma:g}"] = clean + sigma * torch.randn(clean.shape, generator=random)
            shown[f"drawn from {sigma:g}"] = sample(prior, shown[f"+ noise {sigma:g}"], sigma)
        aspect = "auto" if axis and max(size) > 1.5 * min(size) else None
        for ax, (title, image) in zip(row, shown.items()):
            ax.imshow(np.flipud(image[0].norm(dim=0)), cmap="gray", vmin=0, vmax=1.8, aspect=aspect)
            ax.set_title(title, fontsize=8)
            ax.axis("off")
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=80)


def sample(prior: Prior, noisy: Tensor, sigma: float, steps: int = 24, lowest: float = 0.01) -> Tensor:
    """Follow dx/dsigma = (x - D(x, sigma)) / sigma from `noisy` [slices 2 h w] down to `lowest`."""
    levels = [*np.geomspace(sigma, lowest, steps), 0.0]
    x = noisy
    with torch.no_grad():
        for now, then in zip(levels, levels[1:]):
            slope = (x - prior(x, now)) / now
            guess = x + (then - now) * slope
            x = guess if then == 0 else x + (then - now) * (slope + (guess - prior(guess, then)) / then) / 2
    return x


if __name__ == "__main__":
    main()
