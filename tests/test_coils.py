"""Coil maps and compression against the fields the data were made with."""

import subprocess

import numpy as np
import pytest
import torch
from benchmarks.bart import read_cfl
from conftest import random_complex

from recon_core.cg_sense import cg_sense
from recon_core.coils import (
    MATRICES_AT_ONCE,
    _signal_patches,
    compression_matrix,
    cut_acs,
    dominant_eigenvectors,
    find_acs,
    folding,
    in_phase,
    low_resolution_maps,
    maps_of,
    overlap,
    second_maps,
    signal_operators,
)
from recon_core.fft import centre_crop_or_pad, fft
from recon_core.measure import measure
from recon_core.metrics import object_mask, psnr
from recon_core.simulate import coil_sensitivity, loop_sensitivities, phantom, sampling_mask


def object_seen(shape, coils):
    maps = torch.stack([coil_sensitivity(c, coils, shape) for c in range(coils)])
    return phantom(shape) * maps, maps / maps.norm(dim=0)


def maps_from(acs, shape, sigma=0.0):
    return maps_of(signal_operators(acs, shape, sigma), shape)


def alignment(estimate, truth, inside):
    return (estimate.conj() * truth).sum(0).abs()[inside]


@pytest.mark.parametrize("shape,acs", [((40, 44, 36), (20, 20)), ((33, 41, 27), (16, 24))])
def test_maps_agree_with_the_truth(shape, acs):
    images, truth = object_seen(shape, 6)
    kspace = fft(images, (1, 2))
    maps = maps_from(cut_acs(kspace, acs), shape)
    inside = phantom(shape) > 0.3
    assert alignment(maps, truth, inside).mean() > 0.999
    assert torch.quantile(alignment(maps, truth, inside), 0.01) > 0.99
    torch.testing.assert_close(maps.norm(dim=0), torch.ones(shape), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_maps_of_loops_anywhere_agree_with_the_truth(seed):
    shape = (40, 44, 36)
    fields = loop_sensitivities(6, shape, np.random.default_rng(seed))
    maps = maps_from(cut_acs(fft(phantom(shape) * fields, (1, 2)), (20, 20)), shape)
    found = alignment(maps, fields / fields.norm(dim=0), phantom(shape) > 0.3)
    assert found.mean() > 0.999 and torch.quantile(found, 0.01) > 0.98


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_dominant_eigenvectors_agree_with_lapack(scale):
    vectors = torch.linalg.qr(random_complex(3, MATRICES_AT_ONCE, 6, 6)).Q
    values = torch.tensor([0.9, 0.85, 0.4, 0.1, 0.0, 0.0]) * scale
    found, vector = dominant_eigenvectors((vectors * values) @ vectors.mH)
    torch.testing.assert_close(found, torch.full_like(found, 0.9 * scale), rtol=1e-5, atol=0)
    overlap = (vector.conj() * vectors[..., 0]).sum(-1).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-5)


def test_dominant_eigenvectors_of_what_rounding_leaves_are_finite():
    """Where no signal is, a matrix is zero but for rounding, and its trace may be zero or below."""
    matrices = [[[0, 1j], [-1j, 0]], [[-0.5, 0.1], [0.1, 0.2]], [[0, 1], [0, 0]]]
    values, vectors = dominant_eigenvectors(1e-9 * torch.tensor(matrices, dtype=torch.complex64))
    assert bool(torch.isfinite(values).all()) and bool(torch.isfinite(torch.view_as_real(vectors)).all())


def test_dominant_eigenvectors_of_nothing_and_of_equals_are_finite():
    equals = torch.stack([torch.zeros(4, 4), torch.eye(4)]).to(torch.complex64)
    values, vectors = dominant_eigenvectors(equals)
    torch.testing.assert_close(values, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.tensor([0.0, 1.0]))


