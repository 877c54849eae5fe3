"""Real nodes that do not hear each other, by nftables in their own network namespaces.

Their users reach each of them all the time: who is cut off is asked as well, and must not answer what is not so any more.
"""

import asyncio

import pytest

from isopod.api.store import StoreClient
from isopod.world.errors import IsopodError
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.cluster.real.load import Load
from tests.cluster.real.rig import Rig

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(180), pytest.mark.row("B20")]
WITHIN_S = 45.0


async def test_the_leader_alone(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=11) as load:
        await load.progress(within_s=WITHIN_S)
        leader = await rig.wait_leader(host_world)
        others = [number for number in rig.nodes if number != leader]
        rig.lab.cut(leader)
        assert await rig.wait_leader(host_world, others) != leader
        await load.progress(within_s=WITHIN_S)
        await _refuses(host_world, rig, leader)
        rig.lab.heal(leader)
        await load.answers_of(leader, within_s=WITHIN_S)
        await load.finish()


@pytest.mark.row("B17")
async def test_a_follower_alone(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=12) as load:
        leader = await rig.wait_leader(host_world)
        follower = leader % 3 + 1
        rig.lab.cut(follower)
        await load.progress(100, within_s=WITHIN_S)
        await _refuses(host_world, rig, follower)
        rig.lab.heal(follower)
        await load.answers_of(follower, within_s=WITHIN_S)
        await load.finish()


@pytest.mark.parametrize(("hears", "speaks"), [(True, False), (False, True)], ids=["mute", "deaf"])
async def test_a_leader_in_one_direction(host_world: World, rig: Rig, hears: bool, speaks: bool) -> None:
    async with Load(host_world, rig, seed=13 + hears) as load:
        await load.progress(within_s=WITHIN_S)
        leader = await rig.wait_leader(host_world)
        others = [number for number in rig.nodes if number != leader]
        rig.lab.cut(leader, hears=hears, speaks=speaks)
        assert await rig.wait_leader(host_world, others) != leader
        await load.progress(within_s=WITHIN_S)
        rig.lab.heal(leader)
        await load.answers_of(leader, within_s=WITHIN_S)
        await load.finish()


async def test_one_line_of_three_is_cut(host_world: World, rig: Rig) -> None:
    """The leader and a follower do not reach each other, the third reaches both: somebody leads, and writes go on."""
    async with Load(host_world, rig, seed=15) as load:
        await load.progress(within_s=WITHIN_S)
        leader = await rig.wait_leader(host_world)
        follower = leader % 3 + 1
        rig.lab.cut(leader, others=[follower])
        await load.progress(60, within_s=WITHIN_S)
        rig.lab.heal(leader)
        await load.answers_of(follower, within_s=WITHIN_S)
        await load.finish()


async def test_everybody_alone(host_world: World, rig: Rig) -> None:
    """Nobody answers then, and everybody afterwards."""
    async with Load(host_world, rig, seed=16) as load:
        await load.progress(within_s=WITHIN_S)
        for number in rig.nodes:
            rig.lab.cut(number)
        await asyncio.gather(*(_refuses(host_world, rig, number) for number in rig.nodes))
        for number in rig.nodes:
            rig.lab.heal(number)
        await load.progress(within_s=WITHIN_S)
        await load.finish()


async def _refuses(world: World, rig: Rig, number: int) -> None:
    """A node that does not reach a majority answers neither a write nor a linearizable read, in time; an old value it may tell."""
    async with StoreClient(world, [UnixAddress(rig.nodes[number].socket)]) as store:
        write = store.put("alone", str(number).encode(), timeout_s=1.0)
        for result in await asyncio.gather(write, store.get("alone", timeout_s=1.0), return_exceptions=True):
            assert isinstance(result, IsopodError), result
        await store.get("alone", consistency="stale", timeout_s=5.0)
