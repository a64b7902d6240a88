"""Whether what came is what was promised: an aborted scan is recognised here."""

from __future__ import annotations

import numpy as np

from .flags import END_BIT, PAIRS
from .geometry import Geometry

INCOMPLETE = "the scan seems incomplete: "
UNANNOUNCED = 3  # steps from one line to the next, where the header does not say that lines are left out and many are
ELLIPSE = 0.7  # the corners may be left out (pi/4), and a little more


def missing_ends(flags: int) -> list[str]:
    """Beginnings that were flagged without their ends; `flags` are those of all lines together."""
    if flags & END_BIT:
        return []
    return [f"{INCOMPLETE}the first line of a {name} was flagged, its last line never came" for name, first, last in PAIRS if flags & first and not flags & last]


def missing_volumes(promised: dict[str, int], seen: dict[str, set[int]]) -> list[str]:
    """Counters of which fewer values came than the header promises."""
    short = ((name, count, len(seen.get(name, ()))) for name, count in promised.items())
    return [f"{INCOMPLETE}the header announces {count} {name}s, {came} came" for name, count, came in short if came < count]


def missing_centre(geometry: Geometry, counts: np.ndarray) -> list[str]:
    """Whether no line [z y] came within the announced acceleration of k = 0, where brightness and contrast come from."""
    unannounced = max(geometry.acceleration) == 1 and (counts > 0).mean() < ELLIPSE
    steps = (UNANNOUNCED, UNANNOUNCED) if unannounced else geometry.acceleration[::-1]
    around = tuple(slice(max(0, n // 2 - step + 1), n // 2 + step) for n, step in zip(counts.shape, steps))
    return [] if counts[around].any() else [f"{INCOMPLETE}no line came at the centre of k-space, brightness and contrast are wrong"]


def missing_lines(geometry: Geometry, counts: np.ndarray) -> list[str]:
    """What k-space [z y] lacks: an announced end never approached, or too few lines for the announced acceleration."""
    filled = counts > 0
    if not filled.any():
        return []
    for axis, name in ((0, "E1"), (1, "E2")):
        low, high = geometry.limits[axis]
        steps = np.flatnonzero(filled.any(axis=axis)) + geometry.centre[axis] - filled.shape[1 - axis] // 2
        first, last = int(steps[0]), int(steps[-1])
        slack = max(2, (high - low) // 10, geometry.acceleration[axis])
        if last < high - slack or first > low + slack:
            return [f"{INCOMPLETE}{name} was announced from {low} to {high} and came from {first} to {last}"]
    factor = geometry.acceleration[0] * geometry.acceleration[1]
    whole = np.prod([high - low + 1 for low, high in geometry.limits])
    came = int(filled.sum())
    if came >= ELLIPSE * whole / factor:
        return []
    if factor == 1:
        return [f"{came} of {whole} phase encodes came though the header announces no acceleration: undersampled at random, or cut off"]
    return [f"{INCOMPLETE}{came} phase encodes came, {whole // factor} are announced"]
