"""Two bounded maps: one that forgets what was not used for long, one that forgets what is old.

Both are plain and synchronous; time is given by the caller, so they are the same in the simulation. Neither calls back.
"""

from collections.abc import Callable, Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Final, Generic, NamedTuple, TypeVar

from isopod.world.errors import InvalidArgument

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
ENTRIES_MAX: Final = 1 << 20
_SLACK: Final = 64
"""Stale places in a heap that are not worth a rebuild."""


class CacheStatistics(NamedTuple):
    """What a cache did and holds."""

    n_hits: int
    n_misses: int
    n_evicted: int
    n_entries: int
    n_bytes: int


class LruCache(Generic[K, V]):
    """Keeps what was used last, within a budget of bytes.

    Args:
        bytes_max: The budget.
        size_of: The bytes of a value.
        entries_max: A bound on their number, too.
    """

    def __init__(self, bytes_max: int, size_of: Callable[[V], int], *, entries_max: int = ENTRIES_MAX) -> None:
        if bytes_max < 0 or entries_max < 1:
            raise InvalidArgument("cache bound", f"{bytes_max} bytes, {entries_max} entries", "it must hold something")
        self._bytes_max = bytes_max
        self._entries_max = entries_max
        self._size_of = size_of
        self._entries: dict[K, tuple[V, int]] = {}
        """Least recently used first: a dict keeps the order of insertion, and use inserts again."""
        self._n_bytes = self._n_hits = self._n_misses = self._n_evicted = 0

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        """Return whether there is a value, without counting it as used."""
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        """Iterate over the keys, the least recently used first, as they are now."""
        return iter(list(self._entries))

    def get(self, key: K) -> V | None:
        """Return the value and note its use; None if there is none."""
        found = self._entries.pop(key, None)
        if found is None:
            self._n_misses += 1
            return None
        self._entries[key] = found
        self._n_hits += 1
        return found[0]

    def put(self, key: K, value: V) -> bool:
        """Keep a value, in place of an older one; False if it alone is over the budget, and then the older one is gone too."""
        self.remove(key)
        size = self._size_of(value)
        if size > self._bytes_max:
            return False
        while self._entries and (self._n_bytes + size > self._bytes_max or len(self._entries) >= self._entries_max):
            self.remove(next(iter(self._entries)))
            self._n_evicted += 1
        self._entries[key] = (value, size)
        self._n_bytes += size
        return True

    def remove(self, key: K) -> V | None:
        """Forget a key; return its value, None if there was none."""
        found = self._entries.pop(key, None)
        if found is None:
            return None
        self._n_bytes -= found[1]
        return found[0]

    def statistics(self) -> CacheStatistics:
        """Return what the cache did and holds."""
        return CacheStatistics(self._n_hits, self._n_misses, self._n_evicted, len(self._entries), self._n_bytes)


class ExpiringMap(Generic[K, V]):
    """Keeps values for a time each; over its bound those that would expire first go first.

    Args:
        entries_max: The bound.
        now_s: The clock, rising: `loop.time`, say.
    """

    def __init__(self, entries_max: int, now_s: Callable[[], float]) -> None:
        if not 1 <= entries_max <= ENTRIES_MAX:
            raise InvalidArgument("map bound", entries_max, f"it must be from 1 to {ENTRIES_MAX}")
        self._entries_max = entries_max
        self._now_s = now_s
        self._entries: dict[K, tuple[V, float]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._n_put = 0

    def __len__(self) -> int:
        """Return the number of entries that have not expired."""
        self._expire()
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """Return the value, None if there is none or its time is over."""
        found = self._entries.get(key)
        if found is None:
            return None
        if found[1] <= self._now_s():
            del self._entries[key]
            return None
        return found[0]

    def put(self, key: K, value: V, ttl_s: float) -> None:
        """Keep a value for `ttl_s` seconds from now, in place of an older one; 0 or less forgets the key."""
        self._expire()
        self._entries.pop(key, None)
        if ttl_s <= 0:
            return
        while len(self._entries) >= self._entries_max:
            self._drop_first()
        expires_s = self._now_s() + ttl_s
        self._entries[key] = (value, expires_s)
        self._n_put += 1
        heappush(self._heap, (expires_s, self._n_put, key))
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._rebuild()

    def remove(self, key: K) -> None:
        """Forget a key."""
        self._entries.pop(key, None)

    def _expire(self) -> None:
        now_s = self._now_s()
        while self._heap and self._heap[0][0] <= now_s:
            self._drop_first()

    def _drop_first(self) -> None:
        """Take the top of the heap; it may speak of an entry that was replaced or removed since."""
        expires_s, _, key = heappop(self._heap)
        found = self._entries.get(key)
        if found is not None and found[1] == expires_s:
            del self._entries[key]

    def _rebuild(self) -> None:
        """Throw out what the heap still says of replaced entries."""
        self._heap = [(expires_s, index, key) for index, (key, (_, expires_s)) in enumerate(self._entries.items())]
        heapify(self._heap)
