"""The warm server: one process, weights loaded once.

It serves gadgetron_ismrmrd_client, FIRE hosts and Gadgetron's <connect>.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import version
from . import wire as w
from .address import Listening
from .budget import Budget
from .chain import is_gadgetron_peer, options_of_config_name, properties_of
from .conversation import Host, run_scan
from .delivery import LINGER_S, await_delivery, linger
from .failure import ScanError, free_gpu_memory, gpu_lost, log_failure, sentence
from .health import Counts, process_facts
from .keep import FailedScans
from .limits import Limits
from .options import OptionsError, from_a_peer, make_options, options_from_json
from .solve import SOLVERS, device_of, load_prior_for, prior_of, warm_up
from .turns import Turns
from .visit import Stage, Visit

log = logging.getLogger("slicediff")
SPARE = 32  # connections without a scan, on top of the permitted scans
LAST_WORDS_S = 20.0  # after the grace period, for sending what there is
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


class Server(Listening, socketserver.ThreadingTCPServer):
    """MRD server; `serve_forever` accepts connections, one thread each.

    Args:
        address: (host, port), as for Listening.
        defaults: options that every scan starts from.
        load_prior: options -> prior; called once per (method, prior, device).
        keep: where failed scans are kept, if anywhere.
        limits: fields of Limits.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256  # beyond it, the kernel resets connections without a word

    def __init__(
        self,
        address,
        defaults: Mapping[str, Any] = {},
        load_prior: Callable = load_prior_for,
        keep: FailedScans | None = None,
        **limits,
    ):
        self.defaults, self.keep, self._load, self.limits = dict(defaults), keep, load_prior, Limits(**limits)
        self.options = make_options(self.defaults)
        self.priors: dict = {}
        self.lock, self.turns, self.counts = threading.Lock(), Turns(self.limits.slots), Counts()
        self.retiring, self.out_of_time = threading.Event(), threading.Event()
        self.talking: set[Handler] = set()  # all connections, also those that linger
        self.gave_way = False
        self.last_turn = math.inf  # monotonic time from which on no image is begun
        super().__init__(address, Handler)

    def prior(self, options):
        """The prior for these options, loaded at most once."""
        key = (options.method, prior_of(options), str(device_of(options)))
        with self.lock:
            if key not in self.priors:
                self.priors[key] = self._load(options)
            return self.priors[key]

    def warm_up(self) -> None:
        """Load the default prior and run a tiny volume, so that the first scan is not slowed down.

        Raises:
            PriorError: if the prior cannot be loaded.
        """
        warm_up(self.prior(self.options), self.options)

    def retire(self) -> None:
        """Take no new scans; let running ones finish or, after the grace period, send what they have; then stop."""
        log.warning("shutting down: no new scans are taken, %d are open", self.counts.open)
        self.retiring.set()
        _wait_while(lambda: self.counts.open, self.limits.grace_s)
        self.last_turn = time.monotonic() + LAST_WORDS_S / 2
        self.out_of_time.set()
        _wait_while(lambda: self.counts.open, LAST_WORDS_S)
        _wait_while(lambda: self.talking, LINGER_S)
        self.shutdown()

    def service_actions(self) -> None:
        """Hang up on peers that send no header in time, and on all once the time is over, also those that come then.

        Called several times a second.
        """
        for handler in list(self.talking):
            if self.out_of_time.is_set() and not handler.wire.stopped:
                handler.hang_up("this server is shutting down: come again when it is back")
            elif time.monotonic() > handler.until:
                handler.hang_up(f"no configuration and header came within {self.limits.idle_s:g} s")

    def give_way(self) -> None:
        """Retire, once, because the GPU is lost to this process: its supervisor should start another."""
        with self.lock:
            if self.gave_way:
                return
            self.gave_way = True
        log.error("the GPU is lost to this process, which therefore exits: restart it")
        threading.Thread(target=self.retire, name="retiring", daemon=True).start()

    def health(self) -> dict:
        """Facts for the query slicediff::health and the health page."""
        open_, running, queued = self.counts.open, self.turns.running, self.turns.waiting
        scans = {"done": self.counts.done, "failed": self.counts.failed}
        scans |= {"receiving": max(0, open_ - running - queued), "queued": queued, "running": running}
        room = open_ < self.limits.connections and len(self.talking) < self.limits.connections + SPARE
        return {
            "ready": room and not self.retiring.is_set() and not gpu_lost.is_set(),
            "gpu_lost": gpu_lost.is_set(),
            "version": version(),
            "device": str(device_of(self.options)),
            "prior": prior_of(self.options) or None,
            "scans": scans,
            "uptime_s": round(time.monotonic() - self.counts.began, 1),
            **process_facts(),
        }

    def handle_error(self, request, client_address) -> None:
        """Log an exception that a handler did not expect."""
        log.exception("the conversation with %s failed", client_address)


