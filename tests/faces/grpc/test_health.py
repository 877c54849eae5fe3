"""HealthCheck is true: healthy is who can do what it is for, and who cannot says why. On both Worlds, before a fake node."""

import pytest

from isopod.api import messages as m
from isopod.faces.grpc.members import MemberCalls
from isopod.world.errors import KernelError, WrongState
from isopod.world.world import World
from tests.cluster.store.rig import FakeLog
from tests.faces.grpc.fake_node import Desk, FakeNode, asked

pytestmark = pytest.mark.row("B6")


async def test_a_node_that_is_well(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node) as desk:
        assert await MemberCalls(desk.link).health_check(asked()) == {"healthy": True, "message": "Node 1 is healthy"}


async def test_a_full_disk_and_a_failing_kernel_are_said(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node) as desk:
        node.free_bytes = 3 << 20
        wanted = "Node 1 is unhealthy: its disk is full: 3 MiB are left"
        assert await MemberCalls(desk.link).health_check(asked()) == {"healthy": False, "message": wanted}
        node.failures["system.info"] = KernelError("read", "/proc/meminfo", 5)
        told = await MemberCalls(desk.link).health_check(asked())
        assert told == {"healthy": False, "message": "Node 1 is unhealthy: cannot read /proc/meminfo: Input/output error"}


async def test_a_member_without_a_leader_says_so(world: World, folder: str) -> None:
    async with FakeLog(world, 2) as log, FakeNode(world, folder, log=log) as node, Desk(node) as desk:
        node.info_cluster = m.ClusterFacts(id="c", node_id=1, state="follower", leader_id=0, address="", voters=2, nodes=2)
        assert (await MemberCalls(desk.link).health_check(asked()))["healthy"] is True
        node.status_why = "no leader is known"
        told = await MemberCalls(desk.link).health_check(asked())
        assert told == {"healthy": False, "message": "Node 1 is unhealthy: no leader is known"}


async def test_a_node_that_is_gone_is_not_well(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node) as desk:
        await node.end()
        told = await MemberCalls(desk.link).health_check(asked(left_s=2.0))
        assert told["healthy"] is False
        assert told["message"].startswith("Node 1 is unhealthy: it does not answer")
        await node.serve()


@pytest.mark.row("B7")
async def test_a_node_in_no_cluster_has_no_status(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node) as desk:
        calls = MemberCalls(desk.link)
        for call in (calls.cluster_status, calls.raft_status):
            with pytest.raises(WrongState, match="in no cluster"):
                await call(asked())
        with pytest.raises(WrongState, match="in no cluster"):
            await calls.join_cluster(asked(node_id=1, bind_address="10.0.0.1:7000"))


async def test_a_failed_node_is_shown_as_unknown(world: World, folder: str) -> None:
    async with FakeLog(world, 3) as log, FakeNode(world, folder, log=log) as node, Desk(node) as desk:
        node.health[2] = "failed"
        found = await MemberCalls(desk.link).cluster_status(asked())
        states = {info["id"]: info["state"].removeprefix("NODE_STATE_") for info in found["nodes"]}
        assert states == {1: "LEADER", 2: "UNKNOWN", 3: "FOLLOWER"}
