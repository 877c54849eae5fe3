"""Unmodified Starlette applications, and what ASGI asks of a server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import websockets.asyncio.client as ws_client
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from isopod.net.http import HttpLimits
from isopod.net.http.asgi import AsgiApplication
from isopod.runtime.logger import Logger
from isopod.world.errors import DeadlineExceeded, RuntimeFailed
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.http.kit import GET, Site, ask, peer_of, serving, talk

pytestmark = pytest.mark.row("S13")


@asynccontextmanager
async def running(world: World, app: Any, folder: str, limits: HttpLimits | None = None, **options: Any) -> AsyncIterator[Site]:
    """Serve an application, its lifespan around it."""
    lines: list[bytes] = []
    application = AsgiApplication(app, logger=Logger(lines.append, world.clock), **options)
    await application.start()
    try:
        async with serving(world, application, folder, limits) as site:
            yield site
    finally:
        await application.stop()


def refuse_lifespan(scope: Any) -> None:
    """Raise for the lifespan scope: so an application says that it has no use for it, and a server goes on without (ASGI, Lifespan)."""
    if scope["type"] == "lifespan":
        raise ValueError("no lifespan here")


class Shop:
    """An application as a Starlette user writes it."""

    def __init__(self, static: str = "") -> None:
        self.events: list[str] = []
        self.begun = asyncio.Event()
        self.gone = asyncio.Event()
        routes: list[Any] = [
            Route("/", self.index),
            Route("/items/{name}", self.item, methods=["GET", "PUT"]),
            Route("/stream", self.stream),
            Route("/wait", self.wait),
            Route("/background", self.background),
            Route("/fail", self.fail),
            Route("/half", self.half),
            WebSocketRoute("/ws", self.socket),
            WebSocketRoute("/closed", self.closed),
            WebSocketRoute("/broken", self.broken),
        ]
        if static:
            routes.append(Mount("/static", StaticFiles(directory=static)))
        self.app = Starlette(routes=routes, lifespan=self.lifespan, middleware=[Middleware(GZipMiddleware, minimum_size=5000)])

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[dict[str, str]]:
        self.events.append("up")
        yield {"greeting": "hello"}
        self.events.append("down")

    async def index(self, request: Request) -> Response:
        return PlainTextResponse(f"{request.state.greeting} {request.url.path} {request.query_params.get('q')} {request.method}")

    async def item(self, request: Request) -> Response:
        body = await request.body()
        response = JSONResponse({"name": request.path_params["name"], "n": len(body)}, 201 if request.method == "PUT" else 200)
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    async def stream(self, request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            for n in range(int(request.query_params["n"])):
                yield b"%08d" % n
                await asyncio.sleep(0)

        return StreamingResponse(pieces())

    async def wait(self, request: Request) -> Response:
        self.begun.set()
        while not await request.is_disconnected():
            await asyncio.sleep(0.005)
        self.gone.set()
        return PlainTextResponse("too late")

    async def background(self, request: Request) -> Response:
        async def later() -> None:
            await asyncio.sleep(0.01)
            self.events.append("background done")
            self.gone.set()

        return PlainTextResponse("soon", background=BackgroundTask(later))

    async def fail(self, request: Request) -> Response:
        raise ValueError("secret")

    async def half(self, request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"half"
            raise ValueError("secret")

        return StreamingResponse(pieces())

    async def socket(self, socket: WebSocket) -> None:
        await socket.accept(subprotocol="chat" if "chat" in socket.scope["subprotocols"] else None, headers=[(b"x-from", b"shop")])
        try:
            while True:
                message = await socket.receive()
                if message["type"] == "websocket.disconnect":
                    raise WebSocketDisconnect(message["code"])
                if message.get("text") == "close":
                    await socket.close(4001, "as you wish")
                    return
                if message.get("text") is not None:
                    await socket.send_text(message["text"].upper())
                else:
                    await socket.send_bytes(message["bytes"][::-1])
        except WebSocketDisconnect as error:
            self.events.append(f"disconnect {error.code}")
            self.gone.set()

    async def broken(self, socket: WebSocket) -> None:
        await socket.accept()
        raise ValueError(await socket.receive_text())

    async def closed(self, socket: WebSocket) -> None:
        await socket.close()


async def test_a_starlette_application_runs(world: World, folder: str) -> None:
    shop = Shop()
    async with running(world, shop.app, folder) as site:
        index = await ask(site, target="/?q=%26")
        head = await ask(site, "HEAD", "/")
        item = await ask(site, "PUT", "/items/a%2Db", body=b"x" * 200_000)
        missing = await ask(site, target="/nothing")
        wrong = await ask(site, "DELETE", "/items/a")
        stream = await ask(site, target="/stream?n=2000")
        packed = await ask(site, target="/stream?n=2000", headers="Accept-Encoding: gzip\r\n")

    assert index.body == b"hello / & GET" and head.body == b"" and head.headers["content-length"] == "17"
    assert (item.status, item.body) == (201, b'{"name":"a-b","n":200000}')
    assert [value for name, value in item.all_headers if name == "set-cookie"] == ["a=1; Path=/; SameSite=lax", "b=2; Path=/; SameSite=lax"]
    assert (missing.status, wrong.status) == (404, 405)
    assert stream.body == b"".join(b"%08d" % n for n in range(2000)) and packed.headers["content-encoding"] == "gzip"
    assert shop.events[0] == "up" and shop.events[-1] == "down"


@pytest.mark.host
async def test_starlettes_static_files_run(host_world: World, folder: str) -> None:
    with open(f"{folder}/a.txt", "wb") as file:
        file.write(b"static " * 20_000)
    shop = Shop(folder)
    ended: asyncio.Queue[str] = asyncio.Queue()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await shop.app(scope, receive, send)
        ended.put_nowait(scope["type"])

    async with running(host_world, app, folder) as site:
        whole = await ask(site, target="/static/a.txt")
        part = await ask(site, target="/static/a.txt", headers="Range: bytes=0-5\r\n")
        # After its response Starlette closes the file in a thread; stopping would cancel that.
        assert [await ended.get() for _ in range(2)] == ["http", "http"]
    await asyncio.get_running_loop().shutdown_default_executor()

    assert whole.body == b"static " * 20_000 and (part.status, part.body) == (206, b"static")


async def test_an_application_is_told_that_its_client_went(world: World, folder: str) -> None:
    shop = Shop()
    async with running(world, shop.app, folder, HttpLimits(half_closed_s=0.05)) as site:
        async with peer_of(site, b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n"):
            await shop.begun.wait()
        async with asyncio.timeout(40):
            await shop.gone.wait()


async def test_sending_to_a_client_that_went_is_an_os_error(world: World, folder: str) -> None:
    gone = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        refuse_lifespan(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"tick", "more_body": True})
                await asyncio.sleep(0.001)
        except OSError:
            gone.set()

    async with running(world, app, folder, HttpLimits(half_closed_s=0.05)) as site:
        async with peer_of(site, GET) as peer:
            await peer.until_count(b"tick", 3)
        async with asyncio.timeout(40):
            await gone.wait()


async def test_background_work_goes_on_after_the_response(world: World, folder: str) -> None:
    shop = Shop()
    async with running(world, shop.app, folder) as site:
        got = await ask(site, target="/background")
        async with asyncio.timeout(40):
            await shop.gone.wait()

    assert got.body == b"soon" and "background done" in shop.events


async def test_failures_tell_the_peer_nothing(world: World, folder: str) -> None:
    async with running(world, Shop().app, folder) as site:
        before = await ask(site, target="/fail")
        async with peer_of(site, b"GET /half HTTP/1.1\r\nHost: a\r\n\r\n") as peer:
            half = await peer.until_end()
        again = await ask(site)

    assert before.status == 500 and b"secret" not in before.body
    assert b"half" in half and not half.endswith(b"0\r\n\r\n") and b"secret" not in half and again.status == 200


async def test_a_body_over_the_bound_is_still_a_413(world: World, folder: str) -> None:
    head = b"PUT /items/a HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n"
    limits = HttpLimits(body_bytes_max=1000)
    async with running(world, Shop().app, folder, limits) as site, peer_of(site, head + b"x" * 5000) as peer:
        data = await peer.until_count(b"}", 1)

    assert data.startswith(b"HTTP/1.1 413 ")


# -- bare applications ---------------------------------------------------------------------------------------------------------------


async def test_the_scope(world: World, folder: str) -> None:
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"  # knows no lifespan
        seen.append(scope)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async with running(world, app, folder, root_path="/mnt") as site:
        await ask(site, "POST", "/a%20b?c=%20d", "X-Some: Thing\r\nX-Some: Other\r\n")

    scope = seen[0]
    assert (scope["method"], scope["path"], scope["raw_path"], scope["query_string"]) == ("POST", "/mnt/a b", b"/a%20b", b"c=%20d")
    assert scope["headers"] == [(b"host", b"test"), (b"connection", b"close"), (b"x-some", b"Thing"), (b"x-some", b"Other")]
    assert (scope["root_path"], scope["http_version"], scope["scheme"]) == ("/mnt", "1.1", "http")


@pytest.mark.parametrize("what", ["nothing", "body first", "start twice", "after the end"])
async def test_applications_out_of_turn(sim_world: SimWorld, folder: str, what: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        refuse_lifespan(scope)
        start = {"type": "http.response.start", "status": 200, "headers": []}
        if what == "nothing":
            return
        if what != "body first":
            await send(start)
        if what == "start twice":
            await send(start)
        await send({"type": "http.response.body", "body": b"x"})
        await send({"type": "http.response.body", "body": b"y"})

    async with running(sim_world.world, app, folder) as site:
        got = await ask(site)

    assert got.status == (200 if what == "after the end" else 500)


async def test_receive_after_the_response_says_disconnect(world: World, folder: str) -> None:
    seen: list[str] = []
    done = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        refuse_lifespan(scope)
        while (message := await receive())["more_body"]:
            seen.append(message["type"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"transfer-encoding", b"chunked")]})
        await send({"type": "http.response.body", "body": b"x"})
        seen.append((await receive())["type"])
        done.set()

    async with running(world, app, folder) as site:
        got = await ask(site, "POST", body=b"abc")
        await done.wait()

    assert got.body == b"x" and seen == ["http.request", "http.disconnect"]


@pytest.mark.parametrize(("event", "error"), [("failed", RuntimeFailed), ("silence", DeadlineExceeded)])
async def test_a_start_up_that_fails(sim_world: SimWorld, event: str, error: type[Exception]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if event == "silence":
            await asyncio.Event().wait()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    application = AsgiApplication(app, logger=Logger(lambda _: None, sim_world.world.clock))
    with pytest.raises(error):
        await application.start(timeout_s=5)
    await application.stop()


async def test_stopping_cancels_what_is_left(sim_world: SimWorld, folder: str) -> None:
    cancelled = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        refuse_lifespan(scope)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with running(sim_world.world, app, folder) as site, peer_of(site, GET):
        await asyncio.sleep(1)
    assert cancelled.is_set()


# -- WebSocket -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.row("S14")
async def test_a_starlette_websocket_runs(host_world: World, folder: str) -> None:
    shop = Shop()
    async with running(host_world, shop.app, folder) as site:
        async with ws_client.unix_connect(
            f"{folder}/http", "ws://localhost/ws", subprotocols=["other", "chat"], compression=None
        ) as socket:
            await socket.send("hello")
            await socket.send(b"abc")
            assert [await socket.recv(), await socket.recv()] == ["HELLO", b"cba"]
            assert socket.subprotocol == "chat" and socket.response is not None and socket.response.headers["x-from"] == "shop"
        async with asyncio.timeout(40):
            await shop.gone.wait()
        async with ws_client.unix_connect(f"{folder}/http", "ws://localhost/ws", compression=None) as socket:
            await socket.send("close")
            await socket.wait_closed()
            assert (socket.close_code, socket.close_reason) == (4001, "as you wish")
        async with ws_client.unix_connect(f"{folder}/http", "ws://localhost/broken", compression=None) as socket:
            await socket.send("secret")
            await socket.wait_closed()
            assert (socket.close_code, socket.close_reason) == (1011, "")
        with pytest.raises(Exception, match="403"):
            await ws_client.unix_connect(f"{folder}/http", "ws://localhost/closed")
        assert site.server.statistics().n_upgrades == 3

    assert shop.events == ["up", "disconnect 1000", "down"]


WEBSOCKET = b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
WEBSOCKET += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


class Deaf:
    """An application that accepts a WebSocket, and never looks whether it is still there."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        self.n_begun = 0
        self.ended = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refuse_lifespan(scope)
        self.n_begun += 1
        try:
            await send({"type": "websocket.accept", **self.fields})
            await asyncio.get_running_loop().create_future()
        finally:
            self.ended.set()


