"""The requested volume, or the preview in its place.

Supervises the solver, its deadline, and whether its image is finite and credible.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from recon_core.ahead import Ahead, Crew
from recon_core.cg_sense import cg_sense
from recon_core.device_failure import GpuHangs, lost_the_gpu, ran_out_of_memory, why_the_cpu
from recon_core.jackknife import estimated_error
from recon_core.measure import measure
from recon_core.measurement import Measurement
from recon_core.methods import METHODS
from recon_core.metrics import object_mask
from recon_core.prior import Prior, PriorError, load_prior
from recon_core.simulate import sampling_mask
from recon_core.state import State
from recon_core.trust import Trust, finite, judge

from .budget import check_memory, to_compute
from .failure import ReconError, Unfinished, free_gpu_memory, gpu_lost, log_failure, sentence
from .options import Options

SOLVERS = Crew()
Report = Callable[[str, dict], None]  # told of a stage, and facts about it
WhyStop = Callable[[], str]  # a reason to finish early, else ""
PREVIEW = "CG-SENSE preview"
WATCH_S = 0.2  # polling interval of the solver
# For CG-SENSE once there is a reason to stop: most are ready by then, and there would be no other image.
LAST_LOOK_S = 5.0
HANG_S = 600.0  # a sweep of a 320 x 320 x 256 matrix takes a minute on two CPU cores

log = logging.getLogger("slicediff")


def never_stop() -> str:
    """Never gives a reason to stop early."""
    return ""


@dataclass(frozen=True)
class Outcome:
    """The volume [z y x] for the requested series, its name, and remarks for the user.

    `failure` says why it is the preview, if so, and `learned` is a prior it has taught.
    """

    volume: torch.Tensor
    name: str
    remarks: list[str] = field(default_factory=list)
    failure: str = ""
    learned: torch.nn.Module | None = None


def solve(
    measurement: Measurement,
    preview: torch.Tensor,
    prior,
    options: Options,
    report: Report,
    why_stop: WhyStop = never_stop,
    learned: torch.nn.Module | None = None,
) -> Outcome:
    """The volume of the requested method; if an iterative one fails, the preview in its place, with the reason.

    `learned` is what another volume of the scan has taught.
    """
    name = METHODS[options.method].title
    if not METHODS[options.method].iterative:
        on_gpu = measurement.operator.device.type == "cuda"
        only = lambda _: next(states(measurement, preview, prior, options)).volume
        return Outcome(in_thread(only, report, why_stop, on_gpu), name)
    try:
        if measurement.operator.device.type != device_of(options).type:
            raise ReconError("the GPU could not take this scan")
        start = lambda: states(measurement, preview, prior, options, learned)
        state, remarks = run_solver(start, options, report, why_stop)
        trust, why = result_of(judge, report, measurement, preview, state.volume)
        if trust is Trust.FAILED:
            raise ReconError(f"this image {why}")
    except Exception as error:  # the boundary: send an image anyway
        log_failure(f"{name} failed, the preview stands", error)
        _let_go(error)
        if gpu_lost.is_set() and not options.preview and measurement.operator.device.type == "cuda":
            raise  # the preview was not sent and can no longer be read from the GPU: it is made again (recon.py)
        reason = f"{name} failed and the {PREVIEW} stands: {sentence(error)}"
        return Outcome(preview, PREVIEW, [reason], reason)
    if why:
        remarks.append(f"CAUTION: this image {why}: compare with the preview")
    for text in remarks:
        log.warning("%s: %s", name, text)
    return Outcome(state.volume, name, remarks, learned=state.learned)


def estimate_error(
    measurement: Measurement,
    preview: torch.Tensor,
    prior,
    options: Options,
    report: Report,
    why_stop: WhyStop = never_stop,
) -> Outcome:
    """Error map of the requested method's image.

    It is estimated from reconstructions with half the sweeps and without learning.

    Raises:
        ReconError: if it could not be computed, or not in time.
    """
    quick = options.model_copy(update={"sweeps": max(1, options.sweeps // 2), "adapt": 0})
    image_of = lambda part: states(part, cg_sense(part), prior, quick)
    progress = lambda _, facts: report("error map", facts)
    try:
        start = lambda: estimated_error(measurement, image_of, options.seed)
        state, stopped = run_solver(start, options, progress, why_stop)
        flaw = ""
        if stopped:
            flaw = stopped[0]
        elif not result_of(lambda _, found: finite(found), report, measurement, state.volume):
            flaw = "it holds NaN or infinity"
        percent = math.nan if flaw else result_of(_percent, report, measurement, preview, state.volume)
    except Exception as error:  # the boundary: the image itself has been sent
        log_failure("the error map failed", error)
        _let_go(error)
        raise ReconError(f"the error map was not made: {sentence(error)}") from error
    if flaw:
        raise ReconError(f"the error map was not made: {flaw}")
    remark = (
        f"the error is estimated at {percent:.2g} % of tissue brightness, "
        "root mean square of the complex image inside the object"
    )
    return Outcome(state.volume, f"estimated error of {METHODS[options.method].title}", [remark])


def _percent(measurement: Measurement, preview: torch.Tensor, error: torch.Tensor) -> float:
    """Root mean square of `error` [z y x] inside the object, in percent of tissue brightness."""
    return 100 * float(error[object_mask(preview)].abs().square().mean().sqrt()) / measurement.brightness(preview)


def result_of(work: Callable, report: Report, measurement: Measurement, *volumes: torch.Tensor) -> Any:
    """The result of `work(measurement, *volumes)`, on the host.

    Every look at what was computed goes through here, as on a GPU it may hang. Where the GPU fails for want of memory,
    or one of its libraries, the CPU does it, and the measurement's warnings say so.

    Raises:
        GpuHangs: if there is no result within HANG_S.
        ScanError: if the host has no memory for it either.
    """
    on_gpu = volumes[-1].is_cuda
    try:
        return in_thread(lambda _: work(measurement, *volumes), report, never_stop, on_gpu)
    except RuntimeError as error:
        if not on_gpu or lost_the_gpu(error) or not (reason := why_the_cpu(error)):
            raise
        log_failure("the CPU takes over what the GPU has computed", error)
        _let_go(error)
    coils = measurement.operator.coils
    check_memory(to_compute(coils, measurement.operator.shape, coils), "its image needs")
    if (warning := f"{reason}: the CPU made an image of what had been computed") not in measurement.warnings:
        measurement.warnings.append(warning)
    here = lambda _: work(measurement.to("cpu"), *(volume.cpu() for volume in volumes))
    return in_thread(here, report, never_stop, on_gpu)


def _let_go(error: Exception) -> None:
    """If memory ran out, free the solver's tensors, which the frames of the traceback hold."""
    if ran_out_of_memory(error):
        error.__traceback__ = None
        free_gpu_memory()


