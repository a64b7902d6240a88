"""Gathers acquisitions into k-space, volume by volume, while the scan runs; interprets each line's flags and counters.

Each line is trimmed, reversed if necessary, centred and Fourier transformed along the readout as it arrives, and its
readout oversampling is removed, so that the array has the size of the image from the start.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import ismrmrd
import numpy as np

from .calibration import Calibrations, Centres, lies_elsewhere
from .centre import centre_offset, narrow
from .completeness import missing_ends, missing_volumes
from .failure import ScanError, of_lines
from .flags import NOISE_BIT, SKIP_BITS, VolumeKey, is_calibration_only, volume_key
from .geometry import Geometry, announced, read_geometry
from .grid import CalibrationGrid
from .noise_lines import NoiseLines
from .partitions import Partitions
from .readout import Readout
from .recon_data import ReconBit, ReconData, ReconDataError, take_lines
from .repetitions import Repetitions
from .volume import GatheredVolume, OpenVolume, Shared

DOUBTFUL = 2  # lines that lie inside the matrix only with another k-space centre than the header's; more move it
AS_LONG = "the lines are too short for the readout oversampling that other lines of the scan have"
STRETCHED = (
    "CAUTION: the lines state that they begin at the echo, but it lies within them: if their readout oversampling was "
    "removed and their centre sample never stated, the image is stretched along the readout"
)
WAITING = 32  # volumes of a single partition at most that wait for a second slice, to know what they are
UNEVEN = (
    "CAUTION: the lines' trajectories are not uniform (ramp sampling?), but this server reads the samples as equally "
    "spaced: regrid them first"
)
INTEGRATED = ("embedded", "interleaved")
Admit = Callable[[int, int], None]


def no_limit(coils: int, volumes: int) -> None:
    """Admit every volume."""


def gather(header: ismrmrd.xsd.ismrmrdHeader, items: Iterable, admit: Admit = no_limit) -> Iterator[GatheredVolume]:
    """Yield each volume once its last line has arrived (a later repetition began, or the input ended).

    Volumes differ in slice (slab), contrast, repetition, set or phase; averages are summed.
    Items are acquisitions or Gadgetron's buffers of them; others (waveforms) are ignored.

    Args:
        admit: called before each new volume with its number of coils and the number of volumes then gathered at once;
            may raise.

    Raises:
        ScanError: if there is nothing to reconstruct.
    """
    gatherer = Gatherer(header, admit)
    found = 0
    for item in items:
        for volume in gatherer.take(item):
            found += 1
            yield volume
    for volume in gatherer.finish():
        found += 1
        yield volume
    if not found:
        raise ScanError(f"the scan holds no imaging line ({gatherer.what_came()}): nothing to reconstruct")


class Gatherer:
    """State behind `gather`: lines in, finished volumes out."""

    def __init__(self, header: ismrmrd.xsd.ismrmrdHeader, admit: Admit = no_limit):
        self.geometry, self.admit = read_geometry(header), admit
        self.promised = announced(header)
        self.readout = Readout(self.geometry)
        self.partitions = Partitions(self.geometry, header)
        self.repetitions = Repetitions(self.promised.get("average", 1))
        self.volumes: dict[VolumeKey, OpenVolume] = {}
        self.calibrations = Calibrations(header, self.geometry, self.readout)
        self.centres = Centres()
        self.noise = NoiseLines(header)
        self.others: Counter[int] = Counter()  # lines of each encoding space other than the image's
        self.skipped = 0  # lines with one of SKIP_BITS
        self.channelless = 0
        self.calibration_lines = 0
        self.foreign = 0  # lines of another encoding space that are no calibration
        self.late = 0  # imaging lines whose volume had been yielded
        self.seen: dict[str, set[int]] = {name: set() for name in self.promised}
        self.notes: list[str] = []
        # lines outside the matrix with the header's centre, inside with another
        self.doubtful: list[ismrmrd.Acquisition] = []
        self.waiting: list[ismrmrd.Acquisition] = []  # lines of the first slice, which may be a partition
        self.waiting_bytes = 0
        self.centred = False  # whether a volume has shown where k = 0 lies
        self.echoes: dict[int, int] = {}  # for each contrast: by how many samples its lines misstate the echo position
        self.given: set[VolumeKey] = set()  # volumes that were yielded
        self.buffered = False  # whether the lines come in Gadgetron's buffers, which fill the whole readout
        # a block of lines that may become the array of its volume
        self.offered: tuple[VolumeKey, np.ndarray] | None = None
        self.shared = Shared()

    def take(self, item) -> Iterator[GatheredVolume]:
        """Take one item of any kind; yield complete volumes of earlier repetitions."""
        if isinstance(item, ismrmrd.Acquisition):
            return self.add(item)
        return self.add_buffers(item) if isinstance(item, ReconData) else iter(())

    def add_buffers(self, message: ReconData) -> Iterator[GatheredVolume]:
        """Take the lines out of a ReconData message; a block of the size of a volume becomes that volume's array."""
        self.buffered = True
        for bit in message.bits:
            for data, headers in self._reference_blocks(bit):
                for line in take_lines(data, headers):
                    yield from self.add(line)
            for data, headers in bit.data.blocks():
                self._adopt(data, headers)
                for line in take_lines(data, headers):
                    yield from self.add(line)
                self.offered = None

    def _reference_blocks(self, bit: ReconBit) -> list[tuple[np.ndarray, np.ndarray]]:
        try:
            return bit.reference_blocks()
        except ReconDataError as error:
            self.notes.append(f"reference lines were left out: {error}")
            return []

    def _adopt(self, data: np.ndarray, headers: np.ndarray) -> None:
        """Offer the block itself as the array to gather into, if all its lines are already in place."""
        acquired = headers[headers["number_of_samples"] > 0]
        idx = acquired["idx"]
        keys = np.unique(np.stack([idx[name] for name in VolumeKey._fields], axis=-1), axis=0) if acquired.size else []
        if len(keys) != 1 or data.shape[1:] != self.geometry.shape:
            return
        z, y = self.geometry.place(idx["kspace_encode_step_1"].astype(int), idx["kspace_encode_step_2"].astype(int))
        stays = np.array_equal(np.stack([z, y], axis=-1), np.argwhere(headers["number_of_samples"] > 0))
        if stays:
            self.offered = VolumeKey(*keys[0].tolist()), data

    def add(self, line: ismrmrd.Acquisition) -> Iterator[GatheredVolume]:
        """Take one acquisition; yield complete volumes of earlier repetitions."""
        flags = line.flags
        if flags & NOISE_BIT:
            self.noise.add(line, self.readout)
            return
        if not line.encoding_space_ref:  # other encodings have counters of their own
            self.repetitions.flagged(line.idx.repetition, flags)
        if flags & SKIP_BITS:
            self.skipped += 1
            return
        if line.active_channels < 1:
            self.channelless += 1
            return
        self.partitions.see(line)
        if self.partitions.unsure(line):
            self.waiting.append(line)
            self.waiting_bytes += line.data.nbytes
            self._admit_held(line.active_channels)
            return
        if self.waiting:
            yield from self._release()
        yield from self._sort_in(self.partitions.recounted(line))

    def _release(self) -> Iterator[GatheredVolume]:
        """Take the lines that waited for those of another slice."""
        if self.partitions.are_planes:
            self._flatten()
        waiting, self.waiting, self.waiting_bytes = self.waiting, [], 0
        for line in waiting:
            yield from self.add(line)

    def _sort_in(self, line: ismrmrd.Acquisition) -> Iterator[GatheredVolume]:
        """Add a line to the volume or calibration that it belongs to; yield complete volumes of earlier repetitions."""
        key, space = volume_key(line.idx), line.encoding_space_ref
        if space:
            self.others[space] += 1
        elif self.geometry.fitting != (None, None) and any(self.geometry.beyond(_steps(line))):
            yield from self._doubt(line, key)
            return
        external = space and self.geometry.calibration == "external"  # whether flagged or not
        if external or (is_calibration_only(line.flags) and self.geometry.calibration not in INTEGRATED):
            self.calibration_lines += 1
            self.calibrations.add(line, key)
            self._admit_held(line.active_channels)
        elif space:
            self.foreign += 1
        else:
            self.repetitions.count(key.repetition)
            yield from self._finish_earlier(key.repetition)
            if self.partitions.are_planes:  # perhaps only since then
                line = self.partitions.recounted(line)
            if key in self.given:
                self.late += 1
            else:
                self._into_volume(line, key)

    def _admit_held(self, coils: int) -> None:
        """Have the lines that are held besides the volumes admitted as what they would fill of such volumes."""
        held = self.calibrations.nbytes + self.waiting_bytes
        volumes = held // (8 * coils * math.prod(self.geometry.shape))
        if volumes:
            self.admit(coils, len(self.volumes) + volumes)

    def _doubt(self, line: ismrmrd.Acquisition, key: VolumeKey) -> Iterator[GatheredVolume]:
        """Keep a line that supports a k-space centre other than the header's.

        Once there are too many to be strays, use that centre for the whole scan.
        """
        volume = self.volumes.get(key)
        if volume is not None and len(volume.grid.kspace) != line.active_channels:
            volume.grid.unfit += 1
            return
        self.doubtful.append(line)
        if len(self.doubtful) <= DOUBTFUL:
            return
        steps = [self.geometry.beyond(_steps(line)) for line in self.doubtful]
        self._recentre(self.geometry.refitted(tuple(any(axis) for axis in zip(*steps))))
        waiting, self.doubtful = self.doubtful, []
        for line in waiting:
            yield from self.add(line)

    def _into_volume(self, line: ismrmrd.Acquisition, key: VolumeKey) -> None:
        """Add an imaging line to its volume; the first one opens it."""
        volume = self.volumes.get(key) or self._open_volume(key, line.active_channels)
        begins = volume.first is None
        if begins and line.trajectory_dimensions and self.readout.uneven(line) and UNEVEN not in self.notes:
            self.notes.append(UNEVEN)
        if "average" in self.seen:
            self.seen["average"].add(line.idx.average)
        volume.add(line, self.readout)
        if volume.oversampling is not None:
            self.calibrations.image_has(key.contrast, volume.oversampling)

    def _open_volume(self, key: VolumeKey, coils: int) -> OpenVolume:
        volumes = (len(self.volumes) + 1) * self.geometry.shape[0] / self.partitions.count  # of the header's matrix
        self.admit(coils, math.ceil(volumes))
        volume = self.volumes[key] = OpenVolume(self.geometry, coils, self._offered_to(key, coils))
        self.noise.begin(volume)
        for name, value in key._asdict().items():
            self.seen.setdefault(name, set()).add(value)
        self.repetitions.resume(key.repetition)
        return volume

    def _offered_to(self, key: VolumeKey, coils: int) -> np.ndarray | None:
        """The block that a volume may be gathered into, if there is one."""
        return self.offered[1] if self.offered and self.offered[0] == key and len(self.offered[1]) == coils else None

    def _finish_earlier(self, repetition: int) -> Iterator[GatheredVolume]:
        """Yield and release the volumes of earlier repetitions, up to the first that is not over."""
        still_open = self.repetitions.first_open(self.volumes, repetition)
        if all(key.repetition >= still_open for key in self.volumes):
            return
        counts = [volume.grid.counts for volume in self.volumes.values()]
        if len(counts) > WAITING or not self.partitions.await_another_slice(counts):
            yield from self.finish(still_open)

    def finish(self, before: int | None = None) -> Iterator[GatheredVolume]:
        """Yield and release all volumes, or those of repetitions below `before`."""
        if before is None and self.waiting:
            self.partitions.apart_mm = self.partitions.apart_mm or 0.0
            yield from self._release()
        promised = dict(self.promised)
        if self.partitions.are_slices:
            promised.pop("slice", None)
        notes = missing_volumes(promised, self.seen) if before is None else []
        for key in sorted(key for key in self.volumes if before is None or key.repetition < before):
            volume = self.volumes.pop(key)
            self.given.add(key)
            whole = before is not None and volume.lacks_nothing(self.repetitions.averages)
            # of a whole volume, the last line may be one of another set, yet to come
            ends = [] if whole else missing_ends(self.repetitions.flags[key.repetition])
            yield self._close(volume, key, [*ends, *notes])
        self.calibrations.forget(before or 0)

    def _close(self, volume: OpenVolume, key: VolumeKey, notes: list[str]) -> GatheredVolume:
        """Finish a volume that was just taken off `volumes`.

        It may first flatten or recentre all open ones too, each once in a scan: when its lines show the need for it.
        """
        counts = [one.grid.counts for one in (volume, *self.volumes.values())]
        if self.partitions.single(counts, self.seen.get("slice", ())):
            self._flatten(volume)
        self._centre_lines(volume)
        noise, gain, remarks = self.noise.of(volume)
        calibration, told = self.calibrations.of(key, len(volume.grid.kspace))
        remarks += self._centre_echoes(volume, key.contrast, calibration)
        gathered = volume.finished(noise, calibration)
        remarks += told
        if gathered.calibration is None:
            more = any(self.promised.get(name, 1) > 1 for name in VolumeKey._fields if name != "slice")
            keep = more or self.repetitions.latest > key.repetition
            gathered.calibration, note = self.centres.serve(key, volume.grid.kspace, volume.grid.counts, keep)
            if note:
                remarks.append(note)
        if calibration is not None and gathered.calibration is not None and calibration.head is not None:
            remarks += lies_elsewhere(gathered.head, calibration.head)
        remarks += self._remarks(volume, calibration) + self._left_out()
        gathered.warnings += [*self.notes, *self.partitions.notes, *remarks, *notes]
        gathered.flaw = gathered.flaw or self.partitions.flaw(volume.grid.counts, self.seen.get("slice", ()))
        gathered.shared, gathered.gain, gathered.echo_offset = self.shared, gain, self.echoes[key.contrast]
        return gathered

    def _centre_lines(self, volume: OpenVolume) -> None:
        """Move k = 0 to the strongest lines, for the whole scan, if they are far from the header's centre.

        The first volume with a clear result decides.
        """
        offset = None if self.centred else centre_offset(volume.grid.energy)
        if offset is None:
            return
        self.centred = True
        if any(offset):
            self._recentre(volume.geometry.settled().recentred(offset), volume)

    def _centre_echoes(self, volume: OpenVolume, contrast: int, calibration: CalibrationGrid | None) -> list[str]:
        """Centre the echo if the lines misstate its position; returns notes for the user.

        The shift is the same for all volumes of a contrast.
        """
        offset = self.echoes[contrast] = volume.grid.centre_echo(self.echoes.get(contrast))
        if calibration is not None:
            calibration.centre_echo()
            if calibration.foreign or not volume.lacks(calibration):
                calibration.centre_lines()
        notes = []
        if offset:
            side = "beyond" if offset > 0 else "before"
            notes.append(
                f"the echo lies {abs(offset)} samples (without oversampling) {side} the centre sample that the lines "
                "state: its true place was used, and complex images keep the phase that it gives them"
            )
        if offset > 0 and volume.grid.begin_at_echo:
            notes.append(STRETCHED)
        if calibration is not None and calibration.renumbered:
            notes.append(
                "the calibration lines seem to be numbered on their own, far from the image's centre of k-space: "
                "their strongest line was taken for it"
            )
        return notes

    def _recentre(self, geometry: Geometry, *finished: OpenVolume) -> None:
        """Continue with another k-space centre, also for the `finished` volumes."""
        self.geometry = geometry
        for volume in (*finished, *self.volumes.values()):
            volume.move(geometry)
        self.calibrations.move(geometry)

    def _flatten(self, *finished: OpenVolume) -> None:
        """Continue with single slices instead of volumes, also for the `finished` ones."""
        self.geometry, self.offered = self.partitions.plane(self.geometry), None
        for volume in (*finished, *self.volumes.values()):
            volume.flatten(self.geometry)
        self.calibrations.flatten(self.geometry)

    def _remarks(self, volume: OpenVolume, calibration: CalibrationGrid | None) -> list[str]:
        """What was assumed of a volume's readouts and calibration, for the user."""
        remarks = []
        if volume.geometry.calibration == "interleaved" and calibration is None:
            remarks.append(
                "calibration is interleaved over the repetitions: "
                "the coil maps are made from the lines of this and earlier repetitions"
            )
        if volume.oversampling == 0 and any(self.calibrations.oversampling.values()):
            remarks.append(f"{AS_LONG}: it was assumed to be removed already")
        elif volume.oversampling == 0 and self._seems_narrow(volume):
            remarks.append(
                "the lines are as short as without readout oversampling and the image is empty on both sides: "
                "if it looks too narrow, they do have oversampling, and a lower resolution than the header says"
            )
        if volume.oversampling and volume.grid.filled and not volume.certain:
            remarks.append(f"{AS_LONG}: they were assumed to have it, at a lower resolution")
        return remarks

    def _seems_narrow(self, volume: OpenVolume) -> bool:
        """Whether lines that came without the oversampling that the header has give an image empty on both sides."""
        oversampled = self.readout.full_length > self.readout.cut_length  # by the header
        if self.buffered or volume.grid.lengths or not oversampled:
            return False
        return narrow(volume.grid.kspace, volume.grid.energy)

    def _left_out(self) -> list[str]:
        """Which lines of the scan belong to no volume, for the user."""
        remarks, foreign = [], self.foreign + self.calibrations.foreign
        if foreign:
            remarks.append(of_lines(foreign, "{lines} of another encoding space {were} left out"))
        if foreign > (own := self.repetitions.lines):
            remarks.append(
                f"CAUTION: only {own} lines belong to the first encoding space, from which the image is made: "
                "does it belong to another one?"
            )
        if self.channelless:
            remarks.append(of_lines(self.channelless, "{lines} without channels {were} left out"))
        if self.doubtful:
            remarks.append(of_lines(len(self.doubtful), "{lines} lay outside the encoded matrix and {were} left out"))
        if self.late:
            remarks.append(
                of_lines(self.late, "{lines} of volumes that had already been reconstructed {were} left out")
            )
        return remarks

    def what_came(self) -> str:
        """Which lines came that are not image lines, in words."""
        found = [(count, "", f" of encoding space {number}") for number, count in sorted(self.others.items())]
        found += [
            (self.calibration_lines - sum(self.others.values()), "calibration ", ""),
            (self.channelless, "", " without channels"),
            (len(self.noise), "noise ", ""),
            (self.skipped, "other ", ""),
        ]
        told = [of_lines(count, "{lines}" + which, kind) for count, kind, which in found if count > 0]
        return ", ".join(told or ["no line"]) + " came"


def _steps(line: ismrmrd.Acquisition) -> tuple[int, int]:
    """The encoding steps E1, E2 of a line."""
    return line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2
