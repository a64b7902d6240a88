"""Images as a console wants them: geometry, scaling, attributes."""

import ismrmrd
import nibabel
import numpy as np
import pytest
import torch
from conftest import line_like, load_small_scan, run_chain

from gadgets.flags import NOISE_BIT
from gadgets.geometry import Geometry
from gadgets.image_files import affine, write_nifti, write_png
from gadgets.images import make_images, to_pixels, to_recon_matrix
from gadgets.options import make_options
from gadgets.recon import reconstruct
from gadgets.simulation.protocol import SimulateOptions
from gadgets.volume import GatheredVolume

HEADER = ismrmrd.xsd.ismrmrdHeader(
    experimentalConditions=ismrmrd.xsd.experimentalConditionsType(H1resonanceFrequency_Hz=1)
)
DIRECTIONS = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
FLOAT32 = make_options({"output": "float32"})
ZERO_FILLED = make_options({"method": "zero-filled", "device": "cpu"})


def gathered_volume(matrix=(12, 10, 8), recon=None, fov=(24.0, 30.0, 16.0), recon_fov=None) -> GatheredVolume:
    geometry = Geometry(matrix, fov, recon or matrix, recon_fov or fov, (0, 0), ((0, 1), (0, 1)), matrix[0])
    head = ismrmrd.AcquisitionHeader()
    head.position, head.read_dir, head.phase_dir, head.slice_dir = (5.0, -7.0, 11.0), *(tuple(d) for d in DIRECTIONS)
    head.acquisition_time_stamp, head.measurement_uid, head.patient_table_position = 1234, 77, (0.0, 0.0, -3.0)
    head.idx.contrast, head.physiology_time_stamp = 2, (7, 8, 9)
    return GatheredVolume(geometry, torch.empty(0), torch.empty(0), head)


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
    gathered = gathered_volume(matrix)
    x, y, z = 4, 7, min(3, matrix[2] - 1)
    voxel = np.array(gathered.geometry.recon_fov_mm) / matrix
    expected = np.array(gathered.head.position) + (np.array([x, y, z]) - np.array(matrix) // 2) * voxel @ DIRECTIONS
    volume, options = point(matrix[::-1], (z, y, x)), make_options({"layout": layout, "output": "float32"})
    images = list(make_images(volume, gathered, options, HEADER, 1, 0, "test", []))
    assert len(images) == (matrix[2] if layout == "partitions" else 1)
    np.testing.assert_allclose(centroid_mm(images), expected, atol=0.1 * voxel.min())


@pytest.mark.parametrize(
    "recon,recon_fov",
    [
        ((24, 20, 16), None),
        ((25, 21, 15), None),
        ((12, 8, 6), (24.0, 24.0, 12.0)),
        ((6, 5, 4), None),
    ],
)
def test_point_stays_in_place_when_cropped_or_interpolated(recon, recon_fov):
    gathered = gathered_volume(recon=recon, recon_fov=recon_fov)
    away_mm = (np.array([7, 6, 3]) - np.array([6, 5, 4])) * np.array([2.0, 3.0, 2.0])
    expected = np.array(gathered.head.position) + away_mm @ DIRECTIONS
    images = list(make_images(smooth_point((8, 10, 12), (3, 6, 7)), gathered, FLOAT32, HEADER, 1, 0, "test", []))
    assert tuple(images[0].getHead().matrix_size) == recon
    np.testing.assert_allclose(centroid_mm(images), expected, atol=0.2)


def smooth_point(shape, place):
    axes = [torch.exp(-0.5 * ((torch.arange(n) - p) / 1.2) ** 2) for n, p in zip(shape, place)]
    return torch.einsum("i,j,k->ijk", *axes).to(torch.complex64)


def test_interpolation_keeps_brightness():
    gathered = gathered_volume(recon=(24, 20, 16))
    constant = torch.full((8, 10, 12), 3.0, dtype=torch.complex64)
    torch.testing.assert_close(to_recon_matrix(constant, gathered.geometry).abs(), torch.full((16, 20, 24), 3.0))


def test_header_carries_the_acquisition():
    (image,) = make_images(
        point((8, 10, 12), (1, 1, 1)), gathered_volume(), make_options(), HEADER, 2, 4, "name", ["note"]
    )
    head = image.getHead()
    assert (head.acquisition_time_stamp, head.measurement_uid, head.contrast) == (1234, 77, 2)
    assert (head.image_series_index, head.image_index) == (2, 5)
    assert (head.image_type, head.version) == (ismrmrd.IMTYPE_MAGNITUDE, 1)
    assert tuple(head.field_of_view) == (24.0, 30.0, 16.0) and tuple(head.position) == (5.0, -7.0, 11.0)
    assert tuple(head.patient_table_position) == (0.0, 0.0, -3.0) and list(head.physiology_time_stamp) == [7, 8, 9]


def test_meta_speaks_both_dialects_in_ascii_with_whole_windows():
    (image,) = make_images(
        point((8, 10, 12), (1, 1, 1)), gathered_volume(), make_options(), HEADER, 1, 0, "name", ["bär"]
    )
    meta = ismrmrd.Meta.deserialize(image.attribute_string)
    assert meta["GADGETRON_DataRole"] == meta["DataRole"] == "Image"
    assert "note" not in meta["ImageComments"] and "b?r" in meta["GADGETRON_ImageComment"]
    assert image.attribute_string.isascii()


def test_meta_tells_window_matrix_and_both_fields_of_view():
    """A volume of one brightness is shown at the middle of a window as wide as it is bright."""
    gathered = gathered_volume((12, 10, 8), recon=(6, 10, 8), fov=(48.0, 30.0, 16.0), recon_fov=(24.0, 30.0, 16.0))
    (image,) = make_images(
        torch.ones(8, 10, 12, dtype=torch.complex64), gathered, make_options(), HEADER, 1, 0, "name", []
    )
    meta = ismrmrd.Meta.deserialize(image.attribute_string)
    window = (round(int(image.data.max()) / 2), int(image.data.max()))
    assert (int(meta["WindowCenter"]), int(meta["WindowWidth"])) == window
    assert (int(meta["GADGETRON_WindowCenter"]), int(meta["GADGETRON_WindowWidth"])) == window
    assert meta["encoding_FOV"] == ["48", "30", "16"] and meta["recon_FOV"] == ["24", "30", "16"]
    assert meta["encoded_matrix"] == ["12", "10", "8"] and meta["recon_matrix"] == ["6", "10", "8"]


@pytest.mark.parametrize("brightness", [1e-6, 0.3, 5000.25, 2e8])
@pytest.mark.parametrize("output", ["float32", "complex64"])
def test_the_window_of_float_images_fits_pixels_of_any_size(output, brightness):
    """Far below 1 as well: a window of 1 would show such an image black. What reads whole numbers finds no exponent."""
    volume, options = torch.full((8, 10, 12), brightness, dtype=torch.complex64), make_options({"output": output})
    (image,) = make_images(volume, gathered_volume(), options, HEADER, 1, 0, "name", [])
    window = (image.meta["WindowCenter"], image.meta["WindowWidth"])
    assert [float(value) for value in window] == pytest.approx([brightness / 2, brightness], rel=1e-6)
    assert window == (image.meta["GADGETRON_WindowCenter"], image.meta["GADGETRON_WindowWidth"])
    assert brightness < 1 or not any("e" in value for value in window)
    (dark,) = make_images(0 * volume, gathered_volume(), options, HEADER, 1, 0, "name", [])
    assert float(dark.meta["WindowWidth"]) > 0


@pytest.mark.parametrize("output, window", [("uint16", ["2048", "4095"]), ("float32", ["1.5", "3"])])
def test_the_window_shows_a_few_bright_voxels_in_nothing(output, window):
    volume = torch.zeros(8, 10, 12, dtype=torch.complex64)
    volume[4, 5, 6] = 3
    (image,) = make_images(volume, gathered_volume(), make_options({"output": output}), HEADER, 1, 0, "name", [])
    assert [image.meta["WindowCenter"], image.meta["WindowWidth"]] == window


def test_a_nifti_has_the_brightness_of_before_the_scaling(tmp_path):
    volume = torch.from_numpy(np.random.default_rng(0).random((8, 10, 12))).to(torch.complex64)
    (image,) = make_images(volume, gathered_volume(), make_options(), HEADER, 1, 0, "name", [])
    write_nifti(image, tmp_path / "x.nii.gz")
    np.testing.assert_allclose(nibabel.load(tmp_path / "x.nii.gz").get_fdata().T, volume.abs(), atol=1 / 2000)


def test_twelve_bits_one_scale_and_the_way_back():
    volume = np.random.default_rng(0).gamma(2.0, 1.0, (6, 20, 20)) * 1e-6
    pixels, scale, cut = to_pixels(torch.from_numpy(volume), "uint16")
    assert pixels.dtype == np.uint16 and pixels.max() <= 4095 and cut == (volume * scale > 4095.5).sum()
    assert np.percentile(volume, 99.9) * scale == pytest.approx(4095 * 2 / 3)
    np.testing.assert_allclose(pixels / scale, np.minimum(volume, 4095 / scale), atol=0.51 / scale)


def test_the_scale_of_a_large_volume_comes_of_some_of_its_voxels():
    volume = torch.from_numpy(np.random.default_rng(0).uniform(0, 1, (130, 128, 128)).astype(np.float32))
    _, scale, _ = to_pixels(volume, "uint16")
    assert float(np.percentile(volume, 99.9)) * scale == pytest.approx(4095 * 2 / 3, rel=0.01)


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
    volume = point((8, 10, 12), (1, 1, 1)) * float("nan")
    with pytest.raises(ValueError, match="NaN"):
        list(make_images(volume, gathered_volume(), make_options(), HEADER, 1, 0, "name", []))


def series_of(gathered, *volumes):
    """One image of each volume, all in series 1."""
    return [next(make_images(v, gathered, make_options(), HEADER, 1, n, "name", [])) for n, v in enumerate(volumes)]


def test_a_series_has_one_scale_and_says_what_was_cut():
    """The first volume fixes it.

    Where a later one is brighter than 1.5 times in a few voxels (contrast agent), they are cut, and counted.
    """
    volume = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 1, (8, 10, 12))).to(torch.complex64)
    enhanced = volume.clone()
    enhanced[2, 3, :8] *= 3
    gathered = gathered_volume()
    first, second, bright = series_of(gathered, volume, 1.2 * volume, enhanced)
    (other,) = make_images(3 * volume, gathered, make_options(), HEADER, 2, 0, "name", [])
    np.testing.assert_allclose(second.data.astype(float), 1.2 * first.data, atol=1.2)
    assert {i.meta["GADGETRON_ScaleRatio"] for i in (first, second, bright)} == {first.meta["GADGETRON_ScaleRatio"]}
    np.testing.assert_array_equal(other.data, first.data)
    cut = int((bright.data == 4095).sum())
    assert cut > 1 and f"{cut} voxels are brighter than 4095 and were clipped" in bright.meta["ImageComments"]
    assert "cut" not in first.meta["ImageComments"] + second.meta["ImageComments"]


