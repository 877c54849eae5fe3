"""UDP: a socket to receive from and send to with `await`, and a server that answers datagrams.

Datagrams may be lost, doubled and reordered, here as on any network. What arrives while nobody receives is kept up to a bound; beyond it
the newest are dropped and counted: a receiver that is behind does not catch up by dropping what it has.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from typing import Any, Final, NamedTuple, cast

from isopod.runtime.scheduling import SchedulingGroup
from isopod.world.errors import DeadlineExceeded, Disconnected, InvalidArgument, KernelError
from isopod.world.network import UdpAddress
from isopod.world.world import World

QUEUE_MAX: Final = 1024
DATAGRAM_BYTES_MAX: Final = 65507
Answer = Callable[[bytes, UdpAddress], bytes | None]
"""Answers a datagram from its sender, or not."""


class Datagram(NamedTuple):
    """What came, and from where."""

    data: bytes
    sender: UdpAddress


class UdpStatistics(NamedTuple):
    """Counts since the beginning."""

    n_received: int
    n_sent: int
    n_dropped: int
    """Arrived when the queue was full."""
    n_errors: int
    n_bytes_received: int
    n_bytes_sent: int


class UdpSocket(asyncio.DatagramProtocol):
    """One UDP socket; `open_udp_socket` makes it, who opened it closes it.

    Args:
        n_queued_max: Datagrams kept while nobody receives.
        remote: The one peer, or None.
    """

    def __init__(self, n_queued_max: int = QUEUE_MAX, *, remote: UdpAddress | None = None) -> None:
        self._n_queued_max = n_queued_max
        self._remote = remote
        self._queue: deque[Datagram] = deque()
        self._failure: OSError | None = None
        self._receiver: asyncio.Future[None] | None = None
        self._transport: asyncio.DatagramTransport | None = None
        self._is_closed = False
        self._counts = [0] * 6

    @property
    def address(self) -> UdpAddress:
        """The bound address, with the real port."""
        assert self._transport is not None
        name = self._transport.get_extra_info("sockname")
        return UdpAddress(str(name[0]), int(name[1]))

    def send(self, data: bytes, to: UdpAddress | None = None) -> None:
        """Send one datagram, without waiting; it may be lost on the way.

        Args:
            data: 1 to 65507 bytes.
            to: A numeric address; None for the one peer.

        Raises:
            InvalidArgument: It is empty or too large, or there is nobody to send it to.
            Disconnected: The socket is closed.
        """
        if self._transport is None or self._is_closed:
            raise Disconnected("UDP socket", "it is closed")
        if len(data) > DATAGRAM_BYTES_MAX:
            raise InvalidArgument("datagram", f"{len(data)} bytes", f"at most {DATAGRAM_BYTES_MAX} fit")
        if not data:
            raise InvalidArgument("datagram", "0 bytes", "the event loops do not send empty ones")
        if (to is None) == (self._remote is None):
            raise InvalidArgument("receiver", to, "a socket with a peer sends to that one, any other needs an address")
        self._transport.sendto(data, None if to is None else (to.host, to.port))
        self._counts[1] += 1
        self._counts[5] += len(data)

    async def receive(self, *, timeout_s: float | None = None) -> Datagram:
        """Return the next datagram.

        Args:
            timeout_s: How long to wait; None for ever.

        Raises:
            DeadlineExceeded: None came in time.
            KernelError: The one peer cannot be reached (it told us by ICMP).
            Disconnected: The socket was closed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self._queue:
                    await self._wait()
        except TimeoutError as error:
            raise DeadlineExceeded("receiving a datagram", timeout_s or 0) from error
        return self._queue.popleft()

    async def __aiter__(self) -> AsyncIterator[Datagram]:
        """Iterate over datagrams until the socket is closed."""
        while True:
            try:
                yield await self.receive()
            except Disconnected:
                return

    def statistics(self) -> UdpStatistics:
        """Return the counts."""
        return UdpStatistics(*self._counts)

    def close(self) -> None:
        """Close; a pending `receive` raises."""
        self._is_closed = True
        if self._transport is not None:
            self._transport.close()
        self._wake()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        """Keep a datagram."""
        self._counts[0] += 1
        self._counts[4] += len(data)
        if len(self._queue) >= self._n_queued_max:
            self._counts[2] += 1
            return
        self._queue.append(Datagram(data, UdpAddress(str(addr[0]), int(addr[1]))))
        self._wake()

    def error_received(self, exc: Exception) -> None:
        """Something sent could not be delivered."""
        self._counts[3] += 1
        if isinstance(exc, OSError) and self._remote is not None:
            self._failure = exc
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        self._is_closed = True
        self._wake()

    async def _wait(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise KernelError("reach", str(self._remote and self._remote.host), failure.errno or 0)
        if self._is_closed:
            raise Disconnected("UDP socket", "it is closed")
        if self._receiver is not None:
            raise RuntimeError("another task is receiving from this socket")
        self._receiver = asyncio.get_running_loop().create_future()
        try:
            await self._receiver
        finally:
            self._receiver = None

    def _wake(self) -> None:
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)


