"""The sum over many runs: what was covered in how many, what was not in which, and what failed."""

from collections.abc import Sequence

from isopod.testing.coverage import Coverage
from isopod.testing.invariants import Violation
from isopod.testing.outcome import Counts, Outcome, Summary
from isopod.testing.plan import Plan


def outcome(seed: int, classes: Sequence[str], *violations: Violation) -> Outcome:
    coverage = Coverage()
    for kind in classes:
        coverage.count("fault class", kind)
    return Outcome(Plan(1, "everything", seed, 3, 1000), violations, "digest", 2.5, 100, Counts(10, 2, 1), coverage)


def test_it_says_in_how_many_runs_each_class_of_faults_was_and_where_it_was_not() -> None:
    summary = Summary()
    summary.add(outcome(1, ["process", "power"]))
    summary.add(outcome(2, ["process"]))
    summary.add(outcome(3, ["process"], Violation("durable log", 5, "a log that is shorter")))

    text = summary.describe(1.5)

    assert "operations: 30 answered, 6 of unknown outcome, 3 refused" in text
    assert "process 3, power 1, partition 0" in text
    assert "without power: 2 runs, of seed 2, 3" in text
    assert "without process" not in text
    assert "FAILED durable log: isopod sim --seed 3 --scenario everything --nodes 3 --until 1000ms" in text
    assert "3 runs, 1 with a violation; 7.5 virtual seconds in 1.5 s (5 times real time)" in text
    assert [failed.plan.seed for failed in summary.failed] == [3]
