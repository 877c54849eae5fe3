"""From cells to a snapshot: which cells make up which value, worked out once for as long as no series is added.

Several cells may belong to one value: cells of threads, of shards, of a shard's earlier lives. A plan gathers one cell for each value in
one C call, then mends the few values that need more: merged ones, and histograms, whose counts become cumulative.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Final, NamedTuple

from isopod.runtime.metrics.model import SHARD_LABEL, Aggregation, Family, Layout, Series
from isopod.runtime.metrics.page import Entry


class Source(NamedTuple):
    """A page's part in a plan."""

    entries: Sequence[Entry]
    base: int
    """Where the page's cells begin among the cells of all pages."""
    shard: int
    is_live: bool
    """Whether its gauges count: those of a shard's earlier lives do not."""


class Plan:
    """Turns the cells of some pages into the values of a layout. Pages' entries must not contradict each other: the first one of a name
    decides its kind, bounds and help; entries that disagree are left out and counted in `n_refused`.

    Args:
        sources: The pages, shards in rising order.
        by_shard: Whether every series keeps its shard as a label, whatever its family says; None: no series does.
    """

    __slots__ = ("_gather", "_histograms", "_merges", "layout", "n_refused")

    def __init__(self, sources: Sequence[Source], *, by_shard: bool | None = False) -> None:
        self.n_refused = 0
        families = self._collect(sources, by_shard=by_shard)
        cells: list[int] = []
        self._merges: Final[list[tuple[int, Aggregation, tuple[int, ...]]]] = []
        self._histograms: Final[list[tuple[int, int]]] = []
        made: list[Family] = []
        for first, members in families.values():
            series = []
            for labels, owned in members.items():
                series.append(Series(labels, len(cells)))
                self._place(first, owned, cells)
            made.append(Family(first.name, first.kind, first.help, first.unit, first.bounds, tuple(series)))
        self.layout = Layout(tuple(made), len(cells))
        # itemgetter of one index returns no tuple.
        self._gather: Callable[[Sequence[float]], tuple[float, ...]] = itemgetter(*cells) if len(cells) > 1 else _few(cells)

    def values(self, cells: Sequence[float]) -> tuple[float, ...]:
        """Return the layout's values.

        Args:
            cells: The cells of all pages, one after another as the sources' bases say.
        """
        gathered = self._gather(cells)
        if not self._merges and not self._histograms:
            return gathered
        values = list(gathered)
        for at, how, owned in self._merges:
            values[at] = _merge(how, [cells[cell] for cell in owned])
        for at, n_counts in self._histograms:
            values[at : at + n_counts] = accumulate(values[at : at + n_counts])
            values[at + n_counts + 1] = values[at + n_counts - 1]
        return tuple(values)

    def _collect(
        self, sources: Sequence[Source], *, by_shard: bool | None
    ) -> dict[str, tuple[Entry, dict[tuple[tuple[str, str], ...], list[int]]]]:
        """Return for each family its first entry, and for each of its series the first cells of all runs that make it up."""
        families: dict[str, tuple[Entry, dict[tuple[tuple[str, str], ...], list[int]]]] = {}
        for source in sources:
            for entry in source.entries:
                if entry.kind == "gauge" and not source.is_live:
                    continue
                first, members = families.setdefault(entry.name, (entry, {}))
                if (first.kind, first.bounds) != (entry.kind, entry.bounds):
                    self.n_refused += 1
                    continue
                labels = entry.labels
                if by_shard or (by_shard is not None and entry.aggregation == "shard"):
                    labels = (*labels, (SHARD_LABEL, str(source.shard)))
                members.setdefault(labels, []).append(source.base + entry.cell)
        return families

    def _place(self, first: Entry, owned: Sequence[int], cells: list[int]) -> None:
        """Append the cells of one series; note what must be mended."""
        at = len(cells)
        cells.extend(range(owned[0], owned[0] + first.n_cells))
        if first.kind == "histogram":
            cells.append(owned[0])  # the place of the count
            self._histograms.append((at, len(first.bounds) + 1))
        if len(owned) > 1:
            how: Aggregation = first.aggregation if first.kind == "gauge" else "sum"
            self._merges.extend((at + index, how, tuple(begin + index for begin in owned)) for index in range(first.n_cells))


def _few(cells: Sequence[int]) -> Callable[[Sequence[float]], tuple[float, ...]]:
    """Return what itemgetter is for more than one index."""
    return lambda values: tuple(values[cell] for cell in cells)


def _merge(how: Aggregation, values: Sequence[float]) -> float:
    match how:
        case "max":
            return max(values)
        case "min":
            return min(values)
        case "last":
            return values[-1]
    return sum(values)
