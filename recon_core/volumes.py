"""Training slices from volumes: every voxel size, every orientation, realistic phase.

A volume is resampled by cropping its k-space in all three directions, so that through-plane blur is
right too, and then slices are cut from it. Resampled volumes are kept in a small pool, one of which is
replaced every few batches: resampling takes a second, cutting slices a few milliseconds. With a GPU both
take longer than the network, so threads can do them ahead of the training loop (SlicePool.ahead).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .ahead import Ahead
from .fft import centre_crop_or_pad, fft, ifft, kspace_crop
from .scale import intensity_scale
from .simulate import random_phantom

MAX_VOXELS = 12_000_000
VOXEL_MM = (0.02, 50.0)  # a file with smaller or larger voxels has its unit wrong
UNIT_MM = {1: 1000.0, 3: 0.001}  # NIfTI's codes for metre and micron; everything else is taken as mm
ROOM = 8  # batches that may wait for the training loop


@dataclass(frozen=True)
class Volume:
    """A training volume: magnitude or complex data [z y x] in its stored type, voxel_mm along z, y, x."""

    name: str
    data: np.ndarray
    voxel_mm: tuple[float, float, float]


def load_volume(path: str | Path) -> Volume:
    """A NIfTI or .npy file to train on; see read_volume."""
    return Volume(Path(path).name, *read_volume(path))


def read_volume(path: str | Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Read a NIfTI or .npy volume as ([z y x] in its stored type, voxel_mm along z y x).

    A .npy volume has no voxel size: 1 mm is assumed. Axes of length 1 after the third of a NIfTI are dropped.

    Raises:
        ValueError: if the volume does not have three dimensions, or its voxels a size that cannot be.
    """
    if str(path).endswith(".npy"):
        data = np.load(path)
        if data.ndim != 3:
            raise ValueError(_not_one_volume(data.shape))
        return data, (1.0, 1.0, 1.0)
    image = nibabel.load(path)
    shape = image.shape
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise ValueError(_not_one_volume(shape))
    mm = [_unit_mm(image) * float(v) for v in image.header.get_zooms()[:3]]
    if not all(VOXEL_MM[0] <= v <= VOXEL_MM[1] for v in mm):
        size = " x ".join(f"{v:g}" for v in mm)
        raise ValueError(
            f"its voxels have {size} mm, expected {VOXEL_MM[0]:g} to {VOXEL_MM[1]:g} mm: "
            "correct pixdim or xyzt_units in its header"
        )
    return np.asarray(image.dataobj).reshape(shape[:3]).T, (mm[2], mm[1], mm[0])


def emptiness(data: np.ndarray) -> str | None:
    """Why there is nothing to see in a volume: what it holds instead of an object; None if it holds one."""
    if data.dtype.names:
        return f"voxels of {', '.join(data.dtype.names)} instead of one number each"
    if data.dtype.kind not in "biufc":
        return f"{data.dtype.name} instead of numbers"
    if not np.isfinite(data).all():
        return "NaN or infinity"
    return None if data.any() else "nothing but zeros"


def read_affine(path: str | Path) -> np.ndarray:
    """4 x 4 map from voxel (x, y, z) of a NIfTI to RAS millimetres."""
    image = nibabel.load(path)
    return np.diag([*[_unit_mm(image)] * 3, 1.0]) @ image.affine


def _unit_mm(image) -> float:
    """The unit of length of a NIfTI, in mm."""
    if not isinstance(image.header, nibabel.Nifti1Header):
        return 1.0
    return UNIT_MM.get(int(image.header["xyzt_units"]) % 8, 1.0)


def _not_one_volume(shape: tuple[int, ...]) -> str:
    advice = ": choose one volume and store it in a file of its own" if len(shape) > 3 else ""
    return f"it has the shape {tuple(shape)}, expected three dimensions{advice}"


