"""The chain's core: acquisitions in, images out. It opens no socket and no file; what outlives a scan is the solvers' threads and whether the GPU is lost (solve.py, failure.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import ismrmrd
import torch

from recon_core.cg_sense import cg_sense
from recon_core.device_failure import GPU_LOST, ran_out_of_memory, why_the_cpu
from recon_core.measurement import Measurement, measure
from recon_core.methods import METHODS
from recon_core.trust import doubts

from .budget import check_memory, to_compute
from .failure import Failures, free_gpu_memory, gpu_lost, log_failure, noted, raise_if_any
from .flags import volume_name
from .gather import Admit, gather, no_limit
from .geometry import ScanError
from .images import SERIES, make_images
from .options import Options
from .solve import PREVIEW, Hurry, Report, device_of, estimate_error, on_gpu, patient, solve
from .volume import Scan

Turn = Callable[[], AbstractContextManager[Hurry]]


def alone() -> AbstractContextManager[Hurry]:
    """The turn of a process that has the device to itself."""
    return contextlib.nullcontext(patient)


def reconstruct(header, items: Iterable, prior, options: Options, report: Report = lambda stage, facts: None, turn: Turn = alone, ahead: Callable = iter, admit: Admit = no_limit) -> Iterator[ismrmrd.Image]:
    """Yield the images of a 3D Cartesian scan, the CG-SENSE preview before the diffusion volume, and its error map, if wanted, after it.

    A volume that fails does not take the others, nor its own preview, with it.

    Args:
        header: the scan's ISMRMRD header.
        items: acquisitions as they arrive; other items are left aside.
        prior: D(slices [slices 2 h w], sigma); None for methods without a prior.
        options: validated options.
        report: told (stage, facts) as the work goes on.
        turn: context of one volume's computing (a queue for the device); its value says why to stop early, or nothing.
        ahead: given the iterator of gathered volumes, returns one (that reads on meanwhile).
        admit: told before each new volume its coils and how many are then gathered side by side; may raise, for want of memory.

    Raises:
        ValueError: a scan or an image that cannot be, after all that could be was yielded; the message is for the user.
    """
    failures: Failures = {}
    number = 0
    for number, scan in enumerate(ahead(gather(header, items, admit))):
        report("gathered", {"shape": list(scan.kspace.shape), "sampled": float((scan.counts > 0).float().mean()), "warnings": scan.warnings})
        volume = volume_name(number, scan.head.idx)
        images = partial(make_images, scan=scan, options=options, header=header, number=number)
        with noted(failures, volume), turn() as hurry:
            for text in (yield from images_of(scan, prior, options, images, report, hurry)):
                failures.setdefault(text, []).append(volume)
    raise_if_any(failures, number + 1)


def images_of(scan: Scan, prior, options: Options, images: Callable[..., list[ismrmrd.Image]], report: Report, hurry: Hurry) -> Generator[ismrmrd.Image, None, list[str]]:
    """Yield the images of one volume; returns what kept the wanted one from being made. All that it held is let go at its end."""
    measurement, preview = look(scan, options, report)
    notes = scan.warnings + measurement.warnings
    if METHODS[options.method].iterative and options.preview:
        yield from images(preview, series=SERIES["preview"], name=PREVIEW, notes=notes)
    outcome = solve(measurement, preview, prior, options, report, hurry)
    if not (outcome.failure and options.preview):
        yield from images(outcome.volume, series=SERIES["final"], name=outcome.name, notes=notes + outcome.remarks)
    if options.error_map and not outcome.failure:
        doubt = estimate_error(measurement, preview, prior, options, report, hurry)
        yield from images(doubt.volume, series=SERIES["error"], name=doubt.name, notes=notes + doubt.remarks)
    return outcome.failure


def look(scan: Scan, options: Options, report: Report) -> tuple[Measurement, torch.Tensor]:
    """The inverse problem and its CG-SENSE image [z y x]; on the CPU, with a note, if the GPU cannot take the scan."""
    if scan.flaw:
        raise ScanError("; ".join([scan.flaw, *scan.warnings]))
    if not scan.counts.any():
        raise ScanError("; ".join(["none of its lines could be used", *scan.warnings]))
    device, reason = device_of(options), GPU_LOST
    if device.type == "cpu":
        return _look(scan, options, device, report)
    for spare in () if gpu_lost.is_set() else (False, True):  # at first, and where its memory is short, with coil maps on the host
        try:
            return on_gpu(partial(_look, scan, options, device, report, spare))
        except RuntimeError as error:
            reason, short = why_the_cpu(error), ran_out_of_memory(error)
            if not reason:
                raise
            log_failure("the GPU cannot take it" if spare or not short else "the GPU cannot take it with its coil maps", error)
        free_gpu_memory()
        if not short:
            break
    measurement, preview = _look(scan, options, torch.device("cpu"), report)
    measurement.warnings.append(f"{reason}: CG-SENSE was computed on the CPU")
    return measurement, preview


def _look(scan: Scan, options: Options, device: torch.device, report: Report, spare: bool = False, louder: float = 1.0) -> tuple[Measurement, torch.Tensor]:
    coils, *shape = scan.kspace.shape
    if device.type == "cpu" or spare:  # scans that came meanwhile may have taken what was free
        check_memory(to_compute(coils, shape, options.coils), "its image needs")
    reference = scan.phase_reference.get(coils)
    how = dict(coils=options.coils, device=device, phase_reference=reference, louder=louder, keep_lines=options.error_map, brightness=scan.brightness, on_host=spare)
    measurement = measure(scan.kspace, scan.counts, scan.geometry.voxel_mm, scan.noise, scan.calibration, **how)
    scan.phase_reference.setdefault(coils, measurement.mixing[0].cpu())
    report("measured", {"coils": measurement.operator.coils, "acs": list(measurement.acs), "warnings": scan.warnings + measurement.warnings})
    preview = cg_sense(measurement)
    excess = measurement.excess_noise(preview)
    if excess > 1 and louder == 1:
        del measurement, preview  # or two of them would be held at a time
        return _look(scan, options, device, report, spare, excess)
    measurement.warnings += doubts(measurement, preview)
    report("preview", {"warnings": measurement.warnings})
    return measurement, preview
