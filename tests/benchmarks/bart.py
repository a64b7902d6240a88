"""BART as a peer: l1-wavelet `pics` on whitened k-space, with coil maps of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recon_core.fft import fft


def available() -> bool:
    """Whether `bart` is on PATH."""
    return shutil.which("bart") is not None


def wavelet(
    kspace: Tensor, strengths: Sequence[float], left_out: Tensor | None = None, iterations: int = 50, acs: int = 24
) -> dict[float, tuple[Tensor, dict[str, float]]]:
    """l1-wavelet images of kspace [coils z y x], x in image space: strength -> (|image| [z y x], costs).

    The costs are {"seconds", "cpu_s", "peak_gib"} of maps and image.

    With the lines `left_out` [coils z y x] also "unseen", their relative error as image and maps predict them.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_cfl(path / "kspace", fft(kspace, (3,)).permute(3, 2, 1, 0).numpy())
        calibrate = make_maps(path, kspace, acs)
        found = {}
        for strength in strengths:
            image, costs = _wavelet(path, strength, iterations, tuple(kspace.shape[1:]), calibrate)
            found[strength] = image, costs if left_out is None else {**costs, "unseen": _unseen(path, kspace, left_out)}
        return found


def make_maps(path: Path, kspace: Tensor, acs: int) -> tuple[float, float, float]:
    """Coil maps by ecalib, which aborts on a single coil: that one is uniform."""
    if len(kspace) > 1:
        return run(["ecalib", "-m", "1", "-r", str(acs), path / "kspace", path / "maps"])
    write_cfl(path / "maps", np.ones(tuple(reversed(kspace.shape[1:])), np.complex64))
    return 0.0, 0.0, 0.0


def _wavelet(
    path: Path, strength: float, iterations: int, shape: tuple[int, ...], calibrate: tuple
) -> tuple[Tensor, dict[str, float]]:
    # 7 is all three axes; its random shifts abort on short ones
    axes = sum(1 << i for i, n in enumerate(reversed(shape)) if n >= 16)
    how = ["-R", f"W:{axes}:0:{strength:g}", "-i", str(iterations)]
    solve = run(["pics", *how, path / "kspace", path / "maps", path / "image"])
    image = torch.from_numpy(np.abs(read_cfl(path / "image").squeeze().T.reshape(shape)))
    odd = [axis for axis, n in enumerate(image.shape) if n % 2 and n > 1]
    if odd:  # BART's image centre on odd axes is one voxel further
        image = torch.roll(image, [-1] * len(odd), odd)
    return image, {
        "seconds": calibrate[0] + solve[0],
        "cpu_s": calibrate[1] + solve[1],
        "peak_gib": max(calibrate[2], solve[2]),
    }


def _unseen(path: Path, kspace: Tensor, left_out: Tensor) -> float:
    """Relative error of the lines left out as the last image and the maps predict them.

    The prediction has the complex factor with which it fits the others best.
    """
    run(["fmac", path / "maps", path / "image", path / "coils"])
    run(["fft", "-u", "6", path / "coils", path / "predicted"])
    predicted = torch.from_numpy(read_cfl(path / "predicted").reshape(tuple(reversed(kspace.shape))))
    predicted = predicted.permute(3, 2, 1, 0)
    given, rest = (lines.abs().sum(dim=(0, 3)) > 0 for lines in (kspace, left_out))
    fitted, measured = predicted[:, given].flatten(), kspace[:, given].flatten()
    factor = torch.vdot(fitted, measured) / torch.vdot(fitted, fitted)
    return float((factor * predicted[:, rest] - left_out[:, rest]).norm() / left_out.norm())


def run(arguments: list) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak GiB) of one BART command."""
    began = time.monotonic()
    process = subprocess.Popen(["bart", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"bart {arguments[0]} ended with exit code {process.returncode}")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def write_cfl(path: Path, array: np.ndarray) -> None:
    """BART's file pair, first axis fastest."""
    dims = [*array.shape, *[1] * (16 - array.ndim)]
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + "\n")
    array.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path) -> np.ndarray:
    """Array of BART's file pair."""
    dims = [int(n) for n in path.with_suffix(".hdr").read_text().splitlines()[1].split()]
    return np.fromfile(path.with_suffix(".cfl"), np.complex64).reshape(dims, order="F")
