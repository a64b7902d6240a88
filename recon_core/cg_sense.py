"""CG-SENSE: the classical image and, less smooth, the preview from which the other methods start."""

from __future__ import annotations

from torch import Tensor

from .fft import centre_block
from .measurement import Measurement

STRENGTH = 10.0
# On average within 0.04 dB of the best of 5 to 50 on held-out heads (tests/benchmarks/cg_strength.py).
STRENGTH_AS_IMAGE = 20.0
CENTRE = 8  # lines per side that give A^H y its brightness


def cg_sense(measurement: Measurement, iterations: int = 15, strength: float = STRENGTH) -> Tensor:
    """Volume x [z y x] minimising ||A x - y||^2 + lambda ||x - c||^2 (Pruessmann et al., MRM 2001).

    lambda = strength * (noise level / tissue brightness)^2, the same for all protocols. c is zero; where the scan's own
    lines have no fully sampled centre, it is the image of the separate calibration (`Measurement.calibrated`), from
    which the iterations start as well: what a regular undersampling hardly encodes, bright low frequencies above all,
    stays as the calibration shows it. With zero instead, up to 0.8 of the brightness is lost at R = 4 along one axis
    and SNR 10 (tests/benchmarks/lattices.py).
    """
    known = measurement.calibrated
    bright = measurement.brightness(measurement.adjoint / _central_weight(measurement))
    rho = strength * (measurement.sigma / bright) ** 2
    target = measurement.adjoint if known is None else measurement.adjoint + rho * known
    return measurement.operator.solve(target, rho, known, iterations)


def _central_weight(measurement: Measurement) -> float:
    """Mean squared weight of the lines about k = 0: A^H y is as much too dark. Below 1 if others have more averages."""
    weights = measurement.operator.mask.square().cpu()
    central = weights[centre_block(weights.shape, (CENTRE, CENTRE)) & (weights > 0)]
    return float((central if len(central) else weights[weights > 0]).mean())
