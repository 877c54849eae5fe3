"""The Raft core: consensus as a state machine without I/O, clock or chance of its own.

What it is: the contract of `RaftCore`, its values, and `open_core`, which makes one of the Rust core (the crate raft 0.7, a descendant of
etcd's Raft). Nothing else imports `isopod._core` for Raft, so another engine can take its place here.

What it is not: it writes no file, sends no byte, starts no timer. The driver (`isopod.cluster.raft.node`) owns it and calls it from one
thread.

One turn of the driver:

1. `step_many` what the peers sent, *then* `tick` the ticks that passed (messages that lay in a socket are no silence of the leader), then
   `propose_many`, `read_index` and the rest.
2. `ready()` until it gives None. For each:
   - send `messages` at once; start streaming each of `snapshots_to_send` (send its `message` when the peer holds the snapshot's bytes, and
     `report_snapshot` either way);
   - a `snapshot` that came in is made durable first, before anything of this Ready is written;
   - write `hard_state` and `records` as one atomic batch; only if `must_sync` must it be durable before going on;
   - when durable: `on_persisted(number)` and send `persisted_messages`; numbers may be skipped (the last one says all), never reordered;
   - apply `committed` in order, calling `apply_conf_change` for each change of members *before* the next entry is looked at; then
     `applied_to(index)`. After a `snapshot` was installed and reported by `on_persisted`: `applied_to(snapshot.index)`.
   The next Ready may be asked for while the last one is still being written.
3. If `snapshot_wanted()`, make a snapshot.
4. Sleep at most `ticks_until_event()` ticks.

Rules:

- `hard_state`, `records` and messages are opaque bytes; `decode_records` and `describe_message` show what is in them.
- `hard_state` b"" means: unchanged. `records` holds the entries to append, or what a received snapshot made of the log; several Readies'
  `records` in the order they were written are `CoreConfig.records` after a restart. Those below the snapshot may be left out, all others
  must be there. An entry that is written again under an index replaces the older one and all after it.
- The same calls give the same answers, bit for bit, in any process: the election timeout is a pure function of (seed, id, term, number of
  timeouts so far), set after every call.
- After `CorePanicked` the state is unknown: the process must end (`world.processes.abort`). Every later call raises it again.

Source: Ongaro, "Consensus: Bridging Theory and Practice" (2014), chapters 3, 4, 6 and 9; the crate's documentation of `RawNode`.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from isopod import _core
from isopod._core import CorePanicked

__all__ = [
    "CONF_CHANGE",
    "NORMAL",
    "Change",
    "ConfChange",
    "ConfState",
    "CoreConfig",
    "CorePanicked",
    "CoreStatus",
    "Entry",
    "MessageView",
    "PeerProgress",
    "ProposalDropped",
    "RaftCore",
    "Ready",
    "Refusal",
    "SnapshotIn",
    "SnapshotToSend",
    "SoftState",
    "decode_conf_change",
    "decode_records",
    "describe_message",
    "encode_conf_change",
    "open_core",
]

NORMAL: Final = 0
"""The kind of an entry with a command, or of the empty one that a new leader writes."""
CONF_CHANGE: Final = 1
"""The kind of an entry that changes the members: its data goes to `apply_conf_change`. It may be empty."""


class ConfState(NamedTuple):
    """Who votes. `voters_outgoing` is not empty only in the middle of a joint change, which isopod does not begin by itself."""

    voters: tuple[int, ...] = ()
    learners: tuple[int, ...] = ()
    voters_outgoing: tuple[int, ...] = ()
    learners_next: tuple[int, ...] = ()
    auto_leave: bool = False


class Change(NamedTuple):
    """One step of a change: what is "add_voter" (also promotes a learner), "add_learner" (also demotes a voter) or "remove"."""

    what: str
    id: int


class ConfChange(NamedTuple):
    """A change of members. More than one step makes a joint change (section 4.3); no step at all leaves one. `context` is the driver's."""

    changes: tuple[Change, ...]
    context: bytes = b""
    joint: bool = False
    """Go through a joint configuration even for one step."""
    auto_leave: bool = True
    """The leader leaves a joint configuration by itself as soon as it was applied."""


