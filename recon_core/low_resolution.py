"""What the calibration lines show at their low resolution: where the object is, and an image of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .coils import widened
from .fft import centre_crop_or_pad, fft, hann, ifft
from .measurement import inner
from .scale import evenly
from .sense import Sense

# Where the object ends: share of the bright signal, the same at the highest SNR, multiple of the noise.
DARK, DARKEST, SEEN = 0.025, 0.005, 15.0
# Times as much of the data must another phase of the calibration explain: with less, one of another contrast is turned
# to its harm; with more, echoes 10 ms after the calibration keep its phase.
PHASE_GAIN = 1.05
PHASE_ROUNDS, PHASE_SETTLED = 6, 1.01  # at most so many, while each explains this many times as much as the one before
# Of the conjugate gradients that show the phase of a scan whose calibration has another.
PHASE_RHO, PHASE_ITERATIONS = 1e-3, 10


def object_support(acs: Tensor, shape: tuple[int, int, int], sigma: float) -> Tensor:
    """Where the low-resolution calibration image is not dark, grown by 2 voxels: leaves out air, keeps faint tissue.

    Maps that are zero in air leave fewer unknowns, which helps CG-SENSE most. Dark means below DARK times the bright
    signal; if the noise is low enough (`sigma` of `acs` per real part), below SEEN times the noise instead, because a
    vial or deep tissue at 2 % of the bright signal may be real. A wider support costs some of that gain where the air
    around real heads contains ghosts.
    """
    window = _window(acs)
    energy = torch.zeros(shape, device=acs.device)
    for coil in acs * window:  # one by one, to hold a single image in memory
        energy += _low_resolution(coil, shape).abs().square()
    blurred = energy.sqrt()
    noise = sigma * (2 * len(acs) * float(window.square().sum()) / (math.prod(shape[:2]) * widened(shape[2]))) ** 0.5
    bright = float(torch.quantile(evenly(blurred, 100_000), 0.99))
    inside = blurred > min(DARK * bright, max(SEEN * noise, DARKEST * bright))
    grow = [min(5, n if n % 2 else n - 1) for n in inside.shape]
    grown = F.max_pool3d(inside[None, None].float(), grow, stride=1, padding=[g // 2 for g in grow])
    return grown[0, 0]


def calibrated_image(operator: Sense, adjoint: Tensor, acs: Tensor) -> Tensor | None:
    """Image [z y x] of the calibration lines, with the factor and smooth phase that make it explain y best, or None.

    The calibration may have another contrast, gain or echo time, and with that another phase: it is that of what the
    scan itself shows by conjugate gradients, at the resolution of the calibration. Only its own part of k-space is
    compared with y. None if there is no such image.
    """
    if not acs.numel():
        return None
    image = operator.combined(_low_resolution(coil, operator.matrix) for coil in acs)
    plain, known = _fitted(operator, image, adjoint)
    turned, start, found = None, None, 0.0
    for _ in range(PHASE_ROUNDS):
        target = adjoint if start is None else adjoint + PHASE_RHO * start
        seen = operator.solve(target, PHASE_RHO, start, PHASE_ITERATIONS)
        start, explained = _fitted(operator, image * torch.sgn(_blurred(seen * image.conj(), acs.shape[1:3])), adjoint)
        if explained < max(known, PHASE_SETTLED * found):
            break
        turned, found = start, explained
    best = turned if found > PHASE_GAIN * known else plain
    return best if known or found else None


def _fitted(operator: Sense, image: Tensor, adjoint: Tensor) -> tuple[Tensor, float]:
    """`image` [z y x] times the complex factor that makes A x explain y best, and how much of ||y||^2 that explains."""
    energy = inner(image, operator.normal(image))
    factor = complex(torch.vdot(image.flatten(), adjoint.flatten())) / energy if energy else 0
    return factor * image, abs(factor) ** 2 * energy


def explained_by(operator: Sense, image: Tensor, adjoint: Tensor) -> float:
    """How much of ||y||^2 A x explains, with x a multiple of `image` [z y x]; `adjoint` is A^H y."""
    return _fitted(operator, image, adjoint)[1]


def _blurred(volume: Tensor, lines: Sequence[int]) -> Tensor:
    """[z y x] with a Hann window over so many central lines (z, y) of its k-space."""
    sides = [min(pair) for pair in zip(lines, volume.shape)]
    window = hann(sides[0], volume.device)[:, None] * hann(sides[1], volume.device)
    return ifft(fft(volume, (0, 1)) * centre_crop_or_pad(window, volume.shape[:2])[..., None], (0, 1))


def _low_resolution(coil: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Image [z y x] of size `shape` from a block [z y x] made by cut_acs."""
    return centre_crop_or_pad(ifft(centre_crop_or_pad(coil, (*shape[:2], widened(shape[2]))), (0, 1, 2)), shape)


def _window(acs: Tensor) -> Tensor:
    out = torch.ones(acs.shape[1:], device=acs.device)
    for axis, n in enumerate(acs.shape[1:]):
        out = out * hann(n, acs.device).reshape([-1 if i == axis else 1 for i in range(3)])
    return out
