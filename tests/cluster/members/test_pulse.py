"""Pulse alone, against scripted members: whom it beats to, what it takes over, and how often it looks."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from isopod.cluster.members import wire as w
from isopod.cluster.members.book import Book
from isopod.cluster.members.config import ClusterConfig
from isopod.cluster.members.identity import Identity
from isopod.cluster.members.links import Links
from isopod.cluster.members.pulse import Pulse
from isopod.cluster.members.wire import NodeAddress
from isopod.runtime.logger import Logger
from isopod.world.errors import NotStarted
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.cluster.members.rig import until

OWN_ID = 1


@dataclass
class Members:
    """The other members, who all say that `leader_id` leads; only those whose address is known can be asked."""

    book: Book
    leader_id: int
    asked: list[int] = field(default_factory=list)
    peers: tuple[int, ...] = ()

    async def call(self, node_id: int, _method: object, _request: w.BeatRequest, *, timeout_s: float) -> w.BeatReply:
        await asyncio.sleep(0.001)
        self.asked.append(node_id)
        if self.book.find(node_id) is None:
            raise NotStarted(f"node {node_id}", "its address is not known")
        where = f"10.0.0.{self.leader_id}:7000" if self.leader_id else ""
        peers = tuple(NodeAddress(peer, f"10.0.0.{peer}:7000", "", "voter") for peer in self.peers) or None
        return w.BeatReply(leader_id=self.leader_id, leader_address=where, lease_s=3.0, beat_s=1.0, book=1, peers=peers)


def pulse_of(world: World, members: Members, leader: Callable[[], int]) -> Pulse:
    return Pulse(
        world,
        ClusterConfig(data_dir="/node", node_id=OWN_ID),
        Identity(node_id=OWN_ID, incarnation="disk1", phase="member", cluster_id="c"),
        book=members.book,
        links=cast(Links, cast(Any, members)),
        address="10.0.0.1:7000",
        leader=leader,
        applied=lambda: 0,
        logger=Logger(lambda _: None, world.clock),
    )


def book_of(world: World, *known: int) -> Book:
    book = Book(world, "/node", secured=False)
    book.tell(NodeAddress(node_id, f"10.0.0.{node_id}:7000", "", "voter") for node_id in known)
    return book


@pytest.mark.row("S18")
async def test_a_member_that_was_away_learns_the_address_of_a_leader_that_joined_meanwhile(sim_world: SimWorld) -> None:
    """It hears of node 4 by Raft alone, whose record is in a log that does not come before node 4 is answered."""
    members = Members(book_of(sim_world.world, 1, 2, 3), leader_id=4)
    pulse = pulse_of(sim_world.world, members, lambda: 4)
    running = asyncio.get_running_loop().create_task(pulse.run())

    await until(lambda: pulse.reply is not None, "the leader has heard it")

    assert members.asked[0] in (2, 3), "somebody whose address is known is asked who leads, and where"
    assert members.asked[-1] == 4
    assert members.book.find(4) == NodeAddress(4, "10.0.0.4:7000", "", "voter")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.row("S18")
async def test_a_member_that_was_away_learns_of_others_while_nobody_leads(sim_world: SimWorld) -> None:
    """Node 4 joined meanwhile, and may be the only one that can be elected: it needs this node's answer."""
    members = Members(book_of(sim_world.world, 1, 2, 3), leader_id=0, peers=(1, 2, 3, 4))
    running = asyncio.get_running_loop().create_task(pulse_of(sim_world.world, members, lambda: 0).run())

    await until(lambda: members.book.find(4) is not None, "it has heard of node 4")

    assert members.book.find(4) == NodeAddress(4, "10.0.0.4:7000", "", "voter")
    assert len(members.asked) == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.row("S19")
async def test_it_does_not_spin_while_nobody_leads(sim_world: SimWorld) -> None:
    members = Members(book_of(sim_world.world, 1, 2, 3), leader_id=3)
    n_looks = 0
    leader = 2  # which says that node 3 leads, and then nobody is known to

    def look() -> int:
        nonlocal n_looks
        n_looks += 1
        return leader

    running = asyncio.get_running_loop().create_task(pulse_of(sim_world.world, members, look).run())
    await until(lambda: bool(members.asked), "it beats")
    leader = n_looks = 0

    await asyncio.sleep(10.0)

    assert 5 <= n_looks <= 50
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
