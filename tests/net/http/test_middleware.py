"""Middleware: the chain, ids, the access log, limits, CORS and compression."""

import asyncio
import inspect
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
import zstandard

from isopod.net.http import Answer, Handler, HttpError, Request, Response, Upgrade
from isopod.net.http.compression import choose_coding, compress
from isopod.net.http.cors import cors
from isopod.net.http.headers import Headers
from isopod.net.http.messages import HeaderPairs
from isopod.net.http.middleware import access_log, chain, finish, limit_concurrency, limit_rate, request_id
from isopod.runtime.logger import Logger
from isopod.world.errors import InvalidArgument, NotFound
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.http.kit import ask, hello, serving

pytestmark = pytest.mark.row("S13")


def request(method: str = "GET", target: str = "/", **headers: str) -> Request:
    return Request(method, target, Headers([(name.replace("_", "-"), value) for name, value in headers.items()]))


def now(answer: Answer | Awaitable[Answer]) -> Response:
    assert isinstance(answer, Response)
    return answer


def mark(name: str) -> Any:
    def middleware(request: Request, handler: Handler) -> Answer | Awaitable[Answer]:
        request.state.setdefault("in", []).append(name)  # type: ignore[attr-defined]

        def change(response: Response) -> Response:
            response.add_header("x-out", name)
            return response

        return finish(handler(request), change)

    return middleware


# -- the chain -----------------------------------------------------------------------------------------------------------------------


async def test_the_first_is_outermost_and_functions_stay_functions() -> None:
    asked = request()
    answer = now(chain(hello, mark("a"), mark("b"))(asked))

    assert asked.state["in"] == ["a", "b"]
    assert [value for _, value in answer.headers[1:]] == ["b", "a"]


async def test_a_coroutine_makes_the_chain_one() -> None:
    async def handler(request: Request) -> Response:
        return Response.text("x")

    answer = chain(handler, mark("a"), mark("b"))(request())
    assert inspect.isawaitable(answer)
    assert [value for _, value in now(await answer).headers[1:]] == ["b", "a"]


async def test_errors_are_responses_inside_the_chain_and_bugs_are_not() -> None:
    def handler(request: Request) -> Response:
        raise NotFound("thing", "x") if request.path == "/" else ValueError("bug")

    async def later(request: Request) -> Response:
        return handler(request)

    answer = chain(later, mark("a"))(request())
    assert not isinstance(answer, Response | Upgrade)

    assert now(chain(handler, mark("a"))(request())).status == 404
    assert now(await answer).header("x-out") == "a"
    with pytest.raises(ValueError, match="bug"):
        chain(handler, mark("a"))(request(target="/bug"))


# -- ids and the log -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "is_kept"), [("abc-123", True), ("a b", False), ("x" * 65, False), ("", False)])
async def test_request_ids(sim_world: SimWorld, sent: str, is_kept: bool) -> None:
    handler = chain(lambda request: Response.text(str(request.state["request_id"])), request_id(sim_world.world, trusts_client=True))
    answer = now(handler(request(x_request_id=sent)))

    assert answer.body == (answer.header("x-request-id") or "").encode() != b""
    assert (answer.body == sent.encode()) is is_kept


async def test_ids_of_strangers_are_not_taken(sim_world: SimWorld) -> None:
    handler = chain(hello, request_id(sim_world.world))

    assert now(handler(request(x_request_id="mine"))).header("x-request-id") != "mine"