def to_voxel_mm(volume: Tensor, voxel_mm: Sequence[float], target_mm: Sequence[float], taper: float = 0.0):
    """Resample a volume [z y x] to about `target_mm` by k-space cropping; a real volume stays real.

    Args:
        volume: real or complex, [z y x].
        voxel_mm, target_mm: voxel sizes along z, y, x; voxels are never made finer.
        taper: fraction of k-space over which a cosine edge falls to zero (mild apodisation).

    Returns:
        (volume, its exact voxel_mm).
    """
    out, sizes = volume, []
    for axis, (mm, target) in enumerate(zip(voxel_mm, target_mm)):
        n = out.shape[axis]
        size = max(min(8, n), min(n, round(n * mm / target)))
        sizes.append(mm * n / size)
        spectrum = centre_crop_or_pad(fft(out, (axis,)).movedim(axis, -1), (size,))
        if taper:
            spectrum = spectrum * _taper(size, taper)
        out = ifft(spectrum, (-1,)).movedim(-1, axis) * (size / n) ** 0.5
        out = _like(volume, out)
    return out, tuple(sizes)


def _like(original: Tensor, computed: Tensor) -> Tensor:
    """`computed`, real if `original` was."""
    return (computed if original.is_complex() else computed.real).contiguous()


def _taper(size: int, fraction: float) -> Tensor:
    k = (torch.arange(size) - size // 2).abs() / (size / 2)
    return torch.cos(math.pi / 2 * ((k - 1 + fraction) / fraction).clamp(0, 1))


class SlicePool:
    """Random complex training slices, fully determined by (seed, step), so that a resumed run draws the same ones.

    Args:
        volumes: to draw from.
        voxel_mm: (finest, coarsest) voxel size to draw; no volume is made finer than its own voxels.
        crop: side of the square training crops.
        size: resampled volumes held at once.
        refresh: steps between replacements.
        seed: of everything random.
        vary_sharpness: taper or interpolate some volumes, as protocols do.
        vary_contrast: redraw the intensity curve of most volumes.
        phantoms: share of volumes that are phantoms, a new one each time.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        voxel_mm=(0.5, 4.0),
        crop=64,
        size=24,
        refresh=12,
        seed=0,
        vary_sharpness=True,
        vary_contrast=True,
        phantoms=0.0,
    ):
        if not volumes:
            raise ValueError("expected at least one training volume, got none")
        self.volumes = list(volumes)
        self.voxel_mm, self.crop, self.size, self.refresh, self.seed = voxel_mm, crop, size, refresh, seed
        self.vary_sharpness, self.vary_contrast, self.phantoms = vary_sharpness, vary_contrast, phantoms
        self.pool: dict[int, tuple[Tensor, float]] = {}
        self.scales: dict[int, float] = {}
        self.next_volume: Callable[[int], tuple[Tensor, float]] | None = None  # set while threads draw volumes ahead

    def batch(self, step: int, slices: int) -> tuple[Tensor, Tensor]:
        """Clean float32 slices [slices 2 crop crop] for this step, and the voxel size of each in mm.

        That size is the one of its volume's finest axis.
        """
        rng = np.random.default_rng([self.seed, 1, step])
        newest = step // self.refresh + self.size - 1
        for index in range(newest - self.size + 1, newest + 1):
            if index not in self.pool:
                self.pool[index] = (self.next_volume or self.draw_volume)(index)
        self.pool = {i: v for i, v in self.pool.items() if i > newest - self.size}
        keys = sorted(self.pool)
        crops, sizes = [], []
        for _ in range(slices):
            volume, voxel_mm = self.pool[keys[rng.integers(len(keys))]]
            crops.append(_draw_crop(volume, self.crop, rng))
            sizes.append(voxel_mm)
        return _add_phase_and_shading(torch.stack([c.to(torch.complex64) for c in crops]), rng), torch.tensor(sizes)

    @contextmanager
    def ahead(self, make: Callable[[int], Any], steps: range, workers: int) -> Iterator[Iterator]:
        """make(step) for all steps in order, computed ahead of the consumer.

        The results are bit-identical to those without threads. `make` takes its batch from this pool. It runs in one
        thread, up to ROOM steps ahead; `workers` other threads take turns drawing the volumes it will need, each up to
        two ahead. An exception in any of them is raised in place of the step that needed its result. All threads have
        ended when the context exits.

        Args:
            workers: threads that draw volumes; with 0 everything is computed on demand.
        """
        if not workers or not steps:
            yield map(make, steps)
            return
        first, end = steps.start // self.refresh, (steps.stop - 1) // self.refresh + self.size
        drawn = [Ahead(map(self.draw_volume, range(first + n, end, workers))) for n in range(workers)]
        self.pool, self.next_volume = {}, lambda index: next(drawn[(index - first) % workers])  # requested in order
        made = Ahead(map(make, steps), ROOM)
        try:
            yield made
        finally:
            for thread in (made, *drawn):
                thread.closed.set()
            # the batch thread may be waiting for a volume; closing that source releases it
            for thread in (*drawn, made):
                thread.close()
            self.pool, self.next_volume = {}, None

    def draw_volume(self, index: int, stream: int = 2) -> tuple[Tensor, float]:
        """Volume [z y x] number `index` of a random stream, and its finest voxel size in mm."""
        rng = np.random.default_rng([self.seed, stream, index])
        if rng.random() < self.phantoms:
            volume, voxel_mm = self._phantom(rng)
        else:
            volume, voxel_mm = self._source(int(rng.integers(len(self.volumes))))
        if self.vary_contrast:
            volume = _vary_contrast(volume, rng)
        low, high = self.voxel_mm
        finest = max(low, min(voxel_mm))
        target = [rng.uniform(finest, max(finest, high))] * 3  # a volume coarser than this range keeps its voxel size
        if rng.random() < 0.4:  # as in slab protocols: some axes coarser than the finest
            target = [max(finest, min(high, t * rng.uniform(1, 2.5))) for t in target]
        taper = rng.uniform(0.05, 0.9) if self.vary_sharpness and rng.random() < 0.4 else 0.0
        volume, voxel_mm = to_voxel_mm(volume, voxel_mm, target, taper)
        volume = volume / intensity_scale(volume, voxel_mm)
        if not volume.is_complex() and rng.random() < 0.5:
            volume = _add_susceptibility_phase(volume, voxel_mm, rng)
        return (_zero_fill(volume, rng) if self.vary_sharpness and rng.random() < 0.3 else volume), min(voxel_mm)

    def _source(self, number: int) -> tuple[Tensor, tuple[float, float, float]]:
        source = self.volumes[number]
        volume = torch.from_numpy(source.data.astype(np.complex64 if np.iscomplexobj(source.data) else np.float32))
        if number not in self.scales:  # a costly part of a draw
            self.scales[number] = intensity_scale(volume, source.voxel_mm)
        return volume / self.scales[number], source.voxel_mm

    def _phantom(self, rng) -> tuple[Tensor, tuple[float, float, float]]:
        voxel_mm = (max(self.voxel_mm[0], float(rng.uniform(0.9, 1.6))),) * 3
        volume = random_phantom(rng)
        return volume / intensity_scale(volume, voxel_mm), voxel_mm


def _zero_fill(volume: Tensor, rng) -> Tensor:
    """Interpolate along random axes by zero-filling k-space, as protocols do: small pixels may not mean fine detail."""
    sizes = [round(n * rng.uniform(1, 1.7)) if rng.random() < 0.6 else n for n in volume.shape]
    return _like(volume, kspace_crop(volume, sizes)) if math.prod(sizes) <= MAX_VOXELS else volume


def _add_susceptibility_phase(volume: Tensor, voxel_mm: Sequence[float], rng) -> Tensor:
    """Add the phase of gradient echoes from the field distortion at air-tissue interfaces.

    Magnitude [z y x] to complex. Echo times of 0.3 to 10 ms at 3 T: 9.4 ppm of 128 MHz is 7.6 rad per ms.
    """
    tilt = rng.uniform(-0.4, 0.4, 3) + (1, 0, 0)
    field = dipole_field((volume > 0.1).float(), voxel_mm, tilt)
    return torch.polar(volume, 7.6 * math.exp(rng.uniform(math.log(0.3), math.log(10.0))) * field)


def dipole_field(susceptibility: Tensor, voxel_mm: Sequence[float], direction: Sequence[float]) -> Tensor:
    """Relative change of B0 [z y x] caused by a susceptibility map [z y x], without its mean.

    chi * (1/3 - (k.b)^2 / k^2): Salomir et al., Concepts Magn. Reson. B 2003. `direction` is that of B0 along z, y, x;
    the map is treated as periodic.
    """
    k = torch.meshgrid(*(torch.fft.fftfreq(n, mm) for n, mm in zip(susceptibility.shape, voxel_mm)), indexing="ij")
    b = torch.as_tensor(np.asarray(direction) / np.linalg.norm(direction), dtype=torch.float32)
    squared = sum(c.square() for c in k)
    squared[0, 0, 0] = 1.0
    kernel = 1 / 3 - sum(c * d for c, d in zip(k, b)).square() / squared
    kernel[0, 0, 0] = 0.0
    return torch.fft.ifftn(torch.fft.fftn(susceptibility) * kernel).real


def _vary_contrast(volume: Tensor, rng) -> Tensor:
    """Contrasts that the corpus lacks.

    Half the volumes get a new intensity curve, a quarter of all a power law: fat may be many times brighter than brain.
    """
    volume = _remap_contrast(volume, rng) if rng.random() < 0.5 else volume
    return _to_power(volume, math.exp(rng.uniform(math.log(0.7), math.log(2.5)))) if rng.random() < 0.25 else volume


def _to_power(volume: Tensor, power: float) -> Tensor:
    magnitude = volume.abs()
    return volume * magnitude.clamp_min(1e-3 if power < 1 else 0).pow(power - 1)


def _remap_contrast(volume: Tensor, rng) -> Tensor:
    """Smooth random intensity curve through zero."""
    knots = torch.tensor([0.0, *rng.uniform(0.1, 1.6, 5)], dtype=torch.float32)
    knots[1:] = knots[1:] * 0.7 + torch.tensor([0.3, 0.6, 0.9, 1.2, 1.5]) * 0.3
    magnitude = volume.abs()
    position = (magnitude / 0.4).clamp(0, 4.999)
    low = position.floor().long()
    t = position - low
    t = t * t * (3 - 2 * t)
    remapped = torch.lerp(knots[low], knots[low + 1], t)
    return remapped * torch.sgn(volume) if volume.is_complex() else remapped


def _draw_crop(volume: Tensor, crop: int, rng) -> Tensor:
    """Random square crop [crop crop] of a random slice; crops of mostly air are rarely accepted."""
    for _ in range(8):
        axis = rng.integers(3)
        plane = volume.select(axis, int(rng.integers(volume.shape[axis])))
        top, left = (int(rng.integers(max(1, n - crop + 1))) for n in plane.shape)
        tile = plane[top : top + crop, left : left + crop]
        if float((tile.abs() > 0.1).float().mean()) > 0.1 or rng.random() < 0.03:
            break
    pad = [(crop - n) for n in tile.shape]
    before = [int(rng.integers(p + 1)) for p in pad]
    tile = F.pad(tile, (before[1], pad[1] - before[1], before[0], pad[0] - before[0]))
    if rng.random() < 0.5:
        tile = tile.T
    flips = [d for d in (0, 1) if rng.random() < 0.5]
    return tile.flip(flips) if flips else tile


def _add_phase_and_shading(crops: Tensor, rng) -> Tensor:
    """Add smooth random phase at several scales and mild receive shading: [n h w] to [n 2 h w]."""
    n, size = crops.shape[0], crops.shape[-1]
    grid = torch.linspace(-1, 1, size)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    def smooth(cells: int) -> Tensor:
        coarse = normal(n, 1, cells + 1, cells + 1)
        return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[:, 0]

    phase = normal(n, 1, 1) * 3 + normal(n, 1, 1) * grid[:, None] + normal(n, 1, 1) * grid
    for cells, amount in ((3, 1.0), (6, 0.4), (12, 0.15)):
        amplitude = torch.from_numpy(rng.uniform(0, amount, (n, 1, 1))).float()
        phase = phase + amplitude * smooth(cells)
    shading = torch.exp(0.15 * smooth(3) + 0.15 * normal(n, 1, 1))
    turned = crops * shading * torch.polar(torch.ones_like(phase), phase)
    return torch.view_as_real(turned).permute(0, 3, 1, 2).contiguous()
