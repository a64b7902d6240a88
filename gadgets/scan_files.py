"""ISMRMRD scans as HDF5 files, including those that other programs write differently or damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import ismrmrd
import ismrmrd.hdf5
import numpy as np

from .failure import of_lines
from .files import DAMAGE, FileError, create_hdf5, damage_told, open_hdf5
from .header import strip_version

ROWS = 512


class ScanFile:
    """An ISMRMRD scan in HDF5, read in blocks.

    Args:
        group: of the scan, may be nested (study/scan1); by default `dataset`, or the only top-level group that holds a
            scan.

    Raises:
        FileError: if the file, its group, its header or its acquisitions are missing, damaged or not in ISMRMRD format.
    """

    def __init__(self, path: str | Path, group: str | None = None):
        if not Path(path).is_file():
            raise FileError(f"no such scan file: {path}")
        self.file = open_hdf5(path)
        try:
            with damage_told(path):
                self.group = self.file[self._find(path, group)]
                self.header_xml = strip_version(self._xml())
                self._check_table()
        except BaseException:
            self.file.close()
            raise

    def _xml(self) -> bytes:
        """The header's text, whether a scalar or the first element of an array."""
        node = self.group["xml"]
        try:
            text = np.ravel(node[()])[0]
        except (AttributeError, IndexError, TypeError, ValueError):
            raise FileError(f"{self.group.name}/xml of {self.file.filename} holds no header") from None
        return text.encode() if isinstance(text, str) else bytes(text)

    def _check_table(self) -> None:
        table = self.group["data"]
        where = f"{self.group.name}/data of {self.file.filename}"
        names = set(table.dtype.names or ()) if isinstance(table, h5py.Dataset) else set()
        if not {"head", "data"} <= names or table.shape[1:] not in ((), (1,)):
            raise FileError(f"{where} is no table of acquisitions (head, traj, data)")
        samples = h5py.check_vlen_dtype(table.dtype["data"]) or table.dtype["data"].base
        if samples != np.float32:  # h5py returns the bytes of other types unchanged and calls them float32
            raise FileError(
                f"the samples of {where} are stored as {samples}, expected {np.dtype(np.float32)}: "
                "write them as little-endian float32"
            )

    def _find(self, path: str | Path, group: str | None) -> str:
        """Name of the scan's group."""
        if group and is_scan(self.file.get(group.strip("/"))):
            return group.strip("/")
        scans = scans_in(self.file)
        wanted = group or ("dataset" if "dataset" in scans or len(scans) != 1 else scans[0])
        if wanted in scans:
            return wanted
        if group is None and scans:
            raise FileError(f"{path} holds {len(scans)} scans: say which one with --input-group ({', '.join(scans)})")
        if isinstance(node := self.file.get(wanted), h5py.Group):
            lacking = " and ".join(name for name in ("xml", "data") if name not in node)
            others = f" (groups with scans: {', '.join(scans)})" * bool(scans)
            raise FileError(f"the group {wanted!r} of {path} is no ISMRMRD scan: it lacks {lacking}{others}")
        raise FileError(f"{path} has no ISMRMRD scan in group {wanted!r} (groups: {', '.join(self.file) or 'none'})")

    def __enter__(self) -> ScanFile:
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()

    def __len__(self) -> int:
        return self.group["data"].shape[0]

    def acquisitions(self) -> Iterator[ismrmrd.Acquisition]:
        """All readable acquisitions in order; then FileError if some could not be read."""
        table, lost, reason = self.group["data"], 0, ""
        for first in range(0, len(self), ROWS):
            try:
                rows = table[first : first + ROWS].reshape(-1)  # some programs write a table of one column
            except DAMAGE as error:
                lost += min(ROWS, len(self) - first)
                reason = reason or f"the scan file is damaged near acquisition {first}: {error}"
                continue
            heads = by_name(rows["head"], ismrmrd.hdf5.acquisition_header_dtype)
            for number, (head, row) in enumerate(zip(heads, rows), start=first):
                try:
                    yield _acquisition(head, row, number)
                except FileError as error:
                    lost, reason = lost + 1, reason or str(error)
        if lost:
            raise FileError(f"{reason}; {of_lines(lost, '{lines} of the file {were} left out')}")

    def waveforms(self) -> Iterator[ismrmrd.Waveform]:
        """All readable waveforms in order; then FileError if some could not be read."""
        rows = np.empty(0, ismrmrd.hdf5.waveform_dtype)
        try:
            if "waveforms" in self.group:
                rows = self.group["waveforms"][()]
        except (*DAMAGE, TypeError) as error:  # TypeError: a group
            raise FileError(f"the waveforms of the scan file are damaged and were left out: {error}") from None
        lost = 0
        for head, row in zip(by_name(rows["head"], ismrmrd.hdf5.waveform_header_dtype), rows):
            waveform = ismrmrd.Waveform(head.tobytes())
            if row["data"].size == waveform.data.size:
                waveform.data[:] = row["data"].reshape(waveform.data.shape)
                yield waveform
            else:
                lost += 1
        if lost:
            raise FileError(
                f"waveforms of the scan file have other sizes than they announce: {lost} of {len(rows)} were left out"
            )

    def items(self) -> Iterator[ismrmrd.Acquisition | ismrmrd.Waveform]:
        """Acquisitions and waveforms, each waveform before the first acquisition that is not earlier.

        A FileError of either comes at the end.
        """
        damage: list[FileError] = []
        waveforms = until_damaged(self.waveforms(), damage)
        waiting = next(waveforms, None)
        for line in self.acquisitions():
            while waiting is not None and waiting.time_stamp <= line.acquisition_time_stamp:
                yield waiting
                waiting = next(waveforms, None)
            yield line
        if waiting is not None:
            yield waiting
            yield from waveforms
        for error in damage:
            raise error


