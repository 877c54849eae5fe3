"""Damaged disks in small plans: the node refuses to start, somebody puts it right, and nothing that was promised is lost."""

import pytest

from isopod.testing.outcome import Outcome, describe
from isopod.testing.plan import Plan, Step
from isopod.testing.rig import Tampering
from isopod.testing.simulation import run_plan

PUTS = tuple(Step(at_ms=10 * number, do="put", client=1, key=f"key{number % 3}", value=f"v{number}") for number in range(120))


def run(*faults: Step, nodes: int = 3, tampering: Tampering = Tampering()) -> Outcome:  # noqa: B008  an immutable tuple
    steps = tuple(sorted((*PUTS, *faults), key=lambda step: step.at_ms))
    return run_plan(Plan(1, "damage", 5, nodes, 1500, steps), tampering=tampering)


@pytest.mark.row("B13", "B20", "B21")
@pytest.mark.parametrize("do", ["bit_rot", "misdirect"])
def test_a_damaged_node_refuses_to_start_and_comes_back_as_a_new_one(do: str) -> None:
    outcome = run(Step(at_ms=500, do=do, node=2, amount=0.5, lasts_ms=200))

    assert not outcome.violations, describe(outcome)
    events = outcome.coverage.table()["event"]
    assert (events["damage refused"], events["node replaced"]) == (1, 1)
    assert outcome.coverage.get("fault", do) == 1
    assert outcome.operations.answered >= len(PUTS)


@pytest.mark.row("B20")
def test_who_repairs_without_looking_is_found_out() -> None:
    outcome = run(Step(at_ms=500, do="bit_rot", node=2, amount=0.5, lasts_ms=200), tampering=Tampering(repairs_always=True))

    assert "durable log" in [violation.rule for violation in outcome.violations]


def test_a_disk_that_lost_its_last_write_without_a_trace_is_replaced_before_its_node_starts() -> None:
    for at_ms in range(505, 565, 5):
        outcome = run(Step(at_ms=500, do="misdirect", node=2, lasts_ms=200), Step(at_ms=at_ms, do="power_cut", node=2, lasts_ms=200))
        assert not outcome.violations, describe(outcome)
        if outcome.coverage.get("event", "disk replaced unseen"):
            assert outcome.coverage.get("event", "node replaced") == 1
            return
    pytest.fail("power failed too early or too late, every time")


def test_no_majority_is_damaged() -> None:
    """A cluster of one has no minority, and of two damages at once the second waits."""
    alone = run(Step(at_ms=500, do="bit_rot", node=1, amount=0.5, lasts_ms=200), nodes=1)
    both = run(*(Step(at_ms=500, do="bit_rot", node=node, amount=0.5, lasts_ms=200) for node in (2, 3)))

    assert not alone.violations, describe(alone)
    assert alone.coverage.get("fault", "bit_rot") == 0
    assert not both.violations, describe(both)
    assert both.coverage.get("event", "node replaced") in (1, 2)
