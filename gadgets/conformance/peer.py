"""A peer on a raw socket, written from the wire format alone: it shares no code with the reader and writer it tests.

All numbers are little-endian. A message is a u16 id and a payload. The payload of an acquisition is its 340-byte
header, the trajectory and the samples [coils samples] as pairs of float32; that of an image is its 198-byte header, a
u64 length, that many bytes of attributes, and the pixels.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

CONFIG_NAME, CONFIG, HEADER, CLOSE, TEXT, QUERY, RESPONSE, ERROR = 1, 2, 3, 4, 5, 6, 7, 8
ACQUISITION, IMAGE = 1008, 1022
PIXEL_BYTES = {1: 2, 2: 2, 3: 4, 4: 4, 5: 4, 6: 8, 7: 8, 8: 16}


@dataclass
class Answer:
    """What a server sent: images as (header, attributes, pixels), texts, errors, replies.

    `closed` if it ended with CLOSE.
    """

    images: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    closed: bool = False

    @property
    def series(self) -> list[int]:
        """image_series_index of each image."""
        return [struct.unpack_from("<H", head, 128)[0] for head, _, _ in self.images]

    @property
    def complaint(self) -> str:
        """What went wrong, as told to Gadgetron (errors) or a client (texts)."""
        return "; ".join([*self.errors, *(text for text in self.texts if text.startswith("ERROR"))])

    def comment(self, number: int = -1) -> str:
        """The attributes of an image as text."""
        return self.images[number][1].decode()


def config_name(name: str) -> bytes:
    """CONFIG by name: 1024 bytes, padded with NUL."""
    return struct.pack("<H1024s", CONFIG_NAME, name.encode())


def gadgetron_config(properties: str = "") -> bytes:
    """CONFIG as Gadgetron's external node sends it."""
    return text_message(CONFIG, f'<?xml version="1.0"?>\n<configuration>{properties}</configuration>\n')


def text_message(kind: int, text: str | bytes) -> bytes:
    """A message of a u32 length and a text."""
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<HI", kind, len(data)) + data


def query(text: str) -> bytes:
    """QUERY with its correlation id."""
    return struct.pack("<HQQQ", QUERY, 0, 1, len(text)) + text.encode()


def close() -> bytes:
    """CLOSE."""
    return struct.pack("<H", CLOSE)


def acquisition(line) -> bytes:
    """One acquisition, field by field; `line` is an ismrmrd.Acquisition, used only for its values."""
    head, idx = line.getHead(), line.getHead().idx
    times = (head.acquisition_time_stamp, *head.physiology_time_stamp)
    channels = (head.available_channels, head.active_channels, *head.channel_mask)
    discarded = (head.discard_pre, head.discard_post)
    place = (*head.position, *head.read_dir, *head.phase_dir, *head.slice_dir, *head.patient_table_position)
    steps = (idx.kspace_encode_step_1, idx.kspace_encode_step_2)
    counters = (idx.average, idx.slice, idx.contrast, idx.phase, idx.repetition, idx.set, idx.segment)
    out = struct.pack("<HQIII3I", head.version, head.flags, head.measurement_uid, head.scan_counter, *times)
    out += struct.pack("<HHH16Q", head.number_of_samples, *channels)
    out += struct.pack("<5H", *discarded, head.center_sample, head.encoding_space_ref, head.trajectory_dimensions)
    out += struct.pack("<f3f3f3f3f3f", head.sample_time_us, *place)
    out += struct.pack("<9H8H8i8f", *steps, *counters, *idx.user, *head.user_int, *head.user_float)
    samples = [part for channel in line.data.tolist() for value in channel for part in (value.real, value.imag)]
    return struct.pack("<H", ACQUISITION) + out + struct.pack(f"<{len(samples)}f", *samples)


class Peer:
    """One connection; every read waits at most `patience_s`."""

    def __init__(self, address: tuple[str, int], patience_s: float = 30.0):
        self.sock = socket.create_connection(address, 10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(patience_s)
        self.stream = self.sock.makefile("rb")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception) -> None:
        self.stream.close()
        self.sock.close()

    def send(self, *parts: bytes) -> Peer:
        """Send bytes as they are."""
        self.sock.sendall(b"".join(parts))
        return self

    def half_close(self) -> Peer:
        """Close the sending side only."""
        self.sock.shutdown(socket.SHUT_WR)
        return self

    def vanish(self) -> None:
        """Disconnect like a killed process with unread data: the connection is reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.__exit__()

    def next_message(self) -> tuple[int, object]:
        """(id, content); ConnectionError if the stream ends or is not MRD."""
        (kind,) = struct.unpack("<H", self._exactly(2))
        if kind == CLOSE:
            return kind, None
        if kind == TEXT:
            return kind, self._exactly(*struct.unpack("<I", self._exactly(4))).decode()
        if kind == ERROR:
            return kind, self._exactly(*struct.unpack("<Q", self._exactly(8))).decode()
        if kind == RESPONSE:
            _, length = struct.unpack("<QQ", self._exactly(16))
            return kind, self._exactly(length).decode()
        if kind == IMAGE:
            head = self._exactly(198)
            attributes = self._exactly(*struct.unpack("<Q", self._exactly(8)))
            x, y, z = struct.unpack_from("<3H", head, 16)
            (pixel,), (channels,) = struct.unpack_from("<H", head, 2), struct.unpack_from("<H", head, 34)
            return kind, (head, attributes, self._exactly(x * y * z * channels * PIXEL_BYTES[pixel]))
        raise ConnectionError(f"illegal message id {kind}")

    def answer(self) -> Answer:
        """All messages until CLOSE, or until the connection ends."""
        out = Answer()
        places = {TEXT: out.texts, ERROR: out.errors, RESPONSE: out.replies, IMAGE: out.images}
        try:
            while not out.closed:
                kind, content = self.next_message()
                if kind == CLOSE:
                    out.closed = True
                else:
                    places[kind].append(content)
        except ConnectionError:
            pass
        return out

    def _exactly(self, count: int) -> bytes:
        data = self.stream.read(count)
        if len(data) < count:
            raise ConnectionError("the stream ended")
        return data
