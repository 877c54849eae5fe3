"""One connection: the fast path, coroutines, keep-alive, bodies both ways, and what stays in order."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import msgspec
import pytest

from isopod.net.http import HttpError, HttpLimits, Request, Response
from isopod.net.http.messages import HeaderPairs
from isopod.net.http.middleware import chain, request_id
from isopod.runtime.scheduling import SchedulingGroup, current_group
from isopod.world.errors import (
    AlreadyExists,
    BugError,
    DeadlineExceeded,
    DiskFull,
    Exhausted,
    InvalidArgument,
    IsopodError,
    NotFound,
    Unsupported,
    WrongState,
)
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.http.kit import GET, ask, echo, hello, parse, peer_of, serving, talk

pytestmark = pytest.mark.row("S13")

GONE: Final = HttpLimits(half_closed_s=0.05)


async def test_a_plain_function_is_answered_with_date_and_length(world: World, folder: str) -> None:
    async with serving(world, hello, folder) as site:
        got = await ask(site)

    assert (got.status, got.body) == (200, b"hello")
    assert got.headers["content-length"] == "5" and got.headers["date"].endswith(" GMT")
    assert got.headers["connection"] == "close"


async def test_a_connection_is_kept(world: World, folder: str) -> None:
    async with serving(world, hello, folder) as site, peer_of(site) as peer:
        for n in range(1, 4):
            peer.send(GET)
            await peer.until_count(b"hello", n)
        data = peer.data

        assert site.server.statistics().n_accepted == 1
    assert [got.status for got in parse(data, ("GET",) * 3)] == [200] * 3


async def test_pipelined_requests_are_answered_in_order(world: World, folder: str) -> None:
    async def handler(request: Request) -> Response:
        return Response.text(request.path)

    def mixed(request: Request) -> object:
        return handler(request) if request.path.endswith("slow") else Response.text(request.path)

    names = [f"/{n}{'slow' if n % 3 == 0 else ''}" for n in range(200)]
    data = b"".join(f"GET {name} HTTP/1.1\r\nHost: a\r\n\r\n".encode() for name in names)
    async with serving(world, mixed, folder, HttpLimits(pipelined_max=7)) as site:  # type: ignore[arg-type]
        answer = await talk(site, data + b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")

    assert [got.body.decode() for got in parse(answer, ("GET",) * 201)] == [*names, "/last"]


async def test_bodies_of_known_length_and_chunked(world: World, folder: str) -> None:
    chunked = (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nT: x\r\n\r\n"
    )
    async with serving(world, echo, folder) as site:
        known = await ask(site, "POST", body=b"hello" * 30_000)
        answer = await talk(site, chunked)

    assert known.body == b"hello" * 30_000
    assert parse(answer)[0].body == b"abcde"


async def test_http_1_0_closes_unless_asked_otherwise(world: World, folder: str) -> None:
    async with serving(world, hello, folder) as site:
        closed = await talk(site, b"GET / HTTP/1.0\r\n\r\n")
        async with peer_of(site, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n") as peer:
            await peer.until_count(b"hello", 1)
            peer.send(b"GET / HTTP/1.0\r\n\r\n")
            kept = await peer.until_end()

    assert parse(closed)[0].headers["connection"] == "close"
    assert b"connection: keep-alive\r\n" in kept and kept.count(b"hello") == 2


async def test_head_has_the_fields_and_no_body(world: World, folder: str) -> None:
    async with serving(world, hello, folder) as site:
        got = await ask(site, "HEAD")

    assert (got.headers["content-length"], got.body) == ("5", b"")


@pytest.mark.parametrize("status", [204, 304])
async def test_some_statuses_have_no_body(sim_world: SimWorld, folder: str, status: int) -> None:
    async with serving(sim_world.world, lambda _: Response(status, (), b"dropped"), folder) as site:
        data = await talk(site, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))

    assert data.endswith(b"\r\n\r\n") and b"content-length" not in data


async def test_continue_is_said_when_the_body_is_wanted_and_only_then(world: World, folder: str) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    async with serving(world, echo, folder) as site, peer_of(site, head) as peer:
        await peer.until(lambda data: data == b"HTTP/1.1 100 Continue\r\n\r\n")
        peer.send(b"ok")
        await peer.until(lambda data: data.endswith(b"ok"))
    async with serving(world, hello, folder) as site:
        refused = await talk(site, head)

    assert b"100" not in refused and parse(refused)[0].headers["connection"] == "close"


async def test_a_continue_is_not_said_into_an_answer_that_has_begun(world: World, folder: str) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    handler = lambda request: Response(200, (), request.stream())  # noqa: E731 - the whole of it
    async with serving(world, handler, folder) as site, peer_of(site, head) as peer:
        await peer.until(lambda data: b"\r\n\r\n" in data)
        peer.send(b"ok")
        data = await peer.until_end()

    assert data.startswith(b"HTTP/1.1 200") and b"100 Continue" not in data and parse(data)[0].body == b"ok"


async def test_a_body_that_never_comes_behind_such_an_answer_is_not_waited_for(sim_world: SimWorld, folder: str) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    handler = lambda request: Response(200, (), request.stream())  # noqa: E731 - the whole of it
    async with serving(sim_world.world, handler, folder) as site, peer_of(site, head) as peer:
        assert b"100 Continue" not in await peer.until_end()


async def test_a_request_body_is_taken_at_the_handlers_pace(world: World, folder: str) -> None:
    gate = asyncio.Event()
    sizes: list[int] = []

    async def handler(request: Request) -> Response:
        await gate.wait()
        async for piece in request.stream(n_bytes_max=64 << 20):
            sizes.append(len(piece))
        return Response.text(str(sum(sizes)))

    body = b"x" * (8 << 20)
    head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with serving(world, handler, folder) as site, peer_of(site, head + body) as peer:
        for _ in range(200):
            await asyncio.sleep(0.001)
        received = site.server.statistics().n_bytes_received
        gate.set()
        answer = await peer.until_end()

    assert received < 1 << 20
    assert parse(answer)[0].body == b"%d" % len(body)


async def test_a_response_body_is_made_at_the_peers_pace(world: World, folder: str) -> None:
    n_made = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal n_made
        for _ in range(64):
            n_made += 1
            yield b"y" * (256 << 10)

    async with serving(world, lambda _: Response(200, (), pieces()), folder) as site, peer_of(site) as peer:
        assert peer.transport is not None
        peer.transport.pause_reading()
        peer.send(GET)
        for _ in range(200):
            await asyncio.sleep(0.001)
        n_before = n_made
        peer.transport.resume_reading()
        data = await peer.until(lambda data: data.endswith(b"0\r\n\r\n"))

    assert 0 < n_before < 32
    assert parse(data)[0].body == b"y" * (16 << 20)


async def test_a_stream_is_closed_when_the_peer_goes(world: World, folder: str) -> None:
    closed = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"tick"
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async with serving(world, lambda _: Response(200, (), pieces()), folder) as site:
        async with peer_of(site, GET) as peer:
            await peer.until_count(b"tick", 3)
        async with asyncio.timeout(40):
            await closed.wait()


async def test_a_coroutine_is_cancelled_when_the_peer_goes(world: World, folder: str) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(request: Request) -> Response:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return Response.text("never")

    async with serving(world, handler, folder, GONE) as site:
        async with peer_of(site, GET):
            await began.wait()
        async with asyncio.timeout(40):
            await cancelled.wait()
        assert site.events("http.handler_failed") == []


async def test_a_peer_that_shut_down_its_side_still_gets_its_answer(world: World, folder: str) -> None:
    async def handler(request: Request) -> Response:
        await asyncio.sleep(0.02)
        return Response.text("late")

    async with serving(world, handler, folder) as site, peer_of(site, GET) as peer:
        assert peer.transport is not None
        peer.transport.write_eof()
        assert parse(await peer.until_end())[0].body == b"late"


async def test_a_peer_that_hangs_up_at_once_leaves_nothing(world: World, folder: str) -> None:
    async def handler(request: Request) -> Response:
        await asyncio.sleep(60)
        return Response.text("never")

    async with serving(world, chain(handler, request_id(world)), folder, GONE) as site:
        for _ in range(20):
            async with peer_of(site, GET):
                pass
        async with asyncio.timeout(40):
            while site.server.statistics().n_accepted < 20 or site.server.statistics().n_connections:
                await asyncio.sleep(0.005)


# -- what handlers do wrong ----------------------------------------------------------------------------------------------------------


async def _short() -> AsyncIterator[bytes]:
    yield b"ab"


async def _failing() -> AsyncIterator[bytes]:
    yield b"ab"
    raise ValueError("secret detail")


BAD: Final[dict[str, Callable[[], Any]]] = {
    "raises": lambda: 1 // 0,
    "nothing": lambda: None,
    "line feed in a value": lambda: Response(200, (("x", "a\r\nset-cookie: b"),)),
    "carriage return in a value": lambda: Response(200, (("x", "a\rb"),)),
    "NUL in a value": lambda: Response(200, (("x", "a\0b"),)),
    "line feed in a name": lambda: Response(200, (("x: y\r\nz", "a"),)),
    "beyond latin-1": lambda: Response(200, (("x", "\u20ac"),)),
    "redirect with a line feed": lambda: Response.redirect("/a\r\nset-cookie: b"),
    "own framing": lambda: Response(200, (("transfer-encoding", "chunked"),)),
    "own connection": lambda: Response(200, (("connection", "upgrade"),)),
    "wrong length": lambda: Response(200, (("content-length", "7"),), b"abc"),
    "two lengths": lambda: Response(200, (("content-length", "3"), ("Content-Length", "3")), b"abc"),
    "length that is none": lambda: Response(200, (("content-length", "-3"),), b"abc"),
    "informational status": lambda: Response(101),
    "status out of range": lambda: Response(1000),
    "no bytes": lambda: Response(200, (), 7),  # type: ignore[arg-type]
    "header that is no text": lambda: Response(200, (("x", 1),)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("is_later", [False, True], ids=["function", "coroutine"])
@pytest.mark.parametrize("name", BAD)
async def test_what_cannot_be_sent_is_a_500_with_an_id(sim_world: SimWorld, folder: str, name: str, is_later: bool) -> None:
    async def later(request: Request) -> Response:
        return BAD[name]()  # type: ignore[no-any-return]

    async with serving(sim_world.world, later if is_later else lambda _: BAD[name](), folder) as site:
        got = await ask(site)
        (line,) = site.events("http.handler_failed")

    assert got.status == 500 and "set-cookie" not in got.headers
    facts = msgspec.json.decode(got.body)
    assert facts["code"] == "internal" and facts["hint"].endswith(line["id"])
    assert "Traceback" not in got.body.decode() and "Error" in line["traceback"]


@pytest.mark.parametrize(
    ("stream", "headers"),
    [(_failing, ()), (_failing, (("content-length", "5"),)), (_short, (("content-length", "5"),)), (_short, (("content-length", "1"),))],
    ids=["chunked", "known length", "too short", "too long"],
)
async def test_a_broken_stream_cannot_be_taken_for_whole(
    world: World, folder: str, stream: Callable[[], AsyncIterator[bytes]], headers: HeaderPairs
) -> None:
    async with serving(world, lambda _: Response(200, headers, stream()), folder) as site:
        data = await talk(site, GET)
        assert len(site.events("http.handler_failed")) == 1

    found = parse(data)
    assert found == [] or not found[0].is_whole
    assert b"secret" not in data


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NotFound("image", "busybox"), 404, "not_found"),
        (InvalidArgument("name", "x y", "no spaces"), 400, "invalid_argument"),
        (AlreadyExists("network", "n"), 409, "already_exists"),
        (Exhausted("addresses", "256"), 503, "exhausted"),
        (DeadlineExceeded("the peer", 3), 504, "deadline_exceeded"),
        (DiskFull("/x"), 507, "disk_full"),
        (Unsupported("x", "y"), 501, "unsupported"),
        (HttpError(418, "short and stout", "pour", headers=(("x-tea", "pot"),)), 418, "im_a_teapot"),
    ],
    ids=lambda value: value.code if isinstance(value, IsopodError) else str(value),
)
async def test_errors_of_the_tree_have_their_status(sim_world: SimWorld, folder: str, error: IsopodError, status: int, code: str) -> None:
    def handler(request: Request) -> Response:
        raise error

    async with serving(sim_world.world, handler, folder) as site:
        got = await ask(site)
        assert site.events("http.handler_failed") == []

    assert (got.status, msgspec.json.decode(got.body)) == (status, {"code": code, "message": error.message, "hint": error.hint})
    assert ("retry-after" in got.headers) is (status == 503)
    assert ("x-tea" in got.headers) is (status == 418)


async def test_a_bug_or_damaged_data_is_not_told(sim_world: SimWorld, folder: str) -> None:
    def handler(request: Request) -> Response:
        raise BugError("the secret of /etc/isopod")

    async with serving(sim_world.world, handler, folder) as site:
        got = await ask(site)

    assert got.status == 500 and b"secret" not in got.body


@pytest.mark.parametrize(
    "body", [b'"\xff"', b"[" * 100_000, b'"\\ud800"', b"", b"{"], ids=["no UTF-8", "deep", "half a pair", "empty", "cut"]
)
async def test_a_body_that_is_no_json_is_a_400_and_no_failure_of_ours(sim_world: SimWorld, folder: str, body: bytes) -> None:
    async def handler(request: Request) -> Response:
        return Response.json(await request.json(object))

    async with serving(sim_world.world, handler, folder) as site:
        got = await ask(site, "POST", body=body)
        assert (got.status, site.events("http.handler_failed")) == (400, [])


async def test_the_body_can_be_read_as_json_and_only_once(world: World, folder: str) -> None:
    async def handler(request: Request) -> Response:
        value = await request.json(dict[str, int])
        with pytest.raises(WrongState):
            await request.read()
        return Response.json(value)

    async with serving(world, handler, folder) as site:
        statuses = [(await ask(site, "POST", body=body)).status for body in (b'{"a": 1}', b'{"a": "b"}', b"{")]

    assert statuses == [200, 422, 400]


async def test_tasks_run_in_the_servers_group(world: World, folder: str) -> None:
    group = SchedulingGroup("http", 100)

    async def handler(request: Request) -> Response:
        return Response.text(current_group().name)

    async with serving(world, handler, folder, group=group) as site:
        assert (await ask(site)).body == b"http"


async def test_the_same_head_again_is_a_new_request(world: World, folder: str) -> None:
    seen: list[Request] = []

    def handler(request: Request) -> Response:
        seen.append(request)
        request.state["n"] = len(seen)
        return Response.text(f"{request.method} {request.path} {len(seen)}!")

    post = b"POST /b HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n\r\nhi"
    heads = [GET, GET, GET.replace(b"/ ", b"/a "), GET, post, post, GET, GET.replace(b"GET", b"PUT"), GET]
    async with serving(world, handler, folder) as site, peer_of(site) as peer:
        for n, data in enumerate(heads, 1):
            peer.send(data)
            await peer.until_count(b"!", n)

    assert [got.body for got in parse(peer.data, ("GET",) * 9)] == [
        f"{line} {n}!".encode()
        for n, line in enumerate(["GET /", "GET /", "GET /a", "GET /", "POST /b", "POST /b", "GET /", "PUT /", "GET /"], 1)
    ]
    assert len({id(request) for request in seen}) == 9 and [request.state["n"] for request in seen] == list(range(1, 10))


async def test_a_handler_that_ends_as_if_cancelled_is_a_500(world: World, folder: str) -> None:
    async def later(request: Request) -> Response:
        raise asyncio.CancelledError

    def now(request: Request) -> Response:
        raise asyncio.CancelledError

    for handler in (later, now):
        async with serving(world, handler, folder) as site:
            assert (await ask(site)).status == 500
