"""A node of a cluster as its users meet it: its own socket, with an engine and without, on both Worlds."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from isopod.api import cluster as c
from isopod.api import messages as m
from isopod.api import methods
from isopod.api.store import methods as kv
from isopod.api.store.messages import Get, KvRead, KvTxn, Put, Txn
from isopod.cluster.members.backup import make_backup
from isopod.net.rpc import Client, connect
from isopod.node.node import Node
from isopod.node.system import NodeFacts
from isopod.runtime.config import NodeConfig, load_config
from isopod.runtime.logger import Logger
from isopod.world.errors import InUse, NotFound, NotStarted, RefusedError, WrongState
from isopod.world.network import UnixAddress
from isopod.world.world import World

TOKEN = "a-secret-of-the-tests-0123456789"


def told(folder: str, number: int, **flags: str) -> NodeConfig:
    """Return what a node without an engine is told."""
    usual = {"--role": "control", "--id": str(number), "--data-dir": f"{folder}/n{number}", "--bind": "127.0.0.1:0", "--token": TOKEN}
    return load_config(flags={**usual, **{"--" + name.replace("_", "-"): text for name, text in flags.items()}})


async def start(world: World, stack: AsyncExitStack, config: NodeConfig) -> tuple[Node, Client]:
    """Start a node and connect to its socket; both end with the stack."""
    node = Node(world, config, Logger(lambda _: None, world.clock), NodeFacts(world.clock.now_ns(), "test", "test"))
    await node.start()
    stack.push_async_callback(node.stop, "test")
    client = await connect(world, UnixAddress(config.paths["socket"]))
    stack.push_async_callback(client.close)
    return node, client


@pytest.mark.row("B2")
@pytest.mark.row("B14")
async def test_a_cluster_is_used_through_the_nodes_own_sockets(world: World, folder: str) -> None:
    async with AsyncExitStack() as stack:
        one, first = await start(world, stack, told(folder, 1))
        assert one.cluster is not None
        await one.cluster.wait_ready(10)
        two, second = await start(world, stack, told(folder, 2, join=one.cluster.advertised))
        assert two.cluster is not None
        await two.cluster.wait_ready(20)
        assert (await second.call(c.PROMOTE, c.NodeRequest(node_id=2))).message == "Node 2 votes"

        await second.call(kv.KV_TXN, KvTxn(txn=Txn(then=(Put("color", b"red"),))))
        pages = await first.call(kv.KV_READ, KvRead(reads=[Get("color")]))
        assert pages.pages[0].entries[0].value == b"red"
        status = await second.call(c.STATUS, c.StatusRequest())
        assert (status.node_id, status.leader_id, status.voters) == (2, 1, (1, 2))
        assert (await second.call(c.STATUS, c.StatusRequest(at="1"))).node_id == 1
        with pytest.raises(NotFound, match="no such node: 9"):
            await second.call(c.STATUS, c.StatusRequest(at="9"))
        assert [entry.id for entry in (await first.call(c.MEMBERS, c.Nothing())).nodes] == [1, 2]
        assert (await second.call(c.TRANSFER, c.TransferRequest(node_id=2))).message == "Node 2 leads"
        made = await first.call(c.TOKEN_CREATE, c.CreateToken(uses=3))
        assert made.entry.uses_left == 3
        await second.call(c.TOKEN_REVOKE, c.TokenName(id=made.entry.id))
        listed = {entry.id: entry for entry in (await second.call(c.TOKEN_LIST, c.Nothing())).tokens}
        assert listed[made.entry.id].is_revoked
        assert not listed[made.entry.id].is_usable

        info = await first.call(methods.SYSTEM_INFO, m.Empty())
        assert info.cluster is not None
        assert (info.cluster.node_id, info.cluster.voters, info.runtime.value) == (1, 2, "none")
        shown = await first.call(methods.SYSTEM_RENDER, m.RenderRequest(method="cluster.status", body=_packed(c.StatusRequest())))
        assert "leader id: 2 at" in shown.text
        assert "follower" in shown.text
        with pytest.raises(WrongState, match="without an engine"):
            await first.call(methods.CONTAINER_LIST, m.ListContainers())

        chunks: list[bytes] = []
        async with first.open(c.BACKUP, c.Nothing()) as call:
            async for item in call:
                chunks.append(item.data)
            made_backup = await call.reply()
        assert made_backup.n_bytes == sum(map(len, chunks))
        async with second.open(c.RESTORE, c.RestoreRequest(force=True)) as restoring:
            for chunk in chunks:
                await restoring.send(m.Chunk(data=chunk))
            restoring.end()
            assert (await restoring.reply()).n_keys == 1
        with pytest.raises(RefusedError, match="Cannot remove self"):
            await first.call(c.LEAVE, c.NodeRequest(node_id=1))
        assert (await second.call(c.LEAVE, c.NodeRequest(node_id=1))).success


async def test_a_node_that_is_just_starting_sends_readers_elsewhere(sim_world: Any, folder: str) -> None:
    """Its socket is there before its replica: that is no refusal, clients go on to the next node and lose nothing."""
    world = sim_world.world
    config = told(folder, 1)
    async with AsyncExitStack() as stack:
        one, _ = await start(world, stack, config)
        assert one.cluster is not None
        await one.cluster.wait_ready(10)
    sim_world.disk.faults.delay_s = (0.2, 0.2)
    async with AsyncExitStack() as stack:
        starting = asyncio.ensure_future(start(world, stack, config))
        async with asyncio.timeout(60):
            while not sim_world.network.listeners():
                await asyncio.sleep(0.01)
        client = await connect(world, UnixAddress(config.paths["socket"]))
        stack.push_async_callback(client.close)
        with pytest.raises(NotStarted, match="it is just starting") as caught:
            await client.call(kv.KV_READ, KvRead(reads=[Get("color")]))
        assert caught.value.retryable
        await starting


async def test_while_a_backup_is_put_back_users_wait_and_settings_do_not(sim_world: Any, folder: str) -> None:
    world = sim_world.world
    async with AsyncExitStack() as stack:
        node, client = await start(world, stack, told(folder, 1))
        assert node.cluster is not None
        await node.cluster.wait_ready(10)
        for first in range(0, 6400, 128):
            await node.cluster.store.txn(Txn(then=tuple(Put(f"jobs/{number}", b"old") for number in range(first, first + 128))))
        data, _ = make_backup(node.cluster.store.machine, node.cluster.cluster_id, 7)
        await node.cluster.store.delete_prefix("jobs/")
        restoring = asyncio.create_task(node.cluster.restorer.restore(data, force=True))
        refused: list[str] = []
        while not restoring.done():
            try:
                await client.call(kv.KV_READ, KvRead(reads=[Get("jobs/0")]))
                await client.call(kv.KV_TXN, KvTxn(txn=Txn(then=(Put("color", b"red"),))))
            except InUse as error:
                refused.append(error.message)
                assert (await client.call(c.SET, c.SetRequest(voters_max=3))).message == "At most 3 nodes vote"
        assert set(refused) == {"the store of this cluster is in use by a restore"}
        pages = await client.call(kv.KV_READ, KvRead(reads=[Get("jobs/0")]))
        assert pages.pages[0].entries[0].value == b"old"


@pytest.mark.row("B33")
async def test_a_node_that_waits_is_brought_in_over_its_socket(world: World, folder: str) -> None:
    async with AsyncExitStack() as stack:
        one, _ = await start(world, stack, told(folder, 1))
        assert one.cluster is not None
        await one.cluster.wait_ready(10)
        _, second = await start(world, stack, told(folder, 2, join_cluster="true"))
        status = await second.call(c.STATUS, c.StatusRequest())
        assert (status.state, "isopod cluster join" in status.why) == ("joining", True)
        with pytest.raises(WrongState, match="no member yet"):
            await second.call(c.LEAVE, c.NodeRequest(node_id=1))
        joined = await second.call(c.JOIN, c.JoinRequest(address=one.cluster.advertised, token=TOKEN))
        assert joined.message == "Node 2 successfully joined cluster"
        assert [peer.id for peer in joined.peers] == [1, 2]


async def test_a_node_in_no_cluster_says_how_to_found_one(sim_world: Any, folder: str) -> None:
    world = sim_world.world
    async with AsyncExitStack() as stack:
        flags = {"--root": f"{folder}/root", "--run-root": f"{folder}/run", "--pool-size": "0"}
        await world.disk.make_directory(f"{folder}/run/ns")
        config = load_config(flags=flags)
        node, client = await start(world, stack, config)
        assert node.cluster is None
        assert (await client.call(methods.SYSTEM_INFO, m.Empty())).cluster is None
        for method, request in [(c.STATUS, c.StatusRequest()), (kv.KV_STATUS, m.Empty())]:
            with pytest.raises(WrongState, match="in no cluster") as caught:
                await client.call(method, request)  # type: ignore[arg-type]
            assert "--bind" in caught.value.hint


async def test_an_engine_and_a_cluster_live_in_one_node(sim_world: Any, folder: str) -> None:
    world = sim_world.world
    async with AsyncExitStack() as stack:
        flags = {"--root": f"{folder}/root", "--run-root": f"{folder}/run", "--pool-size": "0", "--bind": "127.0.0.1:7000"}
        await world.disk.make_directory(f"{folder}/run/ns")
        node, client = await start(world, stack, load_config(flags=flags))
        assert node.cluster is not None
        await node.cluster.wait_ready(10)
        assert (await client.call(methods.CONTAINER_LIST, m.ListContainers())).containers == ()
        info = await client.call(methods.SYSTEM_INFO, m.Empty())
        assert info.cluster is not None
        assert info.cluster.state == "leader"
        assert info.runtime.value.endswith("crun")
        assert await world.disk.stat(f"{folder}/root/cluster/identity.json") is not None


def _packed(request: Any) -> Any:
    import msgspec

    return msgspec.Raw(msgspec.msgpack.encode(request))
