"""What was read otherwise than linearizably, and what was watched: the notes of clients, and whether they can be true.

A stale read shows what its node has: the state of exactly the revision that it names, which somebody had applied by then; asked one after
the other in one life of one node, revisions do not fall. Its age, if it states one, is true: it misses nothing that was acknowledged
longer ago. A cached read states an age, at most the one that was allowed. A watch tells every change of its keys once, in order, those of
one revision together, over all its connections; or it ends because the store has forgotten what would come next, and that is true as well.

Times are the simulation's. A node that states an age measures it by its own clock, so how wrong clocks may run has to be told.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from isopod.api.store.messages import Consistency, Entry
from isopod.testing.truth import Truth

TURN_NS: Final = 1_000_000
"""Ages are compared with so much play: turns of the loop take some time."""


class Read(NamedTuple):
    """One answered read. `replica` says which life of which node must have answered, "" if that is not known."""

    client: int
    key: str
    consistency: Consistency
    invoked_ns: int
    returned_ns: int
    entry: Entry | None
    revision: int
    age_s: float | None
    age_s_max: float = 0.0
    replica: str = ""

    def __str__(self) -> str:
        return f"client {self.client}'s {self.consistency} read of {self.key} at {self.returned_ns / 1e9:.6f} s (revision {self.revision})"


class Acknowledged(NamedTuple):
    """When an answer told somebody of a revision."""

    at_ns: int
    revision: int


@dataclass(slots=True)
class Watched:
    """What one watch told, from its first change to its end. `items`: when, up to which revision, and which changes."""

    client: int
    prefix: str
    from_revision: int
    items: list[tuple[int, int, list[Entry]]] = field(default_factory=list)
    forgotten_ns: int = 0
    """When it was told that what comes next is forgotten; 0 if it was not."""

    @property
    def revision(self) -> int:
        """How far it was told."""
        return max([self.from_revision - 1, *(revision for _, revision, _ in self.items)])


class Listed(NamedTuple):
    """What a list of keys showed."""

    client: int
    prefix: str
    revision: int
    entries: tuple[Entry, ...]


def read_violations(reads: Sequence[Read], truth: Truth, acknowledged: Sequence[Acknowledged], *, drift: float = 0.0) -> list[str]:
    """Return what cannot be true of reads, in words.

    Args:
        reads: Of all clients.
        truth: What the store held.
        acknowledged: What was answered to anybody, in any order.
        drift: How wrong clocks may run, as a share of the time.
    """
    known = _Known(acknowledged)
    found = [text for read in reads for text in _wrong_read(read, truth, known, drift)]
    return found + _backwards(reads)


def watch_violations(watched: Sequence[Watched], listed: Sequence[Listed], truth: Truth) -> list[str]:
    """Return what cannot be true of watches and of the lists they began with, in words."""
    found = [text for watch in watched for text in _wrong_watch(watch, truth)]
    for each in listed:
        if list(each.entries) != truth.state(each.prefix, each.revision):
            found.append(f"client {each.client}'s list of {each.prefix!r} is not what was there at revision {each.revision}")
    return found


class _Known:
    """The newest revision that anybody was told of by a time."""

    def __init__(self, acknowledged: Sequence[Acknowledged]) -> None:
        self._times: list[int] = []
        self._newest: list[int] = []
        newest = 0
        for each in sorted(acknowledged):
            newest = max(newest, each.revision)
            self._times.append(each.at_ns)
            self._newest.append(newest)

    def by(self, at_ns: float) -> int:
        place = bisect_right(self._times, at_ns)
        return self._newest[place - 1] if place else 0


def _wrong_read(read: Read, truth: Truth, known: _Known, drift: float) -> list[str]:
    found = []
    if truth.known_ns(read.revision) > read.returned_ns:
        found.append(f"{read} is of a revision that nobody had applied")
    elif read.entry != truth.at(read.key, read.revision):
        found.append(f"{read} shows {_words(read.entry)}, and there was {_words(truth.at(read.key, read.revision))}")
    if read.consistency == "cached" and (read.age_s is None or read.age_s > read.age_s_max):
        found.append(f"{read} is {read.age_s} s old, and may be {read.age_s_max:g} s")
    if read.age_s is not None:
        newest = known.by(read.invoked_ns - read.age_s * 1e9 / (1 - drift) - TURN_NS)
        if truth.changed_between(read.key, read.revision, newest):
            found.append(f"{read} says that it is {read.age_s:.6f} s old, and revision {newest} was acknowledged before that")
    return found


def _backwards(reads: Sequence[Read]) -> list[str]:
    """Return where revisions of one life of one node fall."""
    found = []
    by_replica: dict[str, list[Read]] = {}
    for read in reads:
        if read.replica:
            by_replica.setdefault(read.replica, []).append(read)
    for each in by_replica.values():
        known = _Known([Acknowledged(read.returned_ns, read.revision) for read in each])
        for read in each:
            before = known.by(read.invoked_ns - 1)
            if read.revision < before:
                found.append(f"{read} went back from revision {before} on the same node")
    return found


def _wrong_watch(watch: Watched, truth: Truth) -> list[str]:
    name = f"client {watch.client}'s watch of {watch.prefix!r} from revision {watch.from_revision}"
    found = []
    told = [entry for _, _, entries in watch.items for entry in entries]
    expected = truth.told(watch.prefix, watch.from_revision, watch.revision)
    if told != expected:
        found.append(f"{name} told {_first_difference(told, expected)}")
    last = watch.from_revision - 1
    for at_ns, revision, entries in watch.items:
        if entries and entries[0].mod_revision <= last:
            found.append(f"{name} told revision {entries[0].mod_revision} in two parts, or again")
        last = max(last, revision)
        if entries and truth.known_ns(entries[-1].mod_revision) > at_ns:
            found.append(f"{name} told revision {entries[-1].mod_revision} before anybody had applied it")
    if watch.forgotten_ns and not any(at_ns <= watch.forgotten_ns and revision > watch.revision for at_ns, revision in truth.compactions):
        found.append(f"{name} was told that what follows {watch.revision} is forgotten, and it was not")
    return found


def _first_difference(told: Sequence[Entry], expected: Sequence[Entry]) -> str:
    for one, other in zip(told, expected, strict=False):
        if one != other:
            return f"{_words(one)} where {_words(other)} comes next"
    if len(told) < len(expected):
        return f"nothing of {_words(expected[len(told)])}"
    return f"{_words(told[len(expected)])}, which comes from nowhere"


def _words(entry: Entry | None) -> str:
    if entry is None:
        return "nothing"
    what = "its end" if entry.is_deleted else f"{entry.value!r} (version {entry.version})"
    return f"{entry.key} = {what} of revision {entry.mod_revision}"
