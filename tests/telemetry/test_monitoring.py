"""Periodic collection, a bounded history, files that rotate; on both Worlds."""

import asyncio
import csv
import io
import json

import pytest

from isopod.runtime.metrics import Home, Registry, ShardMetrics
from isopod.telemetry.collectors import Collector
from isopod.telemetry.exporters import CsvExporter, JsonExporter
from isopod.telemetry.monitoring import COLLECT_DEADLINE_S, FileExport, MonitoringSystem
from isopod.world.world import World
from tests.telemetry.kit import Memo


class Ticks:
    """Counts its own rounds, and may hang or fail."""

    name = "ticks"

    def __init__(self, registry: Registry) -> None:
        self.counter = registry.counter("ticks_total", "Rounds.")
        self.hangs = False

    async def collect(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        self.counter.inc()


@pytest.mark.row("S24")
async def test_collection_goes_on_and_the_history_is_bounded(world: World) -> None:
    registry = Registry()
    ticks = Ticks(registry)
    first: list[Collector] = [ticks]
    monitoring = MonitoringSystem(world, registry, collectors=first, logger=Memo(world.clock).logger, interval_s=0.01, n_history_max=3)
    await monitoring.start()
    while ticks.counter.value < 5:
        await asyncio.sleep(0.01)
    await monitoring.close()
    seen = [snapshot.value("ticks_total") for snapshot in monitoring.history]
    assert len(seen) == 3
    assert seen == sorted(seen)
    assert monitoring.history[0].at_ns < monitoring.history[-1].at_ns <= world.clock.now_ns()
    settled = ticks.counter.value
    await asyncio.sleep(0.05)
    assert ticks.counter.value == settled
    await monitoring.close()


async def test_a_collector_that_hangs_costs_its_deadline_only(sim_world: "object") -> None:
    from isopod.world.sim import SimWorld

    assert isinstance(sim_world, SimWorld)
    world = sim_world.world
    registry = Registry()
    memo = Memo(world.clock)
    one, two = Ticks(registry), Ticks(registry)
    one.hangs = True
    monitoring = MonitoringSystem(world, registry, collectors=[one, two], logger=memo.logger)
    began = sim_world.loop.time()
    await monitoring.collect()
    assert COLLECT_DEADLINE_S <= sim_world.loop.time() - began < COLLECT_DEADLINE_S + 1
    assert (two.counter.value, memo.events()) == (1, ["collection.failed"])


async def test_all_shards_are_seen(world: World, folder: str) -> None:
    shards = [Registry(Home(world.pages, folder, shard=k)) for k in range(2)]
    for registry in shards:
        registry.counter("calls_total", "Calls.").inc(2)
    scrape = ShardMetrics(world.pages, folder)
    monitoring = MonitoringSystem(world, shards[0], collectors=[], logger=Memo(world.clock).logger, snapshot=scrape.snapshot)
    assert (await monitoring.collect()).value("calls_total") == 4
    shards[1].counter("calls_total", "Calls.").inc()
    assert monitoring.read().value("calls_total") == 5
    for each in shards:
        each.close()
    scrape.close()


@pytest.mark.row("S24")
async def test_files_rotate_by_size_and_age_and_old_ones_go(world: World, folder: str) -> None:
    registry = Registry()
    registry.counter("calls_total", "Calls.").inc()
    memo = Memo(world.clock)
    target = f"{folder}/export"
    export = FileExport(folder=target, exporter=JsonExporter(), n_bytes_max=1500, n_files_max=3)
    monitoring = MonitoringSystem(world, registry, collectors=[], logger=memo.logger, export=export)
    for _ in range(20):
        await monitoring.collect()
    await monitoring.close()
    names = await world.disk.list(target)
    assert len(names) == 3
    assert all(name.endswith(".json") for name in names)
    lines = b"".join([await world.disk.read(f"{target}/{name}") for name in names]).splitlines()
    stamps = [json.loads(line)["timestamp_ns"] for line in lines]
    assert stamps == sorted(stamps)
    assert stamps[-1] == monitoring.history[-1].at_ns
    assert memo.events() == []


async def test_csv_files_have_one_header_each(world: World, folder: str) -> None:
    registry = Registry()
    registry.counter("calls_total", "Calls.").inc()
    export = FileExport(folder=folder, exporter=CsvExporter(), rotate_s=0.05)
    monitoring = MonitoringSystem(world, registry, collectors=[], logger=Memo(world.clock).logger, export=export)
    await monitoring.collect()
    await monitoring.collect()
    await asyncio.sleep(0.06)
    await monitoring.collect()
    await monitoring.close()
    texts = [(await world.disk.read(f"{folder}/{name}")).decode() for name in await world.disk.list(folder)]
    assert len(texts) >= 2
    for text in texts:
        rows = list(csv.reader(io.StringIO(text, newline="")))
        assert [row[0] == "timestamp" for row in rows] == [True, *[False] * (len(rows) - 1)]


async def test_a_disk_that_fails_is_counted_and_collection_goes_on(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/file", b"")
    registry = Registry()
    memo = Memo(world.clock)
    export = FileExport(folder=f"{folder}/file/below", exporter=JsonExporter())
    monitoring = MonitoringSystem(world, registry, collectors=[], logger=memo.logger, export=export)
    seen = [await monitoring.collect() for _ in range(2)]
    assert seen[1].value("isopod_collection_failures_total") == 1
    assert memo.events() == ["collection.failed"] * 2
    await monitoring.close()
