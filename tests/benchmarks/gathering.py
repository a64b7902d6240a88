"""Acquisitions per second from memory, from a socket and from a ReconData buffer, and the memory that it takes.

    python tests/benchmarks/gathering.py

One CPU core gathers (each way in a process of its own, bound to one core); the sender of the socket runs on another. On
a machine that others use too, lines_per_cpu_s is the figure: it leaves out the waiting. Peak memory is what the process
grew by, over the k-space's size, with everything else loaded before.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import multiprocessing
import os
import resource
import socket
import struct
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import ismrmrd
import numpy as np

from gadgets import wire as w
from gadgets.gather import gather
from gadgets.header import parse_header
from gadgets.simulation.protocol import SimulateOptions, make_header

RESULTS = Path(__file__).parent / "results" / "gathering.csv"


def a_header(samples: int, steps: tuple[int, int]):
    """Twofold readout oversampling, every phase encode."""
    xml = make_header((samples // 2, *steps), (1.0, 1.0, 1.0), [0, 0], SimulateOptions(pattern="full"))
    return parse_header(xml)


def payloads(coils: int, samples: int, steps: tuple[int, int]) -> list[bytes]:
    """The acquisitions' headers as bytes; all share one line of samples."""
    head = ismrmrd.AcquisitionHeader()
    head.version, head.number_of_samples, head.active_channels, head.center_sample = 1, samples, coils, samples // 2
    out = []
    for head.idx.kspace_encode_step_2 in range(steps[1]):
        for head.idx.kspace_encode_step_1 in range(steps[0]):
            out.append(bytes(head))
    return out


def samples_of_a_line(coils: int, samples: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((coils, samples, 2)).astype(np.float32).view(np.complex64)[..., 0]


def from_memory(coils: int, samples: int, steps: tuple[int, int]):
    """Acquisitions made on the fly around one line of samples."""
    data, empty = samples_of_a_line(coils, samples), np.zeros((samples, 0), np.float32)
    for head in payloads(coils, samples, steps):
        yield ismrmrd.Acquisition(ismrmrd.AcquisitionHeader.from_buffer_copy(head), data, empty)


def from_socket(sock: socket.socket):
    """Acquisitions or buffers as the server and the external gadget read them."""
    for kind, item in w.Wire(sock).messages():
        if kind in w.SCAN_ITEMS:
            yield item


def send(address, coils: int, samples: int, steps: tuple[int, int]) -> None:
    """The other side: many lines to a write, so that the reader is what is measured."""
    data, heads = samples_of_a_line(coils, samples).tobytes(), payloads(coils, samples, steps)
    with socket.create_connection(address) as sock:
        for first in range(0, len(heads), 16):
            sock.sendall(b"".join(struct.pack("<H", w.ACQUISITION) + head + data for head in heads[first : first + 16]))
        sock.sendall(struct.pack("<H", w.CLOSE))


def send_buffer(address, coils: int, samples: int, steps: tuple[int, int]) -> None:
    """The other side of the second entry: one ReconData, oversampling removed."""
    plane = np.broadcast_to(samples_of_a_line(coils, samples // 2)[:1], (steps[0], samples // 2)).tobytes()
    with socket.create_connection(address) as sock:
        sock.sendall(struct.pack("<HQQ7Q", w.RECON_DATA, 1, 7, samples // 2, *steps, coils, 1, 1, 1))
        for _ in range(coils * steps[1]):
            sock.sendall(plane)
        headers = b"".join(payloads(coils, samples // 2, steps))
        sock.sendall(bytes(2) + struct.pack("<Q5Q", 5, *steps, 1, 1, 1) + headers)
        sock.sendall(bytes(56) + bytes(1) + struct.pack("<H", w.CLOSE))


def measure(source: str, coils: int, samples: int, steps: tuple[int, int], out) -> None:
    """Seconds and growth of the peak memory in MiB, into the queue `out`."""
    cores = sorted(os.sched_getaffinity(0))
    header = a_header(samples, steps)
    list(gather(a_header(samples, (2, 2)), from_memory(coils, samples, (2, 2))))
    with contextlib.ExitStack() as stack:
        if source != "memory":
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            sender = send if source == "socket" else send_buffer
            given = (listener.getsockname(), coils, samples, steps)
            multiprocessing.get_context("spawn").Process(target=sender, args=given).start()
            items = from_socket(stack.enter_context(listener.accept()[0]))
        else:
            items = from_memory(coils, samples, steps)
        os.sched_setaffinity(0, {cores[0]})  # after the sender was started, which has the other cores
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        (scan,) = gather(header, items)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    assert bool((scan.counts == 1).all())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    out.put((seconds, cpu, (after.ru_maxrss - before.ru_maxrss) / 1024, scan.kspace.numel() * 8 / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coils", type=int, default=16)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs=2, default=(160, 96), metavar=("E1", "E2"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), []
    for source in ("memory", "socket", "recon_data"):
        queue, found = context.Queue(), []
        for _ in range(arguments.repeats):
            given = (source, arguments.coils, arguments.samples, tuple(arguments.steps), queue)
            process = context.Process(target=measure, args=given)
            process.start()
            found.append(queue.get())
            process.join()
        seconds, cpu, grown, kspace = min(found, key=lambda f: f[1])
        lines = arguments.steps[0] * arguments.steps[1]
        row = {
            "source": source,
            "coils": arguments.coils,
            "samples": arguments.samples,
            "lines": lines,
            "lines_per_s": round(lines / seconds),
            "lines_per_cpu_s": round(lines / cpu),
            "kspace_mib": round(kspace),
            "peak_growth_mib": round(grown),
            "peak_over_kspace": round(grown / kspace, 2),
        }
        rows.append(row)
        print(row, flush=True)
    arguments.out.parent.mkdir(exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
