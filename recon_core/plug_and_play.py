"""Plug-and-play ADMM with the slice prior as a fixed denoiser (Venkatakrishnan et al., GlobalSIP 2013).

The denoiser is a single function at a single noise level: the mean of the volumes denoised in the three orientations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .measurement import Measurement
from .slices import Denoiser, denoise_slices, usable_axes
from .state import State


@dataclass(frozen=True)
class PlugAndPlayConfig:
    """sigma is in tissue brightness, the best of five (0.03 to 0.12) on three held-out heads.

    The denoised volume has the weight (n / sigma)^2 against the data, with n their noise, as in the Gaussian model.
    """

    iterations: int = 16
    sigma: float = 0.06
    cg_iterations: int = 4


def reconstruct_plug_and_play(
    measurement: Measurement,
    prior: Denoiser,
    start: Tensor,
    config: PlugAndPlayConfig = PlugAndPlayConfig(),
    seed: int = 0,
) -> Iterator[State]:
    """Yield a State after every iteration; nothing is random.

    Args:
        measurement: the inverse problem.
        prior: D(slices [slices 2 h w], sigma).
        start: volume [z y x], the CG-SENSE image.
        seed: not used.
    """
    scale, noise, x, target = measurement.in_tissue_units(start)
    sigma = max(config.sigma, noise / 2)
    rho = (noise / sigma) ** 2
    axes = usable_axes(tuple(x.shape))
    dual, evaluations = x * 0, 0
    for iteration in range(1, config.iterations + 1):
        clean = x * 0
        for axis in axes:
            one = x + dual
            evaluations += denoise_slices(one, prior, sigma, axis)
            clean += one / len(axes)
        dual = dual + x - clean
        x = measurement.operator.solve(target + rho * (clean - dual), rho, x, config.cg_iterations)
        yield State(iteration, config.iterations, sigma, x * scale, evaluations)
