"""What the method as published optimises: volumes of known Gaussians, meshes of one field of view, gradients."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import random_complex
from test_variational import VOXEL, last, problem

from recon_core import gaussians
from recon_core.cg_sense import cg_sense
from recon_core.faithful import RMS, FaithfulConfig, prior_mesh, reconstruct_faithful
from recon_core.fft import fft, kspace_crop
from recon_core.gaussians import Gaussians, Splat, cubes
from recon_core.interpolation import interpolate
from recon_core.measure import measure
from recon_core.measurement import Measurement
from recon_core.methods import METHODS
from recon_core.metrics import object_mask, psnr
from recon_core.neural_field import NeuralField
from recon_core.prior import load_prior
from recon_core.representation import Grid
from recon_core.sense import Sense
from recon_core.simulate import phantom

SHAPE = (18, 20, 17)


def some_gaussians(count=7, shape=(8, 9, 7)):
    random = torch.Generator().manual_seed(0)
    places = torch.rand(count, 3, generator=random, dtype=torch.float64) * torch.tensor(shape)
    lower = torch.rand(count, 3, 3, generator=random, dtype=torch.float64).tril()
    factor = torch.eye(3, dtype=torch.float64) + 0.3 * lower
    return places, factor, torch.randn(count, generator=random, dtype=torch.complex128)


def test_gaussians_are_summed_as_their_formula_says(monkeypatch):
    """Each with the covariance (F F^T)^-1, here written with it; cut off where e^-18 is left."""
    monkeypatch.setattr(gaussians, "REACH", 6.0)
    shape = (8, 9, 7)
    places, factor, amplitude = some_gaussians(shape=shape)
    got = Splat.apply(places, factor, amplitude, shape, cubes(factor, 20))
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij"), -1)
    expected = torch.zeros(shape, dtype=torch.complex128)
    for p, f, a in zip(places, factor, amplitude):
        covariance = torch.linalg.inv(f @ f.T)
        away = grid - p
        expected += a * torch.exp(-0.5 * (away @ torch.linalg.inv(covariance) * away).sum(-1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_gaussians_know_their_derivatives():
    places, factor, amplitude = (value.requires_grad_() for value in some_gaussians(3))
    boxes = cubes(factor.detach(), 3)
    assert torch.autograd.gradcheck(lambda *them: Splat.apply(*them, (8, 9, 7), boxes), (places, factor, amplitude))


def test_every_gaussian_has_one_cube_of_its_own_size():
    factor = torch.eye(3).repeat(50, 1, 1) / torch.linspace(0.3, 3, 50)[:, None, None]
    boxes = cubes(factor, 4)
    assert sorted(torch.cat([some for some, _ in boxes]).tolist()) == list(range(50))
    sides = {int(number): round(len(offsets) ** (1 / 3)) // 2 for some, offsets in boxes for number in some}
    assert sides[0] == 1 and sides[49] == 4 and all(sides[i] <= sides[i + 1] for i in range(49))


@pytest.mark.parametrize("kind", [Gaussians, NeuralField, Grid])
def test_one_field_of_view_on_two_meshes(kind):
    """On a mesh twice as fine every second voxel, counted from n//2, lies on one of the coarse mesh."""
    fine = (36, 40, 34)
    x = kind(phantom(SHAPE).to(torch.complex64), fine)
    coarse, double = x(SHAPE).detach(), x(fine).detach()
    same = double[tuple(slice(f // 2 - n // 2 * 2, None, 2) for n, f in zip(SHAPE, fine))]
    torch.testing.assert_close(same, coarse, rtol=0, atol=1e-5)


def test_a_grid_of_one_mesh_is_the_volume_and_of_two_crops_kspace():
    start = random_complex(*SHAPE)
    assert torch.equal(Grid(start, SHAPE)(SHAPE), start)
    finer = Grid(start, (36, 40, 34))
    torch.testing.assert_close(finer((36, 40, 34)).detach(), kspace_crop(start, (36, 40, 34)))


def test_linear_interpolation_keeps_a_plane_and_its_centre():
    ramp = torch.arange(12.0)[:, None, None].expand(12, 6, 6)
    fine = interpolate(ramp, (24, 6, 6))
    torch.testing.assert_close(fine[:22, 0, 0], torch.arange(22.0) / 2)  # the last wraps around


@pytest.mark.parametrize("n, m", [(13, 26), (13, 39), (12, 25), (9, 31)])
def test_linear_interpolation_keeps_the_centre_of_any_mesh(n, m):
    """A straight line through the middle stays one: places are counted from n//2 to m//2, also where these are odd."""
    ramp = (torch.arange(n) - n // 2).float()[:, None, None].expand(n, 6, 6)
    fine = interpolate(ramp, (m, 6, 6))[:, 0, 0]
    expected = (torch.arange(m) - m // 2) * n / m
    inside = (expected >= -(n // 2)) & (expected <= n - 1 - n // 2)
    torch.testing.assert_close(fine[inside], expected[inside], atol=1e-4, rtol=0)


def noiseless(shape=SHAPE):
    """Fully sampled, one coil: the data are the volume."""
    volume = phantom(shape).to(torch.complex64)
    operator = Sense(torch.ones(1, *shape, dtype=torch.complex64), torch.ones(shape[:2]))
    energy = float(fft(volume, (0, 1)).abs().square().sum())
    return Measurement(operator, volume, energy, volume.numel(), 1e-3, VOXEL, (8, 8)), volume


@pytest.mark.parametrize("name, db", [("faithful", 50), ("interpolated", 30), ("gaussians", 30), ("field", 25)])
def test_without_a_prior_every_representation_comes_to_the_data(name, db):
    measurement, volume = noiseless()
    config = replace(METHODS[name].config, weight=0.0, iterations=60, slabs=1, learning_rate=0.1)
    state = last(reconstruct_faithful(measurement, lambda x, s: x, 0.8 * volume, config))
    error = (state.volume - volume)[object_mask(volume.abs())]
    assert 20 * math.log10(float(volume.abs().max() / error.abs().square().mean().sqrt())) > db


def test_the_prior_sees_voxels_of_its_own_size():
    """Its slices are those of a mesh of that size over the same field of view."""
    measurement, volume = noiseless()
    seen = set()

    def prior(slices, sigma):
        seen.add(tuple(slices.shape[2:]))
        return slices

    config = FaithfulConfig(iterations=1, prior_voxel_mm=1.0)
    last(reconstruct_faithful(measurement, prior, volume, config))
    assert prior_mesh(measurement, config) == (36, 40, 34)
    assert seen == {(40, 34), (36, 34), (36, 40)}


def test_a_neural_field_with_the_shipped_prior_beats_cg_sense():
    kspace, mask, noise, reference = problem(shape=(32, 36, 30), snr=15.0)
    measurement = measure(kspace, mask, VOXEL, noise)
    preview, inside = cg_sense(measurement), object_mask(reference)
    config = replace(METHODS["field"].config, iterations=40, slabs=2)
    state = last(reconstruct_faithful(measurement, load_prior("small-white"), preview, config))
    assert psnr(state.volume, reference, inside) > psnr(preview, reference, inside) + 1


def test_gaussians_begin_near_the_image():
    image = phantom((24, 28, 22)).to(torch.complex64)
    x = Gaussians(image, tuple(image.shape))
    assert len(x.places) == math.ceil(gaussians.SHARE * int((image.abs() > gaussians.EMPTY).sum()))
    before = float((x(tuple(image.shape)).detach() - image).norm() / image.norm())
    x.fit(image, METHODS["gaussians"].config.learning_rate * RMS)
    assert before < 0.7 and float((x(tuple(image.shape)).detach() - image).norm() / image.norm()) < 0.1 * before


def test_a_fit_survives_numbers_too_small_for_their_square():
    """Far from the object Gaussians leave subnormal numbers, at which torch's slope of abs() is NaN."""
    image = torch.zeros(20, 20, 20, dtype=torch.complex64)
    image[8:12, 8:12, 8:12], image[:4] = 1, 1e-40
    x = Gaussians(image, tuple(image.shape))
    x.fit(image, METHODS["gaussians"].config.learning_rate * RMS)
    assert all(bool(torch.isfinite(part).all()) for part in x.parameters())