def test_readout_of_one_sample():
    images, truth = object_seen((40, 44, 9), 4)
    plane = images[..., 4:5]
    maps = maps_from(cut_acs(fft(plane, (1, 2)), (20, 20)), (40, 44, 1))
    assert alignment(maps, truth[..., 4:5], plane.abs().sum(0) > 0.5).mean() > 0.995


@pytest.mark.parametrize("length,positions", [(36, slice(14, 30)), (72, slice(20, 60))])
def test_an_object_that_the_readout_cuts_off(length, positions):
    images, truth = (volume[..., positions] for volume in object_seen((40, 44, length), 6))
    maps = maps_from(cut_acs(fft(images, (1, 2)), (20, 20)), images.shape[1:])
    inside = phantom((40, 44, length))[..., positions] > 0.3
    missed = 1 - (maps.conj() * truth).sum(0).abs().square()
    for edge in (0, -1):
        assert missed[..., edge][inside[..., edge]].mean() < 1e-3


def wrapped(kept: float, coils: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """The phantom in a field of view of `kept` times its own length along y (1: one with room).

    Returns its coil images [coils z y x] and the fields it is seen by, one after the other [2 coils z y x], 0 where
    nothing is.
    """
    images, truth = object_seen((40, 44, 36), coils)
    reach = torch.nonzero(phantom((40, 44, 36)).sum(dim=(0, 2)) > 0)[:, 0]
    wide = int(reach[-1] - reach[0]) + 1
    n = 44 if kept == 1 else int(kept * wide) // 2 * 2
    place = torch.arange(44) + 22 - int(reach[0] + wide // 2) - 22 + n // 2
    out, fields = images.new_zeros(coils, 40, n, 36), images.new_zeros(2, coils, 40, n, 36)
    out.index_add_(2, place % n, images)
    inside = (place >= 0) & (place < n)
    for own, there in enumerate((inside, ~inside)):
        fields[own][:, :, place[there] % n] = (truth * (phantom((40, 44, 36)) > 0.2))[:, :, there]
    return out, fields


@pytest.mark.parametrize("planes", [slice(None), slice(20, 21)])
@pytest.mark.parametrize("kept,told", [(1.0, ""), (0.8, "about"), (0.5, "CAUTION: about")])
def test_an_object_that_reaches_beyond_the_field_of_view_is_told(kept, told, planes):
    """The phantom, or a plane of it, wraps around along y, and lies over itself then; nothing does while it fits."""
    images = wrapped(kept)[0][:, planes]
    kspace = fft(images, (1, 2))
    acs = cut_acs(kspace, (20, 20))
    share = overlap(signal_operators(acs, images.shape[1:]), acs)
    found = measure(kspace, torch.ones(images.shape[1:3]), (2.0, 2.0, 2.0)).warnings
    warnings = [w for w in found if "edge of the field of view or beyond" in w]
    assert (share > 0.05) == bool(told) == bool(warnings) and all(w.startswith(told) for w in warnings), share


@pytest.mark.parametrize("partitions,told", [(12, False), (20, True)])
def test_a_thin_slab_that_fills_its_field_of_view_is_not_told_to_exceed_it(partitions, told):
    """Where its ends meet, the few partitions cannot tell them apart; in a thick one, that share of it is told."""
    images, _ = object_seen((40, 44, 36), 6)
    slab = images[:, 20 - partitions // 2 : 20 + partitions // 2]
    measurement = measure(fft(slab, (1, 2)), torch.ones(slab.shape[1:3]), (2.0, 2.0, 2.0))
    assert any("or beyond" in w for w in measurement.warnings) == told and measurement.acs == slab.shape[1:3]


@pytest.mark.parametrize("loud", [1, 3, 30])
def test_the_noise_of_a_loud_coil_is_not_taken_for_a_second_object(loud):
    """Without noise lines, that coil keeps twice the noise of the others."""
    images, _ = wrapped(1.0)
    noise = random_complex(*images.shape) * torch.tensor([1.0, 1, loud, 1, 1, 1]).reshape(-1, 1, 1, 1)
    measurement = measure(fft(images, (1, 2)) + 0.02 * noise, torch.ones(images.shape[1:3]), (2.0, 2.0, 2.0), sets=2)
    assert measurement.operator.shape == images.shape[1:]
    assert measurement.warnings == ["no noise lines: the noise level was estimated from the scan itself"]


def test_two_sets_of_maps_explain_both_parts_where_they_lie_over_each_other():
    images, fields = wrapped(0.8)
    acs = cut_acs(fft(images, (1, 2)), (20, 20))
    operators = signal_operators(acs, images.shape[1:])
    maps = maps_of(operators, images.shape[1:])
    positions, first = second_maps(operators, torch.fft.ifftshift(maps.permute(3, 0, 1, 2), (2, 3)))
    second = torch.zeros_like(maps)
    second[..., first : first + len(positions)] = torch.fft.fftshift(positions, (2, 3)).permute(1, 2, 3, 0)
    both = (fields.abs().sum(dim=1) > 0).all(dim=0)
    assert both.sum() > 300
    assert (maps.conj() * second).sum(0).abs().max() < 1e-4 and second.norm(dim=0).max() < 1 + 1e-4
    for field in fields:
        alone = (maps.conj() * field).sum(0).abs()[both]
        together = (alone.square() + (second.conj() * field).sum(0).abs()[both].square()).sqrt()
        assert alone.mean() < 0.95 and together.mean() > 0.985
    single = (fields.abs().sum(dim=1) > 0).sum(dim=0) == 1
    assert second.norm(dim=0)[single].mean() < 0.2


def test_a_wrapped_object_comes_out_better_with_two_sets_of_maps():
    """Root sum of squares of fully sampled coils, from a third of the lines.

    A plane, and an object that fits, get one set.
    """
    images, _ = wrapped(0.8)
    truth, shape = images.norm(dim=0), images.shape[1:]
    mask = torch.from_numpy(sampling_mask(shape[:2], 3, acs=16)).float()
    kspace = fft(images, (1, 2)) * mask[..., None] + 1e-3 * random_complex(*images.shape) * mask[..., None]
    one, two = (measure(kspace, mask, (2.0, 2.0, 2.0), sets=sets) for sets in (1, 2))
    assert one.operator.shape == shape and two.operator.shape[2] > shape[2]
    found = [psnr(m.image_of(cg_sense(m)), truth, object_mask(truth)) for m in (one, two)]
    assert found[1] > found[0] + 2, found
    assert two.image_of(cg_sense(two)).shape == shape
    fully = fft(images, (1, 2)), torch.ones(shape[:2])
    later = [measure(*fully, (2.0, 2.0, 2.0), sets=2, reference=m.reference) for m in (one, two)]
    assert [len(m.operator.second) > 0 for m in later] == [False, True], "the first volume decides"
    assert measure(kspace[..., 18:19], mask, (2.0, 2.0, 2.0), sets=2).operator.shape == (*shape[:2], 1)
    fits = fft(wrapped(1.0)[0], (1, 2))
    later = measure(fits, torch.ones(fits.shape[1:3]), (2.0, 2.0, 2.0), sets=2, reference=two.reference)
    assert len(later.operator.second) > 0
    assert measure(fits, torch.ones(fits.shape[1:3]), (2.0, 2.0, 2.0), sets=2).operator.shape == fits.shape[1:]


@pytest.mark.parametrize("acs", [8, 11, 20])
def test_the_noise_of_the_calibration_lines_keeps_its_level(acs):
    noise = random_complex(2, 40, 44, 50)
    block = cut_acs(noise, (acs, acs))
    assert block.shape == (2, acs, acs, 24)
    level = lambda v: float(v.abs().square().mean().sqrt())
    assert abs(level(block) / level(noise) - 1) < 0.05


def test_fallback_is_rough_but_usable():
    images, truth = object_seen((40, 44, 20), 4)
    mask = torch.zeros(40, 44)
    mask[18:23, 19:24] = 1
    maps = low_resolution_maps(fft(images, (1, 2)) * mask[..., None], mask)
    assert alignment(maps, truth, phantom((40, 44, 20)) > 0.3).mean() > 0.95


@pytest.mark.parametrize("unit", [1e-14, 1e-3, 1e9])
def test_the_fallback_knows_no_unit(unit):
    """Root sum of squares 1 everywhere, in air too."""
    images, _ = object_seen((40, 44, 20), 4)
    mask = torch.zeros(40, 44)
    mask[18:23, 19:24] = 1
    maps = low_resolution_maps(unit * fft(images, (1, 2)) * mask[..., None], mask)
    torch.testing.assert_close(maps.norm(dim=0), torch.ones(40, 44, 20), rtol=1e-3, atol=0)


def test_the_fallback_leaves_the_object_its_phase():
    """The maps of an object with and without a phase are the same.

    Otherwise the phases of echoes could not be compared.
    """
    images, _ = object_seen((40, 44, 20), 4)
    mask = torch.zeros(40, 44)
    mask[14:26, 16:28] = 1
    turned = torch.exp(1j * torch.linspace(-1.5, 1.5, 44))[:, None] * images
    plain, phased = (low_resolution_maps(fft(image, (1, 2)) * mask[..., None], mask) for image in (images, turned))
    relative = torch.linalg.vecdot(plain, phased, dim=0)[phantom((40, 44, 20)) > 0.3]
    assert float(relative.angle().square().mean().sqrt()) < 0.1


def test_noise_of_the_calibration_is_told_from_signal():
    images, truth = object_seen((40, 44, 36), 6)
    kspace, inside = fft(images, (1, 2)), phantom((40, 44, 36)) > 0.3
    sigma = 0.5 * float(kspace.abs().max()) / 40
    acs = cut_acs(kspace + sigma * 2**0.5 * random_complex(*kspace.shape), (20, 20))
    found = [maps_from(acs, (40, 44, 36), level) for level in (sigma, 10 * sigma, 0.0)]
    missed = [1 - float(alignment(maps, truth, inside).mean()) for maps in found]
    assert missed[0] < 1e-3 and missed[1] > 5 * missed[0] and missed[2] > 100 * missed[0]


@pytest.mark.parametrize("coils", [2, 14])
def test_signal_patches_are_an_orthonormal_basis_of_all_patches(coils):
    """Whether there are more patches than entries in a patch (2 coils), or fewer (14)."""
    acs = fft(object_seen((24, 24, 16), coils)[0], (1, 2, 3))[:, 9:15, 9:15, 4:12]
    basis = _signal_patches(acs, [2, 2, 3], 0.0)
    patches = acs.unfold(1, 2, 1).unfold(2, 2, 1).unfold(3, 3, 1).permute(0, 4, 5, 6, 1, 2, 3).flatten(4).flatten(0, 3)
    assert (patches.shape[1] < patches.shape[0]) == (coils == 14) and basis.shape[1] < min(patches.shape)
    torch.testing.assert_close(basis.mH @ basis, torch.eye(basis.shape[1]) + 0j, atol=1e-3, rtol=0)
    assert (patches - basis @ (basis.mH @ patches)).norm() < 0.02 * patches.norm()


def test_acs_is_found_also_when_it_is_not_square():
    mask = torch.zeros(30, 41)
    mask[15 - 4 : 15 + 5, 20 - 7 : 20 + 8] = 1
    mask[2, 3] = 1
    assert find_acs(mask) == (9, 15)
    assert find_acs(torch.ones(30, 41)) == (30, 41)
    assert find_acs(torch.zeros(30, 41)) == (0, 0)
    mask[15, 20] = 0
    assert find_acs(mask) == (0, 0)


def test_acs_of_an_even_number_of_lines_is_found_whole():
    mask = torch.zeros(64, 65)
    mask[32 - 6 : 32 + 6, 32 - 12 : 32 + 12] = 1
    assert find_acs(mask) == (12, 24)


def test_acs_with_enough_lines_along_both_axes_comes_before_a_longer_one():
    """In a thin slab sampled densely, the middle rows hold more lines than the square.

    Maps cannot be made of three rows.
    """
    mask = torch.zeros(12, 84)
    mask[:, 42 - 6 : 42 + 6] = 1
    mask[6 - 1 : 6 + 2, 42 - 30 : 42 + 30] = 1
    assert find_acs(mask) == (12, 12)
    mask[6 - 4 : 6 + 5, 42 - 30 : 42 + 30] = 1
    assert find_acs(mask) == (9, 60)


def test_lines_beyond_those_that_maps_are_made_of_hardly_count():
    mask = torch.zeros(64, 200)
    mask[32 - 10 : 32 + 10, 100 - 10 : 100 + 10] = 1
    mask[32 - 4 : 32 + 5, 100 - 50 : 100 + 50] = 1
    assert find_acs(mask) == (20, 20)


def test_no_block_is_larger_than_the_one_found():
    random = torch.Generator().manual_seed(0)
    for _ in range(100):
        shape = torch.randint(1, 9, (2,), generator=random).tolist()
        mask = (torch.rand(shape, generator=random) < 0.9).float()
        sizes = [(z, y) for z in range(1, shape[0] + 1) for y in range(1, shape[1] + 1)]
        blocks = [size for size in sizes if centre_crop_or_pad(mask, size).all()]
        z, y = find_acs(mask)
        assert z * y == max((a * b for a, b in blocks), default=0) and ((z, y) in blocks or not blocks)


def test_compression_keeps_the_energy_of_low_rank_coils():
    acs = torch.einsum("cv,vzyx->czyx", random_complex(10, 3), random_complex(3, 6, 6, 6, seed=1))
    matrix = compression_matrix(acs, 3)
    torch.testing.assert_close(matrix @ matrix.mH, torch.eye(3, dtype=torch.complex64), atol=1e-5, rtol=0)
    kept = (matrix @ acs.flatten(1)).norm()
    assert abs(kept / acs.norm() - 1) < 1e-5


def test_the_phase_of_the_compression_is_no_accident():
    """The first coil with at least half of the largest weight has a positive one, in each virtual coil."""
    for seed in range(6):
        rows = compression_matrix(random_complex(7, 5, 5, 6, seed=seed), 7)
        for row in rows:
            leading = row[row.abs() >= 0.5 * row.abs().max()][0]
            assert float(leading.real) > 0 and abs(float(leading.imag)) < 1e-5
        torch.testing.assert_close(rows @ rows.mH, torch.eye(7, dtype=torch.complex64), atol=1e-5, rtol=0)


def test_maps_in_phase_combine_any_virtual_coils_to_the_same_image():
    images, truth = object_seen((9, 10, 8), 6)
    combined = []
    for seed in (1, 2):
        mixing = torch.linalg.qr(random_complex(6, 6, seed=seed))[0]
        maps = torch.einsum("vc,czyx->vzyx", mixing, truth) * torch.exp(1j * seed * phantom((9, 10, 8)))
        maps = in_phase(maps, mixing, torch.tensor([1, 0.5j, 0, 0, 0, 0], dtype=torch.complex64))
        combined.append(torch.linalg.vecdot(maps, torch.einsum("vc,czyx->vzyx", mixing, images), dim=0))
    torch.testing.assert_close(combined[0], combined[1], atol=1e-5, rtol=1e-5)
    seen = truth[0] + 0.5j * truth[1]
    torch.testing.assert_close(combined[0], images.norm(dim=0) * torch.sgn(seen), atol=1e-5, rtol=1e-5)


@pytest.mark.bart
def test_maps_agree_with_bart_ecalib(tmp_path):
    shape = (40, 44, 36)
    images, _ = object_seen(shape, 5)
    kspace = fft(images, (1, 2, 3))
    write_cfl(tmp_path / "ksp", kspace.permute(3, 2, 1, 0).numpy())
    ecalib = ["bart", "ecalib", "-m", "1", "-r", "20", "-k", "5", "-c", "0", tmp_path / "ksp", tmp_path / "maps"]
    subprocess.run(ecalib, check=True, capture_output=True)
    theirs = torch.from_numpy(read_cfl(tmp_path / "maps")).squeeze().permute(3, 2, 1, 0)
    ours = maps_from(cut_acs(fft(images, (1, 2)), (20, 20)), shape)
    inside = phantom(shape) > 0.3
    assert alignment(ours, theirs / theirs.norm(dim=0).clamp_min(1e-9), inside).mean() > 0.999


def write_cfl(path, array):
    dims = [*array.shape, *[1] * (16 - array.ndim)]
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + "\n")
    array.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def lattice(z: int, y: int, shift: int, shape=(64, 80)) -> torch.Tensor:
    """Every z-th partition and y-th line, shifted from one partition to the next."""
    mask = torch.zeros(shape)
    for number, row in enumerate(mask[::z]):
        row[shift * number % y :: y] = 1
    return mask


def test_how_often_a_lattice_folds_the_image():
    cases = [
        (1, 1, 0, 1),
        (1, 2, 0, 2),
        (2, 1, 0, 2),
        (2, 2, 1, 4),
        (3, 2, 1, 6),
        (1, 4, 2, 4),
        (1, 8, 0, 8),
        (7, 2, 0, 14),
    ]
    assert [folding(lattice(*case[:3])) for case in cases] == [case[3] for case in cases]
    assert folding(lattice(1, 3, 0, (1, 96))) == 3 and folding(torch.zeros(8, 8)) == 1
    random = torch.Generator().manual_seed(0)
    for share in (0.1, 0.3, 0.5, 0.8, 0.95):
        assert folding(torch.rand(64, 80, generator=random) < share) == 1
    assert folding((torch.rand(80, generator=random) < 0.4).expand(64, 80)) == 1
    assert folding(lattice(1, 8, 0, (1, 96))) == 8
    alone = torch.zeros(1, 96)
    alone[0, [46, 51]] = 1
    assert folding(alone) == 1


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_folded_image_is_told(calibrated):
    mask = lattice(2, 2, 0, (20, 24))
    mask[6:15, 8:17] = calibrated
    said = measure(random_complex(4, 20, 24, 8) * mask[..., None], mask, (1.0, 1.0, 1.0)).warnings
    assert sum("CAUTION" in w and "the image is aliased 4-fold" in w for w in said) == (not calibrated)


@pytest.mark.parametrize("lines, told", [(slice(0, 9), True), (slice(7, 12), True), (slice(5, 16), False)])
def test_a_folded_image_whose_calibration_is_of_no_use_is_told(lines, told):
    """By the scan's own lines: those of a calibration off the centre, or too small, are not regular."""
    mask, calibrated = lattice(2, 2, 0, (20, 24)), torch.zeros(20, 24)
    calibrated[lines, lines] = 1
    calibration = random_complex(4, 20, 24, 8, seed=1) * calibrated[..., None], calibrated
    kspace = random_complex(4, 20, 24, 8) * mask[..., None]
    said = measure(kspace, mask, (1.0, 1.0, 1.0), calibration=calibration).warnings
    caution = (
        "CAUTION: the undersampling is regular and too few calibration lines separate the coils: "
        "the image may be aliased 4-fold"
    )
    assert sum(w == caution for w in said) == told
