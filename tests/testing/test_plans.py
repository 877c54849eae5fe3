"""Plans: drawn from a seed, kept as files, refused if they make no sense."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.testing.plan import ACTIONS, FAULT_KINDS, NODES_MAX, Plan, Step, decode_plan, encode_plan
from isopod.testing.scenarios import SCENARIOS, Scenario, make_plan, scenario
from isopod.world.errors import InvalidArgument

STEPS = st.builds(
    Step,
    at_ms=st.integers(0, 10**6),
    do=st.sampled_from(sorted(ACTIONS)),
    node=st.integers(0, NODES_MAX),
    peer=st.integers(0, NODES_MAX),
    client=st.integers(0, 9),
    key=st.text(max_size=5),
    value=st.text(max_size=5),
    lasts_ms=st.integers(0, 10**5),
    amount=st.floats(allow_nan=False, allow_infinity=False),
    text=st.text(max_size=5),
)
PLANS = st.builds(
    Plan,
    version=st.just(1),
    scenario=st.text(max_size=8),
    seed=st.integers(0, 2**63 - 1),
    nodes=st.integers(1, NODES_MAX),
    until_ms=st.integers(0, 10**6),
    steps=st.lists(STEPS, max_size=6).map(tuple),
    found=st.text(max_size=8),
)


@given(PLANS)
@settings(deadline=None)
def test_a_plan_survives_its_file(plan: Plan) -> None:
    assert decode_plan(encode_plan(plan)) == plan


def test_a_file_has_one_step_a_line() -> None:
    plan = make_plan(scenario("crashes"), 7)

    lines = encode_plan(plan).decode().splitlines()

    assert sum(line.lstrip().startswith('{"at_ms"') for line in lines) == len(plan.steps)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a scenario file"),
        (b"\xff", "not a scenario file"),
        (b"[1]", "not a scenario file"),
        (b'{"version":1,"scenario":"load","seed":1,"nodes":3,"until_ms":1,"steps":[{"at_ms":1,"do":"put","color":1}]}', "unknown field"),
        (b'{"version":2,"scenario":"load","seed":1,"nodes":3,"until_ms":1}', "it is of version 2, this program reads 1"),
        (b'{"version":1,"scenario":"load","seed":1,"nodes":0,"until_ms":1}', "0 nodes: want 1 to 9"),
        (b'{"version":1,"scenario":"load","seed":1,"nodes":3,"until_ms":-1}', "want until_ms >= 0"),
        (b'{"version":1,"scenario":"load","seed":1,"nodes":3,"until_ms":1,"steps":[{"at_ms":1,"do":"lie"}]}', "no action is called 'lie'"),
        (b'{"version":1,"scenario":"load","seed":1,"nodes":3,"until_ms":1,"steps":[{"at_ms":-1,"do":"kill"}]}', "time below 0"),
        (b'{"version":1,"scenario":"load","seed":1,"nodes":3,"until_ms":1,"steps":[{"at_ms":1,"do":"kill","node":10}]}', "outside 0 to 9"),
    ],
)
def test_what_is_no_plan_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode_plan(data)

    assert why in caught.value.message


@pytest.mark.row("B22")
@pytest.mark.parametrize("source", SCENARIOS, ids=lambda source: source.name)
def test_a_plan_follows_from_its_seed(source: Scenario) -> None:
    assert make_plan(source, 5) == make_plan(source, 5)
    assert source.name == "idle" or make_plan(source, 5).steps != make_plan(source, 6).steps


@pytest.mark.parametrize("source", SCENARIOS, ids=lambda source: source.name)
def test_a_plan_has_what_its_scenario_allows_and_demands(source: Scenario) -> None:
    for seed in range(20):
        plan = make_plan(source, seed)
        faults = [step.do for step in plan.steps if step.kind != "client"]

        assert [step.at_ms for step in plan.steps] == sorted(step.at_ms for step in plan.steps)
        assert all(0 <= step.at_ms < plan.until_ms and step.node <= plan.nodes and 0 <= step.peer <= plan.nodes for step in plan.steps)
        assert set(source.must) <= set(faults) <= {*source.faults, *source.must}
        assert decode_plan(encode_plan(plan)) == plan


def test_everything_has_at_least_one_fault_of_each_class() -> None:
    for seed in range(50):
        kinds = {step.kind for step in make_plan(scenario("everything"), seed).steps}

        assert kinds == {"client", *FAULT_KINDS}


def test_size_and_length_can_be_chosen() -> None:
    plan = make_plan(scenario("partitions"), 1, nodes=3, run_s=2.0)

    assert (plan.nodes, plan.until_ms) == (3, 2000)
    assert max(step.at_ms for step in plan.steps) < 2000


def test_an_unknown_scenario_is_named_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument) as caught:
        scenario("sunshine")

    assert "partitions" in caught.value.hint
