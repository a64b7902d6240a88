"""With the real Gadgetron and its client: our chains on its server, its client on ours."""

import contextlib
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import ismrmrd
import numpy as np
import pytest
from conftest import run_chain, small_object

from gadgets.image_files import read_images
from gadgets.scan_files import ScanFile
from gadgets.simulation.protocol import SimulateOptions
from gadgets.simulation.scan import simulate
from recon_core.prior import load_prior

pytestmark = pytest.mark.gadgetron
CHAINS = Path(__file__).resolve().parents[1] / "config_xml"
FAST = '<property name="sweeps" value="2"/><property name="device" value="cpu"/>'
COMMAND = [sys.executable, "-c", "from gadgets.cli import command; command()"]
LOST_WAKE_UP = "Bad file descriptor"  # a known race in the client's connect; the run may be repeated


@pytest.fixture(scope="module")
def expected(scan_path):
    return run_chain(scan_path, load_prior("small"), sweeps=2)


@contextlib.contextmanager
def serving(command, environment=None):
    """A server process that listens on a free port, given to `command` as its last argument; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    process = subprocess.Popen(
        [*command, str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def gadgetron():
    """Gadgetron with this interpreter first on its PATH, for <execute>."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with serving([shutil.which("gadgetron"), "-p"], environment) as port:
        yield port


def fast_chain(name):
    """A shipped chain with few sweeps on the CPU."""
    shipped = (CHAINS / f"slicediff_{name}.xml").read_text()
    return shipped.replace("<configuration>\n                <property", f"<configuration>{FAST}<property")


def chain_to(name, port):
    """A shipped chain that connects to a server on that port."""
    return (CHAINS / f"slicediff_{name}.xml").read_text().replace('port="9003"', f'port="{port}"')


def run_client(port, scan, out, *config):
    """What gadgetron_ismrmrd_client printed."""
    server, files = ["-a", "127.0.0.1", "-p", str(port)], ["-f", str(scan), "-o", str(out), "-G", "images"]
    command = ["gadgetron_ismrmrd_client", *server, *files, *config]
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if LOST_WAKE_UP not in done.stdout + done.stderr:
            break
        out.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def assert_same_pixels(path, expected):
    found = read_images(path, "images")
    assert [i.image_series_index for i in found] == [i.image_series_index for i in expected]
    for mine, theirs in zip(expected, found):
        assert theirs.data.tobytes() == mine.data.tobytes()
        for name in ("matrix_size", "field_of_view", "position", "read_dir", "phase_dir", "slice_dir"):
            assert list(getattr(theirs.getHead(), name)) == list(getattr(mine.getHead(), name)), name


def test_execute_chain(scan_path, tmp_path, expected):
    chain = fast_chain("execute")
    assert FAST in chain
    (tmp_path / "chain.xml").write_text(chain)
    with gadgetron() as port:
        run_client(port, scan_path, tmp_path / "out.h5", "-C", str(tmp_path / "chain.xml"))
    assert_same_pixels(tmp_path / "out.h5", expected)


def test_connect_chain(scan_path, tmp_path, expected):
    with serving([*COMMAND, "serve", "--sweeps", "2", "--device", "cpu", "--port"]) as ours, gadgetron() as port:
        (tmp_path / "chain.xml").write_text(chain_to("connect", ours))
        run_client(port, scan_path, tmp_path / "out.h5", "-C", str(tmp_path / "chain.xml"))
    assert_same_pixels(tmp_path / "out.h5", expected)


def assert_alike(path, expected):
    """Buffers went through Gadgetron's own whitening and removal of oversampling: same geometry, nearly same pixels."""
    found = read_images(path, "images")
    assert [i.image_series_index for i in found] == [i.image_series_index for i in expected]
    for mine, theirs in zip(expected, found):
        assert np.corrcoef(mine.data.ravel(), theirs.data.ravel())[0, 1] > 0.98
        for name in ("matrix_size", "field_of_view", "position", "read_dir", "phase_dir", "slice_dir"):
            assert list(getattr(theirs.getHead(), name)) == list(getattr(mine.getHead(), name)), name


def test_buffer_chain(scan_path, tmp_path, expected):
    with serving([*COMMAND, "serve", "--sweeps", "2", "--device", "cpu", "--port"]) as ours, gadgetron() as port:
        (tmp_path / "chain.xml").write_text(chain_to("buffer", ours))
        run_client(port, scan_path, tmp_path / "out.h5", "-C", str(tmp_path / "chain.xml"))
    assert_alike(tmp_path / "out.h5", expected)


