"""Helpers: RaftNodes on simulated machines, over the real transport and RPC."""

import asyncio
from collections.abc import Callable
from typing import Any

from isopod.cluster.raft.link import LinkSettings
from isopod.cluster.raft.node import RaftNode
from isopod.cluster.raft.ports import NodeId
from isopod.cluster.raft.settings import RaftSettings
from isopod.cluster.raft.transport import RpcTransport
from isopod.journal import JournalSettings
from isopod.net.rpc import Server
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.network import Address, PeerIdentity, TcpAddress
from isopod.world.sim.cluster import SimCluster
from isopod.world.sim.sim_host import NodeHandle, SimHost
from isopod.world.world import World
from tests.cluster.raft.support import CLUSTER, Member, Tally

PORT = 7000
DEFAULTS = RaftSettings()
LINKS = LinkSettings()


class Book:
    """An address book with what the test says."""

    def __init__(self, addresses: dict[NodeId, Address]) -> None:
        self.addresses = addresses
        self.incarnations: dict[NodeId, str] = {}

    def address(self, node_id: NodeId) -> Address | None:
        return self.addresses.get(node_id)

    def admits(self, node_id: NodeId, identity: PeerIdentity | None) -> bool:
        return True

    def incarnation(self, node_id: NodeId) -> str | None:
        return self.incarnations.get(node_id)


class Running(Member):
    """A node with its server and transport."""

    def __init__(self, node: RaftNode, machine: Tally, server: Server, transport: RpcTransport, metrics: Registry) -> None:
        super().__init__(node, machine)
        self.server = server
        self.transport = transport
        self.metrics = metrics

    async def close(self, *, hand_over: bool = False) -> None:
        await self.node.close(hand_over=hand_over)
        await self.server.close()


async def run_node(
    world: World,
    folder: str,
    *,
    node_id: NodeId,
    book: Book,
    listen: Address,
    bootstrap: "list[int] | None",
    write: Callable[[bytes], None],
    settings: RaftSettings = DEFAULTS,
    links: LinkSettings = LINKS,
    cluster_id: str = CLUSTER,
    machine: Tally | None = None,
    journal: JournalSettings | None = None,
) -> Running:
    """Start server, transport and node."""
    logger, metrics = Logger(write, world.clock), Registry()
    transport = RpcTransport(world, book, logger=logger, metrics=metrics, settings=links)
    server = Server(world, transport.handlers(), logger=logger, metrics=metrics, peer=f"node {node_id}")
    listener = await server.listen(listen, plaintext=True)
    book.addresses[node_id] = listener.address
    machine = machine or Tally()
    node = await RaftNode.open(
        world,
        folder,
        node_id=node_id,
        cluster_id=cluster_id,
        machine=machine,
        transport=transport,
        settings=settings,
        bootstrap=bootstrap,
        logger=logger,
        metrics=metrics,
        journal_settings=journal,
    )
    await node.start()
    return Running(node, machine, server, transport, metrics)


class SimNodes:
    """One node per simulated machine; node 1 is on node1, and so on."""

    def __init__(self, seed: int, n: int, *, settings: RaftSettings = DEFAULTS, n_first: int | None = None) -> None:
        self.cluster = SimCluster(seed, n)
        self.settings = settings
        self.links = LINKS
        self.journal: JournalSettings | None = None
        self.first = list(range(1, (n_first or n) + 1))
        self.running: dict[NodeId, Running] = {}
        self.handles: dict[NodeId, NodeHandle[Any]] = {}
        self.lines: list[bytes] = []
        self.loop = self.cluster.loop
        self.fabric = self.cluster.fabric

    def host(self, node_id: NodeId) -> SimHost:
        return self.cluster.hosts[node_id - 1]

    def start(self, *node_ids: NodeId, bootstrap: bool = True) -> None:
        for node_id in node_ids or self.first:
            self.handles[node_id] = self.host(node_id).spawn_node(self._body(node_id, bootstrap), name=f"raft{node_id}")

    async def _body(self, node_id: NodeId, bootstrap: bool) -> None:
        host = self.host(node_id)
        book = Book({other: TcpAddress(each.address, PORT) for other, each in enumerate(self.cluster.hosts, start=1)})
        running = await run_node(
            host.world,
            "/data",
            node_id=node_id,
            book=book,
            listen=TcpAddress(host.address, PORT),
            bootstrap=self.first if bootstrap and node_id in self.first else None,
            write=self.lines.append,
            settings=self.settings,
            links=self.links,
            journal=self.journal,
        )
        self.running[node_id] = running
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.running.pop(node_id, None)

    def kill(self, node_id: NodeId) -> None:
        self.running.pop(node_id, None)
        self.handles.pop(node_id).kill()

    def power_cut(self, node_id: NodeId) -> None:
        self.running.pop(node_id, None)
        self.handles.pop(node_id, None)
        self.host(node_id).power_cut()

    def nodes(self) -> list[Running]:
        return list(self.running.values())

    def leader(self) -> Running | None:
        """Return who leads and serves, in the highest term."""
        serving = [each for each in self.running.values() if each.node._driver.is_serving]
        return max(serving, key=lambda each: each.node._driver.term, default=None)

    async def wait(self, condition: Callable[[], object], timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    async def wait_leader(self, timeout_s: float = 30.0) -> Running:
        await self.wait(lambda: self.leader() is not None, timeout_s)
        leader = self.leader()
        assert leader is not None
        return leader

    async def equal(self, timeout_s: float = 60.0) -> list[bytes]:
        def same() -> bool:
            nodes = self.nodes()
            return len({each.node.applied_index for each in nodes}) == 1 and len({each.machine.digest() for each in nodes}) == 1

        await self.wait(same, timeout_s)
        return self.nodes()[0].machine.values()

    def close(self) -> None:
        self.cluster.close()
