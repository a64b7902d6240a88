"""How images are judged, by errors that are known."""

import pytest
import torch

from recon_core.metrics import object_mask, psnr


def test_psnr_of_a_known_error():
    """An error of 0.1 at right angles to the reference, whose peak is 2: 20 log10(2 / 0.1) dB; no factor and no phase counts."""
    reference = torch.tensor([2.0, 2.0, 1.0, 1.0]).reshape(1, 2, 2)
    error = 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 2, 2)
    for image in (reference + error, 7 * (reference + error), 1j * (reference + error)):
        assert psnr(image, reference) == pytest.approx(26.02, abs=0.05)


def test_psnr_looks_inside_the_mask_alone():
    reference, inside = torch.ones(1, 2, 4), torch.tensor([[[True, True, False, False]] * 2])
    image = reference.clone()
    image[..., :2] += 0.01 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    image[..., 2:] = 50.0
    assert psnr(image, reference, inside) == pytest.approx(40.0, abs=0.05)


def test_the_object_is_what_is_brighter_than_a_share_of_the_bright():
    volume = torch.cat([torch.full((50,), 0.09), torch.full((50,), 0.2), torch.full((100,), 1.0)]).reshape(2, 10, 10)
    assert int(object_mask(volume).sum()) == 150 and int(object_mask(volume, 0.5).sum()) == 100
