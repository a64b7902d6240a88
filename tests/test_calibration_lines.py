"""Parallel-calibration lines: integrated, separate, external."""

import copy

import ismrmrd
import numpy as np
import pytest
import torch
from conftest import gathered, line_like, load_small_scan

from gadgets.flags import NOISE_BIT
from gadgets.gather import gather
from gadgets.options import make_options
from gadgets.recon import reconstruct
from gadgets.simulation.protocol import SimulateOptions
from recon_core.coils import find_acs
from recon_core.measure import measure

ONLY, BOTH = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION, ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING


def steps(line):
    """Its place (E1, E2)."""
    return line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2


def fully_sampled(folder, **changes):
    """Header and lines of a simulated scan of the phantom, 26 x 24 lines."""
    protocol = SimulateOptions(coils=4, pattern="full", noise_lines=16, snr=200, **changes)
    return load_small_scan(folder, protocol, (24, 26, 16))[:2]


def measured(volume):
    """The measurement of a gathered volume."""
    return measure(volume.kspace, volume.counts, volume.geometry.voxel_mm, volume.noise, volume.calibration)


@pytest.fixture
def scan_with(full):
    """(mode) -> header of that calibration mode and the full scan's lines by (E1, E2), flags cleared."""
    header, lines, _ = full

    def make(mode):
        changed = copy.deepcopy(header)
        changed.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType(mode)
        return changed, {steps(line): line_like(line, flags=0) for line in lines}

    return make


def flagged(line, flag, **changes):
    out = line_like(line, **changes)
    out.setFlag(flag)
    return out


def in_centre(place):
    return 4 <= place[0] < 9 and 3 <= place[1] < 8


def test_separate_lines_stay_out_of_the_image(scan_with):
    header, lines = scan_with("separate")
    calibration = [flagged(line, ONLY, data=3 * line.data) for place, line in lines.items() if in_centre(place)]
    scan = gathered(header, [*calibration, *lines.values()])
    assert bool((scan.counts == 1).all()) and scan.warnings == []
    where = scan.calibration[1] > 0
    assert int(scan.calibration[1].sum()) == 25 and bool(where[3:8, 4:9].all())
    torch.testing.assert_close(scan.calibration[0][:, where], 3 * scan.kspace[:, where])


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(position=(3.0, 0.0, 0.0)), ""),
        (dict(position=(12.0, -5.0, 0.0)), "13 mm away"),
        (dict(read_dir=(0.0, 1.0, 0.0), phase_dir=(-1.0, 0.0, 0.0)), "turned by 90 degrees"),
        (dict(position=(float("nan"), 0.0, 0.0)), ""),
    ],
)
def test_calibration_of_another_place_is_told(scan_with, changes, told):
    header, lines = scan_with("separate")
    here = dict(
        position=(0.0, 0.0, 0.0), read_dir=(1.0, 0.0, 0.0), phase_dir=(0.0, 1.0, 0.0), slice_dir=(0.0, 0.0, 1.0)
    )
    calibration = [flagged(line, ONLY, **{**here, **changes}) for place, line in lines.items() if in_centre(place)]
    scan = gathered(header, [*calibration, *(line_like(line, **here) for line in lines.values())])
    said = f"the calibration lines were acquired {told} from the image: the coil maps do not fit it"
    assert scan.warnings == ([said] if told else [])


def test_interleaved_calibration_is_told(scan_with):
    header, lines = scan_with("interleaved")
    assert [text for text in gathered(header, lines.values()).warnings if "interleaved over the repetitions" in text]


def test_integrated_lines_are_image_lines(scan_with):
    """Those off the lattice are flagged as calibration alone, yet belong to the same measurement."""
    header, lines = scan_with("embedded")
    on = [flagged(line, BOTH) if in_centre(p) else line for p, line in lines.items() if p[0] % 2 == 0]
    off = [flagged(line, ONLY) for p, line in lines.items() if p[0] % 2 and in_centre(p)]
    scan = gathered(header, [*on, *off])
    assert scan.calibration is None
    assert bool((scan.counts[3:8, 4:9] == 1).all()) and int(scan.counts.sum()) == len(on) + len(off)


