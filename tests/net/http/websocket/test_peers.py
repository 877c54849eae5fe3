"""Independent peers on the real network: the `websockets` library as client and server, wsproto, TLS, and a real browser."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import websockets
from websockets.asyncio.client import connect as their_connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as their_serve
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Message, Request, TextMessage
from wsproto.events import Event as TheirEvent

from isopod.net.http.messages import Handler, HttpError, Response
from isopod.net.http.websocket import WebSocket, WebSocketHub, WebSocketLimits, connect_websocket, websocket_route
from isopod.world.errors import Disconnected
from isopod.world.network import TcpAddress
from isopod.world.world import World
from tests.net.http.browser import needs_browser, open_browser
from tests.net.http.websocket.kit import echo, serve

pytestmark = [pytest.mark.row("S14"), pytest.mark.host]

CHAT_PAGE = """<!doctype html><title>chat</title><ul id="lines"></ul><script>
const lines = [];
const socket = new WebSocket(`ws://${location.host}/chat`, ["chat.v1"]);
socket.onmessage = (event) => { lines.push(event.data); };
socket.onclose = (event) => { lines.push(`closed ${event.code} ${event.reason} ${event.wasClean}`); };
const say = (text) => socket.send(text);
</script>"""


# --- websockets -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_their_client_our_server(host_world: World, compression: str | None) -> None:
    route = websocket_route(echo, subprotocols=("v1",), compresses=True)
    async with serve(host_world, {"/": route}) as stage:
        async with their_connect(stage.url(), compression=compression, subprotocols=[websockets.Subprotocol("v1")]) as theirs:
            assert theirs.subprotocol == "v1"
            assert ("Sec-WebSocket-Extensions" in (theirs.response.headers if theirs.response else ())) == (compression is not None)
            for message in ("", "text €", b"", b"\0\xff" * 70_000, "x" * 200_000):
                await theirs.send(message)
                assert await theirs.recv() == message
            await theirs.send(["frag", "men", "ted"])
            assert await theirs.recv() == "fragmented"
            assert await (await theirs.ping()) >= 0
            await theirs.close(3000, "done")
        assert theirs.close_code == 3000


@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_our_client_their_server(host_world: World, compression: str | None) -> None:
    async with _their_server(compression) as url:
        ws = await connect_websocket(host_world, url, subprotocols=("v1",), compresses=compression is not None)
        assert ws.is_compressed == (compression is not None)
        assert ws.subprotocol == "v1"
        for message in ("", "text €", b"", b"\0\xff" * 70_000, "x" * 200_000):
            await ws.send(message)
            assert await ws.receive() == message
        assert await ws.ping() > 0
        await ws.send("close me")
        with pytest.raises(Disconnected, match="4001 as you wish"):
            await ws.receive()
        await ws.wait_gone()


@pytest.mark.parametrize(("size", "text", "code"), [(101, "", 1009), (0, "", 1007), (0, "frame", 1002)])
async def test_their_client_is_told_why(host_world: World, size: int, text: str, code: int) -> None:
    route = websocket_route(echo, limits=WebSocketLimits(message_bytes_max=100))
    async with serve(host_world, {"/": route}) as stage, their_connect(stage.url(), compression=None) as theirs:
        if size:
            await theirs.send("x" * 200_000)
        elif text:
            theirs.transport.write(b"\x83\x80\0\0\0\0")
        else:
            await theirs.send(b"\xff", text=True)
        with pytest.raises(websockets.ConnectionClosed):
            await theirs.recv()
        assert theirs.close_code == code


async def test_their_client_is_told_to_go(host_world: World) -> None:
    async with serve(host_world, {"/": websocket_route(echo)}) as stage, their_connect(stage.url()) as theirs:
        await stage.server.drain(5.0)
        with pytest.raises(websockets.ConnectionClosedOK):
            await theirs.recv()
        assert theirs.close_code == 1001


@asynccontextmanager
async def _their_server(compression: str | None) -> AsyncIterator[str]:
    async def handle(connection: ServerConnection) -> None:
        async for message in connection:
            if message == "close me":
                await connection.close(4001, "as you wish")
            else:
                await connection.send(message)

    async with their_serve(handle, "127.0.0.1", 0, compression=compression, subprotocols=[websockets.Subprotocol("v1")]) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


# --- wsproto ----------------------------------------------------------------------------------------------------------------------------


class _TheirServer(asyncio.Protocol):
    """Echoes text, by wsproto."""

    def __init__(self) -> None:
        self.ws = WSConnection(ConnectionType.SERVER)
        self.transport: asyncio.BaseTransport | None = None
        self.text = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.ws.receive_data(data)
        for event in self.ws.events():
            for answer in self._answers(event):
                self.transport.write(self.ws.send(answer))  # type: ignore[union-attr]
            if isinstance(event, CloseConnection) and self.transport is not None:
                self.transport.close()

    def _answers(self, event: TheirEvent) -> list[TheirEvent]:
        if isinstance(event, Request):
            return [AcceptConnection()]
        if isinstance(event, CloseConnection):
            return [event.response()]
        if isinstance(event, TextMessage):
            self.text += event.data
            if event.message_finished:
                half, rest = self.text[: len(self.text) // 2], self.text[len(self.text) // 2 :]
                self.text = ""
                return [Message(data=half, message_finished=False), Message(data=rest)]
        return []


async def test_our_client_a_server_of_wsproto(host_world: World) -> None:
    listener = await host_world.network.listen(TcpAddress("127.0.0.1", 0), _TheirServer)
    address = listener.address
    assert isinstance(address, TcpAddress)
    ws = await connect_websocket(host_world, f"ws://127.0.0.1:{address.port}/")
    for message in ("a", "hello €" * 1000):
        await ws.send(message)
        assert await ws.receive() == message
    await ws.close(1001)
    assert ws.close_code == 1001
    await listener.close()


# --- a browser --------------------------------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.slow
async def test_a_chat_in_a_real_browser(host_world: World) -> None:
    hub = WebSocketHub()

    async def chat(ws: WebSocket) -> None:
        name = hub.add(ws)
        try:
            async for message in ws:
                hub.broadcast(f"{name} says {message!r}")
        finally:
            hub.discard(name)

    routes: dict[str, Handler] = {
        "/": lambda _: Response.html(CHAT_PAGE),
        "/chat": websocket_route(chat, subprotocols=("chat.v1",), compresses=True),
    }
    async with serve(host_world, routes) as stage, open_browser() as page:
        await page.goto(stage.url().replace("ws:", "http:"))
        await page.wait("socket.readyState === WebSocket.OPEN")
        assert await page.evaluate("socket.protocol") == "chat.v1"
        assert "permessage-deflate" in await page.evaluate("socket.extensions")
        ours = await stage.connect("/chat", subprotocols=("chat.v1",))
        await ours.send("hello browser €")
        await page.wait("lines.length === 1")
        assert await ours.receive() == "2 says 'hello browser €'"
        await page.evaluate("say('hello program'); say('x'.repeat(100000))")
        assert await ours.receive() == "1 says 'hello program'"
        assert await ours.receive() == f"1 says '{'x' * 100000}'"
        await page.wait("lines.length === 3")
        assert await page.evaluate("lines[0]") == "2 says 'hello browser €'"
        assert hub.connection_count == 2
        await ours.close()
        await stage.server.drain(5.0)
        await page.wait("lines.length === 4")
        assert await page.evaluate("lines[3]") == "closed 1001 the server is shutting down true"
        assert page.errors == []


@needs_browser
@pytest.mark.slow
async def test_a_foreign_page_may_not_connect(host_world: World) -> None:
    async with (
        serve(host_world, {"/chat": websocket_route(echo)}) as ours,
        serve(host_world, {"/": lambda _: Response.html("<title>evil</title>")}) as evil,
        open_browser() as page,
    ):
        await page.goto(evil.url().replace("ws:", "http:"))
        script = (
            f"const s = new WebSocket({ours.url('/chat')!r}); s.onopen = () => done('open'); s.onclose = (e) => done(`closed ${{e.code}}`);"
        )
        assert await page.evaluate(f"new Promise((done) => {{ {script} }})") == "closed 1006"
        with pytest.raises(HttpError, match="403"):
            await ours.connect("/chat", headers=[("origin", evil.url())])
