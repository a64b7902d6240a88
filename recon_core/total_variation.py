"""Compressed sensing with isotropic 3D total variation of the complex volume.

Minimises ||A x - y||^2 / 2 + threshold * sum |grad x| by the primal-dual method of Condat (J. Optim. Theory
Appl. 2013, algorithm 3.1), whose step sizes follow from ||A|| <= 1 and ||grad||^2 <= 12.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .measurement import Measurement
from .slices import Denoiser
from .state import State

TINY = torch.finfo(torch.float32).tiny
PRIMAL, DUAL = 1.0, 0.5 / 12  # 1 / PRIMAL - 12 * DUAL >= 1 / 2


@dataclass(frozen=True)
class TotalVariationConfig:
    """The threshold is strength * n, with n the noise of the data; strength was tuned on held-out heads."""

    iterations: int = 80
    strength: float = 0.15


def reconstruct_total_variation(
    measurement: Measurement,
    prior: Denoiser | None,
    start: Tensor,
    config: TotalVariationConfig = TotalVariationConfig(),
    seed: int = 0,
) -> Iterator[State]:
    """Yield a State after every iteration; nothing is random.

    Args:
        measurement: the inverse problem.
        prior: not used.
        start: volume [z y x], the CG-SENSE image.
        seed: not used.
    """
    scale, noise, x, target = measurement.in_tissue_units(start)
    threshold = config.strength * noise
    dual = gradient(x) * 0
    for iteration in range(1, config.iterations + 1):
        previous = x
        x = x - PRIMAL * (measurement.operator.normal(x) - target - divergence(dual))
        dual = dual + DUAL * gradient(2 * x - previous)
        dual = dual * (threshold / dual.abs().square().sum(0).sqrt().clamp_min(TINY)).clamp_max(1)
        yield State(iteration, config.iterations, threshold, x * scale, 0)


def gradient(volume: Tensor) -> Tensor:
    """Forward differences [3 z y x] of [z y x], zero at the far faces."""
    steps = [torch.diff(volume, dim=axis, append=volume.narrow(axis, volume.shape[axis] - 1, 1)) for axis in range(3)]
    return torch.stack(steps)


def divergence(field: Tensor) -> Tensor:
    """Minus the adjoint of `gradient`: [3 z y x] to [z y x]."""
    out = torch.zeros_like(field[0])
    for axis in range(3):
        inner = field[axis].narrow(axis, 0, field.shape[axis + 1] - 1)
        pad = [0, 0] * (2 - axis) + [1, 1] + [0, 0] * axis
        out += torch.diff(F.pad(inner, pad), dim=axis)
    return out
