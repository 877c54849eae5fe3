"""Members of a cluster in one process, without a loop: cores of `open_core`, disks in memory, machines that are one hash, a list of mail.

`Member` does what the header of `isopod.cluster.raft.core` asks of a driver. `Checker` sees all of them and fails as soon as a promise of
Raft is broken. `Cluster` delivers in order and at once, for scenarios; the seeded one is in `chaos`.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from isopod.cluster.raft.core import (
    CONF_CHANGE,
    Change,
    ConfChange,
    ConfState,
    CoreConfig,
    RaftCore,
    Ready,
    Refusal,
    decode_records,
    describe_message,
    open_core,
)

EMPTY: Final = b"\0" * 16


class Machine(NamedTuple):
    """The applied state: a hash over all commands, and where it stands."""

    index: int = 0  # type: ignore[assignment]  # a tuple's method of that name is of no use here
    term: int = 0
    digest: bytes = EMPTY
    conf: ConfState = ConfState()


class Mail(NamedTuple):
    """A message under way."""

    sender: int
    to: int
    data: bytes


class Checker:
    """Promises of Raft (figure 3 of the paper), checked over all members at once."""

    def __init__(self) -> None:
        self.leaders: dict[int, int] = {}
        self.entries: dict[tuple[int, int], tuple[int, int, bytes]] = {}
        self.committed: dict[int, tuple[int, int, bytes]] = {}
        self.machines: dict[int, Machine] = {}
        self.commit_max = 0

    def on_leader(self, member: "Member") -> None:
        """One leader a term; and it has all that was committed."""
        status = member.core.status()
        assert self.leaders.setdefault(status.term, member.id) == member.id, f"two leaders in term {status.term}"
        if status.first_index <= self.commit_max:
            assert self.commit_max in member.terms, f"leader {member.id} has no entry {self.commit_max}, which was committed"
            assert member.terms[self.commit_max] == self.committed[self.commit_max][0], f"leader {member.id} lost what was committed"

    def on_entry(self, member: "Member", entry: Any) -> None:
        """Entries of one index and term are the same, and so are those before them."""
        before = member.terms.get(entry.index - 1)
        if before is None:
            return
        seen = self.entries.setdefault((entry.index, entry.term), (before, entry.kind, entry.data))
        assert seen == (before, entry.kind, entry.data), f"logs differ at {entry.index} of term {entry.term}"

    def on_commit(self, index: int, entry: tuple[int, int, bytes]) -> None:
        """What is committed under an index stays."""
        assert self.committed.setdefault(index, entry) == entry, f"two commits under index {index}"
        self.commit_max = max(self.commit_max, index)

    def on_applied(self, machine: Machine) -> None:
        """Machines at the same index are equal."""
        seen = self.machines.setdefault(machine.index, machine)
        assert seen == machine, f"machines differ at {machine.index}: {seen}, {machine}"


class Member:
    """One member with its disk. `sync`: what is to be written is durable at once; else when `write` is called."""

    def __init__(self, id_: int, conf: ConfState, checker: Checker, **settings: Any) -> None:
        self.id = id_
        self.checker = checker
        self.settings = {"seed": 1, **settings}
        self.start = Machine(conf=conf)
        if self.settings.pop("index", 0):
            self.start = Machine(settings["index"], 1, EMPTY, conf)
        # The disk.
        self.hard_state = b""
        self.records: list[bytes] = []
        self.snapshot = self.start
        # What a process has.
        self.unwritten: list[Ready] = []
        self.outbox: list[Mail] = []
        self.reads: list[tuple[bytes, int]] = []
        self.refusals: list[Refusal] = []
        self.on_turn: Callable[[Ready], None] | None = None
        self.open()

    def open(self) -> None:
        """Start, from the disk."""
        self.machine = self.snapshot
        self.applied: list[bytes] = []
        self.terms = {self.machine.index: self.machine.term}
        for records in self.records:
            self._follow(records, is_new=False)
        self.core: RaftCore = open_core(
            CoreConfig(
                id=self.id,
                applied=self.machine.index,
                hard_state=self.hard_state,
                conf_state=self.machine.conf,
                snapshot_index=self.machine.index,
                snapshot_term=self.machine.term,
                records=self.records,
                **self.settings,
            )
        )
        self.is_leader = False

    def crash(self, n_durable: int = 0, *, snapshot_only: bool = False) -> None:
        """Lose what is not durable: all but the first `n_durable` of what was being written, and perhaps the snapshot of the next."""
        for ready in self.unwritten[:n_durable]:
            self._store(ready)
        if snapshot_only and len(self.unwritten) > n_durable:
            self._store_snapshot(self.unwritten[n_durable])
        self.unwritten.clear()
        self.outbox.clear()

    def restart(self) -> None:
        """Crash, and start again."""
        self.crash()
        self.open()

    def work(self, *, sync: bool = True) -> bool:
        """Do what the core has to do; returns whether there was something."""
        worked = False
        while True:
            ready = self.core.ready()
            if ready is None:
                if not self.core.snapshot_wanted() or not self.make_snapshot():
                    return worked
                continue
            worked = True
            self._handle(ready)
            if sync:
                self.write()

    def write(self, n_readies: int | None = None) -> None:
        """Make what is waiting durable."""
        batch = self.unwritten[:n_readies]
        if not batch:
            return
        del self.unwritten[:n_readies]
        for ready in batch:
            self._store(ready)
        self.core.on_persisted(batch[-1].number)
        for ready in batch:
            self.outbox += [Mail(self.id, to, data) for to, data in ready.persisted_messages]
            if ready.snapshot is not None:
                self.core.applied_to(ready.snapshot.index)

    def make_snapshot(self, n_kept: int = 0) -> bool:
        """Snapshot the machine and compact the log, but for the last entries, in memory and on the disk; False: nothing new to do."""
        machine = self.machine
        if machine.index <= self.snapshot.index or machine.index != self.core.status().applied:
            return False
        self.snapshot = machine
        self.core.snapshot_made(machine.index, b"")
        self.core.compact(max(machine.index - n_kept, 0))
        n_covered = 0
        for records in self.records:
            if any(entry.index > machine.index for entry in decode_records(records)):
                break
            n_covered += 1
        del self.records[:n_covered]
        return True

    def _handle(self, ready: Ready) -> None:
        if self.on_turn is not None:
            self.on_turn(ready)
        self._follow(ready.records)
        if ready.soft_state is not None:
            if ready.soft_state.role == "leader" and not self.is_leader:
                self.checker.on_leader(self)
            self.is_leader = ready.soft_state.role == "leader"
        self.outbox += [Mail(self.id, to, data) for to, data in ready.messages]
        self.outbox += [Mail(self.id, snapshot.to, snapshot.message) for snapshot in ready.snapshots_to_send]
        if ready.snapshot is not None:
            self.machine = self.checker.machines.get(ready.snapshot.index, self.start)
            assert (self.machine.index, self.machine.term) == (ready.snapshot.index, ready.snapshot.term)
            assert self.machine.conf == ready.snapshot.conf_state
        self.unwritten.append(ready)
        self.reads += ready.read_states
        for entry in ready.committed:
            self._apply(*entry)
        if ready.committed:
            self.core.applied_to(self.machine.index)

    def _apply(self, index: int, term: int, kind: int, data: bytes) -> None:
        assert index == self.machine.index + 1
        conf = self.core.apply_conf_change(data) if kind == CONF_CHANGE else self.machine.conf
        digest = hashlib.blake2b(self.machine.digest + data, digest_size=16).digest() if data else self.machine.digest
        self.machine = Machine(index, term, digest, conf)
        if data and kind != CONF_CHANGE:
            self.applied.append(data)
        self.checker.on_commit(index, (term, kind, data))
        self.checker.on_applied(self.machine)

    def _follow(self, records: bytes, *, is_new: bool = True) -> None:
        for entry in decode_records(records):
            if entry.kind < 0:
                self.terms = {entry.index: entry.term}
                continue
            if is_new:
                self.checker.on_entry(self, entry)
            for index in range(entry.index + 1, max(self.terms, default=0) + 1):
                self.terms.pop(index, None)
            self.terms[entry.index] = entry.term

    def _store(self, ready: Ready) -> None:
        self._store_snapshot(ready)
        self.hard_state = ready.hard_state or self.hard_state
        if ready.records:
            self.records.append(ready.records)

    def _store_snapshot(self, ready: Ready) -> None:
        if ready.snapshot is not None:
            self.snapshot = self.checker.machines.get(ready.snapshot.index, self.start)


class Cluster:
    """Members whose messages arrive in order as soon as `run` is called, unless they are dropped."""

    def __init__(self, n_members: int = 3, *, learners: tuple[int, ...] = (), **settings: Any) -> None:
        voters = tuple(id_ for id_ in range(1, n_members + 1) if id_ not in learners)
        self.conf = ConfState(voters=voters, learners=learners)
        self.settings = settings
        self.checker = Checker()
        self.members = {id_: Member(id_, self.conf, self.checker, **settings) for id_ in range(1, n_members + 1)}
        self.mail: list[Mail] = []
        self.dropped: list[Mail] = []
        self.drops: Callable[[Mail], bool] = lambda mail: False

    def __getitem__(self, id_: int) -> Member:
        return self.members[id_]

    def add(self, id_: int) -> Member:
        """Start a member that is not in the configuration yet. It knows the one that all began with."""
        self.members[id_] = Member(id_, self.conf, self.checker, **self.settings)
        return self.members[id_]

    def run(self) -> None:
        """Work and deliver until nothing happens."""
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("the members never come to rest")

    def step(self, ids: Iterable[int] | None = None) -> bool:
        """Let members work, then deliver to them what was sent; returns whether anything happened."""
        chosen = list(self.members) if ids is None else list(ids)
        worked = [self.members[id_].work() for id_ in chosen]
        self.collect()
        delivered = self.deliver(chosen)
        return any(worked) or delivered

    def collect(self) -> None:
        """Take over what members sent."""
        for member in self.members.values():
            for mail in member.outbox:
                (self.dropped if self.drops(mail) else self.mail).append(mail)
            member.outbox.clear()

    def deliver(self, ids: Iterable[int]) -> bool:
        """Deliver what is under way to some."""
        chosen = set(ids)
        arriving = [mail for mail in self.mail if mail.to in chosen]
        self.mail = [mail for mail in self.mail if mail.to not in chosen]
        for mail in arriving:
            member = self.members[mail.to]
            member.refusals += member.core.step_many([mail.data])
            if describe_message(mail.data).kind == "MsgSnapshot":
                self.members[mail.sender].core.report_snapshot(mail.to, ok=True)
        return bool(arriving)

    def elect(self, id_: int) -> Member:
        """Make a member the leader."""
        others = [member for member in self.members.values() if member.id != id_]
        for member in others:
            member.core.forget_leader()
        if (old := self.leader()) is not None and old.id != id_:
            old.core.transfer_leader(id_)
        else:
            self.members[id_].core.campaign()
        self.run()
        assert self.members[id_].core.status().role == "leader"
        return self.members[id_]

    def leader(self) -> Member | None:
        """The leader of the highest term, if any member believes to be one."""
        statuses = [(member.core.status(), member) for member in self.members.values()]
        leaders = [(status.term, member) for status, member in statuses if status.role == "leader"]
        return max(leaders, key=lambda pair: pair[0])[1] if leaders else None

    def tick(self, n: int = 1, ids: Iterable[int] | None = None) -> None:
        """Let time pass, running in between."""
        for _ in range(n):
            for id_ in list(self.members) if ids is None else ids:
                self.members[id_].core.tick()
            self.run()

    def isolate(self, *ids: int) -> None:
        """Lose all that goes between these and the others."""
        self.drops = lambda mail: (mail.sender in ids) != (mail.to in ids)

    def heal(self) -> None:
        """Lose nothing any more."""
        self.drops = lambda mail: False

    def propose(self, data: bytes) -> int:
        """Propose on the leader, and run."""
        leader = self.leader()
        assert leader is not None
        index = leader.core.propose(data)
        self.run()
        return index

    def change(self, *changes: tuple[str, int], joint: bool = False) -> int:
        """Change the members, and run."""
        leader = self.leader()
        assert leader is not None
        index = leader.core.propose_conf_change(ConfChange(tuple(Change(*change) for change in changes), joint=joint))
        self.run()
        return index

    def applied(self) -> dict[int, list[bytes]]:
        """The commands that each member has applied since it started."""
        return {id_: member.applied for id_, member in self.members.items()}
