"""Pictures of volumes of any shape stay of a size that can be looked at."""

import matplotlib.image
import numpy as np
import pytest

from gadgets.figure import draw_comparison, draw_orthogonal, planes


@pytest.mark.parametrize(("shape", "shown"), [((30, 40, 50), 3), ((4, 128, 126), 1), ((180, 230, 1), 1), ((2, 3, 4), 1)])
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
    draw_comparison({"a": volume, "reference": volume}, np.eye(4), tmp_path / "two.png", {"a": "1 dB"}, "reference", errors=3)
    for name in ("one", "two"):
        height, width = matplotlib.image.imread(tmp_path / f"{name}.png").shape[:2]
        assert width <= 900 and height < 2600
