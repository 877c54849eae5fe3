"""Sockets: TCP, Unix and UDP, connections and their ends, backpressure, TLS and its reload."""

import asyncio

import pytest

from isopod.net.ca import Issued, Subject, write_issued
from isopod.net.tcp import Connection, TcpLimits, TcpServer, connect_tcp
from isopod.net.tls import TlsFiles, open_server_tls
from isopod.net.udp import Datagram, open_udp_socket, serve_udp
from isopod.runtime.abort import deadline
from isopod.world.errors import DeadlineExceeded, Disconnected, HandshakeFailed, KernelError, ProtocolViolation
from isopod.world.network import Address, ClientTls, ServerTls, UdpAddress, UnixAddress
from isopod.world.world import World
from tests.net.certificates import authority, client_material, issue, server_leaf
from tests.parity.kit import LOOPBACK, until

pytestmark = pytest.mark.row("S35")


async def echo(connection: Connection) -> None:
    """Send back what comes."""
    while data := await connection.read():
        connection.write(data)
        await connection.drain()


async def common_name(world: World, address: Address, tls: ClientTls) -> str:
    """Return whom a server proves to be."""
    connection = await connect_tcp(world, address, tls=tls)
    identity = connection.identity
    await connection.wait_closed()
    assert identity is not None
    return identity.common_name


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_a_connection_carries_bytes_both_ways(kind: str, world: World, folder: str) -> None:
    server = TcpServer(world, echo)
    listener = await server.listen(LOOPBACK if kind == "tcp" else UnixAddress(f"{folder}/socket"))
    connection = await connect_tcp(world, listener.address)
    for size in (1, 100_000):
        connection.write(b"x" * size)
        assert await connection.readexactly(size) == b"x" * size
    connection.write_eof()
    assert await connection.read() == b"", "the server ended too"
    await connection.wait_closed()
    await server.close()
    assert (server.statistics().n_bytes_read, server.statistics().n_active) == (100_001, 0)


async def test_datagrams_have_their_sender_and_get_their_answer(world: World) -> None:
    async def collect() -> list[Datagram]:
        return [await client.receive(timeout_s=5) for _ in range(2)]

    server = await serve_udp(world, UdpAddress("127.0.0.1", 0), lambda data, _: data.upper())
    client = await open_udp_socket(world, UdpAddress("127.0.0.1", 0))
    client.send(b"one", server.address)
    client.send(b"two", server.address)
    assert sorted(await collect()) == [(b"ONE", server.address), (b"TWO", server.address)]
    with pytest.raises(DeadlineExceeded):
        await client.receive(timeout_s=0.02)
    client.close()
    server.close()
    await asyncio.sleep(0)


async def test_nobody_listens_there(world: World) -> None:
    server = TcpServer(world, echo)
    listener = await server.listen(LOOPBACK)
    await server.close()
    with pytest.raises(KernelError):
        await connect_tcp(world, listener.address)


async def test_a_read_has_its_deadline(world: World) -> None:
    async def silent(connection: Connection) -> None:
        await connection.read()

    server = TcpServer(world, silent)
    listener = await server.listen(LOOPBACK)
    connection = await connect_tcp(world, listener.address, limits=TcpLimits(read_s=0.05))
    with pytest.raises(DeadlineExceeded):
        await connection.read()
    with pytest.raises(DeadlineExceeded):
        async with deadline(0.02, "asking"):
            await connection.readuntil(b"\n")
    await connection.wait_closed()
    await server.close()


async def test_idle_connections_are_closed(world: World) -> None:
    server = TcpServer(world, echo, limits=TcpLimits(idle_s=0.1))
    listener = await server.listen(LOOPBACK)
    connection = await connect_tcp(world, listener.address)
    with pytest.raises(Disconnected):
        await connection.readexactly(1)
    assert server.statistics().n_idle_closed == 1
    await connection.wait_closed()
    await server.close()


