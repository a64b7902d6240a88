"""One readout: samples to image space, echo centred, oversampling removed."""

from __future__ import annotations

import ismrmrd
import numpy as np

from .geometry import Geometry

SHARE = 2  # so many lines without a sign of oversampling, for each that shows it, are short ones of an oversampled scan
BEYOND = 16  # one over it of the matrix, beyond which no line reaches on either side
OVERSAMPLED = 1.5  # times the header's matrix: more samples than this are readout oversampling that it does not tell of


class Readout:
    """Transforms lines of one encoding to the voxel grid of the image along x; the transform is unitary.

    A line's oversampling is 0 where it was removed before us, 1 as the header tells of it, n where the samples fill the
    header's matrix n times.

    Args:
        image: geometry of the image.
        own: geometry of the encoding that the lines belong to, if it is another one (external calibration).
    """

    def __init__(self, image: Geometry, own: Geometry | None = None):
        own, voxel_mm = own or image, image.encoded_fov_mm[0] / image.encoded_matrix[0]
        self.full, self.cut = own.encoded_matrix[0], own.readout
        self.full_length = round(own.encoded_fov_mm[0] / voxel_mm)
        self.cut_length = max(1, min(self.full_length, round(own.recon_fov_mm[0] / voxel_mm)))
        self.work = np.zeros((0, 0), np.complex64)
        self.long = self.bare = 0

    def saw(self, oversampling: int) -> None:
        """Remember what a line of the image shows."""
        self.long, self.bare = self.long + (oversampling > 0), self.bare + (oversampling == 0)

    @property
    def oversampled(self) -> bool:
        """Whether enough of the scan's lines show oversampling for the others to be short: nobody removes it from some lines only."""
        return SHARE * self.long >= self.bare and self.long > 0

    def echo(self, line: ismrmrd.Acquisition) -> tuple[slice, int, bool]:
        """Which samples count, where the echo lies among them, and whether that had to be assumed."""
        first, last = line.discard_pre, max(line.discard_pre, line.number_of_samples - line.discard_post)
        samples, centre = last - first, line.center_sample - first
        beyond = max(samples - centre - (self.full + 1) // 2, centre - self.full // 2) if 0 <= centre < samples <= self.full else 0
        middle = beyond > (self.full // BEYOND if line.center_sample else 0)  # so many samples would lie outside of k-space: nobody knew the place
        return slice(first, last), samples // 2 if middle else centre, middle

    def oversampling(self, line: ismrmrd.Acquisition) -> int:
        """What the line alone shows of its oversampling: none where its samples reach no further than they would without."""
        there, centre, _ = self.echo(line)
        samples = there.stop - there.start
        if samples >= OVERSAMPLED * self.full:
            return max(2, round(samples / self.full))
        reach = max(centre, samples - centre)
        shown = line.number_of_samples > self.cut or 4 * reach > self.full + self.cut
        return int(shown or self.full_length == self.cut_length)

    def add(self, data: np.ndarray, centre: int, row: np.ndarray, oversampling: int = 1) -> None:
        """Add samples [coils samples], echo at `centre`, to `row` [coils x]; an asymmetric echo is zero-filled."""
        length, half = self.full_length * oversampling or self.cut_length, row.shape[1] // 2
        image = np.fft.ifft(self._wrapped(data, centre, length), axis=1, norm="ortho")
        right, left = min(row.shape[1] - half, (length + 1) // 2), min(half, length // 2)
        row[:, half : half + right] += image[:, :right]
        row[:, half - left : half] += image[:, length - left :]

    def _wrapped(self, data: np.ndarray, centre: int, length: int) -> np.ndarray:
        """Samples at k modulo `length`, as the transform wants them; samples beyond it are cut."""
        if self.work.shape != (len(data), length):
            self.work = np.zeros((len(data), length), np.complex64)
        first, last = max(0, centre - length // 2), min(data.shape[1], centre + (length + 1) // 2)
        self.work[:, : last - centre] = data[:, centre:last]
        self.work[:, last - centre : length - (centre - first)] = 0
        self.work[:, length - (centre - first) :] = data[:, first:centre]
        return self.work
