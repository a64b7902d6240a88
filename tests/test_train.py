"""Training: what it learns from, that it goes on after a kill, that it repeats itself."""

import csv
import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from recon_core.batches import Batch, Batches
from recon_core.curve import Curve
from recon_core.prior import Prior, load_prior
from recon_core.rehearsal import NOTHING_WRONG, Rehearsal, lesson_loss, of_few_shapes
from recon_core.simulate import phantom
from recon_core.slices import MIN_SIDE, usable_axes
from recon_core.train import first_prior, train
from recon_core.train_options import TrainOptions
from recon_core.validation import Validation
from recon_core.variational import VariationalConfig
from recon_core.volumes import SlicePool, Volume, dipole_field, load_volume, to_voxel_mm


@pytest.fixture
def volumes(tmp_path):
    paths = []
    for i in range(2):
        path = tmp_path / f"volume{i}.npy"
        np.save(path, (phantom((40, 44, 36)).numpy() * (100 + 50 * i)).astype(np.uint8))
        paths.append(path)
    return [load_volume(p) for p in paths]


QUICK = TrainOptions(steps=6, batch=2, crop=16, save_every_s=0, precision="fp32", phantoms=0)


def read_curve(path):
    """Rows below the header."""
    header, *rows = csv.reader(path.read_text().splitlines())
    assert header == ["step", "name", "value"]
    return rows


def test_loss_falls(volumes, tmp_path):
    options = TrainOptions(steps=80, batch=4, crop=32, ema_decay=0.9)
    prior = train(volumes, tmp_path / "p.safetensors", options, log=lambda s: None)
    pool = SlicePool(volumes, crop=32, size=2)
    clean, _ = pool.batch(0, 8)
    noisy = clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    untrained = noisy * (0.25 / (0.25 + 0.04))
    with torch.no_grad():
        assert (prior(noisy, 0.2) - clean).square().mean() < 0.8 * (untrained - clean).square().mean()


@pytest.fixture
def short_scans(monkeypatch):
    """Rehearsals of two sweeps on small scans."""
    monkeypatch.setattr(Rehearsal, "config", VariationalConfig(sweeps=2))
    monkeypatch.setattr(Rehearsal, "voxels", (15_000, 20_000))


@pytest.mark.parametrize("own_states", [0.0, 1.0])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(volumes, tmp_path, short_scans, own_states):
    quick = QUICK.model_copy(update={"own_states": own_states})
    whole = train(volumes, tmp_path / "whole.safetensors", quick, log=lambda s: None)

    class Killed(Exception):
        pass

    saves = []

    def kill(data, path, save=torch.save):
        save(data, path)
        saves.append(1)
        if len(saves) == (2 if own_states else 3):  # saved after whole scans
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", lambda data, path: kill(data, path))
        with pytest.raises(Killed):
            train(volumes, tmp_path / "cut.safetensors", quick, log=lambda s: None)
    resumed = train(volumes, tmp_path / "cut.safetensors", quick, log=lambda s: None)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        torch.testing.assert_close(a, b)
    assert load_prior(tmp_path / "cut.safetensors").card["training"]["steps_done"] == 6
    assert {row[0] for row in read_curve(tmp_path / "cut.csv")} == {"6"}
    assert read_curve(tmp_path / "cut.csv") == read_curve(tmp_path / "whole.csv")


