"""One connection of the HTTP client, and one exchange on it: a request out, its answer in.

The connection parses with httptools (leniencies off) and adds what a client must judge itself: the length of a body that only the end of
the connection ends, answers to HEAD, interim answers, bytes that nobody asked for, and bounds on everything that is not body.

Rules: an exchange ends exactly once, by completion or by its first error; after an error its connection is cut. A connection is fit for
another request only when both messages ended within their framing, nothing stood behind the answer, and neither side said close.
Source: RFC 9112 sections 6 to 9.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Callable
from typing import Final, cast

import httptools

from isopod.net.http.client_codec import LAST_CHUNK, chunk
from isopod.net.http.client_messages import ClientLimits
from isopod.runtime.abort import AbortSource, Subscription
from isopod.runtime.timers import TimerWheel, WheelTimer
from isopod.runtime.waiters import Waiters
from isopod.world.errors import Cancelled, DeadlineExceeded, Disconnected, InvalidArgument, IsopodError, ProtocolViolation

_HEAD_END: Final = b"\r\n\r\n"
_BODILESS: Final = frozenset({204, 304})
_VERSIONS: Final = ("1.1", "1.0")
_SWITCHING: Final = 101
_CONTINUE: Final = 100


class Exchange:
    """One request and its answer.

    Args:
        connection: Where it happens.
        method: Of the request.
        limits: Bounds.
        stops_after_head: Whether it asks for another protocol: then what follows a 101 is not HTTP.
    """

    __slots__ = (
        "_connection",
        "_head_waiter",
        "_limits",
        "_n_buffered",
        "_pieces",
        "_reader",
        "_subscription",
        "coding",
        "error",
        "has_head",
        "headers",
        "is_bodiless",
        "is_complete",
        "is_discarded",
        "is_head_request",
        "is_reused",
        "is_sent",
        "is_upgraded",
        "may_continue",
        "n_body",
        "n_overhead",
        "peer",
        "reason",
        "status",
        "stops_after_head",
        "timer",
        "uploader",
        "version",
        "wants_close",
    )

    def __init__(self, connection: "ClientConnection", method: str, limits: ClientLimits, *, stops_after_head: bool = False) -> None:
        self.peer: Final = connection.peer
        self.is_head_request: Final = method == "HEAD"
        self.stops_after_head: Final = stops_after_head
        self.status = 0
        self.reason = ""
        self.version = ""
        self.headers: list[tuple[str, str]] = []
        self.error: BaseException | None = None
        self.has_head = False
        self.is_complete = False
        self.is_discarded = False
        self.is_bodiless = False
        self.is_sent = False
        self.is_upgraded = False
        self.is_reused = False
        self.wants_close = False
        self.may_continue = False
        self.n_body = 0
        self.n_overhead = 0
        self._subscription: Subscription | None = None
        self.coding = ""
        """The answer's Content-Encoding, in small letters."""
        self.timer: WheelTimer | None = None
        self.uploader: asyncio.Task[None] | None = None
        self._connection = connection
        self._limits = limits
        self._pieces: deque[bytes] = deque()
        self._n_buffered = 0
        self._head_waiter: asyncio.Future[None] | None = None
        self._reader: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.is_complete or self.error is not None

    async def wait_head(self, *, or_continue: bool = False) -> None:
        """Wait for the head of the final answer, or for a 100 Continue. Raises what ended the exchange."""
        while not self.has_head and self.error is None and not (or_continue and self.may_continue):
            self._head_waiter = self._connection.loop.create_future()
            await self._head_waiter
        if not self.has_head and self.error is not None:
            raise self.error

    async def next_piece(self) -> bytes | None:
        """Return the next bytes of the body, None at its end. Raises what ended the exchange."""
        while not self._pieces:
            if self.error is not None:
                raise self.error
            if self.is_complete:
                return None
            self._reader = self._connection.loop.create_future()
            await self._reader
        piece = self._pieces.popleft()
        self._n_buffered -= len(piece)
        if not self.is_over and self._n_buffered * 2 < self._limits.buffer_bytes_max:
            self._connection.resume_reading()
        return piece

    def take_whole(self) -> bytes | None:
        """Return the whole body if all of it is here and none was taken, None otherwise."""
        if not self.is_complete or self._n_buffered != self.n_body:
            return None
        pieces, self._n_buffered = self._pieces, 0
        self.is_discarded = True
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def discard(self) -> None:
        """Nobody reads the body any more: drain what is left of it, within bounds, or cut the connection."""
        self._pieces.clear()
        self._n_buffered = 0
        if self.is_over or self.is_discarded:
            return
        self.is_discarded = True
        n_left, self.n_body = self._announced() - self.n_body, 0
        if n_left > self._limits.drain_bytes_max:
            self._connection.abandon(self)
        else:
            self._connection.resume_reading()

    def stop_holding(self) -> None:
        """The server said nothing about our wish to continue: take that for a yes."""
        self.may_continue = True
        self.wake_head()

    def end_with(self, abort: AbortSource) -> None:
        """Let an abort end what is left of the answer."""
        if not self.is_over:
            self._subscription = abort.subscribe(
                lambda reason: self._connection.fail(self, Cancelled(f"request to {self.peer} ({reason})"))
            )

    # --- for the connection -------------------------------------------------------------------------------------------

    def on_head(self) -> None:
        """The final head is here."""
        self.has_head = True
        self.wake_head()

    def wake_head(self) -> None:
        """Tell who waits for the head, or for a 100, that something came."""
        if self._head_waiter is not None and not self._head_waiter.done():
            self._head_waiter.set_result(None)

    def on_body(self, data: bytes) -> None:
        """Bytes of the body came."""
        self.n_body += len(data)
        if self.is_discarded:
            if self.n_body > self._limits.drain_bytes_max:
                self._connection.abandon(self)
            return
        self._pieces.append(data)
        self._n_buffered += len(data)
        self._wake_reader()
        if self._n_buffered > self._limits.buffer_bytes_max:
            self._connection.pause_reading()

    def complete(self) -> None:
        """The answer has ended well."""
        if self.error is not None:
            return
        self.is_complete = True
        self._end()

    def fail(self, error: BaseException) -> None:
        """The exchange has ended badly; only the first error counts. What was received before can still be read."""
        if self.is_over:
            return
        self.error = error
        self._end()

    def _end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self._subscription is not None:
            self._subscription.cancel()
        if self.uploader is not None and not self.is_sent:
            self.uploader.cancel()
        self.wake_head()
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _announced(self) -> int:
        """How long the body said it is; 0 if it did not."""
        return next((int(value) for name, value in self.headers if name.lower() == "content-length" and value.isdecimal()), 0)


