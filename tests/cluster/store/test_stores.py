"""Whole stores over the real Raft, in the simulation: what clients were told holds, whoever dies, hangs or is cut off."""

import asyncio

import pytest

from isopod.api.store import Condition, KvChanges, Put, Txn
from isopod.cluster.raft.settings import RaftSettings
from isopod.cluster.store import ReplicaSettings, Table
from isopod.world.errors import DeadlineExceeded, IsopodError
from tests.cluster.store.sim_stores import SimStores

SEEDS = [12345, 2]


@pytest.mark.row("B2", "B12", "B18")
@pytest.mark.parametrize("seed", SEEDS)
def test_acknowledged_writes_survive_any_leaders_death_and_are_done_once(seed: int) -> None:
    with SimStores(seed) as stores:
        stores.run(_die(stores))


async def _die(stores: SimStores) -> None:
    acknowledged: dict[str, int] = {}
    is_over = asyncio.Event()

    async def write(writer: int) -> None:
        async with stores.client() as store:
            number = 0
            while not is_over.is_set():
                key = f"w{writer}/{number}"
                acknowledged[key] = await store.put(key, b"x", timeout_s=10)
                number += 1
                await asyncio.sleep(0.02)

    writers = [asyncio.ensure_future(write(writer)) for writer in range(4)]
    for _ in range(4):
        await asyncio.sleep(0.4)
        dead = await stores.leader()
        stores.kill(dead)
        await asyncio.sleep(1.0)
        stores.start(dead)
    is_over.set()
    await asyncio.gather(*writers)
    await stores.settle()
    async with stores.client() as store:
        entries, _ = await store.list_all("w")
        report = await store.consistency()
    assert {entry.key: entry.mod_revision for entry in entries} == acknowledged
    assert [entry.key for entry in entries if entry.version != 1] == []
    assert len(acknowledged) > 100
    assert report.consistent is True


@pytest.mark.row("B18")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_counter_counts_every_increment_once(seed: int) -> None:
    """Compare-and-set from three clients while leaders hang and connections break: no increment is lost or doubled."""
    with SimStores(seed) as stores:
        stores.run(_count(stores))


async def _count(stores: SimStores) -> None:
    n_done = 0

    async def increment(number: int) -> None:
        nonlocal n_done
        async with stores.client(number) as store:
            for _ in range(25):
                while True:
                    entry = (await store.get("n", timeout_s=20)).entry
                    value, revision = (int(entry.value), entry.mod_revision) if entry else (0, 0)
                    if await store.put_if("n", b"%d" % (value + 1), revision=revision, timeout_s=20) is not None:
                        break
                n_done += 1
                await asyncio.sleep(0.05)

    clients = [asyncio.ensure_future(increment(number)) for number in stores.ids]
    for _ in range(3):
        await asyncio.sleep(0.3)
        leader = await stores.leader()
        stores.handles[leader].hang()
        await asyncio.sleep(0.8)
        stores.handles[leader].resume()
        stores.fabric.reset(f"node{await stores.leader()}", "node4")
    await asyncio.gather(*clients)
    async with stores.client() as store:
        assert (await store.get("n")).value == b"75"
    assert n_done == 75
    await stores.settle()


@pytest.mark.row("B45")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_watch_tells_every_change_once_whoever_dies(seed: int) -> None:
    with SimStores(seed) as stores:
        stores.run(_watch(stores))


async def _watch(stores: SimStores) -> None:
    seen: list[tuple[str, int]] = []
    begun = asyncio.Event()

    async def follow() -> None:
        async with stores.client() as store, store.watch("k", progress_s=0.3) as watch:
            async for changes in watch:
                begun.set()
                _note(changes, seen)
                if any(key == "k/last" for key, _ in seen):
                    return

    following = asyncio.ensure_future(follow())
    await begun.wait()
    async with stores.client() as store:
        told: list[tuple[str, int]] = []
        for number in range(60):
            if number in {20, 40}:
                dead = await stores.leader()
                stores.kill(dead)
                if number == 40:
                    stores.start(*(each for each in stores.ids if each not in stores.handles))
            told.append((f"k/{number}", await store.put(f"k/{number}", b"", timeout_s=10)))
            await asyncio.sleep(0.01)
            if number == 30:
                stores.start(*(each for each in stores.ids if each not in stores.handles))
        told.append(("k/last", await store.put("k/last", b"", timeout_s=10)))
    await following
    assert seen == told


def _note(changes: KvChanges, seen: list[tuple[str, int]]) -> None:
    seen.extend((entry.key, entry.mod_revision) for entry in changes.entries)


@pytest.mark.row("B12")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_lease_never_ends_while_its_holder_may_believe_in_it(seed: int) -> None:
    with SimStores(seed) as stores:
        stores.run(_hold(stores))


