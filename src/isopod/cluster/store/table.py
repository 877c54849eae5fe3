"""Table: records of one type under a prefix of the store.

    jobs = Table(store, "jobs/", Job)
    await jobs.put("a", Job(...))
    record = await jobs.get("a")

A record is a msgspec type, kept as MessagePack. One that cannot be read (a later isopod wrote it, or it is damaged) is an error that
names its key; `list_all` can be told to leave such out.
"""

from collections.abc import AsyncIterator, Callable
from typing import Generic, NamedTuple, TypeVar

import msgspec

from isopod.api.store.messages import Condition, Consistency, Delete, Entry, Put, Txn
from isopod.api.store.operations import TIMEOUT_S, StoreOperations
from isopod.world.errors import BadRecord, InvalidArgument

T = TypeVar("T")


class Row(NamedTuple, Generic[T]):
    """A record and where it stands. `revision` is that of its last change."""

    name: str
    record: T
    revision: int
    lease: int


class Change(NamedTuple, Generic[T]):
    """What happened to a record; `record` is None if it was deleted. `revision` is the store's."""

    name: str
    record: T | None
    revision: int


class Table(Generic[T]):
    """Records under a prefix.

    Args:
        store: A replica or a client.
        prefix: Ends in "/", so that no other table's names begin with it.
        kind: The records' type.
    """

    def __init__(self, store: StoreOperations, prefix: str, kind: type[T]) -> None:
        if not prefix.endswith("/"):
            raise InvalidArgument("prefix of a table", prefix, "must end in '/'")
        self.prefix = prefix
        self._store = store
        self._decode: Callable[[bytes], T] = msgspec.msgpack.Decoder(kind).decode
        self._encode = msgspec.msgpack.Encoder(order="deterministic").encode

    async def get(
        self, name: str, *, consistency: Consistency = "linearizable", max_age_s: float = 1.0, timeout_s: float = TIMEOUT_S
    ) -> Row[T] | None:
        """Return a record, None if there is none.

        Raises:
            BadRecord: It cannot be read.
        """
        found = await self._store.get(self.prefix + name, consistency=consistency, max_age_s=max_age_s, timeout_s=timeout_s)
        return None if found.entry is None else self.row(found.entry)

    async def list_all(
        self, *, consistency: Consistency = "linearizable", skip_bad: bool = False, timeout_s: float = TIMEOUT_S
    ) -> tuple[list[Row[T]], int]:
        """Return all records in the order of their names, and the revision to watch from (the one behind it).

        Raises:
            BadRecord: One cannot be read, unless those are left out.
        """
        entries, revision = await self._store.list_all(self.prefix, consistency=consistency, timeout_s=timeout_s)
        rows: list[Row[T]] = []
        for entry in entries:
            try:
                rows.append(self.row(entry))
            except BadRecord:
                if not skip_bad:
                    raise
        return rows, revision

    async def put(self, name: str, record: T, *, lease: int = 0, timeout_s: float = TIMEOUT_S) -> int:
        """Set a record; return the revision."""
        return await self._store.put(self.prefix + name, self._encode(record), lease=lease, timeout_s=timeout_s)

    async def put_if(self, name: str, record: T, *, revision: int, lease: int = 0, timeout_s: float = TIMEOUT_S) -> int | None:
        """Set a record that was last changed at that revision (0: that is not there); return the new one, None if it was not."""
        return await self._store.put_if(self.prefix + name, self._encode(record), revision=revision, lease=lease, timeout_s=timeout_s)

    async def delete(self, name: str, *, revision: int = 0, timeout_s: float = TIMEOUT_S) -> bool:
        """Remove a record; return whether it was there. With a revision, only if it was last changed then."""
        key = self.prefix + name
        if not revision:
            return await self._store.delete(key, timeout_s=timeout_s)
        result = await self._store.txn(Txn((Condition(key, "mod_revision", "=", revision),), (Delete(key),)), timeout_s=timeout_s)
        return result.succeeded

    async def watch(self, *, from_revision: int = 0, progress_s: float = 10.0) -> AsyncIterator[list[Change[T]]]:
        """Iterate over what changes, an empty list when only time went by.

        Raises:
            RevisionCompacted: The changes from that revision are forgotten: list again.
            BadRecord: A record cannot be read.
        """
        async with self._store.watch(self.prefix, from_revision=from_revision, progress_s=progress_s) as watch:
            async for changes in watch:
                yield [self._change(entry) for entry in changes.entries]

    def put_op(self, name: str, record: T, *, lease: int = 0) -> Put:
        """Return the operation that sets a record, for a transaction over several tables."""
        return Put(self.prefix + name, self._encode(record), lease)

    def row(self, entry: Entry) -> Row[T]:
        """Return the record of an entry.

        Raises:
            BadRecord: It cannot be read.
        """
        return Row(entry.key[len(self.prefix) :], self._record(entry), entry.mod_revision, entry.lease)

    def _change(self, entry: Entry) -> Change[T]:
        record = None if entry.is_deleted else self._record(entry)
        return Change(entry.key[len(self.prefix) :], record, entry.mod_revision)

    def _record(self, entry: Entry) -> T:
        try:
            return self._decode(entry.value)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BadRecord(entry.key, str(error), "was it written by a later isopod?") from None
