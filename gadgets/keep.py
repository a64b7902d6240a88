"""Raw data of failed scans, kept for replay with `slicediff recon` in a folder of limited size.

While a scan runs, its lines are appended to a plain spool file (a full disk then causes one clear OSError and never
costs the scan); only a failed scan is converted to ISMRMRD HDF5.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import struct
import threading
import time
from pathlib import Path

import ismrmrd

from .recon_data import ReconData, ReconDataError, lines_of

log = logging.getLogger("slicediff")
SPOOL = ".spool"
MOST_GIB = 1e6


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
        self.pruning, self.counting, self.recorded = threading.Lock(), threading.Lock(), 0
        self._recover()

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
            scans = []
            for path in self.folder.glob("failed-*.h5"):
                with contextlib.suppress(FileNotFoundError):  # another server using this folder was quicker
                    scans.append((path.stat().st_mtime, path.stat().st_size, path))
            total = sum(size for _, size, _ in scans)
            for _, size, path in sorted(scans):
                if total <= self.max_bytes:
                    return
                if path == newest:
                    continue
                total -= size
                path.unlink(missing_ok=True)
                log.warning("removed %s: the failed scans took more than %.3g GiB", path, self.max_bytes / 2**30)

    def _recover(self) -> None:
        """Convert the spool files of a killed server; those of a running one are locked."""
        for path in self.folder.glob(f"scan-*{SPOOL}"):
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                if _lock(file):
                    _convert(path, self)


class Recording:
    """Recording of one running scan, ended by `keep` or `drop`. Disk errors are logged once and never raised."""

    def __init__(self, place: FailedScans, header_xml: bytes):
        self.place, self.bytes, self.lines, self.file = place, 0, 0, None
        self.path = place.folder / f"scan-{os.getpid()}-{time.time_ns()}{SPOOL}"
        try:
            self.file = open(self.path, "wb", buffering=0, opener=_private)  # unbuffered: nothing is lost if the process is killed
            _lock(self.file)
        except OSError as error:
            self._give_up(error)
        self._write(struct.pack("<I", len(header_xml)) + header_xml)

    def add(self, item) -> None:
        """Record one item of the scan: an acquisition, or the acquisitions in a ReconData; others are ignored."""
        if isinstance(item, ismrmrd.Acquisition):
            self._add_line(item)
        elif isinstance(item, ReconData) and self.file is not None:
            for buffer in item.buffers():
                with contextlib.suppress(ReconDataError):  # its lines cannot be told apart; the reconstruction reports it
                    for block in buffer.blocks():
                        for _, line in lines_of(*block):
                            self._add_line(line)

    def _add_line(self, line: ismrmrd.Acquisition) -> None:
        if self.file is not None:
            self.lines += 1
            self._write(line.to_bytes())

    def keep(self) -> Path | None:
        """The scan failed: write it to HDF5 and return the path; None if it had no lines or could not be written."""
        if self.file is None or not self.lines:
            return self.drop()
        try:
            return _convert(self.path, self.place)  # still locked, or another server would take it for one left behind
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
                raise OSError(f"the scans that are running take more than {self.place.max_bytes / 2**30:.3g} GiB, {self.bytes / 2**30:.3g} of them this one")
            if self.file.write(data) < len(data):
                raise OSError(f"the disk with {self.place.folder} is full")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.error("the raw data of this scan will not be kept: %s", error)
        self._close()

    def _close(self) -> None:
        file, self.file = self.file, None
        self.place.count(-self.bytes)
        self.bytes = 0
        try:
            if file is not None:
                file.close()
        except OSError as error:
            log.debug("closing %s: %s", self.path, error)
        self.path.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _convert(spool: Path, place: FailedScans) -> Path | None:
    """Convert a spool file, locked by the caller, to HDF5; if the disk is full, remove the spool file and return None."""
    from .scan_files import ScanWriter

    number = spool.name.removesuffix(SPOOL).split("-")[-1]
    target = place.folder / f"failed-{time.strftime('%Y%m%d-%H%M%S')}-{number}.h5"
    partial = spool.with_suffix(".partial")  # named after the spool file: if this process is killed, the next one overwrites it
    try:
        if shutil.disk_usage(place.folder).free < 1.2 * spool.stat().st_size:
            raise OSError(f"less than {1.2 * spool.stat().st_size / 2**20:.0f} MiB are free in {place.folder}")
        with open(spool, "rb") as stream:
            with ScanWriter(partial, stream.read(struct.unpack("<I", stream.read(4))[0])) as writer:
                for line in _lines(stream):
                    writer.append(line)
        partial.chmod(0o600)
        partial.rename(target)
        log.warning("the failed scan was kept: %s", target)
        place.prune(target)
    except (OSError, RuntimeError, ValueError, struct.error) as error:  # h5py reports a full disk in several ways
        log.error("the raw data of a failed scan could not be kept: %s", error)
    partial.unlink(missing_ok=True)
    spool.unlink(missing_ok=True)
    return target if target.exists() else None


def _lines(stream):
    """The acquisitions of a spool file, without a truncated last one."""

    def exactly(nbytes: int) -> bytes:
        data = stream.read(nbytes)
        if len(data) < nbytes:
            raise EOFError
        return data

    while True:
        try:
            yield ismrmrd.Acquisition.deserialize_from(exactly)
        except EOFError:
            return


def _lock(file) -> bool:
    """Lock a file for as long as it is open; False if another process has it locked. A process id would not do: ids are reused, in containers at once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks: there, only one server may use a folder
        log.debug("%s cannot be locked: %s", file.name, error)
    return True
