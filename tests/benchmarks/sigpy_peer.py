"""sigpy as a peer: its l1-wavelet reconstruction, given our whitened k-space and our coil maps."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recon_core.fft import fft, ifft


def available() -> bool:
    """Whether sigpy is installed."""
    return importlib.util.find_spec("sigpy") is not None


def wavelet(
    kspace: Tensor, coil_maps: Tensor, strengths: Sequence[float], iterations: int = 50
) -> dict[float, tuple[Tensor, dict[str, float]]]:
    """strength -> (|image| [z y x], {"seconds", "cpu_s", "peak_gib"}) of kspace [coils z y x], x in image space.

    lambda is strength times the brightest voxel of the zero-filled image. Its own ESPIRiT takes minutes in 3D, so the
    coil maps [coils z y x] are given; memory is not measured.
    """
    from sigpy.mri.app import L1WaveletRecon

    full, maps = fft(kspace, (3,)).numpy(), coil_maps.cpu().numpy()
    brightest = float(_zero_filled(kspace, coil_maps.cpu()).abs().max())
    out = {}
    for strength in strengths:
        began, cpu = time.monotonic(), time.process_time()
        image = L1WaveletRecon(full, maps, strength * brightest, max_iter=iterations, show_pbar=False).run()
        costs = {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - cpu, "peak_gib": float("nan")}
        out[strength] = torch.from_numpy(np.abs(image)), costs
    return out


def _zero_filled(kspace: Tensor, coil_maps: Tensor) -> Tensor:
    return torch.linalg.vecdot(coil_maps, ifft(kspace, (1, 2)), dim=0)
