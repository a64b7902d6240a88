"""`slicediff health`: ask a server for its status."""

from __future__ import annotations

import argparse
import json

from .arguments import port


def add(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port, default=9002)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the answer; 0 if the server takes scans."""
    from ..client import ask

    answer = ask(arguments.host, arguments.port, "slicediff::health")
    print(answer)
    return 0 if json.loads(answer)["ready"] else 1
