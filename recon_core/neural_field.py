"""A neural representation: features on grids of several resolutions, and a small network that maps them to brightness.

As in Müller et al. (arXiv 2201.05989), but with dense grids instead of hashed ones: for a volume they fit in memory.
It is independent of the matrix; sharing features and network between neighbours is what regularises.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .interpolation import interpolate
from .representation import PUBLISHED, Representation, Shape

# voxels of the finest mesh per point of the finest grid, ratio of spacing between grids, number of grids
FINEST, FACTOR, LEVELS = 1.5, 2.0, 4
FEATURES, WIDTH = 8, 64
RATE = 1e-2  # Adam learning rate


class NeuralField(Representation):
    """The field of view as one function; a render costs one pass of the network over all voxels."""

    fit_steps = 200

    def __init__(self, start: Tensor, finest: Shape, seed: int = 0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        steps = [FINEST * FACTOR**level for level in range(LEVELS)]
        grids = [[max(1, round(n / step)) for n in finest] for step in steps]
        self.grids = nn.ParameterList(
            nn.Parameter(0.1 * torch.randn(*grid, FEATURES, generator=random)) for grid in grids
        )
        sizes = [FEATURES * LEVELS, WIDTH, WIDTH, 2]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        for layer in self.layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=random)
            nn.init.zeros_(layer.bias)
        self.to(start.device)

    def groups(self, rate: float) -> list[dict]:
        """A learning rate of its own, RATE if `rate` is PUBLISHED."""
        return [{"params": list(self.parameters()), "lr": RATE * rate / PUBLISHED}]

    def forward(self, shape: Shape) -> Tensor:
        out = torch.cat([interpolate(grid, shape) for grid in self.grids], -1)
        for layer in self.layers[:-1]:
            out = torch.relu(layer(out))
        return torch.view_as_complex(self.layers[-1](out))
