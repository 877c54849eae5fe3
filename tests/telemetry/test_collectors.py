"""System figures on both Worlds, a third party's collector (row S37), and the parsers of /proc."""

import asyncio
import contextlib
import dataclasses
import gc
import mmap
import os
import threading

import pytest

from isopod.runtime.metrics import Registry
from isopod.telemetry.collectors import Collector, FileCollector, LoopCollector, MachineCollector, Total, system_collectors
from isopod.telemetry.monitoring import MonitoringSystem
from isopod.world.clock import Clock
from isopod.world.disk import OpenFlags
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.telemetry.kit import Memo


@pytest.mark.row("S24")
async def test_system_figures_are_there_and_plausible(world: World) -> None:
    registry = Registry()
    for _ in range(2):
        for collector in system_collectors(world, registry):
            await collector.collect()
        await asyncio.sleep(0.01)
    seen = registry.snapshot()
    assert seen.value("isopod_process_cpu_seconds_total") > 0
    assert 1 << 20 < seen.value("isopod_memory_proportional_bytes") <= seen.value("isopod_memory_current_usage_bytes") * 1.1
    assert seen.value("isopod_memory_peak_usage_bytes") >= seen.value("isopod_memory_current_usage_bytes") * 0.5
    assert seen.value("isopod_process_open_fds") >= 3
    assert seen.value("isopod_process_threads") >= 1
    assert seen.value("isopod_process_context_switches_total") >= 0
    assert seen.value("isopod_machine_cpu_seconds_total", mode="idle") > 0
    assert seen.value("isopod_machine_memory_bytes", kind="total") > seen.value("isopod_machine_memory_bytes", kind="available") > 0
    assert seen.value("isopod_network_bytes_received_total") >= 0
    assert seen.value("isopod_machine_load", minutes="1") >= 0
    assert seen.value("isopod_tasks") == 1
    assert seen.value("isopod_gc_collections_total", generation="0") > 0


async def test_figures_follow_what_the_process_does(host_world: World, folder: str) -> None:
    before = await host_world.kernel.process_figures()
    # Pages of its own: what the allocator still has from earlier tests would not be seen.
    with contextlib.ExitStack() as held:
        ballast = held.enter_context(mmap.mmap(-1, 32 << 20))
        ballast.write(os.urandom(1 << 20) * 32)
        for number in range(10):
            held.enter_context(open(f"{folder}/{number}", "wb"))
        after = await host_world.kernel.process_figures()
        assert after.resident_bytes - before.resident_bytes > 16 << 20
        assert after.n_fds - before.n_fds >= 10
        assert after.cpu_user_s + after.cpu_system_s >= before.cpu_user_s + before.cpu_system_s


async def test_collected_garbage_is_counted(world: World) -> None:
    registry = Registry()
    collectors = system_collectors(world, registry, machine=False)
    for collector in collectors:
        await collector.collect()
    before = registry.snapshot().value("isopod_gc_collections_total", generation="2")
    gc.collect()
    for collector in collectors:
        await collector.collect()
    assert registry.snapshot().value("isopod_gc_collections_total", generation="2") == before + 1


class HeldUp:
    """A clock that shows how long steps took: in the simulation they take no time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.took_ns = 0

    def now_ns(self) -> int:
        return self._clock.now_ns() + self.took_ns

    def monotonic_ns(self) -> int:
        return self._clock.monotonic_ns() + self.took_ns


async def test_a_loop_that_is_held_up_shows(sim_world: SimWorld) -> None:
    registry = Registry()
    clock = HeldUp(sim_world.world.clock)
    collector = LoopCollector(dataclasses.replace(sim_world.world, clock=clock), registry, period_s=0.01)
    collector.start()
    collector.start()
    await asyncio.sleep(0.035)
    await collector.collect()
    assert registry.snapshot().value("isopod_reactor_lag_seconds_max") == pytest.approx(0, abs=0.001)
    clock.took_ns = 200_000_000
    await asyncio.sleep(0.03)
    await collector.collect()
    assert registry.snapshot().value("isopod_reactor_lag_seconds_max") == pytest.approx(0.2, abs=0.001)
    await collector.collect()
    assert registry.snapshot().value("isopod_reactor_lag_seconds_max") == pytest.approx(0, abs=0.001)
    collector.close()
    collector.close()
    seen = registry.snapshot().value("isopod_reactor_lag_seconds")
    await asyncio.sleep(0.03)
    assert registry.snapshot().value("isopod_reactor_lag_seconds") == seen


async def test_a_real_loop_that_is_held_up_shows(host_world: World) -> None:
    registry = Registry()
    collector = LoopCollector(host_world, registry, period_s=0.01)
    collector.start()
    asyncio.get_running_loop().call_soon(threading.Event().wait, 0.2)
    await asyncio.sleep(0.03)
    await collector.collect()
    assert registry.snapshot().value("isopod_reactor_lag_seconds_max") > 0.1
    collector.close()


class Thermometer:
    """A third party's collector."""

    name = "thermometer"

    def __init__(self, registry: Registry) -> None:
        self._degrees = registry.gauge("room_temperature_celsius", "In the room.")
        self.now = 20.0

    async def collect(self) -> None:
        if self.now < -273:
            raise ValueError("broken thermometer")
        self._degrees.set(self.now)


@pytest.mark.row("S37")
async def test_a_third_party_s_collector(world: World) -> None:
    registry = Registry()
    memo = Memo(world.clock)
    thermometer = Thermometer(registry)
    first: Collector = thermometer
    monitoring = MonitoringSystem(world, registry, collectors=[first], logger=memo.logger)
    monitoring.add_collector(MachineCollector(world, registry))
    thermometer.now = 21.5
    assert (await monitoring.collect()).value("room_temperature_celsius") == 21.5
    thermometer.now = -300
    seen = await monitoring.collect()
    assert (seen.value("room_temperature_celsius"), seen.value("isopod_collection_failures_total")) == (21.5, 1)
    assert seen.value("isopod_machine_load", minutes="1") >= 0
    assert memo.events() == ["collection.failed"]


def test_totals_that_begin_anew_never_make_a_counter_fall() -> None:
    registry = Registry()
    counter = registry.counter("a_total", "A.")
    total = Total(counter)
    for value, seen in ((5, 5), (7, 7), (2, 9), (2, 9)):
        total.follow(value)
        assert counter.value == seen


async def test_data_files_are_counted(world: World, folder: str) -> None:
    registry = Registry()
    collector = FileCollector(world, registry)
    file = await world.disk.open_file(f"{folder}/data", OpenFlags(write=True, create=True))
    await file.write_at(0, b"x" * 4096)
    await file.read_at(0, 4096)
    file.close()
    await collector.collect()
    seen = registry.snapshot()
    assert (seen.value("isopod_file_bytes_written_total"), seen.value("isopod_file_bytes_read_total")) == (4096, 4096)
    assert seen.value("isopod_file_operations_total", kind="write") == 1