@pytest.mark.parametrize("mode", ["embedded", "other"])
def test_a_centre_square_of_the_first_repetition_serves_the_later_ones(tmp_path, mode):
    """Regularly undersampled without one they would be aliased; with it their maps are those of the first.

    Their lines are their own.
    """
    header, lines = fully_sampled(tmp_path, repetitions=3)
    header.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType(mode)
    scan = []
    for line in lines:
        step_1, step_2, repetition = line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2, line.idx.repetition
        square = repetition == 0 and 7 <= step_1 < 19 and 6 <= step_2 < 18
        if line.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT) or step_1 % 2 == 1 and step_2 % 2 == 0 or square:
            scan.append(flagged(line, BOTH) if square else line)
    first, *later = gather(header, scan)
    assert len(later) == 2 and not [w for w in first.warnings if "earlier volume" in w]
    for volume in later:
        assert [w for w in volume.warnings if "the coil maps are made from those of an earlier volume" in w]
        assert find_acs(volume.calibration[1])[0] >= 12 and int(volume.counts.sum()) == 13 * 12
    options = make_options({"method": "cg", "device": "cpu", "output": "float32"})
    images = [image.data[0] for image in reconstruct(header, scan, None, options)]
    assert np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1] > 0.97
    assert not [w for volume in later for w in measured(volume).warnings if "CAUTION" in w]


def test_a_centre_square_of_the_first_echo_serves_later_ones_sampled_at_random(tmp_path):
    """Without a full centre of their own their maps would be made from a smoothed image, unlike the first echo's."""
    header, lines = fully_sampled(tmp_path, contrasts=2)
    random = np.random.default_rng(0)
    kept = random.random((24, 26)) < 0.4
    kept[9:15, 10:16] |= random.random((6, 6)) < 0.7

    def is_sampled(line):
        step_1, step_2 = steps(line)
        square = 7 <= step_1 < 19 and 6 <= step_2 < 18
        return line.flags & NOISE_BIT or kept[step_2, step_1] or (not line.idx.contrast and square)

    scan = [line for line in lines if is_sampled(line)]
    first, second = gather(header, scan)
    assert first.calibration is None and find_acs(second.calibration[1])[0] >= 12
    said = "too few of the lines are calibration lines: the coil maps are made from those of an earlier volume"
    assert said in second.warnings
    assert find_acs(second.counts)[0] < 8 and int(second.counts.sum()) == kept.sum()
    one, other = measured(first), measured(second)
    torch.testing.assert_close(one.operator.coil_maps(), other.operator.coil_maps(), atol=0.02, rtol=0)


def test_lines_that_alternate_between_repetitions_are_calibrated_together(tmp_path):
    """As in TSENSE: a repetition has every third line, another third each time; from the third on their sum is full."""
    header, lines = fully_sampled(tmp_path, repetitions=4)
    header.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType("interleaved")
    noise = lambda line: line.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    scan = [line for line in lines if noise(line) or line.idx.kspace_encode_step_1 % 3 == line.idx.repetition % 3]
    volumes = list(gather(header, scan))
    assert [volume.calibration is not None for volume in volumes] == [False, False, True, True]
    assert all("from the lines of several repetitions" in " ".join(volume.warnings) for volume in volumes[2:])
    options = make_options({"method": "cg", "device": "cpu", "output": "float32"})
    found = [image.data[0].ravel() for image in reconstruct(header, scan, None, options)]
    of_one_repetition = [line for line in lines if noise(line) or not line.idx.repetition]
    (whole,) = reconstruct(header, of_one_repetition, None, options)
    alike = [np.corrcoef(whole.data[0].ravel(), image)[0, 1] for image in found]
    assert max(alike[:2]) < 0.9 < 0.95 < min(alike[2:]), alike


def test_lines_for_both_complete_the_calibration_when_the_header_names_no_mode(scan_with):
    header, lines = scan_with("other")
    on = [flagged(line, BOTH) if in_centre(p) else line for p, line in lines.items() if p[0] % 2 == 0]
    off = [flagged(line, ONLY) for p, line in lines.items() if p[0] % 2 and in_centre(p)]
    scan = gathered(header, [*off, *on])
    assert bool((scan.calibration[1][3:8, 4:9] == 1).all()) and int(scan.calibration[1].sum()) == 25
    assert int(scan.counts.sum()) == len(on)


