"""Sums of lines on the matrix of a volume: preallocated, filled as lines arrive."""

from __future__ import annotations

import ismrmrd
import numpy as np
import torch

from recon_core.coils import find_acs, too_few

from .centre import block_offset, centre_offset, echo_offset, move_echo
from .failure import ScanError, of_lines
from .flags import REVERSE_BIT
from .geometry import Geometry
from .readout import Readout

MAX_VOLUME_BYTES = 64 << 30


class Grid:
    """Sums of lines [coils z y x] at their places, and line counts [z y].

    `kspace` may supply the array to gather into, all zeros by the time its lines come.
    """

    def __init__(self, geometry: Geometry, coils: int, kspace: np.ndarray | None = None):
        nbytes = 8 * coils * int(np.prod(geometry.shape))
        if nbytes > MAX_VOLUME_BYTES:
            raise ScanError(
                f"the header asks for {nbytes / 2**30:.0f} GiB of k-space ({coils} coils, matrix {geometry.shape}); "
                f"the limit is {MAX_VOLUME_BYTES >> 30} GiB"
            )
        self.kspace = np.zeros((coils, *geometry.shape), np.complex64) if kspace is None else kspace
        self.counts = np.zeros(geometry.shape[:2], np.float32)
        self.energy = np.zeros(geometry.shape[:2], np.float32)  # of the strongest line at each place
        self.lines = self.filled = 0  # lines added; places that have some
        self.uncentred = self.reversed = 0  # of the lines added
        self.begin_at_echo = 0  # of them: short ones whose centre sample is stated as 0
        self.outside = self.unfit = self.empty = 0  # lines left out, see `warnings`
        self.echo_moved = False
        # What was assumed about lines longer or shorter than the header says, and of how many.
        self.lengths: dict[str, int] = {}

    def place(self, line: ismrmrd.Acquisition, own: Geometry) -> tuple[int, int] | None:
        """Place z, y of a line of encoding `own`; outside the matrix, the line is counted and None returned."""
        z, y = own.place(line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2)
        depth, height = self.counts.shape
        z, y = z + depth // 2 - own.shape[0] // 2, y + height // 2 - own.shape[1] // 2
        if 0 <= z < depth and 0 <= y < height:
            return z, y
        self.outside += 1
        return None

    def move(self, shift: tuple[int, int]) -> None:
        """Move all lines by `shift` (z, y); those that leave the matrix are dropped and counted."""
        gone = shifted(np.ones(self.counts.shape, bool), tuple(-n for n in shift)) == 0
        self.outside += int(self.counts[gone].sum())
        self.kspace[:, gone] = 0
        for coil in self.kspace:  # one at a time, to avoid a second array
            coil[:] = np.roll(coil, shift, (0, 1))
        self.counts, self.energy = (shifted(array, shift) for array in (self.counts, self.energy))
        self.lines, self.filled = int(self.counts.sum()), int((self.counts > 0).sum())

    def flatten(self) -> None:
        """Keep only the first plane that has lines."""
        z = int((self.counts > 0).any(axis=1).argmax())
        self.kspace = np.ascontiguousarray(self.kspace[:, z : z + 1])
        self.counts, self.energy = (array[z : z + 1] for array in (self.counts, self.energy))

    def centre_echo(self, offset: int | None = None) -> int:
        """Centre the echo, by `offset` samples or as the lines themselves show; returns the offset.

        Acts only once, then returns 0.
        """
        if self.echo_moved:
            return 0
        offset = echo_offset(self.kspace, self.energy) if offset is None else offset
        if offset:
            move_echo(self.kspace, offset)
        self.echo_moved = True
        return offset

    def add(self, line: ismrmrd.Acquisition, place: tuple[int, int], readout: Readout, oversampling: int) -> bool:
        """Add a line at its place, flipped if its readout is reversed.

        Returns whether it fitted; if not, it is only counted.
        """
        there, centre, assumed = readout.echo(line)
        data = line.data[:, there]
        samples = data.shape[1]
        if len(data) != len(self.kspace) or not 0 <= centre < samples:
            self.unfit += 1
            return False
        if not data[:, centre].any() and not data.any():
            self.empty += 1
            return False
        self.uncentred += assumed
        self.begin_at_echo += centre == 0 and oversampling > 0 and samples <= readout.cut < readout.full
        self.energy[place] = max(self.energy[place], np.vdot(data, data).real)
        if line.flags & REVERSE_BIT:
            self.reversed += 1
            data, centre = data[:, ::-1], samples - 1 - centre
        have = f"{{have}} {samples} samples instead of the {readout.full} in the header"
        if samples > readout.full and oversampling > 1:
            self._of_another_length(f"{have}: {oversampling}-fold readout oversampling was assumed")
        elif samples > readout.full:
            self._of_another_length(f"{have}: the outer ones were cut")
        elif not oversampling and samples < readout.cut:
            self._of_another_length(f"{have}: oversampling was assumed to be removed already")
        readout.add(data, centre, self.kspace[(slice(None), *place)], oversampling)
        self.filled += not self.counts[place]
        self.counts[place] += 1
        self.lines += 1
        return True

    def _of_another_length(self, text: str) -> None:
        self.lengths[text] = self.lengths.get(text, 0) + 1

    def warnings(self, kind: str) -> list[str]:
        """What was left out or assumed, for the user."""
        out = []
        if self.outside:
            out.append(of_lines(self.outside, "{lines} lay outside the encoded matrix and {were} left out", kind))
        if self.unfit:
            text = (
                "{lines} had a different number of channels or samples than most, no samples or no echo "
                "and {were} left out"
            )
            out.append(of_lines(self.unfit, text, kind))
        if self.empty:
            out.append(of_lines(self.empty, "{lines} held only zeros and {were} treated as not acquired", kind))
        out += [of_lines(count, f"{{lines}} {text}", kind) for text, count in self.lengths.items()]
        if self.uncentred:
            text = "{lines} had a centre sample that would put others outside k-space: the middle was assumed"
            out.append(of_lines(self.uncentred, text, kind))
        return out


class CalibrationGrid(Grid):
    """Sums of calibration lines at their places on the matrix of the image; several volumes may use them."""

    def __init__(self, image: Geometry, coils: int, kspace: np.ndarray | None = None):
        super().__init__(image, coils, kspace)
        self.head: ismrmrd.AcquisitionHeader | None = None  # of the first line
        self.foreign = self.renumbered = False  # of another encoding; with a numbering of their own
        self.handed_out = False  # a finished volume, perhaps in reconstruction, has these arrays

    def unshare(self) -> None:
        """Continue with copies of arrays that were handed out."""
        if self.handed_out:
            self.kspace, self.counts, self.handed_out = self.kspace.copy(), self.counts.copy(), False

    def centre_lines(self) -> None:
        """Move the lines to the middle of the matrix if the strongest lie far from it.

        Such lines count from another middle.
        """
        offset, own = centre_offset(self.energy), not self.foreign
        if offset is None and too_few(find_acs(torch.from_numpy(self.counts)), self.counts.shape):
            offset = block_offset(self.energy)
        if offset and any(offset):
            self.move(tuple(-n for n in offset))
            self.foreign, self.renumbered = True, own


def shifted(array: np.ndarray, shift: tuple[int, int]) -> np.ndarray:
    """Array [z y] moved by `shift`, filled with zeros (or False)."""
    out = np.zeros_like(array)
    there = tuple(slice(max(0, n), length + min(0, n)) for n, length in zip(shift, array.shape))
    here = tuple(slice(max(0, -n), length + min(0, -n)) for n, length in zip(shift, array.shape))
    out[there] = array[here]
    return out
