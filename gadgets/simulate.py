"""Writes a complete ISMRMRD 3D scan of a volume: what a scanner would have sent, reference known.

The volume gets object phase, is seen by each coil at its own resolution, and is then cropped in k-space
to the voxel size asked for: the reconstruction never meets the maps or the grid the data were made with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ismrmrd
import numpy as np
import torch

from recon_core.fft import centre_crop_or_pad, fft, kspace_crop
from recon_core.scale import intensity_scale
from recon_core.simulate import coil_sensitivity, phantom, sampling_mask, smooth_phase
from recon_core.volumes import read_volume

from .files import FileError, ScanWriter

DWELL_US = 5.0
NOISE_SAMPLES = 256
TICKS_PER_LINE = 3  # 2.5 ms each


@dataclass(frozen=True)
class SimulateOptions:
    """What a simulated scan is like; snr is tissue brightness over the noise of a full scan's image."""

    voxel_mm: float | None = None
    coils: int = 8
    acceleration: float = 8.0
    pattern: str = "poisson"
    acs: int = 24
    snr: float = 30.0
    partial_fourier: tuple[float, float] = (1.0, 1.0)
    oversampling: float = 2.0
    noise_lines: int = 16
    oblique: bool = False
    repetitions: int = 1
    seed: int = 0

    def __post_init__(self):
        checks = (
            ("coils", self.coils >= 1), ("acceleration", self.acceleration >= 1), ("snr", self.snr > 0),
            ("partial_fourier", all(0.5 < f <= 1 for f in self.partial_fourier)), ("oversampling", self.oversampling >= 1),
            ("noise_lines", self.noise_lines >= 0), ("repetitions", self.repetitions >= 1), ("acs", self.acs >= 0),
            ("voxel_mm", self.voxel_mm is None or self.voxel_mm > 0),
        )  # fmt: skip
        for name, fine in checks:
            if not fine:
                raise ValueError(f"simulation option {name} cannot be {getattr(self, name)}")


def simulate(volume: str | Path, scan: str | Path, options: SimulateOptions, reference: str | Path | None = None) -> dict:
    """Write the scan of `volume` (NIfTI, .npy, or "phantom") to `scan`; returns facts about it.

    Args:
        reference: NIfTI to write the noise-free, fully sampled root sum of squares to.

    Raises:
        FileError: if the volume cannot be read.
        ValueError: for impossible options.
    """
    data, voxel_mm, directions, centre = load_object(volume)
    images, voxel_mm = coil_images(data, voxel_mm, options)
    truth = images.abs().square().sum(0).sqrt()
    brightness = intensity_scale(truth, voxel_mm)
    nz, ny, nx = truth.shape
    mask = sampling_mask((nz, ny), options.acceleration, options.pattern, options.acs, options.seed)
    dropped = [n - max(1, round(n * f)) for n, f in zip((ny, nz), options.partial_fourier)]
    mask[: dropped[1]] = mask[:, : dropped[0]] = False
    if options.oblique:
        directions = tilt(directions)
    geometry = dict(read_dir=directions[0], phase_dir=directions[1], slice_dir=directions[2], position=centre)
    xml = make_header((nx, ny, nz), voxel_mm, dropped, options)
    samples = int(2 * round(nx * options.oversampling / 2)) if options.oversampling > 1 else nx
    noise = Noise(len(images), brightness / options.snr, options.seed)
    kspace = fft(centre_crop_or_pad(images, (nz, ny, samples)), (1, 2, 3)).numpy()
    with ScanWriter(scan, xml) as writer:
        for line in noise_lines(noise, options, samples):
            writer.append(line)
        for line in imaging_lines(kspace, mask, dropped, noise, options, geometry):
            writer.append(line)
    if reference is not None:
        write_reference(truth, voxel_mm, directions, centre, reference)
    return {"matrix": [nx, ny, nz], "voxel_mm": [round(v, 4) for v in reversed(voxel_mm)], "coils": len(images), "lines": int(mask.sum()) * options.repetitions, "acceleration": round(mask.size / mask.sum(), 3)}


