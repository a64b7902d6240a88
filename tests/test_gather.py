"""Acquisitions to k-space: every flag and header that a scanner may send."""

import copy

import ismrmrd
import numpy as np
import pytest
import torch
from conftest import gathered, line_like, load_small_scan, run_chain

from gadgets.failure import ReconError, ScanError
from gadgets.flags import NOISE_BIT
from gadgets.gather import gather
from gadgets.geometry import read_geometry
from gadgets.options import make_options
from gadgets.recon import reconstruct
from gadgets.simulation.protocol import SimulateOptions


def test_full_scan_is_complete_and_clean(full):
    header, lines, _ = full
    scan = gathered(header, lines)
    assert scan.kspace.shape == (2, 10, 13, 12)
    assert bool((scan.counts == 1).all())
    assert scan.warnings == []


@pytest.mark.parametrize(
    "flag",
    [
        ismrmrd.ACQ_IS_NAVIGATION_DATA,
        ismrmrd.ACQ_IS_PHASECORR_DATA,
        ismrmrd.ACQ_IS_DUMMYSCAN_DATA,
        ismrmrd.ACQ_IS_HPFEEDBACK_DATA,
        ismrmrd.ACQ_IS_RTFEEDBACK_DATA,
        ismrmrd.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA,
        ismrmrd.ACQ_IS_NOISE_MEASUREMENT,
        ismrmrd.ACQ_IS_PHASE_STABILIZATION_REFERENCE,
        ismrmrd.ACQ_IS_PHASE_STABILIZATION,
    ],
)
def test_lines_that_are_no_image_data_change_nothing(full, flag):
    header, lines, _ = full
    expected = gathered(header, lines).kspace
    intruder = line_like(lines[5], 1e6 * np.ones_like(lines[5].data))
    intruder.setFlag(flag)
    assert torch.equal(gathered(header, [*lines[:8], intruder, *lines[8:]]).kspace, expected)


def test_waveforms_are_left_aside(full):
    header, lines, _ = full
    assert bool((gathered(header, [ismrmrd.Waveform(), *lines]).counts == 1).all())


def test_reversed_lines_are_turned(full):
    header, lines, _ = full
    expected = gathered(header, lines).kspace
    turned = []
    for line in lines:
        flipped = line_like(line, line.data[:, ::-1], center_sample=line.number_of_samples - 1 - line.center_sample)
        flipped.setFlag(ismrmrd.ACQ_IS_REVERSE)
        turned.append(flipped)
    torch.testing.assert_close(gathered(header, turned).kspace, expected)


def test_discarded_samples_are_cut(full):
    header, lines, _ = full
    expected = gathered(header, lines).kspace
    padded = []
    for line in lines:
        data = np.pad(line.data, ((0, 0), (3, 5)), constant_values=1e6)
        padded.append(line_like(line, data, discard_pre=3, discard_post=5, center_sample=line.center_sample + 3))
    torch.testing.assert_close(gathered(header, padded).kspace, expected)


def test_asymmetric_echo_is_centred(full):
    header, lines, _ = full
    expected = gathered(header, lines).kspace
    early = [line_like(line, line.data[:, 4:], center_sample=line.center_sample - 4) for line in lines]
    difference = gathered(header, early).kspace - expected
    assert difference.norm() < 0.2 * expected.norm()
    zeroed = [line_like(line, np.where(np.arange(line.number_of_samples) < 4, 0, line.data)) for line in lines]
    torch.testing.assert_close(gathered(header, early).kspace, gathered(header, zeroed).kspace)


def test_oversampling_may_be_removed_before_us(full):
    header, lines, _ = full
    expected = gathered(header, lines).kspace
    removed = []
    for line in lines:
        image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(line.data, axes=1), axis=1), axes=1)[:, 6:18]
        data = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(image, axes=1), axis=1), axes=1)
        removed.append(line_like(line, data * 2**0.5, center_sample=6))
    torch.testing.assert_close(gathered(header, removed).kspace, expected, atol=1e-4, rtol=1e-4)


def test_oversampling_that_the_header_does_not_tell_of_is_assumed_and_said(full):
    header, lines, _ = full
    expected = gathered(header, lines).kspace
    silent = copy.deepcopy(header)
    space, recon = silent.encoding[0].encodedSpace, silent.encoding[0].reconSpace
    space.matrixSize.x, space.fieldOfView_mm.x = recon.matrixSize.x, recon.fieldOfView_mm.x
    scan = gathered(silent, lines)
    torch.testing.assert_close(scan.kspace, expected)
    said = f"{len(lines)} lines have 24 samples instead of the 12 in the header"
    assert f"{said}: 2-fold readout oversampling was assumed" in scan.warnings


def test_samples_beyond_the_matrix_are_cut_and_said(full):
    header, lines, _ = full
    longer = []
    for line in lines:
        data = np.pad(line.data, ((0, 0), (2, 2)), constant_values=1e6)
        longer.append(line_like(line, data, center_sample=line.center_sample + 2))
    scan = gathered(header, longer)
    torch.testing.assert_close(scan.kspace, gathered(header, lines).kspace)
    said = f"{len(lines)} lines have 28 samples instead of the 24 in the header: the outer ones were cut"
    assert said in scan.warnings


