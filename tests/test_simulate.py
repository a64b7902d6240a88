"""What is simulated is what a scanner sends: every option is reconstructed, and compared with the object."""

import ismrmrd
import nibabel
import numpy as np
import pytest
import torch
from conftest import line_like, run_chain, small_object

from gadgets.header import parse_header
from gadgets.image_files import affine
from gadgets.options import make_options
from gadgets.recon import reconstruct
from gadgets.scan_files import ScanFile
from gadgets.simulation.protocol import SimulateOptions, tilt
from gadgets.simulation.scan import simulate
from recon_core.fft import ifft
from recon_core.simulate import loop_field, loop_sensitivities, random_phantom, smooth_phase

CASES = {
    "full": (dict(pattern="full"), 0.995),
    "one coil": (dict(coils=1, pattern="full"), 0.995),
    "Poisson": (dict(acceleration=3, acs=14), 0.97),
    "regular with CAIPI shift": (dict(acceleration=4, pattern="regular", acs=12), 0.96),
    "separate calibration": (dict(acceleration=3, pattern="regular", acs=14, calibration="separate"), 0.96),
    "external calibration": (dict(acceleration=3, pattern="regular", acs=14, calibration="external"), 0.96),
    "external calibration, partial Fourier": (
        dict(acceleration=3, pattern="regular", acs=14, calibration="external", partial_fourier=(0.6, 1)),
        0.93,
    ),
    "partial Fourier": (dict(pattern="full", partial_fourier=(0.75, 0.8)), 0.96),
    "partial echo": (dict(pattern="full", partial_echo=0.75), 0.97),
    "no oversampling": (dict(pattern="full", oversampling=1), 0.995),
    "odd oversampling": (dict(pattern="full", oversampling=1.3), 0.995),
    "no noise lines": (dict(pattern="full", noise_lines=0), 0.99),
    "oblique": (dict(pattern="full", oblique=True), 0.995),
    "averages": (dict(pattern="full", snr=25, averages=4), 0.985),
    "navigators": (dict(pattern="full", navigators=7), 0.995),
    "waveforms": (dict(pattern="full", waveforms=True), 0.995),
    "coarser voxels": (dict(pattern="full", voxel_mm=1.5), 0.995),
}


def simulated(folder, **options):
    """(path of the scan, facts, header, lines)."""
    np.save(folder / "object.npy", small_object((26, 31, 24)))
    options = SimulateOptions(**{"coils": 6, "snr": 80, **options})
    facts = simulate(folder / "object.npy", folder / "scan.h5", options, folder / "reference.nii.gz")
    with ScanFile(folder / "scan.h5") as scan:
        return folder / "scan.h5", facts, parse_header(scan.header_xml), list(scan.acquisitions())


@pytest.mark.parametrize("case", CASES)
def test_reconstructed_it_is_the_object(tmp_path, case):
    options, alike = CASES[case]
    path, facts, _, _ = simulated(tmp_path, **options)
    (image,) = run_chain(path, None, method="cg", output="float32")
    reference = nibabel.load(tmp_path / "reference.nii.gz")
    truth = np.asarray(reference.dataobj).T
    assert list(image.getHead().matrix_size) == facts["matrix"] == list(truth.shape[::-1])
    assert np.corrcoef(image.data[0].ravel(), truth.ravel())[0, 1] > alike
    np.testing.assert_allclose(affine(image.getHead()), reference.affine, atol=1e-4)
    comment = image.meta["ImageComments"]
    assert comment == "CG-SENSE" if options.get("noise_lines") != 0 else "no noise lines" in comment


