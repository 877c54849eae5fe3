"""ReadCache: what it answers is never older than it says."""

import asyncio
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isopod.api.store import CacheSettings, Entry, Found, KvChanges, Page, StoreClient
from isopod.api.store.cache import ReadCache
from isopod.api.store.client import ClientSettings
from isopod.runtime.metrics import PrometheusText, Registry
from isopod.world.sim import SimWorld
from tests.cluster.store.rig import FakeLog

pytestmark = pytest.mark.row("B45")


async def test_by_time_it_answers_until_it_is_too_old(sim_world: SimWorld) -> None:
    world = sim_world.world
    how = ClientSettings(cache=CacheSettings(by="time"))
    metrics = Registry()
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True, settings=how, metrics=metrics) as store:
        await store.put("a", b"1")
        first = await store.get("a", consistency="cached", max_age_s=1.0)
        assert (first.value, first.is_cached) == (b"1", False)
        await store.put("a", b"2")
        await asyncio.sleep(0.5)
        second = await store.get("a", consistency="cached", max_age_s=1.0)
        assert (second.value, second.is_cached) == (b"1", True)
        assert second.age_s is not None
        assert 0.5 <= second.age_s <= 0.6
        await asyncio.sleep(0.6)
        assert (await store.get("a", consistency="cached", max_age_s=1.0)).value == b"2"
        statistics = store.cache_statistics()
        assert (statistics.n_hits, statistics.n_misses) == (1, 2)
        assert statistics.hit_rate == pytest.approx(1 / 3)
        hits = [line for line in PrometheusText().render(metrics.snapshot()).splitlines() if 'outcome="hit"' in line]
        assert [line.rpartition(" ")[2] for line in hits] == ["1.0"]
        assert 'isopod_store_cache_hit_ratio{place="client"} 0.333' in PrometheusText().render(metrics.snapshot())


async def test_by_watch_it_is_kept_up_to_date_and_says_so(sim_world: SimWorld) -> None:
    world = sim_world.world
    how = ClientSettings(cache=CacheSettings(by="watch", progress_s=0.2))
    async with FakeLog(world, 2) as log, StoreClient(world, [await log.serve(1)], plaintext=True, settings=how) as store:
        await store.put("a", b"1")
        await store.get("a", consistency="cached")
        await asyncio.sleep(0.5)
        await store.get("a", consistency="cached", max_age_s=0.01)  # read under the watch
        barriers = log.rafts[1].n_barriers
        await log.replicas[2].put("a", b"2")
        await asyncio.sleep(0.3)
        found = await store.get("a", consistency="cached", max_age_s=0.4)
        assert (found.value, found.is_cached) == (b"2", True)
        await asyncio.sleep(10)
        found = await store.get("a", consistency="cached", max_age_s=0.4)
        assert (found.value, found.is_cached) == (b"2", True), "nothing changed, and the watch said so"
        assert log.rafts[1].n_barriers > barriers, "the node made sure of it"
        await log.replicas[2].delete("a")
        await asyncio.sleep(0.3)
        assert (await store.get("a", consistency="cached", max_age_s=0.4)).entry is None


async def test_when_the_watch_breaks_answers_grow_old(sim_world: SimWorld) -> None:
    world = sim_world.world
    how = ClientSettings(cache=CacheSettings(progress_s=0.2))
    async with FakeLog(world, 2) as log, StoreClient(world, [await log.serve(1)], plaintext=True, settings=how) as store:
        await store.put("a", b"1")
        await store.get("a", consistency="cached")
        await asyncio.sleep(0.5)
        await store.get("a", consistency="cached", max_age_s=0.01)
        await log.kill(1)
        await asyncio.sleep(2)
        found = await store.get("a", consistency="cached", max_age_s=60)
        assert found.is_cached
        assert found.age_s is not None
        assert found.age_s >= 2
        assert (await store.get("a", consistency="cached", max_age_s=60)).age_s is not None


async def test_without_a_cache_the_node_answers_from_its_own(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True) as store:
        await store.put("a", b"1")
        for _ in range(5):
            assert (await store.get("a", consistency="cached", max_age_s=2.0)).value == b"1"
        assert log.rafts[1].n_barriers == 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from("ab")),
        st.tuples(st.just("delete"), st.sampled_from("ab")),
        st.tuples(st.just("ask"), st.sampled_from("ab")),
        st.tuples(st.just("answer"), st.just("")),
        st.tuples(st.just("tell"), st.just("")),
        st.tuples(st.just("gap"), st.just("")),
        st.tuples(st.just("get"), st.sampled_from("ab")),
        st.tuples(st.just("wait"), st.just("")),
    ),
    max_size=40,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        return self.now


LATE_ANSWER = [("tell", ""), ("ask", "a"), ("write", "a"), ("tell", ""), ("answer", ""), ("wait", ""), ("tell", ""), ("get", "a")]
"""The watch has told of a change before an older answer arrives: the change will not be told again."""


@given(STEPS, st.sampled_from([0.5, 2.0, 1000.0]))
@example(LATE_ANSWER, 1000.0)
@settings(max_examples=300, deadline=None)
def test_never_older_than_it_says(steps: list[tuple[str, str]], max_age_s: float) -> None:
    """Reads are answered late and watches tell late, in any order: what the cache says still held so long ago, or later."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(_drive(steps, max_age_s))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _drive(steps: list[tuple[str, str]], max_age_s: float) -> None:
    cache, clock = ReadCache(CacheSettings(), None), Clock()
    cache._loop = clock  # type: ignore[assignment]  # it is only asked for the time
    revision = 0
    values: dict[str, list[tuple[float, Entry | None]]] = {key: [(0.0, None)] for key in "ab"}
    history: list[Entry] = []
    asked: list[tuple[str, Found, float]] = []
    told = 0
    is_watching = True
    for what, key in steps:
        clock.now += 0.001
        if what in {"write", "delete"}:
            revision += 1
            entry = Entry(key, b"", 1, revision, 1 if what == "write" else 0)
            history.append(entry)
            values[key].append((clock.now, entry if what == "write" else None))
        elif what == "ask":
            held = values[key][-1][1]
            asked.append((key, Found(Page((held,) if held else ()), revision, 0.0), clock.now))
        elif what == "answer" and asked:
            cache.keep(*asked.pop(0))
        elif what == "tell":
            cache.on_changes(KvChanges(revision=revision, entries=history[told:] if is_watching else [], age_s=0.0))
            told, is_watching = revision, True
        elif what == "gap":
            cache.on_gap()
            told, is_watching = revision, False
        elif what == "wait":
            clock.now += 1.0
        elif what == "get":
            _check(cache.get(key, max_age_s), values[key], clock.now, max_age_s)


def _check(found: Found | None, values: list[tuple[float, Any]], now: float, max_age_s: float) -> None:
    if found is None:
        return
    assert found.age_s is not None
    assert found.age_s <= max_age_s
    held_s = now - found.age_s
    # What it may say: what the key was at that moment, or anything it became later.
    first = max(place for place, (since, _) in enumerate(values) if since <= held_s)
    assert found.entry in [value for _, value in values[first:]]
