"""MRD messages on a byte stream: the same framing for Gadgetron, its client, and FIRE hosts.

Acquisitions, waveforms and images are ismrmrd objects; this module only adds message ids and lengths, with checks that
the stock Connection lacks: end of stream is an error, not an endless loop, lengths are bounded, and an unknown message
id is reported.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import ismrmrd
import numpy as np

from .recon_data import MAX_ARRAY_BYTES, ReconData, ReconDataError, ReconDataReader

CONFIG_FILE, CONFIG_TEXT, HEADER, CLOSE, TEXT, QUERY, RESPONSE, ERROR = range(1, 9)
ACQUISITION, IMAGE, RECON_DATA, WAVEFORM = 1008, 1022, 1023, 1026
SCAN_ITEMS = (ACQUISITION, RECON_DATA, WAVEFORM)
CONFIG_FILE_BYTES = 1024
PAUSE_S = 0.5
MAX_TEXT_BYTES = 64 << 20
MAX_ITEM_BYTES = 4 << 30
BLOCK_BYTES = 4 << 20  # memory grows with what arrives, not with what was announced
PIXEL_TYPES = {
    1: np.uint16,
    2: np.int16,
    3: np.uint32,
    4: np.int32,
    5: np.float32,
    6: np.float64,
    7: np.complex64,
    8: np.complex128,
}
COMPRESSED_BITS = (1 << 52) | (1 << 53)


class WireError(Exception):
    """The stream violated the protocol or ended early; the message is one sentence."""


class PeerGone(OSError):
    """The peer no longer receives what is sent; the message is one sentence."""


class Wire:
    """Reads and writes messages on a connected socket.

    Args:
        sock: connected stream socket, which the caller closes.
        timeout_s: longest wait for the peer's next byte; None: forever.
        max_bytes: largest message accepted.
        max_buffer_bytes: largest ReconData, which can be a whole scan.
    """

    def __init__(
        self,
        sock: socket.socket,
        timeout_s: float | None = None,
        max_bytes: int = MAX_ITEM_BYTES,
        max_buffer_bytes: int = MAX_ARRAY_BYTES,
    ):
        sock.settimeout(timeout_s)
        self.sock, self.timeout_s, self.max_bytes, self.max_buffer_bytes = sock, timeout_s, max_bytes, max_buffer_bytes
        self.stream = sock.makefile("rb", buffering=1 << 20)
        self.ended = self.heard = self.lost = False
        self.stopped = ""  # why nothing more is read
        self.readouts: list[tuple[int, int]] = []  # of the scan's encodings (geometry.readouts), needed for buffers
        self.tap: Callable[[object], None] | None = None  # called with every item of the scan, whoever reads it
        self.sending = threading.Lock()  # the thread that reads the scan answers queries while images are sent

    def read(self, nbytes: int) -> bytes:
        """Read exactly `nbytes`; WireError if the peer is gone or silent."""
        if nbytes > BLOCK_BYTES:
            return b"".join(self.read(min(BLOCK_BYTES, nbytes - done)) for done in range(0, nbytes, BLOCK_BYTES))
        with self._told():
            data = self.stream.read(nbytes)
        self._complete(len(data), nbytes)
        return data

    def read_array(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """Read an array, without a copy if it is no larger than a block."""
        out = np.empty(shape, dtype)
        if out.nbytes > BLOCK_BYTES:
            return np.frombuffer(self.read(out.nbytes), dtype).reshape(shape)
        if out.nbytes:
            with self._told():
                got = self.stream.readinto(out.reshape(-1).view(np.uint8))
            self._complete(got, out.nbytes)
        return out

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            self.ended = True
            raise WireError(f"the peer sent nothing for {self.timeout_s:g} s") from None
        except OSError as error:
            self.ended = True
            raise WireError(f"the connection broke: {error}") from None

    def _complete(self, got: int, wanted: int) -> None:
        if got < wanted:
            self.ended = True
            why = "the stream ended before its CLOSE message: the peer is gone or the scan was cut off"
            raise WireError(self.stopped or why)

    def messages(self) -> Iterator[tuple[int, object]]:
        """(id, item) of each message until CLOSE.

        Text as str, queries and responses as (correlation id, text), the rest as ismrmrd objects or ReconData.
        """
        readers = {
            CONFIG_FILE: lambda: _decode(self.read(CONFIG_FILE_BYTES).split(b"\0")[0]),
            CONFIG_TEXT: self._read_text,
            HEADER: self._read_text,
            TEXT: self._read_text,
            QUERY: self._read_query,
            RESPONSE: lambda: (self._unpack("<Q"), self._read_text("<Q")),
            ERROR: lambda: self._read_text("<Q"),
            ACQUISITION: self._read_acquisition,
            WAVEFORM: self._read_waveform,
            IMAGE: self._read_image,
            RECON_DATA: self._read_recon_data,
        }
        while not self.ended:
            if self.stopped:
                self._complete(0, 1)
            kind = self._unpack("<H")
            self.heard = True
            if kind == CLOSE:
                self.ended = True
                return
            if kind not in readers:
                raise self._out_of_step(
                    f"received message id {kind}, which is unknown here or out of step: the stream cannot be read on"
                )
            item = readers[kind]()
            if self.tap is not None and kind in SCAN_ITEMS:
                self.tap(item)
            yield kind, item

    def be_patient_for(self, timeout_s: float | None) -> None:
        """From now on, wait this long for the peer's next byte."""
        self.timeout_s = timeout_s
        self.sock.settimeout(timeout_s)

    def stop_reading(self, why: str) -> None:
        """End the stream here, whatever is still to come, with this sentence; another thread may be reading."""
        self.stopped = why  # the shutdown alone would not stop us while there is more to read
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)

    def gone(self) -> bool:
        """Whether the connection is known to be broken (a peer that only closed its sending side is still there)."""
        try:
            poll = select.poll()
            poll.register(self.sock, 0)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True

    def release(self) -> None:
        """Release the socket, which its owner closes; before this call, closing it does not reach the peer."""
        self.stream.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def drain(self) -> None:
        """Read and discard what the peer still sends, so that closing does not destroy our last message."""
        with contextlib.suppress(WireError):
            for _ in self.messages():
                pass
        if self.lost:
            self._discard()

    def _discard(self) -> None:
        """A CLOSE cannot be found when out of step: read until the peer pauses, as it does once it waits for us."""
        end, poll = time.monotonic() + (self.timeout_s or math.inf), select.poll()
        with contextlib.suppress(OSError, ValueError):
            poll.register(self.sock, select.POLLIN)
            while poll.poll(1000 * PAUSE_S) and self.sock.recv(1 << 16) and time.monotonic() < end:
                pass

    def _out_of_step(self, text: str) -> WireError:
        """Mark the stream as unreadable from here; returns the error to raise."""
        self.ended = self.lost = True
        return WireError(text)

    def send_text(self, text: str) -> None:
        """Send TEXT, the only message that a client shows its user."""
        self._send_text(text, "<HI", TEXT)

    def send_error(self, text: str) -> None:
        """Send ERROR, which Gadgetron relays to its client; clients abort on it."""
        self._send_text(text, "<HQ", ERROR)

    def send_config(self, text: str | bytes) -> None:
        """Send configuration XML (or anything that a server accepts as such)."""
        self._send_text(text, "<HI", CONFIG_TEXT)

    def send_config_file(self, name: str) -> None:
        """Send the name of a configuration on the server."""
        data = name.encode()
        if len(data) >= CONFIG_FILE_BYTES:
            raise WireError(f"a configuration name may have {CONFIG_FILE_BYTES - 1} bytes, got {len(data)}")
        self._send(struct.pack("<H", CONFIG_FILE) + data.ljust(CONFIG_FILE_BYTES, b"\0"))

    def send_header(self, xml: bytes) -> None:
        """Send the ISMRMRD header as XML bytes."""
        self._send_text(xml, "<HI", HEADER)

    def send_query(self, text: str, number: int = 1) -> None:
        """Send a query to a server, answered by a RESPONSE with the same number."""
        self._send_text(text, "<HQQQ", QUERY, 0, number)

    def send_response(self, number: int, text: str) -> None:
        """Send the answer to a query."""
        self._send_text(text, "<HQQ", RESPONSE, number)

    def send_item(self, item: ismrmrd.Acquisition | ismrmrd.Waveform | ismrmrd.Image) -> None:
        """Send one acquisition, waveform or image, in a single write."""
        kinds = ((ismrmrd.Acquisition, ACQUISITION), (ismrmrd.Waveform, WAVEFORM), (ismrmrd.Image, IMAGE))
        kind = next(k for cls, k in kinds if isinstance(item, cls))
        parts = [struct.pack("<H", kind)]
        item.serialize_into(lambda data: parts.append(bytes(data)))
        self._send(b"".join(parts))

    def close(self) -> None:
        """Send CLOSE, our last message."""
        self._send(struct.pack("<H", CLOSE))

    def _send_text(self, text: str | bytes, form: str, *numbers: int) -> None:
        """Send `numbers` and the length of the text in the struct's `form`, then the text.

        What UTF-8 cannot hold (half of a pair in a host's JSON, a byte of a file's name) is escaped.
        """
        data = text.encode(errors="backslashreplace") if isinstance(text, str) else text
        self._send(struct.pack(form, *numbers, len(data)) + data)

    def _send(self, data: bytes) -> None:
        with self.sending:
            self._deliver(data)

    def _deliver(self, data: bytes) -> None:
        """Send all of it, with the timeout for each piece.

        sendall would apply it to the whole message, and a slow peer takes large images piece by piece.
        """
        rest = memoryview(data)
        while rest:
            rest = rest[self.sock.send(rest) :]

    def _unpack(self, form: str) -> int:
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def _read_text(self, form: str = "<I") -> str:
        length = self._unpack(form)
        self._check(length, min(MAX_TEXT_BYTES, self.max_bytes), "text")
        return _decode(self.read(length).rstrip(b"\0"))

    def _read_query(self) -> tuple[int, str]:
        self.read(8)
        return self._unpack("<Q"), self._read_text("<Q")

    def _read_acquisition(self) -> ismrmrd.Acquisition:
        head = ismrmrd.AcquisitionHeader.from_buffer_copy(self.read(ctypes.sizeof(ismrmrd.AcquisitionHeader)))
        if head.flags & COMPRESSED_BITS:
            raise self._out_of_step(
                "the acquisitions are compressed, which is not supported here: send them without -P or -T"
            )
        samples, coils, dims = head.number_of_samples, head.active_channels, head.trajectory_dimensions
        self._check(samples * (4 * dims + 8 * coils), self.max_bytes, "line")
        trajectory = self.read_array((samples, dims), np.float32)
        data = self.read_array((coils, samples), np.complex64)
        return ismrmrd.Acquisition(head, data, trajectory)

    def _read_waveform(self) -> ismrmrd.Waveform:
        head = ismrmrd.WaveformHeader.from_buffer_copy(self.read(ctypes.sizeof(ismrmrd.WaveformHeader)))
        self._check(4 * head.channels * head.number_of_samples, self.max_bytes, "waveform")
        waveform = ismrmrd.Waveform(head)
        waveform.data.ravel()[:] = np.frombuffer(self.read(4 * head.channels * head.number_of_samples), np.uint32)
        return waveform

    def _read_image(self) -> ismrmrd.Image:
        head = ismrmrd.ImageHeader.from_buffer_copy(self.read(ctypes.sizeof(ismrmrd.ImageHeader)))
        attributes = self._read_text("<Q")
        if head.data_type not in PIXEL_TYPES:
            raise self._out_of_step(
                f"an image of the unknown pixel type {head.data_type} came: the stream is damaged or out of step"
            )
        pixel = np.dtype(PIXEL_TYPES[head.data_type])
        nbytes = math.prod((head.channels, *head.matrix_size)) * pixel.itemsize
        self._check(nbytes, self.max_bytes, "image")
        try:
            image = ismrmrd.Image(head, attributes)
        except Exception as error:  # invalid attribute XML raises various exceptions
            raise self._out_of_step(
                f"the attributes of an image cannot be read: {' '.join(str(error).split())[:200]}"
            ) from error
        image.data.ravel()[:] = np.frombuffer(self.read(nbytes), pixel)
        return image

    def _read_recon_data(self) -> ReconData:
        try:
            return ReconDataReader(self.read, self.max_buffer_bytes, self.readouts).message()
        except ReconDataError as error:
            raise self._out_of_step(str(error)) from None

    def _check(self, length: int, limit: int, what: str) -> None:
        if length > limit:
            raise self._out_of_step(
                f"a {what} of {length} bytes was announced, the limit is {limit}: the stream is damaged or out of step"
            )