@pytest.mark.parametrize(
    "flag,options,count",
    [
        (ismrmrd.ACQ_IS_NOISE_MEASUREMENT, dict(pattern="full", noise_lines=5), 5),
        (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION, dict(calibration="separate", acceleration=3, acs=8), 64),
        (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION, dict(calibration="external", acceleration=3, acs=8), 64),
        (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING, dict(acceleration=3, acs=8), 64),
        (ismrmrd.ACQ_IS_NAVIGATION_DATA, dict(pattern="full", navigators=13, noise_lines=0), 26 * 31 // 13),
        (ismrmrd.ACQ_FIRST_IN_REPETITION, dict(pattern="full", repetitions=3, averages=2, contrasts=2), 3),
        (ismrmrd.ACQ_LAST_IN_REPETITION, dict(pattern="full", repetitions=3), 3),
        (ismrmrd.ACQ_LAST_IN_MEASUREMENT, dict(pattern="full", repetitions=3), 1),
    ],
)
def test_lines_are_flagged(tmp_path, flag, options, count):
    _, _, _, lines = simulated(tmp_path, **{"coils": 1, **options})
    assert sum(line.is_flag_set(flag) for line in lines) == count


def test_a_regular_lattice_is_shifted_from_plane_to_plane(tmp_path):
    _, facts, header, lines = simulated(tmp_path, coils=1, acceleration=4, pattern="regular", acs=0, noise_lines=0)
    steps = {(line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2) for line in lines}
    (y, z) = next(iter(sorted(steps)))
    assert (y + 2, z) in steps and (y + 1, z + 2) in steps and (y, z + 2) not in steps
    factor = header.encoding[0].parallelImaging.accelerationFactor
    assert (factor.kspace_encoding_step_1, factor.kspace_encoding_step_2) == (2, 2)
    assert facts["acceleration"] == pytest.approx(4, rel=0.1)


def test_contrasts_and_repetitions_are_volumes_with_their_times(tmp_path):
    path, facts, header, lines = simulated(tmp_path, coils=2, pattern="full", contrasts=3, repetitions=2)
    assert facts["lines"] == 6 * 26 * 31 == len(lines) - 16
    images = run_chain(path, None, method="cg", output="float32")
    assert sorted((i.repetition, i.contrast) for i in images) == [(r, c) for r in range(2) for c in range(3)]
    by = {(i.repetition, i.contrast): i for i in images}
    assert by[0, 0].data.max() > 1.2 * by[0, 1].data.max() > 1.2 * by[0, 2].data.max()
    assert by[1, 2].meta["EchoTime"] == "7.5"
    assert by[1, 0].acquisition_time_stamp > by[0, 0].acquisition_time_stamp > 0


def test_waveforms_are_stored_and_read_in_order(tmp_path):
    path, _, _, lines = simulated(tmp_path, coils=1, pattern="full", waveforms=True)
    with ScanFile(path) as scan:
        items = list(scan.items())
    waveforms = [item for item in items if isinstance(item, ismrmrd.Waveform)]
    assert len(items) - len(waveforms) == len(lines) and len(waveforms) == len(lines) // 40
    assert waveforms[0].data.shape == (2, 100) and waveforms[0].data.max() > 2048
    times = [item.time_stamp if isinstance(item, ismrmrd.Waveform) else item.acquisition_time_stamp for item in items]
    assert times == sorted(times)
    with ismrmrd.Dataset(path, "dataset", create_if_needed=False) as dataset:
        np.testing.assert_array_equal(dataset.read_waveform(1).data, waveforms[1].data)


@pytest.mark.parametrize(
    "name,value",
    [
        ("calibration", "none"),
        ("partial_echo", 0.4),
        ("averages", 0),
        ("coils", 65536),
        ("seed", -1),
        ("contrasts", 0),
        ("navigators", -1),
    ],
)
def test_impossible_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"simulation option {name} cannot be {value}"):
        SimulateOptions(**{name: value})


def test_an_oblique_slab_is_turned_about_two_axes_and_stays_square():
    turned = tilt(np.eye(3))
    np.testing.assert_allclose(turned @ turned.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turned) == pytest.approx(1)
    assert np.degrees(np.arccos([turned[0, 0], turned[2, 2]])) == pytest.approx([20, 12])


def test_from_a_phantom_without_a_volume(tmp_path):
    facts = simulate("phantom", tmp_path / "scan.h5", SimulateOptions(coils=1, voxel_mm=8, pattern="full"))
    assert facts["matrix"] == [20, 25, 20]
    assert len(run_chain(tmp_path / "scan.h5", None, method="cg")) == 1


def test_phases_of_contrasts_can_be_compared(tmp_path):
    """Complex images of two objects with one phase, told apart by set: no phase between them.

    Though each has its own virtual coils.
    """
    bright, other = small_object((16, 18, 20)), small_object((16, 18, 20))
    bright[:, :9] *= 0.1
    other[:, 9:] *= 0.1
    header, lines = lines_of(tmp_path / "bright", bright)
    _, of_other = lines_of(tmp_path / "other", other)
    later = [line_like(line, set=1) for line in of_other if not line.is_flag_set(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)]
    options = make_options({"method": "cg", "output": "complex64", "device": "cpu"})
    images = list(reconstruct(header, [*lines, *later], None, options))
    a, b = (image.data[0] for image in images)
    both = (bright > 0.02) & (other > 0.02)
    difference = np.angle((b * a.conj())[both])
    assert np.abs(difference).mean() < 0.03


