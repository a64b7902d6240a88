"""`slicediff simulate`: write a complete scan of a volume or phantom."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from ..simulation.simulate_options import SimulateOptions


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments; the defaults are those of SimulateOptions."""

    def option(name: str, text: str = "", **how) -> None:
        default = getattr(SimulateOptions, name[2:].replace("-", "_"))
        shown = default if isinstance(default, str) else f"{default:g}"
        parser.add_argument(name, help=f"{text} (default: {shown})".strip(), **how)

    parser.add_argument(
        "volume",
        help="NIfTI or .npy volume, or the word phantom; "
        "a complex volume keeps its phase, any other is given a smooth one",
    )
    parser.add_argument("scan", type=Path, help="ISMRMRD file to write; replaces an older one")
    parser.add_argument("--voxel-mm", type=float, help="voxel size to crop the k-space to (default: the volume's)")
    option("--coils", type=int)
    option("--acceleration", type=float)
    option("--pattern", "of the phase encodes", choices=("poisson", "regular", "full"))
    option("--acs", "calibration lines along each phase-encode axis", type=int)
    option(
        "--calibration",
        "calibration lines within the scan, before it, or as a scan of their own",
        choices=("integrated", "separate", "external"),
    )
    option("--snr", "tissue brightness over noise of the full scan's image", type=float)
    parser.add_argument(
        "--partial-fourier", type=_fractions, metavar="F[,F2]", help="acquired fraction along E1 (and E2) (default: 1)"
    )
    option("--partial-echo", "acquired fraction of the readout (asymmetric echo)", type=float)
    option("--oversampling", "of the readout", type=float)
    option("--noise-lines", type=int)
    parser.add_argument("--oblique", action="store_true", help="tilt the slab about two axes")
    option("--repetitions", type=int)
    option("--contrasts", "echoes", type=int)
    option("--averages", type=int)
    parser.add_argument(
        "--navigators", type=int, metavar="N", help="a navigator line at every Nth line (default: none)"
    )
    parser.add_argument("--waveforms", action="store_true", help="a physiological waveform beside the lines")
    option("--seed", type=int)
    parser.add_argument("--reference", type=Path, help="NIfTI to write the noise-free image to")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the scan and describe it in one line of JSON."""
    from ..simulation.scan import simulate

    given = {f.name: value for f in fields(SimulateOptions) if (value := getattr(arguments, f.name)) is not None}
    options = SimulateOptions(**given)
    facts = simulate(arguments.volume, arguments.scan, options, arguments.reference)
    if options.voxel_mm is not None and max(facts["voxel_mm"]) > 1.2 * options.voxel_mm:
        voxel = " x ".join(f"{mm:g}" for mm in facts["voxel_mm"])
        print(
            f"slicediff: note: the volume has no voxels as small as {options.voxel_mm:g} mm: the scan has {voxel} mm",
            file=sys.stderr,
        )
    print(json.dumps(facts))
    return 0


def _fractions(text: str) -> tuple[float, float]:
    first, _, second = text.partition(",")
    try:
        return float(first), float(second or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected one fraction or two with a comma between them, got {text!r}"
        ) from None
