"""The HTTP client against independent servers (Python's own, as a process), our own server, TLS, names, and noise."""

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.net.http.client import ClientLimits, HttpClient
from isopod.net.http.messages import Request, Response
from isopod.net.http.server import HttpServer
from isopod.net.http.websocket import connect_websocket, websocket_route
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import DeadlineExceeded, Disconnected, HandshakeFailed, IsopodError, NotFound, PeerError, ProtocolViolation
from isopod.world.network import ClientTls, ServerTls, TcpAddress
from isopod.world.sim import make_sim_world
from isopod.world.world import World
from tests.net.certificates import client_leaf, client_material, server_material
from tests.net.http.client_kit import Peer, Seen, hello, open_client, scripted, unix
from tests.net.http.test_client_framing import BROKEN, SOUND
from tests.net.http.websocket.kit import echo, serve

pytestmark = pytest.mark.row("S13")


# --- TLS and names ----------------------------------------------------------------------------------------------------------------------


async def test_tls_is_verified(world: World) -> None:
    tls = ClientTls(client_material())
    async with scripted(world, hello, tls=ServerTls(server_material())) as stage, open_client(world, tls=tls) as client:
        for _ in range(2):
            assert await (await client.get(stage.url("/secret"))).read() == b"GET /secret"
        assert len(stage.peers) == 1
        async with open_client(world) as wary:  # trusts only the machine's roots
            with pytest.raises(HandshakeFailed):
                await wary.get(stage.url())
        other = ClientTls(client_material(), server_name="other.example")
        async with open_client(world, tls=other) as wary:
            with pytest.raises(HandshakeFailed):
                await wary.get(stage.url())


async def test_tls_with_a_client_certificate(world: World) -> None:
    server = ServerTls(server_material(client_auth="required"))
    async with scripted(world, hello, tls=server) as stage:
        async with open_client(world, tls=ClientTls(client_material(client_leaf()))) as client:
            assert (await client.get(stage.url())).status == 200
        async with open_client(world, tls=ClientTls(client_material())) as client:
            with pytest.raises((HandshakeFailed, Disconnected)):
                await client.get(stage.url())


async def test_plain_text_where_tls_is_spoken_and_the_other_way(world: World) -> None:
    async with (
        scripted(world, hello) as plain,
        scripted(world, hello, tls=ServerTls(server_material())) as secure,
        open_client(world, tls=ClientTls(client_material())) as client,
    ):
        plain.reads_raw = True
        plain.on_connect = lambda peer: peer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(HandshakeFailed):
            await client.get(plain.url().replace("http:", "https:"))
        with pytest.raises((Disconnected, ProtocolViolation)):
            await client.get(secure.url().replace("https:", "http:"), timeout_s=5.0)


async def test_tls_over_a_unix_socket_proves_the_urls_name(world: World, folder: str) -> None:
    tls, trusting = ServerTls(server_material("localhost")), ClientTls(client_material())
    async with scripted(world, hello, unix(folder), tls=tls), open_client(world, tls=trusting) as client:
        assert (await client.request("GET", "https://localhost/", address=unix(folder))).status == 200
        with pytest.raises(HandshakeFailed):
            await client.request("GET", "https://elsewhere.example/", address=unix(folder))


async def test_websocket_over_tls(world: World) -> None:
    async with serve(world, {"/": websocket_route(echo)}, tls=ServerTls(server_material())) as stage:
        ws = await stage.connect(tls=ClientTls(client_material()))
        for message in ("a", b"x" * 300_000):
            await ws.send(message)
            assert await ws.receive() == message
        await ws.close()
        assert ws.close_code == 1000
        with pytest.raises(HandshakeFailed):
            await connect_websocket(world, stage.url())


class Names:
    """A resolver with a table."""

    def __init__(self, **table: list[str]) -> None:
        self.table = table

    async def resolve(self, host: str) -> list[str]:
        if host not in self.table:
            raise NotFound("host name", host)
        return self.table[host]


async def test_a_resolver_finds_hosts_and_the_next_address_helps(world: World) -> None:
    names = Names(two=["127.0.0.9", "127.0.0.1"], none=[], localhost=["127.0.0.1"])
    tls = ClientTls(client_material())
    async with scripted(world, hello) as stage, open_client(world, resolver=names, tls=tls) as client:
        assert (await client.get(stage.url(host="two"))).status == 200
        assert stage.seen[0].header("host") == stage.url(host="two")[7:-1]
        with pytest.raises(NotFound, match="nowhere"):
            await client.get(stage.url(host="nowhere"))
        with pytest.raises(Disconnected, match="no address"):
            await client.get(stage.url(host="none"))
        async with scripted(world, hello, tls=ServerTls(server_material("localhost"))) as secure:
            assert (await client.get(secure.url(host="localhost"))).status == 200
            with pytest.raises(HandshakeFailed):
                await client.get(secure.url(host="two"))


# --- servers of others ------------------------------------------------------------------------------------------------------------------


