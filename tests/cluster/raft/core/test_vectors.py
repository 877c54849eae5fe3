"""The scenarios of etcd's Raft library, run through our binding: their commands as input, the state they reach as the expectation.

Checked are configurations (confchange), commit index and outcome of elections for any set of acknowledgements and votes (quorum), and
after every transcript what it states about roles, terms, leaders, progress and logs, and that all members agree (interaction). The text of
messages is etcd's own and is not compared. What differs on purpose is listed below.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import pytest

from isopod.cluster.raft.core import Change, ConfChange, ConfState, CoreConfig, ProposalDropped, RaftCore, encode_conf_change, open_core
from tests.cluster.raft.core.harness import Cluster, Member
from tests.cluster.raft.core.wire import message

HERE: Final = os.path.dirname(os.path.abspath(__file__))
VECTORS: Final = os.path.normpath(os.path.join(HERE, *[os.pardir] * 5, "shared", "testdata", "raft"))
pytestmark = pytest.mark.skipif(not os.path.isdir(VECTORS), reason=f"etcd's test vectors are not at {VECTORS}")

OPERATIONS: Final = {"v": "add_voter", "l": "add_learner", "r": "remove"}
VOTES: Final = {"y": 0, "n": 1}


class Command(NamedTuple):
    """One command of a file: its words, the lines below it, and what it is expected to print."""

    words: list[str]
    body: list[str]
    expected: list[str]
    where: str

    def argument(self, name: str, default: str = "") -> str:
        """The value of NAME=VALUE."""
        return next((word.partition("=")[2] for word in self.words if word.startswith(f"{name}=")), default)


def commands(folder: str, name: str) -> Iterator[Command]:
    """Parse a file."""
    with open(os.path.join(VECTORS, folder, name), encoding="utf-8") as file:
        lines = file.read().splitlines()
    at = 0
    while at < len(lines):
        if not lines[at].strip() or lines[at].startswith("#"):
            at += 1
            continue
        begin = at
        while lines[at] != "----":
            at += 1
        end = at + 1
        while end < len(lines) and lines[end].strip():
            end += 1
        # Values in brackets hold blanks.
        head = re.sub(r"\(([^)]*)\)", lambda match: "(" + match[1].replace(" ", "") + ")", lines[begin])
        yield Command(head.split(), lines[begin + 1 : at], lines[at + 1 : end], f"{name}:{begin + 1}")
        at = end


def names(folder: str) -> list[str]:
    """The files of a folder."""
    return sorted(os.listdir(os.path.join(VECTORS, folder))) if os.path.isdir(VECTORS) else []


def numbers(text: str) -> tuple[int, ...]:
    """The ids in "(1,2 3)"."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def changes(words: list[str]) -> tuple[Change, ...]:
    """Steps such as v1 l2 r3. Id 0 is nobody and etcd's u (update) changes nothing: neither can be said in ours."""
    return tuple(Change(OPERATIONS[word[0]], int(word[1:])) for word in words if word[0] != "u" and word[1:] != "0")


# Configurations.


def spelled(line: str) -> ConfState:
    """The configuration in "voters=(1 2)&&(1) learners=(3) learners_next=(1) autoleave"."""
    match = re.fullmatch(
        r"voters=\(([^)]*)\)(?:&&\(([^)]*)\))?(?: learners=\(([^)]*)\))?(?: learners_next=\(([^)]*)\))?( autoleave)?", line
    )
    assert match is not None, line
    return ConfState(
        voters=numbers(match[1]),
        learners=numbers(match[3] or ""),
        voters_outgoing=numbers(match[2] or ""),
        learners_next=numbers(match[4] or ""),
        auto_leave=bool(match[5]),
    )


