"""A^H A of this package beside sigpy's and BART's, and how its time grows with the volume.

    python tests/benchmarks/operator_speed.py [--side 96] [--coils 8] [--sizes 64 96 128 192]

Wall seconds, best of several; BART's as the difference of a long and a short run of `pics` (conjugate gradients), which
leaves out its start. sigpy (optional) transforms all three directions as it comes; BART as well.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bart
import numpy as np
import torch
from scans import save_table

from recon_core.fft import fft
from recon_core.sense import Sense
from recon_core.simulate import coil_sensitivity, phantom, sampling_mask


def main() -> None:
    """Print both tables; results/operator_speed.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 192])
    arguments = parser.parse_args()
    rows = [peers(arguments.side, arguments.coils)]
    for side in arguments.sizes:
        seconds = ours(*problem(side, arguments.coils))
        ns = round(1e9 * seconds / side**3 / arguments.coils, 1)
        row = {"side": side, "coils": arguments.coils, "ours_s": seconds, "ours_ns_per_coil_voxel": ns}
        rows.append(row)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    print(save_table("operator_speed", [{k: row.get(k, "") for k in columns} for row in rows]))


def problem(side: int, coils: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coil maps [coils z y x] and mask [z y] of a cube."""
    shape = (side,) * 3
    fields = torch.stack([coil_sensitivity(c, coils, shape) for c in range(coils)])
    return fields / fields.norm(dim=0), torch.from_numpy(sampling_mask(shape[:2], 4, "poisson", 20)).float()


def peers(side: int, coils: int) -> dict:
    """One A^H A of each, and ratios to ours."""
    maps, mask = problem(side, coils)
    row = {"side": side, "coils": coils, "ours_s": ours(maps, mask)}
    for name, measure in (("sigpy", sigpy_normal), ("bart", bart_iteration)):
        seconds = measure(maps, mask)
        if seconds is not None:
            row |= {f"{name}_s": round(seconds, 4), f"{name}_over_ours": round(seconds / row["ours_s"], 2)}
    return row


def ours(maps: torch.Tensor, mask: torch.Tensor) -> float:
    """Seconds of one A^H A on the inner frame, where every method's loop runs."""
    operator = Sense(maps, mask)
    frame = operator.to_frame(maps[0])
    return round(best(lambda: operator.normal_frame(frame)), 4)


def sigpy_normal(maps: torch.Tensor, mask: torch.Tensor) -> float | None:
    """Seconds of one A^H A, None without sigpy."""
    try:
        import sigpy.mri as mri
    except ImportError:
        return None
    weights = np.ascontiguousarray(np.broadcast_to(mask.numpy()[..., None], maps.shape[1:]))
    operator = mri.linop.Sense(maps.numpy(), weights=weights)
    volume = maps[0].numpy()
    return best(lambda: operator.H(operator(volume)))


def bart_iteration(maps: torch.Tensor, mask: torch.Tensor, few: int = 5, many: int = 25) -> float | None:
    """Seconds of one iteration of BART's conjugate gradients, None without BART."""
    if not bart.available():
        return None
    kspace = fft(phantom(tuple(maps.shape[1:])) * maps, (1, 2, 3)) * mask[..., None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        bart.write_cfl(path / "kspace", kspace.permute(3, 2, 1, 0).numpy())
        bart.write_cfl(path / "maps", maps.permute(3, 2, 1, 0).numpy())

        def run(iterations: int) -> None:
            how = ["-l2", "-r", "0.001", "-i", str(iterations)]
            command = ["bart", "pics", *how, path / "kspace", path / "maps", path / "out"]
            subprocess.run(command, check=True, capture_output=True)

        return (best(lambda: run(many), 3) - best(lambda: run(few), 3)) / (many - few)


def best(work: Callable[[], object], repeats: int = 7) -> float:
    """Least seconds of several runs after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
