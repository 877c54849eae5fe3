"""StoreMachine: the replicated store's state, as a function of the log.

Pure: no time but the batch's stamp, no chance, no exception that one node raises and another does not. Whatever a command says, it has a
result: bytes that cannot be read, words of a later level, a lease that is gone are refused, in the same words everywhere. So machines that
were fed equal logs are equal, answer equally, and have equal digests; `snapshot` and `restore` change nothing of that.

A command is taken apart once and its outcome is packed once, here: what `apply` returns is what travels back to the client, and what a
session keeps for the case that the command comes again.

It is not a `Replica`: it knows no nodes, does not wait, and tells changes to whoever listens after each batch.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from hashlib import blake2b
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from isopod.api.store import messages as m
from isopod.api.store.messages import (
    ANSWER_BYTES_MAX,
    COMMAND_BYTES_MAX,
    LEVEL,
    PAGE_BYTES_MAX,
    Command,
    Condition,
    Deleted,
    Entry,
    Outcome,
    Page,
    PlainOp,
    PlainResult,
    Put,
    Refusal,
    Result,
    TxnResult,
)
from isopod.cluster.store.image import Image, finish, pack_in_pieces, unpack_in_pieces
from isopod.cluster.store.keyspace import Keyspace
from isopod.cluster.store.leases import Leases
from isopod.cluster.store.sessions import SessionLimits, Sessions

CHECKPOINTS_KEPT: Final = 64
_DECODE_ERRORS: Final = (msgspec.MsgspecError, ValueError, RecursionError)
_decode: Final = msgspec.msgpack.Decoder(Command).decode
_encode: Final = msgspec.msgpack.Encoder().encode


class AppliedBatch(Protocol):
    """What the machine needs of a Raft entry; `isopod.cluster.raft.ports.Batch` is one."""

    @property
    def index(self) -> int:
        """In the log."""

    @property
    def stamp_ns(self) -> int:
        """The leader's wall time, never before that of an earlier entry."""

    @property
    def commands(self) -> Sequence[bytes]:
        """The commands, in order."""


class MachineLimits(NamedTuple):
    """Bounds of the state. A cluster's nodes must have the same: they are part of the digest."""

    keys_max: int = 1_000_000
    bytes_max: int = 1 << 30
    """Of keys and values, with 160 bytes for each."""
    leases_max: int = 100_000
    history_max: int = 10_000
    history_bytes_max: int = 16 << 20
    history_age_ns: int = 600 * 1_000_000_000
    sessions: SessionLimits = SessionLimits()


class Listener(Protocol):
    """Who is told after each batch, in the same turn of the loop."""

    def on_changes(self, changes: Sequence[Entry]) -> None:
        """Entries were written or deleted, in this order; none if the batch changed no key."""

    def on_restored(self) -> None:
        """The state was replaced."""


class Checkpoint(NamedTuple):
    """The digest at an index of the log."""

    place: int
    """In the log."""
    digest: str


