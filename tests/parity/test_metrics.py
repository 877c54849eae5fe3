"""Metrics: registration, labels, one registry per shard, and scrapes that merge."""

import asyncio

import pytest

from isopod.runtime.metrics import Registry, ShardMetrics
from isopod.runtime.reactor import Reactor
from isopod.runtime.scheduling import SchedulingGroup
from isopod.telemetry.exporters import Exporters
from isopod.world.world import World
from tests.parity import program as p
from tests.parity.kit import shards, until

pytestmark = pytest.mark.row("S35")


def test_what_is_registered_counts() -> None:
    registry = Registry()
    calls = registry.counter("parity_calls_total", "Calls.")
    depth = registry.gauge("parity_depth", "Depth.")
    took = registry.histogram("parity_took_seconds", "Time.", (0.1, 1.0))
    calls.inc()
    calls.inc(2)
    depth.set(7)
    took.observe(0.05)
    took.observe(5)

    now = registry.snapshot()
    assert [now.value(name) for name in ("parity_calls_total", "parity_depth", "parity_took_seconds")] == [3, 7, 2]
    assert 'parity_took_seconds_bucket{le="0.1"} 1.0\n' in registry.render()


def test_labels_make_series_of_their_own() -> None:
    registry = Registry()
    registry.counter("parity_calls_total", "Calls.", kind="a").inc()
    registry.counter("parity_calls_total", "Calls.", kind="b").inc(2)
    registry.counter("parity_calls_total", "Calls.", kind="a").inc()

    assert registry.snapshot().value("parity_calls_total", kind="a") == 2
    assert registry.snapshot().value("parity_calls_total", kind="b") == 2


@pytest.mark.parametrize("wrong", ["with space", "9th", "", "a-b"])
def test_names_that_no_scraper_would_take_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Registry().gauge(wrong, "Wrong.")
    with pytest.raises(ValueError, match="name"):
        Registry().gauge("parity_depth", "Wrong.", **{wrong: "x"})


def test_a_name_has_one_kind() -> None:
    registry = Registry()
    registry.counter("parity_calls_total", "Calls.")
    with pytest.raises(ValueError, match="parity_calls_total"):
        registry.gauge("parity_calls_total", "Calls.")


async def test_every_shard_counts_alone_and_a_scrape_sees_all(world: World, folder: str) -> None:
    async with shards(world, 3, p.count_calls, metrics_folder=folder):
        merged = ShardMetrics(world.pages, folder)
        await until(lambda: merged.snapshot().value("parity_calls_total", kind="test") == 10 + 11 + 12)
        apart = ShardMetrics(world.pages, folder, by_shard=True)
        now = apart.snapshot()
        assert [now.value("parity_calls_total", kind="test", shard=str(shard)) for shard in range(3)] == [10, 11, 12]
        text = Exporters().accepted("text/plain").export(merged.snapshot())
        assert b'parity_calls_total{kind="test"} 33.0\n' in text
        merged.close()
        apart.close()


async def test_a_reactor_counts_its_tasks_timers_and_groups(world: World) -> None:
    registry = Registry()
    reactor = Reactor(metrics=registry)
    await reactor.spawn(asyncio.sleep(0.001), group=SchedulingGroup("bulk", 100))
    reactor.call_later(3600, print).cancel()
    await until(lambda: reactor.statistics().n_tasks == 0)

    now = registry.snapshot()
    assert now.value("isopod_tasks_completed_total") == 1
    assert now.value("isopod_timers_cancelled_total") == 1
    assert now.value("isopod_scheduler_shares", group="bulk") == 100
    await reactor.close()
