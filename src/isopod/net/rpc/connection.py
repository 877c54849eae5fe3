"""Connection: one end of an RPC connection, the same class for client and server.

It does what both sides share: hello and version, frames in and out, one write per turn of the loop, ping, the end of a
connection. What calls are is known to its `Side`. The protocol itself is docs/protocol.md; the bytes are `isopod.wire.frames`.

Rules: nothing a peer sends raises out of here; a violation ends the connection with an ERROR frame and is told to the side once.
Nothing runs periodically. What is written is bounded by the side: it asks `is_write_paused` before it adds stream items.
"""

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol, cast

from isopod.runtime.waiters import Waiters
from isopod.wire import frames as f
from isopod.world.errors import Disconnected, IsopodError, ProtocolViolation, VersionMismatch, from_code

PEER_CHARS_MAX: Final = 128
FLUSH_BYTES: Final = 64 << 10
VERSIONS: Final = (f.VERSION_LOWEST, f.VERSION_HIGHEST)


class RpcLimits(NamedTuple):
    """Bounds of a server (and, where they apply, of a client)."""

    connections_max: int = 1024
    calls_max: int = 256
    """Open calls per connection."""
    in_flight_bytes_max: int = 64 << 20
    """Per connection: requests being served and stream items not yet taken by their handlers."""
    hello_timeout_s: float = 5.0
    write_high_water_bytes: int = 256 << 10
    close_grace_s: float = 1.0
    """How long a closed connection may take to hand its last bytes to the peer."""
    cancel_grace_s: float = 5.0
    """How long handlers may take to clean up once they were cancelled on the way down."""


