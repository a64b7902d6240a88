"""How long after a scan's last line its images come: warm server, <execute>-like start, offline command.

    python tests/benchmarks/latency.py [--repeats 3] [--sweeps 12] [--voxel-mm 2]

The example head, 8 coils, R = 8, is sent as fast as the socket takes it. Rows go to results/latency.csv. The ways take
turns within a repeat, so that a busy machine is busy for all of them; what is written is the median.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from scans import save_table

from gadgets.conformance.peer import ACQUISITION, CLOSE, IMAGE, Peer, close, config_name, gadgetron_config, text_message
from gadgets.conformance.peer import HEADER as HEADER_ID
from gadgets.demo import EXAMPLE
from gadgets.header import parse_header
from gadgets.options import make_options
from gadgets.recon import reconstruct
from gadgets.scan_files import ScanFile
from gadgets.server import Server
from gadgets.simulation.scan import SimulateOptions, simulate


class Stream:
    """The bytes of a scan behind its configuration."""

    def __init__(self, path: Path):
        with ScanFile(path) as scan:
            self.header = scan.header_xml
            self.lines = [ACQUISITION.to_bytes(2, "little") + line.to_bytes() for line in scan.acquisitions()]


def exchange(peer: Peer, stream: Stream, config: bytes) -> tuple[float, float, float, float]:
    """Seconds from the first byte sent: last line sent, first image, last image, CLOSE."""
    began, times = time.monotonic(), {}

    def send() -> None:
        peer.send(config, text_message(HEADER_ID, stream.header))
        for line in stream.lines:
            peer.send(line)
        times["sent"] = time.monotonic() - began
        peer.send(close())

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    arrived = []
    while (kind := peer.next_message()[0]) != CLOSE:
        if kind == IMAGE:
            arrived.append(time.monotonic() - began)
    thread.join()
    assert len(arrived) == 2, f"{len(arrived)} images"
    return times["sent"], arrived[0], arrived[1], time.monotonic() - began


def warm_server(server: Server, stream: Stream) -> tuple:
    """A scan to a server that is up, as Gadgetron's <connect> sends it."""
    with Peer(server.server_address[:2], 3600) as peer:
        return exchange(peer, stream, gadgetron_config())


def client_of_server(server: Server, stream: Stream) -> tuple:
    """The same as a client."""
    with Peer(server.server_address[:2], 3600) as peer:
        return exchange(peer, stream, config_name("default"))


def execute(stream: Stream, properties: str) -> tuple:
    """A process started for the scan, as <execute> does; its start counts, because the scan waits for it."""
    with socket.create_server(("localhost", 0)) as listener:
        began = time.monotonic()
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-W", "ignore", "-m", "gadgetron", port, "gadgets", "slice_diffusion"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        sock, _ = listener.accept()
        peer = Peer.__new__(Peer)
        peer.sock, peer.stream = sock, sock.makefile("rb")
        start = time.monotonic() - began
        with peer:
            times = exchange(peer, stream, gadgetron_config(properties))
        process.wait(60)
    return tuple(start + t for t in times)


def offline_command(path: Path, sweeps: int, out: Path) -> tuple:
    """`slicediff recon` as a process; the file is there at once, so all its time is after the last line."""
    began = time.monotonic()
    program = [sys.executable, "-W", "ignore", "-m", "gadgets.cli"]
    command = [*program, "recon", str(path), str(out), "--sweeps", str(sweeps)]
    subprocess.run(command, check=True, capture_output=True)
    end = time.monotonic() - began
    return 0.0, float("nan"), end, end


def offline_in_process(path: Path, prior, sweeps: int) -> tuple:
    """The chain on the file in a process that is warm: what the server is measured against."""
    began, times = time.monotonic(), []
    with ScanFile(path) as scan:
        header, options = parse_header(scan.header_xml), make_options({"sweeps": sweeps})
        for _ in reconstruct(header, scan.acquisitions(), prior, options):
            times.append(time.monotonic() - began)
    return 0.0, times[0], times[1], times[1]


def main() -> None:
    """Run all ways in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sweeps", type=int, default=12)
    parser.add_argument("--voxel-mm", type=float, default=2.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Server(("127.0.0.1", 0), {"sweeps": arguments.sweeps}) as server:
        path = Path(folder) / "scan.h5"
        facts = simulate(EXAMPLE, path, SimulateOptions(oblique=True, voxel_mm=arguments.voxel_mm))
        stream = Stream(path)
        server.warm_up()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        prior = server.prior(server.options)
        ways = {
            "warm server, <connect>": lambda: warm_server(server, stream),
            "warm server, client": lambda: client_of_server(server, stream),
            "new process, <execute>": lambda: execute(stream, f'<property name="sweeps" value="{arguments.sweeps}"/>'),
            "offline, slicediff recon": lambda: offline_command(path, arguments.sweeps, Path(folder) / "images.h5"),
            "offline, warm process": lambda: offline_in_process(path, prior, arguments.sweeps),
        }
        measured: dict[str, list] = {name: [] for name in ways}
        for repeat in range(arguments.repeats):
            for name, way in ways.items():
                measured[name].append(way())
                print(repeat, name, [round(t, 2) for t in measured[name][-1]], flush=True)
        server.shutdown()
    write(measured, facts, arguments)


def write(measured: dict[str, list], facts: dict, arguments: argparse.Namespace) -> None:
    """The table, and each way's total over that of the warm offline process (median of the repeats' ratios)."""
    rows = []
    offline = measured["offline, warm process"]
    for name, times in measured.items():
        sent, first, last, _ = (statistics.median(column) for column in zip(*times))
        over = statistics.median(mine[2] / theirs[2] for mine, theirs in zip(times, offline))
        row = {
            "way": name,
            "first_image_after_last_line_s": "" if first != first else round(first - sent, 2),
            "last_image_after_last_line_s": round(last - sent, 2),
            "first_image_s": "" if first != first else round(first, 2),
            "total_s": round(last, 2),
            "total_over_offline_percent": round(100 * (over - 1), 1),
            "matrix": "x".join(map(str, facts["matrix"])),
            "lines": facts["lines"],
            "sweeps": arguments.sweeps,
            "repeats": arguments.repeats,
        }
        rows.append(row)
    save_table("latency", rows)


if __name__ == "__main__":
    main()
