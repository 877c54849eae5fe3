"""The HTTP client over time: connections, deadlines, retries, redirects, upgrades."""

import asyncio
from typing import Any

import pytest

from isopod.net.http.client import ClientLimits, HttpClient, RetryPolicy, basic_auth
from isopod.net.http.messages import HttpError
from isopod.runtime.abort import AbortSource, deadline
from isopod.world.errors import (
    Cancelled,
    DeadlineExceeded,
    Disconnected,
    Exhausted,
    ProtocolViolation,
    WrongState,
)
from isopod.world.network import ClientTls, ServerTls
from isopod.world.world import World
from tests.net.certificates import client_material, server_material
from tests.net.http.client_kit import Peer, Seen, answer, hello, open_client, pieces, scripted, unix

pytestmark = pytest.mark.row("S13")


# --- connections ------------------------------------------------------------------------------------------------------------------------


async def test_connections_are_reused_and_bounded(world: World) -> None:
    held: list[Peer] = []

    def script(peer: Peer, seen: Seen) -> None:
        held.append(peer)
        if seen.target != "/hold":
            peer.answer(200, b"ok")

    limits = ClientLimits(connections_max=2, waiting_max=3)
    async with scripted(world, script) as stage, open_client(world, limits=limits) as client:
        for _ in range(5):
            await (await client.get(stage.url())).read()
        assert (len(stage.peers), client.statistics().n_reused) == (1, 4)
        waiting = [asyncio.ensure_future(client.get(stage.url("/hold"))) for _ in range(5)]
        await stage.wait(lambda: len(held) == 7)
        assert client.statistics()[-3:] == (2, 0, 3)
        with pytest.raises(Exhausted, match="3 requests wait"):
            await client.get(stage.url())
        waiting[4].cancel()
        while not all(each.done() for each in waiting):
            for peer in held[5:]:
                peer.answer(200, b"late")
            del held[5:]
            await asyncio.sleep(0.001)
        assert len(stage.peers) <= 3  # the cancelled request may have had one of the two


async def test_idle_connections_are_reaped(world: World) -> None:
    async with (
        scripted(world, lambda peer, _: peer.answer(200, b"ok")) as stage,
        open_client(world, limits=ClientLimits(idle_s=0.1)) as client,
    ):
        await (await client.get(stage.url())).read()
        await stage.wait(lambda: all(peer.is_lost for peer in stage.peers))
        assert client.statistics()[-3:] == (0, 0, 0)


async def test_idle_connections_to_one_server_can_be_dropped(world: World) -> None:
    async with (
        scripted(world, lambda peer, _: peer.answer(200, b"ok")) as dropped,
        scripted(world, lambda peer, _: peer.answer(200, b"ok")) as kept,
        open_client(world) as client,
    ):
        for stage in (dropped, kept):
            await (await client.get(stage.url())).read()
        client.drop_idle(dropped.url())
        await dropped.wait(lambda: dropped.peers[0].is_lost)
        for stage in (dropped, kept):
            await (await client.get(stage.url())).read()
        assert (len(dropped.peers), len(kept.peers)) == (2, 1)


async def test_a_place_is_taken_from_another_hosts_idle_connection(world: World) -> None:
    limits = ClientLimits(connections_max=1)
    async with scripted(world, hello) as one, scripted(world, hello) as two, open_client(world, limits=limits) as client:
        for _ in range(3):
            for stage in (one, two):
                await (await client.get(stage.url())).read()
        assert (len(one.peers), len(two.peers)) == (3, 3)
        both = await asyncio.gather(*(client.get(stage.url()) for stage in (one, two, one, two)))
        assert [await each.read() for each in both] == [b"GET /"] * 4
        assert client.statistics().n_open <= 1


async def test_a_bound_for_each_host(world: World) -> None:
    async with scripted(world, hello) as stage, open_client(world, limits=ClientLimits(connections_per_host_max=1)) as client:
        got = await asyncio.gather(*(client.get(stage.url()) for _ in range(6)))
        assert [each.status for each in got] == [200] * 6
        assert len(stage.peers) == 1


def once_then_close(peer: Peer, seen: Seen) -> None:
    """Answer the first request of a connection, hang up on the second."""
    if len([each for each in peer.stage.seen if each.number == seen.number]) > 1:
        peer.close()
    else:
        peer.answer(200, b"fine")


