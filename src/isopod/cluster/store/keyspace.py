"""Keyspace: the entries, the changes that watches can still ask for, and a digest of it all that costs next to nothing.

Pure: no time of its own, no chance, nothing that depends on hash order. What it does is a function of the calls made.

The digest is a sum over entries (of a hash of each, modulo 2^128), so it does not depend on the order in which they came, and a change only
takes the old entry's part out and puts the new one's in. That is put off: writing notes what an entry was before, and `fold` settles it for
as many keys as were touched. After a restore it is summed up anew, so it also says whether the snapshot was whole.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Final, NamedTuple

import msgspec

from isopod.api.store.messages import PAGE_BYTES_MAX, Entry, Op, Page, Put, Range
from isopod.cluster.store.sorted_keys import SortedKeys

ENTRY_BYTES: Final = 160
"""What an entry takes beside its key and value, roughly."""
UNFOLDED_MAX: Final = 16_384
"""No more keys may pile up between two looks at the digest: to settle so many takes some ten milliseconds."""
FOLDED_AT_ONCE: Final = 512
MODULUS: Final = 1 << 128
_encode = msgspec.msgpack.Encoder().encode


def part_of(thing: object) -> int:
    """Return what a part of the state adds to the digest's sum."""
    return int.from_bytes(blake2b(_encode(thing), digest_size=16).digest(), "little")


class Frozen(NamedTuple):
    """The keys of one moment."""

    order: list[str]
    entries: dict[str, Entry]
    before: dict[str, Entry | None]
    total: int

    def fold(self) -> Iterator[int | None]:
        """Return what `Keyspace.fold` would have returned then, last of all; before that, None for every few hundred keys' work."""
        total = self.total
        for number, (key, old) in enumerate(self.before.items(), 1):
            total += _difference(old, self.entries.get(key))
            if not number % FOLDED_AT_ONCE:
                yield None
        yield total % MODULUS

    def take(self) -> Iterator[Entry]:
        """Return the entries in order, once: each is let go of on the way, for to do that with all of them at the end takes long too."""
        order, entries = self.order, self.entries
        order.reverse()
        while order:
            yield entries.pop(order.pop())


