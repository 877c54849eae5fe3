"""A node whose disk lost what it had promised the others takes part no more, and says what to do."""

import pytest

from isopod.world.errors import BadRecord, IdentityConflict
from isopod.world.world import World
from tests.cluster.members.rig import rig_of, until


async def copy_tree(world: World, source: str, target: str) -> None:
    await world.disk.make_directory(target)
    for name in await world.disk.list(source):
        found = await world.disk.stat(f"{source}/{name}")
        assert found is not None
        if found.is_directory:
            await copy_tree(world, f"{source}/{name}", f"{target}/{name}")
        else:
            await world.disk.copy_file(f"{source}/{name}", f"{target}/{name}")


@pytest.mark.row("S18")
async def test_an_old_copy_of_a_replica_is_found_out_and_stays_out(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        await rig.form(3)
        victim = rig.others()[-1].config.node_id
        await rig.nodes[victim].stop()
        data_dir = rig.nodes[victim].config.data_dir
        await copy_tree(world, f"{data_dir}/raft", f"{data_dir}/old")
        await rig.again(victim)
        for number in range(20):
            await rig.leader().store.put(f"a/{number}", b"x")
        leader = rig.leader()
        await until(lambda: rig.nodes[victim].raft.applied_index >= leader.raft.applied_index, "it has all of it")
        old = rig.nodes[victim]
        await old.stop()
        await world.disk.remove_tree(f"{data_dir}/raft")
        await copy_tree(world, f"{data_dir}/old", f"{data_dir}/raft")

        back = rig.make(victim, bind=old.advertised)
        await back.start()
        await until(back.failed.done, "it is told")
        error = back.failed.exception()
        assert isinstance(error, BadRecord)
        assert "counts on entries that are not in it" in error.message
        assert f"isopod cluster leave {victim}" in error.hint
        assert error.message in back.status().why
        assert not back.raft._driver.is_open, "it gives no vote any more"
        await leader.store.put("b", b"without it")
        await back.stop()
        # It is refused from now on, until it comes as a new one.
        with pytest.raises(IdentityConflict, match="its disk lost part of the log") as caught:
            await rig.make(victim, bind=old.advertised).start()
        assert "empty the data folder" in caught.value.hint
        assert (await leader.members.leave(victim)).success


async def test_a_log_that_is_gone_is_found_out_though_snapshots_are_there(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        await rig.form(3)
        node = rig.others()[0]
        await node.raft.make_snapshot()
        await node.stop()
        await world.disk.remove_tree(f"{node.config.data_dir}/raft/log")
        assert await world.disk.list(f"{node.config.data_dir}/raft/snapshots")
        with pytest.raises(IdentityConflict, match="its replica is gone"):
            await rig.make(node.config.node_id, bind=node.advertised).start()
