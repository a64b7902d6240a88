"""Lines and headers that do not belong together, as converters write them: partitions counted as slices, EPI, another matrix, another encoding."""

import copy

import ismrmrd
import numpy as np
import pytest
import torch
from conftest import gathered, line_like, load_small_scan

from gadgets.flags import CALIBRATION_BIT, LAST_BIT, NOISE_BIT, REVERSE_BIT
from gadgets.gather import gather
from gadgets.geometry import ScanError
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
    limits.kspace_encoding_step_2, limits.slice = (last and kind(minimum=last[0], maximum=last[1], center=last[2]) for last in (step_2, slices))
    return header


@pytest.mark.parametrize("step_2, slices, step_of", [
    ((0, 0, 0), (0, 9, 0), lambda slice_: 0), (None, (0, 9, 0), lambda slice_: 0), ((0, 9, 5), (0, 9, 0), lambda slice_: slice_), ((0, 9, 5), None, lambda slice_: slice_),
])  # fmt: skip
def test_partitions_counted_as_slices_are_one_volume(scan, step_2, slices, step_of):
    header, lines = scan
    header = limited(header, step_2, slices)
    counted = [line_like(line, slice=line.idx.kspace_encode_step_2, kspace_encode_step_2=step_of(line.idx.kspace_encode_step_2)) for line in lines]
    before = [bytes(line.getHead()) for line in counted]
    found = gathered(header, counted)
    assert torch.equal(found.kspace, gathered(*scan).kspace)
    assert "the slice counter runs over the 10 partitions of the matrix: taken for kspace_encode_step_2" in found.warnings
    assert not [w for w in found.warnings if "incomplete" in w] and [bytes(line.getHead()) for line in counted] == before


def test_slabs_stay_slabs(scan):
    header, lines = scan
    slabs = [*lines, *(line_like(line, slice=1) for line in lines if not line.flags & NOISE_BIT)]
    assert [torch.equal(one.kspace, gathered(*scan).kspace) for one in gather(limited(header, (0, 9, 5), (0, 1, 0)), slabs)] == [True, True]


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
    strange = [line_like(line, slice=line.idx.kspace_encode_step_2, kspace_encode_step_2=3) for line in lines if line.idx.kspace_encode_step_2 < 4]
    with pytest.raises(ValueError, match="each of the 4 slices has one of the matrix' 10 partitions"):
        list(reconstruct(header, strange, None, CG))


def test_lines_of_another_header_are_refused(scan):
    header, lines = copy.deepcopy(scan[0]), scan[1]
    header.encoding[0].encodedSpace.matrixSize.z = header.encoding[0].reconSpace.matrixSize.z = 1
    with pytest.raises(ValueError, match="117 lines lay outside the encoded matrix and only 13 inside: the header does not belong to these lines"):
        list(reconstruct(header, lines, None, CG))


def test_lines_of_both_directions_are_told(scan):
    header, lines = scan
    epi = [line_like(line, line.data[:, ::-1], center_sample=line.number_of_samples - 1 - line.center_sample, flags=line.flags | REVERSE_BIT) if line.idx.kspace_encode_step_1 % 2 else line for line in lines]
    assert [w for w in gathered(header, epi).warnings if "CAUTION: this image is made from lines of both readout directions" in w]


def test_an_image_in_another_encoding_is_told(scan):
    header, lines = copy.deepcopy(scan[0]), scan[1]
    header.encoding.append(copy.deepcopy(header.encoding[0]))
    other = [line_like(line, encoding_space_ref=1) for line in lines if not line.flags & NOISE_BIT]
    assert "CAUTION: only 60 lines belong to the first encoding space, from which the image is made: does it belong to another one?" in gathered(header, [*lines[:64], *other]).warnings
    with pytest.raises(ScanError, match="130 lines of encoding space 1"):
        list(gather(header, other))


@pytest.mark.parametrize("flags", [0, CALIBRATION_BIT])
def test_external_calibration_needs_no_flag(tmp_path, flags):
    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, calibration="external", acs=8))
    again = [line_like(line, flags=line.flags & LAST_BIT | flags) if line.encoding_space_ref else line for line in lines]
    found, expected = gathered(header, again), gathered(header, lines)
    assert all(torch.equal(a, b) for a, b in zip(found.calibration, expected.calibration)) and found.warnings == expected.warnings


def test_lines_with_half_the_resolution_of_the_header_are_told(scan):
    """As long as lines without oversampling are: only that the object is too narrow tells."""
    header, lines = scan
    coarse = [line if line.flags & NOISE_BIT else line_like(line, line.data[:, 6:18], center_sample=6) for line in lines]
    narrow = [w for w in gathered(header, coarse).warnings if "if it looks too narrow" in w]
    wide = [line if line.flags & NOISE_BIT else line_like(line, np.fft.fft(np.random.default_rng(0).standard_normal((2, 12))) + 0j, center_sample=6) for line in lines]
    assert len(narrow) == 1 and not [w for w in gathered(header, wide).warnings if "if it looks too narrow" in w]