def test_a_dark_first_volume_does_not_cut_the_later_ones_off():
    """An empty slice or a preparation comes first.

    A new scale begins, is told once, and leads back to the same signal.
    """
    volume = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 1, (8, 10, 12))).to(torch.complex64)
    dark, full, third = series_of(gathered_volume(), 0.02 * volume, volume, volume)
    ratio = [float(i.meta["GADGETRON_ScaleRatio"]) for i in (dark, full, third)]
    assert ratio[0] == pytest.approx(50 * ratio[1]) and ratio[1] == ratio[2]
    said = (
        "CAUTION: much brighter than the earlier images of its series: "
        "from here on, equal pixels mean 50 times the signal"
    )
    assert said in full.meta["ImageComment"]
    assert third.meta["ImageComment"] == "name"
    np.testing.assert_allclose(full.data[0] / ratio[1], volume.abs(), atol=1 / 2000)


def test_the_first_volume_is_not_cut_and_what_is_cut_in_later_ones_is_counted():
    """The 99.9th percentile of 4000 voxels is 1, those of the background.

    Small things that are brighter keep their contrast.
    """
    volume = torch.ones(10, 20, 20, dtype=torch.complex64)
    volume[5, 5, 5:9] = torch.tensor([1.2, 5.0, 6.0, 7.0])
    first, later = series_of(gathered_volume((20, 20, 10)), volume, 1.3 * volume)
    assert first.meta["ImageComment"] == "name" and first.data.max() == 4095
    signal = first.data[0, 5, 5, 4:9] / float(first.meta["GADGETRON_ScaleRatio"])  # the way back
    np.testing.assert_allclose(signal, [1, 1.2, 5, 6, 7], rtol=1e-3)
    said = "2 voxels are brighter than 4095 and were clipped: the first volume of a contrast sets its scale"
    assert later.meta["ImageComment"].startswith(f"name; {said}") and int((later.data == 4095).sum()) == 2


