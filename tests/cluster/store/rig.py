"""Helpers: a log without Raft, for tests of what stands on it: who leads, who is behind and what gets lost is said by the test."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Self

import msgspec

from isopod.api.store import messages as m
from isopod.cluster.raft.ports import Batch, LeaderChanged, RaftEvent, RaftStatus, Waiter
from isopod.cluster.store.machine import StoreMachine
from isopod.cluster.store.replica import Replica, ReplicaSettings
from isopod.cluster.store.service import handlers
from isopod.net.address import format_address
from isopod.net.rpc import Server
from isopod.net.rpc.call import Call
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import DeadlineExceeded, LeadershipLost, NotLeader, NotStarted
from isopod.world.network import Address, TcpAddress
from isopod.world.world import World

SECOND_NS = 1_000_000_000
encode = msgspec.msgpack.Encoder().encode
decode_outcome = msgspec.msgpack.Decoder(m.Outcome).decode


def command(*ops: m.Op, session: int = 0, seq: int = 0, floor: int = 0, level: int = m.LEVEL) -> bytes:
    return encode(m.Command(level, session, seq, floor, list(ops)))


class Feeder:
    """Feeds a machine, and keeps what it was fed."""

    def __init__(self, machine: StoreMachine | None = None) -> None:
        self.machine = machine or StoreMachine()
        self.batches: list[Batch] = []
        self.stamp_ns = SECOND_NS

    def feed(self, *commands: bytes, after_s: float = 0.0) -> list[m.Outcome]:
        self.stamp_ns += round(after_s * SECOND_NS)
        batch = Batch(len(self.batches) + 1, 1, self.stamp_ns, list(commands))
        self.batches.append(batch)
        return [decode_outcome(outcome) for outcome in self.machine.apply(batch)]

    def do(self, *ops: m.Op, after_s: float = 0.0) -> Any:
        """Apply operations outside of any session; return the result, or the list of results."""
        [outcome] = self.feed(command(*ops), after_s=after_s)
        assert outcome.refusal is None, outcome.refusal
        return outcome.results[0] if len(ops) == 1 else outcome.results


class FakeLog:
    """A log that agrees at once, and its nodes."""

    def __init__(self, world: World, n_nodes: int, **settings: Any) -> None:
        self.world = world
        self.batches: list[Batch] = []
        self.term = 1
        self.leader = 1
        self.rafts = {number: FakeRaft(self, number) for number in range(1, n_nodes + 1)}
        self.lines: list[bytes] = []
        self.metrics = {number: Registry() for number in self.rafts}
        logger = Logger(self.lines.append, world.clock)
        self.replicas = {
            number: Replica(
                world,
                raft,
                raft.machine,
                peers=FakePeers(self, number),
                logger=logger,
                metrics=self.metrics[number],
                settings=ReplicaSettings(**{"check_s": 0.0, **settings}),
            )
            for number, raft in self.rafts.items()
        }
        self.handlers = {
            number: {method.name: handler for method, handler in handlers(replica)} for number, replica in self.replicas.items()
        }
        self.n_calls = 0
        self.dead: dict[int, None] = {}
        self.addresses: dict[int, str] = {}
        self.servers: dict[int, Server] = {}

    async def __aenter__(self) -> Self:
        for replica in self.replicas.values():
            await replica.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for number in list(self.servers):
            await self.kill(number)
        for replica in self.replicas.values():
            await replica.close()
        telling = [task for raft in self.rafts.values() for task in raft.telling]
        for task in telling:
            task.cancel()
        await asyncio.gather(*telling, return_exceptions=True)

    async def serve(self, number: int, address: Address = TcpAddress("127.0.0.1", 0)) -> TcpAddress:  # noqa: B008
        """Serve a node's verbs; return where, for a client."""
        server = Server(self.world, handlers(self.replicas[number]), logger=Logger(self.lines.append, self.world.clock), metrics=Registry())
        listener = await server.listen(address, plaintext=True)
        self.addresses[number] = format_address(listener.address)
        self.servers[number] = server
        self.dead.pop(number, None)
        return listener.address if isinstance(listener.address, TcpAddress) else TcpAddress("127.0.0.1", 0)

    async def kill(self, number: int) -> None:
        """End a node's connections, and let nobody reach it."""
        self.dead[number] = None
        await self.servers.pop(number).close()

    def elect(self, leader: int) -> None:
        self.term += 1
        self.leader = leader
        for number, raft in self.rafts.items():
            raft.tell(LeaderChanged(self.term, leader, number == leader))

    def append(self, data: bytes) -> int:
        self.batches.append(Batch(len(self.batches) + 1, self.term, self.world.clock.now_ns(), [data]))
        for raft in self.rafts.values():
            if not raft.is_lagging:
                raft.catch_up()
        return len(self.batches)