class Handler(socketserver.BaseRequestHandler):
    """One connection."""

    server: Server

    def setup(self) -> None:
        # The name is shown in the log; threads of this scan inherit it.
        threading.current_thread().name = "{}:{}".format(*self.client_address[:2])
        limits = self.server.limits
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                self.request.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        timeout_s = min(limits.idle_s, limits.timeout_s)
        message_bytes, buffer_bytes = int(limits.max_message_mib * 2**20), int(limits.max_gib * 2**30)
        self.wire = w.QueuedWire(self.request, timeout_s, message_bytes, buffer_bytes)
        self.visit, self.gadgetron = Visit(self.server.counts, self.server.keep), False
        self.until = time.monotonic() + limits.idle_s  # the header must have come by then
        self.server.talking.add(self)

    def handle(self) -> None:
        log.info("connection from %s", self.client_address)
        try:
            self._converse()
            self.wire.close()
            self.wire.flush()
            if self.visit.stage is Stage.OPEN:
                # Its place is free at once: the next scan may come before we hear of the arrival of this one.
                self.visit.leave()
                await_delivery(self.request, self.server.limits.timeout_s)
                self.visit.end(well=True)
        except (OSError, w.WireError) as error:
            level = logging.WARNING if self.wire.heard else logging.INFO
            log.log(level, "connection from %s ended early: %s", self.client_address, error)
        finally:
            self.visit.end(well=False)  # unless it has ended
            if gpu_lost.is_set():
                self.server.give_way()
        linger(self.request, self.server.limits.idle_s if self.wire.stopped else self.server.limits.timeout_s)

    def finish(self) -> None:
        try:
            with contextlib.suppress(OSError):
                self.wire.flush()
            self.wire.release()
            self.visit.close()
        finally:
            self.server.talking.discard(self)

    def hang_up(self, why: str) -> None:
        """Stop reading: a scan that is still being received ends here."""
        self.until = math.inf
        self.wire.stop_reading(why)

    def _converse(self) -> None:
        config: tuple[int, str] | None = None
        texts, room = [], w.MAX_TEXT_BYTES
        if len(self.server.talking) > self.server.limits.connections + SPARE:
            return self.wire.send_text(
                f"ERROR: this server has {len(self.server.talking) - 1} connections already: try again later"
            )
        try:
            for kind, item in self.wire.messages():
                if kind == w.QUERY:
                    self.wire.send_response(item[0], self.answer(item[1]))
                elif kind in (w.CONFIG_FILE, w.CONFIG_TEXT):
                    config = (kind, item)
                    self.gadgetron = kind == w.CONFIG_TEXT and is_gadgetron_peer(item)
                elif kind == w.TEXT:
                    texts.append(item)
                    room -= len(item)
                    if room < 0:
                        raise w.WireError(f"more than {w.MAX_TEXT_BYTES >> 20} MiB of texts came before the header")
                elif kind == w.HEADER:
                    self.until = math.inf
                    return self._scan(config, texts, item.encode())
                else:
                    raise w.WireError(
                        f"expected a configuration and a header before the data, got message {kind} first"
                    )
        except Exception as error:  # the boundary: every failure must reach the peer
            self._tell(error)

    def _scan(self, config: tuple[int, str] | None, texts: list[str], header_xml: bytes) -> None:
        self.wire.tap = self.visit.begin(header_xml)  # before anything can fail, so that everything received is kept
        self.wire.be_patient_for(self.server.limits.timeout_s)
        sources, first, notify = [self.server.defaults, options_of_config(config)], None, lambda text: None
        if not self.gadgetron:
            first, notify = self._more_options(sources, texts, header_xml), self.wire.send_text
        run_scan(self.wire, header_xml, sources, ServerHost(self), notify, first)

    def _more_options(
        self, sources: list[Mapping[str, Any]], texts: list[str], header_xml: bytes
    ) -> tuple[int, Any] | None:
        """Add the options in `texts`, and in those that follow the header, to `sources`.

        Returns the first other message, None if the scan ends before.
        """
        for kind, item in itertools.chain(((w.TEXT, text) for text in texts), self.wire.messages()):
            if kind == w.TEXT and not item.lstrip().startswith("{"):
                self.wire.send_text(f"this text holds no options, which are a JSON object: {item[:100]!r}")
            elif kind == w.TEXT:
                found, others = options_from_json(item)
                sources.append(found)
                if others:
                    ignored = f"parameters that are not options of this plugin were ignored: {', '.join(others)}"
                    self.wire.send_text(ignored[:1000])
            elif kind == w.QUERY:
                self.wire.send_response(item[0], self.answer(item[1]))
            elif kind != w.HEADER or item.encode() != header_xml:  # the same one again does no harm
                return kind, item
        return None

    def _tell(self, error: Exception) -> None:
        """Send an ERROR to Gadgetron, but a TEXT to clients, which abort on any ERROR."""
        what, level = ("the scan failed", logging.ERROR) if self.wire.heard else ("nothing was asked", logging.INFO)
        log_failure(what, error, level)
        if self.gadgetron:
            self.visit.end(well=False)
            self.wire.drain()  # it may not read while it still sends
            self.wire.send_error(f"slice diffusion: {sentence(error)}")
        else:
            self.wire.send_text(f"ERROR: {sentence(error)}")
            self.visit.end(well=False)
            self.wire.drain()

    def answer(self, question: str) -> str:
        """Reply to a query message."""
        known = {
            "gadgetron::info": lambda: f"gadgetron-slicediff {version()}",
            "gadgetron::version": version,
            "slicediff::health": lambda: json.dumps(self.server.health()),
        }
        if question in known:
            return known[question]()
        return f"unknown query {question[:100]!r}; known are {', '.join(known)}"


