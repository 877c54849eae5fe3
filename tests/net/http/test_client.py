"""The HTTP client's requests and bodies, on both Worlds, against a server whose every byte the test chooses."""

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import zstandard

from isopod.net.http.client import ClientLimits, basic_auth, bearer_auth
from isopod.net.http.url import parse_url
from isopod.world.errors import (
    BadRecord,
    Disconnected,
    Exhausted,
    InvalidArgument,
    ProtocolViolation,
    Unsupported,
    WrongState,
)
from isopod.world.network import TcpAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.http.client_kit import Peer, Seen, hello, open_client, pieces, scripted, unix

pytestmark = pytest.mark.row("S13")


# --- requests ---------------------------------------------------------------------------------------------------------------------------


async def test_a_request_and_its_answer(world: World) -> None:
    async with (
        scripted(world, lambda peer, _: peer.answer(201, b'{"a": 1}', "X-One: 1", "x-one: 2")) as stage,
        open_client(world) as client,
    ):
        got = await client.request("POST", stage.url("/p?q=1"), headers=[("X-Mine", "yes")], body="text €")
        assert (got.status, got.reason, got.version, got.is_success) == (201, "Said", "1.1", True)
        assert got.headers.get_all("X-ONE") == ["1", "2"]
        assert await got.json() == {"a": 1}
        seen = stage.seen[0]
        assert (seen.method, seen.target, seen.body.decode()) == ("POST", "/p?q=1", "text €")
        assert isinstance(stage.address, TcpAddress)
        assert seen.header("host") == f"127.0.0.1:{stage.address.port}"
        assert (seen.header("x-mine"), seen.header("user-agent"), seen.header("content-length")) == ("yes", "isopod", "8")
        assert seen.header("accept-encoding") == "gzip, zstd, deflate"


async def test_the_verbs_and_json(world: World) -> None:
    async with scripted(world, hello) as stage, open_client(world) as client:
        assert await (await client.get(stage.url("/g"))).text() == "GET /g"
        assert await (await client.post(stage.url("/p"), json={"a": [1]})).read() == b'POST /p {"a":[1]}'
        assert await (await client.put(stage.url("/p"), b"x")).read() == b"PUT /p x"
        assert await (await client.delete(stage.url("/d"))).read() == b"DELETE /d"
        assert stage.seen[1].header("content-type") == "application/json"
        with pytest.raises(BadRecord, match="not the JSON"):
            await (await client.get(stage.url())).json()
        assert len(stage.peers) == 1


class Shape(msgspec.Struct):
    a: int


async def test_json_of_a_type(world: World) -> None:
    async with scripted(world, lambda peer, _: peer.answer(200, b'{"a": 1}')) as stage, open_client(world) as client:
        assert (await (await client.get(stage.url())).json(Shape)).a == 1
        with pytest.raises(BadRecord, match="Expected `str`"):
            await (await client.get(stage.url())).json(dict[str, str])


async def test_a_unix_socket(world: World, folder: str) -> None:
    async with scripted(world, hello, unix(folder)), open_client(world) as client:
        got = await client.request("GET", "http://docker/v1/info", address=unix(folder))
        assert await got.read() == b"GET /v1/info"


async def test_nobody_is_there(world: World) -> None:
    async with open_client(world) as client:
        with pytest.raises(Disconnected, match="cannot connect"):
            await client.get("http://127.0.0.1:1/")
        assert client.statistics().n_failed == 1


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://a/", "must begin with"),
        ("//a/", "must begin with"),
        ("http://", "no host"),
        ("http://a b/", "spaces"),
        ("http://a/\r\nx: y", "control"),
        ("http://a:0/", "port 0"),
        ("http://a:99999/", "Port out of range"),
        ("http://a:x/", "Port could not"),
        ("http://u:p@a/", "credentials"),
        ("http://[::1/", "Invalid IPv6"),
        ("http://a\\b/", "not a name"),
        ("http://a/" + "x" * 20_000, "longer than"),
    ],
)
async def test_urls_that_are_refused(sim_world: Any, url: str, why: str) -> None:
    async with open_client(sim_world.world) as client:
        with pytest.raises(InvalidArgument, match=why):
            await client.get(url)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"method": "GE T"}, "not a token"),
        ({"method": "GET\r\nX: y"}, "not a token"),
        ({"headers": [("a b", "c")]}, "not a token"),
        ({"headers": [("a", "b\r\nc: d")]}, "no field may carry"),
        ({"headers": [("a", "b\0")]}, "no field may carry"),
        ({"headers": [("a", "€")]}, "no field may carry"),
        ({"headers": [("Transfer-Encoding", "chunked")]}, "writes it itself"),
        ({"headers": [("Host", "a"), ("host", "b")]}, "given once"),
        ({"headers": [("Content-Length", "5")], "body": b"abc"}, "3 bytes"),
        ({"headers": [("Content-Length", "+3")], "body": b"abc"}, "one number"),
        ({"headers": [("Content-Length", "3"), ("content-length", "3")], "body": b"abc"}, "one number"),
        ({"body": 5}, "async iterable"),
        ({"body": b"a", "json": 1}, "either body or json"),
    ],
)
async def test_requests_that_cannot_be_sent(sim_world: Any, options: dict[str, Any], why: str) -> None:
    world = sim_world.world
    async with scripted(world, hello) as stage, open_client(world) as client:
        method = options.pop("method", "POST")
        with pytest.raises(InvalidArgument, match=why):
            await client.request(method, stage.url(), **options)
        assert stage.seen == []