async def test_the_access_log(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    lines: list[bytes] = []
    logger = Logger(lines.append, world.clock)

    async def handler(request: Request) -> Response:
        await asyncio.sleep(1.5)
        if request.path == "/bug":
            raise ValueError("bug")
        raise HttpError(409, "busy")

    async with serving(world, chain(handler, request_id(world), access_log(logger, world)), folder) as site:
        await ask(site, target="/a?token=secret")
        await ask(site, target="/bug")
    first, second = (msgspec.json.decode(line) for line in lines)

    assert first["event"] == "http.access" and first["path"] == "/a" and first["status"] == 409 and first["method"] == "GET"
    assert 1.5 <= first["duration_s"] < 1.6 and len(first["request_id"]) == 16 and first["n_bytes"] > 10
    assert second["status"] == 500


# -- limits --------------------------------------------------------------------------------------------------------------------------


async def test_concurrency_is_bounded(sim_world: SimWorld) -> None:
    n_inside = n_most = 0

    async def handler(request: Request) -> Response:
        nonlocal n_inside, n_most
        n_inside += 1
        n_most = max(n_most, n_inside)
        await asyncio.sleep(0.6)
        n_inside -= 1
        return Response.text("x")

    limited = chain(handler, limit_concurrency(2, n_waiting_max=2, wait_s=1, retry_after_s=7))

    async def one() -> Response:
        answer = limited(request())
        assert not isinstance(answer, Response | Upgrade)
        return now(await answer)

    answers = await asyncio.gather(*(one() for _ in range(6)))
    again = await one()

    assert sorted(answer.status for answer in answers) == [200, 200, 200, 200, 503, 503]
    assert {answer.header("retry-after") for answer in answers} == {None, "7"} and again.status == 200 and n_most == 2
    with pytest.raises(InvalidArgument):
        limit_concurrency(0)


async def test_the_wait_for_a_place_is_bounded(sim_world: SimWorld) -> None:
    async def handler(request: Request) -> Response:
        await asyncio.sleep(10)
        return Response.text("x")

    limited = chain(handler, limit_concurrency(1, n_waiting_max=1, wait_s=1))
    answers = await asyncio.gather(*(limited(request()) for _ in range(2)))  # type: ignore[arg-type]

    assert sorted(now(answer).status for answer in answers) == [200, 503]


async def test_the_rate_is_bounded(sim_world: SimWorld) -> None:
    limited = chain(hello, limit_rate(sim_world.world, 10, burst=3))
    first = [now(limited(request())).status for _ in range(5)]
    await asyncio.sleep(0.25)
    second = [now(limited(request())).status for _ in range(4)]

    assert (first, second) == ([200, 200, 200, 503, 503], [200, 200, 503, 503])
    with pytest.raises(InvalidArgument):
        limit_rate(sim_world.world, 0, burst=1)


# -- CORS ----------------------------------------------------------------------------------------------------------------------------

SITE = "https://app.example"


async def test_listed_origins_may_read() -> None:
    handler = chain(hello, cors([SITE], credentials=True, exposed=["x-total"]))
    welcome = now(handler(request(origin=SITE)))
    stranger = now(handler(request(origin="https://evil.example")))
    none = now(handler(request()))

    assert welcome.header("access-control-allow-origin") == SITE
    assert welcome.header("access-control-allow-credentials") == "true" and welcome.header("access-control-expose-headers") == "x-total"
    assert [each.header("access-control-allow-origin") for each in (stranger, none)] == [None, None]
    assert [each.header("vary") for each in (welcome, stranger, none)] == ["origin"] * 3


@pytest.mark.parametrize(
    "origin", ["null", "https://app.example.evil", "http://app.example", "https://APP.example", "https://app.example/"]
)
async def test_what_only_looks_like_a_listed_origin(origin: str) -> None:
    assert now(chain(hello, cors([SITE]))(request(origin=origin))).header("access-control-allow-origin") is None


async def test_any_origin() -> None:
    answer = now(chain(hello, cors(["*"]))(request(origin=SITE)))

    assert (answer.header("access-control-allow-origin"), answer.header("vary")) == ("*", None)


@pytest.mark.parametrize(
    ("origin", "method", "headers", "status"),
    [
        (SITE, "PUT", "content-type, X-Token", 204),
        (SITE, "PUT", "", 204),
        (SITE, "DELETE", "", 403),
        (SITE, "PUT", "x-other", 403),
        ("https://evil.example", "PUT", "", 403),
    ],
)
async def test_preflights_never_reach_the_handler(origin: str, method: str, headers: str, status: int) -> None:
    def handler(request: Request) -> Response:
        raise AssertionError(request)

    around = cors([SITE], methods=["GET", "PUT"], headers=["x-token", "content-type"], max_age_s=77)
    asked = request("OPTIONS", origin=origin, access_control_request_method=method, access_control_request_headers=headers)
    answer = now(chain(handler, around)(asked))

    assert answer.status == status
    assert (answer.header("access-control-max-age"), answer.header("access-control-allow-methods")) == (
        ("77", "GET, PUT") if status == 204 else (None, None)
    )


@pytest.mark.parametrize("origins", [["*", SITE], ["app.example"], ["https://app.example/path"], ["https://*.example"]])
def test_origins_that_make_no_sense(origins: list[str]) -> None:
    with pytest.raises(InvalidArgument):
        cors(origins)
    with pytest.raises(InvalidArgument):
        cors(["*"], credentials=True)


# -- compression ---------------------------------------------------------------------------------------------------------------------

TEXT = b"the same words again and again " * 200


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("x-gzip", "gzip"),
        ("GZIP;q=0.5", "gzip"),
        ("gzip, zstd", "zstd"),
        ("gzip, zstd;q=0.9", "gzip"),
        ("gzip;q=0", None),
        ("gzip;q=0, *", "zstd"),
        ("*;q=0", None),
        ("br, deflate", None),
        ("identity, gzip;q=0.5", None),
        ("gzip;q=nan", None),
        ("gzip;q=7", None),
        ("gzip; q=0.001", "gzip"),
        (";;,", None),
    ],
)
def test_the_choice_of_a_coding(accepted: str, expected: str | None) -> None:
    assert choose_coding(accepted, ("zstd", "gzip")) == expected


UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: zlib.decompress(data, 31),
    "zstd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
}


@pytest.mark.parametrize("kind", ["whole", "large", "stream", "announced"])
@pytest.mark.parametrize("coding", ["gzip", "zstd"])
async def test_bodies_are_compressed(world: World, folder: str, coding: str, kind: str) -> None:
    whole = TEXT * (1 if kind == "whole" else 100)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(whole), 10_000):
            yield whole[start : start + 10_000]

    def handler(request: Request) -> Response:
        headers: HeaderPairs = (("content-type", "text/plain"), ("etag", '"v1"'))
        if kind == "announced":
            headers = (*headers, ("content-length", str(len(whole))))
        return Response(200, headers, whole if kind in {"whole", "large"} else pieces())

    async with serving(world, chain(handler, compress()), folder) as site:
        got = await ask(site, headers=f"Accept-Encoding: {coding}\r\n")

    assert UNPACK[coding](got.body) == whole and len(got.body) < len(whole) / 2
    assert got.headers["content-encoding"] == coding and got.headers["vary"] == "accept-encoding"
    assert got.headers["etag"] == 'W/"v1"' and got.is_whole


async def test_a_streams_pieces_are_not_held_back(sim_world: SimWorld, folder: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.Event().wait()

    answer = Response(200, (("content-type", "text/plain"),), pieces())
    packed = now(chain(lambda _: answer, compress(codings=("gzip",)))(request(accept_encoding="gzip")))
    assert not isinstance(packed.body, bytes)
    stream = aiter(packed.body)

    assert zlib.decompressobj(31).decompress(await anext(stream)) == b"first"
    await stream.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("response", "has_vary"),
    [
        (Response(200, (("content-type", "text/plain"),), b"short"), False),
        (Response(200, (("content-type", "image/png"),), TEXT), False),
        (Response(200, (), TEXT), False),
        (Response(200, (("content-type", "text/plain"), ("content-encoding", "br")), TEXT), False),
        (Response(200, (("content-type", "text/plain"), ("cache-control", "no-transform")), TEXT), False),
        (Response(206, (("content-type", "text/plain"), ("content-range", "bytes 0-9/10")), TEXT), False),
        (Response(304, (("content-type", "text/plain"),)), False),
    ],
)
async def test_what_is_left_alone(response: Response, has_vary: bool) -> None:
    body = response.body
    answer = now(chain(lambda _: response, compress())(request(accept_encoding="gzip")))

    assert answer.body is body and (answer.header("vary") is not None) is has_vary


async def test_who_did_not_ask_gets_it_plain_and_a_vary() -> None:
    answer = now(chain(lambda _: Response(200, (("content-type", "application/json"),), TEXT), compress())(request()))

    assert (answer.body, answer.header("content-encoding"), answer.header("vary")) == (TEXT, None, "accept-encoding")
