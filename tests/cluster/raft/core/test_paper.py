"""What the Raft paper demands, rule by rule.

Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm" (extended version), sections 5.1 to 6; Ongaro's dissertation,
sections 6.4 and 9.6.
"""

from collections.abc import Callable
from typing import Any, Final

import pytest

from isopod.cluster.raft.core import NORMAL, MessageView, decode_records, describe_message
from tests.cluster.raft.core.harness import Cluster, Member
from tests.cluster.raft.core.wire import WireEntry, message

PLAIN: Final[dict[str, Any]] = {"pre_vote": False, "check_quorum": False}
"""The paper's algorithm, without what its author added later."""


def follower(*, log: tuple[int, ...] = (), term: int = 0, **settings: Any) -> Member:
    """Member 1 of three, with entries of these terms in its log, none of them committed."""
    member = Cluster(3, **(PLAIN | settings))[1]
    if log:
        entries = tuple(WireEntry(index, entry_term) for index, entry_term in enumerate(log, 1))
        member.core.step_many([message("append", 2, 1, term=log[-1], entries=entries)])
    if term:
        member.core.step_many([message("append_response", 2, 1, term=term)])
    member.work()
    member.outbox.clear()
    return member


def sent(member: Member) -> list[MessageView]:
    """What it sends now."""
    member.work()
    views = [describe_message(mail.data) for mail in member.outbox]
    member.outbox.clear()
    return views


def candidate(**settings: Any) -> Member:
    """Member 1 of three in term 1, its requests sent."""
    member = follower(**settings)
    member.core.campaign()
    sent(member)
    return member


def leader() -> Member:
    """Member 1 of three, elected in term 1, its first entry committed."""
    member = candidate()
    member.core.step_many([message("vote_response", 2, 1, term=1)])
    sent(member)
    member.core.step_many([message("append_response", 2, 1, term=1, index=1), message("append_response", 3, 1, term=1, index=1)])
    sent(member)
    return member


# 5.1: terms.


@pytest.mark.parametrize("role", ["follower", "candidate", "leader"])
def test_a_later_term_makes_everyone_a_follower_of_it(role: str) -> None:
    begin: dict[str, Callable[[], Member]] = {"follower": follower, "candidate": candidate, "leader": leader}
    member = begin[role]()
    member.core.step_many([message("append", 2, 1, term=7)])
    status = member.core.status()
    assert (status.role, status.term, status.leader) == ("follower", 7, 2)


def test_a_message_of_an_older_term_is_not_obeyed() -> None:
    member = follower(log=(1,), term=5)
    member.core.step_many([message("append", 2, 1, term=4, log_term=1, index=1, entries=(WireEntry(2, 4),))])
    assert member.core.status().last_index == 1


def test_the_term_and_the_vote_are_durable_before_they_are_answered() -> None:
    member = follower()
    member.core.step_many([message("vote", 2, 1, term=3)])
    ready = member.core.ready()
    assert ready is not None
    assert ready.must_sync
    assert ready.messages == []
    assert [describe_message(data).kind for _, data in ready.persisted_messages] == ["MsgRequestVoteResponse"]


# 5.2: elections.


def test_everyone_begins_as_a_follower() -> None:
    assert follower().core.status().role == "follower"


def test_a_leader_beats_at_every_interval() -> None:
    member = leader()
    for _ in range(3):
        member.core.tick(4)
        assert sent(member) == []
        member.core.tick()
        assert [(view.kind, view.to, view.n_entries) for view in sent(member)] == [("MsgHeartbeat", 2, 0), ("MsgHeartbeat", 3, 0)]


@pytest.mark.parametrize("again", [False, True])
def test_silence_begins_an_election(again: bool) -> None:
    member = follower(term=2)
    n_elections = 2 if again else 1
    for _ in range(n_elections):
        sent(member)
        member.core.tick(1000)
    status = member.core.status()
    assert (status.role, status.term, status.vote) == ("candidate", 2 + n_elections, 1)
    assert [(view.kind, view.to, view.term) for view in sent(member)] == [("MsgRequestVote", to, 2 + n_elections) for to in (2, 3)]


