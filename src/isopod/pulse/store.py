"""Store: what is known of each sandbox, and views of it that do not change while they are sent.

A round of a sandbox (what one answer of its shim said) is taken in as a whole by `replace`, and let go of as a whole: its families stand
in a dictionary that is never changed after that, so that a view is as many references as there are sandboxes, and shows of each one whole
round, whatever comes while it is streamed.

    add          a sandbox is there; one that is known stays as it is
    describe     the runtime says whose it is: the labels of what is kept are exchanged
    replace      a round: `up`
    touch        the same round again: `up`
    fail         no round: not `up`; its figures are shown for `keep_rounds` failed rounds, then go
    remove       it is gone, and so is everything of it, in the very next view

What comes for a sandbox that is not there is dropped: an answer that was under way when it went makes no ghost.

Not here: reading (`core`), which lines are sent in which form (`render`), when shims are asked (`collector`).
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import WeakValueDictionary

from isopod.pulse import codings
from isopod.pulse.cadvisor import cadvisor_labels
from isopod.pulse.labels import block, exchange, kata_labels
from isopod.pulse.merge import Begun, Block, Census, Pairs, Shape, Told, block_of, count, pairs_of
from isopod.pulse.model import Families, Fragment, Labels, Pod, Query, Row, Runtime, Target
from isopod.pulse.resource import newest
from isopod.pulse.view import Demand, View, make_view
from isopod.world.errors import NotFound

if TYPE_CHECKING:
    from isopod.pulse.histograms import Histograms

HELPS_MAX: Final = 4096
"""How many texts of help are kept once for all sandboxes."""
HELP_BYTES_MAX: Final = 1024
"""A longer one is kept by each."""
FOUND_MAX: Final = 64
"""For how many namespaces and pods it is kept who is in them."""
_NONE: Final[Families] = {}
_EMPTY: Final = Shape(())
_NO_ROW: Final = Row(())
_BY_ID: Final = attrgetter("id")


class Entry:
    """One sandbox. Who reads it changes nothing in it.

    Args:
        target: What discovery says of it.
        found_s: When, by the store's clock.
    """

    __slots__ = (
        "begun",
        "collected_s",
        "containers",
        "dropped",
        "error",
        "families",
        "found_s",
        "id",
        "n_bytes",
        "n_failures",
        "n_rounds",
        "n_series",
        "pod",
        "raw",
        "resource",
        "rows",
        "runtime",
        "shapes",
        "socket",
        "tally",
        "took_s",
        "up",
        "version",
    )

    def __init__(self, target: Target, found_s: float) -> None:
        self.id = target.id
        self.runtime: Runtime = target.runtime
        self.socket = target.socket
        self.found_s = found_s
        self.pod: Pod | None = None
        self.begun = _begun(target.id, None)
        """What all lines of `families` begin with."""
        self.families: Families = _NONE
        """Its kata_* families; never changed, only exchanged."""
        self.containers: Families = _NONE
        """Its families under cAdvisor's names."""
        self.resource: Block | None = None
        """What /metrics/resource shows of it; None until somebody asked."""
        self.shapes: tuple[Shape, Shape] = (_EMPTY, _EMPTY)
        self.rows: tuple[Row, Row] = (_NO_ROW, _NO_ROW)
        """The fragments of both in the order of their shapes."""
        self.raw: bytes | None = None
        self.up = False
        self.error = ""
        """The class of the last failure, "" while `up`."""
        self.n_failures = 0
        """In a row."""
        self.n_rounds = 0
        """Answers taken in, whether or not they said something new."""
        self.n_bytes = 0
        """Of the last answer."""
        self.n_series = 0
        """Of both kinds of families."""
        self.dropped: dict[str, int] = {}
        """Lines left out since the sandbox was found, by reason."""
        self.took_s = 0.0
        """What the last try took, failed or not."""
        self.collected_s: float | None = None
        """When its figures were last confirmed by the shim."""
        self.version = 0
        """Changes with what a view shows of it."""
        self.tally: Mapping[str, int] = {}
        """Lines left out of the last answer."""

    def age_s(self, now: float) -> float | None:
        """Return how old its figures are, None before the first."""
        return None if self.collected_s is None else max(0.0, now - self.collected_s)


class Statistics(NamedTuple):
    """What a store holds, and what happened in it."""

    n_sandboxes: int
    n_up: int
    n_series: int
    n_families: int
    conflicts: Mapping[str, int]
    """By family, how many sandboxes' figures are left out of what is shown now."""
    n_rounds: int
    n_unchanged: int
    n_failed: int
    n_expired: int
    """How often a sandbox's figures were let go of because it failed too long."""
    n_late: int
    """What came for sandboxes that were gone."""


