"""Registry: the replicated records about nodes, decoded and at hand, on every node that holds a replica.

It listens to the store's machine and follows it within the same turn of the loop; it writes nothing. A record that cannot be read (a newer
isopod's) is as if it were not there, and said so once: membership goes on without it.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

import msgspec

from isopod.api.cluster import Health
from isopod.api.store.messages import Entry
from isopod.cluster.members import records as r
from isopod.cluster.members.tokens import TokenRecord
from isopod.runtime.logger import Logger

T = TypeVar("T")
SINGLES: Final = (r.CLUSTER, r.RESTORE_STATE)
"""Keys that stand for themselves."""
_DECODE_ERRORS: Final = (msgspec.MsgspecError, ValueError, RecursionError)


class Source(Protocol):
    """What the registry needs of the store's machine: `StoreMachine` has it."""

    def listen(self, listener: "Registry") -> None:
        """Tell of what is applied from now on."""

    def unlisten(self, listener: "Registry") -> None:
        """Tell no more."""

    def entries(self, prefix: str) -> Sequence[Entry]:
        """Return what is stored under keys that begin so."""


Change = Callable[[str, r.MemberRecord | None, r.MemberRecord | None], None]
"""Told of a node's record: the key, what it was, and what it is."""
HealthChange = Callable[[int, r.HealthRecord | None], None]


class Registry:
    """The records.

    Args:
        source: The store's machine.
        logger: Told of records that cannot be read.
    """

    def __init__(self, source: Source, logger: Logger) -> None:
        self.members: dict[int, r.MemberRecord] = {}
        self.revisions: dict[str, int] = {}
        """Of the records here, by key: for conditions."""
        self.healths: dict[int, r.HealthRecord] = {}
        self.removed: dict[int, r.RemovedRecord] = {}
        self.tokens: dict[str, TokenRecord] = {}
        self.cluster: r.ClusterRecord | None = None
        self.restore: r.RestoreRecord | None = None
        self.version = 0
        """The revision of the last change to members or their health."""
        self.replica_version = 0
        """The same of members that hold a replica: what agents need to know."""
        self.on_member: Change | None = None
        self.on_health: HealthChange | None = None
        self.on_restore: Callable[[], None] = _nothing
        self._source = source
        self._logger = logger
        self._read_all()
        source.listen(self)

    def close(self) -> None:
        """Stop listening."""
        self._source.unlisten(self)

    def health(self, node_id: int) -> Health:
        """Return the leader's last judgement of a node."""
        found = self.healths.get(node_id)
        return found.health if found is not None else "alive"

    def is_removed(self, node_id: int, incarnation: str) -> bool:
        """Return whether that life of that node is over."""
        found = self.removed.get(node_id)
        return found is not None and incarnation in found.incarnations

    def revision(self, key: str) -> int:
        """Return the revision that wrote a record, 0 if there is none."""
        return self.revisions.get(key, 0)

    # --- the machine's listener ---------------------------------------------------------------------------------------

    def on_changes(self, changes: Sequence[Entry]) -> None:
        """Follow a batch."""
        for entry in changes:
            key = entry.key
            if key.startswith((r.MEMBERS, r.HEALTH, r.REMOVED, r.TOKENS)) or key in SINGLES:
                self._take(entry)

    def on_restored(self) -> None:
        """Begin anew: the state was replaced."""
        before = self.members
        self.members = {}
        self.revisions.clear()
        self.healths.clear()
        self.removed.clear()
        self.tokens.clear()
        self.cluster = self.restore = None
        self._read_all()
        if self.on_member is not None:
            for node_id in sorted({**before, **self.members}):
                old, new = before.get(node_id), self.members.get(node_id)
                if old != new:
                    self.on_member(r.member_key(node_id), old, new)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        told, self.on_member, on_health, self.on_health = self.on_member, None, self.on_health, None
        for prefix in (r.MEMBERS, r.HEALTH, r.REMOVED, r.TOKENS, *SINGLES):
            for entry in self._source.entries(prefix):
                if prefix not in SINGLES or entry.key == prefix:
                    self._take(entry)
        self.on_member, self.on_health = told, on_health

    def _take(self, entry: Entry) -> None:
        key = entry.key
        if entry.is_deleted:
            self.revisions.pop(key, None)
        else:
            self.revisions[key] = entry.mod_revision
        if key.startswith(r.MEMBERS):
            self._take_member(entry)
        elif key.startswith(r.HEALTH):
            self._take_health(entry)
        elif key.startswith(r.REMOVED):
            _keep(self.removed, _number(key), self._decode(entry, r.RemovedRecord))
        elif key.startswith(r.TOKENS):
            _keep(self.tokens, key.removeprefix(r.TOKENS), self._decode(entry, TokenRecord))
        elif key == r.RESTORE_STATE:
            self.restore = self._decode(entry, r.RestoreRecord)
            self.on_restore()
        else:
            self.cluster = self._decode(entry, r.ClusterRecord)

    def _take_member(self, entry: Entry) -> None:
        node_id = _number(entry.key)
        if node_id is None:
            return
        old, new = self.members.get(node_id), self._decode(entry, r.MemberRecord)
        _keep(self.members, node_id, new)
        self.version = max(self.version, entry.mod_revision)
        if any(record is not None and record.role != "agent" for record in (old, new)):
            self.replica_version = self.version
        if old != new and self.on_member is not None:
            self.on_member(entry.key, old, new)

    def _take_health(self, entry: Entry) -> None:
        node_id = _number(entry.key)
        if node_id is None:
            return
        new = self._decode(entry, r.HealthRecord)
        _keep(self.healths, node_id, new)
        self.version = max(self.version, entry.mod_revision)
        if self.on_health is not None:
            self.on_health(node_id, new)

    def _decode(self, entry: Entry, kind: type[T]) -> T | None:
        if entry.is_deleted:
            return None
        try:
            return msgspec.json.decode(entry.value, type=kind)
        except _DECODE_ERRORS as error:
            self._logger.warning("cluster.record_unreadable", key=entry.key, why=str(error))
            return None


def _nothing() -> None:
    """Nobody asked to be told."""


K = TypeVar("K")


def _keep(records: dict[K, T], key: K | None, record: T | None) -> None:
    if key is None:
        return
    if record is None:
        records.pop(key, None)
    else:
        records[key] = record


def _number(key: str) -> int | None:
    text = key.rpartition("/")[2]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
