"""Variational 3D reconstruction with a 2D prior on random slices of three orientations.

Minimises ||A x - y||^2 / (2 sigma^2) + sum over slices of a truncated diffusion objective (arXiv 2412.18584)
by alternating directions (ADMM; Boyd et al., 2011, section 3): each sweep denoises the slices of one random
orientation at an annealed noise level, then solves the data term exactly against the result (conjugate gradients
on independent 2D problems). The dual variable remembers what the data refused, so that neither side's bias stays.
The denoiser is never differentiated ("stabilised Jacobian").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .measurement import Measurement
from .slices import Denoiser, denoise_slices, object_box, some_slices, usable_axes
from .state import State

TRUSTED_NOISE = 0.2  # of a least-squares image; up to it the prior has its full weight


@dataclass(frozen=True)
class VariationalConfig:
    """sigma in units of tissue brightness.

    With n the noise of the data in those units, a sweep at sigma weighs its denoised image with
    rho = weight * (n / sigma)^2: the Gaussian model's balance of data noise and prior noise, with
    weight = prior_weight * min(1, 0.2 / (n sqrt(R))): the noisier the image without a prior, the less the prior's
    word is taken for its mean. sigma never falls below 0.7 n. These rules were found by experiment
    (tests/benchmarks/robustness.py) and are the same for every protocol.
    """

    sweeps: int = 16
    sigma_max: float = 0.3
    sigma_min: float = 0.03
    prior_weight: float = 1.0
    cg_iterations: int = 3
    slice_fraction: float = 1.0


def reconstruct_variational(
    measurement: Measurement,
    prior: Denoiser,
    start: Tensor,
    config: VariationalConfig = VariationalConfig(),
    seed: int = 0,
) -> Iterator[State]:
    """Yield a State after every sweep; stop whenever the time is up, the latest is the best.

    Args:
        measurement: the inverse problem.
        prior: D(slices [slices 2 h w], sigma) on slices whose tissue has magnitude about 1.
        start: volume [z y x], the CG-SENSE image.
        seed: of the random slices.
    """
    random = torch.Generator().manual_seed(seed)
    scale, noise, x, target = measurement.in_tissue_units(start)
    box = object_box(measurement.operator.maps)
    usable = usable_axes(tuple(s.stop - s.start for s in box))
    weight = balance(config, noise, float((measurement.operator.weights > 0).float().mean()))
    clean, dual, axes, evaluations = x.clone(), torch.zeros_like(x), [], 0
    for sweep, sigma in enumerate(annealed(config, noise), start=1):
        axes = axes or [a for a in torch.randperm(3, generator=random).tolist() if a in usable]
        axis, mixed = axes.pop(), x[box] + dual[box]
        chosen = some_slices(mixed.shape[axis], config.slice_fraction, random)
        evaluations += denoise_slices(mixed, prior, sigma, axis, chosen)
        new, into, dual_into, at = (v.movedim(axis, 0) for v in (mixed, clean[box], dual[box], x[box]))
        into[chosen] = new[chosen]
        dual_into[chosen] += at[chosen] - new[chosen]
        rho, wanted = weight * (noise / sigma) ** 2, clean - dual
        x = measurement.operator.solve(target + rho * wanted, rho, wanted, config.cg_iterations)
        yield State(sweep, config.sweeps, sigma, (x + clean) * (scale / 2), evaluations)


def balance(config: VariationalConfig, noise: float, sampled: float) -> float:
    """Weight of the prior; `noise` of the data in tissue brightness, `sampled` the share of k-space."""
    return config.prior_weight * min(1.0, TRUSTED_NOISE * sampled**0.5 / max(noise, 1e-12))


def annealed(config: VariationalConfig, noise: float) -> list[float]:
    """Noise level of each sweep, falling geometrically, not below 0.7 of the noise of the data."""
    steps = max(1, config.sweeps - 1)
    lowest = min(config.sigma_max, max(config.sigma_min, 0.7 * noise))
    return [config.sigma_max * (lowest / config.sigma_max) ** (i / steps) for i in range(config.sweeps)]
