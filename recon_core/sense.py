"""The measurement operator A = mask . FFT(z, y) . coil maps, on data whose readout is already an image axis.

The readout of a Cartesian scan is fully sampled, so it is transformed once while gathering and A splits
into one 2D problem per readout position. Internally everything is in the "frame" [x z y], with the image
and k-space centres rolled to index 0, so that no loop contains a shift or a readout FFT.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .cg import conjugate_gradient

WORKING_SET_BYTES = 8 << 20


class Sense:
    """SENSE operator (Pruessmann et al., MRM 1999) with unitary FFT; its norm is at most 1.

    Args:
        coil_maps: [coils z y x] complex64, root sum of squares over coils 1 or 0.
        mask: [z y] real sampling weights in [0, 1]; 0 where nothing was acquired.
        device: where to compute, if not where the maps are; the maps are then read in parts.

    Raises:
        ValueError: if shapes disagree, the mask is empty or the coil maps are not finite.
    """

    def __init__(self, coil_maps: Tensor, mask: Tensor, device: str | torch.device | None = None):
        if coil_maps.ndim != 4 or mask.shape != coil_maps.shape[1:3]:
            raise ValueError(
                f"expected coil maps [coils z y x] and a mask [z y], got {tuple(coil_maps.shape)} and {tuple(mask.shape)}"
            )
        if not bool(mask.any()):
            raise ValueError("the sampling mask is empty: no line of k-space was acquired")
        if not bool(torch.isfinite(coil_maps.sum())):
            raise ValueError("the coil maps hold NaN or infinity")
        self.shape = tuple(coil_maps.shape[1:])
        coils, z, y, x = coil_maps.shape
        self.maps = torch.empty((x, coils, z, y), dtype=coil_maps.dtype, device=coil_maps.device)
        for coil, field in enumerate(coil_maps):  # one by one, to avoid a third copy of the largest array
            self.maps[:, coil] = torch.fft.ifftshift(field.permute(2, 0, 1), (1, 2))
        self.weights = torch.fft.ifftshift(mask.to(self.maps.real.dtype), (0, 1)).to(device or coil_maps.device)
        self.chunk = self._planes_at_once()

    @property
    def device(self) -> torch.device:
        """Where the operator computes."""
        return self.weights.device

    @property
    def coils(self) -> int:
        """Number of coils."""
        return self.maps.shape[1]

    @property
    def mask(self) -> Tensor:
        """Sampling weights [z y], as given."""
        return torch.fft.fftshift(self.weights)

    @property
    def sampled(self) -> Tensor:
        """[z y], true where anything was acquired."""
        return self.mask > 0

    @property
    def support(self) -> Tensor:
        """[z y x], true where any coil has sensitivity."""
        return self.from_frame((self.maps != 0).any(dim=1))

    def to(self, device: str | torch.device) -> Sense:
        """The same operator with its maps on `device`, computing there."""
        there = object.__new__(Sense)
        there.shape, there.maps, there.weights = self.shape, self.maps.to(device), self.weights.to(device)
        there.chunk = there._planes_at_once()
        return there

    def with_mask(self, mask: Tensor) -> Sense:
        """The same coil maps, not copied, with another mask [z y]; ValueError if it is empty."""
        if not bool(mask.any()):
            raise ValueError("the sampling mask is empty: no line of k-space was acquired")
        other = copy.copy(self)
        other.weights = torch.fft.ifftshift(mask.to(self.weights), (0, 1))
        return other

    def coil_maps(self) -> Tensor:
        """[coils z y x], as given."""
        return torch.fft.fftshift(self.maps, (2, 3)).permute(1, 2, 3, 0)

    def to_frame(self, volume: Tensor) -> Tensor:
        """[z y x] to the internal frame [x z y]."""
        return torch.fft.ifftshift(volume.permute(2, 0, 1), (1, 2)).contiguous()

    def from_frame(self, frame: Tensor) -> Tensor:
        """Internal frame [x z y] to [z y x]."""
        return torch.fft.fftshift(frame, (1, 2)).permute(1, 2, 0).contiguous()

    def forward(self, volume: Tensor) -> Tensor:
        """Weighted k-space [coils z y x] (x in image space) of a volume [z y x]."""
        frame = self.to_frame(volume)
        out = torch.empty_like(self.maps)
        for part in self._parts():
            out[part] = torch.fft.fft2(self._maps(part) * frame[part, None], norm="ortho").mul_(self.weights)
        return torch.fft.fftshift(out, (2, 3)).permute(1, 2, 3, 0).contiguous()

    def adjoint(self, kspace: Tensor) -> Tensor:
        """Volume [z y x] of k-space [coils z y x] (x in image space); applies the weights."""
        out = torch.empty(self.maps.shape[:1] + self.maps.shape[2:], dtype=self.maps.dtype, device=self.device)
        for part in self._parts():
            block = torch.fft.ifftshift(kspace[..., part].to(self.device).permute(3, 0, 1, 2), (2, 3)) * self.weights
            out[part] = torch.linalg.vecdot(self._maps(part), torch.fft.ifft2(block, norm="ortho"), dim=1)
        return self.from_frame(out)

    def normal(self, volume: Tensor) -> Tensor:
        """adjoint(forward(volume)), [z y x]."""
        return self.from_frame(self.normal_frame(self.to_frame(volume)))

    def normal_frame(self, frame: Tensor) -> Tensor:
        """The same in the internal frame [x z y]; this is the inner loop of every method."""
        out = torch.empty_like(frame)
        squared = self.weights.square() / self.weights.numel()  # includes the scaling of both transforms, which saves a pass over all coils
        for part in self._parts():
            maps = self._maps(part)
            block = torch.fft.fft2(maps * frame[part, None]).mul_(squared)
            out[part] = torch.linalg.vecdot(maps, torch.fft.ifft2(block, norm="forward"), dim=1)
        return out

    def solve(self, b: Tensor, rho: float, start: Tensor | None = None, iterations: int = 10) -> Tensor:
        """Approximate (A^H A + rho I)^-1 b by conjugate gradients; b and start are volumes [z y x]."""
        frame = conjugate_gradient(
            lambda v: self.normal_frame(v).add_(v, alpha=rho),
            self.to_frame(b),
            None if start is None else self.to_frame(start),
            iterations,
        )
        return self.from_frame(frame)

    def _planes_at_once(self) -> int:
        plane = self.maps[0].numel() * self.maps.element_size()
        return max(1, (WORKING_SET_BYTES * (64 if self.device.type == "cuda" else 1)) // plane)

    def _maps(self, part: slice) -> Tensor:
        return self.maps[part].to(self.device)

    def _parts(self):
        planes = self.maps.shape[0]
        return [slice(i, min(i + self.chunk, planes)) for i in range(0, planes, self.chunk)]
