"""Lines and headers that do not belong together, as converters write them.

Partitions counted as slices, EPI, another matrix, another encoding.
"""

import copy

import ismrmrd
import numpy as np
import pytest
import torch
from conftest import gathered, line_like, load_small_scan

from gadgets.budget import Budget
from gadgets.failure import ScanError
from gadgets.flags import CALIBRATION_BIT, LAST_BIT, NOISE_BIT, REVERSE_BIT
from gadgets.gather import gather
from gadgets.options import make_options
from gadgets.recon import reconstruct
from gadgets.simulation.scan import SimulateOptions

CG = make_options({"method": "cg", "device": "cpu"})


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """Header and lines of a full scan."""
    return load_small_scan(tmp_path_factory.mktemp("scan"), SimulateOptions(coils=2, pattern="full", noise_lines=4))[:2]


def limited(header, step_2, slices):
    """The header with other limits (first, last, centre) of partitions and slices."""
    header = copy.deepcopy(header)
    limits = header.encoding[0].encodingLimits
    kind = type(limits.kspace_encoding_step_1)
    limits.kspace_encoding_step_2, limits.slice = (
        last and kind(minimum=last[0], maximum=last[1], center=last[2]) for last in (step_2, slices)
    )
    return header


def changed(lines, change):
    """Noise lines as they are, the others passed through `change`."""
    return [line if line.flags & NOISE_BIT else change(line) for line in lines]


def further(line, mm):
    """The position of a line so many mm further along the slice direction."""
    return tuple(np.array(line.position) + mm * np.array(line.slice_dir))


@pytest.mark.parametrize(
    "step_2, slices, step_of",
    [
        ((0, 0, 0), (0, 9, 0), lambda slice_: 0),
        (None, (0, 9, 0), lambda slice_: 0),
        ((0, 9, 5), (0, 9, 0), lambda slice_: slice_),
        ((0, 9, 5), None, lambda slice_: slice_),
    ],
)
def test_partitions_counted_as_slices_are_one_volume(scan, step_2, slices, step_of):
    header, lines = scan
    header = limited(header, step_2, slices)
    counted = []
    for line in lines:
        partition = line.idx.kspace_encode_step_2
        counted.append(line_like(line, slice=partition, kspace_encode_step_2=step_of(partition)))
    before = [bytes(line.getHead()) for line in counted]
    found = gathered(header, counted)
    assert torch.equal(found.kspace, gathered(*scan).kspace)
    said = "the slice counter runs over the 10 partitions of the matrix: taken for kspace_encode_step_2"
    assert said in found.warnings
    nowhere = dict(position=(np.inf, 0, -np.inf), slice_dir=(np.inf, 0, np.nan))
    assert torch.equal(gathered(header, [line_like(line, **nowhere) for line in counted]).kspace, found.kspace)
    assert not [w for w in found.warnings if "incomplete" in w]
    assert [bytes(line.getHead()) for line in counted] == before


def test_slabs_stay_slabs(scan):
    header, lines = scan
    slabs = [*lines, *(line_like(line, slice=1) for line in lines if not line.flags & NOISE_BIT)]
    found = gather(limited(header, (0, 9, 5), (0, 1, 0)), slabs)
    assert [torch.equal(one.kspace, gathered(*scan).kspace) for one in found] == [True, True]


@pytest.mark.parametrize("slices,dummies", [((0, 1, 0), False), ((0, 1, 0), True), (None, True)])
def test_slabs_in_any_order_stay_slabs(scan, slices, dummies):
    """The first lines agree in both counters by chance, or are none of the image."""
    header, lines = scan
    noise = [line for line in lines if line.flags & NOISE_BIT]
    first = [line for line in lines if not line.flags & NOISE_BIT]
    slabs = [*first, *(line_like(line, slice=1) for line in first)]
    agree = [next(line for line in slabs if (line.idx.slice, line.idx.kspace_encode_step_2) == (n, n)) for n in (0, 1)]
    if dummies:
        order = [*(line_like(line, flags=1 << (ismrmrd.ACQ_IS_DUMMYSCAN_DATA - 1)) for line in agree), *slabs]
    else:
        order = [*agree, first[-1], *(line for line in slabs if line not in (*agree, first[-1]))]
    found = list(gather(limited(header, (0, 9, 5), slices), [*noise, *order]))
    assert len(found) == 2 and torch.equal(found[0].kspace, gathered(*scan).kspace)


