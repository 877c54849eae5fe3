"""Requests that two parsers could read differently are refused, and any request means the same however its bytes were cut.

The cases are those of RFC 9112 (sections 2.2, 3, 5, 6, 7 and 11.2) and of published attacks on pairs of proxies and servers.
"""

import asyncio
import re
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isopod.net.http import HttpLimits, Request, Response
from isopod.world.sim import make_sim_world
from isopod.world.world import World
from tests.net.http.kit import echo, hello, parse, peer_of, serving, talk

pytestmark = pytest.mark.row("S13")

SMUGGLED: Final = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
POST: Final = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED: Final = POST + b"Transfer-Encoding: chunked\r\n\r\n"

# name: (bytes, status)
REFUSED: Final[dict[str, tuple[bytes, int]]] = {
    # Framing (RFC 9112 section 6.3).
    "length and chunked": (POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "chunked and length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "two equal lengths": (POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc" + SMUGGLED, 400),
    "two different lengths": (POST + b"Content-Length: 3\r\nContent-Length: 30\r\n\r\nabc" + SMUGGLED, 400),
    "a list of lengths": (POST + b"Content-Length: 3, 3\r\n\r\nabc" + SMUGGLED, 400),
    "a signed length": (POST + b"Content-Length: +3\r\n\r\nabc" + SMUGGLED, 400),
    "a negative length": (POST + b"Content-Length: -3\r\n\r\nabc" + SMUGGLED, 400),
    "a hexadecimal length": (POST + b"Content-Length: 0x3\r\n\r\nabc" + SMUGGLED, 400),
    "a length with a space": (POST + b"Content-Length: 1 2\r\n\r\nabc" + SMUGGLED, 400),
    "an empty length": (POST + b"Content-Length:\r\n\r\n" + SMUGGLED, 400),
    "a length over 64 bits": (POST + b"Content-Length: 18446744073709551619\r\n\r\nabc" + SMUGGLED, 400),
    "gzip, chunked": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "chunked, gzip": (POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "chunked twice": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "chunked and identity": (POST + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "xchunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "quoted chunked": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n' + SMUGGLED, 400),
    "identity": (POST + b"Transfer-Encoding: identity\r\n\r\n" + SMUGGLED, 400),
    "vertical tab before chunked": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "chunked with a parameter": (POST + b"Transfer-Encoding: chunked;a=b\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "chunked in 1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, 400),
    "upgrade with a chunked body": (
        POST + b"Connection: upgrade\r\nUpgrade: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        400,
    ),
    # Lines and fields (sections 2.2 and 5).
    "bare line feeds": (b"GET / HTTP/1.1\nHost: a\n\n" + SMUGGLED, 400),
    "a bare line feed after a field": (b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n" + SMUGGLED, 400),
    "a bare line feed before the end": (b"GET / HTTP/1.1\r\nHost: a\r\n\n" + SMUGGLED, 400),
    "a leading line feed": (b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a bare carriage return in a value": (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", 400),
    "a bare carriage return at an end": (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\r\n\r\n", 400),
    "a carriage return in the target": (b"GET /a\rb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a NUL in a value": (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", 400),
    "a NUL in a name": (b"GET / HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n", 400),
    "a control character": (b"GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n", 400),
    "a folded line": (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", 400),
    "a folded line with a tab": (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n\tb\r\n\r\n", 400),
    "a space before the first field": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "a space before the colon": (POST + b"Content-Length : 3\r\n\r\nabc", 400),
    "a tab before the colon": (POST + b"Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n", 400),
    "no colon": (b"GET / HTTP/1.1\r\nHost: a\r\nnonsense\r\n\r\n", 400),
    "an empty name": (b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", 400),
    "a name that is no token": (b"GET / HTTP/1.1\r\nHost: a\r\nX(y): b\r\n\r\n", 400),
    # Request line (section 3).
    "two spaces": (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a space in the target": (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a space at the end": (b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    "a tab": (b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "no version": (b"GET /\r\n\r\n", 400),
    "a lower-case method": (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "an unknown method": (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "version 2": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    "version 0.9": (b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
    "version 1.2": (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 400),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "another protocol": (b"GET / RTSP/1.0\r\nHost: a\r\n\r\n", 400),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40), 400),
    "bytes above ASCII in the target": (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a fragment": (b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    # Forms of the target (section 3.2).
    "a star for GET": (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "an authority for GET": (b"GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a relative path": (b"GET a/b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "another scheme": (b"GET ftp://a/b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "user information": (b"GET http://u:p@a/b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "an absolute form without a host": (b"GET http:///b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "an absolute form with another host": (b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "CONNECT": (b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n" + SMUGGLED, 501),
    "CONNECT with a path": (b"CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    # Host (section 3.2).
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    "two hosts in other cases": (b"GET / HTTP/1.1\r\nHost: a\r\nhOST: b\r\n\r\n", 400),
    "two hosts in 1.0": (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "a host with a path": (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "a host with user information": (b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
    "a host with a space": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "a list of hosts": (b"GET / HTTP/1.1\r\nHost: a, b/c\r\n\r\n", 400),
    "an unknown expectation": (POST + b"Expect: 200-ok\r\nContent-Length: 3\r\n\r\nabc", 417),
}
# After a head that is sound: bad chunks (section 7.1). The handler was called, and reading the body failed.
BAD_CHUNKS: Final[dict[str, bytes]] = {
    "a prefix of 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "a sign": b"+3\r\nabc\r\n0\r\n\r\n",
    "a negative size": b"-3\r\nabc\r\n0\r\n\r\n",
    "a space before": b" 3\r\nabc\r\n0\r\n\r\n",
    "a space after": b"3 \r\nabc\r\n0\r\n\r\n",
    "an underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "no size": b"\r\nabc\r\n0\r\n\r\n",
    "a size over 64 bits": b"10000000000000003\r\nabc\r\n0\r\n\r\n",
    "bare line feeds": b"3\nabc\n0\n\n",
    "a bare line feed after an extension": b"3;a=b\nabc\r\n0\r\n\r\n",
    "a carriage return in an extension": b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "a control character in an extension": b"3;a\x01\r\nabc\r\n0\r\n\r\n",
    "more data than announced": b"3\r\nabcd\r\n0\r\n\r\n",
    "less data than announced": b"5\r\nabc\r\n0\r\n\r\nxx",
    "a bad trailer": b"0\r\nBad Name: x\r\n\r\n",
    "a length in the trailer": b"0\r\nContent-Length: 5\r\n\r\n",
    "a folded trailer": b"0\r\nX: a\r\n b\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
async def test_an_ambiguous_head_is_refused_and_nothing_after_it_is_read(world: World, folder: str, name: str) -> None:
    seen: list[str] = []

    def handler(request: Request) -> Response:
        seen.append(request.target)
        return Response.text("seen")

    data, status = REFUSED[name]
    async with serving(world, handler, folder) as site:
        got = parse(await talk(site, data))

        assert site.server.statistics().n_refused == 1
    assert [each.status for each in got] == [status]
    assert got[0].headers["connection"] == "close" and got[0].headers["content-type"] == "application/json"
    assert seen == []


@pytest.mark.parametrize("name", BAD_CHUNKS)
async def test_a_bad_chunk_ends_the_connection(world: World, folder: str, name: str) -> None:
    async with serving(world, echo, folder) as site:
        got = parse(await talk(site, CHUNKED + BAD_CHUNKS[name] + SMUGGLED))

    assert [(each.status, each.headers["connection"]) for each in got] == [(400, "close")]


async def test_a_body_is_no_request_and_its_end_is_where_it_should_be(world: World, folder: str) -> None:
    seen: list[tuple[str, bytes]] = []

    async def handler(request: Request) -> Response:
        seen.append((request.path, await request.read()))
        return Response.text("ok")

    inner = b"POST /inner HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    data = (
        b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(inner), inner)
        + b"POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(inner), inner)
        + b"POST /3 HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: none\r\nContent-Length: 3\r\n\r\nabc"
        + b"\r\n\r\nGET http://A/4?q HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        + SMUGGLED
    )
    async with serving(world, handler, folder) as site:
        answer = await talk(site, data)

    assert seen == [("/1", inner), ("/2", inner), ("/3", b"abc"), ("/4", b"")]
    assert [got.status for got in parse(answer, ("GET",) * 5)] == [200] * 4


async def test_a_body_nobody_reads_is_not_taken_for_the_next_request(world: World, folder: str) -> None:
    data = POST + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED
    data += CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
    async with serving(world, hello, folder) as site:
        answer = await talk(site, data + b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")

    assert [got.body for got in parse(answer, ("GET",) * 4)] == [b"hello"] * 3


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET /" + b"a" * 30_000, 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 101 + b"\r\n", 431),
    ],
    ids=["target", "endless target", "head", "endless head", "fields"],
)
async def test_a_head_has_bounds(world: World, folder: str, data: bytes, status: int) -> None:
    async with serving(world, hello, folder) as site:
        got = parse(await talk(site, data))

    assert [each.status for each in got] == [status]


@pytest.mark.parametrize("port", [b"", b":80", b":"])
@pytest.mark.parametrize("host", [b"example.org", b"127.0.0.1", b"[::1]", b"[2001:db8::7]", b"xn--bcher-kva.example", b"a_b%20"])
async def test_sound_hosts_are_taken(sim_world: object, folder: str, host: bytes, port: bytes) -> None:
    async with serving(sim_world.world, hello, folder) as site:  # type: ignore[attr-defined]
        got = parse(await talk(site, b"GET / HTTP/1.1\r\nHost: " + host + port + b"\r\nConnection: close\r\n\r\n"))

    assert [each.status for each in got] == [200]


def _stream() -> st.SearchStrategy[bytes]:
    whole = st.sampled_from(
        [
            b"GET /a?b HTTP/1.1\r\nHost: a\r\n\r\n",
            b"\r\nGET /sync HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 50 + b"\r\n\r\n",
            POST + b"Content-Length: 5\r\n\r\nhello",
            CHUNKED + b"5;x\r\nhello\r\n4\r\n\r\n\r\n\r\n0\r\nT: u\r\n\r\n",
            b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
            POST + b"Connection: upgrade\r\nUpgrade: x\r\nContent-Length: 2\r\n\r\nab",
        ]
    )
    last = st.sampled_from(
        [
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + SMUGGLED,
            *(data for data, _ in REFUSED.values()),
            *(CHUNKED + data for data in BAD_CHUNKS.values()),
        ]
    )
    return st.tuples(st.lists(whole, max_size=4), last).map(lambda parts: b"".join(parts[0]) + parts[1])


def test_any_cutting_gives_the_same_answers() -> None:
    def handler(request: Request) -> object:
        return Response.text(request.target) if request.path == "/sync" else _say(request)

    async def _say(request: Request) -> Response:
        body = await request.read()
        return Response.text(f"{request.method} {request.target} {body!r}")

    sim = make_sim_world()

    async def answers(data: bytes, cuts: list[int]) -> bytes:
        async with serving(sim.world, handler, "/tmp", HttpLimits(pipelined_max=2)) as site, peer_of(site) as peer:  # type: ignore[arg-type]
            places = sorted({min(cut, len(data)) for cut in cuts})
            for start, end in zip([0, *places], [*places, len(data)], strict=True):
                if not peer.is_ended:
                    peer.send(data[start:end])
                    await asyncio.sleep(0.001)
            return re.sub(rb"date: [^\r]*\r\n", b"", await peer.until_end())

    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(_stream(), st.lists(st.integers(0, 400), max_size=12))
    def check(data: bytes, cuts: list[int]) -> None:
        run = sim.loop.run_until_complete
        whole = run(answers(data, []))

        assert run(answers(data, cuts)) == whole

    try:
        sim.loop.run_until_complete(sim.world.disk.make_directory("/tmp"))
        check()
        for data, _ in REFUSED.values():  # byte by byte
            whole = sim.loop.run_until_complete(answers(data, []))
            assert sim.loop.run_until_complete(answers(data, list(range(len(data))))) == whole
    finally:
        sim.close()