async def test_a_peer_that_does_not_read_slows_the_writer_down(world: World) -> None:
    n_written = 0

    async def flood(connection: Connection) -> None:
        nonlocal n_written
        while n_written < 64 << 20:
            connection.write(b"x" * 65_536)
            await connection.drain()
            n_written += 65_536

    server = TcpServer(world, flood)
    listener = await server.listen(LOOPBACK)
    connection = await connect_tcp(world, listener.address)
    await connection.readexactly(1)
    before = -1
    while before != n_written:
        before = n_written
        await asyncio.sleep(0.05)
    assert n_written < 32 << 20, "stopped long before the end"
    await connection.readexactly(16 << 20)
    await until(lambda: n_written > before)
    connection.abort()
    await connection.wait_closed()
    await server.close()


async def test_a_line_without_end_is_refused(world: World) -> None:
    refused: list[ProtocolViolation] = []

    async def lines(connection: Connection) -> None:
        try:
            await connection.readuntil(b"\n", n_bytes_max=100)
        except ProtocolViolation as error:
            refused.append(error)
            raise

    server = TcpServer(world, lines)
    listener = await server.listen(LOOPBACK)
    connection = await connect_tcp(world, listener.address)
    connection.write(b"x" * 1000)
    await until(lambda: refused)
    await connection.wait_closed()
    await server.close()
    assert server.statistics().n_peer_failures == 1


async def test_draining_lets_handlers_finish(world: World) -> None:
    async def slow_echo(connection: Connection) -> None:
        data = await connection.readexactly(5)
        await asyncio.sleep(0.03)
        connection.write(data)

    server = TcpServer(world, slow_echo)
    listener = await server.listen(LOOPBACK)
    connection = await connect_tcp(world, listener.address)
    connection.write(b"hello")
    await until(lambda: server.statistics().n_bytes_read == 5)
    drained = asyncio.create_task(server.drain(5))
    assert await connection.readexactly(5) == b"hello"
    await connection.wait_closed()
    assert await drained
    with pytest.raises(KernelError):
        await connect_tcp(world, listener.address)
    await server.close()


async def test_tls_proves_who_is_there_and_refuses_strangers(world: World, folder: str) -> None:
    reloading = await open_server_tls(world, await put(world, folder, server_leaf()))
    server = TcpServer(world, echo)
    listener = await server.listen(LOOPBACK, tls=reloading.tls)
    assert await common_name(world, listener.address, ClientTls(client_material())) == "localhost"
    with pytest.raises(HandshakeFailed):
        await connect_tcp(world, listener.address, tls=ClientTls(client_material(), server_name="elsewhere.example"))
    await reloading.close()
    await server.close()


async def test_new_certificates_are_used_without_a_restart(world: World, folder: str) -> None:
    reloading = await open_server_tls(world, await put(world, folder, server_leaf()))
    tls: ServerTls = reloading.tls
    server = TcpServer(world, echo)
    listener = await server.listen(LOOPBACK, tls=tls)
    trust = ClientTls(client_material())
    old = await connect_tcp(world, listener.address, tls=trust)

    await put(world, folder, issue(Subject("renewed", dns_names=("localhost",), addresses=("127.0.0.1",))))
    await until(lambda: tls.statistics().n_reloads)

    assert await common_name(world, listener.address, trust) == "renewed"
    old.write(b"still here")
    assert await old.readexactly(10) == b"still here"
    await old.wait_closed()
    await reloading.close()
    await server.close()


async def put(world: World, folder: str, issued: Issued) -> TlsFiles:
    """Write a certificate, its key and who signed it."""
    await world.disk.write(f"{folder}/ca.crt", authority().certificate)
    await write_issued(world, issued, certificate=f"{folder}/tls.crt", key=f"{folder}/tls.key")
    return TlsFiles(f"{folder}/tls.crt", f"{folder}/tls.key", f"{folder}/ca.crt")