def test_external_lines_of_a_smaller_matrix_find_their_place(scan_with):
    """A calibration scan of its own encoding space: fewer steps and samples, the same field of view."""
    header, lines = scan_with("external")
    small = copy.deepcopy(header.encoding[0])
    small.encodedSpace.matrixSize = ismrmrd.xsd.matrixSizeType(x=16, y=6, z=5)
    small.reconSpace.matrixSize = ismrmrd.xsd.matrixSizeType(x=8, y=6, z=5)
    small.encodingLimits.kspace_encoding_step_1 = ismrmrd.xsd.limitType(minimum=0, maximum=5, center=3)
    small.encodingLimits.kspace_encoding_step_2 = ismrmrd.xsd.limitType(minimum=0, maximum=4, center=2)
    header.encoding.append(small)
    calibration = []
    for (step_1, step_2), line in lines.items():
        if 0 <= step_1 - 3 < 6 and 0 <= step_2 - 3 < 5:
            extra = flagged(line, ONLY, data=line.data[:, 4:20], center_sample=8, encoding_space_ref=1)
            extra.idx.kspace_encode_step_1, extra.idx.kspace_encode_step_2 = step_1 - 3, step_2 - 3
            calibration.append(extra)
    scan = gathered(header, [*calibration, *lines.values()])
    assert scan.warnings == [] and bool((scan.counts == 1).all())
    where = scan.calibration[1] > 0
    assert int(where.sum()) == 30 and bool(where[3:8, 3:9].all())
    blurred = [line_like(line, data=line.data * 0) for line in lines.values()]
    for line, source in zip(blurred, lines.values()):
        line.data[:, 4:20] = source.data[:, 4:20]
    torch.testing.assert_close(scan.calibration[0][:, where], gathered(header, blurred).kspace[:, where])


def test_lines_of_a_foreign_encoding_are_counted_and_told(scan_with):
    header, lines = scan_with("separate")
    wide = copy.deepcopy(header.encoding[0])
    wide.encodedSpace.fieldOfView_mm.y *= 2
    header.encoding.append(wide)
    strangers = [line_like(line, encoding_space_ref=1) for line in list(lines.values())[:3]]
    strangers += [flagged(line, ONLY, encoding_space_ref=1) for line in list(lines.values())[:2]]
    scan = gathered(header, [*strangers, *lines.values()])
    assert bool((scan.counts == 1).all()) and scan.calibration is None
    assert "5 lines of another encoding space were left out" in scan.warnings


def test_one_calibration_serves_all_repetitions_and_contrasts(scan_with):
    header, lines = scan_with("separate")
    calibration = [flagged(line, ONLY) for place, line in lines.items() if in_centre(place)]
    later = [line_like(line, repetition=1) for line in lines.values()]
    other = [line_like(line, contrast=1) for line in lines.values()]
    scans = list(gather(header, [*calibration, *lines.values(), *other, *later]))
    assert len(scans) == 3 and all(int(scan.calibration[1].sum()) == 25 for scan in scans)


@pytest.mark.parametrize("calibrated_first", [True, False])
def test_each_repetition_keeps_its_own_calibration(scan_with, calibrated_first):
    """The next repetition's calibration comes before the last one was handed out, which no flag told."""
    header, lines = scan_with("separate")
    square = [line for place, line in lines.items() if in_centre(place)]
    scan = []
    for repetition in range(3):
        calibration = [flagged(line, ONLY, data=(1 + repetition) * line.data, repetition=repetition) for line in square]
        image = [line_like(line, repetition=repetition) for line in lines.values()]
        scan += [*calibration, *image] if calibrated_first else [*image, *calibration]
    volumes = list(gather(header, scan))
    assert len(volumes) == 3
    where = volumes[0].calibration[1] > 0
    for repetition, volume in enumerate(volumes):
        assert bool((volume.calibration[1][where] == 1).all()) and volume.warnings == []
        torch.testing.assert_close(volume.calibration[0][:, where], (1 + repetition) * volume.kspace[:, where])


@pytest.mark.parametrize("changes", [{}, {"kspace_encode_step_1": 900}, {"data": np.ones((1, 24))}])
def test_a_stray_line_is_no_newer_calibration(scan_with, changes):
    header, lines = scan_with("separate")
    calibration = [flagged(line, ONLY) for place, line in lines.items() if in_centre(place)]
    stray = flagged(lines[4, 3], ONLY, repetition=1, **changes)
    series = [line_like(line, repetition=repetition) for repetition in range(4) for line in lines.values()]
    volumes = list(gather(header, [*calibration, *series[: len(lines)], stray, *series[len(lines) :]]))
    assert [int(volume.calibration[1].sum()) for volume in volumes] == [25] * 4


