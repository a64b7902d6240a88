"""Seconds per slice and peak memory of each architecture, on every device and in every precision there is.

    python tests/benchmarks/prior_speed.py [--side 256] [--slices 8]

Untrained networks: the time does not depend on the weights. Each case runs in a process of its own, so that
its peak memory is its own; the time is the least of five runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from scans import save_table

from recon_core.prior import ARCHITECTURES, Prior
from recon_core.unet import round_weights

PRECISIONS = ("fp32", "bf16")


def main() -> None:
    """Print the table and write it to results/prior_speed_<device>.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case, arguments.side, arguments.slices)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = ["--side", str(arguments.side), "--slices", str(arguments.slices)]
    rows = []
    for architecture in ARCHITECTURES:
        for precision in PRECISIONS:
            for mode in ("eager", "compiled") if device == "cuda" else ("eager",):
                command = [sys.executable, __file__, *size, "--case", architecture, precision, mode]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
                row = {
                    "device": name,
                    "architecture": architecture,
                    "precision": precision,
                    "mode": mode,
                    "side": arguments.side,
                    "slices": arguments.slices,
                }
                rows.append({**row, **json.loads(said.splitlines()[-1])})
    print(save_table(f"prior_speed_{device}", rows))


def measure(architecture: str, precision: str, mode: str, side: int, slices: int) -> dict[str, float]:
    """Seconds per slice, and the memory that denoising added to the loaded network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prior = Prior(architecture).eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    prior.in_bf16 = precision == "bf16"
    if prior.in_bf16:
        round_weights(prior.net)  # as load_prior does
    run = torch.compile(prior) if mode == "compiled" else prior
    x = torch.randn(slices, 2, side, side, device=device).contiguous(memory_format=torch.channels_last)
    before, seconds = peak_mib(device), []
    for _ in range(6):
        began = time.perf_counter()
        with torch.no_grad():
            run(x, 0.1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"ms_per_slice": round(1000 * min(seconds[1:]) / slices, 2), "added_mib": round(peak_mib(device) - before)}


def peak_mib(device: torch.device) -> float:
    """Peak memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
