"""Variational 3D reconstruction with a 2D prior on random slices of three orientations.

Minimises ||A x - y||^2 / (2 sigma^2) + a prior on all slices that is known only through its denoiser. arXiv 2412.18584
follows the gradient of a diffusion objective on slices with random noise added (faithful.py); here the problem is
split, as in annealed plug-and-play (Zhang et al., arXiv 2008.13751), and no noise is added: each sweep denoises slices
of one random orientation at an annealed noise level and in a random pose, with momentum from the previous sweep, then
minimises the data term plus a pull towards the result (a few conjugate-gradient steps on independent 2D problems). The
denoiser is never differentiated ("stabilised Jacobian"). Part of what it removed is added back before the next one:
ADMM's dual variable, damped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .measurement import Measurement
from .pose import Pose, draw_pose
from .slices import Denoiser, denoise_slices, object_box, some_slices, usable_axes
from .state import State


@dataclass(frozen=True)
class VariationalConfig:
    """Settings of the solver; noise levels are in units of tissue brightness.

    With n the noise of the data in those units, a sweep at sigma pulls towards its denoised image with
    rho = prior_weight * sqrt(1 / R) * (n / sigma)^2: the Gaussian model's balance of data noise and prior noise,
    times a factor found by experiment (tests/benchmarks/robustness.py), the same for every protocol; the more
    of k-space is sampled (R = 1: all), the stronger a prior the image tolerates.

    With the sweeps held at the end, 24 sweeps are at most 0.1 dB better than 12 at R = 4, 0.4 dB at R = 8 and 0.5 dB at
    R = 12 (results/bench_fine.csv). Where slices of only one orientation are usable, `dual_share` and `held` count as
    0: both made measured single planes and thin slabs worse. There 1 / R counts as at least `alone`: planes and thin
    slabs of held-out heads need no weaker prior above R = 3 (0.04 to 0.85 dB at R = 4 and 8, -0.07 to 0.22 dB for slabs
    at 4 mm; results/bench_planes_alone0.csv).
    """

    sweeps: int = 12
    sigma_max: float = 0.3  # noise level of the first sweep
    sigma_min: float = 0.02  # noise level of the last sweep, or n / 2 if that is higher
    prior_weight: float = 0.7  # strength of the prior relative to the data
    # Noisier data tolerate a stronger prior, in proportion to their noise between these levels (SNR 16 to 7), if noise
    # lines give it: an estimate may be twice too high, above all with one coil.
    noisy: float = 0.0625
    noisiest: float = 0.156
    momentum: float = 0.7  # share of the last sweep's change of the volume that is repeated before denoising
    # Share of ADMM's dual variable that is added back: 0 is half-quadratic splitting, whose pull x - D(x) falls short
    # of the prior's gradient; 1 is ADMM, which trusts the denoiser to be exactly the prior's own.
    dual_share: float = 0.3
    held: float = 0.25  # share of the sweeps that stay at the last noise level: slices of all orientations have a turn
    alone: float = 0.36  # least that 1 / R counts as where slices of only one orientation are usable
    cg_iterations: int = 3  # conjugate-gradient steps per sweep
    slice_fraction: float = 1.0  # fraction of the slices that is denoised in each sweep


def denoise_in_pose(volume: Tensor, prior: Denoiser, sigma: float, axis: int, chosen: Tensor, pose: Pose) -> int:
    """Denoise in place the `chosen` slices across `axis` of `volume` [z y x], in tissue units; returns how many."""
    return denoise_slices(volume, pose.seen_by(prior), sigma, axis, chosen)


def reconstruct_variational(
    measurement: Measurement,
    prior: Denoiser,
    start: Tensor,
    config: VariationalConfig = VariationalConfig(),
    seed: int = 0,
    denoise: Callable[[Tensor, Denoiser, float, int, Tensor, Pose], int] = denoise_in_pose,
) -> Iterator[State]:
    """Yield a State after every sweep; the caller may stop at any time: the latest is usually the best.

    Args:
        measurement: the inverse problem.
        prior: D(slices [slices 2 h w], sigma) on slices whose tissue has magnitude about 1.
        start: volume [z y x], the CG-SENSE image.
        seed: for the random slices and poses.
        denoise: replaces denoise_in_pose for callers that learn from the prior's inputs (rehearsal.py, pupil.py).
    """
    random = torch.Generator().manual_seed(seed)
    scale, noise, x, target = measurement.in_tissue_units(start)
    box = object_box(measurement.operator.support)
    across = lambda volume, axis: volume[box].movedim(axis, 0)
    usable = usable_axes(tuple(s.stop - s.start for s in box))
    if len(usable) == 1:
        dual_share, held, least_sampled = 0.0, 0.0, config.alone
    else:
        dual_share, held, least_sampled = config.dual_share, config.held, 0.0
    pull = pull_of_prior(measurement, noise, config, least_sampled)
    previous, denoised, dual = x, x.clone(), torch.zeros_like(x)
    last_sigma = config.sigma_max
    axes, evaluations = [], 0
    for sweep, sigma in enumerate(annealed(config, noise, held), start=1):
        axes = axes or [a for a in torch.randperm(3, generator=random).tolist() if a in usable]
        rho = pull * (noise / sigma) ** 2
        dual = dual * (sigma / last_sigma) ** 2  # keeps rho * dual constant
        to_denoise = x + config.momentum * (x - previous) + dual
        axis = axes.pop()
        chosen = some_slices(denoised[box].shape[axis], config.slice_fraction, random).to(x.device)
        across(denoised, axis)[chosen] = across(to_denoise, axis)[chosen]  # slices not drawn keep their last result
        pose = draw_pose(random)
        evaluations += denoise(denoised[box], prior, sigma, axis, chosen, pose)
        dual = dual_share * (to_denoise - denoised)
        previous, last_sigma = x, sigma
        x = measurement.operator.solve(target + rho * (denoised - dual), rho, denoised, config.cg_iterations)
        yield State(sweep, config.sweeps, sigma, x * scale, evaluations)


def pull_of_prior(
    measurement: Measurement, noise: float, config: VariationalConfig, least_sampled: float = 0.0
) -> float:
    """Pull of the prior relative to that of the Gaussian model (see VariationalConfig).

    `noise` is in units of tissue brightness; `least_sampled` is the smallest share of k-space that counts as
    sampled.
    """
    sampled = max(least_sampled, float(measurement.operator.sampled.float().mean()))
    noisier = min(max(noise, config.noisy), config.noisiest) / config.noisy if measurement.sigma_known else 1.0
    return config.prior_weight * sampled**0.5 * noisier


def annealed(config: VariationalConfig, noise: float, held: float) -> list[float]:
    """Noise level of each sweep: falls geometrically, not below `sigma_min` or half the noise of the data.

    It stays there for the last share `held` of the sweeps.
    """
    steps = max(1, config.sweeps - 1 - int(held * config.sweeps))
    lowest = min(config.sigma_max, max(config.sigma_min, noise / 2))
    return [config.sigma_max * (lowest / config.sigma_max) ** min(1, i / steps) for i in range(config.sweeps)]
