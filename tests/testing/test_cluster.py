"""The test kit's cluster of real nodes: it forms, survives the stop of its leader, and cleans up."""

import os

import pytest

from isopod.testing import ConditionNotMet, TestCluster, wait_for_condition_with_backoff
from isopod.world.errors import InvalidArgument, WrongState
from isopod.world.world import World


@pytest.mark.slow
@pytest.mark.row("B3", "B46")
async def test_three_nodes_form_a_cluster_and_go_on_without_their_leader(host_world: World, folder: str) -> None:
    async with TestCluster(3, folder, world=host_world) as cluster:
        store = cluster.client()
        await store.put("color", b"red")
        leader = cluster.leader()

        await leader.stop()
        await cluster.wait_for_leader()
        assert (await store.get("color")).value == b"red"
        await store.put("color", b"blue")

        await leader.start()
        await wait_for_condition_with_backoff(cluster.agrees, what="all nodes hold the same state")
        assert (await store.get("color")).value == b"blue"
        assert sorted(os.listdir(folder)) == ["node1", "node2", "node3"]


@pytest.mark.row("B2", "B14")
async def test_one_node_is_a_cluster_and_keeps_what_it_has(host_world: World, folder: str) -> None:
    async with TestCluster(1, folder, world=host_world) as cluster:
        (node,) = cluster.nodes
        await cluster.client().put("color", b"red")

        await node.stop()
        await node.stop()
        assert not node.is_running
        with pytest.raises(WrongState, match="test node 1 is stopped"):
            _ = node.node
        with pytest.raises(WrongState, match="without a leader"):
            cluster.leader()
        with pytest.raises(ConditionNotMet, match="a leader was elected"):
            await cluster.wait_for_leader(timeout_s=0.1)

        await node.start()
        await cluster.wait_for_leader()
        assert (await cluster.client().get("color")).value == b"red"


async def test_the_number_of_nodes_is_bounded(host_world: World, folder: str) -> None:
    for n_nodes in (0, 8):
        with pytest.raises(InvalidArgument):
            TestCluster(n_nodes, folder, world=host_world)
