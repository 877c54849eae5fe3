"""Network, on both Worlds: streams over Unix sockets and TCP."""

import asyncio
import errno

import pytest

from isopod.world.network import Listener, TcpAddress, UnixAddress
from isopod.world.world import World
from tests.world.recorder import Recorder


async def test_bytes_go_both_ways(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/s")
    listener = await world.network.listen(address, lambda: Recorder(echo=True))
    transport, client = await world.network.connect(address, Recorder)
    assert isinstance(client, Recorder)
    transport.write(b"hello")
    assert await client.wait_received(5) == b"hello"
    await end(transport, client, listener)


async def test_a_megabyte_arrives_whole_and_in_order(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/s")
    listener = await world.network.listen(address, lambda: Recorder(echo=True))
    transport, client = await world.network.connect(address, Recorder)
    assert isinstance(client, Recorder)
    sent = b"".join(index.to_bytes(4, "big") for index in range(1 << 18))
    transport.write(sent)
    assert await client.wait_received(len(sent)) == sent
    await end(transport, client, listener)


async def test_half_close_reaches_the_peer_which_can_still_answer(world: World, folder: str) -> None:
    servers: list[Recorder] = []
    address = UnixAddress(f"{folder}/s")
    listener = await world.network.listen(address, lambda: remember(servers))
    transport, client = await world.network.connect(address, Recorder)
    assert isinstance(client, Recorder)
    transport.write(b"question")
    transport.write_eof()
    server_transport = await (await first(servers)).wait_made()
    await servers[0].wait_end()
    assert bytes(servers[0].received) == b"question"
    server_transport.write(b"answer")
    assert await client.wait_received(6) == b"answer"
    server_transport.close()
    await servers[0].wait_lost()
    await end(transport, client, listener)


async def test_the_peer_sees_a_close(world: World, folder: str) -> None:
    servers: list[Recorder] = []
    address = UnixAddress(f"{folder}/s")
    listener = await world.network.listen(address, lambda: remember(servers))
    transport, client = await world.network.connect(address, Recorder)
    assert isinstance(client, Recorder)
    server = await first(servers)
    transport.close()
    await server.wait_end()
    (await server.wait_made()).close()
    await server.wait_lost()
    await end(transport, client, listener)


async def test_nobody_there(world: World, folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        await world.network.connect(UnixAddress(f"{folder}/missing"), Recorder)


async def test_closing_a_listener_removes_its_file_and_keeps_its_connections(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/s")
    listener = await world.network.listen(address, lambda: Recorder(echo=True))
    transport, client = await world.network.connect(address, Recorder)
    assert isinstance(client, Recorder)
    transport.write(b"1")
    await client.wait_received(1)
    await listener.close()
    assert await world.disk.stat(address.path) is None
    with pytest.raises(FileNotFoundError):
        await world.network.connect(address, Recorder)
    transport.write(b"2")
    assert await client.wait_received(2) == b"12"
    transport.close()
    await client.wait_lost()


async def test_a_live_socket_is_not_taken_over(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/s")
    listener = await world.network.listen(address, lambda: Recorder(echo=True))
    with pytest.raises(OSError) as caught:
        await world.network.listen(address, Recorder)
    assert caught.value.errno == errno.EADDRINUSE
    transport, client = await world.network.connect(address, Recorder)
    assert isinstance(client, Recorder)
    transport.write(b"still there")
    assert await client.wait_received(11) == b"still there"
    await end(transport, client, listener)


async def test_a_closed_listener_makes_room_for_the_next(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/s")
    first_listener = await world.network.listen(address, Recorder)
    await first_listener.close()
    second_listener = await world.network.listen(address, Recorder)
    await second_listener.close()


async def test_a_socket_has_its_mode(world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/s")
    listener = await world.network.listen(address, Recorder, mode=0o640)
    found = await world.disk.stat(address.path)
    assert found is not None
    assert found.mode == 0o640
    assert await world.disk.list(folder) == ["s"]
    await listener.close()


async def test_listening_in_a_missing_folder(world: World, folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        await world.network.listen(UnixAddress(f"{folder}/missing/s"), Recorder)


async def test_tcp_on_a_free_port(world: World) -> None:
    listener = await world.network.listen(TcpAddress("127.0.0.1", 0), lambda: Recorder(echo=True))
    address = listener.address
    assert isinstance(address, TcpAddress)
    assert address.port != 0
    transport, client = await world.network.connect(address, Recorder)
    assert isinstance(client, Recorder)
    transport.write(b"hello")
    assert await client.wait_received(5) == b"hello"
    with pytest.raises(OSError) as caught:
        await world.network.listen(address, Recorder)
    assert caught.value.errno == errno.EADDRINUSE
    await end(transport, client, listener)
    with pytest.raises(ConnectionRefusedError):
        await world.network.connect(address, Recorder)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("n_turns", range(6))
async def test_a_connect_that_is_cancelled_at_any_moment_is_cancelled(world: World, folder: str, kind: str, n_turns: int) -> None:
    servers: list[Recorder] = []
    address = UnixAddress(f"{folder}/s") if kind == "unix" else TcpAddress("127.0.0.1", 0)
    listener = await world.network.listen(address, lambda: remember(servers))
    connecting = asyncio.ensure_future(world.network.connect(listener.address, Recorder))
    for _ in range(n_turns):
        await asyncio.sleep(0)
    connecting.cancel()
    try:
        transport, _ = await connecting
    except asyncio.CancelledError:
        assert connecting.cancelled()
    else:
        transport.abort()  # it was quicker
    last, _ = await world.network.connect(listener.address, Recorder)
    last.write(b"the ones before are accepted when this is read")
    while not any(server.received for server in servers):
        await asyncio.sleep(0)
    last.abort()
    for server in servers:
        await server.wait_end()
        (await server.wait_made()).abort()
    await listener.close()


async def test_connecting_to_packets_where_nobody_is(world: World, folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        await world.network.connect_packets(f"{folder}/missing")


def remember(servers: list[Recorder]) -> Recorder:
    servers.append(Recorder())
    return servers[-1]


async def first(servers: list[Recorder]) -> Recorder:
    """Return the first accepted connection: accepting may come after connecting."""
    async with asyncio.timeout(40):
        while not servers:
            await asyncio.sleep(0.001)
    await servers[0].wait_made()
    return servers[0]


async def end(transport: asyncio.Transport, client: Recorder, listener: Listener) -> None:
    transport.close()
    await client.wait_lost()
    await listener.close()
