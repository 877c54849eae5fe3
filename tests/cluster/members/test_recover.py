"""A lost quorum, and the way out: `recover`. And backups of the replicated state."""

from typing import Any

import pytest

from isopod.cluster.members.backup import make_backup, read_backup
from isopod.cluster.members.recover import RecoveryReport, recover
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import AlreadyServing, BadRecord, IsopodError, NotFound, PeerError, WrongState
from isopod.world.world import World
from tests.cluster.members.rig import TOKEN, Rig, rig_of, until


async def recovered(world: World, folder: str, *, do_it: bool) -> RecoveryReport:
    logger = Logger(lambda _: None, world.clock)
    return await recover(world, folder, do_it=do_it, logger=logger, metrics=Registry())


async def lost(rig: Rig) -> Any:
    """Form a cluster, write something, stop it all; return a node that has everything."""
    nodes = await rig.form(3)
    for number in range(50):
        await nodes[0].store.put(f"jobs/{number}", str(number).encode())
    await until(lambda: len({node.raft.applied_index for node in nodes}) == 1, "all have it")
    for node in nodes:
        await node.stop()
    return nodes[2]


@pytest.mark.row("B19")
async def test_a_cluster_is_recovered_from_one_node(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        left = await lost(rig)
        data_dir, old_id = left.config.data_dir, left.cluster_id
        before = sorted(await world.disk.list(data_dir))
        plan = await recovered(world, data_dir, do_it=False)
        assert (plan.node_id, plan.old_cluster_id, plan.new_cluster_id, plan.voters, plan.n_keys) == (3, old_id, "", (1, 2, 3), 50)
        assert "LOST would be" in plan.as_text()
        assert "--yes" in plan.as_text()
        assert sorted(await world.disk.list(data_dir)) == before, "looking changes nothing"
        done = await recovered(world, data_dir, do_it=True)
        assert done.new_cluster_id not in ("", old_id)
        assert "done: cluster" in done.as_text()
        assert done.new_cluster_id in done.as_json()
        assert sorted(await world.disk.list(done.kept_in)) == ["identity.json", "peers.json", "raft", "tls"]
        alone = await rig.again(3)
        status = alone.status()
        assert (status.cluster_id, status.voters, status.state) == (done.new_cluster_id, (3,), "leader")
        assert (await alone.store.get("jobs/49")).value == b"49"
        await alone.store.put("jobs/50", b"50")
        assert alone.members.registry.cluster is not None
        assert alone.members.registry.cluster.recovered_from == old_id


async def test_the_old_nodes_are_refused_and_may_join_anew(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        left = await lost(rig)
        await recovered(world, left.config.data_dir, do_it=True)
        alone = await rig.again(3)
        # The two old ones are a quorum of the old cluster: they go on by themselves, and neither side hears the other.
        old = [rig.make(number, bind=rig.nodes[number].advertised) for number in (1, 2)]
        for node in old:
            await node.start()
        await until(lambda: any(node.status().state == "leader" for node in old), "the old ones go on")
        assert alone.status().voters == (3,)
        assert alone.cluster_id != old[0].cluster_id
        with pytest.raises(PeerError):
            from isopod.api import cluster as c

            await old[0].links.call(3, c.STATUS, c.StatusRequest())
        for node in old:
            await node.stop()
        await world.disk.remove_tree(old[0].config.data_dir)
        token = (await alone.members.create_token(_token())).token
        joined = await rig.join(1, alone, token=token)
        await until(lambda: joined.status().voters == (1, 3), "it votes")
        assert (await joined.store.get("jobs/7")).value == b"7"


def _token() -> Any:
    from isopod.api.cluster import CreateToken

    return CreateToken()


async def test_nothing_is_recovered_under_a_running_node_or_from_nothing(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        node = await rig.found()
        with pytest.raises(AlreadyServing):
            await recovered(world, node.config.data_dir, do_it=True)
        with pytest.raises(NotFound, match="name the data folder|no such replica"):
            await recovered(world, f"{folder}/nowhere", do_it=True)
        agent = await rig.join(5, node, role="agent")
        await agent.stop()
        with pytest.raises(NotFound, match="replica in"):
            await recovered(world, agent.config.data_dir, do_it=False)


@pytest.mark.parametrize("n_moves", range(1, 7))
async def test_a_recovery_cut_off_while_files_move_is_finished(sim_world: Any, folder: str, n_moves: int) -> None:
    world = sim_world.world
    async with rig_of(world, folder, "tls") as rig:
        left = await lost(rig)
        data_dir = left.config.data_dir
        cut = _Cut(world.disk, data_dir, n_moves)
        import dataclasses

        with pytest.raises(IsopodError):
            await recovered(dataclasses.replace(world, disk=cut), data_dir, do_it=True)
        half = rig.make(3, bind=left.advertised)
        if cut.n_left < 0 and n_moves > 1:
            with pytest.raises(IsopodError):
                await half.start()
        await half.stop()
        done = await recovered(world, data_dir, do_it=True)
        alone = await rig.start(3, bind=left.advertised)
        assert alone.cluster_id == done.new_cluster_id
        assert (await alone.store.get("jobs/49")).value == b"49"


class _Cut:
    """A disk that fails at the n-th rename inside the data folder, and at all after it."""

    def __init__(self, disk: Any, folder: str, n_moves: int) -> None:
        self._disk = disk
        self._folder = folder
        self.n_left = n_moves

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    async def rename(self, source: str, target: str) -> None:
        if not source.startswith(f"{self._folder}/recovering") and target.count("/") <= self._folder.count("/") + 2:
            self.n_left -= 1
            if self.n_left < 0:
                raise OSError(5, "cut")
        await self._disk.rename(source, target)


# --- backups ----------------------------------------------------------------------------------------------------------


async def test_a_backup_goes_back_into_its_own_and_into_another_cluster(world: World, folder: str) -> None:
    async with rig_of(world, f"{folder}/one") as one, rig_of(world, f"{folder}/two") as two:
        first, second = await one.found(), await two.found()
        for number in range(300):
            await first.store.put(f"jobs/{number:03}", bytes(1000))
        data, info = make_backup(first.store.machine, first.cluster_id, 7)
        assert info.revision == first.store.machine.revision
        await first.store.put("jobs/999", b"later")
        await first.store.delete("jobs/000")
        with pytest.raises(WrongState, match="not empty: it holds 300 keys") as caught:
            await first.restorer.restore(data, force=False)
        assert "--force" in caught.value.hint
        await first.restorer.restore(data, force=True)
        assert (await first.store.get("jobs/000")).value == bytes(1000)
        assert (await first.store.get("jobs/999")).value is None
        done = await second.restorer.restore(data, force=False)
        assert (done.n_keys, done.source_cluster_id) == (300, first.cluster_id)
        assert [entry.id for entry in second.status().nodes] == [1], "no member came with it"
        assert second.members.registry.cluster is not None
        assert second.members.registry.cluster.cluster_id == second.cluster_id
        third = await two.join(2, second, token=TOKEN)
        assert (await third.store.get("jobs/299")).value == bytes(1000)


async def test_a_damaged_backup_is_refused(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        node = await rig.found()
        await node.store.put("a", b"b")
        data, _ = make_backup(node.store.machine, node.cluster_id, 7)
        assert read_backup(data).entries == [("a", b"b")]
        for place in range(len(data)):
            damaged = bytearray(data)
            damaged[place] ^= 1
            with pytest.raises(BadRecord):
                read_backup(bytes(damaged))
        for n_bytes in range(len(data)):
            with pytest.raises(BadRecord):
                read_backup(data[:n_bytes])
