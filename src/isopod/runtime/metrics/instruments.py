"""Counter, Gauge, Histogram: what the code that counts holds in its hands.

Each keeps its value as a plain number and stores it into its cell of the page at every change: one addition and one store. Reading the
cell back first would cost as much again.

Threads: a plain instrument belongs to one thread, its loop's. CPython 3.11 switches threads only between two calls, so that in fact no
addition is lost between threads; but neither the language nor later versions promise that. The `ThreadSafe` ones promise it: each thread
adds to a cell of its own, and whoever reads sums them up. `Gauge.set` is one store, from any thread.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar, cast

from isopod.runtime.metrics.model import BUCKETS_S, Kind

_LOOSE: Final = 1


def _loose_cells(n_cells: int) -> "memoryview[float]":
    """Return cells that are on no page: an instrument made without a registry counts for itself."""
    return memoryview(bytearray(8 * n_cells)).cast("d")


class Counter:
    """A number that only grows. `value` is read, never set.

    Args:
        cells: One cell of a page.
    """

    __slots__ = ("_cells", "value")
    kind: Final[Kind] = "counter"

    def __init__(self, cells: "memoryview[float] | None" = None) -> None:
        self._cells = _loose_cells(_LOOSE) if cells is None else cells
        self.value: float = self._cells[0]

    def inc(self, amount: float = 1.0) -> None:
        """Add `amount`, which is not negative."""
        if not amount >= 0.0:  # neither negative nor NaN
            raise ValueError("a counter never falls")
        self._cells[0] = self.value = self.value + amount


class Gauge:
    """A number that rises and falls. `value` is read, never set: that is what `set` is for.

    Args:
        cells: One cell of a page.
    """

    __slots__ = ("_cells", "value")
    kind: Final[Kind] = "gauge"

    def __init__(self, cells: "memoryview[float] | None" = None) -> None:
        self._cells = _loose_cells(_LOOSE) if cells is None else cells
        self.value: float = self._cells[0]

    def set(self, value: float) -> None:
        """Make it `value`."""
        self._cells[0] = self.value = value

    def inc(self, amount: float = 1.0) -> None:
        """Add `amount`."""
        self._cells[0] = self.value = self.value + amount

    def dec(self, amount: float = 1.0) -> None:
        """Subtract `amount`."""
        self._cells[0] = self.value = self.value - amount


class Histogram:
    """Counts of observations by upper bound, their number and sum.

    Args:
        bounds: Rising upper bounds, without +Inf.
        cells: One cell for each bound, one for +Inf, one for the sum.
    """

    __slots__ = ("_cells", "bounds", "sum")
    kind: Final[Kind] = "histogram"

    def __init__(self, bounds: Sequence[float] = BUCKETS_S, cells: "memoryview[float] | None" = None) -> None:
        self.bounds = tuple(bounds)
        self._cells = _loose_cells(len(self.bounds) + 2) if cells is None else cells
        self.sum: float = self._cells[-1]

    def observe(self, value: float) -> None:
        """Count one observation (a bound holds values less than or equal to it)."""
        cells = self._cells
        cells[bisect_left(self.bounds, value)] += 1.0
        cells[-1] = self.sum = self.sum + value

    def observe_many(self, value: float, count: int, total: float) -> None:
        """Count observations that all lie between the same two bounds: for code too busy to count each.

        Args:
            value: Any that lies there, such as the largest.
            count: How many.
            total: Their sum.
        """
        cells = self._cells
        cells[bisect_left(self.bounds, value)] += count
        cells[-1] = self.sum = self.sum + total

    @property
    def count(self) -> int:
        """The number of observations."""
        return int(sum(self._cells[:-1].tolist()))


Metric = Counter | Gauge | Histogram
M = TypeVar("M", Counter, Gauge, Histogram)


class _PerThread(Generic[M]):
    """One instrument for each thread that used it.

    Args:
        writer_id: Tells threads apart.
        make: Makes the calling thread's instrument, on cells of its own; safe to call from any thread.
    """

    __slots__ = ("_make", "_own", "_writer_id")

    def __init__(self, writer_id: Callable[[], int], make: Callable[[], Metric]) -> None:
        self._writer_id = writer_id
        self._make = make
        # A thread only ever looks up and adds its own key. Idents are reused once their thread has ended: the new one goes on counting.
        self._own: dict[int, M] = {}

    def _first(self) -> M:
        """Return the instrument of a thread that comes for the first time."""
        found = self._own[self._writer_id()] = cast(M, self._make())  # `make` is that of this kind: the registry's doing
        return found


class ThreadSafeCounter(_PerThread[Counter]):
    """A counter that any thread may increment."""

    __slots__ = ()

    def inc(self, amount: float = 1.0) -> None:
        """Add `amount`, which is not negative."""
        own = self._own.get(self._writer_id())
        (own or self._first()).inc(amount)

    @property
    def value(self) -> float:
        """The sum over all threads."""
        return sum(counter.value for counter in tuple(self._own.values()))


class ThreadSafeGauge(_PerThread[Gauge]):
    """A gauge that any thread may raise and lower (such as: calls in flight). It cannot be set: it is a sum over threads."""

    __slots__ = ()

    def inc(self, amount: float = 1.0) -> None:
        """Add `amount`."""
        own = self._own.get(self._writer_id())
        (own or self._first()).inc(amount)

    def dec(self, amount: float = 1.0) -> None:
        """Subtract `amount`."""
        own = self._own.get(self._writer_id())
        (own or self._first()).dec(amount)

    @property
    def value(self) -> float:
        """The sum over all threads."""
        return sum(gauge.value for gauge in tuple(self._own.values()))


class ThreadSafeHistogram(_PerThread[Histogram]):
    """A histogram that any thread may observe into."""

    __slots__ = ()

    def observe(self, value: float) -> None:
        """Count one observation."""
        own = self._own.get(self._writer_id())
        (own or self._first()).observe(value)

    @property
    def count(self) -> int:
        """The number of observations, over all threads."""
        return sum(histogram.count for histogram in tuple(self._own.values()))