async def test_a_stale_connection_is_replaced_once(world: World) -> None:
    async with scripted(world, once_then_close) as stage, open_client(world) as client:
        for _ in range(3):
            assert await (await client.get(stage.url())).read() == b"fine"
        assert (len(stage.peers), client.statistics().n_retried) == (3, 2)
        with pytest.raises(Disconnected, match="before it answered"):
            await client.post(stage.url(), b"not twice")
        assert [seen.method for seen in stage.seen].count("POST") == 1


async def test_a_fresh_connection_that_fails_is_not_tried_again(world: World) -> None:
    async with scripted(world, lambda peer, _: peer.close()) as stage, open_client(world) as client:
        with pytest.raises(Disconnected):
            await client.get(stage.url())
        assert len(stage.seen) == 1


async def test_a_connection_the_server_closes_while_idle_is_not_used(world: World) -> None:
    async with scripted(world, hello) as stage, open_client(world) as client:
        await (await client.get(stage.url())).read()
        stage.peers[0].write(answer(408))
        stage.peers[0].close()
        await stage.wait(lambda: stage.peers[0].is_lost)
        async with asyncio.timeout(5):
            while client.statistics().n_open:
                await asyncio.sleep(0.001)
        assert await (await client.post(stage.url(), b"x")).read() == b"POST / x"


async def test_a_closed_client(world: World) -> None:
    def hold(peer: Peer, seen: Seen) -> None:
        if seen.target == "/begin":
            peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")

    async with scripted(world, hold) as stage:
        client = HttpClient(world, limits=ClientLimits(connections_max=2))
        begun = await client.get(stage.url("/begin"))
        waiting = [asyncio.ensure_future(client.get(stage.url("/never"))) for _ in range(3)]
        await stage.wait(lambda: len(stage.seen) == 2)
        await client.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(each) for each in results} == {Disconnected, WrongState}
        with pytest.raises(Disconnected):
            await begun.read()
        with pytest.raises(WrongState, match="closed"):
            await client.get(stage.url())


# --- time -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.virtual_time
async def test_deadlines(world: World) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        if seen.target == "/drip":
            peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")

    async with scripted(world, script) as stage, open_client(world, limits=ClientLimits(first_byte_s=0.3)) as client:
        with pytest.raises(DeadlineExceeded, match="first byte"):
            await client.get(stage.url("/never"))
        with pytest.raises(DeadlineExceeded, match="answer"):
            await client.get(stage.url("/never"), timeout_s=0.1)
        got = await client.get(stage.url("/drip"), timeout_s=0.6)
        stream = got.stream()
        assert await anext(stream) == b"ab"
        with pytest.raises(DeadlineExceeded, match="answer"):
            await anext(stream)
        with pytest.raises(DeadlineExceeded):
            async with deadline(0.03, "outer"):
                await client.get(stage.url("/never"))
        await stage.wait(lambda: all(peer.is_lost for peer in stage.peers))


async def test_time_runs_while_waiting_for_a_connection(world: World) -> None:
    async with scripted(world, lambda *_: None) as stage, open_client(world, limits=ClientLimits(connections_max=1)) as client:
        first = asyncio.ensure_future(client.get(stage.url()))
        await stage.wait(lambda: len(stage.seen) == 1)
        with pytest.raises(DeadlineExceeded, match="waiting for a connection"):
            await client.get(stage.url(), timeout_s=0.03)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await stage.wait(lambda: stage.peers[0].is_lost)
        assert client.statistics().n_waiting == 0


async def test_an_abort_ends_head_and_body(world: World) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        if seen.target == "/begin":
            peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")

    async with scripted(world, script) as stage, open_client(world) as client:
        abort = AbortSource("test")
        for path in ("/never", "/begin"):
            abort = AbortSource("test")

            async def fetch(path: str = path, abort: AbortSource = abort) -> bytes:
                return await (await client.request("GET", stage.url(path), abort=abort)).read()

            n_seen = len(stage.seen)
            task = asyncio.ensure_future(fetch())
            await stage.wait(lambda n_seen=n_seen: len(stage.seen) > n_seen)  # type: ignore[misc]
            await asyncio.sleep(0.01)
            abort.request_abort("enough")
            with pytest.raises(Cancelled, match="enough"):
                await task
        with pytest.raises(Cancelled):
            await client.request("GET", stage.url(), abort=abort)


# --- retries and redirects --------------------------------------------------------------------------------------------------------------


