"""The conformance suite, case by case, on a server of its own."""

import pytest

from gadgets.conformance.bench import Bench
from gadgets.conformance.suite import CASES, run_case


@pytest.fixture(scope="module")
def bench():
    with Bench() as bench:
        yield bench


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, bench):
    result = run_case(case, bench)
    assert result.verdict == "passed", result.happened
