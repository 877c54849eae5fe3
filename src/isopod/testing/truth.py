"""Truth: what the store held at each of its revisions, and since when anybody could know it.

Made after a run, by feeding one machine with everything that was applied anywhere, in order. Answers that are not linearizable (stale and
cached reads, watches, leases) are compared with it. It is no judge of the log: that entries are the same everywhere, and never lost, is
what `isopod.testing.invariants` watches.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Final

from isopod.api.store.messages import Entry
from isopod.cluster.store.machine import StoreMachine


class Truth:
    """The history of all keys. As the machine's listener it takes changes in; whoever checks asks."""

    def __init__(self) -> None:
        self.changes: list[Entry] = []
        """Every change in order; version 0 for a deletion."""
        self.compactions: list[tuple[int, int]] = []
        """When changes were forgotten, and up to which revision."""
        self.now_ns = 0
        """When what is applied next was first applied by any node."""
        self._by_key: dict[str, list[Entry]] = {}
        self._known_ns: dict[int, int] = {}

    # -- the machine's listener ------------------------------------------------------------------------------------------------------

    def on_changes(self, changes: Sequence[Entry]) -> None:
        """Take changes in."""
        for entry in changes:
            self.changes.append(entry)
            self._by_key.setdefault(entry.key, []).append(entry)
            self._known_ns.setdefault(entry.mod_revision, self.now_ns)

    def on_restored(self) -> None:
        """Never: everything is applied from the first entry on."""

    # -- questions -------------------------------------------------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """The newest."""
        return self.changes[-1].mod_revision if self.changes else 0

    def at(self, key: str, revision: int) -> Entry | None:
        """Return a key's entry as of a revision, None if it was not there."""
        entries = self._by_key.get(key, [])
        place = bisect_right(entries, revision, key=_revision_of)
        found = entries[place - 1] if place else None
        return None if found is None or found.is_deleted else found

    def changed_between(self, key: str, after: int, until: int) -> bool:
        """Return whether a key changed at a revision above `after` and not above `until`."""
        entries = self._by_key.get(key, [])
        return bisect_right(entries, after, key=_revision_of) < bisect_right(entries, until, key=_revision_of)

    def next_change(self, key: str, after: int) -> Entry | None:
        """Return a key's first change above a revision."""
        entries = self._by_key.get(key, [])
        place = bisect_right(entries, after, key=_revision_of)
        return entries[place] if place < len(entries) else None

    def state(self, prefix: str, revision: int) -> list[Entry]:
        """Return all entries under a prefix as of a revision, by key."""
        found = (self.at(key, revision) for key in sorted(self._by_key) if key.startswith(prefix))
        return [entry for entry in found if entry is not None]

    def told(self, prefix: str, first: int, last: int) -> list[Entry]:
        """Return the changes that a watch of a prefix tells, from one revision to another, both with."""
        begin = bisect_right(self.changes, first - 1, key=_revision_of)
        end = bisect_right(self.changes, last, key=_revision_of)
        return [entry for entry in self.changes[begin:end] if entry.key.startswith(prefix)]

    def known_ns(self, revision: int) -> int:
        """Return when a revision was first applied by any node; a time that never came for one that nobody made."""
        return 0 if revision <= 0 else self._known_ns.get(revision, NEVER)


NEVER: Final = 1 << 62


def truth_of(batches: Iterable[tuple[Any, int]]) -> Truth:
    """Apply what a run applied.

    Args:
        batches: Each batch with the time when it was first applied, in order.
    """
    truth, machine = Truth(), StoreMachine()
    machine.listen(truth)
    compacted = 0
    for batch, at_ns in batches:
        truth.now_ns = at_ns
        machine.apply(batch)
        if machine.keys.compacted > compacted:
            compacted = machine.keys.compacted
            truth.compactions.append((at_ns, compacted))
    return truth


def _revision_of(entry: Entry) -> int:
    return entry.mod_revision
