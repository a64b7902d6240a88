"""The client: pace, file layout, and an exit code that says whether all images came."""

import contextlib
import socket
import struct
import threading
import time

import h5py
import ismrmrd
import numpy as np
import pytest
from conftest import line_like, load_small_scan
from peers import GadgetronPeer

from gadgets.cli import main
from gadgets.client import SendError, _Pace, send_scan
from gadgets.flags import NOISE_BIT
from gadgets.scan_files import ScanFile, ScanWriter
from gadgets.simulation.protocol import SimulateOptions
from gadgets.wire import Wire


@pytest.fixture
def scan_path(tmp_path):
    """Two repetitions, a waveform among the lines; 1.1 s long by its time stamps."""
    protocol = SimulateOptions(coils=1, pattern="full", repetitions=2, waveforms=True, noise_lines=2)
    load_small_scan(tmp_path, protocol, (4, 13, 8))
    return tmp_path / "scan.h5"


@contextlib.contextmanager
def a_server(answers: bytes, received: list):
    """Takes a whole scan from one client, then answers; yields its address.

    Appends (arrival time, message id) to `received`.
    """

    def serve():
        sock, _ = listener.accept()
        with sock, sock.makefile("rb") as stream:
            exactly = lambda n: GadgetronPeer._exactly(stream, int(n))
            while True:
                (kind,) = struct.unpack("<H", exactly(2))
                received.append((time.monotonic(), kind))
                if kind == 4:
                    break
                if kind == 1:
                    exactly(1024)
                elif kind in (2, 3):
                    exactly(struct.unpack("<I", exactly(4))[0])
                else:
                    {1008: ismrmrd.Acquisition, 1026: ismrmrd.Waveform}[kind].deserialize_from(exactly)
            sock.sendall(answers + struct.pack("<H", 4))
            sock.shutdown(socket.SHUT_WR)
            stream.read()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()
        thread.join(20)


def an_image(series=2, index=1, comment="") -> bytes:
    image = ismrmrd.Image.from_array(np.full((4, 3, 2), index, np.float32), transpose=False)
    image.image_series_index, image.image_index, image.image_type = series, index, 1
    meta = f"<meta><name>ImageComment</name><value>{comment}</value></meta>"
    image.attribute_string = f"<ismrmrdMeta>{meta}</ismrmrdMeta>" if comment else "<ismrmrdMeta/>"
    return struct.pack("<H", 1022) + image.to_bytes()


def text(line: str) -> bytes:
    return struct.pack("<HI", 5, len(line.encode())) + line.encode()


def send(address, path, **kwargs):
    with ScanFile(path) as scan:
        return list(send_scan(scan, *address, "default", **kwargs))


def send_by_command(address, path, images, *more) -> int:
    """Exit code of `slicediff send`."""
    host, port = address
    return main(["send", str(path), str(images), "--host", host, "--port", str(port), *more])


def test_everything_is_sent_in_order(scan_path):
    received = []
    with a_server(an_image(index=1) + an_image(index=2), received) as address:
        assert len(send(address, scan_path)) == 2
    kinds = [kind for _, kind in received]
    assert kinds[:2] == [1, 3] and kinds[-1] == 4
    assert kinds.count(1008) == 2 + 2 * 4 * 13 and kinds.count(1026) == 2
    assert received[-1][0] - received[0][0] < 0.7


def test_realtime_keeps_the_scanners_pace(scan_path):
    received, counts = [], []
    with a_server(an_image(index=1) + an_image(index=2), received) as address:
        send(address, scan_path, realtime=True, on_sent=counts.append)
    times = [moment for moment, kind in received if kind == 1008][2:]
    wanted = 0.0075 * np.arange(len(times))
    assert abs((times[-1] - times[0]) - wanted[-1]) < 0.15
    assert counts[:3] == [1, 2, 3] and counts[-1] == 106


def test_a_time_stamp_of_another_day_holds_nothing_up():
    pace = _Pace()
    waits = [pace.seconds_until(stamp) for stamp in (1000, 1400, 4_000_000_000, 1800, 0, 2200)]
    assert waits[:3] == pytest.approx([0, 1, 1], abs=0.1) and waits[3:] == pytest.approx([1, 0, 2], abs=0.1)


