"""What the HTTP client makes of an answer's framing: sound, broken, cut short, and poisoned."""

import asyncio
from typing import Any

import pytest

from isopod.world.errors import (
    Disconnected,
    ProtocolViolation,
)
from isopod.world.world import World
from tests.net.http.client_kit import Peer, Seen, open_client, scripted

pytestmark = pytest.mark.row("S13")


# --- framing ----------------------------------------------------------------------------------------------------------------------------

SOUND: list[tuple[str, bytes, bytes, bool]] = [
    ("chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=1\r\nde\r\n0\r\nTrailer: x\r\n\r\n", b"abcde", True),
    ("until the end", b"HTTP/1.1 200 OK\r\n\r\nabc", b"abc", False),
    ("HTTP/1.0", b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc", False),
    ("HTTP/1.0 kept", b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc", b"abc", True),
    ("close", b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc", b"abc", False),
    ("no content", b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    ("not modified", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\n\r\n", b"", True),
    ("after early hints", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", b"a", True),
    ("an unasked 100", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", b"a", True),
    ("no reason", b"HTTP/1.1 200 \r\nContent-Length: 1\r\n\r\na", b"a", True),
    ("more than asked", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\naHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison", b"a", False),
    ("garbage behind", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nagarbage", b"a", False),
]  # fmt: skip


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(("data", "body", "is_kept"), [case[1:] for case in SOUND], ids=[case[0] for case in SOUND])
async def test_sound_answers(sim_world: Any, data: bytes, body: bytes, is_kept: bool, step: int) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        if seen.target == "/again":
            peer.answer(200, b"again")
            return
        for part in [data] if not step else [data[i : i + 1] for i in range(len(data))]:
            peer.write(part)
        if b"Content-Length" not in data and b"chunked" not in data and b"204" not in data:
            peer.close()

    world = sim_world.world
    async with scripted(world, script) as stage, open_client(world) as client:
        got = await client.get(stage.url())
        assert await got.read() == body
        assert got.headers.get("trailer") is None
        await asyncio.sleep(0.01)
        assert await (await client.get(stage.url("/again"))).read() == b"again"
        assert len(stage.peers) == (1 if is_kept else 2)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BROKEN: list[tuple[str, bytes, str]] = [
    ("not HTTP", b"220 smtp.example ESMTP\r\n", "not HTTP"),
    ("TLS instead", b"\x15\x03\x01\x00\x02\x02\x46", "not HTTP"),
    ("HTTP/2", b"HTTP/2.0 200 OK\r\n\r\n", "answers in HTTP/2"),
    ("status of two digits", b"HTTP/1.1 20 OK\r\n\r\n", "not HTTP"),
    ("two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na", "not HTTP"),
    ("length and chunked", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "not HTTP|two lengths"),
    ("chunked and length", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n", "not HTTP|two lengths"),
    ("a negative length", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "not HTTP"),
    ("a length with a sign", b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\na", "not HTTP"),
    ("an enormous length", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\na", "not HTTP"),
    ("gzip and chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "was not asked for"),
    ("chunked twice", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", "not asked for|not HTTP"),
    ("identity", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nabc", "was not asked for"),
    ("chunked in HTTP/1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "chunked in HTTP/1.0|not HTTP"),
    ("a chunk size that is none", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "not HTTP"),
    ("a chunk longer than it says", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n", "not HTTP"),
    ("a folded header", b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n", "not HTTP"),
    ("a space before the colon", b"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n", "not HTTP"),
    ("bare line feeds", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", "not HTTP"),
    ("a NUL in a header", b"HTTP/1.1 200 OK\r\nA: b\0c\r\n\r\n", "not HTTP"),
    ("an unasked switch", b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", "switched protocols"),
    ("an unasked switch without fields", b"HTTP/1.1 101 Switching\r\n\r\n", "switched protocols"),
    ("endless headers", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000, "more than (256 header|65536 bytes)"),
    ("one endless header", b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000, "more than 65536 bytes"),
    ("an endless status line", b"HTTP/1.1 200 " + b"O" * 100_000, "more than 65536 bytes"),
    ("endless interim answers", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 3000, "more than 65536 bytes"),
    ("endless trailers", CHUNKED + b"1\r\na\r\n0\r\n" + b"A: b\r\n" * 60_000, "more than 65536 bytes"),
    ("an endless chunk extension", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 100_000, "more than 65536 bytes"),
]  # fmt: skip


@pytest.mark.parametrize("step", [0, 700])
@pytest.mark.parametrize(("data", "why"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
async def test_broken_answers(sim_world: Any, data: bytes, why: str, step: int) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        for start in range(0, len(data), step or len(data)):
            peer.write(data[start : start + (step or len(data))])

    world = sim_world.world
    async with scripted(world, script) as stage, open_client(world) as client:
        with pytest.raises(ProtocolViolation, match=why):
            await (await client.get(stage.url())).read()
        await stage.wait(lambda: stage.peers[0].is_lost)
        assert client.statistics().n_open == 0


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "before it answered"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "before it answered"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "in the middle of the answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "in the middle of the answer"),
    ],
)
async def test_answers_cut_short(world: World, data: bytes, why: str) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        peer.write(data)
        peer.close()

    async with scripted(world, script) as stage, open_client(world) as client:
        with pytest.raises(Disconnected, match=why):
            await (await client.get(stage.url())).read()


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
async def test_head_has_no_body_whatever_it_says(world: World, data: bytes) -> None:
    async with scripted(world, lambda peer, _: peer.write(data)) as stage, open_client(world) as client:
        for _ in range(2):
            got = await client.request("HEAD", stage.url())
            assert await got.read() == b""
        assert len(stage.peers) == 1


async def test_head_with_a_body_is_not_taken_for_the_next_answer(world: World) -> None:
    async with scripted(world, lambda peer, _: peer.answer(200, b"poison")) as stage, open_client(world) as client:
        for _ in range(2):
            assert (await client.request("HEAD", stage.url())).status == 200
        assert len(stage.peers) == 2
