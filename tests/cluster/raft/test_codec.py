"""The driver's bytes: round trips, and whatever else may come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.cluster.raft.codec import (
    FRAME_HEAD,
    HardState,
    address_of,
    decode_envelope,
    decode_hard_state,
    encode_envelope,
    encode_hard_state,
    only_commits,
    pack_length,
    split_frame,
)
from isopod.cluster.raft.core import ConfState, CoreConfig, Ready, describe_message, open_core
from isopod.world.errors import BadRecord

NUMBERS = st.integers(min_value=0, max_value=(1 << 64) - 1)
pytestmark = pytest.mark.row("B24")


@given(NUMBERS, NUMBERS, NUMBERS)
def test_hard_states_survive(term: int, vote: int, commit: int) -> None:
    state = HardState(term, vote, commit)
    assert decode_hard_state(encode_hard_state(state)) == state


@given(st.binary(max_size=40))
def test_no_bytes_make_a_hard_state_fail_otherwise(data: bytes) -> None:
    try:
        state = decode_hard_state(data)
    except BadRecord:
        return
    assert all(0 <= value < 1 << 70 for value in state)


@given(NUMBERS, st.lists(st.binary(max_size=300), max_size=20))
def test_envelopes_survive(stamp_ns: int, commands: list[bytes]) -> None:
    assert decode_envelope(encode_envelope(stamp_ns, commands)) == (stamp_ns, commands)


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20))
def test_frames_survive(messages: list[bytes]) -> None:
    frame = FRAME_HEAD.pack(7) + b"".join(pack_length(len(each)) + each for each in messages)
    assert split_frame(frame) == messages


@given(st.binary(max_size=200))
def test_no_bytes_make_a_frame_fail_otherwise(data: bytes) -> None:
    try:
        messages = split_frame(FRAME_HEAD.pack(0) + data)
    except ValueError:
        return
    assert sum(len(each) + 4 for each in messages) == len(data)


@given(st.integers(min_value=1, max_value=(1 << 63) - 1), st.integers(min_value=1, max_value=(1 << 63) - 1))
def test_the_cores_messages_begin_with_their_address(one: int, two: int) -> None:
    if one == two:
        return
    voters = tuple(sorted((one, two)))
    core = open_core(CoreConfig(id=one, seed=1, conf_state=ConfState(voters=voters)))
    core.campaign()
    ready = core.ready()
    assert ready is not None
    sent = ready.messages + ready.persisted_messages
    assert [to for to, _ in sent] == [two]
    assert sent[0][1].startswith(address_of(one, two), 2)


def test_commit_messages_are_told_from_entries() -> None:
    """A leader of two: entries for the other, then the news that they are committed."""
    cores = {node_id: open_core(CoreConfig(id=node_id, seed=1, conf_state=ConfState(voters=(1, 2)), pre_vote=False)) for node_id in (1, 2)}
    cores[1].campaign()
    appends: list[bytes] = []
    for _ in range(20):
        for node_id, core in cores.items():
            ready: Ready | None
            while (ready := core.ready()) is not None:
                core.on_persisted(ready.number)
                for to, message in ready.messages + ready.persisted_messages:
                    if describe_message(message).kind == "MsgAppend":
                        appends.append(message)
                    cores[to].step_many([message])
                    del node_id
    cores[1].propose(b"x")
    for _ in range(20):
        for core in cores.values():
            while (ready := core.ready()) is not None:
                core.on_persisted(ready.number)
                for to, message in ready.messages + ready.persisted_messages:
                    if describe_message(message).kind == "MsgAppend":
                        appends.append(message)
                    cores[to].step_many([message])
    assert {describe_message(message).n_entries for message in appends} == {0, 1}
    for message in appends:
        assert only_commits(message) == (describe_message(message).n_entries == 0)