@pytest.mark.parametrize("before", [True, False])
def test_short_calibration_lines_of_an_oversampled_scan_have_less_resolution(full, before):
    """Half of an oversampled readout is as long as a whole one without oversampling.

    The image's lines tell which it is.
    """
    header, lines, _ = full
    header = copy.deepcopy(header)
    once = ismrmrd.xsd.accelerationFactorType(kspace_encoding_step_1=1, kspace_encoding_step_2=1)
    mode = ismrmrd.xsd.calibrationModeType("separate")
    parallel = ismrmrd.xsd.parallelImagingType(accelerationFactor=once, calibrationMode=mode)
    header.encoding[0].parallelImaging = parallel
    flag = 1 << (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION - 1)
    short = [line_like(line, line.data[:, 6:18], center_sample=line.center_sample - 6, flags=flag) for line in lines]
    zeroed = [line_like(line, np.pad(line.data[:, 6:18], ((0, 0), (6, 6))), flags=flag) for line in lines]
    scan = gathered(header, [*short, *lines] if before else [*lines, *short])
    torch.testing.assert_close(scan.calibration[0], gathered(header, [*zeroed, *lines]).calibration[0])
    assert scan.warnings == gathered(header, [*zeroed, *lines]).warnings


def test_a_strongly_asymmetric_echo_is_not_taken_for_removed_oversampling(full):
    """Half of the oversampled samples are as many as a line without oversampling has."""
    header, lines, _ = full
    late = [line_like(line, line.data[:, :12], center_sample=10) for line in lines]
    shifted = [line_like(line, np.pad(line.data[:, :12], ((0, 0), (2, 10)))) for line in lines]
    torch.testing.assert_close(gathered(header, late).kspace, gathered(header, shifted).kspace)


@pytest.mark.parametrize("removed, centre, told", [(True, 0, True), (True, 20, False), (False, 0, False)])
def test_lines_that_may_be_stretched_are_told(tmp_path, removed, centre, told):
    """Without oversampling and with the centre sample left at 0, they look like half echoes of an oversampled scan."""
    protocol = SimulateOptions(coils=2, pattern="full", noise_lines=0, snr=100)
    header, lines, _ = load_small_scan(tmp_path, protocol, (10, 13, 40))

    def cut(data):
        image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(data, 1), axis=1), 1)[:, 20:60]
        return np.fft.fftshift(np.fft.fft(np.fft.ifftshift(image, 1), axis=1), 1).astype(np.complex64)

    short = [line_like(line, cut(line.data) if removed else line.data[:, 40:], center_sample=centre) for line in lines]
    assert any("stretched along the readout" in w for w in gathered(header, short).warnings) is told


def test_a_line_without_its_echo_is_counted_and_told(full):
    header, lines, _ = full
    scan = gathered(header, [line_like(lines[0], center_sample=999), line_like(lines[1], discard_post=90), *lines[2:]])
    assert int(scan.counts.sum()) == len(lines) - 2
    said = "2 lines had a different number of channels or samples than most, no samples or no echo"
    assert any(w.startswith(said) for w in scan.warnings)


def test_a_first_line_without_samples_costs_no_more_than_itself(full):
    header, lines, _ = full
    empty = ismrmrd.Acquisition(line_like(lines[0]).getHead())
    empty.resize(0, lines[0].active_channels, 2)
    scan = gathered(header, [empty, *lines])
    assert torch.equal(scan.kspace, gathered(header, lines).kspace)
    assert any(w.startswith("1 line had a different number of channels or samples") for w in scan.warnings)