def load_object(volume: str | Path) -> tuple[torch.Tensor, tuple[float, float, float], np.ndarray, tuple[float, float, float]]:
    """Volume [z y x], voxel_mm (z y x), directions of x, y, z (rows, LPS) and the LPS place of voxel n//2."""
    if str(volume) == "phantom":
        return phantom(), (2.5, 2.5, 2.5), np.eye(3), (0.0, 0.0, 0.0)
    if not Path(volume).is_file():
        raise FileError(f"no such volume: {volume} (give a NIfTI or .npy file, or the word phantom)")
    try:
        data, voxel_mm = read_volume(volume)
    except Exception as error:  # nibabel and numpy raise many kinds for damaged files
        raise FileError(f"{volume} cannot be read as a volume: {error}") from None
    data = torch.from_numpy(np.abs(np.asarray(data)).astype(np.float32))
    if str(volume).endswith(".npy"):
        return data, voxel_mm, np.eye(3), (0.0, 0.0, 0.0)
    import nibabel

    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nibabel.load(volume).affine
    directions = (lps[:3, :3] / np.linalg.norm(lps[:3, :3], axis=0)).T
    middle = [n // 2 for n in reversed(data.shape)]
    return data, voxel_mm, directions, tuple((lps @ [*middle, 1])[:3])


def coil_images(data: torch.Tensor, voxel_mm, options: SimulateOptions) -> tuple[torch.Tensor, tuple[float, float, float]]:
    """What each coil sees [coils z y x] complex, cropped in k-space to the voxel size asked for, and that size."""
    shape = list(data.shape)
    if options.voxel_mm is not None:
        shape = [max(1, min(n, round(n * mm / options.voxel_mm))) for n, mm in zip(shape, voxel_mm)]
    exact = tuple(n * mm / m for n, mm, m in zip(data.shape, voxel_mm, shape))
    turned = data * torch.exp(1j * smooth_phase(tuple(data.shape), options.seed))
    images = torch.empty((options.coils, *shape), dtype=torch.complex64)
    for coil in range(options.coils):
        images[coil] = kspace_crop(turned * coil_sensitivity(coil, options.coils, tuple(data.shape)), shape)
    return images / images.abs().square().sum(0).sqrt().max(), exact


class Noise:
    """Receiver noise with unequal gains and correlated coils, image noise `sigma` per real part for a full scan."""

    def __init__(self, coils: int, sigma: float, seed: int):
        self.random = np.random.default_rng([seed, 20])
        mix = np.eye(coils) + 0.15 * (self.random.standard_normal((coils, coils)) + 1j * self.random.standard_normal((coils, coils))) / coils**0.5
        mix /= np.sqrt((np.abs(mix) ** 2).sum() / coils)
        self.mix = (sigma * mix).astype(np.complex64)

    def draw(self, samples: int) -> np.ndarray:
        """[coils samples] complex64."""
        shape = (len(self.mix), samples)
        return self.mix @ (self.random.standard_normal(shape) + 1j * self.random.standard_normal(shape)).astype(np.complex64)


def noise_lines(noise: Noise, options: SimulateOptions, samples: int) -> Iterator[ismrmrd.Acquisition]:
    """Noise acquisitions, as sent before the scan."""
    for number in range(options.noise_lines):
        line = ismrmrd.Acquisition.from_array(noise.draw(NOISE_SAMPLES), sample_time_us=DWELL_US, scan_counter=number + 1)
        line.setFlag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
        yield line


def imaging_lines(kspace: np.ndarray, mask: np.ndarray, dropped: list[int], noise: Noise, options: SimulateOptions, geometry: dict) -> Iterator[ismrmrd.Acquisition]:
    """Imaging acquisitions of all repetitions, partition by partition."""
    places = np.argwhere(mask)
    low = [n // 2 - min(options.acs, n) // 2 for n in mask.shape]
    count = options.noise_lines
    for repetition in range(options.repetitions):
        for number, (z, y) in enumerate(places):
            count += 1
            line = ismrmrd.Acquisition.from_array(kspace[:, z, y] + noise.draw(kspace.shape[-1]), sample_time_us=DWELL_US)
            line.scan_counter, line.center_sample = count, kspace.shape[-1] // 2
            line.acquisition_time_stamp = TICKS_PER_LINE * count
            line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2 = int(y) - dropped[0], int(z) - dropped[1]
            line.idx.repetition = repetition
            for name, value in geometry.items():
                setattr(line, name, tuple(float(v) for v in value))
            if options.pattern != "full" and all(a <= i < a + min(options.acs, n) for i, a, n in zip((z, y), low, mask.shape)):
                line.setFlag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
            if number == 0:
                line.setFlag(ismrmrd.ACQ_FIRST_IN_REPETITION)
            if number == len(places) - 1:
                line.setFlag(ismrmrd.ACQ_LAST_IN_REPETITION)
                if repetition == options.repetitions - 1:
                    line.setFlag(ismrmrd.ACQ_LAST_IN_MEASUREMENT)
            yield line


def make_header(matrix: tuple[int, int, int], voxel_mm: tuple[float, float, float], dropped: list[int], options: SimulateOptions) -> str:
    """ISMRMRD header XML; matrix is x, y, z, voxel_mm z, y, x, dropped the missing lines of E1, E2."""
    nx, ny, nz = matrix
    dz, dy, dx = voxel_mm
    samples = int(2 * round(nx * options.oversampling / 2)) if options.oversampling > 1 else nx
    x = ismrmrd.xsd
    space = lambda n, fov: x.encodingSpaceType(  # noqa: E731
        matrixSize=x.matrixSizeType(x=n[0], y=n[1], z=n[2]), fieldOfView_mm=x.fieldOfViewMm(x=fov[0], y=fov[1], z=fov[2])
    )
    limit = lambda n, miss: x.limitType(minimum=0, maximum=n - 1 - miss, center=n // 2 - miss)  # noqa: E731
    limits = x.encodingLimitsType(
        kspace_encoding_step_1=limit(ny, dropped[0]), kspace_encoding_step_2=limit(nz, dropped[1]),
        repetition=x.limitType(minimum=0, maximum=options.repetitions - 1, center=0),
    )  # fmt: skip
    factors = announced_factors(options, nz)
    encoding = x.encodingType(
        encodedSpace=space((samples, ny, nz), (samples * dx, ny * dy, nz * dz)),
        reconSpace=space((nx, ny, nz), (nx * dx, ny * dy, nz * dz)),
        encodingLimits=limits,
        trajectory=x.trajectoryType.CARTESIAN,
        parallelImaging=x.parallelImagingType(
            accelerationFactor=x.accelerationFactorType(kspace_encoding_step_1=factors[0], kspace_encoding_step_2=factors[1]),
            calibrationMode=x.calibrationModeType.EMBEDDED,
        ),
    )
    header = x.ismrmrdHeader(
        measurementInformation=x.measurementInformationType(measurementID="1_1_1_1", patientPosition=x.patientPositionType.HFS, protocolName="simulated_3D"),
        acquisitionSystemInformation=x.acquisitionSystemInformationType(systemVendor="simulated", systemFieldStrength_T=3.0, relativeReceiverNoiseBandwidth=1.0, receiverChannels=options.coils),
        experimentalConditions=x.experimentalConditionsType(H1resonanceFrequency_Hz=123_000_000),
        encoding=[encoding],
    )
    return header.toXML()


def announced_factors(options: SimulateOptions, partitions: int) -> tuple[int, int]:
    """Acceleration along E1, E2 for the header: the lattice of a regular scan; at random, no fewer lines come than this."""
    if options.pattern == "full" or options.acceleration <= 1:
        return (1, 1)
    second = max(1, int(options.acceleration**0.5)) if partitions > 1 else 1
    first = options.acceleration / second
    return (max(1, round(first) if options.pattern == "regular" else math.ceil(first)), second)


def tilt(directions: np.ndarray) -> np.ndarray:
    """Directions (rows) turned by 20 degrees about z and 12 about x: a doubly oblique slab."""
    a, b = np.deg2rad(20), np.deg2rad(12)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return directions @ (about_x @ about_z).T


def write_reference(truth: torch.Tensor, voxel_mm, directions: np.ndarray, centre, path: str | Path) -> None:
    """Reference magnitude [z y x] as NIfTI, in the same place as the images of the scan."""
    import nibabel

    matrix = np.eye(4)
    matrix[:3, :3] = directions.T * np.array(voxel_mm)[::-1]
    matrix[:3, 3] = np.array(centre) - matrix[:3, :3] @ [n // 2 for n in reversed(truth.shape)]
    nibabel.save(nibabel.Nifti1Image(truth.numpy().T, np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix), path)