class ServerHost(Host):
    """What the server grants one connection."""

    def __init__(self, handler: Handler):
        self.handler, self.server = handler, handler.server

    def load_prior(self, options):
        """The server's loaded prior."""
        return self.server.prior(options)

    def take_in(self, header) -> None:
        """Open the scan's memory budget; ScanError if the server takes no scans now, or cannot take this one."""
        server = self.server
        if server.retiring.is_set():
            raise ScanError("this server is shutting down and takes no new scan: send it again when the server is back")
        if server.counts.open > server.limits.connections:
            count = server.limits.connections
            raise ScanError(f"this server has {count} open scan{'s' * (count != 1)} already: send it again later")
        on_cpu = device_of(server.options).type == "cpu"
        self.budget = Budget(header, server.limits.max_gib, server.options.coils if on_cpu else 0)

    def admit(self, coils: int, volumes: int) -> None:
        """ScanError if they would exceed the scan's budget."""
        self.budget.check(coils, volumes)

    def answer(self, question: str) -> str:
        """The server's reply, the same as outside a scan."""
        return self.handler.answer(question)

    def why_stop(self) -> str:
        """Reason to finish the scan early, or ""."""
        return "because the server is shutting down" if self.server.out_of_time.is_set() else ""

    def give_up(self) -> str:
        """Reason not to begin another image, or ""."""
        if self.handler.wire.gone():
            return "because the peer is gone"
        return self.why_stop() if time.monotonic() > self.server.last_turn else ""

    @contextlib.contextmanager
    def hold_device(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Hold one of the device's slots; ReconError if the peer is gone, or the server has no time left.

        Once the grace period is over the queue moves fast, so most still get a turn.
        """

        def tell_place(place: int) -> None:
            tell(f"waiting for the device, number {place} in the queue")

        with self.server.turns.hold(tell_place, self.give_up):
            yield
        if device_of(self.server.options).type == "cuda" and not self.server.turns.waiting:
            # Gadgetron's own gadgets may want the same GPU; freeing may hang, so nobody waits.
            SOLVERS.begin(free_gpu_memory, "freeing memory")


def options_of_config(config: tuple[int, str] | None) -> dict[str, Any]:
    """Options that a client's configuration message contains or refers to by name."""
    if config is None:
        raise OptionsError("expected a configuration (name or XML) before the header, got none")
    kind, text = config
    if kind == w.CONFIG_TEXT and "<" in text:
        return from_a_peer(properties_of(text))
    return options_of_config_name(text.strip())


def _wait_while(busy: Callable[[], Any], longest_s: float) -> None:
    end = time.monotonic() + longest_s
    while busy() and time.monotonic() < end:
        time.sleep(0.05)
