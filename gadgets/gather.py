"""Acquisitions to k-space, volume by volume, while the scan runs: what each line's flags and counters mean.

Each line is cut, turned, centred and Fourier transformed along the readout as it arrives, and its
readout oversampling is removed, so that the array has the size of the image from the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import ismrmrd
import numpy as np
import torch

from .completeness import missing_ends, missing_volumes
from .flags import BOTH_BIT, CALIBRATION_BIT, KEY, LAST_BIT, NOISE_BIT, SKIP_BITS, is_calibration_only, volume_key
from .geometry import Geometry, ScanError, announced, noise_bandwidth, read_geometry
from .readout import Readout
from .recon_data import ReconBit, ReconData, ReconDataError, take_lines
from .volume import Grid, Scan, Volume

SETTLED = 128  # an earlier repetition without its last flag is complete when half as many lines of a later one came in a row, or half of its own
MAX_NOISE_SAMPLES = 1 << 24  # more make the covariance no better
INTEGRATED = ("embedded", "interleaved")


def gather(header: ismrmrd.xsd.ismrmrdHeader, items: Iterable) -> Iterator[Scan]:
    """Yield each volume once its last line has arrived (a later repetition began, or the input ended).

    Volumes are told apart by slice (slab), contrast, repetition, set and phase; averages are summed.
    Items are acquisitions or Gadgetron's buffers of them; others (waveforms) are left aside.

    Raises:
        ScanError: when there is nothing to reconstruct.
    """
    gatherer = Gatherer(header)
    found = 0
    for item in items:
        for scan in gatherer.take(item):
            found += 1
            yield scan
    for scan in gatherer.finish():
        found += 1
        yield scan
    if not found:
        others = "".join(f"{count} lines of encoding space {number} were left out, " for number, count in sorted(gatherer.others.items()))
        raise ScanError(f"the scan holds no imaging line ({others}{gatherer.skipped} other lines came): nothing to reconstruct")


class Gatherer:
    """State behind `gather`: lines in, finished volumes out."""

    def __init__(self, header: ismrmrd.xsd.ismrmrdHeader):
        self.geometry = read_geometry(header)
        self.header, self.promised = header, announced(header)
        self.readouts: dict[int, tuple[Geometry, Readout] | None] = {0: (self.geometry, Readout(self.geometry))}
        self.volumes: dict[tuple[int, ...], Volume] = {}
        self.calibrations: dict[tuple[int, ...], tuple[int, Grid]] = {}
        self.unsure: list[tuple[ismrmrd.Acquisition, tuple[int, ...]]] = []  # calibration lines before the image's first
        self.noise: list[np.ndarray] = []
        self.noise_dwell_us = 0.0
        self.bandwidth_ratio = noise_bandwidth(header)
        self.others: Counter[int] = Counter()  # lines of each encoding space that is not the image's
        self.skipped = self.foreign = self.late = self.streak = 0
        self.repetition, self.flags = -1, {}  # of each repetition: the flags of all its lines together
        self.ended: set[int] = set()  # repetitions whose last line was flagged, with no volume begun since
        self.seen: dict[str, set[int]] = {name: set() for name in self.promised}
        self.notes: list[str] = []
        self.given: set[tuple[int, ...]] = set()
        self.series: dict[tuple[int, ...], float] = {}
        self.phase_reference: dict[int, torch.Tensor] = {}

    def take(self, item) -> Iterator[Scan]:
        """Take whatever a scan consists of; yield the volumes of earlier repetitions that are complete."""
        if isinstance(item, ismrmrd.Acquisition):
            return self.add(item)
        return self.add_buffers(item) if isinstance(item, ReconData) else iter(())

    def add_buffers(self, message: ReconData) -> Iterator[Scan]:
        """Take the lines out of a ReconData; a block that has the size of a volume becomes its array."""
        for bit in message.bits:
            for data, headers in self._reference_blocks(bit):
                for line in take_lines(data, headers):
                    yield from self.add(line)
            for data, headers in bit.data.blocks():
                self._adopt(data, headers)
                for line in take_lines(data, headers):
                    yield from self.add(line)

    def _reference_blocks(self, bit: ReconBit) -> list[tuple[np.ndarray, np.ndarray]]:
        """Blocks of lines for calibration alone; those that serve the image too are in the data."""
        try:
            blocks = list(bit.reference.blocks()) if bit.reference is not None else []
        except ReconDataError as error:
            self.notes.append(f"reference lines were left out: {error}")
            return []
        for _, headers in blocks:
            headers["number_of_samples"][headers["flags"] & (CALIBRATION_BIT | BOTH_BIT) != CALIBRATION_BIT] = 0
        return blocks

    def _adopt(self, data: np.ndarray, headers: np.ndarray) -> None:
        """Gather into the block itself where all its lines stay where they are."""
        acquired = headers[headers["number_of_samples"] > 0]
        idx = acquired["idx"]
        keys = np.unique(np.stack([idx[name] for name in KEY], axis=-1), axis=0) if acquired.size else []
        if len(keys) != 1 or data.shape[1:] != self.geometry.shape:
            return
        z, y = self.geometry.place(idx["kspace_encode_step_1"].astype(int), idx["kspace_encode_step_2"].astype(int))
        key, stays = tuple(int(n) for n in keys[0]), np.array_equal(np.stack([z, y], axis=-1), np.argwhere(headers["number_of_samples"] > 0))
        if stays and key not in self.volumes and key not in self.given:
            self._volume(key, len(data), data)

    def add(self, line: ismrmrd.Acquisition) -> Iterator[Scan]:
        """Take one acquisition; yield the volumes of earlier repetitions that are complete."""
        flags = line.flags
        if flags & NOISE_BIT:
            self._add_noise(line)
            return
        idx = line.idx
        self.flags[idx.repetition] = self.flags.get(idx.repetition, 0) | flags
        if flags & LAST_BIT:
            self.ended.add(idx.repetition)
        if flags & SKIP_BITS:
            self.skipped += 1
            return
        key = volume_key(idx)
        if line.encoding_space_ref:
            self.others[line.encoding_space_ref] += 1
        yield from self._settled(idx.repetition)
        if is_calibration_only(flags) and self.geometry.calibration not in INTEGRATED:
            self._calibrate(line, key)
        elif line.encoding_space_ref:
            self.foreign += 1
        elif key in self.given:
            self.late += 1
        else:
            self._image(line, key)

    def _add_noise(self, line: ismrmrd.Acquisition) -> None:
        """Keep a noise line, scaled to the dwell time of the first one that tells its own: its power goes with 1/dwell."""
        if sum(n.size for n in self.noise) >= MAX_NOISE_SAMPLES:
            return
        dwell_us = line.sample_time_us if line.sample_time_us > 0 else self.noise_dwell_us  # not told: as before
        self.noise_dwell_us = self.noise_dwell_us or dwell_us
        scale = (dwell_us / self.noise_dwell_us) ** 0.5 if dwell_us else 1.0
        self.noise.append(np.array(line.data) if scale == 1.0 else line.data * np.float32(scale))

    def finish(self, before: int | None = None) -> Iterator[Scan]:
        """Hand out and forget all volumes, or those of repetitions below `before`."""
        notes = missing_volumes(self.promised, self.seen) if before is None else []
        for key in sorted(key for key in self.volumes if before is None or key[2] < before):
            volume = self.volumes.pop(key)
            self.given.add(key)
            if volume.head is not None:
                yield self._scan(volume, key, [*missing_ends(self.flags[key[2]]), *notes])

    def _image(self, line: ismrmrd.Acquisition, key: tuple[int, ...]) -> None:
        volume = self.volumes.get(key) or self._volume(key, line.active_channels)
        if "average" in self.seen:
            self.seen["average"].add(line.idx.average)
        volume.add(line, self.readouts[0][1])
        waiting, self.unsure = self.unsure, []
        for calibration, its_key in waiting:
            self._calibrate(calibration, its_key)

    def _volume(self, key: tuple[int, ...], coils: int, kspace: np.ndarray | None = None) -> Volume:
        volume = self.volumes[key] = Volume(self.geometry, coils, kspace)
        for name, value in zip(KEY, key):
            self.seen.setdefault(name, set()).add(value)
        self.ended.discard(key[2])  # where repetitions run inside of another counter, each of its values has them all
        return volume

    def _settled(self, repetition: int) -> Iterator[Scan]:
        """Volumes of repetitions before this line's, once no line of them can follow.

        Either their last lines were flagged, or the newest repetition is half through: repetitions may be interleaved.
        """
        self.streak = self.streak + 1 if repetition == self.repetition else 0
        self.repetition = max(self.repetition, repetition)
        earlier = {key[2]: volume.grid.lines for key, volume in self.volumes.items() if key[2] < repetition}
        if earlier and (earlier.keys() <= self.ended or self.streak > max(SETTLED, *earlier.values()) // 2):
            yield from self.finish(repetition)

    def _calibrate(self, line: ismrmrd.Acquisition, key: tuple[int, ...]) -> None:
        """Add a calibration line; those of a later repetition replace earlier ones.

        A short one waits for the image's first line, which shows whether the lines of its encoding are oversampled.
        """
        own = self._encoding(line.encoding_space_ref)
        if own is None:
            self.foreign += 1
            return
        samples = line.number_of_samples - line.discard_pre - line.discard_post
        if own[0] is self.geometry and not self.volumes and own[1].unsure(samples, line.center_sample - line.discard_pre):
            self.unsure.append((line, key))
            return
        place = (key[0], key[1], key[3], key[4])
        repetition, grid = self.calibrations.get(place, (-1, None))
        if grid is None or key[2] > repetition:
            grid = Grid(self.geometry, line.active_channels)
            self.calibrations[place] = (key[2], grid)
        where = grid.place(line, own[0], self.geometry)
        if where is not None:
            grid.add(line, where, own[1])

    def _encoding(self, number: int) -> tuple[Geometry, Readout] | None:
        """Geometry and readout of an encoding whose phase encodes fit the image's, else None."""
        if number not in self.readouts:
            try:
                own = read_geometry(self.header, number)
                fits = all(abs(a / b - 1) < 0.01 for a, b in zip(own.encoded_fov_mm[1:], self.geometry.encoded_fov_mm[1:]))
                self.readouts[number] = (own, Readout(self.geometry, own)) if fits else None
            except (ScanError, IndexError):
                self.readouts[number] = None
        return self.readouts[number]

    def _scan(self, volume: Volume, key: tuple[int, ...], notes: list[str]) -> Scan:
        noise, remarks = self._noise(volume)
        scan = volume.scan(noise, self._calibration(volume, key))
        if self.foreign:
            remarks.append(f"{self.foreign} lines of another encoding space were left out")
        if self.late:
            remarks.append(f"{self.late} lines of volumes that were handed out already were left out")
        scan.warnings += [*self.notes, *remarks, *notes]
        scan.series, scan.phase_reference = self.series, self.phase_reference
        return scan

    def _calibration(self, volume: Volume, key: tuple[int, ...]) -> Grid | None:
        """Calibration lines of this volume, else of another contrast, set or phase of its slice."""
        coils = len(volume.grid.kspace)
        own = (key[0], key[1], key[3], key[4])
        found = [place for place, (_, grid) in self.calibrations.items() if place[0] == key[0] and len(grid.kspace) == coils and grid.counts.any()]
        return self.calibrations[min(found, key=lambda place: (place != own, place))][1] if found else None

    def _noise(self, volume: Volume) -> tuple[torch.Tensor | None, list[str]]:
        """[coils samples] scaled to the noise of one gathered sample, and what the user should know.

        Noise power per sample goes with 1/dwell; a noise scan sees only the receiver's noise bandwidth of it,
        the middle of the readout sees all (Kellman and McVeigh, MRM 2005).
        """
        coils = len(volume.grid.kspace)
        usable = [n for n in self.noise if n.shape[0] == coils]
        if not usable:
            return None, [f"the noise lines have {self.noise[0].shape[0]} channels, the scan {coils}: they were not used"] if self.noise else []
        samples = sum(n.shape[1] for n in usable)
        if samples < 4 * coils:
            return None, [f"the noise lines have {samples} samples for {coils} channels, too few: they were not used"]
        dwell_us = volume.head.sample_time_us
        power = (self.noise_dwell_us / dwell_us if self.noise_dwell_us and dwell_us else 1.0) / self.bandwidth_ratio
        return torch.from_numpy(np.concatenate(usable, axis=1)) * power**0.5, []