def test_calibration_lines_that_complete_the_image_are_of_its_own_repetition(scan_with):
    header, lines = scan_with("other")
    scan = []
    for repetition in range(2):
        for place, line in lines.items():
            flags = 1 << (ONLY - 1) if in_centre(place) else 0
            scan.append(line_like(line, (1 + repetition) * line.data, repetition=repetition, flags=flags))
    first, second = gather(header, scan)
    assert bool((first.counts == 1).all()) and bool((second.counts == 1).all())
    torch.testing.assert_close(second.kspace, 2 * first.kspace)


def test_calibration_of_another_slab_or_of_other_coils_is_told(scan_with):
    header, lines = scan_with("separate")
    elsewhere = [flagged(line, ONLY, slice=1) for place, line in lines.items() if in_centre(place)]
    warnings = gathered(header, [*elsewhere, *lines.values()]).warnings
    assert "the calibration lines belong to other slabs: none of them can be used here" in warnings
    one_coil = [flagged(line, ONLY, data=line.data[:1]) for place, line in lines.items() if in_centre(place)]
    warnings = gathered(header, [*one_coil, *lines.values()]).warnings
    assert "25 calibration lines have 1 channels instead of the scan's 2 and were not used" in warnings


def test_the_first_calibration_line_of_other_coils_does_not_decide(scan_with):
    header, lines = scan_with("separate")
    calibration = [flagged(line, ONLY) for place, line in lines.items() if in_centre(place)]
    stray = flagged(calibration[0], ONLY, data=calibration[0].data[:1])
    scan = gathered(header, [stray, *calibration, *lines.values()])
    assert int(scan.calibration[1].sum()) >= 24
    assert scan.warnings[0].startswith("2 calibration lines had a different number of channels")


def test_what_was_assumed_of_an_external_encoding_is_told(scan_with):
    header, lines = scan_with("external")
    other = copy.deepcopy(header.encoding[0])
    other.encodingLimits.kspace_encoding_step_1.center = 900
    header.encoding.append(other)
    scan = gathered(header, [*(flagged(line, ONLY, encoding_space_ref=1) for line in lines.values()), *lines.values()])
    assert scan.warnings == [
        "of the calibration, the header's centre 900 of kspace_encoding_step_1 lies outside 0 to 12: 6 assumed"
    ]


@pytest.mark.parametrize(
    "value,said",
    [
        (float("nan"), "hold NaN, infinity or numbers too large to square"),
        (0.0, "held only zeros"),
    ],
)
def test_calibration_of_no_use_leaves_the_image_its_own_centre(scan_with, value, said):
    header, lines = scan_with("separate")
    calibration = [flagged(line, ONLY, data=line.data * value) for place, line in lines.items() if in_centre(place)]
    options = make_options({"method": "cg", "device": "cpu", "output": "float32"})
    (image,) = reconstruct(header, [*calibration, *lines.values()], None, options)
    (expected,) = reconstruct(header, list(lines.values()), None, options)
    assert (image.data == expected.data).all()
    assert f"calibration lines {said} and were left out" in image.meta["ImageComment"]


def test_calibration_that_contrasts_share_holds_the_image_lines_of_none_but_ones_own(full):
    """No mode in the header, and each contrast has flagged lines of its own that serve the image too."""
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].parallelImaging = None
    square = [flagged(line, ONLY, flags=0) for line in lines if in_centre(steps(line))]
    imaging = []
    for contrast, row in enumerate((1, 10)):
        for line in lines:
            own = line_like(line, (1 + 99 * contrast) * line.data, flags=0, contrast=contrast)
            if own.idx.kspace_encode_step_1 == row:
                own.setFlag(BOTH)
            imaging.append(own)
    first, second = gather(header, [*square, *imaging])
    for scan, row in ((first, 1), (second, 10)):
        rows = (scan.calibration[1].sum(0) > 0).nonzero()[:, 0].tolist()
        assert rows == sorted({*range(4, 9), row})
        torch.testing.assert_close(scan.calibration[0][:, :, row], scan.kspace[:, :, row])


