"""The client: streams a scan file to a server and collects the images."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import ismrmrd

from . import wire as w
from .files import ScanFile


class SendError(Exception):
    """The server refused, failed, or sent no image; the message is one sentence."""


def send_scan(scan: ScanFile, host: str, port: int, config: str, on_text: Callable[[str], None] = lambda text: None, on_sent: Callable[[int], None] = lambda count: None, timeout_s: float = 3600.0) -> Iterator[ismrmrd.Image]:
    """Stream a scan and yield the images as they come.

    Args:
        config: path of a chain XML to send whole, else the name of a configuration on the server.
        on_text: called with each line the server sends.
        on_sent: called with the count of acquisitions sent.
        timeout_s: longest silence of the server.

    Raises:
        SendError: when the server cannot be reached, reports an error, or ends without an image.
    """
    try:
        sock = socket.create_connection((host, port), 10)
    except OSError as error:
        raise SendError(f"no server answers at {host} port {port}: {error}") from None
    with sock:
        wire = w.Wire(sock, timeout_s)
        sender = _Sender(scan, wire, config, on_sent)
        sender.start()
        count, failure = 0, ""
        try:
            for kind, item in wire.messages():
                if kind == w.IMAGE:
                    count += 1
                    yield item
                elif kind in (w.TEXT, w.ERROR):
                    on_text(item)
                    if kind == w.ERROR or item.startswith("ERROR"):
                        failure = item
        except w.WireError as error:
            failure = failure or f"the server is gone: {error}"
        sender.join(10)
        failure = failure or sender.failure
        if failure:
            raise SendError(f"{failure.removeprefix('ERROR: ')} ({count} images were received)")
        if not count:
            raise SendError("the server ended the scan without sending an image")


class _Sender(threading.Thread):
    """Sends while the images are being read, so that neither side waits for the other."""

    def __init__(self, scan: ScanFile, wire: w.Wire, config: str, on_sent: Callable[[int], None]):
        super().__init__(daemon=True)
        self.scan, self.wire, self.config, self.on_sent, self.failure = scan, wire, config, on_sent, ""

    def run(self) -> None:
        try:
            if Path(self.config).is_file():
                self.wire.send_config(Path(self.config).read_text())
            else:
                self.wire.send_config_file(self.config)
            self.wire.send_header(self.scan.header_xml)
            for count, line in enumerate(self.scan.acquisitions(), start=1):
                self.wire.send_item(line)
                if count % 256 == 0:
                    self.on_sent(count)
            self.on_sent(len(self.scan))
            self.wire.close()
        except OSError as error:
            self.failure = f"the server stopped taking the scan: {error}"
        except Exception as error:  # a thread's failure must reach the caller
            self.failure = f"the scan could not be sent: {error}"
            self.wire.sock.shutdown(socket.SHUT_RDWR)
