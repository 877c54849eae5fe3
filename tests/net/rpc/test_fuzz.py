"""Whatever a peer says, in whatever pieces: no exception escapes, no task and no call is left, and others are still served."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.net.rpc import RpcLimits, connect
from isopod.wire import frames as f
from isopod.wire.decoder import decode_frame
from isopod.world.errors import IsopodError
from isopod.world.network import UnixAddress
from isopod.world.sim import make_sim_world
from isopod.world.world import World
from tests.net.rpc.kit import COUNT, ECHO, HELLO, Line, Mark, RawPeer, Stage, Text, serve

FOLDER = "/fuzz"
METHODS = ["echo", "fail", "bug", "hang", "stubborn", "big", "count", "sum", "chat", "deaf", "nothing"]

ids = st.integers(0, 6)
bodies = st.one_of(
    st.builds(Text, st.text(max_size=8), st.integers(0, 50)),
    st.builds(Line, st.binary(max_size=200)),
    st.builds(Mark, st.integers(0, 9)),
    st.none() | st.integers(-5, 5) | st.lists(st.integers(0, 5), max_size=3),
)
valid_frames = st.one_of(
    st.builds(f.Request, ids, st.sampled_from(METHODS).map("test.".__add__), st.none() | st.integers(0, 50), bodies),
    st.builds(f.Reply, ids, bodies, st.integers(0, 9)),
    st.builds(f.Error, ids, st.sampled_from(["not_found", "cancelled", "zzz"]), st.text(max_size=5), st.just(""), st.integers(0, 9)),
    st.builds(f.Cancel, ids),
    st.builds(f.Item, ids, bodies),
    st.builds(f.End, ids),
    st.builds(f.Credit, ids, st.integers(1, 200)),
    st.builds(f.GoAway, ids),
    st.builds(f.Ping, ids),
    st.builds(f.Pong, ids),
    st.builds(f.Notify, st.sampled_from(METHODS).map("test.".__add__), st.none() | st.integers(0, 50), bodies),
).map(f.encode_frame)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A frame with a few bytes changed, cut off or put in."""
    data = bytearray(draw(valid_frames))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


def as_raw(call_id: int, method: str, body: bytes) -> bytes:
    """A request whose body follows it."""
    head = f.raw_head((f.REQUEST, call_id, method, 50, None), len(body))
    return f.pack_length(len(head) + len(body) | f.RAW_FLAG) + head + body


def as_zstd(frame: bytes) -> bytes:
    """A frame compressed."""
    packed = zstandard.ZstdCompressor().compress(frame[4:])
    return f.pack_length(len(packed) | f.ZSTD_FLAG) + packed


def as_json(frame: f.Frame) -> bytes:
    """A frame as a line."""
    return msgspec.json.encode(msgspec.msgpack.decode(f.encode_frame(frame)[4:])) + b"\n"  # type: ignore[arg-type]  # a frame both ways


raw_frames = st.builds(as_raw, ids, st.sampled_from(["test.blob", "test.echo", "test.pipe"]), st.binary(max_size=50))
zstd_frames = valid_frames.map(as_zstd)
json_lines = valid_frames.map(lambda frame: as_json(decode_frame(frame[4:])))
any_frame = st.one_of(valid_frames, valid_frames, valid_frames, mutated(), raw_frames, zstd_frames, st.binary(max_size=20))
pieces = st.lists(any_frame, max_size=25).map(b"".join)
FEATURES_HELLO = f.encode_hello(f.Hello((1, 1), "fuzz", "", f.FEATURES, 500))
hellos = st.one_of(st.just(HELLO), st.just(FEATURES_HELLO), st.just(FEATURES_HELLO), st.binary(max_size=12), st.just(HELLO[:-3]))
JSON_HELLO = f.encode_hello(f.Hello((1, 1), "fuzz"), "json")
lines = st.lists(st.one_of(json_lines, json_lines, st.binary(max_size=20), st.just(b"\n")), max_size=20).map(b"".join)
streams = st.one_of(st.tuples(hellos, pieces), st.tuples(hellos, pieces), st.tuples(st.just(JSON_HELLO), lines)).map(b"".join)
cuts = st.lists(st.integers(1, 40), max_size=40)


