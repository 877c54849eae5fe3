"""The binding: what goes in comes out, what was written comes back, and what makes no sense is refused without harm."""

from typing import Any

import pytest

from isopod.cluster.raft.core import (
    CONF_CHANGE,
    NORMAL,
    Change,
    ConfChange,
    ConfState,
    CoreConfig,
    CorePanicked,
    ProposalDropped,
    RaftCore,
    decode_conf_change,
    decode_records,
    describe_message,
    encode_conf_change,
    open_core,
)
from tests.cluster.raft.core.harness import Cluster, Machine, Member
from tests.cluster.raft.core.wire import WireEntry, message, snapshot


def alone(**settings: Any) -> RaftCore:
    return open_core(CoreConfig(id=1, seed=1, conf_state=ConfState(voters=(1,)), **settings))


def test_an_entry_goes_through_three_members() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)

    index = cluster.propose(b"command")

    assert index == leader.core.status().last_index == 2
    assert cluster.applied() == {1: [b"command"], 2: [b"command"], 3: [b"command"]}
    assert {member.machine for member in cluster.members.values()} == {leader.machine}


def test_a_ready_tells_what_to_write_and_when() -> None:
    core = alone()
    core.campaign()

    elected = core.ready()
    assert elected is not None
    assert elected.soft_state == (1, "leader")
    assert elected.must_sync
    assert elected.hard_state
    assert (elected.first_index, elected.last_index, elected.committed) == (1, 1, [])
    assert [(entry.index, entry.term, entry.kind, entry.data) for entry in decode_records(elected.records)] == [(1, 1, NORMAL, b"")]
    assert core.ready() is None, "nothing is committed before it is durable"

    core.on_persisted(elected.number)
    committed = core.ready()
    assert committed is not None
    assert committed.committed == [(1, 1, NORMAL, b"")]
    assert not committed.must_sync, "the commit index need not be durable"
    assert core.ready() is None


def test_the_next_ready_comes_while_the_last_is_being_written() -> None:
    core = alone()
    core.campaign()
    numbers = []
    for n in range(5):
        ready = core.ready()
        assert ready is not None
        numbers.append(ready.number)
        assert core.propose_many([b"%d" % n, b"more"]) == 3 + 2 * n

    core.on_persisted(numbers[2])
    ready = core.ready()

    assert ready is not None
    assert [data for _, _, _, data in ready.committed] == [b"", b"0", b"more", b"1", b"more"]
    core.applied_to(5)
    with pytest.raises(ValueError, match="6 is not between 5"):
        core.applied_to(6)


def test_committed_entries_come_in_bounded_portions() -> None:
    core = alone(committed_bytes_per_ready_max=100)
    core.campaign()
    core.propose_many([b"x" * 60] * 4)
    portions = []
    while (ready := core.ready()) is not None:
        core.on_persisted(ready.number)
        portions.append(len(ready.committed))

    assert [n for n in portions if n] == [2, 1, 1, 1]


def test_what_was_written_is_where_the_next_process_starts() -> None:
    cluster = Cluster(3)
    cluster.elect(2)
    for n in range(10):
        cluster.propose(b"%d" % n)
    before = cluster[1].core.status()

    cluster[1].restart()

    after = cluster[1].core.status()
    assert (after.term, after.vote, after.last_index) == (before.term, before.vote, before.last_index)
    assert (after.role, after.leader, after.applied) == ("follower", 0, 0)
    cluster.run()
    cluster.tick(5)
    assert cluster[1].machine == cluster[2].machine


def test_what_was_not_durable_is_gone_after_a_crash() -> None:
    member = Member(1, ConfState(voters=(1,)), Cluster(1).checker)
    member.core.campaign()
    member.work()
    for data in (b"a", b"b", b"c"):
        member.core.propose(data)
        member.work(sync=False)

    member.crash(n_durable=2)
    member.open()

    assert member.core.status().last_index == 3
    member.core.campaign()
    member.work()
    assert member.applied == [b"a", b"b"]


def test_applied_entries_are_not_handed_out_again() -> None:
    first = alone()
    first.campaign()
    first.propose_many([b"a", b"b"])
    ready = first.ready()
    assert ready is not None

    second = alone(hard_state=ready.hard_state, records=[ready.records], applied=2)
    third = alone(hard_state=ready.hard_state, records=[ready.records])

    assert second.status().commit == 2
    second.campaign()
    third.campaign()
    assert _committed(second) == [(3, 1, NORMAL, b"b"), (4, 2, NORMAL, b"")]
    assert [index for index, *_ in _committed(third)] == [1, 2, 3, 4]


