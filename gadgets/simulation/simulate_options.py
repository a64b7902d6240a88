"""The options of a simulated scan.

Apart from protocol.py, so that the command line can list them without loading ismrmrd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_COILS = 1024  # more than any scanner has


@dataclass(frozen=True)
class SimulateOptions:
    """Options of a simulated scan.

    `snr` is tissue brightness over the image noise of a fully sampled scan; `calibration` says whether the calibration
    square is part of the scan (integrated), comes before it as separate lines (separate), or as a separate scan with
    half the readout and another contrast (external); `partial_echo` is the fraction of the readout that is sampled;
    `navigators` is the number of lines from one navigator to the next (0: none); `waveforms` adds physiological ones.
    """

    voxel_mm: float | None = None
    coils: int = 8
    acceleration: float = 8.0
    pattern: str = "poisson"
    acs: int = 24
    snr: float = 30.0
    partial_fourier: tuple[float, float] = (1.0, 1.0)
    oversampling: float = 2.0
    noise_lines: int = 16
    oblique: bool = False
    repetitions: int = 1
    seed: int = 0
    calibration: str = "integrated"
    partial_echo: float = 1.0
    contrasts: int = 1
    averages: int = 1
    navigators: int = 0
    waveforms: bool = False

    def __post_init__(self):
        checks = (
            ("coils", 1 <= self.coils <= MAX_COILS),
            ("acceleration", self.acceleration >= 1),
            ("snr", self.snr > 0),
            ("partial_fourier", all(0.5 < f <= 1 for f in self.partial_fourier)),
            ("oversampling", 1 <= self.oversampling < math.inf),
            ("noise_lines", self.noise_lines >= 0),
            ("repetitions", self.repetitions >= 1),
            ("acs", self.acs >= 0),
            ("voxel_mm", self.voxel_mm is None or self.voxel_mm > 0),
            ("contrasts", self.contrasts >= 1),
            ("averages", self.averages >= 1),
            ("calibration", self.calibration in ("integrated", "separate", "external")),
            ("partial_echo", 0.5 < self.partial_echo <= 1),
            ("navigators", self.navigators >= 0),
            ("seed", self.seed >= 0),
        )
        for name, fine in checks:
            if not fine:
                raise ValueError(f"simulation option {name} cannot be {getattr(self, name)}")

    @property
    def apart(self) -> bool:
        """Whether calibration lines are separate from imaging lines."""
        return self.calibration != "integrated" and self.acs > 0
