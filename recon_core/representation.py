"""What a variational reconstruction optimises: voxels, or parameters that a volume on any mesh can be rendered from.

A representation covers a field of view, not a matrix: the data term renders it on the matrix of the scan, the prior on
that of its own voxel size. Besides the grid in this file there are `neural_field.py` and `gaussians.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .fft import kspace_crop

Shape = tuple[int, int, int]
PUBLISHED = 1.2  # Adam learning rate for voxel brightness, in tissue units


class Representation(nn.Module):
    """`forward(shape)` is the complex volume [z y x] on a mesh of `shape` over the field of view, differentiable.

    Every class is made from (start, finest, seed): the image to begin with [z y x], in tissue brightness, the shape of
    the finest mesh that it will be asked for, and the seed of its random initial values. A class that cannot be
    initialised to that image directly is fitted to it in `fit_steps`, with cosine decay of the step length if it
    `fit_settles`.
    """

    fit_steps = 0
    fit_settles = False

    def groups(self, rate: float) -> list[dict]:
        """Parameters and learning rates for Adam.

        `rate` is that of voxel brightness, PUBLISHED in the published setting.
        """
        return [{"params": list(self.parameters()), "lr": rate}]

    def fit(self, start: Tensor, rate: float) -> None:
        """Take `fit_steps` steps of Adam on the least-squares distance to `start` [z y x]."""
        if not self.fit_steps:
            return

        def length(step: int) -> float:
            return 0.5 + 0.5 * math.cos(math.pi * step / self.fit_steps) if self.fit_settles else 1.0

        optimiser = torch.optim.Adam(self.groups(rate), betas=(0.9, 0.99))
        decay = torch.optim.lr_scheduler.LambdaLR(optimiser, length)
        with torch.enable_grad():
            for _ in range(self.fit_steps):
                optimiser.zero_grad()
                error = torch.view_as_real(self(tuple(start.shape)) - start)  # abs() has NaN gradients at subnormals
                error.square().sum().mul(0.5).backward()
                optimiser.step()
                decay.step()


class Grid(Representation):
    """A volume on the finest mesh, rendered on others by cropping its k-space: interpolation without loss.

    On a single mesh it is the volume itself.
    """

    def __init__(self, start: Tensor, finest: Shape, seed: int = 0):
        super().__init__()
        self.values = nn.Parameter(torch.view_as_real(kspace_crop(start, finest).clone()))

    def forward(self, shape: Shape) -> Tensor:
        return kspace_crop(torch.view_as_complex(self.values), shape)
