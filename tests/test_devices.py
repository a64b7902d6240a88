"""On a pretended GPU: all that runs there gives what the CPU gives, to the bit, and a failing GPU leaves an image."""

import copy
import gc
import re
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_complex, run_chain
from pretend_gpu import PretendGpu
from test_gpu import test_representations_and_their_derivatives_are_the_cpus  # noqa: F401  it runs here too
from test_mouths import client, running
from test_trust import images_and_error
from test_variational import VOXEL, last, problem

import gadgets.images
from gadgets import solve
from gadgets.failure import gpu_lost
from gadgets.options import OptionsError, make_options
from gadgets.solve import device_of, load_prior_for
from recon_core import adaptation, low_resolution, prior, pupil
from recon_core.adaptation import reconstruct_adapted
from recon_core.ahead import Crew, left_behind
from recon_core.cg_sense import cg_sense
from recon_core.device_failure import GpuHangs
from recon_core.fft import centre_block
from recon_core.gaussians import Gaussians
from recon_core.measure import SINGLE_VOLUMES, WORK_ARRAYS, measure
from recon_core.measurement import Measurement, Reference
from recon_core.methods import METHODS
from recon_core.neural_field import NeuralField
from recon_core.neural_operator import NeuralOperator
from recon_core.prior import Prior, PriorError, save_prior
from recon_core.rehearsal import Rehearsal
from recon_core.sense import Sense
from recon_core.train import train
from recon_core.train_options import TrainOptions
from recon_core.unet import UNet
from recon_core.variational import VariationalConfig
from recon_core.volumes import Volume

SMALL = (18, 20, 17)
ILLEGAL = "CUDA error: an illegal memory access was encountered"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/test_gpu.py runs on it")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU, solver threads of its own, and quick fits."""
    monkeypatch.setattr(solve, "SOLVERS", Crew())
    for kind in (NeuralField, Gaussians):
        monkeypatch.setattr(kind, "fit_steps", 2)
    with PretendGpu() as gpu:
        yield gpu
    gpu_lost.clear()


@pytest.fixture(autouse=True)
def tiny_priors(monkeypatch, tmp_path):
    """Networks of a few weights under the names of the real ones, whose output is not zero."""
    small = partial(UNet, channels=(8, 8), blocks=1, embedding=16)
    architectures = {
        "small": partial(small, unshuffle=2),
        "base": partial(small, unshuffle=1),
        "operator": partial(NeuralOperator, channels=4, taps=3, coarse=(4, 4), embedding=16),
    }
    monkeypatch.setattr(prior, "ARCHITECTURES", architectures)
    monkeypatch.setenv("SLICEDIFF_PRIORS", str(tmp_path))
    random = torch.Generator().manual_seed(0)
    for name in ("small", "small-white", "base", "operator"):
        made = Prior(name.split("-")[0])
        for weights in made.parameters():
            weights.data += 0.05 * torch.randn(weights.shape, generator=random)
        save_prior(made, tmp_path / f"{name}.safetensors", {})


def both(work):
    """What `work` gives on the CPU and on the GPU, which must be there; both on the CPU."""
    there = work("cuda")
    assert there.is_cuda
    return work("cpu"), there.cpu()


def failing_at(when, error):
    """A fault: once `when` is set, every operator raises `error`."""

    def fault(name):
        if when.is_set():
            raise error

    return fault


# the pretended GPU itself


def test_what_a_gpu_refuses_is_refused():
    here, there = torch.ones(3, 2), torch.ones(3, 2, device="cuda")
    index = torch.tensor([0])
    number, seed = torch.tensor(2.0), torch.Generator()
    for mixed in (
        lambda: there + here,
        lambda: here * there[0, 0],
        lambda: here.mul_(there[0, 0]),
        lambda: torch.cat([there, here]),
        lambda: torch.stack([there[0, 0], number]),
        lambda: there @ here.T,
        lambda: here[index.to("cuda")],
        lambda: there.index_select(0, index),
        lambda: torch.where(there > 0, there, here),
        lambda: torch.nn.functional.conv1d(there[None], here[None]),
        lambda: torch.equal(here, there),
        lambda: torch._foreach_lerp_([there], [here], 0.5),
        lambda: torch.randn(3, device="cuda", generator=seed),
        lambda: torch.multinomial(there[0], 1, generator=seed),
    ):
        with pytest.raises(RuntimeError, match="indices should be|two devices|generator"):
            mixed()
    for leaves in (lambda: there.numpy(), lambda: np.asarray(there), lambda: np.percentile(there, 50)):
        with pytest.raises(TypeError, match="can't convert cuda"):
            leaves()


