"""Agents: nodes without a replica and without a vote, by the thousand."""

import asyncio

import pytest

from isopod.cluster.members import events as e
from isopod.cluster.members.config import DetectorSettings
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.cluster.members.rig import leads, rig_of, until

RARE = DetectorSettings(beat_s=3.0, suspect_s=8.0, fail_s=14.0, agent_cleanup_s=0.0, cleanup_s=0.0)
SLOW = DetectorSettings(beat_s=1.0, suspect_s=3.0, fail_s=10.0, agent_cleanup_s=30.0, cleanup_s=0.0)


async def test_an_agent_joins_and_follows_the_leader(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        nodes = await rig.form(3)
        agent = await rig.join(10, nodes[1], role="agent")
        status = agent.status()
        assert (status.state, status.leader_id, status.voters) == ("agent", rig.leader().config.node_id, (1, 2, 3))
        assert [entry.role for entry in nodes[0].status().nodes] == ["voter", "voter", "voter", "agent"]
        leader = rig.leader()
        await leader.stop()
        del rig.nodes[leader.config.node_id]
        await until(lambda: agent.status().leader_id not in (0, leader.config.node_id), "it finds the next leader")
        await agent.stop()
        again = await rig.again(10, role="agent")
        assert again.status().state == "agent"


@pytest.mark.row("S19")
async def test_an_agent_that_dies_is_suspected_failed_and_taken_out(sim_world: SimWorld, folder: str) -> None:
    async with rig_of(sim_world.world, folder) as rig:
        first = await rig.found(detector=SLOW)
        agent = await rig.join(10, first, role="agent", detector=SLOW)
        told: list[e.Event] = []
        first.members.subscribe(told.append)
        await asyncio.sleep(20)
        assert told == []
        await agent.stop()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await until(lambda: e.NodeSuspected(10) in told, "suspected")
        assert 2.0 <= loop.time() - began <= 5.0
        await until(lambda: e.NodeFailed(10) in told, "failed")
        assert 9.0 <= loop.time() - began <= 13.0
        await until(lambda: e.NodeLeft(10) in told, "taken out", timeout_s=60)
        assert 38.0 <= loop.time() - began <= 46.0
        assert told == [e.NodeSuspected(10), e.NodeFailed(10), e.NodeLeft(10)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.row("S19")
async def test_a_thousand_agents(sim_world: SimWorld, folder: str) -> None:
    n_agents = 1000
    async with rig_of(sim_world.world, folder) as rig:
        nodes = await rig.form(3, detector=RARE)
        agents = [rig.make(100 + number, role="agent", join=(nodes[number % 3].advertised,), detector=RARE) for number in range(n_agents)]
        for first in range(0, n_agents, 50):
            for agent in agents[first : first + 50]:
                await agent.start()
            for agent in agents[first : first + 50]:
                await agent.wait_ready(60.0)
        leader = rig.leader()
        await until(lambda: len(leader.members.registry.members) == n_agents + 3, "all are members")
        for agent in agents[:10]:
            await agent.stop()
        await until(
            lambda: sum(leader.members.registry.health(agent.config.node_id) == "failed" for agent in agents[:10]) == 10,
            "those that died are found",
            timeout_s=120,
        )
        assert all(leader.members.registry.health(agent.config.node_id) == "alive" for agent in agents[10:])
        await leader.stop()
        del rig.nodes[leader.config.node_id]
        next_one = rig.leader
        await until(lambda: any(leads(node) for node in nodes if node is not leader), "another leads")
        await asyncio.sleep(15)
        assert all(next_one().members.registry.health(agent.config.node_id) == "alive" for agent in agents[10:]), "no flapping"
        assert all(agent.status().leader_id == next_one().config.node_id for agent in agents[10:])