class Store:
    """All sandboxes of an agent.

    Args:
        now: A clock in seconds that never goes back: the loop's `time`.
        keep_rounds: Failed rounds over which a sandbox's last figures are shown.
        container_labels: Which labels the families under cAdvisor's names begin with.
        resource: Makes of a sandbox what /metrics/resource shows.
        epoch: A word that no other run of the agent has, for `View.tag`.
    """

    def __init__(
        self,
        now: Callable[[], float],
        *,
        keep_rounds: int = 2,
        container_labels: Callable[[str, Pod | None], Labels] = cadvisor_labels,
        resource: Callable[[Entry], Families] | None = None,
        epoch: str = "",
    ) -> None:
        self.generation = 0
        """Changes with what views show."""
        self.demand = Demand(now)
        self._now = now
        self._keep_rounds = keep_rounds
        self._container_labels = container_labels
        self._resource = resource
        self._epoch = epoch
        self._entries: dict[str, Entry] = {}
        self._ordered: list[Entry] = []
        self._kata = Census()
        self._containers = Census()
        self._found: dict[tuple[str, str], Sequence[Entry]] = {}
        """By namespace and pod, who is in them: until a sandbox comes, goes or becomes another's."""
        self._helps: dict[bytes, bytes] = {}
        self._shapes: WeakValueDictionary[Pairs, Shape] = WeakValueDictionary()
        self._n_rounds = self._n_unchanged = self._n_failed = self._n_expired = self._n_late = 0
        self.merged: Histograms | None = None
        """What is shown once for all sandboxes, beside their families."""

    # --- which sandboxes there are --------------------------------------------------------------------------------------------------

    def add(self, target: Target) -> Entry:
        """Return the entry of a sandbox, made anew if there is none: what is known of one that is there is never overwritten."""
        entry = self._entries.get(target.id)
        if entry is None:
            entry = self._entries[target.id] = Entry(target, self._now())
            insort(self._ordered, entry, key=_BY_ID)
            self._found.clear()
            self._show(entry)
        return entry

    def remove(self, identifier: str) -> bool:
        """Let go of a sandbox and all its figures; return whether it was there."""
        entry = self._entries.pop(identifier, None)
        if entry is None:
            return False
        del self._ordered[bisect_left(self._ordered, identifier, key=_BY_ID)]
        self._found.clear()
        self._keep(entry, _NONE, _NONE)
        self.generation += 1
        return True

    def get(self, identifier: str) -> Entry | None:
        """Return the entry of a sandbox, None if there is none."""
        return self._entries.get(identifier)

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries in the order of their ids."""
        return tuple(self._ordered)

    def wanted(self, query: Query) -> Sequence[Entry]:
        """Return the entries that a query is about, in the order of their ids.

        Raises:
            NotFound: There is no such sandbox.
        """
        if query.sandbox:
            entry = self._entries.get(query.sandbox)
            if entry is None:
                raise NotFound("sandbox", query.sandbox, "GET /sandboxes lists those there are")
            return _of_pods((entry,), query)
        if not (query.namespace or query.pod):
            return self._ordered
        key = (query.namespace, query.pod)
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= FOUND_MAX:
                self._found.clear()
            found = self._found[key] = _of_pods(self._ordered, query)
        return found

    # --- what is known of them ------------------------------------------------------------------------------------------------------

    def describe(self, identifier: str, pod: Pod | None) -> bool:
        """Take in whose a sandbox is; the labels of what is kept of it are exchanged.

        Returns:
            Whether it is there and was another's, or nobody's, before.
        """
        entry = self._entries.get(identifier)
        if entry is None or entry.pod == pod:
            return False
        old, entry.pod = entry.pod, pod
        self._found.clear()
        before, entry.begun = entry.begun, _begun(identifier, pod)
        families = _exchanged(entry.families, before.labels, entry.begun.labels)
        labels = self._container_labels
        containers = _exchanged(entry.containers, labels(identifier, old), labels(identifier, pod))
        self._keep(entry, families, containers)
        self._show(entry)
        return True

    def replace(
        self,
        identifier: str,
        families: Families,
        *,
        containers: Families = _NONE,
        n_bytes: int = 0,
        took_s: float = 0.0,
        dropped: Mapping[str, int] | None = None,
        raw: bytes | None = None,
    ) -> bool:
        """Take a round of a sandbox in, in place of the one before.

        Fragments that say what the ones before said are kept instead, with what was made of them for codings.

        Args:
            identifier: The sandbox.
            families: Its kata_* families.
            containers: Its families under cAdvisor's names.
            n_bytes: The size of the shim's answer.
            took_s: How long the shim took.
            dropped: Lines left out, by reason.
            raw: The shim's answer, if it is to be kept.

        Returns:
            False if the sandbox is gone.
        """
        entry = self._entries.get(identifier)
        if entry is None:
            self._n_late += 1
            return False
        self._confirm(entry, took_s)
        entry.n_bytes = n_bytes
        entry.raw = raw
        entry.tally = dict(dropped or {})
        for reason, n in entry.tally.items():
            entry.dropped[reason] = entry.dropped.get(reason, 0) + n
        kata, is_same = self._reuse(families, entry.families)
        cadvisor, is_same_too = self._reuse(containers, entry.containers)
        if not (is_same and is_same_too):
            before = entry.rows
            self._keep(entry, kata, cadvisor)
            for coding in codings.KEPT:
                if self.demand.is_wanted(coding):
                    for row, old in zip(entry.rows, before, strict=True):
                        codings.prepare(row, coding, old)
            self._show(entry)
        return True

    def touch(self, identifier: str, took_s: float) -> bool:
        """Take in that a sandbox's shim said the same again; return False if the sandbox is gone."""
        entry = self._entries.get(identifier)
        if entry is None:
            self._n_late += 1
            return False
        self._n_unchanged += 1
        self._confirm(entry, took_s)
        for reason, n in entry.tally.items():
            entry.dropped[reason] = entry.dropped.get(reason, 0) + n
        return True

    def fail(self, identifier: str, error: str, took_s: float) -> bool:
        """Take in that a round of a sandbox failed.

        Args:
            identifier: The sandbox.
            error: The class of the failure.
            took_s: How long it took to fail.

        Returns:
            False if the sandbox is gone.
        """
        entry = self._entries.get(identifier)
        if entry is None:
            self._n_late += 1
            return False
        self._n_failed += 1
        entry.up = False
        entry.error = error
        entry.took_s = took_s
        entry.n_failures += 1
        if entry.n_failures > self._keep_rounds and (entry.families or entry.containers):
            self._n_expired += 1
            entry.raw = None
            self._keep(entry, _NONE, _NONE)
            self._show(entry)
        return True

    # --- what is shown --------------------------------------------------------------------------------------------------------------

    def view(self, query: Query, own: Families | Told = _NONE) -> View:
        """Return what a scrape shows: it stays as it is now.

        Args:
            query: What is wanted.
            own: The agent's own families; prefixes and selectors hold for them too.

        Raises:
            NotFound: There is no such sandbox.
            InvalidArgument: A selector is malformed.
        """
        entries: Sequence[Entry] = self._ordered
        counts = [self._kata.counts, self._containers.counts]
        shared: list[Block] = []
        n_changes = 0
        is_part = bool(query.sandbox or query.namespace or query.pod)
        if is_part:
            entries = self.wanted(query)
        kata = _blocks(entries, 0, has_begun=bool(query.matches)) if query.view in {"all", "kata"} else []
        containers = _blocks(entries, 1) if query.view in {"all", "cadvisor"} else []
        if query.view == "resource" and self._resource is not None:
            containers = [self._of_resource(entry) for entry in newest(entries)]
            is_part = True
        if is_part:
            counts = [count(kata), count(containers)]
        censuses = [counts[0] if kata else {}, counts[1] if containers else {}]
        if self.merged is not None and not is_part and query.view in {"all", "kata"}:
            merged, n_each = self.merged.block()
            shared, n_changes = [merged], self.merged.n_changes
            censuses.append(n_each)
        return make_view(
            query,
            own if isinstance(own, Told) else Told(own),
            blocks=[*shared, *kata, *containers],
            censuses=censuses,
            n_sandboxes=len(entries),
            generation=self.generation,
            tag=(self._epoch, n_changes, *([entry.version for entry in entries] if is_part else ["all", self.generation])),
            demand=self.demand,
        )

    def statistics(self) -> Statistics:
        """Return what it holds and what happened in it."""
        entries = self._ordered
        return Statistics(
            n_sandboxes=len(entries),
            n_up=sum(entry.up for entry in entries),
            n_series=sum(entry.n_series for entry in entries),
            n_families=len({**self._kata.counts, **self._containers.counts}),
            conflicts=self.view(Query()).conflicts,
            n_rounds=self._n_rounds,
            n_unchanged=self._n_unchanged,
            n_failed=self._n_failed,
            n_expired=self._n_expired,
            n_late=self._n_late,
        )

    # --- inside ---------------------------------------------------------------------------------------------------------------------

    def _of_resource(self, entry: Entry) -> Block:
        if entry.resource is None:
            assert self._resource is not None
            entry.resource = block_of(self._resource(entry))
        return entry.resource

    def _confirm(self, entry: Entry, took_s: float) -> None:
        self._n_rounds += 1
        entry.n_rounds += 1
        entry.up = True
        entry.error = ""
        entry.n_failures = 0
        entry.took_s = took_s
        entry.collected_s = self._now()

    def _reuse(self, families: Families, before: Families) -> tuple[Families, bool]:
        """Return families with the fragments of before where these say the same, and whether all of them do."""
        n_same = 0
        made: Families = {}
        for name, fragment in families.items():
            old = before.get(name)
            if old is fragment or (old is not None and _says_same(fragment, old)):
                made[name] = old
                n_same += 1
            else:
                fragment.help = self._one_help(fragment.help)
                made[name] = fragment
        return made, n_same == len(families) == len(before)

    def _one_help(self, text: bytes) -> bytes:
        """Return the one copy of a help: a thousand sandboxes say the same."""
        known = self._helps.get(text)
        if known is None:
            if len(text) > HELP_BYTES_MAX:
                return text
            if len(self._helps) >= HELPS_MAX:
                self._helps.clear()
            known = self._helps[text] = text
        return known

    def _keep(self, entry: Entry, families: Families, containers: Families) -> None:
        """Exchange an entry's families, and what is counted of them."""
        entry.families = families
        entry.containers = containers
        entry.resource = None
        entry.n_series = sum(each.n_series for part in (families, containers) for each in part.values())
        kata, cadvisor = entry.rows
        entry.rows = (_row(families, kata), _row(containers, cadvisor))
        before, shapes = entry.shapes, (self._one_shape(families), self._one_shape(containers))
        entry.shapes = shapes
        for census, old, new in zip((self._kata, self._containers), before, shapes, strict=True):
            if old is not new:
                census.add(new.pairs)
                census.remove(old.pairs)

    def _one_shape(self, families: Families) -> Shape:
        """Return the one object for the families that a sandbox has: most have the same."""
        pairs = pairs_of(families)
        known = self._shapes.get(pairs)
        if known is None:
            known = self._shapes[pairs] = Shape(pairs)
        return known

    def _show(self, entry: Entry) -> None:
        """Say that what is shown of an entry is new."""
        self.generation += 1
        entry.version = self.generation


