"""Deliberate bugs: each is found by the checkers within a bounded number of seeds. The same seeds find nothing without the bug."""

import pytest

from isopod.testing.scenarios import make_plan
from isopod.testing.simulation import run_plan
from tests.sim.mutations import MUTATIONS, Mutation


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.row("B20")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_deliberate_bug_is_found(mutation: Mutation) -> None:
    for seed in range(mutation.first_seed, mutation.first_seed + mutation.n_seeds):
        plan = make_plan(mutation.source, seed)
        found = [violation.rule for violation in run_plan(plan, tampering=mutation.tampering).violations]
        if found and (not mutation.rule or mutation.rule in found):
            assert not run_plan(plan).violations, "it is the bug that was found, not something else"
            return
    pytest.fail(f"not found in {mutation.n_seeds} seeds: {mutation.about}")


def test_there_are_at_least_ten_with_names() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 14