@pytest.mark.parametrize(
    ("n_members", "granted", "refused", "role"),
    [
        (1, 0, 0, "leader"),
        (3, 2, 0, "leader"),
        (3, 1, 0, "leader"),
        (3, 1, 1, "leader"),
        (5, 2, 0, "leader"),
        (5, 2, 2, "leader"),
        (3, 0, 0, "candidate"),
        (5, 1, 0, "candidate"),
        (5, 1, 2, "candidate"),
        (3, 0, 2, "follower"),
        (5, 1, 3, "follower"),
    ],
)
def test_a_majority_of_votes_makes_a_leader(n_members: int, granted: int, refused: int, role: str) -> None:
    member = Cluster(n_members, **PLAIN)[1]
    member.core.campaign()
    sent(member)
    votes = [0] * granted + [1] * refused
    for peer, reject in enumerate(votes, 2):
        member.core.step_many([message("vote_response", peer, 1, term=1, reject=reject)])
        sent(member)
    assert (member.core.status().role, member.core.status().term) == (role, 1)


def test_a_vote_counts_once() -> None:
    member = Cluster(5, **PLAIN)[1]
    member.core.campaign()
    sent(member)
    member.core.step_many([message("vote_response", 2, 1, term=1)] * 3)
    assert member.core.status().role == "candidate"


@pytest.mark.parametrize(
    ("voted_for", "asks", "is_granted"), [(0, 2, True), (0, 3, True), (2, 2, True), (3, 3, True), (2, 3, False), (3, 2, False)]
)
def test_one_vote_a_term_first_come_first_served(voted_for: int, asks: int, is_granted: bool) -> None:
    member = follower()
    if voted_for:
        member.core.step_many([message("vote", voted_for, 1, term=1)])
        sent(member)
    member.restart()
    member.core.step_many([message("vote", asks, 1, term=1)])
    assert [(view.kind, view.reject) for view in sent(member)] == [("MsgRequestVoteResponse", not is_granted)]


@pytest.mark.parametrize("term", [1, 2])
def test_a_candidate_gives_way_to_a_leader_of_its_term_or_a_later_one(term: int) -> None:
    member = candidate()
    member.core.step_many([message("append", 2, 1, term=term)])
    assert (member.core.status().role, member.core.status().term) == ("follower", term)


@pytest.mark.parametrize("is_candidate", [False, True])
def test_election_timeouts_are_spread_and_differ_between_members(is_candidate: bool) -> None:
    found = []
    for seed in range(200):
        member = follower()
        member.settings["seed"] = seed
        member.restart()
        if is_candidate:
            member.core.campaign()
        found.append(member.core.tick(1000))
    assert sorted(set(found)) == list(range(15, 30))
    same = [ticks for ticks in zip(*(_timeouts(id_) for id_ in (1, 2, 3)), strict=True) if len(set(ticks)) < 3]
    assert len(same) < 40, "most elections have one first candidate"


def _timeouts(id_: int) -> list[int]:
    member = Cluster(3)[id_]
    ticks = []
    for _ in range(100):
        ticks.append(member.core.tick(1000))
        member.work()
    return ticks


# 5.3: replication.


def test_a_leader_appends_and_sends_with_the_entry_before() -> None:
    member = leader()
    member.core.propose(b"x")
    ready = member.core.ready()
    assert ready is not None
    assert [(entry.index, entry.term, entry.data) for entry in decode_records(ready.records)] == [(2, 1, b"x")]
    views = [describe_message(data) for _, data in ready.messages]
    assert [(view.kind, view.to, view.index, view.log_term, view.commit, view.n_entries) for view in views] == [
        ("MsgAppend", to, 1, 1, 1, 1) for to in (2, 3)
    ]


@pytest.mark.parametrize(
    ("n_members", "acknowledge", "is_committed"),
    [(1, (), True), (3, (), False), (3, (2,), True), (3, (2, 3), True), (5, (2,), False), (5, (2, 3), True), (5, (4, 5), True)],
)
def test_an_entry_on_a_majority_is_committed(n_members: int, acknowledge: tuple[int, ...], is_committed: bool) -> None:
    cluster = Cluster(n_members)
    member = cluster.elect(1)
    member.core.propose(b"x")
    member.work()
    member.outbox.clear()
    member.core.step_many([message("append_response", peer, 1, term=1, index=2) for peer in acknowledge])
    member.work()
    assert (member.core.status().commit == 2) == is_committed
    assert member.applied == ([b"x"] if is_committed else [])


def test_the_leaders_own_copy_counts_only_when_it_is_durable() -> None:
    member = leader()
    member.core.propose(b"x")
    member.work(sync=False)
    member.core.step_many([message("append_response", 2, 1, term=1, index=2)])
    member.work(sync=False)
    assert member.core.status().commit == 1
    member.write()
    member.work()
    assert member.core.status().commit == 2


