"""Learning from the scan itself: what is learned from, what judges, that it helps where there is something to learn."""

from dataclasses import replace

import pytest
import torch
from conftest import load_small_scan, random_complex
from test_variational import VOXEL, last, problem

from gadgets import solve
from gadgets.options import make_options
from gadgets.recon import reconstruct
from gadgets.simulation.protocol import SimulateOptions
from recon_core.adaptation import PASSES, AdaptedConfig, reconstruct_adapted
from recon_core.cg_sense import cg_sense
from recon_core.fft import centre_crop_or_pad
from recon_core.measure import measure
from recon_core.metrics import object_mask, psnr
from recon_core.prior import Prior, load_prior
from recon_core.pupil import Pupil, importance, unexplained
from recon_core.variational import reconstruct_variational

QUICK = AdaptedConfig(sweeps=3, adapt=5)
BOTH = (reconstruct_variational, reconstruct_adapted)


def plane(shape=(72, 80, 1), **changes):
    """Some readout positions in the middle of a phantom: the measurement and the image that is to be found."""
    z, y, x = shape
    kspace, mask, noise, reference = problem(shape=(z, y, x + 24), snr=20.0, **{"coils": 8, "acs": 16, **changes})
    return measure(kspace[..., 12 : 12 + x], mask, VOXEL, noise), reference[..., 12 : 12 + x]


def pupil_of(measurement, prior):
    return Pupil(measurement, prior, cg_sense(measurement), QUICK, 0)


@pytest.fixture
def untrained():
    return Prior("small").eval().requires_grad_(False)


def test_volumes_keep_no_lines_and_are_reconstructed_as_ever(untrained):
    measurement = measure(*problem()[:2], VOXEL)
    assert measurement.lines is None
    start = cg_sense(measurement)
    plain, adapted = (last(run(measurement, untrained, start, QUICK, 1)) for run in BOTH)
    assert torch.equal(plain.volume, adapted.volume) and plain.sweep == adapted.sweep == adapted.sweeps == 3


