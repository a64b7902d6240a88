"""Where k = 0 really lies: the strongest lines, and the strongest samples on them, against what header and lines say.

Converters that know it not write the middle of what was acquired. Partial Fourier and asymmetric echoes then lie in the wrong
place: a phase ramp over the image, coil maps of the edge of k-space, and no sign of it in the magnitude of a classical image.
"""

from __future__ import annotations

import numpy as np

STRONGEST = 9  # lines that are asked; a spike is in few of them
AGREED, NEAR = 6, 4  # so many of them lie so near to their middle
AWAY, AWAY_READOUT = 4, 3  # lines, samples without oversampling: up to there it is the scan's own phase
STRAY = 1  # line
ABOUT, STRONGER = 2, 4.0  # lines about the stated centre, and times the energy of any of them
EMPTY = 0.02  # of the energy, in the outer halves of a readout that is empty there
CLEAR = 4.0  # times the mean energy of a line's samples, at its peak


def strongest_lines(energy: np.ndarray) -> np.ndarray:
    """Places [lines 2] (z, y) of the strongest lines of `energy` [z y], 0 where none came."""
    most = np.argsort(energy, axis=None)[::-1][:STRONGEST]
    places = np.stack(np.unravel_index(most, energy.shape), axis=1)
    return places[energy[tuple(places.T)] > 0]


def centre_offset(energy: np.ndarray) -> tuple[int, int] | None:
    """By how many lines (z, y) k = 0 lies beyond the middle of the matrix, by the energy of lines [z y]; None if in doubt.

    (0, 0) where it lies near the middle, and along axes whose lines would leave the matrix about any other centre.
    """
    places, middle = strongest_lines(energy), np.array(energy.shape) // 2
    if len(places) < STRONGEST:
        return None
    found = np.median(places, axis=0)
    agreed = (np.abs(places - found) <= NEAR).all(axis=1)
    if agreed.sum() < AGREED:
        return None
    peak = places[agreed][np.argmax(energy[tuple(places[agreed].T)])]
    away = peak - middle
    if (abs(away) <= AWAY).all():
        return 0, 0
    z, y = np.indices(energy.shape)
    about = energy[(abs(z - middle[0]) <= ABOUT) & (abs(y - middle[1]) <= ABOUT)]
    if not 0 < STRONGER * about.max() <= np.median(energy[tuple(places[agreed].T)]):  # no line about the middle: it was lost, or has not come yet
        return None
    return tuple(int(by) if abs(by) > AWAY and _may_lie(energy, int(at), axis) else 0 for axis, (by, at) in enumerate(zip(away, peak)))


def _may_lie(energy: np.ndarray, at: int, axis: int) -> bool:
    """Whether k = 0 may lie at that place along an axis.

    Lines came on both sides of it, too many for the strongest to be only the last ones before a gap; and about it as the
    middle no more than STRAY of them would lie outside of the matrix: of a whole k-space, no other centre is possible.
    """
    there, n = np.flatnonzero(energy.any(axis=1 - axis)), energy.shape[axis]
    moved = there - at + n // 2
    return there[0] <= at - 2 and there[-1] >= at + 2 and ((moved < 0) | (moved >= n)).sum() <= STRAY


def echo_offset(kspace: np.ndarray, energy: np.ndarray) -> int:
    """By how many samples without oversampling the echo lies beyond the middle of lines [coils z y x], x in image space; 0 if in doubt."""
    places = strongest_lines(energy)
    if len(places) < AGREED:
        return 0
    lines = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(kspace[:, places[:, 0], places[:, 1]], axes=-1), axis=-1), axes=-1)
    power = np.square(np.abs(lines)).sum(axis=0)  # [lines x]
    peaks = power.argmax(axis=1) - power.shape[1] // 2
    found = int(np.median(peaks))
    clear = power.max(axis=1) > CLEAR * power.mean(axis=1)
    agreed = (abs(peaks - found) <= 1) & clear
    return found if abs(found) > AWAY_READOUT and agreed.sum() >= AGREED else 0


def narrow(kspace: np.ndarray, energy: np.ndarray) -> bool:
    """Whether the strongest lines [coils z y x], x in image space, show nothing in the outer halves of the readout."""
    places, n = strongest_lines(energy), kspace.shape[-1]
    power = np.square(np.abs(kspace[:, places[:, 0], places[:, 1]])).sum(axis=(0, 1))
    return bool(power[n // 4 : n - n // 4].sum() > (1 - EMPTY) * power.sum())


def move_echo(kspace: np.ndarray, offset: int) -> None:
    """Shift lines [coils z y x], x in image space, by so many samples in k-space, in place: a linear phase along x."""
    n = kspace.shape[-1]
    ramp = np.exp(-2j * np.pi * offset * (np.arange(n) - n // 2) / n).astype(np.complex64)
    for coil in kspace:  # one by one, to need no second array
        coil *= ramp
