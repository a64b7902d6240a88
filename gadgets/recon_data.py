"""Gadgetron's ReconData, the output of BucketToBuffer, read in bulk into arrays.

Axis order here is the reverse of Gadgetron's, so that arrays are C-contiguous as they come off the wire.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import ismrmrd
import numpy as np
from ismrmrd.hdf5 import acquisition_header_dtype

from .flags import BOTH_BIT, CALIBRATION_BIT

CHUNK_BYTES = 1 << 20
MAX_ARRAY_BYTES = 64 << 30
MAX_DIMENSIONS = 16
SAMPLING_BYTES = 56


class ReconDataError(ValueError):
    """Inconsistent buffers; the message is one sentence."""


@dataclass
class ReconBuffer:
    """data [LOC S N CHA E2 E1 E0] complex64, headers [LOC S N E2 E1] (number_of_samples 0: nothing was acquired)."""

    data: np.ndarray
    headers: np.ndarray

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Data [CHA E2 E1 E0] and headers [E2 E1] of each LOC, S and N.

        Raises:
            ReconDataError: if headers and data do not match.
        """
        expected = (*self.data.shape[:3], *self.data.shape[4:6])
        if self.headers.shape != expected:
            raise ReconDataError(
                f"expected headers of shape {expected} (LOC S N E2 E1) for data of shape {self.data.shape}, "
                f"got {self.headers.shape}"
            )
        for place in np.ndindex(self.data.shape[:3]):
            yield self.data[place], self.headers[place]


@dataclass
class ReconBit:
    """One encoding space: its data, and its separate reference lines if there are any."""

    data: ReconBuffer
    reference: ReconBuffer | None

    def reference_blocks(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Blocks of the lines for calibration only: Gadgetron has those also used for imaging in the data as well.

        Raises:
            ReconDataError: if headers and data do not match.
        """
        blocks = list(self.reference.blocks()) if self.reference is not None else []
        for _, headers in blocks:
            headers["number_of_samples"][headers["flags"] & (CALIBRATION_BIT | BOTH_BIT) != CALIBRATION_BIT] = 0
        return blocks


@dataclass
class ReconData:
    """One message: a bit for each encoding space."""

    bits: list[ReconBit]


def take_lines(data: np.ndarray, headers: np.ndarray) -> Iterator[ismrmrd.Acquisition]:
    """Acquired lines of a block as acquisitions of E0 samples, echo at E0//2, where Gadgetron puts it.

    Each line is removed from the block, which is all zeros at the end and may serve as the array to gather into.
    """
    data[:, headers["number_of_samples"] == 0] = 0
    for place, line in lines_of(data, headers):
        data[(slice(None), *place)] = 0
        yield line


def lines_of(data: np.ndarray, headers: np.ndarray) -> Iterator[tuple[tuple[int, int], ismrmrd.Acquisition]]:
    """Place (E2, E1) of each acquired line, and a copy of it as an acquisition; the block is left unchanged."""
    for e2, e1 in np.argwhere(headers["number_of_samples"] > 0):
        head = ismrmrd.AcquisitionHeader.from_buffer_copy(headers[e2, e1].tobytes())
        samples = data[:, e2, e1].copy()
        head.active_channels, head.number_of_samples = samples.shape
        head.center_sample = samples.shape[1] // 2
        head.discard_pre = head.discard_post = head.trajectory_dimensions = 0
        yield (int(e2), int(e1)), ismrmrd.Acquisition(head, samples)


class ReconDataReader:
    """Reads the payload of a ReconData message.

    Args:
        read: returns exactly n bytes, or raises.
        max_bytes: limit for all arrays of the message together.
        readouts: for each encoding, the samples of a whole readout and of one without oversampling.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        max_bytes: int = MAX_ARRAY_BYTES,
        readouts: Sequence[tuple[int, int]] = (),
    ):
        self.read, self.left, self.readouts = read, max_bytes, readouts

    def message(self) -> ReconData:
        """Read the whole payload; ReconDataError if lengths make no sense."""
        (count,) = struct.unpack("<Q", self.read(8))
        if count > MAX_DIMENSIONS:
            raise ReconDataError(
                f"a ReconData of {count} encoding spaces was announced, the limit is {MAX_DIMENSIONS}: "
                "the stream is damaged or out of step"
            )
        message = ReconData([ReconBit(self._buffer(), self._optional(self._buffer)) for _ in range(count)])
        for bit, readout in zip(message.bits, self.readouts):
            for buffer in (bit.data, bit.reference):
                if buffer is not None:
                    _centre_crop(buffer.data, *readout)
        return message

    def _buffer(self) -> ReconBuffer:
        data = self._array(np.dtype(np.complex64))
        for _ in range(2):  # trajectory and density weights, not needed for Cartesian scans
            self._optional(lambda: self._array(np.dtype(np.float32)))
        headers = self._array(acquisition_header_dtype)
        self.read(SAMPLING_BYTES)  # fields of view, matrices and limits: the scan's header has them
        return ReconBuffer(_with_axes(data, 7), _with_axes(headers, 5))

    def _optional(self, read: Callable):
        return read() if self.read(1) != b"\0" else None

    def _array(self, dtype: np.dtype) -> np.ndarray:
        """hoNDArray in reversed axis order, writable."""
        (count,) = struct.unpack("<Q", self.read(8))
        if count > MAX_DIMENSIONS:
            raise ReconDataError(
                f"an array of {count} dimensions was announced, the limit is {MAX_DIMENSIONS}: "
                "the stream is damaged or out of step"
            )
        shape = struct.unpack(f"<{count}Q", self.read(8 * count))[::-1]
        nbytes = dtype.itemsize * math.prod(shape)
        if nbytes > self.left:
            raise ReconDataError(
                f"an array of {nbytes} bytes was announced where {self.left} are left of the limit: "
                "the stream is damaged, or the scan too large"
            )
        self.left -= nbytes
        if not count or not nbytes:
            return np.empty(0, dtype)
        try:
            out = np.empty(nbytes, np.uint8)  # untouched pages cost nothing: a false length uses no memory
        except MemoryError:
            raise ReconDataError(f"an array of {nbytes} bytes was announced, which does not fit into memory") from None
        for start in range(0, nbytes, CHUNK_BYTES):
            stop = min(nbytes, start + CHUNK_BYTES)
            out[start:stop] = np.frombuffer(self.read(stop - start), np.uint8)
        return out.view(dtype).reshape(shape)


def _centre_crop(data: np.ndarray, whole: int, cut: int) -> None:
    """Move the image of lines [... E0] back by the voxel by which RemoveROOversamplingGadget moved it, if it did.

    That gadget keeps `cut` of `whole` voxels from (whole - cut) // 2 on. If only `whole` is even, the middle one of all
    is then one behind the middle of those kept.
    """
    if data.shape[-1] == cut < whole and cut % 2 and not whole % 2:
        data *= np.exp(2j * np.pi / cut * (np.arange(cut) - cut // 2)).astype(data.dtype)


def _with_axes(array: np.ndarray, axes: int) -> np.ndarray:
    """Restore axes of length 1 that may be missing on the wire, where they are the trailing ones."""
    if array.ndim > axes:
        raise ReconDataError(f"expected an array of at most {axes} dimensions, got {array.ndim}")
    return array.reshape((1,) * (axes - array.ndim) + array.shape) if array.size else array.reshape((0,) * axes)
