"""The client: streams a scan file to a server and collects the images."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import ismrmrd

from . import wire as w
from .failure import ScanError, of_images, sentence
from .flags import NOISE_BIT, SKIP_BITS, VolumeKey, is_calibration_only, volume_key
from .geometry import read_geometry
from .header import parse_header
from .partitions import Partitions
from .scan_files import ScanFile

TICK_S = 0.0025  # unit of time stamps
LEAP_S = 600.0  # no scanner pauses this long between two lines
ERROR_TEXT = re.compile(r"^(\[[^]]*\] )?ERROR: ")  # ours, and Gadgetron's, which starts with the name of the node


class SendError(Exception):
    """The server refused, failed, or sent fewer images than it should; the message is one sentence."""


def send_scan(
    scan: ScanFile,
    host: str,
    port: int,
    config: str,
    on_text: Callable[[str], None] = lambda text: None,
    on_sent: Callable[[int], None] = lambda count: None,
    timeout_s: float = 3600.0,
    realtime: bool = False,
    expect: int | None = None,
) -> Iterator[ismrmrd.Image]:
    """Stream a scan, waveforms included, and yield the images as they arrive.

    Args:
        config: path of a chain XML to send in full, else the name of a configuration on the server.
        on_text: called with each line the server sends.
        on_sent: called with the number of acquisitions sent so far.
        timeout_s: longest time that the server may stay silent.
        realtime: send each line when its time stamp is due, as the scanner did.
        expect: minimum number of images; None: in every series, at least as many as the scan has volumes.

    Raises:
        SendError: when the server cannot be reached, reports an error, or sends fewer images than expected.
        OSError: before anything is sent, if the chain XML cannot be read.
    """
    chain = Path(config).read_bytes() if Path(config).is_file() else None
    with _connected(host, port) as sock, w.Wire(sock, timeout_s) as wire:
        sender = _Sender(scan, wire, config if chain is None else chain, on_sent, realtime)
        sender.start()
        came, failure, gone = Counter(), "", ""
        try:
            for kind, item in wire.messages():
                if kind == w.IMAGE:
                    came[item.image_series_index] += 1
                    yield item
                elif kind in (w.TEXT, w.ERROR):
                    on_text(item)
                    if kind == w.ERROR or ERROR_TEXT.match(item):
                        failure = ERROR_TEXT.sub("", item)
                        sender.give_up()
        except w.WireError as error:
            gone = f"the server is gone: {error}"
        finally:
            sender.stop.set()
        sender.join(10)
        # ours first: the server's complaint about a scan that we broke off says nothing new
        reason = sender.fault or failure or gone or sender.failure
        if reason:
            raise SendError(f"{reason} ({of_images(came.total(), '{images} {were} received')})")
        _check(came, sender.volumes, expect)
        if expect is None and not sender.complete:
            images = of_images(came.total(), "{images} {were} received")
            raise SendError(f"the server ended the scan before all of its lines were sent ({images})")


def ask(host: str, port: int, question: str, timeout_s: float = 10.0) -> str:
    """A server's answer to a query; SendError if there is none."""
    with _connected(host, port) as sock, w.Wire(sock, timeout_s) as wire:
        wire.send_query(question)
        wire.close()
        try:
            answers, said = [], ""
            for kind, item in wire.messages():
                if kind == w.RESPONSE:
                    answers.append(item[1])
                elif kind in (w.TEXT, w.ERROR):
                    said = f": {ERROR_TEXT.sub('', item)}"
        except w.WireError as error:
            raise SendError(f"the server at {host} port {port} did not answer: {error}") from None
    if not answers:
        raise SendError(f"the server at {host} port {port} did not answer the query {question!r}{said}")
    return answers[0]


def _connected(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), 10)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host name at all
        raise SendError(f"no server answers at {host} port {port}: {error}") from None