def test_what_a_gpu_allows_is_allowed_and_gives_what_the_cpu_gives(gpu):
    given = random_complex(4, 5, 6)

    def work(device):
        x = given.clone().to(device)
        x[:2] = torch.ones(2, 5, 6)
        x[torch.tensor([3])] *= torch.tensor(2.0)
        x[:, torch.tensor([True, False] * 2 + [True])] += 1
        spectrum = torch.fft.fftshift(torch.fft.fftn(x.conj(), dim=(1, 2)), (1, 2))
        rows = torch.einsum("rcq,rdq->cdq", spectrum, x.conj()).real.unfold(0, 3, 1)
        rows = rows.quantile(torch.tensor(0.3, device=device), dim=-1)
        assert rows.device == torch.zeros_like(rows).device == torch.arange(2, device=rows.device).device
        assert x.tolist() == x.cpu().tolist() and float(x[0, 0, 0].real) == 2
        return rows

    here, there = both(work)
    assert torch.equal(here, there)
    assert gpu.waits["_local_scalar_dense"] == 1 and gpu.waits["index"] == 2, "an index of the CPU, and a mask"


def test_gradients_modules_and_optimisers_work_there():
    def work(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Conv2d(3, 2, 1))
        net = net.to(device, memory_format=torch.channels_last)
        twin, optimiser = copy.deepcopy(net), torch.optim.Adam(net.parameters(), lr=0.1)
        with torch.autocast(device, torch.bfloat16):
            out = twin(torch.ones(1, 2, 8, 8, device=device))
        assert out.dtype is torch.bfloat16
        image = net(torch.ones(1, 2, 8, 8, device=device))
        elsewhere = torch.zeros(2, 1, 2, 6, 6)
        elsewhere[1] = image  # a copy between devices is differentiable
        (elsewhere.square().sum() + image.abs().sum().cpu()).backward()
        optimiser.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    here, there = both(work)
    assert torch.equal(here, there)


def test_its_memory_is_counted_limited_and_freed(gpu):
    x = torch.zeros(100, device="cuda")
    view = x[:50]
    assert gpu.used == 400
    gpu.total = 1000
    with pytest.raises(torch.OutOfMemoryError):
        torch.cat([x, x])
    del x
    gc.collect()
    assert gpu.used == 400 and len(view) == 50
    del view
    gc.collect()
    assert gpu.used == 0 and gpu.peak == 400


# the reconstruction


def regular(start=0):
    """[z y] with every third line from `start` on."""
    mask = torch.zeros(SMALL[:2])
    mask[start::3, start::3] = 1
    return mask


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        "acs",
        "noise lines",
        "phase",
        "few",
        "one coil",
        "no centre",
        "separate",
        "separate, other phase",
        "separate, two sets",
        "two sets",
        "plane",
    ],
)
def test_measurement_and_cg_sense_are_those_of_the_cpu(case, on_host, monkeypatch):
    shape, acceleration = (40, 44, 3) if case == "plane" else SMALL, 1.0 if "separate" in case else 3.0
    kspace, mask, noise, _ = problem(shape=shape, acceleration=acceleration)
    how = {"on_host": on_host, "keep_lines": case == "acs", "noise": noise if case == "noise lines" else None}
    if case == "phase":
        how["reference"] = Reference(torch.tensor([1, 1j, 0, 0], dtype=torch.complex64), None)
    if case == "one coil":
        kspace = kspace[:1]
    if case in ("few", "no centre"):
        mask = mask * ~centre_block(mask.shape, (10, 10)) + (case == "few") * centre_block(mask.shape, (3, 3))
    if "separate" in case:
        block, mask = centre_block(mask.shape, (10, 10)).float(), regular(int("other" in case))
        how["calibration"] = kspace * block[..., None] * (1j if "other" in case else 1), block
    if "two sets" in case:
        how["sets"] = 2
        monkeypatch.setattr("recon_core.coil_maps.WRAPS", -1)

    def work(device):
        measurement = measure(kspace * mask[..., None], mask, VOXEL, device=device, **how)
        assert (len(measurement.operator.second) > 0) == ("two sets" in case)
        return measurement.image_of(cg_sense(measurement))

    here, there = both(work)
    assert torch.equal(here, there)