class Side(Protocol):
    """What a connection tells its owner. `on_frame` may raise WireError or ProtocolViolation: the peer broke a rule."""

    def on_hello(self, hello: f.Hello) -> None:
        """The connection is ready; once."""

    def on_frame(self, frame: f.Frame, n_bytes: int) -> None:
        """A frame that is not the connection's own business."""

    def on_writable(self) -> None:
        """The peer reads again."""

    def on_lost(self, error: IsopodError) -> None:
        """The connection has ended or is beyond repair; once, also if it never was ready."""

    def on_gone(self) -> None:
        """The transport is gone too; once, after `on_lost`."""


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        side: Who is told.
        peer: What to call ourselves in our hello.
        limits: Bounds.
        stops_reading: Whether to take no frames while the peer takes none: bounds a server's memory. Never on both ends,
            or they could wait for each other.
    """

    def __init__(self, side: Side, *, peer: str, limits: RpcLimits, stops_reading: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self.peer = "peer"
        """What the other end calls itself."""
        self.is_write_paused = False
        self.is_gone = False
        """Whether there is no transport any more."""
        self.writable = Waiters()
        self._side = side
        self._own_name = peer
        self._limits = limits
        self._stops_reading = stops_reading
        self._decoder = f.StreamDecoder()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._out = bytearray()
        self._flush_is_due = False
        self._is_ready = False
        self._error: IsopodError | None = None
        self._gone = Waiters()

    # --- what the side calls ------------------------------------------------------------------------------------------

    @property
    def error(self) -> IsopodError | None:
        """Why the connection ended; None while it is open."""
        return self._error

    def send(self, frame: f.OutFrame) -> int:
        """Queue a frame for the end of this turn of the loop; on an ended connection it is dropped.

        Returns:
            Its length on the wire.

        Raises:
            TooLarge: It is over 1 MiB.
            WireError: It cannot be packed.
        """
        n_bytes = f.append_frame(self._out, frame)
        if len(self._out) >= FLUSH_BYTES:
            self._flush()  # at once, so that the transport can say "enough" within this turn
        elif not self._flush_is_due:
            self._flush_is_due = True
            self.loop.call_soon(self._flush)
        return n_bytes

    def close(self, error: IsopodError) -> None:
        """End the connection: what is queued still goes out, for a bounded time."""
        if self._error is None:
            self._error = error
            self._side.on_lost(error)
        self._flush()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
            self._arm(self._limits.close_grace_s, self._transport.abort)
        self.writable.wake()

    def fail(self, error: IsopodError) -> None:
        """End the connection and tell the peer why."""
        if self._error is None:
            self.send(error_frame(0, error))
        self.close(error)

    def abort(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_gone(self) -> None:
        """Wait until the transport is gone (at once if there never was one)."""
        while self._transport is not None and not self.is_gone:
            await self._gone.wait()

    # --- what the transport calls -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello first."""
        self._transport = transport = cast("asyncio.Transport", transport)  # the port's promise; uvloop's are not subclasses
        transport.set_write_buffer_limits(high=self._limits.write_high_water_bytes)
        if self._error is not None:
            transport.abort()
            return
        transport.write(f.encode_hello(f.Hello(VERSIONS, self._own_name)))
        self._arm(self._limits.hello_timeout_s, self._on_no_hello)

    def data_received(self, data: bytes) -> None:
        """Take bytes, however they are cut."""
        if self._error is not None:
            return
        try:
            self._take(data)
        except f.WireError as error:
            self.fail(ProtocolViolation(self.peer, error.why))
        except ProtocolViolation as error:
            self.fail(error)

    def eof_received(self) -> bool:
        """The peer will send no more: its connection is over (no half close)."""
        return False

    def pause_writing(self) -> None:
        """The peer does not keep up."""
        self.is_write_paused = True
        if self._stops_reading and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The peer reads again."""
        self.is_write_paused = False
        if self._stops_reading and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        self.writable.wake()
        if self._error is None:
            self._side.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        self.is_gone = True
        if self._timer is not None:
            self._timer.cancel()
        if self._error is None:
            self._error = Disconnected(self.peer, "connection closed" if exc is None else f"connection lost: {exc}")
            self._side.on_lost(self._error)
        self._out.clear()
        self.writable.wake()
        self._gone.wake()
        self._side.on_gone()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        """Take bytes. Raises WireError and ProtocolViolation."""
        decoder = self._decoder
        try:
            frames = decoder.feed(data)
        except f.WireError:
            # A peer of another version may be unreadable after its hello: then its version is what to complain about.
            if decoder.hello is not None:
                self._take_hello(decoder.hello)
            raise
        if decoder.hello is not None:
            self._take_hello(decoder.hello)
        for frame, n_bytes in frames:
            if self._error is not None:
                break
            self._take_frame(frame, n_bytes)

    def _take_hello(self, hello: f.Hello) -> None:
        """Agree on a version, or end the connection over it; once."""
        if self._is_ready or self._error is not None:
            return
        self.peer = hello.peer[:PEER_CHARS_MAX] or "peer"
        if f.common_version(VERSIONS, hello.versions) is None:
            ours, theirs = (f"{low}-{high}" for low, high in (VERSIONS, hello.versions))
            self.fail(VersionMismatch(self.peer, ours, theirs))
            return
        self._is_ready = True
        if self._timer is not None:
            self._timer.cancel()
        self._side.on_hello(hello)

    def _take_frame(self, frame: f.Frame, n_bytes: int) -> None:
        if isinstance(frame, f.Ping):
            self.send(f.Pong(frame.token))
        elif isinstance(frame, f.Error) and frame.id == 0:
            self.close(from_code(frame.code, frame.message, frame.hint, frame.exit_code))
        elif not isinstance(frame, f.Pong):  # nobody asks yet: a late answer at most
            self._side.on_frame(frame, n_bytes)

    def _flush(self) -> None:
        """Write what this turn of the loop produced, in one piece."""
        self._flush_is_due = False
        if not self._out:
            return
        out, self._out = self._out, bytearray()  # the transport may keep it: never written to again
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(out)

    def _arm(self, timeout_s: float, then: Callable[[], object]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(timeout_s, then)

    def _on_no_hello(self) -> None:
        self.fail(ProtocolViolation(self.peer, f"no hello within {self._limits.hello_timeout_s:g} s"))


def error_frame(call_id: int, error: IsopodError) -> f.Error:
    """Return an error of the tree as a frame, its texts bounded."""
    return f.Error(call_id, error.code, error.message[:4096], error.hint[:1024], error.exit_code)
