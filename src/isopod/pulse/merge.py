"""Merge: the families of many sandboxes as the groups of one exposition: each name once, of one kind, in the order of names.

Nothing is copied: a group says where its fragments stand; sandboxes that have the same families stand together, as blocks, and a family
of a block is a column of it. Which kind a name has is settled for a whole answer before its first byte:

1. the agent's own families have the kind that the agent gives them;
2. a name in KNOWN has that kind, if any sandbox gives it so;
3. else the kind that most sandboxes give it, of several the first in the order of their names.

Fragments of another kind are left out and counted: a mixed group would be refused whole by who reads it. The same holds for families whose
lines would bear one name: beside a histogram `x` there can be no family `x_count`, `x_sum` or `x_bucket`, beside a summary `x` no `x_count`
or `x_sum`; the one that more sandboxes have stays, of equals the one with parts.

Source: the text format's rule of one group per name; OpenMetrics 1.0 (MetricFamily names must not clash).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from isopod.pulse.model import Families, Fragment, Kind, Labels, Row

KNOWN: Final[Mapping[str, Kind]] = {
    "kata_agent_scrape_count": "counter",
    "kata_hypervisor_scrape_count": "counter",
    "kata_guest_cpu_time": "gauge",
    "kata_guest_diskstat": "gauge",
    "kata_guest_load": "gauge",
    "kata_guest_meminfo": "gauge",
    "kata_guest_netdev_stat": "gauge",
    "kata_guest_tasks": "gauge",
    "kata_guest_vm_stat": "gauge",
    "kata_shim_agent_rpc_durations_histogram_milliseconds": "histogram",
    "kata_shim_rpc_durations_histogram_milliseconds": "histogram",
}
"""What Kata's shims and agents say these are, which dashboards are written for."""
PARTS: Final[Mapping[Kind, tuple[str, ...]]] = {"histogram": ("_bucket", "_count", "_sum"), "summary": ("_count", "_sum")}
"""What stands behind a family's name in the names of its lines."""

Pairs = tuple[tuple[str, Kind], ...]
Counts = dict[str, dict[Kind, int]]


class Run(NamedTuple):
    """One column of some rows."""

    rows: Sequence[Row]
    column: int


Part = Run | Fragment
"""Of a family: what is kept with its row, or a fragment that is nobody's: made for one answer."""


class Group(NamedTuple):
    """One family of an answer."""

    name: str
    kind: Kind
    help: bytes
    parts: Sequence[Part]

    @property
    def fragments(self) -> list[Fragment]:
        """What stands in it."""
        found: list[Fragment] = []
        for part in self.parts:
            if isinstance(part, Fragment):
                found.append(part)
            else:
                column = part.column
                found += [row.fragments[column] for row in part.rows]
        return found


class Plan(NamedTuple):
    """Which families an answer has.

    Args:
        kinds: Their kinds, in the order of names.
        conflicts: By family, how many sandboxes' fragments are left out, because theirs is of another kind or its name clashes.
    """

    kinds: Mapping[str, Kind]
    conflicts: Mapping[str, int]


class Begun(NamedTuple):
    """What all lines of a sandbox begin with: labels, and the same as they stand behind the brace."""

    labels: Labels
    block: bytes


NOTHING: Final = Begun((), b"")


class Shape:
    """Which families a sandbox has, of which kinds: one object for all sandboxes that have the same.

    Args:
        pairs: Their names and kinds, in the order of names.
    """

    __slots__ = ("__weakref__", "index", "pairs")

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.index = {name: number for number, (name, _) in enumerate(pairs)}


class Block(NamedTuple):
    """The families of sandboxes of one shape. A family of theirs is a column: to take it costs no look for its name.

    Args:
        shape: What all of them have.
        rows: By sandbox, its fragments in the order of the shape.
        begun: By sandbox, what all its lines begin with; empty if they do not all begin alike, or nobody needs to know.
        is_kept: Whether the rows outlast the answer, so that what is packed of them is worth keeping.
    """

    shape: Shape
    rows: Sequence[Row]
    begun: Sequence[Begun] = ()
    is_kept: bool = True


class Told(NamedTuple):
    """What the agent says of itself in an answer.

    Args:
        families: Made for the answer.
        blocks: More families, of which none is among those; in part kept from answer to answer.
    """

    families: Families
    blocks: Sequence[Block] = ()

    @property
    def kinds(self) -> dict[str, Kind]:
        """Of all of them."""
        return {**{name: each.kind for name, each in self.families.items()}, **{n: kind for b in self.blocks for n, kind in b.shape.pairs}}


