"""Pictures of volumes of any shape stay of a size that can be looked at."""

import matplotlib.image
import numpy as np
import pytest

from gadgets.demo import compare
from gadgets.figure import comparison_panels, draw_comparison, draw_orthogonal, planes
from gadgets.image_files import save_nifti


@pytest.mark.parametrize(
    ("shape", "shown"), [((30, 40, 50), 3), ((4, 128, 126), 1), ((180, 230, 1), 1), ((2, 3, 4), 1)]
)
def test_planes_across_a_thin_slab_are_left_out(shape, shown):
    volume = np.zeros(shape)
    found = planes(volume, np.ones(3))
    assert len(found) == shown
    assert max(p.size for p, _ in found) == max(np.prod(shape) // n for n in shape)


@pytest.mark.parametrize("shape", [(180, 230, 1), (4, 128, 126), (30, 40, 50)])
def test_pictures_of_thin_and_thick_volumes(tmp_path, shape):
    """[z y x]; columns of 3 inches at 100 dots, rows as high as their plane."""
    volume = np.random.default_rng(0).random(shape).astype(np.float32)
    draw_orthogonal(volume, np.eye(4), tmp_path / "one.png")
    volumes = {"a": volume, "reference": volume}
    draw_comparison(volumes, np.eye(4), tmp_path / "two.png", {"a": "1 dB"}, "reference", errors=3)
    for name in ("one", "two"):
        height, width = matplotlib.image.imread(tmp_path / f"{name}.png").shape[:2]
        assert width <= 900 and height < 2600


def test_errors_stand_below_the_image_they_are_of():
    """Three planes each, then two of the error.

    That is none of the reference's own, 0.25 everywhere of an image that is too bright by that.
    """
    reference = np.random.default_rng(0).random((20, 24, 28)).astype(np.float32)
    bright, own = comparison_panels([reference + 0.25, reference], np.eye(4), reference, errors=2)
    assert [colours for *_, colours, _ in bright] == ["gray"] * 3 + ["magma"] * 2
    np.testing.assert_array_equal(bright[0][0], (reference + 0.25)[10])
    assert all(np.allclose(plane, 0.25, atol=1e-6) for plane, *_ in bright[3:])
    assert not any(plane.any() for plane, *_ in own[3:])
    assert own[3][3] == pytest.approx(own[0][3] / 5)


def test_the_demo_compares_at_the_brightness_of_the_reference(tmp_path, monkeypatch):
    truth, shown = np.random.default_rng(0).random((20, 24, 28)).astype(np.float32), {}
    reference = tmp_path / "reference.nii.gz"
    save_nifti(truth, np.eye(4), reference)
    monkeypatch.setattr("gadgets.demo.draw_comparison", lambda volumes, *_: shown.update(volumes))
    images = {"zero_filled": 0 * truth + 1, "cg_sense": 40 * truth, "diffusion": 7 * truth + 0.07}
    found = compare(images, reference, np.eye(4), tmp_path / "x.png", 0.0)
    np.testing.assert_allclose(shown["CG-SENSE"], truth, rtol=1e-5)
    assert found["psnr"]["cg_sense"] > 100 > found["psnr"]["diffusion"] > 40 > 20 > found["psnr"]["zero_filled"]