def test_a_conflicting_suffix_is_overwritten_in_memory_and_after_a_restart() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose(b"kept")
    cluster.isolate(1)
    for data in (b"lost-1", b"lost-2", b"lost-3"):
        cluster[1].core.propose(data)
    cluster.run()
    assert cluster[1].core.status().last_index == 5
    cluster.tick(40, ids=(2, 3))
    leader = cluster.leader()
    assert leader is not None
    assert leader.id != 1
    cluster.heal()
    cluster.propose(b"won")
    cluster.tick(6)

    assert [entry.data for records in cluster[1].records for entry in decode_records(records)].count(b"lost-3") == 1
    assert cluster[1].machine == leader.machine
    cluster[1].restart()
    cluster.tick(6)
    assert cluster[1].applied == [b"kept", b"won"]


def test_a_lagging_member_gets_a_snapshot_and_restarts_from_it() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.isolate(3)
    for n in range(20):
        cluster.propose(b"%d" % n)
    leader.make_snapshot(n_kept=3)
    assert leader.core.status().first_index == 19
    cluster.heal()
    cluster.tick(12)

    assert cluster[3].machine == leader.machine
    assert cluster[3].core.status().first_index == 22
    assert cluster[3].snapshot.index == 21
    cluster.propose(b"after")
    cluster[3].restart()
    assert cluster[3].machine.index == 21
    cluster.tick(6)
    assert cluster[3].machine == leader.machine


def test_a_snapshot_that_was_durable_before_the_log_knew_replaces_it() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.isolate(3)
    for n in range(5):
        cluster.propose(b"%d" % n)
    leader.make_snapshot()
    cluster.heal()
    lagging = cluster[3]
    for _ in range(30):
        if lagging.machine.index and lagging.unwritten:
            break
        leader.core.tick()
        for member in (leader, cluster[2]):
            member.work()
        lagging.work(sync=False)
        if not any(ready.snapshot for ready in lagging.unwritten):
            lagging.write()
        cluster.collect()
        cluster.deliver((1, 2, 3))

    assert lagging.unwritten
    lagging.crash(snapshot_only=True)
    lagging.open()

    assert lagging.core.status().first_index == lagging.snapshot.index + 1 == 7
    cluster.tick(12)
    assert lagging.machine == leader.machine


@pytest.mark.parametrize("how", ["silence", "at once", "handed over"])
def test_nobody_campaigns_while_a_received_snapshot_is_being_written(how: str) -> None:
    """The crate would look for changes of members in entries that the snapshot replaced, and panic. Found by a seed."""
    lagging = Cluster(3)[3]
    term = 2
    lagging.checker.machines[9] = Machine(9, term, conf=lagging.machine.conf)
    lagging.core.step_many([snapshot(1, 3, term=term, index=9, voters=bytes([1, 2, 3]))])
    lagging.work(sync=False)
    assert lagging.unwritten[0].snapshot is not None

    def stand() -> None:
        if how == "silence":
            for _ in range(100):
                lagging.core.tick()
        elif how == "at once":
            lagging.core.campaign()
        else:
            lagging.core.step_many([message("timeout_now", 1, 3, term=term)])

    stand()
    assert lagging.core.status().role == "follower"
    lagging.write()
    stand()
    assert lagging.core.status().role in ("pre_candidate", "candidate")


