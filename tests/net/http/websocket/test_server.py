"""WebSocket server and our own client, on both Worlds: handshake, messages, closing, keep-alive, backpressure, limits."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.net.http.messages import HttpError
from isopod.net.http.websocket import WebSocket, WebSocketHandler, WebSocketHub, WebSocketLimits, codec, connect_websocket, websocket_route
from isopod.net.http.websocket.server import ConnectionTask
from isopod.runtime.waiters import Waiters
from isopod.world.errors import DeadlineExceeded, Disconnected, Exhausted, InvalidArgument, ProtocolViolation, WrongState
from isopod.world.sim import make_sim_world
from isopod.world.world import World
from tests.conftest import run_checked
from tests.net.http.websocket.kit import EchoHandler, Stage, echo, handshake, masked, raw_peer, serve

pytestmark = pytest.mark.row("S14")

QUIET = WebSocketLimits(ping_interval_s=None)


# --- the handshake ----------------------------------------------------------------------------------------------------------------------


async def test_the_example_of_the_rfc(world: World) -> None:
    async with serve(world, {"/": websocket_route(echo)}) as stage, raw_peer(stage) as peer:
        assert peer.status == 101
        assert b"\r\nsec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n" in peer.head.lower()
        assert b"\r\nupgrade: websocket\r\n" in peer.head.lower()


REFUSED: list[tuple[str, bytes, int]] = [
    ("POST", handshake(method="POST"), 405),
    ("HTTP/1.0", handshake(version="HTTP/1.0"), 426),
    ("no upgrade", handshake(without="upgrade"), 426),
    ("another protocol", handshake("/", "Upgrade: h2c", without="upgrade"), 426),
    ("no connection", handshake(without="connection"), 400),
    ("no key", handshake(without="sec-websocket-key"), 400),
    ("a short key", handshake("/", "Sec-WebSocket-Key: c2hvcnQ=", without="sec-websocket-key"), 400),
    ("a key that is no base64", handshake("/", "Sec-WebSocket-Key: !!!!!!!!!!!!!!!!!!!!!!==", without="sec-websocket-key"), 400),
    ("two keys", handshake("/", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="), 400),
    ("no version", handshake(without="sec-websocket-version"), 426),
    ("version 8", handshake("/", "Sec-WebSocket-Version: 8", without="sec-websocket-version"), 426),
    ("a foreign page", handshake("/", "Origin: https://evil.example"), 403),
    ("two origins", handshake("/", "Origin: http://test", "Origin: http://test"), 403),
]


@pytest.mark.parametrize(("request_bytes", "status"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
async def test_handshakes_that_are_refused(world: World, request_bytes: bytes, status: int) -> None:
    async with serve(world, {"/": websocket_route(echo)}) as stage, raw_peer(stage, request_bytes) as peer:
        assert peer.status == status
        if b"Version: 8" in request_bytes:
            assert b"\r\nsec-websocket-version: 13\r\n" in peer.head.lower()
        assert (b"\r\nupgrade: websocket\r\n" in peer.head.lower()) is (status == 426)  # RFC 9110 section 15.5.22


@pytest.mark.parametrize(
    ("origins", "origin", "status"),
    [
        (None, "http://test", 101),
        (None, "https://test", 403),
        (("https://a.example", "https://b.example"), "https://B.example", 101),
        (("https://a.example",), "http://test", 403),
        (("*",), "https://any.example", 101),
        ((), "null", 403),
        (("null",), "null", 101),
    ],
)
async def test_origins(sim_world: Any, origins: tuple[str, ...] | None, origin: str, status: int) -> None:
    route = websocket_route(echo, origins=origins)
    async with serve(sim_world.world, {"/": route}) as stage, raw_peer(stage, handshake("/", f"Origin: {origin}")) as peer:
        assert peer.status == status


async def test_subprotocols(world: World) -> None:
    async with serve(world, {"/": websocket_route(echo, subprotocols=("v2", "v1"))}) as stage:
        ws = await stage.connect(subprotocols=("v1", "v2"))
        assert ws.subprotocol == "v2"
        await ws.close()
        other = await stage.connect(subprotocols=("v9",))
        assert other.subprotocol == ""
        await other.close()


async def test_client_says_why_it_was_refused(world: World) -> None:
    async with serve(world, {"/": websocket_route(echo, origins=())}) as stage:
        with pytest.raises(HttpError, match="403 Forbidden") as caught:
            await stage.connect(headers=[("origin", "https://evil.example")])
        assert caught.value.status == 403
        with pytest.raises(HttpError, match="404"):
            await stage.connect("/nowhere")
        with pytest.raises(InvalidArgument, match="sets it itself"):
            await stage.connect(headers=[("Sec-WebSocket-Key", "x")])
        with pytest.raises(InvalidArgument, match="wss://"):
            await connect_websocket(stage.world, stage.url().replace("ws://", "http://"))


async def test_too_many_connections_are_refused(world: World) -> None:
    route = websocket_route(echo, limits=WebSocketLimits(connections_max=1))
    async with serve(world, {"/": route}) as stage:
        first = await stage.connect()
        with pytest.raises(HttpError, match="503"):
            await stage.connect()
        await first.close()
        assert route.connection_count == 0
        second = await stage.connect()
        await second.close()


# --- messages ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compresses", [False, True])
async def test_messages_come_back(world: World, compresses: bool) -> None:
    route = websocket_route(echo, compresses=compresses, limits=WebSocketLimits(message_bytes_max=1 << 20))
    async with serve(world, {"/": route}) as stage:
        ws = await stage.connect(compresses=compresses)
        assert ws.is_compressed is compresses
        messages: list[str | bytes] = ["", "text €", b"", b"\0\xff" * 70_000, "x" * (1 << 20)]
        for message in messages:
            await ws.send(message)
            assert await ws.receive() == message
        await ws.send_json({"a": [1, None]})
        assert await ws.receive() == '{"a":[1,null]}'
        await ws.close()
        assert (ws.close_code, ws.is_open) == (1000, False)


async def test_plain_calls_instead_of_a_task(world: World) -> None:
    handler = EchoHandler()
    async with serve(world, {"/": websocket_route(handler)}) as stage:
        ws = await stage.connect()
        await ws.send("a")
        await ws.send(b"b")
        assert [await ws.receive(), await ws.receive()] == ["a", b"b"]
        await ws.close(3001, "enough")
    assert handler.events == ["open", "close 3001"]


async def test_bytes_behind_the_handshake_are_not_lost(world: World) -> None:
    early = handshake() + masked(codec.TEXT, b"early")
    async with serve(world, {"/": websocket_route(echo)}) as stage, raw_peer(stage, early) as peer:
        assert await peer.wait_events(1) == ["early"]


async def test_ping_tells_the_round_trip_and_pings_are_answered(world: World) -> None:
    async with serve(world, {"/": websocket_route(echo)}) as stage:
        ws = await stage.connect()
        assert 0 < await ws.ping() < 10
        assert len(await asyncio.gather(ws.ping(), ws.ping())) == 2
        await ws.close()
        async with raw_peer(stage) as peer:
            peer.write(masked(codec.PING, b"one"))
            assert await peer.wait_events(1) == [codec.Pong(b"one")]


async def test_a_pong_to_the_latest_ping_answers_the_ones_before(world: World) -> None:
    found: list[float] = []

    async def pinging(ws: WebSocket) -> None:
        found.extend(await asyncio.gather(ws.ping(), ws.ping(), ws.ping()))
        await ws.send("done")

    async with serve(world, {"/": websocket_route(pinging)}) as stage, raw_peer(stage) as peer:
        pings = await peer.wait_events(3)
        assert isinstance(pings[2], codec.Ping)
        peer.write(masked(codec.PONG, b"unasked"), masked(codec.PONG, pings[2].payload))
        assert (await peer.wait_events(4))[3] == "done"
    assert len(found) == 3


async def test_what_cannot_be_sent(world: World) -> None:
    async with serve(world, {"/": websocket_route(echo)}) as stage:
        ws = await stage.connect()
        with pytest.raises(InvalidArgument, match="surrogate"):
            await ws.send("\ud800")
        with pytest.raises(InvalidArgument, match="neither str nor bytes"):
            await ws.send(5)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="close code"):
            await ws.close(1005 - 1)
        await ws.send("still open")
        assert await ws.receive() == "still open"
        await ws.close()


async def test_one_task_receives(world: World) -> None:
    async with serve(world, {"/": websocket_route(echo)}) as stage:
        ws = await stage.connect()
        waiting = asyncio.ensure_future(ws.receive())
        for _ in range(5):  # the simulation does not run tasks in the order they were made
            await asyncio.sleep(0)
        with pytest.raises(WrongState, match="another task"):
            await ws.receive()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await ws.send("a")
        assert await ws.receive() == "a"
        await ws.close()


# --- closing ----------------------------------------------------------------------------------------------------------------------------


async def test_the_peer_closes(world: World) -> None:
    ended: list[tuple[int, str]] = []
    changed = Waiters()

    async def until_end(ws: WebSocket) -> None:
        async for _ in ws:
            pass
        ended.append((ws.close_code, ws.close_reason))
        changed.wake()

    async with serve(world, {"/": websocket_route(until_end)}) as stage:
        ws = await stage.connect()
        await ws.close(1001, "leaving")
        async with raw_peer(stage) as peer:
            peer.write(masked(codec.CLOSE))
            assert await peer.wait_events(1) == [codec.Close(1005, "")]
            await peer.wait_lost()
        while len(ended) < 2:
            await changed.wait()
    assert ended == [(1001, "leaving"), (1005, "")]


async def test_messages_before_the_close_are_received(world: World) -> None:
    async def burst(ws: WebSocket) -> None:
        for number in range(5):
            await ws.send(str(number))

    async with serve(world, {"/": websocket_route(burst)}) as stage:
        ws = await stage.connect()
        await ws.wait_gone()
        assert [message async for message in ws] == ["0", "1", "2", "3", "4"]
        with pytest.raises(Disconnected, match="closed with 1000"):
            await ws.receive()
        with pytest.raises(Disconnected):
            await ws.send("too late")
        with pytest.raises(Disconnected):
            await ws.ping()


async def test_an_unusual_close_is_an_error_of_the_iteration(world: World) -> None:
    async def angry(ws: WebSocket) -> None:
        await ws.close(4000, "go away")

    async with serve(world, {"/": websocket_route(angry)}) as stage:
        ws = await stage.connect()
        with pytest.raises(Disconnected, match="4000 go away"):
            await anext(ws)
        assert (ws.close_code, ws.close_reason) == (4000, "go away")
        await ws.close()


async def test_a_peer_that_is_gone(world: World) -> None:
    async def vanishing(ws: WebSocket) -> None:
        ws.abort()

    async with serve(world, {"/": websocket_route(vanishing)}) as stage:
        ws = await stage.connect()
        with pytest.raises(Disconnected, match="without a closing handshake|reset"):
            await ws.receive()
        assert ws.close_code == 1006
        await ws.close()


async def test_a_peer_that_does_not_answer_our_close_is_cut(world: World) -> None:
    async def closing(ws: WebSocket) -> None:
        await ws.close()

    limits = WebSocketLimits(close_timeout_s=0.05)
    async with serve(world, {"/": websocket_route(closing, limits=limits)}) as stage, raw_peer(stage) as peer:
        assert await peer.wait_close_code() == 1000
        peer.write(masked(codec.TEXT, b"I am still talking"))
        await peer.wait_lost()


async def test_a_client_that_waits_for_a_server_which_does_not_hang_up(world: World) -> None:
    """The server's side is made deaf by never reading: the client's close has its own deadline."""
    stalled = asyncio.Event()

    async def stuck(ws: WebSocket) -> None:
        ws._transport.pause_reading()
        await stalled.wait()

    async with serve(world, {"/": websocket_route(stuck)}) as stage:
        ws = await stage.connect(limits=WebSocketLimits(close_timeout_s=0.05))
        await ws.close()
        assert ws.close_code == 1006
        stalled.set()


@pytest.mark.virtual_time
async def test_violations_close_with_their_code(world: World) -> None:
    seen: list[str] = []
    changed = Waiters()

    async def reading(ws: WebSocket) -> None:
        try:
            await ws.receive()
        except ProtocolViolation as error:
            seen.append(str(error))
        changed.wake()

    async with serve(world, {"/": websocket_route(reading, limits=WebSocketLimits(message_bytes_max=10))}) as stage:
        for data, code in ((b"\x81\x00", 1002), (masked(codec.TEXT, b"\xff"), 1007), (masked(codec.TEXT, b"x" * 11), 1009)):
            async with raw_peer(stage) as peer:
                peer.write(data + b"more that nobody reads" * 100)
                assert await peer.wait_close_code() == code
                await peer.wait(lambda peer=peer: peer.saw_eof)  # type: ignore[misc]
        while len(seen) < 3:
            await changed.wait()
    assert "not masked" in seen[0]
    assert "UTF-8" in seen[1]
    assert "11 bytes" in seen[2]


async def test_a_handler_that_fails_closes_with_1011(world: World) -> None:
    reported: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))

    async def broken(ws: WebSocket) -> None:
        raise ZeroDivisionError

    class Broken(EchoHandler):
        def on_message(self, ws: WebSocket, message: str | bytes) -> None:
            raise ZeroDivisionError

    async with serve(world, {"/": websocket_route(broken), "/plain": websocket_route(Broken())}) as stage:
        for path in ("/", "/plain"):
            ws = await stage.connect(path)
            if path == "/plain":
                await ws.send("a")
            with pytest.raises(Disconnected, match="1011"):
                await ws.receive()
            await ws.wait_gone()
    assert [type(error) for error in reported] == [ZeroDivisionError] * 2


async def test_draining_says_going_away(world: World) -> None:
    async with serve(world, {"/": websocket_route(echo)}) as stage:
        ws = await stage.connect()
        async with asyncio.timeout(40):
            await stage.server.drain(5.0)
        assert [message async for message in ws] == []
        assert (ws.close_code, ws.close_reason) == (1001, "the server is shutting down")


async def test_closing_a_route(world: World) -> None:
    route = websocket_route(echo)
    async with serve(world, {"/": route}) as stage:
        ws = await stage.connect()
        await route.close(1012, "restart")
        assert route.connection_count == 0
        await ws.wait_gone()
        assert ws.close_code == 1012
        with pytest.raises(HttpError, match="503"):
            await stage.connect()


async def test_a_handler_that_goes_on_after_the_end_is_cancelled(world: World) -> None:
    told = asyncio.Event()

    async def stubborn(ws: WebSocket) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            told.set()

    route = websocket_route(stubborn, limits=WebSocketLimits(close_timeout_s=0.05))
    async with serve(world, {"/": route}) as stage:
        ws = await stage.connect()
        await ws.close()
        async with asyncio.timeout(40):
            await told.wait()
            await route.close()


# --- keep-alive, backpressure, memory ---------------------------------------------------------------------------------------------------


async def test_a_silent_peer_is_cut_and_a_live_one_kept(world: World) -> None:
    ended: list[Exception] = []

    async def reading(ws: WebSocket) -> None:
        try:
            await ws.receive()
        except DeadlineExceeded as error:
            ended.append(error)

    limits = WebSocketLimits(ping_interval_s=0.03, ping_timeout_s=0.09)
    async with serve(world, {"/": websocket_route(reading, limits=limits)}) as stage:
        live = await stage.connect(limits=QUIET)
        async with raw_peer(stage) as peer:  # answers no ping
            await peer.wait_lost()
            assert any(isinstance(event, codec.Ping) for event in peer.events)
        assert len(ended) == 1
        assert "sign of life" in str(ended[0])
        assert live.is_open
        assert await live.ping() > 0
        await live.close()


@pytest.mark.virtual_time
async def test_a_peer_that_never_reads_is_cut(world: World) -> None:
    limits = WebSocketLimits(ping_interval_s=0.03, ping_timeout_s=0.09, write_bytes_max=1 << 10)
    ended: list[Exception] = []

    async def flooding(ws: WebSocket) -> None:
        try:
            while True:
                await ws.send(b"x" * 60_000)
        except DeadlineExceeded as error:
            ended.append(error)
            raise

    route = websocket_route(flooding, limits=limits)
    async with serve(world, {"/": route}) as stage, raw_peer(stage) as peer:
        assert peer.transport is not None
        peer.transport.pause_reading()
        async with asyncio.timeout(40):
            while not ended:
                peer.write(masked(codec.PONG))  # alive, only it does not read
                await asyncio.sleep(0.02)
        peer.transport.resume_reading()
    assert "reading what was sent" in str(ended[0])


async def test_a_slow_reader_slows_the_sender_down(world: World) -> None:
    """Neither side's memory grows: the sender waits once the buffers between them are full."""
    limits = WebSocketLimits(queued_messages_max=4, write_bytes_max=1 << 10, ping_interval_s=None)
    release = asyncio.Event()
    total: list[int] = []

    async def slow(ws: WebSocket) -> None:
        await release.wait()
        total.append(len([message async for message in ws]))

    async with serve(world, {"/": websocket_route(slow, limits=limits)}) as stage:
        ws = await stage.connect(limits=limits)
        n_sent = 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                while n_sent < 2000:
                    await ws.send(b"x" * 50_000)
                    n_sent += 1
        assert n_sent < 2000
        assert ws.n_unsent < 200_000
        with pytest.raises(Exhausted, match="bytes are unsent"):
            while True:
                ws.send_nowait(b"x" * 50_000)
        release.set()
        await ws.send("last")
        await ws.close()
    assert total
    assert total[0] > n_sent


