"""SimShards: the Shards port over memory. Every shard is a process (an owner) of the one loop.

Legal behaviours: a batch of messages reaches its peer after a small seeded delay, in order; a shard's process may be killed at any moment
(`kill`), and whoever had a channel or link to it is told after what it had sent. At most `IN_FLIGHT_BYTES` are on their way in a channel,
the rest waits with the sender. The machine has two memory nodes with two processors each; `pin` is only remembered.
Not modelled: a peer that breaks the channel's rules, and messages that are cut.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from importlib import import_module
from typing import Final, TypeVar

from isopod.world.errors import Disconnected, InvalidArgument, IsopodError
from isopod.world.network import Address, Listener, ProtocolFactory, ServerTls, TcpOptions
from isopod.world.processes import ProcessIdentity
from isopod.world.shards import Channel, ChannelCounts, ChannelSettings, Entry, Link, NumaNode, Part, ShardProcess
from isopod.world.shards import Shards as ShardsPort
from isopod.world.sim.clock import SimClock
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.network import SimNetwork
from isopod.world.sim.owners import Owner
from isopod.world.sim.streams import StreamEnd
from isopod.world.sim.table import SIGKILL, ProcessTable, SimProcess
from isopod.world.sim.tls import SimTls
from isopod.world.world import World

T = TypeVar("T")

IN_FLIGHT_BYTES: Final = 1 << 20
TOPOLOGY: Final = (NumaNode(0, (0, 1)), NumaNode(1, (2, 3)))
_DELAY_S: Final = (2e-6, 40e-6)
_START_S: Final = (20e-3, 60e-3)


class SimShards:
    """The port, and what a test may do to it: `processes`, `kill`, `log`, `pins`.

    Args:
        loop: The loop.
        chance: The stream for delays.
        table: Where shards are processes.
        network: Where connections come from.
        clock: The time that certificates are judged by.
    """

    def __init__(self, loop: SimLoop, chance: random.Random, *, table: ProcessTable, network: SimNetwork, clock: SimClock) -> None:
        self._loop = loop
        self._chance = chance
        self._table = table
        self._network = network
        self._tls = SimTls(clock)
        self._world: World | None = None
        self.processes: list[SimProcess] = []
        """The shards ever started, oldest first."""
        self.log: list[bytes] = []
        """What shards wrote to their standard error."""
        self.pins: dict[int, int] = {}
        """The processor each process was pinned to, by pid."""

    def bind(self, world: World) -> None:
        """Know the World that shards get."""
        self._world = world

    def kill(self, process: SimProcess) -> None:
        """Kill a shard's process, as kill -9."""
        self._table.signal(process, SIGKILL)

    # -- the port --------------------------------------------------------------------------------------------------------------------

    def topology(self) -> Sequence[NumaNode]:
        """See `Shards.topology`."""
        return TOPOLOGY

    def pin(self, cpu: int) -> None:
        """See `Shards.pin`."""
        self.pins[self._loop.owner().pid] = cpu

    def unpin(self) -> None:
        """See `Shards.unpin`."""
        self.pins.pop(self._loop.owner().pid, None)

    async def start(self, entry: str, *, name: str, cpu: int | None = None) -> ShardProcess:
        """See `Shards.start`."""
        self._loop.owner().check()
        process = self._table.add([name], {}, "/", outside=False)
        self.processes.append(process)
        if cpu is not None:
            self.pins[process.pid] = cpu
        ours, theirs = _Line(self._loop, self._chance, self.log), _Line(self._loop, self._chance, self.log)
        ours.join(theirs)
        ours.belong(self._loop.owner())
        theirs.belong(process.owner)

        async def body(_: SimProcess) -> int:
            await asyncio.sleep(self._chance.uniform(*_START_S))
            module, function_name = entry.split(":")
            function: Entry = getattr(import_module(module), function_name)
            try:
                await function(self._world, theirs)
            finally:
                theirs.close()
            return 0

        self._table.run(process, body)
        return _SimShard(self._table, process, ours)

    def pair(self, settings: ChannelSettings) -> tuple[Part, Part]:
        """See `Shards.pair`."""
        left, right = SimChannel(self._loop, self._chance), SimChannel(self._loop, self._chance)
        left.join(right)
        for end in (left, right):
            end.belong(self._loop.owner())
        return SimPart(left), SimPart(right)

    def open_channel(self, part: Part, settings: ChannelSettings, peer: str) -> Channel:
        """See `Shards.open_channel`."""
        end = _take(part, SimChannel)
        end.open(settings, peer)
        return end

    async def accept(
        self,
        address: Address,
        on_accept: Callable[[Part], None],
        *,
        mode: int = 0o660,
        gid: int | None = None,
        backlog: int = 4096,
        options: TcpOptions | None = None,
    ) -> Listener:
        """See `Shards.accept`."""
        return await self._network.listen(address, lambda: _Accepted(on_accept), mode=mode, gid=gid, backlog=backlog, options=options)

    async def adopt(
        self, part: Part, factory: ProtocolFactory, *, on_gone: Callable[[], None], tls: ServerTls | None = None
    ) -> asyncio.BaseTransport:
        """See `Shards.adopt`."""
        self._loop.owner().check()
        end = _take(part, StreamEnd)
        if tls is not None:
            factory = self._tls.server(factory, tls)
        end.belong(self._loop.owner(), copy_context(), on_gone)
        end.resume_reading()
        end.begin(factory())
        return end


