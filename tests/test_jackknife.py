"""The estimated error: the textbook's jackknife of a mean, every line left out once, and the error of known images."""

import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_chain
from test_variational import VOXEL, last, problem

from gadgets.display import Display
from gadgets.failure import ReconError
from gadgets.header import parse_header
from gadgets.options import make_options
from gadgets.recon import alone, reconstruct
from gadgets.scan_files import ScanFile
from recon_core import jackknife
from recon_core.adaptation import AdaptedConfig, reconstruct_adapted
from recon_core.cg_sense import cg_sense
from recon_core.jackknife import CENTRE, GROUPS, estimated_error, smoothed, without_groups
from recon_core.measure import measure
from recon_core.measurement import Measurement
from recon_core.methods import METHODS
from recon_core.metrics import object_mask
from recon_core.prior import load_prior
from recon_core.scale import intensity_scale
from recon_core.sense import Sense
from recon_core.state import State


def of_random_lines(shape=(20, 24, 6), sampled=0.5):
    random = torch.Generator().manual_seed(0)
    mask = (torch.rand(shape[:2], generator=random) < sampled).float()
    mask[6:14, 8:16] = 1
    operator = Sense(torch.ones(1, *shape, dtype=torch.complex64), mask)
    lines = torch.randn(1, *shape, dtype=torch.complex64, generator=random) * mask[..., None]
    samples, energy = int(mask.sum()) * shape[2], float(lines.abs().square().sum())
    return Measurement(operator, operator.adjoint(lines), energy, samples, 0.7, VOXEL, (8, 8), lines=lines)


def lines_of(measurement):
    return measurement.operator.sampled


def test_every_line_is_left_out_once_and_the_centre_never():
    measurement = of_random_lines()
    taken, kept = lines_of(measurement), without_groups(measurement, seed=3)
    left_out = [taken & ~some for some in kept]
    expected = taken.clone()
    expected[6:14, 8:16] = False
    assert torch.equal(torch.stack(left_out).sum(0), expected.long())
    assert max(int(some.sum()) for some in left_out) - min(int(some.sum()) for some in left_out) <= 1
    ones = torch.ones(1, 20, 24, 6, dtype=torch.complex64)
    for part in map(measurement.part, kept):
        expected = Sense(ones, lines_of(part).float()).adjoint(measurement.lines)
        torch.testing.assert_close(part.adjoint, expected)
        energy = (measurement.lines * lines_of(part)[..., None]).abs().square().sum()
        assert part.energy == pytest.approx(float(energy), rel=1e-5)


def test_of_a_mean_it_is_the_textbooks(monkeypatch):
    """Image: the mean of the lines outside of the centre.

    With G equal groups of means y_g around y: sum |y_g - y|^2 / (G (G - 1)), no bias.
    """
    monkeypatch.setattr(jackknife, "SMOOTHED", 1e-6)
    measurement = of_random_lines(sampled=1.0)
    outer = torch.ones(20, 24, dtype=torch.bool)
    outer[6:14, 8:16] = False

    def mean_of(part):
        yield State(1, 1, 0.0, part.lines[0][outer & lines_of(part)].mean(0).expand(20, 24, 6), 0)

    found = last(estimated_error(measurement, mean_of, seed=1)).volume
    left_out = [outer & ~kept for kept in without_groups(measurement, seed=1)]
    assert len({int(some.sum()) for some in left_out}) == 1
    means = torch.stack([measurement.lines[0][some].mean(0) for some in left_out])
    expected = ((means - means.mean(0)).abs().square().sum(0) / (GROUPS * (GROUPS - 1))).sqrt()
    torch.testing.assert_close(found.real, expected.expand(20, 24, 6), rtol=1e-3, atol=1e-5)
    assert not found.imag.any()


def test_states_count_all_images():
    measurement, sweeps = of_random_lines(), 3 * (1 + GROUPS)

    def three_sweeps(part):
        return (State(n, 3, 0.0, part.adjoint, 10 * n) for n in (1, 2, 3))

    states = list(estimated_error(measurement, three_sweeps))
    assert [s.sweep for s in states] == list(range(1, sweeps + 1)) and {s.sweeps for s in states} == {sweeps}
    assert [s.network_evaluations for s in states][-1] == 30 * (1 + GROUPS)


def test_second_parts_are_no_neighbours_of_the_scans_own_positions():
    """They lie behind them in the volume, and are another part of the object."""
    shape, random = (20, 24, 6), torch.Generator().manual_seed(1)
    plain = of_random_lines(shape)
    operator = plain.operator.with_second(torch.ones(2, 1, *shape[:2], dtype=torch.complex64), 2)
    measurement = replace(plain, operator=operator, adjoint=operator.adjoint(plain.lines))
    noise = torch.randn(GROUPS, *shape, generator=random)
    wholes = iter([torch.zeros(*shape[:2], 8), *(torch.cat([own, 0 * own[..., :2]], 2) for own in noise)])

    def only_the_first_part_differs(part):
        yield State(1, 1, 0.0, next(wholes).to(torch.complex64), 0)

    error = last(estimated_error(measurement, only_the_first_part_differs)).volume.real
    assert float(error[..., :6].min()) > 0 and not error[..., 6:].any()


def test_smoothing_keeps_a_constant_inside_and_nothing_outside():
    inside = torch.zeros(9, 10, 11, dtype=torch.bool)
    inside[2:7, 3:9, 1:10] = True
    torch.testing.assert_close(smoothed(torch.full((9, 10, 11), 3.0), inside), 3.0 * inside)


