"""Every method behind the one interface, against answers that are known."""

from dataclasses import replace

import pytest
import torch
from conftest import random_complex
from test_variational import VOXEL, last, problem

from gadgets.options import make_options
from gadgets.solve import prior_of
from recon_core.cg_sense import cg_sense
from recon_core.faithful import (
    FaithfulConfig,
    diffusion_levels,
    noise_levels,
    random_slabs,
    reconstruct_faithful,
    slice_gradient,
)
from recon_core.fft import fft, ifft
from recon_core.gaussians import Gaussians
from recon_core.measure import measure
from recon_core.measurement import Measurement
from recon_core.methods import METHODS
from recon_core.metrics import object_mask, psnr
from recon_core.neural_field import NeuralField
from recon_core.plug_and_play import PlugAndPlayConfig, reconstruct_plug_and_play
from recon_core.posterior import PosteriorConfig, Variation, reconstruct_posterior
from recon_core.prior import list_priors, load_prior
from recon_core.sense import Sense
from recon_core.total_variation import TotalVariationConfig, divergence, gradient, reconstruct_total_variation


@pytest.fixture(scope="module")
def scan():
    kspace, mask, noise, reference = problem(shape=(32, 36, 30), snr=15.0)
    return measure(kspace, mask, VOXEL, noise), reference


def gaussian(slices, sigma):
    """The exact denoiser of a zero-mean Gaussian prior with standard deviation 0.5."""
    sigma = torch.as_tensor(sigma).reshape(-1, *[1] * (slices.ndim - 1))
    return slices * 0.25 / (0.25 + sigma**2)


