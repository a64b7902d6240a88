"""Tools for writing conformance cases: a decorator that adds a function to the suite, and checks of answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import peer as p

if TYPE_CHECKING:
    from .bench import Bench


class Broken(AssertionError):
    """A promise that was not kept; the message says what happened instead."""


@dataclass(frozen=True)
class Case:
    """A promise to test.

    `needs` is "", "faults" (a server that fails on purpose) or "process" (a server that may be killed).
    """

    name: str
    promise: str
    limit_s: float
    needs: str
    run: Callable[[Bench], str]


CASES: list[Case] = []


def case(promise: str, limit_s: float = 10.0, needs: str = "") -> Callable:
    """Add a function to the suite under its own name."""

    def add(run: Callable[[Bench], str]) -> Callable[[Bench], str]:
        CASES.append(Case(run.__name__.replace("_", "-"), promise, limit_s, needs, run))
        return run

    return add


def expect(fine: bool, otherwise: str) -> None:
    """Raise Broken with what happened instead, unless `fine`."""
    if not fine:
        raise Broken(otherwise)


def refused(answer: p.Answer, words: str) -> str:
    """Expect no image, a sentence that matches `words` (a pattern), and CLOSE; returns the sentence, shortened."""
    expect(not answer.images, f"{len(answer.images)} images came")
    return told(answer, words)


def told(answer: p.Answer, words: str) -> str:
    """Expect that the peer got a sentence that matches `words`, then CLOSE; returns the sentence, shortened."""
    expect(answer.closed, "the connection ended without CLOSE")
    expect(bool(answer.complaint), "nothing was said")
    expect(re.search(words, answer.complaint) is not None, f"said: {answer.complaint}")
    return shortened(answer.complaint)


def shortened(text: str) -> str:
    """A sentence, shortened for the table."""
    text = text.removeprefix("ERROR: ").removeprefix("slice diffusion: ")
    return text if len(text) <= 110 else text[:107] + "..."


def same(answer: p.Answer, bench: Bench) -> None:
    """Expect exactly the images of the first correct scan, no complaint, and CLOSE."""
    expect(not answer.complaint, f"said: {answer.complaint}")
    expect(answer.closed, "the connection ended without CLOSE")
    expect(answer.images == bench.expected, f"{len(answer.images)} images, not the same as before")
