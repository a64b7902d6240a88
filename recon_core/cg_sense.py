"""CG-SENSE: the classical image, shown first, and the starting point of the others."""

from __future__ import annotations

from torch import Tensor

from .measurement import Measurement
from .scale import intensity_scale


def cg_sense(measurement: Measurement, iterations: int = 15, strength: float = 10.0) -> Tensor:
    """Volume [z y x] minimising ||A x - y||^2 + lambda ||x||^2 (Pruessmann et al., MRM 2001).

    lambda = strength * (noise level / tissue brightness)^2, so that it needs no tuning.
    """
    zero_filled = measurement.adjoint
    brightness = intensity_scale(zero_filled, measurement.voxel_mm)
    rho = strength * (measurement.sigma / brightness) ** 2
    return measurement.operator.solve(zero_filled, rho, iterations=iterations)
