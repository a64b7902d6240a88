"""Whitening and the noise level."""

import pytest
import torch
from conftest import random_complex

from recon_core.cg_sense import cg_sense
from recon_core.measure import measure
from recon_core.noise import LOUD, estimate_sigma, whitening_matrix


def test_whitened_noise_is_white_with_unit_sigma():
    mix = random_complex(4, 4) + 2 * torch.eye(4)
    noise = mix @ random_complex(4, 20000, seed=1)
    white = whitening_matrix(noise) @ noise
    covariance = white @ white.mH / (2 * white.shape[1])
    torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.complex64), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "noise,message",
    [
        (torch.ones(4, 8, dtype=torch.complex64), "at least 16"),
        (torch.zeros(2, 100, dtype=torch.complex64), "zero or NaN"),
    ],
)
def test_useless_noise_is_refused(noise, message):
    with pytest.raises(ValueError, match=message):
        whitening_matrix(noise)


@pytest.mark.parametrize("unit, told", [(1e-16, True), (1e-13, False), (1.0, False)])
def test_units_too_small_to_square_are_told_unless_noise_lines_change_them(unit, told):
    noise, kspace = random_complex(2, 4000), random_complex(2, 12, 10, 8, seed=1)
    kspace[:, 4:8, 3:7] += 4
    found = measure(unit * kspace, torch.ones(12, 10), (2.0, 2.0, 2.0))
    assert any("lose precision" in text for text in found.warnings) == told
    assert not measure(unit * kspace, torch.ones(12, 10), (2.0, 2.0, 2.0), unit * noise).warnings


@pytest.mark.parametrize("dead", [0.0, 1e-6])
def test_a_dead_coil_is_left_out_and_the_image_is_that_of_the_others(dead):
    noise, kspace = random_complex(5, 4000), random_complex(5, 24, 20, 16, seed=1)
    kspace[:, 8:16, 6:14] += 40
    noise[2], kspace[2] = dead * noise[2], dead * kspace[2]
    live = [0, 1, 3, 4]
    assert whitening_matrix(noise).shape == (4, 5)
    with_dead = measure(kspace, torch.ones(24, 20), (2.0, 2.0, 2.0), noise)
    others = measure(kspace[live], torch.ones(24, 20), (2.0, 2.0, 2.0), noise[live])
    torch.testing.assert_close(cg_sense(with_dead), cg_sense(others), rtol=1e-3, atol=1e-3)
    assert with_dead.warnings == ["coil 2 (counted from 0) has no noise: dead, left out"]
    assert with_dead.sigma_known and not others.warnings


@pytest.mark.parametrize(
    "silent,said",
    [
        ((2,), "coil 2 (counted from 0) has"),
        ((0, 2), "coils 0, 2 (counted from 0) have"),
        ((0, 2, 3), "coils 0, 2, 3 (counted from 0) have"),
    ],
)
def test_silent_coils_are_left_out_without_noise_lines_too(silent, said):
    kspace = random_complex(4, 24, 20, 16)
    kspace[:, 8:16, 6:14] += 40
    live = [coil for coil in range(4) if coil not in silent]
    kspace[list(silent)] = 0
    both = [measure(k, torch.ones(24, 20), (2.0, 2.0, 2.0)) for k in (kspace, kspace[live])]
    torch.testing.assert_close(*(cg_sense(m) for m in both), rtol=1e-3, atol=1e-3)
    assert both[0].sigma == pytest.approx(both[1].sigma) and both[0].samples == both[1].samples
    assert both[0].warnings == [*both[1].warnings[:1], f"{said} no signal: dead, left out", *both[1].warnings[1:]]


@pytest.mark.parametrize("clean", [(1,), (0, 1), (0, 1, 3)])
def test_coils_without_noise_far_out_are_kept(clean):
    """Their signal is there; the noise level is that of the others."""
    kspace = random_complex(4, 24, 20, 16)
    kspace[list(clean)] = 0
    kspace[:, 8:16, 6:14] += 40
    measurement = measure(kspace, torch.ones(24, 20), (2.0, 2.0, 2.0))
    assert not any("no signal" in warning for warning in measurement.warnings) and measurement.sigma > 0
    assert bool((measurement.mixing.abs().sum(0) > 0).all())


@pytest.mark.parametrize("noise", [torch.zeros(2, 100), torch.ones(2, 3), torch.full((2, 100), float("nan"))])
def test_noise_lines_of_no_use_leave_an_estimate_and_a_warning(noise):
    kspace = random_complex(2, 24, 20, 8)
    kspace[:, 8:16, 6:14] += 40
    noise = noise.to(torch.complex64)
    given, without = (measure(kspace, torch.ones(24, 20), (2.0, 2.0, 2.0), n) for n in (noise, None))
    torch.testing.assert_close(cg_sense(given), cg_sense(without))
    assert not given.sigma_known
    assert given.warnings[0].startswith("unusable noise lines (") and "estimated" in given.warnings[0]