def test_two_followers_commit_without_the_leaders_disk() -> None:
    member = leader()
    member.core.propose(b"x")
    member.work(sync=False)
    member.core.step_many([message("append_response", peer, 1, term=1, index=2) for peer in (2, 3)])
    member.work(sync=False)
    assert member.core.status().commit == 2
    assert member.applied == [], "but it applies only what it holds"


def test_a_leader_commits_what_came_before_with_its_own() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.drops = lambda mail: describe_message(mail.data).kind == "MsgAppendResponse"
    cluster.propose(b"of term 1")
    cluster.heal()
    cluster.elect(2)
    assert cluster.applied() == {id_: [b"of term 1"] for id_ in (1, 2, 3)}


def test_a_follower_learns_the_commit_index_and_applies_in_order() -> None:
    member = follower()
    member.core.step_many([message("append", 2, 1, term=1, entries=(WireEntry(1, 1, b"a"), WireEntry(2, 1, b"b")), commit=1)])
    member.work()
    assert member.applied == [b"a"]
    member.core.step_many([message("append", 2, 1, term=1, log_term=1, index=2, commit=2)])
    member.work()
    assert member.applied == [b"a", b"b"]


def test_a_follower_acknowledges_only_what_is_durable() -> None:
    member = follower()
    member.core.step_many([message("append", 2, 1, term=1, entries=(WireEntry(1, 1, b"a"),), commit=1)])
    ready = member.core.ready()
    assert ready is not None
    assert (ready.must_sync, ready.messages, ready.committed) == (True, [], [])
    assert [(describe_message(data).kind, describe_message(data).index) for _, data in ready.persisted_messages] == [
        ("MsgAppendResponse", 1)
    ]


@pytest.mark.parametrize(
    ("log_term", "index", "rejects"), [(0, 0, False), (1, 1, False), (2, 2, False), (1, 2, True), (4, 4, True), (3, 3, True)]
)
def test_the_entry_before_must_match(log_term: int, index: int, rejects: bool) -> None:
    member = follower(log=(1, 2))
    member.core.step_many([message("append", 2, 1, term=5, log_term=log_term, index=index)])
    (view,) = sent(member)
    assert (view.kind, view.reject) == ("MsgAppendResponse", rejects)


@pytest.mark.parametrize(
    ("log_term", "index", "entries", "log"),
    [
        (2, 2, ((3, 3),), [1, 2, 3]),
        (1, 1, ((2, 3), (3, 4)), [1, 3, 4]),
        (0, 0, ((1, 1),), [1, 2]),
        (0, 0, ((1, 3),), [3]),
        (1, 1, (), [1, 2]),
    ],
)
def test_entries_that_differ_are_replaced_and_others_are_kept(
    log_term: int, index: int, entries: tuple[tuple[int, int], ...], log: list[int]
) -> None:
    member = follower(log=(1, 2))
    member.core.step_many(
        [message("append", 2, 1, term=5, log_term=log_term, index=index, entries=tuple(WireEntry(*entry) for entry in entries))]
    )
    member.work()
    assert [member.terms[position] for position in range(1, len(member.terms))] == log
    member.restart()
    assert [member.terms[position] for position in range(1, len(member.terms))] == log


@pytest.mark.parametrize(
    "log",
    [
        (1, 1, 1, 4, 4, 5, 5, 6, 6),
        (1, 1, 1, 4),
        (1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6),
        (1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7),
        (1, 1, 1, 4, 4, 4, 4),
        (1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3),
    ],
    ids="abcdef",
)
def test_a_leader_brings_the_logs_of_figure_7_in_line_with_its_own(log: tuple[int, ...]) -> None:
    """The paper's figure 7: followers that miss entries, have some too many, or both."""
    cluster = Cluster(3, **PLAIN)
    for id_, terms in ((1, (1, 1, 1, 4, 4, 5, 5, 6, 6, 6)), (2, log)):
        entries = tuple(WireEntry(index, term, b"%d" % term) for index, term in enumerate(terms, 1))
        cluster[id_].core.step_many([message("append", 3, id_, term=7, entries=entries)])
        cluster[id_].work()
        cluster[id_].outbox.clear()
    cluster.drops = lambda mail: mail.to == 2 and describe_message(mail.data).kind == "MsgRequestVote"
    cluster[1].core.campaign()
    cluster.run()
    cluster.heal()
    cluster.tick(10)

    assert cluster[1].core.status().role == "leader"
    assert cluster[2].terms == cluster[1].terms
    assert cluster[2].machine == cluster[1].machine
    assert cluster[1].machine.index == 11


