"""The conformance suite, case by case, on a server of its own."""

import pytest

from gadgets.conformance.suite import Bench, all_cases, run_case


@pytest.fixture(scope="module")
def bench():
    with Bench() as bench:
        yield bench


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_case(case, bench):
    result = run_case(case, bench)
    assert result.verdict == "passed", result.happened