def test_slices_of_one_partition_each_are_refused(scan):
    header, lines = scan
    strange = [
        line_like(line, slice=line.idx.kspace_encode_step_2, kspace_encode_step_2=3)
        for line in lines
        if line.idx.kspace_encode_step_2 < 4
    ]
    with pytest.raises(ValueError, match="each of the 4 slices has one of the matrix' 10 partitions"):
        list(reconstruct(header, strange, None, CG))


def test_lines_of_another_header_are_refused(scan):
    header, lines = copy.deepcopy(scan[0]), scan[1]
    header.encoding[0].encodedSpace.matrixSize.z = header.encoding[0].reconSpace.matrixSize.z = 1
    said = "117 lines lay outside the encoded matrix and only 13 inside: the header does not belong to these lines"
    with pytest.raises(ValueError, match=said):
        list(reconstruct(header, lines, None, CG))


def test_lines_of_both_directions_are_told(scan):
    header, lines = scan
    epi = []
    for line in lines:
        if line.idx.kspace_encode_step_1 % 2:
            centre = line.number_of_samples - 1 - line.center_sample
            line = line_like(line, line.data[:, ::-1], center_sample=centre, flags=line.flags | REVERSE_BIT)
        epi.append(line)
    said = "CAUTION: this image is made from lines of both readout directions"
    assert [w for w in gathered(header, epi).warnings if said in w]


def test_an_image_in_another_encoding_is_told(scan):
    header, lines = copy.deepcopy(scan[0]), scan[1]
    header.encoding.append(copy.deepcopy(header.encoding[0]))
    other = [line_like(line, encoding_space_ref=1) for line in lines if not line.flags & NOISE_BIT]
    said = (
        "CAUTION: only 60 lines belong to the first encoding space, from which the image is made: "
        "does it belong to another one?"
    )
    assert said in gathered(header, [*lines[:64], *other]).warnings
    with pytest.raises(ScanError, match="130 lines of encoding space 1"):
        list(gather(header, other))


@pytest.mark.parametrize("flags", [0, CALIBRATION_BIT])
def test_external_calibration_needs_no_flag(tmp_path, flags):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, calibration="external", acs=8))
    again = [
        line_like(line, flags=line.flags & LAST_BIT | flags) if line.encoding_space_ref else line for line in lines
    ]
    found, expected = gathered(header, again), gathered(header, lines)
    assert all(torch.equal(a, b) for a, b in zip(found.calibration, expected.calibration))
    assert found.warnings == expected.warnings


def test_lines_with_half_the_resolution_of_the_header_are_told(scan):
    """As long as lines without oversampling are: only that the object is too narrow tells."""
    header, lines = scan
    coarse = changed(lines, lambda line: line_like(line, line.data[:, 6:18], center_sample=6))
    narrow = [w for w in gathered(header, coarse).warnings if "if it looks too narrow" in w]
    white = np.fft.fft(np.random.default_rng(0).standard_normal((2, 12))) + 0j
    wide = changed(lines, lambda line: line_like(line, white, center_sample=6))
    assert len(narrow) == 1 and not [w for w in gathered(header, wide).warnings if "if it looks too narrow" in w]


THICK_MM = 3.0


def planes_of(scan, count=8):
    """Header with as many partitions as slices, noise lines, and the lines of a 2D scan by slices.

    Those are the middle partition's, once for each slice and times its number plus 1.
    """
    header, lines = copy.deepcopy(scan[0]), scan[1]
    for space in (header.encoding[0].encodedSpace, header.encoding[0].reconSpace):
        space.matrixSize.z, space.fieldOfView_mm.z = count, count * THICK_MM
    middle = [line for line in lines if not line.flags & NOISE_BIT and line.idx.kspace_encode_step_2 == 5]
    noise = [line for line in lines if line.flags & NOISE_BIT]

    def in_slice(line, number):
        own = dict(slice=number, kspace_encode_step_2=0, flags=0, position=further(line, number * THICK_MM))
        return line_like(line, (number + 1) * line.data, **own)

    stack = [[in_slice(line, number) for line in middle] for number in range(count)]
    return header, noise, stack


