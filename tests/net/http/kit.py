"""What the HTTP server's tests share: a server on either World, and a peer that speaks in raw bytes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import h11
import msgspec

from isopod.net.http import Handler, HttpLimits, HttpListener, HttpServer
from isopod.net.http.messages import Request, Response
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.waiters import Waiters
from isopod.world.network import Address, UnixAddress
from isopod.world.world import World

WAIT_S: Final = 20.0
HOST: Final = b"Host: test\r\n"
GET: Final = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"


@dataclass
class Site:
    """A running server."""

    world: World
    server: HttpServer
    listener: HttpListener
    metrics: Registry
    lines: list[bytes] = field(default_factory=list)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self.listener.address

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log lines of one event."""
        found = [msgspec.json.decode(line) for line in self.lines]
        return [line for line in found if line["event"] == name]


@asynccontextmanager
async def serving(world: World, handler: Handler, folder: str, limits: HttpLimits | None = None, **options: Any) -> AsyncIterator[Site]:
    """Serve on a Unix socket in `folder`; everything is closed at the end, and nothing may be left over."""
    lines: list[bytes] = []
    metrics = Registry()
    logger = Logger(lines.append, world.clock, level="debug")
    server = HttpServer(world, handler, logger=logger, metrics=metrics, limits=limits or HttpLimits(), **options)
    listener = await server.listen(UnixAddress(f"{folder}/http"))
    try:
        yield Site(world, server, listener, metrics, lines)
    finally:
        await server.close()
    assert server.statistics().n_connections == 0


class Peer(asyncio.Protocol):
    """A client of raw bytes."""

    def __init__(self) -> None:
        self.data = b""
        self.is_ended = False
        self.transport: asyncio.Transport | None = None
        self._waiters = Waiters()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self.data += data
        self._waiters.wake()

    def eof_received(self) -> bool:
        """See `asyncio.Protocol`."""
        self.is_ended = True
        self._waiters.wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self.is_ended = True
        self._waiters.wake()

    def send(self, data: bytes) -> None:
        """Write."""
        assert self.transport is not None
        self.transport.write(data)

    def close(self) -> None:
        """Hang up."""
        assert self.transport is not None
        self.transport.abort()

    async def until(self, condition: Callable[[bytes], object]) -> bytes:
        """Wait until what was received so far fits; fail if the server hung up before."""
        async with asyncio.timeout(WAIT_S):
            while not condition(self.data):
                assert not self.is_ended, self.data
                await self._waiters.wait()
        return self.data

    async def until_count(self, what: bytes, n: int) -> bytes:
        """Wait until `what` was received `n` times."""
        return await self.until(lambda data: data.count(what) >= n)

    async def until_end(self, within_s: float = WAIT_S) -> bytes:
        """Wait until the server hung up, return all it said."""
        async with asyncio.timeout(within_s):
            while not self.is_ended:
                await self._waiters.wait()
        return self.data


@asynccontextmanager
async def peer_of(site: Site, data: bytes = b"") -> AsyncIterator[Peer]:
    """Connect, send, and hang up in the end."""
    _, peer = await site.world.network.connect(site.address, Peer)
    assert isinstance(peer, Peer)
    try:
        if data:
            peer.send(data)
        yield peer
    finally:
        peer.close()


async def talk(site: Site, data: bytes, within_s: float = WAIT_S) -> bytes:
    """Send bytes, the last request of which ends the connection; return all that was answered."""
    async with peer_of(site, data) as peer:
        return await peer.until_end(within_s)


@dataclass
class Got:
    """A response as h11 understood it."""

    status: int
    headers: dict[str, str]
    body: bytes
    all_headers: list[tuple[str, str]]
    is_whole: bool = True


def parse(data: bytes, methods: tuple[str, ...] = ("GET",)) -> list[Got]:
    """Return the responses to requests of those methods, read by h11: an independent peer."""
    client = h11.Connection(h11.CLIENT)
    client.receive_data(data)
    client.receive_data(b"")
    found: list[Got] = []
    for method in methods:
        client.send(h11.Request(method=method, target="/", headers=[("host", "test")]))
        client.send(h11.EndOfMessage())
        got: Got | None = None
        while True:
            try:
                event = client.next_event()
            except h11.RemoteProtocolError:
                assert got is not None
                got.is_whole = False
                return found
            if isinstance(event, h11.Response):
                pairs = [(name.decode(), value.decode("latin-1")) for name, value in event.headers]
                got = Got(event.status_code, dict(pairs), b"", pairs)
                found.append(got)
            elif isinstance(event, h11.Data):
                assert got is not None
                got.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            elif not isinstance(event, h11.InformationalResponse):
                return found
        if client.our_state is h11.MUST_CLOSE or client.their_state is not h11.DONE:
            return found
        client.start_next_cycle()
    return found


async def ask(site: Site, method: str = "GET", target: str = "/", headers: str = "", body: bytes = b"") -> Got:
    """Send one request on a connection of its own, return its response."""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    head = f"{method} {target} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{length}{headers}\r\n"
    data = await talk(site, head.encode("latin-1") + body)
    (got,) = parse(data, (method,))
    return got


def hello(request: Request) -> Response:
    """The least handler."""
    return Response.text("hello")


async def echo(request: Request) -> Response:
    """Return the body."""
    return Response(200, (), await request.read())
