"""The prior in function space: one answer on every mesh, noise that is one field on all of them, who may use it."""

import math

import pytest
import torch
from test_variational import last, problem

from gadgets.options import make_options
from gadgets.solve import load_prior_for
from recon_core.cg_sense import cg_sense
from recon_core.faithful import FaithfulConfig, reconstruct_faithful
from recon_core.fft import kspace_crop
from recon_core.measure import measure
from recon_core.neural_operator import NOISE_MM, TAP_MM, NeuralOperator, sampled_kernel, smooth_noise
from recon_core.prior import Prior, PriorError, load_prior
from recon_core.simulate import phantom
from recon_core.train import first_prior
from recon_core.train_options import TrainOptions

MESHES = [(1.0, 1.0), (4.0, 4.0), (1.0, 4.0)]


def waves(voxel_mm, side_mm=96):
    """Two smooth complex waves, seen on voxels of `voxel_mm`: [1 2 h w]."""
    y, x = ((torch.arange(round(side_mm / mm)) + 0.5) * mm for mm in voxel_mm)
    phase = 2 * math.pi * torch.stack([y[:, None] / 48 + x / 32, y[:, None] / 96 - x / 48])
    return (torch.cos(phase) * torch.tensor([0.7, 0.4])[:, None, None])[None]


@pytest.mark.parametrize("voxel_mm", MESHES)
def test_a_kernel_keeps_its_integral_on_all_voxels(voxel_mm):
    kernel = torch.randn(5, 7, 7)
    assert torch.equal(sampled_kernel(kernel, (TAP_MM, TAP_MM)), kernel)
    torch.testing.assert_close(sampled_kernel(kernel, voxel_mm).sum((1, 2)), kernel.sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_a_kernel_is_interpolated_where_voxels_are_finer():
    """Halfway between two values lies their mean; each weighs half along an axis of twice as many voxels."""
    kernel = torch.zeros(1, 7, 7)
    kernel[0, 3, 3:5] = torch.tensor([1.0, 3.0])
    line = sampled_kernel(kernel, (TAP_MM, TAP_MM / 2))[0, 3]
    torch.testing.assert_close(line, torch.tensor([0.0] * 6 + [0.5, 1, 2, 3, 1.5] + [0.0] * 4) / 2)


@pytest.mark.parametrize("voxel_mm", MESHES)
def test_a_smooth_function_has_the_same_answer_on_every_mesh(voxel_mm):
    torch.manual_seed(0)
    network = NeuralOperator(channels=12, coarse=(16, 24)).eval()
    for layer in network.modules():  # zero when untrained
        if isinstance(layer, torch.nn.Conv2d) and not layer.weight.any():
            torch.nn.init.kaiming_normal_(layer.weight)
    level = torch.tensor([-0.5])
    with torch.no_grad():
        there = network(waves(voxel_mm), level, voxel_mm)
        here = network(waves((TAP_MM, TAP_MM)), level)
        blind = network(waves(voxel_mm), level)

    def shrunk(image):
        return torch.nn.functional.interpolate(image, (24, 24), mode="area")[..., 4:-4, 4:-4]

    there, here, blind = shrunk(there), shrunk(here), shrunk(blind)
    error, unaware = ((image - here).norm() / here.norm() for image in (there, blind))
    assert error < 0.1 and unaware > 3 * error


@pytest.mark.parametrize("voxel_mm", [(TAP_MM, TAP_MM), (4.0, 4.0), (1.0, 4.0)])
def test_noise_is_one_field_that_scans_see_with_their_voxels(voxel_mm):
    """What a scan of 1 mm sees, cropped in k-space, has the variance of what a coarser one sees."""
    random = torch.Generator().manual_seed(0)
    fine = smooth_noise(torch.randn(60, 192, 192, generator=random), (1.0, 1.0))
    size = [round(192 / mm) for mm in voxel_mm]
    for seen in (kspace_crop(fine, size).real, smooth_noise(torch.randn(60, *size, generator=random), voxel_mm)):
        factors = [math.erf(math.pi * NOISE_MM / mm) / math.erf(math.pi * NOISE_MM / TAP_MM) for mm in voxel_mm]
        assert abs(float(seen.var()) - math.prod(factors)) < 0.02


def test_complex_noise_stays_complex():
    noise = smooth_noise(torch.randn(3, 32, 32, dtype=torch.complex64), (2.0, 3.0))
    assert noise.is_complex() and abs(float(noise.abs().square().mean()) - 1) < 0.2


@pytest.mark.parametrize("voxel_mm", [1.0, 2.0, 4.0])
def test_the_shipped_operator_removes_smooth_noise_on_voxels_it_never_saw(voxel_mm):
    prior, mesh = load_prior("operator"), (voxel_mm, voxel_mm)
    side = round(192 / voxel_mm)
    clean = torch.stack([phantom((8, side, side))[4], torch.zeros(side, side)])[None] / 0.6
    noise = prior.unit_noise(torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), mesh)
    denoised = prior(clean + 0.2 * noise, 0.2, mesh)
    gain = 10 * torch.log10(0.04 * noise.square().mean() / (denoised - clean).square().mean())
    assert gain > 3


def test_the_published_method_tells_the_prior_the_voxels_of_each_orientation(monkeypatch):
    kspace, mask, noise, _ = problem(shape=(20, 24, 22), snr=15.0)
    measurement, prior, told = measure(kspace, mask, (3.0, 2.0, 1.0), noise), Prior("operator"), set()

    def forward(x, level, voxel_mm):
        told.add((tuple(x.shape[2:]), voxel_mm))
        return 0 * x

    monkeypatch.setattr(prior.net, "forward", forward)
    last(reconstruct_faithful(measurement, prior, cg_sense(measurement), FaithfulConfig(iterations=1, slabs=1)))
    assert told == {((24, 22), (2.0, 1.0)), ((20, 22), (3.0, 1.0)), ((20, 24), (3.0, 2.0))}


def test_methods_that_know_no_function_space_refuse_the_operator():
    unfit = "function space does not fit slice diffusion; use it with the method operator"
    with pytest.raises(PriorError, match=unfit):
        load_prior_for(make_options({"prior": "operator", "device": "cpu"}))
    with pytest.raises(PriorError, match="prior in function space, needs one; leave prior at auto"):
        load_prior_for(make_options({"method": "operator", "prior": "small", "device": "cpu"}))
    for method in ("operator", "faithful", "interpolated"):
        assert load_prior_for(make_options({"method": method, "prior": "operator", "device": "cpu"})).in_function_space


@pytest.mark.parametrize("wrong", [{"voxel_mm": (0.5, 4.0)}, {"own_states": 1.0}, {"vary_sharpness": True}])
def test_an_operator_learns_on_voxels_of_one_size(wrong):
    one_size = {"architecture": "operator", "voxel_mm": (2.0, 2.0), "vary_sharpness": False}
    with pytest.raises(ValueError, match=r"smooth noise on voxels of 2 mm; give voxel_mm: \[2.0, 2.0\]"):
        first_prior(TrainOptions(**one_size | wrong))
    assert first_prior(TrainOptions(**one_size)).in_function_space
