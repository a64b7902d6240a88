"""Diffusion in function space: a network that is told the voxel size, and noise that is one field whatever the voxels.

After infinity-Diff (Bond-Taylor and Willcocks, arXiv 2303.18242). The image is a function that any mesh can sample.
Layers are integrals with kernels defined in millimetres and resampled for each voxel size, a U-Net in the middle always
works on cells of CELL_MM, and pointwise functions come in between. White noise is not a function (its value at a point
would grow as voxels shrink), so the noise here is white noise smoothed over NOISE_MM: one field, which every scan
samples with its own voxels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .unet import NoiseLevel, UNet

TAP_MM = 2.0  # spacing of the learned values of a kernel, and the voxel size of training
CELL_MM = 4.0
NOISE_MM = 1.0  # standard deviation of the Gaussian that smooths the noise
Voxel = tuple[float, float]


class Integral(nn.Module):
    """Residual layer: an integral of each feature, then a pointwise function of all features.

    The kernel of the integral has `taps` x `taps` values TAP_MM apart.
    """

    def __init__(self, channels: int, taps: int, embedding: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, taps, taps) / taps)
        self.film = nn.Linear(embedding, 2 * channels)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = nn.Conv2d(2 * channels, channels, 1)
        for layer in (self.film, self.narrow):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, emb: Tensor, voxel_mm: Voxel) -> Tensor:
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        kernel = sampled_kernel(self.kernel, voxel_mm)
        h = F.conv2d(x, kernel[:, None].to(x.dtype), padding="same", groups=len(kernel))
        return x + self.narrow(F.silu(self.widen(torch.addcmul(shift, h, 1 + scale))))


class NeuralOperator(nn.Module):
    """Maps functions to functions, sampled on voxels of any size; the untrained output is zero.

    Args:
        channels: features at each point.
        taps: side of the kernels, in units of TAP_MM.
        coarse: features per level of the U-Net on cells of CELL_MM.
        io_channels: real channels of a slice (2: real and imaginary part).
        embedding: features of the noise-level embedding.
    """

    def __init__(self, channels=32, taps=7, coarse=(64, 128), io_channels=2, embedding=128):
        super().__init__()
        self.embed = NoiseLevel(embedding)
        self.lift = nn.Conv2d(io_channels, channels, 1)
        self.before = nn.ModuleList(Integral(channels, taps, embedding) for _ in range(2))
        self.coarse = UNet(coarse, blocks=2, unshuffle=1, io_channels=channels, embedding=embedding)
        self.after = nn.ModuleList(Integral(channels, taps, embedding) for _ in range(2))
        self.project = nn.Conv2d(channels, io_channels, 1)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor, noise_level: Tensor, voxel_mm: Voxel = (TAP_MM, TAP_MM)) -> Tensor:
        """Map x [slices io h w], on voxels of `voxel_mm` (h, w), and noise_level [slices] to [slices io h w].

        The slices may have any h and w.
        """
        emb, h = self.embed(noise_level), self.lift(x)
        for layer in self.before:
            h = layer(h, emb, voxel_mm)
        cells = [max(1, round(n * mm / CELL_MM)) for n, mm in zip(x.shape[2:], voxel_mm)]
        coarse = self.coarse(F.interpolate(h, cells, mode="area"), noise_level)
        h = h + F.interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False)
        for layer in self.after:
            h = layer(h, emb, voxel_mm)
        return self.project(F.silu(h))


def sampled_kernel(kernel: Tensor, voxel_mm: Voxel) -> Tensor:
    """Kernels [channels taps taps], values TAP_MM apart, as weights [channels h w] for voxels of `voxel_mm` (h, w).

    The sum of the weights, the kernel's integral, does not depend on the voxels; on voxels of TAP_MM the weights are
    the values.
    """
    high, wide = (_sampling(kernel.shape[-1], mm).to(kernel) for mm in voxel_mm)
    with torch.autocast(kernel.device.type, enabled=False):
        return high @ kernel @ wide.T


def _sampling(taps: int, voxel_mm: float) -> Tensor:
    """Share of each value that each voxel takes [size taps]: a triangle as wide as the coarser of the two.

    Columns sum to one.
    """
    width, reach = max(TAP_MM, voxel_mm), (taps // 2) * TAP_MM
    side = math.ceil((reach + width) / voxel_mm - 1e-6) - 1
    there = (torch.arange(2 * side + 1) - side) * voxel_mm
    values = (torch.arange(taps) - taps // 2) * TAP_MM
    share = (1 - (there[:, None] - values).abs() / width).clamp_min(0)
    return share / share.sum(0)


def smooth_noise(white: Tensor, voxel_mm: Voxel) -> Tensor:
    """The noise field as seen by a scan with voxels of `voxel_mm` (h, w), from white noise [... h w] of variance 1.

    A coarser scan sees the field without its high frequencies, like an image with cropped k-space. On voxels of TAP_MM
    the variance at each point is 1.
    """
    passed = torch.ones(())
    # of the Gaussian below, integrated over the band of voxels of TAP_MM
    power = math.erf(math.pi * NOISE_MM / TAP_MM) / (2 * math.pi**0.5 * NOISE_MM)
    for n, mm in zip(white.shape[-2:], voxel_mm):
        line = torch.exp(-2 * (math.pi * NOISE_MM * torch.fft.fftfreq(n, mm)).square())
        passed = passed[..., None] * line / (power * mm) ** 0.5
    smooth = torch.fft.ifftn(torch.fft.fftn(white, dim=(-2, -1)) * passed.to(white.device), dim=(-2, -1))
    return smooth if white.is_complex() else smooth.real
