"""An image anyway: what stands when the solver, the device or its result fails, and what warns."""

import re
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_small_scan, random_complex, run_chain, small_object

from gadgets import recon, solve
from gadgets.failure import ReconError, gpu_lost, sentence
from gadgets.flags import NOISE_BIT
from gadgets.header import parse_header
from gadgets.images import notes_of
from gadgets.options import make_options
from gadgets.scan_files import ScanFile
from gadgets.simulation.protocol import SimulateOptions
from gadgets.simulation.scan import simulate
from recon_core.ahead import Ahead, Crew, left_behind
from recon_core.cg_sense import cg_sense
from recon_core.fft import fft
from recon_core.measure import measure
from recon_core.state import State
from recon_core.trust import BARS, Trust, doubts, judge


@pytest.fixture
def gpu():
    """As if there were one, found again after the test."""
    yield torch.device("cuda")
    gpu_lost.clear()


def images_and_error(path, prior, **options):
    """What came before the error, and the error."""
    images, options = [], make_options({"sweeps": 2, "device": "cpu", **options})
    with ScanFile(path) as scan, pytest.raises(ReconError) as caught:
        for image in recon.reconstruct(parse_header(scan.header_xml), scan.acquisitions(), prior, options):
            images.append(image)
    return images, str(caught.value)


def test_a_sampler_that_is_stopped_leaves_the_preview(scan_path):
    """Halfway its image is far worse than CG-SENSE."""
    images, error = images_and_error(scan_path, lambda x, sigma: time.sleep(0.02) or x, method="tpdm", deadline_s=0.5)
    stopped = "stopped at the deadline of 0.5 s after [0-9]+ of 80 steps"
    assert len(images) == 1
    assert re.search(f"{stopped}, and posterior sampling TPDM has no image before its last", error)


def test_a_sentence_has_no_control_characters():
    assert sentence(ReconError("\x1b[31mred\x07\n\n two\u2028lines\x9b ")) == "[31mred two lines"


def raising(x, sigma):
    raise RuntimeError("the solver is broken")


def test_the_preview_stands_and_the_reason_follows(scan_path, prior):
    images, error = images_and_error(scan_path, raising)
    assert [i.image_series_index for i in images] == [1]
    assert error.startswith("slice diffusion failed and the CG-SENSE preview stands")
    assert "the solver is broken" in error


def test_without_a_preview_cg_sense_takes_the_wanted_series(scan_path, prior):
    (image,), _ = images_and_error(scan_path, raising, preview=False)
    preview = run_chain(scan_path, lambda x, sigma: x, sweeps=1)[0]
    assert image.image_series_index == 2 and np.array_equal(image.data, preview.data)
    assert image.meta["GADGETRON_SeqDescription"] == "_CG-SENSE preview"
    assert "the solver is broken" in image.meta["ImageComments"]


def test_a_hanging_solver_is_left_behind_at_the_deadline(scan_path):
    let_go = threading.Event()
    began = time.monotonic()
    images, error = images_and_error(scan_path, lambda x, sigma: let_go.wait(60) and x, deadline_s=0.3)
    assert time.monotonic() - began < 20
    assert len(images) == 1 and "at the deadline of 0.3 s before its first sweep ended" in error
    assert left_behind() >= 1
    let_go.set()


def test_a_volume_that_fails_does_not_take_the_others(tmp_path, prior):
    np.save(tmp_path / "o.npy", small_object((16, 18, 16)))
    simulate(tmp_path / "o.npy", tmp_path / "s.h5", SimulateOptions(coils=2, pattern="full", repetitions=3))
    with ScanFile(tmp_path / "s.h5") as scan:
        header, lines = parse_header(scan.header_xml), list(scan.acquisitions())
    next(line for line in lines if line.idx.repetition == 1).data[:] = np.nan
    images = []
    with pytest.raises(ReconError, match="NaN"):
        for image in recon.reconstruct(header, lines, None, make_options({"method": "cg", "device": "cpu"})):
            images.append(image.repetition)
    assert images == [0, 2]