class QueuedWire(Wire):
    """A Wire that sends from a thread of its own, so that a peer that reads slowly holds up nobody else.

    Once the peer is gone, or has taken nothing for `timeout_s`, sending raises OSError. So it does while more than
    `max_buffer_bytes` wait to be taken; what waits is sent all the same.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.failure: OSError | None = None
        self.outgoing: queue.SimpleQueue = queue.SimpleQueue()
        self.waiting = 0  # bytes
        self.writer = threading.Thread(target=self._write, name="writer", daemon=True)
        self.writer.start()

    def gone(self) -> bool:
        """Whether the connection is known to be broken."""
        return self.failure is not None or super().gone()

    def flush(self) -> None:
        """Wait until everything is sent and end the thread; OSError if sending failed."""
        self.outgoing.put(None)
        self.writer.join()
        if self.failure is not None:
            raise self.failure

    def _send(self, data: bytes) -> None:
        if self.failure is not None:
            raise PeerGone(f"the peer takes no more messages: {self.failure}")
        if self.waiting > self.max_buffer_bytes:
            raise PeerGone(f"the peer has left {self.waiting / 2**30:.2g} GiB of images and messages unread")
        self._count(len(data))
        self.outgoing.put(data)

    def _count(self, nbytes: int) -> None:
        with self.sending:
            self.waiting += nbytes

    def _write(self) -> None:
        while (data := self.outgoing.get()) is not None:
            try:
                if self.failure is None:
                    self._deliver(data)
            except OSError as error:
                self.failure = error
            self._count(-len(data))


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")
