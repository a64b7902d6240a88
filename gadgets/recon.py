"""The chain's core: acquisitions in, images out. No socket, no file, no global."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import ismrmrd
import torch

from recon_core.cg_sense import cg_sense
from recon_core.measurement import Measurement, measure
from recon_core.methods import METHODS
from recon_core.prior import Prior, PriorError, load_prior
from recon_core.state import State
from recon_core.variational import VariationalConfig

from .gather import gather
from .images import SERIES, make_images
from .options import Options

Report = Callable[[str, dict], None]


def reconstruct(header, items: Iterable, prior, options: Options, report: Report = lambda stage, facts: None) -> Iterator[ismrmrd.Image]:
    """Yield the images of a 3D Cartesian scan, the CG-SENSE preview before the diffusion volume.

    Args:
        header: the scan's ISMRMRD header.
        items: acquisitions as they arrive; other items are left aside.
        prior: D(slices [slices 2 h w], sigma); None for methods without a prior.
        options: validated options.
        report: told (stage, facts) as the work goes on.

    Raises:
        ValueError: a scan or an image that cannot be; the message is for the user.
    """
    for number, scan in enumerate(gather(header, items)):
        report("gathered", {"shape": list(scan.kspace.shape), "warnings": scan.warnings})
        measurement = measure(scan.kspace, scan.counts, scan.geometry.voxel_mm, scan.noise, scan.calibration, options.coils, device_of(options))
        notes = scan.warnings + measurement.warnings
        report("measured", {"coils": measurement.operator.maps.shape[1], "acs": list(measurement.acs), "warnings": notes})
        preview = cg_sense(measurement)
        report("preview", {})
        if options.preview and options.method not in ("cg", "zero-filled"):
            yield from make_images(preview, scan, options, header, SERIES["preview"], number, "CG-SENSE preview", notes)
        volume, remarks = solve(measurement, preview, prior, options, report)
        yield from make_images(volume, scan, options, header, SERIES["final"], number, METHODS[options.method].title, notes + remarks)


def solve(measurement: Measurement, preview: torch.Tensor, prior, options: Options, report: Report) -> tuple[torch.Tensor, list[str]]:
    """The volume [z y x] of the method asked for, and what the user should know of how it was made."""
    began = time.monotonic()
    for state in states(measurement, preview, prior, options):
        report("sweep", {"sweep": state.sweep, "sweeps": state.sweeps})
        late = options.deadline_s is not None and time.monotonic() - began > options.deadline_s
        if late and state.sweep < state.sweeps:
            return state.volume, [f"stopped at the deadline of {options.deadline_s:g} s after {state.sweep} of {state.sweeps} sweeps"]
    return state.volume, []


def states(measurement: Measurement, preview: torch.Tensor, prior, options: Options) -> Iterator[State]:
    """The states of the method asked for; `sweeps` and the like are of the method `diffusion`."""
    method = METHODS[options.method]
    config = method.config
    if options.method == "diffusion":
        config = VariationalConfig(options.sweeps, options.sigma_max, options.sigma_min, options.prior_weight, slice_fraction=options.slice_fraction)
    return method.run(measurement, prior, preview, config, options.seed)


def load_prior_for(options: Options) -> Prior | None:
    """The prior that the options ask for, on their device; None if the method has none.

    Raises:
        PriorError: if the weights cannot be loaded, or CUDA was asked for and is not there.
    """
    if not METHODS[options.method].uses_prior:
        return None
    return load_prior(options.prior, device_of(options))


def device_of(options: Options) -> torch.device:
    """Resolve `auto`; PriorError if CUDA was asked for and is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise PriorError("device cuda was asked for, but torch finds no CUDA device; use device auto or cpu")
    wanted = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    return torch.device("cpu" if wanted == "auto" else wanted)
