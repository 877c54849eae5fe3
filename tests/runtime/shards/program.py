"""What the shards of the tests run: a service of plain verbs, and classes for `Sharded`."""

import asyncio
import os
from typing import Final, cast

import msgspec

from isopod.runtime.abort import remaining_s
from isopod.runtime.scheduling import SchedulingGroup, current_group
from isopod.runtime.shards import PeeringShardedService, Sharded, Smp, SmpServiceGroup, WorkQueue, submit_to, this_shard_id, this_smp, verb
from isopod.wire.service import Method
from isopod.world.errors import NotFound


class Text(msgspec.Struct, frozen=True):
    text: str = ""


class Numbers(msgspec.Struct, frozen=True):
    values: tuple[int, ...] = ()


class Hop(msgspec.Struct, frozen=True):
    n_left: int
    path: tuple[int, ...] = ()
    other: int = 0
    group: str = "default"
    credits: int = 1


class Bounce(msgspec.Struct, frozen=True):
    """A call that calls back, `depth` times, between `a` and `b`."""

    depth: int
    a: int
    b: int


WHO: Final = Method("who", Text, Numbers)
ECHO: Final = Method("echo", Text, Text)
SLEEP: Final = Method("sleep", Text, Text)
FAIL: Final = Method("fail", Text, Text)
BUG: Final = Method("bug", Text, Text)
BOUNCE: Final = Method("bounce", Bounce, Numbers)
DIE: Final = Method("die", Text, Text)
LEFT: Final = Method("left", Text, Text)
SEEN: Final = Method("seen", Text, Numbers)
RELAY: Final = Method("relay", Numbers, Numbers)
UNPACKABLE: Final = Method("unpackable", Text, Text)
BUSY: Final = Method("busy", Text, Text)
RELAY_SLEEP: Final = Method("relay_sleep", Text, Text)
ODD: Final = Method("odd", Text, Text)
ODD_LATER: Final = Method("odd_later", Text, Text)


class Service:
    """The verbs of one shard."""

    def __init__(self, smp: Smp) -> None:
        self.smp = smp
        self.n_cancelled = 0
        self.n_begun = 0

    def who(self, _: Text) -> Numbers:
        return Numbers((this_shard_id(), this_smp().n_shards, this_smp().world.processes.own_pid()))

    def echo(self, request: Text) -> Text:
        return request

    async def sleep(self, request: Text) -> Text:
        self.n_begun += 1
        try:
            await asyncio.sleep(float(request.text))
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        return Text(str(this_shard_id()))

    def fail(self, request: Text) -> Text:
        raise NotFound("thing", request.text, "look elsewhere")

    def bug(self, request: Text) -> Text:
        raise ZeroDivisionError(request.text)

    async def relay_sleep(self, request: Text) -> Text:
        """Sleep on shard 1."""
        return await (self.sleep(request) if this_shard_id() == 1 else submit_to(1, SLEEP, request, timeout_s=7200))

    def odd(self, _: Text) -> Text:
        raise NotFound("file", os.fsdecode(b"\xff"), os.fsdecode(b"\xfe"))

    async def odd_later(self, request: Text) -> Text:
        return self.odd(request)

    async def bounce(self, request: Bounce) -> Numbers:
        here = this_shard_id()
        if request.depth == 0:
            await asyncio.sleep(0.001)
            return Numbers((here,))
        other = request.b if here == request.a else request.a
        found = await submit_to(other, BOUNCE, Bounce(request.depth - 1, request.a, request.b))
        return Numbers((here, *found.values))

    async def relay(self, request: Numbers) -> Numbers:
        """Go to each shard in turn, from there to the next."""
        if not request.values:
            return Numbers((this_shard_id(),))
        found = await submit_to(request.values[0], RELAY, Numbers(request.values[1:]))
        return Numbers((this_shard_id(), *found.values))

    async def die(self, request: Text) -> Text:
        os._exit(int(request.text))

    async def left(self, _: Text) -> Text:
        return Text(f"{remaining_s():.3f}")

    def seen(self, _: Text) -> Numbers:
        return Numbers((self.n_begun, self.n_cancelled))

    def unpackable(self, _: Text) -> object:
        return object()

    def busy(self, request: Text) -> Text:
        until = asyncio.get_running_loop().time() + float(request.text)
        import time

        while time.monotonic() < until:
            pass
        return request


async def serve(smp: Smp) -> None:
    service = Service(smp)
    smp.serve(
        {
            WHO: service.who,
            ECHO: service.echo,
            SLEEP: service.sleep,
            FAIL: service.fail,
            BUG: service.bug,
            BOUNCE: service.bounce,
            DIE: service.die,
            LEFT: service.left,
            SEEN: service.seen,
            RELAY: service.relay,
            UNPACKABLE: service.unpackable,
            BUSY: service.busy,
            RELAY_SLEEP: service.relay_sleep,
            ODD: service.odd,
            ODD_LATER: service.odd_later,
        }
    )


async def broken_on_others(smp: Smp) -> None:
    """A service that starts on shard 0 only."""
    if smp.shard:
        raise NotFound("licence", f"for shard {smp.shard}", "buy one")


GROUP: Final = SmpServiceGroup("mine", 2)


class Add(msgspec.Struct, frozen=True):
    amount: int


