"""Image quality of the magnitude, relative to a reference."""

from __future__ import annotations

import numpy as np
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
    factor = (image * reference).sum() / (image * image).sum().clamp_min(torch.finfo(torch.float64).tiny)
    error = (factor * image - reference).square().mean().sqrt()
    return float(20 * torch.log10(reference.max() / error))


def ssim(image: Tensor, reference: Tensor, peak: float) -> Tensor:
    """Structural similarity (Wang et al., IEEE Trans. Image Process. 2004) of each voxel of two real volumes [z y x].

    Moments are those under a Gaussian window of 1.5 voxels, cut off at 5; of volumes with a side below 11, planes
    among them, of 3 voxels along each axis that has more than one, as a sample. Edges are mirrored. `peak` is the
    range of values.
    """
    shape, narrow = reference.shape, min(reference.shape) < 11
    image, reference = image.squeeze(), reference.squeeze()
    window = np.ones(3) if narrow else np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    samples = 3**reference.ndim
    unbiased = samples / (samples - 1) if narrow else 1.0
    x, y = (v.double().numpy() for v in (image, reference))
    mean = lambda v: _windowed(v, window / window.sum())
    mx, my, a, b = mean(x), mean(y), (0.01 * peak) ** 2, (0.03 * peak) ** 2
    variances = unbiased * (mean(x * x) - mx * mx + mean(y * y) - my * my)
    covariance = unbiased * (mean(x * y) - mx * my)
    similarity = (2 * mx * my + a) * (2 * covariance + b) / ((mx * mx + my * my + a) * (variances + b))
    return torch.from_numpy(similarity).reshape(shape)


def _windowed(values: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Sums weighted by `window` along each axis in turn."""
    for axis, length in enumerate(values.shape):
        reach = [(len(window) // 2 if a == axis else 0,) * 2 for a in range(values.ndim)]
        mirrored = np.pad(values, reach, "symmetric")
        values = sum(weight * mirrored.take(range(k, k + length), axis) for k, weight in enumerate(window))
    return values
