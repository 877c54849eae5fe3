"""WatchHub: hands the changes of each batch to the watchers that asked for them.

A watcher has a queue of its own, bounded: one that does not take what it is told is cut off, and may go on from where it was. What it
missed is in the store's history, as far back as that goes. Finding the watchers of a change costs one look-up for each length of prefix
in use, so thousands of watchers of their own few keys cost nothing when others' keys change.

All happens in the turn of the loop in which a batch is applied, so a queue never ends in the middle of a revision.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from isopod.api.store.messages import Entry
from isopod.cluster.store.machine import StoreMachine
from isopod.world.errors import Exhausted, IsopodError, RevisionCompacted

QUEUE_MAX: Final = 20_000
QUEUE_BYTES_MAX: Final = 32 << 20
ENTRY_BYTES: Final = 64
WATCHERS_MAX: Final = 20_000


class HubStatistics(NamedTuple):
    """What a hub does."""

    n_watchers: int
    n_told: int
    n_cut: int


class Watcher:
    """One watcher's queue.

    Args:
        prefix: Of the keys.
        exact: Only the key that is called so.
        revision: It knows of everything up to this one.
        entries_max: Bound of its queue.
    """

    __slots__ = ("_entries_max", "_error", "_future", "_n_bytes", "_queue", "exact", "prefix", "revision")

    def __init__(self, prefix: str, *, exact: bool, revision: int, entries_max: int) -> None:
        self.prefix = prefix
        self.exact = exact
        self.revision = revision
        """Of the last change that was taken, or that it was told there is none up to."""
        self._entries_max = entries_max
        self._queue: list[Entry] = []
        self._n_bytes = 0
        self._error: IsopodError | None = None
        self._future: asyncio.Future[None] | None = None

    def wants(self, entry: Entry) -> bool:
        """Return whether a change is for it."""
        if entry.mod_revision <= self.revision:
            return False
        return entry.key == self.prefix if self.exact else entry.key.startswith(self.prefix)

    def put(self, entry: Entry) -> bool:
        """Queue a change; return whether it was cut off by that."""
        if self._error is not None or entry.mod_revision <= self.revision:
            return False
        self._queue.append(entry)
        self._n_bytes += len(entry.value) + ENTRY_BYTES
        if len(self._queue) > self._entries_max or self._n_bytes > QUEUE_BYTES_MAX:
            hint = f"it may go on from revision {self.revision + 1}"
            self.fail(Exhausted("a watcher's queue", f"{len(self._queue)} changes were not taken", hint))
            return True
        if self._future is not None:
            self._wake()
        return False

    def replace(self, changes: Sequence[Entry]) -> None:
        """Queue these instead of what is queued."""
        self._queue = [entry for entry in changes if self.wants(entry)]
        self._n_bytes = sum(len(entry.value) + ENTRY_BYTES for entry in self._queue)
        if self._queue:
            self._wake()

    def fail(self, error: IsopodError) -> None:
        """Let it raise that, after nothing else."""
        self._error = error
        self._queue = []
        self._n_bytes = 0
        self._wake()

    async def wait(self, timeout_s: float) -> bool:
        """Wait until there is something to take; return whether there is, within so many seconds.

        Raises:
            Exhausted: It was too slow, and was cut off.
            RevisionCompacted: What it would be told next is forgotten.
        """
        if not self._queue and self._error is None:
            self._future = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._future
            except TimeoutError:
                return False
            finally:
                self._future = None
        if self._error is not None:
            raise self._error
        return bool(self._queue)

    def take(self, revision: int) -> list[Entry]:
        """Take all that is queued, which is all there is up to `revision`."""
        taken, self._queue = self._queue, []
        self._n_bytes = 0
        self.revision = max(self.revision, revision)
        return taken

    def _wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


class WatchHub:
    """All watchers of one node.

    Args:
        machine: Whose changes.
        queue_max: Changes one watcher may leave waiting.
    """

    def __init__(self, machine: StoreMachine, *, queue_max: int = QUEUE_MAX) -> None:
        self._machine = machine
        self._queue_max = queue_max
        self._exact: dict[str, dict[int, Watcher]] = {}
        self._prefixes: dict[int, dict[str, dict[int, Watcher]]] = {}
        """By the prefix's length."""
        self._watchers: dict[int, Watcher] = {}
        self._n_watchers = self._n_told = self._n_cut = 0
        machine.listen(self)

    def close(self, error: IsopodError) -> None:
        """End all watches."""
        self._machine.unlisten(self)
        for watcher in self._watchers.values():
            watcher.fail(error)

    def statistics(self) -> HubStatistics:
        """Return what the hub does."""
        return HubStatistics(len(self._watchers), self._n_told, self._n_cut)

    def open(self, prefix: str, *, exact: bool, from_revision: int) -> tuple[int, Watcher]:
        """Begin a watch; return its number, to end it with, and its queue.

        Raises:
            RevisionCompacted: Some of what it asks for is forgotten.
            Exhausted: There are too many.
        """
        if len(self._watchers) >= WATCHERS_MAX:
            raise Exhausted("watches", f"{WATCHERS_MAX} on this node", "watch on another node", retry_after_s=1.0)
        keys = self._machine.keys
        if from_revision and from_revision <= keys.compacted:
            raise RevisionCompacted(from_revision, keys.compacted)
        revision = from_revision - 1 if from_revision else keys.revision
        watcher = Watcher(prefix, exact=exact, revision=revision, entries_max=self._queue_max)
        watcher.replace(keys.changes_since(revision))
        number = self._n_watchers
        self._n_watchers += 1
        self._watchers[number] = watcher
        self._place_of(watcher).setdefault(prefix, {})[number] = watcher
        return number, watcher

    def end(self, number: int) -> None:
        """End a watch."""
        watcher = self._watchers.pop(number)
        place = self._place_of(watcher)
        del place[watcher.prefix][number]
        if not place[watcher.prefix]:
            del place[watcher.prefix]
        if not watcher.exact and not place:
            del self._prefixes[len(watcher.prefix)]

    # --- the machine's listener ---------------------------------------------------------------------------------------

    def on_changes(self, changes: Sequence[Entry]) -> None:
        """Hand out a batch."""
        if not self._watchers:
            return
        exact, prefixes = self._exact, self._prefixes
        for entry in changes:
            key = entry.key
            found = exact.get(key)
            if found is not None:
                self._tell(found, entry)
            for n_chars, by_prefix in prefixes.items():
                found = by_prefix.get(key[:n_chars])
                if found is not None:
                    self._tell(found, entry)

    def on_restored(self) -> None:
        """The state was replaced: watchers go on from the new history, where it reaches back to them."""
        keys = self._machine.keys
        for watcher in self._watchers.values():
            if watcher.revision < keys.compacted:
                watcher.fail(RevisionCompacted(watcher.revision + 1, keys.compacted))
            else:
                watcher.replace(keys.changes_since(watcher.revision))

    def _tell(self, watchers: dict[int, Watcher], entry: Entry) -> None:
        for watcher in watchers.values():
            self._n_told += 1
            self._n_cut += watcher.put(entry)

    def _place_of(self, watcher: Watcher) -> dict[str, dict[int, Watcher]]:
        return self._exact if watcher.exact else self._prefixes.setdefault(len(watcher.prefix), {})
