"""Training on the solver's own states: in a reconstruction the prior's input is not an image in white noise.

Scans of training volumes are simulated and reconstructed with the current prior, and at every sweep it also learns to
map the slices that it is given to the true ones (as in imitation learning, arXiv 1011.0686: the states result from the
learner's own actions). The errors left by the measurement (aliasing, blur, mistakes of earlier sweeps) do not look like
noise, and depend on the prior itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .cg_sense import cg_sense
from .elsewhere import made_elsewhere
from .fft import fft
from .measure import measure
from .measurement import Measurement
from .pose import Pose
from .scale import intensity_scale
from .simulate import coil_sensitivity, loop_sensitivities, sampling_mask, smooth_phase
from .slices import MIN_SIDE, object_box
from .variational import VariationalConfig, denoise_in_pose, reconstruct_variational
from .volumes import SlicePool

DRAWS = 100  # volumes tried until one can be scanned
SMALLEST = 24  # fewest voxels along the second longest side of a scan
NOTHING_WRONG = 0.3  # of sigma: least error that a loss is divided by, so that nearly clean states gain no extra weight


class Lesson(NamedTuple):
    """What the solver gave to the prior, and the correct answer: slices [slices 2 h w], in tissue units."""

    given: Tensor
    truth: Tensor
    sigma: float
    pose: Pose


class Rehearsal:
    """Reconstructions of simulated scans, sweep by sweep; all randomness follows from (seed, scan number).

    Args:
        pool: whose volumes are scanned, with every voxel size and contrast that it draws.
        pixels: about how many pixels of each sweep to learn from.
        side: largest side of the slice patches to learn from.
        seed: of everything random.
    """

    config = VariationalConfig(held=0.0)  # also learning from states at a held level made a run worse
    voxels = (120_000, 200_000)  # per scan: a few seconds of work

    def __init__(self, pool: SlicePool, pixels: int, side: int = 64, seed: int = 0):
        self.pool, self.pixels, self.side, self.seed = pool, pixels, side, seed

    def lessons(
        self, prior: Callable, first: int = 0, device: torch.device | str = "cpu", workers: int = 0
    ) -> Iterator[Lesson]:
        """A lesson from every sweep of each scan from number `first` on, without end.

        Args:
            prior: the learner, on `device`; it may change between lessons.
            workers: processes that simulate scans ahead, coil maps included; 0 to do so on demand. Each uses one
                thread, which is all that can make the scans differ.
        """
        for number, (measurement, truth) in enumerate(self._scans(first, workers), start=first):
            rng = np.random.default_rng([self.seed, 6, number])
            measurement, truth = measurement.to(device), truth.to(device)
            start = cg_sense(measurement)
            truth, box = truth / intensity_scale(start, measurement.voxel_mm), object_box(measurement.operator.support)
            solver = of_few_shapes(prior) if measurement.operator.device.type == "cuda" else prior
            states: list = []
            seed, denoise = int(rng.integers(1 << 31)), partial(_noted, states, truth[box])
            for _ in reconstruct_variational(measurement, solver, start, self.config, seed, denoise):
                both, sigma, pose = states.pop()
                given, right = _parts(both, self.side, self.pixels, rng)
                yield Lesson(_channels(given), _channels(right), sigma, pose)

    def _scans(self, first: int, workers: int) -> Iterator[tuple[Measurement, Tensor]]:
        numbers = itertools.count(first)
        if not workers:
            return map(self.scan, numbers)
        return made_elsewhere(_Scans(self), workers, sampler=numbers, prefetch_factor=2)

    def scan(self, number: int) -> tuple[Measurement, Tensor]:
        """A scan and the true volume [z y x] as combined with its coil maps.

        Redrawn if too narrow, mostly air or without room for lines.

        Raises:
            ValueError: if no volume that can be scanned is found.
        """
        rng = np.random.default_rng([self.seed, 4, number])
        for draw in range(DRAWS):
            volume, voxel_mm = self.pool.draw_volume(number * DRAWS + draw, stream=5)
            tile = _tile(volume.permute(*rng.permutation(3).tolist()), self.voxels, rng)
            mask = None if tile is None else _mask(tile.shape[:2], rng)
            if mask is not None:
                return _measured(tile, voxel_mm, mask, rng)
        raise ValueError(
            f"no scan could be made of {DRAWS} draws from the training volumes: "
            f"own_states needs objects of {SMALLEST} voxels and more, along two sides at least"
        )


class _Scans(Dataset):
    """Scans by number, for worker processes."""

    def __init__(self, rehearsal: Rehearsal):
        self.rehearsal = rehearsal

    def __getitem__(self, number: int) -> tuple[Measurement, Tensor]:
        return self.rehearsal.scan(number)


def _noted(
    states: list, truth: Tensor, volume: Tensor, prior: Callable, sigma: float, axis: int, chosen: Tensor, pose: Pose
) -> int:
    """denoise_in_pose, but first append (slices, sigma, pose) to `states`.

    The slices [2 slices h w] are the prior's input and the truth.
    """
    states.append((torch.stack([v.movedim(axis, 0) for v in (volume, truth)]), sigma, pose))
    return denoise_in_pose(volume, prior, sigma, axis, chosen, pose)


def lesson_loss(prior: Callable[[Tensor, Tensor], Tensor], lesson: Lesson) -> Tensor:
    """Mean squared error of each slice [slices] after the prior, relative to the mean over all slices before it."""
    error = (lesson.pose.seen_by(prior)(lesson.given, lesson.sigma) - lesson.truth).square().mean(dim=(1, 2, 3))
    return error / (lesson.given - lesson.truth).square().mean().clamp_min((NOTHING_WRONG * lesson.sigma) ** 2)


def of_few_shapes(prior: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """`prior` with the sides and number of slices padded to multiples of 32.

    cuDNN plans every new shape, which takes longer than denoising.
    """

    def denoise(slices: Tensor, sigma: float) -> Tensor:
        count, _, height, width = slices.shape
        padded = F.pad(slices, (0, -width % 32, 0, -height % 32), mode="replicate")
        padded = torch.cat([padded, padded[:1].expand(-count % 32, -1, -1, -1)])
        padded = padded.contiguous(memory_format=torch.channels_last)
        return prior(padded, sigma)[:count, :, :height, :width]

    return denoise


def _parts(slices: Tensor, side: int, pixels: int, rng: np.random.Generator) -> Tensor:
    """Random patches [... parts h w] of `slices` [... slices h w], about `pixels` pixels in total.

    To keep shapes few, h and w are multiples of 8, or the whole side below 8.
    """
    count, *sides = slices.shape[-3:]
    height, width = (min(side, n - n % 8 or n) for n in sides)
    parts = max(1, pixels // (height * width))
    number = rng.permutation(count)[:parts] if parts <= count else rng.integers(count, size=parts)
    top, left = (rng.integers(n - part + 1, size=parts) for n, part in zip(sides, (height, width)))
    rows, columns = top[:, None, None] + np.arange(height)[:, None], left[:, None, None] + np.arange(width)
    where = (number[:, None, None], rows, columns)
    return slices[(..., *(torch.from_numpy(w).to(slices.device) for w in where))]


def _channels(planes: Tensor) -> Tensor:
    return torch.view_as_real(planes.contiguous()).permute(0, 3, 1, 2)


def _tile(volume: Tensor, voxels: tuple[int, int], rng: np.random.Generator) -> Tensor | None:
    """Part of a volume to scan, with phase; None if too narrow or mostly air.

    It is a block, a few planes across the readout, or a few slices.
    """
    kind = rng.choice(["volume", "planes", "slices"], p=[0.55, 0.28, 0.17])
    z, y = (min(n, int(rng.integers(64, 110))) for n in volume.shape[:2])
    x = int(rng.uniform(*voxels) / (z * y))
    x = max(20, x) if kind == "volume" else min(MIN_SIDE - 1, x)
    if kind == "slices":
        z, y, x = int(rng.integers(2, MIN_SIDE)), 128, 128
    shape = [min(n, m) for n, m in zip(volume.shape, (z, y, x))]
    starts = [int(rng.integers(n - m + 1)) for n, m in zip(volume.shape, shape)]
    tile = volume[tuple(slice(s, s + m) for s, m in zip(starts, shape))]
    if sorted(shape)[1] < SMALLEST or float((tile.abs() > 0.1).float().mean()) < 0.15:
        return None
    tile = tile.flip([axis for axis in range(3) if rng.random() < 0.5])
    phase = rng.uniform(0, 1.2) * smooth_phase((48, 48, 48), int(rng.integers(1 << 20)))
    phase = F.interpolate(phase[None, None], tuple(shape), mode="trilinear")[0, 0]
    return tile * torch.polar(torch.ones_like(phase), phase)


def _mask(shape: tuple[int, int], rng: np.random.Generator) -> Tensor | None:
    """Sampled lines [z y] at an acceleration of 1.5 to 12; with few slices only y is undersampled.

    None if the calibration lines leave no room.
    """
    if shape[0] < MIN_SIDE:
        lines, acs = np.arange(shape[1]), 16
        share = max(0.0, shape[1] / float(rng.choice([1.5, 2, 3, 4])) - acs) / shape[1]
        taken = (rng.random(shape[1]) < share) | (abs(lines - shape[1] // 2 + 0.5) < acs / 2)
        return torch.from_numpy(taken)[None].repeat(shape[0], 1)
    pattern, acs = str(rng.choice(["poisson", "regular"], p=[0.75, 0.25])), int(rng.choice([10, 12, 16, 20, 24]))
    acceleration, seed = float(rng.choice([2, 3, 4, 6, 8, 10, 12])), int(rng.integers(1 << 20))
    try:
        return torch.from_numpy(sampling_mask(shape, acceleration, pattern, acs, seed))
    except ValueError:
        return None


def _coils(coils: int, shape: tuple[int, int, int], rng: np.random.Generator) -> Tensor:
    """Receive fields [coils z y x]: half the time of loops anywhere around the object, otherwise of loops on rings."""
    if coils > 1 and rng.random() < 0.5:
        return loop_sensitivities(coils, shape, rng)
    sides = [axis for axis in (1, 2) if rng.random() < 0.5]
    return torch.stack([coil_sensitivity(c, coils, shape) for c in range(coils)]).flip(sides)


def _measured(volume: Tensor, voxel_mm: float, mask: Tensor, rng: np.random.Generator) -> tuple[Measurement, Tensor]:
    """Scan of a volume [z y x], and the volume as the coil maps combine it.

    It has 1 to 12 coils and an SNR of 8 to 60, with or without noise lines.
    """
    coils, snr = int(rng.choice([1, 2, 4, 6, 8, 12])), math.exp(rng.uniform(math.log(8), math.log(60)))
    random = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    images = volume * _coils(coils, tuple(volume.shape), rng)
    level = intensity_scale(images.abs().square().sum(0).sqrt(), (voxel_mm,) * 3) / snr

    def noise(*shape: int) -> Tensor:
        return level * torch.view_as_complex(torch.randn((coils, *shape, 2), generator=random))

    kspace = (fft(images, (1, 2)) + noise(*volume.shape)) * mask[..., None]
    measurement = measure(kspace, mask.float(), (voxel_mm,) * 3, noise(4096) if rng.random() < 0.65 else None)
    mixed = torch.einsum("vc,czyx->vzyx", measurement.mixing, images)
    return measurement, torch.linalg.vecdot(measurement.operator.coil_maps(), mixed, dim=0)
