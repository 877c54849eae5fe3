"""Watching nodes at their ports: a wrapper around the Raft core and one around the state machine tell the checkers all that matters.

Nothing in a node knows that it is watched, and nothing is changed: each call goes through as it is. What is seen goes into the digest of
the run (every message, every durable record, every applied state), into the checkers of `isopod.testing.invariants`, and into the coverage.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from isopod.cluster.raft.core import ConfChange, ConfState, CoreConfig, CoreStatus, RaftCore, Ready, Refusal, decode_records
from isopod.cluster.raft.ports import Batch, Capturable, StateMachine
from isopod.testing.coverage import Coverage
from isopod.testing.invariants import Invariants

STATE_EVERY: Final = 16
"""The state's digest is taken after each index that this divides: a digest costs as much as the state is large."""
_SNAPSHOT_REPLACED_LOG: Final = -1
_VOTE: Final = b"\x08\x06"
"""How a message begins that answers a request for a vote: its kind is the first field."""
_TERM: Final = 4
_REJECT: Final = 10


class Watch:
    """What all observers of one run report to.

    Args:
        now_ns: Virtual time.
        trace: Takes one line per event that a person may want to read; None to keep none.
    """

    def __init__(self, now_ns: Callable[[], int], *, trace: Callable[[str], None] | None = None) -> None:
        self.now_ns = now_ns
        self.invariants: Final = Invariants(now_ns)
        self.coverage: Final = Coverage()
        self.boots: dict[int, int] = {}
        """How often each node's core was opened."""
        self.snapshot_at: dict[int, int] = {}
        self.n_durable: dict[int, int] = {}
        """How many writes to each node's journal have become durable, at least: those that the core waited for, one after the other."""
        self._trace = trace
        self._digest = hashlib.sha256()

    def hash(self, data: bytes) -> None:
        """Put something into the digest of the run."""
        self._digest.update(data)

    def digest(self) -> str:
        """Return the digest of all that was seen."""
        return self._digest.hexdigest()

    def note(self, text: str) -> None:
        """Put an event into the digest, and into the trace."""
        line = f"{self.now_ns() / 1e9:.6f} {text}"
        self._digest.update(line.encode())
        if self._trace is not None:
            self._trace(line)


class ObservedCore:
    """A Raft core that is watched. Everything goes to the real one.

    Args:
        core: The real one.
        config: What it was opened with.
        watch: Where to report.
    """

    def __init__(self, core: RaftCore, config: CoreConfig, watch: Watch) -> None:
        self._core = core
        self._node = config.id
        self._watch = watch
        self._role = "follower"
        self._terms: dict[int, int] = {config.snapshot_index: config.snapshot_term}
        watch.boots[self._node] = watch.boots.get(self._node, 0) + 1
        self._votes: list[tuple[int, int, int]] = []
        """Votes that are not durable yet: number of the Ready, term, candidate."""
        self._written = 0
        """The newest Ready that had to be written; 0 once it is durable."""
        status = core.status()
        watch.n_durable.setdefault(self._node, 0)
        watch.invariants.on_start(self._node, status.term, config.applied, vote=status.vote, last_index=status.last_index)
        for record in config.records:
            self._records(record)
        watch.note(f"node {self._node} opens its core: term {status.term}, commit {status.commit}, last {status.last_index}")
        # What is only handed on costs nothing more.
        self.tick = core.tick
        self.propose = core.propose
        self.propose_many = core.propose_many
        self.read_index = core.read_index
        self.campaign = core.campaign
        self.forget_leader = core.forget_leader
        self.applied_to = core.applied_to
        self.report_unreachable = core.report_unreachable
        self.ticks_until_event = core.ticks_until_event

    def __getattr__(self, name: str) -> Any:
        """Whatever else the real one has."""
        return getattr(self._core, name)

    def on_persisted(self, number: int) -> None:
        """See `RaftCore.on_persisted`."""
        self._core.on_persisted(number)
        if 0 < self._written <= number:
            self._written = 0
            self._watch.n_durable[self._node] += 1
        while self._votes and self._votes[0][0] <= number:
            _, term, candidate = self._votes.pop(0)
            self._watch.invariants.on_vote(self._node, term, candidate)

    def step_many(self, messages: Sequence[bytes]) -> list[Refusal]:
        """See `RaftCore.step_many`."""
        refused = self._core.step_many(messages)
        for refusal in refused:
            self._watch.coverage.count("refused message", refusal.why)
        return refused

    def propose_conf_change(self, change: ConfChange) -> int:
        """See `RaftCore.propose_conf_change`."""
        self._watch.note(f"node {self._node} proposes {change.changes}")
        return self._core.propose_conf_change(change)

    def apply_conf_change(self, data: bytes) -> ConfState:
        """See `RaftCore.apply_conf_change`."""
        conf = self._core.apply_conf_change(data)
        self._watch.coverage.count("event", "membership changed")
        self._watch.note(f"node {self._node} has voters {conf.voters}, learners {conf.learners}")
        return conf

    def transfer_leader(self, to: int) -> None:
        """See `RaftCore.transfer_leader`."""
        self._watch.coverage.count("event", "transfer begun")
        self._watch.note(f"node {self._node} hands over to {to}")
        self._core.transfer_leader(to)

    def compact(self, index: int) -> None:
        """See `RaftCore.compact`."""
        self._watch.coverage.count("event", "log compacted")
        self._watch.note(f"node {self._node} forgets its log up to {index}")
        self._core.compact(index)

    def snapshot_made(self, index: int, data: bytes) -> None:
        """See `RaftCore.snapshot_made`."""
        self._watch.coverage.count("event", "snapshot made")
        self._watch.note(f"node {self._node} has a snapshot of {index}")
        self._core.snapshot_made(index, data)

    def report_snapshot(self, id: int, *, ok: bool) -> None:  # noqa: A002  the port's name
        """See `RaftCore.report_snapshot`."""
        self._watch.coverage.count("event", "snapshot sent" if ok else "snapshot not sent")
        self._core.report_snapshot(id, ok=ok)

    def status(self) -> CoreStatus:
        """See `RaftCore.status`."""
        return self._core.status()

    def ready(self) -> Ready | None:
        """See `RaftCore.ready`."""
        ready = self._core.ready()
        if ready is not None:
            self._look(ready)
        return ready

    def _look(self, ready: Ready) -> None:
        watch, node = self._watch, self._node
        if ready.must_sync:
            self._written = ready.number
        if ready.hard_state:
            status = self._core.status()
            watch.hash(ready.hard_state)
            watch.invariants.on_term(node, status.term, status.commit)
        if ready.soft_state is not None:
            self._role_changed(ready.soft_state.role, ready.soft_state.leader)
        if ready.snapshot is not None:
            self._installed(ready.snapshot.index, ready.snapshot.term)
        if ready.records:
            watch.hash(ready.records)
            self._records(ready.records)
        for messages in (ready.messages, ready.persisted_messages):
            for to, message in messages:
                watch.hash(message)
                watch.coverage.message(message)
                if message[:2] == _VOTE:
                    self._voted(ready.number, to, message)
                if to <= 0:
                    watch.invariants.report("addressed messages", f"node {node} sends to {to}")
        for index, term, kind, data in ready.committed:
            watch.invariants.on_committed(node, index, term, kind=kind, data=data)

    def _voted(self, number: int, to: int, message: bytes) -> None:
        fields = _numbers(message)
        if not fields.get(_REJECT):
            self._votes.append((number, fields.get(_TERM, 0), to))

    def _role_changed(self, role: str, leader: int) -> None:
        watch = self._watch
        status = self._core.status()
        watch.coverage.count("role", role)
        watch.note(f"node {self._node} is {role} in term {status.term}, leader {leader}")
        if role == "leader" and self._role != "leader":
            watch.coverage.count("event", "leader elected")
            watch.invariants.on_leader(self._node, status.term, len(status.conf.voters))
        self._role = role

    def _installed(self, index: int, term: int) -> None:
        self._watch.coverage.count("event", "snapshot installed")
        self._watch.note(f"node {self._node} takes over a snapshot of {index}, term {term}")
        self._watch.invariants.on_snapshot_installed(self._node, index, term)

    def _records(self, records: bytes) -> None:
        terms = self._terms
        for entry in decode_records(records):
            if entry.kind == _SNAPSHOT_REPLACED_LOG:
                terms.clear()
            else:
                previous = terms.get(entry.index - 1)
                self._watch.invariants.on_append(self._node, entry.index, entry.term, previous_term=previous, data=entry.data)
                if entry.index in terms:
                    self._watch.coverage.count("event", "log entry replaced")
            terms[entry.index] = entry.term


