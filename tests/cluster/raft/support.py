"""Helpers: a tiny machine, and clusters of RaftNodes in one process."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from isopod.cluster.raft.memory import MemoryNetwork
from isopod.cluster.raft.node import RaftNode
from isopod.cluster.raft.ports import Batch, Transport
from isopod.cluster.raft.settings import RaftSettings
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import IsopodError, NotLeader
from isopod.world.world import World

CLUSTER = "c-test"
FAST = RaftSettings()


class Tally:
    """A machine that remembers every command with its index: applying anything twice, or in another order, shows."""

    def __init__(self) -> None:
        self.commands: list[tuple[int, bytes]] = []
        self.last_stamp_ns = 0
        self.n_restores = 0
        self._digest = (-1, "")

    def apply(self, batch: Batch) -> Sequence[Any]:
        assert batch.stamp_ns >= self.last_stamp_ns
        assert not self.commands or batch.index > self.commands[-1][0]
        self.last_stamp_ns = batch.stamp_ns
        first = len(self.commands)
        self.commands += [(batch.index, command) for command in batch.commands]
        return list(range(first, len(self.commands)))

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode((self.last_stamp_ns, self.commands))

    def restore(self, data: bytes) -> None:
        self.last_stamp_ns, self.commands = msgspec.msgpack.decode(data, type=tuple[int, list[tuple[int, bytes]]])
        self.n_restores += 1
        self._digest = (-1, "")

    def digest(self) -> str:
        if self._digest[0] != len(self.commands):
            self._digest = len(self.commands), hashlib.sha256(msgspec.msgpack.encode(self.commands)).hexdigest()
        return self._digest[1]

    def values(self) -> list[bytes]:
        return [command for _, command in self.commands]


class Member:
    """A node with its machine."""

    def __init__(self, node: RaftNode, machine: Tally) -> None:
        self.node = node
        self.machine = machine


class Cluster:
    """Nodes over one `MemoryNetwork`, in one World."""

    def __init__(self, world: World, folder: str, *, network: MemoryNetwork | None = None, settings: RaftSettings = FAST) -> None:
        self.world = world
        self.folder = folder
        self.network = network or MemoryNetwork()
        self.settings = settings
        self.members: dict[int, Member] = {}
        self.lines: list[bytes] = []

    async def start(self, *node_ids: int, bootstrap: Sequence[int] | None = None, transport: Transport | None = None) -> None:
        first = node_ids if bootstrap is None else bootstrap
        for node_id in node_ids:
            await self.add(node_id, bootstrap=first, transport=transport)

    async def add(
        self, node_id: int, *, bootstrap: Sequence[int] | None, transport: Transport | None = None, is_quiet: bool = False
    ) -> Member:
        machine = Tally()
        node = await RaftNode.open(
            self.world,
            f"{self.folder}/n{node_id}",
            node_id=node_id,
            cluster_id=CLUSTER,
            machine=machine,
            transport=transport or self.network.transport(),
            settings=self.settings,
            bootstrap=bootstrap,
            logger=Logger(self.lines.append, self.world.clock),
            metrics=Registry(),
            is_quiet=is_quiet,
        )
        await node.start()
        self.members[node_id] = Member(node, machine)
        return self.members[node_id]

    async def stop(self, node_id: int, *, hand_over: bool = False) -> None:
        await self.members.pop(node_id).node.close(hand_over=hand_over)

    async def close(self) -> None:
        for node_id in list(self.members):
            await self.stop(node_id)

    async def leader(self, timeout_s: float = 10.0) -> Member:
        """Wait until one node leads and serves, and all others that are there know it."""

        def found() -> list[Member]:
            leaders = [member for member in self.members.values() if member.node._driver.is_serving]
            if len(leaders) != 1:
                return []
            return leaders if all(member.node.leader == leaders[0].node.node_id for member in self.members.values()) else []

        await until(lambda: bool(found()), timeout_s)
        return found()[0]

    async def propose(self, command: bytes, timeout_s: float = 10.0) -> Any:
        """Propose where the leader is, looking for it as long as need be."""
        async with asyncio.timeout(timeout_s):
            while True:
                for member in list(self.members.values()):
                    if member.node.is_leader:
                        try:
                            return await member.node.propose(command, timeout_s=timeout_s)
                        except NotLeader:
                            pass
                await asyncio.sleep(0.01)

    async def equal(self, timeout_s: float = 10.0) -> list[bytes]:
        """Wait until all machines hold the same, and return it."""

        def same() -> bool:
            indexes = {member.node.applied_index for member in self.members.values()}
            return len(indexes) == 1 and len({member.machine.digest() for member in self.members.values()}) == 1

        await until(same, timeout_s)
        return next(iter(self.members.values())).machine.values()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def outcome(awaitable: Any) -> Any:
    """Return what an awaitable returns, or its error of the tree."""
    try:
        return await awaitable
    except IsopodError as error:
        return error
