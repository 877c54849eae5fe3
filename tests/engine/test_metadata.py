"""The store of records: durable when acknowledged, all or nothing, recovered exactly, and quick to say what changed."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from isopod.api.messages import Container, Endpoint, Event, Mount, Resources
from isopod.engine import operations as ops
from isopod.engine.metadata import MetadataStore
from isopod.journal import METADATA
from isopod.runtime.logger import Logger
from isopod.world.errors import AlreadyExists, BadRecord, DiskFull, NotFound, TooLarge, UnavailableError, WrongState
from isopod.world.sim import SimWorld, make_sim_world
from isopod.world.world import World
from tests.engine.test_bundle import RECORD
from tests.engine.test_migrations import FIRST

ID = RECORD.id


def record(number: int, **changes: Any) -> Container:
    return msgspec.structs.replace(RECORD, id=f"{number:064x}", name=f"box{number}", **changes)


@asynccontextmanager
async def opened(world: World, folder: str, **settings: Any) -> AsyncIterator[MetadataStore]:
    lines: list[bytes] = []
    store = await MetadataStore.open(
        world,
        f"{folder}/metadata",
        logger=Logger(lines.append, world.clock),
        settings=METADATA._replace(**{"segment_bytes": 1 << 20, **settings}),
    )
    try:
        yield store
    finally:
        await store.close()


def contents(store: MetadataStore) -> list[Container]:
    return list(store.loaded().records)


@pytest.mark.row("R16", "R17", "R18", "R35")
async def test_every_kind_of_change_is_there_after_a_restart(world: World, folder: str) -> None:
    mount = Mount(source="/data", destination="/data")
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
        await store.commit(ops.UpdateLabels(ID, {"tier": "web"}))
        await store.commit(ops.UpdateEnvironment(ID, {"A": "B"}))
        await store.commit(ops.UpdateResources(ID, Resources(memory_bytes_max=64 << 20, cpus=0.5)))
        await store.commit(ops.AttachNetwork(ID, Endpoint(network="backend")))
        await store.commit(ops.AddMount(ID, mount))
        await store.commit(ops.AddMount(ID, Mount(source="/x", destination="/x")), ops.RemoveMount(ID, "/x"))
        await store.commit(ops.UpdateHealth(ID, "healthy"))
        await store.commit(ops.UpdateStatus(ID, "starting"))
        await store.put_state(msgspec.structs.replace(store.records()[0], status="running", pid=7, started_at_ns=3))
        before = contents(store)
    async with opened(world, folder) as store:
        (after,) = contents(store)
        assert [after] == before
        assert (after.labels, after.env, after.resources.cpus, after.network.network) == ({"tier": "web"}, {"A": "B"}, 0.5, "backend")
        assert (after.mounts, after.health, after.status, after.pid, after.revision) == ((mount,), "healthy", "running", 7, 11)
        await store.put_state(msgspec.structs.replace(after, status="exited", pid=None, exit_code=0))
        await store.commit(ops.DetachNetwork(ID), ops.Delete(ID))
    async with opened(world, folder) as store:
        assert contents(store) == []


@pytest.mark.row("R19")
async def test_what_was_acknowledged_survives_a_power_cut(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    await world.disk.sync_directory(folder.rpartition("/")[0])
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
        await store.commit(ops.UpdateLabels(ID, {"a": "b"}))
        left_open = asyncio.ensure_future(store.commit(ops.UpdateLabels(ID, {"a": "c"})))
        copy = contents(store)
        sim_world.disk.crash()
        await asyncio.gather(left_open, return_exceptions=True)
    async with opened(world, folder) as store:
        (after,) = contents(store)
        assert after.labels in ({"a": "b"}, {"a": "c"})
        assert after.id == copy[0].id


@pytest.mark.row("R27")
async def test_a_batch_with_a_refused_member_changes_nothing(world: World, folder: str) -> None:
    told: list[Event] = []
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
        before, cursor = contents(store), store.last_cursor
        store.subscribe(told.append)
        with pytest.raises(WrongState):
            await store.commit(
                ops.UpdateLabels(ID, {"a": "b"}), ops.Create(record(2)), ops.UpdateStatus(ID, "starting"), ops.UpdateStatus(ID, "paused")
            )
        with pytest.raises(NotFound):
            await store.commit(ops.Delete(ID), ops.UpdateLabels(ID, {}))
        with pytest.raises(AlreadyExists):
            await store.commit(ops.Create(record(2)), ops.Create(record(2)))
        assert (contents(store), store.last_cursor, told) == (before, cursor, [])
        outcomes = await asyncio.gather(
            *(store.commit(ops.Create(record(3)), ops.Delete(f"{4:064x}")) for _ in range(3)),
            *(store.commit(ops.Create(record(5)), ops.UpdateLabels(f"{5:064x}", {"a": "b"})) for _ in range(3)),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes].count(NotFound) == 3, "no trace of what was refused, among concurrent ones neither"
        assert [type(outcome) for outcome in outcomes].count(AlreadyExists) == 2
        assert [found.name for found in contents(store)] == ["box5", "box"]
        await store.commit(ops.Delete(f"{5:064x}"))
    async with opened(world, folder) as store:
        assert contents(store) == before


@pytest.mark.row("R27", "R25")
@pytest.mark.parametrize("seed", range(12))
def test_a_crash_in_a_batch_leaves_all_of_it_or_nothing(seed: int) -> None:
    sim = make_sim_world(seed)
    try:
        sim.run(_crash_in_a_batch(sim, seed))
    finally:
        sim.close()


async def _crash_in_a_batch(sim: SimWorld, seed: int) -> None:
    folder = "/var/lib/records"
    await sim.world.disk.make_directory(folder)

    async def write() -> None:
        async with opened(sim.world, folder) as store:
            for number in range(0, 1000, 10):
                await store.commit(*(ops.Create(record(number + i, env={"fill": "x" * 300})) for i in range(10)))

    handle = sim.spawn_node(write())
    await asyncio.sleep(0.001 + random.Random(seed).random() * 0.03)
    handle.kill()
    sim.disk.crash()
    async with opened(sim.world, folder) as store:
        assert len(contents(store)) % 10 == 0


@pytest.mark.row("R31")
async def test_a_thousand_concurrent_updates_lose_nothing(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        await store.commit(*(ops.Create(record(number)) for number in range(20)))
        start = store.last_cursor

        async def update(number: int) -> None:
            identifier = f"{number % 20:064x}"
            if number % 3 == 0:
                await store.commit(ops.UpdateEnvironment(identifier, {"n": str(number)}), ops.UpdateLabels(identifier, {"n": str(number)}))
            elif number % 3 == 1:
                await store.commit(ops.AddMount(identifier, Mount(source="/s", destination=f"/m{number}")))
            else:
                with pytest.raises(AlreadyExists):
                    await store.commit(ops.Create(record(number % 20)))

        async with asyncio.timeout(30):
            await asyncio.gather(*(update(number) for number in range(1000)))
        assert store.last_cursor == start + 2 * 334 + 333
        for number, found in enumerate(contents(store)):
            mine = range(number, 1000, 20)
            assert found.labels == found.env
            assert found.labels["n"] in [str(n) for n in mine if n % 3 == 0]
            assert sorted(mount.destination for mount in found.mounts) == sorted(f"/m{n}" for n in mine if n % 3 == 1)
        before = contents(store)
    async with opened(world, folder) as store:
        assert contents(store) == before


@pytest.mark.row("R31")
async def test_a_caller_that_goes_away_holds_up_nobody(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
        tasks = [asyncio.ensure_future(store.commit(ops.UpdateLabels(ID, {"n": str(n)}))) for n in range(50)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [outcome for outcome in outcomes if outcome is not None and not isinstance(outcome, asyncio.CancelledError)] == []
        await store.commit(ops.UpdateLabels(ID, {"n": "last"}))
        assert contents(store)[0].labels == {"n": "last"}


# --- snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.row("R24", "R25", "R26")
async def test_a_snapshot_and_the_rest_give_what_was_there(world: World, folder: str) -> None:
    async with opened(world, folder, snapshots_kept=2) as store:
        for number in range(4):
            await store.commit(ops.Create(record(number)))
            await store.commit(ops.AddMount(f"{number:064x}", Mount(source="/s", destination="/m")))
            await store.snapshot()
        await store.commit(ops.Delete(f"{0:064x}"), ops.UpdateLabels(f"{1:064x}", {"after": "it"}))
        before = contents(store)
        names = await world.disk.list(f"{folder}/metadata/snapshots")
        assert len(names) == 2
        newest = msgspec.json.decode(await world.disk.read(f"{folder}/metadata/snapshots/{names[-1]}"))
        text = await world.disk.read(f"{folder}/metadata/snapshots/{names[-1]}")
    assert b'"name": "box3"' in text, "a person can read it"
    assert "8" in names[-1]
    assert str(newest).count("'box3'") == 1
    async with opened(world, folder) as store:
        assert contents(store) == before, "one mount each: nothing was applied twice"


@pytest.mark.row("R25", "R26")
async def test_recovery_is_exact_when_the_beginning_of_the_history_is_gone(world: World, folder: str) -> None:
    settings = {"segment_bytes": 16 << 10, "archive_n_max": 0, "snapshots_kept": 2}
    async with opened(world, folder, **settings) as store:
        await store.commit(ops.Create(RECORD))
        for number in range(60):
            fill = {"fill": "x" * 1000, "n": str(number)}
            await store.commit(ops.UpdateLabels(ID, fill), ops.AddMount(ID, Mount(source="/s", destination=f"/m{number}")))
            if number % 10 == 9:
                await store.snapshot()
        assert await store.oldest_cursor() > 0
        before = contents(store)
    async with opened(world, folder, **settings) as store:
        assert contents(store) == before
        assert len(before[0].mounts) == 60


@pytest.mark.row("R25")
async def test_a_damaged_snapshot_is_made_up_for_by_the_one_before(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        for number in range(3):
            await store.commit(ops.Create(record(number)))
            await store.snapshot()
        before = contents(store)
    snapshots = f"{folder}/metadata/snapshots"
    newest = f"{snapshots}/{(await world.disk.list(snapshots))[-1]}"
    data = await world.disk.read(newest)
    await world.disk.write(newest, data.replace(b"box1", b"bax1"))
    async with opened(world, folder) as store:
        assert contents(store) == before


@pytest.mark.row("R24")
async def test_snapshots_are_taken_by_time_and_by_number(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world

    async def n_snapshots() -> int:
        return len(await world.disk.list(f"{folder}/metadata/snapshots"))

    async with opened(world, folder, snapshot_interval_s=30.0) as store:
        await asyncio.sleep(100)
        assert await n_snapshots() == 0, "nothing changed"
        await store.commit(ops.Create(RECORD))
        await asyncio.sleep(29)
        assert await n_snapshots() == 0
        await asyncio.sleep(2)
        assert await n_snapshots() == 1
        await asyncio.sleep(100)
        assert await n_snapshots() == 1
    async with opened(world, folder, snapshot_interval_s=1e6, snapshot_records=10) as store:
        for number in range(30):
            await store.commit(ops.UpdateLabels(ID, {"n": str(number)}))
        await asyncio.sleep(1)
        assert await n_snapshots() >= 2


# --- what is known beside what is stored ------------------------------------------------------------------------------


async def test_a_note_is_seen_and_forgotten_by_a_crash(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
        cursor = store.last_cursor
        store.note(msgspec.structs.replace(RECORD, status="starting", labels={"not": "looked at"}))
        seen, stored = store.get(ID), store.stored(ID)
        assert seen is not None
        assert stored is not None
        assert (seen.status, stored.status, seen.labels, store.last_cursor) == ("starting", "created", {}, cursor)
        with pytest.raises(WrongState):
            store.note(msgspec.structs.replace(RECORD, status="paused"))
        await store.commit(ops.UpdateLabels(ID, {"a": "b"}))
        seen, stored = store.get(ID), store.stored(ID)
        assert seen is not None
        assert stored is not None
        assert (seen.status, seen.labels, stored.status, stored.labels) == ("starting", {"a": "b"}, "created", {"a": "b"})
        await store.put_state(msgspec.structs.replace(seen, status="running", pid=5))
        assert store.get(ID) == store.stored(ID)
        told = [event async for event in store.events_after(0)]
        assert (told[-1].status_before, told[-1].status) == ("created", "running")
    async with opened(world, folder) as store:
        with pytest.raises(NotFound):
            await store.put_state(record(9))


async def test_a_state_that_is_stored_already_costs_no_write(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
        await store.put_state(RECORD)
        assert store.last_cursor == 1


# --- bad input --------------------------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_and_loses_nothing(sim_world: SimWorld, folder: str) -> None:
    world, told = sim_world.world, list[Event]()
    async with opened(world, folder, segment_bytes=64 << 10) as store:
        store.subscribe(told.append)
        await store.commit(ops.Create(RECORD))
        sim_world.disk.capacity_bytes = sim_world.disk.used_bytes
        done = 0
        with pytest.raises(DiskFull):
            for done in range(1000):
                await store.commit(ops.UpdateEnvironment(ID, {"n": str(done), "fill": "x" * 1000}))
        assert done > 10
        assert contents(store)[0].env["n"] == str(done - 1)
        with pytest.raises(DiskFull):
            await asyncio.gather(*(store.commit(ops.UpdateEnvironment(ID, {"fill": "x" * 5000})) for _ in range(5)))
        assert contents(store)[0].env["n"] == str(done - 1), "nobody sees what was refused"
        assert len(told) == done + 1
        sim_world.disk.capacity_bytes = 1 << 40
        await store.commit(ops.UpdateLabels(ID, {"room": "again"}))
        before = contents(store)
    async with opened(world, folder, segment_bytes=64 << 10) as store:
        assert contents(store) == before


@pytest.mark.row("R19")
async def test_a_failed_write_ends_the_process_and_costs_nothing_acknowledged(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    acknowledged: list[int] = []

    async def live() -> None:
        async with opened(world, folder) as store:
            await store.commit(ops.Create(RECORD))
            for number in range(100):
                if number == 20:
                    world.failpoints.set("journal.before_write", "error(EIO)")
                await store.commit(ops.UpdateLabels(ID, {"n": str(number)}))
                acknowledged.append(number)

    handle = sim_world.spawn_node(live())
    await asyncio.gather(handle.wait(), return_exceptions=True)
    world.failpoints.clear()
    assert acknowledged == list(range(20))
    async with opened(world, folder) as store:
        assert contents(store)[0].labels in ({"n": "19"}, {"n": "20"})


async def test_a_closed_store_takes_nothing(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
    with pytest.raises(UnavailableError, match="closed"):
        await store.commit(ops.Delete(ID))
    await store.close()


async def test_records_of_a_newer_isopod_are_refused(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
        store._pack = lambda entry: b'{"v":3,"entry":{"at_ns":1,"change":{"op":"teleport","id":"x"}}}'  # type: ignore[method-assign]
        await store.commit(ops.UpdateLabels(ID, {}))
        store._snapshot_at = store.last_cursor  # as if it were killed now
    with pytest.raises(BadRecord, match="format 3"):
        async with opened(world, folder):
            pass


async def test_what_does_not_fit_into_a_segment_is_refused_and_the_rest_is_not(world: World, folder: str) -> None:
    async with opened(world, folder, segment_bytes=64 << 10) as store:
        await store.commit(*(ops.Create(record(number)) for number in range(8)))
        wide = [ops.UpdateEnvironment(f"{number % 8:064x}", {"n": str(number), "fill": "x" * 3000}) for number in range(100)]
        await asyncio.gather(*(store.commit(change) for change in wide))
        assert store.last_cursor == 108, "one after the other they fit"
        with pytest.raises(TooLarge):
            await store.commit(*wide)
        await store.commit(ops.UpdateLabels(f"{0:064x}", {"a": "b"}))
        before = contents(store)
    async with opened(world, folder, segment_bytes=64 << 10) as store:
        assert contents(store) == before


# --- the first format -------------------------------------------------------------------------------------------------


async def test_files_are_taken_over_once_and_kept(world: World, folder: str) -> None:
    files = f"{folder}/metadata/containers"
    await world.disk.make_directory(files)
    for number in range(3):
        data = msgspec.json.encode({**FIRST, "id": f"{number:064x}", "name": f"box{number}"})
        await world.disk.write(f"{files}/{number:064x}.json", data)
    bad = {**FIRST, "id": "d" * 64, "name": "box1"}  # a name that is taken
    await world.disk.write(f"{files}/{'d' * 64}.json", msgspec.json.encode(bad))
    await world.disk.write(f"{files}/{'e' * 64}.json", b"{")
    async with opened(world, folder) as store:
        assert [found.name for found in contents(store)] == ["box0", "box1", "box2"]
        assert list(store.loaded().damaged) == ["d" * 64, "e" * 64]
        await store.commit(ops.Delete(f"{1:064x}"))
    async with opened(world, folder) as store:
        assert [found.name for found in contents(store)] == ["box0", "box2"], "what was removed does not come back"
        assert list(store.loaded().damaged) == ["d" * 64, "e" * 64]
    assert f"{1:064x}.json" in await world.disk.list(f"{files}.v1")


@pytest.mark.parametrize("seed", range(8))
def test_a_crash_while_files_are_taken_over_begins_anew(seed: int) -> None:
    sim = make_sim_world(seed)
    try:
        sim.run(_crash_while_taking_over(sim, seed))
    finally:
        sim.close()


async def _crash_while_taking_over(sim: SimWorld, seed: int) -> None:
    folder = "/var/lib/records"
    files = f"{folder}/metadata/containers"
    await sim.world.disk.make_directory(files)
    for number in range(300):
        data = msgspec.json.encode({**FIRST, "id": f"{number:064x}", "name": f"box{number}"})
        await sim.world.disk.write_atomic(f"{files}/{number:064x}.json", data)
    for parent in ("/var/lib", folder, f"{folder}/metadata"):
        await sim.world.disk.sync_directory(parent)

    async def take_over() -> None:
        async with opened(sim.world, folder):
            pass

    for attempt in range(3):
        handle = sim.spawn_node(take_over())
        await asyncio.sleep(random.Random(seed * 10 + attempt).random() * 0.2)
        handle.kill()
        sim.disk.crash()
    async with opened(sim.world, folder) as store:
        assert len(contents(store)) == 300
    assert await sim.world.disk.stat(files) is None


@pytest.mark.row("R27", "R31")
async def test_what_is_too_large_is_refused_alone(world: World, folder: str) -> None:
    async with opened(world, folder, record_bytes_max=8192) as store:
        changes = [ops.Create(record(number, env={"A": "x" * (10_000 if number == 3 else 10)})) for number in range(1, 7)]
        outcomes = await asyncio.gather(*(store.commit(change) for change in changes), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [type(None), type(None), TooLarge, *[type(None)] * 3]
        before = contents(store)
        assert [found.name for found in before] == ["box1", "box2", "box4", "box5", "box6"]
    async with opened(world, folder) as store:
        assert contents(store) == before