def test_an_empty_first_volume_fixes_no_scale():
    volume = point((8, 10, 12), (1, 1, 1)) + 1e-3
    first, second = series_of(gathered_volume(), 0 * volume, volume)
    assert not first.data.any() and second.data.max() == 4095


def test_repetitions_share_the_scale_through_the_chain(tmp_path):
    """A signal that grows by 1.2 from each repetition to the next does so in the pixels, preview and final alike."""
    protocol = SimulateOptions(coils=2, pattern="full", snr=100, noise_lines=16, repetitions=2)
    header, lines, _ = load_small_scan(tmp_path, protocol)
    lines = [line_like(line, (1 + 0.2 * line.idx.repetition) * line.data) for line in lines]
    for method in ("zero-filled", "cg"):
        first, second = reconstruct(header, lines, None, make_options({"method": method, "device": "cpu"}))
        assert (first.repetition, second.repetition) == (0, 1)
        assert first.meta["GADGETRON_ScaleRatio"] == second.meta["GADGETRON_ScaleRatio"]
        bright = first.data > 1500
        assert np.median(second.data[bright] / first.data[bright]) == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize("counter", ["contrast", "set"])
def test_a_dark_contrast_or_set_does_not_cut_the_others(tmp_path, counter):
    """As of MP2RAGE: the first a seventh as bright.

    Each keeps its range over the repetitions, and its Meta leads back to the ratio.
    """
    protocol = SimulateOptions(coils=2, pattern="full", snr=100, noise_lines=16, contrasts=2, repetitions=2)
    header, lines, _ = load_small_scan(tmp_path, protocol)
    lines = [line for line in lines if not line.flags & NOISE_BIT and not line.idx.contrast]
    lines = [line_like(line, (0.15, 1)[n] * line.data, **{"contrast": 0, counter: n}) for line in lines for n in (0, 1)]
    images = list(reconstruct(header, lines, None, make_options({"method": "cg", "device": "cpu"})))
    scale = {(i.repetition, getattr(i, counter)): float(i.meta["GADGETRON_ScaleRatio"]) for i in images}
    assert scale[0, 0] == scale[1, 0] and scale[0, 1] == scale[1, 1]
    assert scale[0, 0] / scale[0, 1] == pytest.approx(1 / 0.15, rel=0.02)
    assert all((i.data == 4095).sum() < 5 and i.data.max() > 2000 for i in images)

    def signal(number):
        image = next(i for i in images if getattr(i, counter) == number)
        return image.data / float(image.meta["GADGETRON_ScaleRatio"])

    dark, bright = signal(0), signal(1)
    tissue = bright > 0.3 * bright.max()
    assert np.median(dark[tissue] / bright[tissue]) == pytest.approx(0.15, rel=0.02)