class Counter(PeeringShardedService):
    """A number on each shard."""

    def __init__(self, start: Add, label: str = "") -> None:
        self.value = start.amount
        self.label = label

    @verb
    async def add(self, request: Add) -> int:
        self.value += request.amount
        return self.value

    @verb
    def read(self) -> int:  # a plain function is a verb too
        return self.value

    @verb
    async def sum_of_all(self) -> int:
        return await self.container().map_reduce(lambda each: each.value_of(), lambda total, value: total + value, 0)

    @verb
    async def value_of(self) -> int:
        return self.value

    @verb
    async def where(self) -> tuple[int, str]:
        return this_shard_id(), self.label

    def hidden(self) -> int:
        return self.value


class Stopping:
    """Says where and in which order instances are stopped, through a file of lines or the list of the simulation."""

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path

    @verb
    async def ping(self) -> str:
        return self.name

    async def stop(self) -> None:
        this_smp().logger.warning("stopped", name=self.name)


class Failing:
    """Cannot be made on shard 1."""

    def __init__(self, shard: int) -> None:
        if this_shard_id() == shard:
            raise NotFound("ground", "firm")

    @verb
    async def ping(self) -> int:
        return this_shard_id()


COMPUTE: Final = Method("compute", Text, Numbers)
QUEUES: Final[dict[int, WorkQueue]] = {}


async def work(smp: Smp) -> None:
    """A queue of items that wait for a while (so that a test's shards need no processor each)."""

    async def compute(request: Text) -> Numbers:
        await asyncio.sleep(float(request.text))
        return Numbers((this_shard_id(),))

    QUEUES[smp.shard] = WorkQueue(smp, "slow", {COMPUTE: compute}, n_at_once=2)


async def dies_while_starting(smp: Smp) -> None:
    if smp.shard and smp.world.name == "host":
        os._exit(3)
    if smp.shard:
        identity = smp.world.processes.identify(smp.world.processes.own_pid())
        assert identity is not None
        smp.world.processes.signal(identity, 9)


async def dies_when_ready(smp: Smp) -> None:
    """Shard 1 is gone before shard 2 is ready."""
    if smp.shard == 1:
        identity = smp.world.processes.identify(smp.world.processes.own_pid())
        assert identity is not None
        asyncio.get_running_loop().call_later(0.02, smp.world.processes.signal, identity, 9)
    if smp.shard == 2:
        await asyncio.sleep(1)


async def fails_at_length(smp: Smp) -> None:
    if smp.shard:
        raise NotFound(os.fsdecode(b"\xff"), "x" * 100_000)


async def never_ready(smp: Smp) -> None:
    if smp.shard:
        await asyncio.sleep(3600)


START_THERE: Final = Method("start_there", Text, Text)


async def starter(smp: Smp) -> None:
    async def start_there(_: Text) -> Text:
        await Sharded.start(Counter, Add(1))
        return Text()

    smp.serve({START_THERE: start_there})


MOST_AT_ONCE: Final = [0]


async def work_counted(smp: Smp) -> None:
    running = [0]

    async def compute(request: Text) -> Numbers:
        running[0] += 1
        MOST_AT_ONCE[0] = max(MOST_AT_ONCE[0], running[0])
        await asyncio.sleep(float(request.text))
        running[0] -= 1
        return Numbers((this_shard_id(),))

    MOST_AT_ONCE[0] = 0
    QUEUES[smp.shard] = WorkQueue(smp, "counted", {COMPUTE: compute}, n_at_once=2)


async def compute_here(request: Text) -> Numbers:
    await asyncio.sleep(float(request.text))
    return Numbers((this_shard_id(),))


async def work_short(smp: Smp) -> None:
    QUEUES[smp.shard] = WorkQueue(smp, "short", {COMPUTE: compute_here}, n_at_once=2, n_items_max=1)


async def work_again(smp: Smp) -> None:
    QUEUES[smp.shard] = WorkQueue(smp, "again", {COMPUTE: compute_here}, n_at_once=2, idempotent=True)


class Greeter(asyncio.Protocol):
    """Says which shard it is on, then echoes."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(str(this_shard_id()).encode())

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Upgrading(Greeter):
    """Hands its connection to another protocol at the first bytes."""

    def data_received(self, data: bytes) -> None:
        successor = Successor()
        successor.transport = self.transport
        self.transport.set_protocol(successor)
        self.transport.write(data)


class Successor(asyncio.Protocol):
    transport: asyncio.Transport


async def greet(smp: Smp) -> None:
    smp.serve_connections("greet", Greeter)


async def greet_upgrading(smp: Smp) -> None:
    smp.serve_connections("greet", Upgrading)


GROUP_OF: Final = Method("group_of", Text, Text)


async def grouped(smp: Smp) -> None:
    async def group_of(_: Text) -> Text:
        return Text(current_group().name)

    smp.use_scheduling_group(SchedulingGroup("bulk", 100))
    smp.serve({GROUP_OF: group_of})


async def work_computing(smp: Smp) -> None:
    def compute(request: Text) -> Numbers:
        import time

        until = time.thread_time() + float(request.text)
        while time.thread_time() < until:
            pass
        return Numbers((this_shard_id(),))

    QUEUES[smp.shard] = WorkQueue(smp, "computing", {COMPUTE: compute})
