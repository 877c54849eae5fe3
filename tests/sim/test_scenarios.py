"""The suite of simulations: some seeds of every scenario keep every promise, and really do what they are for."""

import os

import pytest

from isopod.testing.outcome import describe
from isopod.testing.plan import FAULT_KINDS
from isopod.testing.scenarios import DEFAULT_SEED, SCENARIOS, Scenario, make_plan, scenario
from isopod.testing.simulation import run_plan

FIRST_SEED = int(os.environ.get("ISOPOD_SIM_SEED", DEFAULT_SEED))
N_SEEDS = 2
"""Per scenario, in the ordinary suite; `isopod sim --seeds` and the stress profile run more."""


@pytest.mark.row("B20", "B21")
@pytest.mark.parametrize("number", range(N_SEEDS))
@pytest.mark.parametrize("source", SCENARIOS, ids=lambda source: source.name)
def test_every_promise_is_kept(source: Scenario, number: int) -> None:
    outcome = run_plan(make_plan(source, FIRST_SEED + number))

    assert not outcome.violations, describe(outcome)
    assert source.operations_per_s == 0 or outcome.operations.answered > 0
    for name in source.must:
        assert outcome.coverage.get("fault", name), f"no {name} happened"


@pytest.mark.row("B20")
def test_everything_has_a_fault_of_each_class_and_elections() -> None:
    outcome = run_plan(make_plan(scenario("everything"), FIRST_SEED + 100))

    assert not outcome.violations, describe(outcome)
    assert outcome.coverage.missing_fault_classes(FAULT_KINDS) == []
    assert outcome.coverage.get("event", "leader elected") > 1


@pytest.mark.row("B15")
def test_a_node_that_was_away_catches_up_by_a_snapshot() -> None:
    for seed in range(FIRST_SEED, FIRST_SEED + 10):
        outcome = run_plan(make_plan(scenario("snapshots"), seed))
        assert not outcome.violations, describe(outcome)
        if outcome.coverage.get("event", "snapshot installed"):
            return
    pytest.fail("no snapshot was installed in ten runs")
