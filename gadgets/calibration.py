"""Calibration lines, used for coil maps only, and the volumes they serve."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections import Counter
from typing import NamedTuple

import ismrmrd
import numpy as np
import torch

from recon_core.coils import MAX_ACS, find_acs, folding, too_few

from .failure import ScanError, of_lines
from .flags import VolumeKey
from .geometry import Geometry, read_geometry
from .grid import CalibrationGrid
from .readout import Readout

# sums of lines [coils z y x], at most MAX_ACS along z and y, and their counts [z y]
Centre = tuple[np.ndarray, np.ndarray]
ENOUGH = 0.5  # of the lines of the fullest calibration; those with fewer are strays
PAGE_BYTES = 4096
AWAY_MM, TURNED_DEGREES = 5.0, 3.0  # tolerated between calibration and image; coil maps are smooth


class Group(NamedTuple):
    """The counters that the repetitions of a volume share."""

    slice: int
    contrast: int
    set: int
    phase: int


class Calibrations:
    """Calibration lines by slice (slab), contrast, set and phase.

    Each repetition keeps its own until its volumes are finished.

    Args:
        header: of the scan; may have separate encodings for calibration.
        image: geometry of the image.
        readout: of the image's lines.
    """

    def __init__(self, header: ismrmrd.xsd.ismrmrdHeader, image: Geometry, readout: Readout):
        self.header, self.image = header, image
        self.encodings: dict[int, tuple[Geometry, Readout] | None] = {0: (image, readout)}
        self.grids: dict[Group, dict[int, CalibrationGrid]] = {}  # by repetition
        self.unsure: list[tuple[ismrmrd.Acquisition, VolumeKey]] = []  # before the image's first line
        self.oversampling: dict[int, int] = {}  # of the image's lines, by contrast
        self.notes: list[str] = []
        self.foreign = 0
        self.nbytes = 0  # of memory that all of this takes

    def add(self, line: ismrmrd.Acquisition, key: VolumeKey) -> None:
        """Add a line of volume `key`.

        A short one waits for the image's first line, which shows whether both are oversampled.
        """
        own = self._encoding(line.encoding_space_ref)
        if own is None:
            self.foreign += 1
            return
        oversampling = own[1].oversampling(line)
        if own[0] is self.image and oversampling == 0 and not self.oversampling:
            self.unsure.append((line, key))
            self.nbytes += line.data.nbytes
            return
        grid = self._grid(key, line.active_channels)
        grid.foreign |= own[0] is not self.image
        where = grid.place(line, own[0])
        if where is not None:
            grid.unshare()
            self.nbytes -= _nbytes(grid)
            its = max(oversampling, self._of_image(key.contrast)) if own[0] is self.image else oversampling
            grid.add(line, where, own[1], its)
            self.nbytes += _nbytes(grid)
            grid.head = grid.head or line.getHead()

    def image_has(self, contrast: int, oversampling: int) -> None:
        """Note the oversampling of the image's lines, and add those that waited for it."""
        self.oversampling[contrast] = oversampling
        waiting, self.unsure = self.unsure, []
        for line, key in waiting:
            self.nbytes -= line.data.nbytes
            self.add(line, key)

    def move(self, image: Geometry) -> None:
        """Continue with another k-space centre of the image; lines gathered in the image's encoding are moved."""
        shift = self.image.shift_to(image)
        for grid in (grid for grids in self.grids.values() for grid in grids.values() if not grid.foreign):
            grid.unshare()
            self.nbytes -= _nbytes(grid)
            grid.move(shift)
            self.nbytes += _nbytes(grid)
        self.image, self.encodings[0] = image, (image, self.encodings[0][1])

    def flatten(self, image: Geometry) -> None:
        """Continue with single slices in place of the matrix' partitions."""
        for grid in (grid for grids in self.grids.values() for grid in grids.values()):
            self.nbytes -= _nbytes(grid)
            grid.flatten()
            self.nbytes += _nbytes(grid)
        self.image, self.encodings = image, {0: (image, self.encodings[0][1])}

    def of(self, key: VolumeKey, coils: int) -> tuple[CalibrationGrid | None, list[str]]:
        """Calibration lines for volume `key`, and notes for the user.

        The newest from its own or an earlier repetition, with its contrast, set and phase if possible, else with others
        of its slice; a few stray lines do not count as a newer calibration.
        """

        def rank(found: tuple[Group, int, CalibrationGrid]) -> tuple:
            group, repetition, _ = found
            return repetition > key.repetition, group != _group(key), abs(repetition - key.repetition), group

        filled = [
            (group, repetition, grid)
            for group, grids in self.grids.items()
            for repetition, grid in grids.items()
            if grid.filled
        ]
        here = [found for found in filled if found[0].slice == key.slice]
        fitting = [found for found in here if len(found[2].kspace) == coils]
        fitting = [found for found in fitting if found[2].filled >= ENOUGH * max(grid.filled for _, _, grid in fitting)]
        remarks = list(self.notes)
        if fitting:
            chosen = min(fitting, key=rank)[2]
            chosen.handed_out = True
            return chosen, remarks
        channels: Counter[int] = Counter()
        for _, _, grid in here:
            channels[len(grid.kspace)] += grid.lines
        for other, count in channels.items():
            text = f"{{lines}} {{have}} {other} channels instead of the scan's {coils} and {{were}} not used"
            remarks.append(of_lines(count, text, "calibration "))
        if not filled and (empty := sum(grid.empty for grids in self.grids.values() for grid in grids.values())):
            remarks.append(of_lines(empty, "{lines} held only zeros and {were} left out", "calibration "))
        if filled and not here:
            remarks.append("the calibration lines belong to other slabs: none of them can be used here")
        return None, remarks

    def forget(self, before: int) -> None:
        """Release calibration of repetitions below `before`, except the newest with enough lines.

        That one may serve later repetitions too.
        """
        for grids in self.grids.values():
            earlier = {repetition: grid.filled for repetition, grid in grids.items() if repetition < before}
            most = max(earlier.values(), default=0)
            kept = max((number for number, filled in earlier.items() if filled >= ENOUGH * most), default=before)
            for repetition in earlier:
                if repetition != kept:
                    self.nbytes -= _nbytes(grids.pop(repetition))

    def _grid(self, key: VolumeKey, coils: int) -> CalibrationGrid:
        """Grid for a line; started afresh once most lines have another number of channels."""
        grids = self.grids.setdefault(_group(key), {})
        grid = grids.get(key.repetition)
        if grid is None or (len(grid.kspace) != coils and grid.unfit >= grid.lines):
            unfit = grid.unfit + grid.lines if grid else 0
            self.nbytes -= _nbytes(grid) if grid else 0
            grid = grids[key.repetition] = CalibrationGrid(self.image, coils, _sparse((coils, *self.image.shape)))
            grid.unfit = unfit
            self.nbytes += _nbytes(grid)
        return grid

    def _of_image(self, contrast: int) -> int:
        """Oversampling of the image's lines of this contrast, else of any; 0 if none has come."""
        return self.oversampling.get(contrast, next(iter(self.oversampling.values()), 0))

    def _encoding(self, number: int) -> tuple[Geometry, Readout] | None:
        """Geometry and readout of an encoding with the image's field of view along the phase encodings, else None."""
        if number not in self.encodings:
            try:
                own = read_geometry(self.header, number).refitted((True, True))
                fits = all(abs(a / b - 1) < 0.01 for a, b in zip(own.encoded_fov_mm[1:], self.image.encoded_fov_mm[1:]))
                self.encodings[number] = (own, Readout(self.image, own)) if fits else None
                if fits:
                    self.notes += [f"of the calibration, {note}" for note in own.warnings]
            except (ScanError, IndexError):
                self.encodings[number] = None
        return self.encodings[number]