class FakeRaft:
    """A node's part of it."""

    def __init__(self, log: FakeLog, number: int) -> None:
        self.log = log
        self.number = number
        self.machine = StoreMachine()
        self.applied = 0
        self.outcomes: dict[int, bytes] = {}
        self.is_lagging = False
        self.delay_s = 0.0
        self.lose_requests = self.lose_replies = 0
        self.n_proposed = 0
        self.n_barriers = 0
        self.callbacks: list[Callable[[RaftEvent], None]] = []
        self.barrier_error: Exception | None = None
        self.telling: list[asyncio.Task[None]] = []

    async def propose(self, data: bytes, *, timeout_s: float) -> Any:
        await asyncio.sleep(self.delay_s)
        if self.log.leader != self.number:
            raise NotLeader(self.number, self.log.leader)
        self.n_proposed += 1
        if self.lose_requests:
            self.lose_requests -= 1
            raise LeadershipLost(self.number, self.log.term)
        index = self.log.append(data)
        if self.lose_replies:
            self.lose_replies -= 1
            raise LeadershipLost(self.number, self.log.term)
        return self.outcomes[index]

    async def read_barrier(self, *, timeout_s: float) -> int:
        self.n_barriers += 1
        if self.barrier_error is not None:
            raise self.barrier_error
        index = len(self.log.batches)
        await asyncio.sleep(0.001)
        try:
            async with asyncio.timeout(timeout_s):
                while self.applied < index:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise DeadlineExceeded("a read", timeout_s) from None
        return index

    def propose_nowait(self, command: bytes, waiter: Waiter, *, timeout_s: float) -> None:
        self._tell(self.propose(command, timeout_s=timeout_s), waiter)

    def read_barrier_nowait(self, waiter: Waiter, *, timeout_s: float) -> None:
        self._tell(self.read_barrier(timeout_s=timeout_s), waiter)

    def _tell(self, work: Coroutine[Any, Any, Any], waiter: Waiter) -> None:
        async def tell() -> None:
            try:
                result = await work
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - told, as the real one does
                waiter.set_exception(error)
            else:
                waiter.set_result(result)
            finally:
                self.telling.remove(task)

        task = asyncio.get_running_loop().create_task(tell())
        self.telling.append(task)

    def catch_up(self) -> None:
        while self.applied < len(self.log.batches):
            batch = self.log.batches[self.applied]
            self.applied += 1
            [self.outcomes[self.applied]] = self.machine.apply(batch)

    def status(self, *, with_digest: bool) -> RaftStatus:
        nodes = tuple(self.log.rafts) if hasattr(self.log, "rafts") else (self.number,)
        return RaftStatus(
            node_id=self.number,
            cluster_id="c",
            role="leader" if self.log.leader == self.number else "follower",
            term=self.log.term,
            leader=self.log.leader,
            commit=len(self.log.batches),
            applied=self.applied,
            first_index=1,
            last_index=len(self.log.batches),
            snapshot_index=0,
            voters=nodes,
            learners=(),
            peers=(),
            digest="",
        )

    def subscribe(self, callback: Callable[[RaftEvent], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def tell(self, event: RaftEvent) -> None:
        for callback in list(self.callbacks):
            callback(event)


class FakePeers:
    """Calls of one node to others, without a network."""

    def __init__(self, log: FakeLog, number: int) -> None:
        self.log = log
        self.number = number

    async def call(self, node_id: int, method: Any, request: Any, *, timeout_s: float) -> Any:
        self.log.n_calls += 1
        await asyncio.sleep(0)
        if node_id in self.log.dead:
            raise NotStarted(f"node {node_id}", "dead")
        caller = Caller(self.log.world)
        reply = self.log.handlers[node_id][method.name](Call(caller, 1, method.name, round(timeout_s * 1000)), request)
        return await reply if isinstance(reply, Awaitable) else reply

    def address(self, node_id: int) -> str:
        return self.log.addresses.get(node_id, "")


class Caller:
    peer = "test"
    identity = None

    def __init__(self, world: World) -> None:
        self.loop = asyncio.get_running_loop()
        self.arrived_s = self.loop.time()
        self.arrived_ns = world.clock.monotonic_ns()
