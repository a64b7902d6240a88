"""Conjugate gradients on many independent Hermitian systems at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    normal: Callable[[Tensor], Tensor],
    b: Tensor,
    x: Tensor | None = None,
    iterations: int = 10,
    tolerance: float = 1e-6,
) -> Tensor:
    """Solve normal(x) = b for each entry of the first axis, with its own step lengths (Hestenes and Stiefel, 1952).

    Args:
        normal: Hermitian positive definite map that acts on each entry of the first axis independently.
        b: right-hand sides [problems ...], complex.
        x: starting point (zero by default), not modified.
        iterations: maximum number.
        tolerance: a problem is no longer updated once its residual is below this fraction of its right-hand side,
            because further steps at rounding level would undo the solution.
    """
    residual = b.clone() if x is None else b - normal(x)
    x = torch.zeros_like(b) if x is None else x.clone()
    direction = residual.clone()
    energy = _dot(residual, residual)
    enough = tolerance**2 * _dot(b, b)
    for _ in range(iterations):
        active = energy > enough
        if not bool(active.any()):
            break
        mapped = normal(direction)
        step = _ratio(energy, _dot(direction, mapped)) * active
        x.addcmul_(step, direction)
        residual.addcmul_(-step, mapped)
        previous, energy = energy, _dot(residual, residual)
        direction.mul_(_ratio(energy, previous)).add_(residual)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    dims = tuple(range(1, a.ndim))
    a, b = torch.view_as_real(a), torch.view_as_real(b)
    return (a * b).sum(dim=(*dims, -1)).reshape(-1, *[1] * len(dims))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), torch.zeros_like(a))