class Centres:
    """The k-space centres of image lines, for later volumes without calibration lines of their own.

    A scan may acquire a full centre with its first volume only, or, regularly undersampled, spread it over the
    repetitions, each of which acquires other lines (interleaved calibration; TSENSE, Kellman et al., MRM 2001).
    """

    def __init__(self):
        self.full: dict[int, Centre] = {}  # the latest of each slab
        self.together: dict[Group, Centre] = {}  # sums over repetitions

    def serve(
        self, key: VolumeKey, kspace: np.ndarray, counts: np.ndarray, keep: bool
    ) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, str]:
        """Calibration (kspace [coils z y x], counts [z y]) for volume `key`, and a note for the user.

        None if the volume needs none or there is none. What it acquired itself is kept for later ones if `keep` is set.
        """
        sizes = [min(n, MAX_ACS) for n in counts.shape]
        middle = tuple(slice(n // 2 - m // 2, n // 2 - m // 2 + m) for n, m in zip(counts.shape, sizes))
        own = kspace[:, middle[0], middle[1]], counts[middle]
        if not too_few(find_acs(torch.from_numpy(own[1])), counts.shape):
            if keep:
                self.full[key.slice] = own[0].copy(), own[1].copy()
            return None, ""
        if len(kspace) == 1:
            return None, ""
        lattice = folding(torch.from_numpy(counts)) > 1
        found, note = self.full.get(key.slice), "those of an earlier volume"
        if lattice and (found is None or len(found[0]) != len(kspace)):
            found, note = self._with_others(_group(key), own, keep), "the lines of several repetitions"
        if found is None or len(found[0]) != len(kspace) or too_few(find_acs(torch.from_numpy(found[1])), counts.shape):
            return None, ""
        whole, came = np.zeros_like(kspace), np.zeros_like(counts)
        whole[:, middle[0], middle[1]], came[middle] = found
        why = "the lines are regularly undersampled without" if lattice else "too few of the lines are"
        calibration = torch.from_numpy(whole), torch.from_numpy(came)
        return calibration, f"{why} calibration lines: the coil maps are made from {note}"

    def _with_others(self, group: Group, own: Centre, keep: bool) -> Centre | None:
        """The sum of this centre and those of earlier repetitions, None if there are none of these."""
        before = self.together.get(group)
        if before is not None and len(before[0]) == len(own[0]):
            self.together[group] = before[0] + own[0], before[1] + own[1]
            return self.together[group]
        if keep:
            self.together[group] = own[0].copy(), own[1].copy()
        return None


def lies_elsewhere(image: ismrmrd.AcquisitionHeader, calibration: ismrmrd.AcquisitionHeader) -> list[str]:
    """Note for the user if the headers place the calibration away from the image.

    Its coil maps are then those of another place.
    """
    frames = [
        np.array([head.position, head.read_dir, head.phase_dir, head.slice_dir], float) for head in (image, calibration)
    ]
    if not np.isfinite(frames).all():
        return []
    away = float(np.linalg.norm(frames[0][0] - frames[1][0]))
    lengths = np.prod([np.linalg.norm(frame[1:], axis=1) for frame in frames], axis=0)
    cosines = np.divide((frames[0][1:] * frames[1][1:]).sum(1), lengths, out=np.ones(3), where=lengths > 0)
    turned = float(np.degrees(np.arccos(cosines.clip(-1, 1))).max())
    found = []
    if away > AWAY_MM:
        found.append(f"{away:.0f} mm away")
    if turned > TURNED_DEGREES:
        found.append(f"turned by {turned:.0f} degrees")
    if not found:
        return []
    return [f"the calibration lines were acquired {' and '.join(found)} from the image: the coil maps do not fit it"]


def _sparse(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, complex64, that take memory only where something is written.

    NumPy asks for huge pages, of which each coil of a single line would take one.
    """
    try:
        memory = mmap.mmap(-1, 8 * math.prod(shape), mmap.MAP_PRIVATE)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for calibration lines in {shape}: {error}") from None
    with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.complex64).reshape(shape)


def _nbytes(grid: CalibrationGrid) -> int:
    """Bytes of memory that a grid takes: those of its lines, each at least a page, and of its counts and energies."""
    coils, *_, samples = grid.kspace.shape
    lines = grid.filled * coils * max(8 * samples, PAGE_BYTES)
    return min(lines, grid.kspace.nbytes) + grid.counts.nbytes + grid.energy.nbytes


def _group(key: VolumeKey) -> Group:
    return Group(key.slice, key.contrast, key.set, key.phase)