@pytest.mark.parametrize("matrix,samples", [(11, 22), (13, 13), (12, 15), (9, 24)])
def test_a_readout_is_the_centred_transform(matrix, samples):
    """Against the sum that defines it, for odd, even and unusual oversampling."""
    from gadgets.geometry import Geometry
    from gadgets.readout import Readout

    encoded, recon = (samples, 1, 1), (matrix, 1, 1)
    geometry = Geometry(encoded, encoded, recon, recon, (0, 0), ((0, 0), (0, 0)), matrix)
    data = np.random.default_rng(0).standard_normal((2, samples, 2)).astype(np.float32).view(np.complex64)[..., 0]
    row = np.zeros((2, matrix), np.complex64)
    Readout(geometry).add(data, samples // 2, row)
    k, x = np.arange(samples) - samples // 2, np.arange(matrix) - matrix // 2
    expected = data @ np.exp(2j * np.pi * np.outer(k, x) / samples) / samples**0.5
    np.testing.assert_allclose(row, expected, atol=1e-5)


def test_averages_are_summed_and_counted(full):
    header, lines, _ = full
    second = [line_like(line, average=1) for line in lines]
    scan = gathered(header, [*lines, *second])
    assert bool((scan.counts == 2).all())
    torch.testing.assert_close(scan.kspace, 2 * gathered(header, lines).kspace)


@pytest.mark.parametrize("counter", ["contrast", "set", "phase", "slice", "repetition"])
def test_volumes_are_kept_apart(full, counter):
    header, lines, _ = full
    others = [line_like(line, 2 * line.data, **{counter: 1}) for line in lines]
    first, second = gather(header, [*lines, *others])
    torch.testing.assert_close(second.kspace, 2 * first.kspace)
    assert getattr(second.head.idx, counter) == 1


def test_a_line_that_comes_after_its_volume_was_handed_out_is_told(full):
    header, lines, _ = full
    others = [line_like(line, repetition=1) for line in lines]
    first, second = gather(header, [*lines, *others, lines[3]])
    assert any("1 line of volumes that had already been reconstructed" in w for w in second.warnings)


def test_partial_fourier_lands_where_it_belongs(tmp_path, full):
    header, lines, _ = full
    expected = gathered(header, lines).kspace
    (tmp_path / "pf").mkdir()
    protocol = SimulateOptions(coils=2, pattern="full", snr=1e5, noise_lines=0, partial_fourier=(0.7, 0.6))
    pf_header, pf_lines, _ = load_small_scan(tmp_path / "pf", protocol)
    scan = gathered(pf_header, pf_lines)
    inside = scan.counts > 0
    assert inside.sum() == 6 * 9 and bool(inside[4:, 4:].all())
    torch.testing.assert_close(scan.kspace[:, inside], expected[:, inside], atol=2e-3, rtol=1e-2)


def test_header_nearest_the_centre_is_kept(full):
    header, lines, _ = full
    marked = []
    for line in lines:
        stamp = 1000 * line.idx.kspace_encode_step_2 + line.idx.kspace_encode_step_1
        marked.append(line_like(line, acquisition_time_stamp=stamp))
    assert gathered(header, marked).head.acquisition_time_stamp == 5006


def test_lines_that_do_not_fit_are_counted_and_told(full):
    header, lines, _ = full
    lost = line_like(lines[0], kspace_encode_step_1=900)
    odd = line_like(lines[0], lines[0].data[:1])
    scan = gathered(header, [*lines, lost, odd])
    assert bool((scan.counts == 1).all())
    assert any(w.startswith("1 line lay outside") for w in scan.warnings)
    assert any(w.startswith("1 line had a different number of channels or samples") for w in scan.warnings)


def removed(line):
    """A line whose 2-fold oversampling was removed."""
    image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(line.data, axes=1), axis=1), axes=1)[:, 6:18]
    data = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(image, axes=1), axis=1), axes=1)
    return line_like(line, data * 2**0.5, center_sample=6)


