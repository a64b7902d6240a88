"""CG-SENSE: the classical image and, less smooth, the preview from which the other methods start."""

from __future__ import annotations

from torch import Tensor

from .measurement import Measurement

STRENGTH = 10.0
# On average within 0.04 dB of the best of 5 to 50 on held-out heads (tests/benchmarks/cg_strength.py).
STRENGTH_AS_IMAGE = 20.0


def cg_sense(measurement: Measurement, iterations: int = 15, strength: float = STRENGTH) -> Tensor:
    """Volume x [z y x] minimising ||A x - y||^2 + lambda ||x - c||^2 (Pruessmann et al., MRM 2001).

    lambda = strength * (noise level / tissue brightness)^2, the same for all protocols. c is zero; where the scan's own
    lines have no fully sampled centre, it is the image of the separate calibration (`Measurement.calibrated`), from
    which the iterations start as well: what a regular undersampling hardly encodes, bright low frequencies above all,
    stays as the calibration shows it. With zero instead, up to 0.8 of the brightness is lost at R = 4 along one axis
    and SNR 10 (tests/benchmarks/lattices.py).
    """
    known = measurement.calibrated
    rho = strength * (measurement.sigma / measurement.brightness(measurement.adjoint)) ** 2
    target = measurement.adjoint if known is None else measurement.adjoint + rho * known
    return measurement.operator.solve(target, rho, known, iterations)
