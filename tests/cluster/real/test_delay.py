"""Real nodes with a long and uneven line between them: a proxy that holds back what passes, lets nothing pass, or resets connections.

Each node says by `--advertise` that it is reached at the proxy, so all that nodes tell each other goes through it.
"""

import pytest

from isopod.world.world import World
from tests.cluster.real.load import Load
from tests.cluster.real.rig import Rig

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(180), pytest.mark.row("B20")]
RIG = {"proxied": True}
WITHIN_S = 45.0


async def test_30_to_100_ms_each_way(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=21) as load:
        await load.progress(within_s=WITHIN_S)
        rig.proxy("delay 30 100")
        await load.progress(within_s=WITHIN_S)
        leader = await rig.wait_leader(host_world)
        rig.nodes[leader].kill()
        await load.progress(10, within_s=WITHIN_S)
        rig.nodes[leader].start()
        await load.answers_of(leader, 3, within_s=WITHIN_S)
        await load.finish()


@pytest.mark.row("B17")
async def test_connections_are_reset(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=22) as load:
        rig.proxy("delay 0 20")
        for _ in range(5):
            rig.proxy("cut")
            await load.progress(5, within_s=WITHIN_S)
        await load.finish()


async def test_lines_that_are_open_and_carry_nothing(host_world: World, rig: Rig) -> None:
    """No packet is lost, no connection ends: what was said comes all at once, late."""
    async with Load(host_world, rig, seed=23) as load:
        await load.progress(within_s=WITHIN_S)
        leader = await rig.wait_leader(host_world)
        rig.proxy("stall")
        await rig.until(lambda: _has_stood_down(rig, host_world, leader), "the leader stands down", WITHIN_S)
        rig.proxy("delay 0 50")
        await load.progress(within_s=WITHIN_S)
        await load.finish()


async def _has_stood_down(rig: Rig, world: World, leader: int) -> bool:
    status = await rig.status(world, leader)
    return status is not None and status.state != "leader"
