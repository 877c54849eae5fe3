"""RpcPeers: one connection to each node, made when it is needed and made anew when it is lost."""

import asyncio

import pytest

from isopod.api.messages import Empty
from isopod.api.store import methods
from isopod.cluster.store.peers import RpcPeers
from isopod.world.errors import Disconnected, NotStarted
from isopod.world.network import Address, TcpAddress
from isopod.world.sim import SimWorld
from tests.cluster.store.rig import FakeLog


async def test_connects_once_and_again_after_a_loss(sim_world: SimWorld) -> None:
    world = sim_world.world
    addresses: dict[int, Address] = {}
    peers = RpcPeers(world, addresses.get)
    async with FakeLog(world, 2) as log:
        with pytest.raises(NotStarted, match="its address is not known"):
            await peers.call(1, methods.KV_STATUS, Empty(), timeout_s=1)
        assert peers.address(1) == ""
        addresses[1] = await log.serve(1)
        many = await asyncio.gather(*(peers.call(1, methods.KV_STATUS, Empty(), timeout_s=1) for _ in range(20)))
        assert {status.node for status in many} == {1}
        assert peers.address(1) == log.addresses[1]
        await log.kill(1)
        with pytest.raises(Disconnected):
            await peers.call(1, methods.KV_STATUS, Empty(), timeout_s=1)
        addresses[1] = await log.serve(1)  # elsewhere
        assert (await peers.call(1, methods.KV_STATUS, Empty(), timeout_s=1)).node == 1
        addresses[1] = TcpAddress("10.255.0.1", 9)  # nobody answers there
        with pytest.raises(NotStarted):
            await peers.call(1, methods.KV_STATUS, Empty(), timeout_s=0.5)
        await peers.close()
        with pytest.raises(Disconnected):
            await peers.call(1, methods.KV_STATUS, Empty(), timeout_s=0.5)
