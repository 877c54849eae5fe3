"""The host's sockets: what only real ones have. Packets, long paths, stale files, modes, races."""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from isopod.world.network import TcpAddress, UnixAddress
from isopod.world.world import World
from tests.world.recorder import Recorder


@contextmanager
def packet_server(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(path)
        server.listen(1)
        yield server


async def test_packets_keep_their_boundaries_both_ways(host_world: World, folder: str) -> None:
    with packet_server(f"{folder}/s") as server:
        connection = await host_world.network.connect_packets(f"{folder}/s")
        peer, _ = server.accept()
        with peer:
            receiving = asyncio.ensure_future(connection.receive())
            await asyncio.sleep(0.01)
            peer.send(b"one")
            peer.send(b"two")
            assert await receiving == b"one"
            assert await connection.receive() == b"two"
            await connection.send(b"three")
            await connection.send(b"four")
            assert (peer.recv(100), peer.recv(100)) == (b"three", b"four")
            connection.shutdown_write()
            assert peer.recv(100) == b""
            peer.send(b"after half close")
            assert await connection.receive() == b"after half close"
        assert await connection.receive() == b""
        connection.close()


async def test_sending_packets_waits_for_the_reader(host_world: World, folder: str) -> None:
    with packet_server(f"{folder}/s") as server:
        connection = await host_world.network.connect_packets(f"{folder}/s")
        peer, _ = server.accept()
        with peer:
            sending = asyncio.ensure_future(send_numbered(connection.send, 200))
            await asyncio.sleep(0.05)
            assert not sending.done()
            peer.setblocking(False)
            received: list[int] = []
            async with asyncio.timeout(40):
                while len(received) < 200:
                    try:
                        received.append(int.from_bytes(peer.recv(1 << 16)[:4], "big"))
                    except BlockingIOError:
                        await asyncio.sleep(0.001)
            await sending
            assert received == list(range(200))
        with pytest.raises(OSError):
            await connection.send(b"nobody")
        connection.close()


async def test_closing_wakes_a_pending_receive(host_world: World, folder: str) -> None:
    with packet_server(f"{folder}/s"):
        connection = await host_world.network.connect_packets(f"{folder}/s")
        receiving = asyncio.ensure_future(connection.receive())
        await asyncio.sleep(0.01)
        connection.close()
        assert await receiving == b""
        assert await connection.receive() == b""
        with pytest.raises(OSError):
            await connection.send(b"x")


async def test_a_cancelled_receive_loses_nothing(host_world: World, folder: str) -> None:
    with packet_server(f"{folder}/s") as server:
        connection = await host_world.network.connect_packets(f"{folder}/s")
        peer, _ = server.accept()
        with peer:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await connection.receive()
            peer.send(b"later")
            assert await connection.receive() == b"later"
        connection.close()


async def test_a_packet_over_the_bound_is_refused_not_cut(host_world: World, folder: str) -> None:
    with packet_server(f"{folder}/s") as server:
        connection = await host_world.network.connect_packets(f"{folder}/s")
        peer, _ = server.accept()
        with peer:
            peer.send(bytes((64 << 10) + 1))
            with pytest.raises(OSError) as caught:
                await connection.receive()
            assert caught.value.errno == errno.EMSGSIZE
        connection.close()


async def test_paths_longer_than_sun_path(host_world: World, folder: str) -> None:
    deep = f"{folder}/{'d' * 100}/{'e' * 100}"
    await host_world.disk.make_directory(deep)
    address = UnixAddress(f"{deep}/socket-of-the-container")
    listener = await host_world.network.listen(address, lambda: Recorder(echo=True))
    assert listener.address == address
    transport, client = await host_world.network.connect(address, Recorder)
    assert isinstance(client, Recorder)
    transport.write(b"far")
    assert await client.wait_received(3) == b"far"
    transport.close()
    await client.wait_lost()
    await listener.close()
    assert await host_world.disk.list(deep) == []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        folder_fd = os.open(deep, os.O_PATH)
        server.bind(f"/proc/self/fd/{folder_fd}/attach")
        os.close(folder_fd)
        server.listen(1)
        (await host_world.network.connect_packets(f"{deep}/attach")).close()
    with pytest.raises(OSError) as caught:
        await host_world.network.connect(UnixAddress(f"{deep}/{'n' * 120}"), Recorder)
    assert caught.value.errno == errno.ENAMETOOLONG


async def test_the_socket_of_a_dead_process_is_replaced(host_world: World, folder: str) -> None:
    path = f"{folder}/s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen(1)
    assert os.path.exists(path)
    with pytest.raises(ConnectionRefusedError):
        await host_world.network.connect(UnixAddress(path), Recorder)
    listener = await host_world.network.listen(UnixAddress(path), lambda: Recorder(echo=True))
    transport, client = await host_world.network.connect(UnixAddress(path), Recorder)
    assert isinstance(client, Recorder)
    transport.close()
    await client.wait_lost()
    await listener.close()
    assert os.listdir(folder) == []


async def test_what_is_no_socket_is_not_replaced(host_world: World, folder: str) -> None:
    await host_world.disk.write(f"{folder}/s", b"precious")
    with pytest.raises(OSError) as caught:
        await host_world.network.listen(UnixAddress(f"{folder}/s"), Recorder)
    assert caught.value.errno == errno.EADDRINUSE
    assert await host_world.disk.read(f"{folder}/s") == b"precious"


async def test_a_live_socket_of_another_kind_is_not_replaced(host_world: World, folder: str) -> None:
    with packet_server(f"{folder}/s"):
        with pytest.raises(OSError) as caught:
            await host_world.network.listen(UnixAddress(f"{folder}/s"), Recorder)
        assert caught.value.errno == errno.EADDRINUSE


async def test_mode_and_group_stand_before_the_name_does(host_world: World, folder: str) -> None:
    """Whoever sees the name in the folder sees it with its final mode and group: it is renamed into place."""
    path = f"{folder}/s"
    modes: list[tuple[int, int]] = []
    watching = asyncio.ensure_future(first_sight(host_world, folder, modes))
    await asyncio.sleep(0.01)
    old = os.umask(0o077)
    try:
        listener = await host_world.network.listen(UnixAddress(path), lambda: Recorder(echo=True), mode=0o660, gid=4242)
    finally:
        os.umask(old)
    found = os.stat(path)
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, 4242)
    await watching
    assert modes == [(0o660, 4242)]
    await listener.close()


