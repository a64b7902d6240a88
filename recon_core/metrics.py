"""Image quality of the magnitude, relative to a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .scale import evenly


def object_mask(reference: Tensor, threshold: float = 0.1) -> Tensor:
    """Where the reference [z y x] is brighter than `threshold` times its 99th percentile."""
    magnitude = reference.abs().float()
    return magnitude > threshold * torch.quantile(evenly(magnitude, 1_000_000), 0.99)


def psnr(image: Tensor, reference: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of |image| after least-squares scaling to |reference|.

    20 log10(max |reference| / rms error), both over `mask` if given, else over the volume.
    """
    image, reference = image.abs().double(), reference.abs().double()
    if mask is not None:
        image, reference = image[mask], reference[mask]
    factor = (image * reference).sum() / (image * image).sum().clamp_min(1e-30)
    error = (factor * image - reference).square().mean().sqrt()
    return float(20 * torch.log10(reference.max() / error))
