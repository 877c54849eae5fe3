"""WebSocket: one open connection, on either side.

It owns its transport. What is received waits in a bounded queue, and reading stops while that is full; what is sent waits in the
transport's buffer, and `send` waits while that is full. The life of a connection::

    open --our close()--> closing --the peer's Close--> (server closes TCP) --> closed
    open --the peer's Close, answered-----------------> (server closes TCP) --> closed
    open --a violation: Close sent, half closed-------------------------------> closed
    any  --connection lost, keep-alive or closing deadline over---------------> closed

Rules: every way down arms one deadline, after which the connection is cut. A Ping is answered at once, but only the latest one if the
peer does not read. One task receives at a time. Only the latest moment counts for keep-alive: whatever is heard is a sign of life.
Source: RFC 6455 sections 5.5, 7 and 10.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, Self

import msgspec

from isopod.net.http.messages import Request
from isopod.net.http.websocket import codec as c
from isopod.net.http.websocket.deflate import Deflate
from isopod.runtime.timers import TimerWheel, WheelTimer
from isopod.runtime.waiters import Waiters
from isopod.world.clock import Clock
from isopod.world.errors import (
    DeadlineExceeded,
    Disconnected,
    Exhausted,
    InvalidArgument,
    IsopodError,
    ProtocolViolation,
    WrongState,
)
from isopod.world.world import World

_NORMAL_ENDS: Final = frozenset({c.NORMAL, c.GOING_AWAY, c.NO_STATUS})
_PINGS_MAX: Final = 64
_MESSAGE: Final = (str, bytes)  # unions in place would be built anew at each isinstance
_BYTES: Final = (bytes, bytearray, memoryview)
_KEYS_AT_ONCE: Final = 256


class WebSocketLimits(msgspec.Struct, frozen=True):
    """Bounds of one connection.

    Attributes:
        message_bytes_max: Longest message taken, joined and inflated; a longer one closes with 1009.
        frame_bytes_max: Longest frame taken; None for the same.
        queued_messages_max: Messages that wait for the reader before reading stops.
        queued_bytes_max: The same in characters and bytes.
        write_bytes_max: Bytes that wait to be sent before `send` waits; `send_nowait` refuses at four times as much.
        ping_interval_s: Seconds between keep-alive pings; None for no keep-alive at all.
        ping_timeout_s: Seconds without a sign of life, or of a full buffer that does not shrink, after which the connection is cut.
        close_timeout_s: Seconds that the way down may take.
        connections_max: Of one route; more are answered with 503.
    """

    message_bytes_max: int = 1 << 20
    frame_bytes_max: int | None = None
    queued_messages_max: int = 64
    queued_bytes_max: int = 1 << 20
    write_bytes_max: int = 64 << 10
    ping_interval_s: float | None = 30.0
    ping_timeout_s: float = 60.0
    close_timeout_s: float = 5.0
    connections_max: int = 10_000


class WebSocketHandler(Protocol):
    """What happens on a connection, as plain calls from the loop: the fast path, without a task per connection."""

    def on_open(self, ws: "WebSocket") -> None:
        """The connection stands; `ws.send_nowait` may be called."""

    def on_message(self, ws: "WebSocket", message: str | bytes) -> None:
        """A message came."""

    def on_close(self, ws: "WebSocket") -> None:
        """The connection is gone; `ws.close_code` says how."""


class MaskKeys:
    """A supply of masks for a client, fetched from the World many at a time.

    Args:
        world: Whose chance: the operating system's generator on the host, as RFC 6455 section 10.3 asks.
    """

    __slots__ = ("_keys", "_world")

    def __init__(self, world: World) -> None:
        self._world = world
        self._keys: list[bytes] = []

    def next(self) -> bytes:
        """Return 4 bytes not used before."""
        if not self._keys:
            pool = bytes.fromhex(self._world.random.token_hex(c.KEY_BYTES * _KEYS_AT_ONCE))
            self._keys = [pool[start : start + c.KEY_BYTES] for start in range(0, len(pool), c.KEY_BYTES)]
        return self._keys.pop()


class WebSocket(asyncio.Protocol):
    """An open connection. Made by `websocket_route` and `connect_websocket`, not by hand.

    Args:
        transport: Connected and past the handshake; owned from now on.
        wheel: For deadlines.
        limits: Bounds.
        keys: Masks, on a client; None makes this the server's side.
        subprotocol: What was agreed on, "" for none.
        deflate: The agreed compression, if any.
        request: The handshake that opened it, on a server.
        handler: Is called instead of queueing messages.
        clock: For round trips finer than the loop's own time (uvloop's counts milliseconds).
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        wheel: TimerWheel,
        limits: WebSocketLimits,
        *,
        keys: MaskKeys | None = None,
        subprotocol: str = "",
        deflate: Deflate | None = None,
        request: Request | None = None,
        handler: WebSocketHandler | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.subprotocol: Final = subprotocol
        self.request: Final = request
        self.peer: Final = describe_peer(transport, "server" if keys else "client")
        self.close_code = 0
        """How it ended (RFC 6455 section 7.4, 1006 without a close frame); 0 while it has not."""
        self.close_reason = ""
        self._transport = transport
        self._wheel = wheel
        self._limits = limits
        self._keys = keys
        self._deflate = deflate
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._decoder = c.Decoder(
            expects_mask=keys is None,
            message_bytes_max=limits.message_bytes_max,
            frame_bytes_max=limits.frame_bytes_max,
            deflate=deflate,
        )
        self._queue: deque[str | bytes] = deque()
        self._queued_bytes = 0
        self._receiver: asyncio.Future[None] | None = None
        self._writable = Waiters()
        self._gone = Waiters()
        self._pings: dict[bytes, tuple[asyncio.Future[float | None], float]] = {}
        self._n_pings = 0
        self._pong_due: bytes | None = None
        self._is_open = True
        self._is_lost = False
        self._closed_by_us = False
        self._is_read_paused = False
        self._error: IsopodError | None = None
        self._close_timer: WheelTimer | None = None
        self._tick_timer: WheelTimer | None = None
        self._was_heard = True
        self._n_silent = 0
        self._unsent_bytes = 0
        self._n_stalled = 0
        transport.set_write_buffer_limits(high=limits.write_bytes_max)
        self._is_write_paused = transport.get_write_buffer_size() > limits.write_bytes_max
        self._on_lost: Callable[[WebSocket], None] | None = None

    # --- for everybody ------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether messages can still be sent."""
        return self._is_open

    @property
    def is_write_paused(self) -> bool:
        """Whether the peer reads so slowly that `send` would wait."""
        return self._is_write_paused

    @property
    def n_unsent(self) -> int:
        """The bytes that wait to be sent."""
        return self._transport.get_write_buffer_size()

    @property
    def is_lost(self) -> bool:
        """Whether the connection is gone."""
        return self._is_lost

    @property
    def is_compressed(self) -> bool:
        """Whether permessage-deflate was agreed on."""
        return self._deflate is not None

    @property
    def is_plain_server(self) -> bool:
        """Whether its frames are the same for every connection of its kind: neither masked nor compressed."""
        return self._deflate is None and self._keys is None

    async def receive(self) -> str | bytes:
        """Return the next message: str for text, bytes for binary. What came before the end is returned first.

        Raises:
            Disconnected: The connection has ended; `close_code` and `close_reason` say how.
            ProtocolViolation: The peer broke the protocol or a limit.
            DeadlineExceeded: The peer gave no sign of life.
            WrongState: Another task is receiving.
        """
        queue = self._queue
        while not queue:
            if self._is_lost or not self._is_open:
                raise await self._end()
            if self._receiver is not None:
                raise WrongState("websocket", self.peer, "being received from by another task", "receive")
            self._receiver = self._loop.create_future()
            try:
                await self._receiver
            finally:
                self._receiver = None
        message = queue.popleft()
        self._queued_bytes -= len(message)
        if self._is_read_paused and self._has_room(share=2):
            self._is_read_paused = False
            self._transport.resume_reading()
        return message

    def __aiter__(self) -> Self:
        """Iterate over the messages; ends when either side closes normally, raises as `receive` when it ended otherwise."""
        return self

    async def __anext__(self) -> str | bytes:
        try:
            return await self.receive()
        except Disconnected:
            if self._closed_by_us or self.close_code in _NORMAL_ENDS:
                raise StopAsyncIteration from None
            raise

    async def send(self, message: str | bytes) -> None:
        """Send a message, waiting while too much is unsent.

        Raises:
            Disconnected: The connection has ended, or does so while waiting. Other errors as for `receive`.
            InvalidArgument: Neither str nor bytes, or a str that is not Unicode text.
        """
        if self._is_write_paused or not self._is_open:
            await self._wait_writable()
        self._transport.write(self.encode(message))

    def send_nowait(self, message: str | bytes) -> None:
        """Send a message without waiting, for handlers that are plain calls.

        Raises:
            Exhausted: The peer reads too slowly: four times `write_bytes_max` are unsent.
            Disconnected: The connection has ended.
        """
        if not self._is_open:
            raise self._why_ended()
        if self._is_write_paused and self.n_unsent > 4 * self._limits.write_bytes_max:
            raise Exhausted(f"send buffer of {self.peer}", f"{self.n_unsent} bytes are unsent", "the peer reads too slowly")
        self._transport.write(self.encode(message))

    async def send_json(self, value: object) -> None:
        """Send a value as a text message of JSON. Raises as `send`; TypeError for what JSON cannot say."""
        payload = msgspec.json.encode(value)
        if self._is_write_paused or not self._is_open:
            await self._wait_writable()
        self._transport.write(self._frame(c.TEXT, payload))

    async def ping(self) -> float:
        """Send a ping and wait for its pong.

        Returns:
            The round trip in seconds (in whole milliseconds where no clock was given).

        Raises:
            Disconnected: The connection ended first. Other errors as for `receive`.
            DeadlineExceeded: No pong within `ping_timeout_s`.
            Exhausted: 64 pings are unanswered.
        """
        if self._is_write_paused or not self._is_open:
            await self._wait_writable()
        if len(self._pings) >= _PINGS_MAX:
            raise Exhausted(f"pings to {self.peer}", f"{_PINGS_MAX} are unanswered")
        self._n_pings += 1
        payload = self._n_pings.to_bytes(8, "big")
        answer: asyncio.Future[float | None] = self._loop.create_future()
        self._pings[payload] = (answer, self._now_s())
        self._transport.write(c.encode_frame(c.PING, payload, key=self._key()))
        timer = self._wheel.call_later(self._limits.ping_timeout_s, _settle, answer, None)
        try:
            round_trip_s = await answer
        finally:
            timer.cancel()
            self._pings.pop(payload, None)
        if round_trip_s is not None:
            return round_trip_s
        raise self._why_ended() if self._is_lost else DeadlineExceeded(f"pong of {self.peer}", self._limits.ping_timeout_s)

    async def close(self, code: int = c.NORMAL, reason: str = "") -> None:
        """Close with the closing handshake and wait for the end, at most `close_timeout_s`. Doing it twice is fine.

        Args:
            code: 1000, 1001, 1007 to 1014 or 3000 to 4999.
            reason: For the peer; cut at 123 bytes.

        Raises:
            InvalidArgument: The code must not be sent.
        """
        self.start_close(code, reason)
        await self.wait_gone()

    def start_close(self, code: int = c.NORMAL, reason: str = "") -> None:
        """Begin to close; `wait_gone` waits for the end. Raises as `close`."""
        if self._is_open:
            frame = c.encode_close(code, reason, key=self._key())
            self._closed_by_us = True
            self._go_down(frame)

    def abort(self) -> None:
        """Cut the connection at once, without a closing handshake."""
        self._closed_by_us = True
        self._is_open = False
        self._transport.abort()

    async def wait_gone(self) -> None:
        """Wait until the connection is gone."""
        while not self._is_lost:
            await self._gone.wait()

    # --- for the hub and the routes -----------------------------------------------------------------------------------

    def encode(self, message: str | bytes) -> bytes:
        """Return the frame of a message, as this connection sends it. Raises InvalidArgument."""
        if isinstance(message, str):
            try:
                return self._frame(c.TEXT, message.encode())
            except UnicodeEncodeError:
                raise InvalidArgument("message", message[:40].encode("ascii", "replace"), "holds half a surrogate pair") from None
        if not isinstance(message, _BYTES):
            raise InvalidArgument("message", type(message).__name__, "neither str nor bytes", "send_json sends other values")
        return self._frame(c.BINARY, bytes(message))

    def write_frame(self, frame: bytes) -> None:
        """Send a frame built elsewhere. For broadcasts: the caller minds `is_open` and `n_unsent`."""
        self._transport.write(frame)

    def begin(self, leftover: bytes, *, on_lost: Callable[["WebSocket"], None] | None = None) -> None:
        """Start: keep-alive, and the bytes that came with the handshake.

        Args:
            leftover: Received behind the handshake.
            on_lost: Called once, when the connection is gone.
        """
        self._on_lost = on_lost
        if self._limits.ping_interval_s is not None:
            self._tick_timer = self._wheel.call_later(self._limits.ping_interval_s, self._tick)
        if self._handler is not None:
            self._call_handler(self._handler.on_open)
        if leftover:
            self.data_received(leftover)

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes of the peer."""
        self._was_heard = True
        handler = self._handler
        for event in self._decoder.feed(data):
            if isinstance(event, _MESSAGE):
                if not self._is_open:
                    continue  # said behind our back while we were closing
                if handler is not None:
                    self._call_handler(handler.on_message, event)
                else:
                    self._queue.append(event)
                    self._queued_bytes += len(event)
            else:
                self._on_control(event)
        if self._pong_due is not None and not self._is_write_paused:
            self._send_pong()
        if self._queue:
            self._wake_receiver()
            if not self._is_read_paused and self._is_open and not self._has_room():
                self._is_read_paused = True
                self._transport.pause_reading()

    def eof_received(self) -> bool | None:
        """The peer sends no more: with or without a close frame, this is the end. What is unsent still has a while."""
        if self._close_timer is None:
            self._close_timer = self._wheel.call_later(self._limits.close_timeout_s, self._transport.abort)
        return None

    def pause_writing(self) -> None:
        """Too much is unsent."""
        self._is_write_paused = True
        self._unsent_bytes = self.n_unsent
        self._n_stalled = 0
        if self._handler is not None and self._is_open and not self._is_read_paused:
            # A handler of plain calls cannot wait: so that it need not refuse, it is not asked for more.
            self._is_read_paused = True
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The peer reads again."""
        self._is_write_paused = False
        if self._handler is not None and self._is_read_paused:
            self._is_read_paused = False
            self._transport.resume_reading()
        if self._pong_due is not None:
            self._send_pong()
        self._writable.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._is_lost = True
        self._is_open = False
        if not self.close_code:
            self.close_code = c.ABNORMAL
            self.close_reason = "" if exc is None else str(exc)
        for timer in (self._close_timer, self._tick_timer):
            if timer is not None:
                timer.cancel()
        pings, self._pings = self._pings, {}
        for answer, _ in pings.values():
            _settle(answer, None)
        self._wake_receiver()
        self._writable.wake()
        self._gone.wake()
        if self._handler is not None:
            self._call_handler(self._handler.on_close)
        if self._on_lost is not None:
            self._on_lost(self)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _frame(self, opcode: int, payload: bytes) -> bytes:
        if self._deflate is not None:
            return c.encode_frame(opcode, self._deflate.deflate(payload), key=self._key(), is_compressed=True)
        return c.encode_frame(opcode, payload, key=None if self._keys is None else self._keys.next())

    def _now_s(self) -> float:
        return self._loop.time() if self._clock is None else self._clock.monotonic_ns() * 1e-9

    def _key(self) -> bytes | None:
        return None if self._keys is None else self._keys.next()

    def _has_room(self, *, share: int = 1) -> bool:
        """Whether the queue holds less than its limits divided by `share`."""
        limits = self._limits
        return len(self._queue) * share < limits.queued_messages_max and self._queued_bytes * share < limits.queued_bytes_max

    def _wake_receiver(self) -> None:
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)

    def _on_control(self, event: c.Ping | c.Pong | c.Close | c.Failure) -> None:
        if isinstance(event, c.Ping):
            self._pong_due = event.payload
        elif isinstance(event, c.Pong):
            self._on_pong(event.payload)
        elif isinstance(event, c.Close):
            self._on_close_frame(event)
        else:
            self._on_violation(event)

    def _send_pong(self) -> None:
        payload, self._pong_due = self._pong_due, None
        if self._is_open and payload is not None:
            self._transport.write(c.encode_frame(c.PONG, payload, key=self._key()))

    def _on_pong(self, payload: bytes) -> None:
        """Answer the ping it belongs to and those before: a peer may answer only the latest."""
        if payload not in self._pings:
            return
        now = self._now_s()
        for sent in list(self._pings):
            answer, at = self._pings.pop(sent)
            _settle(answer, now - at)
            if sent == payload:
                return

    def _on_close_frame(self, event: c.Close) -> None:
        self.close_code, self.close_reason = event.code, event.reason
        if self._is_open:
            self._go_down(c.encode_close(event.code, key=self._key()))
        if self._keys is None:  # the server closes TCP first (section 7.1.1); a client waits for it until its deadline
            self._transport.close()
        self._wake_receiver()

    def _on_violation(self, event: c.Failure) -> None:
        if self._error is None:
            self._error = ProtocolViolation(self.peer, event.why)
        if not self.close_code:
            self.close_code, self.close_reason = event.code, event.why
        if self._is_open:
            self._go_down(c.encode_close(event.code, event.why, key=self._key()))
        # Closing now, with unread bytes in the kernel, would reset the connection before the peer could read why.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _go_down(self, frame: bytes) -> None:
        """Send the last frame and give the peer a bounded time for the rest."""
        self._is_open = False
        self._transport.write(frame)
        if self._close_timer is None:
            self._close_timer = self._wheel.call_later(self._limits.close_timeout_s, self._transport.abort)
        self._writable.wake()
        self._wake_receiver()
        if self._is_read_paused:
            self._is_read_paused = False
            self._transport.resume_reading()

    async def _wait_writable(self) -> None:
        while self._is_open and self._is_write_paused:
            await self._writable.wait()
        if not self._is_open:
            raise self._why_ended()

    async def _end(self) -> IsopodError:
        """Return why no message will come, once that is known: after our own close, when the peer has answered."""
        while not self._is_lost and not self.close_code:
            await self._gone.wait()
        return self._why_ended()

    def _why_ended(self) -> IsopodError:
        if self._error is not None:
            return self._error
        if self._closed_by_us:
            return Disconnected(self.peer, "the websocket was closed by us")
        if self.close_code in {0, c.ABNORMAL}:
            return Disconnected(self.peer, self.close_reason or "the connection ended without a closing handshake")
        return Disconnected(self.peer, f"the websocket was closed with {self.close_code} {self.close_reason}".rstrip())

    def _tick(self) -> None:
        """Once in a ping interval: cut a peer that is silent or does not read, ping the others."""
        interval_s = self._limits.ping_interval_s
        assert interval_s is not None
        if not self._is_open:
            return
        # While we do not read, nothing can be heard: that is no fault of the peer.
        self._n_silent = 0 if self._was_heard or self._is_read_paused else self._n_silent + 1
        self._was_heard = False
        if self._is_write_paused:
            unsent_bytes = self.n_unsent
            self._n_stalled = self._n_stalled + 1 if unsent_bytes >= self._unsent_bytes else 0
            self._unsent_bytes = unsent_bytes
        else:
            self._n_stalled = 0
        if max(self._n_silent, self._n_stalled) * interval_s >= self._limits.ping_timeout_s:
            what = "a sign of life" if self._n_silent >= self._n_stalled else "reading what was sent to it"
            self._error = DeadlineExceeded(f"{self.peer}: {what}", self._limits.ping_timeout_s)
            self._transport.write(c.encode_close(c.INTERNAL_ERROR, "keep-alive timed out", key=self._key()))
            self._is_open = False
            self._transport.abort()
            return
        if not self._is_write_paused:
            self._transport.write(c.encode_frame(c.PING, b"", key=self._key()))
        self._tick_timer = self._wheel.call_later(interval_s, self._tick)

    def _call_handler(self, method: Callable[..., None], *args: object) -> None:
        """Call a handler; what it raises closes the connection with 1011 and is reported, but for a peer that reads too slowly (1013)."""
        try:
            method(self, *args)
        except Exception as error:  # noqa: BLE001 - the root of a handler's code
            if isinstance(error, Exhausted) and self._is_write_paused:
                self.start_close(c.TRY_AGAIN_LATER, "too slow")
                return
            self._loop.call_exception_handler({"message": f"websocket handler failed on {self.peer}", "exception": error, "protocol": self})
            self.start_close(c.INTERNAL_ERROR)


def describe_peer(transport: asyncio.BaseTransport, kind: str) -> str:
    """Return what to call the other end in messages."""
    name = transport.get_extra_info("peername")
    return f"{kind} {name[0]}:{name[1]}" if isinstance(name, tuple) and len(name) >= 2 else f"{kind} {name or ''}".rstrip()


def _settle(answer: "asyncio.Future[float | None]", round_trip_s: float | None) -> None:
    if not answer.done():
        answer.set_result(round_trip_s)
