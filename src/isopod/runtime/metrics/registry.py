"""The registry of one shard: hands out instruments and takes snapshots.

Values live on pages (`isopod.runtime.metrics.page`). With a `home` the pages are mapped files, which every process on the machine can read
(`isopod.runtime.metrics.shards`); without one they are plain memory: the same code, for tests, tools and programs of one process.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple, TypeVar

import msgspec

from isopod.runtime.metrics.instruments import (
    Counter,
    Gauge,
    Histogram,
    M,
    Metric,
    ThreadSafeCounter,
    ThreadSafeGauge,
    ThreadSafeHistogram,
)
from isopod.runtime.metrics.model import BUCKETS_S, SERIES_MAX, Aggregation, Kind, Sample, Snapshot, unit_of
from isopod.runtime.metrics.page import PAGE_BYTES_MAX, PAGE_BYTES_MIN, Entry, PageWriter, page_head, page_name
from isopod.runtime.metrics.plan import Plan, Source
from isopod.runtime.metrics.text import PrometheusText
from isopod.world.pages import Page, Pages

HELP_CHARS_MAX: Final = 1024
LABEL_CHARS_MAX: Final = 4096
"""The longest value of a label: an entry must fit on a page."""
BOUNDS_MAX: Final = 256
S = TypeVar("S", ThreadSafeCounter, ThreadSafeGauge, ThreadSafeHistogram)
_FIRST: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_REST: Final = _FIRST | frozenset("0123456789")


class Home(NamedTuple):
    """Where a shard's pages are, and whose they are."""

    pages: Pages
    folder: str
    """Absolute; best on a tmpfs."""
    shard: int = 0
    generation: int = 0
    """Counts the lives of this shard: higher than any of its pages still in the folder (`shards.next_generation`)."""


class _Family:
    """What all series of one name have in common."""

    __slots__ = ("bounds", "help", "kind", "label_names", "series")

    def __init__(self, help_text: str, kind: Kind, label_names: tuple[str, ...], bounds: tuple[float, ...]) -> None:
        self.help = help_text
        self.kind = kind
        self.label_names = label_names
        self.bounds = bounds
        self.series: dict[tuple[str, ...], object] = {}


class _Declared(NamedTuple):
    unit: str | None = None
    aggregation: Aggregation = "sum"


