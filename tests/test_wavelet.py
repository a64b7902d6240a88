"""The classical method: an orthonormal transform, and a better image than CG-SENSE."""

import pytest
import torch
from conftest import random_complex, run_chain
from test_variational import VOXEL, last, problem

from recon_core.cg_sense import cg_sense
from recon_core.measurement import measure
from recon_core.metrics import object_mask, psnr
from recon_core.wavelet import join, reconstruct_wavelet, shrink, split


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
