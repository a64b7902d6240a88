"""The solver's input: data, operator, noise level and intensity scale, computed from gathered k-space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .coils import MIN_ACS, compression_matrix, cut_acs, find_acs, folding, in_phase, low_resolution_maps, maps_of, overlap, signal_operators, too_few, widened
from .fft import centre_crop_or_pad, fft, ifft
from .noise import whiten
from .scale import evenly, intensity_scale
from .sense import Sense
from .slices import usable_axes

QUIET = 1.5  # noise of the scan over that of its noise lines above which these are not trusted
WORK_ARRAYS = 3  # data, maps and a temporary copy of the maps
SINGLE_VOLUMES = 14  # besides these: 12 coils of 320 x 320 x 256 peak at 9.4 GiB (tests/benchmarks/chain_speed.py)
KEPT_ARRAYS = 2  # data that are kept, and a part of them
DARK, DARKEST, SEEN = 0.025, 0.005, 15.0  # share of the bright signal, the same at the highest SNR, multiple of the noise: where the object ends
WRAPS, WRAPS_BADLY = 0.08, 0.4  # share of the object that lies over other parts of it: reported, and reported with CAUTION
PHASE_GAIN = 1.2  # times as much of the data must another phase of the calibration explain
PHASE_ROUNDS, PHASE_RHO, PHASE_ITERATIONS = 2, 1e-3, 10  # of the conjugate gradients that show the phase of a scan whose calibration has another
TRUSTED = 2.0  # times the median count: what some lines gain from more averages, coil-map errors in them cost all others


@dataclass
class Measurement:
    """One volume's inverse problem: A^H y, A, and what is known about noise and geometry.

    `adjoint` is A^H y [z y x]; `energy` is ||y||^2, for the data misfit without keeping y; `sigma` is the noise of y per
    real part, `sigma_shown` the upper bound that the scan's own outer lines give for it (0: unknown); `mixing`
    [virtual coils coils] made y from the coils. `lines` is y [virtual coils z y x] itself, kept where the prior may learn
    from it (pupil.py) or the error is to be estimated (jackknife.py). Where the scan's own lines have no fully sampled
    centre, as in regular undersampling with separate calibration, `calibrated` [z y x] is the low-resolution image of that
    calibration, times the factor that makes it explain y best, and `tissue` is its brightness: there A^H y is R times too
    dark, and conjugate gradients recover the low frequencies last.
    """

    operator: Sense
    adjoint: Tensor
    energy: float
    samples: int
    sigma: float
    voxel_mm: tuple[float, float, float]
    acs: tuple[int, int]
    mixing: Tensor | None = None
    sigma_known: bool = True
    sigma_shown: float = 0.0
    warnings: list[str] = field(default_factory=list)
    lines: Tensor | None = None
    calibrated: Tensor | None = None
    tissue: float | None = None

    def to(self, device: str | torch.device) -> Measurement:
        """The same measurement on `device`."""
        lines, calibrated = (None if some is None else some.to(device) for some in (self.lines, self.calibrated))
        return replace(self, operator=self.operator.to(device), adjoint=self.adjoint.to(device), lines=lines, calibrated=calibrated)

    def part(self, chosen: Tensor, there: slice | None = None) -> Measurement:
        """The scan with only the `chosen` lines [z y], at the readout positions `there` (all by default); needs `lines`."""
        weights = self.operator.mask * chosen.to(self.operator.device)
        lines = (self.lines if there is None else self.lines[..., there]) * chosen[..., None].to(self.lines.device)
        operator = self.operator.with_mask(weights) if there is None else Sense(self.operator.coil_maps()[..., there], weights, self.operator.device)
        samples = int((weights > 0).sum()) * len(lines) * lines.shape[-1]
        calibrated = self.calibrated if self.calibrated is None or there is None else self.calibrated[..., there]
        return replace(self, operator=operator, adjoint=operator.adjoint(lines), energy=energy_of(lines), samples=samples, lines=lines, calibrated=calibrated)

    def misfit(self, volume: Tensor) -> float:
        """Root of ||A x - y||^2 / samples over sigma sqrt(2): 1 when x explains y down to the noise."""
        return (max(0.0, self.residual(volume)) / (2 * self.samples)) ** 0.5 / self.sigma

    def residual(self, volume: Tensor) -> float:
        """||A x - y||^2 = ||y||^2 + Re x^H (A^H A x - 2 A^H y), which nearly cancels: summed in double precision."""
        return self.energy + inner(volume, self.operator.normal(volume) - 2 * self.adjoint)

    def noise_level(self, image: Tensor) -> float:
        """Noise of y per real part; if it was estimated, at most what `image` [z y x] leaves unexplained.

        The estimate is too high at high SNR. A least-squares image explains at most one sample per voxel of the
        support, so residual / sqrt(samples - voxels) bounds the noise, often more tightly with several coils.
        """
        free = self.samples - int(self.operator.support.sum())
        if self.sigma_known or free <= 0:
            return self.sigma
        return self.sigma * min(1.0, self.misfit(image) * (self.samples / free) ** 0.5)

    def excess_noise(self, image: Tensor) -> float:
        """Noise of the scan over that of its noise lines, from what a least-squares `image` [z y x] leaves unexplained; 1 if they agree.

        Trusting noise lines of another receiver gain or bandwidth would mean fitting noise. The scan's outer lines must
        confirm the excess: they alone also contain fine detail, the residual alone spikes, motion and coil-map errors.
        """
        if not self.sigma_known or self.sigma_shown <= QUIET * self.sigma or self.sigma == 0:
            return 1.0
        found = min(self.misfit(image), self.sigma_shown / self.sigma)
        return found if found > QUIET else 1.0

    def brightness(self, image: Tensor) -> float:
        """Tissue brightness: `tissue` if the calibration gave it, else that of `image` [z y x]."""
        return intensity_scale(image, self.voxel_mm) if self.tissue is None else self.tissue

    def in_tissue_units(self, image: Tensor) -> tuple[float, float, Tensor, Tensor]:
        """(scale, noise level / scale, image / scale, A^H y / scale), in the prior's units; scale is the brightness of `image` [z y x]."""
        scale = self.brightness(image)
        return scale, self.noise_level(image) / scale, image / scale, self.adjoint / scale


