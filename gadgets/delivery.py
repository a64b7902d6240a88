"""The end of a connection: all that was sent has arrived, and the peer closes first."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import socket
import struct
import termios
import time

from .wire import PeerGone

log = logging.getLogger("slicediff")
LINGER_S = 5.0
LOOK_S = 0.05  # at what the peer has not taken yet


def await_delivery(sock: socket.socket, silence_s: float) -> None:
    """Send no more, and wait until the peer's machine has everything that was sent.

    What still comes from there is read and dropped.

    Raises:
        PeerGone: if the connection broke before, or nothing was taken for `silence_s`.
    """
    sock.shutdown(socket.SHUT_WR)
    sock.settimeout(LOOK_S)
    left, since, sends = math.inf, time.monotonic(), True
    while True:
        if broken := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise PeerGone(f"the peer went away before it had taken everything: {os.strerror(broken)}")
        if (now := _not_taken(sock)) == 0:
            return
        if now < left:
            left, since = now, time.monotonic()
        elif time.monotonic() - since > silence_s:
            raise PeerGone(f"the peer took nothing more for {silence_s:g} s, with {now} bytes to come")
        if not sends:
            time.sleep(LOOK_S)
            continue
        try:
            sends = bool(sock.recv(1 << 16))
        except TimeoutError:
            continue
        except OSError as error:
            raise PeerGone(f"the peer went away before it had taken everything: {error.strerror}") from None


def linger(sock: socket.socket, longest_s: float) -> None:
    """Wait, but not forever, for the peer to close first.

    Closing with its bytes unread would destroy our last message.
    """
    end = time.monotonic() + longest_s
    try:
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(LINGER_S)
        while sock.recv(1 << 16) and time.monotonic() < end:
            pass
    except OSError as error:
        log.debug("the peer did not close in good order: %s", error)


def _not_taken(sock: socket.socket) -> int:
    """Bytes that the peer's machine has not confirmed yet, and the end of the stream as one."""
    try:
        return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
    except OSError as error:  # a system that does not tell
        log.debug("what the peer has taken is not known: %s", error)
        return 0
