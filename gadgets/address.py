"""Listening sockets: a server accepts on every address that its host name resolves to."""

from __future__ import annotations

import errno
import logging
import socket
import socketserver
import threading
import time

log = logging.getLogger("slicediff")
PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED}  # transient: keep listening
RETRY_S = 0.1


class AddressError(Exception):
    """An address that cannot be listened on; the message is one sentence."""


def resolve(host: str, port: int) -> list[tuple[int, tuple]]:
    """(family, address) of each address of a host, IPv4 first; AddressError if it has none or the port is invalid."""
    if not 0 <= port <= 65535:
        raise AddressError(f"expected a port from 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host name at all
        raise AddressError(f"the host {host!r} has no address: {getattr(error, 'strerror', None) or error}") from None
    addresses = dict.fromkeys((family, where) for family, _, _, _, where in found)  # each once
    return sorted(addresses, key=lambda entry: entry[0] != socket.AF_INET)


class Listening(socketserver.TCPServer):
    """Mixin for a socketserver that accepts on all addresses of its host name; "::" means IPv6 and IPv4.

    Args:
        address: (host, port); port 0 picks a free one, see server_address.
        handler: request handler class.

    Raises:
        AddressError: if it cannot listen there.
    """

    def __init__(self, address: tuple[str, int], handler: type):
        self.others: list[socket.socket] = []
        (self.address_family, where), *others = resolve(*address)
        try:
            super().__init__(where, handler)
        except OSError as error:
            raise AddressError(f"cannot listen on {address[0]} port {address[1]}: {error.strerror}") from None
        for family, where in others:
            self._also_on(family, where[0])

    def server_bind(self) -> None:
        """Bind; "::" serves IPv4 as well."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.server_address[0] != "::")
        super().server_bind()

    def server_close(self) -> None:
        """Stop listening on every address."""
        super().server_close()
        for listener in self.others:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _also_on(self, family: int, host: str) -> None:
        """Also accept on another address of the host; if that fails (no IPv6), the first one still serves."""
        where = (host, self.server_address[1])
        try:
            listener = socket.create_server(where, family=family, backlog=self.request_queue_size)
        except OSError as error:
            log.warning("not served on %s: %s", host, error)
            return
        self.others.append(listener)

        def accept() -> None:
            while True:
                try:
                    self._take(*listener.accept())
                except OSError as error:
                    if error.errno not in PASSING:
                        return  # closed
                    log.error("a connection on %s could not be taken: %s", host, error.strerror)
                    time.sleep(RETRY_S)

        threading.Thread(target=accept, name="accept", daemon=True).start()

    def _take(self, connection: socket.socket, peer) -> None:
        try:
            self.process_request(connection, peer)
        except RuntimeError as error:  # no thread can be started
            log.error("the connection with %s could not be taken: %s", peer, error)
            self.shutdown_request(connection)

    def get_request(self) -> tuple[socket.socket, object]:
        """The next connection; a transient error (no free file descriptor) is logged, and raised only after a pause."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in PASSING:
                log.error("a connection could not be taken: %s", error.strerror)
                time.sleep(RETRY_S)
            raise