async def test_retries(world: World) -> None:
    statuses = [503, 502, 200, 503, 503, 503, 503, 503, 500, 503, 200]

    def script(peer: Peer, seen: Seen) -> None:
        status = statuses.pop(0)
        peer.answer(status, b"", *(["Retry-After: 100"] if seen.target == "/later" else []))

    policy = RetryPolicy(attempts=3, backoff_s=0.01)
    async with scripted(world, script) as stage, open_client(world, retry=policy) as client:
        assert (await client.get(stage.url())).status == 200
        assert (await client.get(stage.url())).status == 503
        assert (await client.get(stage.url("/later"))).status == 503
        assert (await client.post(stage.url())).status == 503
        assert (await client.get(stage.url())).status == 500
        assert (await client.request("GET", stage.url(), retry=RetryPolicy())).status == 503
        assert client.statistics().n_retried == 4
        assert (await client.request("PUT", stage.url(), body=pieces(b"a"))).status == 200


async def test_a_retry_connects_again(sim_world: Any) -> None:
    import errno

    world = sim_world.world
    async with scripted(world, hello) as stage, open_client(world, retry=RetryPolicy(attempts=3, backoff_s=0.01)) as client:
        sim_world.network.refuse_next(errno.ECONNREFUSED, times=2)
        assert (await client.get(stage.url())).status == 200
        sim_world.network.refuse_next(errno.ECONNREFUSED, times=5)
        stage.peers[0].close()
        await stage.wait(lambda: stage.peers[0].is_lost)
        await asyncio.sleep(0.01)
        with pytest.raises(Disconnected, match="refused"):
            await client.get(stage.url())


def redirecting(peer: Peer, seen: Seen) -> None:
    """Redirect /STATUS/... to the rest."""
    _, status, *rest = seen.target.split("/")
    if status.isdecimal():
        peer.answer(int(status), b"moved", f"Location: /{'/'.join(rest)}")
    else:
        hello(peer, seen)


@pytest.mark.parametrize(
    ("status", "method", "wanted"),
    [
        (301, "GET", b"GET /x"), (302, "GET", b"GET /x"), (303, "GET", b"GET /x"), (307, "GET", b"GET /x"), (308, "GET", b"GET /x"),
        (301, "POST", b"GET /x"), (302, "POST", b"GET /x"), (303, "POST", b"GET /x"), (307, "POST", b"POST /x data"),
        (308, "POST", b"POST /x data"), (301, "PUT", b"PUT /x data"), (303, "PUT", b"GET /x"),
    ],
)  # fmt: skip
async def test_redirects_and_methods(world: World, status: int, method: str, wanted: bytes) -> None:
    async with scripted(world, redirecting) as stage, open_client(world) as client:
        got = await client.request(
            method, stage.url(f"/{status}/x"), body=b"data" if method != "GET" else b"", headers=[("content-type", "a/b")]
        )
        assert await got.read() == wanted
        assert (got.n_redirects, got.url.target) == (1, "/x")
        assert (stage.seen[1].header("content-type") is None) == (wanted == b"GET /x" and method != "GET")
        assert len(stage.peers) == 1


async def test_redirects_that_are_not_followed(world: World) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        if seen.target == "/loop":
            peer.answer(302, b"", "Location: /loop")
        elif seen.target == "/bad":
            peer.answer(302, b"", "Location: ftp://example.org/")
        elif seen.target == "/none":
            peer.answer(302, b"where")
        else:
            redirecting(peer, seen)

    async with scripted(world, script) as stage, open_client(world) as client:
        with pytest.raises(ProtocolViolation, match="more than 5 redirects"):
            await client.get(stage.url("/loop"))
        assert len(stage.seen) == 6
        with pytest.raises(ProtocolViolation, match="redirects to 'ftp://"):
            await client.get(stage.url("/bad"))
        assert (await client.get(stage.url("/none"))).status == 302
        assert (await client.request("GET", stage.url("/302/x"), follows_redirects=False)).status == 302
        assert (await client.request("PUT", stage.url("/307/x"), body=pieces(b"a"))).status == 307
        assert await (await client.request("HEAD", stage.url("/303/x"))).read() == b""
        assert stage.seen[-1].method == "HEAD"