async def _hold(stores: SimStores) -> None:
    loop = asyncio.get_running_loop()
    ttl_s = 2.0
    async with stores.client() as store, stores.client() as other:
        lease = await store.lease_grant(ttl_s)
        held_until = loop.time()  # the holder's own reckoning: from when it asked
        await store.put("held", b"", lease=lease, timeout_s=10)
        killed = 0
        for number in range(12):
            asked = loop.time()
            try:
                [left_s] = await store.lease_keep([lease], timeout_s=1.0)
            except IsopodError:
                left_s = 0.0
            if left_s:
                held_until = asked + left_s
            if number in {3, 7}:
                dead = await stores.leader()
                stores.kill(dead)
                stores.start(dead)
                killed += 1
            found = await other.get("held", timeout_s=10)
            assert found.entry is not None or loop.time() > held_until
            await asyncio.sleep(0.4)
        assert killed == 2
        assert (await other.get("held")).entry is not None
        # Nobody keeps it any more: it ends, after its time, and not long after.
        await asyncio.sleep(ttl_s + 0.5)
        assert (await other.get("held")).entry is None
    await stores.settle()


@pytest.mark.row("B18")
def test_nothing_waits_for_ever_on_the_side_without_a_quorum() -> None:
    with SimStores(7) as stores:
        stores.run(_cut_off(stores))


async def _cut_off(stores: SimStores) -> None:
    loop = asyncio.get_running_loop()
    leader = await stores.leader()
    async with stores.client(leader) as store:
        await store.put("a", b"1")
        others = [f"node{number}" for number in stores.ids if number != leader]
        stores.fabric.partition([[f"node{leader}", "node4"], others])
        for timeout_s in (1.0, 5.0, 30.0):
            began = loop.time()
            with pytest.raises(DeadlineExceeded):
                await store.put("a", b"2", timeout_s=timeout_s)
            assert loop.time() - began <= timeout_s + 0.2
            if timeout_s < 10:
                continue
            began = loop.time()
            with pytest.raises(IsopodError):
                await stores.running[leader].replica.put("a", b"3", timeout_s=60)
            assert loop.time() - began <= 10.2
        with pytest.raises(DeadlineExceeded):
            await store.get("a", timeout_s=1)
        stale = await store.get("a", consistency="stale")
        assert stale.value == b"1"
        assert stale.age_s is None or stale.age_s > 30
        stores.fabric.heal()
        await store.put("a", b"4")
        assert (await store.get("a")).value == b"4"
    await stores.settle()


@pytest.mark.row("B35")
def test_a_node_that_came_by_snapshot_holds_the_same() -> None:
    raft = RaftSettings(snapshot_log_entries=50, keep_log_entries=20)
    with SimStores(9, raft=raft, store=ReplicaSettings(check_s=5.0)) as stores:
        stores.run(_fall_behind(stores))


async def _fall_behind(stores: SimStores) -> None:
    leader = await stores.leader()
    behind = stores.ids[leader % 3]
    stores.kill(behind)
    async with stores.client() as store:
        lease = await store.lease_grant(600)
        for number in range(300):
            await store.put(f"k{number % 40}", b"%d" % number, lease=lease if number % 2 else 0)
        stores.start(behind)
        await stores.settle()
        assert stores.running[behind].raft.status().snapshot_index > 100
        report = await store.consistency()
        assert report.consistent is True
        assert {member.state for member in report.members} == {"equal"}
        # What came with the snapshot is as good as what came with the log: a watch may begin before it.
        async with stores.client(behind) as late, late.watch("k", from_revision=1) as watch:
            changes = await anext(watch)
            assert [entry.mod_revision for entry in changes.entries] == list(range(1, 301))
        assert await store.lease_revoke(lease) == 20
    await stores.settle()


@pytest.mark.row("B12")
def test_tables_and_transactions_on_any_node() -> None:
    with SimStores(4) as stores:
        stores.run(_tables(stores))


async def _tables(stores: SimStores) -> None:
    await stores.wait(lambda: len(stores.running) == 3)
    leader = await stores.leader()
    follower = stores.running[stores.ids[leader % 3]].replica
    table = Table(follower, "jobs/", dict[str, int])
    assert await table.put_if("a", {"n": 1}, revision=0) == 1
    row = await table.get("a")
    assert row is not None
    assert (row.name, row.record, row.revision) == ("a", {"n": 1}, 1)
    assert await table.put_if("a", {"n": 2}, revision=0) is None
    result = await follower.txn(Txn((Condition("jobs/a", "version", "=", 1),), (table.put_op("b", {"n": 3}), Put("other", b""))))
    assert result.succeeded
    rows, revision = await table.list_all()
    assert ([row.name for row in rows], revision) == (["a", "b"], 2)
    assert await table.delete("a", revision=9) is False
    assert await table.delete("a", revision=1) is True
