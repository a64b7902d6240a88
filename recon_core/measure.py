"""Makes the inverse problem of gathered k-space: prewhitens, averages, compresses coils and estimates coil maps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .coil_maps import Calibration, least_overlap, make_coil_maps
from .coils import compression_matrix, cut_acs, find_acs, folding, in_phase, too_few
from .fft import centre_block, centre_crop_or_pad
from .low_resolution import calibrated_image, explained_by
from .measurement import Measurement, Reference, energy_of
from .noise import Whitening, whiten
from .scale import intensity_scale
from .sense import Sense
from .slices import usable_axes

WORK_ARRAYS = 3  # data, maps and a temporary copy of the maps
SINGLE_VOLUMES = 14  # besides these: 12 coils of 320 x 320 x 256 peak at 9.4 GiB (tests/benchmarks/chain_speed.py)
KEPT_ARRAYS = 2  # data that are kept, and a part of them
# Share of the signal near k = 0 that the calibration's image must explain: on held-out heads with regular undersampling
# a calibration of another contrast explains less, one that differs only in phase explains more.
EXPLAINS = 0.8
TOO_LARGE = 1e15  # for a sample, in any units
TOO_SMALL = 1e-15  # for the mean sample: noise and outer lines are far below it, and squared in float32
# Cap on a line's weight, in median counts: full weight for the few lines with more averages would amplify their
# coil-map errors. Fewer than SEVERAL of the lines weigh no more than the others: the largest weight is 1, and one line
# sent twice would halve all others against the prior.
MOST_WEIGHT = 2.0
SEVERAL = 0.1


def measure(
    kspace: Tensor,
    counts: Tensor,
    voxel_mm: tuple[float, float, float],
    noise: Tensor | None = None,
    calibration: tuple[Tensor, Tensor] | None = None,
    *,
    coils: int = 12,
    device: str | torch.device = "cpu",
    reference: Reference | None = None,
    louder: float = 1.0,
    keep_lines: bool = False,
    gain: float = 1.0,
    on_host: bool = False,
    sets: int = 1,
) -> Measurement:
    """Prewhiten, average, compress coils and estimate coil maps.

    Args:
        kspace: [coils z y x] sums over averages, x in image space, k = 0 at n//2, zeros where nothing was acquired; a
            tensor on the host or the device, or a NumPy array.
        counts: [z y] number of lines summed, or whether a line was acquired.
        voxel_mm: voxel size of the encoded grid along z, y, x.
        noise: [coils samples] noise samples, if there are noise lines.
        calibration: separate calibration (kspace, counts) on the same grid, if there is one.
        coils: maximum number of virtual coils.
        device: where to compute.
        reference: that of another volume of the scan, to make phase and brightness comparable with that volume's.
        louder: noise of the scan over that of its noise lines (Measurement.excess_noise).
        keep_lines: keep `lines` of volumes too, to estimate the error (jackknife.py).
        gain: factor on the image's units, which noise lines make those of the noise, so that volumes of different dwell
            times can be compared.
        on_host: keep the arrays of all coils in host memory, read by the device in parts; by default only if they do
            not seem to fit.
        sets: of coil maps at most. With 2, an object that reaches beyond the field of view gets a second one where its
            parts lie over each other, unless it is a plane, a thin slab or seen by fewer than 4 coils; its volumes then
            have second parts (see Sense), which Measurement.image_of shows.

    Raises:
        ValueError: if shapes do not fit, nothing was acquired, or samples are not finite or too large to square.
    """
    kspace, counts = _sums(kspace, counts)
    calibration = None if calibration is None else _sums(*calibration)
    noise = None if noise is None else torch.as_tensor(noise, dtype=torch.complex64, device=kspace.device)
    if not bool(counts.any()):
        raise ValueError("no imaging line was acquired: nothing to reconstruct")
    if not _finite(kspace, counts):
        raise ValueError(
            "the k-space holds NaN, infinity or numbers too large to square; the scan cannot be reconstructed"
        )
    calibration, warnings = _usable(calibration)
    averages, mask, factor = _weights(counts)
    calibration_kspace, calibration_counts = (kspace, counts) if calibration is None else calibration
    # Not `factor`: its weights would blur the relations between neighbouring samples that give the maps.
    calibration_factor = 1 / calibration_counts.clamp_min(1)
    coil_weights = None if reference is None else reference.coil_weights
    whitened = whiten(kspace, mask, factor, averages, noise, louder, gain, coil_weights)
    warnings += whitened.warnings
    found = _calibration_block(calibration_kspace, calibration_counts, calibration_factor, whitened)
    mixing, found = _compressed(whitened.matrix, found, kspace, counts, coils)
    mixing, found = mixing.cpu(), found.to(device)
    arrays = WORK_ARRAYS + KEPT_ARRAYS * keep_lines
    home, told = _home(len(mixing), kspace.shape[1:], torch.device(device), arrays, on_host)
    warnings += told
    data = _mix_lines(mixing, kspace, factor, home)
    all_lines = lambda: _mix_lines(mixing, calibration_kspace, calibration_factor * (calibration_counts > 0), home)
    least = least_overlap(sets, reference)
    maps = make_coil_maps(found, kspace.shape[1:], calibration_counts.to(home), all_lines, folding(counts), least)
    warnings += maps.warnings
    if reference is not None and len(mixing) > 1 and not torch.equal(reference.combination, mixing[0]):
        in_phase(maps.first, mixing, reference.combination)
    operator = maps.sense(mask, device)
    sigma = whitened.sigma / averages**0.5
    energy, samples = energy_of(data), int((mask > 0).sum()) * data.shape[0] * data.shape[-1]
    if not whitened.known and energy < TOO_SMALL**2 * samples:  # noise lines would have changed the units
        warnings.append(
            "CAUTION: the samples are so small that their squares, and with them the image, lose precision: "
            f"multiply the lines so that they are far above {TOO_SMALL:g}, or send noise lines"
        )
    kept = data if keep_lines or len(usable_axes(operator.shape)) == 1 else None
    adjoint = operator.adjoint(data)
    calibrated = tissue = None
    if calibration is not None and too_few(find_acs(counts), counts.shape):
        calibrated = calibrated_image(operator, adjoint, found.acs)
    if calibrated is not None:
        tissue = intensity_scale(calibrated, voxel_mm)
        warnings += _lacks_centre(operator, calibrated, data, found.size, sigma)
    return Measurement(
        operator=operator,
        adjoint=adjoint,
        energy=energy,
        samples=samples,
        sigma=sigma,
        voxel_mm=voxel_mm,
        acs=found.size,
        mixing=mixing,
        sigma_known=whitened.known,
        sigma_bound=whitened.sigma_bound / averages**0.5,
        warnings=warnings,
        lines=kept,
        calibrated=calibrated,
        tissue=tissue,
        coil_weights=whitened.coil_weights,
    )


def _sums(kspace: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """K-space [coils z y x] and counts [z y] as tensors of the types computed with; not copied if they are already.

    Raises:
        ValueError: if they do not fit.
    """
    # NumPy's flipped views are no tensors yet.
    kspace, counts = (np.ascontiguousarray(a) if isinstance(a, np.ndarray) else a for a in (kspace, counts))
    kspace = torch.as_tensor(kspace, dtype=torch.complex64)
    counts = torch.as_tensor(counts, dtype=torch.float32, device=kspace.device)
    if kspace.ndim != 4 or counts.shape != kspace.shape[1:3]:
        raise ValueError(
            "expected k-space [coils z y x] and counts [z y] of the same z and y, "
            f"got {list(kspace.shape)} and {list(counts.shape)}"
        )
    return kspace, counts


def _weights(counts: Tensor) -> tuple[float, Tensor, Tensor]:
    """How many averages a line counts as at most, the operator's mask [z y], and the factor [z y] from sums to data.

    The mask is the root of each line's averages over that number; of the few lines with more than the median, no more
    count than MOST_WEIGHT allows.
    """
    acquired = counts[counts > 0]
    median = float(acquired.median())
    several = float((acquired > median).float().mean()) >= SEVERAL
    capped = counts.clamp_max(MOST_WEIGHT * median if several else median)
    averages = float(capped.max())
    mask = (capped / averages).sqrt()
    return averages, mask, mask / counts.clamp_min(1)


def _finite(kspace: Tensor, counts: Tensor) -> bool:
    """Whether all samples of the acquired lines are finite and can be squared, also in units of the noise.

    Coils are looked at together, one plane at a time.
    """
    return all(bool(lines.sum(dim=0).abs().square().sum() < TOO_LARGE**2) for _, _, lines in _acquired(kspace, counts))


def _usable(calibration: tuple[Tensor, Tensor] | None) -> tuple[tuple[Tensor, Tensor] | None, list[str]]:
    """The separate calibration if maps can be made from it, else None; and warnings that say why not."""
    if calibration is None:
        return None, []
    if not _finite(*calibration):
        return None, ["the calibration lines hold NaN, infinity or numbers too large to square and were left out"]
    if not any(bool(lines.any()) for _, _, lines in _acquired(*calibration)):
        return None, ["the calibration lines hold only zeros and were left out"]
    return calibration, []


def _calibration_block(kspace: Tensor, counts: Tensor, factor: Tensor, whitened: Whitening) -> Calibration:
    """The calibration lines among those of `kspace` [coils z y x], prewhitened."""
    size = find_acs(counts)
    if not size[0]:
        empty = kspace.new_zeros((len(whitened.matrix), 0, 0, 0))
        return Calibration(empty, size, whitened.sigma, whitened.sigma)
    block = cut_acs(kspace, size)
    sigma = whitened.sigma * float(centre_crop_or_pad(factor * counts.sqrt(), size).square().mean().sqrt())
    acs = _mix(whitened.matrix, block * centre_crop_or_pad(factor, block.shape[1:3])[..., None])
    return Calibration(acs, size, sigma, whitened.loudest * sigma)


def _compressed(
    matrix: Tensor, calibration: Calibration, kspace: Tensor, counts: Tensor, most: int
) -> tuple[Tensor, Calibration]:
    """`matrix` [virtual coils coils] and its calibration lines after compression to at most `most` virtual coils."""
    if len(matrix) == 1:
        return matrix, calibration
    centre = calibration.acs if calibration.acs.numel() else _mix(matrix, _innermost(kspace, counts))
    compression = compression_matrix(centre, min(most, len(matrix)))
    return compression @ matrix, replace(calibration, acs=_mix(compression, calibration.acs))


def _innermost(kspace: Tensor, counts: Tensor, most: int = 64) -> Tensor:
    """The acquired lines nearest the k-space centre [coils lines x], for scans that lack the centre itself."""
    there = (counts > 0).nonzero()
    middle = torch.tensor([n // 2 for n in counts.shape], device=there.device)
    z, y = there[(there - middle).square().sum(1).argsort(stable=True)[:most]].T
    return kspace[:, z, y] / counts[z, y, None]


def _mix(matrix: Tensor, data: Tensor) -> Tensor:
    """`matrix` [virtual coils coils] times `data` [coils ...]."""
    return (matrix @ data.flatten(1)).reshape(len(matrix), *data.shape[1:])


def _mix_lines(matrix: Tensor, kspace: Tensor, factor: Tensor, home: torch.device) -> Tensor:
    """matrix @ (kspace * factor) [virtual coils z y x] at `home`; only lines with nonzero factor are read and moved."""
    out = torch.zeros((len(matrix), *kspace.shape[1:]), dtype=kspace.dtype, device=home)
    matrix = matrix.to(home)
    for z, there, lines in _acquired(kspace, factor):
        out[:, z, there.to(home)] = _mix(matrix, lines.to(home) * factor[z, there, None].to(home))
    return out


def _acquired(kspace: Tensor, counts: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Acquired lines, plane by plane (z, indices y, lines [coils lines x]), to avoid a second array of all coils."""
    for z in range(kspace.shape[1]):
        there = counts[z].nonzero()[:, 0]
        if len(there):
            yield z, there, kspace[:, z, there]