class CoreConfig(NamedTuple):
    """What a core starts from. Times are in ticks, of 10 ms in isopod."""

    id: int
    seed: int
    election_ticks: int = 15
    """A follower campaigns after a silence of this many ticks up to `election_ticks_max` - 1."""
    heartbeat_ticks: int = 5
    pre_vote: bool = True
    check_quorum: bool = True
    max_inflight: int = 256
    """Append messages under way to one peer."""
    bytes_per_message_max: int = 1 << 20
    """Bytes of entries in one append message; one entry always fits."""
    uncommitted_bytes_max: int = 64 << 20
    """Proposals beyond it are dropped."""
    committed_bytes_per_ready_max: int = 4 << 20
    applied: int = 0
    """Index up to which the machine's state is already known: entries after it are handed out again."""
    hard_state: bytes = b""
    """The last one written, b"" if none was."""
    conf_state: ConfState = ConfState()
    """The members as of `applied`."""
    snapshot_index: int = 0
    snapshot_term: int = 0
    records: Sequence[bytes] = ()
    """What was written, in order."""
    election_ticks_max: int = 0
    """0: twice `election_ticks`."""


class SoftState(NamedTuple):
    """What changed without being written. `role` is "follower", "pre_candidate", "candidate" or "leader"; `leader` 0 if unknown."""

    leader: int
    role: str


class Entry(NamedTuple):
    """An entry of the log; `kind` is `NORMAL` or `CONF_CHANGE`. Empty normal entries are the leaders' own and mean nothing."""

    index: int  # type: ignore[assignment]  # a tuple's method of that name is of no use here
    term: int
    kind: int
    data: bytes


class SnapshotIn(NamedTuple):
    """A snapshot that the leader sent: `data` is what its `snapshot_made` was given (metadata; the bytes travel beside)."""

    index: int  # type: ignore[assignment]
    term: int
    conf_state: ConfState
    data: bytes


class SnapshotToSend(NamedTuple):
    """A peer needs the snapshot of this index: stream its bytes, send `message` after them, then `report_snapshot(to, ok=...)`."""

    to: int
    index: int  # type: ignore[assignment]
    term: int
    message: bytes


class Ready(NamedTuple):
    """What a turn produced; see the module's header for what to do with it, and when."""

    number: int
    soft_state: SoftState | None
    hard_state: bytes
    records: bytes
    first_index: int
    """Of the entries in `records`, 0 if there are none."""
    last_index: int
    must_sync: bool
    messages: list[tuple[int, bytes]]
    persisted_messages: list[tuple[int, bytes]]
    committed: list[tuple[int, int, int, bytes]]
    """(index, term, kind, data): the fields of `Entry`, bare because there are many."""
    snapshot: SnapshotIn | None
    read_states: list[tuple[bytes, int]]
    """(context, index): the read may be served once the machine has applied `index`."""
    snapshots_to_send: list[SnapshotToSend]


class PeerProgress(NamedTuple):
    """What a leader knows of a member: `state` is "probe", "replicate" or "snapshot"; `recent`: heard of since the last quorum check."""

    id: int
    match: int
    next: int
    state: str
    recent: bool
    pending_snapshot: int
    n_inflight: int


class CoreStatus(NamedTuple):
    """A view of the core. `progress` is empty on all but the leader; `persisted` is the last index that `on_persisted` covered."""

    id: int
    role: str
    term: int
    leader: int
    vote: int
    commit: int
    applied: int
    persisted: int
    first_index: int
    last_index: int
    conf: ConfState
    transferring_to: int
    """0 if no hand-over is under way."""
    conf_change_pending: bool
    uncommitted_bytes: int
    progress: tuple[PeerProgress, ...]


class Refusal(NamedTuple):
    """A message that was not taken in, and why; the core is as if it had not come. `position` is its place in the list.

    `why` is one of: "undecodable" · "misaddressed" (to another member, or from ourselves) · "unknown_peer" (an answer from a non-member) ·
    "forbidden" (a kind that no peer may send: proposals are not forwarded) · "malformed" · "log_lost" (the leader counts on entries that we
    do not have: this node's disk lost them; it must leave and join under a new id) · "ahead_of_log" (a peer acknowledges entries that were
    never sent to it) · "contradicts_commit" (a leader without what was committed here: its disk, or those of a majority, lost it, or it is
    of another cluster).
    """

    position: int
    sender: int
    why: str