def test_too_few_lines_are_told():
    measurement = of_random_lines()
    mask = torch.zeros(20, 24)
    mask[6:14, 8:16] = 1
    mask[0, :5] = 1
    few = replace(measurement, operator=measurement.operator.with_mask(mask))
    with pytest.raises(ValueError, match="from 5 lines outside of the k-space centre; at least 8"):
        last(estimated_error(few, lambda part: iter(())))
    assert CENTRE == 8


@pytest.mark.parametrize(
    "name, fewer",
    [("diffusion", {"sweeps": 5, "adapt": 0}), ("tv", {"iterations": 30}), ("cg", {})],
)
def test_it_is_about_the_true_error_and_where_it_is(name, fewer):
    kspace, mask, noise, reference = problem(shape=(32, 36, 30), snr=15.0)
    measurement, method = measure(kspace, mask, VOXEL, noise, keep_lines=True), METHODS[name]
    prior = load_prior("small") if method.uses_prior else None
    config = replace(method.config, **fewer) if method.config else None
    image_of = lambda part: method.run(part, prior, cg_sense(part), config, 0)
    volume, estimate = last(image_of(measurement)).volume, last(estimated_error(measurement, image_of)).volume.real
    inside = object_mask(reference)
    factor = (volume.abs() * reference)[inside].sum() / volume[inside].abs().square().sum()
    error = (volume.abs() - reference / factor).abs()
    local = smoothed(error.square(), inside).sqrt()
    # the error is of the magnitude, the estimate of real and imaginary part
    ratio = float(error[inside].square().mean().sqrt() * 2**0.5 / estimate[inside].square().mean().sqrt())
    assert 0.5 < ratio < 1.6
    ranks = torch.stack([local[inside], estimate[inside]]).argsort(1).argsort(1).float()
    assert torch.corrcoef(ranks)[0, 1] > 0.4


def test_a_volume_that_keeps_its_lines_is_not_learned_from():
    kspace, mask, noise, _ = problem(shape=(32, 36, 30), snr=15.0)
    measurement = measure(kspace, mask, VOXEL, noise, keep_lines=True)
    prior, config = load_prior("small"), AdaptedConfig(sweeps=2)
    states = list(reconstruct_adapted(measurement, prior, cg_sense(measurement), config))
    assert len(states) == 2


def test_the_chain_sends_it_last(scan_path, prior):
    images = run_chain(scan_path, prior, error_map=True, sweeps=2, output="float32")
    assert [image.image_series_index for image in images] == [1, 2, 3]
    final, error = images[1:]
    assert "estimated error of slice diffusion" in error.meta["SeriesDescription"]
    preview = torch.from_numpy(images[0].data[0].copy())
    mean_square = (error.data[0][object_mask(preview)] ** 2).mean()
    percent = 100 * float(np.sqrt(mean_square)) / intensity_scale(preview, (2.0, 2.0, 2.0))
    said = (
        r"the error is estimated at ([\d.]+) % of tissue brightness, "
        "root mean square of the complex image inside the object"
    )
    told = re.search(said, error.meta["ImageComment"])
    assert float(told[1]) == pytest.approx(percent, rel=0.1)
    assert final.data.shape == error.data.shape and 0 < float(error.data.max()) < float(final.data.max())
    assert list(final.getHead().position) == list(error.getHead().position)


def test_its_progress_is_its_own(scan_path, prior):
    display = Display()
    with ScanFile(scan_path) as scan:
        options = make_options({"device": "cpu", "error_map": True, "sweeps": 4})
        images = list(reconstruct(parse_header(scan.header_xml), scan.acquisitions(), prior, options, display.stage))
        assert len(images) == 3
    assert display.facts["sweeps"] == 4 and {"sweeps", "error map"} <= set(display.seconds)
    display.say("error map 3/30")
    tasks = [display.bars.tasks[number] for number in display.tasks.values()]
    bars = {task.description: (task.completed, task.total) for task in tasks}
    assert bars == {"sweep": (4, 4), "error map": (3, 10)}


def images_until_the_error(path, prior, images, turn=alone, **options):
    options = make_options({"device": "cpu", "error_map": True, **options})
    with ScanFile(path) as scan:
        header = parse_header(scan.header_xml)
        for image in reconstruct(header, scan.acquisitions(), prior, options, turn=turn):
            images.append(image)


def test_where_it_cannot_be_made_the_image_stands(scan_path, prior, monkeypatch):
    def out_of_luck(*_):
        raise ValueError("no such luck")
        yield

    monkeypatch.setattr("gadgets.solve.estimated_error", out_of_luck)
    images = []
    with pytest.raises(ReconError, match="the error map was not made: no such luck"):
        images_until_the_error(scan_path, prior, images, sweeps=2)
    assert [image.image_series_index for image in images] == [1, 2]


def test_memory_that_ran_out_is_let_go(scan_path, prior, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("no room for four images")
        yield

    let_go, images = [], []
    monkeypatch.setattr("gadgets.solve.estimated_error", too_large)
    monkeypatch.setattr("gadgets.solve.free_gpu_memory", lambda: let_go.append(True))
    with pytest.raises(ReconError, match="the error map was not made: out of memory: no room for four images"):
        images_until_the_error(scan_path, prior, images, sweeps=2)
    assert let_go and [image.image_series_index for image in images] == [1, 2]


def test_out_of_time_it_is_not_sent_and_told(scan_path, prior):
    images, why = [], "because the server is shutting down"

    def shuts_down():
        return nullcontext(lambda: why if len(images) == 2 else "")

    said = f"the error map was not made: stopped {why} (after .* of 10 sweeps|before its first sweep ended)"
    with pytest.raises(ReconError, match=said):
        images_until_the_error(scan_path, prior, images, shuts_down, sweeps=4)
    assert [image.image_series_index for image in images] == [1, 2]