@pytest.mark.parametrize("upstream,samples", [(False, 48), (True, 24), (True, 14)])
@pytest.mark.parametrize("first", [True, False])
def test_a_line_of_another_length_does_not_decide_for_the_others(full, upstream, samples, first):
    """Oversampled lines and one of twice their samples; lines without oversampling and one that has it."""
    header, lines, _ = full
    lines = [removed(line) for line in lines] if upstream else lines
    odd = line_like(lines[20], 1e3 * np.ones((2, samples)), center_sample=samples // 2)
    stream = [odd, *lines] if first else [*lines[:40], odd, *lines[40:]]
    expected, scan = gathered(header, lines), gathered(header, stream)
    came = scan.counts > 0
    assert bool((scan.counts <= 1).all()) and int(scan.counts.sum()) >= len(lines) - 2 * first
    torch.testing.assert_close(scan.kspace[:, came], expected.kspace[:, came])
    left_out = 1 + len(lines) - int(scan.counts.sum())
    said = f"{left_out} line{'s' * (left_out > 1)} had a different number of channels or samples than most"
    assert said in scan.warnings[0]


def test_odd_lines_among_averages_do_not_outnumber_the_others(full):
    """Two averages, each good line followed by one of one coil at its place.

    And one short line in a contrast that has none.
    """
    header, lines, _ = full
    good = [line_like(line, average=average) for average in (0, 1) for line in lines]
    odd = [line_like(line, line.data[:1]) for line in good]
    scan = gathered(header, [line for pair in zip(good, odd) for line in pair])
    assert scan.kspace.shape[0] == 2 and bool((scan.counts == 2).all())
    assert scan.warnings[0].startswith(f"{len(good)} lines had a different number of channels")
    bare = [removed(line) for line in lines]
    short = [line_like(lines[n], lines[n].data[:, 6:18], contrast=1, center_sample=6) for n in (10, 20, 30)]
    long = [line_like(line, contrast=1) for line in lines]
    _, second = gather(header, [*bare, *bare, *long[:50], *short, *long[50:]])
    assert int((second.counts > 0).sum()) == len(lines)
    torch.testing.assert_close(second.kspace, gathered(header, lines).kspace)


def test_contrasts_have_readouts_of_their_own(full):
    """Twice the samples in one contrast change nothing in the other.

    Half of them are a lower resolution, also where they come first.
    """
    header, lines, _ = full
    long = [line_like(line, np.repeat(line.data, 2, axis=1), contrast=1, center_sample=24) for line in lines]
    scans = list(gather(header, [line for pair in zip(long, lines) for line in pair]))
    torch.testing.assert_close(scans[0].kspace, gathered(header, lines).kspace)
    assert scans[0].warnings == [] and "2-fold readout oversampling was assumed" in scans[1].warnings[0]
    short = [line_like(line, line.data[:, 6:18], contrast=1, center_sample=6) for line in lines]
    padded = [line_like(line, np.pad(line.data[:, 6:18], ((0, 0), (6, 6)))) for line in lines]
    mixed = [line for pair in zip(lines, short) for line in pair]
    for scans in (list(gather(header, stream)) for stream in ([*lines, *short], mixed)):
        torch.testing.assert_close(scans[1].kspace, gathered(header, padded).kspace)
        assert "at a lower resolution" in scans[1].warnings[0] and scans[0].warnings == []
    early = list(gather(header, [*short, *lines]))
    assert "assumed to be removed already" in early[1].warnings[0] and early[0].warnings == []


def test_a_volume_taken_for_short_lines_keeps_them(full):
    """Most contrasts turn out to be as long as without oversampling only once many lines of the first of them came."""
    header, lines, _ = full
    short = []
    for contrast in (1, 2, 3):
        short.append([line_like(line, line.data[:, 6:18], contrast=contrast, center_sample=6) for line in lines])
    scans = list(gather(header, [*lines, *short[0], *(line for pair in zip(*short[1:]) for line in pair)]))
    assert all(bool((scan.counts == 1).all()) for scan in scans[:2])
    assert sum(int(scan.counts.sum()) for scan in scans) >= 4 * len(lines) - 2 * 18
    told = [any("too short for the readout oversampling" in warning for warning in scan.warnings) for scan in scans]
    assert told == [False, True, True, True]


def test_lines_shorter_than_without_oversampling_are_told(full):
    header, lines, _ = full
    scan = gathered(header, [line_like(line, line.data[:, 8:16], center_sample=4) for line in lines])
    said = f"{len(lines)} lines have 8 samples instead of the 24 in the header"
    assert scan.warnings == [f"{said}: oversampling was assumed to be removed already"]


def test_discarded_samples_show_that_the_oversampling_is_there(full):
    """Half of each line is discarded: what is left is as long as a line without oversampling."""
    header, lines, _ = full
    cut = [line_like(line, discard_pre=6, discard_post=6) for line in lines]
    zeroed = [line_like(line, np.pad(line.data[:, 6:18], ((0, 0), (6, 6)))) for line in lines]
    torch.testing.assert_close(gathered(header, cut).kspace, gathered(header, zeroed).kspace)


def test_noise_lines_without_a_flag_do_not_decide(full):
    header, lines, _ = full
    noise = [line_like(lines[0], 1e3 * np.ones((2, 100)), center_sample=50) for _ in range(16)]
    scan = gathered(header, [*noise, *lines])
    assert int(scan.counts.sum()) >= len(lines) - 1
    assert scan.warnings[0].startswith("17 lines had a different number of channels or samples")


def test_first_lines_of_other_coils_do_not_decide(full):
    """A body coil's line before those of the array: the majority counts, one line of theirs is lost on the way."""
    header, lines, _ = full
    scan = gathered(header, [line_like(lines[0], lines[0].data[:1]), *lines])
    assert scan.kspace.shape[0] == 2 and int(scan.counts.sum()) == len(lines) - 1
    assert any(w.startswith("2 lines had a different number of channels or samples") for w in scan.warnings)
    odd = gathered(header, [*lines[:40], *(line_like(line, line.data[:1]) for line in lines[:39]), *lines[40:]])
    assert odd.kspace.shape[0] == 2 and int(odd.counts.sum()) == len(lines)


def test_aborted_scan_is_recognised(full):
    header, lines, _ = full
    scan = gathered(header, lines[: len(lines) * 6 // 10])
    assert any("incomplete" in w for w in scan.warnings)


def test_lines_that_come_twice_are_averaged_and_told(full):
    header, lines, _ = full
    scan = gathered(header, [*lines, *lines[:7]])
    assert any(w.startswith("7 lines came more than once") for w in scan.warnings)
    torch.testing.assert_close(scan.kspace / scan.counts[None, :, :, None], gathered(header, lines).kspace)


def test_missing_limits_are_assumed_and_said(full):
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].encodingLimits.kspace_encoding_step_1 = None
    scan = gathered(header, lines)
    assert bool((scan.counts == 1).all())
    assert any("no limits for kspace_encoding_step_1" in w for w in scan.warnings)


def test_centre_outside_its_limits_is_corrected_and_said(full):
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].encodingLimits.kspace_encoding_step_2.center = 77
    scan = gathered(header, lines)
    assert bool((scan.counts == 1).all())
    assert any("centre 77" in w for w in scan.warnings)


@pytest.mark.parametrize("low,high,centre,assumed", [(0, 12, 0, 6), (0, 12, 12, 6), (0, 8, 0, 2), (4, 12, 12, 10)])
def test_a_centre_that_would_lose_many_lines_is_moved_and_said(full, low, high, centre, assumed):
    """All 13 steps fit in one way only; of fewer the nearest centre is taken with which they fit."""
    header = copy.deepcopy(full[0])
    limits = ismrmrd.xsd.limitType(minimum=low, maximum=high, center=centre)
    header.encoding[0].encodingLimits.kspace_encoding_step_1 = limits
    geometry = read_geometry(header)
    assert geometry.centre[0] == assumed and geometry.limits[0] == (low, high)
    assert f"centre {centre} of kspace_encoding_step_1 would put" in geometry.warnings[0]
    assert f": {assumed} assumed" in geometry.warnings[0]


@pytest.mark.parametrize("repetitions", [1, 2])
@pytest.mark.parametrize("apart", [False, True])
def test_a_centre_that_cannot_be_is_found_out_by_the_lines(full, repetitions, apart):
    """The header says 2 of 0 to 12, and all of them come.

    The calibration, which repetitions share, is moved as the image is.
    """
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].parallelImaging = None
    wrong = copy.deepcopy(header)
    wrong.encoding[0].encodingLimits.kspace_encoding_step_1 = ismrmrd.xsd.limitType(minimum=0, maximum=12, center=2)
    wrong.encoding[0].encodingLimits.kspace_encoding_step_2.center = 8
    bit = 1 << (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION - 1)
    square = [line_like(line, flags=bit) for line in lines if 3 <= line.idx.kspace_encode_step_1 < 10] if apart else []
    items = [*square, *(line_like(line, repetition=r, flags=0) for r in range(repetitions) for line in lines)]
    held: list[list[int]] = [[], []]
    right = list(gather(header, items, lambda coils, volumes: held[0].append(volumes)))
    turned = list(gather(wrong, items, lambda coils, volumes: held[1].append(volumes)))
    assert len(right) == len(turned) == repetitions and held[0] == held[1]
    for a, b in zip(right, turned):
        assert torch.equal(a.kspace, b.kspace) and torch.equal(a.counts, b.counts)
        assert a.geometry.centre == b.geometry.centre and bytes(a.head) == bytes(b.head)
        assert a.head.idx.kspace_encode_step_1 == 6 and a.head.idx.kspace_encode_step_2 == 5
        assert (a.calibration is None) == (b.calibration is None) == (not apart)
        assert not apart or all(torch.equal(x, y) for x, y in zip(a.calibration, b.calibration))
        said = [w for w in b.warnings if w not in a.warnings]
        assert sorted(w.split(": ")[-1] for w in said) == ["5 assumed", "6 assumed"], said


