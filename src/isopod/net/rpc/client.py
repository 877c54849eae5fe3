"""Client: calls methods over one connection, many at once.

Cancelling a task that waits in `call` withdraws the call (the server cancels its handler). Answers that come too late are
dropped. A client does not reconnect: when its connection ends, every call, open or to come, raises why. `ReconnectingClient` does.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from isopod.net.rpc.client_call import AnyClientCall, ClientCall
from isopod.net.rpc.codec import Body, Codec
from isopod.net.rpc.connection import VERSIONS, Connection, error_of
from isopod.net.rpc.deadlines import Deadlines
from isopod.net.rpc.limits import RpcLimits
from isopod.runtime.abort import current_deadline
from isopod.wire import frames as f
from isopod.wire.service import Method
from isopod.world.errors import (
    DeadlineExceeded,
    Disconnected,
    InvalidArgument,
    IsopodError,
    NotStarted,
    ProtocolViolation,
    Unsupported,
)
from isopod.world.network import PeerIdentity

Q = TypeVar("Q")
R = TypeVar("R")

CALL_TIMEOUT_S: Final = 30.0
_NOT_OURS: Final = (f.Request, f.Cancel, f.Notify)


class _Failure:
    """What a waiting call is woken with instead of a reply: an exception in a future that nobody awaits any more would be reported."""

    __slots__ = ("error",)

    def __init__(self, error: IsopodError) -> None:
        self.error = error


_Waiting = tuple["asyncio.Future[Any]", Codec[Any, Any], float | None, int | None]
"""A call without streams: who waits, how to decode, when it is over, and after how many milliseconds. An object would cost more."""


class Client:
    """Open with `connect`; close after use.

    Args:
        peer: What to call ourselves.
        limits: Bounds.
        encoding: Of the connection.
        group: The scheduling group to ask for, "" for the listener's own.
        compression: Whether to ask for zstd.
    """

    def __init__(
        self, *, peer: str, limits: RpcLimits, encoding: f.Encoding = "msgpack", group: str = "", compression: bool = False
    ) -> None:
        features = tuple(feature for feature in f.FEATURES if compression or feature != "zstd")
        self._hello = f.Hello(VERSIONS, peer, group, features, round(limits.heartbeat_s * 1000))
        self.connection = Connection(self, limits=limits, is_server=False, encoding=encoding)
        self.table = ""
        """The hash of the server's table of methods, "" if it does not say."""
        self._loop = self.connection.loop
        self._waiting: dict[int, _Waiting] = {}
        self._open: dict[int, AnyClientCall] = {}
        self._codecs: dict[str, Codec[Any, Any]] = {}
        self._n_calls = 0
        self._deadlines = Deadlines(self._loop, self._open_deadlines, self._on_expired)
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._refusal: IsopodError | None = None

    @property
    def peer(self) -> str:
        """What the server calls itself."""
        return self.connection.peer

    @property
    def identity(self) -> PeerIdentity | None:
        """Who the server's certificate says it is; None without TLS."""
        return self.connection.identity

    @property
    def is_usable(self) -> bool:
        """Whether a call made now would be sent."""
        return self._refusal is None

    async def call(self, method: Method[Q, R], request: Q, *, timeout_s: float | None = CALL_TIMEOUT_S) -> R:
        """Call a method and wait for its reply; items it streams are dropped.

        Args:
            method: Which.
            request: Its request.
            timeout_s: The deadline, told to the server too; None for none. A nearer one of the context (`isopod.runtime.abort`) counts.

        Raises:
            DeadlineExceeded: No answer in time.
            Disconnected: The connection ended; `NotStarted` if the server certainly did not begin the call.
            IsopodError: What the handler raised.
        """
        if self.connection.is_write_paused:
            await self._wait_writable(method.name, timeout_s)
        call_id, codec, expires_at, deadline_ms = self._send_request(method, request, timeout_s)
        if method.sends is not None:
            self.connection.send(f.End(call_id))
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[call_id] = (future, codec, expires_at, deadline_ms)
        try:
            found = await future
        except asyncio.CancelledError:
            if self._waiting.pop(call_id, None) is not None:
                self.connection.send(f.Cancel(call_id))
            raise
        if type(found) is _Failure:
            raise found.error
        reply: R = found
        return reply

    @asynccontextmanager
    async def open(self, method: Method[Q, R], request: Q, *, timeout_s: float | None = None) -> AsyncIterator[ClientCall[R]]:
        """Open a call with streams, for the length of an `async with` block; leaving it before the reply withdraws the call.

        Args:
            method: Which.
            request: Its request.
            timeout_s: The deadline of the whole call; None for none.

        Raises:
            IsopodError: The connection has ended.
        """
        if self.connection.is_write_paused:
            await self._wait_writable(method.name, timeout_s)
        call_id, codec, expires_at, deadline_ms = self._send_request(method, request, timeout_s)
        call = self._open[call_id] = ClientCall(self.connection, call_id, codec, expires_at=expires_at)
        call.deadline_ms = deadline_ms
        call.open_streams()
        try:
            yield call
        finally:
            self._withdraw(call)
            call.discard()

    async def notify(self, method: Method[Q, R], request: Q, *, timeout_s: float | None = CALL_TIMEOUT_S) -> None:
        """Have a method called and never hear of it: no reply, no error, no promise that it was served. Returns when it is on its way.

        Args:
            method: Which; it must not stream.
            request: Its request.
            timeout_s: How long the handler may take, and this wait for a server that does not read.

        Raises:
            Unsupported: The server knows no such calls, or the method streams.
            InvalidArgument: The request cannot be packed.
            IsopodError: The connection has ended.
        """
        if method.sends is not None or method.receives is not None:
            raise Unsupported(f"a notice of {method.name}", "the method streams")
        if "notify" not in self.connection.features:
            raise Unsupported(f"a notice of {method.name}", f"{self.peer} takes none")
        if self.connection.is_write_paused:
            await self._wait_writable(method.name, timeout_s)
        if self._refusal is not None:
            raise self._refusal
        self._send((f.NOTIFY, method.name, self._deadline(timeout_s)[1]), request, method.name)

    async def ping(self, *, timeout_s: float = CALL_TIMEOUT_S) -> float:
        """Return how many seconds the server takes to answer a PING.

        Raises:
            DeadlineExceeded: No answer in time.
            IsopodError: The connection has ended.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self.connection.ping()
        except TimeoutError:
            raise DeadlineExceeded(f"a ping of {self.peer}", timeout_s) from None

    async def close(self) -> None:
        """Fail what is open and end the connection."""
        self.connection.close(Disconnected(self.peer, "closed by us"))
        await self.connection.wait_gone()

    async def wait_ready(self) -> None:
        """Wait for the server's hello.

        Raises:
            IsopodError: The connection ended instead.
        """
        await asyncio.shield(self._ready)
        if self.connection.error is not None:
            raise self.connection.error

    # --- what the connection calls ------------------------------------------------------------------------------------

    def on_made(self) -> None:
        """The connection stands; the hello will say more."""

    def greeting(self, theirs: f.Hello | None) -> f.Hello:
        """Return our hello."""
        return self._hello

    def on_hello(self, hello: f.Hello) -> None:
        """The server has introduced itself."""
        self.table = hello.table
        if not self._ready.done():
            self._ready.set_result(None)

    def on_bytes(self) -> None:
        """Something came."""

    def on_frame(self, frame: f.Frame, n_bytes: int) -> bool:
        """Take a frame of a server."""
        if type(frame) is f.Reply:
            self._on_reply(frame.id, frame.body)
        elif isinstance(frame, f.RawFrame):
            self._on_raw_frame(frame, n_bytes)
        elif isinstance(frame, f.STREAM_FRAMES):
            self._on_stream_frame(frame.id, frame, n_bytes)
        elif isinstance(frame, f.Error) and frame.id:
            self._fail(frame.id, error_of(frame))
        elif isinstance(frame, f.GoAway):
            self._on_go_away(frame.last_id)
        elif isinstance(frame, _NOT_OURS):
            raise f.WireError(f"{type(frame).__name__.upper()} from a server")
        else:
            self.connection.on_frame(frame)
        return self.connection.must_pause

    def on_writable(self) -> None:
        """The server reads again."""
        for call in list(self._open.values()):
            call.wake()

    def on_unread(self, n_bytes: int) -> bool:
        """Calls wait while the server does not read: nothing piles up here."""
        return True

    def on_lost(self, error: IsopodError) -> None:
        """The connection has ended."""
        self._refusal = NotStarted(self.peer, error.message, error.hint) if type(error) is Disconnected else error
        self._deadlines.close()
        for call_id in (*self._waiting, *self._open):
            self._fail(call_id, error)
        if not self._ready.done():
            self._ready.set_result(None)

    def on_gone(self) -> None:
        """The transport is gone: nothing is left to do."""

    # --- calls --------------------------------------------------------------------------------------------------------

    def _send_request(self, method: Method[Q, R], request: Q, timeout_s: float | None) -> tuple[int, Codec[Q, R], float | None, int | None]:
        if self._refusal is not None:
            raise self._refusal
        name = method.name
        codec = self._codecs.get(name)
        if codec is None or codec.method is not method:
            codec = self._codecs[name] = Codec(method, self.connection.encoding)
        expires_at, deadline_ms = self._deadline(timeout_s)
        call_id = self._n_calls + 1
        self._send((f.REQUEST, call_id, name, deadline_ms), request, name)
        self._n_calls = call_id
        if expires_at is not None:
            self._deadlines.note(expires_at)
        return call_id, codec, expires_at, deadline_ms

    def _deadline(self, timeout_s: float | None) -> tuple[float | None, int | None]:
        """Return when a call is over, and what to tell the server; a deadline of the context may be nearer."""
        outer = current_deadline()
        if timeout_s is None and outer is None:
            return None, None
        now = self._loop.time()
        expires_at = outer if timeout_s is None else now + timeout_s
        if outer is not None and expires_at is not None and outer < expires_at:
            expires_at = outer
        assert expires_at is not None
        return expires_at, max(0, int((expires_at - now) * 1000 + 0.5))

    def _send(self, head: tuple[object, ...], request: object, what: str) -> None:
        connection = self.connection
        try:
            if type(request) is bytes and len(request) >= connection.raw_bytes_min:
                connection.send_raw((*head, None), request)
            else:
                connection.send((*head, request))
        except f.WireError as error:
            raise InvalidArgument("request of", what, error.why) from error

    def _on_reply(self, call_id: int, body: Body) -> None:
        waiting = self._waiting.pop(call_id, None)
        if waiting is None:
            self._on_open_reply(call_id, body)
            return
        future, codec, _, _ = waiting
        if future.done():
            return  # its caller was cancelled in this turn
        try:
            future.set_result(codec.decode_reply(body, self.peer))
        except ProtocolViolation as error:
            future.set_result(_Failure(error))

    def _on_open_reply(self, call_id: int, body: Body) -> None:
        call = self._open.pop(call_id, None)
        if call is None:
            return  # late: its caller gave up
        try:
            call.finish(call.codec.decode_reply(body, self.peer))
        except ProtocolViolation as error:
            call.fail(error)

    def _on_raw_frame(self, frame: f.RawFrame, n_bytes: int) -> None:
        head = frame.head
        if isinstance(head, f.Reply):
            waiting = self._waiting.get(head.id) or self._open.get(head.id)
            codec = waiting.codec if isinstance(waiting, ClientCall) else waiting[1] if waiting else None
            if codec is not None and codec.method.reply is not bytes:
                self._fail(head.id, ProtocolViolation(self.peer, f"reply of {codec.method.name}: it has no raw body"))
            else:
                self._on_reply(head.id, frame.body)
        elif isinstance(head, f.Item):
            self._on_stream_frame(head.id, frame, n_bytes)
        else:
            raise f.WireError(f"{type(head).__name__.upper()} from a server")

    def _on_stream_frame(self, call_id: int, frame: f.Frame, n_bytes: int) -> None:
        call = self._open.get(call_id)
        if call is not None:
            call.on_frame(frame, n_bytes)
            return
        waiting = self._waiting.get(call_id)
        if waiting is not None and isinstance(frame, f.ITEM_FRAMES):
            method = waiting[1].method
            if method.receives is None:
                raise ProtocolViolation(self.peer, f"{method.name} streams no items")
            self.connection.send(f.Credit(call_id, n_bytes))  # a plain call of a streaming method: nobody wants them

    def _fail(self, call_id: int, error: IsopodError) -> None:
        """End a call, if it is open."""
        waiting = self._waiting.pop(call_id, None)
        if waiting is not None:
            if not waiting[0].done():
                waiting[0].set_result(_Failure(error))
            return
        call = self._open.pop(call_id, None)
        if call is not None:
            call.fail(error)

    def _on_go_away(self, last_id: int) -> None:
        error = NotStarted(self.peer, "shutting down", "try again when it is up")
        self._refusal = self._refusal or error
        for call_id in (*self._waiting, *self._open):
            if call_id > last_id:
                self._fail(call_id, error)

    def _withdraw(self, call: AnyClientCall) -> None:
        """Tell the server that nobody waits any more, unless the call has ended."""
        if self._open.pop(call.id, None) is not None:
            self.connection.send(f.Cancel(call.id))
            call.fail(Disconnected(self.peer, f"{call.codec.method.name} was withdrawn by us"))

    def _open_deadlines(self) -> Iterator[tuple[int, float | None]]:
        for call_id, (_, _, expires_at, _) in self._waiting.items():
            yield call_id, expires_at
        for call_id, call in self._open.items():
            yield call_id, call.expires_at

    def _on_expired(self, call_id: int) -> None:
        waiting = self._waiting.get(call_id)
        if waiting is not None:
            method, deadline_ms = waiting[1].method, waiting[3]
        else:
            call = self._open[call_id]
            method, deadline_ms = call.codec.method, call.deadline_ms
        self.connection.send(f.Cancel(call_id))
        self._fail(call_id, DeadlineExceeded(method.name, (deadline_ms or 0) / 1000))

    async def _wait_writable(self, what: str, timeout_s: float | None) -> None:
        """Wait until the server reads what is already on its way: so a stalled server does not grow our memory."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.connection.is_write_paused and self.connection.error is None:
                    await self.connection.writable.wait()
        except TimeoutError:
            raise DeadlineExceeded(what, timeout_s or 0.0) from None
