"""The server under test, a tiny scan to send it, and the images that it must give."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from recon_core.simulate import phantom

from ..scan_files import ScanFile
from ..simulation.scan import SimulateOptions, simulate
from . import peer as p
from .case import Broken

SWEEPS = 2
SOON_S = 10.0
PROGRAM = "from gadgets.cli import command; command()"
COMMAND = [sys.executable, "-W", "ignore", "-c", PROGRAM, "serve", "--port", "0", "--test-faults"]
QUICK = ["--timeout-s", "2", "--idle-s", "2", "--grace-s", "1", "--max-gib", "0.5", "--max-message-mib", "64"]
# else per-thread heaps hide a leak behind +-20 MiB
ONE_ARENA = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Bench:
    """The server under test, a tiny scan, and the images that it must give every time.

    Args:
        address: of a running server; None starts one of our own, in a child process with short time limits.

    Raises:
        Broken: if the server does not start, or even a correct scan does not give its images.
    """

    def __init__(self, address: tuple[str, int] | None = None):
        self.folder = tempfile.TemporaryDirectory(prefix="slicediff-conform-")
        self.process: subprocess.Popen | None = None
        self.kept = Path(self.folder.name) / "kept"
        self.path = Path(self.folder.name) / "scan.h5"
        self.header, self.lines = _tiny_scan(self.path)
        self.messages = [p.acquisition(line) for line in self.lines]
        try:
            if address is None:
                self.start()
            else:
                self.address = address
            self.expected = self._first_images()
        except Broken:
            self.__exit__()
            raise

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception) -> None:
        if self.process is not None:
            self.process.kill()
            self._reap()
        self.folder.cleanup()

    def _first_images(self) -> list[tuple[bytes, bytes, bytes]]:
        try:
            answer = self.scan()
        except (OSError, UnicodeError) as error:
            raise Broken(f"no server answers at {self.address[0]} port {self.address[1]}: {error}") from None
        if len(answer.images) != 2:
            gave = f"{len(answer.images)} images and not a preview and a final one {answer.complaint}".rstrip()
            raise Broken(f"a correct scan gave {gave}")
        return answer.images

    def start(self) -> None:
        """(Re)start our own server and wait until it reports its port."""
        if self.process is not None:
            self._reap()
        command = [*COMMAND, *QUICK, "--keep-failed", str(self.kept)]
        environment = {**os.environ, **ONE_ARENA}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        words = self.process.stdout.readline().split()
        if not words:
            raise Broken("the server did not start")
        self.address = ("127.0.0.1", int(words[-1]))

    def _reap(self) -> None:
        self.process.wait(30)
        self.process.stdout.close()

    def peer(self) -> p.Peer:
        """A new connection."""
        return p.Peer(self.address)

    def opening(self, header: bytes | None = None, gadgetron: bool = False, **options) -> bytes:
        """Configuration, header and options, as a FIRE host or Gadgetron sends them."""
        options = {"sweeps": SWEEPS, **options}
        head = p.text_message(p.HEADER, self.header if header is None else header)
        if gadgetron:
            return p.gadgetron_config("".join(f'<property name="{n}" value="{v}"/>' for n, v in options.items())) + head
        return p.config_name("default") + head + p.text_message(p.TEXT, json.dumps({"parameters": options}))

    def scan(
        self, lines: list[bytes] | None = None, header: bytes | None = None, gadgetron: bool = False, **options
    ) -> p.Answer:
        """Send a whole scan; returns the answer."""
        lines = self.messages if lines is None else lines
        with self.peer() as peer:
            peer.send(self.opening(header, gadgetron, **options), *lines, p.close())
            return peer.answer()

    def simulated(self, **options) -> tuple[bytes, list, np.ndarray]:
        """Header and acquisitions of the tiny object scanned with another protocol, and the object [z y x]."""
        path, reference = (Path(self.folder.name) / name for name in ("other.h5", "other.nii"))
        protocol = {"coils": 4, "acceleration": 2, "acs": 12, "noise_lines": 8, "snr": 60, **options}
        simulate(self.path.with_name("object.npy"), path, SimulateOptions(**protocol), reference)
        with ScanFile(path) as scan:
            return scan.header_xml, list(scan.acquisitions()), np.asarray(nibabel.load(reference).dataobj).T

    def health(self) -> dict:
        """The server's answer to the health query."""
        with self.peer() as peer:
            reply = peer.send(p.query("slicediff::health"), p.close()).answer().replies
        return json.loads(reply[0])

    def wait_for(self, happened: Callable[[], bool], what: str) -> None:
        """Wait until something has happened; Broken if it does not in time."""
        end = time.monotonic() + SOON_S
        while not happened():
            if time.monotonic() > end:
                raise Broken(f"after {SOON_S:g} s still not: {what}")
            time.sleep(0.05)

    def limit_files(self, nbytes: int) -> None:
        """Limit the size of the server's files: like a disk that is full for it alone."""
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))

    def check_next(self) -> None:
        """Check that the next correct scan gives exactly the same images."""
        answer = self.scan()
        if answer.complaint or not answer.closed:
            raise Broken(f"the next correct scan failed: {answer.complaint or 'no CLOSE'}")
        if answer.images != self.expected:
            raise Broken(f"the next correct scan gave other images ({len(answer.images)} of {len(self.expected)})")


def _tiny_scan(path: Path) -> tuple[bytes, list]:
    """Header and acquisitions of a small phantom: 3 coils, R = 2, 20 x 24 x 22 voxels."""
    volume = path.with_name("object.npy")
    np.save(volume, phantom((20, 24, 22)).numpy())
    simulate(volume, path, SimulateOptions(coils=3, acceleration=2, acs=10, noise_lines=8))
    with ScanFile(path) as scan:
        return scan.header_xml, list(scan.acquisitions())
