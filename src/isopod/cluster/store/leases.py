"""Leases, as the log knows them: which there are, how long they live, and which keys hang on them.

When one ends is not decided here: the leader watches the time (`isopod.cluster.store.lessor`) and says so through the log, so that
every node lets go of the same keys at the same place. Pure, as all of the machine.
"""

import msgspec

from isopod.cluster.store.keyspace import MODULUS, part_of


class SavedLease(msgspec.Struct, frozen=True, array_like=True):
    """A lease in a snapshot; its keys are found by the entries."""

    id: int
    ttl_ms: int
    granted_ns: int


class Lease:
    """One lease."""

    __slots__ = ("granted_ns", "id", "keys", "ttl_ms")

    def __init__(self, number: int, ttl_ms: int, granted_ns: int) -> None:
        self.id = number
        self.ttl_ms = ttl_ms
        self.granted_ns = granted_ns
        """By the clock of the leader of that time."""
        self.keys: dict[str, None] = {}


class Leases:
    """All leases, in the order they were granted."""

    __slots__ = ("_n_granted", "_sum", "by_id", "fresh")

    def __init__(self) -> None:
        self.by_id: dict[int, Lease] = {}
        self.fresh: list[int] = []
        """Granted since whoever watches the time looked last; he empties it."""
        self._n_granted = 0
        self._sum = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.by_id)

    def grant(self, ttl_ms: int, stamp_ns: int) -> int:
        """Make a lease; return its number."""
        self._n_granted += 1
        self._add(SavedLease(self._n_granted, ttl_ms, stamp_ns))
        self.fresh.append(self._n_granted)
        return self._n_granted

    def take(self, number: int) -> Lease | None:
        """Remove and return a lease; None if there is none."""
        lease = self.by_id.pop(number, None)
        if lease is not None:
            self._sum -= part_of(SavedLease(number, lease.ttl_ms, lease.granted_ns))
        return lease

    def attach(self, key: str, *, old: int, new: int) -> None:
        """Move a key from one lease to another; 0 is none."""
        if old and old in self.by_id:
            self.by_id[old].keys.pop(key, None)
        if new and new in self.by_id:
            self.by_id[new].keys[key] = None

    def fold(self) -> int:
        """Return what all leases add to the digest."""
        return (self._sum + part_of(("leases", self._n_granted))) % MODULUS

    def save(self) -> tuple[int, list[SavedLease]]:
        """Return how many were granted, and those that are."""
        return self._n_granted, [SavedLease(lease.id, lease.ttl_ms, lease.granted_ns) for lease in self.by_id.values()]

    def load(self, n_granted: int, saved: list[SavedLease]) -> None:
        """Take a snapshot's leases; their keys are attached by the caller."""
        self.by_id = {}
        self._sum = 0
        for item in saved:
            self._add(item)
        self._n_granted = n_granted

    def become(self, other: "Leases") -> None:
        """Take another's content, which gives it up."""
        self.by_id, self.fresh = other.by_id, other.fresh
        self._n_granted, self._sum = other._n_granted, other._sum

    def _add(self, item: SavedLease) -> None:
        self.by_id[item.id] = Lease(item.id, item.ttl_ms, item.granted_ns)
        self._sum += part_of(item)
