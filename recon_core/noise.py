"""Receiver noise: prewhitening by noise lines, or an estimate of its level from the scan itself.

Throughout, sigma is the standard deviation of the real part, and likewise of the imaginary part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FEW_LINES = 16  # up to this many, the median is a poor estimate
ENOUGH_LINES = 1024  # for a median; using all lines of a large scan takes seconds
DEAD = 1e-3  # noise of a coil over that of the median coil below which it is not connected
# estimated noise of a coil over the median coil's above which it is scaled down; also noise lines over the scan's own
LOUD = 2.0


class Whitening(NamedTuple):
    """How coils become virtual coils of even noise.

    `matrix` [virtual coils coils] makes them, and `sigma` is the noise of a single line after it. `known`: noise lines
    gave `sigma`; otherwise the scan's outer lines did, which also contain fine detail. `sigma_bound` is the upper bound
    that those outer lines give, 0 if they were not used; `warnings` are sentences for the operator; `coil_weights`
    [coils] are the factors in `matrix` if noise lines did not give it, 1 for a coil that was left out. `loudest` is the
    noise of the loudest coil over `sigma`: an estimate does not make them all alike.
    """

    matrix: Tensor
    sigma: float
    known: bool
    sigma_bound: float
    warnings: list[str]
    coil_weights: Tensor | None = None
    loudest: float = 1.0


def whiten(
    kspace: Tensor,
    mask: Tensor,
    factor: Tensor,
    averages: float,
    noise: Tensor | None = None,
    louder: float = 1.0,
    gain: float = 1.0,
    coil_weights: Tensor | None = None,
) -> Whitening:
    """Prewhitening by the noise lines, or as well as the scan itself allows.

    With noise lines sigma is 1, or `louder`, times `gain`. An estimate only evens out the coils and keeps the units of
    the data: otherwise its error would appear as brightness that changes from one volume of a scan to the next. Noise
    lines louder than the scan itself (another receiver gain or bandwidth) give the noise correlation between coils,
    but not its level.

    Args:
        kspace: [coils z y x] sums over averages, x in image space.
        mask: [z y], nonzero where acquired.
        factor: [z y] that scales the sums to lines as noisy as the mean of `averages` lines.
        averages: largest number of lines summed.
        noise: [coils samples] noise samples, if there are noise lines.
        louder: noise of the scan over that of its noise lines.
        gain: factor on data prewhitened by noise lines, so that volumes of different dwell times can be compared.
        coil_weights: [coils] those of another volume of the scan, used without noise lines: own ones, which fine detail
            in the outer lines affects as well, would shade the images of contrasts differently.
    """
    reason = "no noise lines"
    if noise is not None:
        try:
            matrix = whitening_matrix(noise)
        except ValueError as error:
            reason = f"unusable noise lines ({error})"
        else:
            found = _by_noise_lines(matrix, kspace, mask, factor, averages, louder)
            return found._replace(
                matrix=gain * found.matrix, sigma=gain * found.sigma, sigma_bound=gain * found.sigma_bound
            )
    why = f"{reason}: the noise level was estimated from the scan itself"
    return _by_itself(kspace, mask, factor, averages, why, coil_weights)


def _by_itself(
    kspace: Tensor, mask: Tensor, factor: Tensor, averages: float, why: str, given: Tensor | None
) -> Whitening:
    tiny = torch.finfo(torch.float32).tiny
    sigma = estimate_sigma(kspace, mask, factor)
    live = sigma > 0
    for coil in (~live).nonzero()[:, 0].tolist():  # no noise in the outer lines: simulated, or no data at all
        live[coil] = kspace[coil].any()
    live = live | ~live.any()  # an empty scan keeps all coils
    warnings = [why] if bool(live.all()) else [why, left_out(~live, "{have} no signal")]
    sigma = sigma[live]
    if not float(sigma.max()) > 0:
        floor = 1e-4 * float((kspace.abs().square().mean(dim=(0, 3)) * factor.square()).mean().sqrt())
        sigma = sigma + max(floor, tiny)
    if given is None:
        weight = (LOUD * sigma[sigma > 0].median() / sigma.clamp_min(tiny)).clamp_max(1)
    else:
        weight = given.to(sigma.device)[live]
    left = (weight * sigma).double()  # the square of the least noise is none in single precision
    level = float(left.square().mean().sqrt())
    weights = torch.ones(len(kspace), device=sigma.device).masked_scatter(live, weight)
    matrix = weights.diag()[live].to(kspace.dtype)
    of_a_line = level * averages**0.5
    return Whitening(matrix, of_a_line, False, of_a_line, warnings, weights, loudest=float(left.max()) / level)


def left_out(dead: Tensor, why: str) -> str:
    """Sentence saying which coils (true in `dead` [coils]) are left out, and `why`; {have} becomes "has" or "have"."""
    numbers = [str(coil) for coil in dead.nonzero()[:, 0].tolist()]
    coils = f"coil{'s' * (len(numbers) > 1)} {', '.join(numbers)} (counted from 0)"
    why = why.format(have="has" if len(numbers) == 1 else "have")
    return f"{coils} {why}: dead, left out"


def _by_noise_lines(
    matrix: Tensor, kspace: Tensor, mask: Tensor, factor: Tensor, averages: float, louder: float
) -> Whitening:
    dead = ~matrix.any(dim=0)
    warnings = [left_out(dead, "{have} no noise")] if bool(dead.any()) else []
    level = float(estimate_sigma(kspace, mask, factor, matrix).median()) * averages**0.5
    if louder > 1:
        warnings.append(
            f"the scan is {louder:.2g} times as noisy as its noise lines "
            "(another receiver gain or bandwidth, or motion?): the noise level of the scan itself was used"
        )
    if not 0 < level < 1 / LOUD:
        return Whitening(matrix, louder, True, level, warnings)
    warnings.append(
        f"the noise lines are {1 / level:.2g} times louder than the scan: "
        "the noise level was estimated from the scan itself"
    )
    return Whitening(matrix, level, False, level, warnings)


def whitening_matrix(noise: Tensor) -> Tensor:
    """Matrix W [live coils, coils] such that W @ noise has unit sigma and no correlation between coils.

    Inverse Cholesky factor of the noise covariance (Pruessmann et al., MRM 2001, eq. 23). A dead coil, one whose
    noise is at most DEAD times the median coil's, has a column of zeros and no row.

    Args:
        noise: [coils samples] complex noise samples.

    Raises:
        ValueError: with fewer than four samples per coil, non-finite samples, no noise, or a coil that repeats others.
    """
    coils, samples = noise.shape
    if samples < 4 * coils:
        raise ValueError(f"expected at least {4 * coils} noise samples for {coils} coils, got {samples}")
    noise = noise.to(torch.complex128)
    noise = noise - noise.mean(dim=1, keepdim=True)
    covariance = noise @ noise.mH / (2 * samples)
    power = covariance.diagonal().real
    live = power > DEAD**2 * power.median()
    covariance = covariance[live][:, live]
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed) or not bool(live.any()) or not bool(torch.isfinite(torch.view_as_real(factor)).all()):
        raise ValueError(
            "the noise lines have no invertible covariance: are they zero or NaN, or do coils repeat each other?"
        )
    eye = torch.eye(coils, dtype=covariance.dtype, device=covariance.device)[live]
    return torch.linalg.solve_triangular(factor, eye, upper=False).to(torch.complex64)


def estimate_sigma(kspace: Tensor, mask: Tensor, factor: Tensor | None = None, mixing: Tensor | None = None) -> Tensor:
    """Noise level per coil [coils], estimated from the scan itself.

    From the median magnitude (of few lines, the mean) of the samples far from the k-space centre. It is too high where
    fine detail still stands out there, which costs little; too low a level would leave noise in the image,
    and air at the ends of the readout gives too low a level where the receiver noise is not white.

    Args:
        kspace: [coils z y x], x in image space.
        mask: [z y], nonzero where acquired.
        factor: [z y] to multiply the lines by, for example one over their number of averages.
        mixing: [virtual coils coils], to get the level of virtual coils.
    """
    z, y = (torch.arange(n, device=kspace.device) - n // 2 for n in mask.shape)
    radius = (2 * z / max(2, len(z))).square()[:, None] + (2 * y / max(2, len(y))).square()
    acquired = mask > 0
    far = (acquired & (radius >= torch.quantile(radius[acquired], 0.7))).nonzero()
    z, y = far[:: -(-len(far) // ENOUGH_LINES)].T
    lines = kspace[:, z, y]
    if mixing is not None:
        lines = torch.einsum("vc,clx->vlx", mixing, lines)
    magnitude = lines.abs()
    if factor is not None:
        magnitude = magnitude * factor[z, y][:, None]
    # mean or median, each over that of a Rayleigh distribution whose sigma is 1
    if magnitude.shape[1] <= FEW_LINES:
        middle = magnitude.mean(dim=1) / (math.pi / 2) ** 0.5
    else:
        middle = magnitude.median(dim=1).values / (2 * math.log(2)) ** 0.5
    return torch.quantile(middle, 0.5, dim=1)
