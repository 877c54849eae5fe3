"""Nodes that fail and come back: what the others are told, and what the leader does about it; messages between real nodes."""

import asyncio

import pytest

from isopod.cluster.members import events as e
from isopod.cluster.messaging import Message
from isopod.world.errors import DeadlineExceeded, NotFound
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.cluster.members.rig import QUICK, leads, rig_of, until


@pytest.mark.row("S19")
async def test_all_replicas_tell_of_a_failure_and_a_recovery_in_the_same_order(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        nodes = await rig.form(3)
        dead = rig.others()[0]
        dead_id = dead.config.node_id
        left = [node for node in nodes if node is not dead]
        told: dict[int, list[e.Event]] = {node.config.node_id: [] for node in left}
        for node in left:
            node.members.subscribe(told[node.config.node_id].append)
        await dead.stop()
        await until(lambda: all(e.NodeFailed(dead_id) in each for each in told.values()), "it is taken for dead")
        assert all(node.status().nodes[dead_id - 1].health == "failed" for node in left)
        await rig.again(dead_id)
        await until(lambda: all(e.NodeRecovered(dead_id) in each for each in told.values()), "it is back")
        health = [
            [event for event in each if isinstance(event, e.NodeSuspected | e.NodeFailed | e.NodeRecovered)] for each in told.values()
        ]
        assert health[0] == health[1] == [e.NodeSuspected(dead_id), e.NodeFailed(dead_id), e.NodeRecovered(dead_id)]


@pytest.mark.row("S19")
async def test_a_dead_leader_is_followed_by_another_who_judges_it(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        nodes = await rig.form(3)
        leader = rig.leader()
        watching = rig.others()[0]
        told: list[e.Event] = []
        watching.members.subscribe(told.append)
        await leader.stop()
        left = [node for node in nodes if node is not leader]
        await until(lambda: any(leads(node) for node in left), "another leads")
        await until(lambda: e.NodeFailed(leader.config.node_id) in told, "the old one is taken for dead")
        leaders = [event.leader_id for event in told if isinstance(event, e.LeaderChanged) and event.leader_id]
        assert leaders[-1] in [node.config.node_id for node in left]


async def test_an_idle_cluster_accuses_nobody(sim_world: SimWorld, folder: str) -> None:
    async with rig_of(sim_world.world, folder) as rig:
        nodes = await rig.form(3)
        told: list[e.Event] = []
        for node in nodes:
            node.members.subscribe(told.append)
        await asyncio.sleep(120)
        assert told == []


async def test_a_failed_voter_gives_its_vote_to_a_learner_and_is_taken_out(sim_world: SimWorld, folder: str) -> None:
    settings = QUICK._replace(replace_s=5.0, cleanup_s=20.0)
    async with rig_of(sim_world.world, folder) as rig:
        first = await rig.found(voters_max=3, detector=settings)
        for node_id in (2, 3, 4):
            await rig.join(node_id, first, detector=settings)
        await until(lambda: len(first.status().voters) == 3 and len(first.status().learners) == 1, "three vote, one learns")
        spare = first.status().learners[0]
        dead_id = next(node_id for node_id in first.status().voters if node_id != 1)
        await rig.nodes[dead_id].stop()
        await until(lambda: spare in first.status().voters and dead_id not in first.status().voters, "the spare votes")
        await until(lambda: dead_id not in first.members.registry.members, "the dead one is taken out", timeout_s=60)
        assert len(first.status().voters) == 3
        # Of two failures one stays: the rest must be a quorum.
        alive = [node_id for node_id in first.status().voters if node_id != 1]
        for node_id in alive:
            await rig.nodes[node_id].stop()
        await asyncio.sleep(60)
        assert first.status().leader_id == 0
        assert len(first.status().voters) == 3


@pytest.mark.row("S20")
async def test_messages_between_nodes_and_agents(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        first = await rig.found()
        second = await rig.join(2, first)
        agent = await rig.join(9, first, role="agent")
        got: list[tuple[int, bytes]] = []

        async def take(message: Message) -> None:
            got.append((message.sender, message.body))

        second.messages.on("greet", take)
        agent.messages.on("greet", take)
        await first.messages.send(2, "greet", b"1 to 2")
        await first.messages.send(9, "greet", b"1 to 9")
        await agent.messages.send(2, "greet", b"9 to 2")
        assert got == [(1, b"1 to 2"), (1, b"1 to 9"), (9, b"9 to 2")]
        with pytest.raises(NotFound, match="handler for messages of: shout"):
            await first.messages.send(2, "shout", b"")
        await second.stop()
        with pytest.raises(DeadlineExceeded):
            await first.messages.send(2, "greet", b"late", ttl_s=0.5)
        waiting = first.messages.send(2, "greet", b"after its return", ttl_s=60)
        again = rig.make(2, bind=second.advertised)
        again.messages.on("greet", take)
        await again.start()
        await waiting
        assert got[-1] == (1, b"after its return")