@pytest.mark.row("S14")
async def test_a_websocket_that_cannot_be_switched_never_reaches_the_application(sim_world: SimWorld, folder: str) -> None:
    deaf = Deaf()
    async with running(sim_world.world, deaf, folder) as site:
        data = await talk(site, WEBSOCKET + b"Content-Length: 5\r\n\r\n")
    assert data.startswith(b"HTTP/1.1 400 ") and deaf.n_begun == 0


@pytest.mark.row("S14")
@pytest.mark.parametrize("fields", [{}, {"headers": [(b"x-bad", b"a\nb")]}], ids=["hangs up", "cannot be answered"])
async def test_an_application_does_not_outlive_its_websocket_for_ever(sim_world: SimWorld, folder: str, fields: dict[str, Any]) -> None:
    deaf = Deaf(**fields)
    async with running(sim_world.world, deaf, folder, orphan_s=1.0) as site:
        async with peer_of(site, WEBSOCKET + b"\r\n") as peer:
            await peer.until(lambda data: b"\r\n\r\n" in data)
        async with asyncio.timeout(40):
            await deaf.ended.wait()


async def test_a_body_that_is_no_bytes_is_a_bug(sim_world: SimWorld, folder: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        refuse_lifespan(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": 1 << 20})

    async with running(sim_world.world, app, folder) as site:
        assert (await ask(site)).status == 500


async def test_pieces_sent_by_two_tasks_at_once_all_arrive(world: World, folder: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        refuse_lifespan(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        piece = {"type": "http.response.body", "body": b"x", "more_body": True}
        await asyncio.gather(*(send(piece) for _ in range(5)))
        await send({"type": "http.response.body"})

    async with running(world, app, folder) as site:
        assert (await ask(site)).body == b"xxxxx"