def measure(
    kspace: Tensor,
    counts: Tensor,
    voxel_mm: tuple[float, float, float],
    noise: Tensor | None = None,
    calibration: tuple[Tensor, Tensor] | None = None,
    *,
    coils: int = 12,
    device: str | torch.device = "cpu",
    phase_reference: Tensor | None = None,
    louder: float = 1.0,
    keep_lines: bool = False,
    brightness: float = 1.0,
    on_host: bool = False,
) -> Measurement:
    """Prewhiten, average, compress coils and estimate coil maps.

    Args:
        kspace: [coils z y x] complex64 sums over averages, x in image space, k = 0 at n//2; may stay on the host.
        counts: [z y] number of lines summed.
        voxel_mm: voxel size of the encoded grid along z, y, x.
        noise: [coils samples] noise samples, if there are noise lines.
        calibration: separate calibration (kspace, counts) on the same grid, if there is one.
        coils: maximum number of virtual coils.
        device: where to compute.
        phase_reference: [coils] the combination of coils whose map is to be real: the first row of another volume's
            `mixing`, to make phases comparable with that volume's; by default that of this volume.
        louder: noise of the scan over that of its noise lines (Measurement.excess_noise).
        keep_lines: keep `lines` of volumes too, to estimate the error (jackknife.py).
        brightness: factor on the image's units, which noise lines make those of the noise, so that volumes of different dwell times can be compared.
        on_host: keep the arrays of all coils in host memory, read by the device in parts; by default only if they do not
            seem to fit.

    Raises:
        ValueError: if nothing was acquired, or samples are not finite or too large to square.
    """
    if not bool(counts.any()):
        raise ValueError("no imaging line was acquired: nothing to reconstruct")
    if not _finite(kspace, counts):
        raise ValueError("the k-space holds NaN, infinity or numbers too large to square; the scan cannot be reconstructed")
    calibration, of_no_use = _usable(calibration)
    trusted = counts.clamp_max(TRUSTED * float(counts[counts > 0].median()))
    most = float(trusted.max())
    mask = (trusted / most).sqrt()
    factor = mask / counts.clamp_min(1)
    reference, lines = (kspace, counts) if calibration is None else calibration
    reference_factor = 1 / lines.clamp_min(1)  # not `factor`: its weights would blur the relations between neighbouring samples that give the maps
    whitened = whiten(kspace, mask, factor, most, noise, louder, brightness)
    mixing, warnings = whitened.matrix, [*of_no_use, *whitened.warnings]
    acs, acs_size, averaged = _calibration_block(reference, lines, reference_factor, mixing)
    if len(mixing) > 1:
        compression = compression_matrix(acs if acs.numel() else _mix(mixing, _innermost(kspace, counts)), min(coils, len(mixing)))
        mixing, acs = compression @ mixing, _mix(compression, acs)
    if on_host:
        warnings.append("the GPU's memory ran short: coil maps stay in the host's memory")
    home = torch.device("cpu") if on_host else _home(mixing.shape[0], kspace.shape[1:], torch.device(device), warnings, WORK_ARRAYS + KEPT_ARRAYS * keep_lines)
    data = _mix_lines(mixing, kspace, factor, home)
    all_lines = lambda: _mix_lines(mixing, reference, reference_factor * (lines > 0), home)  # noqa: E731
    maps, support, doubts = _maps(acs.to(device), whitened.sigma * averaged, acs_size, (len(mixing), *kspace.shape[1:]), all_lines, lines.to(home))
    warnings += doubts
    if phase_reference is not None and len(mixing) > 1 and not torch.equal(phase_reference, mixing[0]):
        maps = in_phase(maps, mixing, phase_reference)
    operator = Sense(maps.mul_(support), mask, device)
    samples = int((mask > 0).sum()) * data.shape[0] * data.shape[-1]
    sigma, shown = (level / most**0.5 for level in (whitened.sigma, whitened.shown))
    kept = data if keep_lines or len(usable_axes(operator.shape)) == 1 else None
    adjoint = operator.adjoint(data)
    calibrated = _calibrated(operator, adjoint, acs) if calibration is not None and too_few(find_acs(counts), counts.shape) else None
    tissue = None if calibrated is None else intensity_scale(calibrated, voxel_mm)
    return Measurement(operator, adjoint, energy_of(data), samples, sigma, voxel_mm, acs_size, mixing, whitened.known, shown, warnings, kept, calibrated, tissue)