def test_kspace_may_lie_on_the_device_already():
    kspace, mask, noise, _ = problem(shape=SMALL)
    expected = measure(kspace, mask, VOXEL, noise)
    reference = Reference(torch.tensor([1, 1j, 0, 0], dtype=torch.complex64), None)
    found = measure(kspace.to("cuda"), mask, VOXEL, noise, device="cuda")
    assert found.mixing.device.type == "cpu" and torch.equal(found.adjoint.cpu(), expected.adjoint)
    turned = measure(kspace.to("cuda"), mask, VOXEL, noise, device="cuda", reference=reference)
    assert torch.equal(turned.adjoint.cpu(), measure(kspace, mask, VOXEL, noise, reference=reference).adjoint)


def test_the_image_of_a_separate_calibration_is_made_there(monkeypatch):
    """On the CPU it takes seconds per coil."""
    made, original = [], low_resolution._low_resolution

    def noted(coil, shape):
        made.append(original(coil, shape))
        return made[-1]

    monkeypatch.setattr(low_resolution, "_low_resolution", noted)
    kspace, *_ = problem(shape=SMALL, acceleration=1.0)
    block, mask = centre_block(SMALL[:2], (10, 10)).float(), regular()
    calibration = (kspace * block[..., None], block)
    measurement = measure(kspace * mask[..., None], mask, VOXEL, calibration=calibration, device="cuda")
    assert measurement.calibrated is not None
    assert len(made) == 2 * len(kspace) and all(image.is_cuda for image in made)


def test_without_calibration_lines_no_more_memory_is_taken_than_was_counted_on(gpu, monkeypatch):
    monkeypatch.setattr("recon_core.sense.WORKING_SET_BYTES", 1)  # as small beside the scan as it is for large ones
    kspace = random_complex(24, 20, 22, 18)
    mask = torch.zeros(20, 22)
    mask[::2, ::2] = 1
    measurement = measure(kspace * mask[..., None], mask, VOXEL, coils=24, device="cuda")
    assert any("smoothed image" in warning for warning in measurement.warnings)
    assert gpu.peak <= 8 * (WORK_ARRAYS * 24 + SINGLE_VOLUMES) * kspace[0].numel()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_cpus_image(name):
    method, (kspace, mask, noise, _) = METHODS[name], problem(shape=SMALL, coils=2)
    few = {"sweeps": 3, "iterations": 2, "steps": 3, "slabs": 2}
    config = method.config
    if config:
        config = replace(config, **{field: few[field] for field in vars(config) if field in few})

    def work(device):
        measurement = measure(kspace, mask, VOXEL, noise, device=device)
        network = prior.load_prior(method.prior, device, half=False) if method.uses_prior else None
        return last(method.run(measurement, network, cg_sense(measurement), config, 0)).volume

    here, there = both(work)
    assert torch.equal(here, there) and bool(torch.isfinite(here.abs()).all())


