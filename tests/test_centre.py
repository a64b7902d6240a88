"""Where k = 0 lies by the lines themselves, against what header and lines say of it."""

import copy

import numpy as np
import pytest
import torch
from conftest import gathered, line_like, load_small_scan

from gadgets.centre import centre_offset, echo_offset
from gadgets.flags import NOISE_BIT
from gadgets.gather import gather
from gadgets.options import make_options
from gadgets.recon import reconstruct
from gadgets.simulation.scan import SimulateOptions

SHAPE = (26, 36, 32)


def scan_of(folder, **options):
    """Header and lines of a scan of the phantom."""
    protocol = SimulateOptions(**{"coils": 3, "pattern": "full", "noise_lines": 4, **options})
    return load_small_scan(folder, protocol, SHAPE)[:2]


def misplaced(header, steps=("kspace_encoding_step_1", "kspace_encoding_step_2")):
    """The header with the middle of its limits for their centre, as converters write that do not know it."""
    header = copy.deepcopy(header)
    for name in steps:
        limit = getattr(header.encoding[0].encodingLimits, name)
        limit.center = (limit.maximum + 1) // 2
    return header


def similar(scan, other, sign=1):
    """Whether k-space is the same up to rounding."""
    difference = float((scan.kspace - sign * other.kspace).norm())
    return bool((scan.counts == other.counts).all()) and difference < 1e-5 * float(other.kspace.norm())


@pytest.mark.parametrize(
    "options",
    [{}, {"pattern": "regular", "acceleration": 4, "acs": 10}, {"repetitions": 2}, {"contrasts": 2}],
)
def test_partial_fourier_whose_centre_is_the_middle_of_what_came(tmp_path, options):
    header, lines = scan_of(tmp_path, partial_fourier=(0.6, 0.6), **options)
    right, moved = (list(gather(head, lines)) for head in (header, misplaced(header)))
    assert len(right) == len(moved) and all(similar(*pair) for pair in zip(moved, right))
    said = [w for w in moved[0].warnings if w not in right[0].warnings]
    assert len(said) == 2 and all("lines before the header's centre" in w for w in said), said


def test_calibration_moves_with_the_image(tmp_path):
    sampling = dict(pattern="poisson", acceleration=3, acs=10, calibration="separate")
    header, lines = scan_of(tmp_path, partial_fourier=(0.6, 0.6), **sampling)
    right, moved = gathered(header, lines), gathered(misplaced(header), lines)
    assert similar(moved, right) and all(torch.equal(a, b) for a, b in zip(moved.calibration, right.calibration))


@pytest.mark.parametrize(
    "partial_echo, said",
    [
        (0.625, "the echo lies 6 samples (without oversampling) before the centre sample that the lines state"),
        (0.95, ""),
    ],
)
def test_an_echo_said_to_be_in_the_middle(tmp_path, partial_echo, said):
    header, lines = scan_of(tmp_path, partial_echo=partial_echo, contrasts=2)
    wrong = []
    for line in lines:
        middle = line.number_of_samples // 2
        wrong.append(line if line.flags & NOISE_BIT else line_like(line, center_sample=middle))
    told = f"{said}: its true place was used, and complex images keep the phase that it gives them"
    for scan, right in zip(gather(header, wrong), gather(header, lines)):
        assert [w for w in scan.warnings if w not in right.warnings] == ([told] if said else [])
        if said:  # a whole number of samples without oversampling: not even a phase is left
            torch.testing.assert_close(scan.kspace, right.kspace, atol=1e-5 * float(right.kspace.abs().max()), rtol=0)


def test_spikes_noise_and_a_lost_centre_move_nothing(tmp_path):
    header, lines = scan_of(tmp_path)
    spiked = [line_like(line, line.data + 1e4 * (number in (40, 300, 700))) for number, line in enumerate(lines)]

    def is_central(line):
        return line.idx.kspace_encode_step_2 == 13 and abs(line.idx.kspace_encode_step_1 - 18) <= 1

    centre = {line.idx.kspace_encode_step_1: line for line in lines if is_central(line)}
    lost = [line for line in lines if line not in centre.values()]
    random = np.random.default_rng(0)

    def white(shape):
        return (random.standard_normal((2, *shape)) * [[[1]], [[1j]]]).sum(0)

    noise = [line_like(line, white(line.data.shape)) for line in lines]
    for some in (lines, spiked, lost, noise, lines[:200], lines[:430], lines[-300:]):
        assert not [w for w in gathered(header, some).warnings if "strongest lines" in w or "the echo lies" in w]


