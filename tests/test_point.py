"""A point object at a known place in the patient, through the whole chain: within 0.1 voxel of it in the images."""

import pytest

from gadgets.conformance.point import SLABS, error_voxels, point_scan
from gadgets.options import make_options
from gadgets.recon import reconstruct


@pytest.mark.parametrize("orientation", ["acquired", "transpose+flip_x+flip_z"])
@pytest.mark.parametrize("layout", ["volume", "partitions"])
@pytest.mark.parametrize("slab", SLABS)
def test_the_point_lies_where_it_is(slab, layout, orientation):
    header, lines, voxel = point_scan(**SLABS[slab])
    options = make_options({"method": "cg", "layout": layout, "orientation": orientation, "device": "cpu"})
    images = list(reconstruct(header, lines, None, options))
    assert error_voxels([(bytes(image.getHead()), image.data.tobytes()) for image in images], voxel) < 0.1


def test_a_tenth_of_a_voxel_is_noticed():
    header, lines, voxel = point_scan(**SLABS["odd"])
    (image,) = reconstruct(header, lines, None, make_options({"method": "cg", "device": "cpu"}))
    head = image.getHead()
    for axis, direction in enumerate((head.read_dir, head.phase_dir, head.slice_dir)):
        moved = type(head).from_buffer_copy(bytes(head))
        moved.position = tuple(p + 0.2 * voxel[axis] * d for p, d in zip(head.position, direction))
        assert error_voxels([(bytes(moved), image.data.tobytes())], voxel) == pytest.approx(0.2, abs=0.05)
