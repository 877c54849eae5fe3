"""HTTP: a server with routes, a client with connections it uses again, and WebSockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from isopod.net.http import Handler, HttpLimits, HttpServer, Request, Response
from isopod.net.http.client import HttpClient
from isopod.net.http.router import Router
from isopod.net.http.websocket import WebSocket, connect_websocket, websocket_route
from isopod.runtime.metrics import Registry
from isopod.world.errors import DeadlineExceeded, Disconnected
from isopod.world.network import TcpAddress
from isopod.world.world import World
from tests.parity.kit import LOOPBACK, keeping, until

pytestmark = pytest.mark.row("S35")


@asynccontextmanager
async def serving(world: World, handler: Handler, limits: HttpLimits | None = None) -> AsyncIterator[tuple[HttpServer, HttpClient, str]]:
    """A server, a client, and the server's URL."""
    server = HttpServer(world, handler, logger=keeping(world), metrics=Registry(), limits=limits or HttpLimits())
    listener = await server.listen(LOOPBACK)
    assert isinstance(listener.address, TcpAddress)
    client = HttpClient(world)
    try:
        yield server, client, f"http://127.0.0.1:{listener.address.port}"
    finally:
        await client.close()
        await server.close()


async def test_routes_find_their_handlers(world: World) -> None:
    router = Router()
    router.get("/users/:id", lambda request: Response.json({"id": request.params["id"]}))

    async with serving(world, router) as (_, client, url):
        answer = await client.get(f"{url}/users/7?verbose=1")
        assert (answer.status, await answer.json()) == (200, {"id": "7"})
        assert (await client.get(f"{url}/elsewhere")).status == 404
        answer = await client.post(f"{url}/users/7", b"")
        assert (answer.status, answer.headers.get("allow")) == (405, "GET, HEAD, OPTIONS")


async def test_a_connection_is_used_again(world: World) -> None:
    async with serving(world, lambda _: Response.text("hello")) as (server, client, url):
        for _ in range(5):
            assert await (await client.get(url)).read() == b"hello"
        assert server.statistics().n_accepted == 1


async def test_bodies_stream_both_ways(world: World) -> None:
    async def shout(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            async for piece in request.stream():
                yield piece.upper()

        return Response(200, (), pieces())

    async def words() -> AsyncIterator[bytes]:
        for word in (b"one ", b"two ", b"three"):
            yield word

    async with serving(world, shout) as (_, client, url):
        assert await (await client.post(url, words())).read() == b"ONE TWO THREE"


async def test_a_body_that_is_too_large_is_refused(world: World) -> None:
    async def read(request: Request) -> Response:
        return Response.text(str(len(await request.read())))

    async with serving(world, read, HttpLimits(body_bytes_max=100)) as (_, client, url):
        assert (await client.post(url, b"x" * 100)).status == 200
        assert (await client.post(url, b"x" * 101)).status == 413


async def test_a_handler_that_fails_is_answered_and_the_next_one_is_served(world: World) -> None:
    def fail(request: Request) -> Response:
        if request.path == "/bug":
            raise ZeroDivisionError("a secret")
        return Response.text("well")

    async with serving(world, fail) as (_, client, url):
        answer = await client.get(f"{url}/bug")
        assert (answer.status, b"secret" in await answer.read()) == (500, False)
        assert await (await client.get(url)).read() == b"well"


async def test_a_request_has_one_deadline(world: World) -> None:
    async def slow(_: Request) -> Response:
        await asyncio.sleep(3600)
        return Response()

    async with serving(world, slow) as (_, client, url):
        with pytest.raises(DeadlineExceeded):
            await client.get(url, timeout_s=0.05)


async def test_a_drain_lets_requests_finish(world: World) -> None:
    entered = asyncio.Event()

    async def slow(_: Request) -> Response:
        entered.set()
        await asyncio.sleep(0.03)
        return Response.text("finished")

    async with serving(world, slow) as (server, client, url):
        asking = asyncio.create_task(client.get(url))
        await entered.wait()
        await server.drain(5)
        assert await (await asking).read() == b"finished"
        assert server.statistics().n_connections == 0


async def test_websockets_talk_and_are_closed_with_a_reason(world: World) -> None:
    async def upper(ws: WebSocket) -> None:
        async for message in ws:
            await ws.send(message.upper())

    route = websocket_route(upper)
    async with serving(world, route) as (server, _, url):
        ws = await connect_websocket(world, url.replace("http", "ws"))
        await ws.send("text")
        assert await ws.receive() == "TEXT"
        await ws.send(b"bytes")
        assert await ws.receive() == b"BYTES"
        draining = asyncio.create_task(server.drain(5))
        with pytest.raises(Disconnected):
            await ws.receive()
        await draining
        assert ws.close_code == 1001
        await until(lambda: not route.connection_count)