@pytest.mark.parametrize("averages", [1, 4, 9])
@pytest.mark.parametrize("known", [True, False])
def test_averages_lower_the_noise_level_and_leave_the_coil_maps(averages, known):
    """The sum of n lines, over n, has 1 / sqrt(n) of the noise, and the maps of one line with so little noise."""
    noise = random_complex(2, 24, 20, 16) * 2**0.5
    signal = torch.zeros_like(noise)
    signal[:, 8:16, 6:14] = torch.tensor([40, 20j]).reshape(2, 1, 1, 1) * random_complex(8, 8, 16, seed=1)
    lines = random_complex(2, 4096, seed=2) * 2**0.5
    summed = averages * signal + averages**0.5 * noise
    measurement = measure(summed, torch.full((24, 20), float(averages)), (2.0, 2.0, 2.0), lines if known else None)
    assert measurement.sigma == pytest.approx(averages**-0.5, rel=0.1) and measurement.sigma_known == known
    single = measure(summed / averages, torch.ones(24, 20), (2.0, 2.0, 2.0), lines / averages**0.5 if known else None)
    torch.testing.assert_close(measurement.operator.coil_maps(), single.operator.coil_maps(), rtol=1e-3, atol=1e-3)


def test_noise_lines_louder_than_the_scan_leave_an_estimate_and_a_warning():
    """Their level, as of another receiver gain, would have smoothed the image away without a word."""
    kspace, lines = random_complex(3, 24, 20, 16) * 2**0.5, random_complex(3, 4096, seed=1) * 2**0.5
    kspace[:, 8:16, 6:14] += 40
    right, loud = (measure(kspace, torch.ones(24, 20), (2.0, 2.0, 2.0), factor * lines) for factor in (1, 30))
    assert right.sigma_known and not right.warnings
    assert not loud.sigma_known and loud.sigma == pytest.approx(1 / 30, rel=0.1)
    assert loud.warnings == [
        "the noise lines are 30 times louder than the scan: the noise level was estimated from the scan itself"
    ]
    torch.testing.assert_close(cg_sense(loud) * 30, cg_sense(right), rtol=1e-2, atol=0.05)


def test_noise_level_is_estimated_from_the_scan():
    shape, sigma = (2, 40, 48, 16), 0.3
    kspace = sigma * 2**0.5 * random_complex(*shape)
    kspace[:, 15:25, 20:28] += 50
    mask = torch.ones(40, 48)
    torch.testing.assert_close(estimate_sigma(kspace, mask), torch.full((2,), sigma), rtol=0.1, atol=0)


@pytest.mark.parametrize("shape", [(1, 40), (6, 8), (40, 44)])
def test_the_estimate_is_right_for_few_lines_too(shape):
    """Of pure noise: of few lines the mean tells, of many the median."""
    estimates = []
    for seed in range(8):
        noise = 3.0 * 2**0.5 * random_complex(8, *shape, 64, seed=seed)
        estimates.append(float(estimate_sigma(noise, torch.ones(shape)).mean()))
    assert sum(estimates) / 8 == pytest.approx(3.0, rel=0.02)


def test_without_noise_lines_only_a_loud_coil_is_turned_down():
    """An estimate holds fine detail too: coils within LOUD of the middle one keep their units.

    So their sum keeps its shading.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 16, 16, 12, dtype=torch.complex64, generator=generator)
    levels = torch.tensor([0.6, 1.0, 1.0, 1.7, 20.0])
    measurement = measure(noise * levels.reshape(-1, 1, 1, 1), torch.ones(16, 16), (2.0, 2.0, 2.0))
    kept = measurement.mixing.norm(dim=0)
    assert torch.allclose(kept[:4], torch.ones(4), atol=1e-3)
    assert float(kept[4]) == pytest.approx(LOUD / 20, rel=0.1)


def test_coil_weights_are_those_of_the_scans_first_volume():
    """Without noise lines, fine detail far out hides that a coil is loud in a bright contrast, not in a dark one.

    Own weights would shade their ratio.
    """
    noise, detail = (random_complex(4, 24, 24, 12, seed=seed) for seed in (0, 1))
    noise[0] *= 6
    middle = torch.zeros(24, 24, 1).index_fill_(0, torch.arange(8, 16), 1)
    detail += 40 * middle * torch.tensor([1, 1j, -1, 0.5]).reshape(4, 1, 1, 1)
    bright, dark = 30 * detail + noise, 0.5 * detail + noise
    first = measure(bright, torch.ones(24, 24), (2.0, 2.0, 2.0))
    alone = measure(dark, torch.ones(24, 24), (2.0, 2.0, 2.0))
    later = measure(dark, torch.ones(24, 24), (2.0, 2.0, 2.0), reference=first.reference)
    assert float(alone.coil_weights[0]) < 0.8 * float(first.coil_weights[0])
    torch.testing.assert_close(later.coil_weights, first.coil_weights)
    torch.testing.assert_close(later.mixing.mH @ later.mixing, first.mixing.mH @ first.mixing, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [0.0, 1e-25])
def test_lines_whose_squares_are_zero_have_a_noise_level(size):
    kspace = size * random_complex(3, 12, 14, 10)
    assert measure(kspace, torch.ones(12, 14), (1.0, 1.0, 1.0)).sigma == pytest.approx(0.7 * size, rel=0.05, abs=1e-37)