class SimPart:
    """Something on its way: the end of a channel, or a connection that nobody serves yet."""

    def __init__(self, thing: "SimChannel | StreamEnd") -> None:
        self.thing: SimChannel | StreamEnd | None = thing

    def take(self) -> "SimChannel | StreamEnd":
        """Return what it is, which belongs to the caller now."""
        thing, self.thing = self.thing, None
        if thing is None:
            raise InvalidArgument("part", self, "it was used, sent or closed before")
        return thing

    def belong(self, owner: Owner) -> None:
        """Let it belong to another process."""
        if isinstance(self.thing, SimChannel):
            self.thing.belong(owner)
        elif self.thing is not None:
            self.thing.belong(owner, None, None)

    def close(self) -> None:
        """See `Part.close`."""
        thing, self.thing = self.thing, None
        if isinstance(thing, SimChannel):
            thing.close()
        elif thing is not None:
            thing.abort()


class _Accepted(asyncio.Protocol):
    """Stands in for the protocol of an accepted connection until it is known who serves it."""

    def __init__(self, on_accept: Callable[[Part], None]) -> None:
        self._on_accept = on_accept

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hand the connection out, unread."""
        assert isinstance(transport, StreamEnd)
        transport.pause_reading()
        self._on_accept(SimPart(transport))


class _End:
    """One end of a pair in memory: belongs to a process, and is told when the other's process closes it or dies."""

    def __init__(self, loop: SimLoop, chance: random.Random) -> None:
        self._loop = loop
        self._chance = chance
        self._owner: Owner = loop.owner()
        self._held = 0
        self._other: _End = self
        self._context: Context | None = None
        self._at_s = 0.0
        self.is_open = True

    def join(self, other: "_End") -> None:
        """Be the two ends of one pair."""
        self._other, other._other = other, self

    def belong(self, owner: Owner) -> None:
        """Let it belong to a process."""
        if self._held:
            self._owner.forget(self._held)
        self._owner = owner
        if not owner.alive:
            self._sever()
        else:
            self._held = owner.hold(self._sever)

    def close(self) -> None:
        """Close it."""
        if self.is_open and self._owner.alive:
            self._owner.forget(self._held)
            self._sever()

    def _sever(self) -> None:
        """The kernel closes it: the other end hears of that after what was sent."""
        if self.is_open:
            self.is_open = False
            self._at_peer(self._other._on_end)

    def _at_peer(self, callback: Callable[..., None], *args: object) -> None:
        """Have something happen at the other end after a delay, in order, while its process lives."""
        self._at_s = max(self._at_s, self._loop.time() + self._chance.uniform(*_DELAY_S))
        other = self._other

        def arrive() -> None:
            if other._owner.alive:
                other._arrive(callback, args)

        self._loop.call_at(self._at_s, arrive, context=other._context or Context())

    def _arrive(self, callback: Callable[..., None], args: tuple[object, ...]) -> None:
        callback(*args)

    def _on_end(self) -> None:
        raise NotImplementedError