@pytest.mark.parametrize("order", ["slices", "interleaved"])
@pytest.mark.parametrize(
    "step_2, slices, step_of",
    [
        ((0, 0, 0), (0, 7, 0), lambda number: 0),
        (None, (0, 7, 0), lambda number: 0),
        (None, None, lambda number: 0),
        ((0, 7, 4), (0, 7, 0), lambda number: 0),
        ((0, 7, 4), None, lambda number: number),
        (None, (0, 7, 0), lambda number: number),
    ],
)
def test_slices_that_lie_apart_are_slices(scan, step_2, slices, step_of, order):
    """A matrix of as many partitions as there are slices; the image of each is the plane's, at its own position."""
    header, noise, stack = planes_of(scan)
    stack = [[line_like(line, kspace_encode_step_2=step_of(line.idx.slice)) for line in plane] for plane in stack]
    if order == "slices":
        lines = [line for number in (3, 0, 5, 1, 7, 2, 6, 4) for line in stack[number]]
    else:
        lines = [line for same in zip(*stack[::-1]) for line in same]
    found = list(gather(limited(header, step_2, slices), [*noise, *lines]))
    assert [one.head.idx.slice for one in found] == list(range(8))
    alone = gathered(limited(header, None, None), [*noise, *stack[0]])  # no other slice: a partition
    for number, one in enumerate(found):
        assert one.kspace.shape[1] == 1 and one.geometry.recon_matrix[2] == 1
        assert one.geometry.encoded_fov_mm[2] == one.geometry.recon_fov_mm[2] == THICK_MM
        torch.testing.assert_close(one.kspace[:, 0], (number + 1) * alone.kspace[:, 0])
        np.testing.assert_allclose(one.head.position[:], stack[number][0].position[:])
        assert any("each is taken for a 2D image 3 mm thick" in w for w in one.warnings), one.warnings
        assert not [w for w in one.warnings if "step_2" in w or "E2" in w], one.warnings


@pytest.mark.parametrize(
    "step_2, slices, step_of",
    [((0, 0, 0), (0, 7, 0), lambda number: 0), (None, None, lambda number: number)],
)
def test_repetitions_of_slices_that_lie_apart(scan, step_2, slices, step_of):
    header, noise, stack = planes_of(scan)
    lines = []
    for repetition in range(3):
        for line in (line for plane in stack[::-1] for line in plane):
            step = step_of(line.idx.slice)
            flags = LAST_BIT if line is stack[0][-1] else 0
            lines.append(line_like(line, kspace_encode_step_2=step, repetition=repetition, flags=flags))
    found = list(gather(limited(header, step_2, slices), [*noise, *lines]))
    counters = [(one.head.idx.repetition, one.head.idx.slice) for one in found]
    assert counters == [(repetition, number) for repetition in range(3) for number in range(8)]
    for one, first in zip(found, 3 * found[:8]):
        assert one.kspace.shape[1] == 1 and bool((one.counts == 1).all())
        assert torch.equal(one.kspace, first.kspace)


@pytest.mark.parametrize("limits", [((0, 7, 4), (0, 7, 0)), (None, None)])
def test_repetitions_of_one_slice_after_another(scan, limits):
    """Each repetition of the first slice ends, flagged, before there is a second slice to tell what they are."""
    header, noise, stack = planes_of(scan)
    lines = []
    for plane in stack:
        for repetition in range(3):
            same = [line_like(line, repetition=repetition) for line in plane]
            lines += [*same[:-1], line_like(same[-1], flags=LAST_BIT)]
    found = list(gather(limited(header, *limits), [*noise, *lines]))
    assert len(found) == 24 and not [w for one in found for w in one.warnings if "E2" in w]
    alone = {one.head.idx.slice: one.kspace for one in gather(limited(header, *limits), [*noise, *sum(stack, [])])}
    for one in found:
        assert torch.equal(one.kspace, alone[one.head.idx.slice]) and one.kspace.shape[1] == 1


