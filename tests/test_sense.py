"""The operator, its transforms and conjugate gradients against closed forms."""

import pytest
import torch
from conftest import random_complex

from recon_core.cg import conjugate_gradient
from recon_core.fft import centre_crop_or_pad, fft, hann, ifft, kspace_crop, resample
from recon_core.sense import Sense

SHAPES = [(3, 12, 15, 7), (1, 9, 8, 5), (4, 1, 16, 6), (2, 10, 11, 1)]


def make(shape, seed=0, fraction=0.4):
    maps = random_complex(*shape, seed=seed)
    maps = maps / maps.norm(dim=0)
    mask = (torch.rand(shape[1:3], generator=torch.Generator().manual_seed(seed)) < fraction).float()
    mask[shape[1] // 2, shape[2] // 2] = 1
    mask[0, 0] = 0.5
    return Sense(maps, mask), maps, mask


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_textbook_operator(shape):
    operator, maps, mask = make(shape)
    volume = random_complex(*shape[1:], seed=1)
    expected = fft(maps * volume, (1, 2)) * mask[..., None]
    torch.testing.assert_close(operator.forward(volume), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_adjoint_and_normal(shape):
    operator, _, _ = make(shape)
    volume, kspace = random_complex(*shape[1:], seed=1), random_complex(*shape, seed=2)
    left = torch.vdot(operator.forward(volume).flatten(), kspace.flatten())
    right = torch.vdot(volume.flatten(), operator.adjoint(kspace).flatten())
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    there_and_back = operator.adjoint(operator.forward(volume))
    torch.testing.assert_close(operator.normal(volume), there_and_back, atol=1e-5, rtol=1e-5)


def with_second(shape=(4, 12, 15, 7), first=2, positions=3, fraction=0.4):
    """(operator, maps, second, mask): an operator with a second set of maps for some readout positions, and its parts.

    Both sets of maps are [coils z y x], the second one 0 elsewhere; the mask is [z y].
    """
    operator, maps, mask = make(shape, fraction=fraction)
    second = random_complex(*shape, seed=7)
    second -= maps * (maps.conj() * second).sum(0)
    second *= torch.linspace(0.3, 1, shape[1])[:, None, None] / second.norm(dim=0)
    second[..., :first], second[..., first + positions :] = 0, 0
    inner = torch.fft.ifftshift(second[..., first : first + positions].permute(3, 0, 1, 2), (2, 3))
    return operator.with_second(inner, first), maps, second, mask


def test_two_parts_that_lie_over_each_other_are_added_as_each_of_them_is_seen():
    operator, maps, second, mask = with_second()
    volume = random_complex(12, 15, 10, seed=1)
    other = torch.zeros(12, 15, 7, dtype=volume.dtype)
    other[..., 2:5] = volume[..., 7:]
    images = maps * volume[..., :7] + second * other
    torch.testing.assert_close(operator.forward(volume), fft(images, (1, 2)) * mask[..., None], atol=1e-5, rtol=1e-5)
    assert operator.shape == (12, 15, 10) and operator.matrix == (12, 15, 7)
    expected = torch.cat([volume[..., :7], second.norm(dim=0).square()[..., 2:5] * volume[..., 7:]], -1)
    torch.testing.assert_close(operator.combined(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_adjoint_knows_both_parts(chunk):
    operator, _, _, _ = with_second()
    operator.chunk = chunk
    volume, kspace = random_complex(12, 15, 10, seed=1), random_complex(4, 12, 15, 7, seed=2)
    left = torch.vdot(operator.forward(volume).flatten(), kspace.flatten())
    right = torch.vdot(volume.flatten(), operator.adjoint(kspace).flatten())
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    there_and_back = operator.adjoint(operator.forward(volume))
    torch.testing.assert_close(operator.normal(volume), there_and_back, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(operator.to("cpu").normal(volume), operator.normal(volume))


def test_fully_sampled_data_tell_the_two_parts_apart():
    operator, _, _, _ = with_second()
    operator = operator.with_mask(torch.ones(12, 15))
    volume = random_complex(12, 15, 10, seed=5) * operator.support
    solved = operator.solve(operator.adjoint(operator.forward(volume)), 0.0, iterations=60)
    torch.testing.assert_close(solved, volume, atol=1e-4, rtol=1e-3)


def test_the_image_shows_both_parts_with_the_phase_of_the_first():
    operator, _, second, _ = with_second()
    volume = random_complex(12, 15, 10, seed=5)
    volume[3, 4, 2] = 0
    image, size = operator.overlaid(volume), second.norm(dim=0)
    expected = volume[..., :7].abs()
    expected[..., 2:5] = (expected[..., 2:5].square() + (size[..., 2:5] * volume[..., 7:]).abs().square()).sqrt()
    torch.testing.assert_close(image.abs(), expected)
    turned = image / volume[..., :7]
    turned[3, 4, 2] = 1
    assert turned.angle().abs().max() < 1e-5
    torch.testing.assert_close(image[3, 4, 2], size[3, 4, 2] * volume[3, 4, 7])
    plain, _, _ = make((4, 12, 15, 7))
    assert plain.overlaid(image) is image


@pytest.mark.parametrize("operator,shape", [(make((4, 12, 10, 6))[0], (12, 10, 6)), (with_second()[0], (12, 15, 10))])
def test_norm_is_at_most_one(operator, shape):
    volume = random_complex(*shape)
    for _ in range(30):
        volume = operator.normal(volume / volume.norm())
    assert volume.norm() <= 1 + 1e-5


def test_chunks_do_not_change_the_result():
    operator, _, _ = make((3, 12, 15, 7))
    volume = random_complex(12, 15, 7)
    whole = operator.normal(volume)
    operator.chunk = 2
    torch.testing.assert_close(operator.normal(volume), whole)


def test_fully_sampled_noiseless_data_give_the_volume_back():
    _, maps, _ = make((4, 12, 15, 7))
    operator = Sense(maps, torch.ones(12, 15))
    volume = random_complex(12, 15, 7, seed=5)
    solved = operator.solve(operator.adjoint(operator.forward(volume)), 0.0, iterations=5)
    torch.testing.assert_close(solved, volume, atol=1e-5, rtol=1e-4)


def test_single_coil_tikhonov_has_its_closed_form():
    mask = (torch.rand(16, 12, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    operator = Sense(torch.ones(1, 16, 12, 3, dtype=torch.complex64), mask)
    b, rho = random_complex(16, 12, 3), 0.3
    expected = ifft(fft(b, (0, 1)) / (mask + rho)[..., None], (0, 1))
    torch.testing.assert_close(operator.solve(b, rho, iterations=10), expected, atol=1e-5, rtol=1e-4)


def test_conjugate_gradients_solve_each_problem_on_its_own():
    matrices = random_complex(5, 8, 8)
    matrices = matrices @ matrices.mH + torch.eye(8)
    b = random_complex(5, 8, seed=3)
    solved = conjugate_gradient(lambda v: (matrices @ v[..., None])[..., 0], b, iterations=40)
    torch.testing.assert_close(solved, torch.linalg.solve(matrices, b), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_conjugate_gradients_stop_at_their_tolerance(tolerance):
    """Not before, and not long after."""
    matrix = torch.diag(torch.linspace(0.01, 1, 200)).to(torch.complex64)
    b = random_complex(1, 200)
    solved = conjugate_gradient(lambda v: (matrix @ v[..., None])[..., 0], b, iterations=500, tolerance=tolerance)
    left = float((matrix @ solved[0] - b[0]).norm() / b.norm())
    assert 0.1 * tolerance < left < tolerance


@pytest.mark.parametrize("shape", [(3, 7, 9, 4), (2, 8, 6, 3)])
def test_another_mask_gives_the_operator_of_that_mask(shape):
    operator, maps, _ = make(shape)
    mask = (torch.rand(shape[1:3], generator=torch.Generator().manual_seed(5)) < 0.5).float()
    volume = random_complex(*shape[1:], seed=1)
    other = operator.with_mask(mask)
    torch.testing.assert_close(other.forward(volume), Sense(maps, mask).forward(volume))
    assert torch.equal(other.mask, mask) and torch.equal(other.sampled, mask > 0) and other.coils == shape[0]


def test_the_support_is_where_any_coil_sees():
    maps = torch.zeros(2, 5, 7, 4, dtype=torch.complex64)
    maps[0, 1, 2, 3] = maps[1, 4, 6, 0] = 1
    assert torch.equal(Sense(maps, torch.ones(5, 7)).support, (maps != 0).any(0))


def test_bad_operators_are_refused_in_a_sentence():
    maps = torch.ones(2, 4, 4, 4, dtype=torch.complex64)
    with pytest.raises(ValueError, match="mask is empty"):
        Sense(maps, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="expected coil maps"):
        Sense(maps, torch.ones(4, 5))
    with pytest.raises(ValueError, match="NaN"):
        Sense(maps * float("nan"), torch.ones(4, 4))


@pytest.mark.parametrize("n,m", [(8, 4), (9, 4), (9, 5), (8, 5), (7, 12), (8, 13)])
def test_kspace_crop_keeps_a_slow_wave_in_place(n, m):
    position = lambda size: (torch.arange(size) - size // 2) / size
    wave = lambda size: 2 + torch.cos(2 * torch.pi * position(size) + 0.3)
    out = kspace_crop(wave(n)[None, None], (1, 1, m))
    torch.testing.assert_close(out.real[0, 0], wave(m), atol=1e-5, rtol=1e-5)


def test_fewer_places_hold_no_finer_detail():
    """A wave that the new voxels cannot hold leaves nothing, not an alias; a slow one stays."""
    place = (torch.arange(40) - 20) / 40
    fast, slow = (torch.cos(2 * torch.pi * cycles * place)[:, None, None].to(torch.complex64) for cycles in (17, 3))
    extent = 0.61  # no whole number of voxels
    assert float(resample(fast, (12, 1, 1), (extent, 1, 1)).abs().max()) < 1e-4
    new = (torch.arange(12) - 6) / 12 * extent
    found = resample(slow, (12, 1, 1), (extent, 1, 1)).real[:, 0, 0]
    torch.testing.assert_close(found, torch.cos(2 * torch.pi * 3 * new), atol=1e-4, rtol=0)


def test_beyond_the_old_field_of_view_is_nothing():
    wide = resample(torch.ones(20, 1, 1, dtype=torch.complex64), (30, 1, 1), (1.47, 1, 1))
    place = (torch.arange(30) - 15) / 30 * 1.47
    assert float(wide[place.abs() > 0.5].abs().max()) == 0 and float((wide[place.abs() < 0.45] - 1).abs().max()) < 1e-4


def test_what_crosses_the_edge_of_the_new_field_of_view_leaves_no_ripples_there():
    # in old voxels: the new field of view ends at 15.5
    blob = lambda place: torch.exp(-((place - 14) ** 2) / 12)
    old, new = blob(torch.arange(40.0) - 20), blob((torch.arange(64) - 32) / 64 * 32.0)
    found = resample(old.to(torch.complex64)[:, None, None], (64, 1, 1), (0.8, 1, 1)).real[:, 0, 0]
    torch.testing.assert_close(found, new, atol=0.01, rtol=0)


@pytest.mark.parametrize("n,size", [(24, 48), (25, 40), (24, 31), (24, 20)])
def test_what_was_cut_off_along_the_readout_leaves_no_ripples(n, size):
    # in old voxels: cut off at the end
    blob = lambda place: torch.exp(-((place - 0.4 * n) ** 2) / 18) + torch.exp(-((place + 3) ** 2) / 18)
    old, new = blob(torch.arange(float(n)) - n // 2), blob((torch.arange(size) - size // 2) / size * n)
    old = old.to(torch.complex64)[None, None]
    images = (resample(old, (1, 1, size), (1, 1, 1), cut_out).real[0, 0] for cut_out in ([], [2]))
    wrapped, mirrored = ((image - new).abs().max() for image in images)
    assert mirrored < 0.1 and mirrored < wrapped / 2, (mirrored, wrapped)


def test_crop_then_pad_keeps_the_centre():
    line = torch.arange(9.0)
    for size in range(1, 15):
        assert centre_crop_or_pad(line, (size,))[size // 2] == line[4]


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_a_window_has_its_centre_where_k_is_zero(length):
    window = hann(length)
    reach = (length - 1) // 2
    middle = window[length // 2 - reach : length // 2 + reach + 1]
    torch.testing.assert_close(middle, middle.flip(0))
    assert int(window.argmax()) == length // 2 and window.max() == 1 and window.min() > 0


@pytest.mark.parametrize("length", [8, 9])
def test_a_window_leaves_a_real_image_real(length):
    edges = torch.zeros(48, dtype=torch.complex64)
    edges[10:30] = 1
    blurred = ifft(fft(edges, (0,)) * centre_crop_or_pad(hann(length), (48,)), (0,))
    assert blurred[10:30].angle().abs().max() < 0.05
