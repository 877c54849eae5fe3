"""TestCluster: real nodes on loopback, in one process, for tests of what is built on a cluster.

Each `TestNode` is an `isopod.cluster.member.ClusterNode` with a folder and a port of its own; stopping one and starting it again is a
restart on the same disk. What it is not: processes (all nodes share one event loop, and what one wrote stays in the page cache), and TLS,
which is off on loopback unless asked for. For faults of machines, disks and networks there is the simulation (`isopod.testing.simulation`).
"""

import asyncio
from collections.abc import Sequence
from typing import Final, Self

from isopod.api.store.client import StoreClient
from isopod.cluster.member import ClusterNode
from isopod.cluster.members.config import ClusterConfig, PeerSpec, Security
from isopod.cluster.raft.settings import RaftSettings
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.testing.waiting import wait_for_condition_with_backoff
from isopod.world.errors import InvalidArgument, WrongState
from isopod.world.host.world import make_host_world
from isopod.world.network import TcpAddress
from isopod.world.world import World

NODES_MAX: Final = 7
FORM_S: Final = 30.0
LOOPBACK: Final = "127.0.0.1"
_SECRET: Final = "shared-secret-of-a-test-cluster"  # noqa: S105  for loopback only


class TestNode:
    """One node: a folder, an address, and the node while it runs. Made by `TestCluster`.

    Args:
        world: What it runs on.
        config: What it is told at every start.
        log: Takes the lines that it logs.
    """

    __test__ = False

    def __init__(self, world: World, config: ClusterConfig, log: list[bytes]) -> None:
        self.config: Final = config
        self._world = world
        self._log = log
        self._node: ClusterNode | None = None

    @property
    def id(self) -> int:
        """Its id."""
        return self.config.node_id

    @property
    def address(self) -> TcpAddress:
        """Where it listens."""
        host, _, port = self.config.bind.rpartition(":")
        return TcpAddress(host, int(port))

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._node is not None

    @property
    def is_leader(self) -> bool:
        """Whether it believes to lead."""
        return self._node is not None and self._node.status().state == "leader"

    @property
    def node(self) -> ClusterNode:
        """The node.

        Raises:
            WrongState: It does not run.
        """
        if self._node is None:
            raise WrongState("test node", str(self.id), "stopped", "use it", hint="start it")
        return self._node

    async def start(self) -> None:
        """Start it on its folder; nothing happens if it runs. Raises what `ClusterNode.start` raises."""
        if self._node is None:
            logger = Logger(self._log.append, clock=self._world.clock, level="warning")
            node = ClusterNode(self._world, self.config, logger, Registry())
            await node.start()
            self._node = node

    async def stop(self) -> None:
        """Stop it in the ordinary way; nothing happens if it does not run."""
        node, self._node = self._node, None
        if node is not None:
            await node.stop()


class TestCluster:
    """Some nodes that form one cluster. Use it in `async with`, or call `start` and `close`.

    Args:
        n_nodes: How many, 1 to 7.
        folder: Where the nodes' folders are made; the caller removes it.
        world: What they run on; None for the host, which is then closed at the end.
        raft: Settings of Raft.
        security: "plaintext" for loopback.
    """

    __test__ = False

    def __init__(
        self,
        n_nodes: int,
        folder: str,
        *,
        world: World | None = None,
        raft: RaftSettings = RaftSettings(),  # noqa: B008  an immutable tuple
        security: Security = "plaintext",
    ) -> None:
        if not 1 <= n_nodes <= NODES_MAX:
            raise InvalidArgument("nodes", n_nodes, f"want 1 to {NODES_MAX}")
        self.log: list[bytes] = []
        """What the nodes logged, warnings and worse."""
        self.nodes: list[TestNode] = []
        self._world = world or make_host_world()
        self._owns_world = world is None
        self._n_nodes = n_nodes
        self._folder = folder
        self._raft = raft
        self._security: Security = security
        self._clients: list[StoreClient] = []

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_ended: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Take free ports, start all nodes, and return when all of them are members.

        Raises:
            ConditionNotMet: They did not find each other in time.
        """
        ports = await _free_ports(self._world, self._n_nodes)
        peers = tuple(PeerSpec(number, f"{LOOPBACK}:{port}") for number, port in enumerate(ports, start=1))
        for peer in peers:
            config = ClusterConfig(
                data_dir=f"{self._folder}/node{peer.node_id}",
                node_id=peer.node_id,
                bind=peer.address,
                peers=peers if self._n_nodes > 1 else (),
                token=_SECRET,
                voters_max=7,
                security=self._security,
                raft=self._raft,
            )
            self.nodes.append(TestNode(self._world, config, self.log))
        for node in self.nodes:
            await node.start()
        await wait_for_condition_with_backoff(self.has_formed, what="the cluster formed", timeout_s=FORM_S, pause_s_max=0.1)

    async def close(self) -> None:
        """Stop everything that runs."""
        for client in self._clients:
            await client.close()
        self._clients.clear()
        for node in self.nodes:
            await node.stop()
        if self._owns_world:
            self._world.close()

    def client(self) -> StoreClient:
        """Return a new client of the store, which knows all nodes; closed with the cluster."""
        client = StoreClient(self._world, [node.address for node in self.nodes], plaintext=True)
        self._clients.append(client)
        return client

    def leader(self) -> TestNode:
        """Return the node that leads now.

        Raises:
            WrongState: None does.
        """
        found = self._leaders()
        if not found:
            raise WrongState("test cluster", self._folder, "without a leader", "name one", hint="await wait_for_leader()")
        return found[0]

    async def wait_for_leader(self, *, timeout_s: float = 10.0) -> TestNode:
        """Wait until exactly one running node leads and every other running one knows it; return it.

        Raises:
            ConditionNotMet: Not in time.
        """
        await wait_for_condition_with_backoff(self._has_leader, what="a leader was elected", timeout_s=timeout_s, pause_s_max=0.1)
        return self.leader()

    def has_formed(self) -> bool:
        """Return whether every node votes and knows the leader."""
        return self._has_leader() and all(len(node.node.status().voters) == self._n_nodes for node in self.running())

    def agrees(self) -> bool:
        """Return whether all running nodes have applied the same entries and hold the same state."""
        states = [(status.applied, status.digest) for status in (node.node.status() for node in self.running())]
        return len(set(states)) == 1

    def running(self) -> Sequence[TestNode]:
        """Return the nodes that run, by id."""
        return [node for node in self.nodes if node.is_running]

    def _leaders(self) -> list[TestNode]:
        return [node for node in self.running() if node.is_leader]

    def _has_leader(self) -> bool:
        leaders = self._leaders()
        return len(leaders) == 1 and all(node.node.status().leader_id == leaders[0].id for node in self.running())


async def _free_ports(world: World, n_ports: int) -> list[int]:
    """Return ports on loopback that nobody listens on now."""
    listeners = [await world.network.listen(TcpAddress(LOOPBACK, 0), asyncio.Protocol) for _ in range(n_ports)]
    ports = []
    for listener in listeners:
        assert isinstance(listener.address, TcpAddress)
        ports.append(listener.address.port)
        await listener.close()
    return ports
