"""Options of a simulated scan, and the ISMRMRD header that announces it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ismrmrd
import numpy as np

from ..geometry import MAX_MATRIX

MAX_COILS = 1024  # more than any scanner has
ECHO_SPACING_MS = 2.5
x = ismrmrd.xsd


@dataclass(frozen=True)
class SimulateOptions:
    """Options of a simulated scan.

    `snr` is tissue brightness over the image noise of a fully sampled scan; `calibration` says whether the calibration
    square is part of the scan (integrated), comes before it as separate lines (separate), or as a separate scan with
    half the readout and another contrast (external); `partial_echo` is the fraction of the readout that is sampled;
    `navigators` is the number of lines from one navigator to the next, 0 for none; `waveforms` adds a physiological one.
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
            ("coils", 1 <= self.coils <= MAX_COILS), ("acceleration", self.acceleration >= 1), ("snr", self.snr > 0),
            ("partial_fourier", all(0.5 < f <= 1 for f in self.partial_fourier)), ("oversampling", 1 <= self.oversampling < math.inf),
            ("noise_lines", self.noise_lines >= 0), ("repetitions", self.repetitions >= 1), ("acs", self.acs >= 0),
            ("voxel_mm", self.voxel_mm is None or self.voxel_mm > 0), ("contrasts", self.contrasts >= 1), ("averages", self.averages >= 1),
            ("calibration", self.calibration in ("integrated", "separate", "external")), ("partial_echo", 0.5 < self.partial_echo <= 1),
            ("navigators", self.navigators >= 0), ("seed", self.seed >= 0),
        )  # fmt: skip
        for name, fine in checks:
            if not fine:
                raise ValueError(f"simulation option {name} cannot be {getattr(self, name)}")

    def samples(self, nx: int) -> int:
        """Samples of a full readout for an image `nx` wide; ValueError if a line cannot hold them."""
        samples = int(2 * round(nx * self.oversampling / 2)) if self.oversampling > 1 else nx
        if samples > MAX_MATRIX:
            raise ValueError(f"simulation option oversampling cannot be {self.oversampling:g}: a readout would have {samples} samples, and a line holds {MAX_MATRIX}")
        return samples

    @property
    def apart(self) -> bool:
        """Whether calibration lines are separate from imaging lines."""
        return self.calibration != "integrated" and self.acs > 0


def make_header(matrix: tuple[int, int, int], voxel_mm: tuple[float, float, float], dropped: list[int], options: SimulateOptions) -> str:
    """ISMRMRD header XML; `matrix` is x, y, z, `voxel_mm` z, y, x, `dropped` the number of missing lines along E1, E2."""
    nx, ny, nz = matrix
    size = [n * mm for n, mm in zip(matrix, reversed(voxel_mm))]
    samples = options.samples(nx)
    wide = (samples * voxel_mm[2], *size[1:])
    encodings = [_encoding(((samples, ny, nz), wide), (matrix, size), dropped, options)]
    if options.calibration == "external" and options.apart:
        square = (min(options.acs, ny), min(options.acs, nz))
        encodings.append(_encoding(((_half(samples), *square), wide), ((_half(nx), *square), size), [0, 0], SimulateOptions(pattern="full")))
    header = x.ismrmrdHeader(
        measurementInformation=x.measurementInformationType(measurementID="1_1_1_1", patientPosition=x.patientPositionType.HFS, protocolName="simulated_3D"),
        acquisitionSystemInformation=x.acquisitionSystemInformationType(systemVendor="simulated", systemFieldStrength_T=3.0, relativeReceiverNoiseBandwidth=1.0, receiverChannels=options.coils),
        experimentalConditions=x.experimentalConditionsType(H1resonanceFrequency_Hz=123_000_000),
        encoding=encodings,
        sequenceParameters=x.sequenceParametersType(TE=[ECHO_SPACING_MS * (n + 1) for n in range(options.contrasts)]),
    )
    return header.toXML()


def _encoding(encoded, recon, dropped: list[int], options: SimulateOptions):
    """One encoding from (matrix, field of view) pairs as encoded and as reconstructed."""
    space = lambda n, fov: x.encodingSpaceType(  # noqa: E731
        matrixSize=x.matrixSizeType(x=n[0], y=n[1], z=n[2]), fieldOfView_mm=x.fieldOfViewMm(x=fov[0], y=fov[1], z=fov[2])
    )
    step = lambda n, miss: x.limitType(minimum=0, maximum=n - 1 - miss, center=n // 2 - miss)  # noqa: E731
    counter = lambda count: x.limitType(minimum=0, maximum=count - 1, center=0)  # noqa: E731
    _, ny, nz = encoded[0]
    first, second = announced_factors(options, nz)
    mode = {"integrated": x.calibrationModeType.EMBEDDED, "separate": x.calibrationModeType.SEPARATE, "external": x.calibrationModeType.EXTERNAL}
    return x.encodingType(
        encodedSpace=space(*encoded),
        reconSpace=space(*recon),
        encodingLimits=x.encodingLimitsType(
            kspace_encoding_step_1=step(ny, dropped[0]), kspace_encoding_step_2=step(nz, dropped[1]),
            repetition=counter(options.repetitions), contrast=counter(options.contrasts), average=counter(options.averages),
        ),
        trajectory=x.trajectoryType.CARTESIAN,
        parallelImaging=x.parallelImagingType(
            accelerationFactor=x.accelerationFactorType(kspace_encoding_step_1=first, kspace_encoding_step_2=second), calibrationMode=mode[options.calibration]
        ),
    )  # fmt: skip


def _half(samples: int) -> int:
    return max(1, samples // 2)


def announced_factors(options: SimulateOptions, partitions: int) -> tuple[int, int]:
    """Acceleration along E1, E2 for the header: the lattice of a regular scan; with random sampling, no fewer lines come than this implies."""
    if options.pattern == "full" or options.acceleration <= 1:
        return (1, 1)
    second = max(1, int(options.acceleration**0.5)) if partitions > 1 else 1
    first = options.acceleration / second
    return (max(1, round(first) if options.pattern == "regular" else math.ceil(first)), second)


def tilt(directions: np.ndarray) -> np.ndarray:
    """Directions (rows) rotated by 20 degrees about z and 12 about x: a double-oblique slab."""
    a, b = np.deg2rad(20), np.deg2rad(12)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return directions @ (about_x @ about_z).T