class Census:
    """Which families there are among sandboxes, and how many have them: kept up to date, so that an answer need not ask all of them."""

    def __init__(self) -> None:
        self.counts: Counts = {}

    def add(self, pairs: Pairs, n_sandboxes: int = 1) -> None:
        """Count the families of sandboxes of one shape."""
        counts = self.counts
        for name, kind in pairs:
            kinds = counts.get(name)
            if kinds is None:
                counts[name] = {kind: n_sandboxes}
            else:
                kinds[kind] = kinds.get(kind, 0) + n_sandboxes

    def remove(self, pairs: Pairs) -> None:
        """Forget what was counted with `add`."""
        for name, kind in pairs:
            kinds = self.counts[name]
            kinds[kind] -= 1
            if not kinds[kind]:
                del kinds[kind]
                if not kinds:
                    del self.counts[name]


def pairs_of(families: Families) -> Pairs:
    """Return which families these are."""
    return tuple([(name, fragment.kind) for name, fragment in families.items()])


def block_of(families: Families, *, is_kept: bool = True) -> Block:
    """Return families as a block of one row."""
    return Block(Shape(pairs_of(families)), (Row(tuple(families.values())),), is_kept=is_kept)


def count(blocks: Iterable[Block]) -> Counts:
    """Return which families there are in blocks, and how often."""
    census = Census()
    for block in blocks:
        census.add(block.shape.pairs, len(block.rows))
    return census.counts


def plan(censuses: Iterable[Counts], own: Mapping[str, Kind]) -> Plan:
    """Settle which families an answer has.

    Args:
        censuses: What sandboxes have.
        own: The agent's own families, and their kinds.
    """
    merged: Counts = {}
    for counts in censuses:
        for name, kinds in counts.items():
            known = merged.get(name)
            merged[name] = dict(kinds) if known is None else {k: known.get(k, 0) + kinds.get(k, 0) for k in sorted({**known, **kinds})}
    totals = {name: sum(kinds.values()) for name, kinds in merged.items()}
    chosen: dict[str, Kind] = {}
    conflicts: dict[str, int] = {}
    for name in sorted({**merged, **own}):
        kinds = merged.get(name, {})
        kind = own[name] if name in own else _kind(name, kinds)
        chosen[name] = kind
        n_lost = totals.get(name, 0) - kinds.get(kind, 0)
        if n_lost:
            conflicts[name] = n_lost
    for name in _clashing(chosen, merged, own):
        del chosen[name]
        conflicts[name] = totals.get(name, 0)
    return Plan(chosen, conflicts)


def groups(chosen: Plan, blocks: Sequence[Block]) -> Iterator[Group | None]:
    """Iterate over an answer's families."""
    for name, kind in chosen.kinds.items():
        parts: list[Part] = []
        for block in blocks:
            column = block.shape.index.get(name)
            if column is not None and block.shape.pairs[column][1] == kind:
                parts += [Run(block.rows, column)] if block.is_kept else [row.fragments[column] for row in block.rows]
        if parts:
            yield Group(name, kind, first_help(parts), parts)


def first_help(parts: Iterable[Part]) -> bytes:
    """Return the first help of these that says something."""
    for part in parts:
        fragments = (part,) if isinstance(part, Fragment) else (row.fragments[part.column] for row in part.rows)
        found = next((fragment.help for fragment in fragments if fragment.help), b"")
        if found:
            return found
    return b""


def _kind(name: str, kinds: Mapping[Kind, int]) -> Kind:
    known = KNOWN.get(name)
    if known is not None and known in kinds:
        return known
    return min(kinds, key=lambda kind: (-kinds[kind], kind))


def _clashing(chosen: Mapping[str, Kind], counts: Counts, own: Mapping[str, Kind]) -> list[str]:
    """Return the families that must go because their lines would bear the names of another's."""
    lost: dict[str, None] = {}
    for name, kind in chosen.items():
        for suffix in PARTS.get(kind, ()):
            other = name + suffix
            if other not in chosen or name in lost or other in lost:
                continue
            if other in own or (name not in own and counts[name].get(kind, 0) < counts[other].get(chosen[other], 0)):
                lost[name] = None
            else:
                lost[other] = None
    return list(lost)
