"""The same scan with its volume on a finer mesh than the measured k-space fills; k-space beyond is not sampled.

A denoiser works voxel by voxel, and its response to an edge depends on where the edge lies between voxels; on a finer
mesh it depends less on this, and its errors are different.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .fft import centre_crop_or_pad
from .interpolation import interpolate
from .measurement import Measurement
from .pose import BLOCK
from .sense import Sense
from .slices import usable_axes

COVERED = 0.5  # root sum of squares of the interpolated coil maps above which a voxel belongs to the object


def on_finer_mesh(measurement: Measurement, factor: float, start: Tensor) -> Measurement:
    """The scan with `factor` times as many voxels along the phase-encoding axes within the usable slices.

    Their number is rounded up to a multiple of BLOCK. Intensities are kept: `kspace_crop` of a volume to the old matrix
    is the volume on the old mesh. `sigma` is scaled like the lines by the larger transform, so the solver takes an
    image's noise on this mesh to be higher than it is by the root of the ratio of voxels (`factor` where both phase
    encodes are refined); given the true value, it reconstructed planes worse.

    Args:
        measurement: one that keeps its `lines` [coils z y x] and has usable slices of one orientation only.
        start: volume [z y x] of `measurement`, the CG-SENSE image; it bounds an estimated noise level on the original
            mesh, because a finer one does not let the data determine more unknowns.
    """
    z, y, x = measurement.operator.shape
    across = usable_axes((z, y, x))[0]
    fine = tuple(
        n if n == 1 or axis == across else math.ceil(n * factor / BLOCK) * BLOCK for axis, n in enumerate((z, y))
    )
    maps = torch.stack([interpolate(coil, (*fine, x)) for coil in measurement.operator.coil_maps()])
    size = maps.abs().square().sum(0).sqrt()
    maps = torch.where(size > COVERED, maps / size.clamp_min(COVERED), 0)
    gain = (math.prod(fine) / (z * y)) ** 0.5  # of the unitary transform, at equal intensities
    lines = gain * centre_crop_or_pad(measurement.lines.movedim(3, 1), fine).movedim(1, 3)
    operator = Sense(maps, centre_crop_or_pad(measurement.operator.mask, fine), measurement.operator.device)
    return replace(
        measurement,
        operator=operator,
        adjoint=operator.adjoint(lines),
        energy=measurement.energy * gain**2,
        sigma=measurement.noise_level(start) * gain,
        sigma_bound=measurement.sigma_bound * gain,
        voxel_mm=tuple(mm * n / m for mm, n, m in zip(measurement.voxel_mm, (z, y, x), (*fine, x))),
        lines=lines,
        calibrated=None if measurement.calibrated is None else interpolate(measurement.calibrated, (*fine, x)),
    )
