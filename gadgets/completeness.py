"""Whether all lines came that header and flags announce: aborted scans are recognised here."""

from __future__ import annotations

import numpy as np

from .flags import END_BIT, PAIRS
from .geometry import Geometry

INCOMPLETE = "the scan seems incomplete: "
NO_CENTRE = f"{INCOMPLETE}no line was received at the centre of k-space, so brightness and contrast are wrong"
AROUND = 3  # times the reach of a hole: how far around it others are sought
ELLIPSE = 0.7  # of the lines: the corners may be left out (pi/4), and a little more


def missing_ends(flags: int) -> list[str]:
    """Notes on first lines that were flagged without a flagged last line; `flags` combines those of all lines."""
    if flags & END_BIT:
        return []
    return [
        f"{INCOMPLETE}the first line of a {name} was flagged, but its last line never came"
        for name, first, last in PAIRS
        if flags & first and not flags & last
    ]


def missing_volumes(promised: dict[str, int], seen: dict[str, set[int]]) -> list[str]:
    """Notes on counters with fewer values received than the header announces."""
    notes = []
    for name, count in promised.items():
        came = len(seen.get(name, ()))
        if came < count:
            were = "was" if came == 1 else "were"
            notes.append(f"{INCOMPLETE}the header announces {count} {name}s, {came} {were} received")
    return notes


def hole_at_centre(counts: np.ndarray) -> np.ndarray:
    """Mask [z y] of a hole at k = 0, if there is one.

    A hole reaches farther from any line than the gaps around it, whatever the sampling pattern.
    """
    filled, centre = counts > 0, tuple(n // 2 for n in counts.shape)
    if not filled.any() or filled[centre]:
        return np.zeros_like(filled)
    covered, reach = _grown(filled), 1
    while not covered[centre]:
        covered, reach = _grown(covered), reach + 1
    far = ~_grown(filled, reach - 1)  # at least as far from any line as k = 0
    hole, before = np.zeros_like(filled), None
    hole[centre] = True
    while not np.array_equal(hole, before):
        hole, before = _grown(hole) & far, hole
    distance = np.maximum.outer(*(abs(np.arange(n) - n // 2) for n in filled.shape))
    gap = bool((hole & (distance > AROUND * reach)).any())  # between lines, running from one end to the other
    if gap or (far & ~hole & _around(filled, AROUND * reach)).any():
        return np.zeros_like(filled)
    return _grown(hole, reach - 1) & ~filled


def _around(filled: np.ndarray, radius: int) -> np.ndarray:
    """Mask [z y] of places within `radius` of k = 0, but not beyond the first and last lines.

    Along a narrow k-space, it reaches farther than `radius`.
    """
    wanted, sides = (2 * radius + 1) ** 2, sorted(filled.shape)
    radius = max(radius, -(-wanted // min(2 * radius + 1, sides[0])) // 2)
    near = []
    for axis, n in enumerate(filled.shape):
        some, place = np.flatnonzero(filled.any(axis=1 - axis)), np.arange(n)
        near.append((abs(place - n // 2) <= radius) & (place >= some[0]) & (place <= some[-1]))
    return np.logical_and.outer(*near)


def _grown(filled: np.ndarray, steps: int = 1) -> np.ndarray:
    """Mask [z y] dilated by `steps` places."""
    for _ in range(steps):
        padded = np.pad(filled, 1)
        z, y = filled.shape
        filled = np.logical_or.reduce([padded[i : i + z, j : j + y] for i in range(3) for j in range(3)])
    return filled


def missing_lines(geometry: Geometry, counts: np.ndarray) -> list[str]:
    """Notes on what k-space [z y] lacks.

    An announced end was never approached, or too few lines came for the announced acceleration.
    """
    filled = counts > 0
    if not filled.any():
        return []
    for axis, name in ((0, "E1"), (1, "E2")):
        low, high = geometry.limits[axis]
        steps = np.flatnonzero(filled.any(axis=axis)) + geometry.centre[axis] - filled.shape[1 - axis] // 2
        first, last = int(steps[0]), int(steps[-1])
        slack = max(2, (high - low) // 10, geometry.acceleration[axis])
        if last < high - slack or first > low + slack:
            return [f"{INCOMPLETE}{name} was announced from {low} to {high} but received from {first} to {last}"]
    factor = geometry.acceleration[0] * geometry.acceleration[1]
    whole = np.prod([high - low + 1 for low, high in geometry.limits])
    came = int(filled.sum())
    if came >= ELLIPSE * whole / factor:
        return []
    if factor == 1:
        note = (
            f"{came} of {whole} phase encodes were received although the header announces no acceleration: "
            "undersampled at random, or cut off"
        )
        return [note]
    return [f"{INCOMPLETE}{came} phase encodes were received, {whole // factor} were announced"]
