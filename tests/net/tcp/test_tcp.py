"""TCP servers and clients, on both Worlds: reading, writing, time limits, peers that misbehave."""

import asyncio
import errno
from collections.abc import Callable

import pytest

from isopod.net.tcp import Connection, TcpClient, TcpLimits, TcpServer, connect_tcp
from isopod.runtime.scheduling import SchedulingGroup, current_group
from isopod.world.errors import DeadlineExceeded, Disconnected, HandshakeFailed, KernelError, ProtocolViolation, WrongState
from isopod.world.network import Address, ClientTls, ServerTls, TcpAddress, TcpOptions, TlsMaterial, UnixAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.certificates import client_leaf, client_material, server_leaf, server_material

LOOPBACK = TcpAddress("127.0.0.1", 0)
SHORT = TcpLimits(read_s=0.05, write_s=0.1)
pytestmark = pytest.mark.row("S9")


async def echo(connection: Connection) -> None:
    while data := await connection.read():
        connection.write(data)
        await connection.drain()


async def serve(world: World, handler=echo, *, limits: TcpLimits | None = None, address: Address = LOOPBACK) -> tuple[TcpServer, Address]:  # type: ignore[no-untyped-def]
    server = TcpServer(world, handler, limits=limits)
    listener = await server.listen(address)
    return server, listener.address


async def wait_active(server: TcpServer, n_connections: int) -> None:
    async with asyncio.timeout(40):
        while server.statistics().n_active != n_connections:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
async def test_an_echo(world: World, folder: str, kind: str) -> None:
    server = TcpServer(world, echo)
    tls = ServerTls(server_material()) if kind == "tls" else None
    listener = await server.listen(UnixAddress(f"{folder}/s") if kind == "unix" else LOOPBACK, tls=tls)
    connection = await connect_tcp(world, listener.address, tls=ClientTls(client_material()) if tls else None)
    sent = bytes(range(256)) * 4000
    writing = asyncio.ensure_future(write_all(connection, sent))
    assert await connection.readexactly(len(sent)) == sent
    await writing
    assert connection.statistics() == (len(sent), len(sent))
    connection.write_eof()
    assert await connection.read() == b""
    assert connection.at_end
    await connection.wait_closed()
    await wait_active(server, 0)
    counts = server.statistics()
    assert (counts.n_accepted, counts.n_bytes_read, counts.n_bytes_written) == (1, len(sent), len(sent))
    assert (counts.n_peer_failures, counts.n_handler_failures) == (0, 0)
    await server.close()
    with pytest.raises(WrongState):
        await server.listen(LOOPBACK)


async def write_all(connection: Connection, data: bytes) -> None:
    for start in range(0, len(data), 50_000):
        connection.write(data[start : start + 50_000])
        await connection.drain()


async def test_lines_and_counted_bytes_however_they_arrive(world: World) -> None:
    async def pieces(connection: Connection) -> None:
        for piece in (b"one\ntw", b"o\r", b"\n\nab", b"cdef", b"last"):
            connection.write(piece)
            await asyncio.sleep(0.002)

    server, address = await serve(world, pieces)
    connection = await connect_tcp(world, address)
    assert await connection.readuntil() == b"one\n"
    assert await connection.readuntil(b"\r\n") == b"two\r\n"
    assert await connection.readuntil(b"\n", n_bytes_max=1) == b"\n"
    assert await connection.readexactly(0) == b""
    assert await connection.readexactly(6) == b"abcdef"
    assert await connection.read(2) in (b"l", b"la")
    with pytest.raises(Disconnected, match="middle of a line"):
        await connection.readuntil()
    with pytest.raises(Disconnected, match="of 100 bytes"):
        await connection.readexactly(100)
    await connection.read()
    assert await connection.readuntil() == b""
    assert await connection.read() == b""
    await connection.wait_closed()
    await server.close()


