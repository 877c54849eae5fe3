"""The replicated store's words: entries, operations, commands, results, and the messages of its verbs.

A key has a value, the revision that created it, the revision that changed it last, how often it was written since it was created, and
the lease it hangs on. The store's revision rises by one with every operation that changes something; all writes of a transaction share one.

Operations and results are packed as arrays with a number in front: they travel in a command through the replicated log, where every byte is
written three times. A number is never given to another meaning. A `Command` says which `level` of these words it uses; a store that was not
raised to that level refuses it, on every node alike, so that nodes of two versions never answer one command differently.

The limits here are part of the format: they are the same on every node, or one node would refuse what another applies.
"""

from typing import Annotated, Final, Literal

import msgspec

from isopod.api.messages import Message

LEVEL: Final = 1
"""The words below. A later level is first understood by all nodes, then switched on by a command of its own, then used."""
KEY_CHARS_MAX: Final = 1024
VALUE_BYTES_MAX: Final = 256 << 10
TXN_OPS_MAX: Final = 128
"""Conditions, and operations of either branch, each."""
COMMAND_OPS_MAX: Final = 1024
COMMAND_BYTES_MAX: Final = 480 << 10
"""A command travels in one entry of the log, and that in one frame."""
PAGE_ENTRIES_MAX: Final = 10_000
PAGE_BYTES_MAX: Final = 256 << 10
"""A page ends before it would be larger, but has one entry at least."""
ANSWER_BYTES_MAX: Final = 640 << 10
"""Of all that one command or one request reads: an answer travels in one frame."""
READS_MAX: Final = 1024
LEASE_TTL_S_MIN: Final = 1.0
LEASE_TTL_S_MAX: Final = 86_400.0 * 30

Key = Annotated[str, msgspec.Meta(min_length=1, max_length=KEY_CHARS_MAX)]
Prefix = Annotated[str, msgspec.Meta(max_length=KEY_CHARS_MAX)]
Value = Annotated[bytes, msgspec.Meta(max_length=VALUE_BYTES_MAX)]
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Consistency = Literal["linearizable", "stale", "cached"]
"""linearizable: as new as the newest answer that anybody got before. stale: what the asked node has. cached: at most `max_age_s` old."""


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A key and what is known of it; in a stream of changes, `version` 0 says that it was deleted at `mod_revision`."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0

    @property
    def is_deleted(self) -> bool:
        """Whether this tells of a deletion."""
        return self.version == 0


# --- operations -------------------------------------------------------------------------------------------------------