def test_a_sentence_names_the_volumes_that_failed_and_stays_short(tmp_path):
    options = SimulateOptions(coils=1, pattern="full", noise_lines=0, repetitions=3, contrasts=2)
    header, lines, _ = load_small_scan(tmp_path, options, (4, 6, 8))
    for line in lines:
        if line.idx.contrast or line.idx.repetition:
            line.data[:] = np.nan
    images = recon.reconstruct(header, lines, None, make_options({"method": "cg", "device": "cpu"}))
    assert next(images).repetition == 0
    said = (
        r"^volume 2 \(contrast 1\), volume 3 \(repetition 1\), volume 4 \(contrast 1, repetition 1\) and 2 more: "
        "the k-space holds NaN"
    )
    with pytest.raises(ReconError, match=said):
        next(images)


TOO_SMALL = "the GPU's memory does not hold this scan"
LOST = "the GPU failed and cannot be used until this process is restarted"


@pytest.mark.parametrize(
    "failure,reason",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), TOO_SMALL),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), TOO_SMALL),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), TOO_SMALL),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), LOST),
    ],
)
def test_a_gpu_that_cannot_take_the_preview_leaves_it_to_the_cpu(scan_path, prior, monkeypatch, gpu, failure, reason):
    """One whose memory is short is asked again, to leave coil maps on the host; one that is lost is not."""
    expected, asked = run_chain(scan_path, lambda x, sigma: x, sweeps=1)[0], []  # the preview

    def small_gpu(*args, device, on_host, **how):
        if device.type == "cuda":
            asked.append(on_host)
            raise failure
        return measure(*args, device=device, on_host=on_host, **how)

    monkeypatch.setattr(recon, "measure", small_gpu)
    for module in (recon, solve):
        monkeypatch.setattr(module, "device_of", lambda options: gpu)
    for scan in (1, 2):
        images, error = images_and_error(scan_path, prior)
        assert len(images) == 1 and f"{reason}: CG-SENSE was computed on the CPU" in images[0].meta["ImageComments"]
        assert "the GPU could not take this scan" in error
        assert np.array_equal(images[0].data, expected.data)
        assert gpu_lost.is_set() == ("illegal" in str(failure))
        assert asked == ([False] if gpu_lost.is_set() else [False, True] * scan)


def test_a_gpu_that_hangs_is_asked_for_nothing_more(monkeypatch, gpu):
    """Not even for what the solver made before: it would wait behind what hangs."""
    hangs = threading.Event()

    def states():
        yield State(1, 3, 0.1, SimpleNamespace(is_cuda=False), 0)  # to look at its volume would fail
        hangs.wait(30)

    monkeypatch.setattr(solve, "HANG_S", 0.5)
    monkeypatch.setattr(solve, "device_of", lambda options: gpu)
    monkeypatch.setattr(solve, "states", lambda *_: states())
    monkeypatch.setattr(solve, "estimated_error", lambda *_: states())
    scan = SimpleNamespace(operator=SimpleNamespace(device=gpu))
    hint = (
        "stopped because no sweep ended within 0.5 s: "
        "the GPU hangs and will not be used again until this process is restarted"
    )
    outcome = solve.solve(scan, preview := torch.ones(2, 2, 2), None, make_options({}), lambda *_: None)
    assert outcome.volume is preview
    assert outcome.failure == f"slice diffusion failed and the CG-SENSE preview stands: {hint}"
    assert gpu_lost.is_set()
    gpu_lost.clear()
    with pytest.raises(ReconError, match=f"^the error map was not made: {hint}$"):
        solve.estimate_error(scan, preview, None, make_options({}), lambda *_: None)
    hangs.set()
    assert gpu_lost.is_set()


