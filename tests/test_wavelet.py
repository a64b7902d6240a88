"""The classical method: an orthonormal transform, and a better image than CG-SENSE."""

import pytest
import torch
from conftest import random_complex, run_chain
from test_variational import VOXEL, last, problem

from recon_core.cg_sense import cg_sense
from recon_core.measure import measure
from recon_core.measurement import Measurement
from recon_core.metrics import object_mask, psnr
from recon_core.sense import Sense
from recon_core.wavelet import WaveletConfig, join, reconstruct_wavelet, shrink, split


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_transform_is_orthonormal_and_inverted(axis):
    volume = random_complex(8, 10, 12)
    low, high = split(volume, axis)
    torch.testing.assert_close(join(low, high, axis), volume)
    assert float(low.norm() ** 2 + high.norm() ** 2) == pytest.approx(float(volume.norm() ** 2), rel=1e-5)


def test_a_linear_ramp_has_no_details():
    """Four taps are blind to constants and slopes (two vanishing moments)."""
    ramp = torch.arange(32.0)[:, None].expand(32, 4).to(torch.complex64)
    _, high = split(ramp, 0)
    assert float(high[:-1].abs().max()) < 1e-4


@pytest.mark.parametrize("shape", [(17, 40, 33), (1, 64, 20), (5, 5, 5)])
def test_shrinking_keeps_shape_and_what_stands_out(shape):
    volume = random_complex(*shape)
    torch.testing.assert_close(shrink(volume, 0.0, 3, torch.Generator().manual_seed(0)), volume, rtol=1e-4, atol=1e-5)
    assert shrink(volume, 1.0, 3, torch.Generator().manual_seed(0)).norm() <= volume.norm()


def test_shrinking_takes_the_known_share_of_noise():
    """Complex noise of unit power has Rayleigh magnitudes r: E (r - t)+^2 is left of it.

    And all of the coarsest band, 1/512.
    """
    noise, t = random_complex(64, 64, 64), 0.5
    r = torch.linspace(0, 8, 100_001, dtype=torch.float64)
    left = torch.trapezoid((r - t).clamp_min(0) ** 2 * 2 * r * torch.exp(-(r**2)), r)
    left = float(left) * 511 / 512 + 1 / 512
    noise = noise / noise.abs().square().mean().sqrt()
    shrunk = shrink(noise, t, 3, torch.Generator().manual_seed(0))
    assert float(shrunk.abs().square().mean()) == pytest.approx(left, rel=0.02)
    operator = Sense(torch.ones(1, 64, 64, 64, dtype=torch.complex64), torch.ones(64, 64))
    measurement = Measurement(operator, noise, 1.0, 1, 5.0, VOXEL, (8, 8))
    # the threshold is strength times the noise
    state = next(reconstruct_wavelet(measurement, None, noise, WaveletConfig(strength=0.1)))
    assert float(state.volume.abs().square().mean()) == pytest.approx(left, rel=0.02)


def test_momentum_explains_more_in_as_many_iterations():
    """Against plain proximal steps with the same shifts; with next to no threshold the data term tells."""
    kspace, mask, noise, _ = problem(shape=(32, 36, 30), snr=15.0)
    measurement = measure(kspace, mask, VOXEL, noise)
    start = torch.zeros_like(measurement.adjoint)
    config, random, plain = WaveletConfig(iterations=15, strength=1e-3), torch.Generator().manual_seed(0), start
    for _ in range(15):
        stepped = plain - measurement.operator.normal(plain) + measurement.adjoint
        plain = shrink(stepped, 1e-3 * measurement.sigma, 3, random)
    state = last(reconstruct_wavelet(measurement, None, cg_sense(measurement) * 1e-6, config))
    assert measurement.residual(state.volume) < 0.97 * measurement.residual(plain)


def test_better_than_cg_sense_and_explains_the_data():
    kspace, mask, noise, reference = problem(shape=(32, 36, 30), snr=15.0)
    measurement = measure(kspace, mask, VOXEL, noise)
    preview, inside = cg_sense(measurement), object_mask(reference)
    state = last(reconstruct_wavelet(measurement, None, preview))
    assert psnr(state.volume, reference, inside) > psnr(preview, reference, inside) + 1
    assert measurement.misfit(state.volume) < 1.2


def test_it_is_a_method_of_the_chain(scan_path):
    images = run_chain(scan_path, None, method="wavelet")
    assert [i.meta["GADGETRON_SeqDescription"] for i in images] == ["_CG-SENSE preview", "_l1-wavelet"]