async def test_a_host_and_other_defaults_can_be_replaced(world: World) -> None:
    async with scripted(world, hello) as stage, open_client(world, headers=[("User-Agent", "mine"), ("x-all", "1")]) as client:
        await client.get(stage.url(), headers=[("Host", "virtual.example"), ("User-Agent", "other"), ("Accept-Encoding", "identity")])
        seen = stage.seen[0]
        assert [seen.header(name) for name in ("host", "user-agent", "x-all", "accept-encoding")] == [
            "virtual.example",
            "other",
            "1",
            "identity",
        ]


def test_auth_fields() -> None:
    assert basic_auth("Aladdin", "open sesame") == ("authorization", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==")
    assert bearer_auth("abc") == ("authorization", "Bearer abc")


# --- bodies -----------------------------------------------------------------------------------------------------------------------------


async def test_bodies_stream_out_chunked_or_by_length(world: World) -> None:
    async with scripted(world, hello) as stage, open_client(world) as client:
        got = await client.post(stage.url(), pieces(b"one ", b"", b"two"))
        assert await got.read() == b"POST / one two"
        assert stage.seen[0].header("transfer-encoding") == "chunked"
        got = await client.post(stage.url(), pieces(b"ab", b"cd"), headers=[("content-length", "4")])
        assert await got.read() == b"POST / abcd"
        assert stage.seen[1].header("transfer-encoding") is None
        assert len(stage.peers) == 1


@pytest.mark.parametrize("announced", [3, 9])
async def test_a_streamed_body_of_another_length_ends_the_request(world: World, announced: int) -> None:
    async with scripted(world, hello) as stage, open_client(world) as client:
        with pytest.raises(InvalidArgument, match="content-length says"):
            await client.post(stage.url(), pieces(b"ab", b"cd"), headers=[("content-length", str(announced))])
        assert stage.seen == []


async def test_a_body_that_fails_fails_the_request(world: World) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise ZeroDivisionError

    async with scripted(world, hello) as stage, open_client(world) as client:
        with pytest.raises(ZeroDivisionError):
            await client.post(stage.url(), broken())
        assert stage.seen == []
        assert await (await client.get(stage.url())).read() == b"GET /"


async def test_an_early_answer_ends_the_upload(world: World) -> None:
    closed: list[bool] = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 10_000
                await asyncio.sleep(0.001)
        finally:
            closed.append(True)

    async with scripted(world, hello, on_head=lambda peer, _: peer.answer(413, b"no")) as stage, open_client(world) as client:
        got = await client.post(stage.url(), endless())
        assert (got.status, await got.read()) == (413, b"no")
        await stage.wait(lambda: stage.peers[0].is_lost)
    assert closed == [True]


async def test_answers_stream_in_while_the_request_streams_out(world: World) -> None:
    """Both directions at once: each piece is sent only when the answer to the one before is here."""
    arrived = asyncio.Event()

    async def talk() -> AsyncIterator[bytes]:
        for number in range(3):
            yield f"{number}".encode()
            arrived.clear()
            await arrived.wait()

    def begin(peer: Peer, seen: Seen) -> None:
        peer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

    async with scripted(world, lambda peer, _: peer.write(b"0\r\n\r\n"), on_head=begin) as stage, open_client(world) as client:
        got = await client.post(stage.url(), talk())
        stream = got.stream()
        for number in range(3):
            await stage.wait(lambda number=number: stage.peers[0].body.endswith(f"{number}".encode()))  # type: ignore[misc]
            stage.peers[0].write(b"2\r\n>%d\r\n" % number)
            assert await anext(stream) == b">%d" % number
            arrived.set()
        assert [piece async for piece in stream] == []


async def test_a_slow_reader_slows_the_server_down(world: World) -> None:
    limits = ClientLimits(buffer_bytes_max=10_000)
    size = 16_000_000
    async with scripted(world, lambda peer, _: peer.answer(200, b"x" * size)) as stage, open_client(world, limits=limits) as client:
        got = await client.get(stage.url())
        stream = got.stream()
        n_bytes = len(await anext(stream))
        await asyncio.sleep(0.05)
        transport = stage.peers[0].transport
        assert transport is not None
        assert transport.get_write_buffer_size() > 0
        n_bytes += sum([len(piece) async for piece in stream])
        assert n_bytes == size
        with pytest.raises(WrongState, match="taken"):
            await got.read()


async def test_a_body_larger_than_wanted(world: World) -> None:
    async with scripted(world, lambda peer, _: peer.answer(200, b"x" * 1000)) as stage, open_client(world) as client:
        with pytest.raises(Exhausted, match="more than 999 bytes"):
            await (await client.get(stage.url())).read(999)
        assert len(await (await client.get(stage.url())).read(1000)) == 1000


@pytest.mark.parametrize("fails", [False, True])
async def test_a_short_rest_is_drained_and_a_long_one_cuts(world: World, fails: bool) -> None:
    size = 300_000

    def script(peer: Peer, seen: Seen) -> None:
        peer.answer(200, b"x" * size)

    limits = ClientLimits(buffer_bytes_max=1000, drain_bytes_max=1000 if fails else size)
    async with scripted(world, script) as stage, open_client(world, limits=limits) as client:
        async with await client.get(stage.url()) as got:
            assert got.status == 200
        async with asyncio.timeout(40):
            while client.statistics().n_idle < client.statistics().n_open:
                await asyncio.sleep(0.001)
        await (await client.get(stage.url())).read()
        assert len(stage.peers) == 1 + fails


async def test_an_endless_body_nobody_reads_is_cut(world: World) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        peer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\nhello\r\n" * 100)

    async with scripted(world, script) as stage, open_client(world, limits=ClientLimits(drain_bytes_max=1000)) as client:
        got = await client.get(stage.url())
        got.close()
        stage.peers[0].write(b"5\r\nhello\r\n" * 300)
        await stage.wait(lambda: stage.peers[0].is_lost)


ZSTD = zstandard.ZstdCompressor().compress
TEXT = b"hello " * 5000


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", gzip.compress(TEXT)),
        ("x-gzip", gzip.compress(TEXT[:999]) + gzip.compress(TEXT[999:])),
        ("deflate", zlib.compress(TEXT)),
        ("deflate", zlib.compress(TEXT)[2:-4]),
        ("zstd", ZSTD(TEXT)),
        ("identity", TEXT),
    ],
)
async def test_compressed_bodies(world: World, coding: str, data: bytes) -> None:
    async with (
        scripted(world, lambda peer, _: peer.answer(200, data, f"Content-Encoding: {coding}")) as stage,
        open_client(world) as client,
    ):
        assert await (await client.get(stage.url())).read() == TEXT
        raw = await client.request("GET", stage.url(), decompresses=False)
        assert await raw.read() == data


