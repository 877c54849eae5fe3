"""What the shards of the parity suite run."""

import asyncio
from typing import Final, cast

import msgspec

from isopod.runtime.shards import PeeringShardedService, Smp, WorkQueue, submit_to, this_shard_id, this_smp, verb
from isopod.wire.service import Method
from isopod.world.errors import NotFound


class Number(msgspec.Struct, frozen=True):
    """A request or a reply."""

    value: int = 0


class Where(msgspec.Struct, frozen=True):
    """Where a handler ran."""

    shard: int
    pid: int


WHERE: Final = Method("where", Number, Where)
REMEMBER: Final = Method("remember", Number, Number)
RECALL: Final = Method("recall", Number, Number)
FAIL: Final = Method("fail", Number, Number)
CRASH: Final = Method("crash", Number, Number)
PING_PONG: Final = Method("ping_pong", Number, Number)
HANG: Final = Method("hang", Number, Number)
HANG_EVENTS: Final = Method("hang_events", Number, Number)
"""How often `hang` began and was cancelled, added up."""
WORK: Final = Method("work", Number, Where)

STATE: dict[str, int] = {"remembered": 0}
"""A global of the module: each shard has its own."""


async def serve(smp: Smp) -> None:
    """Serve the methods on one shard."""

    def where(_: Number) -> Where:
        return Where(this_shard_id(), this_smp().world.processes.own_pid())

    def remember(request: Number) -> Number:
        STATE["remembered"] = request.value
        return request

    def recall(_: Number) -> Number:
        return Number(STATE["remembered"])

    def fail(request: Number) -> Number:
        raise NotFound("number", str(request.value), "count again")

    def crash(request: Number) -> Number:
        return Number(1 // request.value)

    async def ping_pong(request: Number) -> Number:
        """Call the other shard, which calls back, until nothing is left."""
        if not request.value:
            return Number(1)
        reply = await submit_to(1 - this_shard_id(), PING_PONG, Number(request.value - 1))
        return Number(reply.value + 1)

    events: list[str] = []

    async def hang(request: Number) -> Number:
        events.append("begun")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise
        return request

    def hang_events(_: Number) -> Number:
        return Number(len(events))

    smp.serve({WHERE: where, REMEMBER: remember, RECALL: recall, FAIL: fail, CRASH: crash})
    smp.serve({PING_PONG: ping_pong, HANG: hang, HANG_EVENTS: hang_events})


async def count_calls(smp: Smp) -> None:
    """Count on every shard under one name."""
    smp.metrics.counter("parity_calls_total", "Calls.", kind="test").inc(10 + smp.shard)


class Greeter(asyncio.Protocol):
    """Says which shard it is on."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say it."""
        cast("asyncio.Transport", transport).write(str(this_shard_id()).encode())


async def greet(smp: Smp) -> None:
    """Serve connections that shard 0 hands out."""
    smp.serve_connections("greet", Greeter)


QUEUES: dict[int, WorkQueue] = {}


async def work(smp: Smp) -> None:
    """Work that may run on any shard; it waits, so that a test's shards need no processor each."""

    async def run(_: Number) -> Where:
        await asyncio.sleep(0.02)
        return Where(this_shard_id(), this_smp().world.processes.own_pid())

    QUEUES[smp.shard] = WorkQueue(smp, "parity", {WORK: run}, n_at_once=1)


class Store(PeeringShardedService):
    """A part of a key-value store on each shard."""

    def __init__(self, start: int, farewell: str = "") -> None:
        self.values = [start]
        self.farewell = farewell

    @verb
    async def put(self, value: int) -> int:
        """Keep a value; return how many are here."""
        self.values.append(value)
        return len(self.values)

    @verb
    async def total(self) -> int:
        """Return the sum of what is here."""
        return sum(self.values)

    @verb
    async def grand_total(self) -> int:
        """Return the sum of what is on all shards, asked by this one."""
        return await self.container().map_reduce(lambda each: each.total(), int.__add__, 0)

    @verb
    async def refuse(self, value: int) -> int:
        """Refuse."""
        raise NotFound("value", str(value))

    async def stop(self) -> None:
        """Leave a file where one was told to."""
        if self.farewell:
            await this_smp().world.disk.write(f"{self.farewell}/{this_shard_id()}", b"stopped")
