"""An aborted scan is recognised by what the header and the flags promised."""

import copy

import ismrmrd
import numpy as np
import pytest
import torch
from conftest import gathered, line_like, load_small_scan

from gadgets.completeness import NO_CENTRE, hole_at_centre
from gadgets.gather import gather
from gadgets.simulation.protocol import SimulateOptions


def incomplete(scan):
    return [w.removeprefix("the scan seems incomplete: ") for w in scan.warnings if "incomplete" in w]


def inside(line):
    """Whether it is one of the 5 x 5 lines in the middle."""
    return 4 <= line.idx.kspace_encode_step_1 < 9 and 3 <= line.idx.kspace_encode_step_2 < 8


def test_an_end_of_k_space_that_never_came(full):
    header, lines, _ = full
    begun = [line for line in lines if line.idx.kspace_encode_step_2 < 6]
    assert incomplete(gathered(header, begun))[0] == "E2 was announced from 0 to 9 but received from 0 to 5"


def test_too_few_lines_for_the_announced_acceleration(full):
    """All ends were approached, as in a random order, but half of the lines are missing."""
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].parallelImaging.accelerationFactor.kspace_encoding_step_1 = 2
    regular = [line_like(line, flags=0) for line in lines if line.idx.kspace_encode_step_1 % 2 == 0]
    assert incomplete(gathered(header, regular)) == []
    assert incomplete(gathered(header, regular[::2])) == ["35 phase encodes were received, 65 were announced"]


def test_too_few_lines_without_announced_acceleration(full):
    header, lines, _ = full
    (text,) = gathered(header, [line_like(line, flags=0) for line in lines[::3]]).warnings
    assert text.startswith("44 of 130 phase encodes were received although the header announces no acceleration")


def test_a_repetition_whose_last_line_never_came(full):
    header, lines, _ = full
    assert incomplete(gathered(header, lines[:-1])) == [
        "the first line of a repetition was flagged, but its last line never came"
    ]
    ended = line_like(lines[-1], flags=1 << (ismrmrd.ACQ_LAST_IN_MEASUREMENT - 1))
    assert incomplete(gathered(header, [*lines[:-1], ended])) == []


def test_flags_of_another_encoding_neither_begin_nor_end_a_repetition(full):
    """Its repetition 0 is not the image's."""
    header, lines, _ = full
    others = [line_like(line, encoding_space_ref=1, flags=0) for line in lines if inside(line)]
    others[0].setFlag(ismrmrd.ACQ_FIRST_IN_REPETITION)
    unflagged = [line_like(line, flags=0) for line in lines]
    assert incomplete(gathered(header, [*others, *unflagged])) == []
    others[-1].setFlag(ismrmrd.ACQ_LAST_IN_REPETITION)
    assert incomplete(gathered(header, [*others, *lines[:-1]])) == [
        "the first line of a repetition was flagged, but its last line never came"
    ]


def test_the_last_line_of_a_repetition_may_be_one_of_a_later_set(full):
    header, lines, _ = full
    flagged = lines[0], lines[-1]  # the first one in the first set, the last one in the second
    stream = [
        line_like(line, flags=line.flags * (line is flagged[of_set]), repetition=repetition, set=of_set)
        for of_set in (0, 1)
        for repetition in (0, 1)
        for line in lines
    ]
    assert [incomplete(scan) for scan in gather(header, stream)] == [[]] * 4


def test_announced_volumes_and_averages_that_never_came(full):
    header, lines, _ = full
    header = copy.deepcopy(header)
    limits = header.encoding[0].encodingLimits
    limits.repetition, limits.average = (ismrmrd.xsd.limitType(minimum=0, maximum=n, center=0) for n in (2, 1))
    later = [line_like(line, repetition=1) for line in lines]
    first, second = gather(header, [*lines, *later])
    assert incomplete(first) == []
    assert incomplete(second) == [
        "the header announces 2 averages, 1 was received",
        "the header announces 3 repetitions, 2 were received",
    ]


def test_an_undersampled_scan_is_complete(tmp_path):
    for pattern in ("poisson", "regular"):
        options = SimulateOptions(coils=1, pattern=pattern, acceleration=4, acs=8, partial_fourier=(0.8, 0.75))
        header, lines, _ = load_small_scan(tmp_path, options, (40, 44, 12))
        assert not [w for w in gathered(header, lines).warnings if "noise" not in w]


