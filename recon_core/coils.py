"""Coil compression and coil maps, both from the autocalibration lines (ACS)."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .fft import centre_crop_or_pad, fft, hann, ifft
from .interpolation import interpolate
from .metrics import object_mask

MAX_ACS = 32  # more lines sharpen nothing and cost time
ACS_READOUT = 24
MIN_ACS = 8
LATTICE_BLOCK, LARGEST_SHIFT = 32, 8  # lines
# Share of a regular pattern's lines that a shift moves onto others; two lines of random ones always seem regular.
ALIKE, FEWEST = 0.9, 3
READOUT_MARGIN = 1 / 8  # empty margin on each side, as a share of the readout
# Side of a k-space patch; at most a third of the lines along an axis, since few lines would otherwise give too few
# patches to learn from.
PATCH = 5
GRID = 32  # side of the coarse grid that the maps are computed on
SQUARINGS = 10
MATRICES_AT_ONCE = 2048  # fit in a CPU's cache
SECOND_SIGNAL = 0.9  # eigenvalue above which there is one
RAMP = 0.8, 0.95  # second eigenvalue at which the second set of maps begins, and has its full size


def find_acs(mask: Tensor) -> tuple[int, int]:
    """Size (z, y) of the fully acquired block of `mask` [z y] about k = 0 that is best for coil maps; (0, 0) if none.

    That is one with enough lines along both axes, if there is one, and then the largest, where lines beyond MAX_ACS
    hardly count: in a thin slab, a long narrow block may hold more lines. A block of n lines reaches from n//2 before
    k = 0 to (n - 1)//2 after it, as centre_crop_or_pad cuts it.
    """
    full = (mask > 0).cpu()
    nz, ny = full.shape
    best = (0, 0)

    def worth(size: tuple[int, int]) -> tuple[bool, int, int]:
        return not too_few(size, full.shape), math.prod(min(n, MAX_ACS) for n in size), math.prod(size)

    for z in range(1, nz + 1):
        rows = centre_crop_or_pad(full, (z, ny)).all(dim=0)
        before, after = rows[: ny // 2].flip(0), rows[ny // 2 :]
        y = min(2 * _run(before) + 1, 2 * _run(after))  # consecutive lines on each side, k = 0 on the right
        if y and worth((z, y)) > worth(best):
            best = (z, y)
    return best


def too_few(size: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether calibration lines of `size` (z, y) are too few for the coil maps of a matrix of `shape` (z, y)."""
    return any(n < min(MIN_ACS, full) for n, full in zip(size, shape))


def folding(mask: Tensor) -> int:
    """How many-fold the image of a `mask` [z y] is aliased: the acceleration of its regular pattern about k = 0.

    1 if it has none. A pattern is regular if two shifts map it onto itself; the pair with the smallest cell counts.
    Random lines are not regular.
    """
    block = centre_crop_or_pad((mask > 0).cpu(), [min(n, LATTICE_BLOCK) for n in mask.shape])
    if not block.any():
        return 1
    nz, ny = block.shape
    shifts = []
    if nz == 1:  # no aliasing along an axis of one line
        shifts.append((1, 0))
    if ny == 1:
        shifts.append((0, 1))
    for z, y in itertools.product(range(min(nz, LARGEST_SHIFT + 1)), range(-LARGEST_SHIFT, LARGEST_SHIFT + 1)):
        if (z, y) > (0, 0) and abs(y) < ny:
            here = block[z:, max(0, y) : ny + min(0, y)]
            there = block[: nz - z, max(0, -y) : ny - max(0, y)]
            if int(here.sum()) >= FEWEST and float((here & there).sum()) > ALIKE * float(here.sum()):
                shifts.append((z, y))
    cells = [abs(az * by - ay * bz) for (az, ay), (bz, by) in itertools.combinations(shifts, 2)]
    return min((cell for cell in cells if cell), default=1)  # parallel shifts span none