def _check(came: Counter, volumes: int, expect: int | None) -> None:
    """SendError if images are missing."""
    if not came:
        raise SendError("the server ended the scan without sending an image")
    if expect is not None and came.total() < expect:
        raise SendError(f"expected {of_images(expect, '{images}')}, {came.total()} came")
    short = [series for series, count in sorted(came.items()) if count < volumes]
    if expect is None and short:
        images = of_images(came[short[0]], "{images}")
        raise SendError(f"the scan has {volumes} volumes, but series {short[0]} has only {images}")


def _is_of_an_image(line: ismrmrd.Acquisition) -> bool:
    """Whether a line belongs to an image volume.

    Lines of another encoding (prescans, external calibration) have their own counters.
    """
    return not (line.flags & (NOISE_BIT | SKIP_BITS) or is_calibration_only(line.flags) or line.encoding_space_ref)


class _Sender(threading.Thread):
    """Sends while the images are being read, so that neither side waits for the other."""

    def __init__(
        self, scan: ScanFile, wire: w.Wire, config: str | bytes, on_sent: Callable[[int], None], realtime: bool
    ):
        super().__init__(daemon=True)
        self.scan, self.wire, self.config, self.on_sent = scan, wire, config, on_sent
        self.failure = self.fault = ""  # the server's, the scan's
        self.pace = _Pace() if realtime else None
        self.stop = threading.Event()
        self.given_up = self.complete = False
        self.seen: set[VolumeKey] = set()
        self.partitions = None  # if the header cannot be read, the server says so
        with contextlib.suppress(ScanError):
            header = parse_header(scan.header_xml)
            self.partitions = Partitions(read_geometry(header), header)

    def give_up(self) -> None:
        """Send no more lines and close the scan properly: the server has reported a failure."""
        self.given_up = True
        self.stop.set()

    @property
    def volumes(self) -> int:
        """Number of volumes that the lines sent so far belong to."""
        return len(self.seen)

    def run(self) -> None:
        try:
            (self.wire.send_config if isinstance(self.config, bytes) else self.wire.send_config_file)(self.config)
            self.wire.send_header(self.scan.header_xml)
            self.complete = self._send_items()
            if self.complete:
                self.on_sent(len(self.scan))
            if self.complete or self.given_up:
                self.wire.close()
        except OSError as error:
            self.failure = f"the server stopped taking the scan: {error}"
        except Exception as error:  # a thread's failure must reach the caller
            self.fault = f"the scan could not be sent completely: {sentence(error)}"
            with contextlib.suppress(OSError):
                self.wire.sock.shutdown(socket.SHUT_WR)  # the server reconstructs what it has received

    def _send_items(self) -> bool:
        """Send everything; False if stopped early because the server no longer listens."""
        count = 0
        for item in self.scan.items():
            stamp = item.time_stamp if isinstance(item, ismrmrd.Waveform) else item.acquisition_time_stamp
            if self.stop.wait(self.pace.seconds_until(stamp)) if self.pace else self.stop.is_set():
                return False
            self.wire.send_item(item)
            if isinstance(item, ismrmrd.Acquisition):
                count += 1
                if _is_of_an_image(item):
                    self.seen.add(self._key(item))
                if self.pace or count % 256 == 0:
                    self.on_sent(count)
        return True

    def _key(self, line: ismrmrd.Acquisition) -> VolumeKey:
        """Which volume an image's line belongs to."""
        if self.partitions:
            self.partitions.see(line)
            line = self.partitions.recounted(line)
        return volume_key(line.idx)


class _Pace:
    """When a line is due, by its time stamp; leaps beyond LEAP_S are skipped.

    Lines without a time stamp, or out of order, are due at once.
    """

    def __init__(self):
        self.first = self.last = 0
        self.began = 0.0

    def seconds_until(self, stamp: int) -> float:
        if not stamp:
            return 0.0
        if not self.first:
            self.first, self.last, self.began = stamp, stamp, time.monotonic()
        if abs(stamp - self.last) * TICK_S > LEAP_S:
            self.first += stamp - self.last
        self.last = stamp
        return max(0.0, (stamp - self.first) * TICK_S - (time.monotonic() - self.began))
