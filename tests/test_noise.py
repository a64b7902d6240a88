"""Whitening and the noise level."""

import pytest
import torch
from conftest import random_complex

from recon_core.noise import estimate_sigma, whitening_matrix


def test_whitened_noise_is_white_with_unit_sigma():
    mix = random_complex(4, 4) + 2 * torch.eye(4)
    noise = mix @ random_complex(4, 20000, seed=1)
    white = whitening_matrix(noise) @ noise
    covariance = white @ white.mH / (2 * white.shape[1])
    torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.complex64), atol=0.02, rtol=0)


@pytest.mark.parametrize("noise,message", [(torch.ones(4, 8, dtype=torch.complex64), "at least 16"), (torch.zeros(2, 100, dtype=torch.complex64), "coil dead")])
def test_useless_noise_is_refused(noise, message):
    with pytest.raises(ValueError, match=message):
        whitening_matrix(noise)


def test_noise_level_is_estimated_from_the_scan():
    shape, sigma = (2, 40, 48, 16), 0.3
    kspace = sigma * 2**0.5 * random_complex(*shape)
    kspace[:, 15:25, 20:28] += 50
    mask = torch.ones(40, 48)
    torch.testing.assert_close(estimate_sigma(kspace, mask), torch.full((2,), sigma), rtol=0.1, atol=0)
