"""Estimates the error of an image voxel by voxel: how much it depends on which lines were measured.

Delete-a-group jackknife (Efron, "The Jackknife, the Bootstrap and Other Resampling Plans", SIAM 1982, chapters
2 and 3). The lines outside the centre are divided at random into G groups, and the image is reconstructed again without
each group. With m the mean of these images x_g and x the image from all lines, made the same way, the variance of x is
(G - 1) / G sum |x_g - m|^2 and its bias (G - 1) (m - x). Noise, missing samples and what the prior invents in their
place all change with the lines; what it invents identically whichever lines are missing is not detected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .fft import centre_block
from .measurement import Measurement
from .state import State

GROUPS = 4
CENTRE = 8  # lines per side that are always kept: without them there is no image
SMOOTHED = 1.5  # voxels, standard deviation: so few images give only a rough variance per voxel


def estimated_error(
    measurement: Measurement, image_of: Callable[[Measurement], Iterator[State]], seed: int = 0
) -> Iterator[State]:
    """Yield the states of all images it needs; the last volume is the estimate.

    That is the root mean square error of each voxel [z y x], complex with imaginary part 0.

    Args:
        measurement: one that keeps its `lines`.
        image_of: the method, whose last state counts; called 1 + GROUPS times.
        seed: for the random groups.

    Raises:
        ValueError: if there are too few lines outside the centre.
    """
    whole = None
    mean = torch.zeros_like(measurement.adjoint)
    variance = torch.zeros_like(measurement.adjoint.real)
    evaluations = 0
    images = 1 + GROUPS
    for number, kept in enumerate((None, *without_groups(measurement, seed))):
        for state in image_of(measurement if kept is None else measurement.part(kept)):
            last = number == GROUPS and state.sweep == state.sweeps
            counted = replace(
                state,
                sweep=number * state.sweeps + state.sweep,
                sweeps=images * state.sweeps,
                network_evaluations=evaluations + state.network_evaluations,
            )
            if not last:
                yield counted
        evaluations = counted.network_evaluations
        if whole is None:
            whole = state.volume
            continue
        away = state.volume - mean  # Welford's running mean and sum of squares
        mean = mean + away / number
        variance += (away * (state.volume - mean).conj()).real
    squared = (GROUPS - 1) / GROUPS * variance + ((GROUPS - 1) * (mean - whole)).abs().square()
    # Second parts lie behind the scan's readout positions, and are no neighbours of them (Sense).
    positions = len(measurement.operator.maps)
    both = zip(squared.split(positions, dim=2), (measurement.adjoint != 0).split(positions, dim=2))
    parts = [smoothed(part, inside) for part, inside in both]
    yield replace(counted, volume=torch.cat(parts, dim=2).sqrt().to(whole.dtype))


def without_groups(measurement: Measurement, seed: int) -> list[Tensor]:
    """The lines [z y] kept when each of GROUPS groups is left out in turn; ValueError if there are too few."""
    taken = measurement.operator.sampled.cpu()
    there = (taken & ~centre_block(taken.shape, [max(CENTRE, side) for side in measurement.acs])).nonzero()
    if len(there) < 2 * GROUPS:
        raise ValueError(
            f"the error cannot be estimated from {len(there)} lines outside of the k-space centre; "
            f"at least {2 * GROUPS} are needed"
        )
    order = torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))
    kept = []
    for group in range(GROUPS):
        kept.append(taken.clone())
        kept[-1][tuple(there[order[group::GROUPS]].T)] = False
    return kept


def smoothed(squared: Tensor, inside: Tensor) -> Tensor:
    """Gaussian-weighted mean of `squared` [z y x] over the neighbours `inside`; 0 outside."""
    reach = torch.arange(-4.0, 5.0, device=squared.device)
    kernel = torch.exp(-0.5 * (reach / SMOOTHED).square())
    total, share = squared * inside, inside.to(squared.dtype)
    for axis in range(3):
        shape, pad = [1, 1, 1, 1, 1], [0, 0, 0]
        shape[2 + axis], pad[axis] = len(kernel), len(kernel) // 2
        total, share = (F.conv3d(v[None, None], kernel.view(shape), padding=pad)[0, 0] for v in (total, share))
    return total / share.clamp_min(1e-12) * inside