def in_phase(maps: Tensor, mixing: Tensor, reference: Tensor) -> Tensor:
    """`maps` [virtual coils z y x], phase-rotated in place so that `reference` [coils], a mix of the coils, is real.

    The phase of coil maps is arbitrary; with one reference for all volumes of a scan, the phases of their images can be
    compared.

    Args:
        mixing: [virtual coils coils] that made the virtual coils from the coils, on the CPU like `reference`.

    Returns:
        `maps`; where the reference has no sensitivity they keep their phase.
    """
    seen = torch.zeros(maps.shape[1:], dtype=maps.dtype, device=maps.device)
    weights = (reference @ torch.linalg.pinv(mixing)).tolist()
    for weight, field in zip(weights, maps):  # one by one, to avoid an array of all coils
        seen += weight * field
    return maps.mul_(torch.where(seen == 0, 1, torch.sgn(seen).conj()))


def _run(line: Tensor) -> int:
    """Number of leading values that are true."""
    return int(line.cumprod(0).sum())


def cut_acs(kspace: Tensor, size: tuple[int, int]) -> Tensor:
    """The central block [coils z y x] as true k-space along x too, at most MAX_ACS lines and ACS_READOUT samples wide.

    Along x it covers a `widened` field of view, empty at both ends, with the noise level of `kspace`: otherwise an
    object that the readout cuts off (a neck, a slab) would meet its own opposite end there, as if the maps were
    periodic.
    """
    length = kspace.shape[-1]
    wide = widened(length)
    block = centre_crop_or_pad(kspace, (*(min(n, MAX_ACS) for n in size), wide))
    return centre_crop_or_pad(fft(block, (-1,)), (min(ACS_READOUT, wide),)) * (wide / length) ** 0.5


def widened(length: int) -> int:
    """Number of readout positions in the field of view that cut_acs and signal_operators use if a scan has `length`."""
    return length + 2 * math.ceil(READOUT_MARGIN * length) if length > 1 else 1


