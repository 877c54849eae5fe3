"""The server around its connections: upgrades, the way down, statistics and metrics, TLS, curl as a peer."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from functools import partial
from typing import cast

import pytest

from isopod.net.http import HttpLimits, HttpServer, Request, Response, Upgrade
from isopod.net.http.client import HttpClient
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import WrongState
from isopod.world.network import ClientTls, ServerTls, TcpAddress, UnixAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.certificates import client_material, server_material
from tests.net.http.kit import GET, Peer, ask, hello, parse, peer_of, serving, talk

pytestmark = pytest.mark.row("S13")

SWITCH = b"GET /raw HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"


class Shout(asyncio.Protocol):
    """What the connection is handed to."""

    def __init__(self, transport: asyncio.Transport, leftover: bytes) -> None:
        self.transport = transport
        self.is_lost = False
        if leftover:
            self.data_received(leftover)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data.upper())

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True


# -- upgrades ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_later", [False, True])
async def test_a_connection_can_be_handed_over(world: World, folder: str, is_later: bool) -> None:
    def handler(request: Request) -> Upgrade:
        return Upgrade("tcp", Shout, (("x-stream", "raw"),))

    async def later(request: Request) -> Upgrade:
        await asyncio.sleep(0.001)
        return handler(request)

    async with serving(world, later if is_later else handler, folder) as site:
        async with peer_of(site, SWITCH + b"early ") as peer:
            await peer.until(lambda data: data.endswith(b"EARLY "))
            peer.send(b"and late")
            data = await peer.until(lambda data: data.endswith(b"LATE"))
            assert site.server.statistics().n_connections == 1
        head, _, rest = data.partition(b"\r\n\r\n")
        async with asyncio.timeout(40):
            while site.server.statistics().n_connections:
                await asyncio.sleep(0.005)
        assert site.server.statistics().n_upgrades == 1

    assert head.startswith(b"HTTP/1.1 101 ") and b"\r\nupgrade: tcp" in head and b"\r\nconnection: upgrade" in head and b"x-stream" in head
    assert rest == b"EARLY AND LATE"


async def test_an_upgrade_nobody_takes_is_an_ordinary_request(world: World, folder: str) -> None:
    async with serving(world, hello, folder) as site:
        answer = await talk(site, SWITCH + SWITCH + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))

    assert [got.body for got in parse(answer, ("GET",) * 3)] == [b"hello"] * 3


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nUpgrade: tcp\r\n\r\n",
        b"GET / HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n",
    ],
)
async def test_who_did_not_ask_is_not_switched(world: World, folder: str, data: bytes) -> None:
    async with serving(world, lambda _: Upgrade("tcp", Shout), folder) as site:
        assert parse(await talk(site, data))[0].status == 426


async def test_a_takeover_that_fails_costs_the_connection(world: World, folder: str) -> None:
    def fail(transport: asyncio.Transport, leftover: bytes) -> asyncio.Protocol:
        raise ValueError("no")

    async with serving(world, lambda _: Upgrade("tcp", fail), folder) as site:
        await talk(site, SWITCH)
        assert len(site.events("http.handler_failed")) == 1


# -- the way down --------------------------------------------------------------------------------------------------------------------


async def test_draining_closes_idle_connections_and_lets_busy_ones_finish(world: World, folder: str) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def handler(request: Request) -> Response:
        if request.path == "/slow":
            began.set()
            await go.wait()
        return Response.text("done")

    async with serving(world, handler, folder) as site, peer_of(site, GET) as idle, peer_of(site) as busy:
        await idle.until_count(b"done", 1)
        busy.send(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        await began.wait()
        draining = asyncio.create_task(site.server.drain(10))
        await idle.until_end()
        assert not busy.is_ended
        with pytest.raises((ConnectionError, FileNotFoundError)):
            await talk(site, GET)
        go.set()
        data = await busy.until_end()
        await draining
        with pytest.raises(WrongState):
            await site.server.listen(UnixAddress(f"{folder}/other"))

    assert parse(data)[0].headers["connection"] == "close"


async def test_draining_tells_upgraded_connections_and_waits_for_them(world: World, folder: str) -> None:
    told: list[str] = []

    def handler(request: Request) -> Upgrade:
        def take_over(transport: asyncio.Transport, leftover: bytes) -> asyncio.Protocol:
            def leave() -> None:
                told.append("leave")
                transport.write(b"bye")
                transport.close()

            upgrade.on_drain = leave
            return Shout(transport, leftover)

        upgrade = Upgrade("tcp", take_over)
        return upgrade

    async with serving(world, handler, folder) as site, peer_of(site, SWITCH) as peer:
        await peer.until_count(b"\r\n\r\n", 1)
        await site.server.drain(10)
        assert (await peer.until_end()).endswith(b"bye")

    assert told == ["leave"]


async def test_what_does_not_go_in_time_is_cut(sim_world: SimWorld, folder: str) -> None:
    world, cancelled = sim_world.world, asyncio.Event()

    async def handler(request: Request) -> Response | Upgrade:
        if request.path == "/raw":
            return Upgrade("tcp", Shout)
        try:
            await asyncio.sleep(1000)
        finally:
            cancelled.set()
        return Response.text("never")

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"tick"
            await asyncio.sleep(0.1)

    def choose(request: Request) -> object:
        return Response(200, (), endless()) if request.path == "/stream" else handler(request)

    stream = b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n"
    async with serving(world, choose, folder) as site, peer_of(site, GET), peer_of(site, SWITCH), peer_of(site, stream) as peer:  # type: ignore[arg-type]
        await peer.until_count(b"tick", 1)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await site.server.drain(3)
        took_s = loop.time() - began

        assert site.server.statistics().n_connections == 0
    assert 3 <= took_s < 4 and cancelled.is_set()


async def test_a_server_that_never_listened_goes_down_too(host_world: World) -> None:
    server = HttpServer(host_world, hello, logger=Logger(lambda _: None, host_world.clock), metrics=Registry())
    await server.drain(1)
    await server.close()
    await server.close()


# -- counts --------------------------------------------------------------------------------------------------------------------------


async def test_statistics_and_metrics_agree(sim_world: SimWorld, folder: str) -> None:
    def handler(request: Request) -> Response:
        return Response.text("x", int(request.path[1:]))

    async with serving(sim_world.world, handler, folder) as site:
        for status in (200, 201, 302, 404, 500, 503):
            await ask(site, target=f"/{status}")
        await talk(site, b"nonsense\r\n\r\n")
        await asyncio.sleep(2)
        found = site.listener.statistics()
        text = site.metrics.render()

    label = f'listener="unix:{folder}/http"'
    assert found.responses == {"1xx": 0, "2xx": 2, "3xx": 1, "4xx": 2, "5xx": 2}
    assert (found.n_accepted, found.n_refused, found.n_connections) == (7, 1, 0)
    assert found.n_bytes_received > 300 and found.n_bytes_sent > 700
    for name, n in (("2xx", 2), ("3xx", 1), ("4xx", 2), ("5xx", 2)):
        line = next(
            line for line in text.splitlines() if line.startswith("isopod_http_responses_total{") and label in line and name in line
        )
        assert float(line.split()[-1]) == n
    count = next(line for line in text.splitlines() if line.startswith("isopod_http_request_duration_seconds_count"))
    assert float(count.split()[-1]) == 6


# -- TLS -----------------------------------------------------------------------------------------------------------------------------


async def test_https(world: World) -> None:
    async def handler(request: Request) -> Response:
        return Response.text(f"{request.scheme} {len(await request.read())} " + "y" * 500_000)

    server = HttpServer(world, handler, logger=Logger(lambda _: None, world.clock), metrics=Registry(), limits=HttpLimits(linger_s=20))
    listener = await server.listen(TcpAddress("127.0.0.1", 0), tls=ServerTls(server_material()))
    tls = ClientTls(client_material(), server_name="localhost")
    answers: list[bytes] = []
    for data in (
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000,
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + b"x" * 100_000,
    ):
        _, peer = await world.network.connect(listener.address, Peer, tls=tls)
        assert isinstance(peer, Peer)
        peer.send(data)
        answers.append(await peer.until_end())
        peer.close()
    await server.close()

    assert parse(answers[0])[0].body == b"https 300000 " + b"y" * 500_000
    assert parse(answers[1])[0].status == 400


# -- other peers ---------------------------------------------------------------------------------------------------------------------


async def _curl(*arguments: str) -> bytes:
    path = shutil.which("curl")
    assert path is not None
    process = await asyncio.create_subprocess_exec(
        path, "--silent", "--show-error", "--max-time", "20", *arguments, stdout=asyncio.subprocess.PIPE, env={"PATH": os.environ["PATH"]}
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.mark.host
async def test_curl_is_served(host_world: World, folder: str) -> None:
    async def handler(request: Request) -> Response:
        body = await request.read(n_bytes_max=16 << 20)
        return Response.text(f"{request.method} {request.path} {len(body)} {request.headers.get('transfer-encoding')}")

    with open(f"{folder}/upload", "wb") as file:
        file.write(b"u" * 3_000_000)
    async with serving(host_world, handler, folder) as site:
        url = "http://localhost"
        two = await _curl("--unix-socket", f"{folder}/http", f"{url}/a", f"{url}/b%20c")
        sent = await _curl("--unix-socket", f"{folder}/http", "--data-binary", f"@{folder}/upload", f"{url}/up")
        pieces = await _curl(
            "--unix-socket", f"{folder}/http", "-T", f"{folder}/upload", "-H", "Transfer-Encoding: chunked", "-H", "Expect:", f"{url}/up"
        )
        newer = await _curl("--unix-socket", f"{folder}/http", "--http2", f"{url}/h2c")
        head = await _curl("--unix-socket", f"{folder}/http", "--head", f"{url}/")

        assert site.server.statistics().n_accepted == 5
    assert two == b"GET /a 0 NoneGET /b c 0 None"
    assert (sent, pieces) == (b"POST /up 3000000 None", b"PUT /up 3000000 chunked")
    assert newer == b"GET /h2c 0 None" and head.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.host
async def test_curl_is_served_over_tcp(host_world: World) -> None:
    server = HttpServer(host_world, hello, logger=Logger(lambda _: None, host_world.clock), metrics=Registry())
    listener = await server.listen(TcpAddress("127.0.0.1", 0))
    address = cast("TcpAddress", listener.address)
    try:
        assert await _curl(f"http://127.0.0.1:{address.port}/") == b"hello"
    finally:
        await server.close()


async def test_a_426_names_the_protocol_and_nothing_else_may(world: World, folder: str) -> None:
    async with serving(world, lambda _: Upgrade("tcp", Shout), folder) as site:
        plain = await talk(site, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert plain.startswith(b"HTTP/1.1 426 ") and b"\r\nconnection: upgrade\r\nupgrade: tcp\r\n" in plain

    for status, fields in ((200, (("upgrade", "h2c"),)), (426, (("Upgrade", "a\r\nX-Bad: 1"),))):
        answer = partial(Response, status, fields)
        async with serving(world, lambda _: answer(), folder) as site:  # noqa: B023 - served within the turn
            refused = await talk(site, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert refused.startswith(b"HTTP/1.1 500 ") and b"upgrade:" not in refused.lower() and b"X-Bad" not in refused


async def test_a_snapshot_sees_every_request_that_was_answered(world: World, folder: str) -> None:
    registry = Registry()
    server = HttpServer(world, lambda _: Response.text("x"), logger=Logger(lambda _: None, world.clock), metrics=registry)
    await server.listen(UnixAddress(f"{folder}/http.sock"))
    client = HttpClient(world)
    for n_answered in (1, 2, 3):
        await (await client.request("GET", "http://x/", address=UnixAddress(f"{folder}/http.sock"))).read()
        snapshot = registry.snapshot()
        assert snapshot.value("isopod_http_responses_total") == n_answered
        assert snapshot.value("isopod_http_request_duration_seconds") == n_answered
    await client.close()
    await server.close()
    registry.snapshot()
