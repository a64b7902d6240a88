"""Input of `slicediff train`.

Volumes in files of several formats or folders of them, options from YAML and the command line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import ismrmrd
import numpy as np
from pydantic import ValidationError

from recon_core.train_options import TrainOptions
from recon_core.volumes import Volume, emptiness, load_volume

from .files import DAMAGE, FileError, open_hdf5
from .header import parse_header
from .image_files import join_partitions, read_images
from .images import SERIES
from .options import OptionsError, error_sentence, make_options, read_yaml
from .recon import reconstruct
from .scan_files import ScanFile, scans_in

WHOLE = 0.7  # fraction of k-space: the corners, or a part of one side, may be missing
log = logging.getLogger("slicediff")
VOLUMES = (".nii.gz", ".nii", ".npy", ".h5", ".hdf5", ".mrd")


def load_volumes(paths: Iterable[Path]) -> list[Volume]:
    """All volumes in files and folders, in order.

    NIfTI and .npy hold one volume. HDF5 may be an ISMRMRD scan (fully sampled; reconstructed with coil maps,
    complex), ISMRMRD images (each a volume), or a single array [z y x] with an attribute voxel_mm (z, y, x).

    Raises:
        FileError: for a path that does not exist, a folder without volumes, or a file without usable ones.
    """
    return [_checked(volume) for path in find_volumes(paths) for volume in _load(path)]


def _checked(volume: Volume) -> Volume:
    if found := emptiness(volume.data):
        raise FileError(f"the volume {volume.name} holds {found}: nothing can be learned from it")
    return volume


def find_volumes(paths: Iterable[Path]) -> list[Path]:
    """The volume files given directly or found in folders, in order, without duplicates.

    Hidden ones (macOS writes ._x beside x) are left out.

    Raises:
        FileError: for a path that does not exist or a folder without volumes.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise FileError(f"no such volume or folder: {path}")
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.name.endswith(VOLUMES) and not p.name.startswith("."))
        if not inside:
            raise FileError(f"the folder {path} holds no volume ({', '.join(VOLUMES)})")
        found += inside
    # A link is read by its own name, which has the suffix, but counts as what it leads to.
    return list({path.resolve(): path for path in found}.values())


def make_train_options(config: Path | None, given: Mapping[str, Any]) -> TrainOptions:
    """Training options from a YAML file, overridden by those in `given`.

    Raises:
        OptionsError: naming the option, what was expected and what was given.
    """
    merged = {**(read_yaml(config) if config else {}), **given}
    try:
        return TrainOptions.model_validate(merged)
    except ValidationError as error:
        raise OptionsError(error_sentence(error, TrainOptions.model_fields)) from None


def _load(path: Path) -> list[Volume]:
    if not path.name.endswith((".h5", ".hdf5", ".mrd")):
        try:
            return [load_volume(path)]
        except Exception as error:  # nibabel and numpy raise many kinds of exceptions for damaged files
            raise FileError(f"{path} cannot be read as a volume: {error}") from None
    try:
        with open_hdf5(path) as file:
            if scans_in(file):
                return _from_scan(path)
            if groups := [name for name, node in file.items() if _holds_images(node)]:
                return _from_images(path, groups)
            return [_from_array(path, file)]
    except DAMAGE as error:
        raise FileError(f"{path} cannot be read as a volume: {error}") from None


def _holds_images(node) -> bool:
    series = node.values() if isinstance(node, h5py.Group) else ()
    return any(isinstance(one, h5py.Group) and "header" in one for one in series)


def _from_scan(path: Path) -> list[Volume]:
    options = make_options({"method": "cg", "output": "complex64", "preview": "false", "device": "cpu"})
    shares: list[float] = []

    def report(stage: str, facts: dict) -> None:
        if stage == "gathered":
            shares.append(facts["sampled"])

    with ScanFile(path) as scan:
        images = list(reconstruct(parse_header(scan.header_xml), scan.acquisitions(), None, options, report))
    whole = [(n, image) for n, (image, share) in enumerate(zip(images, shares, strict=True)) if share >= WHOLE]
    if not whole:
        raise FileError(
            f"{path} is undersampled ({max(shares):.0%} of k-space was acquired): a prior learns from whole scans"
        )
    if len(whole) < len(images):
        log.warning("of %s only %d of %d volumes are whole: the others were left out", path, len(whole), len(images))
    return [_from_image(f"{path.name}#{n}" if n else path.name, image) for n, image in whole]


def _from_images(path: Path, groups: Iterable[str]) -> list[Volume]:
    images = [image for group in groups for image in _volumes_of(read_images(path, group))]
    if not images:
        raise FileError(f"{path} holds only single slices; volumes are needed to resample through the plane")
    return [_from_image(f"{path.name}#{n}" if n else path.name, image) for n, image in enumerate(images)]


def _volumes_of(images: list[ismrmrd.Image]) -> list[ismrmrd.Image]:
    """The volumes of a run, without single slices; of ours, its partitions joined, and one series to learn from."""
    if images and "SliceDiffusion" in images[0].meta.get("ImageProcessingHistory", ()):
        final = [i for i in images if i.image_series_index == SERIES["final"]]
        images = join_partitions(final or [i for i in images if i.image_series_index == SERIES["preview"]])
    return [image for image in images if image.data.shape[1] > 1]


def _from_image(name: str, image) -> Volume:
    head = image.getHead()
    voxel_mm = tuple(float(f) / n for f, n in zip(reversed(head.field_of_view), reversed(head.matrix_size)))
    return Volume(name, np.array(image.data[0]), voxel_mm)


def _from_array(path: Path, file: h5py.File) -> Volume:
    arrays = []

    def visit(name: str, node) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim == 3:
            arrays.append(node)

    file.visititems(visit)
    if len(arrays) != 1:
        raise FileError(f"{path} should hold one array with three dimensions (z, y, x), it holds {len(arrays)}")
    voxel_mm = arrays[0].attrs.get("voxel_mm")
    if np.size(voxel_mm) != 3:
        raise FileError(f"{path}: the array {arrays[0].name} lacks the attribute voxel_mm (z, y, x)")
    return Volume(path.name, arrays[0][()], tuple(float(v) for v in voxel_mm))
