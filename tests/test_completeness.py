"""An aborted scan is recognised by what the header and the flags promised."""

import copy

import ismrmrd
import pytest
import torch
from conftest import gathered, line_like, load_small_scan

from gadgets.gather import gather
from gadgets.protocol import SimulateOptions


def incomplete(scan):
    return [w.removeprefix("the scan seems incomplete: ") for w in scan.warnings if "incomplete" in w]


def test_an_end_of_k_space_that_never_came(full):
    header, lines, _ = full
    assert incomplete(gathered(header, [line for line in lines if line.idx.kspace_encode_step_2 < 6]))[0] == "E2 was announced from 0 to 9 and came from 0 to 5"


def test_too_few_lines_for_the_announced_acceleration(full):
    """All ends were approached, as in a random order, but half of the lines are missing."""
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].parallelImaging.accelerationFactor.kspace_encoding_step_1 = 2
    regular = [line_like(line, flags=0) for line in lines if line.idx.kspace_encode_step_1 % 2 == 0]
    assert incomplete(gathered(header, regular)) == []
    assert incomplete(gathered(header, regular[::2])) == ["35 phase encodes came, 65 are announced"]


def test_too_few_lines_without_announced_acceleration(full):
    header, lines, _ = full
    (text,) = gathered(header, [line_like(line, flags=0) for line in lines[::3]]).warnings
    assert text.startswith("44 of 130 phase encodes came though the header announces no acceleration")


def test_a_repetition_whose_last_line_never_came(full):
    header, lines, _ = full
    assert incomplete(gathered(header, lines[:-1])) == ["the first line of a repetition was flagged, its last line never came"]
    ended = line_like(lines[-1], flags=1 << (ismrmrd.ACQ_LAST_IN_MEASUREMENT - 1))
    assert incomplete(gathered(header, [*lines[:-1], ended])) == []


def test_announced_volumes_and_averages_that_never_came(full):
    header, lines, _ = full
    header = copy.deepcopy(header)
    limits = header.encoding[0].encodingLimits
    limits.repetition, limits.average = (ismrmrd.xsd.limitType(minimum=0, maximum=n, center=0) for n in (2, 1))
    later = [line_like(line, repetition=1) for line in lines]
    first, second = gather(header, [*lines, *later])
    assert incomplete(first) == []
    assert incomplete(second) == ["the header announces 2 averages, 1 came", "the header announces 3 repetitions, 2 came"]


def test_an_undersampled_scan_is_complete(tmp_path):
    for pattern in ("poisson", "regular"):
        header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=1, pattern=pattern, acceleration=4, acs=8, partial_fourier=(0.8, 0.75)), (40, 44, 12))
        assert not [w for w in gathered(header, lines).warnings if "noise" not in w]


@pytest.mark.parametrize("steps,reach,told", [((1, 1), 0, True), ((2, 1), 0, False), ((2, 1), 1, True), ((2, 2), 0, False), ((2, 2), 1, True)])
def test_a_hole_at_the_centre_of_k_space_is_told(full, steps, reach, told):
    """One that is not there because of the announced acceleration is none: the next line has most of it."""
    header, lines, _ = full
    header = copy.deepcopy(header)
    factor = header.encoding[0].parallelImaging.accelerationFactor
    factor.kspace_encoding_step_1, factor.kspace_encoding_step_2 = steps
    centre = [getattr(header.encoding[0].encodingLimits, f"kspace_encoding_step_{n}").center for n in (1, 2)]
    away = lambda line: max(abs(line.idx.kspace_encode_step_1 - centre[0]), abs(line.idx.kspace_encode_step_2 - centre[1]))  # noqa: E731
    warnings = gathered(header, [line_like(line, flags=0) for line in lines if away(line) > reach]).warnings
    assert any("no line came at the centre of k-space, brightness and contrast are wrong" in w for w in warnings) == told
    assert not any("centre of k-space" in w for w in gathered(header, lines).warnings)


@pytest.mark.parametrize("mode,taken", [("separate", True), ("external", False)])
def test_calibration_lines_fill_a_hole_at_the_centre_unless_they_are_of_another_scan(full, mode, taken):
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].parallelImaging.calibrationMode = ismrmrd.xsd.calibrationModeType(mode)
    expected = gathered(header, [line_like(line, flags=0) for line in lines])
    inside = lambda line: 4 <= line.idx.kspace_encode_step_1 < 9 and 3 <= line.idx.kspace_encode_step_2 < 8  # noqa: E731
    bit = 1 << (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION - 1)
    scan = gathered(header, [line_like(line, flags=bit if inside(line) else 0) for line in lines])
    assert torch.equal(scan.kspace, expected.kspace) == taken
    assert any("calibration lines serve there" in w for w in scan.warnings) == taken
    assert any("brightness and contrast are wrong" in w for w in scan.warnings) != taken
    assert scan.calibration is not None