async def test_a_line_has_a_bound(world: World) -> None:
    caught: list[Exception] = []

    async def lines(connection: Connection) -> None:
        try:
            await connection.readuntil(n_bytes_max=10)
        except ProtocolViolation as error:
            caught.append(error)
            raise

    server, address = await serve(world, lines)
    for sent in (b"0123456789\n", b"0123456789012345678901234567890"):
        connection = await connect_tcp(world, address)
        connection.write(sent)
        assert await read_to_end(connection) == b""
        await connection.wait_closed()
    assert len(caught) == 2
    assert server.statistics().n_peer_failures == 2
    await server.close()


async def read_to_end(connection: Connection) -> bytes:
    """Read until the peer is gone, orderly or not."""
    found = b""
    try:
        while data := await connection.read():
            found += data
    except Disconnected:
        pass
    return found


async def test_a_byte_that_comes_with_the_deadline_does_not_lift_it(sim_world: SimWorld) -> None:
    """Both in one turn of the loop: the timer finds a reader that is woken already, and must not leave it without a deadline."""
    timers: list[Callable[[], None]] = []

    class Timer:
        def cancel(self) -> None:
            timers.clear()

    def call_later(_: float, callback: Callable[[], None]) -> Timer:
        timers.append(callback)
        return Timer()

    connection = Connection(TcpLimits(read_s=0.1), call_later)
    connection.connection_made(asyncio.Transport())
    reading = asyncio.create_task(connection.readuntil())
    await asyncio.sleep(0.2)
    connection.data_received(b"x")
    timers.pop()()
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(reading, 40)


async def test_a_peer_that_drips_bytes_has_no_more_time_than_one_that_is_silent(world: World) -> None:
    caught: list[Exception] = []

    async def lines(connection: Connection) -> None:
        try:
            await connection.readuntil()
        except DeadlineExceeded as error:
            caught.append(error)
            raise

    server, address = await serve(world, lines, limits=TcpLimits(read_s=0.1))
    connection = await connect_tcp(world, address)
    for _ in range(200):  # two seconds and more
        if caught:
            break
        connection.write(b"x")
        await asyncio.sleep(0.01)
    assert len(caught) == 1
    assert "reading from" in str(caught[0])
    await connection.wait_closed()
    await server.close()


async def test_a_read_that_was_too_long_leaves_the_connection_usable(world: World) -> None:
    server, address = await serve(world)
    connection = await connect_tcp(world, address, limits=SHORT)
    for attempt in (connection.read(), connection.readexactly(3), connection.readuntil()):
        with pytest.raises(DeadlineExceeded):
            await attempt
    connection.limits = TcpLimits()
    connection.write(b"abc")
    assert await connection.readexactly(3) == b"abc"
    await connection.wait_closed()
    await server.close()


async def test_a_peer_that_does_not_read_makes_the_writer_wait_then_fail(world: World) -> None:
    async def deaf(connection: Connection) -> None:
        connection.transport.pause_reading()
        await asyncio.sleep(30)

    server, address = await serve(world, deaf)
    connection = await connect_tcp(world, address, limits=SHORT)
    with pytest.raises(DeadlineExceeded, match="writing to"):
        for _ in range(1000):
            connection.write(bytes(100_000))
            await connection.drain()
    await connection.wait_closed()  # gives up what it could not send
    assert connection.is_closed
    await server.close()


async def test_a_fast_peer_waits_while_nobody_reads_here(world: World) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def later(connection: Connection) -> None:
        started.set()
        await go_on.wait()
        connection.write(b"%d" % len(await connection.readexactly(20_000_000)))

    server, address = await serve(world, later, limits=TcpLimits(buffer_bytes_max=10_000))
    connection = await connect_tcp(world, address)
    connection.write(bytes(20_000_000))
    await started.wait()
    await asyncio.sleep(0.05)
    assert connection.transport.get_write_buffer_size() > 0
    assert server.connections()[0].n_bytes_read < 5_000_000
    go_on.set()
    assert await connection.readexactly(8) == b"20000000"
    await connection.wait_closed()
    await server.close()