@pytest.fixture(scope="module")
def wrapped():
    """The same object in 2/3 of that field of view along y, with two sets of coil maps, and its image [z y x]."""
    kspace, _, noise, _ = problem(shape=(32, 36, 30), acceleration=1.0, snr=15.0)
    images = ifft(kspace, (1, 2))
    images = images.new_zeros(4, 32, 24, 30).index_add_(2, (torch.arange(36) - 18 + 12) % 24, images)
    measurement = measure(fft(images, (1, 2)), torch.ones(32, 24), VOXEL, noise, sets=2)
    assert measurement.operator.shape[2] > 30
    return measurement, images.norm(dim=0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("given", ["scan", "wrapped"])
def test_every_method_yields_finite_states_and_counts(name, given, request, prior, monkeypatch):
    for kind in (NeuralField, Gaussians):
        monkeypatch.setattr(kind, "fit_steps", 2)
    measurement, reference = request.getfixturevalue(given)
    method = METHODS[name]
    states = method.run(measurement, prior if method.uses_prior else None, cg_sense(measurement), method.config, 0)
    first = next(states)
    assert first.sweep == 1 and first.sweep <= first.sweeps
    assert first.volume.shape == measurement.operator.shape and first.volume.is_complex()
    assert measurement.image_of(first.volume).shape == reference.shape
    assert bool(torch.isfinite(first.volume.abs()).all())
    assert (first.network_evaluations > 0) == method.uses_prior


def test_total_variation_divergence_is_minus_the_adjoint_of_the_gradient():
    volume, field = random_complex(5, 6, 7), random_complex(3, 5, 6, 7, seed=1)
    left = torch.vdot(gradient(volume).flatten(), field.flatten())
    right = torch.vdot(volume.flatten(), divergence(field).flatten())
    torch.testing.assert_close(left, -right)


def test_total_variation_denoises_a_step_by_the_known_shift():
    """Fully sampled, one coil: two plateaus of m voxels each keep their edge; each moves by threshold / m."""
    volume = torch.ones(1, 1, 16, dtype=torch.complex64)
    volume[..., 8:] = 3
    operator = Sense(torch.ones(1, 1, 1, 16, dtype=torch.complex64), torch.ones(1, 1))
    measurement = Measurement(operator, volume, 1.0, 1, 0.4, VOXEL, (1, 1))
    config = TotalVariationConfig(iterations=3000, strength=1.0)
    state = last(reconstruct_total_variation(measurement, None, volume, config))
    expected = torch.where(volume.real == 1, 1 + 0.4 / 8, 3 - 0.4 / 8)
    torch.testing.assert_close(state.volume.real, expected, rtol=1e-3, atol=1e-3)


def test_total_variation_beats_cg_sense_on_a_piecewise_constant_object(scan):
    measurement, reference = scan
    preview, inside = cg_sense(measurement), object_mask(reference)
    state = last(reconstruct_total_variation(measurement, None, preview))
    assert psnr(state.volume, reference, inside) > psnr(preview, reference, inside) + 1


def test_plug_and_play_with_a_gaussian_denoiser_reaches_its_closed_form_optimum():
    """D = x d^2 / (d^2 + s^2) is the proximal map of s^2 |x|^2 / (2 d^2): ADMM ends at Tikhonov's with n^2 / d^2."""
    shape = (12, 13, 11)
    mask = (torch.rand(shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5).float()
    mask[4:9, 4:9] = 1
    operator = Sense(torch.ones(1, *shape, dtype=torch.complex64), mask)
    zero_filled = operator.adjoint(operator.forward(random_complex(*shape) + 3))
    measurement = Measurement(operator, zero_filled, 1.0, 1, 1.0, VOXEL, (5, 5))
    config = PlugAndPlayConfig(iterations=10, sigma=0.4, cg_iterations=20)
    state = last(reconstruct_plug_and_play(measurement, gaussian, zero_filled, config))
    noise = measurement.in_tissue_units(zero_filled).noise
    expected = operator.solve(zero_filled, (noise / 0.5) ** 2, iterations=60)
    assert (state.volume - expected).norm() / expected.norm() < 1e-4


def test_published_schedule_of_noise_levels():
    """The truncated range 0.0148 to 2.03 of the linear schedule; time 200 is 0.72."""
    levels = diffusion_levels()
    assert float(levels[1]) == pytest.approx(0.0148, abs=1e-4)
    assert float(levels[200]) == pytest.approx(0.72, abs=0.01)
    assert float(levels[399]) == pytest.approx(2.03, abs=0.01)


def test_faithful_prior_gradient_is_the_denoising_residual_with_a_weight_of_each_slice():
    """With D = 0 the direction is alpha x and the objective 0.6 |x|^2 / (2 s), slice by slice, whatever the noise.

    alpha = 0.985, 0.810 and 0.442 at the times 50, 200 and 399 of the published schedule.
    """
    planes, sigma = random_complex(3, 8, 9), noise_levels(FaithfulConfig())[[49, 199, 398]]
    assert sigma.tolist() == pytest.approx([0.6 * 0.176, 0.6 * 0.72, 0.6 * 2.03], rel=0.01)
    random = torch.Generator().manual_seed(0)
    pull, objective = slice_gradient(planes, lambda x, s: 0 * x, lambda white: white, sigma, random)
    torch.testing.assert_close(pull, planes * torch.tensor([0.985, 0.810, 0.442])[:, None, None], rtol=2e-3, atol=0)
    assert objective == pytest.approx(float((0.3 * planes.abs().square().sum((1, 2)) / sigma).sum()))


@pytest.mark.parametrize("finer", [False, True])
def test_faithful_balances_the_data_and_all_slices(finer):
    """With D = 0 at almost no noise, weight 1 and all of k-space, x meets half of the data.

    On the scan's voxels and on finer ones.
    """
    shape = (8, 9, 10)
    volume = 2 + 0.1 * random_complex(*shape)
    operator = Sense(torch.ones(1, *shape, dtype=torch.complex64), torch.ones(shape[:2]))
    measurement = Measurement(operator, volume, float(volume.abs().square().sum()), volume.numel(), 1e-3, VOXEL, (8, 8))
    prior_voxel_mm = 1.0 if finer else 0.0
    config = FaithfulConfig(iterations=250, learning_rate=0.1, last_time=1, weight=1.0, prior_voxel_mm=prior_voxel_mm)
    states = list(reconstruct_faithful(measurement, lambda x, s: 0 * x, volume, config))
    mean = float(states[-1].volume.mean().real)
    assert mean == pytest.approx(1.0, rel=0.1)


def test_faithful_begins_with_the_published_step():
    """Adam's first step is the rate itself: 2 in units of the volume's root mean square, RMS of tissue brightness."""
    shape = (8, 9, 10)
    volume = 2 + 0.1 * random_complex(*shape)
    operator = Sense(torch.ones(1, *shape, dtype=torch.complex64), torch.ones(shape[:2]))
    measurement = Measurement(operator, 3 * volume, 1.0, volume.numel(), 1e-3, VOXEL, (8, 8))
    state = next(reconstruct_faithful(measurement, lambda x, s: 0 * x, volume, FaithfulConfig()))
    scale, _, _, target = measurement.in_tissue_units(volume)
    step = (state.volume / scale - target).real.abs()
    assert float(step.median()) == pytest.approx(2 * 0.6, rel=1e-3)


def test_faithful_slabs_are_contiguous_and_stay_inside():
    chosen = random_slabs(17, FaithfulConfig(slabs=50), torch.Generator().manual_seed(0)).reshape(50, 5)
    assert bool((chosen.diff(dim=1) == 1).all()) and int(chosen.min()) >= 0 and int(chosen.max()) <= 16
    assert len(random_slabs(3, FaithfulConfig(slabs=2), torch.Generator().manual_seed(0))) == 6


def test_posterior_samples_of_a_gaussian_have_its_mean_and_spread():
    """Where nothing is measured (a mask of next to nothing) the sampler must draw from the prior N(0, 0.5^2)."""
    shape = (24, 24, 24)
    mask = torch.zeros(shape[:2])
    mask[12, 12] = 1e-4
    operator = Sense(torch.ones(1, *shape, dtype=torch.complex64), mask)
    unit = torch.ones(shape, dtype=torch.complex64)
    measurement = Measurement(operator, 0 * unit, 1.0, 1, 1.0, VOXEL, (5, 5))
    state = last(reconstruct_posterior(measurement, gaussian, unit, PosteriorConfig(steps=200, sigma_max=20.0, axis=0)))
    parts = torch.view_as_real(state.volume)
    assert float(parts.std()) == pytest.approx(0.5, rel=0.05)
    assert float(parts.mean()) == pytest.approx(0, abs=0.06)


def test_data_step_with_variation_across_slices_solves_its_problem():
    """Kept up, the ADMM iterations reach the minimum: no small change of x lowers the objective."""
    kspace, mask, noise, _ = problem((16, 18, 10), acs=8)
    measurement = measure(kspace, mask, VOXEL, noise)
    config = PosteriorConfig(tv=0.02, pull=0.5, cg_iterations=8)
    scale, _, clean, target = measurement.in_tissue_units(cg_sense(measurement))
    variation = Variation(measurement, config)
    for _ in range(200):
        x = variation.solve(target, clean)

    def objective(x):
        quadratic = 0.5 * torch.vdot(x.flatten(), measurement.operator.normal(x).flatten()).real
        data = quadratic - torch.vdot(target.flatten(), x.flatten()).real
        pull = 0.5 * config.pull * (x - clean).abs().square().sum()
        return float(data + pull + config.tv * torch.diff(x, dim=0).abs().sum())

    least = objective(x)
    for seed in range(5):
        change = random_complex(*x.shape, seed=seed)
        assert objective(x + 1e-2 * change) > least - 1e-3 * abs(least)
    assert objective(clean) > least


def test_variation_across_slices_moves_a_step_by_the_known_shift():
    """All of k-space, one coil: each plateau of m slices moves by tv / (1 + pull) / m."""
    volume = torch.ones(16, 1, 1, dtype=torch.complex64)
    volume[8:] = 3
    operator = Sense(torch.ones(1, 16, 1, 1, dtype=torch.complex64), torch.ones(16, 1))
    config = PosteriorConfig(tv=0.4, pull=1.0, axis=0, cg_iterations=20)
    variation = Variation(Measurement(operator, volume, 1.0, 1, 0.1, VOXEL, (1, 1)), config)
    for _ in range(500):
        x = variation.solve(volume, volume)
    expected = torch.where(volume.real == 1, 1 + 0.4 / 2 / 8, 3 - 0.4 / 2 / 8)
    torch.testing.assert_close(x.real, expected, rtol=2e-3, atol=2e-3)


def test_variation_across_one_slice_is_none():
    operator = Sense(torch.ones(1, 1, 6, 5, dtype=torch.complex64), torch.ones(1, 6))
    volume = random_complex(1, 6, 5)
    measurement = Measurement(operator, volume, 1.0, 1, 0.1, VOXEL, (1, 1))
    x = Variation(measurement, PosteriorConfig(tv=0.4, pull=1.0, axis=0)).solve(volume, volume)
    torch.testing.assert_close(x, volume)


@pytest.mark.parametrize("name", ["dds", "mbir"])
def test_a_plane_is_sampled_as_the_slice_it_is(name, scan):
    """Across z a plane has no slices but lines of one voxel."""
    kspace, mask, noise, _ = problem(shape=(32, 36, 1), snr=15.0)
    measurement, method, seen = measure(kspace, mask, VOXEL, noise), METHODS[name], set()

    def prior(slices, sigma):
        seen.add(tuple(slices.shape[2:]))
        return slices

    next(method.run(measurement, prior, cg_sense(measurement), method.config, 0))
    assert seen and all(min(shape) >= 32 for shape in seen)


def test_the_rate_of_a_neural_field_may_be_set(scan, prior, monkeypatch):
    monkeypatch.setattr(NeuralField, "fit_steps", 4)
    measurement, _ = scan
    method, start = METHODS["field"], cg_sense(measurement)
    configs = [replace(method.config, iterations=1, learning_rate=rate) for rate in (2.0, 0.5)]
    first, second = (last(method.run(measurement, prior, start, config, 0)).volume for config in configs)
    assert float((first - second).norm() / first.norm()) > 1e-3


@pytest.mark.parametrize("name, fewer", [("tpdm", {"steps": 12, "pull": 1.0}), ("pnp", {"iterations": 4})])
def test_compared_methods_with_the_shipped_prior_beat_cg_sense(name, fewer, scan):
    measurement, reference = scan
    method, inside, preview = METHODS[name], object_mask(reference), cg_sense(measurement)
    state = last(method.run(measurement, load_prior(method.prior), preview, replace(method.config, **fewer), 0))
    assert psnr(state.volume, reference, inside) > psnr(preview, reference, inside) + 1


def test_each_method_has_the_prior_that_suits_it():
    """Samplers need one of white noise alone; a prior that is named is taken for all."""
    names = {method: prior_of(make_options({"method": method, "device": "cpu"})) for method in METHODS}
    samplers = ("faithful", "interpolated", "field", "gaussians", "dds", "tpdm", "mbir")
    assert names == {
        **dict.fromkeys(("diffusion", "pnp"), "small"),
        **dict.fromkeys(samplers, "small-white"),
        "operator": "operator",
        **dict.fromkeys(("wavelet", "tv", "cg", "zero-filled"), ""),
    }
    assert {name for name in names.values() if name} <= {card["name"] for card in list_priors()}
    assert prior_of(make_options({"method": "dds", "prior": "/mine.safetensors"})) == "/mine.safetensors"


def test_on_a_gpu_the_method_diffusion_takes_the_larger_prior():
    found = {name: method.suitable_prior("cuda") for name, method in METHODS.items()}
    assert found == {name: method.suitable_prior("cpu") for name, method in METHODS.items()} | {"diffusion": "base"}
    assert {card["name"]: card["architecture"] for card in list_priors()}["base"] == "base"
