"""When a repetition is over: alone, and in scans of every order."""

from types import SimpleNamespace

import ismrmrd
import pytest
import torch
from conftest import gathered, line_like, load_small_scan

from gadgets.flags import FIRST_BIT, LAST_BIT, VolumeKey
from gadgets.gather import gather
from gadgets.repetitions import STRAYS, Repetitions
from gadgets.simulation.protocol import SimulateOptions


def volume_of(repetition, lines=200, complete=True, averages=1, contrast=0):
    """A volume of so many lines, as an entry of the open ones."""
    grid, key = SimpleNamespace(lines=lines), VolumeKey(0, contrast, repetition, 0, 0)
    return {key: SimpleNamespace(grid=grid, averages=averages, lacks_nothing=lambda averages: complete)}


def lines_held(volumes, flags=0, averages=1):
    """Lines of repetition 1 that come before repetition 0, of 200 lines, is over; None after 3000 of them."""
    repetitions = Repetitions(averages)
    for number in range(200):
        repetitions.flagged(0, 0 if number else flags)
        repetitions.count(0)
    for number in range(1, 3001):
        repetitions.flagged(1, 0)
        repetitions.count(1)
        if repetitions.first_open(volumes, 1) == 1:
            return number
    return None


@pytest.mark.parametrize(
    "volume,flags,averages,held",
    [
        (volume_of(0), LAST_BIT, 1, 1),
        (volume_of(0, complete=False), FIRST_BIT | LAST_BIT, 1, 1),
        (volume_of(0), 0, 1, 102),  # 0.5 x 200, and the first of the row does not count
        (volume_of(0, lines=20), 0, 1, 66),  # as if it had 128
        (volume_of(0, complete=False), 0, 1, 801),  # 4 x 200
        (volume_of(0, complete=False), FIRST_BIT, 1, 1601),  # 8 x 200
        (volume_of(0, complete=False), 0, 2, 1601),
        (volume_of(0, complete=False, averages=2), 0, 2, 801),
        (volume_of(0) | volume_of(0, complete=False, contrast=1), 0, 1, 1601),  # 4 x 400
    ],
)
def test_a_repetition_is_over_after_as_many_later_lines_as_what_it_lacks_demands(volume, flags, averages, held):
    assert lines_held(volume, flags, averages) == held


@pytest.mark.parametrize("back", [STRAYS, STRAYS + 1])
def test_interleaved_repetitions_are_over_once_flagged(back):
    """As many lines of an earlier one may be strays; one more shows that it goes on."""
    repetitions = Repetitions(1)
    for repetition in (0, 1, *[0] * back, *[1] * 1000, 2):
        repetitions.flagged(repetition, 0)
        repetitions.count(repetition)
    volumes = volume_of(0) | volume_of(1)
    for _ in range(200):
        repetitions.count(2)
    assert repetitions.first_open(volumes, 2) == (2 if back == STRAYS else 0)
    repetitions.flagged(0, LAST_BIT)
    assert repetitions.first_open(volumes, 2) == (2 if back == STRAYS else 1)


def test_a_flagged_repetition_of_which_another_volume_begins_goes_on():
    repetitions = Repetitions(1)
    for repetition in (0, 1):
        repetitions.flagged(repetition, LAST_BIT)
        repetitions.count(repetition)
    assert repetitions.first_open(volume_of(0), 1) == 1 and repetitions.first_open(volume_of(0), 0) == 0
    repetitions.resume(0)
    assert repetitions.first_open(volume_of(0), 1) == 0


@pytest.mark.parametrize(
    "repetitions,contrasts,block",
    [
        (2, 1, 1),
        (2, 1, 13),
        (2, 1, 60),
        (2, 1, 130),
        (2, 1, 260),
        (4, 1, 130),
        (4, 1, 260),
        (5, 1, 65),
        (20, 1, 16),
        (30, 1, 7),
        (2, 6, 130),
        (2, 8, 64),
        (6, 4, 16),
    ],
)
def test_interleaved_repetitions_give_one_volume_each(tmp_path, repetitions, contrasts, block):
    """Blocks of any size: until one comes back, a segment of a repetition looks like a whole one."""
    protocol = SimulateOptions(coils=1, pattern="full", snr=1e5, noise_lines=0)
    header, lines, _ = load_small_scan(tmp_path, protocol, (40, 13, 12))
    blocks = [lines[n : n + block] for n in range(0, len(lines), block)]
    counters = [(repetition, contrast) for repetition in range(repetitions) for contrast in range(contrasts)]
    stream = [
        line_like(line, flags=0, repetition=repetition, contrast=contrast)
        for some in blocks
        for repetition, contrast in counters
        for line in some
    ]
    scans = list(gather(header, stream))
    found = [(scan.head.idx.repetition, scan.head.idx.contrast) for scan in scans]
    assert found == sorted(counters, key=lambda pair: pair[::-1])
    assert all(bool((scan.counts == 1).all()) and scan.warnings == [] for scan in scans)


