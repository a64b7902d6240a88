"""Position and orientation of an image: one frame, reoriented together with the pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

STEPS = ("transpose", "flip_x", "flip_y", "flip_z")


@dataclass(frozen=True)
class Frame:
    """Directions of x, y, z (rows, LPS), field of view x, y, z in mm, and the LPS position of pixel n//2."""

    directions: np.ndarray
    fov_mm: tuple[float, float, float]
    position: np.ndarray


def parse_orientation(text: str) -> tuple[str, ...]:
    """Steps of an orientation such as "transpose+flip_x", in the order in which they are applied; "acquired" has none.

    Raises:
        ValueError: for a step that does not exist.
    """
    words = [] if text == "acquired" else [word.strip() for word in text.split("+")]
    unknown = [word for word in words if word not in STEPS]
    if unknown:
        raise ValueError(f"unknown step {unknown[0]!r}; write acquired, or any of {', '.join(STEPS)} joined by +")
    return tuple(step for step in STEPS if step in words)


def orient(pixels: np.ndarray, frame: Frame, orientation: str) -> tuple[np.ndarray, Frame]:
    """Reordered pixels [z y x] and the matching frame: nothing moves in patient coordinates."""
    for step in parse_orientation(orientation):
        if step == "transpose":
            x, y, z = frame.fov_mm
            pixels, frame = pixels.swapaxes(1, 2), Frame(frame.directions[[1, 0, 2]], (y, x, z), frame.position)
        else:
            pixels, frame = _flip(pixels, frame, "xyz".index(step[-1]))
    return np.ascontiguousarray(pixels), frame


def _flip(pixels: np.ndarray, frame: Frame, axis: int) -> tuple[np.ndarray, Frame]:
    """Reverse along x, y or z (axis 0, 1, 2); for an even length, pixel n//2 is then a different one."""
    n = pixels.shape[2 - axis]
    directions = frame.directions.copy()
    position = frame.position + (n - 1 - 2 * (n // 2)) * directions[axis] * frame.fov_mm[axis] / n
    directions[axis] *= -1
    return np.flip(pixels, 2 - axis), replace(frame, directions=directions, position=position)
