"""Connection: one stream connection to read from and write to with `await`.

A protocol with one buffer, not asyncio's streams: half their cost, and every wait has its time limit. What arrives is kept up to
`buffer_bytes_max`, then the peer has to wait; what is written is kept without bound, so `drain` after writing much. One task reads at a
time, one drains.

Errors: `Disconnected` once the connection is gone (reset, or ended in the middle of what was asked for), `DeadlineExceeded` for a wait that
was too long (the connection stands; most callers close it), `ProtocolViolation` for a line that is longer than its bound.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol, cast

import msgspec

from isopod.world.errors import DeadlineExceeded, Disconnected, IsopodError, ProtocolViolation
from isopod.world.network import PeerIdentity, alpn_protocol, peer_identity

LINE_BYTES_MAX: Final = 64 << 10
READ_BYTES: Final = 64 << 10


class TcpLimits(msgspec.Struct, frozen=True):
    """Times in seconds, 0 for no limit, and bounds.

    Args:
        connect_s: To connect, TLS included.
        read_s: For one `read`, `readexactly` or `readuntil`, however slowly the bytes drip in.
        write_s: For one `drain`, and for what is left to send when the connection is closed.
        idle_s: Without a byte in either direction before a server closes the connection (within half as long again).
        buffer_bytes_max: Received bytes kept before the peer has to wait.
        n_connections_max: Connections a server has at a time; further ones are closed at once.
    """

    connect_s: float = 30.0
    read_s: float = 60.0
    write_s: float = 60.0
    idle_s: float = 300.0
    buffer_bytes_max: int = 256 << 10
    n_connections_max: int = 10_000


class ConnectionStatistics(NamedTuple):
    """Bytes so far."""

    n_bytes_read: int
    n_bytes_written: int


class Cancellable(Protocol):
    """A timer."""

    def cancel(self) -> None:
        """Do not fire."""


CallLater = Callable[..., Cancellable]
"""`call_later(delay_s, callback, *args)` of a loop or of a `TimerWheel`."""


class Connection(asyncio.Protocol):
    """One connection. Servers and clients make it; who got it closes it.

    Args:
        limits: Times and bounds.
        call_later: Who keeps the time.
        on_made: Called when the connection stands.
        on_lost: Called once when it is over.
    """

    def __init__(
        self,
        limits: TcpLimits,
        call_later: CallLater,
        *,
        on_made: "Callable[[Connection], None] | None" = None,
        on_lost: "Callable[[Connection], None] | None" = None,
    ) -> None:
        self.limits = limits
        self.n_bytes_read = 0
        self.n_bytes_written = 0
        self._call_later = call_later
        self._on_made = on_made
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._peer = "the peer"
        self._buffer = bytearray()
        self._at_end = False
        self._is_lost = False
        self._failure: Exception | None = None
        self._is_paused = False
        self._is_writable = True
        self._reader: asyncio.Future[None] | None = None
        self._deadline_s = 0.0
        self._watch: Cancellable | None = None
        self._writer: asyncio.Future[None] | None = None
        self._closing: asyncio.Future[None] | None = None

    # -- facts -------------------------------------------------------------------------------------------------------------------------

    @property
    def transport(self) -> asyncio.Transport:
        """The transport below: `set_protocol` takes the connection over."""
        assert self._transport is not None
        return self._transport

    @property
    def peer(self) -> str:
        """The other end, for messages."""
        return self._peer

    @property
    def identity(self) -> PeerIdentity | None:
        """Who the other end proved to be by a certificate."""
        return peer_identity(self.transport)

    @property
    def alpn(self) -> str:
        """The application protocol agreed on by TLS, "" for none."""
        return alpn_protocol(self.transport)

    @property
    def is_closed(self) -> bool:
        """Whether it is over, or closed by us."""
        return self._is_lost or self._transport is None or self._transport.is_closing()

    @property
    def at_end(self) -> bool:
        """Whether the peer has said that nothing follows, and all was read."""
        return self._at_end and not self._buffer

    def statistics(self) -> ConnectionStatistics:
        """Return the counts."""
        return ConnectionStatistics(self.n_bytes_read, self.n_bytes_written)

    # -- reading -----------------------------------------------------------------------------------------------------------------------

    async def read(self, n_bytes_max: int = READ_BYTES) -> bytes:
        """Return what is there, waiting for at least one byte; b"" at the end.

        Raises:
            DeadlineExceeded: Nothing came in time.
            Disconnected: The connection broke.
        """
        if not self._buffer and not self._at_end:
            await self._wait_for(1)
        return self._take(min(n_bytes_max, len(self._buffer)))

    async def readexactly(self, n_bytes: int) -> bytes:
        """Return so many bytes.

        Raises:
            DeadlineExceeded: They did not come in time.
            Disconnected: The connection ended before.
        """
        if len(self._buffer) < n_bytes:
            await self._wait_for(n_bytes)
            if len(self._buffer) < n_bytes:
                raise Disconnected(self._peer, f"it ended after {len(self._buffer)} of {n_bytes} bytes")
        return self._take(n_bytes)

    async def readuntil(self, separator: bytes = b"\n", *, n_bytes_max: int = LINE_BYTES_MAX) -> bytes:
        """Return everything up to and including a separator; b"" if the peer ended exactly before it.

        Raises:
            ProtocolViolation: There is none within `n_bytes_max` bytes.
            DeadlineExceeded: It did not come in time.
            Disconnected: The connection ended before it.
        """
        found = self._buffer.find(separator)
        if found < 0:
            found = await self._search(separator, n_bytes_max)
            if found < 0:
                return b""
        if found + len(separator) > n_bytes_max:
            raise ProtocolViolation(self._peer, f"no end of line within {n_bytes_max} bytes")
        return self._take(found + len(separator))

    # -- writing -----------------------------------------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, without waiting; after the end of the connection nothing happens, `drain` tells."""
        transport = self._transport
        if transport is not None and not transport.is_closing():  # uvloop's raises once it is closed
            self.n_bytes_written += len(data)
            transport.write(data)

    async def drain(self) -> None:
        """Wait until what was written is mostly sent.

        Raises:
            DeadlineExceeded: The peer does not read.
            Disconnected: The connection broke.
        """
        if self._is_lost:
            raise self._gone()
        if self._is_writable:
            return
        self._writer = asyncio.get_running_loop().create_future()
        timer = self._timer(self.limits.write_s, self._writer, "writing to")
        try:
            await self._writer
        finally:
            self._writer = None
            if timer is not None:
                timer.cancel()

    def write_eof(self) -> None:
        """Say that nothing more will be written; reading goes on."""
        if not self.is_closed and self.transport.can_write_eof():
            self.transport.write_eof()

    def close(self) -> None:
        """Close once everything written is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once, dropping what was not sent."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Close, and wait until it is over; a peer that takes nothing is dropped after `write_s`."""
        self.close()
        if self._is_lost:
            return
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
        timer = self._call_later(self.limits.write_s, self.abort) if self.limits.write_s else None
        try:
            await asyncio.shield(self._closing)
        finally:
            if timer is not None:
                timer.cancel()

    # -- called by the transport -------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's only look like it
        self._peer = describe_peer(transport)
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        """Keep what came, and wake who waits for it."""
        self._buffer += data
        self.n_bytes_read += len(data)
        if self._reader is not None:
            _wake(self._reader)
        elif len(self._buffer) > self.limits.buffer_bytes_max:
            self._pause()

    def eof_received(self) -> bool:
        """The peer writes no more; we may."""
        self._at_end = True
        if self._reader is not None:
            _wake(self._reader)
        return True

    def pause_writing(self) -> None:
        """The peer reads more slowly than we write."""
        self._is_writable = False

    def resume_writing(self) -> None:
        """It caught up."""
        self._is_writable = True
        if self._writer is not None:
            _wake(self._writer)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._is_lost = True
        self._failure = exc
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._reader is not None:
            _wake(self._reader)
        if self._writer is not None and not self._writer.done():
            self._writer.set_exception(self._gone())
        if self._closing is not None:
            _wake(self._closing)
        if self._on_lost is not None:
            self._on_lost(self)

    # -- inside ------------------------------------------------------------------------------------------------------------------------

    async def _search(self, separator: bytes, n_bytes_max: int) -> int:
        """Wait for a separator; return where it is, -1 if the peer ended with nothing left."""
        looked = 0
        self._begin_wait()
        while True:
            found = self._buffer.find(separator, max(0, looked - len(separator) + 1))
            if found >= 0:
                return found
            looked = len(self._buffer)
            if looked >= n_bytes_max:
                raise ProtocolViolation(self._peer, f"no end of line within {n_bytes_max} bytes")
            if self._at_end:
                if not looked:
                    return -1
                raise Disconnected(self._peer, f"it ended in the middle of a line of {looked} bytes")
            await self._wait_more()

    async def _wait_for(self, n_bytes: int) -> None:
        """Wait until so many bytes are there or the peer has ended."""
        self._begin_wait()
        while len(self._buffer) < n_bytes and not self._at_end:
            await self._wait_more()

    def _begin_wait(self) -> None:
        """Set the deadline of a read. One timer per connection watches it, and is moved only when it fires: most reads end long before."""
        if self._reader is not None:
            raise RuntimeError("another task is reading this connection")
        if self.limits.read_s:
            self._deadline_s = asyncio.get_running_loop().time() + self.limits.read_s
            if self._watch is None and not self._is_lost:
                self._watch = self._call_later(self.limits.read_s, self._on_watch)

    def _on_watch(self) -> None:
        self._watch = None
        reader = self._reader
        if reader is None or reader.done():
            return
        left_s = self._deadline_s - asyncio.get_running_loop().time()
        if left_s > 0:
            self._watch = self._call_later(left_s, self._on_watch)
        else:
            reader.set_exception(DeadlineExceeded(f"reading from {self._peer}", self.limits.read_s))

    def _watch_again(self) -> None:
        """The timer fired while bytes were on their way to the reader, who now waits for more."""
        left_s = self._deadline_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise DeadlineExceeded(f"reading from {self._peer}", self.limits.read_s)
        self._watch = self._call_later(left_s, self._on_watch)

    async def _wait_more(self) -> None:
        """Wait for something to happen: more bytes, the end, or the deadline."""
        if self._is_lost:
            raise self._gone()
        if self._watch is None and self.limits.read_s:
            self._watch_again()
        if self._is_paused and not self.transport.is_closing():
            self._is_paused = False
            self.transport.resume_reading()
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None
            if len(self._buffer) > self.limits.buffer_bytes_max:
                self._pause()
        self._check_whole()

    def _check_whole(self) -> None:
        if self._is_lost and not self._at_end:
            raise self._gone()

    def _timer(self, limit_s: float, future: "asyncio.Future[None]", what: str) -> Cancellable | None:
        if not limit_s:
            return None

        def expire() -> None:
            if not future.done():
                future.set_exception(DeadlineExceeded(f"{what} {self._peer}", limit_s))

        return self._call_later(limit_s, expire)

    def _take(self, n_bytes: int) -> bytes:
        buffer = self._buffer
        if n_bytes == len(buffer):
            taken = bytes(buffer)
            buffer.clear()
        else:
            with memoryview(buffer) as view:
                taken = bytes(view[:n_bytes])
            del buffer[:n_bytes]
        if self._is_paused and len(buffer) <= self.limits.buffer_bytes_max // 2 and not self.is_closed:
            self._is_paused = False
            self.transport.resume_reading()
        return taken

    def _pause(self) -> None:
        if not self._is_paused and not self.is_closed:
            self._is_paused = True
            self.transport.pause_reading()

    def _gone(self) -> IsopodError:
        failure = self._failure
        if isinstance(failure, IsopodError):
            return failure
        if isinstance(failure, OSError):
            return Disconnected(self._peer, (failure.strerror or str(failure)).lower())
        return Disconnected(self._peer)


def describe_peer(transport: Any) -> str:
    """Return a transport's other end, for messages."""
    name = transport.get_extra_info("peername")
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"{name[0]}:{name[1]}"
    return str(name) if name else "the peer"


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