def test_each_slab_keeps_its_own_place(full):
    header, lines, _ = full
    other = [line_like(line, slice=1, position=(10.0, 20.0, 30.0)) for line in lines]
    first, second = reconstruct(header, [*lines, *other], None, ZERO_FILLED)
    assert (tuple(first.position), tuple(second.position)) == ((0.0, 0.0, 0.0), (10.0, 20.0, 30.0))
    assert (first.slice, second.slice, first.image_index, second.image_index) == (0, 1, 1, 2)


def test_timing_and_protocol_reach_the_attributes(scan_path):
    x = ismrmrd.xsd
    header = x.ismrmrdHeader(
        experimentalConditions=HEADER.experimentalConditions,
        measurementInformation=x.measurementInformationType(
            measurementID="42_1", patientPosition=x.patientPositionType.HFS, protocolName="t1 é"
        ),
        sequenceParameters=x.sequenceParametersType(TE=[1.5, 2.5, 3.5], TI=[900.0]),
    )
    (image,) = make_images(point((8, 10, 12), (1, 1, 1)), gathered_volume(), make_options(), header, 1, 6, "name", [])
    meta = ismrmrd.Meta.deserialize(image.attribute_string)
    # contrast 2 has the third echo time
    assert (meta["GADGETRON_TE"], meta["EchoTime"], meta["GADGETRON_TI"]) == ("3.5", "3.5", "900")
    assert (meta["measurementID"], meta["patient_position"]) == ("42_1", "HFS")
    assert (meta["protocolName"], meta["GADGETRON_ImageNumber"]) == ("t1 ?", "7")
    assert meta["SeriesDescription"] == "t1 ? name"