class ClientConnection(asyncio.Protocol):
    """An open connection to a server. The pool makes it and is told when it is free or gone.

    Args:
        peer: What to call the server in messages.
        limits: Bounds.
        wheel: For deadlines.
        on_free: Called when an exchange has ended and another may begin.
        on_gone: Called once when the connection is lost.
    """

    def __init__(
        self,
        peer: str,
        limits: ClientLimits,
        wheel: TimerWheel,
        *,
        on_free: Callable[["ClientConnection"], None],
        on_gone: Callable[["ClientConnection"], None],
    ) -> None:
        self.peer: Final = peer
        self.loop: Final = asyncio.get_running_loop()
        self.idle_since_s = 0.0
        self.n_exchanges = 0
        self.is_lost = False
        self._limits = limits
        self._wheel = wheel
        self._on_free = on_free
        self._on_gone = on_gone
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._head: bytearray | None = None
        self._headers: list[tuple[str, str]] = []
        self._reason = b""
        self._in_head = True
        self._is_interim = False
        self._ends_with_connection = False
        self._must_close = False
        self._is_handed_over = False
        self._leftover = b""
        self._is_write_paused = False
        self._is_read_paused = False
        self._writable = Waiters()
        self._gone = Waiters()

    @property
    def is_usable(self) -> bool:
        """Whether a request may be sent on it."""
        return self._exchange is None and not self._must_close and self._transport is not None and not self._transport.is_closing()

    # --- requests -----------------------------------------------------------------------------------------------------

    def start(self, method: str, first_byte_s: float, total_s: float, *, stops_after_head: bool = False) -> Exchange:
        """Begin an exchange; `send` follows.

        Args:
            method: Of the request.
            first_byte_s: Time until the head of the answer.
            total_s: Time for all.
            stops_after_head: See `Exchange`.
        """
        exchange = Exchange(self, method, self._limits, stops_after_head=stops_after_head)
        exchange.is_reused = self.n_exchanges > 0
        self.n_exchanges += 1
        self._exchange = exchange
        self._in_head = True
        self._headers = exchange.headers
        self._ends_with_connection = False
        self._head = bytearray() if stops_after_head or exchange.is_head_request else None
        if first_byte_s < total_s:
            exchange.timer = self._wheel.call_later(first_byte_s, self._on_first_byte_due, exchange, first_byte_s, total_s)
        else:
            exchange.timer = self._wheel.call_later(total_s, self._on_expired, exchange, "answer", total_s)
        return exchange

    def send(self, data: bytes) -> None:
        """Send the whole request, or its head."""
        assert self._transport is not None
        self._transport.write(data)

    async def upload(self, exchange: Exchange, body: AsyncIterable[bytes], n_bytes: int | None) -> None:
        """Send a streamed body, at the pace the server takes it. Whatever goes wrong ends the exchange.

        Args:
            exchange: Whose request it is.
            body: The pieces; closed at the end if it can be.
            n_bytes: Their announced sum; None to send them chunked.
        """
        try:
            n_sent = 0
            async for piece in body:
                n_sent += len(piece)
                if n_bytes is not None and n_sent > n_bytes:
                    break
                if piece:
                    self.send(piece if n_bytes is not None else chunk(piece))
                while self._is_write_paused and not exchange.is_over:
                    await self._writable.wait()
                if exchange.is_over:
                    return
            if n_bytes is not None and n_sent != n_bytes:
                raise InvalidArgument("body", f"{n_sent} bytes", f"content-length says {n_bytes}")
            if n_bytes is None:
                self.send(LAST_CHUNK)
            exchange.is_sent = True
        except Exception as error:  # noqa: BLE001 - the caller's iterator: its failure is the request's
            self.fail(exchange, error)
        finally:
            close = getattr(body, "aclose", None)
            if close is not None:
                await close()

    def hand_over(self) -> tuple[asyncio.Transport, bytes]:
        """Give the transport away after a 101, with what came behind it. Reading is paused; the pool forgets the connection."""
        assert self._transport is not None
        self._is_handed_over = True
        self._on_gone(self)
        leftover, self._leftover = self._leftover, b""
        return self._transport, leftover

    def fail(self, exchange: Exchange, error: BaseException) -> None:
        """End an exchange badly, and the connection with it."""
        exchange.fail(error)
        if self._exchange is exchange and not self._is_handed_over:
            self.abort()

    def abandon(self, exchange: Exchange) -> None:
        """Nobody wants the rest of an answer, and it is too long to read away."""
        self.fail(exchange, Disconnected(self.peer, "the answer was given up by us"))

    def abort(self) -> None:
        """Cut the connection."""
        self._must_close = True
        if self._transport is not None:
            self._transport.abort()

    async def wait_gone(self) -> None:
        """Wait until the connection is lost."""
        while not self.is_lost and not self._is_handed_over:
            await self._gone.wait()

    def pause_reading(self) -> None:
        """Slow the server down."""
        if not self._is_read_paused and self._transport is not None:
            self._is_read_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take more."""
        if self._is_read_paused and self._transport is not None and not self.is_lost:
            self._is_read_paused = False
            self._transport.resume_reading()

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Bytes of the server."""
        exchange = self._exchange
        if self._is_handed_over or (exchange is not None and exchange.is_upgraded):
            self._leftover += data
            return
        if exchange is None:  # an unasked answer; a server that times an idle connection out may say 408 here
            self.abort()
            return
        if exchange.is_over:
            return
        try:
            if self._head is None:
                self._feed(exchange, data)
            else:
                self._feed_head(exchange, data)
        except ProtocolViolation as error:
            self.fail(exchange, error)
            return
        if exchange.is_complete:
            self._finish(exchange)

    def eof_received(self) -> bool | None:
        """The server sends no more."""
        return None

    def pause_writing(self) -> None:
        """The server reads slowly."""
        self._is_write_paused = True

    def resume_writing(self) -> None:
        """The server reads again."""
        self._is_write_paused = False
        self._writable.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.is_lost = True
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            if exc is None and exchange.has_head and self._ends_with_connection:
                exchange.complete()
            else:
                exchange.fail(self._lost(exchange, exc))
        self._writable.wake()
        self._gone.wake()
        if not self._is_handed_over:
            self._on_gone(self)

    # --- httptools ----------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A message begins: a second one behind the final answer is none that was asked for."""
        exchange = self._exchange
        if exchange is None or exchange.is_complete:
            raise _Unasked
        self._in_head = True

    def on_status(self, status: bytes) -> None:
        """(A part of) the reason phrase."""
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field; those behind a body are trailers, which nobody asked for."""
        if self._in_head:
            if len(self._headers) >= self._limits.headers_max:
                raise _Violation(f"more than {self._limits.headers_max} header fields")
            self._headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """A head is complete: judge what follows it."""
        self._in_head = False
        exchange = self._exchange
        assert exchange is not None
        status = self._parser.get_status_code()
        self._is_interim = 100 <= status < 200 and not (status == _SWITCHING and exchange.stops_after_head)
        if self._is_interim:
            if status == _SWITCHING:
                raise _Violation("it switched protocols unasked")
            exchange.may_continue = exchange.may_continue or status == _CONTINUE
            self._headers.clear()
            self._reason = b""
            exchange.wake_head()
            return
        exchange.status = status
        exchange.reason, self._reason = self._reason.decode("latin-1"), b""
        exchange.version = self._parser.get_http_version()
        if exchange.version not in _VERSIONS:
            raise _Violation(f"it answers in HTTP/{exchange.version}")
        exchange.is_bodiless = exchange.is_head_request or status in _BODILESS or status == _SWITCHING
        self._judge_framing(exchange)
        exchange.on_head()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        exchange = self._exchange
        if exchange is not None:
            exchange.n_overhead = 0
            exchange.on_body(body)

    def on_message_complete(self) -> None:
        """A message has ended; an interim one is followed by another."""
        exchange = self._exchange
        if self._is_interim or exchange is None:
            return
        exchange.complete()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _feed(self, exchange: Exchange, data: bytes) -> None:
        exchange.n_overhead += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if not exchange.is_complete:
                raise ProtocolViolation(self.peer, "it switched protocols unasked") from None
            self._must_close = True
        except httptools.HttpParserError as error:
            if not exchange.is_complete:
                raise ProtocolViolation(self.peer, _explain(error)) from None
            self._must_close = True  # the answer was sound; what stands behind it is not
        if exchange.n_overhead > self._limits.header_bytes_max and not exchange.is_complete:
            raise ProtocolViolation(self.peer, f"more than {self._limits.header_bytes_max} bytes that are not body")

    def _feed_head(self, exchange: Exchange, data: bytes) -> None:
        """Feed heads only, up to the final one: the parser does not know that an answer to HEAD has no body, nor who wants to switch."""
        assert self._head is not None
        searched = max(0, len(self._head) - len(_HEAD_END))
        self._head += data
        while not exchange.has_head:
            end = self._head.find(_HEAD_END, searched)
            searched = 0
            if end < 0:
                if len(self._head) > self._limits.header_bytes_max:
                    raise ProtocolViolation(self.peer, f"more than {self._limits.header_bytes_max} bytes that are not body")
                return
            head = bytes(self._head[: end + len(_HEAD_END)])
            del self._head[: len(head)]
            self._feed_one_head(exchange, head)
        rest = bytes(self._head)
        self._head = None
        if exchange.is_head_request:
            self._must_close = self._must_close or bool(rest)
            self._parser = httptools.HttpResponseParser(self)
            if not exchange.is_complete:
                exchange.complete()
        elif exchange.status == _SWITCHING:
            exchange.is_upgraded = True
            self._leftover = rest
            self.pause_reading()
            exchange.complete()
        elif rest:
            self._feed(exchange, rest)

    def _feed_one_head(self, exchange: Exchange, head: bytes) -> None:
        exchange.n_overhead += len(head)
        try:
            self._parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            if not exchange.has_head:
                raise ProtocolViolation(self.peer, "it switched protocols unasked") from None
        except httptools.HttpParserError as error:
            raise ProtocolViolation(self.peer, _explain(error)) from None
        if exchange.n_overhead > self._limits.header_bytes_max:
            raise ProtocolViolation(self.peer, f"more than {self._limits.header_bytes_max} bytes that are not body")

    def _judge_framing(self, exchange: Exchange) -> None:
        """Decide what ends the body and whether the connection can be used again. Raises _Violation."""
        codings, has_length, options = "", False, ""
        for name, value in exchange.headers:
            lowered = name.lower()
            if lowered == "transfer-encoding":
                codings = f"{codings}, {value}" if codings else value
            elif lowered == "content-length":
                has_length = True
            elif lowered == "connection":
                options = f"{options},{value}".lower()
            elif lowered == "content-encoding":
                exchange.coding = f"{exchange.coding}, {value.lower()}" if exchange.coding else value.lower()
        if codings:
            if codings.strip().lower() != "chunked":
                raise _Violation(f"transfer coding {codings!r} was not asked for")
            if exchange.version != "1.1" or has_length:
                raise _Violation("its body has two lengths" if has_length else "chunked in HTTP/1.0")
        words = [word.strip() for word in options.split(",")] if options else ()
        keeps = "close" not in words if exchange.version == "1.1" else "keep-alive" in words
        self._ends_with_connection = not codings and not has_length and not exchange.is_bodiless
        if not keeps or self._ends_with_connection or exchange.wants_close:
            self._must_close = True

    def _finish(self, exchange: Exchange) -> None:
        """An exchange is complete: free the connection, or close it."""
        if exchange.is_upgraded:
            return
        self._exchange = None
        self.resume_reading()
        if not exchange.is_sent:  # the server answered before it had the whole request: what would follow could be misread
            self._must_close = True
        if self._must_close:
            self.abort()
            return
        self._on_free(self)

    def _on_first_byte_due(self, exchange: Exchange, first_byte_s: float, total_s: float) -> None:
        """One timer watches both times: most exchanges are over before the first."""
        if not exchange.has_head:
            self._on_expired(exchange, "first byte", first_byte_s)
        elif not exchange.is_over:
            exchange.timer = self._wheel.call_later(total_s - first_byte_s, self._on_expired, exchange, "answer", total_s)

    def _on_expired(self, exchange: Exchange, what: str, limit_s: float) -> None:
        self.fail(exchange, DeadlineExceeded(f"{what} of {self.peer}", limit_s))

    def _lost(self, exchange: Exchange, exc: Exception | None) -> IsopodError:
        where = "in the middle of the answer" if exchange.has_head else "before it answered"
        return Disconnected(self.peer, f"connection closed {where}" + (f" ({exc})" if exc is not None and str(exc) else ""))


class _Violation(Exception):
    """Raised inside the parser's callbacks."""


class _Unasked(_Violation):
    """A second message."""

    def __init__(self) -> None:
        super().__init__("an answer that nobody asked for")


def _explain(error: BaseException) -> str:
    cause = error.__context__
    return str(cause) if isinstance(cause, _Violation) else f"not HTTP: {error}"
