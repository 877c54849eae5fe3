"""RPC over TCP with mutual TLS: who gets in, who does not, and that nobody who does not hurts those who do. On both Worlds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from isopod.net.ca import Authority, Issued, Subject
from isopod.net.rpc import Client, ReconnectingClient, RetryPolicy, connect
from isopod.wire import frames as f
from isopod.world import errors
from isopod.world.network import ClientTls, ServerTls, TcpAddress, TlsMaterial
from isopod.world.world import World
from tests.net.rpc.kit import BLOB, ECHO, HELLO, PLAIN, WHO, RawPeer, Stage, Text, serve, wait_until

pytestmark = pytest.mark.row("S17")
LOOPBACK = "127.0.0.1"
DAY_S = 86_400


class Past:
    """A clock that is late."""

    def __init__(self, world: World, by_s: float) -> None:
        self._clock = world.clock
        self._by_ns = int(by_s * 1e9)

    def now_ns(self) -> int:
        return self._clock.now_ns() - self._by_ns

    def monotonic_ns(self) -> int:
        return self._clock.monotonic_ns()


class Trust:
    """An authority, a server it signed, and clients of all sorts."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.authority = Authority.create(world, "ours")
        server = self.authority.issue(Subject("server", addresses=(LOOPBACK,)))
        self.server = ServerTls(self.material(server, client_auth="required"))

    def material(self, issued: Issued | None, **rules: str) -> TlsMaterial:
        certificate, key = (b"", b"") if issued is None else (issued.certificate, issued.key)
        return TlsMaterial(certificate, key, self.authority.certificate, **rules)  # type: ignore[arg-type]  # client_auth

    def client(self, kind: str) -> ClientTls:
        subject = Subject("client-7", purpose="client")
        if kind == "good":
            return ClientTls(self.material(self.authority.issue(subject)))
        if kind == "no certificate":
            return ClientTls(self.material(None))
        if kind == "of another authority":
            return ClientTls(self.material(Authority.create(self.world, "theirs").issue(subject)))
        if kind == "expired":
            late = replace(self.world, clock=Past(self.world, 30 * DAY_S))
            return ClientTls(self.material(Authority(late, self.authority.issued).issue(subject, valid_s=DAY_S)))
        assert kind == "trusts others"
        other = Authority.create(self.world, "theirs")
        issued = self.authority.issue(subject)
        return ClientTls(TlsMaterial(issued.certificate, issued.key, other.certificate))


@asynccontextmanager
async def serve_tls(world: World, folder: str) -> AsyncIterator[tuple[Stage, Trust, TcpAddress]]:
    async with serve(world, folder) as stage:
        trust = Trust(world)
        listener = await stage.server.listen(TcpAddress(LOOPBACK, 0), tls=trust.server)
        assert isinstance(listener.address, TcpAddress)
        yield stage, trust, listener.address


async def test_calls_over_mutual_tls(world: World, folder: str) -> None:
    async with serve_tls(world, folder) as (stage, trust, address):
        client = await connect(world, address, tls=trust.client("good"), compression=True)
        assert client.identity is not None
        assert client.identity.common_name == "server"
        assert await client.call(WHO, Text()) == Text("client-7"), "the handler sees who the certificate says it is"
        data = world.random.stream("tls").randbytes(500_000)
        assert await client.call(BLOB, data) == data[::-1]
        numbers = await asyncio.gather(*(client.call(PLAIN, Text("n", n)) for n in range(300)))
        assert [answer.number for answer in numbers] == list(range(300))
        await client.close()
        local = await stage.connect()
        assert (await local.call(WHO, Text())).text == "", "nobody proved anything on the Unix socket"
        await local.close()


@pytest.mark.parametrize("kind", ["no certificate", "of another authority", "expired", "trusts others"])
async def test_who_is_not_trusted_gets_no_answer(world: World, folder: str, kind: str) -> None:
    async with serve_tls(world, folder) as (stage, trust, address):
        good = await connect(world, address, tls=trust.client("good"))
        with pytest.raises((errors.HandshakeFailed, errors.Disconnected)):
            await _call(world, address, trust.client(kind))
        assert stage.value("isopod_rpc_calls_total", method="test.echo", outcome="ok") == 0
        assert await good.call(ECHO, Text("undisturbed")) == Text("undisturbed")
        await good.close()
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 0)


async def _call(world: World, address: TcpAddress, tls: ClientTls) -> None:
    client: Client = await connect(world, address, tls=tls)
    try:
        await client.call(ECHO, Text("let me in"))
    finally:
        await client.close()


async def test_tcp_without_tls_must_be_asked_for_by_name(world: World, folder: str) -> None:
    async with serve(world, folder) as stage:
        with pytest.raises(errors.InvalidArgument, match="RPC over TCP needs TLS"):
            await stage.server.listen(TcpAddress(LOOPBACK, 0))
        listener = await stage.server.listen(TcpAddress(LOOPBACK, 0), plaintext=True)
        with pytest.raises(errors.InvalidArgument, match="RPC over TCP needs TLS"):
            await connect(world, listener.address)
        with pytest.raises(errors.InvalidArgument, match="RPC over TCP needs TLS"):
            ReconnectingClient(world, listener.address)
        client = await connect(world, listener.address, plaintext=True)
        assert await client.call(ECHO, Text("bare")) == Text("bare")
        await client.close()


async def test_garbage_inside_and_outside_of_tls(world: World, folder: str) -> None:
    async with serve_tls(world, folder) as (_, trust, address):
        inside, outside = RawPeer(), RawPeer()
        await world.network.connect(address, lambda: inside, tls=trust.client("good"))
        inside.write(HELLO, b"\xff\xff\xff\xff garbage")
        await inside.wait(lambda: any(isinstance(frame, f.Error) for frame in inside.frames))
        assert getattr(inside.frames[-1], "code", "") == "protocol_violation"
        await inside.wait_lost()
        await world.network.connect(address, lambda: outside)
        outside.write(b"GET / HTTP/1.1\r\n\r\n")
        outside.data_received = lambda data: None  # type: ignore[method-assign]  # an alert, perhaps: no RPC
        await outside.wait_lost()
        client = await connect(world, address, tls=trust.client("good"))
        assert await client.call(ECHO, Text("fine")) == Text("fine")
        await client.close()


async def test_bytes_one_by_one_through_tls(world: World, folder: str) -> None:
    async with serve_tls(world, folder) as (_, trust, address):
        peer = RawPeer()
        await world.network.connect(address, lambda: peer, tls=trust.client("good"))
        for byte in HELLO + f.encode_frame(f.Request(1, "test.echo", 5000, Text("slowly"))):
            peer.write(bytes((byte,)))
            await asyncio.sleep(0)
        (reply,) = await peer.wait_frames(1)
        assert isinstance(reply, f.Reply)
        peer.close()
        await peer.wait_lost()


async def test_a_reconnecting_client_takes_its_certificate_along(world: World, folder: str) -> None:
    async with serve_tls(world, folder) as (stage, trust, address):
        client = ReconnectingClient(world, address, tls=trust.client("good"), policy=RetryPolicy(pause_first_s=0.01))
        who = replace(WHO, idempotent=True)  # the client may not have noticed the end when it calls again
        assert (await client.call(who, Text())).text == "client-7"
        for session in list(stage.server._sessions.values()):
            session.connection.abort()
        await wait_until(lambda: stage.value("isopod_rpc_connections") == 0)
        assert (await client.call(who, Text())).text == "client-7"
        await client.close()
