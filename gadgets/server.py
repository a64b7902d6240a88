"""The warm server: one process, weights loaded once, for gadgetron_ismrmrd_client, FIRE hosts and Gadgetron's <connect>."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from typing import Any

from . import wire as w
from .chain import is_gadgetron_peer, options_of_config_name, properties_of
from .conversation import run_scan, sentence
from .external import answer_gadgetron
from .options import Options, OptionsError, make_options, options_from_json
from .recon import device_of, load_prior_for

log = logging.getLogger("slicediff")
LINGER_S = 5.0


class Server(socketserver.ThreadingTCPServer):
    """MRD server; `serve_forever` accepts connections, one thread each.

    Args:
        address: (host, port); port 0 takes a free one, see server_address.
        defaults: options that every scan starts from.
        load_prior: options -> prior; called once per (prior, device).
        timeout_s: longest silence of a peer.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, address, defaults: Mapping[str, Any] = {}, load_prior: Callable = load_prior_for, timeout_s: float = 600.0):
        self.defaults, self.timeout_s, self._load = dict(defaults), timeout_s, load_prior
        make_options(self.defaults)
        self.priors: dict = {}
        self.lock = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def prior(self, options: Options):
        """The prior for these options, loaded at most once."""
        key = (options.method, options.prior, str(device_of(options)))
        with self.lock:
            if key not in self.priors:
                self.priors[key] = self._load(options)
            return self.priors[key]

    def warm_up(self) -> None:
        """Load the default prior before the first scan; PriorError if it cannot be."""
        self.prior(make_options(self.defaults))


class Handler(socketserver.BaseRequestHandler):
    """One connection."""

    server: Server

    def handle(self) -> None:
        wire = w.Wire(self.request, self.server.timeout_s)
        log.info("connection from %s", self.client_address)
        try:
            self._converse(wire)
            wire.close()
            self._linger()
        except (OSError, w.WireError) as error:
            log.warning("connection from %s ended early: %s", self.client_address, error)

    def _converse(self, wire: w.Wire) -> None:
        config: tuple[int, str] | None = None
        try:
            for kind, item in wire.messages():
                if kind == w.QUERY:
                    wire.send_response(item[0], answer(item[1]))
                elif kind in (w.CONFIG_FILE, w.CONFIG_TEXT):
                    config = (kind, item)
                elif kind == w.HEADER:
                    return self._scan(wire, config, item.encode())
                else:
                    raise w.WireError(f"expected a configuration and a header before the data, got message {kind} first")
        except Exception as error:  # the boundary: every failure must reach the client
            self._tell_client(wire, error)

    def _scan(self, wire: w.Wire, config: tuple[int, str] | None, header_xml: bytes) -> None:
        if config is not None and config[0] == w.CONFIG_TEXT and is_gadgetron_peer(config[1]):
            answer_gadgetron(wire, config[1].encode(), header_xml, self.server.defaults, self.server.prior)
            return
        sources = [self.server.defaults, options_of_config(config)]
        first = next(wire.messages(), None)
        while first is not None and first[0] == w.TEXT:
            sources.append(options_from_json(first[1]))
            first = next(wire.messages(), None)
        run_scan(wire, header_xml, sources, self.server.prior, wire.send_text, first)

    def _tell_client(self, wire: w.Wire, error: Exception) -> None:
        log.error("the scan failed: %s", sentence(error), exc_info=error)
        wire.drain()
        wire.send_text(f"ERROR: {sentence(error)}")

    def _linger(self) -> None:
        """Let the peer close first: closing with its bytes unread would destroy our last message."""
        self.request.shutdown(socket.SHUT_WR)
        self.request.settimeout(LINGER_S)
        try:
            while self.request.recv(1 << 16):
                pass
        except TimeoutError:
            log.debug("the peer did not close within %g s", LINGER_S)


def options_of_config(config: tuple[int, str] | None) -> dict[str, Any]:
    """Options behind a client's configuration message."""
    if config is None:
        raise OptionsError("expected a configuration (name or XML) before the header, got none")
    return options_of_config_name(config[1]) if config[0] == w.CONFIG_FILE else properties_of(config[1])


def answer(question: str) -> str:
    """Reply to a query message."""
    from . import version

    known = {"gadgetron::info": f"gadgetron-slicediff {version()}", "gadgetron::version": version(), "slicediff::health": "ok"}
    return known.get(question, f"unknown query {question!r}; known are {', '.join(known)}")