@pytest.mark.parametrize("kind", ["complex .npy", "complex .nii", "magnitude"])
def test_a_complex_volume_keeps_its_phase_and_a_magnitude_is_given_one(tmp_path, kind):
    """The Fourier transform of all lines of a single, uniform coil is the object."""
    magnitude, path = small_object((12, 14, 16)), tmp_path / ("object.nii" if kind == "complex .nii" else "object.npy")
    if kind == "magnitude":
        turns = smooth_phase(magnitude.shape).numpy()
    else:
        turns = np.linspace(-3, 3, 14)[:, None] + np.linspace(0, 1, 16)
    truth = (magnitude * np.exp(1j * turns)).astype(np.complex64)
    given = magnitude if kind == "magnitude" else truth
    nibabel.save(nibabel.Nifti1Image(given.T, np.eye(4)), path) if path.suffix == ".nii" else np.save(path, given)
    options = SimulateOptions(coils=1, pattern="full", snr=1e5, oversampling=1, noise_lines=0)
    simulate(path, tmp_path / "scan.h5", options)
    kspace = torch.zeros(magnitude.shape, dtype=torch.complex64)
    with ScanFile(tmp_path / "scan.h5") as scan:
        for line in scan.acquisitions():
            kspace[line.idx.kspace_encode_step_2, line.idx.kspace_encode_step_1] = torch.from_numpy(line.data[0])
    image = ifft(kspace, (0, 1, 2)).numpy()
    np.testing.assert_allclose(image / np.abs(image).max(), truth / magnitude.max(), atol=1e-3)


def lines_of(path, volume):
    """(header, lines) of a fully sampled scan of `volume`."""
    np.save(path.with_suffix(".npy"), volume)
    simulate(path.with_suffix(".npy"), path.with_suffix(".h5"), SimulateOptions(coils=4, pattern="full", snr=200))
    with ScanFile(path.with_suffix(".h5")) as scan:
        return parse_header(scan.header_xml), list(scan.acquisitions())


def test_the_field_of_a_loop_is_exact_on_its_axis_and_a_dipoles_far_away():
    moment, radius = np.array([0.0, 3.0, 0.0]), 0.5
    on_axis = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    field = loop_field(on_axis, np.array([0.0, 0.8, 0.0]), moment, radius)
    assert field[1].tolist() == pytest.approx([2 * 3 / (d**2 + radius**2) ** 1.5 for d in (0.2, 1.2)], rel=1e-5)
    beside, ahead = loop_field(torch.tensor([[100.0, 0.0], [0.0, 100.0], [0.0, 0.0]]), np.zeros(3), moment, radius).T
    assert beside.tolist() == pytest.approx([0, -3e-6, 0], rel=1e-3)
    assert ahead.tolist() == pytest.approx([0, 6e-6, 0], rel=1e-3)


def test_loops_see_all_of_the_object_each_in_its_own_way():
    fields = loop_sensitivities(8, (24, 30, 28), np.random.default_rng(0))
    together = fields[:, 3:21, 4:26, 4:24].abs().square().sum(0).sqrt()
    assert 0.2 < together.min() and 0.5 < together[9, 11, 10] < 3
    flat = fields.flatten(1) / fields.flatten(1).norm(dim=1, keepdim=True)
    assert ((flat @ flat.mH).abs() - torch.eye(8)).max() < 0.95
    assert torch.equal(fields, loop_sensitivities(8, (24, 30, 28), np.random.default_rng(0)))


def test_random_phantoms_are_bodies_with_parts_in_air():
    seen = [random_phantom(np.random.default_rng(seed)) for seed in range(12)]
    for volume in seen:
        assert 0 <= volume.min() and 1 <= volume.max() <= 1.8 + 1e-5
        assert volume[[0, -1]].mean() < 0.02 and 0.1 < (volume > 0.2).float().mean() < 0.9
    assert len({float(volume.sum()) for volume in seen}) == 12
    assert min(len(volume[64].mul(50).round().unique()) for volume in seen) > 1
