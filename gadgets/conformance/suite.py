"""The conformance suite: what a server promises when peers, networks, scans, solvers and disks fail.

`conform` runs the cases of lines.py, peers.py and scans.py, each within its own time limit and followed by a correct
scan, whose images must be bit-identical to those of the first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import lines, peers, scans  # noqa: F401  they fill CASES
from .bench import Bench
from .case import CASES, Broken, Case

SLACK_S = 10.0


@dataclass(frozen=True)
class Result:
    """A case's row in the table; verdict is passed, failed or skipped."""

    name: str
    promise: str
    verdict: str
    happened: str
    seconds: float


def conform(
    address: tuple[str, int] | None, only: list[str] | None = None, show: Callable[[str], None] = lambda name: None
) -> Iterator[Result]:
    """Run the suite on the server at `address` (host, port), or on our own if None, and yield a result per case.

    Raises:
        Broken: if there is no working server to test, or `only` names an unknown case.
    """
    unknown = set(only or ()) - {case.name for case in CASES}
    if unknown:
        raise Broken(f"no case {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in CASES)}")
    with Bench(address) as bench:
        for case in CASES:
            if only is None or case.name in only:
                show(case.name)
                yield run_case(case, bench)


def run_case(case: Case, bench: Bench) -> Result:
    """Run one case within its time limit, and the correct scan after it."""
    if case.needs and bench.process is None:
        return Result(case.name, case.promise, "skipped", "needs a server of the suite's own", 0.0)
    began, end = time.monotonic(), {}
    thread = threading.Thread(target=_try, args=(case, bench, end), daemon=True)
    thread.start()
    thread.join(case.limit_s + SLACK_S)
    seconds = round(time.monotonic() - began, 2)
    verdict, happened = end.get("is", ("failed", f"it was not over after {seconds:g} s"))
    if verdict == "failed" and bench.process is not None and (thread.is_alive() or bench.process.poll() is not None):
        bench.process.kill()
        bench.start()
    elif verdict == "passed" and end["seconds"] > case.limit_s:
        verdict, happened = "failed", f"{happened}, but after {end['seconds']:.1f} s, not within {case.limit_s:g} s"
    return Result(case.name, case.promise, verdict, happened, seconds)


def _try(case: Case, bench: Bench, end: dict) -> None:
    began = time.monotonic()
    try:
        happened = case.run(bench)
        end["seconds"] = time.monotonic() - began
        bench.check_next()
        end["is"] = ("passed", happened)
    except Broken as error:
        end["is"] = ("failed", str(error))
    except Exception as error:  # whatever a broken server does to its peer
        end["is"] = ("failed", f"{type(error).__name__}: {error}")
