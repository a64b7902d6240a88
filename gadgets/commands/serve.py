"""`slicediff serve`: run the MRD server until it is told to stop."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import threading
from pathlib import Path

from ..limits import Limits
from .arguments import add_options, given_options, port

SERVE_LIMITS = {
    "timeout_s": ("S", "longest silence in the middle of a scan"),
    "idle_s": ("S", "longest wait for a configuration and a header"),
    "slots": ("N", "reconstructions at a time; others wait in line"),
    "max_gib": ("GIB", "refuse a scan whose k-space is larger"),
    "max_message_mib": ("MIB", "refuse a message that is larger"),
    "connections": ("N", "open scans at a time"),
    "grace_s": ("S", "after SIGTERM, time for running scans to end before they hand out what they have"),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help='address or name to listen on; "::" is every address of IPv6 and IPv4 (default: 127.0.0.1)',
    )
    parser.add_argument("--port", type=port, default=9002, help="(default: 9002; 0 takes a free one)")
    for name, (unit, what) in SERVE_LIMITS.items():
        default = getattr(Limits, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar=unit,
            help=f"{what} (default: {default:g})",
        )
    parser.add_argument(
        "--keep-failed",
        type=Path,
        metavar="DIR",
        help="keep the raw data of scans that failed or were refused here, for `slicediff recon`",
    )
    parser.add_argument(
        "--keep-failed-gib",
        type=float,
        default=10.0,
        metavar="GIB",
        help="remove the oldest of them beyond this; running scans may take as much again (default: 10)",
    )
    parser.add_argument(
        "--health-port",
        type=port,
        metavar="PORT",
        help="answer HTTP /healthz and /metrics here (needs prometheus-client)",
    )
    parser.add_argument("--test-faults", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve; 0 after SIGTERM or Ctrl-C, 1 if the GPU was lost to this process."""
    from recon_core.ahead import end_at_once, left_behind

    from ..conformance.faults import load_prior_or_fault
    from ..failure import OneLine, gpu_lost
    from ..health import HealthPage
    from ..keep import FailedScans
    from ..server import Server
    from ..solve import load_prior_for

    log = logging.getLogger("slicediff")
    logging.getLogger().setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        # thread name: the peer's address, so whose scan
        handler.setFormatter(OneLine("%(asctime)s %(levelname)s [%(threadName)s] %(message)s"))
    limits = {name: getattr(arguments, name) for name in SERVE_LIMITS}
    load = load_prior_or_fault if arguments.test_faults else load_prior_for
    keep = arguments.keep_failed and FailedScans(arguments.keep_failed, arguments.keep_failed_gib)
    # a thread, as gigabytes may have been left behind
    recovering = threading.Thread(target=keep.recover if keep else None, name="recovering", daemon=True)
    with Server((arguments.host, arguments.port), given_options(arguments), load, keep, **limits) as server:
        server.warm_up()
        if arguments.health_port is not None:
            page = HealthPage((arguments.host, arguments.health_port), server.health)
            _announce(f"health on {arguments.host} port {page.server_address[1]}")
        facts = server.health()
        prior = f"prior {facts['prior']}" if facts["prior"] else "no prior"
        log.info("slicediff %s on %s with %s", facts["version"], facts["device"], prior)
        if facts["device"] == "cpu" and server.options.device == "auto" and built_for_cuda():
            log.warning(
                "torch is built for CUDA but finds no GPU: scans are computed on the CPU; "
                "--device cuda would refuse to start"
            )
        _retire_on_signals(server)
        recovering.start()  # not before all is well: a start that fails could not exit
        _announce(f"serving on {arguments.host} port {server.server_address[1]}")
        server.serve_forever(poll_interval=0.1)
    if left_behind():
        log.error("%d hung solvers are left behind", left_behind())
    if server.counts.open:
        log.error("scans that did not end in time: %d", server.counts.open)
    # threads that compute could crash the interpreter as it shuts down, those that write HDF5 block it for ever
    if server.talking or recovering.is_alive():
        end_at_once(int(gpu_lost.is_set()))
    return int(gpu_lost.is_set())


def _announce(what: str) -> None:
    """Print a line on stdout; a full disk behind it keeps no server from serving."""
    with contextlib.suppress(OSError):
        print(f"slicediff: {what}", flush=True)


def built_for_cuda() -> bool:
    """Whether this torch was built for CUDA, as the Linux one on PyPI is."""
    import torch

    return torch.version.cuda is not None


def _retire_on_signals(server) -> None:
    """SIGTERM and Ctrl-C let running scans finish; another Ctrl-C does not wait for them."""

    def retire(*_) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=server.retire, daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, retire)
