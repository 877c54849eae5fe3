"""Sending files over connections: equal bytes whatever the way, whoever reads, and whatever ends in the middle (S12)."""

import asyncio
import errno
import hashlib
import os
import socket
from typing import Final, Self, cast

import pytest

from isopod.world.disk import OpenFlags
from isopod.world.network import Address, ClientTls, ServerTls, TcpAddress, UnixAddress
from isopod.world.world import World
from tests.net.certificates import client_material, server_material

DATA: Final = b"".join(hashlib.sha256(index.to_bytes(4)).digest() for index in range(100_000))
"""3.2 MB that do not repeat: more than socket buffers hold."""


class Peer(asyncio.Protocol):
    """Collects what comes; may be slow, and may leave in the middle.

    Args:
        leave_after: Drop the connection after so many bytes.
        is_slow: Read a piece at a time, with pauses.
    """

    def __init__(self, *, leave_after: int | None = None, is_slow: bool = False) -> None:
        self.data = bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leave_after = leave_after
        self._is_slow = is_slow
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of that class

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self.data += data
        if self._leave_after is not None and len(self.data) >= self._leave_after:
            self._transport.abort()
        elif self._is_slow:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(0.002, self._go_on)

    def _go_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class Sender(asyncio.Protocol):
    """The sending end."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


class Pair:
    """A connection: `peer` reads, `transport` sends. Use as `async with`."""

    def __init__(self, world: World, address: Address, peer: Peer) -> None:
        self._world = world
        self._address = address
        self.peer = peer

    async def __aenter__(self) -> Self:
        self._listener = await self._world.network.listen(self._address, lambda: self.peer)
        self.sender = Sender()
        await self._world.network.connect(self._listener.address, lambda: self.sender)
        assert self.sender.transport is not None
        self.transport = self.sender.transport
        return self

    async def __aexit__(self, *failure: object) -> None:
        self.transport.close()
        await self.sender.lost
        if self.peer._transport is not None:
            self.peer._transport.close()
            await self.peer.ended
        await self._listener.close()


def address_in(folder: str, kind: str) -> Address:
    return TcpAddress("127.0.0.1", 0) if kind == "tcp" else UnixAddress(f"{folder}/s")


@pytest.mark.row("S12")
@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("how", ["quick", "slow"])
async def test_what_arrives_is_the_file(world: World, folder: str, kind: str, how: str) -> None:
    await world.disk.write(f"{folder}/a", DATA)
    async with Pair(world, address_in(folder, kind), Peer(is_slow=how == "slow")) as pair:
        file = await world.disk.open_file(f"{folder}/a")
        pair.transport.write(b"head " * 50_000)
        assert await world.disk.send_file(file, pair.transport, offset=0, n_bytes=len(DATA)) == len(DATA)
        pair.transport.write(b" middle ")
        assert await world.disk.send_file(file, pair.transport, offset=1001, n_bytes=70_001) == 70_001
        pair.transport.write(b" end")
        file.close()
        pair.transport.close()
        await pair.peer.ended
        assert bytes(pair.peer.data) == b"head " * 50_000 + DATA + b" middle " + DATA[1001:71_002] + b" end"


@pytest.mark.row("S12")
async def test_a_file_that_ends_early_is_told_by_the_count(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"abcdef")
    async with Pair(world, address_in(folder, "tcp"), Peer()) as pair:
        file = await world.disk.open_read(f"{folder}/a")
        assert await world.disk.send_file(file, pair.transport, offset=2, n_bytes=100) == 4
        assert await world.disk.send_file(file, pair.transport, offset=6, n_bytes=100) == 0
        assert await world.disk.send_file(file, pair.transport, offset=0, n_bytes=0) == 0
        file.close()
        pair.transport.close()
        await pair.peer.ended
        assert bytes(pair.peer.data) == b"cdef"


@pytest.mark.row("S12")
async def test_a_direct_file_is_sent_too(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", DATA)
    async with Pair(world, address_in(folder, "tcp"), Peer()) as pair:
        file = await world.disk.open_file(f"{folder}/a", OpenFlags.read_only(direct=True))
        assert await world.disk.send_file(file, pair.transport, offset=7, n_bytes=len(DATA)) == len(DATA) - 7
        file.close()
        pair.transport.close()
        await pair.peer.ended
        assert bytes(pair.peer.data) == DATA[7:]


@pytest.mark.row("S12")
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_a_peer_that_dies_in_the_middle_is_an_error(world: World, folder: str, kind: str) -> None:
    await world.disk.write(f"{folder}/a", DATA * 3)
    async with Pair(world, address_in(folder, kind), Peer(leave_after=100_000)) as pair:
        file = await world.disk.open_file(f"{folder}/a")
        with pytest.raises(ConnectionError):
            await world.disk.send_file(file, pair.transport, offset=0, n_bytes=3 * len(DATA))
        file.close()


@pytest.mark.host
async def test_a_file_closed_meanwhile_is_sent_to_its_end(host_world: World, folder: str) -> None:
    world = host_world
    await world.disk.write(f"{folder}/a", DATA)
    async with Pair(world, address_in(folder, "tcp"), Peer(is_slow=True)) as pair:
        file = await world.disk.open_file(f"{folder}/a")
        sending = asyncio.ensure_future(world.disk.send_file(file, pair.transport, offset=0, n_bytes=len(DATA)))
        await asyncio.sleep(0.01)
        file.close()
        assert await sending == len(DATA)
        pair.transport.close()
        await pair.peer.ended
        assert bytes(pair.peer.data) == DATA


@pytest.mark.row("S12")
async def test_a_transport_closed_while_it_waits_ends_the_call(world: World, folder: str) -> None:
    """A server that gives up a slow reader: the call must not hold the connection for ever."""
    await world.disk.write(f"{folder}/a", DATA * 3)
    peer = Peer()
    async with Pair(world, address_in(folder, "tcp"), peer) as pair:
        while peer._transport is None:
            await asyncio.sleep(0.001)
        peer._transport.pause_reading()
        file = await world.disk.open_file(f"{folder}/a")
        sending = asyncio.ensure_future(world.disk.send_file(file, pair.transport, offset=0, n_bytes=3 * len(DATA)))
        await asyncio.sleep(0.05)  # buffers are full by now, or the call is ended all the same
        pair.transport.abort()
        with pytest.raises(ConnectionError):
            await sending
        with pytest.raises(ConnectionError):
            await world.disk.send_file(file, pair.transport, offset=0, n_bytes=1)
        file.close()


@pytest.mark.row("S12")
@pytest.mark.parametrize("how", ["quick", "slow"])
async def test_a_file_is_sent_over_tls(world: World, folder: str, how: str) -> None:
    """Nothing can be sent by the kernel there: it goes in pieces, and never far ahead of the peer."""
    await world.disk.write(f"{folder}/a", DATA)
    peer = Peer(is_slow=how == "slow")
    listener = await world.network.listen(TcpAddress("127.0.0.1", 0), lambda: peer, tls=ServerTls(server_material()))
    sender = Sender()
    await world.network.connect(listener.address, lambda: sender, tls=ClientTls(client_material()))
    assert sender.transport is not None
    file = await world.disk.open_file(f"{folder}/a")
    assert await world.disk.send_file(file, sender.transport, offset=1, n_bytes=len(DATA)) == len(DATA) - 1
    file.close()
    sender.transport.close()
    await peer.ended
    await sender.lost
    await listener.close()
    assert bytes(peer.data) == DATA[1:]


async def test_a_cancelled_call_lets_the_file_close(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", DATA * 3)
    peer = Peer()
    async with Pair(world, address_in(folder, "tcp"), peer) as pair:
        while peer._transport is None:
            await asyncio.sleep(0.001)
        peer._transport.pause_reading()
        file = await world.disk.open_file(f"{folder}/a")
        sending = asyncio.ensure_future(world.disk.send_file(file, pair.transport, offset=0, n_bytes=3 * len(DATA)))
        await asyncio.sleep(0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        file.close()
        pair.transport.abort()


@pytest.mark.row("S12")
async def test_gathered_writes_arrive_in_order(world: World, folder: str) -> None:
    pieces: list[bytes | bytearray | memoryview] = [
        DATA[:10],
        bytearray(DATA[10:1000]),
        memoryview(DATA)[1000:500_000],
        b"",
        DATA[500_000:],
    ]
    async with Pair(world, address_in(folder, "tcp"), Peer()) as pair:
        pair.transport.writelines(pieces)
        pair.transport.close()
        await pair.peer.ended
        assert bytes(pair.peer.data) == DATA


@pytest.mark.host
@pytest.mark.row("S12")
async def test_a_file_is_spliced_into_a_pipe(host_world: World, folder: str) -> None:
    await host_world.disk.write(f"{folder}/a", DATA)
    loop = asyncio.get_running_loop()
    read_end, write_end = os.pipe()
    transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(write_end, "wb", 0))
    reader = asyncio.StreamReader()
    reading, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb", 0))
    file = await host_world.disk.open_read(f"{folder}/a")
    sending = asyncio.ensure_future(host_world.disk.send_file(file, transport, offset=5, n_bytes=len(DATA)))
    assert await reader.readexactly(len(DATA) - 5) == DATA[5:]
    assert await sending == len(DATA) - 5
    file.close()
    transport.close()
    reading.close()
    await asyncio.sleep(0.01)


@pytest.mark.host
@pytest.mark.row("S12")
async def test_the_bytes_do_not_pass_through_the_transport(host_world: World, folder: str) -> None:
    """sendfile is really used: the transport, whose write would be the other way, is never written to."""
    await host_world.disk.write(f"{folder}/a", DATA)

    class Recorder(asyncio.Transport):
        def __init__(self, own: socket.socket) -> None:
            super().__init__({"socket": own})

        def is_closing(self) -> bool:
            return False

        def get_write_buffer_size(self) -> int:
            return 0

        def write(self, data: bytes | bytearray | memoryview) -> None:
            raise AssertionError("written by the transport")

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    file = await host_world.disk.open_read(f"{folder}/a")
    sending = asyncio.ensure_future(host_world.disk.send_file(file, Recorder(ours), offset=0, n_bytes=len(DATA)))
    found = bytearray()
    while len(found) < len(DATA):
        found += await asyncio.get_running_loop().sock_recv(theirs, 1 << 16)
    assert await sending == len(DATA)
    assert bytes(found) == DATA
    file.close()
    ours.close()
    theirs.close()


@pytest.mark.host
async def test_what_sendfile_refuses_is_sent_in_pieces(host_world: World, folder: str) -> None:
    """A descriptor opened for appending may be the source, a pipe's reading end as transport is refused by the kernel at once."""
    await host_world.disk.write(f"{folder}/a", b"abc")
    file = await host_world.disk.open_append(f"{folder}/a")
    await file.append(b"def")
    async with Pair(host_world, UnixAddress(f"{folder}/s"), Peer()) as pair:
        assert await host_world.disk.send_file(file, pair.transport, offset=1, n_bytes=100) == 5
        pair.transport.close()
        await pair.peer.ended
        assert bytes(pair.peer.data) == b"bcdef"
    file.close()
    with pytest.raises(OSError) as caught:
        await host_world.disk.open_file("/dev/null")
    assert caught.value.errno == errno.EINVAL
