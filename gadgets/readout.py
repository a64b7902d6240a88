"""One readout: samples to image space, echo centred, oversampling removed."""

from __future__ import annotations

import numpy as np

from .geometry import Geometry


OVERSAMPLED = 1.5  # times the header's matrix: more samples than this are readout oversampling that it does not tell of


class Readout:
    """Transforms lines of one encoding to the voxel grid of the image along x; the transform is unitary.

    A short line of a scan whose lines are `oversampled` has less resolution; in any other, its oversampling was removed
    before us.

    Args:
        image: geometry of the image.
        own: geometry of the encoding that the lines belong to, if it is another one (external calibration).
    """

    def __init__(self, image: Geometry, own: Geometry | None = None):
        own, voxel_mm = own or image, image.encoded_fov_mm[0] / image.encoded_matrix[0]
        self.full, self.cut = own.encoded_matrix[0], own.readout
        self.full_length = round(own.encoded_fov_mm[0] / voxel_mm)
        self.cut_length = max(1, min(self.full_length, round(own.recon_fov_mm[0] / voxel_mm)))
        self.oversampled, self.times = False, 1
        self.work = np.zeros((0, 0), np.complex64)

    def excess(self, samples: int) -> int:
        """How many times the header's matrix the samples fill: 1, or the oversampling that the header does not tell of."""
        return max(2, round(samples / self.full)) if samples >= OVERSAMPLED * self.full else 1

    def unsure(self, samples: int, centre: int) -> bool:
        """Whether it takes other lines to tell if a line's oversampling was removed."""
        return not self.oversampled and self._length(samples, centre) != self.full_length

    def add(self, data: np.ndarray, centre: int, row: np.ndarray) -> None:
        """Add samples [coils samples], echo at `centre`, to `row` [coils x]; an asymmetric echo is zero-filled."""
        self.oversampled, self.times = self.oversampled or data.shape[1] > self.cut, max(self.times, self.excess(data.shape[1]))
        length, half = self._length(data.shape[1], centre), row.shape[1] // 2
        image = np.fft.ifft(self._wrapped(data, centre, length), axis=1, norm="ortho")
        right, left = min(row.shape[1] - half, (length + 1) // 2), min(half, length // 2)
        row[:, half : half + right] += image[:, :right]
        row[:, half - left : half] += image[:, length - left :]

    def _length(self, samples: int, centre: int) -> int:
        """Length of the transform: oversampling was removed before us if the samples reach no further than without it."""
        reach = max(centre, samples - centre)
        if self.oversampled or 4 * reach > self.full + self.cut:
            return self.full_length * self.times
        return self.cut_length

    def _wrapped(self, data: np.ndarray, centre: int, length: int) -> np.ndarray:
        """Samples at k modulo `length`, as the transform wants them; samples beyond it are cut."""
        if self.work.shape != (len(data), length):
            self.work = np.zeros((len(data), length), np.complex64)
        first, last = max(0, centre - length // 2), min(data.shape[1], centre + (length + 1) // 2)
        self.work[:, : last - centre] = data[:, centre:last]
        self.work[:, last - centre : length - (centre - first)] = 0
        self.work[:, length - (centre - first) :] = data[:, first:centre]
        return self.work
