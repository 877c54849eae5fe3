"""StoreOperations: what can be done with the store, the same on a node (`Replica`) and far from it (`StoreClient`).

It is a base class and not a wrapper: a wrapper would cost every put another object and another call. Those who inherit say how an operation
is carried out (`submit`), how something is read, and how changes are watched.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, Final, NamedTuple, Protocol, Self

from isopod.api.store.messages import (
    LEASE_TTL_S_MAX,
    LEASE_TTL_S_MIN,
    PAGE_ENTRIES_MAX,
    ClientOp,
    Compact,
    Condition,
    Consistency,
    Delete,
    Deleted,
    DeletePrefix,
    Entry,
    Get,
    Granted,
    KvChanges,
    LeaseGrant,
    LeaseRevoke,
    Page,
    Put,
    Range,
    Txn,
    TxnResult,
)
from isopod.world.errors import InvalidArgument

TIMEOUT_S: Final = 5.0


class Found(NamedTuple):
    """What a read found.

    Args:
        page: The entries.
        revision: Of the store they were read from.
        age_s: The answer holds everything that was acknowledged so many seconds before it was given; 0 for a linearizable one, None if
            that is not known.
        is_cached: Whether nobody had to be asked.
    """

    page: Page
    revision: int
    age_s: float | None
    is_cached: bool = False

    @property
    def entry(self) -> Entry | None:
        """The first entry, None if there is none: what a `get` asked for."""
        return self.page.entries[0] if self.page.entries else None

    @property
    def value(self) -> bytes | None:
        """Its value."""
        return self.page.entries[0].value if self.page.entries else None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries."""
        return self.page.entries


class Watch(Protocol):
    """A stream of changes: `async with store.watch("jobs/") as watch: async for changes in watch: ...`.

    Every change is told once, in order, and those of one revision together. `revision` is how far it is: to go on later, watch from the
    one behind it.
    """

    revision: int

    async def __aenter__(self) -> Self:
        """Begin."""

    async def __aexit__(self, *_: object) -> None:
        """End."""

    def __aiter__(self) -> AsyncIterator[KvChanges]:
        """Iterate over what changes; one without entries says only that nothing did."""