def run_simulated(body: Callable[[World], Awaitable[None]]) -> None:
    """Run a body in a simulation of its own; fail for failures nobody saw and for tasks it left."""
    sim = make_sim_world()
    unseen: list[object] = []
    sim.loop.set_exception_handler(lambda _, context: unseen.append(context))

    async def whole() -> list[str]:
        await sim.world.disk.make_directory(FOLDER)
        await body(sim.world)
        for _ in range(10):
            await asyncio.sleep(0)
        return [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    try:
        left = sim.loop.run_until_complete(whole())
    finally:
        sim.close()
    assert left == []
    assert unseen == []


async def feed(peer: RawPeer, stream: bytes, lengths: list[int]) -> None:
    """Write `stream` in pieces of those lengths (then the rest), while the other side works."""
    offset = 0
    for length in [*lengths, len(stream)]:
        if peer.is_lost:
            return
        peer.write(stream[offset : offset + length])
        offset += length
        await asyncio.sleep(0.0005)


async def check_server(stage: Stage) -> None:
    """The server serves, and when it is closed nothing is left."""
    client = await stage.connect()
    assert await client.call(ECHO, Text("still here")) == Text("still here")
    await client.close()
    async with asyncio.timeout(40):
        await stage.server.close()
    assert stage.value("isopod_rpc_calls_open") == 0
    assert stage.value("isopod_rpc_connections") == 0
    assert stage.server.gate.n_inside == 0


@settings(max_examples=100, deadline=None)
@given(stream=streams, lengths=cuts)
def test_a_server_survives_any_client(stream: bytes, lengths: list[int]) -> None:
    async def body(world: World) -> None:
        limits = RpcLimits(hello_timeout_s=0.5, in_flight_bytes_max=1500, calls_max=4)
        async with serve(world, FOLDER, limits) as stage:
            peer = RawPeer()
            await world.network.connect(stage.address, lambda: peer)
            await feed(peer, stream, lengths)
            await asyncio.sleep(0.1)
            for session in stage.server._sessions.values():
                assert 0 <= session.in_flight_bytes <= 1500 + (1 << 20)
            peer.close()
            await peer.wait_lost()
            await check_server(stage)

    run_simulated(body)


@settings(max_examples=70, deadline=None)
@given(stream=streams, lengths=cuts, encoding=st.sampled_from(["msgpack", "msgpack", "json"]))
def test_a_client_survives_any_server(stream: bytes, lengths: list[int], encoding: f.Encoding) -> None:
    async def body(world: World) -> None:
        peer = RawPeer()
        address = UnixAddress(f"{FOLDER}/evil.sock")
        listener = await world.network.listen(address, lambda: peer)
        calling = asyncio.create_task(use_client(world, address, encoding))
        await asyncio.sleep(0.01)
        await feed(peer, stream, lengths)
        async with asyncio.timeout(40):
            await calling
        await listener.close()

    run_simulated(body)


async def use_client(world: World, address: UnixAddress, encoding: f.Encoding) -> None:
    """Call a few things; only errors of the tree may come out."""
    try:
        client = await connect(world, address, timeout_s=0.3, encoding=encoding, compression=True)
    except IsopodError:
        return
    outcomes = await asyncio.gather(
        *(client.call(ECHO, Text(), timeout_s=0.2) for _ in range(3)), stream_from(client), return_exceptions=True
    )
    assert all(isinstance(outcome, Text | IsopodError) for outcome in outcomes), outcomes
    await client.close()


async def stream_from(client: object) -> Text:
    """Read a stream to its end."""
    from isopod.net.rpc import Client

    assert isinstance(client, Client)
    async with client.open(COUNT, Text(number=3), timeout_s=0.2) as call:
        async for item in call:
            assert isinstance(item, Line | Mark)
        return await call.reply()
