"""A machine is started and stopped from any node of its cluster: once or not at all, and what its node says is what the asker hears."""

import asyncio

import pytest

from isopod.api.store import StoreClient
from isopod.faces.grpc.orders import ANSWERS, ORDERS, TAKE_S, Order
from isopod.world.errors import DeadlineExceeded, NotFound, RuntimeFailed, Unsupported
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.cluster.store.rig import FakeLog
from tests.faces.grpc.fake_node import Desk, FakeNode, asked
from tests.faces.grpc.test_records import cluster, create

pytestmark = pytest.mark.row("B10")


async def left_over(node: FakeNode) -> list[str]:
    """Return what orders and answers stand in the store."""
    async with StoreClient(node.world, [UnixAddress(node.socket)]) as store:
        return [entry.key for prefix in (ORDERS, ANSWERS) for entry in (await store.list_all(prefix))[0]]


async def test_any_node_starts_and_stops_it(world: World, folder: str) -> None:
    async with cluster(world, folder) as (nodes, desks):
        await desks[1].machines.create_vm(create("web"))
        for number in (0, 2):
            assert await desks[number].machines.start_vm(asked(name="web")) == {"success": True, "message": "VM 'web' start command sent"}
            assert await desks[1].listed() == [("web", 2, "RUNNING")]
            assert await desks[number].machines.stop_vm(asked(name="web")) == {"success": True, "message": "VM 'web' stop command sent"}
            assert await desks[1].listed() == [("web", 2, "STOPPED")]
        assert nodes[1].n_starts == 2
        assert await left_over(nodes[0]) == []


@pytest.mark.row("B7")
async def test_what_its_node_says_is_what_one_hears(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        await desks[1].machines.create_vm(create("web"))
        nodes[1].failures["container.start"] = RuntimeFailed("start", "web", "the guest's kernel panicked")
        told = await desks[0].machines.start_vm(asked(name="web"))
        assert told == {"success": False, "message": "start web: the guest's kernel panicked"}
        nodes[1].failures["container.start"] = Unsupported("a virtual machine", "no hypervisor was found")
        with pytest.raises(Unsupported, match="no hypervisor"):
            await desks[0].machines.start_vm(asked(name="web"))
        with pytest.raises(NotFound):
            await desks[0].machines.stop_vm(asked(name="none"))


@pytest.mark.virtual_time
async def test_an_order_that_nobody_takes_is_taken_back(world: World, folder: str) -> None:
    async with (
        FakeLog(world, 2) as log,
        FakeNode(world, folder, log=log) as first,
        FakeNode(world, folder, log=log, number=2) as second,
        Desk(first) as asker,
    ):
        async with Desk(second, takes_orders=False) as owner:
            await owner.machines.create_vm(create("web"))
            told = await asker.machines.start_vm(asked(name="web", left_s=60.0))
        assert told["success"] is False
        assert "node 2 takes no orders for its machines now: nothing was done" in told["message"]
        assert await left_over(first) == []
        async with Desk(second):
            await asyncio.sleep(2 * TAKE_S)
            assert second.n_starts == 0


@pytest.mark.virtual_time
async def test_an_order_that_takes_too_long_may_still_be_done(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        await desks[1].machines.create_vm(create("web"))
        nodes[1].start_s = 12.0
        with pytest.raises(DeadlineExceeded, match="it may still be done"):
            await desks[0].machines.start_vm(asked(name="web", left_s=8.0))
        assert nodes[1].n_starts == 1
        assert (await desks[0].machines.start_vm(asked(name="web", left_s=60.0)))["success"] is True


async def test_what_others_put_there_is_passed_over(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        await desks[1].machines.create_vm(create("web"))
        async with StoreClient(world, [UnixAddress(nodes[0].socket)]) as store:
            await store.put(f"{ORDERS}2/1", b"\xff no order")
            await store.put(f"{ORDERS}2/2", b'{"name":"web","verb":"destroy","within_s":1}')
        assert (await desks[0].machines.start_vm(asked(name="web")))["success"] is True


async def test_many_orders_at_once(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        for number in range(20):
            await desks[1].machines.create_vm(create(f"web{number}"))
        asking = [desks[0].machines.start_vm(asked(name=f"web{number}")) for number in range(20)]
        assert [told["success"] for told in await asyncio.gather(*asking)] == [True] * 20
        assert nodes[1].n_starts == 20
        assert await left_over(nodes[0]) == []


async def test_an_order_for_a_machine_that_is_gone(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (_, desks):
        assert desks[0].machines.orders is not None
        with pytest.raises(NotFound, match="no such VM: gone"):
            await desks[0].machines.orders.give(2, Order(name="gone", verb="stop", within_s=10.0))
