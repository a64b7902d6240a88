"""Images as files: ISMRMRD HDF5, NIfTI, PNG."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import ismrmrd
import ismrmrd.hdf5
import numpy as np

from .files import FileError, check_place, damage_told, open_hdf5


class ImageWriter:
    """Appends images to HDF5 in the layout of gadgetron_ismrmrd_client: /group/image_<series>/{data header attributes}.

    Raises:
        FileError: at once, not after the reconstruction, if the file cannot be written.
    """

    ROOM = 1 << 20  # for HDF5's own tables and the attributes

    def __init__(self, path: str | Path, group: str | None = None):
        _check_writable(Path(path))
        self.path, self.group, self.count = Path(path), group or _new_group(Path(path)), 0

    def check(self, series: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        """FileError if the series cannot take images [channels z y x] of this type and size, or the disk is full.

        HDF5 loses all images of a file if the disk fills up during a write.
        """
        needed = math.prod(shape) * np.dtype(dtype).itemsize + self.ROOM
        free = shutil.disk_usage(self.path.absolute().parent).free
        if free < needed:
            raise FileError(
                f"no room for another image: {self.path} needs {needed / 2**20:.1f} MiB more, "
                f"{free / 2**20:.1f} MiB of its disk are free"
            )
        where = f"group {self.group!r} of {self.path}"
        if not self.path.exists():
            return
        with damage_told(self.path), open_hdf5(self.path) as file:
            node = _inside(file, f"{self.group}/image_{series}", where)
            found = None if node is None else _kind(node, where)
        if found not in (None, (np.dtype(dtype), tuple(shape))):
            raise FileError(
                f"{where} holds {_words(*found)} in series {series}, and {_words(np.dtype(dtype), shape)} came: "
                "give another --group or another file"
            )

    def write(self, image: ismrmrd.Image) -> None:
        """Append one image; written to disk at once, so that a later failure loses nothing.

        Raises:
            FileError: before anything is written, if the image does not match those of its series in the file.
        """
        self.check(image.image_series_index, image.data.dtype, image.data.shape)
        try:
            with ismrmrd.Dataset(self.path, self.group) as dataset:
                dataset.append_image(f"image_{image.image_series_index}", image)
        except BlockingIOError:
            raise FileError(f"{self.path} is in use by another program: nothing can be appended to it") from None
        self.count += 1


def _inside(file: h5py.File, name: str, where: str) -> h5py.Group | None:
    """Group `name` of a file, None if it does not exist yet; FileError if something else has its name."""
    for parent in (name.rpartition("/")[0], name):
        if parent in file and not isinstance(file[parent], h5py.Group):
            raise FileError(f"{where} cannot take images: {parent!r} is no group there")
    return file.get(name)


def _kind(node: h5py.Group, where: str) -> tuple[np.dtype, tuple[int, ...]] | None:
    """Pixel type and size [channels z y x] of the images of a series, None if it is empty.

    Raises:
        FileError: if it is damaged.
    """
    parts = [node.get(name) for name in ("header", "attributes", "data")]
    if parts == [None] * 3:
        return None
    if None in parts or len({len(part) for part in parts}) > 1 or parts[2].ndim != 5:
        raise FileError(
            f"{where} is damaged or holds no images, nothing can be appended to it: "
            "give another --group or another file"
        )
    return _pixel_type(parts[2].dtype), parts[2].shape[1:]


def _pixel_type(stored: np.dtype) -> np.dtype:
    """ISMRMRD stores complex numbers as pairs (real, imag)."""
    return np.dtype(f"c{stored.itemsize}") if stored.names else stored


def _words(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    channels, z, y, x = shape
    return f"{dtype} images of {x} x {y} x {z}" + f" with {channels} channels" * (channels > 1)


def _new_group(path: Path) -> str:
    """The time, as gadgetron_ismrmrd_client names its groups.

    With a number if another run in the same second has taken it.
    """
    name, known = time.strftime("%Y-%m-%d %H:%M:%S"), []
    if path.exists():
        with damage_told(path), open_hdf5(path) as file:
            known = list(file)
    names = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
    return next(found for found in names if found not in known)


def _check_writable(path: Path) -> None:
    check_place(path)
    if path.exists() and not h5py.is_hdf5(path):
        raise FileError(f"{path} exists and is not an HDF5 file: nothing can be appended to it")


def read_images(path: str | Path, group: str | None = None) -> list[ismrmrd.Image]:
    """All images of a group (the last one by default), by series.

    Not read with ismrmrd.Dataset, which before 1.15 opens files for writing.
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
    """Whole volumes: the partitions of each joined into one 3D image with the volume's number.

    Whole volumes stay as they are. The image number in the Meta attributes takes precedence, if there is one: the
    header's wraps around after 65,535.
    """
    volumes: dict[tuple[int, int], list[ismrmrd.Image]] = {}
    for image in images:
        partitions = int(image.meta["recon_matrix"][2]) // image.data.shape[1]
        number = int(image.meta.get("GADGETRON_ImageNumber", image.image_index))
        volumes.setdefault((image.image_series_index, (number - 1) // partitions), []).append(image)
    return [parts[0] if len(parts) == 1 else _join(parts, number + 1) for (_, number), parts in volumes.items()]


def _join(parts: list[ismrmrd.Image], number: int) -> ismrmrd.Image:
    """One image from partitions in order; its position, of pixel n//2, is that of partition n//2."""
    joined = ismrmrd.Image.from_array(np.concatenate([part.data[0] for part in parts]), transpose=False)
    head, (x, y, z) = parts[len(parts) // 2].getHead(), parts[0].field_of_view
    head.matrix_size, head.field_of_view = joined.getHead().matrix_size, (x, y, z * len(parts))
    head.image_index = number
    joined.setHead(head)
    joined.meta = parts[0].meta
    return joined


def write_nifti(image: ismrmrd.Image, path: str | Path) -> None:
    """Write one 3D image as NIfTI in RAS millimetres: magnitude as float32, in the units before scaling."""
    pixels = np.abs(image.data[0]).astype(np.float32) / float(image.meta.get("GADGETRON_ScaleRatio", 1))
    save_nifti(pixels, affine(image.getHead()), path)


def save_nifti(pixels: np.ndarray, matrix: np.ndarray, path: str | Path) -> None:
    """Save pixels [z y x] as NIfTI; `matrix` maps pixel (x, y, z) to scanner RAS millimetres."""
    import nibabel  # not above, as most runs write no NIfTI

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
    from .figure import draw_orthogonal  # not above, as matplotlib takes seconds to load

    draw_orthogonal(np.abs(image.data[0]), affine(image.getHead()), path)