@pytest.mark.parametrize("thickness,on_host", [(1, False), (4, False), (4, True)])
def test_learning_from_the_scan_is_the_cpus(thickness, on_host, monkeypatch):
    monkeypatch.setattr(adaptation, "PASSES", 2)
    monkeypatch.setattr(pupil, "LEAST_SAMPLES", 10)
    kspace, mask, noise, _ = problem(shape=(28, 32, 24), coils=3, snr=20.0)

    def work(device):
        measurement = measure(kspace[..., 10 : 10 + thickness], mask, VOXEL, noise, device=device, on_host=on_host)
        network, config = prior.load_prior("small", device, half=False), adaptation.AdaptedConfig(sweeps=1, adapt=2)
        states = list(reconstruct_adapted(measurement, network, cg_sense(measurement), config))
        assert len(states) == 5, "one sweep, two rounds, two passes"
        return states[-1].volume

    here, there = both(work)
    assert torch.equal(here, there)


@pytest.mark.parametrize(
    "name,most", {"diffusion": 5, "dds": 7, "tpdm": 7, "mbir": 7, "pnp": 10, "wavelet": 0, "tv": 0}.items()
)
def test_a_sweep_makes_the_host_wait_a_few_times_only(name, most, gpu):
    """For conjugate gradients to end and the prior to look for NaN, once each for every iteration and batch.

    Never for every slice.
    """
    method, (kspace, mask, noise, _) = METHODS[name], problem(shape=(24, 28, 20))
    measurement, waits = measure(kspace, mask, VOXEL, noise, device="cuda"), []
    network = prior.load_prior(method.prior, "cuda") if method.uses_prior else None
    for state, _ in zip(method.run(measurement, network, cg_sense(measurement), method.config, 0), range(4)):
        waits.append(gpu.waits.total())
    assert max(np.diff(waits)) <= most, gpu.waits


# the chain


@pytest.mark.parametrize(
    "options",
    [{"error_map": True, "output": "uint16"}, {"method": "zero-filled", "output": "complex64"}],
)
def test_the_chain_gives_the_cpus_images_and_keeps_nothing_there(scan_path, options, gpu):
    network, images = {device: prior.load_prior("small", device, half=False) for device in ("cpu", "cuda")}, {}
    held = gpu.used
    for device in network:
        images[device] = run_chain(scan_path, network[device], device=device, sweeps=1, **options)
    assert len(images["cpu"]) == len(images["cuda"])
    assert all(np.array_equal(a.data, b.data) for a, b in zip(*images.values()))
    assert all("CPU" not in image.meta["ImageComments"] for image in images["cuda"])
    gc.collect()
    assert gpu.used == held < gpu.peak


def test_the_server_warms_up_and_answers_there(scan_path, gpu):
    with running({"device": "auto", "sweeps": 2, "adapt": 1}, load_prior_for) as server:
        server.warm_up()
        held = gpu.used
        (first, _), (second, _) = (client(server, scan_path) for _ in range(2))
        assert server.health()["device"] == "cuda" and server.health()["prior"] == "base"
    assert [i.image_series_index for i in first] == [1, 2]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(first, second))
    gc.collect()
    assert gpu.used == held


def test_a_gpu_is_chosen_by_its_number(scan_path, gpu, monkeypatch):
    expected, numbered = (run_chain(scan_path, None, method="cg", device=name)[0] for name in ("cuda", "cuda:0"))
    assert np.array_equal(expected.data, numbered.data)
    second = make_options({"device": "cuda:1"})
    with pytest.raises(PriorError, match="device cuda:1 was asked for, but torch finds 1 CUDA device, counted from 0"):
        load_prior_for(second)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        assert device_of(second) == torch.device("cuda", 1)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(PriorError, match="device cuda:1 was asked for, but torch finds no CUDA device"):
            load_prior_for(second)
    with pytest.raises(OptionsError, match="option 'device': expected auto, cpu, cuda, or cuda:N .* got 'cuda:x'"):
        make_options({"device": "cuda:x"})


