"""Client: calls methods over one connection, many at once.

Cancelling a task that waits in `call` withdraws the call (the server cancels its handler). Answers that come too late are
dropped. A client does not reconnect: when its connection ends, every call, open or to come, raises why.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Generic, TypeVar

import msgspec

from isopod.net.rpc.codec import Codec
from isopod.net.rpc.connection import Connection, RpcLimits
from isopod.net.rpc.deadlines import Deadlines
from isopod.net.rpc.streams import Inbox, Outbox
from isopod.wire import frames as f
from isopod.wire.service import Method
from isopod.world.errors import (
    BugError,
    DeadlineExceeded,
    Disconnected,
    InvalidArgument,
    IsopodError,
    ProtocolViolation,
    from_code,
)
from isopod.world.network import Address, UnixAddress
from isopod.world.world import World

Q = TypeVar("Q")
R = TypeVar("R")

CALL_TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 5.0
_STREAM_FRAMES: Final = (f.Item, f.End, f.Credit)  # a union in place would be built anew at each isinstance
START_HINT: Final = "start the node: isopod node"


class ClientCall(Generic[R]):
    """One open call: what its method streams, and its reply."""

    __slots__ = ("_connection", "_done", "_error", "_inbox", "_outbox", "_result", "codec", "id", "timeout_s")

    def __init__(self, connection: Connection, call_id: int, codec: Codec[Any, R], *, timeout_s: float | None) -> None:
        self.id = call_id
        self.codec = codec
        self.timeout_s = timeout_s
        self._connection = connection
        # Only ever set to None: an exception kept in a future nobody awaits any more would be reported by the loop.
        self._done: asyncio.Future[None] = connection.loop.create_future()
        self._error: IsopodError | None = None
        self._result: R | None = None
        self._inbox: Inbox[Any] | None = None
        self._outbox: Outbox | None = None

    async def send(self, item: Any) -> None:  # of the union that the method names
        """Stream one item to the server, waiting for its credit.

        Raises:
            BugError: The method takes no items, or after `end`.
            InvalidArgument: The item is over 1 MiB.
            IsopodError: The call has ended.
        """
        if self._outbox is None:
            raise BugError(f"{self.codec.method.name} takes no items")
        await self._outbox.send(item)

    def end(self) -> None:
        """Say that no more items will come."""
        if self._outbox is not None:
            self._outbox.end()

    async def receive(self) -> Any:  # of the union that the method names
        """Return the next item the server streams; None at the end (the reply may follow).

        Raises:
            IsopodError: The call failed.
        """
        return None if self._inbox is None else await self._inbox.receive()

    def __aiter__(self) -> AsyncIterator[Any]:
        """Iterate over what the server streams."""
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Any]:
        while (item := await self.receive()) is not None:
            yield item

    async def reply(self) -> R:
        """Wait for the reply. Items not received are dropped only when the call is left.

        Raises:
            IsopodError: The call failed.
        """
        await asyncio.shield(self._done)
        return self.result()

    # --- for the client -----------------------------------------------------------------------------------------------

    @property
    def done(self) -> "asyncio.Future[None]":
        """Set when the call has ended."""
        return self._done

    @property
    def has_ended(self) -> bool:
        """Whether reply or error are there."""
        return self._error is not None or self._result is not None

    def open_streams(self) -> None:
        """Give the call the streams of its method."""
        method = self.codec.method
        if self.codec.receives is not None:
            self._inbox = Inbox(self._connection, self.id, decoder=self.codec.receives, method=method.name)
        if method.sends is not None:
            self._outbox = Outbox(self._connection, self.id, method=method.name)

    def result(self) -> R:
        """Return the reply, or raise the error, of an ended call."""
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise BugError(f"{self.codec.method.name} has not ended")
        return self._result

    def finish(self, result: R) -> None:
        """The reply came."""
        self._result = result
        self._settle(None)

    def fail(self, error: IsopodError) -> None:
        """The call failed."""
        self._error = error
        self._settle(error)

    def on_frame(self, frame: f.Frame, n_bytes: int) -> None:
        """Take a frame of this call's streams. Raises ProtocolViolation."""
        if isinstance(frame, f.Credit):
            if self._outbox is not None:
                self._outbox.on_credit(frame.n_bytes)
        elif self._inbox is not None:
            if isinstance(frame, f.Item):
                self._inbox.on_item(frame.body, n_bytes)
            else:
                self._inbox.end()
        elif isinstance(frame, f.Item):
            if self.codec.receives is None:
                raise ProtocolViolation(self._connection.peer, f"{self.codec.method.name} streams no items")
            self._connection.send(f.Credit(self.id, n_bytes))  # a plain call of a streaming method: nobody wants them

    def wake(self) -> None:
        """The peer reads again."""
        if self._outbox is not None:
            self._outbox.wake()

    def discard(self) -> None:
        """Nobody will take what is queued."""
        if self._inbox is not None:
            self._inbox.discard()

    def _settle(self, error: IsopodError | None) -> None:
        if not self._done.done():
            self._done.set_result(None)
        if self._inbox is not None:
            self._inbox.end(error)
        if self._outbox is not None:
            self._outbox.fail(error or Disconnected(self._connection.peer, f"{self.codec.method.name} has ended"))