@pytest.mark.parametrize("flagged", [True, False])
def test_a_centre_that_was_found_out_ends_repetitions_as_a_right_one_does(tmp_path, flagged):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=1, pattern="full", noise_lines=0), (16, 20, 8))
    last_flag = 1 << (ismrmrd.ACQ_LAST_IN_REPETITION - 1)
    items = []
    for repetition in range(6):
        for line in lines:
            flags = last_flag if flagged and line is lines[-1] else 0
            items.append(line_like(line, repetition=repetition, flags=flags))
    wrong = copy.deepcopy(header)
    wrong.encoding[0].encodingLimits.kspace_encoding_step_1.center = 3
    counted: list[list[int]] = [[], []]
    right = [scan.kspace for scan in gather(header, items, lambda coils, volumes: counted[0].append(volumes))]
    moved = [scan.kspace for scan in gather(wrong, items, lambda coils, volumes: counted[1].append(volumes))]
    assert all(torch.equal(a, b) for a, b in zip(right, moved, strict=True)) and counted[0] == counted[1]


def test_strays_do_not_move_the_centre(tmp_path):
    """Two lines at steps that partial Fourier leaves out.

    Nor do lines that are not even announced, or have other channels.
    """
    protocol = SimulateOptions(coils=2, pattern="full", noise_lines=0, partial_fourier=(0.7, 1))
    header, lines, _ = load_small_scan(tmp_path, protocol)
    limit, size = header.encoding[0].encodingLimits.kspace_encoding_step_1, header.encoding[0].encodedSpace.matrixSize.y
    expected = gathered(header, lines)
    limit.maximum = size - 1
    strays = [line_like(lines[0], kspace_encode_step_1=size - 1), line_like(lines[0], kspace_encode_step_1=size - 2)]
    strays += [line_like(lines[0], lines[0].data[:1], kspace_encode_step_1=size - 1) for _ in range(9)]
    strays += [line_like(lines[0], kspace_encode_step_1=size + 1) for _ in range(5)]
    scan = gathered(header, [*lines[:7], *strays, *lines[7:]])
    assert torch.equal(scan.kspace, expected.kspace) and scan.geometry.centre == expected.geometry.centre
    said = " ".join(scan.warnings)
    assert "2 lines lay outside" in said and "5 lines lay outside" in said
    assert "9 lines had a different number of channels" in said


