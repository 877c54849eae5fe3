"""The host's sockets.

Unix sockets are bound under a temporary name, given mode and group, made to listen, and only then renamed into place: nobody can
connect to one that has not its final permissions, and who sees the name can connect. Paths longer than `sun_path` (107 bytes) go
through /proc/self/fd/FOLDER/NAME. Two listeners that race for one path are kept apart by a lock on its folder. A full accept queue
raises EAGAIN, as connect(2) does for Unix sockets: there is nothing to wait on. Sources: unix(7), ip(7), socket(7).
"""

import asyncio
import errno
import fcntl
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from isopod.world.host.readiness import Readiness
from isopod.world.host.resolve import HostResolver
from isopod.world.host.tcp import bind_tcp, connect_tcp, keep_delay
from isopod.world.host.udp import open_udp
from isopod.world.network import (
    Address,
    ClientTls,
    DatagramFactory,
    Listener,
    PacketConnection,
    ProtocolFactory,
    ServerTls,
    TcpAddress,
    TcpOptions,
    UdpAddress,
    UnixAddress,
)
from isopod.world.tls_stream import secure_client, securing

SUN_PATH_BYTES_MAX: Final = 107
PACKET_BYTES_MAX: Final = 64 << 10


class HostNetwork:
    """`Network` by the kernel's sockets. `close` ends the resolver's threads."""

    def __init__(self) -> None:
        self._resolver = HostResolver()

    async def listen(
        self,
        address: Address,
        factory: ProtocolFactory,
        *,
        mode: int = 0o660,
        gid: int | None = None,
        backlog: int = 4096,
        tls: ServerTls | None = None,
        options: TcpOptions | None = None,
    ) -> Listener:
        """See `Network.listen`."""
        loop = asyncio.get_running_loop()
        if tls is not None:
            factory = securing(factory, tls)
        if isinstance(address, UnixAddress):
            sock, identity = _bind_unix(address.path, mode=mode, gid=gid, backlog=backlog)
            try:
                server = await loop.create_unix_server(factory, sock=sock, backlog=backlog)
            except BaseException:
                sock.close()
                _unlink_own(address.path, identity)
                raise
            return _UnixListener(server, address, identity)
        if options is not None and not options.nodelay:
            factory = keep_delay(factory)
        where = (await self._resolver.resolve(address.host, address.port, passive=True))[0]
        sock = bind_tcp(where, backlog, options)
        try:
            server = await loop.create_server(factory, sock=sock, backlog=backlog)
        except BaseException:
            sock.close()
            raise
        host, port = sock.getsockname()[:2]
        return _TcpListener(server, TcpAddress(host, port))

    async def connect(
        self, address: Address, factory: ProtocolFactory, *, tls: ClientTls | None = None, options: TcpOptions | None = None
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """See `Network.connect`."""
        if isinstance(address, UnixAddress):
            sock = _connect_unix(address.path, socket.SOCK_STREAM)
        else:
            sock = await connect_tcp(await self._resolver.resolve(address.host, address.port), options)
        try:
            if tls is None:
                return await _begin(sock, factory, options)
            host = None if isinstance(address, UnixAddress) else address.host
            protocol = factory()
            stream, done = secure_client(protocol, tls, host)
            below, _ = await _begin(sock, lambda: stream, options)
        except BaseException:
            sock.close()
            raise
        try:
            await done
        except BaseException:
            below.abort()
            raise
        return stream, protocol

    async def connect_packets(self, path: str) -> PacketConnection:
        """See `Network.connect_packets`."""
        return HostPacketConnection(_connect_unix(path, socket.SOCK_SEQPACKET))

    async def open_udp(
        self, local: UdpAddress | None, factory: DatagramFactory, *, remote: UdpAddress | None = None, reuse_port: bool = False
    ) -> tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]:
        """See `Network.open_udp`."""
        return await open_udp(self._resolver, local, factory, remote=remote, reuse_port=reuse_port)

    async def resolve(self, host: str, port: int = 0) -> Sequence[TcpAddress]:
        """See `Network.resolve`."""
        found = await self._resolver.resolve(host, port)
        return [TcpAddress(socket.getnameinfo(each.where, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0], port) for each in found]

    def close(self) -> None:
        """End the resolver's threads after their present look-ups."""
        self._resolver.close()


