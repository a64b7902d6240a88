"""Linear interpolation between voxel grids of one field of view, about index n//2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def interpolate(coarse: Tensor, shape: Sequence[int], whole: Sequence[int] | None = None) -> Tensor:
    """Periodic trilinear interpolation of [z y x ...] to the middle `shape` of `whole` voxels over the field of view.

    `whole` is `shape` by default. Differentiable; centres are at n//2.
    """
    out = coarse
    for axis, (n, span) in enumerate(zip(shape, whole or shape)):
        g = out.shape[axis]
        position = (torch.arange(n, device=out.device) - n // 2) * (g / span) + g // 2
        low = position.floor()
        t = (position - low).to(out.dtype).reshape(-1, *[1] * (out.ndim - 1 - axis))
        low = low.long()
        out = torch.lerp(out.index_select(axis, low % g), out.index_select(axis, (low + 1) % g), t)
    return out
