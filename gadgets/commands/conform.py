"""`slicediff conform`: test a server with everything that goes wrong at a scanner."""

from __future__ import annotations

import argparse
import json
import sys

from .arguments import port


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.add_argument(
        "--host", help="test the server there (default: this machine, or one of its own if there is no --port)"
    )
    parser.add_argument("--port", type=port, help="test the server there (default: 9002 with --host)")
    parser.add_argument("--case", action="append", metavar="NAME", help="run only this case; may be given again")
    parser.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the cases; 0 if none failed."""
    from rich.console import Console
    from rich.table import Table

    from ..conformance.suite import conform
    from ..failure import one_line

    table, results = Table("case", "promised", "happened", "seconds"), []
    with Console(stderr=True).status("") as status:
        given = arguments.host is not None or arguments.port is not None
        address = (arguments.host or "127.0.0.1", 9002 if arguments.port is None else arguments.port) if given else None
        for result in conform(address, arguments.case, status.update):
            happened = f"{result.verdict}: {one_line(result.happened)}"
            table.add_row(result.name, result.promise, happened, f"{result.seconds:.1f}")
            results.append(result)
    # no markup: a server's sentence may hold brackets
    Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False).print(table)
    counts = {verdict: sum(r.verdict == verdict for r in results) for verdict in ("passed", "failed", "skipped")}
    print(
        f"{len(results)} case{'s' * (len(results) != 1)}: "
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped, "
        f"{sum(r.seconds for r in results):.1f} s"
    )
    if arguments.json:
        print(json.dumps([vars(result) for result in results]))
    return 0 if counts["passed"] and not counts["failed"] else 1