@pytest.mark.parametrize("repetitions", [1, 3])
def test_partial_fourier_with_the_limits_of_the_whole_matrix_keeps_its_centre(tmp_path, repetitions):
    """Steps 0 to 8 came, k = 0 at 2: the centre is right, the announced maximum of 12 is that of the matrix."""
    sampling = dict(pattern="full", partial_fourier=(0.7, 1), repetitions=repetitions)
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, noise_lines=0, **sampling))
    limit = header.encoding[0].encodingLimits.kspace_encoding_step_1
    nominal = copy.deepcopy(header)
    size = header.encoding[0].encodedSpace.matrixSize.y
    assert 0 < limit.center < size // 2 - size // 10 and limit.maximum < size - 1
    nominal.encoding[0].encodingLimits.kspace_encoding_step_1.maximum = size - 1
    for a, b in zip(gather(header, lines), gather(nominal, lines), strict=True):
        assert torch.equal(a.kspace, b.kspace) and torch.equal(a.counts, b.counts)
        assert a.geometry.limits == b.geometry.limits
        (said,) = [w for w in b.warnings if w not in a.warnings]
        assert said.startswith(f"the header's centre {limit.center} of kspace_encoding_step_1 would put")
        assert said.endswith("it was kept, as those did not come")


def test_limits_beyond_the_matrix_are_not_taken_for_lines_that_never_came(full):
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].encodingLimits.kspace_encoding_step_1.maximum = 65535
    scan = gathered(header, lines)
    assert len(scan.warnings) == 1 and "exceed its matrix 13" in scan.warnings[0]


def test_a_centre_sample_that_nobody_wrote_is_assumed_and_said(full):
    header, lines, _ = full
    expected = gathered(header, lines).kspace
    scan = gathered(header, [line_like(line, center_sample=0) for line in lines])
    assert torch.equal(scan.kspace, expected)
    said = "130 lines had a centre sample that would put others outside k-space: the middle was assumed"
    assert scan.warnings == [said]
    half = gathered(header, [line_like(line, line.data[:, 12:], center_sample=0) for line in lines])
    assert half.warnings == [] and not torch.equal(half.kspace, expected)


def test_calibration_lines_that_are_the_images_centre_serve_both(full):
    """No calibration mode in the header, and lines flagged for calibration alone: the image would have a hole."""
    header, lines, _ = full
    expected = gathered(header, lines).kspace
    header = copy.deepcopy(header)
    header.encoding[0].parallelImaging = None
    bit = 1 << (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION - 1)
    marked = [line_like(line, flags=bit if 3 <= line.idx.kspace_encode_step_1 < 10 else 0) for line in lines]
    scan = gathered(header, marked)
    torch.testing.assert_close(scan.kspace, expected)
    assert bool((scan.counts == 1).all())
    assert scan.warnings[0].startswith("the calibration lines are used for the image too")
    apart = gathered(header, [*[line for line in marked if line.flags], *(line_like(line, flags=0) for line in lines)])
    torch.testing.assert_close(apart.kspace, expected)
    assert not apart.warnings and bool((apart.counts == 1).all())


def test_many_averages_are_not_taken_for_lines_that_came_twice(full):
    header, lines, _ = full
    scan = gathered(header, [line_like(line, average=n, flags=0) for n in range(66) for line in lines[:13]])
    assert int(scan.counts.max()) == 66 and not [w for w in scan.warnings if "more than once" in w]


@pytest.mark.parametrize(
    "low,high,centre,message",
    [
        (0, 30, 6, "limits 0 to 30 of kspace_encoding_step_1 with centre 6 exceed its matrix 13"),
        (9, 3, 6, "limits of kspace_encoding_step_1 run from 9 to 3"),
    ],
)
def test_impossible_limits_are_said(full, low, high, centre, message):
    header, lines, _ = full
    header = copy.deepcopy(header)
    limits = ismrmrd.xsd.limitType(minimum=low, maximum=high, center=centre)
    header.encoding[0].encodingLimits.kspace_encoding_step_1 = limits
    scan = gathered(header, lines)
    assert bool((scan.counts == 1).all())
    assert any(message in w for w in scan.warnings)


def test_noise_is_scaled_to_the_dwell_time(tmp_path):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=4))
    expected = gathered(header, lines).noise
    for line in lines:
        if line.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT):
            line.sample_time_us *= 4
    torch.testing.assert_close(gathered(header, lines).noise, 2 * expected)