def run_solver(
    start: Callable[[], Iterator[State]], options: Options, report: Report, why_stop: WhyStop
) -> tuple[State, list[str]]:
    """The final state, or the latest one when stopped early or learning failed, with remarks.

    The sweeps run in a thread that can be abandoned.

    Raises:
        Unfinished: if stopped before the first sweep ended, or before the last one of a method without intermediate
            images.
        GpuHangs: if no sweep ended on the GPU within HANG_S.
    """
    began, state, solver = time.monotonic(), None, Ahead(once_computed(start), crew=SOLVERS)
    try:
        last_sweep_at, reason = began, ""
        while not reason and (state is None or state.sweep < state.sweeps):
            with contextlib.suppress(TimeoutError):
                state, last_sweep_at = solver.take(WATCH_S), time.monotonic()
                report("sweep", {"sweep": state.sweep, "sweeps": state.sweeps})
            reason = _why_end(options, began, last_sweep_at, why_stop)
    except StopIteration:
        log.info("the solver ended before its last sweep")
    finally:
        solver.close(WATCH_S)
    if time.monotonic() - last_sweep_at > HANG_S and device_of(options).type == "cuda":
        raise GpuHangs(f"stopped {reason}: the GPU hangs and will not be used again until this process is restarted")
    if state is None:
        raise Unfinished(f"stopped {reason} before its first sweep ended")
    early = reason and state.sweep < state.sweeps
    if early and not METHODS[options.method].anytime:
        raise Unfinished(
            f"stopped {reason} after {state.sweep} of {state.sweeps} steps, "
            f"and {METHODS[options.method].title} has no image before its last"
        )
    remarks = [f"stopped {reason} after {state.sweep} of {state.sweeps} sweeps"] if early else []
    if state.setback is not None:
        log_failure("learning from the scan failed", state.setback, logging.INFO)
        _let_go(state.setback)
        remarks.append(f"learning from the scan failed and the image without it stands: {sentence(state.setback)}")
    return state, remarks


def in_thread(work: Callable[[Report], Any], report: Report, why_stop: WhyStop, on_gpu: bool = False) -> Any:
    """The result of `work`, run in a solver thread, which can be abandoned.

    `work` is called with a Report that passes on to `report`, or ends the work once nobody waits for it any more.

    Raises:
        Unfinished: if there was a reason to stop, and no result within LAST_LOOK_S from then.
        GpuHangs: if there is no result on the GPU within HANG_S.
    """
    began, reason, end, over = time.monotonic(), "", math.inf, threading.Event()

    def report_if_awaited(stage: str, facts: dict) -> None:
        if over.is_set():
            raise Unfinished("nobody waits for it any more")
        report(stage, facts)

    worker = Ahead(items_of(lambda: [work(report_if_awaited)]), crew=SOLVERS)
    try:
        while time.monotonic() < end:
            try:
                return worker.take(WATCH_S)
            except TimeoutError:
                if worker.closed.is_set():  # the work's own
                    raise
            if not reason and (reason := why_stop()):
                end = time.monotonic() + LAST_LOOK_S
            if on_gpu and time.monotonic() - began > HANG_S:
                raise GpuHangs(
                    f"the GPU did not answer for {HANG_S:g} s "
                    "and will not be used again until this process is restarted"
                )
        raise Unfinished(f"stopped {reason} before its CG-SENSE image was ready")
    finally:
        over.set()
        worker.close(WATCH_S)