# 5.4: safety.


@pytest.mark.parametrize(
    ("log", "log_term", "index", "is_granted"),
    [
        ((1,), 1, 1, True),
        ((1,), 1, 2, True),
        ((1, 1), 1, 1, False),
        ((1,), 2, 1, True),
        ((1,), 2, 2, True),
        ((1, 1), 2, 1, True),
        ((2,), 1, 1, False),
        ((2,), 1, 2, False),
        ((1, 2), 1, 3, False),
    ],
)
def test_a_vote_goes_to_a_log_that_is_as_good(log: tuple[int, ...], log_term: int, index: int, is_granted: bool) -> None:
    member = follower(log=log)
    member.core.step_many([message("vote", 3, 1, term=5, log_term=log_term, index=index)])
    assert [(view.kind, view.reject) for view in sent(member)] == [("MsgRequestVoteResponse", not is_granted)]


@pytest.mark.parametrize("acknowledged", [1, 2])
def test_only_an_entry_of_its_own_term_makes_a_leader_commit(acknowledged: int) -> None:
    """The paper's figure 8: counting copies of an older term's entry is not enough."""
    member = follower(log=(1, 2))
    member.core.campaign()
    sent(member)
    member.core.step_many([message("vote_response", 2, 1, term=3)])
    sent(member)
    member.core.step_many([message("append_response", 2, 1, term=3, index=acknowledged)])
    member.work()
    assert member.core.status().commit == 0
    member.core.step_many([message("append_response", 2, 1, term=3, index=3)])
    member.work()
    assert member.core.status().commit == 3


def test_an_empty_entry_begins_a_leaders_term() -> None:
    member = candidate()
    member.core.step_many([message("vote_response", 2, 1, term=1)])
    ready = member.core.ready()
    assert ready is not None
    assert [(entry.kind, entry.data) for entry in decode_records(ready.records)] == [(NORMAL, b"")]


# 9.6 and 6.4 of the dissertation: pre-vote, and the check of the quorum.


def test_a_member_that_was_away_does_not_disturb() -> None:
    cluster = Cluster(3)
    leading = cluster.elect(1)
    term = leading.core.status().term
    cluster.isolate(3)
    cluster.tick(200)
    assert (cluster[3].core.status().role, cluster[3].core.status().term) == ("pre_candidate", term)
    cluster.heal()
    cluster.tick(30)
    assert cluster.leader() is leading
    assert leading.core.status().term == term
    assert cluster[3].core.status().leader == 1


def test_without_pre_vote_it_would() -> None:
    cluster = Cluster(3, pre_vote=False)
    leading = cluster.elect(1)
    cluster.isolate(3)
    cluster.tick(200)
    assert cluster[3].core.status().term > leading.core.status().term


def test_a_leader_without_a_quorum_steps_down() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(1)
    cluster.tick(31, ids=(1,))
    assert (cluster[1].core.status().role, cluster[1].core.status().leader) == ("follower", 0)


def test_a_voter_that_hears_its_leader_grants_no_other_its_vote() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[3].core.step_many([message("vote", 2, 3, term=9, log_term=1, index=9)])
    cluster[3].work()
    assert (cluster[3].outbox, cluster[3].core.status().term) == ([], 1)


def test_followers_that_know_of_the_leaders_death_elect_at_once() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(1)
    for id_ in (2, 3):
        cluster[id_].core.forget_leader()
    cluster[2].core.campaign()
    cluster.run()
    assert cluster[2].core.status().role == "leader"


def test_time_slept_through_is_one_event() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    assert cluster[1].core.ticks_until_event() == 5
    assert cluster[1].core.tick(3) == 3
    assert cluster[1].core.ticks_until_event() == 2
    assert cluster[1].core.tick(100_000) == 2
    n_ticks = cluster[2].core.ticks_until_event()
    assert 15 <= n_ticks < 30
    assert cluster[2].core.tick(n_ticks - 1) == n_ticks - 1
    assert cluster[2].core.ready() is None
    assert cluster[2].core.tick(100_000) == 1
    assert cluster[2].core.status().role == "pre_candidate"
