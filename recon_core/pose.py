"""The prior in a random pose: slices mirrored, transposed, shifted by a few pixels, their phase rotated; and back.

The prior was trained on slices in all of these poses, so its output should not depend on them. Where it does, that
is error, which averages out because each sweep uses a different pose.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .slices import Denoiser

BLOCK = 8  # pixels after which the downsampling pattern of a U-Net repeats: a multiple of `UNet.multiple`


class Pose(NamedTuple):
    """How slices are transformed before the prior sees them."""

    flips: list[int]
    turned: bool
    top: int
    left: int
    angle: float

    def seen_by(self, prior: Denoiser) -> Denoiser:
        """`prior` applied in this pose, to slices [slices 2 h w] of any size."""

        def denoise(slices: Tensor, sigma: Tensor | float) -> Tensor:
            there = _rotate_phase(slices, self.angle).flip(self.flips)
            there = F.pad(there.transpose(2, 3) if self.turned else there, (self.left, 0, self.top, 0))
            back = prior(there.contiguous(memory_format=torch.channels_last), sigma)[..., self.top :, self.left :]
            return _rotate_phase((back.transpose(2, 3) if self.turned else back).flip(self.flips), -self.angle)

        return denoise


def draw_pose(random: torch.Generator) -> Pose:
    """A random pose."""
    flip_y, flip_x, turned = (torch.rand(3, generator=random) < 0.5).tolist()
    flips = [axis for axis, flip in ((2, flip_y), (3, flip_x)) if flip]
    top, left = torch.randint(BLOCK, (2,), generator=random).tolist()
    return Pose(flips, turned, top, left, 2 * math.pi * float(torch.rand((), generator=random)))


def _rotate_phase(slices: Tensor, angle: float) -> Tensor:
    real, imaginary = slices.unbind(1)
    c, s = math.cos(angle), math.sin(angle)
    return torch.stack((c * real - s * imaginary, s * real + c * imaginary), dim=1)
