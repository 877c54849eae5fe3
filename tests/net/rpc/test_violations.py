"""Peers that break the protocol, or try to. One body on both Worlds."""

import asyncio

import msgspec
import pytest

from isopod.net.rpc import Client, RpcLimits, connect
from isopod.net.rpc.streams import WINDOW_BYTES
from isopod.wire import frames as f
from isopod.world import errors
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.net.rpc.kit import ECHO, HELLO, Line, Mark, RawPeer, Text, raw_peer, serve, wait_until

OVERSIZED = ((1 << 20) + 1).to_bytes(4, "little")

VIOLATIONS: dict[str, tuple[bytes | f.OutFrame, ...]] = {
    "another protocol": (b"GET / HTTP/1.1\r\n\r\n",),
    "huge hello": (b"ISO1" + (1 << 20).to_bytes(4, "little"),),
    "hello is no map": (b"ISO1" + (1).to_bytes(4, "little") + b"\x01",),
    "lowest above highest": (f.encode_hello(f.Hello((2, 1), "x")),),
    "huge frame": (HELLO, OVERSIZED),
    "not msgpack": (HELLO, (1).to_bytes(4, "little") + b"\xc1"),
    "unknown kind": (HELLO, (3).to_bytes(4, "little") + b"\x92\x63\x01"),
    "wrong types": (HELLO, (3).to_bytes(4, "little") + b"\x92\x03\xa0"),
    "trailing bytes": (HELLO, (4).to_bytes(4, "little") + b"\x92\x05\x01\x01"),
    "deep nesting": (HELLO, (100_000).to_bytes(4, "little") + b"\x91" * 100_000),
    "id 0": (HELLO, f.Request(0, "test.echo", None, Text())),
    "id again": (HELLO, f.Request(1, "test.hang", None, Text()), f.Request(1, "test.echo", None, Text())),
    "falling id": (HELLO, f.Request(5, "test.hang", None, Text()), f.Request(4, "test.echo", None, Text())),
    "items nobody takes": (HELLO, f.Request(1, "test.hang", None, Text()), f.Item(1, Mark(1))),
    "item of another type": (HELLO, f.Request(1, "test.sum", None, Text()), f.Item(1, Text())),
    "item after the end": (HELLO, f.Request(1, "test.deaf", None, Text()), f.End(1), f.Item(1, Mark(1))),
    "credit for nothing": (HELLO, f.Request(1, "test.chat", None, Text()), f.Credit(1, 5)),
    "goaway from a client": (HELLO, f.GoAway(1)),
    "items without credit": (
        HELLO,
        f.Request(1, "test.deaf", None, Text()),
        *(f.Item(1, Line(bytes(WINDOW_BYTES // 2))) for _ in range(3)),
    ),
}


@pytest.mark.parametrize("name", list(VIOLATIONS))
async def test_a_violation_is_told_logged_and_ends_the_connection(world: World, folder: str, name: str) -> None:
    async with serve(world, folder) as stage, raw_peer(stage, *VIOLATIONS[name]) as peer:
        await peer.wait(lambda: any(isinstance(frame, f.Error) and frame.id == 0 for frame in peer.frames) or peer.is_lost)
        error = next(frame for frame in peer.frames if isinstance(frame, f.Error) and frame.id == 0)
        assert error.code == "protocol_violation"
        assert "Traceback" not in error.message
        await peer.wait_lost()
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 0)
        assert stage.value("isopod_rpc_calls_open") == 0
        assert stage.value("isopod_rpc_protocol_violations_total") == 1
        assert len(stage.logged("rpc.violation")) == 1
        client = await stage.connect()
        assert await client.call(ECHO, Text("others go on")) == Text("others go on")
        await client.close()


async def test_a_silent_peer_is_dropped(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(hello_timeout_s=0.05)) as stage, raw_peer(stage) as peer:
        await peer.wait_lost()
        assert isinstance(peer.frames[0], f.Error)
        assert "no hello within 0.05 s" in peer.frames[0].message


@pytest.mark.virtual_time
async def test_a_peer_that_introduced_itself_may_be_silent(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(hello_timeout_s=0.05)) as stage, raw_peer(stage, HELLO) as peer:
        await asyncio.sleep(0.2)
        peer.write(f.Ping(7))
        assert await peer.wait_frames(1) == [f.Pong(7)]


async def test_bytes_may_come_one_by_one(world: World, folder: str) -> None:
    async with serve(world, folder) as stage, raw_peer(stage) as peer:
        stream = HELLO + f.encode_frame(f.Request(1, "test.echo", 5000, Text("slowly", 1))) + f.encode_frame(f.Ping(9))
        for byte in stream:
            peer.write(bytes((byte,)))
            await asyncio.sleep(0)
        frames = await peer.wait_frames(2)
        assert f.Pong(9) in frames
        assert any(isinstance(frame, f.Reply) and bytes(frame.body) == b"\x82\xa4text\xa6slowly\xa6number\x01" for frame in frames)


async def test_frames_for_calls_that_are_over_are_dropped(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        stray = (f.Item(9, Mark(1)), f.End(9), f.Credit(9, 5), f.Cancel(9), f.Reply(9, None, 0), f.Error(9, "x", "", "", 1), f.Pong(3))
        async with raw_peer(stage, HELLO, *stray, f.Request(1, "test.echo", None, Text("ok"))) as peer:
            (reply,) = await peer.wait_frames(1)
            assert isinstance(reply, f.Reply)


async def test_no_common_version_is_told_to_the_client(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        unreadable = f.encode_hello(f.Hello((2, 3), "from-the-future")) + (2).to_bytes(4, "little") + b"\x91\x7f"
        async with raw_peer(stage, unreadable) as peer:
            (error,) = await peer.wait_frames(1)
            assert isinstance(error, f.Error)
            assert (error.id, error.code) == (0, "version_mismatch")
            assert "speaks protocol 2-3, we speak 1-1" in error.message
            await peer.wait_lost()


class FakeServer(RawPeer):
    """A server that says what a test wants."""

    def __init__(self, *first: bytes | f.OutFrame) -> None:
        super().__init__()
        self.first = first

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.write(*self.first)


async def test_no_common_version_is_noticed_by_the_client(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/future.sock")
    listener = await world.network.listen(address, lambda: FakeServer(f.encode_hello(f.Hello((7, 9), "future"))))
    with pytest.raises(errors.VersionMismatch, match="future speaks protocol 7-9"):
        await connect(world, address)
    await listener.close()


async def test_a_server_without_hello_is_given_up(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/mute.sock")
    server = FakeServer(b"")
    listener = await world.network.listen(address, lambda: server)
    with pytest.raises(errors.DeadlineExceeded, match=r"connecting to .*mute.sock took longer than 0.05 s"):
        await connect(world, address, timeout_s=0.05)
    await server.wait_lost()
    await listener.close()


@pytest.mark.parametrize(
    "answer",
    [
        (b"\xff\xff\xff\xff",),
        (f.Request(1, "test.echo", None, None),),
        (f.Cancel(1),),
        (f.Item(1, Mark(1)),),
    ],
    ids=["huge frame", "request", "cancel", "items nobody takes"],
)
async def test_a_server_that_breaks_the_protocol_fails_the_calls(world: World, folder: str, answer: tuple[bytes | f.OutFrame, ...]) -> None:
    address = UnixAddress(f"{folder}/broken.sock")
    server = FakeServer(f.encode_hello(f.Hello((1, 1), "broken")))
    listener = await world.network.listen(address, lambda: server)
    client = await connect(world, address)
    call = asyncio.create_task(client.call(ECHO, Text()))
    await server.wait(lambda: bool(server.frames))
    server.write(*answer)
    with pytest.raises(errors.ProtocolViolation, match="broken broke the protocol"):
        await call
    await client.close()
    await server.wait_lost()
    await listener.close()


async def begun(client: Client, server: FakeServer, number: int) -> "asyncio.Task[Text]":
    """Begin a call that is the peer's frame of that number: tasks begin in any order."""
    task = asyncio.create_task(client.call(ECHO, Text()))
    await server.wait(lambda: len(server.frames) == number)
    return task


async def test_a_reply_of_another_type_fails_its_call_only(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/odd.sock")
    server = FakeServer(f.encode_hello(f.Hello((1, 1), "odd")))
    listener = await world.network.listen(address, lambda: server)
    client = await connect(world, address)
    calls = [await begun(client, server, number) for number in (1, 2)]
    server.write(f.Reply(1, {"number": "x"}, 0), f.Reply(2, Text("fine"), 0), f.Reply(2, Text("twice"), 0))
    with pytest.raises(errors.ProtocolViolation, match=r"reply of test\.echo"):
        await calls[0]
    assert await calls[1] == Text("fine")
    await client.close()
    await server.wait_lost()
    await listener.close()


async def test_goaway_fails_what_was_not_taken(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/going.sock")
    server = FakeServer(f.encode_hello(f.Hello((1, 1), "going")))
    listener = await world.network.listen(address, lambda: server)
    client = await connect(world, address)
    calls = [await begun(client, server, number) for number in (1, 2)]
    server.write(f.GoAway(1))
    with pytest.raises(errors.Disconnected, match="shutting down"):
        await calls[1]
    server.write(f.Reply(1, Text("taken"), 0))
    assert await calls[0] == Text("taken")
    await client.close()
    await server.wait_lost()
    await listener.close()


async def test_an_item_over_the_bytes_in_flight_ends_its_call_only(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(in_flight_bytes_max=100_000)) as stage:
        frames: tuple[f.OutFrame, ...] = (f.Request(1, "test.deaf", None, Text()), *(f.Item(1, Line(bytes(60_000))) for _ in range(2)))
        async with raw_peer(stage, HELLO, *frames, f.Request(2, "test.echo", None, Text("next"))) as peer:
            await peer.wait_frames(2)
            codes = {frame.id: getattr(frame, "code", "ok") for frame in peer.frames if isinstance(frame, f.Error | f.Reply)}
            assert codes == {1: "exhausted", 2: "ok"}
            await stage.wait_calls_open(0)


@pytest.mark.virtual_time
async def test_a_deadline_of_the_client_withdraws_the_call(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/slow.sock")
    server = FakeServer(f.encode_hello(f.Hello((1, 1), "slow")))
    listener = await world.network.listen(address, lambda: server)
    client = await connect(world, address)
    with pytest.raises(errors.DeadlineExceeded):
        await client.call(ECHO, Text(), timeout_s=0.02)
    frames = await server.wait_frames(2)
    assert isinstance(frames[0], f.Request)
    assert frames[0].deadline_ms == 20
    assert frames[1] == f.Cancel(1)
    await client.close()
    await server.wait_lost()
    await listener.close()


async def test_a_server_that_does_not_read_does_not_grow_the_client(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/stuck.sock")
    server = FakeServer(f.encode_hello(f.Hello((1, 1), "stuck")))
    listener = await world.network.listen(address, lambda: server)
    client = await connect(world, address, limits=RpcLimits(write_high_water_bytes=100_000))
    assert server.transport is not None
    server.transport.pause_reading()
    for _ in range(40):
        with pytest.raises(errors.DeadlineExceeded):
            await client.call(ECHO, Text("x" * 100_000), timeout_s=0.005)
    assert client.connection._transport is not None
    assert client.connection._transport.get_write_buffer_size() < 500_000
    calling = asyncio.create_task(client.call(ECHO, Text("at last"), timeout_s=None))
    await asyncio.sleep(0.01)
    assert client.connection.is_write_paused
    server.transport.resume_reading()
    await server.wait(lambda: any(isinstance(frame, f.Request) and b"at last" in bytes(frame.body) for frame in server.frames))
    await client.close()
    with pytest.raises(errors.Disconnected):
        await calling
    await server.wait_lost()
    await listener.close()


async def test_text_that_is_no_text(world: World, folder: str) -> None:
    """Bodies are looked into only by their method's decoder: what is wrong inside must not get past it."""
    bad_text = msgspec.Raw(b"\x81\xa4text\xa2\xff\xfe")
    bad_item = msgspec.Raw(b"\x81\xa4type\xa2\xff\xfe")
    async with serve(world, folder) as stage, raw_peer(stage, HELLO, f.Request(1, "test.echo", None, bad_text)) as peer:
        (error,) = await peer.wait_frames(1)
        assert isinstance(error, f.Error)
        assert (error.id, error.code) == (1, "invalid_argument")
        peer.write(f.Request(2, "test.deaf", None, Text()), f.Item(2, bad_item))
        await peer.wait(lambda: getattr(peer.frames[-1], "code", "") == "protocol_violation")
