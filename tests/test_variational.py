"""The solver against optima that are known in closed form."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_complex

from recon_core.cg_sense import STRENGTH, cg_sense
from recon_core.coils import cut_acs
from recon_core.fft import centre_block, fft, ifft
from recon_core.low_resolution import object_support as support
from recon_core.measure import measure
from recon_core.measurement import Measurement
from recon_core.methods import METHODS
from recon_core.metrics import object_mask, psnr
from recon_core.scale import intensity_scale
from recon_core.sense import Sense
from recon_core.simulate import coil_sensitivity, phantom, sampling_mask
from recon_core.slices import denoise_slices, usable_axes
from recon_core.variational import VariationalConfig, annealed, pull_of_prior, reconstruct_variational

VOXEL = (2.0, 2.0, 2.0)


def problem(shape=(24, 28, 20), coils=4, acceleration=3.0, snr=30.0, seed=0, acs=10):
    maps = torch.stack([coil_sensitivity(c, coils, shape) for c in range(coils)])
    truth = phantom(shape) * maps
    reference = truth.norm(dim=0)
    sigma = intensity_scale(reference, VOXEL) / snr
    mask = torch.from_numpy(sampling_mask(shape[:2], acceleration, "poisson", acs, seed)).float()
    noise = sigma * 2**0.5 * random_complex(coils, 4000, seed=7)
    kspace = (fft(truth, (1, 2)) + sigma * 2**0.5 * random_complex(coils, *shape, seed=seed)) * mask[:, :, None]
    return kspace, mask, noise, reference


def last(states):
    for state in states:
        pass
    return state


def gaussian_problem(noise=0.05):
    """One coil, half of the lines: what is measured, and where Tikhonov's image of a weight lies."""
    shape = (18, 17, 19)
    mask = (torch.rand(shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5).float()
    mask[4:9, 4:9] = 1
    operator = Sense(torch.ones(1, *shape, dtype=torch.complex64), mask)
    y = fft(random_complex(*shape)[None] + 3, (1, 2)) * mask[..., None]
    measurement = Measurement(operator, operator.adjoint(y), 1.0, 1, noise, VOXEL, (5, 5))
    return measurement, lambda rho: operator.solve(measurement.adjoint, rho, iterations=60)


def test_momentum_comes_nearer_in_as_many_sweeps():
    """With D = 0.9 x and little trust in the data every sweep takes a tenth of the way; momentum takes more of it."""
    measurement, tikhonov = gaussian_problem(noise=3.0)
    noise = 3.0 / intensity_scale(measurement.adjoint, VOXEL)
    rho = pull_of_prior(measurement, noise, VariationalConfig(prior_weight=2.0)) * (noise / 0.2) ** 2
    expected, left = tikhonov(rho * 0.1), []
    config = VariationalConfig(
        sweeps=12, sigma_max=0.2, sigma_min=0.2, prior_weight=2.0, dual_share=0.0, cg_iterations=8
    )
    for momentum in (0.0, 0.5):
        config = replace(config, momentum=momentum)
        state = last(reconstruct_variational(measurement, lambda x, s: 0.9 * x, measurement.adjoint, config))
        left.append(float((state.volume - expected).norm() / expected.norm()))
    assert left[1] < 0.8 * left[0]


def test_what_is_given_back_follows_the_noise_level():
    """Of the exact Gaussian denoiser the fixed point is the same at all levels, if the dual is scaled with them."""
    measurement, tikhonov = gaussian_problem()
    data = 0.5
    config = VariationalConfig(
        sweeps=40,
        sigma_max=0.6,
        sigma_min=0.15,
        prior_weight=2.0,
        dual_share=1.0,
        momentum=0.0,
        held=0.0,
        cg_iterations=12,
    )

    def gaussian(x, s):
        return x * data**2 / (data**2 + float(torch.as_tensor(s).flatten()[0]) ** 2)

    state = last(reconstruct_variational(measurement, gaussian, measurement.adjoint, config))
    noise = 0.05 / intensity_scale(measurement.adjoint, VOXEL)
    expected = tikhonov(2.0 * float(measurement.operator.sampled.float().mean()) ** 0.5 * (noise / data) ** 2)
    assert (state.volume - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("dual_share", [0.0, 0.3, 1.0])
def test_gaussian_prior_reaches_its_closed_form_optimum(dual_share):
    """With D(x) = a x the fixed point of a sweep is Tikhonov's with weight rho (1 - a) / (1 - dual_share (1 - a)).

    Without the dual that is the pull x - D(x), with the whole of it, rho (1 - a) / a, the Gaussian's own gradient.
    """
    shape, sigma, data = (18, 17, 19), 0.2, 0.5
    mask = (torch.rand(shape[:2], generator=torch.Generator().manual_seed(0)) < 0.5).float()
    mask[4:9, 4:9] = 1
    operator = Sense(torch.ones(1, *shape, dtype=torch.complex64), mask)
    y = fft(random_complex(*shape)[None] + 3, (1, 2)) * mask[..., None]
    measurement = Measurement(operator, operator.adjoint(y), 1.0, 1, 0.05, VOXEL, (5, 5))
    shrink = data**2 / (data**2 + sigma**2)
    config = VariationalConfig(
        sweeps=400, sigma_max=sigma, sigma_min=sigma, prior_weight=2.0, dual_share=dual_share, cg_iterations=8
    )
    state = last(reconstruct_variational(measurement, lambda x, s: x * shrink, operator.adjoint(y), config))
    noise = 0.05 / intensity_scale(operator.adjoint(y), VOXEL)
    rho = 2.0 * float(mask.mean()) ** 0.5 * (noise / sigma) ** 2
    expected = operator.solve(operator.adjoint(y), rho * (1 - shrink) / (1 - dual_share * (1 - shrink)), iterations=50)
    assert (state.volume - expected).norm() / expected.norm() < 1e-4


def test_kspace_times_1000_gives_the_image_times_1000(prior):
    kspace, mask, noise, _ = problem()
    once = measure(kspace, mask, VOXEL, noise)
    images = []
    for factor in (1.0, 1000.0):
        scaled = Measurement(once.operator, factor * once.adjoint, 1.0, 1, factor * once.sigma, VOXEL, once.acs)
        state = last(reconstruct_variational(scaled, prior, cg_sense(scaled), VariationalConfig(sweeps=3)))
        images.append(state.volume)
    torch.testing.assert_close(images[1], 1000 * images[0], rtol=1e-3, atol=1e-4 * float(images[1].abs().max()))


def test_noiseless_full_data_give_the_object_back(prior):
    kspace, _, _, reference = problem(snr=1e6)
    full = torch.stack([phantom((24, 28, 20)) * coil_sensitivity(c, 4, (24, 28, 20)) for c in range(4)])
    noise = 1e-6 * random_complex(4, 4000)
    measurement = measure(fft(full, (1, 2)), torch.ones(24, 28), VOXEL, noise)
    state = last(reconstruct_variational(measurement, prior, cg_sense(measurement), VariationalConfig(sweeps=3)))
    assert psnr(state.volume, reference, object_mask(reference)) > 40


@pytest.mark.parametrize("name", ["diffusion", "tv", "wavelet", "pnp", "cg"])
def test_data_without_any_noise_are_no_division_by_zero(prior, name):
    """Where the noise level is estimated and CG-SENSE explains all, it is 0."""
    kspace, mask, noise, _ = problem()
    measurement = measure(kspace, mask, VOXEL, noise)
    start, measurement.sigma = cg_sense(measurement), 0.0
    method = METHODS[name]
    state = last(itertools.islice(method.run(measurement, prior, start, method.config, 0), 4))
    assert bool(torch.isfinite(state.volume.abs()).all())


@pytest.mark.parametrize("coils", [1, 2, 8])
def test_trained_prior_beats_cg_sense(coils):
    from recon_core.prior import load_prior

    kspace, mask, noise, reference = problem((48, 56, 40), coils, acceleration=3.0, snr=20.0, acs=20)
    measurement = measure(kspace, mask, VOXEL, noise)
    start = cg_sense(measurement)
    state = last(reconstruct_variational(measurement, load_prior("small"), start, VariationalConfig(sweeps=9)))
    inside = object_mask(reference)
    assert psnr(state.volume, reference, inside) > psnr(start, reference, inside) + 1.5


@pytest.mark.parametrize(
    ("noise", "known", "weight"),
    [(0.03, True, 0.35), (0.09375, True, 0.525), (0.156, True, 0.8736), (0.6, True, 0.8736), (0.125, False, 0.35)],
)
def test_noisy_data_take_more_of_the_prior_if_noise_lines_say_so(noise, known, weight):
    """A quarter of the lines halves 0.7; an SNR of 11 instead of 16 adds a half, one below 7 no more than one of 7.

    But not by an estimate that may be wrong.
    """
    mask = torch.zeros(8, 8)
    mask[::2, ::2] = 1
    operator = Sense(torch.ones(1, 8, 8, 4, dtype=torch.complex64), mask)
    measurement = Measurement(operator, torch.zeros(8, 8, 4), 0.0, 64, 1.0, VOXEL, (8, 8), sigma_known=known)
    assert pull_of_prior(measurement, noise, VariationalConfig()) == pytest.approx(weight)
    assert pull_of_prior(measurement, noise, VariationalConfig(), least_sampled=0.36) == pytest.approx(1.2 * weight)


def test_half_of_the_slices_per_sweep_cost_little():
    """Slices that are not drawn are held by what was last made of them, not left to the noise."""
    from recon_core.prior import load_prior

    kspace, mask, noise, reference = problem((40, 44, 36), 8, acceleration=3.0, snr=20.0, acs=20)
    measurement = measure(kspace, mask, VOXEL, noise)
    start, prior, inside = cg_sense(measurement), load_prior("small"), object_mask(reference)
    configs = (VariationalConfig(sweeps=16, slice_fraction=fraction) for fraction in (1.0, 0.5))
    whole, half = (last(reconstruct_variational(measurement, prior, start, config)) for config in configs)
    assert half.network_evaluations == pytest.approx(whole.network_evaluations / 2, rel=0.05)
    assert psnr(half.volume, reference, inside) > psnr(whole.volume, reference, inside) - 1


def test_same_seed_same_image_other_seed_other_order(prior):
    kspace, mask, noise, _ = problem()
    measurement = measure(kspace, mask, VOXEL, noise)
    start, config = cg_sense(measurement), VariationalConfig(sweeps=3, slice_fraction=0.5)
    images = [last(reconstruct_variational(measurement, prior, start, config, seed)).volume for seed in (0, 0, 1)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("shape,usable", [((30, 32, 34), {0, 1, 2}), ((30, 32, 6), {2})])
def test_each_orientation_has_its_turn_in_an_order_that_the_seed_draws(prior, shape, usable):
    kspace, mask, noise, _ = problem(shape)
    measurement = measure(kspace, mask, VOXEL, noise)
    config, orders = VariationalConfig(sweeps=6), []
    for seed in range(4):
        asked = []
        noted = lambda volume, prior, sigma, axis, chosen, pose: asked.append(axis) or len(chosen)
        last(reconstruct_variational(measurement, prior, cg_sense(measurement), config, seed, noted))
        assert set(asked[:3]) == set(asked[3:]) == usable
        orders.append(tuple(asked))
    assert (len(set(orders)) > 1) == (len(usable) > 1)


def test_every_sweep_is_a_state_that_counts_its_evaluations(prior):
    kspace, mask, noise, _ = problem()
    measurement = measure(kspace, mask, VOXEL, noise)
    states = list(reconstruct_variational(measurement, prior, cg_sense(measurement), VariationalConfig(sweeps=4)))
    assert [s.sweep for s in states] == [1, 2, 3, 4]
    assert states[0].network_evaluations > 0
    noise = measurement.sigma / intensity_scale(cg_sense(measurement), VOXEL)
    assert [s.sigma for s in states] == pytest.approx(annealed(VariationalConfig(sweeps=4), noise, 0.25))
    assert states[-1].sigma == pytest.approx(max(0.02, noise / 2))


def test_noise_levels_fall_by_a_factor_and_stay_at_the_lowest_for_every_orientation():
    config = VariationalConfig(sweeps=12, sigma_max=0.32, sigma_min=0.02)
    levels = annealed(config, 0.1, 0.25)
    assert levels[8:] == pytest.approx([0.05] * 4) and levels[4] == pytest.approx((0.32 * 0.05) ** 0.5)
    assert [b / a for a, b in zip(levels[:8], levels[1:9])] == pytest.approx([(0.05 / 0.32) ** (1 / 8)] * 8)
    assert annealed(config, 0.01, 0.0)[-2:] == pytest.approx([0.02 * 16 ** (1 / 11), 0.02])
    assert annealed(VariationalConfig(sweeps=1), 0.1, 0.25) == [0.3]
    assert annealed(VariationalConfig(sweeps=2), 0.1, 0.25) == pytest.approx([0.3, 0.05])


@pytest.mark.parametrize("shape,held", [((30, 32, 34), 2), ((30, 32, 1), 0)])
def test_where_one_orientation_is_of_use_the_noise_level_falls_to_the_last_sweep(prior, shape, held):
    kspace, mask, noise, _ = problem(shape)
    measurement = measure(kspace, mask, VOXEL, noise)
    states = reconstruct_variational(measurement, prior, cg_sense(measurement), VariationalConfig(sweeps=8))
    levels = [state.sigma for state in states]
    assert sum(level == levels[-1] for level in levels) == 1 + held


@pytest.mark.parametrize("shape,same", [((30, 32, 34), True), ((30, 32, 1), False)])
def test_high_acceleration_weakens_the_prior_less_where_one_orientation_is_of_use(prior, shape, same):
    kspace, mask, noise, _ = problem(shape, acceleration=5.0)
    measurement = measure(kspace, mask, VOXEL, noise)
    start, images = cg_sense(measurement), []
    for alone in (0.36, 0.0):
        config = VariationalConfig(sweeps=3, alone=alone)
        images.append(last(reconstruct_variational(measurement, prior, start, config)).volume)
    assert torch.equal(*images) == same


def test_thin_slabs_are_not_cut_across_their_thin_side():
    assert usable_axes((1, 180, 230)) == [0]
    assert usable_axes((180, 230, 1)) == [2]
    assert usable_axes((40, 50, 60)) == [0, 1, 2]
    assert usable_axes((4, 100, 90)) == [0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_slices_that_do_not_fit_into_memory_together_go_one_after_another(error):
    asked = []

    def small_memory(x, sigma):
        asked.append(len(x))
        if len(x) > limit:
            raise error
        return 2 * x

    volume, limit = random_complex(11, 20, 20), 3
    doubled = volume.clone()
    assert denoise_slices(doubled, small_memory, 0.1, 0) == 11
    assert torch.equal(doubled, 2 * volume) and asked == [11, 5, 2, 2, 2, 2, 2, 1]
    limit = 0
    with pytest.raises(type(error)):
        denoise_slices(doubled, small_memory, 0.1, 0)


def test_misfit_of_the_true_image_is_one():
    kspace, mask, noise, _ = problem((32, 36, 28))
    measurement = measure(kspace, mask, VOXEL, noise)
    exact = measurement.operator.solve(measurement.adjoint, 1e-3, iterations=60)
    assert 0.5 < measurement.misfit(exact) < 1.1
    assert measurement.misfit(0 * exact) > 3


def test_misfit_of_a_large_volume_is_exact():
    """Energy and model are some 10^4 times what is left of them, of 10^7 voxels."""
    shape, noise = (160, 256, 256), 0.01
    volume = 1 + random_complex(*shape)
    operator = Sense(torch.ones(1, *shape, dtype=torch.complex64), torch.ones(shape[:2]))
    y = operator.adjoint(operator.forward(volume))  # of one coil, whole: the volume itself
    y += noise * random_complex(*shape, seed=1)
    energy = float(torch.view_as_real(y).double().square().sum())
    measurement = Measurement(operator, y, energy, y.numel(), noise / 2**0.5, VOXEL, (8, 8))
    assert measurement.misfit(volume) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("centre", [1.0, 4.0])
def test_unequal_averages_leave_the_coil_maps_as_they_are(centre):
    """Lines that came more often weigh more in the image; the calibration is made of their means."""
    kspace, mask, noise, _ = problem((32, 36, 30), coils=6, snr=1e4, acs=16)
    counts = mask.clone()
    counts[::2] *= 2
    counts[12:20, 14:22] *= centre
    plain, unequal = measure(kspace, mask, VOXEL, noise), measure(kspace * counts[..., None], counts, VOXEL, noise)
    own, other = plain.operator.coil_maps(), unequal.operator.coil_maps()
    assert (own - other).norm() / own.norm() < 2e-3
    separate = measure(kspace, mask, VOXEL, noise, (kspace * counts[..., None], counts)).operator.coil_maps()
    assert (own - separate).norm() / own.norm() < 2e-3


def test_coils_are_compressed_without_a_centre_too():
    kspace, mask, noise, _ = problem(coils=6, acs=0)
    mask[10:15, 12:17] = 0
    measurement = measure(kspace * mask[..., None], mask, VOXEL, noise, coils=2)
    assert measurement.operator.coils == 2 and measurement.acs == (0, 0)
    whole = measure(kspace * mask[..., None], mask, VOXEL, noise)
    assert measurement.energy > 0.5 * whole.energy


@pytest.mark.parametrize("doubled", ["none", "centre", "outer"])
def test_regularisation_is_the_same_wherever_lines_were_averaged(doubled):
    """Lambda is STRENGTH times the noise over the true brightness, squared, though y is weighted."""
    kspace, mask, noise, reference = problem(snr=10.0, acs=12)
    central = centre_block(mask.shape, (12, 12))
    counts = mask * (1.0 + {"none": False, "centre": central, "outer": ~central}[doubled])
    measurement = measure(kspace * counts[..., None], counts, VOXEL, noise)
    truth = intensity_scale(reference, VOXEL) / float(noise.abs().square().mean().sqrt() / 2**0.5)
    expected = measurement.operator.solve(measurement.adjoint, STRENGTH * (measurement.sigma / truth) ** 2)
    assert (cg_sense(measurement, 10) - expected).norm() < 0.01 * expected.norm()


def test_lines_that_came_many_times_do_not_outweigh_the_others():
    """More than twice the middle count is not believed: errors of the maps there would spoil the rest."""
    kspace, mask, noise, _ = problem()
    often, twice = mask.clone(), mask.clone()
    often[12, 14], twice[12, 14] = 50, 2
    weights = [measure(kspace * counts[..., None], counts, VOXEL, noise).operator.mask for counts in (often, twice)]
    torch.testing.assert_close(*weights)


def test_a_few_lines_sent_twice_leave_the_weights_of_all_others():
    """Otherwise the data would have half their weight against every prior."""
    kspace, mask, noise, _ = problem()
    once, counts = measure(kspace, mask, VOXEL, noise), mask.clone()
    counts[tuple((mask > 0).nonzero()[5::20].T)] = 2
    repeated = measure(kspace * counts[..., None], counts, VOXEL, noise)
    torch.testing.assert_close(repeated.operator.mask, once.operator.mask)
    away = cg_sense(repeated) - cg_sense(once)
    assert away.norm() < 0.03 * cg_sense(once).norm()  # less noise in the calibration lines changes the maps a little


def test_flipped_arrays_are_taken():
    kspace, mask, noise, _ = problem()
    flipped = measure(kspace.flip(1).numpy()[:, ::-1], mask.flip(0).numpy()[::-1], VOXEL, noise)
    assert torch.equal(flipped.adjoint, measure(kspace, mask, VOXEL, noise).adjoint)


@pytest.mark.parametrize("shape, blurred", [((250, 400, 24), 72), ((50, 80, 32), 26), ((100, 102, 41), 28)])
def test_the_support_is_where_the_blurred_object_is_and_two_voxels_more(shape, blurred):
    """A box 20 wide, seen by 32 x 32 lines.

    Also where every so many voxels lie in one plane, as 250 x 400 of each side do.
    """
    acs = torch.zeros(1, *shape, dtype=torch.complex64)
    z, y, x = shape
    acs[0, z // 2 - 10 : z // 2 + 10, y // 2 - 10 : y // 2 + 10, x // 2 - 10 : x // 2 + 10] = 1
    acs = cut_acs(fft(acs, (1, 2)), (32, 32))
    inside = support(acs, shape, 1.0) > 0
    width = int(inside[z // 2, :, x // 2].sum())
    assert blurred + 3 <= width <= blurred + 8  # ripples of the blur are grown too


def test_what_stands_out_of_the_noise_is_no_air():
    """A vial at 1 % of the bright one: signal where its SNR is high, air where it is lost in the noise."""
    shape = (32, 40, 36)
    image = torch.zeros(1, *shape, dtype=torch.complex64)
    image[:, 8:20, 6:18, 8:20], image[:, 20:28, 26:36, 22:32] = 1, 0.01
    for snr, seen in ((20, True), (0.25, False)):
        sigma = 0.01 / snr
        noisy = fft(image, (1, 2)) + sigma * random_complex(1, *shape)
        found = support(cut_acs(noisy, (20, 20)), shape, sigma / 2**0.5)
        assert bool(found[24, 31, 27]) is seen and bool(found[14, 12, 14])


def test_averages_weigh_as_their_number():
    """Two averages of lines with sqrt 2 times the noise equal one scan, in units of the noise of a line."""
    kspace, mask, noise, _ = problem()
    once = measure(kspace, mask, VOXEL, noise)
    twice = measure(2 * kspace, 2 * mask, VOXEL, np.sqrt(2) * noise)
    assert float((np.sqrt(2) * twice.adjoint - once.adjoint).abs().max() / once.adjoint.abs().max()) < 1e-3
    assert twice.sigma == pytest.approx(once.sigma / np.sqrt(2))
    uneven = mask.clone()
    uneven[:, ::2] *= 2  # these lines have half the variance, so sqrt 2 times the weight
    weights = measure(uneven[..., None] * kspace, uneven, VOXEL, noise).operator.mask
    assert sorted(set(weights.flatten().tolist())) == pytest.approx([0, 0.5**0.5, 1])


@pytest.mark.parametrize(
    "break_it,message",
    [
        (lambda k, m: (k * float("nan"), m), "NaN"),
        (lambda k, m: (k, 0 * m), "no imaging line"),
    ],
)
def test_bad_kspace_is_refused_in_a_sentence(break_it, message):
    kspace, mask, noise, _ = problem()
    kspace, mask = break_it(kspace, mask)
    with pytest.raises(ValueError, match=message):
        measure(kspace, mask, VOXEL, noise)


@pytest.mark.parametrize("name", ["diffusion", "tv", "dds"])
def test_lines_far_from_the_centre_hold_no_tissue(name):
    """In one coil that sees all the same, nothing of them is left at low resolution."""
    kspace = random_complex(1, 24, 28, 20)
    far = torch.zeros(24, 28)
    far[:2, ::2] = 1
    operator = Sense(torch.ones(1, 24, 28, 20, dtype=torch.complex64), far)
    measurement = Measurement(operator, operator.adjoint(kspace), 1.0, 1000, 1.0, VOXEL, (0, 0))
    with pytest.raises(ValueError, match="times as bright as the tissue: lines of the k-space centre are needed"):
        next(METHODS[name].run(measurement, lambda x, sigma: x, measurement.adjoint, METHODS[name].config, 0))


def test_missing_calibration_is_said_aloud():
    kspace, mask, noise, _ = problem()
    thinned = mask.clone()
    thinned[::2] = 0
    measurement = measure(kspace * thinned[..., None], thinned, VOXEL, noise)
    assert any("calibration lines cover only" in w for w in measurement.warnings)


def test_a_calibration_square_of_eight_lines_is_enough():
    kspace, mask, noise, _ = problem()
    square = torch.zeros_like(mask)
    z, y = (n // 2 for n in mask.shape)
    square[z - 4 : z + 4, y - 4 : y + 4] = 1
    thinned = torch.maximum(square, mask * (torch.arange(len(mask)) % 3 == 0)[:, None])
    measurement = measure(kspace * thinned[..., None], thinned, VOXEL, noise)
    assert measurement.acs == (8, 8) and measurement.warnings == []


def test_brightness_does_not_hang_on_an_estimated_noise_level():
    """The same object under more noise: the estimate follows, the image's brightness stays."""
    brightness, levels = [], []
    for snr in (60.0, 15.0):
        kspace, mask, _, reference = problem(snr=snr)
        measurement = measure(kspace, mask, VOXEL)
        brightness.append(intensity_scale(cg_sense(measurement), VOXEL))
        levels.append(measurement.sigma)
    assert brightness[1] == pytest.approx(brightness[0], rel=0.05)
    assert levels[1] > 1.5 * levels[0]


def test_separate_calibration_lines_make_the_maps():
    kspace, mask, noise, reference = problem()
    thinned = mask.clone()
    thinned[::2] = 0
    calibration = torch.zeros_like(mask)
    calibration[7:17, 9:19] = 1
    separate = (kspace * calibration[..., None], calibration)
    measurement = measure(kspace * thinned[..., None], thinned, VOXEL, noise, separate)
    told = [text for text in measurement.warnings if "lie over other parts" not in text]
    assert told == [], "10 lines cannot tell whether so small an object just fits"
    assert measurement.acs[0] >= 9


@pytest.mark.parametrize("gain", [1.0, 0.2])
def test_a_lattice_without_a_centre_square_takes_its_brightness_from_the_calibration(gain):
    """Whatever gain that has.

    A^H y alone is four times too dark, CG-SENSE was half as bright and so was what the prior took for tissue.
    """
    kspace, _, noise, reference = problem(coils=8, acceleration=1.0)
    calibration, lattice = torch.zeros(24, 28), torch.zeros(24, 28)
    calibration[5:19, 7:21] = lattice[::2, ::2] = 1
    separate = (kspace * calibration[..., None], calibration)
    other_gain = (gain * separate[0], calibration)
    measurement = measure(kspace * lattice[..., None], lattice, VOXEL, noise, other_gain)
    true = intensity_scale(reference, VOXEL) / float(noise.abs().square().mean().sqrt() / 2**0.5)
    assert measurement.tissue == pytest.approx(true, rel=0.1)
    assert intensity_scale(measurement.adjoint, VOXEL) < 0.5 * true
    assert intensity_scale(cg_sense(measurement), VOXEL) == pytest.approx(true, rel=0.2)
    assert measurement.in_tissue_units(cg_sense(measurement)).scale == measurement.tissue
    both = (lattice + calibration).clamp_max(1)
    own = measure(kspace * both[..., None], both, VOXEL, noise, separate)
    assert own.tissue is None


@pytest.mark.parametrize("step,first,waves", [(4, 0, 0.0), (3, 1, 0.0), (3, 1, 3.0)])
def test_a_lattice_that_misses_the_centre_keeps_its_brightness(step, first, waves):
    """Conjugate gradients that begin at zero come to the low frequencies last.

    Ours begin and end near the image of the calibration, whose echo time and phase may be others.
    """
    kspace, _, noise, reference = problem(coils=8, acceleration=1.0)
    calibration, lattice = torch.zeros(24, 28), torch.zeros(24, 28)
    calibration[5:19, 7:21] = lattice[:, first::step] = 1  # k = 0 lies between two lines
    z, y = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 28), indexing="ij")
    turned = fft(ifft(kspace, (1, 2)) * torch.exp(1j * waves * (z**2 + y))[..., None], (1, 2))
    separate = (turned * calibration[..., None], calibration)
    measurement = measure(kspace * lattice[..., None], lattice, VOXEL, noise, separate, keep_lines=True)
    inside, truth = reference > 0.3, reference / float(noise.abs().square().mean().sqrt() / 2**0.5)
    bright = lambda image: float((image.abs() / truth)[inside].mean())
    blind = measurement.operator.solve(measurement.adjoint, 1e-4, iterations=15)
    image = cg_sense(measurement)
    assert bright(image) == pytest.approx(1, abs=0.06)
    assert measurement.tissue == pytest.approx(intensity_scale(truth, VOXEL), rel=0.15)
    assert psnr(image, truth, inside) > psnr(blind, truth, inside) + 1
    there = measurement.part(lattice > 0, slice(4, 12))
    torch.testing.assert_close(cg_sense(there), image[..., 4:12], rtol=1e-3, atol=0.02 * float(truth.max()))


@pytest.mark.parametrize("waves", [1.0, 1.5])
def test_a_calibration_of_a_somewhat_other_phase_is_given_that_of_the_scan(waves):
    """As a field map makes it within some ms: not enough to darken the calibration's image much.

    But images are pulled towards it.
    """
    kspace, _, noise, reference = problem(coils=8, acceleration=1.0)
    calibration, lattice = torch.zeros(24, 28), torch.zeros(24, 28)
    calibration[5:19, 7:21] = lattice[::2, ::2] = 1
    z, y = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 28), indexing="ij")
    turned = fft(ifft(kspace, (1, 2)) * torch.exp(1j * waves * (z**2 + y))[..., None], (1, 2)) * calibration[..., None]
    sampled = measure(kspace * lattice[..., None], lattice, VOXEL, noise, (turned, calibration))
    whole = measure(kspace, torch.ones(24, 28), VOXEL, noise, (turned, calibration))
    away = (sampled.calibrated * cg_sense(whole).conj())[reference > 0.3].angle()
    assert float(away.square().mean().sqrt()) < 0.2


def test_a_noisy_lattice_keeps_its_brightness():
    """At SNR 5, a pull towards zero would leave a third of what four times undersampled data hardly encode."""
    kspace, _, noise, reference = problem(coils=8, acceleration=1.0, snr=5.0)
    calibration, lattice = torch.zeros(24, 28), torch.zeros(24, 28)
    calibration[5:19, 7:21] = lattice[:, ::4] = 1  # k = 0 lies between two lines
    separate = (kspace * calibration[..., None], calibration)
    measurement = measure(kspace * lattice[..., None], lattice, VOXEL, noise, separate)
    inside, truth = reference > 0.3, reference / float(noise.abs().square().mean().sqrt() / 2**0.5)
    bright = lambda image: float((image.abs() * truth)[inside].sum() / truth[inside].square().sum())
    assert bright(cg_sense(measurement)) == pytest.approx(1, abs=0.1)
    assert bright(cg_sense(replace(measurement, calibrated=None))) < 0.5


@pytest.mark.parametrize("step,negative,said", [(4, True, True), (4, False, False), (3, True, False)])
def test_a_lattice_far_from_the_centre_with_a_calibration_of_another_contrast_is_told(step, negative, said):
    """Only if the nearest line is two away from k = 0 does the image's brightness come from the calibration."""
    kspace, _, noise, reference = problem(coils=8, acceleration=1.0)
    calibration, lattice = torch.zeros(24, 28), torch.zeros(24, 28)
    calibration[5:19, 7:21] = 1
    lattice[:, ::step] = 1  # at step 3 a line lies next to k = 0
    other = fft(ifft(kspace, (1, 2)) * (1 - reference / reference.max()).square(), (1, 2)) if negative else kspace
    separate = (other * calibration[..., None], calibration)
    measurement = measure(kspace * lattice[..., None], lattice, VOXEL, noise, separate)
    assert any("CAUTION: no line lies next to the k-space centre" in text for text in measurement.warnings) == said


def test_arrays_of_shapes_that_do_not_fit_are_refused():
    kspace, mask, _, _ = problem()
    said = r"expected k-space \[coils z y x\] and counts \[z y\].* got \[4, 24, 28, 20\] and \[28, 24\]"
    with pytest.raises(ValueError, match=said):
        measure(kspace, mask.T, VOXEL)


def test_regularisation_takes_no_brightness():
    """Fully sampled, lambda divides the image by 1 + lambda: the factor is just that, whatever the noise.

    Of a zero image nothing is made.
    """
    kspace, mask, noise, _ = problem(acceleration=1.0, snr=4.0)
    measurement = measure(kspace, mask, VOXEL, noise)
    exact = measurement.operator.solve(measurement.adjoint, 0.0, iterations=1)
    darker = measurement.operator.solve(measurement.adjoint, 0.8, iterations=1)
    torch.testing.assert_close(darker * 1.8, exact, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(measurement.image_of(darker), exact, rtol=1e-4, atol=1e-3)
    assert not measurement.image_of(0 * exact).any()


def test_an_estimated_noise_level_is_bounded_by_the_residual():
    """Six coils, fully sampled, noise half of what was estimated: the least-squares residual tells."""
    shape, coils = (16, 18, 14), 6
    maps = torch.stack([coil_sensitivity(c, coils, shape) for c in range(coils)])
    operator = Sense(maps / maps.abs().square().sum(0).sqrt(), torch.ones(shape[:2]))
    y = operator.forward(random_complex(*shape, seed=1)) + 0.5 * 2**0.5 * random_complex(coils, *shape, seed=2)
    energy, adjoint = float(y.abs().square().sum()), operator.adjoint(y)
    for known, expected in ((True, 1.0), (False, 0.5)):
        measurement = Measurement(operator, adjoint, energy, y.numel(), 1.0, VOXEL, (5, 5), sigma_known=known)
        image = operator.solve(adjoint, 0.0, iterations=20)
        assert measurement.noise_level(image) == pytest.approx(expected, rel=0.03)
