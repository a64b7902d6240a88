"""The ISMRMRD header that announces a simulated scan."""

from __future__ import annotations

import math

import ismrmrd
import numpy as np

from ..geometry import MAX_MATRIX
from .simulate_options import SimulateOptions

ECHO_SPACING_MS = 2.5
x = ismrmrd.xsd


def samples_of(options: SimulateOptions, nx: int) -> int:
    """Samples of a full readout for an image `nx` wide; ValueError if a line cannot hold them."""
    samples = int(2 * round(nx * options.oversampling / 2)) if options.oversampling > 1 else nx
    if samples > MAX_MATRIX:
        raise ValueError(
            f"simulation option oversampling cannot be {options.oversampling:g}: "
            f"a readout would have {samples} samples, and a line holds {MAX_MATRIX}"
        )
    return samples


def make_header(
    matrix: tuple[int, int, int], voxel_mm: tuple[float, float, float], dropped: list[int], options: SimulateOptions
) -> str:
    """ISMRMRD header XML.

    `matrix` is x, y, z, `voxel_mm` z, y, x, `dropped` the number of missing lines along E1, E2.
    """
    nx, ny, nz = matrix
    size = [n * mm for n, mm in zip(matrix, reversed(voxel_mm))]
    samples = samples_of(options, nx)
    wide = (samples * voxel_mm[2], *size[1:])
    encodings = [_encoding(((samples, ny, nz), wide), (matrix, size), dropped, options)]
    if options.calibration == "external" and options.apart:
        square = (min(options.acs, ny), min(options.acs, nz))
        encoded, recon = ((_half(samples), *square), wide), ((_half(nx), *square), size)
        encodings.append(_encoding(encoded, recon, [0, 0], SimulateOptions(pattern="full")))
    header = x.ismrmrdHeader(
        measurementInformation=x.measurementInformationType(
            measurementID="1_1_1_1", patientPosition=x.patientPositionType.HFS, protocolName="simulated_3D"
        ),
        acquisitionSystemInformation=x.acquisitionSystemInformationType(
            systemVendor="simulated",
            systemFieldStrength_T=3.0,
            relativeReceiverNoiseBandwidth=1.0,
            receiverChannels=options.coils,
        ),
        experimentalConditions=x.experimentalConditionsType(H1resonanceFrequency_Hz=123_000_000),
        encoding=encodings,
        sequenceParameters=x.sequenceParametersType(TE=[ECHO_SPACING_MS * (n + 1) for n in range(options.contrasts)]),
    )
    return header.toXML()


def _encoding(encoded, recon, dropped: list[int], options: SimulateOptions):
    """One encoding from (matrix, field of view) pairs as encoded and as reconstructed."""

    def space(n, fov):
        matrix, field = x.matrixSizeType(x=n[0], y=n[1], z=n[2]), x.fieldOfViewMm(x=fov[0], y=fov[1], z=fov[2])
        return x.encodingSpaceType(matrixSize=matrix, fieldOfView_mm=field)

    step = lambda n, miss: x.limitType(minimum=0, maximum=n - 1 - miss, center=n // 2 - miss)
    counter = lambda count: x.limitType(minimum=0, maximum=count - 1, center=0)
    _, ny, nz = encoded[0]
    first, second = announced_factors(options, nz)
    mode = {
        "integrated": x.calibrationModeType.EMBEDDED,
        "separate": x.calibrationModeType.SEPARATE,
        "external": x.calibrationModeType.EXTERNAL,
    }
    return x.encodingType(
        encodedSpace=space(*encoded),
        reconSpace=space(*recon),
        encodingLimits=x.encodingLimitsType(
            kspace_encoding_step_1=step(ny, dropped[0]),
            kspace_encoding_step_2=step(nz, dropped[1]),
            repetition=counter(options.repetitions),
            contrast=counter(options.contrasts),
            average=counter(options.averages),
        ),
        trajectory=x.trajectoryType.CARTESIAN,
        parallelImaging=x.parallelImagingType(
            accelerationFactor=x.accelerationFactorType(kspace_encoding_step_1=first, kspace_encoding_step_2=second),
            calibrationMode=mode[options.calibration],
        ),
    )


def _half(samples: int) -> int:
    return max(1, samples // 2)


def announced_factors(options: SimulateOptions, partitions: int) -> tuple[int, int]:
    """Acceleration along E1, E2 for the header: the lattice of a regular scan.

    With random sampling, no fewer lines come than this implies.
    """
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