def until_damaged(items: Iterator, damage: list[FileError]) -> Iterator:
    """`items` up to a FileError, which is appended to `damage`: what came before it is still useful."""
    try:
        yield from items
    except FileError as error:
        damage.append(error)


def scans_in(file: h5py.File) -> list[str]:
    """Names of the top-level groups that hold a scan."""
    return [name for name, node in file.items() if is_scan(node)]


def is_scan(node) -> bool:
    """Whether an HDF5 node is a group with a header and acquisitions."""
    return isinstance(node, h5py.Group) and {"xml", "data"} <= set(node)


def by_name(rows: np.ndarray, wanted: np.dtype) -> np.ndarray:
    """Records with their fields laid out as `wanted`; missing fields are 0.

    Other programs align, order or store them differently.
    """
    if rows.dtype == wanted:
        return rows
    out = np.zeros(rows.shape, wanted)
    for name in set(wanted.names) & set(rows.dtype.names or ()):
        out[name] = by_name(rows[name], wanted[name].base) if wanted[name].base.names else rows[name]
    return out


def _acquisition(head: np.void, row: np.void, number: int) -> ismrmrd.Acquisition:
    head = ismrmrd.AcquisitionHeader.from_buffer_copy(head.tobytes())
    coils, samples, dims = head.active_channels, head.number_of_samples, head.trajectory_dimensions
    parts = (row[name] if name in row.dtype.names else [] for name in ("data", "traj"))
    data, trajectory = (np.asarray(part, np.float32).reshape(-1) for part in parts)
    if data.size != 2 * coils * samples:
        raise FileError(f"acquisition {number} announces {coils} x {samples} samples but holds {data.size // 2}")
    if not trajectory.size:
        dims = head.trajectory_dimensions = 0  # announced and left out, which a Cartesian scan can do without
    if trajectory.size != samples * dims:
        raise FileError(
            f"acquisition {number} announces a trajectory of {samples} x {dims} numbers but holds {trajectory.size}"
        )
    return ismrmrd.Acquisition(head, data.view(np.complex64).reshape(coils, samples), trajectory.reshape(samples, dims))


class ScanWriter:
    """Writes an ISMRMRD scan to HDF5, in blocks; replaces an existing file. The header is written without <version>."""

    def __init__(self, path: str | Path, header_xml: str | bytes):
        header_xml = strip_version(header_xml.encode() if isinstance(header_xml, str) else header_xml)
        self.file = create_hdf5(path)
        group = self.file.create_group("dataset")
        group.create_dataset("xml", (1,), dtype=h5py.special_dtype(vlen=bytes))[0] = header_xml
        self.table = group.create_dataset(
            "data", (0,), maxshape=(None,), chunks=(64,), dtype=ismrmrd.hdf5.acquisition_dtype
        )
        self.group, self.rows, self.waveforms = group, [], []

    def __enter__(self) -> ScanWriter:
        return self

    def __exit__(self, *exception) -> None:
        try:
            self._flush()
            if self.waveforms:
                self._write_waveforms()
        finally:
            self.file.close()  # on a full disk too: an open file would go on taking room after its deletion

    def _write_waveforms(self) -> None:
        table = np.empty(len(self.waveforms), ismrmrd.hdf5.waveform_dtype)
        for i, waveform in enumerate(self.waveforms):
            table[i]["head"] = np.frombuffer(bytes(waveform.getHead()), ismrmrd.hdf5.waveform_header_dtype)[0]
            table[i]["data"] = np.ascontiguousarray(waveform.data).ravel()
        self.group.create_dataset("waveforms", data=table, maxshape=(None,))

    def append(self, item: ismrmrd.Acquisition | ismrmrd.Waveform) -> None:
        """Add one acquisition or waveform."""
        if isinstance(item, ismrmrd.Waveform):
            self.waveforms.append(item)
            return
        self.rows.append(item)
        if len(self.rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        block = np.empty(len(self.rows), ismrmrd.hdf5.acquisition_dtype)
        for i, line in enumerate(self.rows):
            block[i]["head"] = np.frombuffer(bytes(line.getHead()), ismrmrd.hdf5.acquisition_header_dtype)[0]
            block[i]["data"] = np.ascontiguousarray(line.data).view(np.float32).ravel()
            block[i]["traj"] = np.ascontiguousarray(line.traj).ravel()
        start = self.table.shape[0]
        self.table.resize(start + len(self.rows), axis=0)
        self.table[start:] = block
        self.rows = []