class MessageView(NamedTuple):
    """The head of a message, for logs and tests. `kind` is the crate's name for it, such as "MsgAppend"."""

    kind: str
    sender: int
    to: int
    term: int
    log_term: int
    index: int  # type: ignore[assignment]
    commit: int
    reject: bool
    n_entries: int
    snapshot_index: int


class ProposalDropped(Exception):
    """The core did not take a proposal; nothing of it was written. args = (why,).

    `why` is "not_leader", "transferring", "too_much_uncommitted" or "conf_change_pending".
    """

    @property
    def why(self) -> str:
        """The reason."""
        return str(self.args[0])


class RaftCore(Protocol):
    """One member's part in the consensus. Used by one thread; every method returns at once."""

    def tick(self, n: int = 1) -> int:
        """Let `n` ticks pass; returns how many did: it stops after the first that started something (a heartbeat, a campaign).

        The rest is dropped on purpose: a process that stood still must not take its own pause for the silence of others.
        """

    def step_many(self, messages: Sequence[bytes]) -> list[Refusal]:
        """Take in what peers sent; returns those that were refused, normally none."""

    def propose(self, data: bytes) -> int:
        """Append an entry with a command; returns its index (its term is the present one). Only on the leader.

        Raises:
            ProposalDropped: Not the leader, or it is handing over, or too much is uncommitted.
        """

    def propose_many(self, data: Sequence[bytes]) -> int:
        """Append several entries, all or none; returns the index of the last. Not for an empty list (ValueError)."""

    def propose_conf_change(self, change: ConfChange) -> int:
        """Append a change of members; returns its index. One at a time: "conf_change_pending" until the last was applied.

        Raises:
            ProposalDropped: As for `propose`, or the last change was not applied yet (after an election: the log up to then was not).
            ValueError: It makes no sense, such as removing the last voter.
        """

    def apply_conf_change(self, data: bytes) -> ConfState:
        """Carry out a committed change (`Entry.data` of kind `CONF_CHANGE`); returns the members after it, to be kept with the snapshot.

        Called once for each, in order. ValueError: it makes no sense and changed nothing, on every member alike. A leader that is no voter
        afterwards becomes a follower at once.
        """

    def read_index(self, context: bytes) -> None:
        """Ask for an index that is certainly not behind any write acknowledged before this call; it comes in `Ready.read_states`.

        It may never come (no leader, a lost message, a leader that has not committed in its term yet): ask again with a new context. A
        context is never reused.
        """

    def transfer_leader(self, to: int) -> None:
        """On the leader: hand over to a voter. Given up after one election timeout; nothing happens for a learner or an unknown id."""

    def campaign(self) -> None:
        """Stand for election now (with pre-vote, if that is on). Nothing happens on a leader or a learner."""

    def forget_leader(self) -> None:
        """On a follower: the leader is known to be dead (its process ended). Others may campaign without waiting for a timeout."""

    def ready(self) -> Ready | None:
        """Take what there is to do, None if nothing. Its entries count as appended; they are durable when `on_persisted` says so."""

    def on_persisted(self, number: int) -> None:
        """All up to the Ready of this number is durable."""

    def applied_to(self, index: int) -> None:
        """The machine has applied everything up to `index`. ValueError: it was not committed and durable yet, or is below the last one."""

    def compact(self, index: int) -> None:
        """Forget the entries up to `index`, which must be covered by `snapshot_made`; the term at `index` is kept. ValueError otherwise."""

    def snapshot_made(self, index: int, data: bytes) -> None:
        """There is a durable snapshot of the machine at `index`, an applied one: it is offered to peers that need what was compacted.

        The members as of `index` are remembered by the core from `apply_conf_change`. ValueError: beyond what was applied, or too old.
        """

    def snapshot_wanted(self) -> bool:
        """Whether a peer waits for a newer snapshot than there is: one that was made before it became a member is of no use to it.

        Asked once a turn; the answer is to make a snapshot of what is applied now, whatever the policy says.
        """

    def report_unreachable(self, peer: int) -> None:
        """Messages to this peer were lost: probe it before sending more."""

    def report_snapshot(self, peer: int, *, ok: bool) -> None:
        """Sending a snapshot to this peer ended."""

    def ticks_until_event(self) -> int:
        """Return how many ticks can be slept through before `tick` would do something, at least 1; 2**31 - 1 if only messages matter."""

    def status(self) -> CoreStatus:
        """Return a view of the present state."""


