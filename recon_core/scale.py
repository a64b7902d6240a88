"""The intensity scale that the prior's images are measured in: one definition for training and reconstruction."""

from __future__ import annotations

import math

from torch import Tensor

from .fft import kspace_crop

SCALE_MM = 8.0


def evenly(values, most: int):
    """At most `most` of the values [any shape] of a tensor or array, evenly spread: for a percentile of all of them.

    The step shares no factor with the shape, so that it never keeps step with the rows: one side of the volume would then stand for all of it.
    """
    step = -(-math.prod(values.shape) // most)
    while math.gcd(step, math.prod(values.shape)) > 1:
        step += 1
    return values.reshape(-1)[::step]


def intensity_scale(volume: Tensor, voxel_mm: tuple[float, float, float]) -> float:
    """Brightness of typical tissue: sum |v|^3 / sum |v|^2 of the volume blurred to 8 mm voxels.

    The blur keeps noise, aliasing and the voxel size from moving it; the powers keep air, and so the
    matrix size, from moving it. It scales exactly with the volume.

    Args:
        volume: [z y x], complex or real.
        voxel_mm: voxel size along z, y, x.

    Raises:
        ValueError: if the volume is empty or not finite.
    """
    matrix = [max(1, min(n, round(n * mm / SCALE_MM))) for n, mm in zip(volume.shape, voxel_mm)]
    magnitude = kspace_crop(volume, matrix).abs().double()
    scale = float((magnitude**3).sum() / (magnitude**2).sum())
    if not 0 < scale < float("inf"):
        raise ValueError(f"the image has no finite signal to scale by (found {scale}): is the k-space, or its centre, empty or NaN?")
    return scale
