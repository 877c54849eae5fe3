"""What costs a message or a turn, and what does not: news of commits, signs of life, and what shares a turn."""

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from isopod.cluster.raft.codec import APPEND_START, HEARTBEAT_ANSWER_START, is_sign_of_life, only_commits
from isopod.cluster.raft.core import describe_message
from isopod.cluster.raft.driver import HOLD_S
from isopod.cluster.raft.memory import MemoryNetwork, MemoryTransport
from isopod.world.sim import SimWorld
from tests.cluster.raft.support import Cluster


class CountingTransport(MemoryTransport):
    """Counts what it sends."""

    def __init__(self, network: "Counting") -> None:
        super().__init__(network)
        self._counts = network.counts
        self._seen = network.seen

    def send(self, to: int, messages: Sequence[bytes]) -> None:
        for message in messages:
            self._seen.append(message)
            if message.startswith(APPEND_START):
                self._counts["commit" if only_commits(message) else "append"] += 1
            elif message.startswith(HEARTBEAT_ANSWER_START):
                self._counts["answer"] += 1
        super().send(to, messages)


class Counting(MemoryNetwork):
    """Counts what travels, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.seen: list[bytes] = []

    def transport(self) -> MemoryTransport:
        return CountingTransport(self)


async def started(sim_world: SimWorld, folder: str) -> tuple[Cluster, Counting]:
    network = Counting()
    cluster = Cluster(sim_world.world, folder, network=network)
    await cluster.start(1, 2, 3)
    await cluster.leader()
    return cluster, network


@pytest.mark.row("B13")
async def test_the_news_of_a_commit_travels_with_the_next_entries(sim_world: SimWorld, folder: str) -> None:
    cluster, network = await started(sim_world, folder)
    leader = (await cluster.leader()).node
    await leader.propose(b"first")
    await asyncio.sleep(2 * HOLD_S)
    network.counts.clear()
    for _ in range(100):
        await leader.propose(b"x")  # takes about a millisecond
    assert network.counts["append"] == 200
    assert network.counts["commit"] <= 10
    await asyncio.sleep(2 * HOLD_S)
    assert {member.node.applied_index for member in cluster.members.values()} == {leader.applied_index}, "held, not lost"
    await cluster.close()


@pytest.mark.row("B16")
async def test_a_followers_read_does_not_wait_for_held_news(sim_world: SimWorld, folder: str) -> None:
    cluster, _ = await started(sim_world, folder)
    leader = (await cluster.leader()).node
    follower = next(member for member in cluster.members.values() if member.node is not leader)
    for number in range(20):
        await leader.propose(b"%d" % number)
        began = asyncio.get_running_loop().time()
        await follower.node.read_barrier()
        assert follower.machine.values()[-1] == b"%d" % number
        assert asyncio.get_running_loop().time() - began < HOLD_S, "the answer brings the news along"
    await cluster.close()


@pytest.mark.row("B13")
async def test_an_idle_leader_has_no_turn_for_signs_of_life_and_stays_leader(sim_world: SimWorld, folder: str) -> None:
    cluster, network = await started(sim_world, folder)
    leader = (await cluster.leader()).node
    await leader.propose(b"x")
    await asyncio.sleep(1.0)
    n_turns = leader._driver.n_turns
    term = leader.status(with_digest=False).term
    network.counts.clear()
    await asyncio.sleep(60.0)
    status = leader.status(with_digest=False)
    assert (status.role, status.term) == ("leader", term), "its check of the quorum counts them nevertheless"
    assert network.counts["answer"] > 2000
    assert leader._driver.n_turns - n_turns < 0.8 * network.counts["answer"]
    await cluster.close()


async def test_a_leader_whose_peers_are_silent_steps_down(sim_world: SimWorld, folder: str) -> None:
    cluster, network = await started(sim_world, folder)
    leader = (await cluster.leader()).node
    await asyncio.sleep(1.0)
    network.isolate(leader.node_id)
    began = asyncio.get_running_loop().time()
    while leader.is_leader:
        await asyncio.sleep(0.01)
    assert asyncio.get_running_loop().time() - began < 1.0
    await cluster.close()


async def test_signs_of_life_are_told_from_other_messages(sim_world: SimWorld, folder: str) -> None:
    cluster, network = await started(sim_world, folder)
    leader = (await cluster.leader()).node
    await leader.propose(b"x")
    await leader.read_barrier()
    await asyncio.sleep(0.2)
    found = Counter(describe_message(message).kind for message in network.seen if is_sign_of_life(message))
    assert list(found) == ["MsgHeartbeatResponse"]
    asked = [m for m in network.seen if m.startswith(HEARTBEAT_ANSWER_START) and not is_sign_of_life(m)]
    assert asked, "an answer with a context is a vote for a read"
    await cluster.close()