class StoreOperations(ABC):
    """The operations. All may raise what is listed here, and what they say themselves.

    Raises:
        InvalidArgument: A key, a value or a bound is over its limit.
        Exhausted: The store, or what waits to be sent to it, is full.
        DeadlineExceeded: No answer in time: what was to be written may still be.
        SessionExpired: It is not known whether it was done.
        IsopodError: The store refused it, or nobody serves it.
    """

    @abstractmethod
    def submit(self, op: ClientOp, *, timeout_s: float = TIMEOUT_S) -> Awaitable[Any]:
        """Have one operation done through the log; return what waits for its result. A refusal is raised."""

    @abstractmethod
    def read(
        self, op: Get | Range, *, consistency: Consistency = "linearizable", max_age_s: float = 1.0, timeout_s: float = TIMEOUT_S
    ) -> Awaitable[Found]:
        """Read without writing to the log."""

    @abstractmethod
    def watch(
        self, prefix: str = "", *, exact: bool = False, from_revision: int = 0, progress_s: float = 10.0, verified: bool = False
    ) -> Watch:
        """Watch keys.

        Args:
            prefix: Of the keys, "" for all.
            exact: Only the key that is called so.
            from_revision: The first change wanted may have this revision; 0 for those to come.
            progress_s: How long the stream may be silent before it says how far it is.
            verified: Have the node make sure that it is not behind before it says so.
        """

    @abstractmethod
    async def lease_keep(self, leases: Sequence[int], *, timeout_s: float = TIMEOUT_S) -> list[float]:
        """Keep leases alive; return the seconds each has, counted from when this was called; 0 for one that is no more."""

    def put(self, key: str, value: bytes, *, lease: int = 0, timeout_s: float = TIMEOUT_S) -> Awaitable[int]:
        """Set a key; return the revision.

        Args:
            key: 1 to 1024 characters.
            value: Up to 256 KiB.
            lease: With which it ends, 0 for none.
            timeout_s: The deadline.

        Raises:
            NotFound: No such lease.
        """
        return self.submit(Put(key, value, lease), timeout_s=timeout_s)

    async def delete(self, key: str, *, timeout_s: float = TIMEOUT_S) -> bool:
        """Remove a key; return whether it was there."""
        found: Deleted = await self.submit(Delete(key), timeout_s=timeout_s)
        return found.count > 0

    async def delete_prefix(self, prefix: str, *, timeout_s: float = TIMEOUT_S) -> int:
        """Remove all keys that begin so, at once; return how many went."""
        found: Deleted = await self.submit(DeletePrefix(prefix), timeout_s=timeout_s)
        return found.count

    async def txn(self, txn: Txn, *, timeout_s: float = TIMEOUT_S) -> TxnResult:
        """Do one branch of a transaction, with nothing in between.

        Args:
            txn: Conditions, and what to do if they hold, and if not.
            timeout_s: The deadline.

        Raises:
            NotFound: No such lease; nothing was written.
        """
        found: TxnResult = await self.submit(txn, timeout_s=timeout_s)
        return found

    async def put_if(self, key: str, value: bytes, *, revision: int, lease: int = 0, timeout_s: float = TIMEOUT_S) -> int | None:
        """Set a key if it was last changed at that revision (0: if it is not there); return the new one, None if it was not."""
        unchanged = Condition(key, "mod_revision", "=", revision)
        result = await self.txn(Txn((unchanged,), (Put(key, value, lease),)), timeout_s=timeout_s)
        return result.revision if result.succeeded else None

    def get(
        self, key: str, *, consistency: Consistency = "linearizable", max_age_s: float = 1.0, timeout_s: float = TIMEOUT_S
    ) -> Awaitable[Found]:
        """Read a key.

        Args:
            key: Which.
            consistency: "linearizable", "stale" (whatever the node has) or "cached".
            max_age_s: How old a cached answer may be.
            timeout_s: The deadline.
        """
        return self.read(Get(key), consistency=consistency, max_age_s=max_age_s, timeout_s=timeout_s)

    def range(
        self,
        prefix: str = "",
        *,
        limit: int = PAGE_ENTRIES_MAX,
        after: str = "",
        keys_only: bool = False,
        consistency: Consistency = "linearizable",
        max_age_s: float = 1.0,
        timeout_s: float = TIMEOUT_S,
    ) -> Awaitable[Found]:
        """Read one page of keys that begin so, in order; `page.more` says that there are others behind `after` its last key."""
        op = Range(prefix, limit, after, keys_only)
        return self.read(op, consistency=consistency, max_age_s=max_age_s, timeout_s=timeout_s)

    async def list_all(
        self, prefix: str = "", *, consistency: Consistency = "linearizable", keys_only: bool = False, timeout_s: float = TIMEOUT_S
    ) -> tuple[list[Entry], int]:
        """Read all keys that begin so, page by page; return them and the revision of the first page: to watch from the one behind it.

        Changes made meanwhile may be seen in later pages already, and will be told again by that watch.
        """
        entries: list[Entry] = []
        revision, after = 0, ""
        while True:
            found = await self.range(prefix, after=after, keys_only=keys_only, consistency=consistency, timeout_s=timeout_s)
            entries.extend(found.entries)
            revision = revision or found.revision
            if not found.page.more:
                return entries, revision
            after = found.entries[-1].key

    async def lease_grant(self, ttl_s: float, *, timeout_s: float = TIMEOUT_S) -> int:
        """Make a lease that lives so long after it was last kept alive; return its number.

        Args:
            ttl_s: 1 s to 30 days.
            timeout_s: The deadline.
        """
        if not LEASE_TTL_S_MIN <= ttl_s <= LEASE_TTL_S_MAX:
            raise InvalidArgument("ttl_s", ttl_s, f"must be from {LEASE_TTL_S_MIN:g} to {LEASE_TTL_S_MAX:g}")
        found: Granted = await self.submit(LeaseGrant(round(ttl_s * 1000)), timeout_s=timeout_s)
        return found.lease

    async def lease_revoke(self, lease: int, *, timeout_s: float = TIMEOUT_S) -> int:
        """End a lease now; return how many keys went with it.

        Raises:
            NotFound: No such lease.
        """
        found: Deleted = await self.submit(LeaseRevoke(lease), timeout_s=timeout_s)
        return found.count

    async def compact(self, revision: int, *, timeout_s: float = TIMEOUT_S) -> int:
        """Forget the changes up to a revision: watches cannot begin there any more; return how many went."""
        found: Deleted = await self.submit(Compact(revision), timeout_s=timeout_s)
        return found.count
