"""A spot at a known position in an oblique slab: its k-space in closed form, and where images show it.

It uses nothing from the simulation or the code under test.
"""

from __future__ import annotations

import struct

import ismrmrd
import numpy as np

x = ismrmrd.xsd
DIRECTIONS = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]  # rows: read, phase, slice
POSITION_MM = np.array([12.5, -31.0, 47.25])
OFFSET_MM = np.array([5.3, -6.1, 4.4])  # along read, phase and slice
SLABS = {
    "even": dict(encoded=(32, 20, 16), fov=(64, 40, 32)),
    "odd": dict(encoded=(33, 21, 17), fov=(64, 40, 32)),
    "mixed": dict(encoded=(31, 20, 17), fov=(62, 42, 30)),
    "oversampled": dict(encoded=(64, 20, 16), fov=(128, 40, 32), recon=(32, 20, 16), recon_fov=(64, 40, 32)),
    "partial Fourier E1": dict(encoded=(32, 20, 16), fov=(64, 40, 32), first=(6, 0)),
    "partial Fourier E1, E2": dict(encoded=(33, 20, 17), fov=(64, 40, 32), first=(6, 5)),
    "asymmetric echo": dict(encoded=(32, 20, 16), fov=(64, 40, 32), early=9),
    "cropped": dict(encoded=(32, 24, 20), fov=(64, 48, 40), recon=(32, 20, 16), recon_fov=(64, 40, 32)),
    "cropped by parts of a voxel": dict(
        encoded=(32, 24, 20), fov=(64, 48, 40), recon=(32, 20, 16), recon_fov=(64, 40.7, 31.1)
    ),
    "interpolated": dict(encoded=(32, 20, 16), fov=(64, 40, 32), recon=(64, 41, 32)),
    "interpolated and cropped": dict(
        encoded=(48, 25, 21), fov=(96, 50, 42), recon=(65, 40, 32), recon_fov=(64, 40, 32)
    ),
    "smaller matrix": dict(encoded=(48, 30, 24), fov=(64, 40, 32), recon=(32, 20, 17)),
    "wider than acquired": dict(encoded=(32, 20, 16), fov=(64, 40, 32), recon=(40, 24, 20), recon_fov=(80, 48, 40)),
    "one partition more": dict(encoded=(32, 20, 15), fov=(64, 40, 33), recon=(32, 20, 16)),
}


def point_scan(encoded, fov, recon=None, recon_fov=None, first=(0, 0), early=0):
    """Header, acquisitions and voxel size in mm (x, y, z) of a scan of the spot, which is as wide as a voxel.

    Args:
        encoded, fov, recon, recon_fov: matrices and fields of view in mm, x, y, z.
        first: first E1 and E2 acquired.
        early: samples missing before the echo.
    """
    recon, recon_fov = recon or encoded, recon_fov or fov
    header = _header(encoded, fov, recon, recon_fov, first)
    kx, ky, kz = ((np.arange(n) - n // 2) / mm for n, mm in zip(encoded, fov))
    voxel = [mm / n for n, mm in zip(recon, recon_fov)]
    width = [max(size, mm / n) for size, n, mm in zip(voxel, encoded, fov)]
    spot = lambda k, mm, size: np.exp(-2j * np.pi * k * mm - 2 * (np.pi * k * size) ** 2)
    along = [spot(k, mm, size) for k, mm, size in zip((kx, ky, kz), OFFSET_MM, width)]
    lines = []
    for z in range(first[1], encoded[2]):
        for y in range(first[0], encoded[1]):
            samples = (1e3 * along[0] * along[1][y] * along[2][z])[None, early:]
            line = ismrmrd.Acquisition.from_array(samples.astype(np.complex64))
            line.center_sample = encoded[0] // 2 - early
            line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2 = y - first[0], z - first[1]
            line.position = tuple(POSITION_MM)
            line.read_dir, line.phase_dir, line.slice_dir = (tuple(d) for d in DIRECTIONS)
            lines.append(line)
    return header, lines, np.array(voxel)


def _header(encoded, fov, recon, recon_fov, first):
    limit = lambda n, gone: x.limitType(minimum=0, maximum=n - 1 - gone, center=n // 2 - gone)

    def space(n, mm):
        matrix, field = x.matrixSizeType(x=n[0], y=n[1], z=n[2]), x.fieldOfViewMm(x=mm[0], y=mm[1], z=mm[2])
        return x.encodingSpaceType(matrixSize=matrix, fieldOfView_mm=field)

    e1, e2 = (limit(n, gone) for n, gone in zip(encoded[1:], first))
    encoding = x.encodingType(
        encodedSpace=space(encoded, fov),
        reconSpace=space(recon, recon_fov),
        encodingLimits=x.encodingLimitsType(kspace_encoding_step_1=e1, kspace_encoding_step_2=e2),
        trajectory=x.trajectoryType.CARTESIAN,
    )
    conditions = x.experimentalConditionsType(H1resonanceFrequency_Hz=1)
    return x.ismrmrdHeader(experimentalConditions=conditions, encoding=[encoding])


def error_voxels(images: list[tuple[bytes, bytes]], voxel: np.ndarray) -> float:
    """Distance of the spot from its true position, in voxels along the worst axis.

    `images` are (header, uint16 pixels) as on the wire.
    """
    total, weight = np.zeros(3), 0.0
    for head, pixels in images:
        places, values = _voxels(head, pixels)
        total += values @ places
        weight += values.sum()
    return float(np.abs(DIRECTIONS @ (total / weight - POSITION_MM - OFFSET_MM @ DIRECTIONS) / voxel).max())


def _voxels(head: bytes, pixels: bytes) -> tuple[np.ndarray, np.ndarray]:
    """LPS position in mm [n 3] and squared value [n] of each voxel; pixel n//2 lies at the header's position."""
    matrix = np.array(struct.unpack_from("<3H", head, 16))
    fov, position, *directions = (np.array(struct.unpack_from("<3f", head, at)) for at in (22, 36, 48, 60, 72))
    z, y, x_ = (index.ravel() for index in np.indices(matrix[::-1]))
    steps = (np.stack([x_, y, z], axis=1) - matrix // 2) * (fov / matrix)
    return position + steps @ np.array(directions), np.frombuffer(pixels, "<u2").astype(float) ** 2