def test_each_noise_line_is_scaled_by_its_own_dwell_time(tmp_path):
    """Lines of dwell 5, 20, 1.25 and 5 us, each as strong as its own says, are the noise of one scan of 5 us."""
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=4))
    expected = gathered(header, lines).noise
    assert torch.equal(expected, torch.from_numpy(np.concatenate([line.data for line in lines[:4]], axis=1)))
    # 0: not told, taken for the first one's
    for dwells in ((5.0, 20.0, 1.25, 5.0), (20.0, 5.0, 5.0, 1.25), (1.25, 0.0, 5.0, 20.0)):
        told = [dwell or dwells[0] for dwell in dwells]
        noise = []
        for line, t, dwell in zip(lines, told, dwells):
            noise.append(line_like(line, line.data * (5.0 / t) ** 0.5, sample_time_us=dwell))
        torch.testing.assert_close(gathered(header, [*noise, *lines[4:]]).noise, expected)


def test_noise_is_scaled_to_the_receivers_noise_bandwidth(tmp_path):
    """White noise, of which the noise scan saw 0.64 of the power: the image's noise is 1/0.8 as strong."""
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=4))
    expected = gathered(header, lines).noise
    header.acquisitionSystemInformation.relativeReceiverNoiseBandwidth = 0.64
    torch.testing.assert_close(gathered(header, lines).noise, expected / 0.8)


def test_gathered_noise_is_as_strong_as_the_noise_lines_say(tmp_path):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=64, snr=0.01))
    scan = gathered(header, lines)
    ratio = scan.kspace.abs().square().mean((1, 2, 3)) / scan.noise.abs().square().mean(1)
    torch.testing.assert_close(ratio, torch.ones(2), atol=0.1, rtol=0)


def test_noise_lines_serve_the_volumes_after_them(tmp_path):
    """Louder ones before the second repetition change nothing in the first.

    The same ones again change nothing at all; where none came in time, all are used.
    """
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=8, snr=50))
    noise, lines = lines[:8], lines[8:]
    louder = [line_like(line, 2 * line.data) for line in noise]
    again = [line_like(line, repetition=1) for line in lines]
    expected = gathered(header, [*noise, *lines]).noise
    first, second = gather(header, [*noise, *lines, *louder, *again])
    assert torch.equal(first.noise, expected) and torch.equal(second.noise, 2 * expected)
    assert not [w for w in first.warnings if "noise" in w]
    assert [w for w in second.warnings if w.startswith("the noise lines before this volume are 2 times as loud")]
    gain = [line_like(line, 2 * line.data) for line in again]
    options = make_options({"method": "cg", "device": "cpu", "output": "float32"})
    a, b = reconstruct(header, [*noise, *lines, *louder, *gain], None, options)
    np.testing.assert_allclose(a.data, b.data, rtol=0, atol=1e-4 * a.data.max())  # the receivers' gain
    other = [line_like(line, 1.1 * line.data[:, ::-1]) for line in noise]
    for items in ([*noise, *lines, *other, *again], [*lines, *noise, *again]):
        for scan in gather(header, items):
            assert torch.equal(scan.noise, expected) and scan.gain == 1 and scan.warnings == []


def test_noise_of_other_coils_is_not_used_and_said(tmp_path):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=4))
    lines = [line_like(line, line.data[:1]) if line.flags & NOISE_BIT else line for line in lines]
    scan = gathered(header, lines)
    assert scan.noise is None
    assert "the noise lines have 1 channels instead of the scan's 2: they were not used" in scan.warnings


def test_too_few_noise_samples_are_not_used_and_said(tmp_path):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=1))
    scan = gathered(header, [line_like(lines[0], lines[0].data[:, :7]), *lines[1:]])
    assert scan.noise is None
    assert "the noise lines have 7 samples for 2 channels, too few: they were not used" in scan.warnings


def test_memory_is_one_array(tmp_path):
    """Lines are written as they arrive: 1.3 times the k-space at most, whatever the oversampling."""
    import tracemalloc

    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=8, pattern="full", noise_lines=2), (40, 44, 36))
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    scan = gathered(header, lines)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak <= 1.3 * scan.kspace.numel() * 8


@pytest.mark.parametrize(
    "changes,said",
    [
        (
            {"center_sample": 500},
            "130 lines had a different number of channels or samples than most, no samples or no echo",
        ),
        ({"kspace_encode_step_2": 900}, "130 lines lay outside the encoded matrix"),
        ({"discard_pre": 500}, "130 lines had a different number"),
    ],
)
def test_a_volume_none_of_whose_lines_can_be_used_is_told(full, changes, said):
    header, lines, _ = full
    images, lost = [], [line_like(line, contrast=1, **changes) for line in lines]
    with pytest.raises(ReconError, match=rf"volume 2 \(contrast 1\): none of its lines could be used; {said}"):
        for image in reconstruct(header, [*lines, *lost], None, make_options({"method": "cg", "device": "cpu"})):
            images.append(image.contrast)
    assert images == [0]
    with pytest.raises(ReconError, match=f"^none of its lines could be used; {said}"):
        list(reconstruct(header, lost, None, make_options({"method": "cg", "device": "cpu"})))