@pytest.mark.parametrize(
    "noticed,said",
    [
        ("before", "GiB free, 4 coils need"),
        ("on the way", "the GPU's memory ran short: coil maps stay in the host's memory"),
    ],
)
def test_where_memory_is_short_coil_maps_stay_on_the_host(scan_path, noticed, said, gpu):
    (expected,) = run_chain(scan_path, None, method="cg", device="cpu", output="float32")
    errors = [torch.OutOfMemoryError("CUDA out of memory")] * (noticed == "on the way")

    def fault(name):
        if errors:
            raise errors.pop()

    gpu.fault, gpu.told = fault, 2**20 if noticed == "before" else None
    (image,) = run_chain(scan_path, None, method="cg", device="cuda", output="float32")
    assert np.array_equal(image.data, expected.data) and said in image.meta["ImageComments"]
    gc.collect()
    assert gpu.used == 0


@pytest.mark.parametrize(
    "error,lost",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError(ILLEGAL), True),
        (RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"), False),
    ],
)
def test_a_gpu_that_fails_before_the_preview_leaves_it_to_the_cpu(scan_path, error, lost, gpu):
    (expected,) = run_chain(scan_path, None, method="cg", device="cpu", output="float32")
    when = threading.Event()
    when.set()
    gpu.fault = failing_at(when, error)
    (image,) = run_chain(scan_path, None, method="cg", device="cuda", output="float32")
    assert np.array_equal(image.data, expected.data)
    assert "CG-SENSE was computed on the CPU" in image.meta["ImageComments"]
    assert gpu_lost.is_set() == lost


@pytest.mark.parametrize(
    "error,lost",
    [(torch.OutOfMemoryError("CUDA out of memory"), False), (RuntimeError(ILLEGAL), True)],
)
def test_a_gpu_that_fails_while_the_solver_works_leaves_the_preview(scan_path, error, lost, gpu):
    when = threading.Event()
    gpu.fault = failing_at(when, error)

    def spoil(x, sigma):
        when.set()
        return x + 1

    images, said = images_and_error(scan_path, spoil, device="cuda")
    assert len(images) == 1 and images[0].image_series_index == 1 and "the CG-SENSE preview stands" in said
    assert gpu_lost.is_set() == lost


@pytest.mark.parametrize("method", ["diffusion", "cg"])
def test_a_gpu_that_hangs_is_waited_for_in_no_thread_but_the_solvers(method, gpu, monkeypatch):
    """Nor if there is an image of an earlier sweep, which comes after what hangs.

    Nor if it makes CG-SENSE, which has no sweeps.
    """
    released, hangs, calls, said = threading.Event(), threading.Event(), [], []
    kspace, mask, noise, _ = problem(shape=SMALL)
    measurement = measure(kspace, mask, VOXEL, noise, device="cuda")
    preview = cg_sense(measurement)

    def hang():
        monkeypatch.setattr(solve, "HANG_S", 3.0)
        hangs.set()

    def denoise(x, sigma):
        calls.append(sigma)
        if len(calls) > 1:
            hang()
        return x + 1

    def why_stop():
        return "in a hurry" * hangs.is_set() * (method != "cg")

    def work():
        options = make_options({"method": method})
        try:
            said.append(solve.solve(measurement, preview, denoise, options, lambda *_: None, why_stop).failure)
        except GpuHangs as error:
            said.append(str(error))

    def hanging_states(*_):
        hang()
        return iter([SimpleNamespace(volume=torch.ones(2, device="cuda") + 1)])

    gpu.fault = lambda name: hangs.is_set() and released.wait(60)
    if method == "cg":
        monkeypatch.setattr(solve, "states", hanging_states)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    answered = list(said)
    released.set()
    thread.join(20)
    assert len(answered) == 1 and "did not answer for 3 s" in answered[0]
    assert gpu_lost.is_set() == (method != "cg"), "of CG-SENSE the caller takes note"


WITHIN = {
    "image_of": (Measurement, "image_of"),
    "overlaid": (Sense, "overlaid"),
    "judge": (solve, "judge"),
    "finite": (solve, "finite"),
    "object_mask": (solve, "object_mask"),
    "pixels": (gadgets.images, "to_pixels"),
    "finite pixels": (gadgets.images, "finite"),
}


