"""Peers that play the other side byte for byte: Gadgetron's external node and its client."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading

import ismrmrd

from gadgets import wire as w
from gadgets.conformance.buffers import recon_data
from gadgets.header import parse_header
from gadgets.scan_files import ScanFile


def buckets(lines):
    """Lines as Gadgetron's accumulate trigger passes them on: by repetition, without noise and phase correction."""
    bucket, repetition = [], None
    for line in lines:
        if line.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT) or line.is_flag_set(ismrmrd.ACQ_IS_PHASECORR_DATA):
            continue
        if bucket and line.idx.repetition != repetition:
            yield bucket
            bucket = []
        repetition = line.idx.repetition
        bucket.append(line)
    yield bucket


class GadgetronPeer:
    """Gadgetron's side of an external node: CONFIG, HEADER, acquisitions, CLOSE; collects images and errors."""

    def __init__(self, sock: socket.socket, buffered: bool = False, remove_oversampling: bool = False):
        sock.settimeout(120)
        self.sock, self.buffered, self.remove_oversampling = sock, buffered, remove_oversampling
        self.images: list[ismrmrd.Image] = []
        self.errors: list[str] = []
        self.closed = False

    def run(self, scan: ScanFile, config: str | None = "", cut_after: int | None = None) -> None:
        """Send a scan and read until CLOSE; `cut_after` lines the connection's sending side is shut without CLOSE."""
        sender = threading.Thread(target=self._send, args=(scan, config, cut_after), daemon=True)
        sender.start()
        self._receive()
        sender.join(10)

    def _send(self, scan, properties, cut_after) -> None:
        config = b'<?xml version="1.0"?>\n'
        if properties is not None:
            config += f"<configuration>{properties}</configuration>\n".encode()
        try:
            self.sock.sendall(struct.pack("<HI", 2, len(config)) + config)
            self.sock.sendall(struct.pack("<HI", 3, len(scan.header_xml)) + scan.header_xml)
            for number, message in enumerate(self._messages(scan)):
                if number == cut_after:
                    self.sock.shutdown(socket.SHUT_WR)
                    return
                self.sock.sendall(message)
            self.sock.sendall(struct.pack("<H", 4))
        except OSError as error:
            self.errors.append(f"send failed: {error}")

    def _messages(self, scan):
        if self.buffered:
            header = parse_header(scan.header_xml)
            for lines in buckets(scan.acquisitions()):
                yield struct.pack("<H", 1023) + recon_data(header, lines, self.remove_oversampling)
        else:
            for line in scan.acquisitions():
                yield struct.pack("<H", 1008) + line.to_bytes()

    def _receive(self) -> None:
        with self.sock.makefile("rb") as stream:
            self._take(stream)

    def _take(self, stream) -> None:
        while True:
            kind = struct.unpack("<H", self._exactly(stream, 2))[0]
            if kind == 4:
                self.closed = True
                return
            if kind == 8:
                length = struct.unpack("<Q", self._exactly(stream, 8))[0]
                self.errors.append(self._exactly(stream, length).decode())
            elif kind == 1022:
                self.images.append(ismrmrd.Image.deserialize_from(lambda n: self._exactly(stream, int(n))))
            else:
                raise AssertionError(f"Received illegal message id from external peer: {kind}")

    @staticmethod
    def _exactly(stream, count: int) -> bytes:
        data = stream.read(count)
        assert len(data) == count, "the peer went away without CLOSE"
        return data


def run_execute(
    scan_path, properties="", cut_after=None, target="slice_diffusion", environment=None, buffered=False
) -> tuple[GadgetronPeer, int]:
    """Start `python -m gadgetron PORT gadgets TARGET` as <execute> does and play Gadgetron.

    Returns the peer and the exit code.
    """
    with socket.create_server(("localhost", 0)) as listener, ScanFile(scan_path) as scan:
        port = listener.getsockname()[1]
        command = [sys.executable, "-W", "ignore", "-m", "gadgetron", str(port), "gadgets", target]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        listener.settimeout(60)
        sock, _ = listener.accept()
        peer = GadgetronPeer(sock, buffered)
        try:
            peer.run(scan, properties, cut_after)
        finally:
            sock.close()
            out, _ = process.communicate(timeout=60)
    assert out == b"", "stdout is Gadgetron's data stream in --from_stream"
    return peer, process.returncode


class ClientPeer:
    """A client on a raw socket, as gadgetron_ismrmrd_client and FIRE hosts send."""

    def __init__(self, address):
        self.sock = socket.create_connection(address[:2], 10)
        self.wire = w.Wire(self.sock, timeout_s=120)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.wire.release()
        self.sock.close()

    def talk(
        self,
        scan: ScanFile | None,
        name: str = "default",
        text: str | None = None,
        lines: int | None = None,
        close: bool = True,
    ):
        """Send and return (images, texts)."""
        threading.Thread(target=self._send, args=(scan, name, text, lines, close), daemon=True).start()
        images, texts = [], []
        for kind, item in self.wire.messages():
            (images if kind == w.IMAGE else texts).append(item)
        return images, texts

    def _send(self, scan, name, text, lines, close):
        self.wire.send_config_file(name)
        if scan is not None:
            self.wire.send_header(scan.header_xml)
            if text is not None:
                self.wire.send_text(text)
            for number, line in enumerate(scan.acquisitions()):
                if number == lines:
                    break
                self.wire.send_item(line)
        if close:
            self.wire.close()
        else:
            self.sock.shutdown(socket.SHUT_WR)


def same_images(first: list[ismrmrd.Image], second: list[ismrmrd.Image]) -> bool:
    """Identical pixels, headers and attributes."""
    pairs = list(zip(first, second))
    return len(first) == len(second) and all(
        bytes(a.getHead()) == bytes(b.getHead())
        and a.data.tobytes() == b.data.tobytes()
        and a.attribute_string == b.attribute_string
        for a, b in pairs
    )
