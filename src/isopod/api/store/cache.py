"""ReadCache: what a client read before, and how old that may be by now.

Every answer states an age: it holds all that was acknowledged so many seconds ago, and perhaps more. Without a watch the age counts
from when the read was sent. With one, entries are kept up to date by what the watch tells, and as of its last word all of them are as
new as that was; while the watch is broken, they grow older. An answer older than its reader allows is a miss, and read again.

Bounded in entries and bytes; what was not used for longest goes first. Single keys only.
"""

import asyncio
from typing import Final, Literal, NamedTuple

from isopod.api.store.messages import Entry, KvChanges, Page
from isopod.api.store.operations import Found
from isopod.runtime.caches import LruCache
from isopod.runtime.metrics import Registry

ENTRY_BYTES: Final = 256
NEVER: Final = float("-inf")


class CacheSettings(NamedTuple):
    """How a client keeps what it read.

    Args:
        by: "watch" keeps it up to date, "time" lets it grow old.
        prefix: Of the keys that are kept, and watched.
        entries_max: How many.
        bytes_max: Of their keys and values.
        progress_s: How often a quiet watch says that all is as it was: the age of answers goes up to this and the time that word takes.
    """

    by: Literal["watch", "time"] = "watch"
    prefix: str = ""
    entries_max: int = 10_000
    bytes_max: int = 16 << 20
    progress_s: float = 0.5


class CacheStatistics(NamedTuple):
    """What a cache did and holds."""

    n_hits: int
    n_misses: int
    n_entries: int
    n_bytes: int

    @property
    def hit_rate(self) -> float:
        """Of all look-ups, 0 before the first."""
        n_all = self.n_hits + self.n_misses
        return self.n_hits / n_all if n_all else 0.0


class _Kept(NamedTuple):
    """What is known of a key: the entry (None: it is not there), the store's revision then, the loop's time as of which it held, and
    whether the watch tells of every change since."""

    entry: Entry | None
    revision: int
    held_s: float
    is_watched: bool


class ReadCache:
    """The cache.

    Args:
        settings: How.
        metrics: Where look-ups are counted; None for nowhere.
    """

    def __init__(self, settings: CacheSettings, metrics: Registry | None) -> None:
        self.settings = settings
        self._loop = asyncio.get_running_loop()
        self._kept: LruCache[str, _Kept] = LruCache(settings.bytes_max, _size_of, entries_max=settings.entries_max)
        self._n_hits = self._n_misses = 0
        self._told = -1
        """The watch has told all changes up to this revision; -1 before its first word."""
        self._told_s = NEVER
        """The loop's time as of which everything up to then was told."""
        metrics = metrics or Registry()
        name, text = "isopod_store_cache_lookups_total", "Reads that a cache was asked for."
        self._hits = metrics.counter(name, text, place="client", outcome="hit")
        self._misses = metrics.counter(name, text, place="client", outcome="miss")
        self._hit_ratio = metrics.gauge(
            "isopod_store_cache_hit_ratio", "Of all look-ups since the start, those that were hits.", place="client"
        )

    def get(self, key: str, max_age_s: float) -> Found | None:
        """Return what is known of a key, if it is new enough."""
        kept = self._kept.get(key)
        if kept is not None:
            age_s = self._loop.time() - self._held_s(kept)
            if age_s <= max_age_s:
                self._n_hits += 1
                self._hits.inc()
                self._hit_ratio.set(self.statistics().hit_rate)
                page = Page(() if kept.entry is None else (kept.entry,))
                return Found(page, kept.revision, max(0.0, age_s), is_cached=True)
        self._n_misses += 1
        self._misses.inc()
        self._hit_ratio.set(self.statistics().hit_rate)
        return None

    def keep(self, key: str, found: Found, asked_s: float) -> None:
        """Keep what was read.

        Args:
            key: Which was read.
            found: What was found.
            asked_s: The loop's time when it was asked for.
        """
        if found.age_s is None or not key.startswith(self.settings.prefix):
            return
        before = self._kept.get(key)
        if before is None or before.revision <= found.revision:
            # What was read at an older revision than the watch has told may have missed a change that nobody repeats.
            is_watched = 0 <= self._told <= found.revision
            self._kept.put(key, _Kept(found.entry, found.revision, asked_s - found.age_s, is_watched))

    def on_changes(self, changes: KvChanges) -> None:
        """The watch said something: what is kept is up to date with it."""
        now_s = self._loop.time()
        for entry in changes.entries:
            before = self._kept.get(entry.key)
            if before is not None and before.revision < entry.mod_revision:
                kept = _Kept(None if entry.is_deleted else entry, entry.mod_revision, self._held_s(before), is_watched=True)
                self._kept.put(entry.key, kept)
        self._told = max(self._told, changes.revision)
        if changes.age_s is not None:
            self._told_s = max(self._told_s, now_s - changes.age_s)

    def on_gap(self) -> None:
        """The watch has to begin anew: what was kept may have changed meanwhile, and goes."""
        for key in self._kept:
            self._kept.remove(key)
        self._told = -1
        self._told_s = NEVER

    def statistics(self) -> CacheStatistics:
        """Return what the cache did and holds."""
        held = self._kept.statistics()
        return CacheStatistics(self._n_hits, self._n_misses, held.n_entries, held.n_bytes)

    def _held_s(self, kept: _Kept) -> float:
        """Return the loop's time as of which it held."""
        return max(kept.held_s, self._told_s) if kept.is_watched else kept.held_s


def _size_of(kept: _Kept) -> int:
    return ENTRY_BYTES + (0 if kept.entry is None else len(kept.entry.key) + len(kept.entry.value))
