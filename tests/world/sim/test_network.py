"""The simulated network beyond what both Worlds share: flow control, resets, and what a test may look at."""

import asyncio
import errno

import pytest

from isopod.world.network import TcpAddress, UnixAddress
from isopod.world.sim import SimWorld
from isopod.world.sim.streams import StreamEnd
from tests.world.recorder import Recorder

ADDRESS = UnixAddress("/run/s")


class Paused(Recorder):
    """Notes what the transport asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")
        self.changed.set()


async def pair(sim: SimWorld) -> tuple[StreamEnd, Paused, StreamEnd, Recorder]:
    """Return a connection's ends: ours with its protocol, the server's with its own."""
    servers: list[Recorder] = []

    def accept() -> Recorder:
        servers.append(Recorder())
        return servers[-1]

    listener = await sim.world.network.listen(ADDRESS, accept)
    transport, protocol = await sim.world.network.connect(ADDRESS, Paused)
    while not servers:
        await asyncio.sleep(0)
    served = await servers[0].wait_made()
    await listener.close()
    assert isinstance(transport, StreamEnd)
    assert isinstance(served, StreamEnd)
    assert isinstance(protocol, Paused)
    return transport, protocol, served, servers[0]


async def test_a_slow_reader_pauses_the_writer(sim_world: SimWorld) -> None:
    transport, protocol, served, server = await pair(sim_world)
    transport.set_write_buffer_limits(high=100_000, low=10_000)
    served.pause_reading()
    transport.write(bytes(250_000))
    assert protocol.calls == []
    transport.write(bytes(100_000))
    assert protocol.calls == ["pause"]
    await asyncio.sleep(1)
    assert server.received == b""
    served.resume_reading()
    assert await server.wait_received(350_000) == bytes(350_000)
    assert protocol.calls == ["pause", "resume"]
    assert transport.get_write_buffer_size() == 0


async def test_bytes_are_split_and_joined_anyhow_but_in_order(sim_world: SimWorld) -> None:
    transport, _, _, server = await pair(sim_world)
    sizes: list[int] = []
    taken = server.data_received

    def take(data: bytes) -> None:
        sizes.append(len(data))
        taken(data)

    server.data_received = take  # type: ignore[method-assign]
    message = bytes(range(256)) * 100
    for start in range(0, len(message), 128):
        transport.write(message[start : start + 128])
        if start % 1024 == 0:
            await asyncio.sleep(0.0001)
    assert await server.wait_received(len(message)) == message
    assert any(size % 128 for size in sizes)
    assert any(size > 128 for size in sizes)


async def test_what_was_written_before_close_arrives(sim_world: SimWorld) -> None:
    transport, protocol, _, server = await pair(sim_world)
    transport.write(bytes(500_000))
    transport.close()
    assert len(await server.wait_received(500_000)) == 500_000
    await server.wait_end()
    await protocol.wait_lost()
    assert protocol.error is None


async def test_writing_to_who_is_gone_breaks_the_connection(sim_world: SimWorld) -> None:
    transport, protocol, served, server = await pair(sim_world)
    served.abort()
    await server.wait_lost()
    await protocol.wait_end()
    transport.write(b"anybody?")
    await protocol.wait_lost()
    assert isinstance(protocol.error, BrokenPipeError)


async def test_closing_with_unread_bytes_resets_the_peer(sim_world: SimWorld) -> None:
    transport, protocol, served, _ = await pair(sim_world)
    served.pause_reading()
    transport.write(b"never read")
    await asyncio.sleep(0.01)
    served.close()
    await protocol.wait_lost()
    assert isinstance(protocol.error, ConnectionResetError)


async def test_a_protocol_that_raises_loses_its_connection_and_is_reported(sim_world: SimWorld) -> None:
    transport, _, _, server = await pair(sim_world)
    reports: list[str] = []
    handler = sim_world.loop.get_exception_handler()
    sim_world.loop.set_exception_handler(lambda _, context: reports.append(context["message"]))

    def fail(data: bytes) -> None:
        raise ZeroDivisionError

    server.data_received = fail  # type: ignore[method-assign]
    transport.write(b"x")
    await server.wait_lost()
    sim_world.loop.set_exception_handler(handler)
    assert isinstance(server.error, ZeroDivisionError)
    assert reports == ["Fatal error: protocol.fail() call failed."]


async def test_nothing_can_be_written_after_the_end(sim_world: SimWorld) -> None:
    transport, _, _, _ = await pair(sim_world)
    transport.write_eof()
    with pytest.raises(RuntimeError, match="write_eof"):
        transport.write(b"x")
    with pytest.raises(TypeError):
        transport.write("text")  # type: ignore[arg-type]


async def test_tcp_names_and_ports(sim_world: SimWorld) -> None:
    network = sim_world.world.network
    everywhere = await network.listen(TcpAddress("0.0.0.0", 8080), Recorder)
    with pytest.raises(OSError) as taken:
        await network.listen(TcpAddress("10.0.0.1", 8080), Recorder)
    assert taken.value.errno == errno.EADDRINUSE
    transport, _ = await network.connect(TcpAddress("10.9.9.9", 8080), Recorder)
    transport.close()
    await everywhere.close()
    with pytest.raises(ConnectionRefusedError):
        await network.connect(TcpAddress("10.9.9.9", 8080), Recorder)


async def test_a_test_can_look_and_break(sim_world: SimWorld) -> None:
    listener = await sim_world.world.network.listen(ADDRESS, Recorder, mode=0o600, gid=42)
    (seen,) = sim_world.network.listeners()
    assert (seen.address, seen.mode, seen.gid) == (ADDRESS, 0o600, 42)
    sim_world.network.refuse_next(errno.ECONNRESET, times=2)
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            await sim_world.world.network.connect(ADDRESS, Recorder)
    transport, _ = await sim_world.world.network.connect(ADDRESS, Recorder)
    transport.close()
    await listener.close()
    assert sim_world.network.listeners() == []


async def test_packets_keep_their_boundaries_and_order(sim_world: SimWorld) -> None:
    listener = sim_world.network.listen_packets("/run/p")
    client = await sim_world.world.network.connect_packets("/run/p")
    server = await listener.accept()
    for number in range(10):
        await client.send(b"%d" % number * number)
    client.shutdown_write()
    received = []
    while packet := await server.receive():
        received.append(packet)
    assert received == [b"%d" % number * number for number in range(1, 10)][: len(received)]
    await server.send(b"answer")
    assert await client.receive() == b"answer"
    server.close()
    assert await client.receive() == b""
    with pytest.raises(BrokenPipeError):
        await client.send(b"late")


async def test_a_full_queue_of_packets_makes_the_sender_wait(sim_world: SimWorld) -> None:
    listener = sim_world.network.listen_packets("/run/p")
    client = await sim_world.world.network.connect_packets("/run/p")
    server = await listener.accept()
    sent = 0

    async def send() -> None:
        nonlocal sent
        for _ in range(100):
            await client.send(b"x")
            sent += 1

    sending = asyncio.ensure_future(send())
    await asyncio.sleep(1)
    assert sent == 64
    for _ in range(100):
        assert await server.receive() == b"x"
    await sending
    with pytest.raises(OSError) as refused:
        await client.send(bytes(70_000))
    assert refused.value.errno == errno.EMSGSIZE


async def test_kinds_of_sockets_do_not_mix(sim_world: SimWorld) -> None:
    sim_world.network.listen_packets("/run/p")
    listener = await sim_world.world.network.listen(ADDRESS, Recorder)
    for attempt in (
        sim_world.world.network.connect(UnixAddress("/run/p"), Recorder),
        sim_world.world.network.connect_packets(ADDRESS.path),
    ):
        with pytest.raises(OSError) as refused:
            await attempt
        assert refused.value.errno == errno.EPROTOTYPE
    await listener.close()