AnyClientCall = ClientCall[Any]  # of whatever its method replies


class Client:
    """Open with `connect`; close after use."""

    def __init__(self, *, peer: str, limits: RpcLimits) -> None:
        self.connection = Connection(self, peer=peer, limits=limits, stops_reading=False)
        self._calls: dict[int, AnyClientCall] = {}
        self._codecs: dict[str, Codec[Any, Any]] = {}
        self._n_calls = 0
        self._deadlines = Deadlines(self.connection.loop, self._on_expired)
        self._ready: asyncio.Future[None] = self.connection.loop.create_future()
        self._refusal: IsopodError | None = None

    @property
    def peer(self) -> str:
        """What the server calls itself."""
        return self.connection.peer

    async def call(self, method: Method[Q, R], request: Q, *, timeout_s: float | None = CALL_TIMEOUT_S) -> R:
        """Call a method and wait for its reply; items it streams are dropped.

        Args:
            method: Which.
            request: Its request.
            timeout_s: The deadline, told to the server too; None for none.

        Raises:
            DeadlineExceeded: No answer in time.
            Disconnected: The connection ended.
            IsopodError: What the handler raised.
        """
        if self.connection.is_write_paused:
            await self._wait_writable(method.name, timeout_s)
        call = self._start(method, request, timeout_s, streams=False)
        try:
            await call.done
        except asyncio.CancelledError:
            self._withdraw(call)
            raise
        return call.result()

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
        call = self._start(method, request, timeout_s, streams=True)
        try:
            yield call
        finally:
            self._withdraw(call)
            call.discard()

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

    def on_hello(self, hello: f.Hello) -> None:
        """The server has introduced itself."""
        if not self._ready.done():
            self._ready.set_result(None)

    def on_frame(self, frame: f.Frame, n_bytes: int) -> None:
        """Take a frame of a server."""
        if isinstance(frame, f.Reply):
            self._on_reply(frame)
        elif isinstance(frame, _STREAM_FRAMES):
            call = self._calls.get(frame.id)
            if call is not None:
                call.on_frame(frame, n_bytes)
        elif isinstance(frame, f.Error):
            call = self._forget(frame.id)
            if call is not None:
                call.fail(from_code(frame.code, frame.message, frame.hint, frame.exit_code))
        elif isinstance(frame, f.GoAway):
            self._on_go_away(frame.last_id)
        else:
            raise f.WireError(f"{type(frame).__name__.upper()} from a server")

    def on_writable(self) -> None:
        """The server reads again."""
        for call in list(self._calls.values()):
            call.wake()

    def on_lost(self, error: IsopodError) -> None:
        """The connection has ended."""
        self._refusal = error
        self._deadlines.close()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.fail(error)
        if not self._ready.done():
            self._ready.set_result(None)

    def on_gone(self) -> None:
        """The transport is gone: nothing is left to do."""

    # --- calls --------------------------------------------------------------------------------------------------------

    def _start(self, method: Method[Q, R], request: Q, timeout_s: float | None, *, streams: bool) -> ClientCall[R]:
        if self._refusal is not None:
            raise self._refusal
        call_id = self._n_calls + 1
        deadline_ms = None if timeout_s is None else max(0, round(timeout_s * 1000))
        try:
            self.connection.send(f.Request(call_id, method.name, deadline_ms, request))
        except f.WireError as error:
            raise InvalidArgument("request of", method.name, error.why) from error
        self._n_calls = call_id
        call = ClientCall(self.connection, call_id, self._codec(method), timeout_s=timeout_s)
        if streams:
            call.open_streams()
        elif method.sends is not None:
            self.connection.send(f.End(call_id))
        self._calls[call_id] = call
        if timeout_s is not None:
            self._deadlines.add(call_id, timeout_s)
        return call

    def _codec(self, method: Method[Q, R]) -> Codec[Q, R]:
        codec = self._codecs.get(method.name)
        if codec is None or codec.method is not method:
            codec = self._codecs[method.name] = Codec(method)
        return codec

    def _forget(self, call_id: int) -> AnyClientCall | None:
        self._deadlines.discard(call_id)
        return self._calls.pop(call_id, None)

    def _on_reply(self, frame: f.Reply[msgspec.Raw]) -> None:
        call = self._forget(frame.id)
        if call is None:
            return  # late: its caller gave up
        try:
            call.finish(call.codec.decode_reply(frame.body, self.peer))
        except ProtocolViolation as error:
            call.fail(error)

    def _on_go_away(self, last_id: int) -> None:
        error = Disconnected(self.peer, "shutting down", "try again when it is up")
        self._refusal = self._refusal or error
        for call_id in [call_id for call_id in self._calls if call_id > last_id]:
            call = self._forget(call_id)
            if call is not None:
                call.fail(error)

    def _withdraw(self, call: AnyClientCall) -> None:
        """Tell the server that nobody waits any more, unless the call has ended."""
        if self._forget(call.id) is not None:
            self.connection.send(f.Cancel(call.id))
            call.fail(Disconnected(self.peer, f"{call.codec.method.name} was withdrawn by us"))

    def _on_expired(self, call_id: int) -> None:
        call = self._calls.pop(call_id, None)
        if call is not None:
            self.connection.send(f.Cancel(call_id))
            call.fail(DeadlineExceeded(call.codec.method.name, call.timeout_s or 0.0))

    async def _wait_writable(self, what: str, timeout_s: float | None) -> None:
        """Wait until the server reads what is already on its way: so a stalled server does not grow our memory."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.connection.is_write_paused and self.connection.error is None:
                    await self.connection.writable.wait()
        except TimeoutError:
            raise DeadlineExceeded(what, timeout_s or 0.0) from None


async def connect(
    world: World,
    address: Address,
    *,
    peer: str = "isopod",
    timeout_s: float = CONNECT_TIMEOUT_S,
    limits: RpcLimits = RpcLimits(),  # noqa: B008 - an immutable tuple
) -> Client:
    """Connect and shake hands.

    Args:
        world: Whose network.
        address: Where the server listens.
        peer: What to call ourselves.
        timeout_s: Deadline of connecting and of the server's hello together.
        limits: Bounds of our side.

    Raises:
        Disconnected: Nobody listens there, or the connection ended at once.
        DeadlineExceeded: No hello in time.
        VersionMismatch: No protocol version in common.
    """
    client = Client(peer=peer, limits=limits)
    where = address.path if isinstance(address, UnixAddress) else f"{address.host}:{address.port}"
    try:
        async with asyncio.timeout(timeout_s):
            await world.network.connect(address, lambda: client.connection)
            await client.wait_ready()
    except TimeoutError:
        client.connection.abort()
        raise DeadlineExceeded(f"connecting to {where}", timeout_s) from None
    except OSError as error:
        raise Disconnected(where, error.strerror or str(error), START_HINT) from error
    except (IsopodError, asyncio.CancelledError):
        client.connection.abort()
        raise
    return client
