"""Images as a console wants them: geometry, scaling, attributes."""

import ismrmrd
import numpy as np
import pytest
import torch
from conftest import run_chain

from gadgets.files import affine
from gadgets.geometry import Geometry
from gadgets.volume import Scan
from gadgets.images import make_images, to_pixels, to_recon_matrix
from gadgets.options import make_options

HEADER = ismrmrd.xsd.ismrmrdHeader(experimentalConditions=ismrmrd.xsd.experimentalConditionsType(H1resonanceFrequency_Hz=1))
DIRECTIONS = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]


def a_scan(matrix=(12, 10, 8), recon=None, fov=(24.0, 30.0, 16.0), recon_fov=None) -> Scan:
    geometry = Geometry(matrix, fov, recon or matrix, recon_fov or fov, (0, 0), ((0, 1), (0, 1)), matrix[0])
    head = ismrmrd.AcquisitionHeader()
    head.position, head.read_dir, head.phase_dir, head.slice_dir = (5.0, -7.0, 11.0), *(tuple(d) for d in DIRECTIONS)
    head.acquisition_time_stamp, head.measurement_uid, head.patient_table_position = 1234, 77, (0.0, 0.0, -3.0)
    head.idx.contrast = 2
    return Scan(geometry, torch.empty(0), torch.empty(0), head)


def point(shape, place):
    volume = torch.zeros(shape, dtype=torch.complex64)
    volume[place] = 1
    return volume


def centroid_mm(images) -> np.ndarray:
    """LPS place of the brightest point, weighted over pixels."""
    total, weight = np.zeros(3), 0.0
    for image in images:
        to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine(image.getHead())
        pixels = np.abs(image.data[0]).astype(float) ** 2
        z, y, x = np.indices(pixels.shape)
        places = np.stack([x, y, z, np.ones_like(x)]).reshape(4, -1)
        total += (to_lps @ places)[:3] @ pixels.ravel()
        weight += pixels.sum()
    return total / weight


@pytest.mark.parametrize("layout", ["volume", "partitions"])
@pytest.mark.parametrize("matrix", [(12, 10, 8), (13, 11, 9), (13, 10, 1)])
def test_point_object_lies_where_it_is(layout, matrix):
    scan = a_scan(matrix)
    x, y, z = 4, 7, min(3, matrix[2] - 1)
    voxel = np.array(scan.geometry.recon_fov_mm) / matrix
    expected = np.array(scan.head.position) + (np.array([x, y, z]) - np.array(matrix) // 2) * voxel @ DIRECTIONS
    images = list(make_images(point(matrix[::-1], (z, y, x)), scan, make_options({"layout": layout, "output": "float32"}), HEADER, 1, 0, "test", []))
    assert len(images) == (matrix[2] if layout == "partitions" else 1)
    np.testing.assert_allclose(centroid_mm(images), expected, atol=0.1 * voxel.min())


@pytest.mark.parametrize("recon,recon_fov", [((24, 20, 16), None), ((25, 21, 15), None), ((12, 8, 6), (24.0, 24.0, 12.0)), ((6, 5, 4), None)])
def test_point_stays_in_place_when_cropped_or_interpolated(recon, recon_fov):
    scan = a_scan(recon=recon, recon_fov=recon_fov)
    expected = np.array(scan.head.position) + (np.array([7, 6, 3]) - np.array([6, 5, 4])) * np.array([2.0, 3.0, 2.0]) @ DIRECTIONS
    images = list(make_images(smooth_point((8, 10, 12), (3, 6, 7)), scan, make_options({"output": "float32"}), HEADER, 1, 0, "test", []))
    assert tuple(images[0].getHead().matrix_size) == recon
    np.testing.assert_allclose(centroid_mm(images), expected, atol=0.2)


def smooth_point(shape, place):
    axes = [torch.exp(-0.5 * ((torch.arange(n) - p) / 1.2) ** 2) for n, p in zip(shape, place)]
    return torch.einsum("i,j,k->ijk", *axes).to(torch.complex64)


def test_interpolation_keeps_brightness():
    scan = a_scan(recon=(24, 20, 16))
    constant = torch.full((8, 10, 12), 3.0, dtype=torch.complex64)
    torch.testing.assert_close(to_recon_matrix(constant, scan.geometry).abs(), torch.full((16, 20, 24), 3.0))


def test_header_carries_the_acquisition():
    (image,) = make_images(point((8, 10, 12), (1, 1, 1)), a_scan(), make_options(), HEADER, 2, 4, "name", ["note"])
    head = image.getHead()
    assert (head.acquisition_time_stamp, head.measurement_uid, head.contrast) == (1234, 77, 2)
    assert (head.image_series_index, head.image_index, head.image_type, head.version) == (2, 5, ismrmrd.IMTYPE_MAGNITUDE, 1)
    assert tuple(head.field_of_view) == (24.0, 30.0, 16.0) and tuple(head.position) == (5.0, -7.0, 11.0)
    assert tuple(head.patient_table_position) == (0.0, 0.0, -3.0)


def test_meta_speaks_both_dialects_in_ascii_with_whole_windows():
    (image,) = make_images(point((8, 10, 12), (1, 1, 1)), a_scan(), make_options(), HEADER, 1, 0, "name", ["bär"])
    meta = ismrmrd.Meta.deserialize(image.attribute_string)
    assert meta["GADGETRON_DataRole"] == meta["DataRole"] == "Image"
    assert "note" not in meta["ImageComments"] and "b?r" in meta["GADGETRON_ImageComment"]
    assert int(meta["WindowCenter"]) > 0 and int(meta["GADGETRON_WindowWidth"]) > 0
    assert image.attribute_string.isascii()


def test_twelve_bits_one_scale_and_the_way_back():
    volume = np.random.default_rng(0).gamma(2.0, 1.0, (6, 20, 20)) * 1e-6
    pixels, scale = to_pixels(volume, "uint16")
    assert pixels.dtype == np.uint16 and pixels.max() <= 4095
    np.testing.assert_allclose(pixels / scale, np.minimum(volume, 4095 / scale), atol=0.51 / scale)


@pytest.mark.parametrize("output,dtype", [("uint16", np.uint16), ("float32", np.float32), ("complex64", np.complex64)])
def test_pixel_types(scan_path, output, dtype):
    (image,) = run_chain(scan_path, None, method="zero-filled", output=output)
    assert image.data.dtype == dtype


def test_partitions_share_scale_and_are_numbered(scan_path):
    images = run_chain(scan_path, None, method="cg", layout="partitions")
    assert [i.image_index for i in images] == list(range(1, 25))
    assert len({i.meta["GADGETRON_ScaleRatio"] for i in images}) == 1
    assert [i.slice for i in images] == list(range(24))


def test_images_of_nan_are_not_sent():
    with pytest.raises(ValueError, match="NaN"):
        list(make_images(point((8, 10, 12), (1, 1, 1)) * float("nan"), a_scan(), make_options(), HEADER, 1, 0, "name", []))