def test_compaction_needs_a_snapshot_and_keeps_the_term_at_its_end() -> None:
    cluster = Cluster(1)
    core = cluster.elect(1).core
    for n in range(5):
        cluster.propose(b"%d" % n)
    with pytest.raises(ValueError, match="newest snapshot is at 0"):
        core.compact(3)
    with pytest.raises(ValueError, match="beyond what was applied"):
        core.snapshot_made(7, b"")
    core.snapshot_made(4, b"meta")
    core.compact(4)
    core.compact(2)
    assert (core.status().first_index, core.status().last_index) == (5, 6)
    with pytest.raises(ValueError, match="too old"):
        core.snapshot_made(3, b"")
    with pytest.raises(ValueError, match="newest snapshot is at 4"):
        core.compact(5)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"id": 0}, "invalid node id"),
        ({"heartbeat_ticks": 0}, "heartbeat tick"),
        ({"election_ticks": 5}, "election tick"),
        ({"election_ticks_max": 15}, "min election tick"),
        ({"max_inflight": 0}, "inflight"),
        ({"uncommitted_bytes_max": 1}, "uncommitted"),
        ({"hard_state": b"\xff"}, "hard state is damaged"),
        ({"records": [b"\x01"]}, "cut off"),
        ({"records": [b"\x01\0\0\0\x09"]}, "unknown kind"),
        ({"applied": 3}, "ends at 0, but 3 was committed"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        open_core(CoreConfig(id=1, seed=1, conf_state=ConfState(voters=(1,)))._replace(**changes))


def test_a_log_with_a_hole_or_without_its_tail_is_refused() -> None:
    cluster = Cluster(1)
    cluster.elect(1)
    for n in range(3):
        cluster.propose(b"%d" % n)
    member = cluster[1]
    config = CoreConfig(id=1, seed=1, conf_state=ConfState(voters=(1,)), hard_state=member.hard_state, records=member.records)
    assert open_core(config).status().last_index == 4

    with pytest.raises(ValueError, match="entries from 2 to 2 are missing"):
        open_core(config._replace(records=[member.records[0], *member.records[2:]]))
    with pytest.raises(ValueError, match="ends at 3, but 4 was committed: its tail is lost"):
        open_core(config._replace(records=member.records[:-1]))
    with pytest.raises(ValueError, match="no hard state later than term 0"):
        open_core(config._replace(hard_state=b""))
    with pytest.raises(ValueError, match="entries from 1 to 1 are missing"):
        open_core(config._replace(records=member.records[1:]))


def test_only_a_leader_takes_proposals() -> None:
    cluster = Cluster(3, uncommitted_bytes_max=1 << 20)
    with pytest.raises(ProposalDropped) as dropped:
        cluster[1].core.propose(b"x")
    assert dropped.value.why == "not_leader"
    leader = cluster.elect(1).core
    with pytest.raises(ProposalDropped, match="not_leader"):
        cluster[2].core.propose(b"x")
    with pytest.raises(ProposalDropped, match="not_leader"):
        cluster[2].core.propose_conf_change(ConfChange((Change("remove", 3),)))
    cluster.isolate(1)
    leader.propose(b"x" * (1 << 20))
    with pytest.raises(ProposalDropped, match="too_much_uncommitted"):
        leader.propose(b"x")
    assert leader.status().uncommitted_bytes == 1 << 20
    leader.transfer_leader(2)
    with pytest.raises(ProposalDropped, match="transferring"):
        leader.propose(b"x")
    with pytest.raises(ValueError, match="nothing to propose"):
        leader.propose_many([])


def test_one_change_of_members_at_a_time() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.isolate(1)
    leader.core.propose_conf_change(ConfChange((Change("add_learner", 4),), b"context"))

    assert leader.core.status().conf_change_pending
    with pytest.raises(ProposalDropped, match="conf_change_pending"):
        leader.core.propose_conf_change(ConfChange((Change("remove", 2),)))
    assert leader.core.status().last_index == 2


@pytest.mark.parametrize(
    "changes",
    [(("remove", 1), ("remove", 2), ("remove", 3)), (), (("become_king", 4),), (("add_voter", 0),)],
    ids=str,
)
def test_a_change_of_members_that_makes_no_sense_is_not_written(changes: tuple[tuple[str, int], ...]) -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1).core
    with pytest.raises(ValueError, match=r"voters|joint|no change|member's id"):
        leader.propose_conf_change(ConfChange(tuple(Change(*change) for change in changes)))
    assert leader.status().last_index == 1


def test_changes_of_members_come_back_as_they_were_given() -> None:
    change = ConfChange((Change("add_voter", 4), Change("add_learner", 2), Change("remove", 3)), b"who asked", joint=True, auto_leave=False)
    assert decode_conf_change(encode_conf_change(change)) == change
    with pytest.raises(ValueError):
        decode_conf_change(b"\xff")


def test_members_change_one_by_one_and_through_a_joint_configuration() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.add(4)
    cluster.change(("add_learner", 4))
    assert leader.machine.conf == ConfState(voters=(1, 2, 3), learners=(4,))
    cluster.change(("add_voter", 4))
    assert cluster[4].machine == leader.machine
    assert leader.core.status().conf == ConfState(voters=(1, 2, 3, 4))

    cluster.add(5)
    cluster.change(("add_voter", 5), ("remove", 2))

    assert leader.machine.conf == ConfState(voters=(1, 3, 4, 5)), "the joint configuration was left by itself"
    assert cluster[5].machine == leader.machine
    assert [peer.id for peer in leader.core.status().progress] == [1, 3, 4, 5]


