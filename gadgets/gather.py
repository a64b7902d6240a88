"""Acquisitions to k-space: one preallocated array per volume, filled while the scan runs.

Each line is cut, turned, centred and Fourier transformed along the readout as it arrives, and its
readout oversampling is removed, so that the array has the size of the image from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import ismrmrd
import numpy as np
import torch

SKIPPED = (
    ismrmrd.ACQ_IS_NAVIGATION_DATA,
    ismrmrd.ACQ_IS_PHASECORR_DATA,
    ismrmrd.ACQ_IS_HPFEEDBACK_DATA,
    ismrmrd.ACQ_IS_DUMMYSCAN_DATA,
    ismrmrd.ACQ_IS_RTFEEDBACK_DATA,
    ismrmrd.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA,
    ismrmrd.ACQ_IS_PHASE_STABILIZATION_REFERENCE,
    ismrmrd.ACQ_IS_PHASE_STABILIZATION,
)
_bits = lambda *flags: sum(1 << (flag - 1) for flag in flags)  # noqa: E731
SKIP_BITS = _bits(*SKIPPED)
NOISE_BIT = _bits(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
CALIBRATION_BIT = _bits(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
BOTH_BIT = _bits(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
REVERSE_BIT = _bits(ismrmrd.ACQ_IS_REVERSE)

MAX_VOLUME_BYTES = 64 << 30


class ScanError(ValueError):
    """A scan that cannot be reconstructed; the message is one sentence for the user."""


@dataclass(frozen=True)
class Geometry:
    """Matrix and field of view as x, y, z; where k = 0 lies among the encoding steps."""

    encoded_matrix: tuple[int, int, int]
    encoded_fov_mm: tuple[float, float, float]
    recon_matrix: tuple[int, int, int]
    recon_fov_mm: tuple[float, float, float]
    centre: tuple[int, int]
    limits: tuple[tuple[int, int], tuple[int, int]]
    readout: int
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Gathered matrix z, y, x: phase-encode axes as encoded, readout without oversampling."""
        return (self.encoded_matrix[2], self.encoded_matrix[1], self.readout)

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        """Voxel size of the gathered matrix along z, y, x."""
        x, y, z = self.encoded_fov_mm
        return (z / self.shape[0], y / self.shape[1], self.recon_fov_mm[0] / self.readout)


@dataclass
class Scan:
    """One volume: sums of lines [coils z y x] (x in image space), line counts [z y], and its headers."""

    geometry: Geometry
    kspace: torch.Tensor
    counts: torch.Tensor
    head: ismrmrd.AcquisitionHeader
    noise: torch.Tensor | None = None
    calibration: tuple[torch.Tensor, torch.Tensor] | None = None
    warnings: list[str] = field(default_factory=list)