def inner(a: Tensor, b: Tensor) -> float:
    """Real part of a^H b for [z y x], plane by plane in double precision: in single precision, summing 10^7 products loses three digits."""
    planes = zip(torch.view_as_real(a), torch.view_as_real(b))
    return sum(torch.stack([(p * q).sum(dtype=torch.float64) for p, q in planes]).tolist())


def energy_of(lines: Tensor) -> float:
    """||y||^2 of lines [coils z y x], plane by plane in double precision."""
    return sum(torch.stack([torch.view_as_real(plane).double().square().sum() for plane in lines.unbind(1)]).tolist())


def _finite(kspace: Tensor, counts: Tensor) -> bool:
    """Whether all samples of the acquired lines are finite and can be squared; coils together, one plane at a time."""
    return all(bool(torch.isfinite(lines.sum(dim=0).abs().square().sum())) for _, _, lines in _acquired(kspace, counts))


def _usable(calibration: tuple[Tensor, Tensor] | None) -> tuple[tuple[Tensor, Tensor] | None, list[str]]:
    """The separate calibration if maps can be made from it, else None; and warnings that say why not."""
    if calibration is None:
        return None, []
    if not _finite(*calibration):
        return None, ["the calibration lines hold NaN, infinity or numbers too large to square and were left out"]
    if not any(bool(lines.any()) for _, _, lines in _acquired(*calibration)):
        return None, ["the calibration lines hold only zeros and were left out"]
    return calibration, []


