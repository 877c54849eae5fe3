"""Shrinking, on a toy system whose defects are known."""

import msgspec
import pytest

from isopod.testing.plan import Plan, Step
from isopod.testing.scenarios import make_plan, scenario
from isopod.testing.shrink import shrink


def plan(*steps: Step, nodes: int = 5) -> Plan:
    return Plan(version=1, scenario="everything", seed=1, nodes=nodes, until_ms=20_000, steps=steps)


def breaks_after_kill_then_put(candidate: Plan) -> str:
    """The toy: a write after a kill is lost, if there are three nodes or more."""
    killed = False
    for step in candidate.steps:
        killed = killed or step.do == "kill"
        if killed and step.do == "put" and candidate.nodes >= 3:
            return "lost write"
    return ""


@pytest.mark.row("B23")
def test_what_does_not_matter_goes() -> None:
    whole = make_plan(scenario("crashes"), 3, nodes=5)
    assert breaks_after_kill_then_put(whole)

    small = shrink(whole, breaks_after_kill_then_put).plan

    assert [step.do for step in small.steps] == ["kill", "put"]
    assert small.nodes == 3
    assert small.until_ms == small.steps[-1].at_ms
    assert small.steps[0].lasts_ms <= 50
    assert (small.seed, small.scenario) == (whole.seed, whole.scenario)


def test_no_single_step_can_be_left_out_of_the_outcome() -> None:
    def needs_three_alike(candidate: Plan) -> str:
        counts = {step.key: sum(other.key == step.key for other in candidate.steps) for step in candidate.steps}
        return "three alike" if max(counts.values(), default=0) >= 3 else ""

    steps = [Step(at_ms=number, do="put", key=f"key{number * number % 23}") for number in range(60)]

    small = shrink(plan(*steps), needs_three_alike).plan

    assert len(small.steps) == 3
    for place in range(3):
        rest = msgspec.structs.replace(small, steps=(*small.steps[:place], *small.steps[place + 1 :]))
        assert not needs_three_alike(rest)


def test_another_failure_is_not_taken_for_the_same() -> None:
    def fails_otherwise_when_small(candidate: Plan) -> str:
        return "first defect" if len(candidate.steps) >= 4 else "second defect"

    small = shrink(plan(*(Step(at_ms=number, do="get") for number in range(9))), fails_otherwise_when_small).plan

    assert len(small.steps) == 4


def test_a_plan_that_does_not_fail_is_left_as_it_is() -> None:
    whole = plan(Step(at_ms=1, do="put"))

    assert shrink(whole, lambda _: "") == (whole, 0)


def test_the_number_of_runs_is_bounded() -> None:
    n_runs = 0

    def failure(candidate: Plan) -> str:
        nonlocal n_runs
        n_runs += 1
        return "always" if len(candidate.steps) > 30 else ""

    shrunk = shrink(plan(*(Step(at_ms=number, do="get") for number in range(60))), failure, n_runs_max=10)

    assert (shrunk.n_runs, n_runs) == (10, 11)
    assert len(shrunk.plan.steps) > 30


def test_nothing_is_tried_twice() -> None:
    seen: list[bytes] = []

    def failure(candidate: Plan) -> str:
        seen.append(msgspec.json.encode(candidate))
        return breaks_after_kill_then_put(candidate)

    shrink(make_plan(scenario("crashes"), 4), failure)

    assert len(seen) == len(set(seen))
