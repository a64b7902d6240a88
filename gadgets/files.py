"""Scans and images as files: ISMRMRD HDF5, NIfTI, PNG."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import ismrmrd
import ismrmrd.hdf5
import numpy as np

from .failure import of_lines
from .header import strip_version

ROWS = 512


class FileError(Exception):
    """A file that is missing or is not what was expected; the message is one sentence."""


class ScanFile:
    """An ISMRMRD scan in HDF5, read in blocks.

    Args:
        group: that holds it, also one within others (study/scan1); by default `dataset`, or the only one at the top that holds a scan.

    Raises:
        FileError: if the file, its group, its header or its acquisitions are missing, or are not what ISMRMRD makes of them.
    """

    def __init__(self, path: str | Path, group: str | None = None):
        if not Path(path).is_file():
            raise FileError(f"no such scan file: {path}")
        self.file = open_hdf5(path)
        try:
            self.group = self.file[self._find(path, group)]
            self.header_xml = strip_version(self._xml())
            self._check_table()
        except BaseException:
            self.file.close()
            raise

    def _xml(self) -> bytes:
        """The header's text, whether it stands alone or first in an array."""
        node = self.group["xml"]
        try:
            text = node[()] if node.shape == () else node[0]
        except (AttributeError, IndexError, ValueError):
            raise FileError(f"{self.group.name}/xml of {self.file.filename} holds no header") from None
        return text.encode() if isinstance(text, str) else bytes(text)

    def _check_table(self) -> None:
        table = self.group["data"]
        names = set(table.dtype.names or ()) if isinstance(table, h5py.Dataset) else set()
        if not {"head", "data"} <= names or table.shape[1:] not in ((), (1,)):
            raise FileError(f"{self.group.name}/data of {self.file.filename} is no table of acquisitions (head, traj, data)")
        samples = h5py.check_vlen_dtype(table.dtype["data"]) or table.dtype["data"].base
        if samples != np.float32:  # h5py returns the bytes of others unchanged and calls them float32
            raise FileError(f"the samples of {self.group.name}/data of {self.file.filename} are stored as {samples}, expected {np.dtype(np.float32)}: write them as little-endian float32")

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
        raise FileError(f"{path} has no ISMRMRD scan in group {wanted!r} (groups: {', '.join(self.file) or 'none'})")

    def __enter__(self) -> ScanFile:
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()

    def __len__(self) -> int:
        return self.group["data"].shape[0]

    def acquisitions(self) -> Iterator[ismrmrd.Acquisition]:
        """All acquisitions in order that can be read; then, if there were others, FileError."""
        table, lost, reason = self.group["data"], 0, ""
        for first in range(0, len(self), ROWS):
            try:
                rows = table[first : first + ROWS].reshape(-1)  # some write a table of one column
            except OSError as error:
                lost, reason = lost + min(ROWS, len(self) - first), reason or f"the scan file is damaged near acquisition {first}: {error}"
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
        """All waveforms in order that can be read; then, if there were others, FileError."""
        try:
            rows = self.group["waveforms"][()] if "waveforms" in self.group else np.empty(0, ismrmrd.hdf5.waveform_dtype)
        except OSError as error:
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
            raise FileError(f"waveforms of the scan file have other sizes than they announce: {lost} of {len(rows)} were left out")

    def items(self) -> Iterator[ismrmrd.Acquisition | ismrmrd.Waveform]:
        """Acquisitions and waveforms, each waveform before the first acquisition that is not earlier; FileError as of both, in the end."""
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
    """`items` up to a FileError, which is put into `damage`: what came before it is worth something."""
    try:
        yield from items
    except FileError as error:
        damage.append(error)


def open_hdf5(path: str | Path) -> h5py.File:
    """The file, to be read; FileError if it is none or another program has it."""
    try:
        return h5py.File(path, "r")
    except BlockingIOError:
        raise FileError(f"{path} is in use by another program, which writes to it: wait until it has closed it") from None
    except OSError as error:
        raise FileError(f"{path} is not an HDF5 file: {error}") from None


def scans_in(file: h5py.File) -> list[str]:
    """Names of the groups at the top that hold a scan."""
    return [name for name, node in file.items() if is_scan(node)]


def is_scan(node) -> bool:
    """Whether something in an HDF5 file is a group with a header and acquisitions."""
    return isinstance(node, h5py.Group) and {"xml", "data"} <= set(node)


def by_name(rows: np.ndarray, wanted: np.dtype) -> np.ndarray:
    """Structures with the same fields laid out as `wanted`: other programs align, order or store them in another way. What is missing is 0."""
    if rows.dtype == wanted:
        return rows
    out = np.zeros(rows.shape, wanted)
    for name in set(wanted.names) & set(rows.dtype.names or ()):
        out[name] = by_name(rows[name], wanted[name].base) if wanted[name].base.names else rows[name]
    return out