async def open_udp_socket(
    world: World,
    local: UdpAddress | None = None,
    *,
    remote: UdpAddress | None = None,
    n_queued_max: int = QUEUE_MAX,
    reuse_port: bool = False,
) -> UdpSocket:
    """Open a socket.

    Args:
        world: The ports.
        local: Where to receive; None for any free port.
        remote: The one peer to send to and hear from; None for anybody.
        n_queued_max: Datagrams kept while nobody receives.
        reuse_port: Let several processes bind one port.

    Raises:
        KernelError: The address cannot be bound or reached.
    """
    try:
        _, opened = await world.network.open_udp(
            local, lambda: UdpSocket(n_queued_max, remote=remote), remote=remote, reuse_port=reuse_port
        )
    except OSError as error:
        raise KernelError("open UDP", str(local or remote or "any port"), error.errno or 0) from error
    assert isinstance(opened, UdpSocket)
    return opened


class UdpServer(asyncio.DatagramProtocol):
    """Answers datagrams with a plain function, in the loop's own turn; `serve_udp` makes it."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._transport: asyncio.DatagramTransport | None = None
        self._counts = [0] * 6

    @property
    def address(self) -> UdpAddress:
        """The bound address, with the real port."""
        assert self._transport is not None
        name = self._transport.get_extra_info("sockname")
        return UdpAddress(str(name[0]), int(name[1]))

    def statistics(self) -> UdpStatistics:
        """Return the counts; an answer that raised is an error."""
        return UdpStatistics(*self._counts)

    def close(self) -> None:
        """Close."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        """Answer one datagram; an answer that raises is reported and sends nothing."""
        self._counts[0] += 1
        self._counts[4] += len(data)
        try:
            answer = self._answer(data, UdpAddress(str(addr[0]), int(addr[1])))
        except Exception as error:  # noqa: BLE001 - one bad datagram must not end the server
            self._counts[3] += 1
            asyncio.get_running_loop().call_exception_handler({"message": "a UDP answer failed", "exception": error})
            return
        if answer is not None and self._transport is not None and len(answer) <= DATAGRAM_BYTES_MAX:
            self._transport.sendto(answer, addr)
            self._counts[1] += 1
            self._counts[5] += len(answer)

    def error_received(self, exc: Exception) -> None:
        """An answer could not be delivered."""
        self._counts[3] += 1


async def serve_udp(
    world: World, local: UdpAddress, answer: Answer, *, group: SchedulingGroup | None = None, reuse_port: bool = False
) -> UdpServer:
    """Answer datagrams.

    Args:
        world: The ports.
        local: Where.
        answer: Returns the answer to a datagram, or None.
        group: Whose share of time it uses.
        reuse_port: Let several processes bind one port.

    Returns:
        The server, which the caller closes.

    Raises:
        KernelError: The address cannot be bound.
    """
    with group.active() if group is not None else nullcontext():
        try:
            _, server = await world.network.open_udp(local, lambda: UdpServer(answer), reuse_port=reuse_port)
        except OSError as error:
            raise KernelError("open UDP", f"{local.host}:{local.port}", error.errno or 0) from error
    assert isinstance(server, UdpServer)
    return server
