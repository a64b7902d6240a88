"""Core of the chain: acquisitions in, images out.

It opens no socket or file; only the solver threads (solve.py) and whether the GPU is lost (failure.py) outlive a scan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import ismrmrd
import torch

from recon_core.cg_sense import cg_sense
from recon_core.device_failure import GPU_LOST, lost_the_gpu, ran_out_of_memory, why_the_cpu
from recon_core.measure import measure
from recon_core.measurement import Measurement
from recon_core.methods import METHODS
from recon_core.trust import doubts

from .budget import check_memory, has_room, to_compute
from .failure import Failures, free_gpu_memory, gpu_lost, log_failure, noted, raise_if_any
from .flags import volume_name
from .gather import Admit, gather, no_limit
from .geometry import ScanError
from .images import SERIES, make_images
from .options import Options
from .solve import PREVIEW, Hurry, Report, apart, device_of, estimate_error, patient, result_of, solve
from .volume import GatheredVolume

TWO_SETS = 1.25  # times the memory of one, for an object that reaches beyond the field of view
Turn = Callable[[], AbstractContextManager[Hurry]]


def alone() -> AbstractContextManager[Hurry]:
    """The turn for a process that has the device to itself."""
    return contextlib.nullcontext(patient)


def reconstruct(
    header,
    items: Iterable,
    prior,
    options: Options,
    report: Report = lambda stage, facts: None,
    turn: Turn = alone,
    ahead: Callable = iter,
    admit: Admit = no_limit,
) -> Iterator[ismrmrd.Image]:
    """Yield the images of a 3D Cartesian scan.

    For each volume, these are the CG-SENSE preview, the diffusion image and, if requested, its error map.
    A volume that fails affects neither the others nor its own preview.

    Args:
        header: the scan's ISMRMRD header.
        items: acquisitions, or ReconData holding them, as they arrive; other items are ignored.
        prior: denoiser D(slices [slices 2 h w], sigma); None for methods without a prior.
        options: validated options.
        report: called with (stage, facts) as the work proceeds.
        turn: context for computing one volume (a queue for the device); its value is called for a reason to stop early,
            or "".
        ahead: wraps the iterator of gathered volumes (to read ahead during computation).
        admit: called before each new volume with its coils and the number of volumes then gathered at once; may raise
            for lack of memory.

    Raises:
        ValueError: if the scan or some images cannot be reconstructed, after all others were yielded; the message is
            for the user.
    """
    failures: Failures = {}
    number = 0
    for number, scan in enumerate(ahead(gather(header, items, admit))):
        sampled = float((scan.counts > 0).float().mean())
        report("gathered", {"shape": list(scan.kspace.shape), "sampled": sampled, "warnings": scan.warnings})
        volume = volume_name(number, scan.head.idx)
        images = partial(make_images, scan=scan, options=options, header=header, number=number)
        with noted(failures, volume), turn() as hurry:
            for text in (yield from images_of(scan, prior, options, images, report, hurry)):
                failures.setdefault(text, []).append(volume)
    raise_if_any(failures, number + 1)


def images_of(
    scan: GatheredVolume,
    prior,
    options: Options,
    images: Callable[..., Iterable[ismrmrd.Image]],
    report: Report,
    hurry: Hurry,
) -> Generator[ismrmrd.Image, None, list[str]]:
    """Yield the images of one volume; returns why the requested one could not be made, if so.

    They are of CG-SENSE on the CPU if the GPU is lost before the first.
    """
    for again in (False, True):
        made = _images_of(scan, prior, options, images, report, hurry)
        try:
            first = next(made)
            break
        except RuntimeError as error:
            if again or not lost_the_gpu(error):
                raise
            log_failure("the CPU takes over", error)  # from here on the GPU is not asked
    yield first
    return (yield from made)


def _images_of(
    scan: GatheredVolume,
    prior,
    options: Options,
    images: Callable[..., Iterable[ismrmrd.Image]],
    report: Report,
    hurry: Hurry,
) -> Generator[ismrmrd.Image, None, list[str]]:
    """The same on one device. Everything held is freed at the end."""
    measurement, preview = look(scan, options, report, hurry)

    def shown(
        volume: torch.Tensor,
        series: str,
        name: str,
        remarks: Iterable[str] = (),
        image_of: Callable = Measurement.image_of,
    ) -> list[ismrmrd.Image]:
        make = partial(images, series=SERIES[series], name=name)

        def made(there: Measurement, volume: torch.Tensor) -> list[ismrmrd.Image]:
            return list(make(image_of(there, volume), notes=[*scan.warnings, *there.warnings, *remarks]))

        return result_of(made, report, measurement, volume)

    if METHODS[options.method].iterative and options.preview:
        yield from shown(preview, "preview", PREVIEW)
    outcome = solve(measurement, preview, prior, options, report, hurry, scan.shared.learned)
    scan.shared.learned = scan.shared.learned if outcome.learned is None else outcome.learned
    if not (outcome.failure and options.preview):
        yield from shown(outcome.volume, "final", outcome.name, outcome.remarks)
    if options.error_map and not outcome.failure:
        error = estimate_error(measurement, preview, prior, options, report, hurry)
        yield from shown(error.volume, "error", error.name, error.remarks, lambda there, x: there.operator.overlaid(x))
    return outcome.failure


def look(scan: GatheredVolume, options: Options, report: Report, hurry: Hurry) -> tuple[Measurement, torch.Tensor]:
    """The inverse problem and its CG-SENSE image [z y x].

    On the CPU, with a warning, if the GPU cannot handle the scan.

    Raises:
        ScanError: if no image can be made of it.
        Unfinished: if there was a reason to stop before it was ready.
    """
    if scan.flaw:
        raise ScanError("; ".join([scan.flaw, *scan.warnings]))
    if not scan.counts.any():
        raise ScanError("; ".join(["none of its lines could be used", *scan.warnings]))
    device, reason = device_of(options), GPU_LOST
    if device.type == "cpu":
        return apart(partial(_look, scan, options, device), report, hurry)
    # The second try, if GPU memory is short, is with coil maps on the host.
    for spare in () if gpu_lost.is_set() else (False, True):
        try:
            return apart(partial(_look, scan, options, device, spare=spare), report, hurry, on_gpu=True)
        except RuntimeError as error:
            reason, short = why_the_cpu(error), ran_out_of_memory(error)
            if not reason:
                raise
            what = "the GPU cannot take it" if spare or not short else "the GPU cannot take it with its coil maps"
            log_failure(what, error)
        free_gpu_memory()
        if not short:
            break
    measurement, preview = apart(partial(_look, scan, options, torch.device("cpu")), report, hurry)
    measurement.warnings.append(f"{reason}: CG-SENSE was computed on the CPU")
    return measurement, preview


def _look(
    scan: GatheredVolume,
    options: Options,
    device: torch.device,
    report: Report,
    spare: bool = False,
    louder: float = 1.0,
) -> tuple[Measurement, torch.Tensor]:
    coils, *shape = scan.kspace.shape
    needed, on_cpu = to_compute(coils, shape, options.coils), device.type == "cpu"
    if on_cpu or spare:  # scans that arrived meanwhile may have taken the free memory
        check_memory(needed, "its image needs")
    sets = 1 if spare or (on_cpu and not has_room(TWO_SETS * needed)) else 2
    how = dict(
        coils=options.coils,
        device=device,
        reference=scan.shared.references.get(coils),
        louder=louder,
        keep_lines=options.error_map,
        gain=scan.gain,
        on_host=spare,
        sets=sets,
    )
    measurement = measure(scan.kspace, scan.counts, scan.geometry.voxel_mm, scan.noise, scan.calibration, **how)
    scan.shared.references.setdefault(coils, measurement.reference)
    warnings = scan.warnings + measurement.warnings
    report("measured", {"coils": measurement.operator.coils, "acs": list(measurement.acs), "warnings": warnings})
    preview = cg_sense(measurement)
    excess = measurement.excess_noise(preview)
    if excess > 1 and louder == 1:
        del measurement, preview  # else two of each would be held at once
        return _look(scan, options, device, report, spare, excess)
    measurement.warnings += doubts(measurement, preview)
    report("preview", {"warnings": measurement.warnings})
    return measurement, preview
