"""How images are judged, by errors that are known."""

import numpy as np
import pytest
import torch

from recon_core.metrics import object_mask, psnr, ssim


def test_psnr_of_a_known_error():
    """An error of 0.1 at right angles to the reference, whose peak is 2: 20 log10(2 / 0.1) dB.

    No factor and no phase counts.
    """
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


@pytest.mark.parametrize("shape", [(12, 14, 11), (20, 30), (4, 12, 12), (9, 16)])
def test_ssim_is_made_of_the_moments_under_its_window(shape):
    """Of a pixel in the middle as the formula gives it, summed pixel by pixel.

    Of equal images, and of even ones, in closed form.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=random)
    y = x + 0.3 * torch.rand(shape, generator=random)
    narrow = min(shape) < 11
    weights = np.ones(3) / 3 if narrow else np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    total = {power: 0.0 for power in ("x", "y", "xx", "yy", "xy", "1")}
    for away in np.ndindex((len(weights),) * len(shape)):
        weight = np.prod(weights[list(away)])
        place = [n // 2 + a - len(weights) // 2 for n, a in zip(shape, away)]
        place = tuple(-1 - p if p < 0 else 2 * n - 1 - p if p >= n else p for n, p in zip(shape, place))
        a, b = float(x[place]), float(y[place])
        for power, value in {"x": a, "y": b, "xx": a * a, "yy": b * b, "xy": a * b, "1": 1}.items():
            total[power] += weight * value
    m = {power: value / total["1"] for power, value in total.items()}
    more = 3 ** len(shape) / (3 ** len(shape) - 1) if narrow else 1
    u, v = 0.02**2, 0.06**2  # of a peak of 2
    brightness = (2 * m["x"] * m["y"] + u) / (m["x"] ** 2 + m["y"] ** 2 + u)
    covariance, variances = m["xy"] - m["x"] * m["y"], m["xx"] - m["x"] ** 2 + m["yy"] - m["y"] ** 2
    expected = brightness * (2 * more * covariance + v) / (more * variances + v)
    assert float(ssim(x, y, 2.0)[tuple(n // 2 for n in shape)]) == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(ssim(x, x, 2.0), torch.ones(shape, dtype=torch.double))
    even = torch.full(shape, (1 + u) / (1.25 + u), dtype=torch.double)
    torch.testing.assert_close(ssim(torch.ones(shape), torch.full(shape, 0.5), 2.0), even)


def test_ssim_of_a_plane_has_the_narrow_window_of_a_slab():
    """A pixel of a plane [1 y x] is that of a strip of 9 rows about it."""
    x, y = torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0))
    strip = slice(6, 15)
    expected = float(ssim(x[strip], y[strip], 1.0)[4, 15])
    assert ssim(x[None], y[None], 1.0)[0, 10, 15] == pytest.approx(expected, abs=1e-12)