class Frozen(torch.nn.Module):
    """A network whose weights cannot learn: it is evaluated without gradients."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, slices, sigma):
        with torch.no_grad():
            return self.prior(slices, sigma)


@pytest.mark.parametrize("wrap", [Frozen, lambda prior: torch.nn.Identity()])
def test_a_prior_without_weights_to_learn_gives_its_image(untrained, wrap):
    measurement, prior = plane()[0], wrap(untrained)
    prior.forward = prior.forward if isinstance(prior, Frozen) else lambda slices, sigma: slices
    plain, adapted = (last(run(measurement, prior, cg_sense(measurement), QUICK, 1)) for run in BOTH)
    assert torch.equal(plain.volume, adapted.volume) and adapted.sweep == adapted.sweeps == QUICK.sweeps


def test_parts_of_a_scan_add_up_to_it():
    measurement, _ = plane((40, 44, 5), acs=12)
    chosen = torch.rand(40, 44, generator=torch.Generator().manual_seed(0)) < 0.5
    part, rest = (measurement.part(lines, slice(1, 4)) for lines in (chosen, ~chosen))
    torch.testing.assert_close(part.adjoint + rest.adjoint, measurement.adjoint[..., 1:4])
    torch.testing.assert_close(part.lines + rest.lines, measurement.lines[..., 1:4])
    assert part.samples + rest.samples == measurement.samples * 3 // 5
    assert part.energy + rest.energy == pytest.approx(float(measurement.lines[..., 1:4].abs().square().sum()))
    volume = random_complex(40, 44, 3)
    expected = measurement.operator.normal(torch.nn.functional.pad(volume, (1, 1)))[..., 1:4]
    torch.testing.assert_close(part.operator.normal(volume) + rest.operator.normal(volume), expected)


def test_what_is_unexplained_and_its_gradient():
    measurement, _ = plane((20, 24, 2), acs=8)
    operator, volume, alike = measurement.operator, random_complex(20, 24, 2), torch.ones(20, 24)
    assert float(unexplained(operator, volume, operator.forward(volume), alike)) < 1e-10
    assert float(unexplained(operator, torch.zeros_like(volume), measurement.lines, alike)) == pytest.approx(1)
    volume.requires_grad_(True)
    unexplained(operator, volume, measurement.lines, alike).backward()
    residual = operator.normal(volume.detach()) - measurement.adjoint
    torch.testing.assert_close(volume.grad, 2 * residual / measurement.lines.abs().square().sum())


def test_a_line_that_weighs_twice_counts_as_two():
    measurement, _ = plane((20, 24, 2), acs=8)
    operator, lines, volume = measurement.operator, measurement.lines, random_complex(20, 24, 2)
    weights = torch.ones(20, 24)
    weights[10, 12] = 2
    residual = (operator.forward(volume) - lines).abs().square().sum(dim=(0, 3))
    energy = lines.abs().square().sum(dim=(0, 3))
    expected = (residual.sum() + residual[10, 12]) / (energy.sum() + energy[10, 12])
    assert float(unexplained(operator, volume, lines, weights)) == pytest.approx(float(expected))


def test_a_measured_line_stands_for_those_around_it_that_were_not():
    """Of every third line one stands for two; near a denser half for fewer; the calibration square changes nothing."""
    taken = torch.zeros(120, 120, dtype=torch.bool)
    taken[:, ::3] = True
    weights = importance(taken, (0, 0))
    assert not bool(weights[~taken].any())
    assert float(weights[60, 60]) == pytest.approx(2, rel=0.02)
    square = taken.clone()
    square[50:70, 50:70] = True
    torch.testing.assert_close(importance(square, (20, 20))[:, :36], weights[:, :36], rtol=0.05, atol=0)
    taken[:, 60:] = True
    dense, border, sparse = importance(taken, (0, 0))[60, [117, 60, 30]].tolist()
    assert dense < 0.03 < border < sparse == pytest.approx(2, rel=0.05)
    assert border == pytest.approx(0.5, rel=0.1)  # two thirds were measured on either side of it together


@pytest.mark.parametrize("shape", [(1, 60), (4, 128), (3, 5)])
def test_lines_of_a_scan_with_all_of_them_stand_for_alike_many(shape):
    weights = importance(torch.ones(shape, dtype=torch.bool), (1, 2))
    assert bool((weights == weights[0, 0]).all()) and float(weights[0, 0]) > 0


def test_the_shipped_prior_learns_a_phantom_and_stays_as_it_was():
    """Flat ellipses are not the anatomy that it was trained on."""
    measurement, reference = plane()
    prior = load_prior("small")
    before = {name: weight.clone() for name, weight in prior.state_dict().items()}
    states = list(reconstruct_adapted(measurement, prior, cg_sense(measurement), replace(QUICK, sweeps=6, adapt=8), 0))
    first, final = (psnr(s.volume, reference, object_mask(reference)) for s in (states[5], states[-1]))
    assert final > first + 0.7
    assert all(torch.equal(weight, before[name]) for name, weight in prior.state_dict().items())
    assert not any(p.requires_grad for p in prior.parameters())


def test_the_first_image_stands_until_the_last_sweep(untrained):
    measurement, _ = plane()
    states = list(reconstruct_adapted(measurement, untrained, cg_sense(measurement), QUICK, 0))
    assert [s.sweep for s in states] == list(range(1, 3 * (1 + PASSES) + 5 + 1))
    assert {s.sweeps for s in states} == {len(states)}
    assert all(torch.equal(s.volume, states[2].volume) for s in states[2:-1])
    assert not torch.equal(states[-1].volume, states[2].volume)
    ratio = float(states[-1].volume.norm() / states[2].volume.norm())
    assert ratio == pytest.approx(1, abs=0.1)  # the mean of the passes, not their sum
    evaluations = [s.network_evaluations for s in states]
    learning, judging = 5 * 2 * 3, 2 * 3 * 3  # forward and backward; on two meshes the prior, and twice what it became
    assert evaluations == sorted(evaluations) and evaluations[-1] == 3 * (1 + PASSES) + learning + judging


def test_what_was_learned_serves_the_next_volume_of_the_scan(untrained, monkeypatch):
    """It begins with that prior and takes a fifth of the rounds; its first image is that of the prior as it was."""
    begun, (one, _), (other, _) = [], plane((48, 52, 3), acs=12), plane((48, 52, 3), acs=12, seed=5)
    learn = Pupil.learn

    def weights(network):
        return {name: weight.clone() for name, weight in network.state_dict().items()}

    def noted(self):
        begun.append(weights(self.network))
        return learn(self)

    monkeypatch.setattr(Pupil, "keep_if_better", lambda self: setattr(self, "best", self.average))
    monkeypatch.setattr(Pupil, "learn", noted)
    taught = last(reconstruct_adapted(one, untrained, cg_sense(one), QUICK, 0)).learned
    kept, begun[:] = weights(taught), []
    states = list(reconstruct_adapted(other, untrained, cg_sense(other), replace(QUICK, learned=taught), 0))
    assert len(begun) == 1 and states[-1].sweep == states[-1].sweeps == 3 * (1 + PASSES) + 1
    assert any(bool(w.any()) for n, w in kept.items() if n.endswith("tail.weight"))
    assert all(torch.equal(w, kept[n]) and torch.equal(w, begun[0][n]) for n, w in taught.state_dict().items())
    plain = last(reconstruct_variational(other, untrained, cg_sense(other), QUICK, 0))
    assert torch.equal(states[2].volume, plain.volume) and states[2].learned is None


def test_the_chain_hands_it_on_within_a_scan_only(untrained, monkeypatch, tmp_path):
    given, states = [], solve.states

    def noted(measurement, preview, prior, options, learned=None):
        given.append(learned)
        return states(measurement, preview, prior, options, learned)

    monkeypatch.setattr(solve, "states", noted)
    monkeypatch.setattr(Pupil, "keep_if_better", lambda self: setattr(self, "best", self.average))
    protocol = SimulateOptions(coils=4, acceleration=2, acs=10, repetitions=2)
    header, lines, _ = load_small_scan(tmp_path, protocol, (12, 48, 24))
    options = make_options({"sweeps": 1, "adapt": 1, "device": "cpu", "preview": False})
    for _ in range(2):
        assert len(list(reconstruct(header, lines, untrained, options))) == 2
    assert [learned is None for learned in given] == 2 * [True, False]


def test_same_seed_same_image(untrained):
    measurement, _ = plane()
    start = cg_sense(measurement)
    images = [last(reconstruct_adapted(measurement, untrained, start, QUICK, seed)).volume for seed in (3, 3, 4)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_held_out_lines_and_the_calibration_square_are_never_learned_from(untrained, monkeypatch):
    measurement, _ = plane()
    pupil, seen = pupil_of(measurement, untrained), []
    part = type(measurement).part

    def noted(self, lines, there):
        seen.append(lines)
        return part(self, lines, there)

    monkeypatch.setattr(type(measurement), "part", noted)
    for _ in range(2):
        pupil.learn()
    taken = measurement.lines.abs().sum(dim=(0, 3)) > 0
    assert [lines.shape for lines in seen] == 2 * [(72, 80)] + 2 * [(112, 120)]
    assert all(int(lines.sum()) == int(centre_crop_or_pad(lines, (72, 80)).sum()) for lines in seen)
    seen = [centre_crop_or_pad(lines, (72, 80)) for lines in seen]
    (given, target), (other, _) = zip(seen[::2], seen[1::2])
    for lines in (given, target):
        assert not bool((lines & pupil.held_out).any())
    assert torch.equal(given | target | pupil.held_out, taken)
    assert not bool((given & target).any()) and not torch.equal(given, other)
    z, y = measurement.acs
    centre = (slice(36 - z // 2, 36 - z // 2 + z), slice(40 - y // 2, 40 - y // 2 + y))
    assert bool(given[centre].all())
    assert 0.05 < float(pupil.held_out.sum() / taken.sum()) < 0.1


def test_what_is_judged_is_the_slow_mean_of_the_steps(untrained):
    """After three steps it has taken 2, 4 and 6 % of the way at most."""
    measurement, _ = plane()
    pupil = pupil_of(measurement, untrained)
    pupil.learn()

    def way(network):
        pairs = zip(network.parameters(), untrained.parameters())
        return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5

    assert 0 < way(pupil.average) < 0.1 * way(pupil.network)


def test_what_a_sweep_used_is_what_is_learned_from(untrained):
    """One evaluation of the network each, not another one with a graph."""
    pupil, evaluated = pupil_of(plane()[0], untrained), []
    pupil.network.register_forward_hook(lambda *_: evaluated.append(torch.is_grad_enabled()))
    pupil.learn()
    assert evaluated == QUICK.sweeps * [True]


def test_what_makes_it_worse_is_not_taken(untrained, monkeypatch):
    monkeypatch.setattr("recon_core.pupil.RATE", 10.0)
    measurement, _ = plane()
    pupil = pupil_of(measurement, untrained)
    pupil.learn()
    pupil.keep_if_better()
    assert pupil.best is untrained
    assert all(torch.equal(a, b) for a, b in zip(pupil.network.parameters(), untrained.parameters()))


def test_the_held_out_lines_choose_the_mesh_or_the_mean_of_both(untrained, monkeypatch):
    measurement, _ = plane()
    scores = iter([(5.0, 4.0, 4.5), (4.2, 3.9, 3.8), (3.7, 3.9, 4.0), (3.8, 3.8, 3.8)])

    def scored(self, prior):
        return zip([self.on_meshes[:1], self.on_meshes[1:], self.on_meshes], next(scores))

    monkeypatch.setattr(Pupil, "_scored", scored)
    pupil, chosen = pupil_of(measurement, untrained), []
    pupil.keep_if_better()  # the prior, and what it became
    assert pupil.on_best_meshes == pupil.on_meshes and pupil.best is not untrained
    for _ in range(2):
        first = pupil.best
        pupil.keep_if_better()
        chosen.append((pupil.on_best_meshes == (measurement,), pupil.best is first))
    assert chosen == [(True, False), (True, True)]


def test_what_the_meshes_are_judged_by_are_the_lines_that_their_images_predict(untrained):
    measurement, _ = plane()
    pupil = pupil_of(measurement, untrained)
    (own, _), (finer, _), (both, _) = scores = pupil._scored(untrained)
    assert own == (measurement,) and both == own + finer and finer[0].operator.shape == (112, 120, 1)
    part = measurement.part(pupil.training)
    image = last(reconstruct_variational(part, untrained, cg_sense(part), QUICK)).volume
    target = measurement.part(pupil.held_out)
    assert scores[0][1] == pytest.approx(float(unexplained(target.operator, image, target.lines, pupil.importance)))
    assert scores[2][1] <= max(scores[0][1], scores[1][1])  # a mean's error is not above the worse one's


def test_the_image_on_a_finer_mesh_comes_back_on_the_own(untrained, monkeypatch):
    monkeypatch.setattr(Pupil, "keep_if_better", lambda self: setattr(self, "on_best_meshes", self.on_meshes[1:]))
    measurement, _ = plane()
    states = list(reconstruct_adapted(measurement, untrained, cg_sense(measurement), QUICK, 0))
    assert states[-1].volume.shape == (72, 80, 1)
    change = (states[-1].volume - states[2].volume).norm()
    assert float(change / states[2].volume.norm()) < 0.3  # neither moved nor brighter


def test_each_pass_has_slices_and_poses_of_its_own(untrained, monkeypatch):
    """Their mean would gain nothing if all were the same."""
    seeds = []
    noted = lambda *arguments: seeds.append(arguments[4]) or reconstruct_variational(*arguments)
    monkeypatch.setattr("recon_core.adaptation.reconstruct_variational", noted)
    measurement, _ = plane()
    last(reconstruct_adapted(measurement, untrained, cg_sense(measurement), QUICK, 7))
    assert len(seeds) == len(set(seeds)) == 1 + PASSES


@pytest.mark.parametrize(
    "where, error",
    [
        ("__init__", TypeError("cannot be copied")),
        ("on_meshes", torch.OutOfMemoryError("CUDA out of memory")),
        ("learn", RuntimeError("a kernel is missing")),
        ("keep_if_better", torch.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_learning_that_fails_leaves_the_first_image(untrained, monkeypatch, where, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(Pupil, where, property(fails) if where == "on_meshes" else fails)
    measurement, _ = plane()
    states = list(reconstruct_adapted(measurement, untrained, cg_sense(measurement), replace(QUICK, adapt=1), 0))
    assert torch.equal(states[-1].volume, states[2].volume) and states[-1].sweep == states[-1].sweeps
    assert states[-1].setback is error


@pytest.mark.parametrize("where", ["__init__", "learn"])
def test_a_gpu_that_is_lost_while_learning_has_lost_the_first_image(untrained, monkeypatch, where):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Pupil, where, lost)
    measurement, _ = plane()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(reconstruct_adapted(measurement, untrained, cg_sense(measurement), replace(QUICK, adapt=1), 0))


@pytest.mark.parametrize(
    "learned, why",
    [
        (lambda x, sigma: x * float("nan"), "holds NaN or infinity"),
        (lambda x, sigma: 0 * x, "explains the data worse than CG-SENSE does"),
    ],
)
def test_an_image_of_what_was_learned_that_cannot_be_trusted_leaves_the_first(untrained, monkeypatch, learned, why):
    def keep_if_better(self):
        self.best, self.config = learned, replace(QUICK, prior_weight=100)

    monkeypatch.setattr(Pupil, "keep_if_better", keep_if_better)
    monkeypatch.setattr(Pupil, "learn", lambda self: None)
    measurement, _ = plane()
    states = list(reconstruct_adapted(measurement, untrained, cg_sense(measurement), replace(QUICK, adapt=1), 0))
    assert torch.equal(states[-1].volume, states[2].volume) and states[-1].sweep == states[-1].sweeps
    assert str(states[-1].setback).startswith(f"the image made with what was learned {why}")


@pytest.mark.parametrize("shape, acs", [((32, 36, 1), 12), ((1, 60, 64), 10)])
def test_too_few_samples_or_lines_to_judge_by_teach_nothing(untrained, shape, acs):
    measurement, _ = plane(shape, acs=acs)
    assert not pupil_of(measurement, untrained).can_be_judged
    assert last(reconstruct_adapted(measurement, untrained, cg_sense(measurement), QUICK, 0)).sweeps == 3


def test_denoisers_that_are_no_networks_are_used_as_they_are():
    measurement, _ = plane()
    assert last(reconstruct_adapted(measurement, lambda x, s: x * 0.9, cg_sense(measurement), QUICK, 0)).sweeps == 3


@pytest.mark.parametrize("shape, width", [((64, 72, 12), 2), ((8, 72, 80), 32), ((64, 72, 1), 1)])
def test_thick_slabs_are_learned_from_in_part(untrained, monkeypatch, shape, width):
    """Readout positions are scans of their own; slices along the readout need some of its length."""
    monkeypatch.setattr("recon_core.pupil.PIXELS", 10_000)
    measurement, _ = plane(shape)
    pupil = pupil_of(measurement, untrained)
    windows = [pupil._window() for _ in range(20)]
    assert {w.stop - w.start for w in windows} == {width}
    assert all(0 <= w.start and w.stop <= shape[2] for w in windows)
    assert len({w.start for w in windows}) > 1 or width == shape[2]
    middle = pupil._window(middle=True)
    assert middle.start == shape[2] // 2 - width // 2