def open_core(config: CoreConfig) -> RaftCore:
    """Make a core.

    Args:
        config: Settings, and everything that was written before.

    Returns:
        The core. Nothing needs to be closed.

    Raises:
        ValueError: A setting makes no sense; or what was written does not fit together (args[0] says what is missing), which means that
            the disk lost part of it.
    """
    return _RustCore(config)


def decode_records(records: bytes) -> list[Entry]:
    """Return the entries in a Ready's `records`; a log that was replaced by a snapshot gives one of kind -1. ValueError: damaged."""
    return [Entry(*fields) for fields in _core.raft_decode_records(records)]


def encode_conf_change(change: ConfChange) -> bytes:
    """Return what `propose_conf_change` writes. ValueError: an unknown kind of step, or id 0."""
    return _core.raft_encode_conf_change(change.changes, change.context, change.joint, change.auto_leave)


def decode_conf_change(data: bytes) -> ConfChange:
    """Return a change of members from `Entry.data`. ValueError: damaged."""
    changes, context, joint, auto_leave = _core.raft_decode_conf_change(data)
    return ConfChange(tuple(Change(*change) for change in changes), context, joint, auto_leave)


def describe_message(message: bytes) -> MessageView:
    """Return the head of a message. ValueError: it cannot be decoded."""
    return MessageView(*_core.raft_describe_message(message))


class _RustCore:
    """Turns the plain tuples of `isopod._core.RaftCore` into named ones."""

    __slots__ = ("_raw",)

    def __init__(self, config: CoreConfig) -> None:
        self._raw = _core.RaftCore(config)

    def tick(self, n: int = 1) -> int:
        return self._raw.tick(n)

    def step_many(self, messages: Sequence[bytes]) -> list[Refusal]:
        return [Refusal(*refusal) for refusal in self._raw.step_many(messages)]

    def propose(self, data: bytes) -> int:
        return _taken(self._raw.propose((data,)))

    def propose_many(self, data: Sequence[bytes]) -> int:
        return _taken(self._raw.propose(data))

    def propose_conf_change(self, change: ConfChange) -> int:
        return _taken(self._raw.propose_conf_change(encode_conf_change(change)))

    def apply_conf_change(self, data: bytes) -> ConfState:
        return ConfState(*self._raw.apply_conf_change(data))

    def read_index(self, context: bytes) -> None:
        self._raw.read_index(context)

    def transfer_leader(self, to: int) -> None:
        self._raw.transfer_leader(to)

    def campaign(self) -> None:
        self._raw.campaign()

    def forget_leader(self) -> None:
        self._raw.forget_leader()

    def ready(self) -> Ready | None:
        raw = self._raw.ready()
        if raw is None:
            return None
        ready = Ready._make(raw)
        if ready.soft_state is None and ready.snapshot is None and not ready.snapshots_to_send:
            return ready
        return ready._replace(
            soft_state=ready.soft_state and SoftState(*ready.soft_state),
            snapshot=ready.snapshot and _snapshot_in(*ready.snapshot),
            snapshots_to_send=[SnapshotToSend(*fields) for fields in ready.snapshots_to_send],
        )

    def on_persisted(self, number: int) -> None:
        self._raw.on_persisted(number)

    def applied_to(self, index: int) -> None:
        self._raw.applied_to(index)

    def compact(self, index: int) -> None:
        self._raw.compact(index)

    def snapshot_made(self, index: int, data: bytes) -> None:
        self._raw.snapshot_made(index, data)

    def snapshot_wanted(self) -> bool:
        return self._raw.snapshot_wanted()

    def report_unreachable(self, peer: int) -> None:
        self._raw.report_unreachable(peer)

    def report_snapshot(self, peer: int, *, ok: bool) -> None:
        self._raw.report_snapshot(peer, ok)

    def ticks_until_event(self) -> int:
        return self._raw.ticks_until_event()

    def status(self) -> CoreStatus:
        status = CoreStatus(*self._raw.status())
        return status._replace(conf=ConfState(*status.conf), progress=tuple(PeerProgress(*peer) for peer in status.progress))


def _taken(answer: int | str) -> int:
    if isinstance(answer, str):
        raise ProposalDropped(answer)
    return answer


def _snapshot_in(index: int, term: int, conf_state: ConfState, data: bytes) -> SnapshotIn:
    return SnapshotIn(index, term, ConfState(*conf_state), data)
