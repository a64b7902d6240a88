"""Writes a complete ISMRMRD 3D scan of a volume: what a scanner would have sent, with a known reference.

A magnitude is given object phase, a complex volume keeps its own. The object is weighted by each coil at its original
resolution, and then cropped in k-space to the requested voxel size: the reconstruction never sees the coil maps or the
grid from which the data were made.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from recon_core.fft import centre_crop_or_pad, fft, kspace_crop
from recon_core.scale import intensity_scale
from recon_core.simulate import coil_sensitivity, phantom, sampling_mask, smooth_phase
from recon_core.volumes import emptiness, read_affine, read_volume

from ..files import FileError, check_place, check_replaceable
from ..image_files import save_nifti
from ..scan_files import ScanWriter
from .protocol import SimulateOptions, make_header, samples_of, tilt
from .sequence import Noise, Sequence

DECAY_PER_CONTRAST = 0.4  # of the brightest tissue; darker tissue decays less


def simulate(
    volume: str | Path, scan: str | Path, options: SimulateOptions, reference: str | Path | None = None
) -> dict:
    """Write the scan of `volume` (NIfTI, .npy, or "phantom") to `scan`; returns facts about it.

    Args:
        reference: NIfTI file to write, with the noise-free, fully sampled root sum of squares of the first contrast.

    Raises:
        FileError: if the volume cannot be read, scan or reference cannot be written, or two of the files are the same.
        ValueError: for impossible options.
    """
    if reference is not None:
        _check_reference(Path(reference))
    _check_apart(volume=volume, scan=scan, reference=reference)
    check_replaceable(Path(scan))
    data, voxel_mm, directions, centre = load_object(volume)
    images, voxel_mm = coil_images(data, voxel_mm, options)
    truth = images.abs().square().sum(0).sqrt()
    nz, ny, nx = truth.shape
    acs = 0 if options.apart else options.acs
    mask = sampling_mask((nz, ny), options.acceleration, options.pattern, acs, options.seed)
    dropped = [n - max(1, round(n * f)) for n, f in zip((ny, nz), options.partial_fourier)]
    mask[: dropped[1]] = mask[:, : dropped[0]] = False
    if options.oblique:
        directions = tilt(directions)
    noise = Noise(len(images), intensity_scale(truth, voxel_mm) / options.snr, options.seed)
    geometry = dict(read_dir=directions[0], phase_dir=directions[1], slice_dir=directions[2], position=centre)
    sequence = Sequence(_Contrasts(images, truth, options), mask, dropped, noise, options, geometry)
    lines = int(mask.sum()) * options.repetitions * options.averages * options.contrasts
    with ScanWriter(scan, make_header((nx, ny, nz), voxel_mm, dropped, options)) as writer:
        for item in sequence.items():
            writer.append(item)
    if reference is not None:
        write_reference(truth, voxel_mm, directions, centre, reference)
    return {
        "matrix": [nx, ny, nz],
        "voxel_mm": [round(v, 4) for v in reversed(voxel_mm)],
        "coils": len(images),
        "lines": lines,
        "acceleration": round(mask.size / mask.sum(), 3),
    }


class _Contrasts:
    """contrast -> k-space [coils z y samples]; the latest is cached."""

    def __init__(self, images: torch.Tensor, truth: torch.Tensor, options: SimulateOptions):
        self.images, self.decay, self.options = images, DECAY_PER_CONTRAST * truth / truth.max(), options
        self.contrast, self.kspace = -1, None

    def __call__(self, contrast: int) -> np.ndarray:
        if contrast != self.contrast:
            nz, ny, nx = self.images.shape[1:]
            images = self.images * torch.exp(-contrast * self.decay) if contrast else self.images
            padded = centre_crop_or_pad(images, (nz, ny, samples_of(self.options, nx)))
            self.contrast, self.kspace = contrast, fft(padded, (1, 2, 3)).numpy()
        return self.kspace


def load_object(
    volume: str | Path,
) -> tuple[torch.Tensor, tuple[float, float, float], np.ndarray, tuple[float, float, float]]:
    """Volume [z y x], voxel_mm (z y x), directions of x, y, z (rows, LPS) and the LPS position of voxel n//2.

    The volume is complex64 if the file's is complex, otherwise its magnitude, float32.
    """
    if str(volume) == "phantom":
        return phantom(), (2.5, 2.5, 2.5), np.eye(3), (0.0, 0.0, 0.0)
    if not Path(volume).is_file():
        raise FileError(f"no such volume: {volume} (give a NIfTI or .npy file, or the word phantom)")
    try:
        data, voxel_mm = read_volume(volume)
    except Exception as error:  # nibabel and numpy raise many kinds of errors for damaged files
        raise FileError(f"{volume} cannot be read as a volume: {error}") from None
    if found := emptiness(data):
        raise FileError(f"the volume {Path(volume).name} holds {found}: no scan can be made of it")
    # In this order: the magnitude of int16's least number is none of its numbers.
    data = torch.from_numpy(data.astype(np.complex64) if np.iscomplexobj(data) else np.abs(data.astype(np.float32)))
    if str(volume).endswith(".npy"):
        return data, voxel_mm, np.eye(3), (0.0, 0.0, 0.0)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ read_affine(volume)
    directions = (lps[:3, :3] / np.linalg.norm(lps[:3, :3], axis=0)).T
    middle = [n // 2 for n in reversed(data.shape)]
    return data, voxel_mm, directions, tuple((lps @ [*middle, 1])[:3])


def coil_images(
    data: torch.Tensor, voxel_mm, options: SimulateOptions
) -> tuple[torch.Tensor, tuple[float, float, float]]:
    """Complex coil images [coils z y x] and their exact voxel size.

    They are cropped in k-space to the requested voxel size; real `data` are given a smooth phase.
    """
    shape = list(data.shape)
    if options.voxel_mm is not None:
        shape = [max(1, min(n, round(n * mm / options.voxel_mm))) for n, mm in zip(shape, voxel_mm)]
    exact = tuple(n * mm / m for n, mm, m in zip(data.shape, voxel_mm, shape))
    turned = data if data.is_complex() else data * torch.exp(1j * smooth_phase(tuple(data.shape), options.seed))
    images = torch.empty((options.coils, *shape), dtype=torch.complex64)
    for coil in range(options.coils):
        images[coil] = kspace_crop(turned * coil_sensitivity(coil, options.coils, tuple(data.shape)), shape)
    return images / images.abs().square().sum(0).sqrt().max(), exact


def _check_apart(**paths: str | Path | None) -> None:
    """FileError if two of the files are the same: what is written would replace the other."""
    given = {name: path for name, path in paths.items() if path is not None and str(path) != "phantom"}
    files = {name: Path(path).absolute().resolve() for name, path in given.items()}
    for one, other in itertools.combinations(files, 2):
        if files[one] == files[other]:
            raise FileError(f"{one} and {other} are the same file, {paths[one]}: each needs a file of its own")


def _check_reference(path: Path) -> None:
    """FileError, before any work is done, if no NIfTI can be written there."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise FileError(f"the reference is a NIfTI, whose name ends in .nii or .nii.gz: it cannot be written to {path}")
    check_place(path)


def write_reference(truth: torch.Tensor, voxel_mm, directions: np.ndarray, centre, path: str | Path) -> None:
    """Reference magnitude [z y x] as NIfTI, in the same position as the images of the scan."""
    matrix = np.eye(4)
    matrix[:3, :3] = directions.T * np.array(voxel_mm)[::-1]
    matrix[:3, 3] = np.array(centre) - matrix[:3, :3] @ [n // 2 for n in reversed(truth.shape)]
    save_nifti(truth.numpy(), np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix, path)