def _calibration_block(reference: Tensor, lines: Tensor, factor: Tensor, mixing: Tensor) -> tuple[Tensor, tuple[int, int], float]:
    """Calibration lines of the virtual coils [coils z y x], their number (z, y), and their noise relative to a single line."""
    size = find_acs(lines)
    if not size[0]:
        return torch.zeros((len(mixing), 0, 0, 0), dtype=reference.dtype), size, 1.0
    block = cut_acs(reference, size)
    averaged = centre_crop_or_pad(factor * lines.sqrt(), size).square().mean().sqrt()
    return _mix(mixing, block * centre_crop_or_pad(factor, block.shape[1:3])[..., None]), size, float(averaged)


def _calibrated(operator: Sense, adjoint: Tensor, acs: Tensor) -> Tensor | None:
    """Image [z y x] of the calibration lines, with the factor and the smooth phase that make it explain y best; None if there is none.

    The calibration may have another contrast, gain or echo time, and with that another phase: it is that of what the scan itself
    shows by conjugate gradients, at the resolution of the calibration. Only its own part of k-space is compared with y.
    """
    if not acs.numel():
        return None
    image, maps = torch.zeros_like(adjoint), operator.coil_maps()
    for coil, of_coil in zip(acs, maps):
        image += of_coil.to(image.device).conj() * _low_resolution(coil.to(image.device), operator.shape)
    (best, most), start = _fitted(operator, image, adjoint), None
    for _ in range(PHASE_ROUNDS):
        seen = operator.solve(adjoint, PHASE_RHO, start, PHASE_ITERATIONS)
        turned, explained = _fitted(operator, image * torch.sgn(_blurred(seen * image.conj(), acs.shape[1:3])), adjoint)
        best, most = (turned, explained) if explained > PHASE_GAIN * most else (best, most)
        start = best
    return best if most else None


def _fitted(operator: Sense, image: Tensor, adjoint: Tensor) -> tuple[Tensor, float]:
    """`image` [z y x] times the complex factor that makes A x explain y best, and how much of ||y||^2 that explains."""
    energy = inner(image, operator.normal(image))
    factor = complex(torch.vdot(image.flatten(), adjoint.flatten())) / energy if energy else 0
    return factor * image, abs(factor) ** 2 * energy


def _blurred(volume: Tensor, lines: Sequence[int]) -> Tensor:
    """[z y x] with a Hann window over so many central lines (z, y) of its k-space."""
    sides = [min(pair) for pair in zip(lines, volume.shape)]
    window = _hann(sides[0], volume)[:, None] * _hann(sides[1], volume)
    return ifft(fft(volume, (0, 1)) * centre_crop_or_pad(window, volume.shape[:2])[..., None], (0, 1))


