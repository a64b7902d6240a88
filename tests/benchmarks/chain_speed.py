"""The whole chain at the size of a scan, stage by stage, beside what the hardware would allow; made for a GPU.

    python tests/benchmarks/chain_speed.py [--matrix 320 320 256] [--coils 12] [--acceleration 8] [--device cuda]
                                           [--methods diffusion faithful diffusion:base]

A phantom's acquisitions (x y z matrix, twofold readout oversampling, Poisson disc, noise lines) are gathered on the
host, then coil maps and A^H y, CG-SENSE, and each of --methods with its default settings, with --prior or the one named
after a colon. `after_last_line_s` runs from the last line to the end of the stage, for the first method. `floor_s` is
the roofline: the larger of bytes that must move over the bandwidth, and operations over the rate, both measured here
first (copy of a large array; matrix product in the precision of the network). Bytes: gathering writes each sample once
(host bandwidth); a normal operator reads the maps once and its volume, and writes one; operations are those of the
network's convolutions. FFTs and the network's activations are not in it: it is a bound, not a goal. `process_gib` is
the most memory the process has had in the host so far. One run after a small one that warms up.
"""

from __future__ import annotations

import argparse
import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ismrmrd
import numpy as np
import torch
from bench import Meter
from scans import save_table
from solve_speed import clock
from torch.utils.flop_counter import FlopCounterMode

from gadgets.gather import gather
from gadgets.header import parse_header
from gadgets.simulation.protocol import SimulateOptions, make_header
from recon_core.cg_sense import cg_sense
from recon_core.fft import fft
from recon_core.measure import measure
from recon_core.methods import METHODS, Method
from recon_core.prior import Prior, load_prior
from recon_core.simulate import coil_sensitivity, phantom, sampling_mask

ACS, NOISE, PREVIEW_ITERATIONS, SLICE = 24, 0.03, 15, 256


def main() -> None:
    """Print the table; results/chain_speed_<device>.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", type=int, nargs=3, default=(320, 320, 256), metavar=("X", "Y", "Z"))
    parser.add_argument("--coils", type=int, default=12)
    parser.add_argument("--acceleration", type=float, default=8.0)
    parser.add_argument("--methods", nargs="+", default=["diffusion"], metavar="METHOD[:PRIOR]")
    parser.add_argument("--prior", default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    methods = []
    for title in arguments.methods:
        name, _, prior = title.partition(":")
        methods.append((title, METHODS[name], load_prior(prior or arguments.prior, arguments.device)))
    machine = Machine.measured(arguments.device, torch.bfloat16 if methods[0][2].in_bf16 else torch.float32)
    print(machine, flush=True)
    run(Scan((48, 48, 40), arguments.coils, 2.0), machine, methods, lambda row: None)
    rows = []
    scan = Scan(tuple(arguments.matrix), arguments.coils, arguments.acceleration)
    run(scan, machine, methods, lambda row: (rows.append(row), print(row, flush=True)))
    print(save_table(f"chain_speed_{torch.device(arguments.device).type}", rows, show=False))


@dataclass(frozen=True)
class Machine:
    """Where it runs, and its rates.

    Bytes per second of the host and of the device, operations per second of the device.
    """

    device: str
    name: str
    host_bandwidth: float
    bandwidth: float
    rate: float

    @classmethod
    def measured(cls, device: str, precision: torch.dtype) -> Machine:
        """Rates of copies, and of a matrix product in `precision`, the network's."""
        cuda = torch.device(device).type == "cuda"
        host, there = (torch.ones(1 << 26, device=d) for d in ("cpu", device))
        square = torch.ones((8192 if cuda else 2048,) * 2, dtype=precision, device=device)
        copies = [2 * 4 * t.numel() / best_of(lambda t=t: t.clone(), device) for t in (host, there)]
        rate = 2 * len(square) ** 3 / best_of(lambda: square @ square, device)
        return cls(device, torch.cuda.get_device_name() if cuda else "CPU", *copies, rate)


