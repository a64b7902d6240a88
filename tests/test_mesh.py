"""The same scan on a finer mesh: what is predicted and explained, intensities and geometry stay what they were."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import random_complex
from test_adaptation import plane

from recon_core.cg_sense import cg_sense
from recon_core.fft import centre_crop_or_pad, kspace_crop
from recon_core.mesh import on_finer_mesh
from recon_core.metrics import object_mask, psnr


def on_both(shape=(36, 44, 2), factor=1.5, **changes):
    measurement, reference = plane(shape, acs=12, **changes)
    start = cg_sense(measurement)
    return measurement, on_finer_mesh(measurement, factor, start), start, reference


def test_one_coil_sees_the_same_lines_of_an_image_on_either_mesh():
    measurement, finer, _, _ = on_both(coils=1)
    volume = random_complex(*measurement.operator.shape)
    fine_volume = kspace_crop(volume, finer.operator.shape)
    there, here = finer.operator.forward(fine_volume), measurement.operator.forward(volume)
    gain = (math.prod(finer.operator.shape) / math.prod(measurement.operator.shape)) ** 0.5
    middle = centre_crop_or_pad(there.movedim(3, 1), (36, 44)).movedim(1, 3)
    torch.testing.assert_close(middle, gain * here, rtol=1e-4, atol=1e-4)
    # nothing elsewhere
    assert float(there.abs().square().sum()) == pytest.approx(gain**2 * float(here.abs().square().sum()), rel=1e-4)
    assert finer.misfit(fine_volume) == pytest.approx(measurement.misfit(volume), rel=1e-4)
    assert finer.samples == measurement.samples


def test_interpolated_coil_maps_explain_the_scan_nearly_as_well():
    measurement, finer, start, reference = on_both((72, 80, 1))
    assert finer.misfit(kspace_crop(start, finer.operator.shape)) < 1.1 * measurement.misfit(start)
    size = finer.operator.coil_maps().abs().square().sum(0)
    assert bool(((size - 1).abs() < 1e-5).logical_or(size == 0).all())
    support = lambda m: float(m.operator.support.float().mean())
    assert support(finer) == pytest.approx(support(measurement), rel=0.03)
    inside = object_mask(reference)
    own, fine = (psnr(kspace_crop(image, reference.shape), reference, inside) for image in (start, cg_sense(finer)))
    assert fine > own - 0.5


@pytest.mark.parametrize(
    "shape, fine",
    [((36, 44, 2), (56, 72, 2)), ((1, 60, 64), (1, 96, 64)), ((40, 6, 48), (64, 6, 48)), ((8, 44, 48), (8, 72, 48))],
)
def test_only_what_lies_in_the_slices_is_made_finer(shape, fine):
    measurement, finer, _, _ = on_both(shape)
    assert finer.operator.shape == fine == tuple(finer.adjoint.shape) == tuple(finer.lines.shape[1:])
    extent = lambda m: [mm * n for mm, n in zip(m.voxel_mm, m.operator.shape)]
    assert extent(finer) == pytest.approx(extent(measurement))


def test_an_estimated_noise_level_is_the_one_of_the_own_mesh():
    measurement, _, start, _ = on_both((72, 80, 1))
    # too high, as estimates are where an image leaves less than they say
    high = replace(measurement, sigma_known=False, sigma=4 * measurement.sigma)
    finer = on_finer_mesh(high, 1.5, start)
    gain = (math.prod(finer.operator.shape) / math.prod(measurement.operator.shape)) ** 0.5
    assert finer.sigma == pytest.approx(gain * high.noise_level(start))
    assert finer.sigma < 2 * gain * measurement.sigma