class Put(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """Set a key. Result: the revision."""

    key: Key
    value: Value
    lease: Number = 0


class Delete(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Remove a key. Result: `Deleted`."""

    key: Key


class DeletePrefix(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """Remove all keys that begin so. Result: `Deleted`."""

    prefix: Key


class Get(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """Read a key. Result: a `Page` of one entry or none."""

    key: Key


class Range(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """Read keys that begin so, in order. Result: `Page`.

    Args:
        prefix: "" for all.
        limit: How many at most.
        after: Begin behind this key, to read the next page.
        keys_only: Leave the values out.
    """

    prefix: Prefix = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_ENTRIES_MAX)] = PAGE_ENTRIES_MAX
    after: Prefix = ""
    keys_only: bool = False


class Condition(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What must hold of a key. An absent key has revisions, version and lease 0, and no value: only "!=" holds of a value then."""

    key: Key
    what: Literal["version", "create_revision", "mod_revision", "lease", "value"]
    relation: Literal["=", "!=", "<", ">"]
    number: Number = 0
    value: Value = b""


PlainOp = Put | Delete | DeletePrefix | Get | Range
PlainOps = Annotated[tuple[PlainOp, ...], msgspec.Meta(max_length=TXN_OPS_MAX)]


class Txn(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """Do `then` if all conditions hold, else `otherwise`, with nothing in between. Result: `TxnResult`."""

    conditions: Annotated[tuple[Condition, ...], msgspec.Meta(max_length=TXN_OPS_MAX)] = ()
    then: PlainOps = ()
    otherwise: PlainOps = ()


class LeaseGrant(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """Make a lease: its keys vanish when nobody keeps it alive for so long. Result: `Granted`."""

    ttl_ms: Annotated[int, msgspec.Meta(ge=int(LEASE_TTL_S_MIN * 1000), le=int(LEASE_TTL_S_MAX * 1000))]


class LeaseRevoke(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """End a lease now, with its keys. Result: `Deleted`."""

    lease: Number


class SessionOpen(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """Be known, so that a repeated command is applied once. Result: `Opened`."""


class SessionClose(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    """Be forgotten. Result: `Deleted`."""

    session: Number


class Compact(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=11):
    """Forget the changes up to this revision: watches cannot begin there any more. Result: `Deleted` (how many changes went)."""

    revision: Number


class LeaseExpire(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=12):
    """The leader saw nobody keep these alive. Only nodes say so. Result: `Deleted` (how many keys went)."""

    leases: Annotated[tuple[Number, ...], msgspec.Meta(min_length=1, max_length=COMMAND_OPS_MAX)]


class Checkpoint(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=13):
    """Every node notes its digest here, to be compared. Only nodes say so. Result: the index in the log."""


ClientOp = Put | Delete | DeletePrefix | Get | Range | Txn | LeaseGrant | LeaseRevoke | SessionOpen | SessionClose | Compact
Op = ClientOp | LeaseExpire | Checkpoint
Ops = Annotated[list[Op], msgspec.Meta(min_length=1, max_length=COMMAND_OPS_MAX)]
ClientOps = Annotated[list[ClientOp], msgspec.Meta(min_length=1, max_length=COMMAND_OPS_MAX)]


class Command(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is proposed: operations that are applied one after the other, each whole by itself.

    Args:
        level: Of the words used.
        session: Whose, 0 for nobody's: such a command must not be repeated unless that does no harm.
        seq: Rises by one with each command of a session, from 1.
        floor: All of the session's commands below this one were answered: their replies may be forgotten.
        ops: The operations.
    """

    level: int
    session: Number
    seq: Number
    floor: Number
    ops: Ops


class ClientCommand(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The same, of operations that a client may ask for."""

    level: int
    session: Number
    seq: Number
    floor: Number
    ops: ClientOps


# --- results ----------------------------------------------------------------------------------------------------------


class Refusal(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """Why nothing was done: the code and words of an error of the tree."""

    code: str
    message: str
    hint: str = ""


class Deleted(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """How many went; the revision is the store's, new if any did."""

    revision: int
    count: int


class Page(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """Entries in the order of their keys; `more` if there are others behind the last."""

    entries: tuple[Entry, ...] = ()
    more: bool = False


class Granted(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """A new lease."""

    lease: int
    ttl_ms: int


class Opened(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """A new session."""

    session: int


PlainResult = int | Refusal | Deleted | Page


class TxnResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """Which branch was done, and the result of each of its operations."""

    succeeded: bool
    revision: int
    results: tuple[PlainResult, ...] = ()


Result = int | Refusal | Deleted | Page | Granted | Opened | TxnResult


class Outcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of a command: a result for each operation, or why none was looked at."""

    results: list[Result] = []
    refusal: Refusal | None = None


# --- the verbs' messages ----------------------------------------------------------------------------------------------


class KvApply(Message, frozen=True, kw_only=True):
    """A packed `ClientCommand`. `n_hops` counts the nodes that handed it on."""

    command: bytes
    n_hops: int = 0


class KvApplied(Message, frozen=True, kw_only=True):
    """A packed `Outcome`, and who leads: what comes next is best sent there."""

    outcome: bytes
    leader: int = 0
    address: str = ""


class KvRead(Message, frozen=True, kw_only=True):
    """Reads that are answered from one revision."""

    reads: Annotated[list[Get | Range], msgspec.Meta(min_length=1, max_length=READS_MAX)]
    consistency: Consistency = "linearizable"
    max_age_s: float = 1.0
    """For "cached" only."""


class KvPages(Message, frozen=True, kw_only=True):
    """A page for each read.

    Args:
        pages: The pages.
        revision: Of the store they were read from.
        age_s: The answer holds everything that was acknowledged so many seconds before it; None if that is not known.
    """

    pages: list[Page]
    revision: int
    age_s: float | None = None


class KvTxn(Message, frozen=True, kw_only=True):
    """A transaction outside of any session: for those who speak JSON."""

    txn: Txn


class KvTxnDone(Message, frozen=True, kw_only=True):
    """What became of it."""

    result: TxnResult


class KvWatch(Message, frozen=True, kw_only=True):
    """Changes of keys as a stream.

    Args:
        prefix: Of the keys, "" for all.
        exact: Only the key that is called so.
        from_revision: The first change wanted may have this one; 0 for those to come.
        progress_s: How long the stream may be silent before it says how far it is.
        verified: Have the node make sure that it is not behind before it says so.
    """

    prefix: Prefix = ""
    exact: bool = False
    from_revision: Number = 0
    progress_s: Annotated[float, msgspec.Meta(ge=0.05, le=3600.0)] = 10.0
    verified: bool = False


class KvChanges(Message, frozen=True, kw_only=True):
    """All changes up to a revision that were not told before; none if nothing changed: then it tells only how far the stream is.

    Args:
        revision: How far.
        entries: The changes, in order.
        age_s: The node had applied everything that was acknowledged so many seconds before; None if that is not known.
        more: On the wire only: the rest of the same follows.
    """

    revision: int
    entries: list[Entry] = []
    age_s: float | None = None
    more: bool = False


class LeaseKeep(Message, frozen=True, kw_only=True):
    """Keep leases alive."""

    leases: Annotated[list[int], msgspec.Meta(max_length=1024)]
    n_hops: int = 0


class LeasesKept(Message, frozen=True, kw_only=True):
    """Milliseconds each has from now, 0 for one that is no more."""

    ttl_ms: list[int]


class LeaseInfo(Message, frozen=True, kw_only=True):
    """A lease."""

    lease: int
    ttl_ms: int
    granted_at_ns: int
    n_keys: int


class LeaseList(Message, frozen=True, kw_only=True):
    """All leases."""

    leases: list[LeaseInfo]


class StoreStatus(Message, frozen=True, kw_only=True):
    """A node's view of the store."""

    node: int
    leader: int
    leader_address: str = ""
    role: str
    term: int
    applied: int
    revision: int
    compacted_revision: int
    n_keys: int
    n_bytes: int
    n_leases: int
    n_sessions: int
    n_watchers: int
    digest: str
    age_s: float | None = None
    consistent: bool | None = None
    """What the last comparison of all members found; None before the first."""


class CheckpointQuery(Message, frozen=True, kw_only=True):
    """What a node's state was at an index of the log."""

    index: int


class CheckpointAnswer(Message, frozen=True, kw_only=True):
    """Empty if the node does not know: it is behind, or came past it with a snapshot."""

    digest: str = ""
    applied: int = 0


class MemberDigest(Message, frozen=True, kw_only=True):
    """A member's state at the compared index."""

    node: int
    state: Literal["equal", "different", "behind", "skipped", "unreachable"]
    digest: str = ""
    applied: int = 0


class ConsistencyReport(Message, frozen=True, kw_only=True):
    """Whether all members hold the same state: `consistent` is False if any two differ, None if fewer than two could be compared."""

    index: int
    consistent: bool | None
    members: list[MemberDigest]
    checked_at_ns: int = 0