def test_a_new_member_gets_a_snapshot_that_knows_it() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose(b"before")
    leader.make_snapshot()
    cluster.change(("add_learner", 4))
    received: list[ConfState] = []
    cluster.add(4).on_turn = lambda ready: received.append(ready.snapshot.conf_state) if ready.snapshot else None
    assert leader.core.status().first_index == 3
    assert not leader.core.snapshot_wanted()
    leader.core.tick(5)
    for _ in range(10):
        if leader.core.snapshot_wanted():
            break
        for member in cluster.members.values():
            while (ready := member.core.ready()) is not None:
                member._handle(ready)
                member.write()
        cluster.collect()
        cluster.deliver(cluster.members)
    assert leader.core.snapshot_wanted()
    assert received == [], "the one at 2 is from before it was a member: it would ignore it"
    cluster.tick(12)

    assert received == [ConfState(voters=(1, 2, 3), learners=(4,))]
    assert cluster[4].machine == leader.machine
    assert not leader.core.snapshot_wanted()


def test_a_removed_leader_steps_down_and_the_rest_go_on() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.change(("remove", 1))

    assert leader.core.status().role == "follower"
    assert leader.machine.conf == ConfState(voters=(2, 3))
    with pytest.raises(ProposalDropped, match="not_leader"):
        leader.core.propose(b"x")
    leader.core.campaign()
    assert leader.core.status().role == "follower"
    cluster.tick(40, ids=(2, 3))
    cluster.propose(b"on we go")
    assert cluster[2].applied == cluster[3].applied == [b"on we go"]


def test_entries_under_way_when_a_leader_is_removed_do_no_harm() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.core.propose_conf_change(ConfChange((Change("remove", 1),)))
    for n in range(5):
        leader.core.propose(b"%d" % n)
    cluster.run()
    cluster.tick(40, ids=(2, 3))

    assert leader.core.status().role == "follower"
    assert cluster[2].applied == cluster[3].applied
    assert cluster[2].machine.conf == ConfState(voters=(2, 3))


@pytest.mark.row("B16")
@pytest.mark.parametrize("with_snapshot", [False, True])
def test_a_member_that_was_away_knows_the_members_again(with_snapshot: bool) -> None:
    cluster = Cluster(4)
    leader = cluster.elect(1)
    cluster.isolate(3)
    cluster.change(("remove", 4))
    cluster.change(("add_learner", 5))
    if with_snapshot:
        leader.make_snapshot()
    cluster.heal()
    cluster[3].restart()
    assert cluster[3].core.status().conf.voters == (1, 2, 3, 4)
    cluster.tick(12)
    assert cluster[3].core.status().conf == ConfState(voters=(1, 2, 3), learners=(5,))
    for member in cluster.members.values():
        before = member.core.status()
        member.restart()
        member.work()
        after = member.core.status()
        assert after.conf == before.conf, "the part of the log that is known to be committed brings them back"
        assert (after.term, after.vote, after.commit) == (before.term, before.vote, before.commit)


