"""Watches: every change once and in order, whatever is slow, lost, forgotten or replaced meanwhile."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.api.store import messages as m
from isopod.api.store.messages import Delete, Entry, KvChanges, Put, Txn
from isopod.cluster.store.hub import WatchHub
from isopod.cluster.store.machine import MachineLimits, StoreMachine
from isopod.cluster.store.replica import in_parts
from isopod.world.errors import Disconnected, Exhausted, RevisionCompacted
from isopod.world.sim import SimWorld
from tests.cluster.store.rig import FakeLog, Feeder

KEYS = st.sampled_from(["a", "a/1", "a/2", "b", "b/1"])
OPS = st.one_of(
    st.builds(Put, KEYS, st.binary(max_size=1)),
    st.builds(Delete, KEYS),
    st.builds(m.DeletePrefix, st.just("a")),
    st.builds(lambda keys: Txn((), tuple(Put(key, b"t") for key in keys)), st.lists(KEYS, min_size=1, max_size=3)),
)


def told(changes: list[KvChanges]) -> list[Entry]:
    return [entry for change in changes for entry in change.entries]


async def test_tells_what_is_and_what_comes(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 2) as log:
        await log.replicas[1].put("a/1", b"1")
        async with log.replicas[2].watch("a/", progress_s=1.0) as watch:
            first = await anext(watch)
            assert (first.revision, first.entries) == (1, [])
            await log.replicas[1].put("b", b"2")
            await log.replicas[1].put("a/2", b"3")
            await log.replicas[1].delete("a/1")
            changes = await anext(watch)
            assert [(e.key, e.mod_revision, e.is_deleted) for e in changes.entries] == [("a/2", 3, False), ("a/1", 4, True)]
            quiet = await anext(watch)
            assert (quiet.revision, quiet.entries) == (4, [])
        assert log.replicas[2].status().n_watchers == 0
        async with log.replicas[2].watch("a/1", exact=True, from_revision=1) as watch:
            assert [e.mod_revision for e in (await anext(watch)).entries] == [1, 4]


@given(
    st.lists(OPS, min_size=1, max_size=25),
    st.sampled_from(["", "a", "a/", "b/1"]),
    st.booleans(),
    st.lists(st.booleans(), min_size=25, max_size=25),
)
@settings(max_examples=100, deadline=None)
def test_never_misses_or_doubles_over_reconnections(ops: list[m.Op], prefix: str, exact: bool, breaks: list[bool]) -> None:
    feeder = Feeder()
    hub = WatchHub(feeder.machine)
    number, watcher = hub.open(prefix, exact=exact, from_revision=1)
    seen: list[Entry] = []
    for op, is_broken in zip(ops, breaks, strict=False):
        feeder.do(op)
        if is_broken:
            seen += watcher.take(feeder.machine.revision)
            # Lost, and resumed from the revision behind the last that was told.
            hub.end(number)
            number, watcher = hub.open(prefix, exact=exact, from_revision=watcher.revision + 1)
    seen += watcher.take(feeder.machine.revision)
    wanted = [e for e in feeder.machine.keys.history if (e.key == prefix if exact else e.key.startswith(prefix))]
    assert seen == wanted
    revisions = [entry.mod_revision for entry in seen]
    assert revisions == sorted(revisions)


async def test_one_that_is_too_slow_is_cut_off_and_may_go_on(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1, watch_queue_max=3) as log:
        replica = log.replicas[1]
        async with replica.watch("") as slow, replica.watch("z") as other:
            await anext(slow)
            await anext(other)
            for number in range(5):
                await replica.put("a", bytes([number]))
            with pytest.raises(Exhausted) as caught:
                await anext(slow)
            assert "from revision 1" in caught.value.hint
            assert replica._hub.statistics().n_cut == 1
            async with replica.watch("", from_revision=slow.revision + 1) as again:
                assert [e.value for e in (await anext(again)).entries] == [bytes([number]) for number in range(5)]
            await replica.put("z", b"")
            assert len((await anext(other)).entries) == 1


async def test_what_is_forgotten_is_said_to_be(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1) as log:
        replica = log.replicas[1]
        for number in range(4):
            await replica.put("a", bytes([number]))
        assert await replica.compact(2) == 2
        with pytest.raises(RevisionCompacted, match="behind 2"):
            await anext(replica.watch("", from_revision=2))
        async with replica.watch("", from_revision=3) as watch:
            assert [e.mod_revision for e in (await anext(watch)).entries] == [3, 4]


async def test_changes_yet_to_come_may_be_watched_on_a_node_that_is_behind(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 2) as log:
        log.rafts[2].is_lagging = True
        for number in range(4):
            await log.replicas[1].put("a", bytes([number]))
        async with log.replicas[2].watch("", from_revision=3) as watch:
            first = await anext(watch)
            assert (first.revision, first.entries) == (2, [])
            log.rafts[2].is_lagging = False
            log.rafts[2].catch_up()
            assert [e.mod_revision for e in (await anext(watch)).entries] == [3, 4]


async def test_a_snapshot_under_a_watch_loses_nothing(sim_world: SimWorld) -> None:
    leader, behind = Feeder(), Feeder()
    hub = WatchHub(behind.machine)
    for feeder in (leader, behind):
        feeder.do(Put("a", b"0"))
    _, watcher = hub.open("a", exact=False, from_revision=1)
    _, taken = hub.open("a", exact=False, from_revision=1)
    assert len(taken.take(1)) == 1
    for number in range(1, 4):
        leader.do(Put("a", bytes([number])))
    behind.machine.restore(leader.machine.snapshot())
    assert await watcher.wait(1)
    assert [e.mod_revision for e in watcher.take(4)] == [1, 2, 3, 4]
    assert [e.mod_revision for e in taken.take(4)] == [2, 3, 4]


async def test_a_snapshot_that_leaves_a_gap_ends_the_watch(sim_world: SimWorld) -> None:
    leader, behind = Feeder(), Feeder()
    hub = WatchHub(behind.machine)
    _, watcher = hub.open("", exact=False, from_revision=1)
    leader.do(Put("a", b"0"), Put("a", b"1"), m.Compact(1))
    behind.machine.restore(leader.machine.snapshot())
    with pytest.raises(RevisionCompacted):
        await watcher.wait(1)
    hub.close(Disconnected("x"))


async def test_ends_with_its_node(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1) as log:
        watch = log.replicas[1].watch("")
        await anext(watch)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.1)
    with pytest.raises(Disconnected, match="shutting down"):
        await waiting


def test_changes_are_taken_apart_for_frames_and_nothing_is_lost() -> None:
    entries = [Entry(f"k{number}", bytes(100_000), number, number, 1) for number in range(1, 12)]
    parts = in_parts(KvChanges(revision=11, entries=entries, age_s=0.5))
    assert [entry for part in parts for entry in part.entries] == entries
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    assert (parts[-1].revision, parts[-1].age_s) == (11, 0.5)
    assert in_parts(KvChanges(revision=3)) == [KvChanges(revision=3)]


def test_thousands_of_watchers_of_other_keys_cost_nothing() -> None:
    feeder = Feeder(StoreMachine(MachineLimits()))
    hub = WatchHub(feeder.machine)
    for number in range(2000):
        hub.open(f"agents/{number:05d}/", exact=False, from_revision=0)
    for number in range(100):
        feeder.do(Put(f"agents/{number:05d}/x", b""))
    assert hub.statistics().n_told == 100