@pytest.mark.parametrize(
    "data", [gzip.compress(TEXT), zlib.compress(TEXT), zlib.compress(TEXT)[2:-4], ZSTD(TEXT)], ids=["gzip", "zlib", "raw", "zstd"]
)
async def test_compressed_bodies_byte_by_byte(sim_world: Any, data: bytes, request: pytest.FixtureRequest) -> None:
    coding = {"zlib": "deflate", "raw": "deflate"}.get(request.node.callspec.id, request.node.callspec.id)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunks = b"".join(b"1\r\n%b\r\n" % data[i : i + 1] for i in range(len(data)))
    world = sim_world.world
    async with scripted(world, lambda peer, _: peer.write(head, chunks, b"0\r\n\r\n")) as stage, open_client(world) as client:
        assert await (await client.get(stage.url())).read() == TEXT


@pytest.mark.parametrize(
    ("coding", "data", "error", "why"),
    [
        ("gzip", gzip.compress(TEXT)[:-9], ProtocolViolation, "ends too early"),
        ("gzip", gzip.compress(TEXT) + b"garbage", ProtocolViolation, "damaged"),
        ("gzip", TEXT, ProtocolViolation, "damaged"),
        ("deflate", b"\xff\xff" + TEXT, ProtocolViolation, "damaged"),
        ("deflate", zlib.compress(TEXT) + b"x", ProtocolViolation, "behind its end"),
        ("zstd", ZSTD(TEXT)[:-3], ProtocolViolation, "ends too early"),
        ("zstd", ZSTD(TEXT) + b"x", ProtocolViolation, "behind its end"),
        ("zstd", TEXT, ProtocolViolation, "damaged"),
        ("br", TEXT, Unsupported, "br"),
        ("gzip, gzip", TEXT, Unsupported, "gzip, gzip"),
        ("gzip", gzip.compress(bytes(20_000_000)), Exhausted, "more than"),
        ("deflate", zlib.compress(bytes(20_000_000)), Exhausted, "more than"),
        ("zstd", ZSTD(bytes(20_000_000)), Exhausted, "more than"),
    ],
)
async def test_damaged_and_hostile_compression(sim_world: Any, coding: str, data: bytes, error: type[Exception], why: str) -> None:
    world = sim_world.world
    limits = ClientLimits(body_bytes_max=1_000_000)
    async with (
        scripted(world, lambda peer, _: peer.answer(200, data, f"Content-Encoding: {coding}")) as stage,
        open_client(world, limits=limits) as client,
    ):
        with pytest.raises(error, match=why):
            await (await client.get(stage.url())).read()