@pytest.mark.parametrize(
    "answers,expect,message",
    [
        (b"", None, "without sending an image"),
        (
            an_image(1, 1) + an_image(1, 2) + an_image(2, 1),
            None,
            "the scan has 2 volumes, but series 2 has only 1 image",
        ),
        (an_image(2, 1), None, "series 2 has only 1 image"),
        (an_image(2, 1) + an_image(2, 2), 3, "expected 3 images, 2 came"),
        (an_image(2, 1) + an_image(2, 2) + text("ERROR: no weights"), None, r"^no weights \(2 images were received\)"),
        (text("[Connection Main Thread/Stream/external] ERROR: Errors received: x"), None, "^Errors received: x"),
    ],
)
def test_missing_images_and_errors_are_failures(scan_path, tmp_path, capsys, answers, expect, message):
    with a_server(answers, []) as address, pytest.raises(SendError, match=message):
        send(address, scan_path, expect=expect)
    more = [] if expect is None else ["--expect", str(expect)]
    with a_server(answers, []) as address:
        assert send_by_command(address, scan_path, tmp_path / "out.h5", *more) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2


def test_what_the_comments_tell_is_told(scan_path, tmp_path, capsys):
    """As `slicediff recon` tells it: once, and whether or not the images of another server have comments."""
    noted = "slice diffusion; no noise lines"
    answers = an_image(1, 1) + an_image(2, 1, noted) + an_image(2, 2, f"{noted}; one line is missing")
    with a_server(answers, []) as address:
        assert send_by_command(address, scan_path, tmp_path / "out.h5", "--expect", "3") == 0
    notes = capsys.readouterr().err.splitlines()[-2:]
    assert notes == ["slicediff: note: no noise lines", "slicediff: note: one line is missing"]


def test_a_server_cannot_steer_the_terminal(scan_path, tmp_path, capsys):
    """Neither with what it says, nor with its errors and comments."""
    evil = "\x1b]0;title\x07\x9b31mred\rover\u202e"
    answers = text(evil) + an_image(1, 1) + an_image(2, 1, "name; noted &#x9b;31m") + text(f"ERROR: no {evil}")
    with a_server(answers, []) as address:
        assert send_by_command(address, scan_path, tmp_path / "out.h5") == 1
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert "]0;title31mred over" in shown and "note: noted 31m" in shown and "slicediff: no ]0;title" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_a_chain_is_sent_byte_for_byte(scan_path, tmp_path, monkeypatch):
    """Whatever its encoding and line ends: its declaration tells the server."""
    chain, sent, send_config = tmp_path / "chain.xml", [], Wire.send_config
    configuration = '<?xml version="1.0" encoding="ISO-8859-1"?>\r\n<!-- für den 3-T-Tomographen --><configuration/>'
    chain.write_bytes(configuration.encode("latin-1"))
    monkeypatch.setattr(Wire, "send_config", lambda wire, data: sent.append(data) or send_config(wire, data))
    with a_server(an_image(), []) as (host, port), ScanFile(scan_path) as scan:
        assert len(list(send_scan(scan, host, port, str(chain), expect=1))) == 1
    assert sent == [chain.read_bytes()]


