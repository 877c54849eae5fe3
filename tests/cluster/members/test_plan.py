"""The leader's plan and the failure detector: pure functions, told what they see."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.cluster.members.config import DetectorSettings
from isopod.cluster.members.detector import FailureDetector, Judgement
from isopod.cluster.members.plan import Action, View, next_action, survives_without
from isopod.cluster.members.records import MemberRecord

SETTINGS = DetectorSettings(beat_s=1, suspect_s=3, fail_s=10, recover_beats=2, cleanup_s=100, agent_cleanup_s=50, replace_s=20)


def member(node_id: int, **fields: Any) -> MemberRecord:
    return MemberRecord(**{"node_id": node_id, "incarnation": f"i{node_id}", "address": f"h{node_id}:1", "role": "voter", **fields})


def view(**fields: Any) -> View:
    """Three voters of five, all well, unless said otherwise."""
    usual = View(
        own_id=1,
        voters=(1, 2, 3),
        learners=(),
        members={node_id: member(node_id) for node_id in (1, 2, 3)},
        healths={},
        failed_s={},
        ready=(),
        buried={},
        voters_max=5,
        settings=SETTINGS,
    )
    return usual._replace(**fields)


def members(*records: MemberRecord) -> dict[int, MemberRecord]:
    return {record.node_id: record for record in (member(1), member(2), member(3), *records)}


def action(found: Action | None) -> tuple[str, int] | None:
    return None if found is None else (found.verb, found.node_id)


@pytest.mark.parametrize(
    "fields,wanted",
    [
        ({}, None),
        ({"members": members(member(4))}, ("add_learner", 4)),
        ({"members": members(member(4, role="agent"))}, None),
        ({"members": members(member(4)), "learners": (4,)}, None),
        ({"members": members(member(4)), "learners": (4,), "ready": (4,)}, ("promote", 4)),
        ({"members": members(member(4, role="learner")), "learners": (4,), "ready": (4,)}, None),
        ({"members": members(member(4)), "learners": (4,), "ready": (4,), "voters_max": 3}, None),
        ({"members": members(member(4)), "learners": (4,), "ready": (4,), "healths": {4: "suspected"}}, None),
        ({"members": members(member(3, is_leaving=True))}, ("demote", 3)),
        ({"members": members(member(3, is_leaving=True)), "voters": (1, 2), "learners": (3,)}, ("remove", 3)),
        ({"members": members(member(3, is_leaving=True)), "voters": (1, 2)}, ("bury", 3)),
        ({"members": members(member(1, is_leaving=True))}, ("transfer", 0)),
        ({"members": {1: member(1, is_leaving=True)}, "voters": (1,)}, None),
        ({"members": members(member(9, role="agent", is_leaving=True))}, ("bury", 9)),
        ({"members": members(member(2, role="learner"))}, ("demote", 2)),
        ({"members": members(member(1, role="learner"))}, ("transfer", 0)),
        ({"voters_max": 1}, ("demote", 3)),
        ({"voters_max": 1, "healths": {2: "failed"}}, ("demote", 2)),
        ({"learners": (7,), "buried": {7: ("i7",)}}, ("remove", 7)),
        ({"voters": (1, 2, 3, 7), "buried": {7: ("i7",)}}, ("demote", 7)),
        ({"learners": (7,)}, None),
        ({"healths": {3: "failed"}, "failed_s": {3: 99}}, None),
        ({"healths": {3: "failed"}, "failed_s": {3: 101}}, ("let_go", 3)),
        ({"healths": {2: "failed", 3: "failed"}, "failed_s": {2: 101, 3: 101}}, None),
        ({"members": members(member(9, role="agent")), "healths": {9: "failed"}, "failed_s": {9: 51}}, ("let_go", 9)),
        (
            {
                "members": members(member(4)),
                "learners": (4,),
                "ready": (4,),
                "voters_max": 3,
                "healths": {3: "failed"},
                "failed_s": {3: 21},
            },
            ("demote", 3),
        ),
        (
            {
                "members": members(member(4)),
                "learners": (4,),
                "ready": (4,),
                "voters_max": 3,
                "healths": {3: "failed"},
                "failed_s": {3: 19},
            },
            None,
        ),
    ],
)
def test_the_next_step(fields: dict[str, Any], wanted: tuple[str, int] | None) -> None:
    assert action(next_action(view(**fields))) == wanted


def test_who_is_needed() -> None:
    assert survives_without(view(), 3)
    assert not survives_without(view(voters=(1,)), 1)
    assert survives_without(view(voters=(1, 2)), 2)
    assert not survives_without(view(voters=(1, 2), healths={2: "failed"}), 1)
    assert not survives_without(view(voters=(1, 2), healths={2: "failed"}), 2), "one of two cannot even decide that"
    assert survives_without(view(healths={3: "failed"}), 3)
    assert not survives_without(view(healths={3: "failed"}), 2)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7, unique=True),
    st.dictionaries(st.integers(1, 9), st.sampled_from(["voter", "learner", "agent"]), max_size=9),
    st.lists(st.integers(1, 9), unique=True),
    st.lists(st.integers(1, 9), unique=True),
    st.sampled_from([1, 3, 5, 7]),
)
def test_steps_lead_to_what_is_wanted(
    voters: list[int], roles: dict[int, str], leaving: list[int], learners: list[int], voters_max: int
) -> None:
    """Carried out on a model, the steps end, never leave the cluster without voters, and end as wanted."""
    records = {node_id: member(node_id, role=role, is_leaving=node_id in leaving) for node_id, role in roles.items()}
    records = {**{node_id: member(node_id) for node_id in voters if node_id not in records}, **records}
    votes, learns = dict.fromkeys(voters), dict.fromkeys(node for node in learners if node not in voters)
    buried: dict[int, tuple[str, ...]] = {}
    own = voters[0]
    for _ in range(100):
        seen = view(
            own_id=own,
            voters=tuple(votes),
            learners=tuple(learns),
            members=records,
            ready=tuple(learns),
            buried=buried,
            voters_max=voters_max,
        )
        found = next_action(seen)
        if found is None:
            break
        node_id = found.node_id
        if found.verb == "transfer":
            others = [node for node in votes if node != own]
            assert others, "there is somebody to hand over to"
            wanted = [n for n in others if n in records and records[n].role == "voter" and not records[n].is_leaving]
            own = (wanted or others)[0]
        elif found.verb == "add_learner":
            assert node_id not in votes
            learns[node_id] = None
        elif found.verb == "promote":
            assert len(votes) < voters_max
            del learns[node_id]
            votes[node_id] = None
        elif found.verb == "demote":
            assert node_id != own
            del votes[node_id]
            learns[node_id] = None
        elif found.verb == "remove":
            del learns[node_id]
        elif found.verb == "bury":
            assert node_id not in votes
            assert node_id not in learns
            buried[node_id] = ("x",)
            del records[node_id]
        assert votes
    else:
        pytest.fail("the steps do not end")
    assert all(not record.is_leaving or (len(votes) == 1 and node_id in votes) for node_id, record in records.items())


# --- the detector -----------------------------------------------------------------------------------------------------


@pytest.mark.row("S19")
def test_silence_is_suspected_then_taken_for_death_and_life_brings_back() -> None:
    detector = FailureDetector(SETTINGS, 0.0)
    detector.watch(2, 0.0)
    told = []
    for second in range(1, 13):
        told += detector.look(float(second))
    assert [(judgement.health, round(judgement.silent_s)) for judgement in told] == [("suspected", 3), ("failed", 10)]
    assert detector.heard(2, 12.5) is None, "one sign of life is none"
    assert detector.look(13.0) == []
    assert detector.health(2) == "failed"
    assert detector.heard(2, 13.5) == Judgement(2, "alive", 0.0)
    assert detector.silent_s(2, 15.5) == 2.0


@pytest.mark.row("S19")
def test_a_node_at_the_edge_does_not_flap() -> None:
    """A sign of life just after every suspicion never makes it alive again for a moment: it stays suspected."""
    detector = FailureDetector(SETTINGS, 0.0)
    detector.watch(2, 0.0)
    told = []
    now = 0.0
    for _ in range(50):
        for _ in range(4):
            now += 1.0
            told += detector.look(now)
        found = detector.heard(2, now)
        told += [found] if found else []
    assert [judgement.health for judgement in told] == ["suspected"]


@pytest.mark.row("S19")
def test_a_judge_that_slept_accuses_nobody() -> None:
    detector = FailureDetector(SETTINGS, 0.0)
    detector.watch(2, 0.0)
    detector.heard(2, 1.0)
    assert detector.look(1.0) == []
    assert detector.look(500.0) == []
    assert detector.look(501.0) == []
    assert [judgement.health for judgement in detector.look(504.0)] == ["suspected"]


@given(st.lists(st.tuples(st.sampled_from(["look", "heard"]), st.floats(0.01, 5.0)), max_size=80))
def test_judgements_alternate_as_the_table_says(steps: list[tuple[str, float]]) -> None:
    detector = FailureDetector(SETTINGS, 0.0)
    detector.watch(2, 0.0)
    now, before = 0.0, "alive"
    allowed = {("alive", "suspected"), ("alive", "failed"), ("suspected", "failed"), ("suspected", "alive"), ("failed", "alive")}
    for what, wait in steps:
        now += wait
        found = detector.look(now) if what == "look" else [judged for judged in [detector.heard(2, now)] if judged]
        for judgement in found:
            assert (before, judgement.health) in allowed
            before = judgement.health
        assert detector.health(2) == before


def test_who_is_watched() -> None:
    detector = FailureDetector(SETTINGS, 0.0)
    for node_id in (2, 3, 4):
        detector.watch(node_id, 0.0, "failed" if node_id == 4 else "alive")
    detector.keep([2, 4])
    assert [detector.health(node_id) for node_id in (2, 3, 4)] == ["alive", "unknown", "failed"]
    detector.forget(2)
    assert detector.silent_s(2, 1.0) is None
    assert detector.heard(2, 1.0) is None
