"""Raw data of failed scans, kept for replay with `slicediff recon` in a folder of limited size.

While a scan runs, its lines are appended to a plain spool file (a full disk then causes one clear OSError and never
costs the scan); only a failed scan is converted to ISMRMRD HDF5. A spool file holds the length of the header (uint32),
its XML, and the acquisitions as they are on the wire.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import shutil
import struct
import threading
import time
from pathlib import Path

import ismrmrd
import numpy as np

from .recon_data import ReconData, ReconDataError, lines_of
from .scan_files import ScanWriter

log = logging.getLogger("slicediff")
SPOOL, DAMAGED = ".spool", ".damaged"
MOST_GIB = 1e6
FULL = {errno.ENOSPC, errno.EDQUOT}


class SpoolError(ValueError):
    """A spool file that cannot be one; the message is one sentence."""


class FolderFull(OSError):
    """The disk has no room for a scan; the message is one sentence."""


class FailedScans:
    """The folder; once its scans exceed `gib` in total, the oldest are removed.

    Raises:
        OSError: if the folder cannot be made or written to.
        ValueError: for an invalid size.
    """

    def __init__(self, folder: str | Path, gib: float = 10.0):
        if not 0 < gib <= MOST_GIB:
            raise ValueError(f"the room for failed scans must be above 0 and at most {MOST_GIB:g} GiB, got {gib:g}")
        self.folder, self.max_bytes = Path(folder), int(gib * 2**30)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # headers identify the patient
        except FileExistsError:
            raise NotADirectoryError(f"failed scans cannot be kept in {folder}: it is a file") from None
        probe = self.folder / f"probe-{os.getpid()}{SPOOL}"
        probe.touch()
        probe.unlink()
        # Now, before there is one of our own, which could be taken for one left behind before it is locked.
        self.left_behind = sorted(self.folder.glob(f"scan-*{SPOOL}"))
        self.pruning, self.counting, self.recorded = threading.Lock(), threading.Lock(), 0

    def record(self, header_xml: bytes) -> Recording:
        """Start recording a scan."""
        return Recording(self, header_xml)

    def count(self, nbytes: int) -> int:
        """Add `nbytes` (may be negative) to the size of all running recordings; returns the total."""
        with self.counting:
            self.recorded += nbytes
            return self.recorded

    def prune(self, newest: Path | None = None) -> None:
        """Remove the oldest scans until the rest fits; `newest` stays, whatever the others' time stamps say."""
        with self.pruning:
            scans = self._oldest_first()
            total = sum(size for _, size, _ in scans)
            for _, size, path in scans:
                if total <= self.max_bytes:
                    return
                if path == newest:
                    continue
                total -= size
                _remove(path)
                log.warning("removed %s: the failed scans took more than %.3g GiB", path, self.max_bytes / 2**30)

    def make_room(self, nbytes: int) -> bool:
        """The disk is full: remove the oldest scans until `nbytes` are free; returns whether any was removed."""
        removed = False
        with self.pruning:
            for _, _, path in self._oldest_first():
                if removed and shutil.disk_usage(self.folder).free >= nbytes:
                    break
                if _remove(path):
                    removed = True
                    log.warning("removed %s: the disk is full", path)
        return removed

    def recover(self) -> None:
        """Convert the spool files that a killed server left behind; those of a running one are locked.

        One that cannot be read is put aside.
        """
        for path in self.left_behind:
            try:
                with open(path, "rb") as file:
                    if _lock(file):
                        _convert(path, self)
                        _remove(path)
            except FileNotFoundError:  # another server using this folder was quicker
                continue
            except Exception as error:  # the boundary of one file: whatever it holds, the others are converted
                log.error("what a killed server left in %s was not converted: %s", path, _said(error))
                if not isinstance(error, FolderFull):  # else the next start may have room
                    with contextlib.suppress(OSError):
                        path.rename(path.with_suffix(DAMAGED))

    def _oldest_first(self) -> list[tuple[float, int, Path]]:
        """(time, size in bytes, path) of what is kept."""
        scans = []
        for path in (*self.folder.glob("failed-*.h5"), *self.folder.glob(f"scan-*{DAMAGED}")):
            with contextlib.suppress(FileNotFoundError):  # another server using this folder was quicker
                scans.append((path.stat().st_mtime, path.stat().st_size, path))
        return sorted(scans)