def test_a_hole_at_the_centre_of_k_space_is_told(full):
    """From one line on, of any shape, in the whole k-space and in every second row of it."""
    header, lines, _ = full
    at = lambda line: (line.idx.kspace_encode_step_1 - 6, line.idx.kspace_encode_step_2 - 5)
    for step in (1, 2):
        rows = [line_like(line, flags=0) for line in lines if at(line)[0] % step == 0]
        assert NO_CENTRE not in gathered(header, rows).warnings
        for e1, e2 in ((0, 0), (2, 0), (0, 1), (2, 1)) if step == 1 else ((1, 1), (2, 1)):
            holed = [line for line in rows if abs(at(line)[0]) > e1 or abs(at(line)[1]) > e2]
            assert NO_CENTRE in gathered(header, holed).warnings, (step, e1, e2)


@pytest.mark.parametrize("shape", [(48, 56), (8, 128), (1, 200)])
def test_no_pattern_is_taken_for_a_hole_at_the_centre(shape):
    """Whatever the header says of it: lattices in all their shifts, CAIPI, at random, no corners, partial Fourier."""
    rng, alarms = np.random.default_rng(0), 0
    z, y = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    for steps in ((1, 2), (2, 1), (1, 4), (1, 6), (2, 2), (3, 2), (4, 4)):
        for _ in range(8):
            shift = rng.integers(8, size=2)
            for caipi in (0, 1):
                lattice = ((z + shift[0]) % steps[0] == 0) & ((y + shift[1] + caipi * (z // steps[0])) % steps[1] == 0)
                assert not hole_at_centre(lattice).any(), (steps, shift, caipi)
                assert not hole_at_centre(lattice & (y > shape[1] // 4)).any()
    for factor in (1.05, 1.3, 2, 4, 8, 12):
        for _ in range(25):
            taken = rng.random(shape) < 1 / factor
            corner = ((2 * z / shape[0] - 1) ** 2 + (2 * y / shape[1] - 1) ** 2 > 1) & (shape[0] > 1)
            alarms += bool(hole_at_centre(taken).any()) + bool(hole_at_centre(taken & ~corner).any())
    assert alarms <= 12  # of 300; without any pattern the largest hole is sometimes there


@pytest.mark.parametrize("mode,taken", [("separate", True), ("external", False)])
def test_calibration_lines_fill_a_hole_at_the_centre_unless_they_are_of_another_scan(full, mode, taken):
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType(mode)
    expected = gathered(header, [line_like(line, flags=0) for line in lines])
    bit = 1 << (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION - 1)
    scan = gathered(header, [line_like(line, flags=bit if inside(line) else 0) for line in lines])
    assert torch.equal(scan.kspace, expected.kspace) == taken
    assert any("calibration lines are used there" in w for w in scan.warnings) == taken
    assert (NO_CENTRE in scan.warnings) != taken
    assert scan.calibration is not None


def test_what_is_cut_off_or_of_no_use_is_not_filled_from_the_calibration(full):
    """An image that is nothing but calibration lines would tell nobody that the scan is not there."""
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType.SEPARATE
    bit = 1 << (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION - 1)

    def square(factor):
        return [line_like(line, factor * line.data, flags=bit) for line in lines if inside(line)]

    plain = [line_like(line, flags=0) for line in lines]
    scan = gathered(header, [*square(1), *plain[:30]])
    assert int(scan.counts.sum()) == 30 and any("but received from 0 to" in text for text in incomplete(scan))
    holed = [line for line in plain if (line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2) != (6, 5)]
    for factor in (0, np.nan):
        scan = gathered(header, [*square(factor), *holed])
        assert int(scan.counts.sum()) == len(holed) and NO_CENTRE in scan.warnings
        assert bool(torch.isfinite(scan.kspace.abs()).all())
    scan = gathered(header, [*square(2), *holed])
    assert int(scan.counts.sum()) == len(plain)
    torch.testing.assert_close(scan.kspace[:, 5, 6], 2 * gathered(header, plain).kspace[:, 5, 6])