def test_an_echo_that_a_field_moves_moves_no_other(tmp_path):
    """The second contrast's lines are strongest 6 steps away, as in a background gradient.

    The first repetition has shown where k = 0 lies.
    """
    header, lines = scan_of(tmp_path, contrasts=2, repetitions=2, partial_fourier=(0.8, 0.8))
    noise = [line for line in lines if line.flags & NOISE_BIT]
    by_place = {}
    for line in lines:
        if not line.flags & NOISE_BIT:
            idx = line.idx
            by_place[idx.repetition, idx.contrast, idx.kspace_encode_step_1, idx.kspace_encode_step_2] = line
    low = min(step for _, _, step, _ in by_place)
    moved = []
    for (repetition, contrast, step, partition), line in by_place.items():
        source = by_place.get((repetition, contrast, max(low, step - 6), partition), line)
        moved.append(line_like(line, source.data) if contrast else line)
    right, scans = list(gather(header, lines)), list(gather(header, [*noise, *moved]))
    assert all(similar(scan, other) for scan, other in zip(scans[::2], right[::2])) and len(scans) == 4
    assert not [w for scan in scans for w in scan.warnings if "strongest lines" in w]


def test_the_scans_own_phase_is_left_to_it(tmp_path):
    """Three periods over the field of view, as fields drift and gradients lag."""
    header, lines = scan_of(tmp_path)

    def shifted(line):
        step_1 = (line.idx.kspace_encode_step_1 + 3) % 36
        return line_like(line, center_sample=line.center_sample + 4, kspace_encode_step_1=step_1)

    moved = [line if line.flags & NOISE_BIT else shifted(line) for line in lines]
    assert gathered(header, moved).warnings == []


def test_offsets_of_energies():
    z, y = np.indices((40, 48))
    energy = np.exp(-((z - 20 - 7) ** 2 + (y - 24 + 9) ** 2) / 8.0)
    came = (z >= 7) & (y < 39)  # what the matrix holds about that centre
    assert centre_offset(energy * came) == (7, -9)
    assert centre_offset(energy * came * (z % 3 == 0) * (y % 2 == 1)) == (7, -9)
    assert centre_offset(energy * (z >= 7)) == (7, 0)  # of all lines along y no other centre is possible
    assert centre_offset(energy) == (0, 0)
    assert centre_offset(np.exp(-((z - 20 - 3) ** 2 + (y - 24) ** 2) / 8.0)) == (0, 0)  # near enough
    twice = energy + np.exp(-((z - 20) ** 2 + (y - 24) ** 2) / 8.0)
    assert centre_offset(twice * came) is None  # as strong where it should be
    assert centre_offset(energy * (z > 28)) is None  # strongest at an edge
    hollow = (abs(z - 20) > 6) | (abs(y - 24) > 6)
    assert centre_offset(energy * came * hollow) is None  # nothing came where it should be
    assert centre_offset(np.zeros((40, 48))) is centre_offset(np.ones((2, 3))) is None
    for values in (0, 1e25):  # whose square is too large for single precision
        assert echo_offset(np.full((2, 40, 48, 16), values, np.complex64), energy) == 0


@pytest.mark.parametrize("periods, recon", [(6, None), (-5, (24, 0.75)), (5, (48, 1.0))])
def test_a_late_echo_keeps_the_phase_that_a_field_gave_it(tmp_path, periods, recon):
    """The second contrast is the first with so many periods of phase over the readout.

    Also where the image is cropped and interpolated along it.
    """
    header, lines = scan_of(tmp_path, partial_fourier=(1, 1))
    space = header.encoding[0].reconSpace
    whole_mm = space.fieldOfView_mm.x
    if recon:
        space.matrixSize.x, space.fieldOfView_mm.x = recon[0], recon[1] * whole_mm
    imaging = [line for line in lines if not line.flags & NOISE_BIT]
    late = [line_like(line, np.roll(line.data, 2 * periods, axis=1), contrast=1) for line in imaging]
    options = make_options({"method": "cg", "device": "cpu", "output": "complex64"})
    first, second = reconstruct(header, [*lines, *late], None, options)
    assert "the echo lies" in second.meta["ImageComment"] and "the echo lies" not in first.meta["ImageComment"]
    a, b = first.data[0].astype(complex), second.data[0].astype(complex)
    x = (np.arange(a.shape[2]) - a.shape[2] // 2) * space.fieldOfView_mm.x / a.shape[2]
    expected = a * np.exp(2j * np.pi * periods * x / whole_mm)
    bright = abs(a) > 0.3 * abs(a).max()
    assert np.abs(np.angle(b[bright] * expected[bright].conj())).mean() < 0.05
    options = make_options({"method": "cg", "device": "cpu", "output": "float32"})
    magnitudes = reconstruct(header, [*lines, *late], None, options)
    for image, phased in zip(magnitudes, (a, b)):
        np.testing.assert_allclose(image.data[0], abs(phased), rtol=0, atol=1e-5 * abs(phased).max())
