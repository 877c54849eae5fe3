"""Metrics across shards: a scrape by anybody sees all, without a message; the dead count on; damage never breaks a scrape."""

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.runtime.metrics import Home, Registry, ShardMetrics, next_generation
from isopod.runtime.metrics.page import HEADER_BYTES, Entry, PageReader, PageWriter, page_head, parse_page_name
from isopod.world.world import World

SHARD = """
import sys
sys.path.insert(0, {src!r})
from isopod.runtime.metrics import Home, Registry
from isopod.world.host.pages import HostPages
registry = Registry(Home(HostPages(), {folder!r}, shard=int(sys.argv[1])))
counter = registry.counter("calls_total", "Calls.", kind="a")
for _ in range(int(sys.argv[2])):
    counter.inc()
registry.gauge("open", "Open.").set(3)
registry.histogram("took_seconds", "Time.", (1.0,)).observe(0.5)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.row("S24")
async def test_every_shard_sees_all_shards(world: World, folder: str) -> None:
    home = f"{folder}/metrics"
    shards = [Registry(Home(world.pages, home, shard=k)) for k in range(3)]
    for k, registry in enumerate(shards):
        registry.declare("depth", aggregation="max")
        registry.declare("fill_ratio", aggregation="last")
        registry.declare("queue", aggregation="shard")
        registry.counter("calls_total", "Calls.", kind="a").inc(10**k)
        registry.gauge("open", "Open.").set(k)
        registry.gauge("depth", "Depth.").set(5 - k)
        registry.gauge("fill_ratio", "Fill.").set(k / 10)
        registry.gauge("queue", "Queue.").set(k)
        for value in (0.5, 5.0)[: k + 1]:
            registry.histogram("took_seconds", "Time.", (1.0,)).observe(value)
    scrape = ShardMetrics(world.pages, home)
    seen = scrape.snapshot(7)
    assert seen.at_ns == 7
    assert [seen.value(name) for name in ("calls_total", "open", "depth", "fill_ratio")] == [111, 3, 5, 0.2]
    assert [seen.value("queue", shard=str(k)) for k in range(3)] == [0, 1, 2]
    assert {(s.name, s.labels): s.value for s in seen.samples() if s.name.startswith("took")} == {
        ("took_seconds_bucket", (("le", "1.0"),)): 3,
        ("took_seconds_bucket", (("le", "+Inf"),)): 5,
        ("took_seconds_sum", ()): 11.5,
        ("took_seconds_count", ()): 5,
    }
    shards[1].counter("calls_total", "Calls.", kind="a").inc()
    shards[2].counter("late_total", "Asked for later.").inc(4)
    again = scrape.snapshot()
    assert (again.value("calls_total"), again.value("late_total"), scrape.shards()) == (112, 4, (0, 1, 2))
    single = ShardMetrics(world.pages, home, by_shard=True)
    assert [single.snapshot().value("calls_total", kind="a", shard=str(k)) for k in range(3)] == [1, 11, 100]
    scrape.close()
    single.close()
    for registry in shards:
        registry.close()


@pytest.mark.row("S24")
async def test_the_dead_count_on_and_a_new_life_adds_to_them(world: World, folder: str) -> None:
    first = Registry(Home(world.pages, folder, shard=0, generation=next_generation(world.pages, folder, 0)))
    first.counter("calls_total", "Calls.").inc(5)
    first.gauge("open", "Open.").set(9)
    scrape = ShardMetrics(world.pages, folder)
    assert scrape.snapshot().value("open") == 9
    for life in range(1, 4):
        generation = next_generation(world.pages, folder, 0)
        assert generation == life
        registry = Registry(Home(world.pages, folder, shard=0, generation=generation))
        registry.counter("calls_total", "Calls.").inc(1)
        registry.histogram("took_seconds", "Time.", (1.0,)).observe(0.5)
        registry.gauge("open", "Open.").set(life)
        seen = scrape.snapshot()
        assert (seen.value("calls_total"), seen.value("open")) == (5 + life, life)
    before = scrape.snapshot().values
    other = ShardMetrics(world.pages, folder)
    other.snapshot()
    assert other.retire(0, before=3) == 3
    assert len(world.pages.names(folder)) == 2
    assert sorted(scrape.snapshot().values) == sorted(before) == sorted(other.snapshot().values)
    assert other.retire(0, before=3) == 0
    assert next_generation(world.pages, folder, 0) == 4


async def test_sums_of_retired_lives_are_never_counted_beside_them(sim_world: "object") -> None:
    from isopod.world.sim import SimWorld

    assert isinstance(sim_world, SimWorld)
    pages = sim_world.pages
    for generation in range(3):
        Registry(Home(pages, "/m", shard=0, generation=generation)).counter("calls_total", "Calls.").inc(1)
    left = dict(pages.stored)
    ShardMetrics(pages, "/m").retire(0, before=2)
    # The supervisor dies between the rename and the removals: the old pages are still there.
    pages.stored.update(left)
    assert ShardMetrics(pages, "/m").snapshot().value("calls_total") == 3
    assert ShardMetrics(pages, "/m").retire(0, before=2) == 2
    assert ShardMetrics(pages, "/m").snapshot().value("calls_total") == 3


@pytest.mark.host
@pytest.mark.row("S24")
def test_processes_killed_in_the_middle_leave_their_counts(folder: str) -> None:
    from isopod.world.host.pages import HostPages

    script = SHARD.format(src=os.path.join(os.path.dirname(__file__), "../../../src"), folder=folder)
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(k), "1000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for k in (0, 1)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        scrape = ShardMetrics(HostPages(), folder)
        assert scrape.snapshot().value("calls_total", kind="a") == 2000
        running[0].send_signal(signal.SIGKILL)
        running[0].wait(10)
        seen = scrape.snapshot()
        assert (seen.value("calls_total"), seen.value("took_seconds"), seen.n_damaged) == (2000, 2, 0)
        scrape.close()
    finally:
        for process in running:
            process.kill()
            process.communicate()


def page(n_series: int = 3) -> bytearray:
    """Return a page with some counters whose values are 1."""
    body = bytearray(page_head(65536, shard=0, generation=0).ljust(65536, b"\0"))
    writer = PageWriter(memoryview(body))
    for index in range(n_series):
        cells = writer.add(Entry(0, 1, "counter", f"c{index}_total", "C.", "", "sum", (("a", "b"),), ()))
        assert cells is not None
        cells[0] = 1.0
    return body


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 65535) | st.integers(0, 64) | st.integers(16448, 17000), st.integers(0, 255)), max_size=8))
def test_any_damage_is_read_as_far_as_it_is_whole(damage: list[tuple[int, int]]) -> None:
    body = page()
    for at, byte in damage:
        body[at] = byte
    try:
        reader = PageReader(memoryview(body))
    except ValueError:
        return
    reader.refresh()
    assert len(reader.values()) == reader.n_cells_used <= reader.head.n_cells
    assert reader.is_damaged or [entry.name for entry in reader.entries] == [f"c{i}_total" for i in range(len(reader.entries))]


@pytest.mark.row("S24")
async def test_torn_and_foreign_pages_do_not_break_a_scrape(sim_world: "object") -> None:
    from isopod.world.sim import SimWorld

    assert isinstance(sim_world, SimWorld)
    pages = sim_world.pages
    torn = page()
    table = HEADER_BYTES + 8 * PageReader(memoryview(torn)).head.n_cells
    second = torn.index(b"c1_total", table)
    torn[second] ^= 1
    pages.stored["/m/shard-0-0-0.page"] = torn
    pages.stored["/m/shard-1-0-0.page"] = page()
    pages.stored["/m/shard-2-0-0.page"] = bytearray(b"garbage" * 100)
    pages.stored["/m/shard-3-0-0.page"] = bytearray(10)
    pages.stored["/m/notes.txt"] = bytearray(b"not ours")
    late = page()
    late[8] = 99  # a later version
    pages.stored["/m/shard-4-0-0.page"] = late
    scrape = ShardMetrics(pages, "/m")
    seen = scrape.snapshot()
    assert [seen.value(f"c{i}_total") for i in range(3)] == [2, 1, 1]
    assert seen.n_damaged == 4
    shrunk = page()
    scrape = ShardMetrics(pages, "/n")
    pages.stored["/n/shard-0-0-0.page"] = shrunk
    assert scrape.snapshot().n_damaged == 0
    shrunk[48] = 1  # committed falls
    shrunk[49] = 0
    assert (scrape.snapshot().n_damaged, scrape.snapshot().value("c0_total")) == (1, 1)


async def test_families_that_disagree_are_not_mixed(sim_world: "object") -> None:
    from isopod.world.sim import SimWorld

    assert isinstance(sim_world, SimWorld)
    Registry(Home(sim_world.pages, "/m", shard=0)).histogram("h_seconds", "H.", (1.0,)).observe(0.5)
    Registry(Home(sim_world.pages, "/m", shard=1)).histogram("h_seconds", "H.", (2.0,)).observe(0.5)
    assert ShardMetrics(sim_world.pages, "/m").snapshot().value("h_seconds") == 1


@pytest.mark.parametrize("name", ["", "x", "shard-0-0-0", "shard-0-0.page", "shard-a-0-0.page", "shard-0-0-0-0.page", "shard--1-0-0.page"])
def test_other_names_are_no_pages(name: str) -> None:
    assert parse_page_name(name) is None


async def test_many_series_take_more_pages(world: World, folder: str) -> None:
    registry = Registry(Home(world.pages, folder))
    counters = [registry.counter("calls_total", "Calls of one kind.", kind=f"k{i}" * 20) for i in range(2000)]
    for counter in counters:
        counter.inc(2)
    assert len(world.pages.names(folder)) > 2
    scrape = ShardMetrics(world.pages, folder)
    assert scrape.snapshot().value("calls_total") == registry.snapshot().value("calls_total") == 4000
    assert registry.n_series == 2000
    scrape.close()
    registry.close()
    counters[0].inc()


async def test_counting_goes_on_where_no_page_can_be_made(host_world: World, folder: str) -> None:
    with open(f"{folder}/file", "wb"):
        pass
    registry = Registry(Home(host_world.pages, f"{folder}/file/below"))
    registry.counter("calls_total", "Calls.").inc(3)
    assert (registry.snapshot().value("calls_total"), registry.n_unshared_pages) == (3, 1)
    registry.close()