@pytest.mark.parametrize("mode", ["separate", "external", "other"])
@pytest.mark.parametrize("first", [(0, 0), (1, 3)])
def test_calibration_lines_that_count_from_a_number_of_their_own_are_centred(tmp_path, mode, first):
    """Their block would lie in a corner of k-space.

    With their strongest line at k = 0 they are those of the image's numbering.
    """
    header, lines = fully_sampled(tmp_path)
    header.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType(mode)
    noise = [line for line in lines if line.flags & NOISE_BIT]
    places = {steps(line): line_like(line, flags=0) for line in lines if not line.flags & NOISE_BIT}
    sampled = [line for (step_1, step_2), line in places.items() if step_1 % 2 == 1 and step_2 % 2 == 0]
    square = [flagged(line, ONLY) for (step_1, step_2), line in places.items() if 8 <= step_1 < 18 and 7 <= step_2 < 17]
    own = []
    for line in square:
        step_1, step_2 = steps(line)
        numbers = dict(kspace_encode_step_1=step_1 - 8 + first[0], kspace_encode_step_2=step_2 - 7 + first[1])
        own.append(line_like(line, **numbers))
    right, moved = (gathered(header, [*noise, *calibration, *sampled]) for calibration in (square, own))
    z, y = np.indices((24, 26))
    assert torch.equal(moved.counts, torch.from_numpy((z % 2 == 0) & (y % 2 == 1)))
    assert all(torch.equal(a, b) for a, b in zip(moved.calibration, right.calibration))
    new = [w for w in moved.warnings if w not in right.warnings]
    assert [w for w in new if "numbered on their own, far from the image's centre of k-space" in w]
    options = make_options({"method": "cg", "device": "cpu", "output": "float32"})
    (image,) = reconstruct(header, [*noise, *own, *sampled], None, options)
    assert "CAUTION" not in image.meta["ImageComment"]


def test_calibration_lines_that_the_image_lacks_are_its_own_where_the_header_misplaces_the_centre(tmp_path):
    """Partial Fourier with the middle of the steps for their centre.

    The lines' numbering is one, and only the image's centre is wrong.
    """
    protocol = SimulateOptions(coils=3, pattern="full", noise_lines=4, partial_fourier=(0.6, 0.6))
    header, lines, _ = load_small_scan(tmp_path, protocol, (26, 36, 32))
    header.encoding[0].parallelImaging = None
    limits = header.encoding[0].encodingLimits
    true = limits.kspace_encoding_step_1.center, limits.kspace_encoding_step_2.center
    for limit in (limits.kspace_encoding_step_1, limits.kspace_encoding_step_2):
        limit.center = (limit.maximum + 1) // 2

    def is_near(line):
        step_1, step_2 = steps(line)
        return abs(step_1 - true[0]) <= 3 and abs(step_2 - true[1]) <= 3 and not line.flags & NOISE_BIT

    scan = gathered(header, [flagged(line, ONLY, flags=0) if is_near(line) else line for line in lines])
    assert int(scan.counts.sum()) == len(lines) - 4
    assert scan.warnings[0].startswith("the calibration lines are used for the image too")


def test_external_calibration_does_not_decide_what_the_slice_counter_means(tmp_path):
    """Its lines, of slice 0 and many partitions, would say that slices are slabs."""
    header, lines = fully_sampled(tmp_path, calibration="external", acs=10)
    whole = next(gather(header, lines))
    for line in lines:
        if not line.encoding_space_ref and not line.flags & NOISE_BIT:
            line.idx.slice = line.idx.kspace_encode_step_2
    (found,) = gather(header, lines)
    assert not found.flaw and torch.equal(found.kspace, whole.kspace)


def test_calibration_that_comes_again_does_not_change_a_volume_that_was_handed_out(tmp_path):
    header, lines = fully_sampled(tmp_path, calibration="separate", acs=10, repetitions=2)
    calibrating = [line for line in lines if line.isFlagSet(ONLY)]
    first, second = ([line for line in lines if line.idx.repetition == n and line not in calibrating] for n in (0, 1))
    found = gather(header, [*calibrating, *first, second[0], *calibrating, *second[1:]])
    volume = next(found)
    before = [part.clone() for part in volume.calibration]
    assert len(list(found)) == 1
    assert all(torch.equal(*pair) for pair in zip(volume.calibration, before))
