"""All phantoms and fixtures of the tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # each process gets its share of the cores, before torch counts them
    share = os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import shutil
from pathlib import Path

import ismrmrd
import numpy as np
import pytest
import torch

from gadgets.cli import main
from gadgets.gather import gather
from gadgets.header import parse_header
from gadgets.options import make_options
from gadgets.recon import reconstruct
from gadgets.scan_files import ScanFile
from gadgets.simulation.protocol import SimulateOptions
from gadgets.simulation.scan import simulate
from recon_core.prior import Prior

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    """Skip, with the reason, what needs a program or a device that is not here."""
    gadgetron = shutil.which("gadgetron") and shutil.which("gadgetron_ismrmrd_client")
    needs = {
        "gadgetron": (gadgetron, "gadgetron and gadgetron_ismrmrd_client are not on PATH"),
        "bart": (shutil.which("bart"), "bart is not on PATH"),
        "gpu": (torch.cuda.is_available(), "no CUDA device"),
    }
    for item in items:
        for marker, (there, reason) in needs.items():
            if item.get_closest_marker(marker) and not there:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def scan_path(tmp_path_factory) -> Path:
    """A small oblique phantom scan: 4 coils, R = 3, noise lines, readout oversampling."""
    folder = tmp_path_factory.mktemp("scan")
    np.save(folder / "object.npy", small_object())
    options = SimulateOptions(coils=4, acceleration=3, acs=12, snr=40, oblique=True)
    simulate(folder / "object.npy", folder / "scan.h5", options, folder / "reference.nii.gz")
    return folder / "scan.h5"


@pytest.fixture(scope="session")
def other_scan_path(tmp_path_factory) -> Path:
    """A second scan, of another matrix and coil count."""
    folder = tmp_path_factory.mktemp("other")
    np.save(folder / "object.npy", small_object((20, 30, 22)))
    options = SimulateOptions(coils=3, acceleration=2, acs=10, noise_lines=8, oversampling=1, seed=3)
    simulate(folder / "object.npy", folder / "scan.h5", options)
    return folder / "scan.h5"


@pytest.fixture
def full(tmp_path):
    """(header, acquisitions, folder) of a fully sampled, nearly noiseless scan without noise lines."""
    return load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", snr=1e5, noise_lines=0))


def load_small_scan(folder: Path, options: SimulateOptions, shape=(10, 13, 12)):
    """(header, acquisitions, folder) of a simulated scan of the phantom [z y x]."""
    np.save(folder / "object.npy", small_object(shape))
    simulate(folder / "object.npy", folder / "scan.h5", options, folder / "reference.nii.gz")
    with ScanFile(folder / "scan.h5") as scan:
        return parse_header(scan.header_xml), list(scan.acquisitions()), folder


def gathered(header, lines):
    """The only volume of a scan."""
    (scan,) = gather(header, lines)
    return scan


def line_like(line: ismrmrd.Acquisition, data=None, **changes) -> ismrmrd.Acquisition:
    """A copy of a line with other data [coils samples] or header fields."""
    head = ismrmrd.AcquisitionHeader.from_buffer_copy(bytes(line.getHead()))
    data = line.data if data is None else data
    head.active_channels, head.number_of_samples = data.shape
    out = ismrmrd.Acquisition(head, np.array(data, np.complex64))
    for name, value in changes.items():
        setattr(out.idx if hasattr(out.idx, name) and name != "flags" else out, name, value)
    return out


@pytest.fixture(scope="session")
def prior() -> Prior:
    """An untrained prior: the exact Gaussian denoiser, fast enough for every test of the chain."""
    torch.manual_seed(0)
    return Prior("small").eval().requires_grad_(False)


def small_object(shape=(24, 35, 26)) -> np.ndarray:
    """Phantom of non-cubic, odd size [z y x], float32."""
    from recon_core.simulate import phantom

    return phantom(shape).numpy()


def run_chain(path: Path, prior, **options) -> list[ismrmrd.Image]:
    """All images of a scan file through the chain."""
    options = make_options({"sweeps": 3, "device": "cpu", **options})
    with ScanFile(path) as scan:
        return list(reconstruct(parse_header(scan.header_xml), scan.acquisitions(), prior, options))


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def random_complex(*shape: int, seed: int = 0) -> torch.Tensor:
    """Complex standard normal numbers."""
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