async def test_expect_continue(world: World) -> None:
    said: list[bytes] = []

    def on_head(peer: Peer, seen: Seen) -> None:
        said.append(peer.raw.partition(b"\r\n\r\n")[2])
        if seen.target == "/yes":
            peer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif seen.target == "/no":
            peer.answer(417, b"never")

    patient, brief = ClientLimits(continue_s=1000), ClientLimits(continue_s=0.1)
    async with scripted(world, hello, on_head=on_head) as stage, open_client(world, limits=brief) as client:
        got = await client.request("POST", stage.url("/silent"), body=b"data", expects_continue=True)
        assert (got.status, await got.read()) == (200, b"POST /silent data")
    said.clear()
    async with scripted(world, hello, on_head=on_head) as stage, open_client(world, limits=patient) as client:
        for path, status, body in (("/yes", 200, b"POST /yes data"), ("/no", 417, b"never")):
            got = await client.request("POST", stage.url(path), body=b"data", expects_continue=True)
            assert (got.status, await got.read()) == (status, body)
        got = await client.request("POST", stage.url("/yes"), body=pieces(b"da", b"ta"), expects_continue=True)
        assert await got.read() == b"POST /yes data"
        assert said[0] == b""
        assert len(stage.seen) == 2
        assert len(stage.peers) == 2  # what follows a refused body could be misread


@pytest.mark.parametrize("body", [b'"\xff"', b"[" * 100_000], ids=["no UTF-8", "deep"])
async def test_an_answer_that_is_no_json_is_a_bad_record(sim_world: SimWorld, body: bytes) -> None:
    async with scripted(sim_world.world, lambda peer, _: peer.answer(200, body)) as stage, open_client(sim_world.world) as client:
        with pytest.raises(BadRecord, match="not the JSON"):
            await (await client.get(stage.url())).json()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("http://h/\ud800", "control characters"),
        ("http://h\ud800/", "control characters"),
        ("http://h/\r\nX: 1", "control characters"),
        ("http://[v1.foo]/", "no IPv6 address"),
        ("http://[::1/", "Invalid IPv6"),
        ("http://good.example\\@evil.example/", "credentials"),
        ("http://good.example\\.evil.example/", "not a name"),
        ("http://@h/", "credentials"),
        ("http://h:65536/", "Port"),
        ("http://h:\uff18/", "Port"),
        ("unix:/run/socket", "must begin with"),
    ],
)
def test_urls_that_two_readers_could_read_in_two_ways(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        parse_url(text)
    caught.value.message.encode()


@pytest.mark.parametrize("text", ["http://[fe80::1%25eth0]:81/a", "http://[fe80::1%eth0]:81/a"])
def test_the_zone_of_an_address_is_used_and_not_told(text: str) -> None:
    url = parse_url(text)
    assert (url.host, url.host_field) == ("fe80::1%eth0", "[fe80::1]:81")
    assert url.join("b").host == url.host