class Keyspace:
    """The keys, at `revision`.

    Args:
        history_max: Changes kept for watches.
        history_bytes_max: Bytes of them.
        history_age_ns: How long they are kept.
    """

    __slots__ = (
        "_age_ns", "_before", "_bytes_max", "_marks", "_n_max", "_order", "_sum", "compacted", "entries", "fresh", "history",
        "history_bytes", "n_bytes", "revision",
    )  # fmt: skip

    def __init__(self, *, history_max: int, history_bytes_max: int, history_age_ns: int) -> None:
        self.entries: dict[str, Entry] = {}
        self.revision = 0
        self.compacted = 0
        """Changes up to this revision are forgotten."""
        self.history: deque[Entry] = deque()
        self.history_bytes = 0
        self.fresh: list[Entry] = []
        """Changes of the batch that is being applied."""
        self.n_bytes = 0
        self._n_max = history_max
        self._bytes_max = history_bytes_max
        self._age_ns = history_age_ns
        self._order = SortedKeys()
        self._marks: deque[tuple[int, int]] = deque()
        """(revision, time): the changes up to that revision are at least so old."""
        self._before: dict[str, Entry | None] = {}
        """What keys were when the digest was last settled."""
        self._sum = 0

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(self, op: Put, revision: int) -> Entry | None:
        """Set a key; return what it was."""
        key, value, lease = op.key, op.value, op.lease
        entries = self.entries
        old = entries.get(key)
        if old is None:
            entry = Entry(key, value, revision, revision, 1, lease)
            self._order.add(key)
            self.n_bytes += len(value) + len(key) + ENTRY_BYTES
        else:
            entry = Entry(key, value, old.create_revision, revision, old.version + 1, lease)
            self.n_bytes += len(value) - len(old.value)
        entries[key] = entry
        self.fresh.append(entry)
        self._before.setdefault(key, old)
        self.revision = revision
        return old

    def put_run(self, ops: Sequence[Op], at: int, *, detach: Callable[[str, int], None]) -> int:
        """Set the keys of a run of puts without leases, each at a revision of its own; return the place behind the run.

        As `put` for each, in one frame: nearly all that a busy store does happens here.

        Args:
            ops: Operations.
            at: Where the run begins; a put without a lease stands there.
            detach: Told of a key that hung on a lease before.
        """
        entries, before = self.entries, self._before
        add, append = self._order.add, self.fresh.append
        revision, n_bytes = self.revision, self.n_bytes
        for place in range(at, len(ops)):
            op = ops[place]
            if type(op) is not Put or op.lease:
                break
            key, value = op.key, op.value
            revision += 1
            old = entries.get(key)
            if old is None:
                entry = Entry(key, value, revision, revision, 1)
                add(key)
                n_bytes += len(value) + len(key) + ENTRY_BYTES
            else:
                entry = Entry(key, value, old.create_revision, revision, old.version + 1)
                n_bytes += len(value) - len(old.value)
                if old.lease:
                    detach(key, old.lease)
            entries[key] = entry
            append(entry)
            if key not in before:
                before[key] = old
        else:
            place = len(ops)
        self.revision, self.n_bytes = revision, n_bytes
        return place

    def delete(self, key: str, revision: int) -> Entry | None:
        """Remove a key; return what it was, None if it was not there (then nothing changes)."""
        old = self.entries.pop(key, None)
        if old is None:
            return None
        self._order.remove(key)
        self.n_bytes -= len(old.value) + len(key) + ENTRY_BYTES
        self.fresh.append(Entry(key, b"", 0, revision, 0))
        self._before.setdefault(key, old)
        self.revision = revision
        return old

    def end_batch(self, stamp_ns: int) -> None:
        """Keep the batch's changes for watches, and forget what is over the bounds."""
        fresh = self.fresh
        history = self.history
        if fresh:
            history.extend(fresh)
            n_bytes = 0
            for entry in fresh:
                n_bytes += len(entry.value)
            self.history_bytes += n_bytes + ENTRY_BYTES * len(fresh)
            self._marks.append((self.revision, stamp_ns))
            self.fresh = []
        marks = self._marks
        until = self.compacted
        while marks and marks[0][1] + self._age_ns < stamp_ns:
            until = marks.popleft()[0]
        n_over = len(history) - self._n_max
        if n_over > 0:
            until = max(until, history[n_over - 1].mod_revision)
        if until > self.compacted:
            self.compact(until)
        while self.history_bytes > self._bytes_max and len(history) > 1:
            self.compact(history[0].mod_revision)
        if len(self._before) > UNFOLDED_MAX:
            self.settle(2 * len(fresh) + 64)

    def compact(self, revision: int) -> int:
        """Forget the changes up to a revision; return how many went."""
        history = self.history
        n_before = len(history)
        n_bytes = 0
        while history and history[0].mod_revision <= revision:
            n_bytes += len(history.popleft().value)
        self.history_bytes -= n_bytes + ENTRY_BYTES * (n_before - len(history))
        while self._marks and self._marks[0][0] <= revision:
            self._marks.popleft()
        self.compacted = max(self.compacted, min(revision, self.revision))
        return n_before - len(history)

    # --- reading ------------------------------------------------------------------------------------------------------

    def keys(self, prefix: str, after: str = "") -> Iterator[str]:
        """Iterate over the keys that begin so, in order; change nothing meanwhile."""
        return self._order.starting_with(prefix, after)

    def page(self, op: Range, bytes_max: int = PAGE_BYTES_MAX) -> Page:
        """Return the entries a range asks for, as far as the limits go; one at least if there is any."""
        found: list[Entry] = []
        left = bytes_max
        for key in self.keys(op.prefix, op.after):
            entry = self.entries[key]
            if op.keys_only and entry.value:
                entry = Entry(key, b"", entry.create_revision, entry.mod_revision, entry.version, entry.lease)
            left -= len(entry.value) + len(key) + 32
            if found and (len(found) >= op.limit or left < 0):
                return Page(tuple(found), more=True)
            found.append(entry)
        return Page(tuple(found))

    def frozen(self) -> "Frozen":
        """Return all keys and entries as of now, whatever is written later. Entries never change: only who is there is copied."""
        return Frozen(self._order.all(), dict(self.entries), dict(self._before), self._sum)

    def changes_since(self, revision: int) -> list[Entry]:
        """Return the kept changes behind a revision, the oldest first."""
        found: list[Entry] = []
        for entry in reversed(self.history):
            if entry.mod_revision <= revision:
                break
            found.append(entry)
        found.reverse()
        return found

    # --- digest and restore -------------------------------------------------------------------------------------------

    def fold(self) -> int:
        """Settle the digest; return the sum over all entries."""
        self.settle(len(self._before))
        return self._sum

    def settle(self, n_keys: int) -> bool:
        """Settle the digest for so many of the keys that were touched, those touched first; return whether any are left."""
        before, entries, total = self._before, self.entries, self._sum
        for key in list(islice(before, n_keys)):
            total += _difference(before.pop(key), entries.get(key))
        self._sum = total % MODULUS
        return bool(before)

    def load(self, entries: Iterable[Entry], history: Iterable[Entry], marks: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Take a snapshot's content, in pieces; `revision` and `compacted` are set by the caller."""
        self.entries = {}
        self.n_bytes = self._sum = 0
        for number, entry in enumerate(entries, 1):
            self.entries[entry.key] = entry
            self._sum += part_of(entry)
            self.n_bytes += len(entry.value) + len(entry.key) + ENTRY_BYTES
            if not number % FOLDED_AT_ONCE:
                yield
        self._sum %= MODULUS
        self.history = deque(history)
        self.history_bytes = sum(len(entry.value) + ENTRY_BYTES for entry in self.history)
        self.fresh = []
        self._order = SortedKeys(self.entries)
        self._marks = deque(marks)
        self._before = {}

    def become(self, other: "Keyspace") -> None:
        """Take another's content, which gives it up; the bounds are the same."""
        self.revision, self.compacted = other.revision, other.compacted
        self.entries, self.n_bytes, self._order = other.entries, other.n_bytes, other._order
        self.history, self.history_bytes, self._marks = other.history, other.history_bytes, other._marks
        self.fresh, self._before, self._sum = other.fresh, other._before, other._sum

    def marks(self) -> list[tuple[int, int]]:
        """Return what a snapshot keeps of the changes' ages."""
        return list(self._marks)


def _difference(old: Entry | None, new: Entry | None) -> int:
    """Return what a change of an entry adds to the digest's sum."""
    if old is new:
        return 0
    return (0 if new is None else part_of(new)) - (0 if old is None else part_of(old))
