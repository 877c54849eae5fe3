"""UDP sockets of the host. Source: udp(7)."""

import asyncio
import socket

from isopod.world.host.resolve import HostResolver, Place
from isopod.world.network import DatagramFactory, UdpAddress


async def open_udp(
    resolver: HostResolver, local: UdpAddress | None, factory: DatagramFactory, *, remote: UdpAddress | None, reuse_port: bool
) -> tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]:
    """See `Network.open_udp`."""
    there = None if remote is None else (await resolver.resolve(remote.host, remote.port, kind=socket.SOCK_DGRAM))[0]
    here = None if local is None else (await resolver.resolve(local.host, local.port, passive=True, kind=socket.SOCK_DGRAM))[0]
    family = next((place.family for place in (there, here) if place is not None), socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((_any(family) if here is None else here).where)
        if there is not None:
            sock.connect(there.where)
    except BaseException:
        sock.close()
        raise
    loop = asyncio.get_running_loop()
    opening = loop.create_task(loop.create_datagram_endpoint(factory, sock=sock))
    try:
        return await asyncio.shield(opening)
    except BaseException:
        opening.add_done_callback(lambda _: _dispose(opening, sock))  # the loops forget a transport whose caller is cancelled
        raise


def _dispose(opening: "asyncio.Task[tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]]", sock: socket.socket) -> None:
    """Close what was opened for a caller who has gone."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].close()
    else:
        sock.close()


def _any(family: int) -> Place:
    return Place(family, ("::" if family == socket.AF_INET6 else "0.0.0.0", 0))  # noqa: S104 - an unbound sender's own address
