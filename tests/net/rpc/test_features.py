"""What the hellos agree on: encodings, raw bodies, compression, groups, heartbeats, reflection; and notices. One body on both Worlds."""

import asyncio
from functools import partial
from typing import Any

import msgspec
import pytest

from isopod.net.rpc import REFLECT, Reflection, ReflectRequest, RpcLimits
from isopod.net.rpc.connection import RAW_BYTES_MIN
from isopod.runtime.scheduling import SchedulingGroup
from isopod.wire import frames as f
from isopod.wire.service import Method
from isopod.world import errors
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.net.rpc.kit import (
    BIG,
    BLOB,
    CHAT,
    COUNT,
    ECHO,
    FAIL,
    HANG,
    HELLO,
    METHODS,
    NOTE,
    PIPE,
    PLAIN,
    WHO,
    Mark,
    RawPeer,
    Stage,
    Text,
    raw_peer,
    serve,
    wait_until,
)

pytestmark = pytest.mark.row("S17")


async def test_json_and_msgpack_clients_side_by_side(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        packed, typed = await stage.connect(), await stage.connect(encoding="json")
        for client in (packed, typed):
            assert await client.call(ECHO, Text("ä\n", 7)) == Text("ä\n", 7)
            assert await client.call(PLAIN, Text("p")) == Text("p")
            assert await client.call(BLOB, bytes(range(256)) * 100) == (bytes(range(256)) * 100)[::-1]
            with pytest.raises(errors.NotFound, match="no such container: web"):
                await client.call(FAIL, Text("web"))
            with pytest.raises(errors.Exhausted, match="over 1048576"):
                await client.call(BIG, Text(number=2 << 20))
            with pytest.raises(errors.InvalidArgument, match="field 'number'"):
                await client.call(Method("test.echo", dict, Text), {"number": "x"})
        async with packed.open(CHAT, Text()) as one, typed.open(CHAT, Text()) as other:
            for number in range(50):
                await one.send(Mark(number))
                await other.send(Mark(number))
                assert await one.receive() == await other.receive() == Mark(number)
        async with typed.open(COUNT, Text("x" * 60_000, 60)) as call:
            assert len([item async for item in call]) == 60
        for client in (packed, typed):
            await client.close()


async def test_a_person_can_talk_json(world: World, folder: str) -> None:
    """What `socat - UNIX-CONNECT:...` shows for two typed lines."""
    async with serve(world, folder) as stage:
        person = Typist()
        await world.network.connect(stage.address, lambda: person)
        person.type('{"versions":[1,1]}')
        person.type('[0,1,"test.echo",null,{"text":"hello"}]')
        person.type('[0,2,"test.nothing",null,{}]')
        hello, *answers = [msgspec.json.decode(line) for line in await person.wait_lines(3)]
        reply, error = sorted(answers, key=lambda answer: answer[1])
        assert hello["peer"] == "test-server"
        assert reply[:3] == [1, 1, {"text": "hello", "number": 0}]
        assert error[:3] == [2, 2, "method_not_found"]
        person.type("what?")
        assert msgspec.json.decode((await person.wait_lines(4))[3])[:3] == [2, 0, "protocol_violation"]
        await person.wait_lost()
        other = Typist()
        await world.network.connect(stage.address, lambda: other)
        other.type("{}")
        assert [msgspec.json.decode(line) for line in await other.wait_lines(2)][1][:3] == [2, 0, "protocol_violation"]
        await other.wait_lost()


class Typist(RawPeer):
    """Writes and reads lines."""

    def __init__(self) -> None:
        super().__init__()
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.changed.wake()

    def type(self, line: str) -> None:
        self.write(line.encode() + b"\n")

    async def wait_lines(self, number: int) -> list[bytes]:
        await self.wait(lambda: self.received.count(b"\n") >= number)
        return self.received.splitlines()


async def test_unknown_features_and_keys_are_ignored(world: World, folder: str) -> None:
    hello = {"versions": [1, 1], "peer": "new", "features": ["raw", "telepathy"], "later": {"a": [1]}}
    packed = msgspec.msgpack.encode(hello)
    async with serve(world, folder) as stage:
        first = f.MAGIC + f.pack_length(len(packed)) + packed
        async with raw_peer(stage, first, f.Request(1, "test.echo", None, Text("ok"))) as peer:
            (reply,) = await peer.wait_frames(1)
            assert isinstance(reply, f.Reply)
            (session,) = stage.server._sessions.values()
            assert session.connection.features == ("raw",)
            assert peer.decoder.hello is not None
            assert set(f.FEATURES) <= set(peer.decoder.hello.features)


async def test_the_server_waits_for_the_clients_hello(world: World, folder: str) -> None:
    async with serve(world, folder) as stage, raw_peer(stage) as peer:
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 1)
        await asyncio.sleep(0.01)
        assert peer.n_received == 0
        peer.write(HELLO)
        await peer.wait(lambda: peer.decoder.hello is not None)


