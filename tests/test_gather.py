"""Acquisitions to k-space: every flag and header that a scanner may send."""

import copy

import ismrmrd
import numpy as np
import pytest
import torch
from conftest import run_chain, small_object

from gadgets.files import ScanFile
from gadgets.gather import ScanError, gather, read_geometry
from gadgets.header import parse_header
from gadgets.simulate import SimulateOptions, simulate


@pytest.fixture
def full(tmp_path):
    """(header, acquisitions, path) of a fully sampled, nearly noiseless scan without noise lines."""
    return load(tmp_path, SimulateOptions(coils=2, pattern="full", snr=1e5, noise_lines=0))


def load(folder, options):
    np.save(folder / "object.npy", small_object((10, 13, 12)))
    simulate(folder / "object.npy", folder / "scan.h5", options, folder / "reference.nii.gz")
    with ScanFile(folder / "scan.h5") as scan:
        return parse_header(scan.header_xml), list(scan.acquisitions()), folder


def gathered(header, lines):
    (scan,) = gather(header, lines)
    return scan


def line_like(line, data=None, **changes):
    head = ismrmrd.AcquisitionHeader.from_buffer_copy(bytes(line.getHead()))
    data = line.data if data is None else data
    head.active_channels, head.number_of_samples = data.shape
    out = ismrmrd.Acquisition(head, np.array(data, np.complex64))
    for name, value in changes.items():
        setattr(out.idx if hasattr(out.idx, name) and name not in ("flags",) else out, name, value)
    return out


def test_full_scan_is_complete_and_clean(full):
    header, lines, _ = full
    scan = gathered(header, lines)
    assert scan.kspace.shape == (2, 10, 13, 12)
    assert bool((scan.counts == 1).all())
    assert scan.warnings == []


@pytest.mark.parametrize("flag", [
    ismrmrd.ACQ_IS_NAVIGATION_DATA, ismrmrd.ACQ_IS_PHASECORR_DATA, ismrmrd.ACQ_IS_DUMMYSCAN_DATA, ismrmrd.ACQ_IS_HPFEEDBACK_DATA,
    ismrmrd.ACQ_IS_RTFEEDBACK_DATA, ismrmrd.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA, ismrmrd.ACQ_IS_NOISE_MEASUREMENT,
])  # fmt: skip
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


def test_a_repetition_is_handed_out_before_the_next_ends(tmp_path):
    header, lines, _ = load(tmp_path, SimulateOptions(coils=1, pattern="full", repetitions=2, noise_lines=0))
    consumed = []
    scans = gather(header, (consumed.append(1) or line for line in lines))
    next(scans)
    assert len(consumed) == len(lines) // 2 + 1


def test_partial_fourier_lands_where_it_belongs(tmp_path, full):
    header, lines, _ = full
    expected = gathered(header, lines).kspace
    (tmp_path / "pf").mkdir()
    pf_header, pf_lines, _ = load(tmp_path / "pf", SimulateOptions(coils=2, pattern="full", snr=1e5, noise_lines=0, partial_fourier=(0.7, 0.6)))
    scan = gathered(pf_header, pf_lines)
    inside = scan.counts > 0
    assert inside.sum() == 6 * 9 and bool(inside[4:, 4:].all())
    torch.testing.assert_close(scan.kspace[:, inside], expected[:, inside], atol=2e-3, rtol=1e-2)


def test_header_nearest_the_centre_is_kept(full):
    header, lines, _ = full
    marked = [line_like(line, acquisition_time_stamp=1000 * line.idx.kspace_encode_step_2 + line.idx.kspace_encode_step_1) for line in lines]
    assert gathered(header, marked).head.acquisition_time_stamp == 5006


def test_lines_that_do_not_fit_are_counted_and_told(full):
    header, lines, _ = full
    lost = line_like(lines[0], kspace_encode_step_1=900)
    odd = line_like(lines[0], lines[0].data[:1])
    scan = gathered(header, [*lines, lost, odd])
    assert bool((scan.counts == 1).all())
    assert any(w.startswith("1 lines lay outside") for w in scan.warnings)
    assert any(w.startswith("1 lines had another number of channels") for w in scan.warnings)


def test_aborted_scan_is_recognised(full):
    header, lines, _ = full
    scan = gathered(header, lines[: len(lines) * 6 // 10])
    assert any("incomplete" in w for w in scan.warnings)


def test_separate_calibration_lines_stay_out_of_the_image(full):
    header, lines, _ = full
    calibration = []
    for line in lines[40:60]:
        extra = line_like(line)
        extra.setFlag(ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
        calibration.append(extra)
    scan = gathered(header, [*calibration, *lines])
    assert bool((scan.counts == 1).all())
    assert int(scan.calibration[1].sum()) == 20


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


def test_noise_is_scaled_to_the_dwell_time(tmp_path):
    header, lines, _ = load(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=4))
    expected = gathered(header, lines).noise
    for line in lines:
        if line.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT):
            line.sample_time_us *= 4
    torch.testing.assert_close(gathered(header, lines).noise, 2 * expected)


def test_nothing_to_reconstruct_is_an_error(full):
    header, _, _ = full
    with pytest.raises(ScanError, match="no imaging line"):
        list(gather(header, []))


@pytest.mark.parametrize("change,message", [
    (lambda e: setattr(e.encodedSpace.matrixSize, "y", 0), "matrix of at least 1"),
    (lambda e: setattr(e.reconSpace.fieldOfView_mm, "x", 0.0), "positive field of view"),
    (lambda e: setattr(e, "trajectory", ismrmrd.xsd.trajectoryType.RADIAL), "cartesian"),
    (lambda e: setattr(e, "reconSpace", None), "lacks"),
])  # fmt: skip
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
