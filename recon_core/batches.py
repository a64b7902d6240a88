"""Batches for learning to denoise: clean slices, noise levels and noise, made ahead of the training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from .elsewhere import made_elsewhere
from .volumes import ROOM, SlicePool


class Batch(NamedTuple):
    """Slices and unit noise [slices 2 h w] on the network's device; voxel sizes, noise levels [slices] on the CPU."""

    clean: Tensor
    voxel_mm: Tensor
    sigma: Tensor
    noise: Tensor


class Batches:
    """One batch per step, fully determined by (seed, step).

    Args:
        pool: where slices are drawn from.
        slices: per batch.
        sigma_range: noise levels, in tissue brightness.
        seed: of the noise.
    """

    def __init__(self, pool: SlicePool, slices: int, sigma_range: tuple[float, float] = (0.008, 2.0), seed: int = 0):
        self.pool, self.slices, self.sigma_range, self.seed = pool, slices, sigma_range, seed

    def make(self, step: int) -> Batch:
        """The batch of one step; noise levels are log-normal, clipped to `sigma_range`."""
        clean, voxel_mm = self.pool.batch(step, self.slices)
        rng = np.random.default_rng([self.seed, 3, step])
        sigma = np.exp(rng.normal(math.log(0.1), 1.2, len(clean))).clip(*self.sigma_range)
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        return Batch(clean, voxel_mm, torch.from_numpy(sigma).float(), torch.from_numpy(noise))

    @contextmanager
    def ahead(
        self, steps: range, workers: int, device: torch.device | str = "cpu", elsewhere: bool | None = None
    ) -> Iterator[Iterator[Batch]]:
        """The batches of all steps, in order and on `device`, computed ahead of the consumer by `workers` threads.

        Args:
            elsewhere: whether those threads run in a separate process; by default only for a GPU. In the same process
                they hold up, through the GIL, a loop that launches a thousand kernels per step
                (tests/benchmarks/batch_speed.py).
        """
        device = torch.device(device)
        on_gpu = device.type == "cuda"
        if not workers or not (on_gpu if elsewhere is None else elsewhere):
            with self.pool.ahead(self.make, steps, workers) as batches:
                yield (_moved(batch, device) for batch in batches)
            return
        made = made_elsewhere(_Steps(self, steps, workers), workers=1, prefetch_factor=ROOM, pin_memory=on_gpu)
        try:
            yield (_moved(batch, device) for batch in made)
        finally:
            made.close()


class _Steps(IterableDataset):
    """The batches of `steps`, computed by threads."""

    def __init__(self, batches: Batches, steps: range, workers: int):
        self.batches, self.steps, self.workers = batches, steps, workers

    def __iter__(self) -> Iterator[Batch]:
        with self.batches.ahead(self.steps, self.workers) as made:
            yield from made


def _moved(batch: Batch, device: torch.device) -> Batch:
    clean, noise = (images.to(device, non_blocking=True) for images in (batch.clean, batch.noise))
    return batch._replace(clean=clean, noise=noise)