async def test_a_client_notices_a_server_of_another_encoding(world: World, folder: str) -> None:
    from tests.net.rpc.test_violations import FakeServer

    address = UnixAddress(f"{folder}/other.sock")
    listener = await world.network.listen(address, lambda: FakeServer(f.encode_hello(f.Hello((1, 1), "other"))))
    from isopod.net.rpc import connect

    with pytest.raises(errors.ProtocolViolation, match="answers json in msgpack"):
        await connect(world, address, encoding="json")
    await listener.close()


# --- bulk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, RAW_BYTES_MIN - 1, RAW_BYTES_MIN, 300_000, (1 << 20) - 100])
@pytest.mark.parametrize("compression", [False, True])
async def test_bytes_pass_as_they_are(world: World, folder: str, size: int, compression: bool) -> None:
    data = world.random.stream("bulk").randbytes(size)
    async with serve(world, folder) as stage:
        client = await stage.connect(compression=compression)
        assert await client.call(BLOB, data) == data[::-1]
        async with client.open(PIPE, Text()) as call:
            for _ in range(3):
                await call.send(data)
                assert await call.receive() == data
            call.end()
            assert await call.reply() == Text("piped", 3 * size)
        with pytest.raises(errors.InvalidArgument, match="over 1048576"):
            await client.call(BLOB, bytes(1 << 20))
        await client.close()


async def test_ten_windows_of_bytes_pass(world: World, folder: str) -> None:
    piece = bytes(256 << 10)
    async with serve(world, folder) as stage:
        client = await stage.connect()
        async with client.open(PIPE, Text()) as call:

            async def send() -> None:
                for _ in range(40):
                    await call.send(piece)
                call.end()

            sending = asyncio.create_task(send())
            assert sum([len(item) async for item in call]) == 40 * len(piece)
            await sending
        await client.close()


async def test_a_raw_body_for_who_takes_none_is_refused(world: World, folder: str) -> None:
    hello = f.encode_hello(f.Hello((1, 1), "raw", "", ("raw",)))

    def raw(*head: object) -> bytes:
        packed = f.raw_head((*head, None), 1)
        return f.pack_length(len(packed) + 1 | f.RAW_FLAG) + packed + b"\x80"

    async with serve(world, folder) as stage:
        async with raw_peer(stage, hello, raw(0, 1, "test.echo", None), raw(0, 2, "test.nothing", None)) as peer:
            first, second = await peer.wait_frames(2)
            assert [getattr(frame, "code", "") for frame in (first, second)] == ["invalid_argument", "method_not_found"]
            peer.write(raw(10, "test.note", None), f.Request(3, "test.sum", None, Text()), raw(4, 3))
            await peer.wait(lambda: getattr(peer.frames[-1], "code", "") == "protocol_violation")
        assert stage.service.events == []


async def test_large_frames_are_compressed_only_where_asked_and_only_if_it_helps(world: World, folder: str) -> None:
    from isopod.net.rpc import connect

    async with serve(world, folder) as stage:
        sizes = {}
        for compression in (False, True):
            relay = Relay(world, stage.address)
            address = UnixAddress(f"{folder}/relay.sock")
            listener = await world.network.listen(address, partial(Proxy, relay))
            client = await connect(world, address, compression=compression)
            assert len((await client.call(BIG, Text(number=900_000))).text) == 900_000
            sizes[compression] = relay.n_bytes
            await client.close()
            await wait_until(lambda: stage.value("isopod_rpc_connections") == 0)
            await listener.close()
        assert sizes[False] > 900_000
        assert sizes[True] < 20_000


async def test_compressed_items_cannot_get_past_the_window(world: World, folder: str) -> None:
    """Ten megabytes in ten kilobytes: the window counts what comes out, so the third megabyte is one without credit."""
    import zstandard

    hello = f.encode_hello(f.Hello((1, 1), "bomber", "", ("zstd",)))
    item = zstandard.ZstdCompressor().compress(f.encode_frame(f.Item(1, {"type": "line", "data": bytes((1 << 20) - 100)}))[4:])
    bomb = f.pack_length(len(item) | f.ZSTD_FLAG) + item
    async with serve(world, folder) as stage, raw_peer(stage, hello, f.Request(1, "test.deaf", None, Text()), *[bomb] * 10) as peer:
        await peer.wait(lambda: getattr(peer.frames[-1] if peer.frames else None, "code", "") == "protocol_violation")
        assert "without credit" in getattr(peer.frames[-1], "message", "")


