"""One volume of a scan: under construction, and finished."""

from __future__ import annotations

from dataclasses import dataclass, field

import ismrmrd
import numpy as np
import torch

from recon_core.measurement import Reference

from .completeness import NO_CENTRE, hole_at_centre, missing_lines
from .failure import of_lines
from .flags import BOTH_BIT
from .geometry import Geometry
from .grid import CalibrationGrid, Grid, shifted
from .readout import Readout

BOTH_WAYS = 0.1  # of the lines: the user is warned if more than this run in each of the two readout directions
DECIDED = 16  # filled places beyond which a volume of short lines is kept as such, whatever the rest of the scan shows


@dataclass
class Shared:
    """What the volumes of a scan decide for each other.

    It must be the same for all its images or need not be found twice: `scales` of pixels by series, contrast and set;
    `references` by number of coils; `learned` is the prior they have taught.
    """

    scales: dict[tuple[int, ...], float] = field(default_factory=dict)
    references: dict[int, Reference] = field(default_factory=dict)
    learned: torch.nn.Module | None = None


@dataclass
class GatheredVolume:
    """One volume: sums of lines [coils z y x] (x in image space), line counts [z y], geometry and header.

    `head` is the header of the acquired line nearest the k-space centre, or of the first line if none could be used.
    `shared` is the same object for all volumes of a scan. `gain` converts an image in noise units to those of the
    scan's first volume, whose lines may have another dwell time. `flaw` says why no image can be made of the volume, if
    so. `echo_offset` is the number of samples (without oversampling) by which the echo was found beyond the stated
    centre and moved back.
    """

    geometry: Geometry
    kspace: torch.Tensor
    counts: torch.Tensor
    head: ismrmrd.AcquisitionHeader
    noise: torch.Tensor | None = None
    calibration: tuple[torch.Tensor, torch.Tensor] | None = None
    warnings: list[str] = field(default_factory=list)
    shared: Shared = field(default_factory=Shared)
    gain: float = 1.0
    flaw: str = ""
    echo_offset: int = 0


