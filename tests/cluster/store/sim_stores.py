"""Helpers: whole stores on simulated machines, over the real Raft, its log, its transport and RPC; one more machine for clients."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Self

from isopod.api.store import StoreClient
from isopod.api.store.client import ClientSettings
from isopod.cluster.raft.node import RaftNode
from isopod.cluster.raft.settings import RaftSettings
from isopod.cluster.raft.transport import RpcTransport
from isopod.cluster.store import Replica, ReplicaSettings, StoreMachine, handlers
from isopod.cluster.store.peers import RpcPeers
from isopod.net.rpc import Server
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import IsopodError
from isopod.world.network import Address, PeerIdentity, TcpAddress
from isopod.world.sim.cluster import SimCluster
from isopod.world.sim.sim_host import NodeHandle, SimHost

PORT = 7000


class Book:
    """Where nodes are."""

    def __init__(self, addresses: dict[int, Address]) -> None:
        self.addresses = addresses

    def address(self, node_id: int) -> Address | None:
        return self.addresses.get(node_id)

    def admits(self, node_id: int, identity: PeerIdentity | None) -> bool:
        return True

    def incarnation(self, node_id: int) -> str | None:
        return None


class Running(NamedTuple):
    raft: RaftNode
    machine: StoreMachine
    replica: Replica


class SimStores:
    """One node per machine, node 1 on node1 and so on; clients are on the machine behind the last.

    Args:
        seed: Decides everything.
        n: How many nodes.
        raft: Times and bounds of Raft.
        store: Of the replicas.
    """

    def __init__(self, seed: int, n: int = 3, *, raft: RaftSettings | None = None, store: ReplicaSettings | None = None) -> None:
        self.cluster = SimCluster(seed, n + 1)
        self.fabric = self.cluster.fabric
        self.ids = list(range(1, n + 1))
        self.running: dict[int, Running] = {}
        self.handles: dict[int, NodeHandle[Any]] = {}
        self.lines: list[bytes] = []
        self._raft, self._store = raft or RaftSettings(), store or ReplicaSettings()
        self._addresses: dict[int, Address] = {number: TcpAddress(self.host(number).address, PORT) for number in self.ids}

    def __enter__(self) -> Self:
        self.start(*self.ids)
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.close()

    def run(self, body: Coroutine[Any, Any, None]) -> None:
        self.cluster.run(body)

    def host(self, number: int) -> SimHost:
        return self.cluster.hosts[number - 1]

    def client(self, *numbers: int, settings: ClientSettings | None = None) -> StoreClient:
        addresses = [self._addresses[number] for number in numbers or self.ids]
        return StoreClient(self.cluster.hosts[-1].world, addresses, plaintext=True, settings=settings or ClientSettings())

    def start(self, *numbers: int) -> None:
        for number in numbers:
            self.handles[number] = self.host(number).spawn_node(self._body(number), name=f"store{number}")

    def kill(self, number: int) -> None:
        self.running.pop(number, None)
        self.handles.pop(number).kill()

    async def leader(self) -> int:
        def found() -> list[int]:
            return [number for number, node in self.running.items() if node.raft._driver.is_serving and not self.handles[number].is_hung]

        await self.wait(found)
        return max(found(), key=lambda number: self.running[number].raft._driver.term)

    async def wait(self, condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)

    async def settle(self) -> None:
        """Wait until all nodes have applied the same, and see that they hold the same."""
        await self.wait(
            lambda: len(self.running) == len(self.ids) and len({node.raft.applied_index for node in self.running.values()}) == 1
        )
        assert len({node.machine.digest() for node in self.running.values()}) == 1

    async def _body(self, number: int) -> None:
        host = self.host(number)
        world = host.world
        logger, metrics = Logger(self.lines.append, world.clock), Registry()
        book, machine = Book(self._addresses), StoreMachine()
        transport = RpcTransport(world, book, logger=logger, metrics=metrics)
        raft = await RaftNode.open(
            world,
            "/data",
            node_id=number,
            cluster_id="c",
            machine=machine,
            transport=transport,
            settings=self._raft,
            bootstrap=self.ids,
            logger=logger,
            metrics=metrics,
        )
        replica = Replica(world, raft, machine, peers=RpcPeers(world, book.address), logger=logger, metrics=metrics, settings=self._store)
        server = Server(world, [*transport.handlers(), *handlers(replica)], logger=logger, metrics=metrics)
        await server.listen(TcpAddress(host.address, PORT), plaintext=True)
        await raft.start()
        await replica.start()
        self.running[number] = Running(raft, machine, replica)
        await asyncio.get_running_loop().create_future()


async def until_done(make: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Try until it does not fail."""
    while True:
        try:
            await make()
        except IsopodError:
            await asyncio.sleep(0.05)
        else:
            return
