"""Machines in a cluster: every node lists all of them, a name is given once, and what stands in the store is what the nodes say."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from isopod.api.store import StoreClient
from isopod.faces.grpc.records import PREFIX
from isopod.testing import wait_for_condition_with_backoff
from isopod.world.errors import AlreadyExists, Disconnected, Exhausted, IsopodError, RuntimeFailed
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.cluster.store.rig import FakeLog
from tests.faces.grpc.fake_node import Desk, FakeNode, asked

pytestmark = pytest.mark.row("B10")
Cluster = tuple[list[FakeNode], list[Desk]]


@asynccontextmanager
async def cluster(world: World, folder: str, n: int = 3, **told: Any) -> AsyncIterator[Cluster]:
    """Open so many nodes with a face each; the first leads."""
    async with FakeLog(world, n) as log, AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(FakeNode(world, folder, log=log, number=number)) for number in range(1, n + 1)]
        desks = [await stack.enter_async_context(Desk(node, **told)) for node in nodes]
        yield nodes, desks


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    await wait_for_condition_with_backoff(condition, timeout_s=20.0)


def create(name: str) -> Any:
    return asked(name=name, config_path="", vcpus=2, memory_mb=256)


async def raw(node: FakeNode) -> dict[str, bytes]:
    """Return what stands in the store."""
    async with StoreClient(node.world, [UnixAddress(node.socket)]) as store:
        return {entry.key: entry.value for entry in (await store.list_all(PREFIX))[0]}


async def test_every_node_lists_what_one_created_as_soon_as_it_said_so(world: World, folder: str) -> None:
    async with cluster(world, folder) as (_, desks):
        assert (await desks[1].machines.create_vm(create("web")))["success"] is True
        for desk in desks:
            assert await desk.listed() == [("web", 2, "CREATED")]
        assert (await desks[1].machines.start_vm(asked(name="web")))["success"] is True

        async def is_known() -> bool:
            return all([await desk.listed() == [("web", 2, "RUNNING")] for desk in desks])

        await until(is_known)
        info = {"name": "web", "state": "VM_STATE_RUNNING", "node_id": 2, "vcpus": 2, "memory_mb": 256}
        assert await desks[0].machines.vm_status(asked(name="web")) == {"found": True, "vm_info": info}


async def test_a_name_is_given_once(world: World, folder: str) -> None:
    async with cluster(world, folder) as (nodes, desks):
        asking = [desk.machines.create_vm(create("web")) for desk in desks]
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert sum(isinstance(answer, AlreadyExists) for answer in answers) == 2
        assert sum(len(node.containers) for node in nodes) == 1
        with pytest.raises(AlreadyExists):
            await desks[0].machines.create_vm(create("web"))


@pytest.mark.parametrize("error", [RuntimeFailed("create", "web", "why"), Exhausted("addresses", "all are used")])
async def test_what_could_not_be_created_leaves_no_record(world: World, folder: str, error: IsopodError) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        nodes[0].failures["container.create"] = error
        assert (await desks[0].machines.create_vm(create("web")))["success"] is False
        assert await desks[1].listed() == []
        assert (await desks[1].machines.create_vm(create("web")))["success"] is True


async def test_what_was_created_although_nobody_heard_of_it_is_listed(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        nodes[0].late_failures["container.create"] = Disconnected("the node")
        with pytest.raises(Disconnected):
            await desks[0].machines.create_vm(create("web"))

        async def is_known() -> bool:
            return await desks[1].listed() == [("web", 1, "CREATED")]

        await until(is_known)


async def test_a_record_whose_machine_is_not_there_goes_and_its_name_is_free(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        nodes[0].failures["container.create"] = Disconnected("the node")
        with pytest.raises(Disconnected):
            await desks[0].machines.create_vm(create("web"))
        del nodes[0].failures["container.create"]

        async def is_gone() -> bool:
            return await raw(nodes[1]) == {}

        await until(is_gone)
        assert (await desks[1].machines.create_vm(create("web")))["success"] is True


async def test_machines_made_and_removed_by_another_door_are_followed(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        nodes[0].make("mine", status="running")
        nodes[0].make("plain", isolation="container")

        async def is_known() -> bool:
            return await desks[1].listed() == [("mine", 1, "RUNNING")]

        await until(is_known)
        nodes[0].change("mine", status="exited", exit_code=1, error="the guest's kernel panicked")

        async def has_failed() -> bool:
            found = await raw(nodes[1])
            return b'"why":"the guest\'s kernel panicked"' in found[f"{PREFIX}mine"] and await desks[1].listed() == [("mine", 1, "FAILED")]

        await until(has_failed)
        nodes[0].forget("mine")

        async def is_gone() -> bool:
            return await desks[1].listed() == []

        await until(is_gone)


async def test_of_two_machines_with_one_name_both_are_listed_by_their_nodes(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        await desks[0].machines.create_vm(create("web"))
        nodes[1].make("web", status="running")

        async def is_said() -> bool:
            return any(b"grpc.vm_name_taken" in line for line in nodes[1].lines)

        await until(is_said)
        assert await desks[0].listed() == [("web", 1, "CREATED")]
        assert await desks[1].listed() == [("web", 1, "CREATED"), ("web", 2, "RUNNING")]
        nodes[0].forget("web")

        async def is_taken_over() -> bool:
            nodes[1].change("web", status="running")
            return await desks[0].listed() == [("web", 2, "RUNNING")]

        await until(is_taken_over)


async def test_the_state_of_a_machine_whose_node_is_lost_is_not_known(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        await desks[1].machines.create_vm(create("web"))
        nodes[0].health[2] = "failed"
        assert await desks[0].listed() == [("web", 2, "UNKNOWN")]
        nodes[0].health[2] = "alive"
        assert await desks[0].listed() == [("web", 2, "CREATED")]


async def test_what_others_put_under_the_prefix_is_in_nobodys_way(world: World, folder: str) -> None:
    async with cluster(world, folder, 2) as (nodes, desks):
        async with StoreClient(world, [UnixAddress(nodes[0].socket)]) as store:
            await store.put(f"{PREFIX}web", b"\xff no record")
            await store.put(f"{PREFIX}moved", b'{"name":"other","node_id":2}')
        assert await desks[0].listed() == []
        assert (await desks[0].machines.create_vm(create("web")))["success"] is True
        assert await desks[1].listed() == [("web", 1, "CREATED")]


async def test_a_face_that_comes_back_writes_down_what_happened_meanwhile(world: World, folder: str) -> None:
    async with FakeLog(world, 1) as log, FakeNode(world, folder, log=log) as node:
        async with Desk(node) as desk:
            await desk.machines.create_vm(create("web"))
            await desk.machines.create_vm(create("old"))
        node.change("web", status="running")
        node.forget("old")
        async with Desk(node):

            async def is_true() -> bool:
                found = await raw(node)
                return list(found) == [f"{PREFIX}web"] and b"VM_STATE_RUNNING" in found[f"{PREFIX}web"]

            await until(is_true)


async def test_a_lost_node_is_asked_again(world: World, folder: str) -> None:
    async with FakeLog(world, 1) as log, FakeNode(world, folder, log=log) as node, Desk(node) as desk:
        await desk.machines.create_vm(create("web"))
        await node.end()
        node.change("web", status="running")
        await node.serve()

        async def is_true() -> bool:
            try:
                return b"VM_STATE_RUNNING" in (await raw(node))[f"{PREFIX}web"]
            except IsopodError:
                return False

        await until(is_true)