class StoreMachine:
    """The state machine that Raft feeds.

    Args:
        limits: Bounds, the same on all nodes.
    """

    def __init__(self, limits: MachineLimits = MachineLimits()) -> None:  # noqa: B008 - an immutable tuple
        self.limits = limits
        self.keys = Keyspace(
            history_max=limits.history_max, history_bytes_max=limits.history_bytes_max, history_age_ns=limits.history_age_ns
        )
        self.leases = Leases()
        self.sessions = Sessions(limits.sessions)
        self.stamp_ns = 0
        """The log's own time."""
        self.index = 0
        """Of the last batch."""
        self.level = LEVEL
        self.checkpoints: deque[Checkpoint] = deque(maxlen=CHECKPOINTS_KEPT)
        self._listeners: list[Listener] = []
        self._read_left = 0
        self._prepared: tuple[bytes, StoreMachine] | None = None
        self._do: dict[type[Any], Callable[[Any], Result]] = {
            m.Put: self._put,
            m.Delete: self._delete,
            m.DeletePrefix: self._delete_prefix,
            m.Get: self._get,
            m.Range: self._range,
            m.Txn: self._txn,
            m.LeaseGrant: self._grant,
            m.LeaseRevoke: lambda op: self._end_leases((op.lease,), must_exist=True),
            m.LeaseExpire: lambda op: self._end_leases(op.leases, must_exist=False),
            m.SessionOpen: self._open,
            m.SessionClose: lambda op: Deleted(self.keys.revision, self.sessions.close(op.session)),
            m.Compact: self._compact,
            m.Checkpoint: self._checkpoint,
        }

    @property
    def revision(self) -> int:
        """Of the last change."""
        return self.keys.revision

    def listen(self, listener: Listener) -> None:
        """Tell a listener of what is applied from now on."""
        self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        """Tell it no more."""
        self._listeners.remove(listener)

    # --- the state machine's port -------------------------------------------------------------------------------------

    def apply(self, batch: AppliedBatch) -> list[bytes]:
        """Apply a Raft entry; return a packed `Outcome` for each of its commands."""
        self._prepared = None  # whoever goes on by entries needs no snapshot
        self.stamp_ns = stamp_ns = max(self.stamp_ns, batch.stamp_ns)
        self.index = batch.index
        self.sessions.expire(stamp_ns)
        outcomes = [self._apply(data) for data in batch.commands]
        fresh = self.keys.fresh
        self.keys.end_batch(stamp_ns)
        for listener in self._listeners:
            listener.on_changes(fresh)
        return outcomes

    def digest(self) -> str:
        """Return a digest of all of the state: equal states have equal ones, whichever way they came about."""
        return _digest_of(self.keys.fold(), self._other_parts())

    def _other_parts(self) -> list[object]:
        """Return what makes the digest besides the entries."""
        keys = self.keys
        return [
            self.leases.fold(),
            self.sessions.fold(),
            keys.revision,
            keys.compacted,
            self.stamp_ns,
            self.level,
            len(keys.history),
            keys.history_bytes,
            *self.limits,
        ]

    def snapshot(self) -> bytes:
        """Return all of the state."""
        return b"".join(self.capture())

    def capture(self) -> Iterator[bytes]:
        """Return all of the state as of now in pieces, some of them empty: what is applied while they are taken does not change them."""
        keys = self.keys
        frozen, other_parts = keys.frozen(), self._other_parts()
        n_granted, leases = self.leases.save()
        n_opened, sessions = self.sessions.save()
        image = Image(
            level=self.level,
            revision=keys.revision,
            compacted=keys.compacted,
            stamp_ns=self.stamp_ns,
            index=self.index,
            entries=[],
            history=list(keys.history),
            marks=keys.marks(),
            n_granted=n_granted,
            leases=leases,
            n_opened=n_opened,
            sessions=sessions,
        )
        digest = ("" if folded is None else _digest_of(folded, other_parts) for folded in frozen.fold())
        return pack_in_pieces(image, frozen.take(), len(frozen.order), digest)

    def restore(self, data: bytes) -> None:
        """Become what a snapshot says.

        Raises:
            BadRecord: It is none, is damaged, of a later version, or was made with other limits; the state is as before.
        """
        if self._prepared is None or self._prepared[0] is not data:
            finish(self.prepare(data))
        assert self._prepared is not None
        _, found = self._prepared
        self._prepared = None
        self.level, self.stamp_ns, self.index = found.level, found.stamp_ns, found.index
        self.keys.become(found.keys)
        self.leases.become(found.leases)
        self.sessions.become(found.sessions)
        self.checkpoints.clear()
        for listener in self._listeners:
            listener.on_restored()

    def prepare(self, data: bytes) -> Generator[None, None, None]:
        """Do what `restore` takes long for, in pieces and without changing the state; it then takes over what was made of these very bytes.

        Raises:
            BadRecord: As `restore`.
        """
        self._prepared = None
        image = yield from unpack_in_pieces(data)
        found = StoreMachine(self.limits)
        yield from found._load(image)
        if found.digest() != image.digest:
            raise image.misfit(image.digest, found.digest())
        self._prepared = data, found

    def entries(self, prefix: str) -> list[Entry]:
        """Return all entries under keys that begin so, in order."""
        entries = self.keys.entries
        return [entries[key] for key in self.keys.keys(prefix)]

    def checkpoint_at(self, index: int) -> str:
        """Return the digest noted at an index, "" if there is none."""
        return next((point.digest for point in self.checkpoints if point.place == index), "")

    def _load(self, image: Image) -> Iterator[None]:
        self.level = image.level
        self.stamp_ns = image.stamp_ns
        self.index = image.index
        self.keys.revision = image.revision
        self.keys.compacted = image.compacted
        yield from self.keys.load(image.entries, image.history, image.marks)
        self.leases.load(image.n_granted, image.leases)
        yield
        for entry in image.entries:
            if entry.lease:
                self.leases.attach(entry.key, old=0, new=entry.lease)
        yield
        self.sessions.load(image.n_opened, image.sessions)

    # --- commands -----------------------------------------------------------------------------------------------------

    def _apply(self, data: bytes) -> bytes:
        if len(data) > COMMAND_BYTES_MAX:
            return refused("too_large", f"a command of {len(data)} bytes is over {COMMAND_BYTES_MAX}")
        try:
            command = _decode(data)
        except _DECODE_ERRORS:
            return refused("invalid_argument", "a command that this store does not know", "are some nodes older than the client?")
        if command.level > self.level:
            return refused("unsupported", f"commands of level {command.level} are not used in this cluster", "upgrade all nodes first")
        if not command.session:
            return self._outcome(command)
        known = self.sessions.begin(command, self.stamp_ns)
        if known is None:
            known = self._outcome(command)
            self.sessions.end(command, known)
        elif type(known) is Refusal:
            known = _encode(Outcome(refusal=known))
        assert type(known) is bytes
        return known

    def _outcome(self, command: Command) -> bytes:
        self._read_left = ANSWER_BYTES_MAX
        ops, keys, limits = command.ops, self.keys, self.limits
        # Where the command fits into the bounds as a whole, runs of plain puts are done in one go.
        has_room = len(keys.entries) + len(ops) <= limits.keys_max and keys.n_bytes + COMMAND_BYTES_MAX < limits.bytes_max
        results: list[Result] = []
        place, n_ops = 0, len(ops)
        while place < n_ops:
            op = ops[place]
            if type(op) is Put and not op.lease and has_room:
                first = keys.revision + 1
                place = keys.put_run(ops, place, detach=self._detach)
                results.extend(range(first, keys.revision + 1))
            else:
                results.append(self._do[type(op)](op))
                place += 1
        return _encode(Outcome(results))

    def _detach(self, key: str, lease: int) -> None:
        self.leases.attach(key, old=lease, new=0)

    # --- operations ---------------------------------------------------------------------------------------------------

    def _put(self, op: Put) -> int | Refusal:
        return self._refusal_of_put(op) or self._put_at(op, self.keys.revision + 1)

    def _put_at(self, op: Put, revision: int) -> int:
        old = self.keys.put(op, revision)
        if op.lease or (old is not None and old.lease):
            self.leases.attach(op.key, old=0 if old is None else old.lease, new=op.lease)
        return revision

    def _refusal_of_put(self, op: Put) -> Refusal | None:
        if op.lease and op.lease not in self.leases.by_id:
            return Refusal("not_found", f"no such lease: {op.lease}", "it has expired or was revoked: grant a new one")
        keys, limits = self.keys, self.limits
        if keys.n_bytes >= limits.bytes_max or (len(keys.entries) >= limits.keys_max and op.key not in keys.entries):
            return Refusal("exhausted", f"the store exhausted: {limits.keys_max} keys, {limits.bytes_max} bytes", "delete some keys")
        return None

    def _delete(self, op: m.Delete) -> Deleted:
        return self._delete_at(op.key, self.keys.revision + 1)

    def _delete_at(self, key: str, revision: int) -> Deleted:
        old = self.keys.delete(key, revision)
        if old is not None and old.lease:
            self.leases.attach(key, old=old.lease, new=0)
        return Deleted(self.keys.revision, int(old is not None))

    def _delete_prefix(self, op: m.DeletePrefix) -> Deleted:
        return self._delete_prefix_at(op.prefix, self.keys.revision + 1)

    def _delete_prefix_at(self, prefix: str, revision: int) -> Deleted:
        found = list(self.keys.keys(prefix))
        for key in found:
            self._delete_at(key, revision)
        return Deleted(self.keys.revision, len(found))

    def _get(self, op: m.Get) -> Page | Refusal:
        entry = self.keys.entries.get(op.key)
        return self._bounded(Page(() if entry is None else (entry,)))

    def _range(self, op: m.Range) -> Page | Refusal:
        return self._bounded(self.keys.page(op, max(0, min(self._read_left, PAGE_BYTES_MAX))))

    def _bounded(self, page: Page) -> Page | Refusal:
        """Return a page if the command's answer has room for it."""
        self._read_left -= page_bytes(page)
        if self._read_left < 0:
            return Refusal("exhausted", f"the answer exhausted: it would be over {ANSWER_BYTES_MAX} bytes", "read less at once")
        return page

    def _txn(self, op: m.Txn) -> TxnResult | Refusal:
        succeeded = all(self._holds(condition) for condition in op.conditions)
        branch = op.then if succeeded else op.otherwise
        for part in branch:
            if type(part) is Put and (refusal := self._refusal_of_put(part)) is not None:
                return refusal
        revision = self.keys.revision + 1
        results = tuple([self._do_at(part, revision) for part in branch])
        return TxnResult(succeeded, self.keys.revision, results)

    def _do_at(self, op: PlainOp, revision: int) -> PlainResult:
        if type(op) is Put:
            return self._put_at(op, revision)
        if type(op) is m.Delete:
            return self._delete_at(op.key, revision)
        if type(op) is m.DeletePrefix:
            return self._delete_prefix_at(op.prefix, revision)
        return self._get(op) if type(op) is m.Get else self._range(op)  # type: ignore[arg-type]  # what is left is a Range

    def _holds(self, condition: Condition) -> bool:
        entry = self.keys.entries.get(condition.key)
        if condition.what == "value":
            if entry is None:
                return condition.relation == "!="
            return _compare(entry.value, condition.relation, condition.value)
        return _compare(0 if entry is None else getattr(entry, condition.what), condition.relation, condition.number)

    def _grant(self, op: m.LeaseGrant) -> m.Granted | Refusal:
        if len(self.leases) >= self.limits.leases_max:
            return Refusal("exhausted", f"leases exhausted: {self.limits.leases_max} are granted", "revoke some")
        return m.Granted(self.leases.grant(op.ttl_ms, self.stamp_ns), op.ttl_ms)

    def _end_leases(self, numbers: Sequence[int], *, must_exist: bool) -> Deleted | Refusal:
        if must_exist and numbers[0] not in self.leases.by_id:
            return Refusal("not_found", f"no such lease: {numbers[0]}")
        revision = self.keys.revision + 1
        n_deleted = 0
        for number in numbers:
            lease = self.leases.take(number)
            for key in list(lease.keys) if lease is not None else ():
                self._delete_at(key, revision)
                n_deleted += 1
        return Deleted(self.keys.revision, n_deleted)

    def _open(self, _op: m.SessionOpen) -> m.Opened | Refusal:
        found = self.sessions.open(self.stamp_ns)
        return found if isinstance(found, Refusal) else m.Opened(found)

    def _compact(self, op: m.Compact) -> Deleted | Refusal:
        keys = self.keys
        if op.revision > keys.revision:
            return Refusal("invalid_argument", f"revision {op.revision} is in the future: the store is at {keys.revision}")
        return Deleted(keys.revision, keys.compact(op.revision))

    def _checkpoint(self, _op: m.Checkpoint) -> int:
        self.checkpoints.append(Checkpoint(self.index, self.digest()))
        return self.index


def _digest_of(folded: int, other_parts: Sequence[object]) -> str:
    return blake2b(",".join(map(str, (folded, *other_parts))).encode(), digest_size=16).hexdigest()


def refused(code: str, message: str, hint: str = "") -> bytes:
    """Return the outcome of a command none of whose operations was looked at."""
    return _encode(Outcome(refusal=Refusal(code, message, hint)))


def page_bytes(page: Page) -> int:
    """Return about how many bytes a page takes in an answer."""
    return sum(len(entry.value) + 4 * len(entry.key) + 48 for entry in page.entries) + 8


def _compare(found: Any, relation: str, wanted: Any) -> bool:  # both numbers, or both bytes
    if relation == "=":
        return bool(found == wanted)
    if relation == "!=":
        return bool(found != wanted)
    return bool(found < wanted) if relation == "<" else bool(found > wanted)
