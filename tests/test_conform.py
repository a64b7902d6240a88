"""The conformance suite, case by case, on a server of its own."""

import pytest

from gadgets.cli import main
from gadgets.conformance.bench import Bench
from gadgets.conformance.suite import CASES, Result, run_case


@pytest.fixture(scope="module")
def bench():
    with Bench() as bench:
        yield bench


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, bench):
    result = run_case(case, bench)
    assert result.verdict == "passed", result.happened


def test_what_a_server_said_is_shown_as_it_is(monkeypatch, capsys):
    said = "said: no weights in [/opt/priors]: asked for [small]"
    result = Result("replay", "same images", "failed", said, 1.0)
    monkeypatch.setattr("gadgets.conformance.suite.conform", lambda *_: [result])
    assert main(["conform"]) == 1
    assert said in capsys.readouterr().out