def best_of(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Least seconds of several runs."""
    seconds = []
    for _ in range(repeats):
        began = clock(device)
        work()
        seconds.append(clock(device) - began)
    return min(seconds)


class Scan:
    """A phantom's scan: its header, and its lines as they would arrive."""

    def __init__(self, matrix: tuple[int, int, int], coils: int, acceleration: float):
        self.matrix, self.coils = matrix, coils
        x, y, z = matrix
        options = SimulateOptions(coils=coils, acs=ACS, acceleration=acceleration, oversampling=2)
        self.header = parse_header(make_header(matrix, (1.0, 1.0, 1.0), [0, 0], options))
        self.mask = sampling_mask((z, y), acceleration, "poisson", ACS)
        self.random = np.random.default_rng(0)
        self.lines = np.empty((int(self.mask.sum()), coils, 2 * x), np.complex64)
        body = phantom((z, y, x))
        for coil in range(coils):  # one by one: the lines are much less than the images
            image = torch.zeros((z, y, 2 * x), dtype=torch.complex64)
            image[..., x // 2 : x // 2 + x] = body * coil_sensitivity(coil, coils, (z, y, x))
            self.lines[:, coil] = fft(image, (0, 1, 2)).numpy()[self.mask]
        for line in self.lines:
            line += self._noise(2 * x)

    def _noise(self, samples: int) -> np.ndarray:
        noise = NOISE * self.random.standard_normal((self.coils, samples, 2), dtype=np.float32)
        return noise.view(np.complex64)[..., 0]

    def items(self) -> Iterator[ismrmrd.Acquisition]:
        """Noise lines, then all others."""
        x = self.matrix[0]
        for _ in range(16):
            line = ismrmrd.Acquisition.from_array(self._noise(2 * x))
            line.set_flag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
            yield line
        for samples, (z, y) in zip(self.lines, np.argwhere(self.mask)):
            line = ismrmrd.Acquisition.from_array(samples)
            line.center_sample, line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2 = x, int(y), int(z)
            yield line


def run(
    scan: Scan, machine: Machine, methods: list[tuple[str, Method, Prior]], report: Callable[[dict], object]
) -> None:
    """Every stage once, of methods (title, method, prior); `report` is given a row as each ends."""
    device, (x, y, z) = machine.device, scan.matrix
    volume, last_line = 8 * x * y * z, None

    def stage(name: str, work: Callable[[], object], floor_s: Callable[[object], float]) -> object:
        with Meter(torch.device(device)) as meter:
            began = clock(device)
            result = work()
            ended = clock(device)
        seconds, floor = ended - began, floor_s(result)
        row = {
            "matrix": f"{x}x{y}x{z}",
            "coils": scan.coils,
            "stage": name,
            "seconds": round(seconds, 3),
            "floor_s": round(floor, 4),
            "over_floor": round(seconds / floor, 1),
            "after_last_line_s": round(ended - last_line, 3) if last_line else "",
            "evaluations": getattr(result, "network_evaluations", ""),
            "peak_gib": meter.costs["peak_gib"],
            "process_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "device": machine.name,
        }
        report(row)
        return result

    (gathered,) = stage(
        "gather",
        lambda: list(gather(scan.header, scan.items())),
        lambda _: scan.lines.nbytes / 2 / machine.host_bandwidth,
    )
    last_line = clock(device)
    inputs = (gathered.kspace, gathered.counts, gathered.geometry.voxel_mm, gathered.noise, gathered.calibration)
    scan.lines = None  # which the source of a scan does not keep either
    measurement = stage(
        "coil maps",
        lambda: measure(*inputs, device=device),
        lambda m: (scan.coils + 2 * m.operator.coils) * volume / machine.bandwidth,
    )
    normal = (measurement.operator.coils + 2) * volume / machine.bandwidth
    preview = stage("preview", lambda: cg_sense(measurement, PREVIEW_ITERATIONS), lambda _: PREVIEW_ITERATIONS * normal)
    for name, method, prior in methods:

        def last_state(method=method, prior=prior):
            for state in method.run(measurement, prior if method.uses_prior else None, preview, method.config, 0):
                pass
            return state

        def floor(state, method=method, prior=prior) -> float:
            pixels = state.network_evaluations * (x * y * z) ** (2 / 3)  # a slice has as many on the average
            solves = state.sweeps * getattr(method.config, "cg_iterations", 1)
            return pixels * operations_per_pixel(prior, device) / machine.rate + solves * normal

        stage(name, last_state, floor)
        last_line = None


def operations_per_pixel(prior: Prior, device: str) -> float:
    """Multiplications and additions of the network's convolutions."""
    slices = torch.zeros(1, 2, SLICE, SLICE, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prior(slices, 0.1)
    return counter.get_total_flops() / math.prod(slices.shape[2:])


if __name__ == "__main__":
    main()