def test_buffers_of_an_odd_readout(tmp_path):
    """RemoveROOversamplingGadget crops it off its centre."""
    np.save(tmp_path / "object.npy", small_object((24, 34, 27)))
    options = SimulateOptions(coils=4, acceleration=3, acs=12, snr=40, calibration="separate")
    simulate(tmp_path / "object.npy", tmp_path / "scan.h5", options)
    expected = run_chain(tmp_path / "scan.h5", load_prior("small"), sweeps=2)
    with serving([*COMMAND, "serve", "--sweeps", "2", "--device", "cpu", "--port"]) as ours, gadgetron() as port:
        (tmp_path / "chain.xml").write_text(chain_to("buffer", ours))
        run_client(port, tmp_path / "scan.h5", tmp_path / "out.h5", "-C", str(tmp_path / "chain.xml"))
    assert_alike(tmp_path / "out.h5", expected)


def test_generic_chain(scan_path, tmp_path, expected):
    chain = fast_chain("generic")
    assert FAST in chain
    (tmp_path / "chain.xml").write_text(chain)
    with gadgetron() as port:
        run_client(port, scan_path, tmp_path / "out.h5", "-C", str(tmp_path / "chain.xml"))
    assert_alike(tmp_path / "out.h5", expected)


def test_ten_runs_in_a_row(scan_path, tmp_path, expected):
    with serving([*COMMAND, "serve", "--sweeps", "2", "--device", "cpu", "--port"]) as ours, gadgetron() as port:
        (tmp_path / "chain.xml").write_text(chain_to("connect", ours))
        for run in range(10):
            run_client(port, scan_path, tmp_path / f"{run}.h5", "-C", str(tmp_path / "chain.xml"))
            assert_same_pixels(tmp_path / f"{run}.h5", expected)


def test_an_error_reaches_the_client(scan_path, tmp_path):
    shipped = (CHAINS / "slicediff_execute.xml").read_text()
    chain = shipped.replace('name="method" value="diffusion"', 'name="method" value="magic"')
    (tmp_path / "chain.xml").write_text(chain)
    with gadgetron() as port:
        assert "option 'method'" in run_client(port, scan_path, tmp_path / "out.h5", "-C", str(tmp_path / "chain.xml"))
    assert not (tmp_path / "out.h5").exists() or not read_images(tmp_path / "out.h5", "images")


def test_gadgetrons_client_on_our_server(scan_path, tmp_path, expected):
    with serving([*COMMAND, "serve", "--sweeps", "2", "--device", "cpu", "--port"]) as port:
        run_client(port, scan_path, tmp_path / "out.h5", "-c", "default")
    assert_same_pixels(tmp_path / "out.h5", expected)


def test_stream_mode_keeps_stdout_clean(scan_path, tmp_path, expected):
    """Images are read from stdout, where any stray byte would put the stream out of step."""
    folder = tmp_path / "share/gadgetron/config"
    folder.mkdir(parents=True)
    (folder / "chain.xml").write_text(fast_chain("execute"))
    with ScanFile(scan_path) as scan, (tmp_path / "in.bin").open("wb") as stream:
        stream.write(struct.pack("<HI", 3, len(scan.header_xml)) + scan.header_xml)
        for line in scan.acquisitions():
            stream.write(struct.pack("<H", 1008) + line.to_bytes())
        stream.write(struct.pack("<H", 4))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["gadgetron", "-G", str(tmp_path), "-d", "true", "--from_stream"]
    command += ["-i", str(tmp_path / "in.bin"), "-c", "chain.xml"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    out, images = io.BytesIO(done.stdout), []
    while (kind := struct.unpack("<H", out.read(2))[0]) in (3, 1022):
        if kind == 3:  # newer Gadgetrons hand the header on, ahead of the images
            assert out.read(struct.unpack("<I", out.read(4))[0]) == scan.header_xml and not images
        else:
            images.append(ismrmrd.Image.deserialize_from(lambda n: out.read(int(n))))
    assert kind == 4 and out.read() == b"", done.stderr.decode()
    assert [i.data.tobytes() for i in images] == [i.data.tobytes() for i in expected]
