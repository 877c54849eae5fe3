"""Connection: one end of an RPC connection, the same class for client and server.

It does what both sides share: hello, version and features, frames in and out, one write per turn of the loop, heartbeats, the end of a
connection. What calls are is known to its `Side`. The protocol itself is docs/protocol.md; the bytes are `isopod.wire`.

Rules: nothing a peer sends raises out of here; a violation ends the connection with an ERROR frame and is told to the side once.
Nothing runs periodically unless heartbeats were agreed on. A server takes no frames from a peer that does not read its answers, and
never so many in one turn that others starve. What is written is bounded by the side: it asks `is_write_paused` before it adds items.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, cast

from isopod.net.rpc.heartbeat import Heartbeat
from isopod.net.rpc.limits import HEARTBEAT_S_MIN, RpcLimits
from isopod.runtime.waiters import Waiters
from isopod.wire import frames as f
from isopod.wire.compression import THRESHOLD_BYTES, Zstd
from isopod.wire.decoder import StreamDecoder
from isopod.world.errors import Disconnected, Exhausted, IsopodError, ProtocolViolation, VersionMismatch, from_code
from isopod.world.network import PeerIdentity, peer_identity

PEER_CHARS_MAX: Final = 128
FLUSH_BYTES: Final = 64 << 10
RAW_BYTES_MIN: Final = 8 << 10
"""Smaller bodies of bytes are packed in place: copying them costs less than three pieces to write."""
VERSIONS: Final = (f.VERSION_LOWEST, f.VERSION_HIGHEST)
_NEVER: Final = 1 << 62
_PACK_LENGTH: Final = f.pack_length
_LENGTH_BYTES: Final = f.LENGTH_BYTES
_JSON_PLAIN_MAX: Final = -1
PACKED_BYTES_MAX: Final = min(RAW_BYTES_MIN, THRESHOLD_BYTES) // 2
"""Bodies from here on are sent in the long way: they may be compressed, or go raw."""


class Side(Protocol):
    """What a connection tells its owner. `on_frame` may raise WireError or ProtocolViolation: the peer broke a rule."""

    def on_made(self) -> None:
        """There is a transport. With TLS many connections never get so far: what is counted is counted from here on."""

    def greeting(self, theirs: f.Hello | None) -> f.Hello:
        """Return our hello; a server has the client's before it, unless that never came."""

    def on_hello(self, hello: f.Hello) -> None:
        """The connection is ready; once."""

    def on_bytes(self) -> None:
        """Frames may follow."""

    def on_frame(self, frame: f.Frame, n_bytes: int) -> object:
        """A frame. What is not the side's business is for `Connection.on_frame`. True asks for a pause: pass on `must_pause`."""

    def on_writable(self) -> None:
        """The peer reads again."""

    def on_unread(self, n_bytes: int) -> bool:
        """So much was written and not read by the peer; return whether that is still bearable."""

    def on_lost(self, error: IsopodError) -> None:
        """The connection has ended or is beyond repair; once, also if it never was ready."""

    def on_gone(self) -> None:
        """The transport is gone too; once, after `on_lost`."""


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        side: Who is told.
        limits: Bounds.
        is_server: A server lets the client speak first and answers in its encoding, and takes no frames while the peer takes none: that
            bounds its memory. Never on both ends, or they could wait for each other.
        encoding: Of a client.
    """

    # CPython keeps no more than 30 attributes of an object in place; the rest of the hot path would look all of them up in a dictionary.
    __slots__ = (
        "_decoder", "_encode", "_error", "_flush_is_due", "_gone", "_has_backlog", "_has_bulk", "_has_greeted", "_heartbeat", "_is_full",
        "_is_ready", "_is_server", "_limits", "_n_out", "_on_bytes", "_on_frame", "_out", "_own_hello", "_plain_max", "_side", "_timer",
        "_transport", "_zstd", "features", "is_gone", "is_write_paused", "loop", "must_pause", "peer", "raw_bytes_min", "writable",
    )  # fmt: skip

    def __init__(self, side: Side, *, limits: RpcLimits, is_server: bool, encoding: f.Encoding = "msgpack") -> None:
        self.loop = asyncio.get_running_loop()
        self.peer = "peer"
        """What the other end calls itself."""
        self.features: tuple[str, ...] = ()
        """What both ends offer."""
        self.is_write_paused = False
        self.must_pause = False
        """Whether no more frames should be taken in this turn."""
        self.is_gone = False
        """Whether there is no transport any more."""
        self.raw_bytes_min = _NEVER
        """From which length on bodies of bytes go by `send_raw`."""
        self.writable = Waiters()
        self._side = side
        self._limits = limits
        self._is_server = is_server
        self._decoder = StreamDecoder()
        self._on_bytes = side.on_bytes
        self._on_frame = side.on_frame
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._out: list[bytes] = []
        self._n_out = 0
        self._has_bulk = False
        self._flush_is_due = False
        self._has_backlog = False
        self._is_full = False
        self._has_greeted = False
        self._own_hello = f.Hello(VERSIONS)
        self._is_ready = False
        self._error: IsopodError | None = None
        self._gone = Waiters()
        self._zstd: Zstd | None = None
        self._encode = f.encode_msgpack
        self._plain_max = f.FRAME_BYTES_MAX
        self._heartbeat = Heartbeat(self)
        self._set_encoding(encoding)

    # --- what the side calls ------------------------------------------------------------------------------------------

    @property
    def error(self) -> IsopodError | None:
        """Why the connection ended; None while it is open."""
        return self._error

    @property
    def encoding(self) -> f.Encoding:
        """What bodies are in."""
        return "msgpack" if self._encode is f.encode_msgpack else "json"

    @property
    def identity(self) -> PeerIdentity | None:
        """Who the peer's certificate says it is, None without one."""
        return None if self._transport is None else peer_identity(self._transport)

    def send(self, frame: f.OutFrame) -> int:
        """Queue a frame for the end of this turn of the loop; on an ended connection it is dropped.

        Returns:
            Its length as flow control counts it: on the wire, before compression.

        Raises:
            TooLarge: It is over 1 MiB.
            WireError: It cannot be packed.
        """
        try:
            packed = self._encode(frame)
        except f.ENCODE_ERRORS as error:
            raise f.WireError(f"cannot encode {f.kind_name(frame)}: {error}") from error
        n_payload = len(packed)
        if n_payload > self._plain_max:
            return self._send_otherwise(packed)
        out = self._out
        out.append(_PACK_LENGTH(n_payload))
        out.append(packed)
        self._n_out += n_payload
        if not self._flush_is_due:
            self._flush_soon()
        elif self._n_out >= FLUSH_BYTES:
            self.flush()  # at once, so that the transport can say "enough" within this turn
        return n_payload + _LENGTH_BYTES

    def send_raw(self, frame: tuple[object, ...], body: bytes) -> int:
        """Queue a frame whose body goes as it is, without a copy; only for bodies of at least `raw_bytes_min`.

        Args:
            frame: Its array, with None for the body.
            body: The body.

        Returns:
            As `send`.

        Raises:
            TooLarge: It is over 1 MiB.
        """
        head = f.raw_head(frame, len(body))
        n_payload = len(head) + len(body)
        packed = b"" if self._zstd is None else self._zstd.compress(head + body)
        if packed and len(packed) < n_payload:
            self._put(f.pack_length(len(packed) | f.RAW_FLAG | f.ZSTD_FLAG), packed)
        else:
            self._has_bulk = True
            self._put(f.pack_length(n_payload | f.RAW_FLAG), head, body)
        return n_payload + f.LENGTH_BYTES

    def send_now(self, frame: tuple[object, ...], body: bytes) -> None:
        """Write a frame with a body of bytes in this very moment, with what is queued: for senders that gather by themselves.

        Args:
            frame: Its array, without the body at its end.
            body: The body.

        Raises:
            TooLarge: It is over 1 MiB.
        """
        self._flush_is_due = True
        if len(body) >= self.raw_bytes_min:
            self.send_raw((*frame, None), body)
        else:
            self.send((*frame, body))
        self.flush()

    def send_packed(self, prefix: f.Prefix, parts: tuple[bytes, ...]) -> None:
        """Do as `send_now` for a sender that says the same again and again, but for the body.

        Args:
            prefix: The frame up to its body.
            parts: The body, to be joined.

        Raises:
            TooLarge: It is over 1 MiB.
        """
        n_body = sum(map(len, parts))
        transport = self._transport
        if self._out or n_body >= PACKED_BYTES_MAX or transport is None or self._plain_max == _JSON_PLAIN_MAX:
            self.send_now(prefix.frame, b"".join(parts))
        elif not transport.is_closing():
            head = f.bytes_head(n_body)
            transport.write(b"".join((_PACK_LENGTH(len(prefix.packed) + len(head) + n_body), prefix.packed, head, *parts)))
            if self.is_write_paused:
                self._check_unread(transport)

    def hold(self) -> None:
        """Have what is sent from now on wait for `flush`, which the caller promises to call in this very moment of the loop."""
        self._flush_is_due = True

    def flush(self) -> None:
        """Write what this turn of the loop produced, in one piece."""
        self._flush_is_due = False
        if not self._out:
            return
        out, self._out, self._n_out = self._out, [], 0
        if self._transport is not None and not self._transport.is_closing():
            if self._has_bulk:
                self._transport.writelines(out)
            else:
                self._transport.write(b"".join(out))
            if self.is_write_paused:
                self._check_unread(self._transport)
        self._has_bulk = False

    def set_full(self, is_full: bool) -> None:
        """Take no frames for now, because the side has enough to do; or go on."""
        self._is_full = is_full
        self._update_pause()

    def close(self, error: IsopodError) -> None:
        """End the connection: what is queued still goes out, for a bounded time."""
        self._end(error)
        self.flush()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
            self._arm(self._limits.close_grace_s, self._transport.abort)
        self.writable.wake()

    def fail(self, error: IsopodError) -> None:
        """End the connection and tell the peer why."""
        if self._error is None:
            self._greet(None)
            self.send(error_frame(0, error))
        self.close(error)

    def drop(self, error: IsopodError) -> None:
        """End the connection at once: the peer is dead or will not listen."""
        self._end(error)
        self.abort()
        self.writable.wake()

    def abort(self) -> None:
        """Drop the transport at once."""
        if self._transport is not None:
            self._transport.abort()

    async def ping(self) -> float:
        """Ask the peer for a sign of life; return how many seconds it took. Deadlines are the caller's.

        Raises:
            IsopodError: The connection has ended.
        """
        return await self._heartbeat.ping()

    async def wait_gone(self) -> None:
        """Wait until the transport is gone (at once if there never was one)."""
        while self._transport is not None and not self.is_gone:
            await self._gone.wait()

    def on_frame(self, frame: f.Frame) -> None:
        """Take a frame that is not about a call."""
        if isinstance(frame, f.Ping):
            if not self.is_write_paused:  # who does not read does not get more to read
                self.send(f.Pong(frame.token))
        elif isinstance(frame, f.Pong):
            self._heartbeat.on_pong(frame.token)
        elif isinstance(frame, f.Error) and frame.id == 0:
            self.close(error_of(frame))

    # --- what the transport calls -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client says hello first."""
        self._transport = transport = cast("asyncio.Transport", transport)  # the port's promise; uvloop's are not subclasses
        transport.set_write_buffer_limits(high=self._limits.write_high_water_bytes)
        self._side.on_made()
        if self._error is not None:
            transport.abort()
            return
        if not self._is_server:
            self._greet(None)
        self._arm(self._limits.hello_timeout_s, self._on_no_hello)

    def data_received(self, data: bytes) -> None:
        """Take bytes, however they are cut."""
        self._heartbeat.was_heard = True
        if self._error is not None:
            return
        if self._has_backlog or self.must_pause:
            self._decoder.put(data)  # what a transport had under way when it was told to pause
        else:
            self._take(data)

    def eof_received(self) -> bool:
        """The peer will send no more: its connection is over (no half close)."""
        return False

    def pause_writing(self) -> None:
        """The peer does not keep up."""
        self.is_write_paused = True
        self._update_pause()

    def resume_writing(self) -> None:
        """The peer reads again."""
        self.is_write_paused = False
        self._side.on_unread(0)
        self._update_pause()
        self.writable.wake()
        if self._error is None:
            self._side.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        self.is_gone = True
        if self._timer is not None:
            self._timer.cancel()
        self._end(Disconnected(self.peer, "connection closed" if exc is None else f"connection lost: {exc}"))
        self._out.clear()
        self._side.on_unread(0)
        self.writable.wake()
        self._gone.wake()
        self._side.on_gone()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        """Take the next bytes, or go on with what is left over."""
        self._flush_is_due = True  # answers given at once go out below, with one write and without a turn of the loop between
        has_more = False
        self._on_bytes()
        try:
            if self._is_ready:
                has_more = self._decoder.take(data, self._on_frame)
            elif self._decoder.greet(data):
                self._on_hello()
                has_more = self._error is None and self._decoder.take(b"", self._on_frame)
        except f.WireError as error:
            self.fail(ProtocolViolation(self.peer, error.why))
        except ProtocolViolation as error:
            self.fail(error)
        if self._out:
            self.flush()
        self._flush_is_due = False
        if self._error is not None:
            return
        if has_more or self.must_pause:
            self._pause()
        elif self._has_backlog:
            self._resume()

    def _update_pause(self) -> None:
        """Look again whether to take frames."""
        self.must_pause = self._error is not None or self._is_full or (self._is_server and self.is_write_paused)
        if not self.must_pause:
            self._has_backlog = True  # bytes may have come meanwhile
            self.loop.call_soon(self._go_on)
        elif self._error is None and self._transport is not None:
            self._transport.pause_reading()

    def _pause(self) -> None:
        """Leave the rest of what came for a later turn, and read no more until then."""
        if not self._has_backlog and self._transport is not None:
            self._has_backlog = True
            self._transport.pause_reading()
        if not self.must_pause:  # else `_update_pause` goes on
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._error is None and self._has_backlog and not self.must_pause:
            self._take(b"")

    def _resume(self) -> None:
        """All that came is taken."""
        self._has_backlog = False
        if not self.must_pause and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _greet(self, theirs: f.Hello | None) -> None:
        """Say our hello, if it is not said yet."""
        if not self._has_greeted and self._transport is not None:
            self._has_greeted = True
            if self._is_server and self._decoder.encoding is not None:
                self._set_encoding(self._decoder.encoding)
            self._own_hello = self._side.greeting(theirs)
            self._transport.write(f.encode_hello(self._own_hello, self.encoding))

    def _on_hello(self) -> None:
        """Agree on version and features, or end the connection. Raises WireError."""
        hello = self._decoder.hello
        encoding = self._decoder.encoding
        assert hello is not None
        assert encoding is not None
        self.peer = hello.peer[:PEER_CHARS_MAX] or "peer"
        if not self._is_server and encoding != self.encoding:
            raise f.WireError(f"a server that answers {self.encoding} in {encoding}")
        self._greet(hello)
        if f.common_version(VERSIONS, hello.versions) is None:
            ours, theirs = (f"{low}-{high}" for low, high in (VERSIONS, hello.versions))
            self.fail(VersionMismatch(self.peer, ours, theirs))
            return
        self._is_ready = True
        if self._timer is not None:
            self._timer.cancel()
        self._agree(hello)
        self._side.on_hello(hello)

    def _agree(self, theirs: f.Hello) -> None:
        """Begin to use what both ends offer."""
        ours = self._own_hello
        self.features = tuple(feature for feature in f.FEATURES if feature in ours.features and feature in theirs.features)
        if self.encoding == "msgpack":
            self._zstd = Zstd() if "zstd" in self.features else None
            self._decoder.allow(raw="raw" in self.features, zstd=self._zstd)
            if "raw" in self.features:
                self.raw_bytes_min = RAW_BYTES_MIN
            if self._zstd is not None:
                self._plain_max = THRESHOLD_BYTES
        heartbeat_ms = (ours if self._is_server else theirs).heartbeat_ms
        if heartbeat_ms:
            self._heartbeat.start(max(heartbeat_ms / 1000, HEARTBEAT_S_MIN))

    def _set_encoding(self, encoding: f.Encoding) -> None:
        self._encode, self._plain_max = (f.encode_msgpack, f.FRAME_BYTES_MAX) if encoding == "msgpack" else (f.encode_json, _JSON_PLAIN_MAX)

    def _send_otherwise(self, packed: bytes) -> int:
        """Queue a frame that is a line of JSON, or so large that it is compressed. Raises TooLarge."""
        n_payload = len(packed)
        if n_payload > f.FRAME_BYTES_MAX:
            raise f.TooLarge(f"a frame of {n_payload} bytes is over {f.FRAME_BYTES_MAX}")
        if self._plain_max == _JSON_PLAIN_MAX:
            self._put(packed)
            return n_payload
        assert self._zstd is not None  # nothing else lowers _plain_max
        smaller = self._zstd.compress(packed)
        self._put(f.pack_length(len(smaller) | (f.ZSTD_FLAG if smaller is not packed else 0)), smaller)
        return n_payload + f.LENGTH_BYTES

    def _put(self, *parts: bytes) -> None:
        self._out.extend(parts)
        self._n_out += sum(map(len, parts))
        if not self._flush_is_due:
            self._flush_soon()
        elif self._n_out >= FLUSH_BYTES:
            self.flush()

    def _flush_soon(self) -> None:
        self._flush_is_due = True
        self.loop.call_soon(self.flush)

    def _check_unread(self, transport: asyncio.Transport) -> None:
        n_bytes = transport.get_write_buffer_size()
        if not self._side.on_unread(n_bytes):
            self.drop(Exhausted(f"answers to {self.peer}", f"{n_bytes} bytes were not read", "read them, or ask for less at once"))

    def _end(self, error: IsopodError) -> None:
        if self._error is None:
            self._error = error
            self.must_pause = True
            self._heartbeat.stop()
            self._side.on_lost(error)

    def _arm(self, timeout_s: float, then: Callable[[], object]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(timeout_s, then)

    def _on_no_hello(self) -> None:
        self.fail(ProtocolViolation(self.peer, f"no hello within {self._limits.hello_timeout_s:g} s"))


def error_frame(call_id: int, error: IsopodError) -> f.Error:
    """Return an error of the tree as a frame, its texts bounded."""
    retry_after_ms = None if error.retry_after_s is None else max(0, round(error.retry_after_s * 1000))
    return f.Error(call_id, error.code, error.message[:4096], error.hint[:1024], error.exit_code, retry_after_ms)


def error_of(frame: f.Error) -> IsopodError:
    """Return the error of the tree that a frame carries."""
    retry_after_s = None if frame.retry_after_ms is None else frame.retry_after_ms / 1000
    return from_code(frame.code, frame.message, frame.hint, frame.exit_code, retry_after_s=retry_after_s)