def test_a_gpu_that_hangs_before_the_preview_leaves_the_scan_to_the_cpu(scan_path, prior, monkeypatch, gpu):
    """Its first call may be what hangs: of the second scan after a solver that missed its deadline."""
    hangs, asked, on_cpu = threading.Event(), [], recon._prepare

    def prepare(gathered, options, device, report, **how):
        asked.append(device.type)
        if device.type == "cuda":
            hangs.wait(30)
        return on_cpu(gathered, options, torch.device("cpu"), report, **how)

    (expected,), _ = images_and_error(scan_path, raising)
    for module in (recon, solve):
        monkeypatch.setattr(module, "device_of", lambda options: gpu)
    monkeypatch.setattr(recon, "_prepare", prepare)
    monkeypatch.setattr(solve, "HANG_S", 0.5)
    for _ in range(2):
        images, error = images_and_error(scan_path, prior)
        assert np.array_equal(images[0].data, expected.data) and "the GPU could not take this scan" in error
        assert f"{LOST}: CG-SENSE was computed on the CPU" in images[0].meta["ImageComments"]
    hangs.set()
    assert gpu_lost.is_set() and asked == ["cuda", "cpu", "cpu"]


def test_a_volume_is_let_go_before_the_next_one_is_prepared(tmp_path, monkeypatch, prior):
    held, alive = [], []
    options = SimulateOptions(coils=2, pattern="full", noise_lines=0, repetitions=3)
    header, lines, _ = load_small_scan(tmp_path, options, (4, 12, 8))

    def seen(*args, **how):
        alive.append(sum(measurement() is not None for measurement in held))
        measurement = measure(*args, **how)
        held.append(weakref.ref(measurement))
        return measurement

    monkeypatch.setattr(recon, "measure", seen)
    images = list(recon.reconstruct(header, lines, prior, make_options({"sweeps": 1, "adapt": 0, "device": "cpu"})))
    assert len(images) == 6 and alive == [0, 0, 0]