class Recording:
    """Recording of one running scan, ended by `keep` or `drop`. Disk errors are logged once and never raised."""

    def __init__(self, place: FailedScans, header_xml: bytes):
        self.place, self.bytes, self.lines, self.file = place, 0, 0, None
        self.path = place.folder / f"scan-{os.getpid()}-{time.time_ns()}{SPOOL}"
        try:
            # Unbuffered: nothing is lost if the process is killed.
            self.file = open(self.path, "wb", buffering=0, opener=_private)
            _lock(self.file)
        except OSError as error:
            self._give_up(error)
        self._write(struct.pack("<I", len(header_xml)) + header_xml)

    def add(self, item) -> None:
        """Record one item of the scan: an acquisition, or the acquisitions in a ReconData; others are ignored."""
        if isinstance(item, ismrmrd.Acquisition):
            self._add_line(item)
        elif isinstance(item, ReconData) and self.file is not None:
            for blocks in (blocks for bit in item.bits for blocks in (bit.reference_blocks, bit.data.blocks)):
                # If its lines cannot be told apart, the reconstruction reports it.
                with contextlib.suppress(ReconDataError):
                    for block in blocks():
                        for _, line in lines_of(*block):
                            self._add_line(line)

    def _add_line(self, line: ismrmrd.Acquisition) -> None:
        if self.file is not None:
            self.lines += 1
            self._write(line.to_bytes())

    def keep(self) -> Path | None:
        """The scan failed: write it to HDF5 and return the path; None if it had no lines or could not be written."""
        if self.file is None or not self.lines:
            self.drop()
            return None
        try:
            return _convert(self.path, self.place)  # still locked, or another server would take it for one left behind
        # The boundary: no trouble with the folder may disturb a scan, and h5py reports a full disk in several ways.
        except Exception as error:
            log.error("the raw data of a failed scan could not be kept: %s", _said(error))
            return None
        finally:
            self._close()

    def drop(self) -> None:
        """The scan succeeded: discard the recording."""
        if self.file is not None:
            self._close()

    def _write(self, data: bytes) -> None:
        if self.file is None:
            return
        self.bytes += len(data)
        try:
            if self.place.count(len(data)) > self.place.max_bytes:
                raise OSError(
                    f"the scans that are running take more than {self.place.max_bytes / 2**30:.3g} GiB, "
                    f"{self.bytes / 2**30:.3g} of them this one"
                )
            self._append(data)
        except OSError as error:
            self._give_up(error)

    def _append(self, data: bytes) -> None:
        """Write all of it; where the disk is full, the oldest scans make room for as much again as this one has."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.file.write(rest) :]
            except OSError as error:
                if error.errno not in FULL or not self.place.make_room(self.bytes):
                    raise

    def _give_up(self, error: OSError) -> None:
        log.error("the raw data of this scan will not be kept: %s", error)
        self._close()

    def _close(self) -> None:
        file, self.file = self.file, None
        self.place.count(-self.bytes)
        self.bytes = 0
        if file is None:
            return
        try:
            file.close()
        except OSError as error:
            log.debug("closing %s: %s", self.path, error)
        _remove(self.path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _remove(path: Path) -> bool:
    """Remove a file, whether or not it is there; False, with a line in the log, if the folder does not let go of it."""
    try:
        path.unlink(missing_ok=True)
        return True
    except OSError as error:
        log.error("%s could not be removed: %s", path, error.strerror)
        return False


def _convert(spool: Path, place: FailedScans) -> Path:
    """Convert a spool file, locked by the caller, to HDF5.

    Raises:
        SpoolError: if it is none.
        FolderFull: if there is no room for it; h5py raises other errors as well.
    """
    number = spool.name.removesuffix(SPOOL).split("-")[-1]
    target = place.folder / f"failed-{time.strftime('%Y%m%d-%H%M%S')}-{number}.h5"
    # Named after the spool file: if this process is killed, the next one begins with it.
    partial = spool.with_suffix(".partial")
    _remove(partial)  # of a killed process: it may hold the room that is needed
    _ensure_room(place, int(1.2 * spool.stat().st_size))
    try:
        os.close(_private(partial, os.O_CREAT | os.O_WRONLY))  # before there is anything to read in it
        with open(spool, "rb") as stream:
            size = spool.stat().st_size
            with ScanWriter(partial, _header(stream, size)) as writer:
                for line in _lines(stream, size):
                    writer.append(line)
        partial.rename(target)
    except Exception:
        _remove(partial)
        raise
    log.warning("the failed scan was kept: %s", target)
    place.prune(target)
    return target


def _ensure_room(place: FailedScans, nbytes: int) -> None:
    """FolderFull unless so much is free, or becomes free without the oldest scans."""
    free = lambda: shutil.disk_usage(place.folder).free
    if free() < nbytes:
        place.make_room(nbytes)
    if free() < nbytes:
        raise FolderFull(f"{_size(nbytes)} are needed in {place.folder}, {_size(free())} are free")


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.0f} KiB"


def _header(stream, size: int) -> bytes:
    """The ISMRMRD header at the start of a spool file of `size` bytes."""
    start = stream.read(4)
    length = struct.unpack("<I", start)[0] if len(start) == 4 else size
    if length > size - 4:  # garbage must not take gigabytes of memory
        raise SpoolError(f"a header of {length} bytes was expected, the file has {size}: it is damaged")
    return stream.read(length)


def _lines(stream, size: int):
    """The acquisitions of a spool file of `size` bytes, without a truncated last one."""
    nbytes = ctypes.sizeof(ismrmrd.AcquisitionHeader)
    while size - stream.tell() >= nbytes:
        head = ismrmrd.AcquisitionHeader.from_buffer_copy(stream.read(nbytes))
        coils, samples, dims = head.active_channels, head.number_of_samples, head.trajectory_dimensions
        if samples * (4 * dims + 8 * coils) > size - stream.tell():
            return
        trajectory = np.frombuffer(stream.read(4 * samples * dims), np.float32).reshape(samples, dims)
        data = np.frombuffer(stream.read(8 * samples * coils), np.complex64).reshape(coils, samples)
        yield ismrmrd.Acquisition(head, data, trajectory)


def _lock(file) -> bool:
    """Lock a file for as long as it is open; False if another process has it locked.

    A process id would not do: ids are reused, in containers at once.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks: there, only one server may use a folder
        log.debug("%s cannot be locked: %s", file.name, error)
    return True
