"""Compressed sensing with an l1 penalty on wavelet details: the classical baseline.

Minimises ||A x - y||^2 / 2 + threshold * ||details of W x||_1 by FISTA (Beck and Teboulle, SIAM J. Imaging
Sci. 2009) with step 1, which is allowed because ||A|| <= 1. W is an orthonormal four-tap Daubechies transform
along every axis that is long enough, randomly shifted in each iteration (Figueiredo and Nowak, IEEE TIP 2003)
to avoid block artefacts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .measurement import Measurement
from .slices import Denoiser
from .state import State

_R3 = math.sqrt(3)
LOW = tuple(v / (4 * math.sqrt(2)) for v in (1 + _R3, 3 + _R3, 3 - _R3, 1 - _R3))
HIGH = (LOW[3], -LOW[2], LOW[1], -LOW[0])
SHORTEST = 16  # axes shorter than this are not transformed


@dataclass(frozen=True)
class WaveletConfig:
    """The threshold is strength * n, with n the noise of the data; strength was tuned on held-out heads."""

    iterations: int = 50
    strength: float = 0.2
    levels: int = 3


def reconstruct_wavelet(
    measurement: Measurement,
    prior: Denoiser | None,
    start: Tensor,
    config: WaveletConfig = WaveletConfig(),
    seed: int = 0,
) -> Iterator[State]:
    """Yield a State after every iteration.

    Args:
        measurement: the inverse problem.
        prior: not used.
        start: volume [z y x], the CG-SENSE image.
        seed: of the random shifts.
    """
    random = torch.Generator().manual_seed(seed)
    threshold = config.strength * measurement.noise_level(start)
    sigma = threshold / measurement.brightness(start)
    x = ahead = start
    t = 1.0
    for iteration in range(1, config.iterations + 1):
        previous = x
        gradient = measurement.operator.normal(ahead) - measurement.adjoint
        x = shrink(ahead - gradient, threshold, config.levels, random)
        t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        ahead = x + (last - 1) / t * (x - previous)
        yield State(iteration, config.iterations, sigma, x, 0)


def shrink(volume: Tensor, threshold: float, levels: int, random: torch.Generator) -> Tensor:
    """Soft-threshold the detail coefficients of a randomly shifted transform of `volume` [z y x]."""
    axes = [a for a, n in enumerate(volume.shape) if n >= SHORTEST]
    if not axes:
        return volume
    padded = F.pad(volume, [p for n in reversed(volume.shape) for p in (0, -n % 2**levels if n >= SHORTEST else 0)])
    shifts = [int(torch.randint(2**levels, (), generator=random)) for _ in axes]
    padded = torch.roll(padded, shifts, axes)
    smaller = _shrink_level(padded, threshold, levels, axes)
    smaller = torch.roll(smaller, [-s for s in shifts], axes)
    return smaller[tuple(slice(n) for n in volume.shape)].contiguous()


def _shrink_level(volume: Tensor, threshold: float, levels: int, axes: list[int]) -> Tensor:
    if levels == 0:
        return volume
    bands = [volume]
    for axis in axes:
        bands = [half for band in bands for half in split(band, axis)]
    coarse = _shrink_level(bands[0], threshold, levels - 1, axes)
    bands = [coarse, *(soft_threshold(band, threshold) for band in bands[1:])]
    for axis in reversed(axes):
        bands = [join(low, high, axis) for low, high in zip(bands[::2], bands[1::2])]
    return bands[0]


def split(volume: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Low and high half-bands along `axis` (of even length, periodic)."""
    even, odd = _phases(volume, axis)
    taps = (even, odd, torch.roll(even, -1, axis), torch.roll(odd, -1, axis))
    return tuple(sum(c * tap for c, tap in zip(filter_, taps)) for filter_ in (LOW, HIGH))


def join(low: Tensor, high: Tensor, axis: int) -> Tensor:
    """Inverse of `split`, which is also its transpose."""
    parts = [LOW[i] * low + HIGH[i] * high for i in range(4)]
    even, odd = parts[0] + torch.roll(parts[2], 1, axis), parts[1] + torch.roll(parts[3], 1, axis)
    return torch.stack((even, odd), dim=axis + 1).flatten(axis, axis + 1)


def _phases(volume: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    pairs = volume.unflatten(axis, (-1, 2))
    return pairs.select(axis + 1, 0), pairs.select(axis + 1, 1)


def soft_threshold(coefficients: Tensor, threshold: float) -> Tensor:
    """Reduce magnitudes by `threshold`, down to zero; phases are kept."""
    size = coefficients.abs()
    return coefficients * ((size - threshold).clamp_min(0) / size.clamp_min(1e-30))