def _home(
    coils: int, shape: tuple[int, int, int], device: torch.device, arrays: int, on_host: bool
) -> tuple[torch.device, list[str]]:
    """Where to keep so many `arrays` of all coils, and a warning if that is not the device.

    On the device if they fit, else, or if `on_host` is set, on the host, to be read in parts.
    """
    host = torch.device("cpu")
    if on_host:
        return host, ["the GPU's memory ran short: coil maps stay in the host's memory"]
    if device.type != "cuda":
        return device, []
    # Cached by earlier volumes, available to this one.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    needed = 8 * (arrays * coils + SINGLE_VOLUMES) * math.prod(shape)
    if needed <= free:
        return device, []
    warning = (
        f"the GPU has {free / 2**30:.1f} GiB free, {coils} coils need {needed / 2**30:.1f} GiB: "
        "coil maps stay in the host's memory"
    )
    return host, [warning]


def _lacks_centre(operator: Sense, calibrated: Tensor, data: Tensor, size: tuple[int, int], sigma: float) -> list[str]:
    """A warning if no line of `data` lies near k = 0 and the calibration's image explains too little of those around.

    `data` is y [coils z y x], `calibrated` [z y x] the image of a block of `size` (z, y): only lines within it count.
    """
    mask = operator.mask.cpu()
    inner_mask = mask * centre_block(mask.shape, size)
    if bool((inner_mask * centre_block(mask.shape, (3, 3))).any()) or not bool(inner_mask.any()):
        return []
    inner_operator = operator.with_mask(inner_mask)
    inner_data = data * (inner_mask > 0)[..., None].to(data.device)
    signal = energy_of(inner_data) - 2 * sigma**2 * int((inner_mask > 0).sum()) * len(data) * data.shape[-1]
    share = explained_by(inner_operator, calibrated, inner_operator.adjoint(inner_data)) / max(signal, 1e-30)
    if share > EXPLAINS:
        return []
    return [
        "CAUTION: no line lies next to the k-space centre, and the image of the calibration, "
        f"perhaps of another contrast, explains only {share:.0%} of the lines around it: "
        "large structures may have the wrong brightness"
    ]
