"""Three nodes in one process on the real machine: files on its disk, connections over loopback."""

import asyncio

import pytest

from isopod.cluster.raft.core import ConfState
from isopod.cluster.raft.settings import RaftSettings
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world import errors
from isopod.world.network import TcpAddress
from isopod.world.world import World
from tests.cluster.raft.sim_support import Book, Running, run_node
from tests.cluster.raft.support import until

SETTINGS = RaftSettings(snapshot_log_entries=50, keep_log_entries=10)


class Trio:
    """The nodes."""

    def __init__(self, world: World, folder: str) -> None:
        self.world = world
        self.folder = folder
        self.book = Book({})
        self.running: dict[int, Running] = {}
        self.lines: list[bytes] = []

    async def start(self, *node_ids: int) -> None:
        for node_id in node_ids:
            self.running[node_id] = await run_node(
                self.world,
                f"{self.folder}/n{node_id}",
                node_id=node_id,
                book=self.book,
                listen=self.book.addresses.get(node_id, TcpAddress("127.0.0.1", 0)),
                bootstrap=[1, 2, 3],
                write=self.lines.append,
                settings=SETTINGS,
            )

    async def stop(self, *node_ids: int) -> None:
        for node_id in node_ids:
            await self.running.pop(node_id).close()

    async def leader(self) -> Running:
        await until(lambda: any(each.node._driver.is_serving for each in self.running.values()))
        return next(each for each in self.running.values() if each.node._driver.is_serving)

    async def propose(self, command: bytes) -> None:
        async with asyncio.timeout(20.0):
            while True:
                try:
                    await (await self.leader()).node.propose(command, timeout_s=10.0)
                    return
                except (errors.NotLeader, errors.LeadershipLost):  # on a machine that stood still; then it may be there twice
                    await asyncio.sleep(0.01)

    async def equal(self) -> list[bytes]:
        def same() -> bool:
            nodes = list(self.running.values())
            return len({each.node.applied_index for each in nodes}) == 1 and len({each.machine.digest() for each in nodes}) == 1

        await until(same, 20.0)
        return next(iter(self.running.values())).machine.values()


@pytest.mark.row("B15")
@pytest.mark.row("B21")
async def test_a_follower_that_was_away_catches_up_by_snapshot_and_equals_the_leader(host_world: World, folder: str) -> None:
    trio = Trio(host_world, folder)
    await trio.start(1, 2, 3)
    leader = await trio.leader()
    away = 1 + leader.node.node_id % 3
    await trio.stop(away)
    for number in range(150):
        await trio.propose(b"%d" % number + bytes(2000))
    await until(lambda: all(each.node.status(with_digest=False).first_index > 100 for each in trio.running.values()))
    await trio.start(away)
    values = await trio.equal()
    assert list(dict.fromkeys(value.rstrip(b"\0") for value in values)) == [b"%d" % number for number in range(150)]
    assert trio.running[away].machine.n_restores == 2
    status = trio.running[away].node.status()
    assert status.digest == (await trio.leader()).node.status().digest
    await trio.stop(1, 2, 3)


@pytest.mark.row("B13")
async def test_all_come_back_from_their_disks(host_world: World, folder: str) -> None:
    trio = Trio(host_world, folder)
    await trio.start(1, 2, 3)
    for number in range(120):
        await trio.propose(b"%d" % number)
    await trio.equal()
    await trio.stop(1, 2, 3)
    await trio.start(1, 2, 3)
    await trio.propose(b"after")
    assert list(dict.fromkeys(await trio.equal())) == [*(b"%d" % number for number in range(120)), b"after"]
    await trio.stop(1, 2, 3)


async def test_a_leader_that_is_closed_hands_over_first(host_world: World, folder: str) -> None:
    trio = Trio(host_world, folder)
    await trio.start(1, 2, 3)
    old = await trio.leader()
    await trio.propose(b"a")
    await trio.equal()
    term = old.node.status().term
    del trio.running[old.node.node_id]
    await old.close(hand_over=True)
    new = await trio.leader()
    assert new.node.status().term == term + 1, "nobody had to notice anything"
    await trio.stop(*trio.running)


@pytest.mark.row("B35")
async def test_metrics_say_what_happened(host_world: World, folder: str) -> None:
    trio = Trio(host_world, folder)
    await trio.start(1, 2, 3)
    leader = await trio.leader()
    for number in range(10):
        await leader.node.propose(b"%d" % number)
    await trio.equal()
    for running in trio.running.values():
        text = running.metrics.render()
        assert "isopod_raft_applied_commands_total 10" in text
        assert f"isopod_raft_is_leader {int(running is leader)}" in text
        assert 'isopod_raft_peer_connected{peer="' in text
    text = leader.metrics.render()
    assert "isopod_raft_proposals_total 10" in text
    assert "isopod_raft_round_duration_seconds_count 10" in text
    assert "isopod_raft_append_duration_seconds_count" in text
    await trio.stop(1, 2, 3)


async def test_the_log_of_a_node_that_lost_its_tail_is_refused(host_world: World, folder: str) -> None:
    """A log whose entries do not reach the snapshot's place cannot have been written by one node."""
    from isopod.cluster.raft.log import RaftLog
    from isopod.cluster.raft.memory import MemoryNetwork
    from isopod.cluster.raft.node import RaftNode
    from tests.cluster.raft.support import CLUSTER, Tally

    first = (ConfState(voters=(1,)), b"\x92\x00\x90")
    log, _ = await RaftLog.open(host_world, folder, cluster_id=CLUSTER, node_id=1, bootstrap=first)
    log.append(b"\xff\xff\xff no entries", 7, 7, hard_state=b"")
    await log.close()
    lines: list[bytes] = []
    with pytest.raises(errors.BadRecord, match="does not fit"):
        await RaftNode.open(
            host_world,
            folder,
            node_id=1,
            cluster_id=CLUSTER,
            machine=Tally(),
            transport=MemoryNetwork().transport(),
            settings=SETTINGS,
            bootstrap=None,
            logger=Logger(lines.append, host_world.clock),
            metrics=Registry(),
        )
