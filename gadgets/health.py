"""Status of a server: counts and metrics for a query, a probe and a monitoring system."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

from recon_core.ahead import left_behind

from .address import Listening

log = logging.getLogger("slicediff")
GAUGES = (
    ("uptime_s", "seconds since the start"),
    ("rss_mib", "resident memory in MiB"),
    ("open_files", "open files"),
    ("stuck_solvers", "solvers that hung and were left behind"),
)


class HealthError(Exception):
    """The health page cannot be served; the message is one sentence."""


class Counts:
    """Scans of a server, counted by state and outcome."""

    def __init__(self):
        self.lock = threading.Lock()
        self.began = time.monotonic()
        self.open = self.done = self.failed = 0

    def add(self, **changes: int) -> None:
        """Add to the named counts."""
        with self.lock:
            for name, change in changes.items():
                setattr(self, name, getattr(self, name) + change)


def process_facts() -> dict:
    """Resident memory, threads, open files, and solver threads that hung and were abandoned."""
    facts = {"threads": threading.active_count(), "stuck_solvers": left_behind()}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        facts |= {"rss_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1), "open_files": open_files}
    except OSError:  # not Linux
        facts |= {"rss_mib": None, "open_files": None}
    return facts


class HealthPage(Listening, ThreadingTCPServer):
    """HTTP next to the MRD server: /healthz (JSON; status 200 when ready, else 503) and /metrics (Prometheus).

    Not an HTTPServer, which asks for the host's full name: without a working DNS, for a long time.

    Args:
        address: (host, port), as for Listening.
        facts: returns the same facts as the health query.

    Raises:
        HealthError: if prometheus-client is not installed.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, address: tuple[str, int], facts: Callable[[], dict]):
        self.facts, self.metrics = facts, metrics_of(facts)
        super().__init__(address, _Page)
        threading.Thread(target=self.serve_forever, name="health", daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        """Log an error; at debug level if a probe merely disconnected before its answer."""
        gone = isinstance(sys.exc_info()[1], OSError)
        level = logging.DEBUG if gone else logging.ERROR
        log.log(level, "the health page could not answer %s", client_address[0], exc_info=not gone)


class _Page(BaseHTTPRequestHandler):
    timeout = 10

    def do_GET(self) -> None:
        """Answer one request."""
        self._reply()

    def do_HEAD(self) -> None:
        """The same without the body."""
        self._reply()

    def _reply(self) -> None:
        path = self.path.split("?")[0].rstrip("/")
        if path == "/healthz":
            facts = self.server.facts()
            self._answer(200 if facts["ready"] else 503, "application/json", json.dumps(facts).encode())
        elif path == "/metrics":
            self._answer(200, "text/plain; version=0.0.4; charset=utf-8", self.server.metrics())
        else:
            self._answer(404, "text/plain", b"/healthz and /metrics are here\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Log nothing: probes come every few seconds."""


def metrics_of(facts: Callable[[], dict]) -> Callable[[], bytes]:
    """A function that returns `facts` in Prometheus text format."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError:
        raise HealthError(
            "--health-port needs the package prometheus-client: pip install 'gadgetron-slicediff[metrics]'"
        ) from None

    class Collector:
        def collect(self):
            now = facts()
            ended = CounterMetricFamily("slicediff_scans", "Scans that ended, by outcome", labels=["outcome"])
            present = GaugeMetricFamily("slicediff_scans_now", "Scans that are here, by state", labels=["state"])
            for name in ("done", "failed"):
                ended.add_metric([name], now["scans"][name])
            for name in ("receiving", "queued", "running"):
                present.add_metric([name], now["scans"][name])
            yield from (ended, present)
            yield GaugeMetricFamily("slicediff_ready", "1 while new scans are taken", value=float(now["ready"]))
            for name, unit in GAUGES:
                if now[name] is not None:
                    yield GaugeMetricFamily(f"slicediff_{name}", unit, value=now[name])

    registry = CollectorRegistry()
    registry.register(Collector())
    return lambda: generate_latest(registry)
