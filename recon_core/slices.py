"""Applies the prior to the slices of a volume: which orientations are usable, and denoising in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .device_failure import ran_out_of_memory

Denoiser = Callable[[Tensor, float], Tensor]
MIN_SIDE = 16  # slices with a shorter side show the network hardly any anatomy
PIXELS_PER_BATCH = {"cpu": 1 << 16, "cuda": 1 << 22}


def usable_axes(shape: tuple[int, int, int]) -> list[int]:
    """Axes across which slices are worth denoising: both in-plane sides at least MIN_SIDE, or else the best axis."""
    sides = [min(n for i, n in enumerate(shape) if i != axis) for axis in range(3)]
    return [a for a in range(3) if sides[a] >= MIN_SIDE] or [max(range(3), key=lambda a: sides[a])]


def object_box(inside: Tensor) -> tuple[slice, slice, slice]:
    """Bounding box (z, y, x) of where `inside` [z y x] is true; the whole volume if it is true nowhere."""
    box = []
    for axis in range(3):
        line = inside.any(dim=tuple(a for a in range(3) if a != axis)).nonzero()[:, 0]
        box.append(slice(int(line[0]), int(line[-1]) + 1) if len(line) else slice(0, inside.shape[axis]))
    return tuple(box)


def denoise_slices(
    volume: Tensor, prior: Denoiser, sigma: float, axis: int, chosen: Sequence[int] | Tensor | None = None
) -> int:
    """Denoise the `chosen` slices (all by default) of `volume` [z y x] across `axis` in place; returns how many.

    A batch that does not fit in GPU memory is halved, down to one slice.
    """
    planes = volume.movedim(axis, 0)
    chosen = torch.arange(len(planes)) if chosen is None else torch.as_tensor(chosen)
    chosen = chosen.to(volume.device)
    batch, done = max(1, PIXELS_PER_BATCH.get(volume.device.type, 1 << 16) // planes[0].numel()), 0
    while done < len(chosen):
        part = chosen[done : done + batch]
        try:
            planes[part] = denoise_planes(planes[part], prior, sigma)
            done += len(part)
        except RuntimeError as error:
            if len(part) == 1 or not ran_out_of_memory(error):
                raise
            batch = len(part) // 2
    return len(chosen)


def denoise_planes(planes: Tensor, prior: Denoiser, sigma: float | Tensor) -> Tensor:
    """`prior` applied to complex `planes` [slices h w]; sigma is a number or [slices]."""
    with torch.no_grad():
        return apply_prior(planes, prior, sigma)


def apply_prior(planes: Tensor, prior: Denoiser, sigma: float | Tensor) -> Tensor:
    """Like denoise_planes, but differentiable in the prior's weights where gradients are enabled."""
    slices = torch.view_as_real(planes).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return torch.view_as_complex(prior(slices, sigma).float().permute(0, 2, 3, 1).contiguous())


def some_slices(count: int, fraction: float, random: torch.Generator) -> Tensor:
    """Sorted random choice of ceil(fraction * count) of `count` slices."""
    return torch.randperm(count, generator=random)[: max(1, math.ceil(fraction * count))].sort().values


def complex_noise(like: Tensor, random: torch.Generator) -> Tensor:
    """Standard normal real and imaginary parts, in the shape of `like`; the same on every device."""
    parts = torch.randn((*like.shape, 2), generator=random)
    return torch.view_as_complex(parts).to(like.device)