def test_an_image_that_explains_the_data_worse_than_the_preview_is_told_apart():
    """With A = identity and y = 0, the misfit of an image of rms r per real part is r / sigma: known numbers."""
    kspace = torch.randn(1, 12, 12, 12, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    measurement = measure(kspace, torch.ones(12, 12), (1.0, 1.0, 1.0), torch.randn(1, 4000, dtype=torch.complex64))
    best = measurement.adjoint
    assert measurement.misfit(best) < 0.01
    direction = torch.ones_like(best)
    drifted = lambda misfit: best + direction * misfit * 2**0.5 * measurement.sigma
    assert measurement.misfit(drifted(1.0)) == pytest.approx(1.0, abs=0.02)
    bars = {trust: bar.of_noise for trust, bar in BARS.items()}
    for misfit, trust in (
        (0.95 * bars[Trust.DOUBTFUL], Trust.SOUND),
        (1.7, Trust.DOUBTFUL),
        (1.05 * bars[Trust.FAILED], Trust.FAILED),
    ):
        assert judge(measurement, best, drifted(misfit))[0] is trust
    assert "residual 1.70 against" in judge(measurement, best, drifted(1.7))[1]
    assert judge(measurement, drifted(3.0), drifted(3.1)) == (Trust.SOUND, "")


def test_good_images_carry_no_warning_and_drifted_ones_do(scan_path, prior):
    assert "CAUTION" not in run_chain(scan_path, prior)[1].meta["ImageComments"]
    drifted = run_chain(scan_path, lambda x, sigma: torch.zeros_like(x), prior_weight=0.07)[1]
    assert "CAUTION" in drifted.meta["ImageComments"]


def test_an_image_that_left_the_data_is_not_sent(scan_path):
    images, error = images_and_error(scan_path, lambda x, sigma: torch.zeros_like(x), prior_weight=100)
    assert [i.image_series_index for i in images] == [1]
    assert "preview stands: this image explains the data worse than CG-SENSE does" in error


def test_learning_that_fails_costs_only_what_it_would_gain(tmp_path, prior, monkeypatch):
    def fails(*_):
        raise RuntimeError("a kernel is missing")

    header, lines, _ = load_small_scan(tmp_path, SimulateOptions(coils=2, pattern="full", noise_lines=0), (4, 24, 20))

    def images(adapt):
        options = make_options({"sweeps": 1, "adapt": adapt, "device": "cpu"})
        return list(recon.reconstruct(header, lines, prior, options))

    monkeypatch.setattr("recon_core.adaptation.Pupil", fails)
    plain, learned = images(0), images(5)
    assert len(learned) == 2 and np.array_equal(learned[1].data, plain[1].data)
    stands = "learning from the scan failed and the image without it stands"
    comments = learned[1].meta["ImageComments"]
    assert f"{stands}: internal error, RuntimeError: a kernel is missing" in comments


def test_an_error_map_that_is_not_finite_is_not_sent(monkeypatch):
    state = State(1, 1, 0.0, torch.full((2, 2, 2), float("nan")) + 0j, 0)
    monkeypatch.setattr(solve, "estimated_error", lambda *_: iter([state]))
    with pytest.raises(ReconError, match="^the error map was not made: it holds NaN or infinity$"):
        solve.estimate_error(None, None, None, make_options({"device": "cpu"}), lambda *_: None)


def test_reading_ahead_delivers_all_in_order_and_the_error_in_its_place():
    def source():
        yield from range(5)
        raise ValueError("here")

    ahead = Ahead(source())
    assert [next(ahead) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="here"):
        next(ahead)
    assert list(ahead) == []


def test_who_waits_for_an_item_finds_the_end_when_it_is_closed():
    go, got = threading.Event(), []
    ahead = Ahead(go.wait(10) for _ in range(2))
    taker = threading.Thread(target=lambda: got.extend(ahead), daemon=True)
    taker.start()
    assert not ahead.close(0.2), "its source hangs"
    taker.join(10)
    go.set()
    ahead.thread.join(10)
    assert not taker.is_alive() and not ahead.thread.is_alive() and got == []


def test_the_threads_of_a_crew_are_kept_but_for_one_that_hangs():
    crew, go, at_work = Crew(), threading.Event(), []

    def source():
        at_work.append(threading.current_thread())
        yield threading.current_thread().name

    for _ in range(3):
        ahead = Ahead(source(), crew=crew)
        assert list(ahead) == [threading.current_thread().name] and ahead.close(10)
    hanging, before = Ahead((go.wait(10) for _ in range(1)), crew=crew), left_behind()
    assert not hanging.close(0.2) and left_behind() == before + 1
    assert list(Ahead(source(), crew=crew)) and at_work[0] == at_work[1] == at_work[2] != at_work[3]
    go.set()
    at_work[0].join(10)
    assert not at_work[0].is_alive() and at_work[3].is_alive() and left_behind() == before


def test_what_a_crew_worked_on_is_let_go():
    class Held:
        pass

    held = Held()
    known, ahead = weakref.ref(held), Ahead((len(str(what)) for what in [held]), crew=Crew())
    del held
    assert len(list(ahead)) == 1 and ahead.close(10) and known() is None


def test_solvers_of_one_volume_after_the_other_share_a_thread(scan_path, prior):
    names = set()

    def seen(x, sigma):
        names.add(threading.get_ident())
        return prior(x, sigma)

    for _ in range(2):
        run_chain(scan_path, seen)
    assert len(names) == 1


def test_a_source_that_must_be_read_to_its_end_is():
    read = []
    ahead = Ahead((read.append(i) or i for i in range(50)), to_the_end=True)
    next(ahead)
    assert ahead.close(10) and read == list(range(50))


def seen_by_two(noise=1.0):
    """(kspace, mask, noise lines) of the phantom under two coils, fully sampled, SNR about 20."""
    truth = torch.from_numpy(small_object((24, 26, 20)))
    weights = torch.tensor([20.0, 14.0j]).reshape(2, 1, 1, 1)
    kspace = fft(weights * truth, (1, 2)) + 2**0.5 * random_complex(2, *truth.shape)
    return kspace, torch.ones(truth.shape[:2]), noise * 2**0.5 * random_complex(2, 4096, seed=1)


@pytest.mark.parametrize("averages", [1, 4])
def test_noise_lines_quieter_than_the_scan_are_recognised(averages):
    """As of another receiver gain or bandwidth; believed, they would have the noise fitted and break the coil maps."""
    kspace, mask, lines = seen_by_two()
    kspace, mask, lines = averages * kspace, averages * mask, averages**0.5 * lines
    right, quiet = (measure(kspace, mask, (4.0, 4.0, 4.0), factor * lines) for factor in (1.0, 0.1))
    assert right.excess_noise(cg_sense(right)) == 1.0
    excess = quiet.excess_noise(cg_sense(quiet))
    assert excess == pytest.approx(10, rel=0.15)
    mended = measure(kspace, mask, (4.0, 4.0, 4.0), 0.1 * lines, louder=excess)
    assert mended.sigma_known and mended.excess_noise(cg_sense(mended)) == 1.0
    torch.testing.assert_close(cg_sense(mended) * 0.1, cg_sense(right), rtol=0.02, atol=0.5)


@pytest.mark.parametrize("noise", [1.0, None])
def test_a_spike_is_told(noise):
    kspace, mask, lines = seen_by_two()
    kspace[:, 20, 5] += 20 * kspace.abs().max()
    measurement = measure(kspace, mask, (4.0, 4.0, 4.0), lines if noise else None)
    (text,) = doubts(measurement, cg_sense(measurement))
    assert text.startswith("CAUTION: CG-SENSE leaves ")
    assert text.endswith(" times the noise of the data unexplained: spikes, motion, or lines of another scan?")


def test_a_scan_without_noise_is_not_one_with_spikes(tmp_path):
    options = SimulateOptions(coils=4, pattern="full", snr=1e8, noise_lines=0)
    header, lines, _ = load_small_scan(tmp_path, options, (24, 35, 26))
    (image,) = recon.reconstruct(header, lines, None, make_options({"method": "cg", "device": "cpu"}))
    assert "CAUTION" not in image.meta["ImageComment"]


def test_noisy_echoes_keep_their_ratio(tmp_path, prior):
    """Fully sampled, the images of CG-SENSE are as bright as those without regularisation, at SNR 3 as well."""
    options = SimulateOptions(coils=3, pattern="full", snr=3, noise_lines=16)
    header, lines, _ = load_small_scan(tmp_path, options, (20, 22, 18))
    shown = []
    for method in ("zero-filled", "cg", "diffusion"):
        options = make_options({"method": method, "sweeps": 4, "device": "cpu", "output": "float32"})
        first, *_ = recon.reconstruct(header, lines, prior, options)
        shown.append(first.data)
    plain, cg, preview = shown
    inside = plain > np.percentile(plain, 90)
    for image in (cg, preview):
        assert image[inside].mean() == pytest.approx(plain[inside].mean(), rel=0.02)


def test_contrasts_share_their_coil_weights(tmp_path):
    """A coil that seems loud in the second contrast only is not turned down there.

    Near it, the ratio of the contrasts would be wrong.
    """
    options = SimulateOptions(coils=4, pattern="full", snr=1e5, noise_lines=0, contrasts=2)
    header, lines, _ = load_small_scan(tmp_path, options, (20, 22, 18))
    random = np.random.default_rng(0)
    for line in lines:
        loud = np.array([[6 if line.idx.contrast else 1], [1], [1], [1]])
        real, imaginary = (random.standard_normal(line.data.shape) for _ in range(2))
        line.data[:] += 0.1 * loud * (real + 1j * imaginary)
    options, both = make_options({"device": "cpu"}), []
    for gathered in recon.gather(header, lines):
        measurement, *_ = recon.prepare(gathered, options, lambda stage, facts: None, recon.never_stop)
        both.append(measurement)
    assert [measurement.coil_weights.tolist() for measurement in both] == [[1.0] * 4] * 2
    assert not both[1].sigma_known and float(both[1].sigma) > 1.5 * float(both[0].sigma)


def test_an_object_that_reaches_beyond_the_field_of_view_is_shown_whole(tmp_path, prior, monkeypatch):
    """Every second line along y halves the field of view, which is then 0.8 of the object.

    A third of the outer lines is missing. Preview, image and error map show both parts, if there is memory for that.
    """
    wide = np.zeros((26, 72, 24), np.float32)
    wide[:, 14:58] = small_object((26, 44, 24))
    np.save(tmp_path / "object.npy", wide)
    options = SimulateOptions(coils=8, pattern="full", snr=200, noise_lines=16)
    simulate(tmp_path / "object.npy", tmp_path / "scan.h5", options)
    with ScanFile(tmp_path / "scan.h5") as scan:
        header, lines = parse_header(scan.header_xml), list(scan.acquisitions())
    random = np.random.default_rng(0)

    def is_kept(line):
        if line.flags & NOISE_BIT:
            return True
        y, z = line.idx.kspace_encode_step_1, line.idx.kspace_encode_step_2
        inner = abs(y - 36) < 16 and abs(z - 13) < 8
        return y % 2 == 0 and (inner or random.random() < 0.67)

    kept = [line for line in lines if is_kept(line)]
    for line in kept:
        line.idx.kspace_encode_step_1 //= 2
    encoding = header.encoding[0]
    for space in (encoding.encodedSpace, encoding.reconSpace):
        space.matrixSize.y, space.fieldOfView_mm.y = 36, space.fieldOfView_mm.y / 2
    limits = encoding.encodingLimits.kspace_encoding_step_1
    limits.maximum, limits.center = 35, 18
    options = make_options({"sweeps": 3, "device": "cpu", "output": "float32", "error_map": True})
    images = list(recon.reconstruct(header, kept, prior, options))
    assert [image.data.shape[1:] for image in images] == [(26, 36, 24)] * 3
    said = "two sets of coil maps separate the parts, and the image shows both"
    assert all(said in image.meta["ImageComment"] for image in images)
    places = (torch.arange(72) - 36 + 18) % 36
    parts = torch.zeros(26, 36, 24).index_add_(1, places, torch.from_numpy(wide).square()).sqrt().numpy()
    inside = parts > 0.2
    for image in images[:2]:
        assert np.corrcoef(image.data[0][inside], parts[inside])[0, 1] > 0.95
    monkeypatch.setattr(recon, "has_room", lambda nbytes: False)
    (short,) = recon.reconstruct(header, kept, prior, make_options({"method": "cg", "device": "cpu"}))
    said = "or beyond along a phase encode, and one set of coil maps cannot describe both"
    assert any(note.endswith(said) for note in notes_of(short))


def test_noise_lines_that_are_too_quiet_are_told_with_both_images_and_change_no_brightness(tmp_path, prior):
    """Of two repetitions each is judged by itself; their units stay those of the noise lines."""
    options = SimulateOptions(coils=3, pattern="full", snr=30, noise_lines=16, repetitions=2)
    header, lines, _ = load_small_scan(tmp_path, options, (20, 22, 18))
    for line in lines:
        if line.flags & NOISE_BIT:
            line.data[:] *= 0.1
    options = make_options({"sweeps": 2, "device": "cpu", "output": "float32"})
    images = list(recon.reconstruct(header, lines, prior, options))
    said = r"the scan is ([0-9.]+) times as noisy as its noise lines"
    told = [re.search(said, image.meta["ImageComment"]) for image in images]
    assert len(images) == 4 and all(6 < float(found[1]) < 12 for found in told)
    previews = [image.data for image in images if image.image_series_index == 1]
    assert previews[0].mean() == pytest.approx(previews[1].mean(), rel=1e-2)
