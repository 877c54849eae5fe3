"""The life-cycle table: every state x event, and what users are told."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.api.messages import Status
from isopod.engine.states import LIVE, RTAIN_NAMES, TABLE, Event, advance
from isopod.world.errors import WrongState

STATES: tuple[Status, ...] = get_args(Status)
EVENTS: tuple[Event, ...] = get_args(Event)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_every_pair_moves_or_is_refused(state: Status, event: Event) -> None:
    if (state, event) in TABLE:
        assert advance("box", state, event) == TABLE[state, event]
    else:
        with pytest.raises(WrongState, match=f"box is {state}"):
            advance("box", state, event)


def test_every_live_state_can_end_and_only_those() -> None:
    assert tuple(state for state in STATES if (state, "exited") in TABLE) == LIVE
    assert all((state, "lost") in TABLE for state in LIVE)


def test_nothing_leaves_removing() -> None:
    assert [after for (state, _), after in TABLE.items() if state == "removing"] == ["removing"]


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_no_history_leaves_the_states(events: list[Event]) -> None:
    state: Status = "created"
    for event in events:
        state = TABLE.get((state, event), state)
        assert state in STATES


def test_a_running_one_cannot_be_removed_and_the_hint_says_what_to_do() -> None:
    with pytest.raises(WrongState) as refused:
        advance("box", "running", "remove")
    assert "rm -f" in refused.value.hint


def test_the_references_names_map_onto_ours() -> None:
    assert set(RTAIN_NAMES.values()) <= set(STATES)
    assert RTAIN_NAMES["Stopped"] == RTAIN_NAMES["Exited"] == "exited"
