"""Whether a volume may be trusted: does it explain the measured data as well as the classical image does?"""

from __future__ import annotations

from torch import Tensor

from .measurement import Measurement

WORSE = 1.15
UNEXPLAINED = 1.1


def distrust(measurement: Measurement, preview: Tensor, volume: Tensor) -> str:
    """A warning if `volume` leaves clearly more of the data unexplained than `preview` does, else nothing.

    Misfit is the residual's root mean square over the noise: 1 for an image that explains the data to the noise.
    """
    classical, found = measurement.misfit(preview), measurement.misfit(volume)
    if found <= max(WORSE * classical, UNEXPLAINED * measurement.noise_level(preview) / measurement.sigma):
        return ""
    return f"CAUTION: this image explains the data worse than CG-SENSE does (residual {found:.2f} against {classical:.2f} times the noise): compare with the preview"
