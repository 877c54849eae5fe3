"""Streams: the two ends of a simulated stream connection, as asyncio transports.

A connection is two pipes, one each way: `Pipe`s inside one machine, `Wire`s between two. What does not fit waits in the writer's own
buffer, whose marks pause and resume the protocol.

Legal behaviours: any split or join of the bytes (a stream has no record boundaries, and code that hopes for them must fail here); end
of stream only after all bytes; after the peer is gone a write ends the connection with BrokenPipeError; closing with unread bytes gives
the peer ConnectionResetError. What else may befall a connection between machines: `world.sim.fabric`.
"""

import asyncio
import errno
import os
from collections.abc import Callable, Iterable
from contextvars import Context
from typing import Any, Final, cast

from isopod.world.sim.loop import SimLoop
from isopod.world.sim.owners import Owner
from isopod.world.sim.pipe import Pipe
from isopod.world.sim.wires import Wire
from isopod.world.tls_stream import TlsStream

HIGH_WATER_BYTES: Final = 64 << 10
_BYTES: Final = (bytes, bytearray, memoryview)


class StreamEnd(asyncio.Transport):
    """One end of a connection.

    Args:
        loop: The loop.
        owner: The process that has it open; its death closes it.
        incoming: The direction it reads.
        outgoing: The direction it writes.
        context: In which its protocol is called.
        extra: What `get_extra_info` knows.
    """

    def __init__(self, loop: SimLoop, owner: Owner, *, incoming: Pipe, outgoing: Pipe, context: Context, extra: dict[str, Any]) -> None:
        super().__init__(extra)
        self.context = context
        self._loop = loop
        self._owner = owner
        self._in = incoming
        self._out = outgoing
        self._protocol: asyncio.BaseProtocol = asyncio.Protocol()
        self._is_buffered = False
        self._buffer = bytearray()
        self._high = HIGH_WATER_BYTES
        self._low = HIGH_WATER_BYTES // 4
        self.is_thirsty = False
        """Whether bytes that come can go to the protocol at once, unless its process hangs. A plain attribute: every segment asks."""
        self._is_connected = False
        self._is_reading = True
        self._is_write_paused = False
        self._wants_eof = False
        self._has_ended = False
        self._saw_eof = False
        self._is_closing = False
        self._is_gone = False
        self._on_gone: Callable[[], None] | None = None
        self._held = owner.hold(self.sever)
        incoming.reader = self
        outgoing.writer = self

    # -- life ------------------------------------------------------------------------------------------------------------------------

    def belong(self, owner: Owner, context: Context | None, on_gone: Callable[[], None] | None) -> None:
        """Let it belong to another process, as a descriptor does that was passed on; `on_gone` is told when it is closed there."""
        self._owner.forget(self._held)
        self._owner = owner
        self.context = context or self.context
        self._on_gone = on_gone
        if owner.alive:
            self._held = owner.hold(self.sever)
        else:
            self.sever()

    def begin(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection to its protocol; bytes flow from now on."""
        self.set_protocol(protocol)
        self._call(protocol.connection_made, self)
        self._is_connected = True
        self._look_for_thirst()
        if self._in.data or self._in.is_ended or self._in.is_broken:
            self._in.wake()

    def close(self) -> None:
        """Close once everything written has been taken by the peer's buffer."""
        if self._is_closing or self._is_gone:
            return
        self._is_closing = True
        self.is_thirsty = False
        if not self._buffer:
            self._finish(None)

    def abort(self) -> None:
        """Close at once, dropping what was not sent."""
        self._finish(None)

    def sever(self) -> None:
        """The process died: the kernel closes its end, and nobody is told on this side."""
        self._is_closing = True
        self.is_thirsty = False
        self._release()

    def is_closing(self) -> bool:
        """Return whether it is closed or about to be."""
        return self._is_closing or self._is_gone

    @property
    def may_split(self) -> bool:
        """Whether what it reads may come in pieces of seeded size: not during a TLS handshake, whose sizes no seed decides."""
        return not isinstance(self._protocol, TlsStream) or self._protocol.is_open

    @property
    def is_secured(self) -> bool:
        """Whether it carries TLS, whose bytes no seed decides."""
        return isinstance(self._protocol, TlsStream)

    def fail(self, error: OSError) -> None:
        """The network ended it: the protocol is told why."""
        self._finish(error)

    def vanish(self) -> None:
        """The machine lost power: the peer is not told. Code that lives on, the test's own, sees a connection that is gone."""
        if self._is_gone:
            return
        self._is_gone = self._is_closing = True
        self.is_thirsty = False
        self._owner.forget(self._held)
        self._buffer.clear()
        self._in.reader = None
        self._in.data.clear()
        if isinstance(self._out, Wire):
            self._out.vanish()
        self._loop.call_soon(self._lose, ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)), context=self.context)

    # -- reading ---------------------------------------------------------------------------------------------------------------------

    def is_reading(self) -> bool:
        """Return whether bytes are delivered."""
        return self._is_reading and not self.is_closing()

    def pause_reading(self) -> None:
        """Deliver nothing until `resume_reading`."""
        self._is_reading = self.is_thirsty = False

    def resume_reading(self) -> None:
        """Deliver again."""
        if not self._is_reading:
            self._is_reading = True
            self._look_for_thirst()
            self._in.wake()

    @property
    def is_hung(self) -> bool:
        """Whether its process stands still."""
        return self._owner.is_hung

    def on_readable(self) -> None:
        """Take one piece, or the end, out of the incoming pipe. Called by the pipe."""
        if not self._is_connected or self._is_gone or self._is_closing or not self._is_reading or self._saw_eof:
            return
        pipe = self._in
        if pipe.data:
            self.hand_over(pipe.take())
            if pipe.data or pipe.is_ended or pipe.is_broken:
                pipe.wake()
        elif pipe.is_broken:
            self._finish(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))
        elif pipe.is_ended:
            self._saw_eof = True
            self.is_thirsty = False
            if not self._call(cast(asyncio.Protocol, self._protocol).eof_received):
                self.close()

    def hand_over(self, data: bytes) -> None:
        """Give bytes to the protocol, and room to the writer."""
        if self._owner.alive:
            try:
                if self._is_buffered:
                    _fill(cast(asyncio.BufferedProtocol, self._protocol), data)
                else:
                    self._protocol.data_received(data)  # type: ignore[attr-defined]  # a stream's protocol
            except Exception as error:  # noqa: BLE001 - the root of a protocol's callback
                self._blame(_fill if self._is_buffered else self._protocol.data_received, error)  # type: ignore[attr-defined]
        writer = self._in.writer
        if writer is not None and (writer._is_write_paused or writer._buffer):
            writer.on_room()

    # -- writing ---------------------------------------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, in order, without waiting."""
        if type(data) is not bytes:
            if not isinstance(data, _BYTES):
                raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
            data = bytes(data)
        if self._wants_eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._is_closing or self._is_gone or not self._owner.alive or not data:
            return
        if not self._buffer and self._out.offer(data):
            return
        self._buffer += data
        self._flush()
        if not self._is_write_paused and len(self._buffer) > self._high:
            self._is_write_paused = True
            self._call(self._protocol.pause_writing)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send several pieces."""
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        """Half close is supported."""
        return True

    def write_eof(self) -> None:
        """Say that nothing more will be written; reading goes on."""
        if self._wants_eof or self.is_closing() or not self._owner.alive:
            return
        self._wants_eof = True
        self._flush()

    def get_write_buffer_size(self) -> int:
        """Return the bytes that wait."""
        return len(self._buffer)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the low and high marks."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks that resume and pause the protocol."""
        if high is None:
            high = HIGH_WATER_BYTES if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low

    def on_room(self) -> None:
        """The peer took bytes: move more, and resume the protocol below the low mark. Called by the reading end."""
        if self._is_gone:
            return
        self._flush()
        if self._is_write_paused and len(self._buffer) <= self._low:
            self._is_write_paused = False
            self._loop.call_soon(self._call, self._protocol.resume_writing, context=self.context)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Replace the protocol."""
        self._protocol = protocol
        self._is_buffered = isinstance(protocol, asyncio.BufferedProtocol)

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._out.is_refused:
            if self._buffer:
                self._buffer.clear()
                self._loop.call_soon(self._finish, BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)), context=self.context)
            return
        n_bytes = min(len(self._buffer), self._out.room)
        if n_bytes:
            piece = bytes(memoryview(self._buffer)[:n_bytes])
            del self._buffer[:n_bytes]
            self._out.put(piece)
        if not self._buffer:
            if self._wants_eof and not self._has_ended:
                self._has_ended = True
                self._out.end()
            if self._is_closing:
                self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        """Give the connection up; `connection_lost` is the last call the protocol gets."""
        if self._is_gone:
            return
        self._is_closing = True
        self.is_thirsty = False
        self._release()
        self._loop.call_soon(self._lose, error, context=self.context)

    def _release(self) -> None:
        if self._is_gone:
            return
        self._is_gone = True
        self.is_thirsty = False
        self._owner.forget(self._held)
        if self._on_gone is not None and self._owner.alive:
            self._loop.call_soon(self._on_gone, context=self.context)
        self._buffer.clear()
        has_unread = bool(self._in.data)
        self._in.reader = None
        self._in.data.clear()
        if has_unread:
            self._out.break_off()
        if not self._has_ended:
            self._has_ended = True
            self._out.end()
        self._out.forget_writer()
        if self._in.writer is not None:
            self._in.writer.on_room()

    def _lose(self, error: Exception | None) -> None:
        self._call(self._protocol.connection_lost, error)

    def _call(self, method: Callable[..., Any], *args: object) -> Any:
        """Call the protocol; what it raises ends the connection and is reported, as asyncio does."""
        if not self._owner.alive:
            return None
        try:
            return method(*args)
        except Exception as error:  # noqa: BLE001 - the root of every protocol callback
            self._blame(method, error)
            return None

    def _blame(self, method: Callable[..., Any], error: Exception) -> None:
        self._loop.call_exception_handler(
            {
                "message": f"Fatal error: protocol.{getattr(method, '__name__', 'callback')}() call failed.",
                "exception": error,
                "transport": self,
                "protocol": self._protocol,
            }
        )
        self._finish(error)

    def _look_for_thirst(self) -> None:
        self.is_thirsty = self._is_connected and self._is_reading and not (self._is_gone or self._is_closing or self._saw_eof)


def _fill(protocol: asyncio.BufferedProtocol, data: bytes) -> None:
    """Hand data to a protocol that brings its own buffer."""
    rest = memoryview(data)
    while rest:
        room = memoryview(protocol.get_buffer(len(rest)))
        n_bytes = min(len(room), len(rest))
        room[:n_bytes] = rest[:n_bytes]
        protocol.buffer_updated(n_bytes)
        rest = rest[n_bytes:]
