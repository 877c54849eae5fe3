"""Several nodes of one cluster in one process, on the host's loopback or on one simulated machine: what the tests of membership share."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from isopod.cluster.member import ClusterNode
from isopod.cluster.members.config import ClusterConfig, DetectorSettings, PeerSpec, Security
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import WrongState
from isopod.world.world import World

TOKEN: Final = "a-secret-of-the-tests-0123456789"
QUICK: Final = DetectorSettings(beat_s=0.1, suspect_s=0.5, fail_s=1.0, recover_beats=2, cleanup_s=0.0, agent_cleanup_s=0.0, replace_s=60.0)


class Rig:
    """The nodes, by id; `lines` are all their log lines."""

    def __init__(self, world: World, folder: str, security: Security) -> None:
        self.world = world
        self.folder = folder
        self.security: Security = security
        self.nodes: dict[int, ClusterNode] = {}
        self.lines: list[bytes] = []
        self._all: list[ClusterNode] = []

    def make(self, node_id: int, **fields: Any) -> ClusterNode:
        """Return a node that is not started; its folder is the one it had before."""
        config = ClusterConfig(
            data_dir=f"{self.folder}/n{node_id}", node_id=node_id, bind="127.0.0.1:0", security=self.security, detector=QUICK
        )
        logger = Logger(lambda line: self.lines.append(line), self.world.clock, level="info")  # noqa: PLW0108 - returns None
        node = ClusterNode(self.world, config._replace(**fields), logger, Registry())
        self.nodes[node_id] = node
        self._all.append(node)
        return node

    async def start(self, node_id: int, **fields: Any) -> ClusterNode:
        """Start a node and wait until it is a member."""
        node = self.make(node_id, **fields)
        await node.start()
        await node.wait_ready(20.0)
        return node

    async def found(self, **fields: Any) -> ClusterNode:
        """Found a cluster of node 1."""
        return await self.start(1, **{"token": TOKEN, **fields})

    async def join(self, node_id: int, at: ClusterNode, **fields: Any) -> ClusterNode:
        """Have a node join by another."""
        return await self.start(node_id, **{"join": (at.advertised,), "token": TOKEN, **fields})

    async def form(self, n_nodes: int, **fields: Any) -> list[ClusterNode]:
        """Form a cluster of that many voters."""
        first = await self.found(**fields)
        nodes = [first]
        for node_id in range(2, n_nodes + 1):
            nodes.append(await self.join(node_id, first, **fields))
        await until(lambda: all(len(node.status().voters) == n_nodes for node in nodes), "all vote")
        return nodes

    async def again(self, node_id: int, **fields: Any) -> ClusterNode:
        """Start a node once more on its folder and its old address."""
        old = self.nodes[node_id]
        return await self.start(node_id, **{"bind": old.advertised, **fields})

    def leader(self) -> ClusterNode:
        """Return the node that leads."""
        return next(node for node in self.nodes.values() if leads(node))

    def others(self) -> list[ClusterNode]:
        """Return the nodes that do not."""
        return [node for node in self.nodes.values() if node is not self.leader()]

    async def close(self) -> None:
        """Stop all nodes, those first that would hand over to nobody."""
        for node in reversed(self._all):
            await node.stop()


@asynccontextmanager
async def rig_of(world: World, folder: str, security: Security = "plaintext") -> AsyncIterator[Rig]:
    """Make a rig, and stop all its nodes at the end."""
    rig = Rig(world, folder, security)
    try:
        yield rig
    finally:
        await rig.close()


def leads(node: ClusterNode) -> bool:
    """Return whether a node believes to lead; cheaper than its status."""
    try:
        return node.raft.is_leader
    except WrongState:  # an agent, or no member yet
        return False


async def until(condition: Callable[[], bool], what: str, *, timeout_s: float = 20.0) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: Not in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not in {timeout_s:g} s: {what}") from None


def peers_of(addresses: Sequence[str]) -> tuple[PeerSpec, ...]:
    """Return peers with the ids 1, 2, 3 and so on."""
    return tuple(PeerSpec(number, address) for number, address in enumerate(addresses, 1))


def free_addresses(n: int, first: int = 17100) -> list[str]:
    """Return addresses on loopback that the tests of this folder have for themselves."""
    return [f"127.0.0.1:{first + number}" for number in range(n)]
