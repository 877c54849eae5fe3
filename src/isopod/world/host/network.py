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
from isopod.world.network import Address, Listener, PacketConnection, ProtocolFactory, TcpAddress, UnixAddress

SUN_PATH_BYTES_MAX: Final = 107
PACKET_BYTES_MAX: Final = 64 << 10

_SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
_AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, _SocketAddress]


class HostNetwork:
    """`Network` by the kernel's sockets."""

    async def listen(
        self, address: Address, factory: ProtocolFactory, *, mode: int = 0o660, gid: int | None = None, backlog: int = 4096
    ) -> Listener:
        """See `Network.listen`."""
        loop = asyncio.get_running_loop()
        if isinstance(address, UnixAddress):
            sock, identity = _bind_unix(address.path, mode=mode, gid=gid, backlog=backlog)
            try:
                server = await loop.create_unix_server(factory, sock=sock, backlog=backlog)
            except BaseException:
                sock.close()
                _unlink_own(address.path, identity)
                raise
            return _UnixListener(server, address, identity)
        sock = await _bind_tcp(address, backlog)
        try:
            server = await loop.create_server(factory, sock=sock, backlog=backlog)
        except BaseException:
            sock.close()
            raise
        host, port = sock.getsockname()[:2]
        return _TcpListener(server, TcpAddress(host, port))

    async def connect(self, address: Address, factory: ProtocolFactory) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """See `Network.connect`."""
        loop = asyncio.get_running_loop()
        if isinstance(address, UnixAddress):
            sock = _connect_unix(address.path, socket.SOCK_STREAM)
            try:
                transport, protocol = await loop.create_unix_connection(factory, sock=sock)
            except BaseException:
                sock.close()
                raise
            return transport, protocol
        sock = await _connect_tcp(address)
        try:
            tcp_transport, tcp_protocol = await loop.create_connection(factory, sock=sock)
        except BaseException:
            sock.close()
            raise
        return tcp_transport, tcp_protocol

    async def connect_packets(self, path: str) -> PacketConnection:
        """See `Network.connect_packets`."""
        return HostPacketConnection(_connect_unix(path, socket.SOCK_SEQPACKET))


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


async def _bind_tcp(address: TcpAddress, backlog: int) -> socket.socket:
    """Return a listening socket on the first address that the name has: one listener, one port."""
    family, where = (await _resolve(address, passive=True))[0]
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_tcp(address: TcpAddress) -> socket.socket:
    """Return a connected socket, trying the addresses of the name in their order; the first one's failure is raised."""
    loop = asyncio.get_running_loop()
    failure: OSError | None = None
    for family, where in await _resolve(address, passive=False):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await loop.sock_connect(sock, where)
        except OSError as error:
            sock.close()
            failure = failure or error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    assert failure is not None
    raise failure


async def _resolve(address: TcpAddress, *, passive: bool) -> Sequence[tuple[int, _SocketAddress]]:
    """Return the (family, address) pairs of a host; numeric ones without a thread."""
    flags = socket.AI_PASSIVE if passive else 0
    try:
        numeric = flags | socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        found: Sequence[_AddressInfo] = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=numeric)
    except socket.gaierror:
        found = await _look_up(address, flags)
    return [(family, where) for family, _, _, _, where in found]


async def _look_up(address: TcpAddress, flags: int) -> Sequence[_AddressInfo]:
    loop = asyncio.get_running_loop()
    try:
        return await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as error:  # its number is not an errno
        raise OSError(errno.EHOSTUNREACH, f"cannot resolve {address.host}: {error.strerror}") from error