@pytest.mark.parametrize("counter", ["contrast", "repetition", "average"])
def test_a_line_without_channels_takes_no_volume_with_it(full, counter):
    header, lines, _ = full
    empty = line_like(lines[0], np.zeros((0, 24)), **{counter: 1})
    scan = gathered(header, [*lines, empty])
    assert bool((scan.counts == 1).all()) and "1 line without channels was left out" in scan.warnings
    with pytest.raises(ScanError, match=r"no imaging line \(3 lines without channels came\)"):
        list(gather(header, [empty] * 3))


def test_what_noise_lines_discard_is_no_noise(tmp_path):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=4))
    plain = gathered(header, lines).noise

    def padded(line):
        data = np.pad(line.data, ((0, 0), (7, 5)), constant_values=1e6)
        return line_like(line, data, discard_pre=7, discard_post=5)

    lines = [padded(line) if line.flags & NOISE_BIT else line for line in lines]
    torch.testing.assert_close(gathered(header, lines).noise, plain)


@pytest.mark.parametrize("dwell", [0.0, float("nan"), float("inf")])
def test_a_dwell_time_that_makes_no_sense_is_no_dwell_time(tmp_path, dwell):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=4))
    plain, scan = gathered(header, lines), gathered(header, [line_like(line, sample_time_us=dwell) for line in lines])
    assert torch.isfinite(torch.view_as_real(scan.noise)).all() and scan.gain == plain.gain == 1


@pytest.mark.parametrize("useless", [False, True])
def test_contrasts_of_another_dwell_time_keep_their_brightness(tmp_path, useless):
    """The same samples, said to be read half as fast, are less noisy, not brighter; also with useless noise lines."""
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", snr=50, noise_lines=8))
    lines = [line_like(line, 0 * line.data) if useless and line.flags & NOISE_BIT else line for line in lines]
    imaging = [line for line in lines if not line.flags & NOISE_BIT]
    slow = [line_like(line, contrast=1, sample_time_us=2 * line.sample_time_us) for line in imaging]
    options = make_options({"method": "cg", "device": "cpu", "output": "float32"})
    first, second = reconstruct(header, [*lines, *slow], None, options)
    bright = first.data > 0.5 * first.data.max()
    assert second.data[bright].mean() == pytest.approx(first.data[bright].mean(), rel=0.02)


def test_nothing_to_reconstruct_is_an_error(full):
    header, _, _ = full
    with pytest.raises(ScanError, match="no imaging line"):
        list(gather(header, []))


def test_lines_of_other_encodings_alone_are_counted_and_named(full):
    header, lines, _ = full
    navigator = line_like(lines[0], flags=1 << (ismrmrd.ACQ_IS_NAVIGATION_DATA - 1))
    calibration = 1 << (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION - 1)
    others = [line_like(line, encoding_space_ref=1) for line in lines[:70]]
    others += [line_like(line, encoding_space_ref=2, flags=calibration) for line in lines[70:79]]
    with pytest.raises(ScanError) as refused:
        list(gather(header, [navigator, *others]))
    assert str(refused.value) == (
        "the scan holds no imaging line (70 lines of encoding space 1, 9 lines of encoding space 2, "
        "1 other line came): nothing to reconstruct"
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda e: setattr(e.encodedSpace.matrixSize, "y", 0), "matrix of at least 1"),
        (lambda e: setattr(e.reconSpace.fieldOfView_mm, "x", 0.0), "positive, finite field of view"),
        (lambda e: setattr(e, "trajectory", ismrmrd.xsd.trajectoryType.RADIAL), "cartesian"),
        (lambda e: setattr(e, "reconSpace", None), "lacks"),
    ],
)
def test_impossible_headers_are_refused(full, change, message):
    header = copy.deepcopy(full[0])
    change(header.encoding[0])
    with pytest.raises(ScanError, match=message):
        read_geometry(header)


def test_absurd_matrices_do_not_allocate(full):
    header, lines, _ = full
    header = copy.deepcopy(header)
    header.encoding[0].encodedSpace.matrixSize.y = header.encoding[0].encodedSpace.matrixSize.z = 60000
    with pytest.raises(ScanError, match="limit is"):
        list(gather(header, lines))


def test_single_line_scan_gives_an_image_or_a_sentence(full):
    header, lines, folder = full
    scan = gathered(header, lines[:1])
    assert any("incomplete" in w for w in scan.warnings)


def test_chain_reconstructs_the_object(full):
    import nibabel

    _, _, folder = full
    (image,) = run_chain(folder / "scan.h5", None, method="cg", output="float32")
    reference = np.asarray(nibabel.load(folder / "reference.nii.gz").dataobj).T
    pixels = image.data[0]
    pixels = pixels * (pixels * reference).sum() / (pixels * pixels).sum()
    inside = reference > 0.2 * reference.max()
    assert np.abs(pixels - reference)[inside].max() < 0.05 * reference.max()