@pytest.mark.parametrize("flags", [0, FIRST_BIT])
def test_a_long_series_without_last_flags_is_not_held_to_its_end(tmp_path, flags):
    """Undersampled at random, so that nobody knows what lacks.

    Also where late lines, calibration or another encoding interfere.
    """
    protocol = SimulateOptions(coils=1, acceleration=2, acs=8, noise_lines=0)
    header, lines, _ = load_small_scan(tmp_path, protocol, (40, 13, 12))
    held, most = 0, 0

    def running():
        nonlocal held, most
        for repetition in range(20):
            held, most = held + 1, max(most, held + 1)
            for number, line in enumerate(lines):
                yield line_like(line, flags=flags if not number else 0, repetition=repetition)
            yield line_like(lines[0], flags=0, encoding_space_ref=1)
            if repetition == 10:
                yield line_like(lines[0], flags=0)

    for _ in gather(header, running()):
        held -= 1
    assert most <= (10 if flags else 6)


@pytest.mark.parametrize("counter", ["contrast", "set", "phase", "slice"])
def test_repetitions_inside_of_another_counter_are_whole(full, counter):
    """Each value of the counter has its repetitions with their last lines flagged.

    A volume is handed out as soon as it is over.
    """
    header, lines, _ = full
    volumes = [(value, repetition) for value in (0, 1) for repetition in (0, 1, 2)]
    consumed, whole = [], []

    def running():
        for value, repetition in volumes:
            factor = 1 + repetition + 3 * value
            for line in lines:
                consumed.append(1)
                yield line_like(line, factor * line.data, repetition=repetition, **{counter: value})

    for scan in gather(header, running()):
        idx = scan.head.idx
        whole.append(((getattr(idx, counter), idx.repetition), len(consumed) / len(lines)))
        assert bool((scan.counts == 1).all()) and not any("already been reconstructed" in w for w in scan.warnings)
        factor = 1 + idx.repetition + 3 * getattr(idx, counter)
        torch.testing.assert_close(scan.kspace, factor * gathered(header, lines).kspace)
    assert sorted(key for key, _ in whole) == volumes
    assert all(when < 2.1 for key, when in whole if key == (0, 0))
    assert all(when < 5.1 for key, when in whole if key == (1, 0))


def test_averages_outside_of_repetitions_are_waited_for_where_the_header_announces_them(tmp_path):
    protocol = SimulateOptions(coils=1, pattern="full", snr=1e5, noise_lines=0)
    header, lines, _ = load_small_scan(tmp_path, protocol, (20, 13, 12))
    header.encoding[0].encodingLimits.average = ismrmrd.xsd.limitType(minimum=0, maximum=1, center=0)
    loops = [(average, repetition) for average in (0, 1) for repetition in range(6)]
    stream = [
        line_like(line, flags=0, average=average, repetition=repetition)
        for average, repetition in loops
        for line in lines
    ]
    scans = list(gather(header, stream))
    assert [scan.head.idx.repetition for scan in scans] == list(range(6))
    assert all(bool((scan.counts == 2).all()) for scan in scans)


def test_a_repetition_is_handed_out_before_the_next_ends(tmp_path):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=1, pattern="full", repetitions=2, noise_lines=0))
    consumed = []
    scans = gather(header, (consumed.append(1) or line for line in lines))
    next(scans)
    assert len(consumed) == len(lines) // 2 + 1
    consumed.clear()
    scans = gather(header, (consumed.append(1) or line_like(line, flags=0) for line in lines))
    next(scans)
    assert len(lines) // 2 < len(consumed) < 0.8 * len(lines)  # without a flag for the last line
