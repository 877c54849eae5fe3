"""What the WebSocket tests share: a server with routes to talk to, and a client that speaks in raw bytes."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from isopod.net.http.messages import Handler, Request, Response
from isopod.net.http.server import HttpServer
from isopod.net.http.websocket import WebSocket, codec, connect_websocket
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.waiters import Waiters
from isopod.world.network import ServerTls, TcpAddress
from isopod.world.world import World

WAIT_S = 20.0


@dataclass
class Stage:
    """A running server and where it is."""

    world: World
    server: HttpServer
    address: TcpAddress
    scheme: str = "ws"

    def url(self, path: str = "/") -> str:
        """Return the URL of a path."""
        return f"{self.scheme}://127.0.0.1:{self.address.port}{path}"

    async def connect(self, path: str = "/", **options: Any) -> WebSocket:
        """Open our own client."""
        return await connect_websocket(self.world, self.url(path), **options)


@asynccontextmanager
async def serve(world: World, routes: Mapping[str, Handler], *, tls: ServerTls | None = None) -> AsyncIterator[Stage]:
    """Serve handlers by path."""

    def handle(request: Request) -> Any:
        handler = routes.get(request.path)
        return handler(request) if handler is not None else Response.error(404)

    lines: list[bytes] = []
    server = HttpServer(world, handle, logger=Logger(lines.append, world.clock), metrics=Registry())
    listener = await server.listen(TcpAddress("127.0.0.1", 0), tls=tls)
    address = listener.address
    assert isinstance(address, TcpAddress)
    try:
        yield Stage(world, server, address, "ws" if tls is None else "wss")
    finally:
        async with asyncio.timeout(WAIT_S):
            await server.close()
    assert lines == []


async def echo(ws: WebSocket) -> None:
    """Say everything back."""
    async for message in ws:
        await ws.send(message)


class EchoHandler:
    """Say everything back, without a task."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_open(self, ws: WebSocket) -> None:
        self.events.append("open")

    def on_message(self, ws: WebSocket, message: str | bytes) -> None:
        ws.send_nowait(message)

    def on_close(self, ws: WebSocket) -> None:
        self.events.append(f"close {ws.close_code}")


@dataclass
class RawPeer(asyncio.Protocol):
    """A client that says whatever a test wants, and decodes what it hears."""

    head: bytes = b""
    events: list[codec.Event] = field(default_factory=list)
    is_lost: bool = False
    saw_eof: bool = False
    answers_close: bool = True
    changed: Waiters = field(default_factory=Waiters)

    def __post_init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.decoder = codec.Decoder(expects_mask=False, message_bytes_max=1 << 24)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if b"\r\n\r\n" not in self.head:
            self.head, end, data = (self.head + data).partition(b"\r\n\r\n")
            self.head += end
        self.events += self.decoder.feed(data)
        self.changed.wake()

    def eof_received(self) -> bool:
        self.saw_eof = True
        self.changed.wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.changed.wake()

    @property
    def status(self) -> int:
        """The status of the server's answer."""
        return int(self.head.split(b" ", 2)[1])

    def write(self, *parts: bytes) -> None:
        """Send bytes as they are."""
        assert self.transport is not None
        self.transport.write(b"".join(parts))

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for something that received bytes bring about."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                assert not self.is_lost, f"connection lost after {self.head!r} {self.events}"
                await self.changed.wait()

    async def wait_events(self, number: int) -> list[codec.Event]:
        """Wait for so many events in all."""
        await self.wait(lambda: len(self.events) >= number)
        return self.events

    async def wait_lost(self) -> None:
        """Wait for the end of the connection."""
        await self.wait(lambda: self.is_lost)

    async def wait_close_code(self) -> int:
        """Wait for a close frame and return its code."""
        await self.wait(lambda: any(isinstance(event, codec.Close) for event in self.events))
        return next(event.code for event in self.events if isinstance(event, codec.Close))


KEY = b"\x01\x02\x03\x04"


def masked(opcode: int, payload: bytes = b"", *, is_last: bool = True) -> bytes:
    """Return a client's frame."""
    return codec.encode_frame(opcode, payload, key=KEY, is_last=is_last)


def handshake(path: str = "/", *lines: str, without: str = "", method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    """Return a client's handshake; `lines` are added, the field `without` left out."""
    fields = [
        "Host: test",
        "Upgrade: websocket",
        "Connection: keep-alive, Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
    ]
    kept = [line for line in fields if not without or not line.lower().startswith(without.lower() + ":")]
    return "\r\n".join([f"{method} {path} {version}", *kept, *lines, "", ""]).encode()


@asynccontextmanager
async def raw_peer(stage: Stage, first: bytes | None = None, *, opens: bool = True) -> AsyncIterator[RawPeer]:
    """Connect a raw peer that says `first` (a sound handshake by default) at once, and wait for the answer."""
    peer = RawPeer()
    await stage.world.network.connect(stage.address, lambda: peer)
    try:
        peer.write(handshake() if first is None else first)
        if opens:
            await peer.wait(lambda: peer.head.endswith(b"\r\n\r\n"))
        yield peer
    finally:
        assert peer.transport is not None
        peer.transport.abort()
        await peer.wait(lambda: peer.is_lost)


def untrusting_context() -> ssl.SSLContext:
    """Return a client's TLS context that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