# --- notices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
async def test_a_notice_is_served_and_never_answered(world: World, folder: str, encoding: f.Encoding) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect(encoding=encoding)
        for number in range(5):
            await client.notify(NOTE, Text(str(number)))
        await client.notify(FAIL, Text())
        await client.notify(BLOB, bytes(100_000))
        await stage.service.wait_event("noted 4 True")
        assert [event for event in stage.service.events if event.startswith("noted")] == [f"noted {n} True" for n in range(5)]
        assert await client.call(ECHO, Text("fine")) == Text("fine")
        assert not client._waiting
        assert not client._open
        await stage.wait_calls_open(0)
        assert stage.value("isopod_rpc_calls_total", method="test.note", outcome="ok") == 5
        assert stage.value("isopod_rpc_calls_total", method="test.fail", outcome="error") == 1
        await client.close()


@pytest.mark.virtual_time
async def test_a_notice_has_a_deadline_there(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        await client.notify(HANG, Text("n"), timeout_s=0.05)
        await stage.service.wait_event("hang ends n")
        await stage.wait_calls_open(0)
        await client.close()


async def test_notices_that_cannot_be_served_are_counted(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(calls_max=1)) as stage:
        client = await stage.connect()
        with pytest.raises(errors.Unsupported, match="streams"):
            await client.notify(CHAT, Text())
        await client.notify(Method("test.nothing", Text, Text), Text())
        await client.notify(Method("test.chat", Text, Text), Text())
        await client.notify(HANG, Text("first"))
        await stage.wait_calls_open(1)
        await client.notify(HANG, Text("second"))
        await wait_until(lambda: stage.value("isopod_rpc_dropped_notices_total") == 3)
        assert "hang begins second" not in stage.service.events
        await client.notify(Method("test.echo", dict, Text), {"number": "x"})
        await client.close()
        with pytest.raises(errors.Disconnected):
            await client.notify(NOTE, Text())


async def test_a_server_that_takes_no_notices_is_told_none(world: World, folder: str) -> None:
    from isopod.net.rpc import connect
    from tests.net.rpc.test_violations import FakeServer

    address = UnixAddress(f"{folder}/old.sock")
    server = FakeServer(f.encode_hello(f.Hello((1, 1), "old")))
    listener = await world.network.listen(address, lambda: server)
    client = await connect(world, address)
    with pytest.raises(errors.Unsupported, match="old takes none"):
        await client.notify(NOTE, Text())
    await client.close()
    await server.wait_lost()
    await listener.close()


# --- groups -----------------------------------------------------------------------------------------------------------


async def test_handlers_run_in_the_group_of_the_listener_or_the_one_asked_for(world: World, folder: str) -> None:
    raft, bulk = SchedulingGroup("raft-test", 1000), SchedulingGroup("bulk-test", 100)
    async with serve(world, folder, groups=(bulk,)) as stage:
        address = UnixAddress(f"{folder}/raft.sock")
        await stage.server.listen(address, group=raft)
        from isopod.net.rpc import connect

        for client in (await stage.connect(), await connect(world, address), await connect(world, address, group="bulk-test")):
            await client.call(WHO, Text())
            await client.close()
        assert stage.service.groups == ["main", "raft-test", "bulk-test"]
        with pytest.raises(errors.NotFound, match="no such scheduling group: raft-test"):
            await _ask_for_group(stage, "raft-test")


async def _ask_for_group(stage: Stage, group: str) -> None:
    client = await stage.connect(group=group)
    await client.call(ECHO, Text())


# --- heartbeats -------------------------------------------------------------------------------------------------------


class Proxy(asyncio.Protocol):
    """One end of a relay that can stop to pass anything on, both ways, without closing."""

    def __init__(self, relay: "Relay") -> None:
        self.relay = relay
        self.other: Proxy | None = None
        self.transport: asyncio.Transport | None = None
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]  # uvloop's are not subclasses
        self.relay.ends.append(self)
        if self.other is None:
            self.relay.dial(self)

    def data_received(self, data: bytes) -> None:
        self.relay.n_bytes += len(data)
        if self.relay.is_stalled:
            return
        if self.other is None or self.other.transport is None:
            self.early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.other is not None and self.other.transport is not None and not self.relay.is_stalled:
            self.other.transport.close()


class Relay:
    """Listens at one address and passes on to another."""

    def __init__(self, world: World, target: UnixAddress) -> None:
        self.world = world
        self.target = target
        self.is_stalled = False
        self.n_bytes = 0
        self.ends: list[Proxy] = []
        self.dialling: list[asyncio.Task[None]] = []

    def dial(self, near: Proxy) -> None:
        self.dialling.append(asyncio.create_task(self._dial(near)))

    async def _dial(self, near: Proxy) -> None:
        far = Proxy(self)
        far.other = near
        await self.world.network.connect(self.target, lambda: far)
        near.other = far
        assert far.transport is not None
        for data in near.early:
            far.transport.write(data)

    def close(self) -> None:
        for end in self.ends:
            if end.transport is not None:
                end.transport.abort()