class OpenVolume:
    """One volume under construction: its grid, and what its lines have shown."""

    def __init__(self, geometry: Geometry, coils: int, kspace: np.ndarray | None = None):
        self.geometry = geometry
        self.first: ismrmrd.AcquisitionHeader | None = None
        self.noise_came = 0  # number of noise lines that had come before
        self._begin(Grid(geometry, coils, kspace))

    def _begin(self, grid: Grid, oversampling: int | None = None) -> None:
        self.grid, self.oversampling = grid, oversampling
        self.averages_at = np.zeros(self.geometry.shape[:2], np.uint64)
        self.calibrating = np.zeros(self.geometry.shape[:2], bool)
        self.head: ismrmrd.AcquisitionHeader | None = None
        self.nearest, self.judged = np.inf, (0, False)
        # With respect to the alternative centre, where the header's is in doubt.
        self.other_nearest, self.other_head = np.inf, None
        self.averages = self.duplicates = 0
        self.certain = 0  # places whose first line showed the oversampling of the volume
        self.strange: set[tuple[int, int]] = set()  # places of lines unlike the others

    def add(self, line: ismrmrd.Acquisition, readout: Readout) -> None:
        """Add one imaging line at its place; a line that does not fit is only counted."""
        if self.first is None:
            self.first = line.getHead()
        place = self.grid.place(line, self.geometry)
        if place is None:
            return
        oversampling = readout.oversampling(line)
        readout.saw(oversampling)
        if self.oversampling is None:
            self.oversampling = oversampling or int(readout.oversampled)
        if not self._is_one_of_us(line.active_channels, oversampling, readout.oversampled, place):
            self.grid.unfit += 1
            return
        new = not self.grid.counts[place]
        if self.grid.add(line, place, readout, self.oversampling):
            self.certain += new and oversampling == self.oversampling
            self.note(line.idx.average, line.flags, place, line.getHead)

    def _is_one_of_us(self, coils: int, oversampling: int, may_be_short: bool, place: tuple[int, int]) -> bool:
        """Whether a line has the channels and oversampling of the others.

        The first lines may have been the odd ones out. A short line of an oversampled scan has lower resolution. Places
        count, not lines: unflagged noise lines share one.
        """
        ours = coils == len(self.grid.kspace)
        if ours and oversampling == self.oversampling:
            return True
        self.strange.add(place)
        short = ours and oversampling == 0 and self.oversampling == 1
        if short and (may_be_short or (not self.certain and self.grid.filled > DECIDED)):
            return True
        if len(self.strange) <= self.certain:
            return False
        grid = Grid(self.geometry, coils)
        grid.outside, grid.unfit = self.grid.outside, self.grid.unfit + self.grid.lines
        self._begin(grid, oversampling)
        return True

    def note(self, average: int, flags: int, place: tuple[int, int], head) -> None:
        """Record a line that was added; `head()` is called for its header if it is the nearest to the centre so far."""
        bit = np.uint64(1 << average if average < 64 else 0)  # later averages are not checked for duplicates
        self.averages = max(self.averages, average + 1)
        if self.averages_at[place] & bit:
            self.duplicates += 1
        self.averages_at[place] |= bit
        if flags & BOTH_BIT:
            self.calibrating[place] = True
        distance = abs(place[0] - self.geometry.shape[0] // 2) + abs(place[1] - self.geometry.shape[1] // 2)
        if distance < self.nearest:
            self.nearest, self.head = distance, head()
        if self.geometry.fitting != (None, None):
            self._note_for_the_other_centre(place, head)

    def _note_for_the_other_centre(self, place: tuple[int, int], head) -> None:
        shift = self.geometry.shift_to(self.geometry.refitted((True, True)))
        distance = sum(abs(at + by - n // 2) for at, by, n in zip(place, shift, self.geometry.shape))
        if distance < self.other_nearest:
            self.other_nearest, self.other_head = distance, head()

    def move(self, geometry: Geometry) -> None:
        """Continue with another k-space centre; lines already gathered are moved."""
        shift = self.geometry.shift_to(geometry)
        self.geometry = geometry
        self.grid.move(shift)
        self.averages_at, self.calibrating = (shifted(array, shift) for array in (self.averages_at, self.calibrating))
        self.strange = {(z + shift[0], y + shift[1]) for z, y in self.strange}
        self.nearest, self.head, self.judged = self.other_nearest, self.other_head or self.head, (0, False)

    def flatten(self, geometry: Geometry) -> None:
        """Continue with `geometry`, which has a single partition: that of the lines."""
        z = int((self.grid.counts > 0).any(axis=1).argmax())
        away = abs(z - self.geometry.shape[0] // 2)
        self.geometry = geometry
        self.grid.flatten()
        self.averages_at, self.calibrating = (array[z : z + 1] for array in (self.averages_at, self.calibrating))
        self.strange = {(0, y) for at, y in self.strange if at == z}
        self.nearest, self.other_nearest, self.judged = self.nearest - away, self.other_nearest - away, (0, False)

    def lacks_nothing(self, averages: int) -> bool:
        """Whether as many lines and averages came as the header announces; cached until another line comes."""
        if self.judged[0] != self.grid.lines:
            complete = self.averages >= averages and not missing_lines(self.geometry.settled(), self.grid.counts)
            self.judged = self.grid.lines, complete
        return self.judged[1]

    def finished(self, noise: torch.Tensor | None, calibration: CalibrationGrid | None) -> GatheredVolume:
        """The volume, with notes for the user.

        To be called once: it settles the geometry and may write calibration lines into the gathered k-space.
        """
        self.geometry = self.geometry.settled()
        kspace, counts = torch.from_numpy(self.grid.kspace), torch.from_numpy(self.grid.counts)
        volume = GatheredVolume(self.geometry, kspace, counts, self.head or self.first, noise)
        volume.warnings += [*self.geometry.warnings, *self.grid.warnings("")]
        if self.duplicates:
            volume.warnings.append(of_lines(self.duplicates, "{lines} came more than once and {were} averaged"))
        if calibration is not None:
            volume.warnings += self._take_centre(calibration)
            volume.calibration = self._calibration(calibration)
            volume.warnings += calibration.warnings("calibration ")
        volume.warnings += missing_lines(self.geometry, self.grid.counts)
        if self.grid.filled and hole_at_centre(self.grid.counts).any():
            volume.warnings.append(NO_CENTRE)
        if min(self.grid.reversed, self.grid.lines - self.grid.reversed) > BOTH_WAYS * self.grid.lines:
            volume.warnings.append(
                "CAUTION: this image is made from lines of both readout directions, as in EPI, "
                "without any correction: expect ghosts"
            )
        if self.grid.outside > self.grid.lines > 0:
            volume.flaw = (
                f"{self.grid.outside} lines lay outside the encoded matrix and only {self.grid.lines} inside: "
                "the header does not belong to these lines"
            )
        return volume

    def _take_centre(self, calibration: CalibrationGrid) -> list[str]:
        """Use calibration lines for the image too; returns a remark for the user, if so.

        Only if it has none of them and the header names no calibration mode, or to fill a hole at its centre.
        """
        if calibration.foreign or not self.grid.lines:
            return []
        there = calibration.counts > 0
        if self.lacks(calibration):
            remark = (
                "the calibration lines are used for the image too: it has no lines of its own there, "
                "and the header names no calibration mode"
            )
        else:
            there &= self._hole()
            if not there.any():
                return []
            energy = np.square(np.abs(calibration.kspace[:, there])).sum()
            if not np.isfinite(energy) or not energy:
                return []
            remark = (
                "no image line was received at the centre of k-space: "
                "calibration lines are used there and determine brightness and contrast"
            )
        self.grid.kspace[:, there], self.grid.counts[there] = calibration.kspace[:, there], calibration.counts[there]
        return [remark]

    def lacks(self, calibration: CalibrationGrid) -> bool:
        """Whether the image has no lines where the calibration has some, and the header names no calibration mode.

        These then belong to it.
        """
        if self.geometry.calibration not in ("", "other") or self.calibrating.any():
            return False
        return not (self.grid.counts[calibration.counts > 0] > 0).any()

    def _hole(self) -> np.ndarray:
        """Places [z y] of a hole at the centre that calibration lines of the same scan may fill.

        There are none if more than the hole is missing.
        """
        if self.geometry.calibration == "external" or missing_lines(self.geometry, self.grid.counts):
            return np.zeros(self.grid.counts.shape, bool)
        return hole_at_centre(self.grid.counts)

    def _calibration(self, grid: CalibrationGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """Calibration lines and their counts, completed by imaging lines that also serve as calibration."""
        kspace, counts = grid.kspace, grid.counts
        shared = self.calibrating & (counts == 0)
        if self.geometry.calibration not in ("separate", "external") and shared.any():
            # Copies, as other volumes, with imaging lines of their own, use the same calibration.
            kspace, counts = kspace.copy(), counts.copy()
            kspace[:, shared], counts[shared] = self.grid.kspace[:, shared], self.grid.counts[shared]
        return torch.from_numpy(kspace), torch.from_numpy(counts)
