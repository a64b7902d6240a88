"""Centred unitary Fourier transforms and k-space cropping; everything has its centre at index n//2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fft(image: Tensor, dims: Sequence[int]) -> Tensor:
    """Centred unitary FFT, image to k-space, over `dims`; any shape."""
    return torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(image, dims), dim=dims, norm="ortho"), dims)


def ifft(kspace: Tensor, dims: Sequence[int]) -> Tensor:
    """Centred unitary inverse FFT, k-space to image, over `dims`; any shape."""
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(kspace, dims), dim=dims, norm="ortho"), dims)


def centre_crop_or_pad(array: Tensor, shape: Sequence[int]) -> Tensor:
    """Crop or zero-pad the last len(shape) axes so that index n//2 stays the centre."""
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


def kspace_crop(volume: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample a volume [... z y x] to matrix `shape` by cropping or padding its k-space.

    Intensities are kept (a constant volume stays that constant). Works axis by axis, so that memory
    shrinks as it goes; a real volume gives the complex result of the same operation.
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
