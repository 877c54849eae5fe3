"""What the client tests share: a server whose requests are read by h11 and whose answers a test writes byte by byte."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import h11

from isopod.net.http.client import HttpClient
from isopod.runtime.waiters import Waiters
from isopod.world.network import Address, ServerTls, TcpAddress, UnixAddress
from isopod.world.world import World

WAIT_S = 20.0


class Seen(NamedTuple):
    """One whole request."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    number: int
    """Of the connection it came on, from 1."""

    def header(self, name: str) -> str | None:
        """Return the first field of that name."""
        return next((value for key, value in self.headers if key == name), None)


class Peer(asyncio.Protocol):
    """The server's end of one connection."""

    def __init__(self, stage: "Stage", number: int) -> None:
        self.stage = stage
        self.number = number
        self.transport: asyncio.Transport | None = None
        self.parser = h11.Connection(h11.SERVER)
        self.request: h11.Request | None = None
        self.body = b""
        self.raw = b""
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.stage.peers.append(self)
        self.stage.on_connect(self)
        self.stage.changed.wake()

    def data_received(self, data: bytes) -> None:
        self.raw += data
        self.stage.changed.wake()
        if self.stage.reads_raw:
            return
        self.parser.receive_data(data)
        while True:
            event = self.parser.next_event()
            if isinstance(event, h11.Request):
                self.request, self.body = event, b""
                self.stage.on_head(self, self._seen())
            elif isinstance(event, h11.Data):
                self.body += bytes(event.data)
                self.stage.changed.wake()
            elif isinstance(event, h11.EndOfMessage):
                seen = self._seen()
                self.stage.seen.append(seen)
                self.stage.changed.wake()
                self._next_cycle()
                self.stage.script(self, seen)
            else:
                return

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.stage.changed.wake()

    def write(self, *parts: bytes) -> None:
        """Send bytes as they are."""
        assert self.transport is not None
        self.transport.write(b"".join(parts))

    def answer(self, status: int = 200, body: bytes = b"", *fields: str) -> None:
        """Send a sound answer."""
        self.write(answer(status, body, *fields))

    def close(self) -> None:
        """Hang up."""
        assert self.transport is not None
        self.transport.close()

    def _seen(self) -> Seen:
        assert self.request is not None
        headers = [(name.decode(), value.decode("latin-1")) for name, value in self.request.headers]
        return Seen(self.request.method.decode(), self.request.target.decode(), headers, self.body, self.number)

    def _next_cycle(self) -> None:
        """Let h11 believe that the answer was sent: what really is sent is the test's business."""
        if self.parser.our_state is h11.SEND_RESPONSE:
            self.parser.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            self.parser.send(h11.EndOfMessage())
        if self.parser.our_state is h11.DONE:
            self.parser.start_next_cycle()


def answer(status: int = 200, body: bytes = b"", *fields: str) -> bytes:
    """Return a sound answer with its length."""
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status} Said", *fields, f"Content-Length: {len(body)}"))
    return f"{head}\r\n".encode("latin-1") + body


Script = Callable[[Peer, Seen], None]


@dataclass
class Stage:
    """A running scripted server."""

    script: Script
    address: Address = field(default_factory=lambda: TcpAddress("127.0.0.1", 0))
    scheme: str = "http"
    reads_raw: bool = False
    peers: list[Peer] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    changed: Waiters = field(default_factory=Waiters)
    on_connect: Callable[[Peer], None] = lambda _: None
    on_head: Script = lambda _, __: None

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        """Return the URL of a path."""
        assert isinstance(self.address, TcpAddress)
        return f"{self.scheme}://{host}:{self.address.port}{path}"

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for something that connections and requests bring about."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await self.changed.wait()


@asynccontextmanager
async def scripted(
    world: World, script: Script, address: Address | None = None, *, tls: ServerTls | None = None, **options: Any
) -> AsyncIterator[Stage]:
    """Serve a script."""
    stage = Stage(script, scheme="http" if tls is None else "https", **options)
    listener = await world.network.listen(address or stage.address, lambda: Peer(stage, len(stage.peers) + 1), tls=tls)
    stage.address = listener.address
    try:
        yield stage
    finally:
        await listener.close()
        for peer in stage.peers:
            if peer.transport is not None:
                peer.transport.abort()
        await stage.wait(lambda: all(peer.is_lost for peer in stage.peers))


@asynccontextmanager
async def open_client(world: World, **options: Any) -> AsyncIterator[HttpClient]:
    """Open a client and close it."""
    client = HttpClient(world, **options)
    try:
        yield client
    finally:
        async with asyncio.timeout(WAIT_S):
            await client.close()
        assert client.statistics()[-3:] == (0, 0, 0)


def unix(folder: str) -> UnixAddress:
    """Return the address of a socket in a folder."""
    return UnixAddress(f"{folder}/http.sock")


def hello(peer: Peer, seen: Seen) -> None:
    """Say what was asked."""
    peer.answer(200, f"{seen.method} {seen.target} {seen.body.decode()}".strip().encode())


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    """Yield parts, one by one."""
    for part in parts:
        await asyncio.sleep(0)
        yield part