def _acquisition(head: np.void, row: np.void, number: int) -> ismrmrd.Acquisition:
    head = ismrmrd.AcquisitionHeader.from_buffer_copy(head.tobytes())
    coils, samples, dims = head.active_channels, head.number_of_samples, head.trajectory_dimensions
    data, trajectory = (np.asarray(row[name] if name in row.dtype.names else [], np.float32).reshape(-1) for name in ("data", "traj"))
    if data.size != 2 * coils * samples or trajectory.size != samples * dims:
        raise FileError(f"acquisition {number} announces {coils} x {samples} samples but holds {data.size // 2}")
    return ismrmrd.Acquisition(head, data.view(np.complex64).reshape(coils, samples), trajectory.reshape(samples, dims))


class ScanWriter:
    """Writes an ISMRMRD scan to HDF5, in blocks; replaces an existing file. Its header has no <version>."""

    def __init__(self, path: str | Path, header_xml: str | bytes):
        header_xml = strip_version(header_xml.encode() if isinstance(header_xml, str) else header_xml)
        self.file = h5py.File(path, "w")
        group = self.file.create_group("dataset")
        group.create_dataset("xml", (1,), dtype=h5py.special_dtype(vlen=bytes))[0] = header_xml
        self.table = group.create_dataset("data", (0,), maxshape=(None,), chunks=(64,), dtype=ismrmrd.hdf5.acquisition_dtype)
        self.group, self.rows, self.waveforms = group, [], []

    def __enter__(self) -> ScanWriter:
        return self

    def __exit__(self, *exception) -> None:
        self._flush()
        if self.waveforms:
            table = np.empty(len(self.waveforms), ismrmrd.hdf5.waveform_dtype)
            for i, waveform in enumerate(self.waveforms):
                table[i]["head"] = np.frombuffer(bytes(waveform.getHead()), ismrmrd.hdf5.waveform_header_dtype)[0]
                table[i]["data"] = np.ascontiguousarray(waveform.data).ravel()
            self.group.create_dataset("waveforms", data=table, maxshape=(None,))
        self.file.close()

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


