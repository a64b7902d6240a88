"""Centred unitary Fourier transforms and k-space cropping; every centre is at index n//2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SAME = 0.02  # voxels; a field of view that differs by less is the same


def fft(image: Tensor, dims: Sequence[int]) -> Tensor:
    """Centred unitary FFT, image to k-space, over `dims`; any shape."""
    return torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(image, dims), dim=dims, norm="ortho"), dims)


def ifft(kspace: Tensor, dims: Sequence[int]) -> Tensor:
    """Centred unitary inverse FFT, k-space to image, over `dims`; any shape."""
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(kspace, dims), dim=dims, norm="ortho"), dims)


def centre_crop_or_pad(array: Tensor, shape: Sequence[int]) -> Tensor:
    """Crop or zero-pad the last len(shape) axes so that the centre stays at index n//2."""
    lead = array.ndim - len(shape)
    out = array
    for axis, size in enumerate(shape, start=lead):
        n = out.shape[axis]
        if size < n:
            out = out.narrow(axis, n // 2 - size // 2, size)
        elif size > n:
            padded = out.new_zeros(*out.shape[:axis], size, *out.shape[axis + 1 :])
            padded.narrow(axis, size // 2 - n // 2, n).copy_(out)
            out = padded
    return out


def centre_block(shape: Sequence[int], sides: Sequence[int]) -> Tensor:
    """Boolean mask of `shape`, true in the block of `sides` (cropped to fit) about index n//2."""
    return centre_crop_or_pad(torch.ones(tuple(sides), dtype=torch.bool), shape)


def hann(length: int, device: str | torch.device = "cpu") -> Tensor:
    """Hann window [length] with its peak at index n//2; without zeros."""
    odd = length + 1 - length % 2  # an even number of lines has its centre half a line before n//2
    return torch.hann_window(odd + 2, periodic=False, device=device)[1 : length + 1]


def kspace_crop(volume: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample a volume [... z y x] to matrix `shape` by cropping or padding its k-space.

    Intensities are kept (a constant volume stays that constant). Works axis by axis, so that memory
    use shrinks along the way; a real volume gives the complex result of the same operation.
    """
    out = volume
    for axis, size in enumerate(shape, start=volume.ndim - len(shape)):
        n = out.shape[axis]
        if size == n:
            continue
        spectrum = fft(out, (axis,)).movedim(axis, -1)
        spectrum = centre_crop_or_pad(spectrum, (size,)).movedim(-1, axis)
        out = ifft(spectrum, (axis,)) * (size / n) ** 0.5
    return out


def resample(volume: Tensor, shape: Sequence[int], extent: Sequence[float], cut_out: Sequence[int] = ()) -> Tensor:
    """Resample a volume [z y x] to matrix `shape` over `extent` times its field of view, about index n//2.

    Intensities are kept. An axis keeps its voxels (and is cropped or zero-padded), or its field of view (and is
    resampled by FFT), or is resampled by its Fourier sum at the new positions. Cropping first and then resampling would
    wrap what crosses the edge of the new field of view, with ripples along it; rounding would shift voxels. The axes
    `cut_out` of a larger field of view already are continued by their mirror image, as they do not wrap around.
    """
    out = volume
    axes = [*zip(range(len(shape)), shape, extent)]
    for axis, size, part in reversed(axes):  # the readout first, whose mirror image takes memory
        final, voxels = [*out.shape], out.shape[axis] * part
        final[axis] = size
        if abs(voxels - size) <= SAME:
            out = centre_crop_or_pad(out, final)
        elif axis in cut_out:
            out = _fourier_sum(_mirrored(out, axis), axis, size, part / 2)
        elif abs(voxels - out.shape[axis]) <= SAME:
            out = kspace_crop(out, final)
        else:
            out = _fourier_sum(out, axis, size, part)
    return out


def _mirrored(volume: Tensor, axis: int) -> Tensor:
    """A volume followed by its mirror image along one axis, its index n//2 in the middle."""
    n = volume.shape[axis]
    return torch.cat([volume, volume.flip(axis)], axis).roll(n - n // 2, axis)


def _fourier_sum(volume: Tensor, axis: int, size: int, part: float) -> Tensor:
    """One axis at `size` positions over `part` of its field of view.

    Detail finer than the new voxels is removed, and all beyond the old field of view is zero.
    """
    n = volume.shape[axis]
    place = (torch.arange(size, dtype=torch.float64) - size // 2) * part / size
    k = torch.arange(n, dtype=torch.float64) - n // 2
    waves = torch.polar(torch.full((size, n), n**-0.5, dtype=torch.float64), 2 * torch.pi * place[:, None] * k)
    waves = waves * (k.abs() <= size / (2 * part)) * (place.abs() <= 0.5)[:, None]
    spectrum = fft(volume, (axis,)).movedim(axis, 0)
    return torch.tensordot(waves.to(spectrum.device, spectrum.dtype), spectrum, dims=1).movedim(0, axis)
