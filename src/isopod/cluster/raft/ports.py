"""What the driver needs of others and gives to others: the state machine, the transport, the book of addresses, changes and events.

Nothing here does anything. A `StateMachine` is what the replicated commands are for; a `Transport` carries bytes between nodes and may lose
all of them; a `TransportSink` is what the driver is to its transport; an `AddressBook` says where a node is and who it must be.
"""

import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

from isopod.world.errors import IsopodError
from isopod.world.network import Address, PeerIdentity

NodeId = int
"""Of a voter or learner: 1 or more, never used twice in the life of a cluster."""
NO_NODE: NodeId = 0


class Batch(NamedTuple):
    """The commands of one Raft entry: what came together in one turn of the leader's loop."""

    index: int  # type: ignore[assignment]  # tuples have a method of that name
    term: int
    stamp_ns: int
    """The leader's wall time when it proposed the entry, never before the stamp of an earlier entry: the only clock a machine may use."""
    commands: Sequence[bytes]


class StateMachine(Protocol):
    """What the log is for. Deterministic: equal batches in equal order make equal machines, on every node and in every run.

    None of the methods may await, look at a clock, draw chance, or raise: a command that makes no sense is answered by a result.
    """

    def apply(self, batch: Batch) -> Sequence[Any]:
        """Apply the commands in order; return one result for each, which only the proposing node hands to its caller."""

    def snapshot(self) -> bytes:
        """Return all of the state. A large one should be `Capturable` beside."""

    def restore(self, data: bytes) -> None:
        """Become what `snapshot` returned elsewhere; forget everything else."""

    def digest(self) -> str:
        """Return a digest of the state, equal on all nodes that applied the same index. Asked for by checks and people, not per entry."""


class Waiter(Protocol):
    """Who waits for a result: a future, or whatever is told like one. What it does when told must be quick and must not raise."""

    def done(self) -> bool:
        """Return whether it was told, or waits no more."""

    def set_result(self, result: Any, /) -> object:  # of whatever it waits for
        """Tell the result."""

    def set_exception(self, error: Any, /) -> object:  # as asyncio's: an exception
        """Tell why there is none."""


@runtime_checkable
class Capturable(Protocol):
    """A machine that can be too large to be packed in one go: peers must hear of a node more often than that."""

    def capture(self) -> Iterator[bytes]:
        """Return what `snapshot` would return now, in pieces of a few milliseconds' work each, whatever is applied while they are taken.

        An empty piece says that there is nothing to write yet.
        """


@runtime_checkable
class Preparable(Protocol):
    """A machine that can be too large to be restored in one go."""

    def prepare(self, data: bytes) -> Iterator[None]:
        """Do what `restore` takes long for, in pieces of a few milliseconds' work each: `restore` of these very bytes is then quick.

        Raises:
            IsopodError: `restore` would not take them.
        """


class ChangeKind(enum.Enum):
    """What a membership change does."""

    ADD_LEARNER = "add_learner"
    PROMOTE = "promote"
    DEMOTE = "demote"
    REMOVE = "remove"


class MemberChange(NamedTuple):
    """One change of one member.

    `REMOVE` of a voter demotes it first. `PROMOTE` is refused while the learner is behind.
    """

    kind: ChangeKind
    node_id: NodeId


class Members(NamedTuple):
    """Who replicates the log, sorted."""

    voters: tuple[NodeId, ...]
    learners: tuple[NodeId, ...]

    def all(self) -> tuple[NodeId, ...]:
        """Return voters and learners, sorted."""
        return tuple(sorted((*self.voters, *self.learners)))


class LeaderChanged(NamedTuple):
    """This node's view of the leader changed; `leader` is 0 while it knows none."""

    term: int
    leader: NodeId
    is_self: bool


class MembersChanged(NamedTuple):
    """A membership change was applied, or came with a snapshot."""

    index: int  # type: ignore[assignment]  # tuples have a method of that name
    members: Members


class Applied(NamedTuple):
    """An entry was applied. `kind` is 0 for commands (none for an empty `data`), 1 for a membership change."""

    index: int  # type: ignore[assignment]  # tuples have a method of that name
    term: int
    kind: int
    data: bytes


class Restored(NamedTuple):
    """The machine became a snapshot, at start or because this node was too far behind."""

    index: int  # type: ignore[assignment]  # tuples have a method of that name
    term: int


class LogLost(NamedTuple):
    """The leader counts on entries that this member's disk had and has no more: it may have forgotten votes, and takes part no longer."""

    error: IsopodError


RaftEvent = LeaderChanged | MembersChanged | Applied | Restored | LogLost
Subscriber = Callable[[RaftEvent], None]
Role = Literal["follower", "candidate", "leader", "pre_candidate"]


class PeerStatus(NamedTuple):
    """What a leader knows of a follower, and the transport of its way there."""

    node_id: NodeId
    match: int
    next: int
    state: str
    """"probe", "replicate" or "snapshot"."""
    is_active: bool
    """Whether it was heard of within the longest election timeout."""
    is_connected: bool
    rtt_s: float | None
    n_queued: int