def test_repetitions_of_a_slice_that_stays_the_only_one_do_not_wait_for_the_end(scan):
    header, noise, stack = planes_of(scan)
    lines = []
    for repetition in range(40):
        same = [line_like(line, repetition=repetition) for line in stack[0]]
        lines += [*same[:-1], line_like(same[-1], flags=LAST_BIT)]
    came = []

    def items():
        for line in [*noise, *lines]:
            came.append(line)
            yield line

    next(gather(limited(header, None, None), items()))
    assert len(came) < len(noise) + len(lines)


def test_the_thickness_of_slices_may_be_the_field_of_view(scan):
    header, noise, stack = planes_of(scan)
    for space in (header.encoding[0].encodedSpace, header.encoding[0].reconSpace):
        space.fieldOfView_mm.z = 2.5
    first, *_ = gather(limited(header, (0, 0, 0), (0, 7, 0)), [*noise, *(line for plane in stack for line in plane)])
    assert first.geometry.recon_fov_mm[2] == 2.5


def test_slabs_that_lie_apart_stay_slabs(scan):
    """Both slabs' first partition comes before any second one; cut off, they are incomplete slabs, not slices."""
    header, lines = scan
    slabs = [
        line_like(line, slice=number, position=further(line, 20.0 * number))
        for line in lines
        if not line.flags & NOISE_BIT
        for number in (0, 1)
    ]
    slabs.sort(key=lambda line: line.idx.kspace_encode_step_2)
    whole = gathered(*scan)
    for slices in ((0, 1, 0), None):
        found = gather(limited(header, (0, 9, 5), slices), slabs)
        assert [torch.equal(one.kspace, whole.kspace) for one in found] == [True, True]
    assert {one.kspace.shape[1] for one in gather(limited(header, (0, 9, 5), None), slabs[:40])} == {10}


def test_slices_counted_as_a_matrix_fit_the_memory_of_one(scan):
    header, noise, stack = planes_of(scan)
    header = limited(header, (0, 0, 0), (0, 7, 0))
    one = Budget(header, 1.0).nbytes(2)
    budget = Budget(header, 1.01 * one / 2**30)
    assert len(list(gather(header, [*noise, *(line for plane in stack for line in plane)], budget.check))) == 8


def with_trajectory(line, places):
    """A line with a trajectory [samples dimensions]."""
    head = line.getHead()
    head.trajectory_dimensions = places.shape[1]
    return ismrmrd.Acquisition(head, line.data, places.astype(np.float32))


def test_a_trajectory_that_is_not_uniform_is_told(scan):
    header, lines = scan
    even = (np.arange(24) - 12) / 24
    ramps = np.sin(even * np.pi * 0.95) / (2 * np.sin(0.475 * np.pi))
    wave = 0.05 * np.sin(4 * np.pi * even)
    zero = 0 * even
    caution = (
        "CAUTION: the lines' trajectories are not uniform (ramp sampling?), "
        "but this server reads the samples as equally spaced: regrid them first"
    )
    for places, told in (
        (np.stack([even, zero + 0.1, zero], 1), []),
        (even[::-1, None], []),
        (even[:, None] * 24 + 0.3, []),
        (zero[:, None], []),
        (even[:, None] + 1e-3 * wave[:, None], []),
        (ramps[:, None], [caution]),
        (np.stack([ramps, zero], 1), [caution]),
        (np.stack([even, wave], 1), [caution]),
    ):
        found = gathered(header, changed(lines, lambda line: with_trajectory(line, places)))
        assert torch.equal(found.kspace, gathered(*scan).kspace)
        assert [w for w in found.warnings if "CAUTION" in w] == told

    def as_slice(line):
        line = line_like(line, slice=line.idx.kspace_encode_step_2, kspace_encode_step_2=0)
        return with_trajectory(line, ramps[:, None])

    slices = changed(lines, as_slice)[::-1]  # the first line is not of the first slice
    found = gathered(limited(header, (0, 0, 0), (0, 9, 0)), slices)
    assert any("not uniform" in w for w in found.warnings)