def failing_within(monkeypatch, gpu, place, fail, well=0):
    """Let every operator that the GPU is asked for within the function at `place` call `fail`.

    But for the first `well` calls of that function.
    """
    within, original, calls = threading.local(), getattr(*WITHIN[place]), []

    def entered(*given, **how):
        calls.append(1)
        within.it = len(calls) > well
        try:
            return original(*given, **how)
        finally:
            within.it = False

    monkeypatch.setattr(*WITHIN[place], entered)
    gpu.fault = lambda name: getattr(within, "it", False) and fail()


@pytest.mark.parametrize(
    "error,reason",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "the GPU's memory does not hold this scan"),
        (RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"), "a library of the GPU failed"),
    ],
)
@pytest.mark.parametrize("place", WITHIN)
def test_a_gpu_that_runs_short_after_the_solver_leaves_its_image_to_the_cpu(
    scan_path, place, error, reason, gpu, monkeypatch
):
    options = {"sweeps": 1, "error_map": True, "output": "uint16"}
    expected = run_chain(scan_path, prior.load_prior("small", "cpu", half=False), **options)
    network, asked = prior.load_prior("small", "cuda", half=False), []
    held = gpu.used

    def fail():
        asked.append(1)
        raise error

    failing_within(monkeypatch, gpu, place, fail)
    made = run_chain(scan_path, network, device="cuda", **options)
    assert asked or place == "overlaid", "there is one set of maps"
    assert len(made) == 3 and all(np.array_equal(a.data, b.data) for a, b in zip(expected, made))
    note = f"{reason}: the CPU made an image of what had been computed"
    assert made[-1].meta["ImageComments"].count(note) == bool(asked)
    gc.collect()
    assert not gpu_lost.is_set()
    assert gpu.used == held or error.__traceback__, "the log of the test keeps an internal error's traceback"


