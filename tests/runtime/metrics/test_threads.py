"""Thread-safe instruments lose nothing, however the threads are switched."""

import sys
import threading
from collections.abc import Callable

import pytest

from isopod.runtime.metrics import Home, Registry
from isopod.world.world import World

N_THREADS = 6
N_EACH = 4000


class SlowNumber(float):
    """An amount whose addition gives way to other threads in the middle: what the language allows at any addition."""

    def __radd__(self, other: float) -> float:
        pause.wait(0.0001)
        return other + float(self)


pause = threading.Event()


def repeat(work: Callable[[int], None], n_each: int) -> None:
    for index in range(n_each):
        work(index)


def hammer(work: Callable[[int], None], n_each: int) -> None:
    """Run `work` in several threads at once that are switched as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=repeat, args=(work, n_each)) for _ in range(N_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)


@pytest.mark.row("S24")
async def test_nothing_is_lost_between_threads(host_world: World, folder: str) -> None:
    registry = Registry(Home(host_world.pages, folder))
    counter = registry.threadsafe_counter("calls_total", "Calls.", kind="a")
    gauge = registry.threadsafe_gauge("open", "Open.")
    histogram = registry.threadsafe_histogram("took_seconds", "Time.", (1.0,))

    def work(index: int) -> None:
        counter.inc()
        gauge.inc(2)
        gauge.dec()
        histogram.observe(index % 2 * 2)

    hammer(work, N_EACH)
    total = N_THREADS * N_EACH
    seen = registry.snapshot()
    assert (counter.value, gauge.value, histogram.count) == (total, total, total)
    assert (seen.value("calls_total"), seen.value("open"), seen.value("took_seconds")) == (total, total, total)
    assert registry.threadsafe_counter("calls_total", "Calls.", kind="a") is counter


async def test_an_addition_that_is_interrupted_loses_counts_of_plain_counters_only(host_world: World, folder: str) -> None:
    registry = Registry(Home(host_world.pages, folder))
    plain = registry.counter("plain_total", "Plain.")
    safe = registry.threadsafe_counter("safe_total", "Safe.")
    hammer(lambda _: plain.inc(SlowNumber(1)), 30)
    hammer(lambda _: safe.inc(SlowNumber(1)), 30)
    assert plain.value < N_THREADS * 30, "the plain counter has become thread-safe: say so in its docstring"
    assert safe.value == registry.snapshot().value("safe_total") == N_THREADS * 30


async def test_thread_safe_series_want_a_home_and_a_sum(world: World, folder: str) -> None:
    with pytest.raises(ValueError, match="home"):
        Registry().threadsafe_counter("a_total", "A.")
    registry = Registry(Home(world.pages, folder))
    registry.declare("deepest", aggregation="max")
    with pytest.raises(ValueError, match="declared as max"):
        registry.threadsafe_gauge("deepest", "D.")
    registry.counter("a_total", "A.")
    with pytest.raises(ValueError, match="another instrument"):
        registry.threadsafe_counter("a_total", "A.")
    registry.threadsafe_counter("b_total", "B.")
    with pytest.raises(ValueError, match="another instrument"):
        registry.counter("b_total", "B.")
    with pytest.raises(ValueError, match="declare it before"):
        registry.declare("a_total", unit="bytes")
    registry.declare("deepest", aggregation="max")