class RaftStatus(NamedTuple):
    """What one node knows now."""

    node_id: NodeId
    cluster_id: str
    role: Role
    term: int
    leader: NodeId
    """0 for none."""
    commit: int
    applied: int
    first_index: int
    last_index: int
    snapshot_index: int
    voters: tuple[NodeId, ...]
    learners: tuple[NodeId, ...]
    peers: tuple[PeerStatus, ...]
    digest: str
    """Of the machine at `applied`, "" if it was not asked for."""


class PeerLink(NamedTuple):
    """What a transport knows of one peer."""

    is_connected: bool = False
    rtt_s: float | None = None
    n_queued: int = 0
    n_queued_bytes: int = 0
    n_dropped: int = 0
    is_broken: bool = False
    """Whether the breaker is open: nothing is kept for this peer."""
    why: str = ""
    """Of the last failure."""


class SnapshotOffer(msgspec.Struct, frozen=True, array_like=True):
    """What a snapshot is, told before its bytes."""

    message: bytes
    """The core's message that it belongs to."""
    index: int
    term: int
    n_bytes: int
    crc: int
    """CRC-32 of all bytes of the file: who holds the first of them goes on from there."""


class SnapshotSource(Protocol):
    """A snapshot that is being sent. Who got it closes it."""

    n_bytes: int
    crc: int

    async def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to so many bytes from `offset`, b"" at the end. OSError if the disk fails."""

    def close(self) -> None:
        """Let go of the file; twice is fine."""


class SnapshotReceiver(Protocol):
    """A snapshot that is being received. Who got it ends it with `finish` or `abandon`."""

    offset: int
    """How many bytes are there already: where to go on."""

    async def write(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            IsopodError: More than announced, or the disk failed.
        """

    async def finish(self) -> None:
        """All bytes came: check them, make them durable, hand them to Raft.

        Raises:
            DigestMismatch: They are not what was announced; they are dropped.
            IsopodError: The disk failed.
        """

    def abandon(self) -> None:
        """The connection broke: keep what came for the next try."""


class TransportSink(Protocol):
    """What the driver is to its transport. Plain calls are cheap and never raise."""

    def on_messages(self, sender: NodeId, messages: Sequence[bytes]) -> None:
        """Messages came, in the order in which they were sent."""

    def on_unreachable(self, node_id: NodeId) -> None:
        """Something for this peer was dropped or could not be sent."""

    def on_peer_up(self, node_id: NodeId) -> None:
        """A connection to this peer stands."""

    def on_peer_lost(self, node_id: NodeId) -> None:
        """The connection to this peer closed: its process may have died."""

    async def open_source(self, index: int, term: int) -> SnapshotSource:
        """Open the snapshot that the core wants sent.

        Raises:
            NotFound: It is gone; a newer one will be offered.
            IsopodError: The disk failed.
        """

    async def open_receiver(self, sender: NodeId, offer: SnapshotOffer) -> SnapshotReceiver:
        """Begin, or go on, to receive a snapshot.

        Raises:
            IsopodError: It is not wanted, another one is under way, or the disk failed.
        """

    def on_snapshot_sent(self, node_id: NodeId, *, ok: bool) -> None:
        """A snapshot has reached its peer, or will not."""

    def known_incarnation(self, node_id: NodeId) -> str | None:
        """Return the incarnation under which this peer was met first, None if never."""

    def learn_incarnation(self, node_id: NodeId, incarnation: str) -> None:
        """Remember, durably, who this peer is."""


class TransportIdentity(NamedTuple):
    """Who a node is to its peers."""

    cluster_id: str
    node_id: NodeId
    incarnation: str


class Transport(Protocol):
    """Carries messages to peers. Best effort: anything may be lost, doubled by nobody, and what arrives arrives in order."""

    async def start(self, identity: TransportIdentity, sink: TransportSink) -> None:
        """Begin."""

    async def close(self) -> None:
        """End all connections and tasks; what is queued is dropped."""

    def set_peers(self, node_ids: Sequence[NodeId]) -> None:
        """Keep connections to exactly these peers (never to oneself)."""

    def send(self, to: NodeId, messages: Sequence[bytes]) -> None:
        """Send at the end of this turn of the loop. Never blocks and never raises: bounded per peer, the oldest are dropped."""

    def send_snapshot(self, to: NodeId, message: bytes, *, index: int, term: int) -> None:
        """Stream a snapshot to a peer beside everything else; `on_snapshot_sent` tells the end."""

    def link(self, node_id: NodeId) -> PeerLink:
        """Return what is known of the way to a peer."""


class AddressBook(Protocol):
    """Where nodes are. Kept by the members; asked whenever a connection is to be made."""

    def address(self, node_id: NodeId) -> Address | None:
        """Return where a node listens, None if that is not known (yet)."""

    def admits(self, node_id: NodeId, identity: PeerIdentity | None) -> bool:
        """Return whether a certificate (None without TLS) may speak for that node."""

    def incarnation(self, node_id: NodeId) -> str | None:
        """Return the incarnation that the cluster has on record for a node, None if it has none."""
