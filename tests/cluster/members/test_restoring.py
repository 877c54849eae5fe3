"""A restore is done wholly or not at all, whoever dies in the middle of it."""

import asyncio
from random import Random

import msgspec
import pytest

from isopod.api.store.messages import Delete, Put, Txn
from isopod.cluster.member import ClusterNode
from isopod.cluster.members import records as r
from isopod.cluster.members.backup import BackupMaker, held, make_backup, read_backup
from isopod.cluster.members.restoring import PART_BYTES
from isopod.world.errors import InUse, IsopodError, WrongState
from isopod.world.sim import SimWorld
from tests.cluster.members.rig import Rig, rig_of, until

N_KEYS = 6400
BATCH = 128


async def fill(node: ClusterNode, value: bytes) -> None:
    """Write many small keys, as many at a time as a transaction takes."""
    for first in range(0, N_KEYS, BATCH):
        puts = tuple(Put(f"jobs/{number:05}", b"%s %d" % (value, number)) for number in range(first, first + BATCH))
        await node.store.txn(Txn(then=puts))


async def furnished(rig: Rig) -> tuple[list[ClusterNode], bytes]:
    """Return three nodes that hold something else than the backup says."""
    nodes = await rig.form(3)
    await fill(nodes[0], b"old")
    data, _ = make_backup(nodes[0].store.machine, nodes[0].cluster_id, 7)
    await fill(nodes[0], b"new")
    await nodes[0].store.put("later", b"1")
    return nodes, data


async def many_pieces(node: ClusterNode) -> bytes:
    """Write what takes long to stage, and return a backup of it."""
    chance = Random(7)
    for number in range(20):
        await node.store.put(f"big/{number}", chance.randbytes(PART_BYTES))
    return make_backup(node.store.machine, node.cluster_id, 7)[0]


def mark_of(node: ClusterNode) -> r.RestoreRecord | None:
    return node.members.registry.restore


def leftovers(node: ClusterNode) -> list[str]:
    return [entry.key for entry in node.store.machine.entries(r.RESTORE)]


async def test_whoever_leads_next_finishes_what_its_leader_had_begun(sim_world: SimWorld, folder: str) -> None:
    async with rig_of(sim_world.world, folder) as rig:
        nodes, data = await furnished(rig)
        leader, (asked, third) = rig.leader(), rig.others()
        wanted = dict(read_backup(data).entries)
        task = asyncio.create_task(asked.restorer.restore(data, force=True))
        await until(lambda: (mark := mark_of(third)) is not None and mark.state == "applying", "it is applied")
        with pytest.raises(InUse, match="in use by a restore"):
            third.restorer.refuse_users()
        assert "put back" in third.status().why
        with pytest.raises(InUse, match="another restore"):
            await third.restorer.restore(data, force=True)
        await leader.stop()
        assert held(third.store.machine) != wanted, "the leader was stopped in the middle"
        assert (await task).n_keys == N_KEYS
        await until(lambda: held(asked.store.machine) == held(third.store.machine) == wanted, "both hold the backup")
        assert leftovers(third) == []
        third.restorer.refuse_users()
        assert third.status().why == ""
        assert len(nodes) == 3


async def test_who_dies_while_it_stages_leaves_what_was_there(sim_world: SimWorld, folder: str) -> None:
    async with rig_of(sim_world.world, folder) as rig:
        await rig.form(3)
        asked, third = rig.others()
        data = await many_pieces(third)
        await third.store.put("big/0", b"changed")
        await third.store.barrier()
        before = held(third.store.machine)
        task = asyncio.create_task(asked.restorer.restore(data, force=True))
        await until(lambda: bool(third.store.machine.entries(r.RESTORE_PARTS)), "it is staged")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: mark_of(third) is None, "who gives up takes its pieces away")
        assert leftovers(third) == []
        assert held(third.store.machine) == before


