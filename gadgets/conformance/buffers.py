"""ReconData, byte by byte as Gadgetron's BucketToBuffer gadget makes it: the other kind of input."""

from __future__ import annotations

import struct

import ismrmrd
import numpy as np
from ismrmrd.hdf5 import acquisition_header_dtype


def recon_data(header, lines, remove_oversampling: bool = False) -> bytes:
    """ReconData payload of a bucket: N = contrast, S = average, LOC = slice.

    k = 0 lies at matrix/2, as with parallelImaging in the header.
    """
    flags = (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION, ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
    only, both = (1 << (flag - 1) for flag in flags)
    data = [line for line in lines if not line.flags & only or line.flags & both]
    reference = [line for line in lines if line.flags & (only | both)]
    bits = _recon_buffer(header, data, remove_oversampling)
    bits += b"\1" + _recon_buffer(header, reference, remove_oversampling) if reference else b"\0"
    return struct.pack("<Q", 1) + bits


def _recon_buffer(header, lines, remove_oversampling) -> bytes:
    encoding = header.encoding[0]
    encoded, recon = encoding.encodedSpace, encoding.reconSpace
    limits = (encoding.encodingLimits.kspace_encoding_step_1, encoding.encodingLimits.kspace_encoding_step_2)
    ny, nz = encoded.matrixSize.y, encoded.matrixSize.z
    nx = recon.matrixSize.x if remove_oversampling else encoded.matrixSize.x
    sizes = [1 + max(getattr(line.idx, name) for line in lines) for name in ("slice", "average", "contrast")]
    data = np.zeros((*sizes, lines[0].active_channels, nz, ny, nx), np.complex64)
    heads = np.zeros((*sizes, nz, ny), acquisition_header_dtype)
    for line in lines:
        samples = np.zeros((line.active_channels, encoded.matrixSize.x), np.complex64)
        start = encoded.matrixSize.x // 2 - line.center_sample
        samples[:, start : start + line.number_of_samples] = line.data
        if remove_oversampling:
            image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(samples, 1), axis=1, norm="ortho"), 1)
            low = (samples.shape[1] - nx) // 2  # not centred if only nx is odd
            cropped = np.fft.ifftshift(image[:, low : low + nx], 1)
            samples = np.fft.fftshift(np.fft.fft(cropped, axis=1, norm="ortho"), 1)
        place = (line.idx.slice, line.idx.average, line.idx.contrast)
        steps = (line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2)
        y, z = (step + n // 2 - limit.center for step, n, limit in zip(steps, (ny, nz), limits))
        data[place][:, z, y] = samples
        heads[(*place, z, y)] = np.frombuffer(bytes(line.getHead()), acquisition_header_dtype)[0]
    fovs = [v for space in (encoded, recon) for f in [space.fieldOfView_mm] for v in (f.x, f.y, f.z)]
    matrices = [nx, ny, nz, recon.matrixSize.x, recon.matrixSize.y, recon.matrixSize.z]
    shifted = []
    for limit, size in zip(limits, (ny, nz)):
        middle = size // 2
        shifted += [limit.minimum + middle - limit.center, middle, limit.maximum + middle - limit.center]
    sampling = struct.pack("<6f6H9H2x", *fovs, *matrices, 0, nx // 2, nx - 1, *shifted)
    return _array(data) + b"\0\0" + _array(heads) + sampling


def _array(array: np.ndarray) -> bytes:
    return struct.pack(f"<Q{array.ndim}Q", array.ndim, *array.shape[::-1]) + array.tobytes()