def read_geometry(header: ismrmrd.xsd.ismrmrdHeader) -> Geometry:
    """Geometry of the first encoding.

    Raises:
        ScanError: without an encoding, with an impossible matrix, or for a trajectory that is not Cartesian.
    """
    if not header.encoding:
        raise ScanError("the header has no encoding: matrix and field of view are unknown")
    encoding, warnings = header.encoding[0], []
    kind = getattr(encoding.trajectory, "value", encoding.trajectory)
    if kind not in (None, "cartesian"):
        raise ScanError(f"expected a cartesian trajectory, the header says {kind!r}")
    if encoding.encodedSpace is None or encoding.reconSpace is None:
        raise ScanError("the header lacks encodedSpace or reconSpace")
    encoded, recon = _matrix(encoding.encodedSpace), _matrix(encoding.reconSpace)
    encoded_fov, recon_fov = _fov(encoding.encodedSpace), _fov(encoding.reconSpace)
    limits, centres = [], []
    for axis, name in ((1, "kspace_encoding_step_1"), (2, "kspace_encoding_step_2")):
        limit = getattr(encoding.encodingLimits, name, None) if encoding.encodingLimits else None
        if limit is None or limit.maximum is None:
            limits.append((0, encoded[axis] - 1))
            centres.append(encoded[axis] // 2)
            if encoded[axis] > 1:
                warnings.append(f"the header has no limits for {name}: centre {encoded[axis] // 2} assumed")
        else:
            low, high, centre = limit.minimum or 0, limit.maximum, limit.center
            if centre is None or not low <= centre <= high:
                warnings.append(f"the header's centre {centre} of {name} lies outside {low} to {high}: {(low + high + 1) // 2} assumed")
                centre = (low + high + 1) // 2
            limits.append((low, high))
            centres.append(centre)
    readout = max(1, round(encoded[0] * recon_fov[0] / encoded_fov[0]))
    return Geometry(encoded, encoded_fov, recon, recon_fov, tuple(centres), tuple(limits), readout, tuple(warnings))


def gather(header: ismrmrd.xsd.ismrmrdHeader, items: Iterable) -> Iterator[Scan]:
    """Yield each volume once its last line has arrived (a later repetition began, or the input ended).

    Volumes are told apart by slice (slab), contrast, repetition, set and phase; averages are summed.
    Items that are no acquisitions (waveforms) are left aside.

    Raises:
        ScanError: when there is nothing to reconstruct.
    """
    gatherer = Gatherer(header)
    found = 0
    for item in items:
        if isinstance(item, ismrmrd.Acquisition):
            for scan in gatherer.add(item):
                found += 1
                yield scan
    for scan in gatherer.finish():
        found += 1
        yield scan
    if not found:
        raise ScanError(f"the scan holds no imaging line ({gatherer.skipped} other lines came): nothing to reconstruct")


class Gatherer:
    """State behind `gather`: lines in, finished volumes out."""

    def __init__(self, header: ismrmrd.xsd.ismrmrdHeader):
        self.geometry = read_geometry(header)
        self.volumes: dict[tuple[int, ...], _Volume] = {}
        self.noise: list[np.ndarray] = []
        self.noise_dwell_us = 0.0
        self.bandwidth_ratio = _noise_bandwidth(header)
        self.skipped = 0
        self.repetition = -1

    def add(self, line: ismrmrd.Acquisition) -> Iterator[Scan]:
        """Take one acquisition; yield the volumes of earlier repetitions that it completes."""
        flags = line.flags
        if flags & NOISE_BIT:
            self.noise.append(np.array(line.data))
            self.noise_dwell_us = line.sample_time_us
            return
        if flags & SKIP_BITS:
            self.skipped += 1
            return
        idx = line.idx
        if idx.repetition > self.repetition:
            yield from self.finish()
            self.repetition = idx.repetition
        key = (idx.slice, idx.contrast, idx.repetition, idx.set, idx.phase)
        if key not in self.volumes:
            self.volumes[key] = _Volume(self.geometry, line.active_channels)
        self.volumes[key].add(line)

    def finish(self) -> Iterator[Scan]:
        """Hand out and forget all volumes gathered so far."""
        volumes, self.volumes = self.volumes, {}
        for key in sorted(volumes):
            volume = volumes[key]
            if volume.head is not None:
                yield volume.scan(self._noise(volume), self.skipped)

    def _noise(self, volume: _Volume) -> torch.Tensor | None:
        """[coils samples] scaled to the noise of one gathered sample."""
        usable = [n for n in self.noise if n.shape[0] == volume.kspace.shape[0]]
        if not usable:
            return None
        dwell = volume.head.sample_time_us
        scale = (self.noise_dwell_us / dwell if self.noise_dwell_us and dwell else 1.0) * self.bandwidth_ratio
        return torch.from_numpy(np.concatenate(usable, axis=1)) * scale**0.5


class _Volume:
    """k-space of one volume under construction."""

    def __init__(self, geometry: Geometry, coils: int):
        if coils < 1:
            raise ScanError("an imaging line has no coil channels")
        nbytes = 8 * coils * int(np.prod(geometry.shape))
        if nbytes > MAX_VOLUME_BYTES:
            raise ScanError(f"the header asks for {nbytes / 2**30:.0f} GiB of k-space ({coils} coils, matrix {geometry.shape}); the limit is {MAX_VOLUME_BYTES >> 30} GiB")
        self.geometry = geometry
        self.kspace = np.zeros((coils, *geometry.shape), np.complex64)
        self.counts = np.zeros(geometry.shape[:2], np.float32)
        self.calibration: tuple[np.ndarray, np.ndarray] | None = None
        self.head: ismrmrd.AcquisitionHeader | None = None
        self.nearest = np.inf
        self.outside = self.wrong_shape = 0
        self.reach = [[1 << 16, -1], [1 << 16, -1]]

    def add(self, line: ismrmrd.Acquisition) -> None:
        """Add one imaging or calibration line at its place; lines that do not fit are counted."""
        z, y = self._place(line.idx)
        if not (0 <= z < self.counts.shape[0] and 0 <= y < self.counts.shape[1]):
            self.outside += 1
            return
        data = line.data[:, line.discard_pre : line.number_of_samples - line.discard_post]
        if data.shape[0] != self.kspace.shape[0] or data.shape[1] == 0:
            self.wrong_shape += 1
            return
        centre = line.center_sample - line.discard_pre
        if line.flags & REVERSE_BIT:
            data, centre = data[:, ::-1], data.shape[1] - 1 - centre
        row = readout_to_image(data, centre, self.geometry)
        if line.flags & CALIBRATION_BIT and not line.flags & BOTH_BIT:
            if self.calibration is None:
                self.calibration = (np.zeros_like(self.kspace), np.zeros_like(self.counts))
            self.calibration[0][:, z, y] += row
            self.calibration[1][z, y] += 1
            return
        self.kspace[:, z, y] += row
        self.counts[z, y] += 1
        self._remember(line, z, y)

    def scan(self, noise: torch.Tensor | None, skipped: int) -> Scan:
        """The finished volume with what the user should know of it."""
        calibration = None if self.calibration is None else tuple(torch.from_numpy(a) for a in self.calibration)
        scan = Scan(self.geometry, torch.from_numpy(self.kspace), torch.from_numpy(self.counts), self.head, noise, calibration)
        scan.warnings += self.geometry.warnings
        if self.outside:
            scan.warnings.append(f"{self.outside} lines lay outside the encoded matrix and were left out")
        if self.wrong_shape:
            scan.warnings.append(f"{self.wrong_shape} lines had another number of channels or no samples and were left out")
        missing = self._missing()
        if missing:
            scan.warnings.append(f"the scan seems incomplete: {missing}")
        return scan

    def _place(self, idx) -> tuple[int, int]:
        (cy, cz), (nz, ny) = self.geometry.centre, self.counts.shape
        return idx.kspace_encode_step_2 + nz // 2 - cz, idx.kspace_encode_step_1 + ny // 2 - cy

    def _remember(self, line: ismrmrd.Acquisition, z: int, y: int) -> None:
        distance = abs(z - self.counts.shape[0] // 2) + abs(y - self.counts.shape[1] // 2)
        if distance < self.nearest:
            self.nearest, self.head = distance, line.getHead()
        for reach, step in zip(self.reach, (line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2)):
            reach[0], reach[1] = min(reach[0], step), max(reach[1], step)

    def _missing(self) -> str:
        """Which announced end of k-space was never approached (corners may be left out, so be tolerant)."""
        for name, (low, high), (first, last) in zip(("E1", "E2"), self.geometry.limits, self.reach):
            slack = max(2, (high - low) // 10)
            if last < high - slack or first > low + slack:
                return f"{name} was announced from {low} to {high} and came from {first} to {last}"
        return ""


def readout_to_image(data: np.ndarray, centre: int, geometry: Geometry) -> np.ndarray:
    """Readout samples [coils samples] to image space [coils x], echo at `centre`, oversampling removed.

    An asymmetric echo is zero-filled; the transform is unitary.
    """
    length = geometry.encoded_matrix[0] if data.shape[1] > geometry.readout else geometry.readout
    start = length // 2 - centre
    if start != 0 or data.shape[1] != length:
        padded = np.zeros((data.shape[0], length), np.complex64)
        source = slice(max(0, -start), min(data.shape[1], length - start))
        padded[:, max(0, start) : max(0, start) + source.stop - source.start] = data[:, source]
        data = padded
    image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(data, axes=1), axis=1, norm="ortho"), axes=1)
    low = length // 2 - geometry.readout // 2
    return image[:, low : low + geometry.readout].astype(np.complex64, copy=False)


def _matrix(space) -> tuple[int, int, int]:
    m = space.matrixSize
    if min(m.x, m.y, m.z) < 1:
        raise ScanError(f"expected a matrix of at least 1 in each direction, the header says {m.x} x {m.y} x {m.z}")
    return (m.x, m.y, m.z)


def _fov(space) -> tuple[float, float, float]:
    f = space.fieldOfView_mm
    if not min(f.x, f.y, f.z) > 0:
        raise ScanError(f"expected a positive field of view, the header says {f.x} x {f.y} x {f.z} mm")
    return (f.x, f.y, f.z)


def _noise_bandwidth(header) -> float:
    """Receiver noise bandwidth ratio (about 0.79 on Siemens), 1 if not stated."""
    system = header.acquisitionSystemInformation
    return float(getattr(system, "relativeReceiverNoiseBandwidth", None) or 1.0)
