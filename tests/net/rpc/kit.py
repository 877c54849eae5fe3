"""What the RPC tests share: a small contract, a server for it, and a peer that speaks in raw frames."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, cast

import msgspec

from isopod.net.rpc import Call, Client, RpcLimits, Server, connect
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.scheduling import current_group
from isopod.runtime.waiters import Waiters
from isopod.wire import frames as f
from isopod.wire.decoder import StreamDecoder
from isopod.wire.service import Method
from isopod.world.errors import Disconnected, IsopodError, NotFound
from isopod.world.network import UnixAddress
from isopod.world.world import World


class Text(msgspec.Struct, frozen=True):
    """A request, a reply or an item."""

    text: str = ""
    number: int = 0


class Line(msgspec.Struct, frozen=True, tag="line", tag_field="type"):
    """An item."""

    data: bytes


class Mark(msgspec.Struct, frozen=True, tag="mark", tag_field="type"):
    """Another item of the same stream."""

    number: int


ECHO: Final = Method("test.echo", Text, Text)
FAIL: Final = Method("test.fail", Text, Text)
BUG: Final = Method("test.bug", Text, Text)
HANG: Final = Method("test.hang", Text, Text)
STUBBORN: Final = Method("test.stubborn", Text, Text)
MULE: Final = Method("test.mule", Text, Text)
BIG: Final = Method("test.big", Text, Text)
COUNT: Final = Method("test.count", Text, Text, receives=Line | Mark)
SUM: Final = Method("test.sum", Text, Text, sends=Line | Mark)
CHAT: Final = Method("test.chat", Text, Text, sends=Line | Mark, receives=Line | Mark)
BABBLER: Final = Method("test.babbler", Text, Text, receives=Line | Mark)
DEAF: Final = Method("test.deaf", Text, Text, sends=Line | Mark)
PLAIN: Final = Method("test.plain", Text, Text)
EITHER: Final = Method("test.either", Text, Text)
NOTE: Final = Method("test.note", Text, Text)
BLOB: Final = Method("test.blob", bytes, bytes, idempotent=True)
PIPE: Final = Method("test.pipe", Text, Text, sends=bytes, receives=bytes)
FLAKY: Final = Method("test.flaky", Text, Text, idempotent=True)
FRAGILE: Final = Method("test.fragile", Text, Text)
WHO: Final = Method("test.who", Text, Text)

METHODS: Final = (
    ECHO, FAIL, BUG, HANG, STUBBORN, MULE, BIG, COUNT, SUM, CHAT, DEAF, BABBLER, PLAIN, EITHER, NOTE, BLOB, PIPE, FLAKY, FRAGILE, WHO
)  # fmt: skip

WAIT_S: Final = 20.0


@dataclass
class Service:
    """The test contract's handlers, and what happened in them."""

    events: list[str] = field(default_factory=list)
    changed: Waiters = field(default_factory=Waiters)
    n_sent: int = 0
    n_failures: int = 0
    """How many calls of `flaky` and `fragile` fail from now on."""
    failure: Callable[[], IsopodError] = field(default=lambda: Disconnected("flaky", "as asked"))
    groups: list[str] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, event: str) -> None:
        """Remember that something happened."""
        self.events.append(event)
        self.changed.wake()

    async def wait_event(self, event: str) -> None:
        """Wait until it happened."""
        async with asyncio.timeout(WAIT_S):
            while event not in self.events:
                await self.changed.wait()

    async def echo(self, call: Call[Any, Any], request: Text) -> Text:
        return request

    async def fail(self, call: Call[Any, Any], request: Text) -> Text:
        raise NotFound("container", request.text, "look with `isopod ps`")

    async def bug(self, call: Call[Any, Any], request: Text) -> Text:
        raise ZeroDivisionError("the secret of the handler")

    async def hang(self, call: Call[Any, Any], request: Text) -> Text:
        self.note(f"hang begins {request.text}")
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.note(f"hang ends {request.text}")
        return request

    async def stubborn(self, call: Call[Any, Any], request: Text) -> Text:
        """Take cancellation for a wish, and answer late."""
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.note("stubborn heard")
            await asyncio.sleep(0.05)
        self.note("stubborn ends")
        return Text("late")

    async def babbler(self, call: Call[Any, Line | Mark], request: Text) -> Text:
        """Go on sending, cancelled or not, until told otherwise."""
        number = 0
        try:
            while True:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.001)
                await call.send(Mark(number))
                number += 1
        except IsopodError as error:
            self.note(f"babbler was told {type(error).__name__}")
            raise

    async def mule(self, call: Call[Any, Any], request: Text) -> Text:
        """Do not be cancelled."""
        self.note("mule begins")
        while not self.release.is_set():
            with suppress(asyncio.CancelledError):
                await self.release.wait()
        return Text("at last")

    async def big(self, call: Call[Any, Any], request: Text) -> Text:
        return Text("x" * request.number)

    async def count(self, call: Call[Any, Line | Mark], request: Text) -> Text:
        """Stream `number` marks, or lines of len(text) bytes."""
        for number in range(request.number):
            await call.send(Line(request.text.encode()) if request.text else Mark(number))
            self.n_sent += 1
        self.note("count ends")
        return Text("done", request.number)

    async def sum(self, call: Call[Line | Mark, Any], request: Text) -> Text:
        total = n_bytes = 0
        async for item in call:
            if isinstance(item, Mark):
                total += item.number
            else:
                n_bytes += len(item.data)
        return Text(str(n_bytes), total)

    async def chat(self, call: Call[Line | Mark, Line | Mark], request: Text) -> Text:
        n_items = 0
        async for item in call:
            await call.send(item)
            n_items += 1
        call.end()
        return Text("bye", n_items)

    def plain(self, call: Call[Any, Any], request: Text) -> Text:
        """A function that is no coroutine; fails as asked."""
        self.note(f"plain {request.text}")
        if request.text == "refuse":
            raise NotFound("container", request.text)
        if request.text == "bug":
            raise ZeroDivisionError("the secret of the function")
        if request.text == "cancelled":
            raise asyncio.CancelledError
        return request

    def either(self, call: Call[Any, Any], request: Text) -> Text | Awaitable[Text]:
        """Answer at once, or later."""
        return request if request.number == 0 else self._later(request)

    async def _later(self, request: Text) -> Text:
        await asyncio.sleep(request.number / 1000)
        return request

    def note_(self, call: Call[Any, Any], request: Text) -> Text:
        self.note(f"noted {request.text} {call.id < 0}")
        return request

    async def blob(self, call: Call[Any, Any], request: bytes) -> bytes:
        assert type(request) is bytes
        return request[::-1]

    async def pipe(self, call: Call[bytes, bytes], request: Text) -> Text:
        n_bytes = 0
        async for piece in call:
            assert type(piece) is bytes
            n_bytes += len(piece)
            await call.send(piece)
        return Text("piped", n_bytes)

    async def flaky(self, call: Call[Any, Any], request: Text) -> Text:
        self.note("flaky")
        if self.n_failures:
            self.n_failures -= 1
            raise self.failure()
        return request

    async def fragile(self, call: Call[Any, Any], request: Text) -> Text:
        return await self.flaky(call, request)

    async def who(self, call: Call[Any, Any], request: Text) -> Text:
        """Say who called, and in which group this runs."""
        self.groups.append(current_group().name)
        return Text("" if call.identity is None else call.identity.common_name)

    async def deaf(self, call: Call[Any, Any], request: Text) -> Text:
        """Never take an item."""
        return await self.hang(call, Text("deaf"))