class SimChannel(_End):
    """`Channel` in memory."""

    kind = "memory"

    def __init__(self, loop: SimLoop, chance: random.Random) -> None:
        super().__init__(loop, chance)
        self._peer = "shard"
        self._message_bytes_max = 0
        self._out: list[bytes] = []
        self._in_flight = 0
        self._flush_is_due = False
        self._early: list[list[bytes]] = []
        self._has_ended = False
        self._on_messages: Callable[[list[bytes]], None] | None = None
        self._on_closed: Callable[[IsopodError], None] | None = None
        self._n_out = self._bytes_out = self._n_in = self._bytes_in = self._n_flushes = 0

    def open(self, settings: ChannelSettings, peer: str) -> None:
        """Be used by the process that runs."""
        self.belong(self._loop.owner())
        self._peer = peer
        self._message_bytes_max = settings.message_bytes_max

    def start(self, on_messages: Callable[[list[bytes]], None], on_closed: Callable[[IsopodError], None]) -> None:
        """See `Channel.start`."""
        self._on_messages = on_messages
        self._on_closed = on_closed
        self._context = copy_context()
        self._loop.call_soon(self._catch_up)

    def send(self, message: bytes) -> None:
        """See `Channel.send`."""
        self._owner.check()
        if len(message) > self._message_bytes_max:
            raise InvalidArgument("message to", self._peer, f"its {len(message)} bytes are over {self._message_bytes_max}")
        if self.is_open:
            self._out.append(message)
            self._bytes_out += len(message)
            if not self._flush_is_due:
                self._flush_is_due = True
                self._loop.call_soon(self._flush)

    def statistics(self) -> ChannelCounts:
        """See `Channel.statistics`."""
        return ChannelCounts(self._n_out, self._bytes_out, self._n_in, self._bytes_in, len(self._out), self._n_flushes, self._n_flushes)

    def close(self) -> None:
        """See `Channel.close`."""
        if self.is_open and self._owner.alive:
            self._flush()
            super().close()

    def _flush(self) -> None:
        self._flush_is_due = False
        batch: list[bytes] = []
        while self._out and (self._in_flight < IN_FLIGHT_BYTES or not self.is_open):
            batch.append(self._out.pop(0))
            self._in_flight += len(batch[-1])
        if batch and self.is_open and self._owner.alive:
            self._n_flushes += 1
            self._n_out += len(batch)
            other = self._other
            assert isinstance(other, SimChannel)
            self._at_peer(other._take, batch)

    def _take(self, batch: list[bytes]) -> None:
        if self._on_messages is None:
            self._early.append(batch)
            return
        if not self.is_open:
            return
        n_bytes = sum(map(len, batch))
        self._n_in += len(batch)
        self._bytes_in += n_bytes
        self._at_peer(self._other._credit, n_bytes)  # type: ignore[attr-defined]
        self._on_messages(batch)

    def _credit(self, n_bytes: int) -> None:
        self._in_flight -= n_bytes
        if self._out and self.is_open:
            self._flush()

    def _catch_up(self) -> None:
        early, self._early = self._early, []
        for batch in early:
            self._take(batch)
        if self._has_ended:
            self._on_end()

    def _on_end(self) -> None:
        self._has_ended = True
        if self._on_closed is not None and self.is_open:
            self.is_open = False
            self._owner.forget(self._held)
            self._on_closed(Disconnected(self._peer))


class _Line(_End):
    """`Link` in memory."""

    def __init__(self, loop: SimLoop, chance: random.Random, log: list[bytes]) -> None:
        super().__init__(loop, chance)
        self._log = log
        self._early: list[tuple[bytes, list[SimPart]]] = []
        self._has_ended = False
        self._on_message: Callable[[bytes, Sequence[Part]], None] | None = None
        self._on_closed: Callable[[], None] | None = None

    def start(self, on_message: Callable[[bytes, Sequence[Part]], None], on_closed: Callable[[], None]) -> None:
        """See `Link.start`."""
        self._on_message = on_message
        self._on_closed = on_closed
        self._context = copy_context()
        self._loop.call_soon(self._catch_up)

    def send(self, message: bytes, parts: Sequence[Part] = ()) -> None:
        """See `Link.send`."""
        self._owner.check()
        ours = [part for part in parts if isinstance(part, SimPart)]
        moved = [SimPart(part.take()) for part in ours]
        for part in moved:
            if self.is_open and self._other.is_open:
                part.belong(self._other._owner)
            else:
                part.close()
        if self.is_open:
            self._at_peer(self._other._take, message, moved)  # type: ignore[attr-defined]

    def write_log(self, line: bytes) -> None:
        """See `Link.write_log`."""
        self._owner.check()
        self._log.append(line)

    def _take(self, message: bytes, parts: list[SimPart]) -> None:
        if self._on_message is None:
            self._early.append((message, parts))
        elif self.is_open:
            self._on_message(message, parts)
        else:
            for part in parts:
                part.close()

    def _catch_up(self) -> None:
        early, self._early = self._early, []
        for message, parts in early:
            self._take(message, parts)
        if self._has_ended:
            self._on_end()

    def _on_end(self) -> None:
        self._has_ended = True
        if self._on_closed is not None and self.is_open:
            self.is_open = False
            self._owner.forget(self._held)
            self._on_closed()


class _SimShard:
    """`ShardProcess` of the simulation."""

    def __init__(self, table: ProcessTable, process: SimProcess, link: _Line) -> None:
        self._table = table
        self._process = process
        self._link = link

    @property
    def identity(self) -> ProcessIdentity:
        return self._process.identity

    @property
    def link(self) -> Link:
        return self._link

    async def wait(self) -> int:
        return await self._process.wait()

    async def end(self) -> None:
        self._link.close()
        self._table.signal(self._process, SIGKILL)
        await self._process.wait()


def _take(part: Part, kind: type[T]) -> T:
    if not isinstance(part, SimPart) or not isinstance(part.thing, kind):
        raise InvalidArgument("part", part, "it was used, sent or closed before, or is something else")
    found: T = part.thing
    part.thing = None
    return found


def _check_port(shards: SimShards) -> ShardsPort:
    """Let the type checker compare with the port."""
    return shards