def _blocks(entries: Sequence[Entry], which: int, *, has_begun: bool = False) -> list[Block]:
    """Return the families of sandboxes, those of one shape together: the first of `rows`, or the second."""
    shapes = [entry.shapes[which] for entry in entries]
    if shapes.count(shapes[0] if shapes else _EMPTY) == len(shapes):  # as mostly: that is seen at a glance
        found: Mapping[Shape, Sequence[Entry]] = {shapes[0]: entries} if shapes else {}
    else:
        found = _by_shape(entries, which)
    return [
        Block(shape, [entry.rows[which] for entry in each], [entry.begun for entry in each] if has_begun else ())
        for shape, each in found.items()
        if shape.pairs
    ]


def _by_shape(entries: Sequence[Entry], which: int) -> Mapping[Shape, Sequence[Entry]]:
    found: dict[Shape, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.shapes[which], []).append(entry)
    return found


def _of_pods(entries: Sequence[Entry], query: Query) -> list[Entry]:
    """Return the entries of a namespace and of pods of a name; an empty word is any."""
    found = list(entries)
    if query.namespace:
        found = [entry for entry in found if entry.pod is not None and entry.pod.namespace == query.namespace]
    if query.pod:
        found = [entry for entry in found if entry.pod is not None and entry.pod.name == query.pod]
    return found


def _row(families: Families, before: Row) -> Row:
    """Return families as a row: the one of before, with what is packed of it, if it has the same fragments."""
    fragments = tuple(families.values())
    return before if fragments == before.fragments else Row(fragments)


def _begun(identifier: str, pod: Pod | None) -> Begun:
    labels = kata_labels(identifier, pod)
    return Begun(labels, block(labels))


def _says_same(one: Fragment, other: Fragment) -> bool:
    return one.text == other.text and one.kind == other.kind and one.help == other.help and one.open_text == other.open_text


def _exchanged(families: Families, old: Labels, new: Labels) -> Families:
    if old == new:
        return families
    made: Families = {}
    for name, each in families.items():
        open_text = None if each.open_text is None else exchange(each.open_text, old, new)
        made[name] = Fragment(each.kind, each.help, exchange(each.text, old, new), each.n_series, open_text)
    return made
