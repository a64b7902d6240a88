"""Variational 3D reconstruction with a 2D prior on random slices of three orientations.

Minimises ||A x - y||^2 / (2 sigma^2) + sum over slices of a truncated diffusion objective
(arXiv 2412.18584), by half-quadratic splitting: each sweep denoises slices of one random orientation
at an annealed noise level, with momentum from the sweep before, then solves the data term exactly against
the result (conjugate gradients on independent 2D problems). The denoiser is never differentiated
("stabilised Jacobian").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .measurement import Measurement
from .scale import intensity_scale
from .state import State

Denoiser = Callable[[Tensor, float], Tensor]
MIN_SIDE = 16  # shorter slices show the network hardly any anatomy
PIXELS_PER_BATCH = {"cpu": 1 << 16, "cuda": 1 << 22}


@dataclass(frozen=True)
class VariationalConfig:
    """sigma in units of tissue brightness.

    With n the noise of the data in those units, a sweep at sigma pulls towards its denoised image with
    rho = prior_weight * sqrt(1 / R) * (n / sigma)^2: the Gaussian model's balance of data noise and prior noise,
    times a factor found by experiment (tests/benchmarks/prior_weight.py), the same for every protocol; the more
    of k-space was sampled (R = 1: all), the better the image bears a strong prior.
    sigma never falls below n / 2.
    """

    sweeps: int = 16
    sigma_max: float = 0.3
    sigma_min: float = 0.02
    prior_weight: float = 0.5
    momentum: float = 0.8
    cg_iterations: int = 3
    slice_fraction: float = 1.0


def reconstruct_variational(
    measurement: Measurement,
    prior: Denoiser,
    start: Tensor,
    config: VariationalConfig = VariationalConfig(),
    seed: int = 0,
) -> Iterator[State]:
    """Yield a State after every sweep; stop whenever the time is up, the latest is the best.

    Args:
        measurement: the inverse problem.
        prior: D(slices [slices 2 h w], sigma) on slices whose tissue has magnitude about 1.
        start: volume [z y x], the CG-SENSE image.
        seed: of the random slices.
    """
    random = torch.Generator().manual_seed(seed)
    scale = intensity_scale(start, measurement.voxel_mm)
    noise = measurement.noise_level(start) / scale
    box = object_box(measurement.operator.maps)
    usable = usable_axes(tuple(s.stop - s.start for s in box))
    weight = config.prior_weight * float((measurement.operator.weights > 0).float().mean()) ** 0.5
    x, target, evaluations = start / scale, measurement.adjoint / scale, 0
    previous, axes = x, []
    for sweep, sigma in enumerate(annealed(config, noise), start=1):
        axes = axes or [a for a in torch.randperm(3, generator=random).tolist() if a in usable]
        denoised = x + config.momentum * (x - previous)
        evaluations += denoise_slices(denoised[box], prior, sigma, axes.pop(), config.slice_fraction, random)
        rho = weight * (noise / sigma) ** 2
        previous = x
        x = measurement.operator.solve(target + rho * denoised, rho, denoised, config.cg_iterations)
        yield State(sweep, config.sweeps, sigma, x * scale, evaluations)


def usable_axes(shape: tuple[int, int, int]) -> list[int]:
    """Axes across which slices are worth denoising: both in-plane sides long enough, or the best there is."""
    sides = [min(n for i, n in enumerate(shape) if i != axis) for axis in range(3)]
    return [a for a in range(3) if sides[a] >= MIN_SIDE] or [max(range(3), key=lambda a: sides[a])]


def annealed(config: VariationalConfig, noise: float) -> list[float]:
    """Noise level of each sweep, falling geometrically, not below half the noise of the data."""
    steps = max(1, config.sweeps - 1)
    lowest = min(config.sigma_max, max(config.sigma_min, noise / 2))
    return [config.sigma_max * (lowest / config.sigma_max) ** (i / steps) for i in range(config.sweeps)]


def object_box(maps: Tensor) -> tuple[slice, slice, slice]:
    """Bounding box (z, y, x) of where the coil maps (operator frame [x coils z y]) are not zero."""
    inside = (maps != 0).any(dim=1)
    inside = torch.fft.fftshift(inside, (1, 2)).permute(1, 2, 0)
    box = []
    for axis in range(3):
        line = inside.any(dim=tuple(a for a in range(3) if a != axis)).nonzero()[:, 0]
        box.append(slice(int(line[0]), int(line[-1]) + 1) if len(line) else slice(0, inside.shape[axis]))
    return tuple(box)


def denoise_slices(volume: Tensor, prior: Denoiser, sigma: float, axis: int, fraction: float, random: torch.Generator) -> int:
    """Denoise random slices of `volume` [z y x] across `axis` in place; returns how many."""
    planes = volume.movedim(axis, 0)
    count = max(1, math.ceil(fraction * planes.shape[0]))
    chosen = torch.randperm(planes.shape[0], generator=random)[:count].sort().values.to(volume.device)
    batch = max(1, PIXELS_PER_BATCH.get(volume.device.type, 1 << 16) // planes[0].numel())
    for part in chosen.split(batch):
        slices = torch.view_as_real(planes[part]).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            clean = prior(slices, sigma)
        planes[part] = torch.view_as_complex(clean.permute(0, 2, 3, 1).contiguous())
    return count
