"""CG-SENSE: the classical image and, less smooth, the preview from which the other methods start."""

from __future__ import annotations

from torch import Tensor

from .measurement import Measurement

STRENGTH, STRENGTH_OF_LATTICES, ITERATIONS_OF_LATTICES = 10.0, 3.0, 5
STRENGTH_AS_IMAGE = 20.0  # on average within 0.04 dB of the best of 5 to 50 on held-out heads (tests/benchmarks/cg_strength.py); as a start it costs up to 0.3 dB


def cg_sense(measurement: Measurement, iterations: int = 15, strength: float = STRENGTH) -> Tensor:
    """Volume [z y x] minimising ||A x - y||^2 + lambda ||x||^2 (Pruessmann et al., MRM 2001).

    lambda = strength * (noise level / tissue brightness)^2, the same for all protocols. Where the scan's own lines have no
    fully sampled centre, lambda is smaller, because it would darken the bright low frequencies, and only a few iterations start
    from the image of the separate calibration (`Measurement.calibrated`): from zero, low frequencies converge so late that up to
    half of the brightness is lost at R = 4 along one axis, and iterating until they converge turns what the regular
    undersampling hardly encodes into noise.
    """
    if measurement.calibrated is not None:
        iterations, strength = ITERATIONS_OF_LATTICES, STRENGTH_OF_LATTICES
    zero_filled = measurement.adjoint
    rho = strength * (measurement.sigma / measurement.brightness(zero_filled)) ** 2
    return measurement.operator.solve(zero_filled, rho, measurement.calibrated, iterations)
