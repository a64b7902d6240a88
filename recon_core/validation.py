"""How well a prior denoises volumes that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .prior import Prior
from .volumes import SlicePool, Volume


class Validation:
    """Denoising of a fixed set of held-out slices, per voxel size and noise level."""

    VOXEL_MM = (1.0, 2.0, 4.0)
    SIGMAS = (0.05, 0.2)

    def __init__(self, volumes: Sequence[Volume], seed: int):
        self.slices: dict[float, Tensor] = {}
        for mm in self.VOXEL_MM:
            slices, drawn_mm = SlicePool(volumes, (mm, mm), crop=96, size=6, seed=seed).batch(0, 12)
            # within what whole matrix sizes allow; coarser volumes keep their voxel size and say nothing about this one
            fine = drawn_mm < 1.2 * mm
            if bool(fine.any()):
                self.slices[mm] = slices[fine]
        self.slices = self.slices or {round(float(drawn_mm.max()), 1): slices}

    def measure(self, prior: Prior) -> dict[str, float]:
        """PSNR in dB relative to tissue brightness, 20 log10(1 / rms |error|), by name."""
        out = {}
        for mm, clean in self.slices.items():
            for sigma in self.SIGMAS:
                error = (self._denoise(prior, clean, sigma, mm)[1] - clean).square().sum(1).mean().sqrt()
                out[f"psnr {mm:g} mm sigma {sigma:g}"] = -20 * math.log10(float(error))
        return out

    def images(self, prior: Prior) -> Tensor:
        """Magnitudes [noisy|denoised|clean slices h w] of two slices per voxel size at the larger noise level."""
        rows = []
        for mm, slices in self.slices.items():
            clean = slices[:2]
            rows.append((*self._denoise(prior, clean, self.SIGMAS[-1], mm), clean))
        return torch.stack([torch.cat(column).norm(dim=1) for column in zip(*rows)])

    @staticmethod
    def _denoise(prior: Prior, clean: Tensor, sigma: float, mm: float) -> tuple[Tensor, Tensor]:
        white = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        noisy = clean + sigma * prior.unit_noise(white, (mm, mm))
        with torch.no_grad():
            return noisy, prior(noisy.to(next(prior.parameters()).device), sigma, (mm, mm)).float().cpu()