class HostPacketConnection:
    """`PacketConnection` by a non-blocking socket. An empty record cannot be told from the end, as in recv(2)."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._ready = Readiness(sock.fileno())

    async def receive(self) -> bytes:
        """See `PacketConnection.receive`. A record over 64 KiB raises EMSGSIZE instead of being cut."""
        while not self._ready.closed:
            try:
                data, _, flags, _ = self._socket.recvmsg(PACKET_BYTES_MAX)
            except BlockingIOError:
                await self._ready.wait_readable()
            except ConnectionResetError:  # the peer closed without having read all: for us just the end
                return b""
            else:
                if flags & socket.MSG_TRUNC:
                    raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
                return data
        return b""

    async def send(self, data: bytes) -> None:
        """See `PacketConnection.send`."""
        while True:
            try:
                self._socket.send(data)
            except BlockingIOError:
                await self._ready.wait_writable()
            else:
                return

    def shutdown_write(self) -> None:
        """See `PacketConnection.shutdown_write`."""
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See `PacketConnection.close`."""
        self._ready.close()
        self._socket.close()


class _TcpListener:
    def __init__(self, server: asyncio.AbstractServer, address: TcpAddress) -> None:
        self._server = server
        self._address = address

    @property
    def address(self) -> Address:
        return self._address

    async def close(self) -> None:
        self._server.close()
        await _turn()


class _UnixListener:
    def __init__(self, server: asyncio.AbstractServer, address: UnixAddress, identity: tuple[int, int]) -> None:
        self._server = server
        self._address = address
        self._identity = identity

    @property
    def address(self) -> Address:
        return self._address

    async def close(self) -> None:
        _unlink_own(self._address.path, self._identity)
        self._server.close()
        await _turn()


async def _turn() -> None:
    """Let the loop close the listening socket: uvloop does so in its next turn."""
    for _ in range(2):
        await asyncio.sleep(0)


def _bind_unix(path: str, *, mode: int, gid: int | None, backlog: int) -> tuple[socket.socket, tuple[int, int]]:
    """Return a listening socket that stands at `path`, and the (device, inode) of its file."""
    temporary = ".bind-" + secrets.token_hex(6)
    with _locked_folder(path) as (folder_fd, name):
        _refuse_live(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind(f"/proc/self/fd/{folder_fd}/{temporary}")
            os.chmod(temporary, mode, dir_fd=folder_fd)
            if gid is not None:
                os.chown(temporary, -1, gid, dir_fd=folder_fd)
            sock.listen(backlog)
            stat = os.stat(temporary, dir_fd=folder_fd, follow_symlinks=False)
            os.rename(temporary, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        except BaseException:
            sock.close()
            _unlink_quietly(temporary, folder_fd)
            raise
    return sock, (stat.st_dev, stat.st_ino)


def _refuse_live(path: str) -> None:
    """Raise EADDRINUSE if something other than a dead socket stands at `path`."""
    try:
        probe = _connect_unix(path, socket.SOCK_STREAM)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        if _is_socket(path):
            return
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE, errno.EACCES):
            raise
    else:
        probe.close()
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)


def _is_socket(path: str) -> bool:
    return os.lstat(path).st_mode & 0o170000 == 0o140000


def _unlink_own(path: str, identity: tuple[int, int]) -> None:
    """Remove a socket's file, unless another listener has replaced it or it is gone with its folder."""
    try:
        with _locked_folder(path) as (folder_fd, name):
            stat = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
            if (stat.st_dev, stat.st_ino) == identity:
                os.unlink(name, dir_fd=folder_fd)
    except FileNotFoundError:
        return


def _unlink_quietly(name: str, folder_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=folder_fd)
    except FileNotFoundError:
        return


@contextmanager
def _locked_folder(path: str) -> Iterator[tuple[int, str]]:
    """Open the folder of `path` and hold a lock on it; the lock is held for microseconds, and dies with its holder."""
    folder, name = os.path.split(path)
    folder_fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder_fd, fcntl.LOCK_EX)
        yield folder_fd, name
    finally:
        os.close(folder_fd)


def _connect_unix(path: str, kind: int) -> socket.socket:
    """Return a connected non-blocking socket: connect(2) on a Unix socket never waits, it answers or fails."""
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    try:
        with _short_path(path) as short:
            sock.connect(short)
    except BaseException:
        sock.close()
        raise
    return sock


@contextmanager
def _short_path(path: str) -> Iterator[str]:
    """Give a path that fits into `sun_path` for the time of a call.

    Raises:
        OSError: ENAMETOOLONG: even the last component alone does not fit.
    """
    if len(os.fsencode(path)) <= SUN_PATH_BYTES_MAX:
        yield path
        return
    folder, name = os.path.split(path)
    folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{folder_fd}/{name}"
        if len(os.fsencode(short)) > SUN_PATH_BYTES_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
        yield short
    finally:
        os.close(folder_fd)


async def _begin(
    sock: socket.socket, factory: ProtocolFactory, options: TcpOptions | None
) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
    """Hand a connected socket to the loop."""
    loop = asyncio.get_running_loop()
    if sock.family == socket.AF_UNIX:
        return await loop.create_unix_connection(factory, sock=sock)
    transport, protocol = await loop.create_connection(factory, sock=sock)
    if options is not None and not options.nodelay:  # the loops have switched it on
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    return transport, protocol
