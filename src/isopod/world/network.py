"""Network: the port to connections between processes, to datagrams and to the machine's resolver.

Stream connections are asyncio transports and protocols; with `tls=` the transport is the secured one and the protocol sees nothing else.
A connection refused for its certificate, or whose peer speaks no TLS, never reaches a listener's factory's protocol.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from isopod.world.tls import ClientTls, PeerIdentity, ServerTls, TlsMaterial, alpn_protocol, peer_identity

__all__ = [
    "Address",
    "ClientTls",
    "DatagramFactory",
    "Listener",
    "Network",
    "PacketConnection",
    "PeerIdentity",
    "ProtocolFactory",
    "ServerTls",
    "TcpAddress",
    "TcpOptions",
    "TlsMaterial",
    "UdpAddress",
    "UnixAddress",
    "alpn_protocol",
    "parse_address",
    "peer_identity",
]


class UnixAddress(NamedTuple):
    """A Unix stream socket's path."""

    path: str


class TcpAddress(NamedTuple):
    """A TCP end point; port 0 listens on a free one."""

    host: str
    port: int


class UdpAddress(NamedTuple):
    """A UDP end point; port 0 binds a free one."""

    host: str
    port: int


class TcpOptions(NamedTuple):
    """What tcp(7) lets one ask of a connection. Ignored for Unix sockets.

    Args:
        nodelay: Send small writes at once (TCP_NODELAY).
        keepalive_idle_s: Silence after which the kernel probes the peer; 0 never probes.
        keepalive_interval_s: Between probes.
        keepalive_count: Unanswered probes after which the connection is dead.
        user_timeout_s: How long sent bytes may stay unacknowledged (TCP_USER_TIMEOUT); 0 for the kernel's own, many minutes.
        reuse_port: Let several processes listen on one port (SO_REUSEPORT); the kernel shares connections out by hash.
    """

    nodelay: bool = True
    keepalive_idle_s: int = 60
    keepalive_interval_s: int = 10
    keepalive_count: int = 3
    user_timeout_s: float = 0.0
    reuse_port: bool = False


Address = UnixAddress | TcpAddress
PORT_MAX: Final = 65535
ProtocolFactory = Callable[[], asyncio.BaseProtocol]
DatagramFactory = Callable[[], asyncio.DatagramProtocol]


def parse_address(text: str) -> Address:
    """Return the address that "HOST:PORT", "[IPv6]:PORT" or "unix:PATH" stands for.

    Raises:
        ValueError: It stands for none.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or "\0" in path:
            raise ValueError(f"{text!r}: want an absolute path behind unix:")
        return UnixAddress(path)
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: an IPv6 address stands in brackets")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > PORT_MAX:
        raise ValueError(f"{text!r}: want HOST:PORT with a port up to {PORT_MAX}")
    return TcpAddress(host, int(port))


class Listener(Protocol):
    """A listening socket. Who opened it closes it."""

    @property
    def address(self) -> Address:
        """The bound address (with the real port)."""

    async def close(self) -> None:
        """Stop accepting and remove a Unix socket's file; open connections go on."""


class PacketConnection(Protocol):
    """A connected SOCK_SEQPACKET socket: record boundaries kept."""

    async def receive(self) -> bytes:
        """Return the next packet (at most 64 KiB), b"" when the peer closed."""

    async def send(self, data: bytes) -> None:
        """Send one packet, waiting while the peer's buffer is full."""

    def shutdown_write(self) -> None:
        """Say that nothing more will be sent (half close)."""

    def close(self) -> None:
        """Close; a pending `receive` returns b""."""


class Network(Protocol):
    """Listen and connect. Failures are the OSErrors of socket(7), in both Worlds; those of TLS are errors of the tree."""

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
        """Accept connections, each with a new protocol from `factory`.

        Args:
            address: Where. A stale Unix socket file is replaced; a live one raises EADDRINUSE.
            factory: Makes the protocol of one connection.
            mode: Permission bits of a Unix socket's file, set before it can be connected to.
            gid: Its group, or None for the process's own.
            backlog: Connections that may wait to be accepted.
            tls: Secure every connection; the holder's context at the moment of accepting is used.
            options: Of every accepted TCP connection; None leaves the kernel's defaults, with TCP_NODELAY.
        """

    async def connect(
        self, address: Address, factory: ProtocolFactory, *, tls: ClientTls | None = None, options: TcpOptions | None = None
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Connect once; deadlines are the caller's, but for the handshake, which has its own.

        Args:
            address: Where to.
            factory: Makes the protocol.
            tls: Secure the connection. The name that must be proved is `tls.server_name`, else the address's host.
            options: As for `listen`.

        Raises:
            HandshakeFailed: No secured connection came about, and will not by trying again.
            DeadlineExceeded: The handshake took too long.
            OSError: Of connect(2).
        """

    async def connect_packets(self, path: str) -> PacketConnection:
        """Connect to a Unix SOCK_SEQPACKET socket."""

    async def open_udp(
        self, local: UdpAddress | None, factory: DatagramFactory, *, remote: UdpAddress | None = None, reuse_port: bool = False
    ) -> tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]:
        """Open a UDP socket; `datagram_received` gets the real sender as `(host, port)`.

        Args:
            local: Where to receive; None for any free port. The bound one is `transport.get_extra_info("sockname")`.
            factory: Makes the protocol.
            remote: The one peer: datagrams of others are not seen, and ICMP errors come to `error_received`.
            reuse_port: Let several processes bind one port.

        Returns:
            The transport, which the caller closes, and the protocol.
        """

    async def resolve(self, host: str, port: int = 0) -> Sequence[TcpAddress]:
        """Return the numeric addresses of a name, in the order they are worth trying, as the machine's resolver knows them.

        Raises:
            OSError: EHOSTUNREACH: there is no such name (its `filename` is "no such name" then) or the resolver failed; EAGAIN: too many
                look-ups are waiting.
        """
