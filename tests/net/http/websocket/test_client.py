"""What a WebSocket client refuses of a server's answer, and what it says in its own handshake."""

from typing import Any

import pytest

from isopod.net.http.headers import Headers
from isopod.net.http.websocket import WebSocketLimits, codec, connect_websocket
from isopod.net.http.websocket.handshake import accept_token, check_answer, client_headers
from isopod.world.errors import DeadlineExceeded, Disconnected, ProtocolViolation
from isopod.world.world import World
from tests.net.http.client_kit import Peer, Seen, scripted, unix

pytestmark = pytest.mark.row("S14")

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
SOUND = {"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="}


def check(**changes: str) -> Any:
    """Check an answer that differs from a sound one."""
    fields = {**SOUND, **{name.replace("_", "-"): value for name, value in changes.items()}}
    headers = Headers((name, value) for name, value in fields.items() if value)
    return check_answer(headers, KEY, subprotocols=("v1", "v2"), offered_deflate=True, peer="test")


def test_a_sound_answer() -> None:
    assert accept_token(KEY) == SOUND["sec-websocket-accept"]
    assert check() == ("", None, ())
    assert check(upgrade="WebSocket", connection="keep-alive, UPGRADE").subprotocol == ""
    assert check(sec_websocket_protocol="v2").subprotocol == "v2"
    assert check(sec_websocket_extensions="permessage-deflate; server_no_context_takeover").deflate.server_no_context_takeover


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"upgrade": "h2c"}, "does not switch"),
        ({"connection": "close"}, "does not switch"),
        ({"sec_websocket_accept": ""}, "not the answer to our key"),
        ({"sec_websocket_accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOO="}, "not the answer to our key"),
        ({"sec_websocket_protocol": "v3"}, "not offered"),
        ({"sec_websocket_extensions": "x-other"}, "not offered"),
        ({"sec_websocket_extensions": "permessage-deflate; server_max_window_bits=99"}, "not offered"),
    ],
)
def test_answers_that_are_refused(changes: dict[str, str], why: str) -> None:
    with pytest.raises(ProtocolViolation, match=why):
        check(**changes)


def test_what_the_handshake_says() -> None:
    assert dict(client_headers(KEY, subprotocols=(), offers_deflate=False)) == {
        "upgrade": "websocket", "connection": "Upgrade", "sec-websocket-key": KEY, "sec-websocket-version": "13",
    }  # fmt: skip
    pairs = dict(client_headers(KEY, subprotocols=("a", "b"), offers_deflate=True))
    assert pairs["sec-websocket-protocol"] == "a, b"
    assert pairs["sec-websocket-extensions"] == "permessage-deflate; client_max_window_bits"


def switch(peer: Peer, seen: Seen) -> bytes:
    """Return a sound answer to a handshake; what follows is not HTTP."""
    peer.stage.reads_raw = True
    token = accept_token(seen.header("sec-websocket-key") or "")
    return f"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {token}\r\n\r\n".encode()


async def test_a_wrong_accept_ends_the_connection(world: World) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        peer.write(switch(peer, seen).replace(b"Accept: ", b"Accept: x"))

    async with scripted(world, script) as stage:
        with pytest.raises(ProtocolViolation, match="not the answer to our key"):
            await connect_websocket(world, stage.url().replace("http", "ws"))
        await stage.wait(lambda: stage.peers[0].is_lost)


async def test_messages_right_behind_the_answer(world: World, folder: str) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        peer.write(switch(peer, seen), codec.encode_frame(codec.TEXT, b"first"), codec.encode_close(4000, "and last"))
        peer.close()

    async with scripted(world, script, unix(folder)) as stage:
        ws = await connect_websocket(world, "ws://docker/events", address=unix(folder), headers=[("x-mine", "1")])
        assert await ws.receive() == "first"
        with pytest.raises(Disconnected, match="4000 and last"):
            await ws.receive()
        await ws.wait_gone()
        assert (stage.seen[0].target, stage.seen[0].header("host"), stage.seen[0].header("x-mine")) == ("/events", "docker", "1")


async def test_a_server_that_masks_is_told_so(world: World) -> None:
    def script(peer: Peer, seen: Seen) -> None:
        peer.write(switch(peer, seen), codec.encode_frame(codec.TEXT, b"masked", key=b"abcd"))

    async with scripted(world, script) as stage:
        ws = await connect_websocket(world, stage.url().replace("http", "ws"), limits=WebSocketLimits(close_timeout_s=0.1))
        with pytest.raises(ProtocolViolation, match="masks its frames"):
            await ws.receive()
        decoder = codec.Decoder(expects_mask=True, message_bytes_max=100)
        await stage.wait(lambda: b"\x88" in stage.peers[0].raw.partition(b"\r\n\r\n")[2])
        closing = decoder.feed(stage.peers[0].raw.partition(b"\r\n\r\n")[2])
        assert closing == [codec.Close(1002, "a server masks its frames")]
        await ws.wait_gone()


async def test_a_server_that_never_answers(world: World) -> None:
    async with scripted(world, lambda *_: None) as stage:
        with pytest.raises(DeadlineExceeded):
            await connect_websocket(world, stage.url().replace("http", "ws"), timeout_s=0.05)
    with pytest.raises(Disconnected, match="cannot connect"):
        await connect_websocket(world, "ws://127.0.0.1:1/")