async def test_the_file_of_a_successor_is_left_alone(host_world: World, folder: str) -> None:
    path = f"{folder}/s"
    listener = await host_world.network.listen(UnixAddress(path), lambda: Recorder(echo=True))
    os.unlink(path)
    successor = await host_world.network.listen(UnixAddress(path), lambda: Recorder(echo=True))
    await listener.close()
    assert os.path.exists(path)
    await successor.close()
    assert not os.path.exists(path)


async def test_of_twenty_who_want_one_path_one_gets_it(host_world: World, folder: str) -> None:
    address = UnixAddress(f"{folder}/s")
    attempts = [host_world.network.listen(address, lambda: Recorder(echo=True)) for _ in range(20)]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    listeners = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, OSError) and outcome.errno == errno.EADDRINUSE]
    assert (len(listeners), len(refused)) == (1, 19)
    assert os.listdir(folder) == ["s"]
    await listeners[0].close()


async def test_a_name_that_does_not_resolve(host_world: World) -> None:
    with pytest.raises(OSError, match="cannot resolve") as caught:
        await host_world.network.connect(TcpAddress("no-such-host.invalid", 80), Recorder)
    assert caught.value.errno == errno.EHOSTUNREACH


async def test_tcp_over_ipv6_loopback(host_world: World) -> None:
    addresses = "/proc/net/if_inet6"
    if not os.path.exists(addresses) or b" lo" not in await host_world.disk.read(addresses):
        pytest.skip("this machine has no IPv6 loopback")
    listener = await host_world.network.listen(TcpAddress("::1", 0), lambda: Recorder(echo=True))
    assert isinstance(listener.address, TcpAddress)
    transport, client = await host_world.network.connect(listener.address, Recorder)
    assert isinstance(client, Recorder)
    transport.write(b"six")
    assert await client.wait_received(3) == b"six"
    transport.close()
    await client.wait_lost()
    await listener.close()


async def send_numbered(send: Callable[[bytes], Awaitable[None]], n_packets: int) -> None:
    for index in range(n_packets):
        await send(index.to_bytes(4, "big") + bytes(8192))


async def first_sight(world: World, folder: str, modes: list[tuple[int, int]]) -> None:
    async with world.disk.watch(folder) as watch, asyncio.timeout(40):
        async for name in watch:
            if name == "s":
                found = os.stat(f"{folder}/s")
                modes.append((stat.S_IMODE(found.st_mode), found.st_gid))
                return


async def test_small_writes_are_sent_at_once_on_every_loop(host_world: World) -> None:
    """Else the last few bytes of an answer wait 40 ms for the reader's acknowledgement."""
    ours, theirs = Recorder(), Recorder()
    listener = await host_world.network.listen(TcpAddress("127.0.0.1", 0), lambda: theirs)
    assert isinstance(listener.address, TcpAddress)
    await host_world.network.connect(listener.address, lambda: ours)
    while theirs.transport is None:
        await theirs.changed.wait()
    for recorder in (ours, theirs):
        assert recorder.transport is not None
        assert recorder.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        recorder.transport.abort()
    await listener.close()
