"""What the flags and counters of an acquisition mean here."""

from __future__ import annotations

from typing import NamedTuple

import ismrmrd


def _bits(*flags: int) -> int:
    return sum(1 << (flag - 1) for flag in flags)


# Of lines without image data or noise: they are not gathered, and the client counts no volumes by them.
SKIP_BITS = _bits(
    ismrmrd.ACQ_IS_NAVIGATION_DATA,
    ismrmrd.ACQ_IS_PHASECORR_DATA,
    ismrmrd.ACQ_IS_HPFEEDBACK_DATA,
    ismrmrd.ACQ_IS_DUMMYSCAN_DATA,
    ismrmrd.ACQ_IS_RTFEEDBACK_DATA,
    ismrmrd.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA,
    ismrmrd.ACQ_IS_PHASE_STABILIZATION_REFERENCE,
    ismrmrd.ACQ_IS_PHASE_STABILIZATION,
)
NOISE_BIT = _bits(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
CALIBRATION_BIT = _bits(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
BOTH_BIT = _bits(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
REVERSE_BIT = _bits(ismrmrd.ACQ_IS_REVERSE)
FIRST_BIT = _bits(ismrmrd.ACQ_FIRST_IN_REPETITION)
LAST_BIT = _bits(ismrmrd.ACQ_LAST_IN_REPETITION)
END_BIT = _bits(ismrmrd.ACQ_LAST_IN_MEASUREMENT)
PAIRS = (  # name, its first line, its last line
    ("repetition", FIRST_BIT, LAST_BIT),
    ("slice", _bits(ismrmrd.ACQ_FIRST_IN_SLICE), _bits(ismrmrd.ACQ_LAST_IN_SLICE)),
)


class VolumeKey(NamedTuple):
    """The counters that identify a volume."""

    slice: int
    contrast: int
    repetition: int
    set: int
    phase: int


def volume_key(idx) -> VolumeKey:
    """Which volume a line belongs to, by its counters."""
    return VolumeKey(idx.slice, idx.contrast, idx.repetition, idx.set, idx.phase)


def volume_name(number: int, idx) -> str:
    """User-facing name of volume `number` (from 0) of a scan, such as "volume 2 (repetition 1)".

    Counters at 0 are omitted.
    """
    counters = [f"{name} {value}" for name, value in volume_key(idx)._asdict().items() if value]
    return f"volume {number + 1} ({', '.join(counters)})" if counters else f"volume {number + 1}"


def is_calibration_only(flags: int) -> bool:
    """Whether a line is flagged for parallel calibration and not also for imaging."""
    return bool(flags & CALIBRATION_BIT) and not flags & BOTH_BIT