async def test_credentials_stay_with_their_origin(world: World) -> None:
    async with scripted(world, hello) as other:

        def script(peer: Peer, seen: Seen) -> None:
            target = other.url("/there") if seen.target == "/out" else "/here"
            if seen.target == "/here":
                hello(peer, seen)
            else:
                peer.answer(302, b"", f"Location: {target}")

        secret = [basic_auth("u", "p"), ("Cookie", "c=1"), ("X-Kept", "1")]
        async with scripted(world, script) as stage, open_client(world) as client:
            assert await (await client.get(stage.url("/in"), headers=secret)).read() == b"GET /here"
            assert stage.seen[1].header("authorization") is not None
            assert await (await client.get(stage.url("/out"), headers=secret)).read() == b"GET /there"
            seen = other.seen[0]
            assert [seen.header(name) for name in ("authorization", "cookie", "x-kept")] == [None, None, "1"]


async def test_the_clients_own_credentials_stay_with_their_origin_too(world: World) -> None:
    async with scripted(world, hello) as other:

        def script(peer: Peer, seen: Seen) -> None:
            peer.answer(302, b"", f"Location: {other.url('/there')}")

        fields = [basic_auth("u", "p"), ("x-kept", "1")]
        async with scripted(world, script) as stage, open_client(world, headers=fields) as client:
            assert await (await client.get(stage.url("/out"))).read() == b"GET /there"
            assert stage.seen[0].header("authorization") is not None
            assert [other.seen[0].header(name) for name in ("authorization", "x-kept")] == [None, "1"]


async def test_a_redirect_does_not_lead_out_of_tls(world: World) -> None:
    async with scripted(world, hello) as other:

        def script(peer: Peer, seen: Seen) -> None:
            peer.answer(307, b"", f"Location: {other.url('/there')}")

        tls = ClientTls(client_material(), server_name="localhost")
        async with scripted(world, script, tls=ServerTls(server_material())) as stage, open_client(world, tls=tls) as client:
            got = await client.post(stage.url("/out"), b"secret")
            assert (got.status, await got.read(), other.seen) == (307, b"", [])


async def test_a_redirect_elsewhere_does_not_leave_a_given_address(world: World, folder: str) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        if seen.target == "/x":
            hello(peer, seen)
        else:
            peer.answer(302, b"", f"Location: {'/x' if seen.target == '/in' else 'http://elsewhere/'}")

    async with scripted(world, script, unix(folder)), open_client(world) as client:
        assert (await client.request("GET", "http://here/in", address=unix(folder))).status == 200
        assert (await client.request("GET", "http://here/out", address=unix(folder))).status == 302


# --- upgrades ---------------------------------------------------------------------------------------------------------------------------


class Lines(asyncio.Protocol):
    """What speaks after the switch."""

    def __init__(self) -> None:
        self.data = b""
        self.lost = asyncio.Event()
        self.got = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.got.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


async def test_a_raw_upgrade(world: World) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        peer.stage.reads_raw = True
        peer.write(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nX-Id: 7\r\n\r\n", b"first", b" bytes")

    async with scripted(world, script) as stage, open_client(world) as client:
        got = await client.upgrade(stage.url("/attach"), "tcp", method="POST")
        lines = Lines()
        got.transport.set_protocol(lines)
        lines.data += got.leftover
        got.transport.resume_reading()
        assert (got.response.status, got.response.headers["x-id"]) == (101, "7")
        assert client.statistics().n_open == 0
        async with asyncio.timeout(5):
            while lines.data != b"first bytes":
                lines.got.clear()
                await lines.got.wait()
            got.transport.write(b"mine")
            await stage.wait(lambda: stage.peers[0].raw.endswith(b"mine"))
            stage.peers[0].close()
            await lines.lost.wait()
        assert (stage.seen[0].header("upgrade"), stage.seen[0].header("connection")) == ("tcp", "Upgrade")


async def test_an_upgrade_that_is_refused(world: World) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        peer.answer(int(seen.target[1:]), b"no such container")

    async with scripted(world, script) as stage, open_client(world) as client:
        with pytest.raises(HttpError, match="404 Said no such container") as caught:
            await client.upgrade(stage.url("/404"), "tcp")
        assert caught.value.status == 404
        with pytest.raises(ProtocolViolation, match="answered 200"):
            await client.upgrade(stage.url("/200"), "tcp")
        with pytest.raises(DeadlineExceeded):
            stage.script = lambda *_: None
            await client.upgrade(stage.url(), "tcp", timeout_s=0.05)
