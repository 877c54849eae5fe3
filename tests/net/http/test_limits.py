"""Bounds and time-outs: slow and dead peers, slow handlers, too many connections. Mostly in virtual time."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from isopod.net.http import HttpLimits, Request, Response, Upgrade
from isopod.net.http.core import Core, Tally
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import InvalidArgument
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.http.kit import GET, Peer, ask, echo, hello, parse, peer_of, serving, talk

pytestmark = pytest.mark.row("S13")

LONG_S = 1000.0
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"


async def _trickle(peer: Peer, data: bytes, every_s: float) -> None:
    for n in range(len(data)):
        if peer.is_ended:
            return
        peer.send(data[n : n + 1])
        await asyncio.sleep(every_s)


async def _until_end(peer: Peer) -> tuple[bytes, float]:
    loop = asyncio.get_running_loop()
    began = loop.time()
    return await peer.until_end(LONG_S), loop.time() - began


async def test_a_peer_that_says_nothing_is_left(sim_world: SimWorld, folder: str) -> None:
    async with serving(sim_world.world, hello, folder) as site, peer_of(site) as peer:
        data, took_s = await _until_end(peer)

    assert data == b"" and 10 <= took_s < 11


async def test_a_head_that_trickles_in_is_a_408(sim_world: SimWorld, folder: str) -> None:
    async with serving(sim_world.world, hello, folder) as site, peer_of(site) as peer:
        task = asyncio.create_task(_trickle(peer, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 1000, 0.5))
        data, took_s = await _until_end(peer)
        await task

    assert parse(data)[0].status == 408 and 10 <= took_s < 12.5


async def test_an_idle_connection_is_closed_without_a_word(sim_world: SimWorld, folder: str) -> None:
    async with serving(sim_world.world, hello, folder) as site, peer_of(site, GET) as peer:
        await peer.until_count(b"hello", 1)
        n_bytes = len(peer.data)
        data, took_s = await _until_end(peer)

        assert site.server.statistics().n_refused == 0
    assert len(data) == n_bytes and 60 <= took_s < 61


async def test_a_request_in_time_keeps_the_connection(sim_world: SimWorld, folder: str) -> None:
    async with serving(sim_world.world, hello, folder) as site, peer_of(site) as peer:
        for n in range(1, 6):
            peer.send(GET)
            await peer.until_count(b"hello", n)
            await asyncio.sleep(50)
        assert not peer.is_ended


@pytest.mark.parametrize("framing", [b"Content-Length: 100000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nffff\r\n"])
async def test_a_body_that_trickles_in_is_a_408(sim_world: SimWorld, folder: str, framing: bytes) -> None:
    async with serving(sim_world.world, echo, folder) as site, peer_of(site, POST + framing) as peer:
        task = asyncio.create_task(_trickle(peer, b"y" * 1000, 0.1))
        data, took_s = await _until_end(peer)
        await task

    assert parse(data)[0].status == 408 and 10 <= took_s < 13


async def test_a_body_that_comes_fast_enough_is_taken(sim_world: SimWorld, folder: str) -> None:
    async with serving(sim_world.world, echo, folder) as site, peer_of(site, POST + b"Content-Length: 20000\r\n\r\n") as peer:
        for _ in range(20):
            peer.send(b"y" * 1000)
            await asyncio.sleep(3)
        assert parse(await peer.until(lambda data: data.count(b"y") == 20_000))[0].status == 200


async def test_a_handler_that_rests_is_no_fault_of_the_peer(sim_world: SimWorld, folder: str) -> None:
    async def handler(request: Request) -> Response:
        await asyncio.sleep(100)
        return Response.text(str(len(await request.read())))

    body = b"y" * 1_000_000
    async with serving(sim_world.world, handler, folder) as site:
        got = parse(await talk(site, POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body, LONG_S))

    assert got[0].body == b"1000000"


async def test_a_handler_has_a_deadline(sim_world: SimWorld, folder: str) -> None:
    async def handler(request: Request) -> Response:
        await asyncio.Event().wait()
        return Response.text("never")

    async with serving(sim_world.world, handler, folder, HttpLimits(handler_s=20)) as site, peer_of(site, GET) as peer:
        data, took_s = await _until_end(peer)

    assert parse(data)[0].status == 504 and 20 <= took_s < 21


async def test_a_handler_that_will_not_stop_costs_its_connection(sim_world: SimWorld, folder: str) -> None:
    async def handler(request: Request) -> Response:
        for _ in range(3):
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                continue
        return Response.text("late")

    async with serving(sim_world.world, handler, folder, HttpLimits(handler_s=20)) as site, peer_of(site, GET) as peer:
        data, took_s = await _until_end(peer)
        await asyncio.sleep(100)

    assert data == b"" and 22 <= took_s < 23


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_peer_that_does_not_read_is_cut_off(sim_world: SimWorld, folder: str, is_stream: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"y" * 100_000

    def handler(request: Request) -> Response:
        return Response(200, (), pieces() if is_stream else b"y" * 10_000_000)

    async with serving(sim_world.world, handler, folder) as site, peer_of(site, GET) as peer:
        assert peer.transport is not None
        peer.transport.pause_reading()
        await asyncio.sleep(28)
        assert site.server.statistics().n_connections == 1
        await asyncio.sleep(5)

        assert site.server.statistics().n_connections == 0
        assert site.server.statistics().n_refused == 1
        assert len(site.events("http.stalled")) == 1


async def test_a_peer_that_reads_slowly_but_steadily_gets_all(sim_world: SimWorld, folder: str) -> None:
    async with serving(sim_world.world, lambda _: Response(200, (), b"y" * 3_000_000), folder) as site, peer_of(site, GET) as peer:
        assert peer.transport is not None
        for _ in range(15):
            peer.transport.pause_reading()
            await asyncio.sleep(20)
            peer.transport.resume_reading()
            await asyncio.sleep(0.0001)
        await asyncio.sleep(1)
        n_bytes = peer.data.count(b"y")

    assert n_bytes == 3_000_000


async def test_one_connection_too_many_is_a_503(world: World, folder: str) -> None:
    async with serving(world, hello, folder, HttpLimits(connections_max=2, linger_s=20)) as site:
        async with peer_of(site, GET) as first, peer_of(site, GET) as second:
            await first.until_count(b"hello", 1)
            await second.until_count(b"hello", 1)
            refused = parse(await talk(site, GET))
            assert site.server.statistics().n_rejected == 1
        while site.server.statistics().n_connections:
            await asyncio.sleep(0.005)
        assert (await ask(site)).status == 200

    assert (refused[0].status, refused[0].headers["retry-after"], refused[0].is_whole) == (503, "1", True)
    assert b"too many connections" in refused[0].body


class _Looked(asyncio.Transport):
    """The transport of an upgraded connection; counts the looks."""

    def __init__(self) -> None:
        super().__init__()
        self.n_looks = 0
        self.is_over = False

    def is_closing(self) -> bool:
        self.n_looks += 1
        return self.is_over


async def test_a_full_server_does_not_look_at_its_upgraded_connections_for_each_of_a_flood(sim_world: SimWorld) -> None:
    logger = Logger(lambda _: None, sim_world.world.clock)
    core = Core(sim_world.world, hello, logger=logger, limits=HttpLimits(connections_max=1), group=None)
    transport = _Looked()
    core.upgraded[0] = (transport, Upgrade("tcp", lambda *_: asyncio.Protocol()), Tally(Registry(), "test"))
    for _ in range(100):
        assert core.is_full
    assert transport.n_looks == 1
    transport.is_over = True
    await asyncio.sleep(0.1)
    assert not core.is_full
    core.wheel.close()


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_over_the_bound_is_a_413_that_the_peer_can_read(world: World, folder: str, framing: str) -> None:
    body = b"y" * 300_000
    if framing == "length":
        data = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    else:
        data = POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    async with serving(world, echo, folder, HttpLimits(body_bytes_max=1000)) as site, peer_of(site, data) as peer:
        got = parse(await peer.until(lambda data: b"}" in data))

    assert got[0].status == 413
    assert msgspec.json.decode(got[0].body)["code"] == "content_too_large"


async def test_a_handler_may_take_more_than_the_bound(world: World, folder: str) -> None:
    async def handler(request: Request) -> Response:
        return Response.text(str(len(await request.read(n_bytes_max=1 << 20))))

    async with serving(world, handler, folder, HttpLimits(body_bytes_max=1000)) as site:
        assert (await ask(site, "POST", body=b"y" * 100_000)).body == b"100000"


async def test_an_endless_body_that_nobody_wants_ends_the_connection(world: World, folder: str) -> None:
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    async with serving(world, hello, folder, HttpLimits(linger_s=0.2)) as site, peer_of(site, head) as peer:
        await peer.until_count(b"hello", 1)
        for _ in range(1000):
            if peer.is_ended:
                break
            peer.send(b"8000\r\n" + b"y" * 0x8000 + b"\r\n")
            await asyncio.sleep(0.001)
        assert peer.is_ended


def test_limits_are_above_zero() -> None:
    with pytest.raises(InvalidArgument):
        HttpLimits(idle_s=0)
