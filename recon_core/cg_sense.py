"""CG-SENSE: the classical image, and, less smooth, the one that is shown first and that the others start from."""

from __future__ import annotations

from torch import Tensor

from .measurement import Measurement

STRENGTH, STRENGTH_OF_LATTICES, ITERATIONS_OF_LATTICES = 10.0, 3.0, 5
STRENGTH_AS_IMAGE = 20.0  # within 0.04 dB in the mean of the best of 5 to 50 on heads left out of training (tests/benchmarks/cg_strength.py); as a start it costs up to 0.3 dB


def cg_sense(measurement: Measurement, iterations: int = 15, strength: float = STRENGTH) -> Tensor:
    """Volume [z y x] minimising ||A x - y||^2 + lambda ||x||^2 (Pruessmann et al., MRM 2001).

    lambda = strength * (noise level / tissue brightness)^2, alike for all protocols. Where the scan itself has no centre square it
    is less, as it would darken what is bright, the low frequencies, and a few iterations begin at the image of the separate
    calibration (`Measurement.calibrated`): from zero, low frequencies come so late that brightness is lost, up to half of it at
    R = 4 along one axis, and to go on until they are there makes noise of what the lattice hardly sees.
    """
    if measurement.calibrated is not None:
        iterations, strength = ITERATIONS_OF_LATTICES, STRENGTH_OF_LATTICES
    zero_filled = measurement.adjoint
    rho = strength * (measurement.sigma / measurement.brightness(zero_filled)) ** 2
    return measurement.operator.solve(zero_filled, rho, measurement.calibrated, iterations)
