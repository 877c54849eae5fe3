"""UDP, on both Worlds: real senders, a bounded queue, errors; loss and duplication in the simulation."""

import asyncio
import errno

import pytest

from isopod.net.udp import UdpSocket, open_udp_socket, serve_udp
from isopod.runtime.scheduling import SchedulingGroup
from isopod.world.errors import DeadlineExceeded, Disconnected, InvalidArgument, KernelError
from isopod.world.network import UdpAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World

LOOPBACK = UdpAddress("127.0.0.1", 0)
pytestmark = pytest.mark.row("S9")


async def closed(*sockets: UdpSocket) -> None:
    for each in sockets:
        each.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_datagrams_carry_their_real_sender(world: World) -> None:
    first, second = await open_udp_socket(world, LOOPBACK), await open_udp_socket(world, LOOPBACK)
    first.send(b"!", second.address)
    first.send(b"hello", second.address)
    found = sorted([await second.receive(timeout_s=5), await second.receive(timeout_s=5)])
    assert found == [(b"!", first.address), (b"hello", first.address)]
    second.send(bytes(60_000), found[0].sender)
    assert await first.receive(timeout_s=5) == (bytes(60_000), second.address)
    assert first.statistics()[:3] == (1, 2, 0)
    assert second.statistics().n_bytes_received == 6
    await closed(first, second)


async def test_a_connected_socket_hears_its_peer_only(world: World) -> None:
    server, stranger = await open_udp_socket(world, LOOPBACK), await open_udp_socket(world, LOOPBACK)
    client = await open_udp_socket(world, None, remote=server.address)
    client.send(b"question")
    question = await server.receive(timeout_s=5)
    where = UdpAddress("127.0.0.1", client.address.port)
    assert question.sender == where
    stranger.send(b"forged", where)
    await asyncio.sleep(0.01)
    server.send(b"answer", where)
    assert await client.receive(timeout_s=5) == (b"answer", server.address)
    with pytest.raises(InvalidArgument):
        client.send(b"x", stranger.address)
    with pytest.raises(InvalidArgument):
        server.send(b"x")
    await closed(client, server, stranger)


async def test_nobody_there_is_told_to_who_asked(world: World) -> None:
    gone = await open_udp_socket(world, LOOPBACK)
    address = gone.address
    await closed(gone)
    client = await open_udp_socket(world, remote=address)
    client.send(b"anybody?")
    with pytest.raises(KernelError) as caught:
        await client.receive(timeout_s=5)
    assert caught.value.errno == errno.ECONNREFUSED
    with pytest.raises(DeadlineExceeded):
        await client.receive(timeout_s=0.01)
    await closed(client)


async def test_what_nobody_takes_is_bounded(world: World) -> None:
    receiver = await open_udp_socket(world, LOOPBACK, n_queued_max=3)
    sender = await open_udp_socket(world, LOOPBACK)
    for number in range(10):
        sender.send(b"%d" % number, receiver.address)
    async with asyncio.timeout(40):
        while receiver.statistics().n_received < 10:
            await asyncio.sleep(0.001)
    assert receiver.statistics().n_dropped == 7
    for _ in range(3):
        await receiver.receive()
    with pytest.raises(DeadlineExceeded):
        await receiver.receive(timeout_s=0.01)
    await closed(receiver, sender)


async def test_closing_wakes_the_receiver(world: World) -> None:
    receiver = await open_udp_socket(world, LOOPBACK)
    receiving = asyncio.ensure_future(receiver.receive())
    await asyncio.sleep(0.001)
    with pytest.raises(RuntimeError, match="another task"):
        await receiver.receive()
    await closed(receiver)
    with pytest.raises(Disconnected):
        await receiving
    with pytest.raises(Disconnected):
        receiver.send(b"x", LOOPBACK)
    assert [datagram async for datagram in receiver] == []


async def test_bounds_and_taken_ports(world: World) -> None:
    first = await open_udp_socket(world, LOOPBACK)
    with pytest.raises(KernelError) as caught:
        await open_udp_socket(world, first.address)
    assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(InvalidArgument, match="at most 65507"):
        first.send(bytes(65508), first.address)
    with pytest.raises(InvalidArgument, match="empty"):
        first.send(b"", first.address)
    shared = [await open_udp_socket(world, UdpAddress("127.0.0.1", 45_454), reuse_port=True) for _ in range(2)]
    await closed(first, *shared)


async def test_a_server_answers_with_a_function(world: World) -> None:
    reports: list[str] = []
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: reports.append(context["message"]))
    server = await serve_udp(
        world, LOOPBACK, lambda data, _: None if data == b"quiet" else b"%d" % (10 // int(data)), group=SchedulingGroup("u")
    )
    client = await open_udp_socket(world, remote=server.address)
    for question in (b"quiet", b"0", b"5"):
        client.send(question)
    assert (await client.receive(timeout_s=5)).data == b"2"
    async with asyncio.timeout(40):
        while server.statistics().n_received < 3:
            await asyncio.sleep(0.001)
    loop.set_exception_handler(handler)
    assert reports == ["a UDP answer failed"]
    assert server.statistics()[:4] == (3, 1, 0, 1)
    server.close()
    await closed(client)


async def test_the_simulation_loses_and_doubles(sim_world: SimWorld) -> None:
    sim_world.network.datagrams.loss = 0.3
    sim_world.network.datagrams.duplication = 0.3
    receiver = await open_udp_socket(sim_world.world, LOOPBACK)
    sender = await open_udp_socket(sim_world.world, LOOPBACK)
    for number in range(200):
        sender.send(b"%d" % number, receiver.address)
        await asyncio.sleep(0.0001)
    await asyncio.sleep(1)
    got = [int((await receiver.receive()).data) for _ in range(receiver.statistics().n_received)]
    assert 0 < len(set(got)) < 200
    assert len(got) > len(set(got))
    await closed(receiver, sender)
