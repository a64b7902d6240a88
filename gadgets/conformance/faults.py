"""Priors that fail on purpose, to test that nothing is lost when a real one does.

Off unless a server is started with --test-faults.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from ..options import Options
from ..solve import load_prior_for

HANG_S = 60.0


def load_prior_or_fault(options: Options):
    """The requested prior; names that start with "test-" are in FAULTS."""
    return FAULTS.get(options.prior) or load_prior_for(options)


def _hangs(x: torch.Tensor, sigma: float) -> torch.Tensor:
    threading.Event().wait(HANG_S)
    raise RuntimeError("the solver hung")


def _is_slow(x: torch.Tensor, sigma: float) -> torch.Tensor:
    threading.Event().wait(0.3)
    return x


def _raises(x: torch.Tensor, sigma: float) -> torch.Tensor:
    raise RuntimeError("a fault on purpose")


def _exhausts_memory(x: torch.Tensor, sigma: float) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")


def _loses_the_gpu(x: torch.Tensor, sigma: float) -> torch.Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered (simulated)")


def _is_nan(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x * float("nan")


def _forgets_the_data(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.zeros_like(x)


FAULTS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "test-hang": _hangs,
    "test-slow": _is_slow,
    "test-raise": _raises,
    "test-memory": _exhausts_memory,
    "test-gpu-lost": _loses_the_gpu,
    "test-nan": _is_nan,
    "test-drift": _forgets_the_data,
}