async def test_pieces_that_nobody_came_back_for_are_removed(sim_world: SimWorld, folder: str) -> None:
    async with rig_of(sim_world.world, folder) as rig:
        node = await rig.found()
        now_ns = sim_world.world.clock.now_ns()
        mark = r.RestoreRecord(
            id="aa", state="staging", digest="", n_parts=2, began_at_ns=now_ns, source_cluster_id="b" * 16, source_revision=1
        )
        await node.store.txn(Txn(then=(Put(r.RESTORE_STATE, msgspec.json.encode(mark)),)))
        await node.store.put(r.restore_part_key(0), b"x")
        await asyncio.sleep(3000)
        assert mark_of(node) is not None
        await asyncio.sleep(700)
        assert leftovers(node) == []


async def test_pieces_that_make_no_backup_change_nothing(sim_world: SimWorld, folder: str) -> None:
    async with rig_of(sim_world.world, folder) as rig:
        node = await rig.found()
        await node.store.put("a", b"b")
        data, _ = make_backup(node.store.machine, node.cluster_id, 7)
        await node.store.put("a", b"c")
        mark = r.RestoreRecord(
            id="aa",
            state="applying",
            digest="0" * 64,
            n_parts=1,
            began_at_ns=sim_world.world.clock.now_ns(),
            source_cluster_id="b" * 16,
            source_revision=1,
        )
        await node.store.txn(Txn(then=(Put(r.RESTORE_STATE, msgspec.json.encode(mark)), Put(r.restore_part_key(0), data))))
        await until(lambda: (found := mark_of(node)) is not None and found.state == "failed", "it is found out")
        assert held(node.store.machine) == {"a": b"c"}
        node.restorer.refuse_users()
        # The next one takes its place.
        assert (await node.restorer.restore(data, force=True)).n_keys == 1
        assert held(node.store.machine) == {"a": b"b"}
        assert leftovers(node) == []


async def test_of_two_restores_the_later_one_counts(sim_world: SimWorld, folder: str) -> None:
    async with rig_of(sim_world.world, folder) as rig:
        node = await rig.found()
        first = await many_pieces(node)
        await node.store.txn(Txn(then=tuple(Delete(f"big/{number}") for number in range(1, 20))))
        second, _ = make_backup(node.store.machine, node.cluster_id, 7)
        slow = asyncio.create_task(node.restorer.restore(first, force=True))
        await until(lambda: bool(leftovers(node)), "the first one is staged")
        quick = await node.restorer.restore(second, force=True)
        with pytest.raises((WrongState, InUse)) as caught:
            await slow
        assert isinstance(caught.value, IsopodError)
        assert quick.n_keys == 1
        assert list(held(node.store.machine)) == ["big/0"]


async def test_a_backup_is_of_one_moment_whatever_is_written_while_it_is_packed(sim_world: SimWorld, folder: str) -> None:
    async with rig_of(sim_world.world, folder) as rig:
        node = await rig.found()
        await fill(node, b"old")
        maker = BackupMaker(node.store.machine, node.cluster_id, 7)
        pieces = maker.pieces()
        taken = [next(pieces)]
        await node.store.put("jobs/00001", b"changed")
        await node.store.delete("jobs/06399")
        taken += pieces
        backup = read_backup(b"".join(taken))
        assert dict(backup.entries) == {f"jobs/{number:05}": b"old %d" % number for number in range(N_KEYS)}
        assert maker.info().n_bytes == sum(map(len, taken))


async def test_a_restore_on_a_node_that_stops_is_told_so(sim_world: SimWorld, folder: str) -> None:
    async with rig_of(sim_world.world, folder) as rig:
        _, data = await furnished(rig)
        asked = rig.others()[0]
        task = asyncio.create_task(asked.restorer.restore(data, force=True))
        await asyncio.sleep(0.005)
        await asked.stop()
        with pytest.raises(IsopodError):
            await task
