"""TCP sockets of the host: binding, connecting and their options. Sources: tcp(7), socket(7)."""

import asyncio
import socket
from collections.abc import Sequence
from typing import cast

from isopod.world.host.resolve import Place
from isopod.world.network import ProtocolFactory, TcpOptions


def bind_tcp(place: Place, backlog: int, options: TcpOptions | None) -> socket.socket:
    """Return a listening socket: one listener, one port. What is set on it here the connections it accepts inherit."""
    sock = socket.socket(place.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, socket.IPPROTO_TCP)  # asyncio looks at it
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if options is not None:
            _apply(sock, options)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(options.reuse_port))
        sock.bind(place.where)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


async def connect_tcp(places: Sequence[Place], options: TcpOptions | None) -> socket.socket:
    """Return a connected socket, trying the addresses of the name in their order; the first one's failure is raised."""
    loop = asyncio.get_running_loop()
    failure: OSError | None = None
    for family, where in places:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, socket.IPPROTO_TCP)
        try:
            if options is not None:
                _apply(sock, options)
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


def keep_delay(factory: ProtocolFactory) -> ProtocolFactory:
    """Return a factory whose connections have Nagle's algorithm on, which both loops switch off when they accept."""
    return lambda: _Delaying(factory())


class _Delaying(asyncio.Protocol):
    """Stands in for a protocol until its connection is made."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the option and step aside."""
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        cast(asyncio.Transport, transport).set_protocol(self._protocol)
        self._protocol.connection_made(transport)


def _apply(sock: socket.socket, options: TcpOptions) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, int(options.nodelay))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(options.keepalive_idle_s > 0))
    if options.keepalive_idle_s > 0:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, options.keepalive_idle_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, options.keepalive_interval_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, options.keepalive_count)
    if options.user_timeout_s > 0:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(options.user_timeout_s * 1000))