@pytest.mark.parametrize(
    "changes,names,difference",
    [
        (dict(seed=1), "ab", "seed was 0, is 1"),
        (dict(batch=4, vary_contrast=False, steps=9), "ab", "batch was 2, is 4; vary_contrast was True, is False"),
        (dict(voxel_mm=(2.0, 2.0)), "ab", "voxel_mm was [0.5, 4.0], is [2.0, 2.0]"),
        (dict(start_from="small"), "ab", "start_from was None, is small.safetensors (sha256 "),
        ({}, "ac", "volumes left out: b; volumes added: c"),
        ({}, "abb", "volumes added: b"),
        (dict(crop=24), "abcdef", "volumes added: c, d, e and 1 more; crop was 16, is 24"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(volumes, tmp_path, changes, names, difference):
    """Its weights would get a card that names volumes and options they do not come from."""
    named = lambda letters: [Volume(name, volumes[0].data, volumes[0].voxel_mm) for name in letters]
    out = tmp_path / "p.safetensors"
    train(named("ab"), out, QUICK.model_copy(update={"steps": 1}), log=lambda s: None)
    written = out.read_bytes(), out.with_suffix(".csv").read_bytes()
    with pytest.raises(ValueError) as refused:
        train(named(names), out, QUICK.model_copy(update=changes), log=lambda s: None)
    checkpoint = tmp_path / "p.checkpoint"
    assert str(refused.value).startswith(f"{checkpoint} is of another run ({difference}")
    assert str(refused.value).endswith(f"): take another --out, or remove {checkpoint}")
    assert (out.read_bytes(), out.with_suffix(".csv").read_bytes()) == written


def test_other_weights_of_the_same_name_are_another_start(volumes, tmp_path):
    once = QUICK.model_copy(update={"steps": 1})
    train(volumes, tmp_path / "first.safetensors", once, log=lambda s: None)
    again = once.model_copy(update={"start_from": str(tmp_path / "first.safetensors")})
    train(volumes, tmp_path / "second.safetensors", again, log=lambda s: None)
    train(volumes, tmp_path / "first.safetensors", QUICK, log=lambda s: None)
    weights = r"first.safetensors \(sha256 \w{12}\)"
    with pytest.raises(ValueError, match=f"start_from was {weights}, is {weights}"):
        train(volumes, tmp_path / "second.safetensors", again, log=lambda s: None)


def test_what_may_change_does_and_a_run_that_had_ended_says_so(volumes, tmp_path):
    """In another order the volumes are the same; checkpoints of before do not know what they were made of."""
    out, lines = tmp_path / "p.safetensors", []
    train(volumes, out, QUICK.model_copy(update={"steps": 1}), log=lambda s: None)
    may_change = {"steps": 2, "validate_every": 3, "save_every_s": 9, "device": "cpu", "start_share": 0.1}
    train(volumes[::-1], out, QUICK.model_copy(update=may_change), lines.append)
    assert len(lines) == 1 and lines[0].startswith("step 2/2")
    state = torch.load(tmp_path / "p.checkpoint", weights_only=True)
    assert state.pop("made_of")["volumes"] == ["volume0.npy", "volume1.npy"]
    torch.save(state, tmp_path / "p.checkpoint")
    train(volumes[:1], out, QUICK.model_copy(update={"steps": 2, "seed": 1}), lines.append)
    checkpoint = tmp_path / "p.checkpoint"
    assert lines[1:] == [f"nothing is left to train: {checkpoint} has 2 of 2 steps; {out} is written again"]


def test_weights_with_another_ending_are_refused(volumes, tmp_path):
    """`m.txt` would go on from the checkpoint of `m.safetensors`."""
    with pytest.raises(ValueError, match=r"ends in .safetensors, got .*m\.txt"):
        train(volumes, tmp_path / "m.txt", QUICK)
    assert not list(tmp_path.glob("m.*"))


def test_slices_follow_from_seed_and_step(volumes):
    first, second = SlicePool(volumes, crop=24, size=2, seed=3), SlicePool(volumes, crop=24, size=2, seed=3)
    first.batch(0, 4)
    assert torch.equal(first.batch(30, 4)[0], second.batch(30, 4)[0])
    assert not torch.equal(first.batch(31, 4)[0], first.batch(30, 4)[0])


def test_slices_are_complex_bright_and_rarely_empty(volumes):
    pool = SlicePool(volumes, crop=32, size=3)
    slices = torch.cat([pool.batch(step, 16)[0] for step in range(6)])
    magnitude = slices.norm(dim=1)
    assert slices.shape[1:] == (2, 32, 32)
    assert (magnitude.amax(dim=(1, 2)) > 0.3).float().mean() > 0.9
    assert 0.5 < float(magnitude.amax(dim=(1, 2)).median()) < 3
    assert float(slices.mean().abs()) < 0.1, "phase should be anywhere"


def test_resampling_blurs_through_the_plane_too():
    volume = torch.zeros(40, 40, 40)
    volume[20] = 1
    out, voxel_mm = to_voxel_mm(volume, (1.0, 1.0, 1.0), (4.0, 2.0, 1.0))
    assert out.shape == (10, 20, 40) and voxel_mm == (4.0, 2.0, 1.0)
    assert float(out[5].mean()) == pytest.approx(0.25, abs=0.03)


def test_no_volumes_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="at least one training volume"):
        train([], tmp_path / "x.safetensors", QUICK)


def test_starting_from_other_weights_keeps_them_and_their_history(volumes, tmp_path):
    """As a site does that adds its own volumes: the card tells both trainings, and no path of the machine."""
    first = train(volumes, tmp_path / "first.safetensors", QUICK, log=lambda s: None)
    again = TrainOptions(steps=2, batch=2, crop=16, seed=1, start_from=str(tmp_path / "first.safetensors"))
    for a, b in zip(first.parameters(), first_prior(again).parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # stored in half precision
    mean = train(volumes, tmp_path / "second.safetensors", again, log=lambda s: None)
    training = load_prior(tmp_path / "second.safetensors").card["training"]
    assert training["learning_rate"] == 2e-4 and training["earlier"]["learning_rate"] == 8e-4
    assert training["start_from"] == "first.safetensors" and training["earlier"]["steps_done"] == 6
    for share, weights in ((0.0, (2, -1)), (1.0, (0, 1))):  # new = 2 mean - first
        shared = again.model_copy(update={"start_share": share})
        ended = train(volumes, tmp_path / "second.safetensors", shared, log=lambda s: None)
        for a, b, c in zip(ended.parameters(), mean.parameters(), first_prior(again).parameters()):
            expected = weights[0] * b + weights[1] * c
            torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="asked for 'base'"):
        first_prior(TrainOptions(architecture="base", start_from=str(tmp_path / "first.safetensors")))


@pytest.fixture
def one_thread():
    """As many as other processes compute with.

    Sums, and with them the coil maps where little signal is, depend on it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_do_what_one_does(volumes, tmp_path, short_scans):
    """Started as torchrun starts them; the same losses and the same weights."""
    one = train(volumes, tmp_path / "one.safetensors", QUICK.model_copy(update={"own_states": 1.0}), log=lambda s: None)
    code = """
import sys
from pathlib import Path
from recon_core.rehearsal import Rehearsal
from recon_core.train import train
from recon_core.train_options import TrainOptions
from recon_core.variational import VariationalConfig
from recon_core.volumes import load_volume
Rehearsal.config, Rehearsal.voxels = VariationalConfig(sweeps=2), (15_000, 20_000)
options = TrainOptions(
    steps=6, batch=2, crop=16, save_every_s=0, device="cpu", precision="fp32", own_states=1.0, phantoms=0
)
train([load_volume(p) for p in sys.argv[2:]], Path(sys.argv[1]), options, log=lambda s: None)
"""
    (tmp_path / "main.py").write_text(code)
    launcher = "-m torch.distributed.run --nproc-per-node 2 --standalone".split()
    paths = map(str, [tmp_path / "main.py", tmp_path / "two.safetensors", *sorted(tmp_path.glob("*.npy"))])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launcher, *paths], timeout=120, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    two = load_prior(tmp_path / "two.safetensors", half=False)
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)  # stored in half precision
    rows = [read_curve(tmp_path / f"{name}.csv") for name in ("one", "two")]
    assert [r[:2] for r in rows[0]] == [r[:2] for r in rows[1]]
    assert [float(r[2]) for r in rows[0]] == pytest.approx([float(r[2]) for r in rows[1]], rel=1e-3)


def test_the_curve_tells_losses_and_validation(volumes, tmp_path):
    options = TrainOptions(steps=4, batch=4, crop=16, validate_every=2)
    shown, lines = [], []
    show = lambda step, images: shown.append((step, images.shape))
    train(volumes[:1], tmp_path / "p.safetensors", options, lines.append, volumes[1:], show)
    assert [step for step, _ in shown] == [2, 4] and shown[0][1] == (3, 6, 96, 96)
    assert "held out: psnr 1 mm sigma 0.05" in lines[0] and "loss mm<" in lines[2]
    rows = read_curve(tmp_path / "p.csv")
    names = {row[1] for row in rows}
    assert [row[0] for row in rows if row[1] == "psnr 1 mm sigma 0.2"] == ["2", "4"]
    assert {row[0] for row in rows if not row[1].startswith("psnr")} == {"4"}
    assert "psnr 2 mm sigma 0.2" in names
    assert any(name.startswith("sigma<") for name in names) and any(name.startswith("mm<") for name in names)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_spoils_the_weights(volumes, tmp_path, monkeypatch):
    """Of the solver's own states too."""
    options = QUICK.model_copy(update={"steps": 2, "own_states": 1.0})
    losses = iter([torch.ones(2, requires_grad=True), torch.full((2,), float("nan"), requires_grad=True)])
    monkeypatch.setattr("recon_core.train.lesson_loss", lambda prior, lesson: next(losses))
    monkeypatch.setattr("recon_core.train.rehearse", lambda *_: itertools.repeat(None))
    with pytest.raises(ValueError, match="loss became nan at step 1; lower the learning rate"):
        train(volumes, tmp_path / "p.safetensors", options, log=lambda s: None)
    assert not (tmp_path / "p.safetensors").exists()


def test_validation_asks_each_slice_once_and_knows_its_size(volumes):
    """Of a volume of 2 mm there are no slices of 1 mm."""
    asked = []
    coarse = Volume("coarse", volumes[0].data, (2.0, 2.0, 2.0))
    prior = Prior("small")
    prior.register_forward_hook(lambda *_: asked.append(1))
    measured = Validation([coarse], 0).measure(prior)
    assert set(measured) == {f"psnr {mm} mm sigma {sigma}" for mm in (2, 4) for sigma in (0.05, 0.2)}
    assert len(asked) == 4
    uneven = Volume("uneven", phantom((45, 45, 45)).numpy(), (1.0, 1.0, 1.0))
    assert set(Validation([uneven], 0).slices) == {1.0, 2.0, 4.0}  # 2.045 and 4.09 mm, as whole voxels allow
    coarser = Volume("coarser", volumes[0].data, (5.0, 5.0, 5.0))
    assert set(Validation([coarser], 0).measure(prior)) == {"psnr 5 mm sigma 0.05", "psnr 5 mm sigma 0.2"}


def test_cuda_where_there_is_none_is_a_sentence(volumes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        train(volumes, tmp_path / "x.safetensors", QUICK.model_copy(update={"device": "cuda"}))


def test_a_batch_that_cannot_be_shared_is_a_sentence(volumes, tmp_path, monkeypatch):
    monkeypatch.setattr("recon_core.team.Team.size", 3, raising=False)
    monkeypatch.setattr("recon_core.team.Team.__init__", lambda self, device: setattr(self, "rank", 0))
    with pytest.raises(ValueError, match="cannot be shared by 3 processes"):
        train(volumes, tmp_path / "x.safetensors", QUICK)


def test_complex_volumes_keep_their_phase():
    """A fast phase ramp, faster than any that is added to magnitude volumes, is still there."""
    ramp = np.exp(1j * np.arange(48) * 1.2).astype(np.complex64)
    volume = Volume("ramp", phantom((40, 44, 48)).numpy() * ramp, (1.0, 1.0, 1.0))
    pool = SlicePool([volume], (1.0, 1.0), crop=32, size=6)
    slices, voxel_mm = pool.batch(0, 60)
    turned = torch.view_as_complex(slices.permute(0, 2, 3, 1).contiguous())

    def step(axis):
        return (turned.narrow(axis, 1, 31) * turned.narrow(axis, 0, 31).conj()).sum((1, 2)).angle().abs()

    fastest = torch.maximum(step(1), step(2))
    assert ((fastest - 1.2).abs() < 0.35).float().mean() > 0.4, "two of three orientations show the ramp"
    assert bool((voxel_mm >= 1.0).all()) and float(slices.abs().max()) > 0.3


@pytest.mark.parametrize("header", ["", "step,name,value\n"])
def test_the_curve_goes_on_where_the_checkpoint_was(tmp_path, header):
    """Rows of steps that a kill undid, and one that it cut short, are dropped; the running means do not jump.

    Older files had no header.
    """
    (tmp_path / "c.csv").write_text(f"{header}100,sigma<0.1,0.4\n100,psnr 1 mm sigma 0.2,20\n200,sigma<0.1,0.3\n20")
    curve = Curve(tmp_path / "c.csv", start=150, means={"sigma<0.1": 0.35})
    assert [row[0] for row in read_curve(tmp_path / "c.csv")] == ["100", "100"]
    batch = Batch(None, torch.tensor([2.0]), torch.tensor([0.05]), None)
    curve.add(150, torch.tensor([1.4]), torch.tensor([1.4]), None, batch)
    curve.settle()
    assert curve.values["sigma<0.1"] == pytest.approx(0.99 * 0.35 + 0.01 * 1.4)


def test_a_volume_coarser_than_the_voxel_size_asked_for_is_used_as_it_is():
    volume = Volume("coarse", phantom((40, 44, 48)).numpy(), (1.5, 1.5, 1.5))
    _, voxel_mm = SlicePool([volume], (1.0, 1.0), crop=32, size=2).batch(0, 4)
    assert voxel_mm.tolist() == [1.5] * 4


def test_field_around_a_sphere_of_other_susceptibility():
    """Outside chi/3 (a/r)^3 (3 cos^2 - 1), inside nothing; B0 along z.

    Source: Jackson, Classical Electrodynamics, section 5.10.
    """
    n, radius = 64, 8.0
    axis = (torch.arange(n) - n // 2).float()
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    field = dipole_field((distance < radius).float(), (1.0, 1.0, 1.0), (1.0, 0.0, 0.0))
    volume = float((distance < radius).sum()) / (4 / 3 * torch.pi)
    for place, shape in (((16, 0, 0), 2.0), ((0, 16, 0), -1.0), ((0, 0, -16), -1.0)):
        index = tuple(n // 2 + p for p in place)
        assert float(field[index]) == pytest.approx(shape / 3 * volume / 16**3, rel=0.1)
    assert abs(float(field[n // 2, n // 2, n // 2])) < 0.01


def test_training_slices_have_phase_of_air_beside_tissue_and_keep_their_magnitude():
    head = Volume("phantom", phantom((40, 48, 40)).numpy(), (2.0, 2.0, 2.0))
    pool = SlicePool([head], (2.0, 2.0), crop=32, size=8, seed=3, vary_sharpness=False, vary_contrast=False)
    pool.batch(0, 2)
    kinds = {volume.is_complex() for volume, _ in pool.pool.values()}
    magnitudes = [volume.abs() for volume, _ in pool.pool.values()]
    assert kinds == {True, False}
    for magnitude in magnitudes[1:]:
        torch.testing.assert_close(magnitude, magnitudes[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", [0, 17])
def test_batches_made_ahead_are_the_same_to_the_bit_and_in_order(volumes, start):
    """From a step in the middle too, as a resumed run asks for them; volumes are replaced on the way."""
    make = lambda: SlicePool(volumes, crop=16, size=3, refresh=4, seed=2)
    one, steps = make(), range(start, 40)
    known = [one.batch(step, 3)[0] for step in steps]
    for workers in (0, 1, 3):
        pool = make()
        with pool.ahead(lambda step: (step, pool.batch(step, 3)[0]), steps, workers) as batches:
            made = list(batches)
        assert [step for step, _ in made] == list(steps)
        assert all(torch.equal(a, b) for (_, a), b in zip(made, known))


def test_batches_of_a_process_of_their_own_are_the_same_to_the_bit(volumes, one_thread):
    make = lambda: Batches(SlicePool(volumes, crop=16, size=3, refresh=4, seed=2), 3, seed=5)
    known, steps = make(), range(5, 17)
    with make().ahead(steps, 2, elsewhere=True) as batches:
        for step, batch in zip(steps, batches, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(batch, known.make(step)))


def test_weights_do_not_depend_on_the_workers(volumes, tmp_path):
    """To the bit, over a replaced volume, and of a run that is resumed with others than it began with."""
    trained = {}
    for name, runs in {"0": [(14, 0)], "2": [(14, 2)], "cut": [(13, 2), (14, 1)]}.items():
        for steps, workers in runs:
            options = QUICK.model_copy(update={"steps": steps, "workers": workers})
            trained[name] = train(volumes, tmp_path / f"{name}.safetensors", options, log=lambda s: None)
    for a, b in zip(trained["0"].parameters(), trained["2"].parameters()):
        assert torch.equal(a, b)
    assert load_prior(tmp_path / "0.safetensors").card == load_prior(tmp_path / "2.safetensors").card
    assert read_curve(tmp_path / "0.csv") == read_curve(tmp_path / "2.csv")
    assert load_prior(tmp_path / "cut.safetensors").card["training"]["steps_done"] == 14


def test_a_damaged_volume_fails_at_the_step_that_needs_it(volumes):
    """The same sentence at the same step with and without workers."""
    damaged = Volume("damaged", np.full((20, 20, 20), np.nan, np.float32), (1.0, 1.0, 1.0))
    delivered = []
    for workers in (0, 2):
        pool, made = SlicePool([*volumes, damaged], crop=16, size=2, refresh=2, seed=7), []
        with pytest.raises(ValueError, match="no finite signal"):
            with pool.ahead(lambda step: pool.batch(step, 2), range(100), workers) as batches:
                for batch in batches:
                    made.append(batch)
        delivered.append(len(made))
    assert delivered[0] == delivered[1] > 0
    pool = SlicePool([*volumes, damaged], crop=16, size=2, refresh=2, seed=7)
    with pytest.raises(ValueError, match="^the image has no finite signal"):
        with Batches(pool, 2).ahead(range(100), 2, elsewhere=True) as batches:
            for number, _ in enumerate(batches, start=1):
                delivered.append(number)
    assert delivered[-1] == delivered[0]


def test_training_leaves_nothing_behind(volumes, tmp_path, monkeypatch):
    """No thread and no setting, whether it ends, fails, is interrupted, or a volume is damaged."""
    damaged = Volume("damaged", np.full((20, 20, 20), np.nan, np.float32), (1.0, 1.0, 1.0))
    before, inside = set(threading.enumerate()), []

    def run(steps, volumes, error=None):
        def schedule(step, steps):
            inside.append((len(set(threading.enumerate()) - before), torch.backends.cudnn.benchmark))
            if error and step == 2:
                raise error
            return 1.0

        monkeypatch.setattr("recon_core.train.schedule", schedule)
        options = QUICK.model_copy(update={"workers": 2, "steps": steps, "save_every_s": 60})
        train(volumes, tmp_path / f"{steps}.safetensors", options, log=lambda s: None)

    run(6, volumes)
    for steps, kind, volume, error in (
        (1001, OSError, volumes[1], OSError),
        (1002, KeyboardInterrupt, volumes[1], KeyboardInterrupt),
        (1003, ValueError, damaged, None),
    ):
        with pytest.raises(kind):
            run(steps, [volumes[0], volume], error)
        assert set(threading.enumerate()) <= before and not torch.backends.cudnn.benchmark
    assert inside[6:] == [(3, True)] * 6 and all(tuned for _, tuned in inside[:6])


def test_who_stops_at_once_does_not_wait_for_the_first_batch(volumes):
    """The thread that makes it waits for volumes, of which only those begun are ended."""
    pool, drawn, before = SlicePool(volumes, crop=16, size=1000), [], set(threading.enumerate())
    pool.draw_volume = lambda index, draw=pool.draw_volume: drawn.append(index) or draw(index)
    with pytest.raises(KeyError), pool.ahead(lambda step: pool.batch(step, 2), range(10), 2):
        raise KeyError
    assert set(threading.enumerate()) <= before and len(drawn) < 100


def test_lessons_are_the_solvers_states_and_the_truth_under_them(volumes, short_scans):
    """Two per scan, the same for the same seed and number; a prior that changes nothing leaves all of the error."""

    def rehearse(first, seed=0):
        rehearsal = Rehearsal(SlicePool(volumes, (1.0, 1.5), seed=seed), 4096, 32, seed)
        return rehearsal.lessons(lambda x, sigma: x, first)

    lessons = list(itertools.islice(rehearse(0), 4))
    assert [lesson.sigma for lesson in lessons[::2]] == pytest.approx([0.3, 0.3])
    assert all(lesson.sigma < 0.3 for lesson in lessons[1::2])
    for lesson in lessons:
        count, channels, height, width = lesson.given.shape
        assert lesson.given.shape == lesson.truth.shape and channels == 2
        assert height <= 32 and width <= 32 and height % 8 == width % 8 == 0
        assert 4096 - height * width < count * height * width <= 4096
        assert 0.3 < float(lesson.truth.norm(dim=1).quantile(0.9)) < 3  # tissue units
        error = (lesson.given - lesson.truth).square().mean()
        assert float(error) < float(lesson.truth.square().mean())
        expected = float(error / max(error, (NOTHING_WRONG * lesson.sigma) ** 2))
        assert float(lesson_loss(lambda x, sigma: x, lesson).mean()) == pytest.approx(expected, rel=1e-4)
        assert float(lesson_loss(lambda x, sigma: 0 * x, lesson).mean()) > expected
    again, other = next(rehearse(1)), next(rehearse(0, seed=1))
    torch.testing.assert_close(again.given, lessons[2].given)
    assert other.given.shape != lessons[0].given.shape or not torch.equal(other.given, lessons[0].given)


def test_slices_of_any_shape_are_asked_for_in_few(prior):
    """The answer is the same, wherever the network does not see beyond its slices."""
    asked, x = set(), torch.randn(50, 2, 70, 45, generator=torch.Generator().manual_seed(0))
    few = of_few_shapes(lambda slices, sigma: asked.add(tuple(slices.shape)) or prior(slices, sigma))
    for shape in ((50, 70, 45), (33, 65, 64), (64, 96, 40), (1, 66, 33)):
        slices = x[: shape[0], :, : shape[1], : shape[2]]
        torch.testing.assert_close(few(slices, 0.3), prior(slices, 0.3))
    assert asked == {(64, 2, 96, 64), (32, 2, 96, 64)}


def test_rehearsed_scans_are_volumes_planes_and_slices_with_one_two_or_many_coils(volumes, monkeypatch):
    """Of planes and few slices one orientation is of use, as in the solver; lines are left out of all."""
    rehearsal, kinds = Rehearsal(SlicePool(volumes, (1.0, 1.5)), 4096), []
    monkeypatch.setattr(Rehearsal, "voxels", (20_000, 30_000))
    for number in range(14):
        measurement, truth = rehearsal.scan(number)
        operator = measurement.operator
        assert truth.shape == measurement.adjoint.shape and 0.05 < float(operator.sampled.float().mean()) < 0.8
        several, thin = len(usable_axes(tuple(truth.shape))) > 1, truth.shape[0] < MIN_SIDE
        kinds.append((several, thin, measurement.sigma_known, operator.coils))
    several, thin, known, coils = map(set, zip(*kinds))
    assert several == thin == known == {True, False} and len(coils) >= 4


def test_scans_made_ahead_by_processes_are_the_same(volumes, one_thread):
    rehearsal = Rehearsal(SlicePool(volumes, (1.0, 1.5)), 4096)
    rehearsal.voxels = (20_000, 30_000)  # of the object: other processes know nothing of the class's
    for ahead, number in zip(rehearsal._scans(3, 2), (3, 4, 5)):
        for one, other in zip(ahead, rehearsal.scan(number)):
            one, other = (m if torch.is_tensor(m) else m.adjoint for m in (one, other))
            assert torch.equal(one, other)


@pytest.mark.parametrize("scan_workers", [0, 1])
def test_volumes_too_small_to_be_scanned_are_a_sentence(scan_workers, tmp_path):
    tiny = Volume("tiny", phantom((12, 14, 12)).numpy(), (1.0, 1.0, 1.0))
    options = QUICK.model_copy(update={"own_states": 1.0, "scan_workers": scan_workers})
    with pytest.raises(ValueError, match="^no scan could be made.*own_states needs objects of 24 voxels and more"):
        train([tiny], tmp_path / "p.safetensors", options, log=lambda s: None)


def test_learning_from_own_states_mends_them(volumes, tmp_path, short_scans):
    """16 steps on phantoms leave less of the error in states of other scans than as many steps of denoising alone."""
    left = []
    for own_states in (0.0, 3.0):
        options = TrainOptions(steps=16, batch=4, crop=32, voxel_mm=(1.0, 1.5), ema_decay=0.8, own_states=own_states)
        prior = train(volumes, tmp_path / f"{own_states}.safetensors", options, log=lambda s: None)
        with torch.no_grad():
            lessons = itertools.islice(Rehearsal(SlicePool(volumes, (1.0, 1.5), seed=9), 8192, 32, 9).lessons(prior), 8)
            left.append(np.mean([float(lesson_loss(prior, lesson).mean()) for lesson in lessons]))
    assert left[1] < 0.95 * left[0]


@pytest.mark.parametrize("share,expected", [(0.0, 0), (0.3, 12), (1.0, 40)])
def test_phantoms_are_drawn_beside_the_volumes(share, expected):
    small = Volume("small", phantom((20, 22, 24)).numpy(), (1.0, 1.0, 1.0))
    sides = []
    for number in range(40):
        pool = SlicePool([small], (0.9, 4.0), seed=1, vary_sharpness=False, phantoms=share)
        sides.append(max(pool.draw_volume(number)[0].shape))
    assert sum(side > 24 for side in sides) == pytest.approx(expected, abs=0.2 * expected)