async def test_a_reset_in_the_middle_is_told_to_reader_and_writer(world: World) -> None:
    caught: list[Exception] = []

    async def reads(connection: Connection) -> None:
        try:
            await connection.readexactly(100)
        except Disconnected as error:
            caught.append(error)
        with pytest.raises(Disconnected):
            for _ in range(100):
                connection.write(bytes(100_000))
                await connection.drain()
                await asyncio.sleep(0.001)
        with pytest.raises(Disconnected):
            await connection.drain()

    server, address = await serve(world, reads)
    connection = await connect_tcp(world, address)
    connection.write(b"part")
    while not server.connections() or server.connections()[0].n_bytes_read < 4:
        await asyncio.sleep(0.001)
    connection.abort()
    await wait_active(server, 0)
    assert len(caught) == 1
    assert server.statistics().n_handler_failures == 0
    await connection.wait_closed()
    await server.close()


async def test_half_close_then_answer(world: World) -> None:
    async def count(connection: Connection) -> None:
        n_bytes = 0
        while data := await connection.read():
            n_bytes += len(data)
        connection.write(b"%d" % n_bytes)

    server, address = await serve(world, count)
    connection = await connect_tcp(world, address)
    connection.write(bytes(100_000))
    connection.write_eof()
    assert await read_to_end(connection) == b"100000"
    await connection.wait_closed()
    await server.close()


async def test_connections_over_the_bound_are_refused(world: World) -> None:
    server, address = await serve(world, limits=TcpLimits(n_connections_max=2))
    kept = [await connect_tcp(world, address) for _ in range(2)]
    await wait_active(server, 2)
    third = await connect_tcp(world, address)
    assert await read_to_end(third) == b""
    await third.wait_closed()
    assert server.statistics().n_refused == 1
    kept[0].write(b"x")
    assert await kept[0].readexactly(1) == b"x"
    await kept[0].wait_closed()
    await wait_active(server, 1)
    again = await connect_tcp(world, address)
    again.write(b"y")
    assert await again.readexactly(1) == b"y"
    for connection in (again, kept[1]):
        await connection.wait_closed()
    await server.close()


@pytest.mark.virtual_time
async def test_idle_connections_are_closed_busy_ones_are_not(world: World) -> None:
    server, address = await serve(world, limits=TcpLimits(idle_s=0.4))
    idle, busy = await connect_tcp(world, address), await connect_tcp(world, address)
    ended = asyncio.ensure_future(read_to_end(idle))
    async with asyncio.timeout(40):
        while not ended.done():
            busy.write(b"x")
            assert await busy.readexactly(1) == b"x"
            await asyncio.sleep(0.01)
    assert await ended == b""
    assert server.statistics().n_idle_closed == 1
    assert server.statistics().n_active == 1
    for connection in (idle, busy):
        await connection.wait_closed()
    await server.close()


@pytest.mark.virtual_time
async def test_draining_lets_handlers_finish_and_cancels_the_late(world: World) -> None:
    async def slow(connection: Connection) -> None:
        await asyncio.sleep(float((await connection.readuntil()).strip()))
        connection.write(b"done")

    server, address = await serve(world, slow)
    quick, late = await connect_tcp(world, address), await connect_tcp(world, address)
    quick.write(b"0.05\n")
    late.write(b"100\n")
    await wait_active(server, 2)
    assert not await server.drain(1.0)
    assert await read_to_end(quick) == b"done"
    assert await read_to_end(late) == b""
    with pytest.raises(KernelError) as caught:
        await connect_tcp(world, address)
    assert caught.value.errno == errno.ECONNREFUSED
    for connection in (quick, late):
        await connection.wait_closed()
    await server.close()


