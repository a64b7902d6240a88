"""Whether a volume can be trusted.

Does it explain the measured data as well as the classical image, and do data and noise agree?
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from .measurement import Measurement


class Trust(Enum):
    """What may be done with a volume: shown, shown with a warning, or not shown."""

    SOUND = 0
    DOUBTFUL = 1
    FAILED = 2


class Bar(NamedTuple):
    """Misfit as multiples of the classical image's and of the noise; one that exceeds both is over the bar."""

    of_classical: float
    of_noise: float


UNEXPLAINED = 4.0  # times the noise, left by the classical image, above which something is wrong with the data
# of the data, and less is what coil maps never explain: a scan without noise, as simulated ones may be,
# is not one with spikes
INEXACT = 0.01
BARS = {  # the higher bar first: the first one that is exceeded counts
    Trust.FAILED: Bar(2.0, 2.0),
    Trust.DOUBTFUL: Bar(1.15, 1.1),
}


def judge(measurement: Measurement, preview: Tensor, volume: Tensor) -> tuple[Trust, str]:
    """Trust in `volume` [z y x] compared with `preview` [z y x], and what is wrong with it: "" if sound.

    What is wrong is worded to follow "this image". Misfit is the residual's root mean square over the noise: 1 for an
    image that explains the data down to the noise. A prior that invents what was not measured leaves more of the data
    unexplained than the classical image does.
    """
    if not finite(volume):
        return Trust.FAILED, "holds NaN or infinity"
    classical, found = measurement.misfit(preview), measurement.misfit(volume)
    noise = measurement.noise_level(preview) / measurement.sigma
    for trust, bar in BARS.items():
        if found > max(bar.of_classical * classical, bar.of_noise * noise):
            why = (
                "explains the data worse than CG-SENSE does "
                f"(residual {found:.2f} against {classical:.2f} times the noise)"
            )
            return trust, why
    return Trust.SOUND, ""


def finite(volume: Tensor) -> bool:
    """Whether all voxels are."""
    return bool(torch.isfinite(torch.view_as_real(volume)).all())


def doubts(measurement: Measurement, preview: Tensor) -> list[str]:
    """What is wrong with the data themselves, judged by the classical image `preview` [z y x].

    It affects both images.
    """
    left = measurement.misfit(preview)
    if left <= UNEXPLAINED or measurement.residual(preview) <= INEXACT**2 * measurement.energy:
        return []
    return [
        f"CAUTION: CG-SENSE leaves {left:.2g} times the noise of the data unexplained: "
        "spikes, motion, or lines of another scan?"
    ]