@dataclass
class Stage:
    """A running server and where it is."""

    world: World
    server: Server
    service: Service
    address: UnixAddress
    metrics: Registry
    lines: list[bytes]

    async def connect(self, **options: Any) -> Client:
        """Open a client."""
        return await connect(self.world, self.address, peer="test-client", **options)

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log's lines of one event."""
        found: list[dict[str, Any]] = [msgspec.json.decode(line) for line in self.lines]
        return [line for line in found if line["event"] == event]

    def value(self, name: str, **labels: str) -> float:
        """Return a metric's value."""
        return next(s.value for s in self.metrics.statistics() if s.name == name and dict(s.labels) == labels)

    async def wait_calls_open(self, number: int) -> None:
        """Wait until so many calls are being served."""
        await wait_until(lambda: self.value("isopod_rpc_calls_open") == number)


@asynccontextmanager
async def serve(
    world: World,
    folder: str,
    limits: RpcLimits = RpcLimits(),  # noqa: B008
    **options: Any,
) -> AsyncIterator[Stage]:
    """Run the test service on a socket in `folder`."""
    lines: list[bytes] = []
    service = Service()
    metrics = Registry()
    handlers: list[tuple[Method[Any, Any], Any]] = [
        (method, service.note_ if method is NOTE else getattr(service, method.name.removeprefix("test."))) for method in METHODS
    ]
    logger = Logger(lines.append, world.clock, level="debug")
    server = Server(world, handlers, logger=logger, metrics=metrics, limits=limits, peer="test-server", **options)
    address = UnixAddress(f"{folder}/rpc.sock")
    await server.listen(address)
    try:
        yield Stage(world, server, service, address, metrics, lines)
    finally:
        async with asyncio.timeout(WAIT_S):
            await server.close()


class RawPeer(asyncio.Protocol):
    """A client that says whatever a test wants, and keeps what it hears."""

    def __init__(self) -> None:
        self.decoder = StreamDecoder()
        self.frames: list[f.Frame] = []
        self.n_received = 0
        self.is_lost = False
        self.changed = Waiters()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.n_received += len(data)
        self.frames += [frame for frame, _ in self.decoder.feed(data)]
        self.changed.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.changed.wake()

    def write(self, *parts: bytes | f.OutFrame) -> None:
        """Send bytes and frames as they are."""
        assert self.transport is not None
        self.transport.write(b"".join(part if isinstance(part, bytes) else f.encode_frame(part) for part in parts))

    async def wait_frames(self, number: int) -> list[f.Frame]:
        """Wait for so many frames in all."""
        await self.wait(lambda: len(self.frames) >= number)
        return self.frames

    async def wait_lost(self) -> None:
        """Wait for the end of the connection."""
        await self.wait(lambda: self.is_lost)

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for something that received bytes bring about."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                assert not self.is_lost, f"connection lost after {self.frames}"
                await self.changed.wait()

    def close(self) -> None:
        """End the connection."""
        if self.transport is not None:
            self.transport.abort()


HELLO: Final = f.encode_hello(f.Hello((1, 1), "raw"))


@asynccontextmanager
async def raw_peer(stage: Stage, *first: bytes | f.OutFrame) -> AsyncIterator[RawPeer]:
    """Connect a raw peer that says `first` at once."""
    peer = RawPeer()
    await stage.world.network.connect(stage.address, lambda: peer)
    peer.write(*first)
    try:
        yield peer
    finally:
        peer.close()
        await peer.wait_lost()


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that changes without telling, looking every millisecond of the loop's time."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.001)
