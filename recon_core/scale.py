"""The intensity scale of the prior's images: one definition for training and reconstruction."""

from __future__ import annotations

import math

from torch import Tensor

from .fft import kspace_crop

SCALE_MM = 8.0


def evenly(values, most: int):
    """At most `most` of the values of a tensor or array of any shape, evenly spaced: for a percentile of all of them.

    The step shares no factor with the shape, so it never aligns with the rows: one side of the volume would then stand
    for all of it.
    """
    step = -(-math.prod(values.shape) // most)
    while math.gcd(step, math.prod(values.shape)) > 1:
        step += 1
    return values.reshape(-1)[::step]


def intensity_scale(volume: Tensor, voxel_mm: tuple[float, float, float]) -> float:
    """Brightness of typical tissue: sum |v|^3 / sum |v|^2 of the volume blurred to 8 mm voxels.

    The blur makes it insensitive to noise, aliasing and voxel size; the powers make it insensitive to air,
    and so to matrix size. It scales exactly with the volume.

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
        raise ValueError(
            f"the image has no finite signal to scale by (found {scale}): is the k-space, or its centre, empty or NaN?"
        )
    return scale