@pytest.mark.parametrize("name", names("confchange"))
def test_configurations_follow_from_changes(name: str) -> None:
    core = open_core(CoreConfig(id=99, seed=1))
    conf = ConfState()
    for command in commands("confchange", name):
        steps = changes(" ".join(command.body).split())
        joint = command.words[0] == "enter-joint"
        if command.words[0] == "simple" and len(steps) != 1:
            # The crate takes more than one step through a joint configuration, so this form cannot be asked for.
            conf = _simple(core, conf, steps, command)
            continue
        change = ConfChange(
            () if command.words[0] == "leave-joint" else steps, joint=joint, auto_leave=command.argument("autoleave") == "true"
        )
        if command.expected[0].startswith("voters="):
            conf = core.apply_conf_change(encode_conf_change(change))
            assert conf == spelled(command.expected[0]), command.where
        else:
            with pytest.raises(ValueError, match=_same_reason(command.expected[0])):
                core.apply_conf_change(encode_conf_change(change))
        assert core.status().conf == conf, command.where


def _simple(core: RaftCore, conf: ConfState, steps: tuple[Change, ...], command: Command) -> ConfState:
    """Several steps without a joint configuration: one by one, and as a whole only if at most one voter changes."""
    if not command.expected[0].startswith("voters="):
        return conf
    for step in steps:
        conf = core.apply_conf_change(encode_conf_change(ConfChange((step,))))
    assert conf == spelled(command.expected[0]), command.where
    return conf


def _same_reason(etcd: str) -> str:
    """The crate's words for etcd's."""
    return {"config is already joint": "already joint", "can't leave a non-joint config": "non-joint"}.get(etcd, ".")


# Quorums.


def quorum_commands(kind: str) -> list[Command]:
    """Commands with voters, one that leads being among them, since ours are asked of a real leader."""
    found = [command for name in names("quorum") for command in commands("quorum", name)]
    return [command for command in found if command.words[0] == kind and numbers(command.argument("cfg"))]


def members_of(command: Command) -> tuple[ConfState, list[int]]:
    """The configuration, and its ids in the order in which the file gives their values."""
    incoming, outgoing = numbers(command.argument("cfg")), numbers(command.argument("cfgj"))
    ids = list(dict.fromkeys(incoming + outgoing))
    return ConfState(voters=incoming, voters_outgoing=outgoing), ids


def values_of(command: Command, name: str) -> list[str]:
    """The values in "idx=(1,_,3)"."""
    return [value for value in command.argument(name).strip("()").split(",") if value]


@pytest.mark.parametrize("command", quorum_commands("committed"), ids=lambda command: command.where)
def test_a_commit_index_follows_from_acknowledgements(command: Command) -> None:
    conf, ids = members_of(command)
    values = [0 if value == "_" else int(value) for value in values_of(command, "idx")]
    # The leader is the first of the voters. Only entries of its term count; the first of them stands at 1 here.
    member = Member(ids[0], conf, Cluster(1).checker, check_quorum=False, pre_vote=False)
    core = member.core
    _win(member, ids)
    numbers_by_index = {}
    while (ready := core.ready()) is not None:
        numbers_by_index[ready.last_index] = ready.number
        if ready.last_index < max(values):
            core.propose(b"x")
    if values[0]:
        core.on_persisted(numbers_by_index[values[0]])
    for peer, value in zip(ids[1:], values[1:], strict=True):
        if value:
            core.step_many([message("append_response", peer, ids[0], term=1, index=value)])
    assert core.status().commit == int(command.expected[-1])


def _win(member: Member, ids: list[int]) -> None:
    """Elect it, with its first entry not durable."""
    member.core.campaign()
    if member.core.status().role != "leader":
        ready = member.core.ready()
        assert ready is not None
        member.core.on_persisted(ready.number)
        member.core.step_many([message("vote_response", peer, member.id, term=1) for peer in ids if peer != member.id])
    assert member.core.status().role == "leader"


@pytest.mark.parametrize("command", quorum_commands("vote"), ids=lambda command: command.where)
def test_an_election_follows_from_votes(command: Command) -> None:
    conf, ids = members_of(command)
    votes = dict(zip(ids, values_of(command, "votes"), strict=False))
    # Who campaigns votes for itself: one of those that said yes.
    candidates = [id_ for id_ in ids if votes.get(id_) == "y"]
    for candidate in candidates:
        member = Member(candidate, conf, Cluster(1).checker, pre_vote=False)
        member.core.campaign()
        member.work()
        for id_, vote in votes.items():
            if id_ != candidate and vote in VOTES:
                member.core.step_many([message("vote_response", id_, candidate, term=1, reject=VOTES[vote])])
        role = member.core.status().role
        assert role == {"VoteWon": "leader", "VoteLost": "follower", "VotePending": "candidate"}[command.expected[-1]], command.where


