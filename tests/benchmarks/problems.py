"""What the benchmarks reconstruct: volumes seen by simulated coils, and measured k-space with lines left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from measured import acquired_lines, cases
from torch import Tensor

from gadgets.simulation.scan import Noise, SimulateOptions, coil_images, load_object
from recon_core.cg_sense import cg_sense
from recon_core.fft import fft, ifft
from recon_core.measure import measure
from recon_core.measurement import Measurement
from recon_core.metrics import object_mask
from recon_core.scale import intensity_scale
from recon_core.sense import Sense
from recon_core.simulate import sampling_mask

EDGE = 0.1  # of the brightest voxel: where an object ends


@dataclass
class Problem:
    """A measurement with its answer.

    `truth` [z y x] is the magnitude without noise (or with the noise of the scan, if it was measured), `phased` the
    same as the measurement's coil maps combine it, None if unknown; `kspace` [coils z y x] is what the measurement was
    made of, whitened and mixed to virtual coils, x in image space: what peers are given; `left_out` is the rest of a
    measured scan's lines, None for a simulated one; `seed` is that of the sampling and of all that is simulated.
    """

    facts: dict
    measurement: Measurement
    truth: Tensor
    phased: Tensor | None
    inside: Tensor
    kspace: Tensor
    left_out: Tensor | None = None
    seed: int = 0

    def unseen(self, image: Tensor) -> float:
        """Error of the lines that were left out as `image` [z y x] predicts them, relative to them (noise included).

        Their noise is in no method's data, so that the smaller number is the better image; a reference that holds
        the noise of the lines in use as well favours images that keep it.
        """
        operator = self.measurement.operator
        rest = self.left_out.abs().sum(dim=(0, 3))[..., None] > 0
        predicted = fft(operator.coil_maps() * image.to(operator.device), (1, 2)).cpu() * rest
        return float((predicted - self.left_out).norm() / self.left_out.norm())

    @cached_property
    def floor(self) -> float:
        """`unseen` of the image that fits all lines best: their noise, and what the coil maps cannot explain.

        It fits a little of that noise, so that sqrt(unseen^2 - floor^2), the error of an image itself, comes out too
        large rather than too small.
        """
        maps, every = self.measurement.operator.coil_maps(), self.kspace + self.left_out
        operator = Sense(maps, (every.abs().sum(dim=(0, 3)) > 0).float())
        return self.unseen(operator.solve(operator.adjoint(every), 1e-6, iterations=60))


def simulated(
    path: Path,
    voxel_mm: float,
    coils: int,
    acceleration: float,
    snr: float,
    acs: int,
    seed: int = 0,
    readout: int | None = None,
    device: str = "cpu",
    keep_lines: bool = False,
    extent: tuple[float, float] | None = None,
    sets: int = 1,
) -> Problem:
    """A volume with phase as coils see it, cropped in k-space to `voxel_mm`, with correlated noise.

    Each coil sees it at the volume's own resolution. With `readout` only so many positions along x are kept, in the
    middle: the readout is fully sampled, so they are a scan of their own. With `extent`, the field of view is only so
    much of the object's own extent along z and y, and what lies beyond it wraps around.
    """
    data, size, _, _ = load_object(path)
    images, size = coil_images(data, size, SimulateOptions(voxel_mm=voxel_mm, coils=coils, seed=seed))
    images = images if extent is None else wrapped(images, extent)
    images = images[..., middle(images.shape[3], readout)].contiguous()
    truth = images.abs().square().sum(0).sqrt()
    noise = Noise(coils, intensity_scale(truth, size) / snr, seed)
    mask = torch.from_numpy(sampling_mask(truth.shape[:2], acceleration, "poisson", acs, seed))
    kspace = fft(images, (1, 2))
    kspace[:, ~mask] = 0
    kspace[:, mask] += torch.from_numpy(noise.draw(int(mask.sum()) * truth.shape[2]).reshape(coils, -1, truth.shape[2]))
    lines = torch.from_numpy(noise.draw(4096))
    measurement = measure(kspace, mask.float(), size, lines, device=device, keep_lines=keep_lines, sets=sets)
    mixing = measurement.mixing.cpu()
    phased = torch.linalg.vecdot(measurement.operator.coil_maps(), _mix(mixing, images).to(device), dim=0)
    facts = {
        "volume": path.name.split(".")[0],
        "voxel_mm": size_label(voxel_mm, size),
        "matrix": "x".join(map(str, reversed(truth.shape))),
        "coils": coils,
        "R": round(mask.numel() / int(mask.sum()), 1),
        "snr": snr,
        "acs": acs,
    }
    return Problem(facts, measurement, truth, phased, object_mask(truth), _mix(mixing, kspace), seed=seed)


def wrapped(images: Tensor, shares: tuple[float, float]) -> Tensor:
    """Coil images [coils z y x] in a field of view of `shares` (z, y) of the object's extent.

    What lies beyond it is added at the opposite side.
    """
    for axis, share in enumerate(shares, start=1):
        profile = images.norm(dim=0).amax(dim=[a for a in range(3) if a != axis - 1])
        there = (profile > EDGE * profile.max()).nonzero()[:, 0]
        extent = int(there[-1] - there[0]) + 1
        length = int(share * extent) // 2 * 2
        place = torch.arange(extent) - extent // 2 + length // 2
        shape = [length if a == axis else n for a, n in enumerate(images.shape)]
        images = images.new_zeros(shape).index_add_(axis, place % length, images.narrow(axis, int(there[0]), extent))
    return images


def size_label(asked_mm: float, size: tuple[float, float, float]) -> float:
    """The voxel size asked for; the side of a cube of the same volume if the scan's `size` is above 1.2 times it."""
    return asked_mm if round(max(size), 4) <= 1.2 * asked_mm else round(math.prod(size) ** (1 / 3), 2)


def middle(length: int, kept: int | None) -> slice:
    """`kept` positions in the middle of `length`, all if None."""
    kept = min(length, kept or length)
    return slice(length // 2 - kept // 2, length // 2 - kept // 2 + kept)


def measured(raw: Path, accelerations: Sequence[float] | None = None, seed: int = 0) -> Iterator[Problem]:
    """Measured scans that have a reference: all lines, combined by CG-SENSE, noise included; and the lines left out.

    Only those at `accelerations`, all if None; `seed` is that of the sampling.
    """
    for name, planes, mask, voxel_mm, acceleration, _, has_reference in cases(raw, seed):
        wanted = has_reference and (accelerations is None or acceleration in accelerations)
        for contrast in range(len(planes) if wanted else 0):
            whole, lines = ifft(torch.from_numpy(np.ascontiguousarray(planes[contrast])), (3,)), torch.from_numpy(mask)
            kspace = whole * lines[..., None]
            truth = cg_sense(measure(whole, torch.from_numpy(acquired_lines(planes)).float(), voxel_mm)).abs()
            measurement = measure(kspace, lines.float(), voxel_mm)
            facts = {
                "volume": f"{name} {contrast}",
                "voxel_mm": voxel_mm[1],
                "matrix": "x".join(map(str, reversed(truth.shape))),
                "coils": len(kspace),
                "R": acceleration,
                "snr": "",
                "acs": "",
            }
            inside, mixing = object_mask(truth, 0.15), measurement.mixing
            given, left_out = _mix(mixing, kspace), _mix(mixing, whole - kspace)
            yield Problem(facts, measurement, truth, None, inside, given, left_out, seed)


def _mix(matrix: Tensor, data: Tensor) -> Tensor:
    return (matrix @ data.flatten(1)).reshape(len(matrix), *data.shape[1:])
