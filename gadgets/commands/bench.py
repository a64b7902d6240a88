"""`slicediff bench`: run tests/benchmarks/bench.py of a checkout."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.add_argument("rest", nargs="*", help="as tests/benchmarks/bench.py --help lists them")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run tests/benchmarks/bench.py of the checkout in the current folder, else of the one that holds this package."""
    places = [root / "tests" / "benchmarks" / "bench.py" for root in (Path.cwd(), Path(__file__).resolve().parents[2])]
    program = next((p for p in places if p.is_file()), None)
    if program is None:
        raise FileNotFoundError(
            "the benchmarks are not installed with the package: run `slicediff bench` in a checkout of the project"
        )
    sys.argv = [str(program), *arguments.rest]
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")
