"""One readout: samples to image space, echo centred, oversampling removed."""

from __future__ import annotations

import ismrmrd
import numpy as np

from .geometry import Geometry

# For each line that shows oversampling, up to so many without a sign of it are short lines of an oversampled scan.
SHARE = 2
BEYOND = 16  # no line extends beyond k-space, on either side, by more than 1/16 of the matrix
UNEVEN = 0.25  # samples; a trajectory that strays farther from equal spacing blurs and distorts the image
OVERSAMPLED = 1.5  # times the header's matrix: lines this long have readout oversampling that the header does not state


class Readout:
    """Transforms lines of one encoding to the voxel grid of the image along x; the transform is unitary.

    A line's oversampling is 0 if it was removed upstream, 1 if it is as the header states, n if the samples fill the
    header's matrix n times.

    Args:
        image: geometry of the image.
        own: geometry of the lines' encoding, if it is not the image's (external calibration).
    """

    def __init__(self, image: Geometry, own: Geometry | None = None):
        own, voxel_mm = own or image, image.encoded_fov_mm[0] / image.encoded_matrix[0]
        self.full, self.cut = own.encoded_matrix[0], own.readout
        self.full_length = round(own.encoded_fov_mm[0] / voxel_mm)
        self.cut_length = max(1, min(self.full_length, round(own.recon_fov_mm[0] / voxel_mm)))
        self.work = np.zeros((0, 0), np.complex64)
        self.long = self.bare = 0

    def saw(self, oversampling: int) -> None:
        """Record whether an imaging line shows oversampling."""
        self.long, self.bare = self.long + (oversampling > 0), self.bare + (oversampling == 0)

    @property
    def oversampled(self) -> bool:
        """Whether enough lines show oversampling for the others to be merely short.

        It is never removed from only some lines.
        """
        return SHARE * self.long >= self.bare and self.long > 0

    def echo(self, line: ismrmrd.Acquisition) -> tuple[slice, int, bool]:
        """Samples to use, the echo's index among them, and whether that index had to be assumed."""
        first, last = line.discard_pre, max(line.discard_pre, line.number_of_samples - line.discard_post)
        samples, centre = last - first, line.center_sample - first
        beyond = 0
        if 0 <= centre < samples <= self.full:
            beyond = max(samples - centre - (self.full + 1) // 2, centre - self.full // 2)
        # With too many samples outside k-space, the writer did not know the centre sample.
        middle = beyond > (self.full // BEYOND if line.center_sample else 0)
        return slice(first, last), samples // 2 if middle else centre, middle

    def uneven(self, line: ismrmrd.Acquisition) -> bool:
        """Whether the line comes with a trajectory and this is not a straight one at constant speed."""
        there, _, _ = self.echo(line)
        places = np.asarray(line.traj, np.float64).reshape(line.number_of_samples, line.trajectory_dimensions)[
            there
        ]  # [samples dimensions]
        if len(places) < 3 or not places.shape[1] or not np.isfinite(places).all():
            return False
        speed = (places[-1] - places[0]) / (len(places) - 1)
        away = places - places[0] - np.arange(len(places))[:, None] * speed
        return bool(np.linalg.norm(away, axis=1).max() > UNEVEN * np.linalg.norm(speed)) and bool(speed.any())

    def oversampling(self, line: ismrmrd.Acquisition) -> int:
        """Oversampling that the line itself shows: 0 if its samples reach no further than they would without."""
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
        """Samples at k modulo `length`, the order of the FFT; those beyond it are cut off."""
        if self.work.shape != (len(data), length):
            self.work = np.zeros((len(data), length), np.complex64)
        first, last = max(0, centre - length // 2), min(data.shape[1], centre + (length + 1) // 2)
        self.work[:, : last - centre] = data[:, centre:last]
        self.work[:, last - centre : length - (centre - first)] = 0
        self.work[:, length - (centre - first) :] = data[:, first:centre]
        return self.work