# Transcripts.

NOT_OURS: Final = frozenset(
    (
        # Without etcd's option step-down-on-removal, its leader goes on after it was removed; ours always steps down.
        "confchange_v1_remove_leader.txt",
        # Its option lets in changes that make no sense; ours are always checked.
        "confchange_disable_validation.txt",
    )
)


class Transcript:
    """Carries out a file's commands on our members."""

    def __init__(self) -> None:
        self.cluster = Cluster(0)
        self.offset = 0

    def do(self, command: Command) -> None:
        """Carry out one command, and check what it printed if that is a state."""
        name, *rest = command.words
        ids = [int(word) for word in rest if word.isdigit()]
        if name in self.OF_ONE:
            self.OF_ONE[name](self.cluster.members[ids[0]], ids)
        elif name in self.OF_PROPOSALS:
            core = self.cluster.members[ids[0]].core
            self._try(command, lambda: self.OF_PROPOSALS[name](core, command))
        else:
            self.OF_ALL[name](self, command, ids)

    def _transfer(self, command: Command, _ids: list[int]) -> None:
        self.cluster.members[int(command.argument("from"))].core.transfer_leader(int(command.argument("to")))

    def _process(self, _command: Command, ids: list[int]) -> None:
        for id_ in ids:
            self.cluster.members[id_].work()
            self.cluster.collect()

    def _deliver(self, command: Command, ids: list[int]) -> None:
        dropped = numbers(command.argument("drop"))
        self.cluster.collect()
        self.cluster.mail = [mail for mail in self.cluster.mail if mail.to not in dropped]
        self.cluster.deliver(ids)

    def _add(self, command: Command, ids: list[int]) -> None:
        index = int(command.argument("index", "0"))
        # Their term starts at 0 with a snapshot of term 1 in the log; ours is never behind its log.
        self.offset = max(self.offset, 1 if index else 0)
        conf = ConfState(voters=numbers(command.argument("voters")), learners=numbers(command.argument("learners")))
        settings = {
            "election_ticks": 6,
            "heartbeat_ticks": 2,
            "index": index,
            "pre_vote": command.argument("prevote") == "true",
            "check_quorum": command.argument("checkquorum") == "true",
            "max_inflight": int(command.argument("inflight", "256")),
        }
        for _ in range(ids[0]):
            id_ = len(self.cluster.members) + 1
            self.cluster.members[id_] = Member(id_, conf, self.cluster.checker, **settings)

    def _stabilize(self, _command: Command, ids: list[int]) -> None:
        for _ in range(1000):
            if not self.cluster.step(ids or None):
                return
        raise AssertionError("it never comes to rest")

    def _try(self, command: Command, propose: Callable[[], int]) -> None:
        """A proposal that etcd drops is dropped by ours, and the other way round."""
        is_dropped = any("dropped" in line or "ignoring" in line for line in command.expected)
        try:
            propose()
        except (ProposalDropped, ValueError):
            assert is_dropped, command.where
        else:
            assert not is_dropped, command.where

    def _check_status(self, command: Command, ids: list[int]) -> None:
        """Lines such as "2: StateReplicate match=11 next=12 inflight=2"; the leader's own line is not about replication."""
        member = self.cluster.members[ids[0]]
        expected = {int(line.split(":")[0]): line for line in command.expected}
        for peer in member.core.status().progress:
            line = expected.pop(peer.id)
            if peer.id == member.id:
                continue
            match = re.search(r"State(\w+) match=(\d+) next=(\d+)", line)
            assert match is not None
            # Ours leaves the probe state with the next entry, theirs with the next heartbeat.
            is_probed = peer.state == "probe" and peer.match == member.core.status().last_index
            assert is_probed or peer.state == match[1].lower(), command.where
            assert peer.match == int(match[2]), command.where
            # Theirs counts what a snapshot brings as sent; ours when the snapshot was reported.
            assert peer.next == int(match[3]) or peer.state == "snapshot", command.where
            inflight = re.search(r"inflight=(\d+)", line)
            assert peer.n_inflight == (int(inflight[1]) if inflight else 0), command.where
        assert expected == {}, command.where

    def _check_log(self, command: Command, ids: list[int]) -> None:
        assert len(self.cluster.members[ids[0]].terms) - 1 == len(command.expected), command.where

    def _check_roles(self, command: Command, _ids: list[int]) -> None:
        """Lines such as "1: StateLeader (Voter) Term:1 Lead:1"."""
        for line in command.expected:
            match = re.fullmatch(r"(\d+): State(\w+) \((\S+)\) Term:(\d+) Lead:(\d+)", line)
            assert match is not None, command.where
            status = self.cluster.members[int(match[1])].core.status()
            found = (status.role, status.id in status.conf.voters + status.conf.voters_outgoing, status.term - self.offset, status.leader)
            assert found == (match[2].lower(), match[3] == "Voter", int(match[4]), int(match[5])), command.where

    OF_ONE: Final[dict[str, Callable[[Member, list[int]], object]]] = {
        "campaign": lambda member, ids: member.core.campaign(),
        "tick-heartbeat": lambda member, ids: member.core.tick(member.settings["heartbeat_ticks"]),
        # Ours stops at each event on the way.
        "tick-election": lambda member, ids: [member.core.tick() for _ in range(member.settings["election_ticks"])],
        "report-unreachable": lambda member, ids: member.core.report_unreachable(ids[1]),
        "compact": lambda member, ids: member.make_snapshot(member.machine.index - ids[1]),
    }
    OF_PROPOSALS: Final[dict[str, Callable[[RaftCore, Command], int]]] = {
        "propose": lambda core, command: core.propose(command.words[2].encode()),
        "propose-conf-change": lambda core, command: core.propose_conf_change(change_of(command)),
    }
    OF_ALL: Final[dict[str, Callable[["Transcript", Command, list[int]], None]]] = {
        "add-nodes": _add,
        "transfer-leadership": _transfer,
        "process-ready": _process,
        "deliver-msgs": _deliver,
        "stabilize": _stabilize,
        "status": _check_status,
        "raft-state": _check_roles,
        "raft-log": _check_log,
        "log-level": lambda transcript, command, ids: None,
    }


