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
    from ..client import SendError, ask

    answer = ask(arguments.host, arguments.port, "slicediff::health")
    try:
        facts = json.loads(answer)
        ready = facts["ready"]
    except (ValueError, TypeError, KeyError):  # Gadgetron itself has port 9002, too
        raise SendError(
            f"the server at {arguments.host} port {arguments.port} is another one: it answered {answer[:100]!r}"
        ) from None
    print(json.dumps(facts))  # written anew, as the answer may steer a terminal
    return 0 if ready else 1
