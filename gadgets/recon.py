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
from .failure import Failures, ScanError, free_gpu_memory, gpu_lost, log_failure, noted, raise_if_any
from .flags import volume_name
from .gather import Admit, gather, no_limit
from .images import SERIES, make_images
from .options import Options
from .solve import PREVIEW, Report, WhyStop, device_of, estimate_error, in_thread, never_stop, result_of, solve
from .volume import GatheredVolume

TWO_SETS = 1.25  # times the memory of one, for an object that reaches beyond the field of view
Turn = Callable[[], AbstractContextManager[WhyStop]]


def alone() -> AbstractContextManager[WhyStop]:
    """The turn for a process that has the device to itself."""
    return contextlib.nullcontext(never_stop)


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
    for number, gathered in enumerate(ahead(gather(header, items, admit))):
        sampled = float((gathered.counts > 0).float().mean())
        report("gathered", {"shape": list(gathered.kspace.shape), "sampled": sampled, "warnings": gathered.warnings})
        volume = volume_name(number, gathered.head.idx)
        with noted(failures, volume), turn() as why_stop:
            failure = yield from images_of(gathered, number, header, prior, options, report, why_stop)
            if failure:
                failures.setdefault(failure, []).append(volume)
    raise_if_any(failures, number + 1)


def images_of(
    gathered: GatheredVolume, number: int, header, prior, options: Options, report: Report, why_stop: WhyStop
) -> Generator[ismrmrd.Image, None, str]:
    """Yield the images of volume `number`; returns why the requested one could not be made, "" if it was.

    They are of CG-SENSE on the CPU if the GPU is lost before the first.
    """
    for again in (False, True):
        made = _images_of(gathered, number, header, prior, options, report, why_stop)
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
    gathered: GatheredVolume, number: int, header, prior, options: Options, report: Report, why_stop: WhyStop
) -> Generator[ismrmrd.Image, None, str]:
    """The same on one device. Everything held is freed at the end."""
    measurement, preview = prepare(gathered, options, report, why_stop)

    def shown(
        volume: torch.Tensor,
        series: str,
        name: str,
        remarks: Iterable[str] = (),
        image_of: Callable = Measurement.image_of,
    ) -> list[ismrmrd.Image]:
        def made(there: Measurement, volume: torch.Tensor) -> list[ismrmrd.Image]:
            notes = [*gathered.warnings, *there.warnings, *remarks]
            facts = gathered, options, header, SERIES[series], number, name, notes
            return list(make_images(image_of(there, volume), *facts))  # which lets go of what it has converted

        return result_of(made, report, measurement, volume)

    if METHODS[options.method].iterative and options.preview:
        yield from shown(preview, "preview", PREVIEW)
    outcome = solve(measurement, preview, prior, options, report, why_stop, gathered.shared.learned)
    if outcome.learned is not None:
        gathered.shared.learned = outcome.learned
    if not (outcome.failure and options.preview):
        yield from shown(outcome.volume, "final", outcome.name, outcome.remarks)
    if options.error_map and not outcome.failure:
        error = estimate_error(measurement, preview, prior, options, report, why_stop)
        yield from shown(error.volume, "error", error.name, error.remarks, lambda there, x: there.operator.overlaid(x))
    return outcome.failure


def prepare(
    gathered: GatheredVolume, options: Options, report: Report, why_stop: WhyStop
) -> tuple[Measurement, torch.Tensor]:
    """The inverse problem and its CG-SENSE image [z y x].

    On the CPU, with a warning, if the GPU cannot handle the volume.

    Raises:
        ScanError: if no image can be made of it.
        Unfinished: if there was a reason to stop before it was ready.
    """
    if gathered.flaw:
        raise ScanError("; ".join([gathered.flaw, *gathered.warnings]))
    if not gathered.counts.any():
        raise ScanError("; ".join(["none of its lines could be used", *gathered.warnings]))
    device, reason = device_of(options), GPU_LOST
    if device.type == "cpu":
        return in_thread(partial(_prepare, gathered, options, device), report, why_stop)
    # The second try, if GPU memory is short, is with coil maps on the host.
    for maps_on_host in () if gpu_lost.is_set() else (False, True):
        try:
            work = partial(_prepare, gathered, options, device, maps_on_host=maps_on_host)
            return in_thread(work, report, why_stop, on_gpu=True)
        except RuntimeError as error:
            reason, short = why_the_cpu(error), ran_out_of_memory(error)
            if not reason:
                raise
            with_maps = short and not maps_on_host
            what = "the GPU cannot take it with its coil maps" if with_maps else "the GPU cannot take it"
            log_failure(what, error)
        free_gpu_memory()
        if not short or gpu_lost.is_set():
            break
    work = partial(_prepare, gathered, options, torch.device("cpu"))
    measurement, preview = in_thread(work, report, why_stop)
    measurement.warnings.append(f"{reason}: CG-SENSE was computed on the CPU")
    return measurement, preview


def _prepare(
    gathered: GatheredVolume,
    options: Options,
    device: torch.device,
    report: Report,
    maps_on_host: bool = False,
    noise_factor: float = 1.0,
) -> tuple[Measurement, torch.Tensor]:
    """The same on one device; the noise is `noise_factor` times that of the noise lines."""
    coils, *shape = gathered.kspace.shape
    needed, on_cpu = to_compute(coils, shape, options.coils), device.type == "cpu"
    if on_cpu or maps_on_host:  # scans that arrived meanwhile may have taken the free memory
        check_memory(needed, "its image needs")
    measurement = measure(
        gathered.kspace,
        gathered.counts,
        gathered.geometry.voxel_mm,
        gathered.noise,
        gathered.calibration,
        coils=options.coils,
        device=device,
        reference=gathered.shared.references.get(coils),
        louder=noise_factor,
        keep_lines=options.error_map,
        gain=gathered.gain,
        on_host=maps_on_host,
        sets=1 if maps_on_host or (on_cpu and not has_room(TWO_SETS * needed)) else 2,
    )
    gathered.shared.references.setdefault(coils, measurement.reference)
    warnings = gathered.warnings + measurement.warnings
    report("measured", {"coils": measurement.operator.coils, "acs": list(measurement.acs), "warnings": warnings})
    preview = cg_sense(measurement)
    excess = measurement.excess_noise(preview)
    if excess > 1 and noise_factor == 1:
        del measurement, preview  # else two of each would be held at once
        return _prepare(gathered, options, device, report, maps_on_host=maps_on_host, noise_factor=excess)
    measurement.warnings += doubts(measurement, preview)
    report("preview", {"warnings": measurement.warnings})
    return measurement, preview