class Registry:
    """The metrics of one shard, in the order they were asked for.

    Args:
        home: Where other processes find them; None keeps them in this one. Who makes a registry with a home closes it.
    """

    def __init__(self, home: Home | None = None) -> None:
        self._home = home
        self._families: dict[str, _Family] = {}
        self._declared: dict[str, _Declared] = {}
        self._n_series = 0
        self._writers: list[PageWriter] = []
        self._entries: list[list[Entry]] = []
        self._mapped: list[Page] = []
        self._plan: Plan | None = None
        self._text = PrometheusText()
        self._hooks: list[Callable[[], None]] = []
        self.n_unshared_pages = 0
        """Pages that could not be mapped: this process sees their series, others do not."""
        self._lock: AbstractContextManager[object] = nullcontext() if home is None else home.pages.lock()

    # --- instruments ----------------------------------------------------------------------------------------------------

    def counter(self, name: str, help_text: str, /, **labels: str) -> Counter:
        """Return the counter of that name and labels, made on first sight.

        Args:
            name: Ends in `_total`.
            help_text: One line.
            **labels: Fixed for this series.

        Raises:
            ValueError: A malformed name, one known with another kind, help or label names, or too many series.
        """
        return self._series(Counter, self._entry("counter", name, help_text, labels))

    def gauge(self, name: str, help_text: str, /, **labels: str) -> Gauge:
        """Return the gauge of that name and labels, made on first sight. Raises as `counter`."""
        return self._series(Gauge, self._entry("gauge", name, help_text, labels))

    def histogram(self, name: str, help_text: str, /, bounds: Sequence[float] = BUCKETS_S, **labels: str) -> Histogram:
        """Return the histogram of that name and labels, made on first sight. Raises as `counter`.

        Args:
            name: Ends in its unit (`_seconds`).
            help_text: One line.
            bounds: Rising upper bounds, equal for the whole family; at most 256.
            **labels: Fixed for this series.
        """
        return self._series(Histogram, self._entry("histogram", name, help_text, labels, bounds=bounds))

    def threadsafe_counter(self, name: str, help_text: str, /, **labels: str) -> ThreadSafeCounter:
        """Return a counter that any thread may increment. Raises as `counter`, and without a home: threads are told apart by its port."""
        entry = self._entry("counter", name, help_text, labels)
        return self._shared(ThreadSafeCounter, entry)

    def threadsafe_gauge(self, name: str, help_text: str, /, **labels: str) -> ThreadSafeGauge:
        """Return a gauge that any thread may raise and lower; it must be declared as a sum (or per shard). Raises as the counter does."""
        entry = self._entry("gauge", name, help_text, labels)
        if entry.aggregation not in ("sum", "shard"):
            raise ValueError(f"gauge {name}: a sum over threads cannot be declared as {entry.aggregation}")
        return self._shared(ThreadSafeGauge, entry)

    def threadsafe_histogram(self, name: str, help_text: str, /, bounds: Sequence[float] = BUCKETS_S, **labels: str) -> ThreadSafeHistogram:
        """Return a histogram that any thread may observe into. Raises as the counter does."""
        entry = self._entry("histogram", name, help_text, labels, bounds=bounds)
        return self._shared(ThreadSafeHistogram, entry)

    def declare(self, name: str, /, *, unit: str | None = None, aggregation: Aggregation = "sum") -> None:
        """Say more about a family, before its first series is asked for.

        Args:
            name: The family's.
            unit: Its unit; by default the base unit at the end of its name.
            aggregation: How the shards' gauges become one ("sum", "max", "min", "last"), or "shard" to keep each with a label `shard`.

        Raises:
            ValueError: The family has series already, and was declared otherwise.
        """
        fresh = _Declared(unit, aggregation)
        if name in self._families and self._declared.get(name, _Declared()) != fresh:
            raise ValueError(f"metric {name} has series already: declare it before")
        self._declared[name] = fresh

    # --- reading ----------------------------------------------------------------------------------------------------------

    def before_snapshot(self, hook: Callable[[], None]) -> Callable[[], None]:
        """Call `hook` before each snapshot of this registry, to set gauges that are asked for rather than counted.

        Returns:
            What takes it off again.
        """
        self._hooks.append(hook)
        return lambda: self._hooks.remove(hook)

    def refresh(self) -> None:
        """Call the hooks: bring the pages up to date for whoever reads them from outside."""
        for hook in tuple(self._hooks):
            hook()

    def snapshot(self, at_ns: int = 0) -> Snapshot:
        """Return all values now.

        Args:
            at_ns: The moment, wall time, for whoever keeps it.
        """
        self.refresh()
        plan = self._plan
        if plan is None:
            plan = self._plan = self._make_plan()
        cells: list[float] = []
        for writer in self._writers:
            cells += writer.values()
        return Snapshot(at_ns, plan.layout, plan.values(cells))

    def statistics(self) -> tuple[Sample, ...]:
        """Return all values now, as the exposition would show them."""
        return tuple(self.snapshot().samples())

    def render(self) -> str:
        """Return the exposition text (format 0.0.4)."""
        return self._text.render(self.snapshot())

    @property
    def n_series(self) -> int:
        """How many series there are."""
        return self._n_series

    def close(self) -> None:
        """Give the mappings back. The pages stay in their folder, so that what was counted goes on being seen; instruments still work."""
        for page in self._mapped:
            page.close()
        self._mapped.clear()

    # --- inside -----------------------------------------------------------------------------------------------------------

    def _make_plan(self) -> Plan:
        with self._lock:
            sources = []
            base = 0
            for writer, entries in zip(self._writers, self._entries, strict=True):
                sources.append(Source(tuple(entries), base, 0, True))
                base += writer.n_cells_used
        return Plan(sources, by_shard=None)

    def _entry(self, kind: Kind, name: str, help_text: str, labels: dict[str, str], *, bounds: Sequence[float] = ()) -> Entry:
        if kind == "counter" and not name.endswith("_total"):
            raise ValueError(f"counter {name} does not end in _total")
        if kind == "histogram" and (not bounds or len(bounds) > BOUNDS_MAX or list(bounds) != sorted(set(bounds)) or "le" in labels):
            raise ValueError(f"histogram {name}: want 1 to {BOUNDS_MAX} rising bounds, and no label called le")
        for word in (name, *labels):
            if not word or word[0] not in _FIRST or any(c not in _REST for c in word):
                raise ValueError(f"metric {name}: {word!r} is not a name")
        if len(help_text) > HELP_CHARS_MAX or any(len(value) > LABEL_CHARS_MAX for value in labels.values()):
            raise ValueError(f"metric {name}: a help text over {HELP_CHARS_MAX} or a label over {LABEL_CHARS_MAX} characters")
        declared = self._declared.get(name, _Declared())
        unit = unit_of(name) if declared.unit is None else declared.unit
        rising = tuple(float(bound) for bound in bounds)
        n_cells = len(rising) + 2 if kind == "histogram" else 1
        return Entry(0, n_cells, kind, name, help_text, unit, declared.aggregation, tuple(labels.items()), rising)

    def _series(self, cls: type[M], entry: Entry) -> M:
        family = self._family(entry)
        values = tuple(value for _, value in entry.labels)
        found = family.series.get(values)
        if found is None:
            found = family.series[values] = self._add(entry)
        if not isinstance(found, cls):
            raise ValueError(f"metric {entry.name} with these labels is another instrument")
        return found

    def _shared(self, cls: type[S], entry: Entry) -> S:
        if self._home is None:
            raise ValueError(f"metric {entry.name}: a thread-safe series needs a registry with a home")
        family = self._family(entry)
        values = tuple(value for _, value in entry.labels)
        found = family.series.get(values)
        if found is None:
            found = family.series[values] = cls(self._home.pages.writer_id, lambda: self._add(entry))
            self._add(entry)  # so that it is seen as 0 before its first use
        if not isinstance(found, cls):
            raise ValueError(f"metric {entry.name} with these labels is another instrument")
        return found

    def _family(self, entry: Entry) -> _Family:
        label_names = tuple(name for name, _ in entry.labels)
        family = self._families.get(entry.name)
        if family is None:
            family = self._families[entry.name] = _Family(entry.help, entry.kind, label_names, entry.bounds)
        if (family.kind, family.help, family.label_names, family.bounds) != (entry.kind, entry.help, label_names, entry.bounds):
            raise ValueError(f"metric {entry.name} is known with another kind, help text, label names or bounds")
        return family

    def _add(self, entry: Entry) -> Metric:
        """Put a series on a page and return its instrument."""
        with self._lock:
            if self._n_series >= SERIES_MAX:
                raise ValueError(f"more than {SERIES_MAX} series: {entry.name} has a label with too many values")
            cells = self._room(entry)
            self._n_series += 1
            self._plan = None
        match entry.kind:
            case "counter":
                return Counter(cells)
            case "gauge":
                return Gauge(cells)
        return Histogram(entry.bounds, cells)

    def _room(self, entry: Entry) -> "memoryview[float]":
        while True:
            if self._writers:
                writer = self._writers[-1]
                begin = writer.n_cells_used
                cells = writer.add(entry)
                if cells is not None:
                    self._entries[-1].append(msgspec.structs.replace(entry, cell=begin))
                    return cells
            self._grow()

    def _shared_page(self, home: Home, path: str, head: bytes, n_bytes: int) -> memoryview:
        """Return a mapped page; plain memory where there is no room for one: counting must not fail because a disk is full."""
        try:
            page = home.pages.create(path, n_bytes, head)
        except OSError:
            self.n_unshared_pages += 1
            return memoryview(bytearray(head.ljust(n_bytes, b"\0")))
        self._mapped.append(page)
        return page.view

    def _grow(self) -> None:
        """Open the next page, twice as large as the last."""
        number = len(self._writers)
        n_bytes = min(PAGE_BYTES_MIN << number, PAGE_BYTES_MAX)
        home = self._home
        if home is None:
            head = page_head(n_bytes, shard=0, generation=0)
            view = memoryview(bytearray(head.ljust(n_bytes, b"\0")))
        else:
            head = page_head(n_bytes, shard=home.shard, generation=home.generation)
            view = self._shared_page(home, f"{home.folder}/{page_name(home.shard, home.generation, number)}", head, n_bytes)
        self._writers.append(PageWriter(view))
        self._entries.append([])