def change_of(command: Command) -> ConfChange:
    """What "propose-conf-change" asks for."""
    steps = changes(" ".join(command.body).split())
    transition = command.argument("transition", "auto")
    return ConfChange(steps, joint=transition != "auto" and bool(steps), auto_leave=transition != "explicit")


def last_committed(found: list[Command]) -> int:
    """The highest commit index that a transcript prints."""
    text = "\n".join(line for command in found for line in command.expected)
    return max((int(number) for number in re.findall(r"HardState .*Commit:(\d+)", text)), default=0)


@pytest.mark.parametrize("name", [name for name in names("interaction") if name not in NOT_OURS])
def test_a_transcript_leads_to_the_same_state(name: str) -> None:
    transcript = Transcript()
    found = list(commands("interaction", name))
    for command in found:
        transcript.do(command)
    members = transcript.cluster.members

    # For a change of members that etcd ignores it writes an empty entry; ours refuses it.
    n_ignored = sum(any("ignoring conf change" in line for line in command.expected) for command in found)
    printed = last_committed(found)
    assert transcript.cluster.checker.commit_max == printed - n_ignored or not printed
    assert [member.refusals for member in members.values() if any(refusal.why != "unknown_peer" for refusal in member.refusals)] == []
    transcript.cluster.heal()
    transcript.cluster.tick(20)
    conf = next(
        member.machine.conf for member in members.values() if member.machine.index == max(m.machine.index for m in members.values())
    )
    machines = {members[id_].machine for id_ in conf.voters + conf.learners}
    assert len(machines) == 1, "members differ in the end"
