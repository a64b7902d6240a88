"""The variational method as published: the reference that the fast one is measured against.

Adam on the voxels, or on another representation of the volume (arXiv 2412.18584): each iteration adds to the
gradient of the data term that of a truncated diffusion objective on random slabs of all three orientations, with every
slice noised at its own random level s. The network's Jacobian is replaced by the identity ("stabilised"), which leaves
x - D(x + s n) as the direction. Each slice is weighted by its own s (Mardani et al., arXiv 2305.04391), so that it
pulls with 1 / sqrt(1 + s^2), s in the published units; the published code uses one mean weight for all slices instead.
A prior in function space (neural_operator.py) is told the voxel size and given smooth noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .measurement import Measurement, inner
from .prior import Prior
from .representation import Grid, Representation
from .slices import Denoiser, complex_noise, denoise_planes, usable_axes
from .state import State

RMS = 0.6  # of a head's whole volume, in units of tissue brightness; the published numbers are in units of this RMS


@dataclass(frozen=True)
class FaithfulConfig:
    """Published settings; `weight` is the published lambda times the number of coils.

    That is because the published loss averages over coils. Of the weights 0.005, 0.02 and 0.08 the last was best on a
    held-out head, with 0.02 nearly as good. With `prior_voxel_mm` the representation renders the volume for the prior
    in voxels of that size (0: those of the scan).
    """

    iterations: int = 200
    learning_rate: float = 2.0
    betas: tuple[float, float] = (0.9, 0.99)
    patience: int = 20
    slabs: int = 10
    slab_thickness: int = 5
    last_time: int = 399
    weight: float = 0.08
    representation: type[Representation] = Grid
    prior_voxel_mm: float = 0.0


def reconstruct_faithful(
    measurement: Measurement, prior: Denoiser, start: Tensor, config: FaithfulConfig = FaithfulConfig(), seed: int = 0
) -> Iterator[State]:
    """Yield a State after every iteration; ends with the last iterate.

    Voxels start from the zero-filled image, other representations from `start`.

    Args:
        measurement: the inverse problem.
        prior: D(slices [slices 2 h w], sigma [slices]).
        start: volume [z y x], the CG-SENSE image, which also sets the intensity scale.
        seed: of the random slabs and noise, and of the representation's random initial values.
    """
    random = torch.Generator().manual_seed(seed)
    scale, _, image, target = measurement.in_tissue_units(start)
    here = tuple(target.shape)
    mesh = prior_mesh(measurement, config)
    mesh_mm = tuple(mm * n / seen for mm, n, seen in zip(measurement.voxel_mm, here, mesh))
    # Zero-filled, as published; other representations are fitted to the better image.
    first = target if config.representation is Grid else image
    x = config.representation(first, tuple(max(pair) for pair in zip(here, mesh)), seed)
    energy = measurement.energy / scale**2
    rate = config.learning_rate * RMS
    x.fit(first, rate)
    optimiser = torch.optim.Adam(x.groups(rate), betas=config.betas)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=config.patience)
    highest = float(noise_levels(config).max())
    evaluations = 0
    render = torch.enable_grad()(x.forward)
    volume = render(here)
    for iteration in range(1, config.iterations + 1):
        seen = volume if mesh == here else render(mesh)
        misfit, data_pull = data_gradient(measurement, volume.detach(), target, energy)
        penalty, prior_pull, spent = prior_gradient(seen.detach(), mesh_mm, prior, config, random)
        share = config.weight * volume.numel() / seen.numel()
        optimiser.zero_grad()
        torch.autograd.backward([volume, seen], [data_pull, share * prior_pull])
        optimiser.step()
        plateau.step(misfit + share * penalty)
        evaluations += spent
        volume = render(here)
        yield State(iteration, config.iterations, highest, volume.detach() * scale, evaluations)


def prior_mesh(measurement: Measurement, config: FaithfulConfig) -> tuple[int, int, int]:
    """The matrix (z, y, x) on which the prior sees the field of view."""
    if not config.prior_voxel_mm:
        return tuple(measurement.adjoint.shape)
    sides_mm = [n * mm for n, mm in zip(measurement.adjoint.shape, measurement.voxel_mm)]
    return tuple(max(1, round(side / config.prior_voxel_mm)) for side in sides_mm)


def data_gradient(measurement: Measurement, volume: Tensor, target: Tensor, energy: float) -> tuple[float, Tensor]:
    """||A x - y||^2 / 2 and its gradient A^H A x - A^H y for x [z y x]; target is A^H y, energy is ||y||^2."""
    mapped = measurement.operator.normal(volume)
    return 0.5 * (energy + inner(volume, mapped - 2 * target)), mapped - target


def prior_gradient(
    volume: Tensor, voxel_mm: Sequence[float], prior: Denoiser, config: FaithfulConfig, random: torch.Generator
) -> tuple[float, Tensor, int]:
    """The diffusion objective on random slabs of `volume` [z y x] in all orientations, and its gradient.

    Both are scaled to all slices; the third value is how many slices were denoised.
    """
    axes, levels = usable_axes(tuple(volume.shape)), noise_levels(config)
    penalty, gradient, spent = 0.0, torch.zeros_like(volume), 0
    for axis in axes:
        chosen = random_slabs(volume.shape[axis], config, random)
        sigma = levels[torch.randint(len(levels), (len(chosen),), generator=random)]
        in_plane = tuple(mm for other, mm in enumerate(voxel_mm) if other != axis)
        pull, loss = slice_gradient(volume.movedim(axis, 0)[chosen], *on_voxels(prior, in_plane), sigma, random)
        share = volume.shape[axis] / len(chosen) / len(axes)
        gradient.movedim(axis, 0).index_add_(0, chosen.to(pull.device), share * pull)
        penalty, spent = penalty + share * loss, spent + len(chosen)
    return penalty, gradient, spent


def on_voxels(prior: Denoiser, voxel_mm: tuple[float, float]) -> tuple[Denoiser, Callable[[Tensor], Tensor]]:
    """`prior` for voxels of `voxel_mm` (h, w) and a function that turns white noise into the kind it was trained on."""
    if isinstance(prior, Prior):
        return partial(prior, voxel_mm=voxel_mm), partial(prior.unit_noise, voxel_mm=voxel_mm)
    return prior, lambda white: white


def slice_gradient(
    planes: Tensor, prior: Denoiser, noise: Callable[[Tensor], Tensor], sigma: Tensor, random: torch.Generator
) -> tuple[Tensor, float]:
    """(x - D(x + s n)) / sqrt(1 + (s / RMS)^2) for complex planes x [slices h w], and the objective's value.

    s is `sigma` [slices]; n is `noise` applied to white noise.
    """
    s = sigma.to(planes.device)[:, None, None]
    difference = planes - denoise_planes(planes + s * noise(complex_noise(planes, random)), prior, s[:, 0, 0])
    # The published |difference / s|^2, weighted by s / RMS; times RMS^2 as the data term, which is in tissue units.
    objective = 0.5 * RMS * (difference.abs().square() / s).double().sum()
    return difference / torch.sqrt(1 + (s / RMS) ** 2), float(objective)


def random_slabs(length: int, config: FaithfulConfig, random: torch.Generator) -> Tensor:
    """Indices of random slabs of contiguous slices, with replacement."""
    thickness = min(config.slab_thickness, length)
    first = torch.randint(length - thickness + 1, (config.slabs,), generator=random)
    return (first[:, None] + torch.arange(thickness)).flatten()


def noise_levels(config: FaithfulConfig) -> Tensor:
    """The levels that slices are noised at, in tissue brightness."""
    return diffusion_levels()[1 : config.last_time + 1] * RMS


def diffusion_levels() -> Tensor:
    """sigma / alpha of the linear schedule from 1e-4 to 0.02 (Ho et al., arXiv 2006.11239), indexed by time."""
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return ((1 - alpha) / alpha).sqrt().float()
