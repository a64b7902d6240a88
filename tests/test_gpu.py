"""On a CUDA device: the same images as on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_chain
from test_adaptation import plane
from test_variational import VOXEL, problem

from gadgets.options import make_options
from gadgets.solve import load_prior_for, prior_of
from recon_core.adaptation import AdaptedConfig, reconstruct_adapted
from recon_core.cg_sense import cg_sense
from recon_core.gaussians import Gaussians
from recon_core.measure import measure
from recon_core.neural_field import NeuralField
from recon_core.prior import load_prior
from recon_core.representation import Grid
from recon_core.simulate import phantom
from recon_core.train import train
from recon_core.train_options import TrainOptions
from recon_core.volumes import Volume

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", ["cg", "diffusion"])
def test_the_gpu_gives_the_cpus_image_and_its_error_map(scan_path, method):
    images, maps = {}, {}
    for device in ("cpu", "cuda"):
        options = {"method": method, "device": device, "output": "float32", "preview": False, "error_map": True}
        prior = load_prior("small", device, half=False)  # bf16 differs by more, and not every CPU has it
        image, error_map = run_chain(scan_path, prior, **options)
        images[device], maps[device] = np.array(image.data), np.array(error_map.data)
    away = lambda of: np.linalg.norm(of["cuda"] - of["cpu"]) / np.linalg.norm(of["cpu"])
    assert away(images) < 5e-3, "TF32 convolutions may differ by this much"
    assert away(maps) < 5e-2


def test_the_default_there_gives_the_image_of_single_precision(scan_path):
    """The larger prior, in bf16."""
    options = {"output": "float32", "preview": False, "adapt": 0}
    (expected,) = run_chain(scan_path, load_prior("base", "cpu", half=False), **options)
    (image,) = run_chain(scan_path, load_prior_for(make_options({})), device="cuda", **options)
    assert np.linalg.norm(image.data - expected.data) / np.linalg.norm(expected.data) < 5e-3


def test_where_the_context_is_spoiled_the_cpu_answers(scan_path):
    """Scan after scan, in a process of its own, whose GPU no other test could use."""
    code = """
import sys
import torch
from conftest import run_chain
from gadgets.failure import gpu_lost
try:
    torch.zeros(2, device="cuda")[torch.tensor([9], device="cuda")]
    torch.cuda.synchronize()
except RuntimeError as error:
    print(error)
for _ in range(2):
    image = run_chain(sys.argv[1], None, method="cg", device="cuda")[0]
    assert image.meta["ImageComments"].count("the GPU failed") == 1
assert gpu_lost.is_set()
print("answered twice")
"""
    done = in_a_process(code, scan_path)
    assert "device-side assert" in done.stdout and "answered twice" in done.stdout, done.stderr


def test_where_the_gpu_hangs_the_cpu_answers(scan_path):
    """A kernel that takes about a minute is in the way of the first scan; the second does not ask."""
    code = """
import os, sys
import torch
from conftest import run_chain
from gadgets import solve
solve.HANG_S = 20
torch.cuda._sleep(10**11)
for _ in range(2):
    image = run_chain(sys.argv[1], None, method="cg", device="cuda")[0]
    assert image.meta["ImageComments"].count("the GPU failed") == 1
print("answered twice", flush=True)
os._exit(0)  # as `serve` does: no end of what hangs is waited for
"""
    done = in_a_process(code, scan_path)
    assert "answered twice" in done.stdout, done.stderr


def in_a_process(code: str, scan_path: Path) -> subprocess.CompletedProcess:
    """What `code` printed in a process of its own, which may import from the tests."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code, str(scan_path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


def test_the_larger_prior_is_taken_there():
    options = make_options({})
    prior = load_prior_for(options)
    assert prior_of(options) == "base" == prior.architecture and next(prior.parameters()).is_cuda


@pytest.mark.parametrize("given", [{}, {"own_states": 1.0}, {"architecture": "operator", "voxel_mm": (2.0, 2.0)}])
def test_training_on_the_gpu(given, tmp_path):
    volume = Volume("box", np.pad(np.ones((40, 44, 42), np.float32), 8), (1.0, 1.0, 1.0))
    lines = []
    options = TrainOptions(steps=3, batch=4, crop=32, device="cuda", scan_workers=2, **given)
    prior = train([volume], tmp_path / "p.safetensors", options, lines.append)
    assert next(prior.parameters()).is_cuda and lines
    assert all(bool(torch.isfinite(p).all()) for p in prior.parameters())


def test_a_prior_learns_from_a_scan_there():
    measurement = plane()[0].to("cuda")
    prior = load_prior("small", "cuda")
    states = list(reconstruct_adapted(measurement, prior, cg_sense(measurement), AdaptedConfig(sweeps=3, adapt=5)))
    assert states[-1].volume.is_cuda and bool(torch.isfinite(states[-1].volume.abs()).all())
    assert not torch.equal(states[-1].volume, states[2].volume)


@pytest.mark.parametrize("kind", [Grid, NeuralField, Gaussians])
def test_representations_and_their_derivatives_are_the_cpus(kind):
    image, found = phantom((18, 20, 17)).to(torch.complex64), {}
    fitted = kind(image, (36, 40, 34))
    fitted.fit(image, 0.1)
    for device in ("cpu", "cuda"):
        x = kind(image.to(device), (36, 40, 34))
        assert next(x.parameters()).device.type == device
        x.load_state_dict(fitted.state_dict())
        volume = x((18, 20, 17))
        volume.abs().square().sum().backward()
        found[device] = [volume.detach(), *(p.grad for p in x.parameters())]
    for cpu, cuda in zip(found["cpu"], found["cuda"]):
        assert float((cuda.cpu() - cpu).norm() / cpu.norm()) < 1e-2


def test_the_prior_in_function_space_is_the_cpus():
    white, found = torch.randn(2, 2, 40, 36, generator=torch.Generator().manual_seed(0)), {}
    for device in ("cpu", "cuda"):
        prior = load_prior("operator", device, half=False)
        noisy = 0.2 * prior.unit_noise(white.to(device), (1.0, 3.0))
        found[device] = prior(noisy, 0.2, (1.0, 3.0)).cpu()
    assert float((found["cuda"] - found["cpu"]).norm() / found["cpu"].norm()) < 5e-3


def test_coil_maps_that_the_gpu_has_no_room_for_stay_in_the_hosts_memory():
    kspace, mask, noise, _ = problem(shape=(40, 44, 36), coils=6, acs=16, snr=30.0)
    there = measure(kspace, mask, VOXEL, noise, device="cuda")
    here = measure(kspace, mask, VOXEL, noise, device="cuda", on_host=True)
    assert here.operator.maps.device.type == "cpu" and there.operator.maps.device.type == "cuda"
    images = [cg_sense(measurement) for measurement in (there, here)]
    assert all(image.device.type == "cuda" for image in images)
    assert float((images[1] - images[0]).norm() / images[0].norm()) < 1e-3