def compression_matrix(acs: Tensor, coils: int) -> Tensor:
    """Orthonormal rows [virtual coils coils] onto the `coils` strongest ones of acs [coils z y x] (Buehrer, MRM 2007).

    The phase of an eigenvector, and with that of the image, is arbitrary. Here the first coil with at least half of a
    row's largest weight has a positive one: so that two scans of an object, and the same scan on two devices, have the
    same phase.
    """
    flat = acs.flatten(1)
    _, vectors = torch.linalg.eigh(flat @ flat.mH)
    rows = vectors.flip(1)[:, :coils].mH
    size = rows.abs()
    leading = (2 * size >= size.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    return rows * torch.sgn(rows.gather(1, leading)).conj()


def signal_operators(acs: Tensor, shape: tuple[int, int, int], sigma: float = 0.0) -> Tensor:
    """ESPIRiT's operator (Uecker et al., MRM 2014) at each point of a coarse grid.

    Coil signals that the calibration lines allow there have eigenvalue 1. The projector onto the signal space of
    k-space patches is folded into one C x C convolution kernel of side 2k-1, so its cost does not depend on the volume
    size and its memory is C^2 x grid^3.

    Args:
        acs: [coils z y x] fully sampled k-space centre, from cut_acs; the strongest coil should come first, as its
            phase becomes that of the maps.
        shape: (z, y, x) of the volume.
        sigma: noise level of acs, to separate signal from noise patches.

    Returns:
        Hermitian matrices [z y x coils coils], over the `widened` field of view.
    """
    coils = acs.shape[0]
    whole = (*shape[:2], widened(shape[2]))
    sides = [max(1, min(PATCH, (n + 1) // 3)) for n in acs.shape[1:]]
    signal = _signal_patches(acs, sides, sigma)
    full = [2 * k - 1 for k in sides]
    patches = signal.T.reshape(-1, coils, *sides)
    spectra = torch.fft.ifftn(patches, s=full, dim=(2, 3, 4), norm="forward").flatten(2)
    folded = torch.einsum("rcq,rdq->cdq", spectra, spectra.conj()) / float(torch.tensor(sides).prod())
    lags = torch.fft.fftn(folded.reshape(coils, coils, *full), dim=(2, 3, 4), norm="forward")
    lags = torch.fft.fftshift(lags, (2, 3, 4))
    coarse = [max(f, min(GRID, n)) for f, n in zip(full, whole)]
    lags = torch.fft.ifftshift(centre_crop_or_pad(lags, coarse), (2, 3, 4))
    return torch.fft.fftshift(torch.fft.ifftn(lags, dim=(2, 3, 4), norm="forward"), (2, 3, 4)).permute(2, 3, 4, 0, 1)


def maps_of(operators: Tensor, shape: tuple[int, int, int], home: torch.device | None = None) -> Tensor:
    """Coil maps [coils z y x] of `shape`, with root sum of squares 1.

    They are the dominant eigenvectors of signal_operators, interpolated, and kept at `home`, by default the device of
    `operators`, which may have no room for them.
    """
    _, vectors = dominant_eigenvectors(operators)
    maps = vectors.movedim(-1, 0)
    maps = maps * torch.exp(-1j * maps[:1].angle())
    whole = (*shape[:2], widened(shape[2]))
    fine = torch.empty((len(maps), *shape), dtype=maps.dtype, device=home or maps.device)
    energy = torch.zeros(shape, device=fine.device)
    for coil, field in enumerate(maps):  # one by one: the maps are the largest array of all
        fine[coil] = interpolate(field, shape, whole)
        energy += torch.view_as_real(fine[coil]).square().sum(-1)
    fine /= energy.sqrt().clamp_min(1e-6)
    return fine


def overlap(operators: Tensor, acs: Tensor) -> float:
    """Share of the object that lies over another part of it, for example where it exceeds the field of view.

    There two signals fit the coils.

    Args:
        operators: [z y x coils coils], signal_operators of `acs`.
        acs: [coils z y x], from cut_acs.

    Returns:
        0 to 1: near 0 for objects within the field of view, more the more of the object wraps around
        (tests/test_coils.py). Objects that end exactly at the edge of the field of view come in between, as the
        opposite edges meet there.
    """
    image = ifft(centre_crop_or_pad(acs, operators.shape[:3]), (1, 2, 3)).norm(dim=0)
    inside = operators[object_mask(image)]
    some = inside[:: max(1, -(-len(inside) // MATRICES_AT_ONCE))]
    second, _ = second_eigenvectors(some)
    return float((second > SECOND_SIGNAL).sum()) / max(1, len(some))


def second_maps(operators: Tensor, maps: Tensor) -> tuple[Tensor, int]:
    """Second set of coil maps for Sense.with_second, where two signals fit the coils, and its first readout position.

    Args:
        operators: [z y x coils coils], signal_operators.
        maps: the first set in Sense's frame [x coils z y], to which the second is made orthogonal.

    Returns:
        [positions coils z y] in the same frame, for the range of readout positions that have a second signal. Their
        root sum of squares falls from 1 to 0 as the second eigenvalue falls from 0.95 to 0.8
        (soft SENSE, Uecker et al., MRM 2014).
    """
    shape = (*maps.shape[2:], len(maps))
    whole = (*shape[:2], widened(shape[2]))
    values, vectors = second_eigenvectors(operators)
    vectors = vectors * torch.exp(-1j * vectors[..., :1].angle())

    def frame(field: Tensor) -> Tensor:
        return torch.fft.ifftshift(interpolate(field, shape, whole).permute(2, 0, 1), (1, 2)).to(maps.device)

    weight = frame(((values - RAMP[0]) / (RAMP[1] - RAMP[0])).clamp(0, 1)) * (maps != 0).any(dim=1)
    there = weight.amax(dim=(1, 2)).nonzero()[:, 0].tolist() or [0]
    used = slice(there[0], there[-1] + 1)
    own, weight = maps[used], weight[used]
    second = torch.empty_like(own)
    for coil in range(own.shape[1]):  # one by one, as in maps_of
        second[:, coil] = frame(vectors[..., coil])[used]
    common = torch.linalg.vecdot(own, second, dim=1)
    for coil in range(own.shape[1]):
        second[:, coil] -= own[:, coil] * common
    size = torch.linalg.vector_norm(second, dim=1).clamp_min(1e-6)
    return second.mul_((weight.sqrt() / size)[:, None]), used.start


def dominant_eigenvectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue [...] and its unit eigenvector [... n] of Hermitian positive semidefinite matrices [... n n].

    By repeated squaring (the power method, 2^SQUARINGS steps): only matrix products, which are fast on every device.
    The batched eigensolvers of GPUs refuse some 32,000 matrices at once, or process them one by one (pytorch issue
    183806). Where the two largest eigenvalues are equal, the vector is one from their span.
    """
    found = [_dominant(part) for part in matrices.reshape(-1, *matrices.shape[-2:]).split(MATRICES_AT_ONCE)]
    values, vectors = (torch.cat(parts) for parts in zip(*found))
    return values.reshape(matrices.shape[:-2]), vectors.reshape(matrices.shape[:-1])


def second_eigenvectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the second largest eigenvalue."""
    values, vectors = dominant_eigenvectors(matrices)
    rest = matrices - values[..., None, None] * vectors[..., :, None] * vectors[..., None, :].conj()
    return dominant_eigenvectors(rest)


def _dominant(matrices: Tensor) -> tuple[Tensor, Tensor]:
    power, tiny = matrices, torch.finfo(matrices.real.dtype).tiny
    for _ in range(SQUARINGS):
        # By the largest entry, not the trace: where there is no signal, rounding leaves a trace of about zero.
        power = power / power.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
        power = power @ power
    strongest = power.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    vectors = power.gather(-1, strongest[..., None, None].expand(*power.shape[:-1], 1))[..., 0]
    vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(tiny)
    return torch.linalg.vecdot(vectors, (matrices @ vectors[..., None])[..., 0]).real, vectors


def low_resolution_maps(kspace: Tensor, mask: Tensor) -> Tensor:
    """Fallback without ACS: smooth coil images divided by their root sum of squares [coils z y x].

    The phase of the first is taken off: otherwise they would contain the object's own phase, and with that take it from
    the image. They take the place of `kspace` [coils z y x].
    """
    window = [hann(n, kspace.device) ** 4 for n in mask.shape]
    smoothing = (window[0][:, None] * window[1] * (mask > 0))[..., None]
    for coil in kspace:  # one by one, to avoid further arrays of all coils
        coil.copy_(ifft(coil * smoothing, (0, 1)))
    turn = torch.where(kspace[0] == 0, 1, torch.sgn(kspace[0]).conj())
    return kspace.mul_(turn / kspace.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny))


def _signal_patches(acs: Tensor, sides: list[int], sigma: float) -> Tensor:
    """Orthonormal basis [coils*patch, rank] of the k-space patches that stand out from the noise."""
    windows = acs
    for axis, k in enumerate(sides, start=1):
        windows = windows.unfold(axis, k, 1)
    rows = windows.permute(1, 2, 3, 0, 4, 5, 6).reshape(-1, acs.shape[0] * sides[0] * sides[1] * sides[2])
    # Of few patches with many entries (many coils), the products with each other have the same nonzero eigenvalues.
    few = rows.shape[0] < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows.conj() @ rows.T if few else rows.T @ rows.conj())
    noise_edge = 2 * sigma**2 * (rows.shape[0] ** 0.5 + rows.shape[1] ** 0.5) ** 2
    keep = values > max(noise_edge, 1e-4 * float(values[-1]))
    keep[-1] = True
    signal = vectors[:, keep]
    if few:
        signal = rows.T @ signal
        signal /= signal.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    return signal
