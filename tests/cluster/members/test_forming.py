"""Clusters form: one node alone, several by joining, several by one and the same line; on the host and in the simulation."""

import pytest

from isopod.cluster.members.identity import IdentityFile
from isopod.world.world import World
from tests.cluster.members.rig import TOKEN, free_addresses, peers_of, rig_of, until


@pytest.mark.row("B2")
@pytest.mark.row("B14")
async def test_one_node_founds_leads_and_takes_commands(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        node = await rig.found()
        status = node.status()
        assert (status.state, status.leader_id, status.voters) == ("leader", 1, (1,))
        await node.store.put("color", b"red")
        assert (await node.store.get("color")).value == b"red"


@pytest.mark.row("B3")
@pytest.mark.row("B35")
async def test_three_nodes_join_and_say_the_same(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        nodes = await rig.form(3)
        await nodes[2].store.put("color", b"red")
        await until(lambda: len({node.status().applied for node in nodes}) == 1, "all applied the same")
        said = [node.status() for node in nodes]
        assert {(each.leader_id, each.term, each.voters, each.digest) for each in said} == {(1, said[0].term, (1, 2, 3), said[0].digest)}
        assert {tuple((entry.id, entry.address, entry.role) for entry in each.nodes) for each in said} == {
            tuple((node.config.node_id, node.advertised, "voter") for node in nodes)
        }
        assert sorted(each.state for each in said) == ["follower", "follower", "leader"]


@pytest.mark.row("B3")
@pytest.mark.row("B33")
async def test_the_same_line_on_each_machine_forms_the_cluster(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        addresses = free_addresses(3)
        nodes = [rig.make(node_id, bind=address, peers=peers_of(addresses), token=TOKEN) for node_id, address in enumerate(addresses, 1)]
        for node in reversed(nodes):  # those that join are there first
            await node.start()
        for node in nodes:
            await node.wait_ready(30.0)
        await until(lambda: all(node.status().voters == (1, 2, 3) for node in nodes), "all vote")
        assert len({node.cluster_id for node in nodes}) == 1
        await nodes[1].store.put("color", b"red")
        assert (await nodes[2].store.get("color")).value == b"red"


@pytest.mark.row("B19")
async def test_members_come_back_after_all_were_stopped(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        nodes = await rig.form(3)
        await nodes[0].store.put("color", b"red")
        cluster_id = nodes[0].cluster_id
        for node in nodes:
            await node.stop()
        again = [rig.make(node.config.node_id, bind=node.advertised) for node in nodes]
        for node in again:
            await node.start()
        for node in again:
            await node.wait_ready(20.0)
        assert {node.cluster_id for node in again} == {cluster_id}
        assert (await again[2].store.get("color")).value == b"red"


async def test_a_node_that_was_enrolled_founds_no_cluster_of_its_own(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        first = await rig.found()
        node = rig.make(2, join=(first.advertised,), token=TOKEN)
        await node.start()
        await until(lambda: node.cluster_id == first.cluster_id, "it has a certificate")
        await node.stop()
        file = await IdentityFile.open(world, node.config.data_dir, 2)
        await file.set_phase("enrolled")
        file.close()
        await world.disk.remove_tree(f"{node.config.data_dir}/raft")
        await world.disk.remove(f"{node.config.data_dir}/peers.json")
        told_nothing = rig.make(2)
        await told_nothing.start()
        assert told_nothing.status().state == "joining"
        assert "waits to be told" in told_nothing.status().why
        await told_nothing.join_now(first.advertised, TOKEN, timeout_s=20)
        assert told_nothing.cluster_id == first.cluster_id