async def test_a_flood_of_pings_is_answered_by_the_latest(world: World) -> None:
    async with serve(world, {"/": websocket_route(echo)}) as stage, raw_peer(stage) as peer:
        peer.write(*(masked(codec.PING, str(number).encode()) for number in range(20_000)))
        await peer.wait(lambda: codec.Pong(b"19999") in peer.events)
        assert len(peer.events) < 20_000


async def test_pings_without_an_answer(world: World) -> None:
    async def one(ws: WebSocket) -> None:
        with pytest.raises(DeadlineExceeded, match="pong"):
            await ws.ping()
        await ws.send("gave up")

    limits = WebSocketLimits(ping_interval_s=None, ping_timeout_s=0.05)
    async with serve(world, {"/": websocket_route(one, limits=limits)}) as stage, raw_peer(stage) as peer:
        assert (await peer.wait_events(2))[1] == "gave up"


async def test_pings_are_bounded_and_can_be_cancelled(world: World) -> None:
    async def deaf(ws: WebSocket) -> None:
        ws._transport.pause_reading()
        await ws.wait_gone()

    async with serve(world, {"/": websocket_route(deaf)}) as stage:
        ws = await stage.connect(limits=QUIET)
        pings = [asyncio.ensure_future(ws.ping()) for _ in range(64)]
        for _ in range(5):
            await asyncio.sleep(0)
        with pytest.raises(Exhausted, match="64 are unanswered"):
            await ws.ping()
        pings[0].cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        ws.abort()
        results = await asyncio.gather(*pings, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert all(isinstance(each, Disconnected) for each in results[1:])


async def test_a_broadcast_builds_one_frame_for_many(world: World) -> None:
    hub = WebSocketHub()

    async def join(ws: WebSocket) -> None:
        name = hub.add(ws)
        try:
            async for message in ws:
                hub.broadcast(f"{name}: {message!r}", besides=[name])
        finally:
            hub.discard(name)

    async with serve(world, {"/": websocket_route(join), "/z": websocket_route(join, compresses=True)}) as stage:
        first, second, third = [await stage.connect(path, compresses=path == "/z") for path in ("/", "/", "/z")]
        await first.ping()
        assert (hub.connection_count, hub.names()) == (3, ["1", "2", "3"])
        await first.send("hello")
        assert await second.receive() == await third.receive() == "1: 'hello'"
        assert hub.send_to("1", "you")
        assert await first.receive() == "you"
        assert not hub.send_to("9", "nobody")
        assert hub.broadcast_json({"n": 1}) == 3
        assert [await each.receive() for each in (first, second, third)] == ['{"n":1}'] * 3
        for each in (first, second, third):
            await each.close()
        async with asyncio.timeout(40):
            while hub.connection_count:
                await asyncio.sleep(0.001)
        assert hub.broadcast("nobody") == 0


@pytest.mark.parametrize("policy", ["drop", "skip"])
async def test_a_slow_consumer_costs_the_others_nothing(world: World, policy: Any) -> None:
    hub = WebSocketHub(slow_consumer=policy, unsent_bytes_max=200_000)

    async def join(ws: WebSocket) -> None:
        name = hub.add(ws)
        try:
            await ws.wait_gone()
        finally:
            hub.discard(name)

    route = websocket_route(join, limits=WebSocketLimits(ping_interval_s=None, close_timeout_s=0.2))
    async with serve(world, {"/": route}) as stage, raw_peer(stage) as slow:
        assert slow.transport is not None
        slow.transport.pause_reading()
        quick = await stage.connect(limits=QUIET)
        await quick.ping()
        n_broadcast = 0
        while not (hub.n_dropped if policy == "drop" else hub.n_skipped):
            n_broadcast += 1
            assert n_broadcast < 1000
            hub.broadcast(b"x" * 50_000)
            assert await quick.receive() == b"x" * 50_000
        if policy == "drop":
            assert hub.connection_count == 1
            async with asyncio.timeout(40):
                while route.connection_count > 1:  # a peer that does not read does not hinder its own end
                    await asyncio.sleep(0.01)
        else:
            assert hub.broadcast(b"y" * 50_000) == 1
            slow.transport.resume_reading()
            await slow.wait(lambda: len(slow.events) >= n_broadcast - 1)
            assert hub.broadcast("all again") == 2
            await slow.wait(lambda: slow.events[-1] == "all again")
        await quick.close()


async def test_plain_calls_are_not_asked_for_more_than_the_peer_reads(world: World) -> None:
    """An echo without a task: what the peer does not read stops the reading of what it sends."""
    route = websocket_route(EchoHandler(), limits=WebSocketLimits(ping_interval_s=None))
    async with serve(world, {"/": route}) as stage, raw_peer(stage) as peer:
        assert peer.transport is not None
        peer.transport.pause_reading()
        message = masked(codec.BINARY, b"x" * 50_000)
        n_sent = 0
        while peer.transport.get_write_buffer_size() < 1_000_000:
            assert n_sent < 1000, "somebody takes all of it"
            peer.write(message)
            n_sent += 1
            await asyncio.sleep(0.001)
        peer.transport.resume_reading()
        await peer.wait(lambda: len(peer.events) >= n_sent)
        assert peer.events == [b"x" * 50_000] * n_sent


async def test_plain_calls_that_say_more_than_the_peer_reads(world: World) -> None:
    class Chatterbox(EchoHandler):
        def on_message(self, ws: WebSocket, message: str | bytes) -> None:
            while True:
                ws.send_nowait(b"x" * 100_000)

    handler = Chatterbox()
    route = websocket_route(handler, limits=WebSocketLimits(ping_interval_s=None, close_timeout_s=0.2))
    async with serve(world, {"/": route}) as stage, raw_peer(stage) as peer:
        peer.write(masked(codec.TEXT, b"go on"))
        assert await peer.wait_close_code() == 1013
        await peer.wait_lost()


# --- whatever happens -------------------------------------------------------------------------------------------------------------------

ACTIONS = ["text", "half", "bad", "ping", "close", "cut", "wait", "eof", "drain"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(ACTIONS), max_size=5), min_size=1, max_size=4), st.sampled_from(["task", "calls", "brief"]))
def test_nothing_is_left_of_connections_whatever_their_peers_do(peers: list[list[str]], kind: str) -> None:
    async def brief(ws: WebSocket) -> None:
        await ws.send(await ws.receive())

    limits = WebSocketLimits(ping_interval_s=0.5, ping_timeout_s=1.0, close_timeout_s=0.2, message_bytes_max=100)
    handlers: dict[str, ConnectionTask | WebSocketHandler] = {"task": echo, "calls": EchoHandler(), "brief": brief}
    route = websocket_route(handlers[kind], limits=limits)
    data = {
        "text": masked(codec.TEXT, b"hi"),
        "half": b"\x81",
        "bad": b"\xff\xff",
        "ping": masked(codec.PING),
        "close": masked(codec.CLOSE),
    }

    async def play(stage: Stage, actions: list[str]) -> None:
        async with raw_peer(stage) as peer:
            assert peer.transport is not None
            for action in actions:
                if action in data:
                    peer.write(data[action])
                elif action == "cut":
                    peer.transport.abort()
                elif action == "eof":
                    peer.transport.write_eof()
                elif action == "drain":
                    route_drains.append(asyncio.ensure_future(stage.server.drain(1.0)))
                else:
                    await asyncio.sleep(0.3)
                if peer.transport.is_closing() or action == "eof":
                    return

    route_drains: list[asyncio.Future[None]] = []

    async def body(world: World) -> None:
        async with serve(world, {"/": route}) as stage:
            await asyncio.gather(*(play(stage, actions) for actions in peers), return_exceptions=True)
            await asyncio.gather(*route_drains)
            async with asyncio.timeout(40):
                await route.close()
            assert route.connection_count == 0

    sim = make_sim_world()
    try:
        run_checked(sim.loop, body(sim.world), limit_s=None)
    finally:
        sim.close()
