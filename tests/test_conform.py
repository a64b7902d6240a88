"""The conformance suite, case by case, on a server of its own."""

import pytest

from gadgets.conform import Bench, run_case
from gadgets.conform_cases import CASES


@pytest.fixture(scope="module")
def bench():
    with Bench() as bench:
        yield bench


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, bench):
    result = run_case(case, bench)
    assert result.verdict == "passed", result.happened
