"""Raw data of failed scans, kept for a replay with `slicediff recon`, in a folder that does not grow without end.

While a scan runs its lines are appended to a plain file (a full disk then costs one clear OSError and never
the scan); only a scan that failed is turned into ISMRMRD HDF5.
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
    """The folder; oldest scans are removed first once all together exceed `gib`.

    Raises:
        OSError: if the folder cannot be made or written to.
        ValueError: for a size that cannot be.
    """

    def __init__(self, folder: str | Path, gib: float = 10.0):
        if not 0 < gib <= MOST_GIB:
            raise ValueError(f"the room for failed scans must be above 0 and at most {MOST_GIB:g} GiB, got {gib:g}")
        self.folder, self.max_bytes = Path(folder), int(gib * 2**30)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # headers tell who the patient is
        except FileExistsError:
            raise NotADirectoryError(f"failed scans cannot be kept in {folder}: it is a file") from None
        probe = self.folder / f"probe-{os.getpid()}{SPOOL}"
        probe.touch()
        probe.unlink()
        self.pruning, self.counting, self.recorded = threading.Lock(), threading.Lock(), 0
        self._recover()

    def record(self, header_xml: bytes) -> Recording:
        """Begin to record a scan."""
        return Recording(self, header_xml)

    def count(self, nbytes: int) -> int:
        """Bytes of all running recordings after `nbytes` more (or fewer)."""
        with self.counting:
            self.recorded += nbytes
            return self.recorded

    def prune(self, newest: Path | None = None) -> None:
        """Remove the oldest scans until the rest is small enough; `newest` stays whatever the clock said of the others."""
        with self.pruning:
            scans = []
            for path in self.folder.glob("failed-*.h5"):
                with contextlib.suppress(FileNotFoundError):  # another server of this folder was quicker
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
        """Turn what a killed server left behind into scans; what a running one writes is locked."""
        for path in self.folder.glob(f"scan-*{SPOOL}"):
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                if _lock(file):
                    _convert(path, self)


class Recording:
    """One running scan; `keep` or `drop` ends it. Trouble with the disk is logged once and never raised."""

    def __init__(self, place: FailedScans, header_xml: bytes):
        self.place, self.bytes, self.lines, self.file = place, 0, 0, None
        self.path = place.folder / f"scan-{os.getpid()}-{time.time_ns()}{SPOOL}"
        try:
            self.file = open(self.path, "wb", buffering=0, opener=_private)  # unbuffered: a killed process has lost nothing
            _lock(self.file)
        except OSError as error:
            self._give_up(error)
        self._write(struct.pack("<I", len(header_xml)) + header_xml)

    def add(self, item) -> None:
        """One more item of the scan; acquisitions are kept, and buffers as the acquisitions in them."""
        if isinstance(item, ismrmrd.Acquisition):
            self._add_line(item)
        elif isinstance(item, ReconData) and self.file is not None:
            for buffer in item.buffers():
                with contextlib.suppress(ReconDataError):  # no lines can be told apart; whoever reconstructs the scan says so
                    for block in buffer.blocks():
                        for _, line in lines_of(*block):
                            self._add_line(line)

    def _add_line(self, line: ismrmrd.Acquisition) -> None:
        if self.file is not None:
            self.lines += 1
            self._write(line.to_bytes())

    def keep(self) -> Path | None:
        """The scan failed: write it as HDF5 if it had any line, return where."""
        if self.file is None or not self.lines:
            return self.drop()
        try:
            return _convert(self.path, self.place)  # still locked: no other server may take it for left behind
        finally:
            self._close()

    def drop(self) -> None:
        """The scan went well: forget it."""
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
    """Spool file, locked by whoever calls, to HDF5; without room on the disk the spool is removed and None returned."""
    from .scan_files import ScanWriter

    number = spool.name.removesuffix(SPOOL).split("-")[-1]
    target = place.folder / f"failed-{time.strftime('%Y%m%d-%H%M%S')}-{number}.h5"
    partial = spool.with_suffix(".partial")  # of the spool's name: if this process is killed, the next one writes the same file anew
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
    except (OSError, RuntimeError, ValueError, struct.error) as error:  # h5py tells of a full disk in several ways
        log.error("the raw data of a failed scan could not be kept: %s", error)
    partial.unlink(missing_ok=True)
    spool.unlink(missing_ok=True)
    return target if target.exists() else None


def _lines(stream):
    """The acquisitions of a spool file; a last one that was cut off is left out."""

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
    """Lock a file for as long as it is open; False if another has it. A process id would be taken again, in a container at once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks: there a folder may serve one server only
        log.debug("%s cannot be locked: %s", file.name, error)
    return True