@pytest.mark.host
async def test_pythons_http_server(host_world: World, folder: str) -> None:
    data = os.urandom(2_000_000)
    with open(f"{folder}/data.bin", "wb") as file:
        file.write(data)
    os.mkdir(f"{folder}/sub")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", folder, "0",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port = int((await process.stdout.readline()).split(b"port ")[1].split()[0])
        base = f"http://127.0.0.1:{port}"
        async with open_client(host_world) as client:
            got = await client.get(f"{base}/data.bin")
            assert (got.status, got.version, got.headers["content-length"]) == (200, "1.0", "2000000")
            digest = hashlib.sha256()
            async for piece in got.stream():
                digest.update(piece)
            assert digest.digest() == hashlib.sha256(data).digest()
            assert (await client.request("HEAD", f"{base}/data.bin")).headers["content-length"] == "2000000"
            assert (await client.get(f"{base}/nothing")).status == 404
            moved = await client.get(f"{base}/sub")
            assert (moved.status, moved.n_redirects, moved.url.target) == (200, 1, "/sub/")
            assert (await client.post(base, b"x")).status == 501
    finally:
        process.kill()
        await process.communicate()


async def test_our_own_server(world: World) -> None:
    async def handle(request: Request) -> Response:
        if request.path == "/whole":
            return Response(200, body=await request.read())
        if request.path == "/echo":

            async def back() -> AsyncIterator[bytes]:
                async for piece in request.stream():
                    yield piece

            return Response(200, body=back())
        return Response.redirect("/echo", 307)

    async def upload() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"0123456789" * 1000

    lines: list[bytes] = []
    server = HttpServer(world, handle, logger=Logger(lines.append, world.clock), metrics=Registry())
    listener = await server.listen(TcpAddress("127.0.0.1", 0))
    assert isinstance(listener.address, TcpAddress)
    base = f"http://127.0.0.1:{listener.address.port}"
    async with open_client(world) as client:
        got = await client.post(f"{base}/echo", upload())
        assert await got.read() == b"0123456789" * 50_000
        assert await (await client.post(f"{base}/there", b"kept")).read() == b"kept"
        assert await (await client.request("POST", f"{base}/whole", body=b"held", expects_continue=True)).read() == b"held"
        await server.drain(5.0)
        with pytest.raises(Disconnected):
            await client.get(base)
    await server.close()
    assert lines == []


# --- noise ------------------------------------------------------------------------------------------------------------------------------

_GOOD = [case[1] for case in SOUND]
_BAD = [case[1][:2000] for case in BROKEN]


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.binary(max_size=200), st.sampled_from(_GOOD + _BAD)),
    st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=3)), max_size=3),
    st.integers(1, 100),
    st.sampled_from(["GET", "HEAD", "UPGRADE"]),
)
def test_whatever_comes_the_outcome_is_typed(data: bytes, edits: list[tuple[int, bytes]], step: int, method: str) -> None:
    for place, patch in edits:
        data = data[:place] + patch + data[place + len(patch) :]

    def script(peer: Peer, seen: Seen) -> None:
        for start in range(0, len(data), step):
            peer.write(data[start : start + step])
        peer.close()

    async def body(world: World) -> None:
        async with scripted(world, script) as stage, open_client(world, limits=ClientLimits(total_s=5.0)) as client:
            try:
                if method == "UPGRADE":
                    (await client.upgrade(stage.url(), "x")).transport.abort()
                else:
                    await (await client.request(method, stage.url())).read()
            except IsopodError as error:
                assert not isinstance(error, DeadlineExceeded)
            async with asyncio.timeout(5):
                while client.statistics().n_open:
                    await asyncio.sleep(0.001)

    sim = make_sim_world()
    try:
        sim.loop.run_until_complete(body(sim.world))
    finally:
        sim.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["keep", "close", "drop", "garbage", "slow", "large", "redirect"]), min_size=1, max_size=12), st.integers(1, 4)
)
def test_the_pool_survives_any_mixture_of_endings(endings: list[str], n_connections: int) -> None:
    """Requests at once, each ending in its own way: all end, the bound holds, and no place is lost."""

    def script(peer: Peer, seen: Seen) -> None:
        kind = seen.target[1:]
        assert len([each for each in peer.stage.peers if not each.is_lost]) <= n_connections + 1  # one may be on its way out
        if kind == "drop":
            peer.close()
        elif kind == "garbage":
            peer.write(b"\0\xff garbage\r\n\r\n")
        elif kind == "slow":
            peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")
        elif kind == "redirect":
            peer.answer(302, b"", "Location: /keep")
        else:
            peer.answer(200, b"x" * (400_000 if kind == "large" else 2), *(["Connection: close"] if kind == "close" else []))

    async def one(client: HttpClient, url: str) -> str:
        try:
            async with await client.get(url, timeout_s=2.0) as got:
                if not url.endswith("large"):
                    await got.read()
        except PeerError as error:
            return type(error).__name__
        return "fine"

    async def body(world: World) -> None:
        limits = ClientLimits(connections_max=n_connections)
        wanted: dict[str, Any] = {"drop": "Disconnected", "garbage": "ProtocolViolation", "slow": "DeadlineExceeded"}
        async with scripted(world, script) as stage, open_client(world, limits=limits) as client:
            found = await asyncio.gather(*(one(client, stage.url(f"/{ending}")) for ending in endings))
            for ending, outcome in zip(endings, found, strict=True):
                assert outcome in (wanted.get(ending, "fine"), *(["DeadlineExceeded"] if "slow" in endings else []))
            assert client.statistics().n_open <= n_connections
            assert await one(client, stage.url("/keep")) == "fine"

    sim = make_sim_world()
    try:
        sim.loop.run_until_complete(body(sim.world))
    finally:
        sim.close()