class ImageWriter:
    """Appends images to HDF5 in the layout of gadgetron_ismrmrd_client: /group/image_<series>/{data header attributes}.

    Raises:
        FileError: at once, not after the reconstruction, if the file cannot be written.
    """

    ROOM = 1 << 20  # for HDF5's own tables and the attributes

    def __init__(self, path: str | Path, group: str | None = None):
        _check_writable(Path(path))
        self.path, self.group, self.count = Path(path), group or time.strftime("%Y-%m-%d %H:%M:%S"), 0

    def check(self, series: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        """FileError if images [channels z y x] of this type and size cannot join those that the series has already, or the disk is full.

        HDF5 loses all images of a file when the disk fills up while it writes one.
        """
        needed, free = math.prod(shape) * np.dtype(dtype).itemsize + self.ROOM, shutil.disk_usage(self.path.absolute().parent).free
        if free < needed:
            raise FileError(f"no room for another image: {self.path} needs {needed / 2**20:.1f} MiB more, {free / 2**20:.1f} MiB of its disk are free")
        where = f"group {self.group!r} of {self.path}"
        if not self.path.exists():
            return
        with open_hdf5(self.path) as file:
            node = _inside(file, f"{self.group}/image_{series}", where)
            found = None if node is None else _kind(node, where)
        if found not in (None, (np.dtype(dtype), tuple(shape))):
            raise FileError(f"{where} holds {_words(*found)} in series {series}, and {_words(np.dtype(dtype), shape)} came: give another --group or another file")

    def write(self, image: ismrmrd.Image) -> None:
        """Append one image; written to disk at once, so that a later failure loses nothing.

        Raises:
            FileError: before anything is written, if the image is not like those of its series in the file.
        """
        self.check(image.image_series_index, image.data.dtype, image.data.shape)
        try:
            with ismrmrd.Dataset(self.path, self.group) as dataset:
                dataset.append_image(f"image_{image.image_series_index}", image)
        except BlockingIOError:
            raise FileError(f"{self.path} is in use by another program: nothing can be appended to it") from None
        self.count += 1


def _inside(file: h5py.File, name: str, where: str) -> h5py.Group | None:
    """A group of a file, None if there is none yet; FileError if something else has its name."""
    for parent in (name.rpartition("/")[0], name):
        if parent in file and not isinstance(file[parent], h5py.Group):
            raise FileError(f"{where} cannot take images: {parent!r} is no group there")
    return file.get(name)


def _kind(node: h5py.Group, where: str) -> tuple[np.dtype, tuple[int, ...]] | None:
    """Pixel type and size [channels z y x] of the images of a series, None if it is empty; FileError if it is damaged."""
    parts = [node.get(name) for name in ("header", "attributes", "data")]
    if parts == [None] * 3:
        return None
    if None in parts or len({len(part) for part in parts}) > 1 or parts[2].ndim != 5:
        raise FileError(f"{where} is damaged or not of images, nothing can be appended to it: give another --group or another file")
    return _pixel_type(parts[2].dtype), parts[2].shape[1:]


def _pixel_type(stored: np.dtype) -> np.dtype:
    """ISMRMRD stores complex numbers as pairs (real, imag)."""
    return np.dtype(f"c{stored.itemsize}") if stored.names else stored


def _words(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    channels, z, y, x = shape
    return f"{dtype} images of {x} x {y} x {z}" + f" with {channels} channels" * (channels > 1)


def check_apart(scan: Path, images: Path) -> None:
    """FileError if the images would go into the scan's own file, which is open for reading meanwhile."""
    if scan.exists() and images.exists() and scan.samefile(images):
        raise FileError(f"{images} is the scan itself: its images need a file of their own")


def check_folder(path: Path) -> None:
    """FileError if `path` is no folder to write to and cannot be made one."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise FileError(f"{path} cannot be a folder: {there} is a file")
    if not os.access(there, os.W_OK):
        raise FileError(f"nothing can be written into {path}: permission denied")


def check_picture(path: Path) -> None:
    """FileError if `path` is no place for a picture, or has the ending of none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise FileError(f"{path} cannot be drawn: pictures end in .png (or one of {', '.join(sorted(known))})")
    if path.is_dir():
        raise FileError(f"{path} cannot be written: it is a folder")
    check_place(path)


def _check_writable(path: Path) -> None:
    check_place(path)
    if path.exists() and not h5py.is_hdf5(path):
        raise FileError(f"{path} exists and is not an HDF5 file: nothing can be appended to it")


def check_place(path: Path) -> None:
    """FileError if there is no folder for a file."""
    if not path.parent.is_dir():
        raise FileError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise FileError(f"{path} cannot be written: permission denied")


def read_images(path: str | Path, group: str | None = None) -> list[ismrmrd.Image]:
    """All images of a group (the last one by default), by series.

    Read here and not by ismrmrd.Dataset, which before 1.15 opens files for writing.
    """
    if not Path(path).is_file():
        raise FileError(f"no such image file: {path}")
    with open_hdf5(path) as file:
        series = file[group or sorted(file)[-1]]
        return [image for name in sorted(series) for image in _series(series[name])]


def _series(node: h5py.Group) -> Iterator[ismrmrd.Image]:
    for head, attributes, pixels in zip(node["header"], node["attributes"], node["data"]):
        image = ismrmrd.Image(head, attributes)
        image.data[:] = pixels.view(image.data.dtype) if pixels.dtype.names else pixels
        yield image


def join_partitions(images: Iterable[ismrmrd.Image]) -> list[ismrmrd.Image]:
    """Whole volumes: the partitions of each as one 3D image that has the volume's number; what is whole stays as it is.

    The number in the Meta attributes counts, where there is one: that of the header begins again after 65,535.
    """
    volumes: dict[tuple[int, int], list[ismrmrd.Image]] = {}
    for image in images:
        partitions = int(image.meta["recon_matrix"][2]) // image.data.shape[1]
        number = int(image.meta.get("GADGETRON_ImageNumber", image.image_index))
        volumes.setdefault((image.image_series_index, (number - 1) // partitions), []).append(image)
    return [parts[0] if len(parts) == 1 else _join(parts, number + 1) for (_, number), parts in volumes.items()]


def _join(parts: list[ismrmrd.Image], number: int) -> ismrmrd.Image:
    """One image of partitions in order; the place of pixel n//2 is that of the partition n//2."""
    joined = ismrmrd.Image.from_array(np.concatenate([part.data[0] for part in parts]), transpose=False)
    head, (x, y, z) = parts[len(parts) // 2].getHead(), parts[0].field_of_view
    head.matrix_size, head.field_of_view, head.image_index = joined.matrix_size, (x, y, z * len(parts)), number
    joined.setHead(head)
    joined.meta = parts[0].meta
    return joined


def write_nifti(image: ismrmrd.Image, path: str | Path) -> None:
    """Write one 3D image as NIfTI in RAS millimetres, magnitude as float32 in the units before scaling."""
    pixels = np.abs(image.data[0]).astype(np.float32) * float(image.meta.get("RescaleSlope", 1))
    save_nifti(pixels, affine(image.getHead()), path)


def save_nifti(pixels: np.ndarray, matrix: np.ndarray, path: str | Path) -> None:
    """Save pixels [z y x] as NIfTI; `matrix` maps pixel (x, y, z) to RAS millimetres of the scanner."""
    import nibabel

    image = nibabel.Nifti1Image(pixels.T, matrix)
    image.set_sform(matrix, code=1)
    image.set_qform(matrix, code=1)  # some programs read only this one
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)


def affine(head: ismrmrd.ImageHeader) -> np.ndarray:
    """4 x 4 map from pixel (x, y, z) to RAS millimetres; pixel n//2 lies at the header's position (LPS)."""
    matrix = np.array(head.matrix_size, float)
    voxel = np.array(head.field_of_view, float) / matrix
    directions = np.array([head.read_dir, head.phase_dir, head.slice_dir], float).T
    out = np.eye(4)
    out[:3, :3] = directions * voxel
    out[:3, 3] = np.array(head.position, float) - out[:3, :3] @ (matrix // 2)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ out


def write_png(image: ismrmrd.Image, path: str | Path) -> None:
    """Three orthogonal centre slices of an image as one PNG."""
    from .figure import draw_orthogonal

    draw_orthogonal(np.abs(image.data[0]), affine(image.getHead()), path)