async def test_a_handler_that_fails_ends_its_own_connection_only(world: World) -> None:
    reports: list[str] = []
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: reports.append(context["message"]))

    async def divide(connection: Connection) -> None:
        connection.write(b"%d" % (10 // int(await connection.readuntil())))

    server, address = await serve(world, divide)
    bad, good = await connect_tcp(world, address), await connect_tcp(world, address)
    bad.write(b"0\n")
    assert await read_to_end(bad) == b""
    good.write(b"2\n")
    assert await read_to_end(good) == b"5"
    for connection in (bad, good):
        await connection.wait_closed()
    loop.set_exception_handler(handler)
    assert [report.rpartition(" for ")[0] for report in reports] == ["the handler of tcp failed"]
    assert server.statistics().n_handler_failures == 1
    await server.close()


async def test_handlers_run_in_the_servers_group(world: World) -> None:
    group = SchedulingGroup("served", 100)
    seen: list[SchedulingGroup] = []

    async def look(connection: Connection) -> None:
        seen.append(current_group())

    server = TcpServer(world, look, group=group)
    listener = await server.listen(LOOPBACK)
    connection = await connect_tcp(world, listener.address)
    await read_to_end(connection)
    assert seen == [group]
    assert current_group() is not group
    await connection.wait_closed()
    await server.close()


async def test_only_one_task_reads(world: World) -> None:
    server, address = await serve(world)
    connection = await connect_tcp(world, address)
    reading = asyncio.ensure_future(connection.read())
    await asyncio.sleep(0.001)
    with pytest.raises(RuntimeError, match="another task"):
        await connection.read()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    connection.write(b"x")
    assert await connection.readexactly(1) == b"x"
    await connection.wait_closed()
    await server.close()


async def test_clients_are_known_by_their_certificate(world: World) -> None:
    async def whoami(connection: Connection) -> None:
        assert connection.identity is not None
        connection.write(f"{connection.identity.common_name} {connection.alpn}".encode())

    server = TcpServer(world, whoami)
    listener = await server.listen(LOOPBACK, tls=ServerTls(server_material(client_auth="required", alpn=("line",))))
    connection = await connect_tcp(world, listener.address, tls=ClientTls(client_material(client_leaf(), alpn=("line",))))
    assert await read_to_end(connection) == b"a client line"
    await connection.wait_closed()
    await server.close()


async def test_why_connecting_fails(world: World, folder: str) -> None:
    with pytest.raises(KernelError, match=r"cannot connect to unix:.*No such file") as caught:
        await connect_tcp(world, UnixAddress(f"{folder}/none"))
    assert caught.value.errno == errno.ENOENT
    server = TcpServer(world, echo)
    leaf = server_leaf(by="somebody else")
    listener = await server.listen(LOOPBACK, tls=ServerTls(TlsMaterial(leaf.certificate, leaf.key)))
    client = TcpClient(world, listener.address, tls=ClientTls(client_material()))
    with pytest.raises(HandshakeFailed):
        await client.connect()
    await server.close()


async def test_a_client_tries_again(sim_world: SimWorld) -> None:
    server, address = await serve(sim_world.world)
    client = TcpClient(sim_world.world, address, limits=TcpLimits(connect_s=1.0))
    sim_world.network.refuse_next(errno.ECONNREFUSED)
    sim_world.network.hang_next()
    connection = await client.connect()
    await connection.wait_closed()
    sim_world.network.hang_next(times=3)
    with pytest.raises(DeadlineExceeded, match="connecting to 127.0.0.1"):
        await client.connect()
    await server.close()


@pytest.mark.host
async def test_options_reach_the_kernel(host_world: World) -> None:
    import socket

    options = TcpOptions(nodelay=False, keepalive_idle_s=7, keepalive_interval_s=3, keepalive_count=2, user_timeout_s=4.5, reuse_port=True)
    server = TcpServer(host_world, echo, options=options)
    first = await server.listen(LOOPBACK)
    second = await server.listen(first.address)  # reuse_port
    connection = await connect_tcp(host_world, first.address, options=options)
    await wait_active(server, 1)
    for transport in (connection.transport, server.connections()[0].transport):
        sock = transport.get_extra_info("socket")
        found = [
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT, socket.TCP_NODELAY)
        ]
        assert found == [7, 3, 2, 4500, 0]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    connection.write(b"x")
    assert await connection.readexactly(1) == b"x"
    await connection.wait_closed()
    default = await connect_tcp(host_world, second.address)
    assert default.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    await default.wait_closed()
    await server.close()