@pytest.mark.parametrize(
    "line",
    ["no weights in [/opt/priors]: asked for [small]", "sweep one/two", "error map 1/2/3", ":warning: 3:40:12"],
)
def test_what_a_server_says_is_shown_as_it_is(scan_path, tmp_path, capsys, line):
    with a_server(text(line) + an_image(), []) as address:
        assert send_by_command(address, scan_path, tmp_path / "out.h5", "--expect", "1") == 0
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize(
    "answers,expect",
    [
        (an_image(2, 1), 1),
        (an_image(2, 1) + an_image(2, 2), None),
        (an_image(2, 1) + an_image(2, 2) + text("no ERROR: fine"), 2),
    ],
)
def test_all_images_are_a_success_in_the_layout_of_gadgetrons_client(scan_path, tmp_path, answers, expect):
    more = [] if expect is None else ["--expect", str(expect)]
    with a_server(answers, []) as address:
        assert send_by_command(address, scan_path, tmp_path / "out.h5", "--group", "g", *more) == 0
    with h5py.File(tmp_path / "out.h5") as file:
        series = file["g/image_2"]
        assert set(series) == {"data", "header", "attributes"}
        assert series["data"].shape == (len(answers) // len(an_image()), 1, 4, 3, 2)
        assert series["header"].dtype["matrix_size"].shape == (3,)
        assert tuple(series["header"][0]["matrix_size"]) == (2, 3, 4)


@pytest.mark.parametrize("encoding,complete", [(1, True), (0, False)])
def test_a_prescan_of_another_encoding_is_no_volume(scan_path, tmp_path, encoding, complete):
    """Its slice counter is its own: the gatherer makes no image of it.

    In the image's encoding it would be a third volume.
    """
    with ScanFile(scan_path) as scan, ScanWriter(tmp_path / "prescan.h5", scan.header_xml) as writer:
        lines = list(scan.acquisitions())
        for line in (*(line_like(line, slice=5, encoding_space_ref=encoding) for line in lines[2:10]), *lines):
            writer.append(line)
    with a_server(an_image(1, 1) + an_image(1, 2), []) as address:
        if complete:
            assert len(send(address, tmp_path / "prescan.h5")) == 2
        else:
            with pytest.raises(SendError, match="the scan has 3 volumes, but series 1 has only 2 images"):
                send(address, tmp_path / "prescan.h5")


def test_partitions_counted_as_slices_are_one_volume(scan_path, tmp_path, capsys):
    """As the gatherer takes them; a series that is short is told beside the images that came."""
    with ScanFile(scan_path) as scan, ScanWriter(tmp_path / "slices.h5", scan.header_xml) as writer:
        for line in scan.acquisitions():
            writer.append(line if line.flags & NOISE_BIT else line_like(line, slice=line.idx.kspace_encode_step_2))
    slices, images = tmp_path / "slices.h5", tmp_path / "out.h5"
    with a_server(an_image(1, 1) + an_image(1, 2), []) as address:
        assert send_by_command(address, slices, images) == 0
    with a_server(an_image(1, 1) + an_image(1, 2, "CG-SENSE; told"), []) as address:
        assert send_by_command(address, slices, images, "--expect", "3") == 1
    captured = capsys.readouterr()
    assert captured.out.count("2 images written to") == 2
    assert "slicediff: note: told" in captured.err and "expected 3 images, 2 came" in captured.err


def test_a_scan_that_is_refused_is_not_sent_to_its_end(scan_path):
    """Paced, it would take 1.1 s more; the server still gets a CLOSE."""
    received = []

    def serve():
        sock, _ = listener.accept()
        with sock, sock.makefile("rb") as stream:
            sock.sendall(text("ERROR: no"))
            while chunk := stream.read1(1 << 16):
                received.append(chunk)
                if b"".join(received).endswith(struct.pack("<H", 4)):
                    sock.sendall(struct.pack("<H", 4))
                    sock.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        began = time.monotonic()
        with pytest.raises(SendError, match="^no "):
            send(listener.getsockname(), scan_path, realtime=True)
        thread.join(10)
    assert time.monotonic() - began < 0.6 and b"".join(received).endswith(struct.pack("<H", 4))


def test_a_server_that_ends_the_scan_before_its_end_is_told(scan_path):
    """It answers the first line with an image and closes in good order: nothing else shows that lines are missing."""

    def serve():
        sock, _ = listener.accept()
        with sock, sock.makefile("rb") as stream:
            sock.sendall(an_image(1) + an_image(2) + struct.pack("<H", 4))
            sock.shutdown(socket.SHUT_WR)
            stream.read()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(SendError, match=r"^the server ended the scan before .* \(2 images were received\)$"):
            send(listener.getsockname(), scan_path, realtime=True)
        thread.join(10)


def test_a_server_that_goes_away_ends_a_paced_scan(scan_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            sock, _ = listener.accept()
            sock.recv(100)
            sock.close()

        thread = threading.Thread(target=serve)
        thread.start()
        began = time.monotonic()
        with pytest.raises(SendError, match="the server is gone"):
            send(listener.getsockname(), scan_path, realtime=True)
        thread.join()
    assert time.monotonic() - began < 0.6
