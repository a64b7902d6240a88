"""`slicediff simulate`: write a complete scan of a volume or phantom."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments; the defaults are those of SimulateOptions."""
    parser.add_argument("volume", help="NIfTI or .npy volume, or the word phantom; a complex volume keeps its phase, any other is given a smooth one")
    parser.add_argument("scan", type=Path, help="ISMRMRD file to write; replaces an older one")
    parser.add_argument("--voxel-mm", type=float, help="voxel size to crop the k-space to (default: the volume's)")
    parser.add_argument("--coils", type=int)
    parser.add_argument("--acceleration", type=float)
    parser.add_argument("--pattern", choices=("poisson", "regular", "full"))
    parser.add_argument("--acs", type=int, help="calibration lines along each phase-encode axis")
    parser.add_argument("--calibration", choices=("integrated", "separate", "external"), help="calibration lines within the scan, before it, or as a scan of their own")
    parser.add_argument("--snr", type=float, help="tissue brightness over noise of the full scan's image")
    parser.add_argument("--partial-fourier", type=_fractions, metavar="F[,F2]", help="acquired fraction along E1 (and E2)")
    parser.add_argument("--partial-echo", type=float, help="acquired fraction of the readout (asymmetric echo)")
    parser.add_argument("--oversampling", type=float, help="of the readout")
    parser.add_argument("--noise-lines", type=int)
    parser.add_argument("--oblique", action="store_true", help="tilt the slab about two axes")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--contrasts", type=int, help="echoes")
    parser.add_argument("--averages", type=int)
    parser.add_argument("--navigators", type=int, metavar="N", help="a navigator line at every Nth line (default: none)")
    parser.add_argument("--waveforms", action="store_true", help="a physiological waveform beside the lines")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--reference", type=Path, help="NIfTI to write the noise-free image to")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the scan and describe it in one line of JSON."""
    from ..simulation.protocol import SimulateOptions
    from ..simulation.scan import simulate

    options = SimulateOptions(**{f.name: value for f in fields(SimulateOptions) if (value := getattr(arguments, f.name)) is not None})
    facts = simulate(arguments.volume, arguments.scan, options, arguments.reference)
    if options.voxel_mm is not None and max(facts["voxel_mm"]) > 1.2 * options.voxel_mm:
        print(f"slicediff: note: the volume has no voxels as small as {options.voxel_mm:g} mm: the scan has {' x '.join(f'{mm:g}' for mm in facts['voxel_mm'])} mm", file=sys.stderr)
    print(json.dumps(facts))
    return 0


def _fractions(text: str) -> tuple[float, float]:
    first, _, second = text.partition(",")
    try:
        return float(first), float(second or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected one fraction or two with a comma between them, got {text!r}") from None
