"""The inverse problem that the methods solve: data, operator, noise level and intensity scale of one volume."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .scale import intensity_scale
from .sense import Sense

NO_TISSUE = 1e3  # times its brightness: noise at which there is none
QUIET = 1.5  # noise of the scan over that of its noise lines above which these are not trusted


class Reference(NamedTuple):
    """What one volume decides for all of its scan, so that their phases and brightness can be compared.

    `combination` [coils] is the one whose map is real; `coil_weights` [coils] are those of Whitening, None if noise
    lines were used; `sets` is the number of sets of coil maps.
    """

    combination: Tensor
    coil_weights: Tensor | None
    sets: int = 1


class TissueUnits(NamedTuple):
    """An image x [z y x], A^H y [z y x] and the noise level in the prior's units, times `scale` those of the data."""

    scale: float
    noise: float
    image: Tensor
    adjoint: Tensor


@dataclass
class Measurement:
    """One volume's inverse problem: A^H y, A, and what is known about noise and geometry.

    `adjoint` is A^H y [z y x]; `energy` is ||y||^2, for the data misfit without keeping y; `sigma` is the noise of y
    per real part, `sigma_bound` the upper bound that the scan's own outer lines give for it (0: unknown); `mixing`
    [virtual coils coils] made y from the coils. `lines` is y [virtual coils z y x] itself, kept where the prior may
    learn from it (pupil.py) or the error is to be estimated (jackknife.py). Where the scan's own lines have no fully
    sampled centre, as in regular undersampling with separate calibration, `calibrated` [z y x] is the low-resolution
    image of that calibration, times the factor that makes it explain y best, and `tissue` is its brightness: there
    A^H y is R times too dark, and conjugate gradients recover the low frequencies last. `coil_weights` [coils] are
    those of Reference.
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
    sigma_bound: float = 0.0
    warnings: list[str] = field(default_factory=list)
    lines: Tensor | None = None
    calibrated: Tensor | None = None
    tissue: float | None = None
    coil_weights: Tensor | None = None

    def to(self, device: str | torch.device) -> Measurement:
        """The same measurement on `device`."""
        lines, calibrated = (None if some is None else some.to(device) for some in (self.lines, self.calibrated))
        operator, adjoint = self.operator.to(device), self.adjoint.to(device)
        return replace(self, operator=operator, adjoint=adjoint, lines=lines, calibrated=calibrated)

    @property
    def reference(self) -> Reference:
        """For the other volumes of the scan."""
        return Reference(self.mixing[0].cpu(), self.coil_weights, 2 if len(self.operator.second) else 1)

    def part(self, chosen: Tensor, there: slice | None = None) -> Measurement:
        """The scan with only the `chosen` lines [z y], at readout positions `there` (all by default); needs `lines`."""
        mask = self.operator.mask * chosen.to(self.operator.device)
        lines = (self.lines if there is None else self.lines[..., there]) * chosen[..., None].to(self.lines.device)
        if there is None:
            operator = self.operator.with_mask(mask)
        else:
            operator = Sense(self.operator.coil_maps()[..., there], mask, self.operator.device)
        samples = int((mask > 0).sum()) * len(lines) * lines.shape[-1]
        calibrated = self.calibrated if self.calibrated is None or there is None else self.calibrated[..., there]
        return replace(
            self,
            operator=operator,
            adjoint=operator.adjoint(lines),
            energy=energy_of(lines),
            samples=samples,
            lines=lines,
            calibrated=calibrated,
        )

    def misfit(self, volume: Tensor) -> float:
        """Root of ||A x - y||^2 / samples over sigma sqrt(2): 1 when x explains y down to the noise."""
        return (max(0.0, self.residual(volume)) / (2 * self.samples)) ** 0.5 / self.sigma

    def residual(self, volume: Tensor) -> float:
        """||A x - y||^2 = ||y||^2 + Re x^H (A^H A x - 2 A^H y), which nearly cancels: summed in double precision."""
        return self.energy + inner(volume, self.operator.normal(volume) - 2 * self.adjoint)

    def image_of(self, volume: Tensor) -> Tensor:
        """The image [z y x] of `volume` x, times the real factor that makes A x explain y best.

        `volume` may have second parts (see Sense). What regularisation takes from all of an image, 1 / (1 + lambda)
        where k-space is fully sampled, depends on the noise: without the factor, T2 measured from several echoes would
        come out too short.
        """
        energy = inner(volume, self.operator.normal(volume))
        factor = inner(volume, self.adjoint) / energy if energy else 1.0
        return self.operator.overlaid(factor * volume if factor > 0 else volume)

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
        """Noise of the scan over that of its noise lines; 1 if they agree.

        It is found from what a least-squares `image` [z y x] leaves unexplained. Trusting noise lines of another
        receiver gain or bandwidth would mean fitting noise. The scan's outer lines must confirm the excess: they alone
        also contain fine detail, the residual alone spikes, motion and coil-map errors.
        """
        if not self.sigma_known or self.sigma_bound <= QUIET * self.sigma or self.sigma == 0:
            return 1.0
        found = min(self.misfit(image), self.sigma_bound / self.sigma)
        return found if found > QUIET else 1.0

    def brightness(self, image: Tensor) -> float:
        """Tissue brightness: `tissue` if the calibration gave it, else that of `image` [z y x]."""
        return intensity_scale(image, self.voxel_mm) if self.tissue is None else self.tissue

    def in_tissue_units(self, image: Tensor) -> TissueUnits:
        """`image` [z y x], A^H y and the noise level over the brightness of `image`.

        Raises:
            ValueError: if there is no tissue: without lines of the centre of k-space, its brightness is rounding alone.
        """
        scale = self.brightness(image)
        noise = self.noise_level(image) / scale
        if noise > NO_TISSUE:
            raise ValueError(
                f"the noise is {noise:.2g} times as bright as the tissue: lines of the k-space centre are needed"
            )
        return TissueUnits(scale, noise, image / scale, self.adjoint / scale)


def inner(a: Tensor, b: Tensor) -> float:
    """Real part of a^H b for [z y x], plane by plane in double precision.

    In single precision, summing 10^7 products loses three digits.
    """
    planes = zip(torch.view_as_real(a), torch.view_as_real(b))
    return sum(torch.stack([(p * q).sum(dtype=torch.float64) for p, q in planes]).tolist())


def energy_of(lines: Tensor) -> float:
    """||y||^2 of lines [coils z y x], plane by plane in double precision."""
    return sum(torch.stack([torch.view_as_real(plane).double().square().sum() for plane in lines.unbind(1)]).tolist())
