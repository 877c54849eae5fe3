"""Network: the port to connections between processes."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol


class UnixAddress(NamedTuple):
    """A Unix stream socket's path."""

    path: str


class TcpAddress(NamedTuple):
    """A TCP end point; port 0 listens on a free one."""

    host: str
    port: int


Address = UnixAddress | TcpAddress
ProtocolFactory = Callable[[], asyncio.Protocol]


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
    """Listen and connect. Failures are the OSErrors of socket(7), in both Worlds."""

    async def listen(
        self, address: Address, factory: ProtocolFactory, *, mode: int = 0o660, gid: int | None = None, backlog: int = 4096
    ) -> Listener:
        """Accept connections, each with a new protocol from `factory`.

        Args:
            address: Where. A stale Unix socket file is replaced; a live one raises EADDRINUSE.
            factory: Makes the protocol of one connection.
            mode: Permission bits of a Unix socket's file, set before it can be connected to.
            gid: Its group, or None for the process's own.
            backlog: Connections that may wait to be accepted.
        """

    async def connect(self, address: Address, factory: ProtocolFactory) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Connect once; deadlines are the caller's."""

    async def connect_packets(self, path: str) -> PacketConnection:
        """Connect to a Unix SOCK_SEQPACKET socket."""