def test_a_follower_left_alone_waits_for_its_disk_before_it_leads() -> None:
    """The crate asserts that everything is durable when a leader begins; alone there is no request for votes to wait for that."""
    member = Member(2, ConfState(voters=(1, 2)), Cluster(1).checker)
    leave = encode_conf_change(ConfChange((Change("remove", 1),)))
    member.core.step_many([message("append", 1, 2, term=1, entries=(WireEntry(1, 1), WireEntry(2, 1, leave, kind=2)))])
    member.work(sync=False)
    later = message("append", 1, 2, term=1, log_term=1, index=2, commit=2, entries=(WireEntry(3, 1, b"x"),))
    member.core.step_many([later])
    member.work(sync=False)
    member.write(1)
    member.work(sync=False)
    assert member.machine.conf == ConfState(voters=(2,))

    for _ in range(100):
        member.core.tick()
    member.core.campaign()
    assert member.core.status().role == "follower"
    member.write()
    member.core.tick()
    member.work()

    assert member.core.status().role == "leader"
    assert member.applied == [b"x"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff\xff", "undecodable"),
        (message("heartbeat", 2, 3, term=9), "misaddressed"),
        (message("heartbeat", 1, 1, term=9), "misaddressed"),
        (message("heartbeat", 0, 1, term=9), "misaddressed"),
        (message("append_response", 7, 1, term=1, index=1), "unknown_peer"),
        (message("hup", 2, 1), "forbidden"),
        (message("propose", 2, 1, entries=(WireEntry(0, 0, b"x"),)), "forbidden"),
        (message("transfer_leader", 2, 1), "forbidden"),
        (message("unreachable", 2, 1), "forbidden"),
        (message("snap_status", 2, 1), "forbidden"),
        (message("check_quorum", 2, 1), "forbidden"),
        (message("read_index", 2, 1), "malformed"),
        (message("read_index_response", 2, 1, term=1), "malformed"),
        (message("snapshot", 2, 1, term=9), "malformed"),
        (message("append", 2, 1, term=9, log_term=1, index=1, entries=(WireEntry(3, 9),)), "malformed"),
        (message("append", 2, 1, term=9, log_term=3, index=1, entries=(WireEntry(2, 2),)), "malformed"),
        (message("append", 2, 1, term=9, log_term=1, index=1, entries=(WireEntry(2, 9, kind=7),)), "malformed"),
        (message("heartbeat", 2, 1, term=9, commit=100), "log_lost"),
        (message("append_response", 2, 1, term=1, index=100), "ahead_of_log"),
        (message("append", 2, 1, term=9, log_term=0, index=4), "contradicts_commit"),
        (bytes([8, 99]) + message("heartbeat", 2, 1, term=9)[2:], "malformed"),
    ],
)
def test_a_message_that_cannot_be_is_refused_and_changes_nothing(data: bytes, why: str) -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    for n in range(3):
        cluster.propose(b"%d" % n)
    before = leader.core.status()

    refusals = leader.core.step_many([data, message("heartbeat_response", 2, 1, term=1)])

    assert [(refusal.position, refusal.why) for refusal in refusals] == [(0, why)]
    assert leader.core.status() == before
    assert leader.core.ready() is None
    cluster.propose(b"still working")


@pytest.mark.parametrize("n_kept", [0, 2])
def test_a_wiped_disk_under_a_known_id_is_found_out(n_kept: int) -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    for n in range(5):
        cluster.propose(b"%d" % n)
    wiped = Member(3, cluster.conf, cluster.checker)
    left = (WireEntry(1, 1), WireEntry(2, 1, b"0"))[:n_kept]
    wiped.core.step_many([message("append", 1, 3, term=1, entries=left)])
    cluster.members[3] = wiped
    cluster.tick(6)

    assert {refusal.why for refusal in wiped.refusals} == {"log_lost"}
    assert cluster[1].core.status().role == "leader"
    cluster.propose(b"two are enough")


def test_a_panic_poisons_the_core(capfd: pytest.CaptureFixture[str]) -> None:
    core = open_core(CoreConfig(id=1, seed=1, conf_state=ConfState(voters=(1, 2, 3))))
    absurd = snapshot(2, 1, term=3, index=9, voters=bytes([1, 2]), learners=bytes([1]))
    with pytest.raises(CorePanicked) as first:
        core.step_many([absurd])
    with pytest.raises(CorePanicked) as second:
        core.tick()

    assert isinstance(first.value, RuntimeError)
    assert str(first.value) == str(second.value)
    assert "restore" in str(first.value)
    assert ".rs:" in str(first.value)
    assert capfd.readouterr() == ("", "")


def test_what_a_message_says() -> None:
    data = message("append", 2, 1, term=9, log_term=3, index=4, commit=5, entries=(WireEntry(5, 9),))
    assert describe_message(data) == ("MsgAppend", 2, 1, 9, 3, 4, 5, False, 1, 0)
    with pytest.raises(ValueError):
        describe_message(b"\xff")


def test_the_machine_of_the_harness_can_tell_a_difference() -> None:
    cluster = Cluster(1)
    cluster.checker.on_applied(Machine(1, 1, b"a"))
    with pytest.raises(AssertionError, match="machines differ at 1"):
        cluster.checker.on_applied(Machine(1, 1, b"b"))
    cluster.checker.on_commit(1, (1, NORMAL, b"a"))
    with pytest.raises(AssertionError, match="two commits under index 1"):
        cluster.checker.on_commit(1, (1, CONF_CHANGE, b"a"))


def _committed(core: RaftCore) -> list[tuple[int, int, int, bytes]]:
    entries = []
    while (ready := core.ready()) is not None:
        core.on_persisted(ready.number)
        entries += ready.committed
    return entries
