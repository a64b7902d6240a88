"""`slicediff demo`: run the whole chain on the shipped example, with a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..display import Display
from .arguments import add_options, given_options

# else there would be nothing to compare, or not pixel by pixel
FIXED = {
    "preview": "true",
    "error_map": "false",
    "output": "float32",
    "orientation": "acquired",
    "layout": "volume",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.add_argument(
        "--out", type=Path, default=Path("slicediff-demo"), help="folder for the files (default: slicediff-demo)"
    )
    parser.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
    parser.set_defaults(run=run)
    add_options(parser, without=FIXED)


def run(arguments: argparse.Namespace) -> int:
    """Simulate, stream, reconstruct, compare; 0 if it all worked."""
    from ..demo import TITLES, run_demo
    from ..files import check_folder

    check_folder(arguments.out)
    progress = Display()
    with progress:
        result = run_demo(arguments.out, progress.say, {**given_options(arguments), **FIXED})
    psnr = (f"{TITLES[name]} {quality:.2f} dB" for name, quality in result["psnr"].items())
    print("PSNR in the object: " + ", ".join(psnr))
    print(f"{result['seconds']:.0f} s; look at {result['png']}")
    if arguments.json:
        print(json.dumps(result))
    return 0