class ObservedMachine:
    """A state machine that is watched.

    Args:
        machine: The real one.
        node: Whose it is.
        watch: Where to report.
    """

    def __init__(self, machine: StateMachine, node: int, watch: Watch) -> None:
        self.machine: Final = machine
        self._node = node
        self._watch = watch
        self._index = 0

    def apply(self, batch: Batch) -> Sequence[Any]:
        """See `StateMachine.apply`."""
        results = self.machine.apply(batch)
        self._index = batch.index
        self._watch.invariants.on_batch(batch)
        if not batch.index % STATE_EVERY:
            self.look()
        return results

    def look(self) -> None:
        """Take the state's digest now."""
        digest = self.machine.digest()
        self._watch.hash(digest.encode())
        self._watch.invariants.on_state(self._node, self._index, digest)

    def snapshot(self) -> bytes:
        """See `StateMachine.snapshot`."""
        data = self.machine.snapshot()
        self._watch.invariants.on_snapshot_made(self._index, data)
        return data

    def capture(self) -> Iterator[bytes]:
        """See `Capturable.capture`."""
        return self._seen(self.machine.capture() if isinstance(self.machine, Capturable) else iter((self.machine.snapshot(),)), self._index)

    def _seen(self, pieces: Iterator[bytes], index: int) -> Iterator[bytes]:
        taken: list[bytes] = []
        for piece in pieces:
            taken.append(piece)
            yield piece
        self._watch.invariants.on_snapshot_made(index, b"".join(taken))

    def restore(self, data: bytes) -> None:
        """See `StateMachine.restore`."""
        self._watch.coverage.count("event", "machine restored")
        self.machine.restore(data)
        self._index = getattr(self.machine, "index", 0)

    def digest(self) -> str:
        """See `StateMachine.digest`."""
        return self.machine.digest()

    def __getattr__(self, name: str) -> Any:
        """Whatever else the real one has."""
        return getattr(self.machine, name)


def _numbers(message: bytes) -> dict[int, int]:
    """Return the fields of a protocol buffer that are whole numbers, up to the first one of another kind that has no length."""
    found: dict[int, int] = {}
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        value, place = _varint(message, place)
        if key & 7 == 2:
            place += value
        elif key & 7 == 0:
            found[key >> 3] = value
        else:
            break
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    return value, place
