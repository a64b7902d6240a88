"""Measured k-space to ISMRMRD scans, and what the benchmarks share."""

from __future__ import annotations

import csv
import platform
from pathlib import Path

import ismrmrd
import numpy as np
import torch

from gadgets.scan_files import ScanWriter
from gadgets.simulation.protocol import SimulateOptions, make_header
from recon_core.fft import fft

RESULTS = Path(__file__).parent / "results"


def write_scan(
    path: Path, kspace: np.ndarray, mask: np.ndarray, voxel_mm: tuple[float, float, float], dropped_after: int = 0
) -> None:
    """Write measured k-space as a scan.

    Args:
        kspace: [contrasts coils kz ky kx], centre at n//2.
        mask: [kz ky] lines to write.
        voxel_mm: along z, y, x.
        dropped_after: partitions at the end of kz that were never acquired.
    """
    nz, ny, nx = kspace.shape[2:]
    xml = make_header((nx, ny, nz), voxel_mm, [0, 0], SimulateOptions(coils=kspace.shape[1], oversampling=1))
    if dropped_after:
        xml = xml.replace(f"<maximum>{nz - 1}</maximum>", f"<maximum>{nz - 1 - dropped_after}</maximum>")
    with ScanWriter(path, xml) as writer:
        for contrast in range(len(kspace)):
            for z, y in np.argwhere(mask):
                samples = np.ascontiguousarray(kspace[contrast, :, z, y])
                line = ismrmrd.Acquisition.from_array(samples, sample_time_us=5.0)
                line.center_sample = nx // 2
                line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2 = int(y), int(z)
                line.idx.contrast = contrast
                line.read_dir, line.phase_dir, line.slice_dir = (1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)
                writer.append(line)


def to_kspace(array: np.ndarray, axis: int) -> np.ndarray:
    """Fourier transform an image axis back to k-space."""
    return fft(torch.from_numpy(array), (axis,)).numpy()


def read_table(name: str) -> list[dict]:
    """Rows of a table under results/ as text, none if there is none."""
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save_table(name: str, rows: list[dict], show: bool = True) -> Path:
    """Write rows as CSV under results/, each with the machine it was measured on; print them as a table."""
    RESULTS.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*rows[0], "machine"])))
        writer.writeheader()
        writer.writerows({"machine": machine, **row} for row in rows)
    for row in rows if show else ():
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    return path
