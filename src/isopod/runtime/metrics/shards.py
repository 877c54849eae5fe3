"""The metrics of all shards of a node, read by any of them from the pages in their folder.

Nobody is asked: a scrape maps the pages it has not seen yet and reads cells. A shard that died leaves its pages, and they go on counting
(so that sums do not fall) beside those of its next life; its gauges stop counting as soon as a newer life has pages. `retire` melts the
pages of past lives into one, so that a shard which restarts often does not fill the folder.

Files that are no pages, damaged ones, and ones that vanish are left out and counted in `Snapshot.n_damaged`; a scrape never fails.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from isopod.runtime.metrics.model import Snapshot
from isopod.runtime.metrics.page import (
    FLAG_RETIRED,
    PAGE_BYTES_MIN,
    Entry,
    PageKey,
    PageReader,
    PageWriter,
    page_head,
    page_name,
    parse_page_name,
)
from isopod.runtime.metrics.plan import Plan, Source
from isopod.world.pages import Page, Pages

PAGES_MAX: Final = 4096
"""So many pages are read; more is a defect of whoever makes them."""
_RETIRED_NUMBER: Final = 999_999
"""The page number of retired lives: no live shard has so many pages."""


class _Mapped(NamedTuple):
    page: Page
    reader: PageReader


def next_generation(pages: Pages, folder: str, shard: int) -> int:
    """Return the number of a shard's next life: one more than any page in the folder has."""
    keys = [key for key in map(parse_page_name, pages.names(folder)) if key is not None and key.shard == shard]
    return max((key.generation for key in keys), default=-1) + 1


class ShardMetrics:
    """Reads the pages of all shards. Who makes it closes it.

    Args:
        pages: The port.
        folder: Where the shards' registries have their home.
        by_shard: Whether every series keeps its shard as a label (`shard="0"`); else only those declared so, and the others are merged
            as their family says.
    """

    def __init__(self, pages: Pages, folder: str, *, by_shard: bool = False) -> None:
        self._pages = pages
        self._folder = folder
        self._by_shard = by_shard
        self._mapped: dict[PageKey, _Mapped] = {}
        self._plan: Plan | None = None
        self._order: list[PageKey] = []
        self._n_unreadable = 0

    def snapshot(self, at_ns: int = 0) -> Snapshot:
        """Return the values of all shards now.

        Args:
            at_ns: The moment, wall time, for whoever keeps it.
        """
        self._refresh()
        plan = self._plan
        if plan is None:
            plan = self._plan = self._make_plan()
        cells: list[float] = []
        for key in self._order:
            cells += self._mapped[key].reader.values()
        n_damaged = self._n_unreadable + sum(mapped.reader.is_damaged for mapped in self._mapped.values())
        return Snapshot(at_ns, plan.layout, plan.values(cells), n_damaged)

    def shards(self) -> tuple[int, ...]:
        """Return the numbers of the shards that have pages, rising."""
        return tuple(sorted({key.shard for key in self._mapped}))

    def retire(self, shard: int, *, before: int) -> int:
        """Melt the pages of a shard's lives before generation `before` into one page of sums, and remove them. For the supervisor alone.

        The page of sums says which lives it covers, and appears whole: at no moment is anything counted twice or not at all.

        Returns:
            How many pages were removed.
        """
        self._refresh()
        old = [key for key in sorted(self._mapped) if key.shard == shard and key.generation < before]
        if len(old) < 2:
            return 0
        last = old[-1].generation
        body = _melt([self._mapped[key].reader for key in self._counted() if key in old], shard=shard, generation=last)
        self._pages.create(self._path(PageKey(shard, last, _RETIRED_NUMBER)), len(body), body).close()
        doomed = [key for key in old if key != PageKey(shard, last, _RETIRED_NUMBER)]
        for key in doomed:
            self._pages.remove(self._path(key))
            self._forget(key)
        return len(doomed)

    def close(self) -> None:
        """Give the mappings back."""
        for key in list(self._mapped):
            self._forget(key)

    def _counted(self) -> list[PageKey]:
        """Return the pages that count, in order: not those whose sums are on a page of retired lives."""
        covered: dict[int, int] = {}
        for key in sorted(self._mapped):
            if self._mapped[key].reader.head.flags & FLAG_RETIRED:
                covered[key.shard] = key.generation
        return [
            key
            for key in sorted(self._mapped)
            if key.generation > covered.get(key.shard, -1)
            or (key.generation == covered[key.shard] and self._mapped[key].reader.head.flags & FLAG_RETIRED)
        ]

    def _make_plan(self) -> Plan:
        self._order = self._counted()
        latest = {key.shard: key.generation for key in self._order}
        sources = []
        base = 0
        for key in self._order:
            reader = self._mapped[key].reader
            sources.append(Source(reader.entries, base, key.shard, key.generation == latest[key.shard]))
            base += reader.n_cells_used
        return Plan(sources, by_shard=self._by_shard)

    def _path(self, key: PageKey) -> str:
        return f"{self._folder}/{page_name(*key)}"

    def _forget(self, key: PageKey) -> None:
        self._mapped.pop(key).page.close()
        self._plan = None

    def _refresh(self) -> None:
        """Map new pages, forget removed ones, read new entries."""
        self._n_unreadable = 0
        keys = [key for key in map(parse_page_name, self._pages.names(self._folder)) if key is not None][:PAGES_MAX]
        present = frozenset(keys)
        for key in [key for key in self._mapped if key not in present]:
            self._forget(key)
        for key in keys:
            if key not in self._mapped:
                self._map(key)
        for mapped in self._mapped.values():
            if mapped.reader.refresh():
                self._plan = None

    def _map(self, key: PageKey) -> None:
        try:
            page = self._pages.open(self._path(key))
        except OSError:
            self._n_unreadable += 1
            return
        try:
            reader = PageReader(page.view)
        except ValueError:
            page.close()
            self._n_unreadable += 1
            return
        self._mapped[key] = _Mapped(page, reader)
        self._plan = None


def _melt(readers: Sequence[PageReader], *, shard: int, generation: int) -> bytes:
    """Return a page with the sums of all counters and histograms of some pages. Gauges ended with the process that set them."""
    sums: dict[tuple[object, ...], tuple[Entry, list[float]]] = {}
    for reader in readers:
        values = reader.values()
        for entry in reader.entries:
            if entry.kind != "gauge":
                own = values[entry.cell : entry.cell + entry.n_cells]
                _, total = sums.setdefault((entry.kind, entry.name, entry.labels, entry.bounds), (entry, [0.0] * entry.n_cells))
                total[:] = [a + b for a, b in zip(total, own, strict=True)]
    n_bytes = PAGE_BYTES_MIN
    while (packed := _packed(list(sums.values()), n_bytes, shard=shard, generation=generation)) is None:
        n_bytes *= 2
    return packed


def _packed(sums: Sequence[tuple[Entry, list[float]]], n_bytes: int, *, shard: int, generation: int) -> bytes | None:
    """Return a page of `n_bytes` with these series, None if it is too small."""
    head = page_head(n_bytes, shard=shard, generation=generation, flags=FLAG_RETIRED)
    body = bytearray(head.ljust(n_bytes, b"\0"))
    writer = PageWriter(memoryview(body))
    for entry, total in sums:
        cells = writer.add(entry)
        if cells is None:
            return None
        for index, value in enumerate(total):
            cells[index] = value
    return bytes(body)