def test_where_the_host_is_short_of_memory_too_the_preview_stands(scan_path, gpu, monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    failing_within(monkeypatch, gpu, "image_of", fail, well=1)
    monkeypatch.setattr("gadgets.budget.free_memory", lambda: 2**20)
    (image,), said = images_and_error(scan_path, lambda x, sigma: x, device="cuda")
    assert image.image_series_index == 1
    assert "its image needs 0.16 GiB, and 0.00098 GiB of this machine's memory are free now" in said


@pytest.mark.parametrize("hangs", [True, False])
@pytest.mark.parametrize(
    "place,well,preview",
    [
        ("image_of", 0, True),
        ("image_of", 1, True),
        ("image_of", 0, False),
        ("judge", 0, True),
        ("judge", 0, False),
        ("pixels", 0, True),
        ("pixels", 1, True),
        ("pixels", 0, False),
    ],
)
def test_a_gpu_that_is_lost_after_the_solver_costs_at_most_its_image(
    scan_path, place, well, preview, hangs, gpu, monkeypatch
):
    """What was sent stands, or else the CPU makes CG-SENSE, as for the next scan."""
    expected, released = run_chain(scan_path, lambda x, sigma: x, sweeps=1)[0], threading.Event()
    sent = preview and (well or place == "judge")  # before it was lost
    on_cpu_note = "the GPU failed and cannot be used until this process is restarted: CG-SENSE was computed on the CPU"
    failure = "the GPU did not answer for 0.5 s" if hangs else ILLEGAL

    def fail():
        monkeypatch.setattr(solve, "HANG_S", 0.5)
        if hangs:
            released.wait(30)
        raise RuntimeError(ILLEGAL)

    failing_within(monkeypatch, gpu, place, fail, well)
    for scan in (1, 2):
        (image,), said = images_and_error(scan_path, lambda x, sigma: x, device="cuda", preview=preview)
        assert np.array_equal(image.data, expected.data) and image.image_series_index == (1 if preview else 2)
        assert gpu_lost.is_set()
        on_cpu = on_cpu_note in image.meta["ImageComments"]
        assert on_cpu == (scan == 2 or not sent)
        assert ("the GPU could not take this scan" if on_cpu else failure) in said
    released.set()


def test_a_gpu_that_hangs_as_its_memory_is_freed_holds_up_no_scan(scan_path, gpu):
    released = threading.Event()
    gpu.fault = lambda name: name == "empty_cache" and released.wait(60)
    with running({"device": "cuda", "method": "cg"}, load_prior_for) as server:
        (first, _), (second, _) = (client(server, scan_path) for _ in range(2))
    assert len(first) == len(second) == 1 and not released.is_set()
    released.set()


def test_a_gpu_that_hangs_as_it_takes_a_prior_is_lost(gpu, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(solve, "HANG_S", 0.5)
    gpu.fault = lambda name: released.wait(60)
    assert load_prior_for(make_options({"device": "cuda", "method": "pnp"})) is None and gpu_lost.is_set()
    released.set()


def test_a_gpu_that_hangs_as_its_memory_is_freed_for_another_try_is_lost(scan_path, gpu, monkeypatch):
    """CG-SENSE comes from the CPU."""
    (expected,), released = run_chain(scan_path, None, method="cg", device="cpu"), threading.Event()
    monkeypatch.setattr("gadgets.failure.FREEING_S", 0.5)

    def fault(name):
        if name == "empty_cache":
            released.wait(60)
        else:
            assert not gpu_lost.is_set(), f"{name} was asked of it"
            raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.fault = fault
    (image,) = run_chain(scan_path, None, method="cg", device="cuda")
    assert np.array_equal(image.data, expected.data) and gpu_lost.is_set() and left_behind() == 1
    assert "CG-SENSE was computed on the CPU" in image.meta["ImageComments"]
    released.set()


def test_a_lost_gpu_is_asked_to_hold_no_prior(gpu):
    gpu.fault = lambda name: pytest.fail(f"{name} was asked of it")
    gpu_lost.set()
    assert load_prior_for(make_options({"method": "pnp"})) is None


@pytest.mark.parametrize("method", ["wavelet", "tv", "diffusion"])
def test_the_deadline_counts_what_is_computed_not_what_is_asked_for(scan_path, method, gpu):
    gpu.fault = lambda name: time.sleep(1.0 * (name == "synchronize"))  # what was asked for
    options = dict(method=method, sweeps=50, device="cuda", deadline_s=3.0, preview=False)
    image = run_chain(scan_path, lambda x, sigma: x, **options)[0]
    done = re.search("stopped at the deadline of 3 s after ([0-9]+) of [58]0 sweeps", image.meta["ImageComments"])
    assert done and int(done[1]) <= 3


# training


OPERATOR = {"architecture": "operator", "voxel_mm": (2.0, 2.0), "vary_sharpness": False}


@pytest.mark.parametrize("given", [{}, {"own_states": 1.0}, OPERATOR])
def test_training_there_is_the_cpus_and_can_be_resumed(given, tmp_path, monkeypatch):
    monkeypatch.setattr(Rehearsal, "config", VariationalConfig(sweeps=2))
    monkeypatch.setattr(Rehearsal, "voxels", (12_000, 20_000))
    monkeypatch.setattr("recon_core.rehearsal.of_few_shapes", lambda network: network)  # padding changes the result
    volume = Volume("box", np.pad(np.ones((40, 44, 42), np.float32), 8), (1.0, 1.0, 1.0))

    def work(device):
        path = tmp_path / f"{device}.safetensors"
        alone = dict(phantoms=0, workers=0, scan_workers=0)
        options = TrainOptions(steps=2, batch=2, crop=16, device=device, precision="fp32", **alone, **given)
        train([volume], path, options, lambda text: None)
        longer = options.model_copy(update={"steps": 4})
        trained = train([volume], path, longer, lambda text: None, () if given else [volume])
        return torch.cat([weights.detach().flatten() for weights in trained.parameters()])

    here, there = both(work)
    # Adam divides by the gradient's size: rounding of small ones counts
    assert torch.allclose(here, there, rtol=0, atol=5e-5)
