"""Where k = 0 really lies, whatever the header and lines state: the strongest lines, and the strongest samples on them.

Converters that do not know the centre write the middle of what was acquired. Partial Fourier and asymmetric echoes are
then misplaced: a phase ramp across the image, coil maps from the edge of k-space, and no sign of it in the magnitude of
a conventional image.
"""

from __future__ import annotations

import numpy as np

STRONGEST = 9  # lines examined; a spike affects few of them
AGREED, NEAR = 6, 4  # at least so many of them lie within so many lines of their median
AWAY, AWAY_READOUT = 4, 3  # lines, samples without oversampling; offsets up to these come from the phase of the image
STRAY = 1  # line that may fall outside the matrix
# lines around the stated centre; how many times stronger than any of these the strongest must be
ABOUT, STRONGER = 2, 4.0
EMPTY = 0.02  # of the energy: with less in its outer quarters, a readout is empty there
CLEAR = 4.0  # times the mean energy of a line's samples: a clear peak


def strongest_lines(energy: np.ndarray) -> np.ndarray:
    """Places [lines 2] (z, y) of the strongest lines of `energy` [z y], which is 0 where none came."""
    most = np.argsort(energy, axis=None)[::-1][:STRONGEST]
    places = np.stack(np.unravel_index(most, energy.shape), axis=1)
    return places[energy[tuple(places.T)] > 0]


def centre_offset(energy: np.ndarray) -> tuple[int, int] | None:
    """Number of lines (z, y) by which k = 0 lies beyond the middle of line energies [z y]; None if in doubt.

    (0, 0) if it lies near the middle; 0 along axes whose lines would leave the matrix with any other centre.
    """
    middle, strong = np.array(energy.shape) // 2, _agreeing(energy)
    if strong is None:
        return None
    peak = _peak(energy, strong)
    away = peak - middle
    if (abs(away) <= AWAY).all():
        return 0, 0
    z, y = np.indices(energy.shape)
    about = energy[(abs(z - middle[0]) <= ABOUT) & (abs(y - middle[1]) <= ABOUT)]
    # With no line near the middle, the true centre was lost or has not come yet; with strong ones, it is there.
    if not 0 < STRONGER * about.max() <= np.median(energy[tuple(strong.T)]):
        return None
    return tuple(
        int(by) if abs(by) > AWAY and _may_lie(energy, int(at), axis) else 0
        for axis, (by, at) in enumerate(zip(away, peak))
    )


def block_offset(energy: np.ndarray) -> tuple[int, int]:
    """As centre_offset, for a block of calibration lines that lacks the middle of the matrix; (0, 0) if in doubt.

    Its numbering is then its own.
    """
    strong = _agreeing(energy)
    if strong is None:
        return 0, 0
    peak = _peak(energy, strong)
    return tuple(
        int(at) - n // 2 if _may_lie(energy, int(at), axis) else 0
        for axis, (at, n) in enumerate(zip(peak, energy.shape))
    )


def _agreeing(energy: np.ndarray) -> np.ndarray | None:
    """Those of the strongest lines' places [lines 2] that lie near their median; None if most do not."""
    places = strongest_lines(energy)
    if len(places) < STRONGEST:
        return None
    agreed = (np.abs(places - np.median(places, axis=0)) <= NEAR).all(axis=1)
    return places[agreed] if agreed.sum() >= AGREED else None


def _peak(energy: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The strongest of these places [lines 2]."""
    return places[np.argmax(energy[tuple(places.T)])]


def _may_lie(energy: np.ndarray, at: int, axis: int) -> bool:
    """Whether k = 0 may lie at place `at` along an axis.

    Lines must have come on both sides of it, two or more places away, or the strongest may just be the last before a
    gap; and with `at` as the middle, at most STRAY of them may leave the matrix: a full k-space allows no other centre.
    """
    there, n = np.flatnonzero(energy.any(axis=1 - axis)), energy.shape[axis]
    moved = there - at + n // 2
    return there[0] <= at - 2 and there[-1] >= at + 2 and ((moved < 0) | (moved >= n)).sum() <= STRAY


def echo_offset(kspace: np.ndarray, energy: np.ndarray) -> int:
    """Number of samples by which the echo lies beyond the middle of lines [coils z y x]; 0 if in doubt.

    Samples are counted without oversampling; x is in image space.
    """
    places = strongest_lines(energy)
    if len(places) < AGREED:
        return 0
    profiles = np.fft.ifftshift(kspace[:, places[:, 0], places[:, 1]], axes=-1)
    lines = np.fft.fftshift(np.fft.fft(profiles, axis=-1), axes=-1)
    # [lines x]; float64, as a damaged line may hold numbers too large to square
    power = np.square(np.abs(lines), dtype=np.float64).sum(axis=0)
    peaks = power.argmax(axis=1) - power.shape[1] // 2
    found = int(np.median(peaks))
    clear = power.max(axis=1) > CLEAR * power.mean(axis=1)
    agreed = (abs(peaks - found) <= 1) & clear
    return found if abs(found) > AWAY_READOUT and agreed.sum() >= AGREED else 0


def narrow(kspace: np.ndarray, energy: np.ndarray) -> bool:
    """Whether the strongest lines [coils z y x], x in image space, are empty in the outer quarters of the readout."""
    places, n = strongest_lines(energy), kspace.shape[-1]
    power = np.square(np.abs(kspace[:, places[:, 0], places[:, 1]])).sum(axis=(0, 1))
    return bool(power[n // 4 : n - n // 4].sum() > (1 - EMPTY) * power.sum())


def move_echo(kspace: np.ndarray, offset: int) -> None:
    """Move the echo of lines [coils z y x], x in image space, back by `offset` samples, in place.

    This is a linear phase along x.
    """
    n = kspace.shape[-1]
    ramp = np.exp(-2j * np.pi * offset * (np.arange(n) - n // 2) / n).astype(np.complex64)
    for coil in kspace:  # one at a time, to avoid a second array
        coil *= ramp