@pytest.mark.virtual_time
async def test_a_peer_behind_a_stalled_proxy_is_given_up_by_both(world: World, folder: str) -> None:
    limits = RpcLimits(heartbeat_s=0.05)
    async with serve(world, folder, limits) as stage:
        relay = Relay(world, stage.address)
        address = UnixAddress(f"{folder}/relay.sock")
        listener = await world.network.listen(address, lambda: Proxy(relay))
        from isopod.net.rpc import connect

        client = await connect(world, address, limits=limits)
        calling = asyncio.create_task(client.call(HANG, Text("x")))
        await stage.service.wait_event("hang begins x")
        await asyncio.sleep(0.5)  # ten intervals without a word of ours: PING and PONG keep it alive
        assert client.is_usable
        relay.is_stalled = True
        with pytest.raises(errors.Disconnected, match=r"silent for 0\.2 s"):
            await calling
        await stage.service.wait_event("hang ends x")
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 0)
        relay.close()
        await client.close()
        await listener.close()


async def test_without_heartbeats_nothing_runs_and_silence_is_fine(world: World, folder: str) -> None:
    async with serve(world, folder, RpcLimits(heartbeat_s=0.05)) as stage, raw_peer(stage, HELLO) as peer:
        await peer.wait(lambda: peer.decoder.hello is not None)
        assert peer.decoder.hello is not None
        assert peer.decoder.hello.heartbeat_ms == 0, "a client that did not ask for heartbeats is asked nothing"
        await asyncio.sleep(0.5)
        assert peer.frames == []
        assert not peer.is_lost


@pytest.mark.parametrize(("own_s", "granted_ms"), [(10.0, 10_000), (0.0, 50)], ids=["its own", "any"])
async def test_a_server_grants_no_shorter_silence_than_its_own(world: World, folder: str, own_s: float, granted_ms: int) -> None:
    async with serve(world, folder, RpcLimits(heartbeat_s=own_s)) as stage:
        hello = f.encode_hello(f.Hello((1, 1), "eager", "", (), 1))
        async with raw_peer(stage, hello) as peer:
            await peer.wait(lambda: peer.decoder.hello is not None)
            assert peer.decoder.hello is not None
            assert peer.decoder.hello.heartbeat_ms == granted_ms


async def test_a_ping_is_answered_and_fails_with_its_connection(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        assert 0 <= await client.ping() < 5
        (session,) = stage.server._sessions.values()
        assert session.connection._transport is not None
        session.connection._transport.pause_reading()
        with pytest.raises(errors.DeadlineExceeded, match="a ping of test-server"):
            await client.ping(timeout_s=0.02)
        pinging = asyncio.create_task(client.ping())
        await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(errors.Disconnected):
            await pinging
        with pytest.raises(errors.Disconnected):
            await client.ping()


# --- reflection -------------------------------------------------------------------------------------------------------


async def test_a_server_tells_what_it_serves(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        client = await stage.connect()
        found: Reflection = await client.call(REFLECT, ReflectRequest())
        rows = {row.name: row for row in found.methods}
        assert list(rows) == sorted(method.name for method in METHODS)
        assert rows["test.blob"].idempotent
        assert not rows["test.echo"].idempotent
        assert rows["test.echo"].sends is rows["test.echo"].receives is None
        assert rows["test.chat"].sends is not None
        assert found.schemas["Text"]["properties"]["number"]["type"] == "integer"
        assert found.table == client.table != ""
        assert found.versions == (1, 1)
        assert set(found.features) == set(f.FEATURES)
        numbers = {row.code: row.number for row in found.codes}
        assert numbers["method_not_found"] == -32601
        part = await client.call(REFLECT, ReflectRequest("test.ch"))
        assert [row.name for row in part.methods] == ["test.chat"]
        assert part.table == found.table
        await client.close()


async def test_reflection_can_be_switched_off(world: World, folder: str) -> None:
    async with serve(world, folder, reflection=False, compression=False) as stage:
        client = await stage.connect(compression=True)
        assert client.table == ""
        assert client.connection.features == ("notify", "raw")
        with pytest.raises(errors.MethodNotFound, match=r"rpc\.reflect"):
            await client.call(REFLECT, ReflectRequest())
        await client.close()


def test_the_hash_of_a_table_changes_with_its_messages() -> None:
    from isopod.net.rpc.reflection import describe, table_hash

    class Other(msgspec.Struct, frozen=True):
        text: str = ""

    tables: list[list[Method[Any, Any]]] = [
        [ECHO, FAIL],
        [FAIL, ECHO],
        [ECHO],
        [ECHO, Method("test.fail", Other, Text)],
        [ECHO, Method("test.fail", Text, Text, Text)],
    ]
    hashes = [table_hash(*describe(table)) for table in tables]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
