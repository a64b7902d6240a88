"""The measurement operator A = mask . FFT(z, y) . coil maps, on data whose readout is already an image axis.

The readout of a Cartesian scan is fully sampled, so it is transformed once while gathering and A splits
into one 2D problem per readout position. Internally everything is in the "frame" [x z y], with the image
and k-space centres rolled to index 0, so that no loop contains a shift or a readout FFT.

Where an object reaches beyond the field of view, two of its parts lie over each other, and no single set of coil maps
describes both. There the operator takes a second set ("soft" SENSE: Uecker et al., MRM 2014). The second parts are
further readout positions of the volume, behind those of the scan, so that all methods treat them like other anatomy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

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
                "expected coil maps [coils z y x] and a mask [z y], "
                f"got {tuple(coil_maps.shape)} and {tuple(mask.shape)}"
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
        self.second, self.shared = self.maps[:0], slice(0, 0)

    @property
    def device(self) -> torch.device:
        """Where the operator computes."""
        return self.weights.device

    @property
    def matrix(self) -> tuple[int, int, int]:
        """(z, y, x) of the k-space and of an image; `shape` is that of a volume, with the second parts."""
        return (*self.shape[:2], len(self.maps))

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
        return self._joined((self.maps != 0).any(dim=1), (self.second != 0).any(dim=1))

    def to(self, device: str | torch.device) -> Sense:
        """The same operator with its maps on `device`, computing there."""
        there = copy.copy(self)
        there.maps, there.second, there.weights = self.maps.to(device), self.second.to(device), self.weights.to(device)
        there.chunk = there._planes_at_once()
        return there

    def with_mask(self, mask: Tensor) -> Sense:
        """The same coil maps, not copied, with another mask [z y]; ValueError if it is empty."""
        if not bool(mask.any()):
            raise ValueError("the sampling mask is empty: no line of k-space was acquired")
        other = copy.copy(self)
        other.weights = torch.fft.ifftshift(mask.to(self.weights), (0, 1))
        return other

    def with_second(self, maps: Tensor, first: int) -> Sense:
        """The same coil maps, not copied, and a second set for the readout positions from `first` on.

        Args:
            maps: [positions coils z y] in the internal frame, orthogonal to the first set in each voxel, with a norm of
                at most 1.
        """
        other = copy.copy(self)
        other.second, other.shared = maps, slice(first, first + len(maps))
        other.shape = (*self.shape[:2], len(self.maps) + len(maps))
        return other

    def coil_maps(self) -> Tensor:
        """[coils z y x], as given: the first set."""
        return torch.fft.fftshift(self.maps, (2, 3)).permute(1, 2, 3, 0)

    def to_frame(self, volume: Tensor) -> Tensor:
        """[z y x] to the internal frame [x sets z y]."""
        planes = torch.fft.ifftshift(volume.permute(2, 0, 1), (1, 2))
        if not len(self.second):
            return planes[:, None].contiguous()
        frame = planes.new_zeros((len(self.maps), 2, *planes.shape[1:]))
        frame[:, 0], frame[self.shared, 1] = planes[: len(self.maps)], planes[len(self.maps) :]
        return frame

    def from_frame(self, frame: Tensor) -> Tensor:
        """Internal frame [x sets z y] to [z y x]."""
        return self._joined(frame[:, 0], frame[self.shared, -1])

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        """Volume [z y x] of the planes [positions z y] of both sets in the internal frame."""
        return torch.fft.fftshift(torch.cat([first, second]), (1, 2)).permute(1, 2, 0).contiguous()

    def overlaid(self, volume: Tensor) -> Tensor:
        """The image of a volume: parts that lie over each other as their root sum of squares.

        It has the phase of the first part, of the second where the first is zero.
        """
        if not len(self.second):
            return volume
        image, second = volume[..., : len(self.maps)].clone(), volume[..., len(self.maps) :]
        norm = torch.fft.fftshift(torch.linalg.vector_norm(self.second, dim=1), (1, 2)).permute(1, 2, 0)
        first, second = image[..., self.shared], second * norm.to(volume.device)
        phase = torch.where(first == 0, torch.sgn(second), torch.sgn(first))
        image[..., self.shared] = torch.hypot(first.abs(), second.abs()) * phase
        return image

    def combined(self, coil_images: Iterable[Tensor]) -> Tensor:
        """Volume [z y x] of coil images [z y x], given one by one: their sum, each times its conjugate map."""
        total = None
        for coil, image in enumerate(coil_images):
            planes = torch.fft.ifftshift(image.to(self.maps.device).permute(2, 0, 1), (1, 2))
            parts = torch.cat([self.maps[:, coil].conj() * planes, self.second[:, coil].conj() * planes[self.shared]])
            total = parts if total is None else total.add_(parts)
        return self._joined(total[: len(self.maps)], total[len(self.maps) :]).to(self.device)

    def forward(self, volume: Tensor) -> Tensor:
        """Weighted k-space [coils z y x] (x in image space) of a volume [z y x]."""
        frame = self.to_frame(volume)
        out = torch.empty_like(self.maps)
        for part in self._parts():
            out[part] = torch.fft.fft2(self._coil_images(frame, part), norm="ortho").mul_(self.weights)
        return torch.fft.fftshift(out, (2, 3)).permute(1, 2, 3, 0).contiguous()

    def adjoint(self, kspace: Tensor) -> Tensor:
        """Volume [z y x] of k-space [coils z y x] (x in image space); applies the weights."""
        out = self.to_frame(torch.zeros(self.shape, dtype=self.maps.dtype, device=self.device))
        for part in self._parts():
            block = torch.fft.ifftshift(kspace[..., part].to(self.device).permute(3, 0, 1, 2), (2, 3)) * self.weights
            self._combine(torch.fft.ifft2(block, norm="ortho"), part, out)
        return self.from_frame(out)

    def normal(self, volume: Tensor) -> Tensor:
        """adjoint(forward(volume)), [z y x]."""
        return self.from_frame(self.normal_frame(self.to_frame(volume)))

    def normal_frame(self, frame: Tensor) -> Tensor:
        """The same in the internal frame [x sets z y]; this is the inner loop of every method."""
        out = torch.zeros_like(frame) if len(self.second) else torch.empty_like(frame)
        # with the scaling of both transforms, which saves a pass over all coils
        squared = self.weights.square() / self.weights.numel()
        for part in self._parts():
            block = torch.fft.fft2(self._coil_images(frame, part)).mul_(squared)
            self._combine(torch.fft.ifft2(block, norm="forward"), part, out)
        return out

    def _coil_images(self, frame: Tensor, part: slice) -> Tensor:
        """Coil images [positions coils z y] of `part` of the readout positions of a frame [x sets z y]."""
        images = self.maps[part].to(self.device) * frame[part, :1]
        here, there = self._of_second(part)
        if here.stop > here.start:
            images[here].addcmul_(self.second[there].to(self.device), frame[part, 1:][here])
        return images

    def _combine(self, images: Tensor, part: slice, out: Tensor) -> None:
        """The adjoint of _coil_images, into `out` [x sets z y]."""
        out[part, 0] = torch.linalg.vecdot(self.maps[part].to(self.device), images, dim=1)
        here, there = self._of_second(part)
        if here.stop > here.start:
            out[part, 1][here] = torch.linalg.vecdot(self.second[there].to(self.device), images[here], dim=1)

    def _of_second(self, part: slice) -> tuple[slice, slice]:
        """The readout positions of `part` that have a second set, counted in `part` and in `second`."""
        start, stop = max(part.start, self.shared.start), min(part.stop, self.shared.stop)
        return slice(start - part.start, stop - part.start), slice(start - self.shared.start, stop - self.shared.start)

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

    def _parts(self):
        planes = self.maps.shape[0]
        return [slice(i, min(i + self.chunk, planes)) for i in range(0, planes, self.chunk)]