def items_of(start: Callable[[], Iterable]) -> Iterator:
    """The items of `start()`, which is called and iterated in the consuming thread."""
    yield from start()


def once_computed(start: Callable[[], Iterator[State]]) -> Iterator[State]:
    """The states of `start()`, each once its volume is computed.

    A GPU is only told what to do, and what it was told would add up beyond the deadline.
    """
    for state in start():
        if state.volume.is_cuda:
            torch.cuda.synchronize(state.volume.device)
        yield state


def _why_end(options: Options, began: float, last_sweep_at: float, why_stop: WhyStop) -> str:
    """A reason to end the solver: its deadline, no sweep for too long, or the caller's; else ""."""
    now = time.monotonic()
    if options.deadline_s is not None and now - began > options.deadline_s:
        return f"at the deadline of {options.deadline_s:g} s"
    if now - last_sweep_at > HANG_S:
        return f"because no sweep ended within {HANG_S:g} s"
    return why_stop()


def states(
    measurement: Measurement, preview: torch.Tensor, prior, options: Options, learned: torch.nn.Module | None = None
) -> Iterator[State]:
    """The states of the requested method.

    Options such as `sweeps`, and what was `learned`, apply to the method `diffusion` only.
    """
    method = METHODS[options.method]
    config = method.config
    if options.method == "diffusion":
        asked = {name: getattr(options, name) for name in vars(config) if hasattr(options, name)}
        config = replace(config, **asked, learned=learned)
    return method.run(measurement, prior, preview, config, options.seed)


def warm_up(prior, options: Options) -> None:
    """Run one sweep, and one round of learning, on a tiny volume and a thin slab.

    What loads on first use (kernels, plans, threads, an optimiser) is thus loaded before the first scan.
    """
    device, random = device_of(options), torch.Generator().manual_seed(0)
    once = options.model_copy(update={"sweeps": 1, "adapt": min(1, options.adapt)})
    for shape in ((16, 16, 16), (32, 32, 6)) if METHODS[options.method].iterative else ():
        mask = torch.from_numpy(sampling_mask(shape[:2], 2, acs=8))
        kspace = torch.randn(8, *shape, dtype=torch.complex64, generator=random) * mask[..., None]
        measurement = measure(kspace, mask.float(), (4.0, 4.0, 4.0), device=device)
        sweep_and_round = itertools.islice(states(measurement, cg_sense(measurement), prior, once), 2)
        solver = Ahead(sweep_and_round, crew=SOLVERS)
        for _ in solver:
            pass
        solver.close()


def load_prior_for(options: Options) -> Prior | None:
    """The prior that the options select, on their device; None if the method uses none.

    None as well if the device is a GPU that is lost, or hangs: then CG-SENSE stands.

    Raises:
        PriorError: if the weights cannot be loaded or do not fit the method, or CUDA was requested but is not
            available.
    """
    method = METHODS[options.method]
    if not method.uses_prior or (gpu_lost.is_set() and device_of(options).type == "cuda"):
        return None
    load, on_gpu = partial(load_prior, prior_of(options), device_of(options)), device_of(options).type == "cuda"
    try:
        prior = in_thread(lambda _: load(), lambda stage, facts: None, never_stop, on_gpu)
    except GpuHangs as error:
        log_failure("the prior was not loaded", error)
        return None
    method.check(prior)
    return prior


def prior_of(options: Options) -> str:
    """Name or path of the prior; `auto` selects the one that suits method and device, "" if the method uses none."""
    return METHODS[options.method].suitable_prior(device_of(options)) if options.prior == "auto" else options.prior


def device_of(options: Options) -> torch.device:
    """The device, with `auto` resolved; PriorError if a GPU was requested that is not there."""
    name, _, number = options.device.partition(":")
    if name == "cuda" and not torch.cuda.is_available():
        raise PriorError(
            f"device {options.device} was asked for, but torch finds no CUDA device; use device auto or cpu"
        )
    if number and int(number) >= (count := torch.cuda.device_count()):
        raise PriorError(
            f"device {options.device} was asked for, but torch finds {count} CUDA device{'s' * (count != 1)}, "
            "counted from 0; use device cuda or auto"
        )
    wanted = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    return torch.device("cpu" if wanted == "auto" else wanted)
