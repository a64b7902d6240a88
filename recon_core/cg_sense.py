"""CG-SENSE: the classical image, shown first, and the starting point of the others."""

from __future__ import annotations

from torch import Tensor

from .measurement import Measurement

STRENGTH, STRENGTH_OF_LATTICES = 10.0, 3.0


def cg_sense(measurement: Measurement, iterations: int = 15, strength: float | None = None) -> Tensor:
    """Volume [z y x] minimising ||A x - y||^2 + lambda ||x||^2 (Pruessmann et al., MRM 2001).

    lambda = strength * (noise level / tissue brightness)^2, so that it needs no tuning: by default STRENGTH, less where the
    scan itself has no centre square (`Measurement.tissue`), as it would darken what is bright, the low frequencies.
    """
    if strength is None:
        strength = STRENGTH if measurement.tissue is None else STRENGTH_OF_LATTICES
    zero_filled = measurement.adjoint
    rho = strength * (measurement.sigma / measurement.brightness(zero_filled)) ** 2
    return measurement.operator.solve(zero_filled, rho, iterations=iterations)