def _low_resolution(coil: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Image [z y x] of size `shape` from a block [z y x] made by cut_acs."""
    return centre_crop_or_pad(ifft(centre_crop_or_pad(coil, (*shape[:2], widened(shape[2]))), (0, 1, 2)), shape)


def _innermost(kspace: Tensor, counts: Tensor, lines: int = 64) -> Tensor:
    """The acquired lines nearest the k-space centre [coils lines x], for scans that lack the centre itself."""
    there = (counts > 0).nonzero()
    middle = torch.tensor([n // 2 for n in counts.shape], device=there.device)
    z, y = there[(there - middle).square().sum(1).argsort(stable=True)[:lines]].T
    return kspace[:, z, y] / counts[z, y, None]


def _mix(matrix: Tensor, data: Tensor) -> Tensor:
    """`matrix` [virtual coils coils] times `data` [coils ...]."""
    return (matrix @ data.flatten(1)).reshape(len(matrix), *data.shape[1:])


def _mix_lines(matrix: Tensor, kspace: Tensor, factor: Tensor, home: torch.device) -> Tensor:
    """matrix @ (kspace * factor) [virtual coils z y x] at `home`; only lines with a nonzero factor are read and moved."""
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


def _home(coils: int, shape: tuple[int, int, int], device: torch.device, warnings: list[str], arrays: int = WORK_ARRAYS) -> torch.device:
    """Where to keep the arrays of all coils: on the device if they fit, else on the host, read by the device in parts."""
    if device.type != "cuda":
        return device
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by earlier volumes, available to this one
    needed, free = 8 * (arrays * coils + SINGLE_VOLUMES) * math.prod(shape), torch.cuda.mem_get_info(device)[0] + cached
    if needed <= free:
        return device
    warnings.append(f"the GPU has {free / 2**30:.1f} GiB free, {coils} coils need {needed / 2**30:.1f} GiB: coil maps stay in the host's memory")
    return torch.device("cpu")


def _maps(acs: Tensor, sigma: float, size: tuple[int, int], whole: tuple[int, ...], all_lines: Callable[[], Tensor], counts: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Coil maps of size `whole` (coils, z, y, x) and support [z y x], by the best method that the calibration lines allow, and warnings.

    If there are too few calibration lines, `all_lines` gives k-space of that size with all lines there are, in numbers
    `counts` [z y]; maps and support are on the device of `counts`.
    """
    shape, home = whole[1:], counts.device
    everywhere = torch.ones(shape, device=home)
    if whole[0] == 1:
        return torch.ones(whole, dtype=acs.dtype, device=home), everywhere, []
    if too_few(size, shape):
        few = (
            f"calibration lines cover only {size[0]} x {size[1]} (z x y) of the k-space centre, "
            f"{MIN_ACS} x {MIN_ACS} are wanted: coil maps were made from a smoothed image and may be poor"
        )
        folded = folding(counts)
        lattice = f"CAUTION: the undersampling is regular and no calibration separates the coils: the image is aliased {folded}-fold"
        return low_resolution_maps(all_lines(), counts), everywhere, [few] + [lattice] * (folded > 1)
    operators = signal_operators(acs, shape, sigma)
    return maps_of(operators, shape, home), _support(acs, shape, sigma).to(home), _wraps(overlap(operators, acs))


def _wraps(share: float) -> list[str]:
    """Warnings about an object of which a `share` lies over another part of it."""
    if share < WRAPS:
        return []
    wraps = f"about {share:.0%} of the object seems to lie over other parts of it: it reaches beyond the field of view along a phase encode, and one set of coil maps cannot describe both"
    return [f"{'CAUTION: ' * (share > WRAPS_BADLY)}{wraps}"]


def _support(acs: Tensor, shape: tuple[int, int, int], sigma: float) -> Tensor:
    """Where the low-resolution calibration image is not dark, grown by 2 voxels: leaves out air, keeps faint tissue.

    Maps that are zero in air remove a third to a half of the unknowns (about 1 dB for CG-SENSE). Dark means below DARK times
    the bright signal; if the noise is low enough (`sigma` of `acs` per real part), below SEEN times the noise instead, because
    a vial or deep tissue at 2 % of the bright signal may be real. A wider support costs CG-SENSE a few tenths of a dB where
    the air around real heads contains ghosts, slice diffusion less.
    """
    energy, window = torch.zeros(shape, device=acs.device), _window(acs)
    for coil in acs * window:  # one by one, to hold a single image in memory
        energy += _low_resolution(coil, shape).abs().square()
    blurred = energy.sqrt()
    noise = sigma * (2 * len(acs) * float(window.square().sum()) / (math.prod(shape[:2]) * widened(shape[2]))) ** 0.5
    bright = float(torch.quantile(evenly(blurred, 100_000), 0.99))
    inside = blurred > min(DARK * bright, max(SEEN * noise, DARKEST * bright))
    grow = [min(5, n if n % 2 else n - 1) for n in inside.shape]
    grown = F.max_pool3d(inside[None, None].float(), grow, stride=1, padding=[g // 2 for g in grow])
    return grown[0, 0]


def _window(acs: Tensor) -> Tensor:
    out = torch.ones(acs.shape[1:], device=acs.device)
    for axis, n in enumerate(acs.shape[1:]):
        out = out * _hann(n, acs).reshape([-1 if i == axis else 1 for i in range(3)])
    return out


def _hann(length: int, like: Tensor) -> Tensor:
    return torch.hann_window(length + 2, periodic=False, device=like.device)[1:-1]