def test_the_inversion_times_of_sets_are_told(full):
    """MP2RAGE: two inversions are two sets, whose contrasts, if there are several, are echoes."""
    header, lines, _ = full
    header.sequenceParameters = ismrmrd.xsd.sequenceParametersType(TI=[700.0, 2500.0])
    images = reconstruct(header, [*lines, *(line_like(line, set=1) for line in lines)], None, ZERO_FILLED)
    assert [image.meta["InversionTime"] for image in images] == ["700", "2500"]
    header.encoding[0].encodingLimits.set = ismrmrd.xsd.limitType(minimum=0, maximum=1, center=0)
    echoes = [
        line_like(line, set=inversion, contrast=echo) for inversion in (0, 1) for echo in (0, 1) for line in lines
    ]
    images = reconstruct(header, echoes, None, ZERO_FILLED)
    told = {(i.getHead().contrast, i.getHead().set): i.meta["InversionTime"] for i in images}
    assert told == {(0, 0): "700", (1, 0): "700", (0, 1): "2500", (1, 1): "2500"}


def test_lines_without_a_finite_position_are_told(full):
    header, lines, _ = full
    lines = [line_like(line, position=(float("nan"), 0.0, 1.0)) for line in lines]
    (image,) = reconstruct(header, lines, None, ZERO_FILLED)
    assert "no finite position: the centre of the magnet was assumed" in image.meta["ImageComment"]
    assert tuple(image.position) == (0.0, 0.0, 0.0)


def test_partitions_of_slabs_have_slice_numbers_of_their_own():
    gathered, options = gathered_volume(), make_options({"layout": "partitions"})
    gathered.head.idx.slice = 2
    images = list(make_images(point((8, 10, 12), (1, 1, 1)), gathered, options, HEADER, 1, 2, "name", []))
    assert [i.slice for i in images] == list(range(16, 24)) and [i.image_index for i in images] == list(range(17, 25))


