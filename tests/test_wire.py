"""Framing: golden bytes, dribbled bytes, and streams that lie."""

import socket
import struct
import threading
import time

import ismrmrd
import numpy as np
import pytest

from gadgets.wire import ACQUISITION, TEXT, PeerGone, QueuedWire, Wire, WireError


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs, Wire(ours, timeout_s=5) as wire:
        yield wire, theirs


def an_acquisition():
    return ismrmrd.Acquisition.from_array(np.arange(12, dtype=np.complex64).reshape(3, 4), scan_counter=7)


@pytest.mark.parametrize("kind", [Wire, QueuedWire])
def test_a_slow_peer_that_goes_on_reading_gets_all_of_a_large_message(kind):
    """The timeout is for a peer that takes nothing at all."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        wire, text, got = kind(ours, timeout_s=0.5), "x" * 4_000_000, 0
        sender = threading.Thread(target=wire.send_text, args=(text,))
        sender.start()
        began = time.monotonic()
        while got < 6 + len(text):
            got += len(theirs.recv(200_000))
            time.sleep(0.05)
        sender.join()
        assert time.monotonic() - began > 1
        if kind is QueuedWire:
            wire.flush()
        wire.release()


def test_a_peer_that_takes_nothing_is_given_up():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with Wire(ours, timeout_s=0.2) as wire, pytest.raises(TimeoutError):
            wire.send_text("x" * 4_000_000)


def test_what_a_peer_leaves_unread_is_bounded_and_not_lost():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire, sent = QueuedWire(ours, timeout_s=20, max_buffer_bytes=1_000_000), 0
        with pytest.raises(PeerGone, match="the peer has left 0.00.* GiB of images and messages unread"):
            while sent < 100:
                wire.send_text("x" * 100_000)
                sent += 1
        assert 10 <= sent < 20
        with Wire(theirs, timeout_s=20) as peer:
            assert [len(text) for _, (_, text) in zip(range(sent), peer.messages())] == [100_000] * sent
        wire.send_text("it goes on")
        wire.flush()
        wire.release()


def test_the_peer_hears_of_a_close_after_the_wire_was_released():
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(5)
        with ours, Wire(ours):
            pass
        assert theirs.recv(1) == b""


def test_golden_bytes(pair):
    wire, theirs = pair
    wire.send_error("no")
    wire.send_text("hi")
    wire.send_config_file("x")
    wire.send_response(5, "ok")
    wire.close()
    expected = (
        b"\x08\x00" + struct.pack("<Q", 2) + b"no" + b"\x05\x00" + struct.pack("<I", 2) + b"hi"
        + b"\x01\x00" + b"x".ljust(1024, b"\0") + b"\x07\x00" + struct.pack("<QQ", 5, 2) + b"ok" + b"\x04\x00"
    )  # fmt: skip
    assert theirs.recv(4096) == expected


def test_an_acquisition_has_gadgetrons_layout(pair):
    wire, theirs = pair
    line = an_acquisition()
    wire.send_item(line)
    data = theirs.recv(4096)
    assert data[:2] == struct.pack("<H", ACQUISITION)
    assert len(data) == 2 + 340 + 8 * 12
    assert struct.unpack_from("<I", data, 2 + 14)[0] == 7
    assert data[342:] == line.data.tobytes()


def test_every_byte_alone_is_understood(pair):
    wire, theirs = pair
    line = an_acquisition()
    line.setFlag(ismrmrd.ACQ_IS_REVERSE)
    stream = struct.pack("<H", ACQUISITION) + line.to_bytes()
    stream += b"\x05\x00" + struct.pack("<I", 3) + b"abc" + b"\x04\x00"

    def dribble():
        for byte in stream:
            theirs.sendall(bytes([byte]))

    threading.Thread(target=dribble, daemon=True).start()
    (first, text) = list(wire.messages())
    assert first == (ACQUISITION, line)
    assert text == (TEXT, "abc")


@pytest.mark.parametrize("cut", [1, 2, 100, 342, 400])
def test_a_stream_that_ends_early_is_an_error(pair, cut):
    wire, theirs = pair
    theirs.sendall((struct.pack("<H", ACQUISITION) + an_acquisition().to_bytes())[:cut])
    theirs.close()
    with pytest.raises(WireError, match="ended before its CLOSE"):
        list(wire.messages())


@pytest.mark.parametrize(
    "stream,message",
    [
        (struct.pack("<H", 13968), "message id 13968"),
        (struct.pack("<HI", TEXT, 1 << 31), "2147483648 bytes was announced"),
        (struct.pack("<HQQQ", 6, 0, 1, 1 << 60), "was announced"),
    ],
)
def test_nonsense_is_refused_without_allocating(pair, stream, message):
    wire, theirs = pair
    theirs.sendall(stream)
    with pytest.raises(WireError, match=message):
        list(wire.messages())


def test_compressed_acquisitions_are_refused(pair):
    wire, theirs = pair
    line = an_acquisition()
    line.setFlag(53)
    theirs.sendall(struct.pack("<H", ACQUISITION) + line.to_bytes())
    with pytest.raises(WireError, match="compressed"):
        list(wire.messages())


def test_silence_ends(pair):
    wire, _ = pair
    wire.sock.settimeout(0.05)
    wire.timeout_s = 0.05
    with pytest.raises(WireError, match="sent nothing for 0.05 s"):
        list(wire.messages())
