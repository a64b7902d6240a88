"""What every iterative method yields: the image so far, so that the caller controls time, display and stopping."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class State:
    """One sweep's result: volume [z y x] in the units of the data, and sigma, the denoising strength used.

    `setback` is what kept the volume, complete without it, from being improved further. `learned` is a prior that the
    volume has taught, for the other volumes of its scan.
    """

    sweep: int
    sweeps: int
    sigma: float
    volume: Tensor
    network_evaluations: int
    setback: Exception | None = None
    learned: nn.Module | None = None