def turned_by(degrees: float) -> list:
    """DIRECTIONS with the phase direction turned towards the read direction."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return [DIRECTIONS[0], s * DIRECTIONS[0] + c * DIRECTIONS[1], DIRECTIONS[2]]


@pytest.mark.parametrize(
    "directions",
    [1.02 * DIRECTIONS, 1000 * DIRECTIONS, np.diag([1.0, 2, 0]) @ DIRECTIONS, np.diag([0, 1.0, 1]) @ DIRECTIONS],
)
def test_directions_of_another_length_say_where_the_volume_lies_all_the_same(directions):
    """One that lacks is at right angles to the others."""
    gathered = gathered_volume()
    gathered.head.read_dir, gathered.head.phase_dir, gathered.head.slice_dir = (tuple(d) for d in directions)
    (image,) = make_images(point((8, 10, 12), (1, 1, 1)), gathered, FLOAT32, HEADER, 1, 0, "name", [])
    head = image.getHead()
    np.testing.assert_allclose([head.read_dir, head.phase_dir, head.slice_dir], DIRECTIONS, atol=1e-6)
    lacks = next((name for name, direction in zip(("read", "phase", "slice"), directions) if not direction.any()), "")
    if lacks:
        said = f"the lines have no {lacks} direction: the one at right angles to the others, right-handed, was assumed"
    else:
        said = "the lines' directions are not all of length 1: they were normalised"
    assert image.meta["ImageComment"] == f"name; {said}"


@pytest.mark.parametrize(
    "directions,word",
    [
        (np.zeros((3, 3)), "no"),
        ([DIRECTIONS[0], DIRECTIONS[0], DIRECTIONS[2]], "contradicting"),
        (turned_by(2), "contradicting"),
        (np.diag([1.0, 0, 0]) @ DIRECTIONS, "contradicting"),
        (np.full((3, 3), np.nan), "contradicting"),
        (np.inf * DIRECTIONS, "contradicting"),
        (DIRECTIONS, None),
        (turned_by(0.2), None),
    ],
)
def test_lines_without_directions_lie_along_the_patient(tmp_path, directions, word):
    """Read, phase and slice then are x, y and z (LPS), as the comment says, and NIfTI and PNG can be written."""
    gathered = gathered_volume()
    gathered.head.read_dir, gathered.head.phase_dir, gathered.head.slice_dir = (tuple(d) for d in directions)
    (image,) = make_images(point((8, 10, 12), (1, 1, 1)), gathered, FLOAT32, HEADER, 1, 0, "name", ["note"])
    head = image.getHead()
    expected = np.eye(3) if word else np.array(directions)
    np.testing.assert_allclose([head.read_dir, head.phase_dir, head.slice_dir], expected, atol=1e-6)
    told = [[float(v) for v in image.meta[name]] for name in ("read_dir", "phase_dir", "slice_dir")]
    np.testing.assert_allclose(told, expected, atol=1e-6)
    said = (
        f"name; note; the lines have {word} directions: read, phase and slice were assumed to point to "
        "the patient's left, posterior and superior"
    )
    assert image.meta["ImageComment"] == (said if word else "name; note")
    write_nifti(image, tmp_path / "x.nii.gz")
    write_png(image, tmp_path / "x.png")
    if word:  # pixel n//2 lies at the position (5, -7, 11) mm LPS, and RAS is its mirror image along x and y
        to_ras = [[-2, 0, 0, -5 + 12], [0, -3, 0, 7 + 15], [0, 0, 2, 11 - 8], [0, 0, 0, 1]]
        np.testing.assert_allclose(nibabel.load(tmp_path / "x.nii.gz").affine, to_ras)


def test_preview_and_final_image_say_that_directions_are_missing(full):
    header, lines, _ = full
    lines = [line_like(line, read_dir=(0, 0, 0), phase_dir=(0, 0, 0), slice_dir=(0, 0, 0)) for line in lines]
    options = make_options({"method": "tv", "device": "cpu", "layout": "partitions"})
    images = list(reconstruct(header, lines, None, options))
    assert {i.image_series_index for i in images} == {1, 2}
    assert all("the lines have no directions" in i.meta["ImageComment"] for i in images)
    assert {tuple(i.getHead().slice_dir) for i in images} == {(0.0, 0.0, 1.0)}


@pytest.mark.parametrize(
    "orientation",
    ["acquired", "transpose", "flip_x", "flip_y+flip_z", "flip_z + transpose + flip_x"],
)
@pytest.mark.parametrize("matrix", [(12, 10, 8), (13, 11, 9)])
def test_orientation_moves_nothing_in_the_patient(orientation, matrix):
    gathered, volume = gathered_volume(matrix), point(matrix[::-1], (2, 7, 4))

    def oriented(steps):
        options = make_options({"orientation": steps, "output": "float32"})
        return list(make_images(volume, gathered, options, HEADER, 1, 0, "name", []))

    plain, turned = oriented("acquired"), oriented(orientation)
    np.testing.assert_allclose(centroid_mm(turned), centroid_mm(plain), atol=1e-4)
    steps = orientation.replace(" ", "").split("+")
    z, y, x = np.unravel_index(np.argmax(turned[0].data[0]), turned[0].data[0].shape)
    (a, b), (nx, ny, nz) = ((7, 4), (matrix[1], matrix[0], matrix[2])) if "transpose" in steps else ((4, 7), matrix)
    assert x == (nx - 1 - a if "flip_x" in steps else a)
    assert y == (ny - 1 - b if "flip_y" in steps else b)
    assert z == (nz - 3 if "flip_z" in steps else 2)
    row_dir = [float(v) for v in turned[0].meta["ImageRowDir"]]
    assert row_dir == pytest.approx(list(turned[0].getHead().read_dir), abs=1e-6)


def test_an_unknown_orientation_is_refused():
    with pytest.raises(ValueError, match="option 'orientation': unknown step 'rotate'"):
        make_options({"orientation": "flip_x+rotate"})
